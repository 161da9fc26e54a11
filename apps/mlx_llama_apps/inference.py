"""The one thread that loads the model and owns every array; commands talk to it by queues.

A running evaluation cannot be interrupted, so whoever must stay responsive waits here instead: on
Ctrl-C the caller goes on at once, and the thread gives up at its next slice.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from mlx_llama import blas
from mlx_llama.options import ContextOptions, LoadOptions
from mlx_llama_apps.progress import remark
from mlx_llama_apps.terminal import StatusLine

NOTICEABLE_BYTES = 64 << 20  # weights of a model that is slow enough to say why
SLOWER = "4-bit models decode 22 to 42 times slower; `make kernels` builds them"
SECOND_BEST = "where that cannot be, `apt install libopenblas0` makes prompts faster"

if TYPE_CHECKING:
    from mlx_llama import Llama, Step

PATIENCE_S = 0.1
GRACE_S = 0.04  # what an interrupted answer may take to end of itself

T = TypeVar("T")
S = TypeVar("S")
Steps = Callable[["S", threading.Event], "Iterator[Step]"]


@dataclass(frozen=True, slots=True)
class _End:
    """Closes a job's results: its value, or what it raised."""

    value: object = None
    error: BaseException | None = None


class _Interrupted:
    """Stands among a job's results where its reader was interrupted."""


@dataclass(slots=True)
class _Job:
    """Work for the thread; whatever `work` yields goes into `results`, then an `_End`."""

    work: Callable[[], Iterator[object]]
    cancel: threading.Event = field(default_factory=threading.Event)
    results: queue.SimpleQueue[object] = field(default_factory=queue.SimpleQueue)
    is_call: bool = False  # given up by its caller before it began, it must not happen later


class Inference(Generic[S]):
    """Runs a state of type S (a model, a conversation) on a thread of its own.

    A context manager. make: builds the state on the thread when the context is entered, and what
    it raises is raised there.
    """

    def __init__(self, make: Callable[[], S]) -> None:
        self._make = make
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None ends the thread
        self._state: S
        self._read: _Job | None = None  # whose results the caller waits for
        self._is_interrupted = False
        # A daemon: a slice in flight must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread and wait until the state is made."""
        self._thread.start()

        def make() -> Iterator[object]:
            self._state = self._make()
            yield from ()

        try:
            self._wait(self._submit(make))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        """Ask the thread to end, and give it a moment: a slice in flight may take longer."""
        self._jobs.put(None)
        self._thread.join(PATIENCE_S)

    def listen(self) -> None:
        """Forget earlier interrupts: what comes from here on belongs to what is asked next."""
        self._is_interrupted = False

    def interrupt(self) -> None:
        """End what the caller waits for, or will wait for next. May be called by a signal handler.

        An answer is cancelled and its reader goes on within GRACE_S; a call raises
        KeyboardInterrupt.
        """
        self._is_interrupted = True
        if (job := self._read) is not None:
            job.cancel.set()
            job.results.put(_Interrupted())

    def call(self, function: Callable[[S], T]) -> T:
        """Run a function on the thread and return its result, after the jobs before it."""

        def work() -> Iterator[object]:
            yield function(self._state)

        return self._wait(self._submit(work))  # pyright: ignore[reportReturnType]

    def stream(self, function: Steps[S]) -> Iterator[Step]:
        """Yield the steps that a function makes on the thread.

        Closing the iterator early (Ctrl-C, too) returns at once; the thread stops at its next
        slice, and later jobs wait for that. After `interrupt` it yields what still comes at once.
        """

        def work() -> Iterator[object]:
            yield from function(self._state, job.cancel)

        job = _Job(work)
        self._start(job)
        until: float | None = None
        try:
            while not isinstance(result := job.results.get(timeout=_left(until)), _End):
                if isinstance(result, _Interrupted):
                    until = monotonic() + GRACE_S if until is None else until
                else:
                    yield result  # pyright: ignore[reportReturnType]
            if result.error is not None:
                raise result.error
        except queue.Empty:  # interrupted, and a slice is still in flight
            pass
        finally:
            self._read = None
            job.cancel.set()

    def _submit(self, work: Callable[[], Iterator[object]]) -> _Job:
        job = _Job(work, is_call=True)
        self._start(job)
        return job

    def _start(self, job: _Job) -> None:
        self._read = job
        if self._is_interrupted:
            self.interrupt()
        self._jobs.put(job)

    def _wait(self, job: _Job) -> object:
        value: object = None
        try:
            while not isinstance(result := job.results.get(), _End):
                if isinstance(result, _Interrupted):
                    raise KeyboardInterrupt
                value = result
        finally:
            self._read = None
        if result.error is not None:
            raise result.error
        return value

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            end = _End()
            if job.is_call and job.cancel.is_set():
                continue
            try:
                for result in job.work():
                    job.results.put(result)
            except BaseException as error:
                end = _End(error=error)
            job.results.put(end)


def slower(taken: str | None) -> str:
    """Say what is lost without the kernels, and what helps; taken: the BLAS in their place."""
    again = " again" if blas.are_kernels_installed() else ""
    second = f"; {SECOND_BEST}" if taken is None and blas.would_be_taken() else ""
    return f"{SLOWER}{again} (docs/cpu.md){second}"


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - monotonic())


def processors() -> int:
    """Return how many processors this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def model_loader(
    path: Path,
    load_options: LoadOptions,
    context_options: ContextOptions,
    status: StatusLine,
    *,
    needed: int | None = None,
    on_open: Callable[[], None] | None = None,
) -> Callable[[], Llama]:
    """Return what loads a model on the inference thread, telling the layers done.

    What will not fit into memory is refused before the first weight is read. needed: tokens that
    prompt and answer take, where they are known. on_open is called before the first weight is read.
    """

    threads = load_options.threads or 0
    if threads > (n_processors := processors()):
        found = "1 processor" if n_processors == 1 else f"{n_processors} processors"
        remark(f"--threads {threads}: more than the {found} here, and slower")

    def load() -> Llama:
        from mlx_llama import ops
        from mlx_llama.context import plan_context
        from mlx_llama.loading import load, open_model_directory

        def on_block(done: int, total: int) -> None:
            status.show(f"loading {path.name}: layer {done} of {total}")

        directory = open_model_directory(path)
        is_large = directory.weight_bytes >= NOTICEABLE_BYTES
        if is_large and directory.native_formats and (reason := ops.slow_reason()) is not None:
            remark(f"without native CPU kernels ({reason}): {slower(ops.blas_name())}")
        dtype = directory.dtype_with(load_options)
        plan_context(
            context_options,
            directory.config_with(load_options),
            dtype=dtype,
            weights=directory.loaded_bytes(dtype),
            needed=needed,
        ).require_memory()
        if on_open is not None:
            on_open()
        return load(directory, **asdict(load_options), on_block=on_block)

    return load
