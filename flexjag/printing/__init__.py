"""Masks and scores as straight-line programs: their functions are called once, on symbols instead of tensors.

A symbol stands for one number: a head, an index, a score. Operators and torch functions on symbols are recorded
as instructions, so that a program can be differentiated and printed in other languages. That takes 0.5 to 2 ms, and
it is plain Python on strings, which TorchDynamo can trace.

    program, derivative             instructions, and those of a derivative
    torch_table, tracer             torch's functions on symbols, and the symbols themselves
    language, triton, torch, cpp    a class per language, with a word for each of ``program.OPERATIONS``
    emit                            a mask and a score to a program, and the program to functions of a language
    support                         reasons why a user's function cannot be printed
    runtime                         functions that code printed for torch calls

One more language is one more subclass of :class:`Language`.
"""

from flexjag.printing.cpp import Cpp as Cpp
from flexjag.printing.derivative import derivative as derivative
from flexjag.printing.emit import MaskFunction as MaskFunction
from flexjag.printing.emit import ScoreFunction as ScoreFunction
from flexjag.printing.emit import Traced as Traced
from flexjag.printing.emit import emit_gradient as emit_gradient
from flexjag.printing.emit import emit_mask as emit_mask
from flexjag.printing.emit import emit_score as emit_score
from flexjag.printing.emit import emit_slopes as emit_slopes
from flexjag.printing.emit import trace as trace
from flexjag.printing.language import Language as Language
from flexjag.printing.program import OPERATIONS as OPERATIONS
from flexjag.printing.program import Instruction as Instruction
from flexjag.printing.program import Program as Program
from flexjag.printing.program import Symbol as Symbol
from flexjag.printing.support import functions as functions
from flexjag.printing.support import has_functions as has_functions
from flexjag.printing.support import objection as objection
from flexjag.printing.torch import Torch as Torch
from flexjag.printing.tracer import new_program as new_program
from flexjag.printing.tracer import read as read
from flexjag.printing.triton import Triton as Triton
