"""Writing down what a later run may go on from; work that could not be kept is still work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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
