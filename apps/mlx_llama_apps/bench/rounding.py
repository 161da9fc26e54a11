"""What rounded activations cost: a model's predictions beside its own with float activations.

Both go through a text in the box, window by window: the first half as a prompt is read, the second
a few tokens at a time, which are multiplied as those of an answer are. A processor may round in one
of the two alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mlx_llama.options import FLOAT32, INT8

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_llama import Llama
    from mlx_llama.cache import KVCache
    from mlx_llama_quantize.divergence import Divergence, TokenScores
    from mlx_llama_quantize.windows import Windows

MOST_TOKENS, CONTEXT = 1024, 512  # of the text, of a window
FEW = 4  # tokens that the kernels take as they take one


@dataclass(frozen=True, slots=True)
class Cost:
    """A divergence from the predictions with float activations, and the text that was read."""

    text: str
    divergence: Divergence

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON holds it, named as `compare` does."""
        return {"text": self.text, **asdict(self.divergence)}


def measure_cost(llama: Llama, on_window: Callable[[int, int], None]) -> Cost:
    """Compare the model with itself; on_window(number, all of them) is called before each window.

    What it was loaded with is in force again afterwards.
    """
    from mlx_llama import ops
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
    try:
        for number in range(len(windows)):
            on_window(number + 1, len(windows))
            parts.extend(_scores(llama, windows, number))
    finally:
        ops.use_activations(llama.activations)
    return Cost(text.name, summarize(TokenScores.joined(parts)))


def _scores(llama: Llama, windows: Windows, number: int) -> Iterator[TokenScores]:
    """Read one window both ways; yield the scores of its second half."""
    import mlx.core as mx

    from mlx_llama import ops
    from mlx_llama.cache import KVCache
    from mlx_llama_quantize.divergence import score_tokens

    ids, scored = mx.array(windows.ids[number]), windows.scored
    targets = mx.array(windows.targets(number))
    floats, rounded = (
        (how, KVCache(llama.config, capacity=windows.context)) for how in (FLOAT32, INT8)
    )
    step = ops.prefill_chunk()
    for side in (floats, rounded):
        for start in range(0, scored.start, step):
            _logits(llama, *side, ids[start : min(start + step, scored.start)])
    for start in range(scored.start, scored.stop, FEW):
        chunk = ids[start : min(start + FEW, scored.stop)]
        of_floats, of_rounded = (_logits(llama, *side, chunk) for side in (floats, rounded))
        first = start - scored.start
        yield score_tokens(of_floats, of_rounded, targets[first : first + len(chunk)])


def _logits(llama: Llama, how: str, cache: KVCache, ids: mx.array) -> mx.array:
    """Append ids (L,) to a cache; return their scores (L, V), evaluated."""
    import mlx.core as mx

    from mlx_llama import ops

    ops.use_activations(how)
    hidden = llama.model.hidden(ids[None], cache)
    # Without the rows of padding that an embedding may have.
    logits = llama.model.logits(hidden[0])[:, : llama.tokenizer.vocab_size]
    mx.eval(logits, cache.arrays)
    return logits
