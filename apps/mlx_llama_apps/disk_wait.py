"""How long a process waited for the disk and for nothing else, by looking at its threads."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Self

SECONDS_BETWEEN_LOOKS = 0.05
LEAST_SECONDS = 2.0  # of work of which something can be said
WAITING, RUNNING = "D", "R"  # as in proc(5); a thread that waits for a processor runs, too


class DiskWait:
    """Looks now and then, while its block runs, at what the threads wait for; on Linux alone.

    pid: of whose threads; its own by default.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._threads = Path("/proc") / ("self" if pid is None else str(pid)) / "task"
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look, name="disk-wait", daemon=True)
        self._n_looks = self._n_waiting = 0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._started = monotonic()
        if self._threads.is_dir():
            self._looking.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self.seconds = monotonic() - self._started

    @property
    def is_the_limit(self) -> bool:
        """Whether most of the time some thread waited for the disk and none had work to do."""
        return self.seconds >= LEAST_SECONDS and 2 * self._n_waiting > self._n_looks

    def _look(self) -> None:
        own = str(threading.get_native_id())
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            states: set[str] = set()
            with contextlib.suppress(OSError):  # a thread may end meanwhile
                for thread in self._threads.iterdir():
                    if thread.name != own:
                        states.add(_state(thread))
            self._n_looks += 1
            self._n_waiting += WAITING in states and RUNNING not in states


def _state(thread: Path) -> str:
    """Return the letter behind the name, which may hold anything."""
    return (thread / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2][1]
