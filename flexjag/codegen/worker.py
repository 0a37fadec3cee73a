"""Worker processes: they isolate jobs, so that patches to PyTorch and Triton never reach the caller's process.

A job is a function of :mod:`flexjag.codegen.jobs`, called by name. Its result is returned through a dedicated pipe, so
that output printed by the process cannot mix with it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Self

from flexjag.errors import CodegenError

TIMEOUT_S = 600.0

_START = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer);"
    "from flexjag.codegen.worker import serve; serve(int(sys.argv[1]))"
)


class WorkerTraceback(Exception):
    """The traceback or output of a failed worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Worker:
    """A process that runs jobs one after another.

    Args:
        interpret: Run Triton kernels in Triton's interpreter there; they can then not be compiled.

    >>> with Worker() as worker:
    ...     worker.call("double", 21)
    42
    """

    def __init__(self, interpret: bool = False) -> None:
        self.interpret = interpret

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Self:
        """Start the process, as entering a ``with`` block does, and return the worker."""
        self.lock = threading.Lock()
        self.place = tempfile.TemporaryDirectory(prefix="flexjag-")
        here = Path(self.place.name)
        self.log = (here / "stderr").open("w+b")
        self.answers, theirs = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs)],
            env=_environment(here, self.interpret),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.log,
            pass_fds=(theirs,),
            start_new_session=True,
        )
        os.close(theirs)
        self._send([p or os.getcwd() for p in sys.path])
        return self

    def close(self) -> None:
        """Kill the process and its children, such as an assembler."""
        self._kill()
        self.process.communicate()
        os.close(self.answers)
        self.log.close()
        self.place.cleanup()

    def call(self, job: str, *args: Any, timeout: float = TIMEOUT_S) -> Any:
        """Run one job and return its result.

        Args:
            job: The name of a function of :mod:`flexjag.codegen.jobs`.
            args: Its arguments, picklable.
            timeout: Seconds after which the worker is killed.

        Raises:
            CodegenError: If the job raises, the worker dies or `timeout` expires; the worker's traceback is the cause.
        """
        with self.lock:
            try:
                self._send((job, args))
                answer = self._receive(job, timeout)
            except BaseException:  # interrupted: a late answer must not be read as the next job's
                self._kill()
                raise
        if answer is None:
            code = self.process.wait()
            fate = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.log.seek(0)
            told = self.log.read()[-4000:].decode(errors="replace")
            raise CodegenError(f"worker: {job} died ({fate})") from WorkerTraceback(told)
        good, value = pickle.loads(answer)
        if good:
            return value
        reason, told = value
        raise CodegenError(f"worker: {job} failed: {reason}") from WorkerTraceback(told)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        message = pickle.dumps(value)
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # the worker is dead: _receive reports it

    def _receive(self, job: str, timeout: float) -> bytes | None:
        """Receive one answer, an 8-byte length and that many bytes; None if the worker has died."""
        until = time.monotonic() + timeout
        found = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            while len(found) < 8 or len(found) < 8 + int.from_bytes(found[:8], "little"):
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise CodegenError(f"worker: {job} took longer than timeout={timeout:g} s and was stopped")
                part = os.read(self.answers, 2**20)
                if not part:
                    return None
                found += part
        return found[8:]


def call(job: str, *args: Any, interpret: bool = False, timeout: float = TIMEOUT_S) -> Any:
    """Run one job in a new worker; arguments as for :class:`Worker` and :meth:`Worker.call`."""
    with Worker(interpret) as worker:
        return worker.call(job, *args, timeout=timeout)


def _environment(here: Path, interpret: bool) -> dict[str, str]:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1" if interpret else "0"}
    caches = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    places = {"TORCHINDUCTOR_CACHE_DIR": str(here / "inductor"), "TRITON_CACHE_DIR": str(here / "triton")}
    settings = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE", "TORCH_LOGS", "TRITON_", "DISABLE_PTXAS_OPT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(settings)}  # settings are not part of the cache key
    return {**kept, **hidden, **caches, **places}


def serve(answers: int) -> None:
    """Main loop of the worker process: read a job, run it and answer, until the input ends."""
    import ctypes

    from flexjag.codegen import jobs

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: be killed when the caller dies
    while True:
        try:
            name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, getattr(jobs, name)(*args)))
        except Exception as reason:
            first = (str(reason) or type(reason).__name__).strip().split("\n")[0]
            answer = pickle.dumps((False, (f"{type(reason).__name__}: {first}", traceback.format_exc())))
        with os.fdopen(os.dup(answers), "wb") as pipe:
            pipe.write(len(answer).to_bytes(8, "little") + answer)
