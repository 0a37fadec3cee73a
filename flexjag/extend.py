"""What authors of nodes need: base classes, fields and their axes, and the interpretations to register cases of."""

from flexjag.backends.reference import Segment as Segment
from flexjag.backends.reference import dense as dense
from flexjag.backends.reference import rescore as rescore
from flexjag.layout import Layout as Layout
from flexjag.masks import Mask as Mask
from flexjag.mods import RowTables as RowTables
from flexjag.mods import mask_case as mask_case
from flexjag.mods import score_case as score_case
from flexjag.nodes import along as along
from flexjag.nodes import node as node
from flexjag.scores import Score as Score
from flexjag.spans import Sandwich as Sandwich
from flexjag.spans import Spans as Spans
from flexjag.spans import sandwich as sandwich
