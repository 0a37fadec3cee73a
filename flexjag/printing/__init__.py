"""Masks and scores as straight-line programs: their functions are called once, on symbols instead of tensors.

A symbol stands for one number: a head, an index, a score. What operators and torch functions make of symbols is noted
as an instruction, so that a program can be printed in another language and differentiated. That takes 0.5 to 2 ms,
and it is plain Python on strings, which TorchDynamo can trace.
"""

from flexjag.printing.derivative import derivative as derivative
from flexjag.printing.derivative import times as times
from flexjag.printing.program import Instruction as Instruction
from flexjag.printing.program import Program as Program
from flexjag.printing.program import Symbol as Symbol
from flexjag.printing.program import Value as Value
from flexjag.printing.program import as_symbol as as_symbol
from flexjag.printing.program import convert as convert
from flexjag.printing.program import looks_up_pairs as looks_up_pairs
from flexjag.printing.program import needed as needed
from flexjag.printing.program import read as read
from flexjag.printing.support import functions as functions
from flexjag.printing.support import has_functions as has_functions
from flexjag.printing.support import objection as objection
