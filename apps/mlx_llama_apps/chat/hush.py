"""The terminal while nobody reads the keyboard: what is typed waits, unseen, for the next prompt.

Owns its mode meanwhile, also when the program is stopped (Ctrl-Z) and goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

# A terminal then marks what is pasted, so that it stays one message; and no longer.
MARKS_PASTES, MARKS_NONE = b"\x1b[?2004h", b"\x1b[?2004l"


@dataclass(slots=True)
class _Drawing:
    """Whether something is being drawn, and whether Ctrl-Z came meanwhile."""

    is_under_way: bool = False
    is_stop_due: bool = False


_DRAWING = _Drawing()


@contextlib.contextmanager
def hushed(on_resume: Callable[[], None] = lambda: None) -> Iterator[int | None]:
    """Do not echo what is typed; keep it. Yield the terminal's descriptor; None if there is none.

    While the program is stopped the terminal is as it was before. on_resume: called by a signal
    handler when it goes on.
    """
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):
        yield None
        return
    quiet = termios.tcgetattr(descriptor)
    # Without NOFLSH the terminal would drop it with Ctrl-C; with ICANON, keep it for a line.
    quiet[3] = (quiet[3] & ~(termios.ECHO | termios.ICANON)) | termios.NOFLSH

    def leave() -> None:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
        _write(MARKS_NONE)

    def enter() -> None:
        if is_in_foreground(descriptor):
            termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
            _write(MARKS_PASTES)

    def go_on() -> None:
        enter()
        on_resume()

    enter()
    try:
        with _stoppable(leave, go_on):
            yield descriptor
    finally:
        leave()


def is_in_foreground(descriptor: int) -> bool:
    """Whether a terminal is this program's; in the background it is another's."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # a terminal that is nobody's
        return True


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Let Ctrl-Z wait until this was drawn: the rest would come when a shell has the terminal."""
    _DRAWING.is_under_way = True
    try:
        yield
    finally:
        _DRAWING.is_under_way = False
        if _DRAWING.is_stop_due:
            _DRAWING.is_stop_due = False
            signal.raise_signal(signal.SIGTSTP)


def _write(code: bytes) -> None:
    """Write a code past what Python buffers, as a signal handler must."""
    if os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stdout.fileno(), code)


@contextlib.contextmanager
def _stoppable(on_stop: Callable[[], None], on_resume: Callable[[], None]) -> Iterator[None]:
    """Call these before Ctrl-Z stops the program, and when it goes on."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        if _DRAWING.is_under_way:
            _DRAWING.is_stop_due = True
            return
        on_stop()
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_kill(threading.get_ident(), number)  # stops here
        signal.signal(number, stop)
        on_resume()  # where no shell could let it go on it has not stopped, and no SIGCONT comes

    def resume(number: int, frame: FrameType | None) -> None:
        del number, frame
        on_resume()

    found = [(signal.SIGTSTP, stop), (signal.SIGCONT, resume)]
    before = [(number, signal.signal(number, handler)) for number, handler in found]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
