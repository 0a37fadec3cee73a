"""flexjag: a compiler frontend on FlexAttention for jagged (variable-length, unpadded) batches."""

from flexjag import errors
from flexjag.attention import attention, merge
from flexjag.jagged import Jagged
from flexjag.masks import (
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
from flexjag.normalizers import Normalizer, Softmax
from flexjag.plan import Plan, plan
from flexjag.scores import Alibi, RelativeBias, Score, ScoreMod, SoftCap

__version__ = "0.1.0"

__all__ = [
    "Alibi",
    "Causal",
    "Chunked",
    "Dense",
    "Full",
    "GlobalTokens",
    "Jagged",
    "Mask",
    "MaskMod",
    "Normalizer",
    "PerHead",
    "Plan",
    "Prefix",
    "RelativeBias",
    "Rows",
    "SameGroup",
    "Score",
    "ScoreMod",
    "SoftCap",
    "Softmax",
    "Window",
    "attention",
    "errors",
    "merge",
    "plan",
]
