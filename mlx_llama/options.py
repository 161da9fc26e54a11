"""Every option, once: name, default, help and check.

The command line's flags, Python's keywords and the chat's settings are made of these dataclasses.
A field that is None is not set; who uses it takes the model directory's value or the default named
in its help. Imports no MLX.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mlx_llama.errors import OptionError

KV_BITS = (32, 16, 8, 4, "16:8", "16:4", "8:16", "8:4", "4:16", "4:8")
PLAIN_BITS = ("32", "16")  # of KV_BITS, those that pack nothing, as they are written
METHODS = ("rtn", "mse", "gptq", "awq", "awq+gptq", "auto")
MODE_BITS = {"affine": 4, "mxfp4": 4, "mxfp8": 8, "nvfp4": 4}  # what each has by default
DTYPE_NAMES = ("bfloat16", "float16", "float32")
FLOAT32, INT8 = ACTIVATIONS = ("float32", "int8")
DEFAULT_TEMPERATURE = 0.6  # Meta's reference code and the Llama 3 release
DEFAULT_TOP_P = 0.9
MAX_BIAS = 1e6  # scores are a few dozen; far larger ones would overflow float32 in the sampler

# How a field's type is called in a message.
_TYPE_NAMES: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    list[str]: "a list of texts",
    dict[str, float]: "texts with a number each",
}


def _option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    words: tuple[str, ...] = (),
    python_only: bool = False,
) -> Any:
    """Describe an option. words: texts that it takes beside numbers."""
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "choices": choices,
        "words": words,
        "python_only": python_only,
    }
    if isinstance(default, dict | list):
        return field(default_factory=type(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _Checked:
    """Checks every option against its type and its metadata when it is set."""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for spec in fields(self):  # pyright: ignore[reportArgumentType]
            if not spec.metadata:  # no option
                continue
            problem = _problem(getattr(self, spec.name), hints[spec.name], spec.metadata)
            if problem:
                raise _refusal(spec.name, problem)


def _refusal(name: str, problem: str) -> OptionError:
    return OptionError(f"--{name.replace('_', '-')}: {problem}", option=name)


@cache
def _hints(options: type) -> Mapping[str, Any]:
    return get_type_hints(options)


def _problem(value: Any, hint: Any, metadata: Mapping[str, Any]) -> str | None:
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if not _is_of_type(value, hint):
        kinds = [_TYPE_NAMES[kind] for kind in _arms(hint) if kind is not NoneType]
        return f"found {repr(value)[:60]}, expected {' or '.join(kinds)}"
    if value is None or value in metadata["words"]:
        return None
    if metadata["words"] and isinstance(value, str):
        return f"found {value!r}, expected a whole number or {' or '.join(metadata['words'])}"
    if choices is not None and value not in choices:
        return f"found {value!r}, expected one of {', '.join(map(str, choices))}"
    if low is None and high is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"found {value}, expected a number"
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        return f"found {value}, expected {bounds}"
    return None


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_of_type(value: object, hint: Any) -> bool:
    """Whether a value fits an annotation; true is no number, and a whole number is a float."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of_type(value, arm) for arm in arguments)
    if origin is list:
        return isinstance(value, list | tuple) and all(_is_of_type(v, arguments[0]) for v in value)
    if origin is dict:
        key_hint, value_hint = arguments
        return isinstance(value, Mapping) and all(
            _is_of_type(key, key_hint) and _is_of_type(item, value_hint)
            for key, item in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions(_Checked):
    """How the next token is chosen: penalties and bias, temperature, top-k, top-p, min-p."""

    temperature: float | None = _option(
        None,
        "randomness; 0 always takes the likeliest token, whatever the filters "
        "(default: the model's, or 0.6)",
        low=0.0,
        high=100.0,
    )
    top_p: float | None = _option(
        None,
        "keep the likeliest tokens of this total probability (default: the model's, or 0.9)",
        low=0.0,
        high=1.0,
    )
    top_k: int | None = _option(
        None, "keep this many likeliest tokens; 0 keeps all (default: the model's, or 0)", low=0
    )
    min_p: float | None = _option(
        None,
        "drop tokens less likely than this share of the likeliest (default: the model's, or 0)",
        low=0.0,
        high=1.0,
    )
    repetition_penalty: float | None = _option(
        None,
        "divide the scores of tokens in prompt or answer (default: the model's, or 1)",
        low=0.01,
        high=100.0,
    )
    presence_penalty: float = _option(
        0.0, "subtract from tokens that the answer holds", low=-100.0, high=100.0
    )
    frequency_penalty: float = _option(
        0.0, "subtract for each time that the answer holds a token", low=-100.0, high=100.0
    )
    logit_bias: dict[str, float] = _option(
        {},
        "TEXT=B adds B to the score of a token, with or without a leading space; -inf bans it; "
        "repeatable",
    )
    seed: int | None = _option(
        None, "makes the answer repeatable (default: another one each time)", low=0, high=2**32 - 1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """When an answer ends, and what is reported about it."""

    max_tokens: int | None = _option(
        None, "end the answer after this many tokens (default: the context's end)", low=1
    )
    timeout: float | None = _option(
        None,
        "end the answer after this many seconds, reading the prompt included (default: never)",
        low=0.001,
        high=1e9,
    )
    stop: list[str] = _option([], "end the answer before this text; repeatable")
    ignore_eos: bool = _option(False, "go on after the model's end-of-text tokens")
    logprobs: int = _option(
        0,
        "report this many likeliest tokens a step, natural logarithms",
        low=0,
        high=1000,
        python_only=True,
    )

    def __post_init__(self) -> None:
        """Check what the fields' bounds cannot say."""
        # Zero-argument super() does not survive dataclass(slots=True), which makes a new class.
        _Checked.__post_init__(self)
        if "" in self.stop:
            raise _refusal("stop", "an empty text would stop every answer; leave it out")
        for text, bias in self.logit_bias.items():
            if bias != -math.inf and not -MAX_BIAS <= bias <= MAX_BIAS:
                bounds = f"{-MAX_BIAS:.0f} to {MAX_BIAS:.0f}, or -inf to ban the token"
                problem = f"{text!r} has {bias}, expected a number from {bounds}"
                raise _refusal("logit_bias", problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(_Checked):
    """How a model directory is brought into memory."""

    dtype: str | None = _option(
        None,
        "dtype of activations: bfloat16, float16 or float32 (default: what suits weights and "
        "device)",
        choices=DTYPE_NAMES,
    )
    rope_linear: float | None = _option(
        None,
        "stretch the context of a model without RoPE scaling by this factor: positions are divided "
        "by it, and answers lose accuracy (default: off)",
        low=1.0,
        high=1024.0,
    )
    threads: int | None = _option(
        None,
        "threads of the native CPU kernels, or of the BLAS in their place (default: the processors "
        "that this process may use, as OMP_NUM_THREADS and its control group limit them)",
        low=1,
        high=1024,
    )
    activations: str | None = _option(
        None,
        "how the native CPU kernels take activations where a matrix is packed: float32, or int8, "
        "which rounds them to 8 bits, faster and less exact; bench says by how much (default: "
        "float32)",
        choices=ACTIVATIONS,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOptions(_Checked):
    """How many tokens a model sees at once, what happens beyond them, and how they are stored."""

    context: int | str | None = _option(
        None,
        'tokens that prompt and answer may have together, or "max" for what the model was trained '
        "for (default: the least of that, 8192 and what fits into memory)",
        low=1,
        words=("max",),
    )
    on_full: str = _option(
        "stop",
        "what a full context does: stop ends the answer, slide drops the oldest tokens behind the "
        "kept ones and says so",
        choices=("stop", "slide"),
    )
    keep: int | None = _option(
        None,
        "first tokens that slide never drops (default: the system prompt, at least 4)",
        low=0,
    )
    kv_bits: int | str = _option(
        16,
        "bits per cached number: 16 (float16 where activations are float32 and the native CPU "
        "kernels run, else as computed), 8 or 4, or two of these, keys:values, such as 8:4; 32 for "
        "float32",
        choices=KV_BITS,
    )
    kv_start: int = _option(
        0, "cache the first tokens unpacked, and pack them all when there are so many", low=0
    )
    prefill_chunk: int | None = _option(
        None,
        "tokens of a prompt that are computed at once; fewer take less memory (default: what suits "
        "the device)",
        low=1,
        high=1 << 20,
    )

    def __post_init__(self) -> None:
        """Refuse what could not take effect."""
        _Checked.__post_init__(self)
        if self.keep is not None and self.on_full != "slide":
            problem = "does nothing without --on-full slide; give that too, or leave it out"
            raise _refusal("keep", problem)
        if self.kv_start and self.kv_bits in (16, 32):
            problem = "does nothing without --kv-bits 8 or 4; leave it out"
            raise _refusal("kv_start", problem)

    @property
    def key_value_bits(self) -> tuple[int, int]:
        """Bits of keys and of values."""
        keys, _, values = str(self.kv_bits).partition(":")
        return int(keys), int(values or keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions(_Checked):
    """How a chat at a terminal shows and keeps what is said."""

    plain: bool = _option(False, "show answers as they come, without Markdown")
    chat_cache_bytes: int = _option(
        2_000_000_000,
        "bytes that the caches of the newest chats may take on disk together; 0 keeps none",
        low=0,
        high=1 << 62,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions(_Checked):
    """What a model directory shall hold."""

    bits: int | None = _option(None, "bits per weight (default: 4)", choices=(2, 3, 4, 5, 6, 8))
    target_bpw: float | None = _option(
        None,
        "bits per weight of the whole model as stored, at most: bits and group of each matrix are "
        "chosen by measuring what its packing costs",
        low=2.0,
        high=16.0,
    )
    group_size: int | None = _option(
        None,
        "weights that share a scale (default: 64, or the largest that divides a width)",
        choices=(32, 64, 128),
    )
    quantize: bool = _option(True, "pack the matrices", python_only=True)
    dtype: str | None = _option(
        None,
        "dtype of scales and unquantized tensors (default: the source's)",
        choices=DTYPE_NAMES,
    )
    kind: str | None = _option(
        None, "which Llama it is, such as llama3.1-instruct (default: found out, with its reason)"
    )
    rope_factor: float | None = _option(
        None, "factor of Llama 3.1's RoPE scaling (default: found out)", low=1.0, high=1024.0
    )
    mode: str = _option("affine", "format: affine, mxfp4, mxfp8 or nvfp4", choices=tuple(MODE_BITS))
    method: str = _option(
        "rtn",
        "rtn (round to nearest), mse (scales of less squared error; default of quantize), or with "
        "a calibration text: gptq (weights make up for each other's errors), awq (finer steps for "
        "strong inputs), awq+gptq (both), auto (of those what errs least, matrix by matrix)",
        choices=METHODS,
    )
    override: list[str] = _option(
        [],
        "PATTERN=BITS[:GROUP], PATTERN=MODE or PATTERN=dense for the tensors that a pattern means: "
        "attention, feed-forward, embedding, head, or a name with *; the last one counts; "
        "repeatable",
    )
    allow_requantize: bool = _option(
        False, "take a source that is quantized already, whose errors stay"
    )

    @property
    def weight_bits(self) -> int | None:
        """Bits of most weights, None without quantization and where they are to be chosen."""
        if self.target_bpw is not None:
            return None
        return (self.bits or MODE_BITS[self.mode]) if self.quantize else None


def generation_options(given: Mapping[str, Any]) -> GenerationOptions:
    """Check keywords by name; an unknown one is an OptionError that suggests the nearest."""
    return GenerationOptions(**_known(given, GenerationOptions))


def context_options(given: Mapping[str, Any]) -> ContextOptions:
    """Do the same for what a session is made with."""
    return ContextOptions(**_known(given, ContextOptions))


def split_options(given: Mapping[str, Any]) -> tuple[ContextOptions, dict[str, Any]]:
    """Return the context of a single answer, checked, and the keywords of `GenerationOptions`."""
    _known(given, GenerationOptions, ContextOptions)
    names = {spec.name for spec in fields(ContextOptions)}
    context = ContextOptions(**{name: value for name, value in given.items() if name in names})
    return context, {name: value for name, value in given.items() if name not in names}


def _known(given: Mapping[str, Any], *options: type) -> Mapping[str, Any]:
    known = [spec.name for kind in options for spec in fields(kind)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f": choose from {', '.join(known)}"
            raise OptionError(f"option {name!r} is unknown{hint}")
    return given
