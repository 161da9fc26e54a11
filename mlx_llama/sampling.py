"""Choosing the next token, inside MLX's graph: nothing here waits for a result.

Order: penalties and bias, temperature, top-k, top-p, min-p. Knows token ids, no text.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx

from mlx_llama import token_ops
from mlx_llama.errors import CheckpointError, OptionError
from mlx_llama.options import DEFAULT_TEMPERATURE, DEFAULT_TOP_P, GenerationOptions
from mlx_llama.tokenizer import Tokenizer

# Scores divided by less leave float32; the likeliest token is what so little asks for anyway.
LEAST_TEMPERATURE = 1e-4

# Up to so many tokens sorting takes less time than histograms of 1 << 15 bins.
_FEW = 4096
# Of a probability, at most 1: its bits as an integer are fewer than 1 << 30.
_HALF_BITS = 15
# A probability of 1, exact in float32; below 1 << 32 by more than rounding adds to the sum.
_UNITS = float((1 << 32) - (1 << 22))


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledOptions(GenerationOptions):
    """Options with every choice made. banned: tokens that are never drawn."""

    banned: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a model directory recommends in `generation_config.json`; None where it is silent.

    padding: rows of the output that no token of the tokenizer stands for, which are never drawn.
    unnamed_stops: those of such rows that end an answer, drawn unless the end is ignored.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    padding: frozenset[int] = frozenset()
    unnamed_stops: frozenset[int] = frozenset()

    def fill(self, options: GenerationOptions) -> FilledOptions:
        """Return the options with every open choice made, the seed included."""
        chosen = {spec.name: getattr(options, spec.name) for spec in fields(GenerationOptions)}
        defaults = {
            "temperature": (self.temperature, DEFAULT_TEMPERATURE),
            "top_p": (self.top_p, DEFAULT_TOP_P),
            "top_k": (self.top_k, 0),
            "min_p": (self.min_p, 0.0),
            "repetition_penalty": (self.repetition_penalty, 1.0),
            "seed": (secrets.randbits(32),),
        }
        for name, values in defaults.items():
            if chosen[name] is None:
                chosen[name] = next(value for value in values if value is not None)
        banned = self.padding | self.unnamed_stops if options.ignore_eos else self.padding
        return FilledOptions(**chosen, banned=banned)


def sampling_defaults(raw: Mapping[str, Any], *, where: str) -> SamplingDefaults:
    """Take what a generation_config.json (raw, read from where) recommends.

    Raises CheckpointError for a value that cannot be.
    """
    is_sampled = raw.get("do_sample")
    if is_sampled is not None and not isinstance(is_sampled, bool):
        raise CheckpointError(
            f"{where}: do_sample is {repr(is_sampled)[:60]}, expected true or false"
        )

    def number(name: str, low: float, high: float, *, is_whole: bool = False) -> Any:
        value = raw.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int if is_whole else int | float)
        if isinstance(value, bool) or not is_number or not low <= value <= high:
            what = "a whole number" if is_whole else "a number"
            raise CheckpointError(
                f"{where}: {name} is {repr(value)[:60]}, expected {what} from {low:g} to {high:g}"
            )
        return value

    temperature = number("temperature", 0.0, 100.0)
    return SamplingDefaults(
        temperature=0.0 if is_sampled is False else temperature,
        top_p=number("top_p", 0.0, 1.0),
        top_k=number("top_k", 0, 1 << 21, is_whole=True),
        min_p=number("min_p", 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", 0.01, 100.0),
    )


class Sampler:
    """Draws tokens from logits, one a step; remembers what it drew for the penalties.

    options: with every choice made (`SamplingDefaults.fill`). prompt: ids that the repetition
    penalty counts too; presence and frequency look at the answer alone. bias: score by token id.
    begun: the tokens that an answer already has; what follows is drawn as if it never paused.
    """

    def __init__(
        self,
        options: FilledOptions,
        *,
        vocab_size: int,
        prompt: Sequence[int],
        bias: Mapping[int, float],
        begun: Sequence[int] = (),
    ) -> None:
        self._options = options
        self._draws = len(begun)
        self._bias: mx.array | None = None
        if bias := {**bias, **dict.fromkeys(options.banned, -math.inf)}:
            ids = mx.array(list(bias))
            self._bias = mx.zeros(vocab_size).at[ids].add(mx.array(list(bias.values())))
        self._repetition = options.repetition_penalty or 1.0
        self._counts: mx.array | None = None
        if options.presence_penalty or options.frequency_penalty or self._repetition != 1.0:
            self._counts = mx.zeros(vocab_size)
            if begun:
                self._counts = self._counts.at[mx.array(list(begun))].add(1.0)
        self._in_prompt: mx.array | None = None
        if self._repetition != 1.0 and prompt:
            self._in_prompt = mx.zeros(vocab_size).at[mx.array(sorted(set(prompt)))].add(1.0)

    def __call__(self, logits: mx.array) -> mx.array:
        """Draw one token, (1,) uint32, from logits (V,) float32."""
        logits = self._penalized(logits)
        temperature = self._options.temperature or 0.0
        if temperature < LEAST_TEMPERATURE:
            token = token_ops.likeliest(logits)
        else:
            kept = keep_likeliest(
                logits / temperature,
                top_k=self._options.top_k or 0,
                top_p=1.0 if self._options.top_p is None else self._options.top_p,
                min_p=self._options.min_p or 0.0,
            )
            # A key of seed and count needs no state that the graph would have to carry.
            key = mx.array([self._options.seed or 0, self._draws], dtype=mx.uint32)
            token = token_ops.draw(kept, key)
        self._draws += 1
        if self._counts is not None:
            self._counts = self._counts.at[token].add(1.0)
        return token.astype(mx.uint32)

    def _penalized(self, logits: mx.array) -> mx.array:
        if self._counts is not None:
            options = self._options
            if self._repetition != 1.0:
                seen = self._counts if self._in_prompt is None else self._counts + self._in_prompt
                # Dividing a negative score would raise it (arXiv 1909.05858, as corrected since).
                factor = mx.where(logits > 0, 1.0 / self._repetition, self._repetition)
                logits = mx.where(seen > 0, logits * factor, logits)
            logits = logits - options.frequency_penalty * self._counts
            logits = logits - options.presence_penalty * (self._counts > 0)
        return logits if self._bias is None else logits + self._bias


def keep_likeliest(logits: mx.array, *, top_k: int, top_p: float, min_p: float) -> mx.array:
    """Set all but the likeliest logits (V,) to minus infinity; the likeliest always stays.

    top_p keeps a token when the tokens before it hold at most that much probability, as
    `sample_top_p` in meta-llama/llama-models does; equally likely ones stay or go together.
    """
    is_all = not 0 < top_k < logits.size and top_p >= 1.0 and min_p <= 0.0
    if is_all:
        return logits
    kept = token_ops.keep_likeliest(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    return _by_arrays(logits, top_k, top_p, min_p) if kept is None else kept


def _by_arrays(logits: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array:
    """Do what `keep_likeliest` says by MLX's operations."""
    if 0 < top_k < logits.size:
        logits = mx.where(logits >= mx.min(mx.topk(logits, top_k)), logits, -math.inf)
    if top_p < 1.0:
        logits = mx.where(_in_nucleus(mx.softmax(logits), top_p), logits, -math.inf)
    if min_p > 0.0:
        logits = mx.where(logits >= mx.max(logits) + math.log(min_p), logits, -math.inf)
    return logits


def _in_nucleus(probabilities: mx.array, top_p: float) -> mx.array:
    """Return which probabilities (V,) float32 have at most top_p of the sum above them.

    Masses are whole numbers, so that no order of adding changes the sum; rounding to them moves it
    by less than 2^-33 a token. A large vocabulary is not sorted, see `_least_bits`.
    """
    masses = _masses(probabilities)
    most = (mx.sum(masses) * top_p).astype(mx.uint32)
    if probabilities.size > _FEW:
        # NaN's bits are larger than any probability's.
        bits = mx.minimum(probabilities.view(mx.uint32), (1 << 2 * _HALF_BITS) - 1)
        return bits >= _least_bits(bits, masses, most)
    falling = mx.sort(probabilities)[::-1]
    masses = _masses(falling)
    is_kept = mx.cumsum(masses) - masses <= most
    return probabilities >= mx.min(mx.where(is_kept, falling, math.inf))


def _masses(probabilities: mx.array) -> mx.array:
    return mx.round(probabilities * _UNITS).astype(mx.uint32)


def _least_bits(bits: mx.array, masses: mx.array, most: mx.array) -> mx.array:
    """Return the least of the floats' bits (V,) that has at most `most` of the masses above it.

    A float's bits rise with its value: one histogram of the masses by the upper half of the bits
    finds the bin that the least lies in, a second one by the lower half finds it there.
    """
    upper, lower = bits >> _HALF_BITS, bits & ((1 << _HALF_BITS) - 1)
    bin_, above = _lowest_bin(upper, masses, most, mx.array(0, dtype=mx.uint32))
    rest, _ = _lowest_bin(lower, mx.where(upper == bin_, masses, 0), most, above)
    return (bin_ << _HALF_BITS) + rest


def _lowest_bin(
    bins: mx.array, masses: mx.array, most: mx.array, above: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the lowest bin that has at most `most` above it, and how much that is.

    bins, masses: (V,) uint32. above: what lies above all of them.
    """
    histogram = mx.zeros(1 << _HALF_BITS, dtype=mx.uint32).at[bins].add(masses)
    up_to = mx.cumsum(histogram)
    over = up_to[-1] - up_to + above
    found = mx.argmax(over <= most)
    return found, over[found]


def bias_by_token(texts: Mapping[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    """Turn texts into token ids: each text that is one token, as it stands or after a space.

    A token that one text spells exactly is that text's, not that of a text without the space.
    Raises OptionError for a text that is left without a token: its bias could not take effect.
    """
    by_id: dict[int, float] = {}
    if not texts:
        return by_id
    spellings = {f" {text}".encode(): text for text in texts}
    spellings |= {text.encode(): text for text in texts}
    found: set[str] = set()
    specials = set(tokenizer.special_tokens.values())
    for token in range(tokenizer.vocab_size):
        text = spellings.get(tokenizer.token_bytes(token)) if token not in specials else None
        if text is None and token in specials:
            text = next((t for t in texts if tokenizer.special_tokens.get(t) == token), None)
        if text is not None:
            by_id[token] = texts[text]
            found.add(text)
    for text in texts:
        if text not in found:
            raise OptionError(_no_token(text, found, tokenizer))
    return by_id


def _no_token(text: str, found: Set[str], tokenizer: Tokenizer) -> str:
    spaced = f" {text}"
    if spaced in found:
        return (
            f"--logit-bias: {text!r} is a token after a space only, and {spaced!r} has a bias of "
            "its own; leave one of them out"
        )
    n_tokens = len(tokenizer.encode(text))
    return (
        f"--logit-bias: {text!r} is no single token of this model; it is {n_tokens} tokens, "
        "bias a part of it"
    )
