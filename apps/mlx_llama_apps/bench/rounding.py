"""What rounded activations cost: a model's predictions beside its own with float activations.

Both read a text in the box as a prompt is read, window by window: there every processor rounds that
rounds at all, and some nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mlx_llama.options import FLOAT32, INT8

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_llama import Llama
    from mlx_llama.cache import KVBits, KVCache
    from mlx_llama.model import LlamaModel
    from mlx_llama_quantize.divergence import Divergence, TokenScores
    from mlx_llama_quantize.windows import Windows

MOST_TOKENS, CONTEXT = 1024, 512  # of the text, of a window
ROWS = 64  # whose scores are held at once; each has as many as the vocabulary


@dataclass(frozen=True, slots=True)
class Cost:
    """A divergence from the predictions with float activations, and the text that was read."""

    text: str
    divergence: Divergence

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON holds it, named as `compare` does."""
        return {"text": self.text, **asdict(self.divergence)}


def measure_cost(llama: Llama, bits: KVBits, on_window: Callable[[int, int], None]) -> Cost:
    """Compare the model with itself; on_window(number, all of them) is called before each window.

    bits: of both caches.
    """
    from mlx_llama_quantize.divergence import TokenScores, summarize
    from mlx_llama_quantize.texts import CERTIFICATE, shipped
    from mlx_llama_quantize.windows import cut_windows

    text = shipped(CERTIFICATE)
    windows = cut_windows(
        llama.tokenizer.encode(text.content)[:MOST_TOKENS],
        bos_id=llama.tokenizer.bos_id,
        context=min(CONTEXT, llama.config.max_context),
    )
    parts: list[TokenScores] = []
    for number in range(len(windows)):
        on_window(number + 1, len(windows))
        parts.extend(_window_scores(llama, windows, number, bits))
    return Cost(text.name, summarize(TokenScores.joined(parts)))


def _window_scores(
    llama: Llama, windows: Windows, number: int, bits: KVBits
) -> Iterator[TokenScores]:
    """Read one window both ways; yield the scores of its second half."""
    import mlx.core as mx

    from mlx_llama import ops
    from mlx_llama.cache import KVCache
    from mlx_llama_quantize.divergence import score_tokens

    ids, targets = mx.array(windows.ids[number]), mx.array(windows.targets(number))
    sides = [llama.model.with_activations(how) for how in (FLOAT32, INT8)]
    states: list[mx.array] = []
    for side in sides:
        storage = ops.cache_storage(llama.dtype, bits)  # as a session has it
        cache = KVCache(llama.config, capacity=windows.context, bits=bits, storage=storage)
        states.append(_read(side, ids, cache)[windows.scored])
    for start in range(0, windows.n_scored, ROWS):
        rows = slice(start, start + ROWS)
        of_floats, of_rounded = (
            # Without the rows of padding that an embedding may have.
            _evaluated(side.logits(state[rows])[:, : llama.tokenizer.vocab_size])
            for side, state in zip(sides, states, strict=True)
        )
        yield score_tokens(of_floats, of_rounded, targets[rows])


def _read(model: LlamaModel, ids: mx.array, cache: KVCache) -> mx.array:
    """Read ids (L,) as a prompt is read; return the residual stream (L, dim), evaluated."""
    import mlx.core as mx

    from mlx_llama import ops

    step, found = ops.prefill_chunk(), []
    for start in range(0, len(ids), step):
        found.append(model.hidden(ids[None, start : start + step], cache)[0])
        mx.eval(found[-1], cache.arrays)
    return _evaluated(mx.concatenate(found))


def _evaluated(found: mx.array) -> mx.array:
    """Return an array once it is computed: before another model's pass begins."""
    import mlx.core as mx

    mx.eval(found)
    return found
