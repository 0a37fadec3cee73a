"""Small C++ units for tests: printed functions run at every head, key and query, beside the torch printer's."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flexjag
from flexjag.printing import Cpp, Torch, Traced, emit_gradient, emit_mask, emit_score, emit_slopes

HEADERS = Path(flexjag.__file__).parent
FLAGS = ("-std=c++17", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unused-parameter")
REALS = {torch.float32: ("float", 16), torch.float64: ("double", 8)}
"""What ``real`` is, and the lanes of a vector."""

RUN = """
#define RUN(name)                                                                                                   \\
  extern "C" void run_##name(const int64_t* sizes, const real* s, const real* ds, const void* const* captures,      \\
                             const int64_t* numbers, int32_t* allowed, real* scored, real* by_score,                \\
                             double* const* totals) {                                                               \\
    for (int32_t h = 0; h < sizes[0]; h++)                                                                          \\
      for (int32_t kv = 0; kv < sizes[1]; kv++)                                                                     \\
        for (int32_t first = 0; first < sizes[2]; first += LANES) {                                                 \\
          int64_t at = (h * sizes[1] + kv) * sizes[2] + first;                                                      \\
          int32_t last = (int32_t)sizes[2] - 1, count = last + 1 - first < LANES ? last + 1 - first : LANES;        \\
          Rows rows{first, count == LANES, minimum(add(first, iota<int32_t>()), last)};                             \\
          Lanes<real> x = load_row(s + at, count), dx = load_row(ds + at, count);                                   \\
          Lanes<int32_t> inside = mask(h, rows, kv, captures, numbers);                                             \\
          for (int i = 0; i < count; i++) allowed[at + i] = inside[i];                                              \\
          store_row(scored + at, score(x, h, rows, kv, captures, numbers), count);                                  \\
          store_row(by_score + at, dscore(dx, x, h, rows, kv, captures, numbers), count);                           \\
          slopes(dx, x, h, rows, kv, captures, numbers, totals);                                                    \\
        }                                                                                                           \\
  }
"""


def compiler() -> str:
    """A C++ compiler; the test is skipped if there is none."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def unit(real: torch.dtype, source: str) -> str:
    """A translation unit that includes the headers."""
    name, lanes = REALS[real]
    return f"using real = {name};\n#define LANES {lanes}\n{Cpp().header}\nnamespace flexjag {{\n{source}\n}}\n"


def compiled(source: str, folder: Path, *flags: str) -> ctypes.CDLL:
    """The library of a unit, compiled without warnings."""
    file = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.cpp"
    library = file.with_suffix(".so")
    file.write_text(source)
    how = [*FLAGS, *WARNINGS, *flags, "-shared", "-fPIC", "-iquote", str(HEADERS)]
    made = subprocess.run([compiler(), *how, str(file), "-o", str(library)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[:4000]
    return ctypes.CDLL(str(library))


def printed(programs: Mapping[str, Traced]) -> str:
    """Source that runs each program."""
    parts, cpp = [RUN], Cpp()
    for name, traced in programs.items():
        made = (
            emit_mask(traced, cpp, "mask"),
            emit_score(traced, cpp, "score"),
            emit_gradient(traced, cpp, "dscore"),
            emit_slopes(traced, cpp, "slopes"),
        )
        parts.append("\n".join([f"namespace {name} {{", *made, f"RUN({name})", "}  // namespace", ""]))
    return "\n".join(parts)


@dataclass
class Result:
    """What the functions return at every head, key and query ``[H, K, T]``.

    Attributes:
        allowed: The mask.
        scored: The score.
        by_score: The gradient by `s`.
        totals: Gradients of the learned captures' memory, where entries of one address are one.
    """

    allowed: Tensor
    scored: Tensor
    by_score: Tensor
    totals: list[Tensor]


def _address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * (len(tensors) + 1))(*[x.data_ptr() for x in tensors])


def _offsets(x: Tensor) -> Tensor:
    """Each entry's distance from the first one in memory."""
    places = torch.zeros(x.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        places += (torch.arange(size) * stride).view(-1, *[1] * (x.ndim - 1 - dim))
    return places


def run(library: ctypes.CDLL, name: str, traced: Traced, s: Tensor, ds: Tensor) -> Result:
    """A program in C++, at ``s [H, K, T]``."""
    captures = [x.detach() for x in traced.captures]
    totals = [torch.zeros(int(_offsets(captures[i]).max()) + 1, dtype=torch.float64) for i in traced.learned]
    made = Result(torch.empty(s.shape, dtype=torch.int32), torch.empty_like(s), torch.empty_like(s), totals)
    sizes, numbers = torch.tensor(s.shape), torch.tensor(traced.numbers)
    getattr(library, f"run_{name}")(
        _address(sizes), _address(s), _address(ds), _addresses(captures), _address(numbers),
        _address(made.allowed), _address(made.scored), _address(made.by_score), _addresses(totals),
    )  # fmt: skip
    return made


def in_torch(traced: Traced, s: Tensor, ds: Tensor) -> Result:
    """A program as the torch printer writes it."""
    language, space, captures = Torch(), {}, [x.detach() for x in traced.captures]
    writers: dict[str, Callable[..., str]] = {
        "mask": emit_mask, "score": emit_score, "dscore": emit_gradient, "slopes": emit_slopes,
    }  # fmt: skip
    text = "\n".join([language.header, *[write(traced, language, name) for name, write in writers.items()]])
    exec(text, space)
    sizes = [torch.arange(n, dtype=torch.int32) for n in s.shape]
    at = (sizes[0][:, None, None], sizes[2], sizes[1][:, None], captures, traced.numbers)
    allowed = torch.as_tensor(space["mask"](*at)).expand(s.shape)  # without a mask, True
    made = Result(allowed, space["score"](s, *at), space["dscore"](ds, s, *at), [])
    offsets = {i: _offsets(traced.captures[i]).flatten() for i in traced.learned}
    totals = {i: torch.zeros(int(x.max()) + 1, dtype=torch.float64) for i, x in offsets.items()}
    for i, place, slope in space["slopes"](s, *at):
        grad, place = ds.double() * slope, torch.as_tensor(place).expand(s.shape)
        totals[i].index_add_(0, offsets[i][place.flatten()], grad.flatten())
    made.totals = list(totals.values())
    return made
