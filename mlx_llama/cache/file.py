"""A cache on disk: one safetensors file with the rows, the token ids, the counts and the model.

A file is written beside its place and renamed; only its owner may read it, as it holds what was
said. One that is read is not trusted: every count and shape is checked before it is used.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_llama.cache.kv import KVCache
from mlx_llama.cache.rows import PLAIN, Layer, Storage, Stored, group_size
from mlx_llama.cache.window import Window
from mlx_llama.dtypes import name_of
from mlx_llama.errors import CheckpointError, OptionError
from mlx_llama.safetensors_reader import open_with_metadata
from mlx_llama.safetensors_writer import Entry, SafetensorsWriter
from mlx_llama.strict_json import parse_json_bytes
from mlx_llama.tensor_ref import TensorRef

VERSION = 1
MOST_TOKENS = 1 << 40
MOST_SHOWN = 150  # letters of what a file says
TOKENS = "tokens"


def save_cache(
    path: Path, cache: KVCache, *, tokens: Sequence[int], fingerprint: Mapping[str, str]
) -> None:
    """Write a cache and the ids that it counts; one layer's keys or values are copied at a time.

    fingerprint: what tells the model from others, by name. Raises ValueError when ids and cache
    disagree, or for a batch; OSError as the disk gives it, with nothing half written.
    """
    if len(tokens) != cache.offset:
        raise ValueError(f"{len(tokens)} tokens for a cache of {cache.offset}")
    arrays = dict(_arrays(cache, tokens))
    if any(array.ndim > 1 and array.shape[0] != 1 for array in arrays.values()):
        raise ValueError("a cache of several texts cannot be saved as one")
    entries: list[Entry] = [(name, name_of(a.dtype), a.shape) for name, a in arrays.items()]
    metadata = {"cache": json.dumps(_state(cache)), "model": json.dumps(dict(fingerprint))}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)  # made for its owner alone, which writing to it does not change
    beside = Path(name)
    try:
        with SafetensorsWriter(beside, entries, metadata) as file:
            for name in list(arrays):
                file.write(name, arrays.pop(name))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_cache(
    path: Path,
    cache: KVCache,
    *,
    dtype: mx.Dtype,
    fingerprint: Mapping[str, str],
    keep: int | None = None,
) -> list[int]:
    """Fill a cache with what `save_cache` wrote for the same model; return the ids.

    dtype: of the activations; where they are float32, rows in that and in float16 become what the
    cache stores, as devices differ. keep: the first tokens that must have been kept, where any were
    forgotten; None takes what was kept. The cache decides how it grows, forgets and stores; a file
    that was not saved with the same is refused, but that one from which nothing was forgotten fits
    into any context that is long enough. Raises CheckpointError with the reason, and nothing is
    changed.
    """
    try:
        refs, metadata = open_with_metadata(path)
    except CheckpointError as error:
        if path.is_file():
            raise _refusal(path, "damaged, or something else") from error
        raise
    state, model = (_object(path, metadata, name) for name in ("cache", "model"))
    if not _is_same(found := state.get("version"), VERSION):
        raise _refusal(path, f"version {_shown(found)} of the format, expected {VERSION}")
    for name, expected in fingerprint.items():
        if not _is_same(found := model.get(name), expected):
            what = "of dtype" if name == "dtype" else f"another model's: {name}"
            raise _refusal(path, f"{what} {_shown(found)}, here {expected}")
    _check_storage(path, cache, state)
    window = _window(path, cache, state)
    if keep is not None and window.forgotten and keep != window.keep:
        raise _refusal(
            path, f"of --keep {window.keep} and has forgotten tokens, here --keep {keep}"
        )
    is_packed = state.get("is_packed") is True
    name = _dtype_of(refs, dtype)
    expected = dict(_expected(cache, window, name, is_packed=is_packed))
    if {name: (ref.dtype, ref.shape) for name, ref in refs.items()} != expected:
        raise _refusal(path, "damaged: the arrays are not those that its counts tell of")
    tokens = cast(list[int], refs.pop(TOKENS).read().tolist())
    if tokens and max(tokens) >= cache.config.vocab_size:
        raise _refusal(path, f"damaged: there is no token {max(tokens)}")
    n_layers = cache.config.n_layers if tokens else 0
    here = cache.storage.dtype or dtype
    storage = None if name == name_of(here) else replace(cache.storage, dtype=here)
    layers = [_layer(refs, index, cache, storage, is_packed) for index in range(n_layers)]
    cache.take_up(window, layers, is_packed=is_packed)
    return tokens


def _arrays(cache: KVCache, tokens: Sequence[int]) -> Iterator[tuple[str, mx.array]]:
    yield TOKENS, mx.array(list(tokens), dtype=mx.uint32)
    for index, layer in enumerate(cache.layers()):
        for kind, rows in (("keys", layer.keys), ("values", layer.values)):
            for part, array in enumerate(rows.arrays if rows is not None else ()):
                yield _name(index, kind, part), array


def _name(index: int, kind: str, part: int) -> str:
    return f"layers.{index}.{kind}.{part}"


def _state(cache: KVCache) -> dict[str, Any]:
    window = cache.window
    return {
        "version": VERSION,
        "bits": str(cache.bits),
        "packed_from": cache.packed_from,
        "is_packed": cache.is_packed,
        "slides": window.slides,
        "capacity": window.capacity,
        "keep": window.keep,
        "offset": window.offset,
        "first": window.first,
        "shift": window.shift,
    }


def _object(path: Path, metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    if name not in metadata:
        raise CheckpointError(f"{path}: not a saved cache: its metadata has no {name!r}")
    return parse_json_bytes(metadata[name].encode(), where=f"{path}: {name}")


def _refusal(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: this saved cache is {what}; the text must be computed anew")


def _shown(found: object) -> str:
    """Return what a file says as part of a line: it is not trusted to be one, or short."""
    return repr(str(found)[:MOST_SHOWN])[1:-1]


def _is_same(found: object, expected: object) -> bool:
    """Compare with the type: JSON's true is no 1."""
    return type(found) is type(expected) and found == expected


def _check_storage(path: Path, cache: KVCache, state: Mapping[str, Any]) -> None:
    bits, start = state.get("bits"), state.get("packed_from")
    if not _is_same(bits, str(cache.bits)) or not _is_same(start, cache.packed_from):
        raise _refusal(
            path,
            f"of --kv-bits {_shown(bits)} --kv-start {_shown(start)}, here --kv-bits {cache.bits} "
            f"--kv-start {cache.packed_from}",
        )


def _window(path: Path, cache: KVCache, state: Mapping[str, Any]) -> Window:
    """Return the counts of a file, in the window of the cache that takes them up."""
    names = ("offset", "first", "shift", "keep", "capacity")
    numbers = [state.get(name) for name in names]
    if any(type(number) is not int or abs(number) > MOST_TOKENS for number in numbers):
        raise _refusal(path, "damaged: a count is missing or no possible number")
    offset, first, shift, keep, capacity = cast(list[int], numbers)
    slides = state.get("slides") is True
    here = cache.window
    if first != keep and (capacity, slides) != (here.capacity, here.slides):
        raise _refusal(
            path,
            f"of --context {capacity} --on-full {_policy(slides)} and has forgotten tokens, here "
            f"--context {here.capacity} --on-full {_policy(here.slides)}",
        )
    if offset > here.capacity and first == keep:
        raise _refusal(path, f"of {offset} tokens, more than --context {here.capacity} takes")
    try:
        if first == keep:  # nothing was forgotten, so it does not matter what would have been kept
            keep = first = here.keep
        window = replace(here, keep=keep)
        window.resume(offset=offset, first=first, shift=shift)
    except (OptionError, ValueError) as error:
        raise _refusal(path, f"damaged: {error}") from error
    return window


def _policy(slides: bool) -> str:
    return "slide" if slides else "stop"


def _dtype_of(refs: Mapping[str, TensorRef], dtype: mx.Dtype) -> str:
    """Return the dtype that a file's numbers have, or ought to have."""
    last = max((name for name in refs if name != TOKENS), default=None)
    may_be_half = dtype == mx.float32 and last is not None and refs[last].dtype == "float16"
    return "float16" if may_be_half else name_of(dtype)


def _expected(
    cache: KVCache, window: Window, name: str, *, is_packed: bool
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield dtype and shape of each array that a file with these counts holds, by name.

    name: the dtype of its numbers.
    """
    yield TOKENS, ("uint32", (window.offset,))
    config = cache.config
    for index in range(config.n_layers if window.offset else 0):
        for kind, bits in _stored_bits(cache, is_packed=is_packed):
            parts = [(name, config.head_dim)]
            if bits != PLAIN:
                scales = (name, config.head_dim // group_size(config.head_dim))
                parts = [("uint32", config.head_dim * bits // 32), scales, scales]
            for part, (of, width) in enumerate(parts):
                yield _name(index, kind, part), (of, (1, config.n_kv_heads, window.n_rows, width))


def _stored_bits(cache: KVCache, *, is_packed: bool) -> tuple[tuple[str, int], tuple[str, int]]:
    keys, values = (cache.bits.keys, cache.bits.values) if is_packed else (PLAIN, PLAIN)
    return ("keys", min(keys, PLAIN)), ("values", min(values, PLAIN))


def _layer(
    refs: Mapping[str, TensorRef],
    index: int,
    cache: KVCache,
    storage: Storage | None,
    is_packed: bool,
) -> Layer:
    """Read one layer. storage: of numbers that are to become others; None leaves them."""

    def read(kind: str, bits: int) -> Stored:
        n_parts = 1 if bits == PLAIN else 3
        parts = tuple(refs[_name(index, kind, part)].read() for part in range(n_parts))
        group = 0 if bits == PLAIN else group_size(cache.config.head_dim)
        stored = Stored(parts, bits, group)
        if storage is None:
            return stored
        stored = stored.owned(storage)
        mx.eval(stored.arrays)  # so that the numbers of one layer alone are there twice
        return stored

    return Layer(*(read(*each) for each in _stored_bits(cache, is_packed=is_packed)))
