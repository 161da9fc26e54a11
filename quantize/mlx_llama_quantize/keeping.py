"""Writing down what a later run may go on from; work that could not be kept is still work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlx_llama.errors import is_ctrl_c

OnNote = Callable[[str], None]


@dataclass(slots=True)
class Keeper:
    """Where a piece of work writes down how far it is. on_note: told once that it cannot."""

    folder: Path
    on_note: OnNote | None = None
    _fails: bool = field(default=False, init=False)

    def keep(self, write: Callable[[], None]) -> None:
        """Call what writes; where the disk refuses, the work goes on without."""
        if self._fails:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            self._fails = True
            if self.on_note is not None:
                self.on_note(
                    f"{self.folder}: {error.strerror or error}; the work goes on, but a later run "
                    "could not take it up"
                )


@contextmanager
def told_when_stopped(what: str, path: Path | None) -> Iterator[None]:
    """Note with Ctrl-C that a file, or a folder with something in it, stays for a later run."""
    try:
        yield
    except BaseException as error:
        is_kept = path is not None and (any(path.iterdir()) if path.is_dir() else path.is_file())
        if is_kept and is_ctrl_c(error):
            error.add_note(f"{what} is kept in {path}")
        raise
