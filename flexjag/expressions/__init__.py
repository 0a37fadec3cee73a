"""Masks and scores as straight-line programs: their functions are called once, on symbols instead of tensors.

A symbol stands for one number: a head, an index, a score. What operators and torch functions make of symbols is noted
as an instruction, so that a program can be printed in another language and differentiated. That takes 0.5 to 2 ms,
and it is plain Python on strings, which TorchDynamo can trace.
"""

from flexjag.expressions.derivative import derivative as derivative
from flexjag.expressions.derivative import times as times
from flexjag.expressions.objection import functions as functions
from flexjag.expressions.objection import has_functions as has_functions
from flexjag.expressions.objection import objection as objection
from flexjag.expressions.program import Instruction as Instruction
from flexjag.expressions.program import Program as Program
from flexjag.expressions.program import Symbol as Symbol
from flexjag.expressions.program import Value as Value
from flexjag.expressions.program import as_symbol as as_symbol
from flexjag.expressions.program import convert as convert
from flexjag.expressions.program import looks_up_pairs as looks_up_pairs
from flexjag.expressions.program import needed as needed
from flexjag.expressions.program import read as read
