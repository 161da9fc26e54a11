"""The meter of the context, and what is said when a setting costs the cache."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from terminal import Start, Terminal, new_tokens


def meter(terminal: Terminal) -> tuple[int, int]:
    """Return what the bar under the prompt says: tokens used, tokens that there are."""

    def found() -> list[tuple[str, str]]:
        below = "\n".join(terminal.screen.display[terminal.screen.cursor.y :])
        return re.findall(r"^context (\d+) of (\d+)", below, re.MULTILINE)

    terminal.until(lambda: bool(found()), "meter")
    used, limit = found()[-1]
    return int(used), int(limit)


@pytest.mark.parametrize("kind", ["chat", "base"])
@pytest.mark.parametrize("change", ["kv_bits 32", "threads 1", "prefill_chunk 9"])
def test_a_setting_that_empties_the_cache_says_so_and_the_meter_stays(
    chat_model: Path, base_model: Path, start: Start, change: str, kind: str
) -> None:
    """The meter fell to 0 without a word."""
    model = {"chat": chat_model, "base": base_model}[kind]
    terminal = start(model, "--max-tokens", 5, "--ignore-eos", "--seed", 1, columns=100)
    terminal.enter(f"/set {change}")
    assert "emptied" not in terminal.text  # nothing was said yet
    terminal.enter("hello")
    before, _ = meter(terminal)
    terminal.enter(f"/set {change.split()[0]} default")
    after, _ = meter(terminal)
    assert 0 <= after - before <= 1  # the last token of an answer is read with what follows
    told = f"the cache was emptied: the next answer reads {after} tokens of the conversation again"
    terminal.expect(told)
    terminal.enter("the")
    assert new_tokens(terminal)[-1] > after


def test_a_context_that_has_become_too_short_is_told(chat_model: Path, start: Start) -> None:
    terminal = start(chat_model, "--max-tokens", 5, columns=100)
    terminal.enter("hello")
    terminal.enter("/set context 12")
    terminal.expect("tokens of the conversation again, and the context holds 12")
    assert meter(terminal)[1] == 12
