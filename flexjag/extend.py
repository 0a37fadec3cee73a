"""For authors of nodes and backends: base classes, field axes, interpretations to register cases of, records."""

from flexjag.algebra.masks import Mask as Mask
from flexjag.algebra.node import along as along
from flexjag.algebra.node import node as node
from flexjag.algebra.scores import Score as Score
from flexjag.backends.base import Backend as Backend
from flexjag.backends.base import Case as Case
from flexjag.backends.base import Promises as Promises
from flexjag.backends.choose import register as register
from flexjag.backends.choose import unregister as unregister
from flexjag.backends.reference import Segment as Segment
from flexjag.backends.reference import dense as dense
from flexjag.backends.reference import rescore as rescore
from flexjag.lowering.layout import Layout as Layout
from flexjag.lowering.mods import RowTables as RowTables
from flexjag.lowering.mods import mask_case as mask_case
from flexjag.lowering.mods import score_case as score_case
from flexjag.lowering.recipe import Recipe as Recipe
from flexjag.lowering.spans import Sandwich as Sandwich
from flexjag.lowering.spans import Spans as Spans
from flexjag.lowering.spans import sandwich as sandwich
