"""flexjag: a compiler frontend on FlexAttention for jagged (variable-length, unpadded) batches."""

from flexjag import data, errors, extend, nn, ops
from flexjag.algebra import positions
from flexjag.algebra.masks import (
    Causal,
    Chunked,
    Dense,
    Full,
    GlobalTokens,
    Mask,
    MaskMod,
    PerHead,
    Prefix,
    Rows,
    SameGroup,
    Window,
)
from flexjag.algebra.normalizers import GELU, Identity, Normalizer, Pointwise, Sigmoid, SiLU, Softmax, StickBreaking
from flexjag.algebra.positions import rope
from flexjag.algebra.scores import (
    Alibi,
    BucketedBias,
    DenseBias,
    RelativeBias,
    Score,
    ScoreMod,
    SoftCap,
    T5Bias,
    TimeBias,
)
from flexjag.algebra.tokens import Keys, Queries
from flexjag.api.attention import attention
from flexjag.api.cache import KVCache
from flexjag.api.merge import merge
from flexjag.api.plan import Plan, plan
from flexjag.api.recompiles import explain_recompiles
from flexjag.backends import operators as _operators  # noqa: F401  # registers them
from flexjag.codegen.compile import compile_for
from flexjag.jagged import Jagged

__version__ = "0.1.0"

__all__ = [
    "GELU",
    "Alibi",
    "BucketedBias",
    "Causal",
    "Chunked",
    "Dense",
    "DenseBias",
    "Full",
    "GlobalTokens",
    "Identity",
    "Jagged",
    "KVCache",
    "Keys",
    "Mask",
    "MaskMod",
    "Normalizer",
    "PerHead",
    "Plan",
    "Pointwise",
    "Prefix",
    "Queries",
    "RelativeBias",
    "Rows",
    "SameGroup",
    "Score",
    "ScoreMod",
    "SiLU",
    "Sigmoid",
    "SoftCap",
    "Softmax",
    "StickBreaking",
    "T5Bias",
    "TimeBias",
    "Window",
    "attention",
    "compile_for",
    "data",
    "errors",
    "explain_recompiles",
    "extend",
    "merge",
    "nn",
    "ops",
    "plan",
    "positions",
    "rope",
]
