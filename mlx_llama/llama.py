"""A loaded model with its tokenizer: the Python interface.

`stream` and `generate` take plain text or token ids, `stream_chat` and `chat` take messages, and
`session` keeps one conversation. All are synchronous and belong to the thread that loaded the
model: MLX's arrays cannot be evaluated from another one before they are computed.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama import ops
from mlx_llama.cache import KVCache
from mlx_llama.config import ModelConfig
from mlx_llama.errors import ContextOverflowError, OptionError
from mlx_llama.fingerprint import model_fingerprint
from mlx_llama.generation import OnForget, OnPrefill, Step
from mlx_llama.kinds import Kind, kind_named
from mlx_llama.model import LAST, LlamaModel
from mlx_llama.options import context_options, split_options
from mlx_llama.prompts import Message, PromptFormat, prompt_format
from mlx_llama.sampling import SamplingDefaults
from mlx_llama.session import Session
from mlx_llama.tokenizer import Tokenizer


def stop_ids(kind: Kind, tokenizer: Tokenizer, recorded: Iterable[int]) -> frozenset[int]:
    """Return the tokens that end an answer: EOS, the kind's stops, and those of the files.

    recorded: what config.json and generation_config.json name.
    """
    specials = tokenizer.special_tokens
    named = {specials[name] for name in kind.stops if name in specials}
    return frozenset({tokenizer.eos_id, *named, *recorded})


class Llama:
    """One model in memory. Made by `mlx_llama.load`.

    path: the model directory. dtype: of the activations.
    """

    def __init__(
        self,
        model: LlamaModel,
        tokenizer: Tokenizer,
        config: ModelConfig,
        *,
        path: Path,
        dtype: mx.Dtype,
        sampling_defaults: SamplingDefaults,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.path = path
        self.dtype = dtype
        self.sampling_defaults = sampling_defaults

    @property
    def kind(self) -> Kind:
        """Which member of the family this is."""
        return kind_named(self.config.kind)

    @property
    def activations(self) -> str:
        """How packed products take activations: "float32", or "int8" where they are rounded."""
        return self.model.activations

    @cached_property
    def prompt_format(self) -> PromptFormat:
        """The chat format; UnsupportedModelError for a base model."""
        return prompt_format(self.kind, self.tokenizer)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer; see the function of the same name."""
        return stop_ids(self.kind, self.tokenizer, self.config.eos_ids)

    @cached_property
    def fingerprint(self) -> Mapping[str, str]:
        """What tells this model, as it is loaded, from others: see `model_fingerprint`."""
        return model_fingerprint(self.model, self.dtype, self.activations)

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Return BOS and a text's tokens, or ids as they are once they are checked."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        if isinstance(prompt, bytes | bytearray):
            raise OptionError(
                "prompt: found bytes, expected a text or token ids; decode them first"
            )
        ids = _whole_numbers(prompt, "prompt", "a text or token ids")
        if not ids:
            raise OptionError("prompt: no token ids; a model needs one at least, such as BOS")
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise OptionError(
                    f"prompt: token id {token} is not from 0 to {self.config.vocab_size - 1}"
                )
        return ids

    def logits(self, ids: Sequence[int], *, positions: Sequence[int] | None = None) -> mx.array:
        """Return the scores behind each token of a text, without sampling.

        ids: (L,), BOS included. positions: which of them to give logits for, negative ones from
        the end; None gives all.
        Returns (L, V) or (len(positions), V) float32, evaluated. Long texts go through a cache in
        slices, which bounds the memory of attention.
        """
        ids = self.prompt_ids(list(ids))
        wanted = range(len(ids)) if positions is None else _places(positions, len(ids))
        step = ops.prefill_chunk()
        if len(ids) > self.config.max_context:
            raise ContextOverflowError(
                f"the text has {len(ids)} tokens, the model was trained for "
                f"{self.config.max_context}: shorten it"
            )
        cache = None
        if len(ids) > step:
            cache = KVCache(self.config, capacity=len(ids))
            cache.reserve(len(ids))
        rows: list[mx.array] = []
        for start in range(0, len(ids), step):
            here = sorted({p - start for p in wanted if start <= p < start + step})
            chunk = mx.array(ids[start : start + step], dtype=mx.uint32)[None]
            asked = None if len(here) == chunk.size else mx.array(here) if here else LAST
            hidden = self.model.hidden(chunk, cache, positions=asked)
            if here:
                rows.append(self.model.logits(hidden[0]))
            mx.eval([*rows[-1:], *([] if cache is None else cache.arrays)])
        row_of = {position: row for row, position in enumerate(sorted(set(wanted)))}
        result = mx.concatenate(rows, axis=0)[mx.array([row_of[p] for p in wanted])]
        mx.eval(result)
        return result

    def session(self, **options: Any) -> Session:
        """Begin a conversation. Options: the fields of `ContextOptions`.

        Raises MemoryShortError for a context that does not fit, with the ones that would.
        """
        return Session(self, context_options(options))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        on_prefill: OnPrefill | None = None,
        on_forget: OnForget | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Continue a plain text (BOS is put before it) or token ids.

        Options: the fields of `GenerationOptions` and `ContextOptions`. on_prefill(done, total)
        counts prompt tokens; on_forget(n) tells how many tokens a sliding context has dropped;
        setting cancel ends the answer at the next slice.
        """
        context, generation = split_options(options)
        session = Session(self, context, is_single=True)
        hooks = {"on_prefill": on_prefill, "on_forget": on_forget, "cancel": cancel}
        return session.complete(prompt, **hooks, **generation)

    def stream_chat(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        *,
        date: str | None = None,
        on_prefill: OnPrefill | None = None,
        on_forget: OnForget | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Answer messages such as {"role": "user", "content": "Hi"}; the rest as in `stream`.

        date: for the system block of the formats that have one.
        """
        context, generation = split_options(options)
        session = Session(self, context, is_single=True)
        hooks = {"on_prefill": on_prefill, "on_forget": on_forget, "cancel": cancel}
        return session.stream(messages, date=date, **hooks, **generation)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """Return the whole text that `stream` yields."""
        return "".join(step.text for step in self.stream(prompt, **options))

    def chat(self, messages: Sequence[Message | Mapping[str, str]], **options: Any) -> str:
        """Return the whole answer that `stream_chat` yields."""
        return "".join(step.text for step in self.stream_chat(messages, **options))


def _whole_numbers(values: Iterable[object], name: str, expected: str) -> list[int]:
    """Return Python's whole numbers for what may be numpy's."""
    try:
        return [operator.index(value) for value in values]  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise OptionError(f"{name}: found {repr(values)[:60]}, expected {expected}") from error


def _places(positions: Sequence[int], length: int) -> list[int]:
    """Check positions in a text of so many tokens; return them from its beginning."""
    places = _whole_numbers(positions, "positions", "whole numbers")
    if not places:
        raise OptionError("positions: none given; leave them out to get the logits of all")
    for place in places:
        if not -length <= place < length:
            raise OptionError(
                f"positions: {place} is not from {-length} to {length - 1}, the text has {length} "
                "tokens"
            )
    return [place % length for place in places]
