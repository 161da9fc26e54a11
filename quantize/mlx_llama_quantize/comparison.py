"""Two models over one text: both in memory where they fit, else one block at a time.

Some windows at a time go through all blocks of A, then of B, and what both say of them is scored.
Walked block by block, a model takes the memory of one block, its two ends and the windows' hidden
states, whatever its size; each block is read once for all the windows that are held.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter
from zipfile import BadZipFile

import mlx.core as mx
import numpy as np

from mlx_llama.cache import KVBits
from mlx_llama.errors import CheckpointError
from mlx_llama.memory import Demand, memory_found
from mlx_llama.model import Block, LlamaModel
from mlx_llama.weights import build_blocks, build_ends
from mlx_llama_quantize.divergence import TokenScores, score_tokens
from mlx_llama_quantize.keeping import Keeper, OnNote, told_when_stopped
from mlx_llama_quantize.products import block_for_texts, for_texts
from mlx_llama_quantize.subject import Subject
from mlx_llama_quantize.windows import Windows

SLICE_BYTES = 64 << 20  # of logits, both models' together with what is computed from them
HIDDEN_BYTES = 32 << 20  # of the windows that go through the blocks together
COPIES = 8  # arrays as large as one model's logits that scoring has alive

OnProgress = Callable[[int, int], None]  # windows times blocks done, and in all


class Side:
    """One of the two models. is_resident: whether its blocks stay in memory."""

    def __init__(self, subject: Subject, *, dtype: str | None, is_resident: bool) -> None:
        self.subject = subject
        self.config = subject.config
        self.dtype = subject.dtype_with(dtype)
        arrays = subject.arrays()
        self.ends: LlamaModel = build_ends(self.config, arrays, dtype=self.dtype)
        output = for_texts(self.ends.output)
        self.ends.output, self.ends.tok_embeddings = output, for_texts(self.ends.tok_embeddings)
        self._blocks: list[Block] | None = None
        if is_resident:
            self._blocks = [*self._built(arrays, is_joined=True)]

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks, read anew unless they stay in memory."""
        if self._blocks is not None:
            return iter(self._blocks)
        return self._built(self.subject.arrays(), is_joined=False)

    def _built(self, arrays: MutableMapping[str, mx.array], *, is_joined: bool) -> Iterator[Block]:
        blocks = build_blocks(self.config, arrays, dtype=self.dtype, is_joined=is_joined)
        return map(block_for_texts, blocks)

    def hidden(
        self, windows: Windows, chosen: range, on_window: Callable[[], None]
    ) -> list[mx.array]:
        """Return the states behind the last block at the scored positions: (P, dim) a window.

        on_window is called after each window and block, and may raise to end it.
        """
        states = [
            self.ends.tok_embeddings.rows(mx.array(windows.ids[number : number + 1]))
            for number in chosen
        ]
        mx.eval(states)
        for block in self.blocks():
            for place, state in enumerate(states):
                states[place] = self.ends.through(block, state)
                mx.eval(states[place])
                on_window()
            del block  # before the next one is read
        return [mx.contiguous(state[0, windows.scored]) for state in states]


@dataclass(frozen=True, slots=True)
class Spent:
    """What the parts of a comparison before this one took that kept something; bytes: at most."""

    elapsed_s: float = 0.0
    peak_bytes: int = 0


class Comparison:
    """A comparison on its way: scores what is missing, keeps what is done.

    a, b: of one vocabulary. dtype: of both models' activations; None takes what suits each.
    is_resident: whether both stay in memory; None decides by what is free. states: a folder where
    the scores are kept until the text is done, and found again by whoever compares the same.
    on_note: told where they cannot be kept.
    `before`: what earlier parts took, without what they lost when they were stopped.
    """

    def __init__(
        self,
        a: Subject,
        b: Subject,
        windows: Windows,
        *,
        dtype: str | None = None,
        is_resident: bool | None = None,
        states: Path | None = None,
        on_note: OnNote | None = None,
    ) -> None:
        require_one_vocabulary(a, b)
        self.windows = windows
        self._subjects, self._dtype = (a, b), dtype
        self.is_resident = self._fits() if is_resident is None else is_resident
        self._state = states and states / f"{_key(a, b, windows, dtype)}.npz"
        self._keeper = states and Keeper(states, on_note)
        self.done, self._parts, self.before = self._resumed()
        self._started = perf_counter()

    def run(
        self, *, on_progress: OnProgress | None = None, cancel: threading.Event | None = None
    ) -> TokenScores:
        """Score the text. KeyboardInterrupt when cancel is set, with what is done kept."""
        self._started = perf_counter()
        sides = [
            Side(each, dtype=self._dtype, is_resident=self.is_resident) for each in self._subjects
        ]
        n_blocks = sum(side.config.n_layers for side in sides)
        total, passed = n_blocks * len(self.windows), n_blocks * self.done

        def on_window() -> None:
            nonlocal passed
            passed += 1
            if on_progress is not None:
                on_progress(passed, total)
            if cancel is not None and cancel.is_set():
                raise KeyboardInterrupt

        size = self.group_size(sides)
        while self.done < len(self.windows):
            chosen = range(self.done, min(self.done + size, len(self.windows)))
            states = [side.hidden(self.windows, chosen, on_window) for side in sides]
            for number, hidden_a, hidden_b in zip(chosen, *states, strict=True):
                self._parts.append(self._score(sides, number, hidden_a, hidden_b))
                self.done = number + 1
                self._keep()
        if self._state is not None:
            with contextlib.suppress(OSError):
                self._state.unlink()
        return TokenScores.joined(self._parts)

    def told_when_stopped(self) -> AbstractContextManager[None]:
        """Return what notes with Ctrl-C in its block where the scores are kept, if any are."""
        return told_when_stopped("what was compared", self._state)

    def group_size(self, sides: list[Side]) -> int:
        """Return how many windows go through the blocks together."""
        if self.is_resident:
            return 1  # nothing is read anew
        widest = max(side.config.dim * side.dtype.size for side in sides)
        return max(1, HIDDEN_BYTES // (2 * self.windows.context * widest))

    def _score(
        self, sides: list[Side], number: int, hidden_a: mx.array, hidden_b: mx.array
    ) -> TokenScores:
        """Score one window, a slice of its logits at a time."""
        vocab_size = self._subjects[0].tokenizer.vocab_size
        targets = mx.array(self.windows.targets(number))
        size = max(1, SLICE_BYTES // (COPIES * 4 * vocab_size))
        parts: list[TokenScores] = []
        for start in range(0, self.windows.n_scored, size):
            rows = slice(start, start + size)
            # Without the rows of padding that an embedding may have.
            logits_a, logits_b = (
                side.ends.logits(hidden[rows])[:, :vocab_size]
                for side, hidden in zip(sides, (hidden_a, hidden_b), strict=True)
            )
            parts.append(score_tokens(logits_a, logits_b, targets[rows]))
        return TokenScores.joined(parts)

    def _fits(self) -> bool:
        """Whether both models and one window of the larger have room."""
        found = memory_found()
        if found is None:
            return True
        needed = 3 * SLICE_BYTES
        for subject in self._subjects:
            dtype = subject.dtype_with(self._dtype)
            weights, context = subject.loaded_bytes(dtype), self.windows.context
            demand = Demand(subject.config, weights, KVBits(), dtype, context)
            needed += demand.at(context, None).total
        return needed <= found

    # --- going on where it stopped ---------------------------------------------------------------

    def _resumed(self) -> tuple[int, list[TokenScores], Spent]:
        """Return windows done, their scores and what they took; a damaged file is none."""
        nothing = 0, [], Spent()
        if self._state is None or not self._state.is_file():
            return nothing
        try:
            with self._state.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                scores = TokenScores(**{spec.name: file[spec.name] for spec in fields(TokenScores)})
                before = Spent(float(file["elapsed_s"]), int(file["peak_bytes"]))
        except (OSError, EOFError, ValueError, TypeError, KeyError, BadZipFile):
            return nothing
        done, rest = divmod(len(scores), self.windows.n_scored)
        return nothing if rest or done > len(self.windows) else (done, [scores], before)

    def _keep(self) -> None:
        state = self._state
        if state is None or self._keeper is None:
            return
        scores = TokenScores.joined(self._parts)
        self._parts = [scores]
        arrays = {spec.name: getattr(scores, spec.name) for spec in fields(scores)}
        elapsed_s = self.before.elapsed_s + perf_counter() - self._started
        peak_bytes = max(self.before.peak_bytes, mx.get_peak_memory())

        def write() -> None:
            beside = state.with_name(f"{state.stem}.partial.npz")
            np.savez(beside, elapsed_s=elapsed_s, peak_bytes=peak_bytes, **arrays)
            beside.replace(state)

        self._keeper.keep(write)


def require_one_vocabulary(a: Subject, b: Subject) -> None:
    """Raise CheckpointError unless both models' tokens are the same, one by one."""
    one, other = a.tokenizer, b.tokenizer
    if (one.vocab_size, one.family) != (other.vocab_size, other.family):
        what = (
            f"{one.vocab_size} tokens ({one.family}), {b.name} has {other.vocab_size} "
            f"({other.family})"
        )
    else:
        differing = next(
            (n for n in range(one.vocab_size) if one.token_bytes(n) != other.token_bytes(n)), None
        )
        if differing is None:
            return
        what = f"another token {differing} than {b.name}"
    raise CheckpointError(
        f"{a.name} has {what}: only models of one vocabulary can be compared token by token"
    )


def _key(a: Subject, b: Subject, windows: Windows, dtype: str | None) -> str:
    """Return what tells one comparison from another."""
    digest = hashlib.sha256(windows.ids.tobytes())
    for subject in (a, b):
        digest.update(f"{subject.identity} {dtype}".encode())
    return digest.hexdigest()[:32]
