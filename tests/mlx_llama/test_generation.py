from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_llama
from mlx_llama import Llama, ops
from mlx_llama.errors import ContextOverflowError, OptionError
from mlx_llama.generation import Step, StopText
from mlx_llama.model import LlamaModel


@pytest.fixture(scope="module")
def llama(base_model: Path) -> Llama:
    return mlx_llama.load(base_model)


def greedy_by_full_passes(llama: Llama, ids: list[int], count: int) -> list[int]:
    """Decode without a cache: the whole text again for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(np.argmax(np.array(llama.logits(ids, positions=[-1])[0]))))
    return ids[-count:]


def script(llama: Llama, monkeypatch: pytest.MonkeyPatch, texts: list[int]) -> None:
    """Make the model answer with these tokens, whatever it is asked."""
    answer = iter(texts)

    def logits(_: LlamaModel, hidden: mx.array) -> mx.array:
        token = next(answer, 0)
        row = mx.zeros(llama.config.vocab_size).at[token].add(50.0)
        return mx.broadcast_to(row, (*hidden.shape[:-1], llama.config.vocab_size))

    monkeypatch.setattr(LlamaModel, "logits", logits)
    monkeypatch.setattr(LlamaModel, "_pass_token", lambda *_: None)


def pieces(llama: Llama, *texts: bytes) -> list[int]:
    by_bytes = {
        llama.tokenizer.token_bytes(i): i for i in reversed(range(3, llama.config.vocab_size))
    }
    return [by_bytes[text] for text in texts]


def test_cached_decoding_equals_full_passes(llama: Llama) -> None:
    ids = llama.tokenizer.encode("hello the thing", bos=True)
    steps = list(llama.stream(ids, temperature=0, max_tokens=24, ignore_eos=True))
    assert [s.token_id for s in steps] == greedy_by_full_passes(llama, ids, 24)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_prefill_in_slices_gives_the_same_answer(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    whole = llama.generate("hello the thing in the", temperature=0, max_tokens=12, ignore_eos=True)
    monkeypatch.setattr(ops, "prefill_chunk", lambda: chunk)
    seen: list[tuple[int, int]] = []
    sliced = llama.generate(
        "hello the thing in the",
        temperature=0,
        max_tokens=12,
        ignore_eos=True,
        on_prefill=lambda done, total: seen.append((done, total)),
    )
    assert sliced == whole
    total = seen[-1][1]
    assert [done for done, _ in seen] == [*range(chunk, total, chunk), total]


def test_last_step_alone_has_reason_and_stats(llama: Llama) -> None:
    steps = list(llama.stream("hello", max_tokens=5, seed=1, ignore_eos=True))
    assert [s.finish_reason for s in steps] == [None] * 4 + ["length"]
    assert [s.stats is None for s in steps] == [True] * 4 + [False]
    stats = steps[-1].stats
    assert stats is not None
    assert (stats.answer_tokens, stats.seed, stats.cached_tokens) == (5, 1, 0)
    assert stats.prompt_tokens == len(llama.tokenizer.encode("hello", bos=True))
    assert stats.elapsed_s >= stats.time_to_first_token_s > 0
    assert stats.peak_memory_bytes > 0


def test_end_of_text_ends_the_answer_and_is_not_printed(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = [*pieces(llama, b" hello"), llama.tokenizer.eos_id]
    script(llama, monkeypatch, answer)
    steps = list(llama.stream("the", temperature=0))
    assert [s.token_id for s in steps] == answer
    assert "".join(s.text for s in steps) == " hello"
    assert steps[-1].finish_reason == "eos"
    script(llama, monkeypatch, answer)
    longer = list(llama.stream("the", temperature=0, ignore_eos=True, max_tokens=4))
    assert len(longer) == 4


@pytest.mark.parametrize(
    ("texts", "stop", "shown"),
    [
        ([b" the", b" hello", b"ing"], ["hello"], " the "),
        ([b" the", b" hello", b"ing"], ["lloi"], " the he"),  # across a token's border
        ([b" the", b" hello", b"ing"], ["zzz"], " the helloing"),
        ([b"he", b"ll", b"he"], ["hellx", "ellh"], "h"),
        ([b"aa", b"aa"], ["aaaaa"], "aaaa"),  # held back to the end, then shown
        ([b" the", b" hello"], [" the"], ""),
    ],
)
def test_stop_texts_match_text_and_are_not_printed(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, texts: list[bytes], stop: list[str], shown: str
) -> None:
    script(llama, monkeypatch, [*pieces(llama, *texts), llama.tokenizer.eos_id])
    steps = list(llama.stream("in", temperature=0, stop=stop))
    assert "".join(s.text for s in steps) == shown
    is_met = any(s in b"".join(texts).decode() for s in stop)
    assert steps[-1].finish_reason == ("stop" if is_met else "eos")


def test_stop_text_hidden_in_what_was_held_back_is_found() -> None:
    held = StopText(["abcd", "bc"])
    assert held.add("ab") == ("", False)
    assert held.add("c") == ("a", True)


def test_half_a_character_is_never_shown(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    emoji = "😀".encode()
    ids = pieces(llama, *(bytes([b]) for b in emoji))
    script(llama, monkeypatch, [*ids, *ids[:2], llama.tokenizer.eos_id])
    texts = [s.text for s in llama.stream("in", temperature=0)]
    assert texts[:4] == ["", "", "", "😀"]
    assert "".join(texts[4:]) == "\ufffd\ufffd"  # SentencePiece shows each broken byte


def test_context_ends_the_answer(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(llama, "config", replace(llama.config, max_context=10))
    ids = [1, 5, 6, 7]
    steps = list(llama.stream(ids, ignore_eos=True, temperature=0))
    assert len(steps) == 6
    assert steps[-1].finish_reason == "context"
    asked = list(llama.stream(ids, ignore_eos=True, temperature=0, max_tokens=6))
    assert asked[-1].finish_reason == "length"
    with pytest.raises(ContextOverflowError, match="10 tokens, the context holds 10"):
        list(llama.stream([1] * 10))


def test_cancelling_ends_with_a_step_that_says_so(llama: Llama) -> None:
    cancel = threading.Event()
    steps: list[Step] = []
    for step in llama.stream("hello", ignore_eos=True, cancel=cancel):
        steps.append(step)
        if len(steps) == 3:
            cancel.set()
    assert len(steps) == 4
    assert steps[-1].finish_reason == "cancelled"
    assert steps[-1].token_id is None


def test_cancelling_in_prefill_keeps_whole_slices(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "prefill_chunk", lambda: 4)
    cancel = threading.Event()
    session = llama.session()
    ids = llama.tokenizer.encode("hello the thing in the end", bos=True)

    def on_prefill(done: int, total: int) -> None:
        if done >= 8:
            cancel.set()

    steps = list(session.complete(ids, on_prefill=on_prefill, cancel=cancel))
    assert [s.finish_reason for s in steps] == ["cancelled"]
    assert session.tokens == ids[:8]
    again = list(session.complete(ids, temperature=0, max_tokens=6, ignore_eos=True))
    assert again[-1].stats is not None
    assert again[-1].stats.cached_tokens == 8
    assert [s.token_id for s in again] == greedy_by_full_passes(llama, ids, 6)


@pytest.mark.parametrize("nothing", [{"max_tokens": 0}, {"timeout": 0.0}])
def test_no_answer_asked_for_is_refused(llama: Llama, nothing: dict[str, Any]) -> None:
    """Once it was an empty answer, which nobody means."""
    with pytest.raises(OptionError, match="found 0"):
        list(llama.stream("hello", **nothing))


def test_prompt_rate_counts_what_was_computed(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "prefill_chunk", lambda: 2)
    cancel = threading.Event()
    steps = llama.stream([1, 5, 6, 7, 8, 9], cancel=cancel, on_prefill=lambda *_: cancel.set())
    (step,) = steps
    assert step.stats is not None
    computed = step.stats.prompt_tokens_per_s * step.stats.time_to_first_token_s
    assert computed == pytest.approx(2)


def test_logprobs_are_those_of_the_logits(llama: Llama) -> None:
    ids = llama.tokenizer.encode("hello", bos=True)
    (step,) = llama.stream(ids, max_tokens=1, temperature=0, logprobs=3)
    row = np.array(llama.logits(ids, positions=[-1])[0], dtype=np.float64)
    expected = row - np.log(np.exp(row - row.max()).sum()) - row.max()
    best = np.argsort(-expected)[:3]
    assert [token for token, _ in step.top_logprobs] == best.tolist()
    # The native kernels keep a cache in half precision, which scoring a short text does without.
    np.testing.assert_allclose([p for _, p in step.top_logprobs], expected[best], rtol=1e-3)
    assert step.logprob == pytest.approx(expected[best[0]], rel=1e-3)
    (plain,) = llama.stream(ids, max_tokens=1, temperature=0)
    assert plain.logprob is None


def test_seed_makes_an_answer_repeatable(llama: Llama) -> None:
    def answer(seed: int) -> list[int | None]:
        options: dict[str, Any] = {"temperature": 2.0, "top_p": 1.0, "max_tokens": 12}
        return [s.token_id for s in llama.stream("hello", seed=seed, ignore_eos=True, **options)]

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)


def test_leading_space_is_dropped_at_the_start_of_a_text_alone(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = [*pieces(llama, b" hello"), llama.tokenizer.eos_id]
    for prompt, text in (("", "hello"), ("the", " hello")):
        script(llama, monkeypatch, answer)
        assert llama.generate(prompt, temperature=0) == text


@pytest.mark.parametrize("ids", [[], [-1], [10**6]])
def test_wrong_ids_are_refused(llama: Llama, ids: list[int]) -> None:
    with pytest.raises(OptionError, match="prompt"):
        llama.generate(ids)


def test_options_are_checked_before_anything_runs(llama: Llama) -> None:
    with pytest.raises(OptionError, match="did you mean"):
        llama.stream("x", max_token=3)


def test_closing_early_leaves_a_cache_that_agrees(llama: Llama) -> None:
    session = llama.session()
    steps: Iterator[Step] = session.complete([1, 5, 6], ignore_eos=True, temperature=0)
    taken = [next(steps).token_id for _ in range(4)]
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert session.cache.offset == len(session.tokens)
    assert [1, 5, 6, *taken][: len(session.tokens)] == session.tokens
