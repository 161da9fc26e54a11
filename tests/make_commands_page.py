"""Write docs/commands.md from the commands themselves; a test compares the two."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
HEAD = """# Commands

Made by `python tests/make_commands_page.py` from the commands' own help. Exit codes: 0, 1 for an
error, 2 for wrong usage, 130 after Ctrl-C. `--debug` shows a traceback with an error.

MODEL is a folder, or a name in the models folder: `data/models` under `MLX_LLAMA_HOME` when that is
set, else `models` in the platform's folder for a program's data
(`~/Library/Application Support/mlx-llama` on macOS, `~/.local/share/mlx-llama` on Linux), or
`bundled`, the small guide that ships with the program, which is converted on first use. A prompt
or a chat that comes through a pipe is one message, whatever its lines.
"""


def page() -> str:
    """Return the text of docs/commands.md."""
    from mlx_llama_apps.main import COMMANDS, arguments_of

    parts = [HEAD]
    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").strip().splitlines()[0]
        parts.append(f"\n## mlx-llama {name}\n\n{summary}\n\n| option | |\n|---|---|\n")
        for argument in arguments_of(name, parse_docstring=True):
            names = ", ".join(f"`{n}`" for n in argument.names)
            about = " ".join((argument.parameter.help or "").split())
            parts.append(f"| {names} | {about} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
