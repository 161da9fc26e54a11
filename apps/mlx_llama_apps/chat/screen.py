"""All that the chat draws and reads: prompt, streamed answer, remarks, statistics."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from mlx_llama_apps.terminal import read_stdin, write_text

if TYPE_CHECKING:
    from mlx_llama import Stats

REASONS = {
    "length": "ended after --max-tokens",
    "context": "the context is full; /clear begins anew, --on-full slide would go on",
    "cancelled": "stopped",
    "stop": "ended at a stop text",
}


class Screen:
    """A terminal, or a pipe, which gets the answers alone."""

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._console = Console(highlight=False, soft_wrap=False)
        self._session = None
        self._ends_line = True

    def read(self) -> str | None:
        """Read what the user types; None at the end of input. Ctrl-C drops the line.

        A pipe is one message, whatever its lines.
        """
        if not self.is_interactive:
            return read_stdin() or None
        if self._session is None:
            from prompt_toolkit import PromptSession

            self._session = PromptSession()
        try:
            return self._session.prompt("> ")
        except EOFError:
            return None

    def say(self, text: str) -> None:
        """Print a remark of the program's own."""
        self._console.print(Text(text, style="dim"))

    def write(self, text: str) -> None:
        """Print a part of the answer as it comes."""
        if text:
            write_text(text, sys.stdout)
            self._ends_line = text.endswith("\n")

    def end_answer(self, reason: str | None, stats: Stats | None) -> None:
        """Close the answer; at a terminal, say what it cost and why it stopped."""
        if not self._ends_line:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._ends_line = True
        if self.is_interactive:
            parts = [REASONS[reason]] if reason in REASONS else []
            if stats is not None:
                parts += _stats_parts(stats)
                if stats.forgotten_tokens:
                    parts.append(f"{stats.forgotten_tokens} oldest tokens dropped")
            if parts:
                self.say(" · ".join(parts))


def _stats_parts(stats: Stats) -> list[str]:
    new = stats.prompt_tokens - stats.cached_tokens
    return [
        f"{new} new prompt tokens at {stats.prompt_tokens_per_s:.0f}/s",
        f"{stats.answer_tokens} answer tokens at {stats.answer_tokens_per_s:.1f}/s",
        f"first after {stats.time_to_first_token_s:.2f} s",
        f"context {stats.context_tokens} of {stats.context_limit}",
    ]
