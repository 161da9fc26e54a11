"""Run the chat at a pseudo-terminal; write what the screen showed into docs/chat.md and chat.svg.

    python tests/make_chat_page.py MODEL [COLUMNS]

MODEL is stories260K, converted with --no-quantize. The transcripts stand between markers
`<!-- NAME -->` and `<!-- end -->`; the picture is drawn by rich from the cells of the screen.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

sys.path.insert(0, str(Path(__file__).parent / "apps" / "chat"))
from terminal import Terminal

DOCS = Path(__file__).resolve().parents[1] / "docs"
COLUMNS = 76
OPTIONS = ("--temperature", 0, "--max-tokens", 45)


def turning_back(terminal: Terminal) -> None:
    terminal.enter("Once upon a time")
    terminal.enter("/continue")
    terminal.enter("/undo")
    terminal.enter("The dog")


def interrupting(terminal: Terminal) -> None:
    terminal.send("/set max_tokens default\r")
    terminal.prompt()
    terminal.send("Lily went to the park\r")
    terminal.until(lambda: "with" in terminal.flat.partition("the park")[2], "answer")
    terminal.interrupt()
    terminal.prompt()
    terminal.interrupt()
    terminal.expect("Ctrl-C again")


def settings(terminal: Terminal) -> None:
    terminal.enter("/set temperature 0.8")
    terminal.enter("/set temperature")
    terminal.enter("/set temprature 1")
    terminal.enter("/set")


def resuming(terminal: Terminal) -> None:
    terminal.enter("/stats")
    terminal.enter("/chats")


SCENES: dict[str, tuple[tuple[object, ...], Callable[[Terminal], None]]] = {
    "turning back": (OPTIONS, turning_back),
    "interrupting": (OPTIONS, interrupting),
    "settings": (("--top-p", 0.8), settings),
    "resuming": (("--resume", *OPTIONS), resuming),
}


def picture(terminal: Terminal) -> str:
    """Return the screen as SVG, in the terminal's own colours and without foreign fonts."""
    screen = terminal.screen
    console = Console(record=True, width=screen.columns, file=Path("/dev/null").open("w"))  # noqa: SIM115
    last = max((y for y in range(screen.lines) if screen.display[y].strip()), default=0)
    for y in range(last + 1):
        line = Text()
        for x in range(screen.columns):
            cell = screen.buffer[y][x]
            colour = None if cell.fg == "default" else cell.fg
            line.append(cell.data, Style(color=colour, bold=cell.bold, italic=cell.italics))
        console.print(line, no_wrap=True, overflow="crop")
    svg = console.export_svg(title="mlx-llama chat", theme=MONOKAI, unique_id="chat")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def transcript(terminal: Terminal) -> str:
    lines = [line.rstrip() for line in re.sub(r"\n{3,}", "\n", terminal.text).split("\n")]
    return "\n".join(f"    {line}".rstrip() for line in lines).strip("\n")


def main() -> None:
    model = Path(sys.argv[1]).resolve()
    page = (DOCS / "chat.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "data" / "models").mkdir(parents=True)
        (home / "data" / "models" / "stories").symlink_to(model)
        for name, (options, play) in SCENES.items():
            given = options if "--resume" in options else ("stories", *options)
            terminal = Terminal(home, *given, columns=COLUMNS, lines=30)
            terminal.prompt()
            play(terminal)
            if name == "turning back":
                (DOCS / "chat.svg").write_text(picture(terminal), encoding="utf-8")
            command = "    $ mlx-llama chat " + " ".join(map(str, given))
            shown = f"<!-- {name} -->\n\n{command}\n{transcript(terminal)}\n\n<!-- end -->"
            place = re.compile(rf"<!-- {name} -->.*?<!-- end -->", re.DOTALL)
            assert place.search(page), f"docs/chat.md has no place for {name!r}"
            page = place.sub(lambda _, shown=shown: shown, page)
            terminal.send("\x15\x04")
            terminal.ended()
    (DOCS / "chat.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
