"""What takes back, asks again and offers again."""

from __future__ import annotations

from pathlib import Path

from terminal import Start, said, saved


def test_dropped_or_refused_edit_leaves_the_question(
    home: Path, chat_model: Path, start: Start
) -> None:
    """Once whatever came next took its place, and a refused edit was put behind it."""
    terminal = start(chat_model, "--max-tokens", 3, "--context", 120)
    terminal.enter("hello")
    terminal.send("/edit\r")
    terminal.expect("changes the last question")
    terminal.send("\x03\x03")  # the draft is dropped
    terminal.prompt()
    terminal.enter("world")
    assert said(home)[::2] == ["hello", "world"]
    terminal.send("/edit\r")
    terminal.expect("> world", times=2)
    terminal.send("\x15the\r")  # emptied, and something else typed
    terminal.expect("peak", times=3)
    assert said(home)[::2] == ["hello", "world", "the"]
    terminal.send("/edit\r")
    terminal.expect("> the", times=2)
    terminal.send(" thing" * 60 + "\r")
    terminal.expect("the prompt has")
    terminal.send("\r")  # left as it is, and offered again
    terminal.expect("changes the last question")
    assert said(home)[::2] == ["hello", "world", "the"]
    terminal.send("\x7f" * 360 + "\r")
    terminal.expect("peak", times=4)
    assert said(home)[::2] == ["hello", "world", "the"]
    assert terminal.leave() == 0


def test_draft_of_a_message_with_a_slash_is_offered_as_it_is_typed(
    home: Path, chat_model: Path, start: Start
) -> None:
    terminal = start(chat_model, "--max-tokens", 3)
    terminal.enter("//stats is a word")
    assert said(home)[0] == "/stats is a word"
    terminal.send("/edit\r")
    terminal.expect("> //stats is a word", times=2)
    terminal.send(" too\r")
    terminal.expect("peak", times=2)
    terminal.prompt()
    assert said(home)[::2] == ["/stats is a word too"]
    assert terminal.leave() == 0


def test_retry_of_a_fixed_seed_takes_others_and_the_next_question_the_fixed_one(
    home: Path, chat_model: Path, start: Start
) -> None:
    from mlx_llama_apps.chat.store import read_chat

    terminal = start(chat_model, "--max-tokens", 6, "--ignore-eos", "--seed", 7, "--temperature", 2)
    answers = []
    for wish in ("hello", "/retry", "/retry", "/undo", "hello"):
        terminal.enter(wish)
        if wish != "/undo":
            answers.append(read_chat(saved(home)[0]).messages[-1])
    assert [message.seed for message in answers] == [7, 8, 9, 7]
    assert len({message.token_ids for message in answers}) == 3
    assert answers[0] == answers[-1]
    terminal.enter("world")
    assert read_chat(saved(home)[0]).messages[-1].seed == 7
    assert terminal.leave() == 0
