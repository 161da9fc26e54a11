"""Scales and biases of less squared error than the nearest, in MLX's affine format.

MLX takes them from the least and the largest weight of a group. Here both ends are cut a little;
then, in turns, the nearest codes are taken, and scale and bias solved for by least squares. What is
compared is what will be read: scale and bias as stored, bfloat16 or float16 rounding included.
MLX's own scale and bias are the other candidate, so that no group is ever worse off.

The native kernels pack whole matrices, where they are installed, on any device: their
`least_squares` does what stands here, operation by operation, and gives the same bytes. Here it is
NumPy, some thousand groups at a time, each of them a column (G, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_llama import ops
from mlx_llama.config import QuantFormat

CHUNK = 1 << 18  # weights: fewer would make threads wait for Python's lock, more leave the cache
APART = 16  # groups fewer: rows of a power of two bytes would share a cache's few lines
# Steps, of 2**bits - 1, that the search's first range leaves out, by bits: of normal weights in
# groups of 64 the squared error is least so.
CUT = {2: 1.2, 3: 1.0, 4: 0.6, 5: 0.4, 6: 0.2, 8: 0.0}
ROUNDS = 2  # of choosing codes and solving for scale and bias
EPSILON = np.float32(1e-7)  # MLX's least scale

Packed = tuple[mx.array, mx.array, mx.array]  # weight, scales, biases


@dataclass(slots=True)
class Grid:
    """Scale and bias of groups, (N,) float32, as they are stored."""

    scale: np.ndarray
    bias: np.ndarray


def quantize(values: mx.array, form: QuantFormat) -> Packed:
    """Pack values (out, in), evaluated, as `mx.quantize` does; scales have the values' dtype."""
    packed = ops.least_squares(values, form, cut=CUT[form.bits], rounds=ROUNDS)
    return quantize_in_numpy(values, form) if packed is None else packed


def quantize_in_numpy(values: mx.array, form: QuantFormat) -> Packed:
    """Do what `quantize` does, without the native kernels."""
    groups = _stored_numbers(values).reshape(-1, form.group_size)
    words = np.empty((len(groups), form.group_size * form.bits // 32), np.uint32)
    scale, bias = (np.empty(len(groups), np.float32) for _ in range(2))
    step = CHUNK // form.group_size - APART
    scratch = np.empty((3, form.group_size, step), np.float32)
    for start in range(0, len(groups), step):
        rows = slice(start, start + step)
        columns, *others = scratch[:, :, : len(groups[rows])]
        _write_columns(groups[rows], columns)
        grid, codes = search(columns, form.bits, values.dtype, others)
        words[rows] = pack_codes(np.ascontiguousarray(codes.T), form.bits).reshape(len(codes.T), -1)
        scale[rows], bias[rows] = grid.scale, grid.bias
    return _arrays(words.reshape(len(values), -1), scale, bias, values.dtype)


def _stored_numbers(values: mx.array) -> np.ndarray:
    """Return an array's numbers without a copy; of bfloat16 the bits, uint16."""
    return np.array(values.view(mx.uint16) if values.dtype == mx.bfloat16 else values, copy=False)


def _write_columns(groups: np.ndarray, columns: np.ndarray) -> None:
    """Write groups (N, G) as columns (G, N) float32."""
    if groups.dtype == np.uint16:
        bits = columns.view(np.uint32)
        np.copyto(bits, groups.T)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(columns, groups.T)


def packed(
    codes: np.ndarray, scale: np.ndarray, bias: np.ndarray, form: QuantFormat, dtype: mx.Dtype
) -> Packed:
    """Return the arrays of a model directory for codes (out, in) uint8 and a grid of its groups."""
    return _arrays(pack_codes(codes, form.bits).reshape(len(codes), -1), scale, bias, dtype)


def _arrays(words: np.ndarray, scale: np.ndarray, bias: np.ndarray, dtype: mx.Dtype) -> Packed:
    weight = mx.array(words)
    scales, biases = (mx.array(a.reshape(len(words), -1)).astype(dtype) for a in (scale, bias))
    mx.eval(weight, scales, biases)
    return weight, scales, biases


@np.errstate(all="ignore")  # of weights near the end of float32, whose scales compare as worse
def search(
    groups: np.ndarray, bits: int, dtype: mx.Dtype, scratch: Sequence[np.ndarray] = ()
) -> tuple[Grid, np.ndarray]:
    """Return the best grid found for each of the groups (G, N) float32, and its codes, uint8.

    scratch: two arrays as the groups, where there are some.
    """
    low, high = groups.min(axis=0), groups.max(axis=0)
    rest, product = scratch or (np.empty_like(groups), np.empty_like(groups))
    grid, total = _cut(low, high, bits, dtype), _sum(groups)
    for _ in range(ROUNDS):
        codes = nearest(groups, grid, bits, out=rest)
        grid = _solved(groups, total, codes, product, dtype)
    known = minimum_maximum(low, high, bits, dtype)
    is_usable = grid.scale != 0
    grid.scale = np.where(is_usable, grid.scale, known.scale)
    found, codes = _tried(groups, grid, bits, rest, product)
    error, known_codes = _tried(groups, known, bits, rest, product)
    # In squared steps of the other: squares of large weights would be infinite.
    steps = grid.scale / known.scale
    is_better = is_usable & (found * steps * steps < error)
    codes ^= (codes ^ known_codes) & ~np.negative(is_better.view(np.uint8))
    scale = np.where(is_better, grid.scale, known.scale)
    return Grid(scale, np.where(is_better, grid.bias, known.bias)), codes


def minimum_maximum(low: np.ndarray, high: np.ndarray, bits: int, dtype: mx.Dtype) -> Grid:
    """Return `mx.quantize`'s own grid: the end of larger magnitude is met, and so is 0."""
    is_low = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), EPSILON)
    scale = np.where(is_low, scale, -scale)
    edge = np.where(is_low, low, high)
    steps = np.rint(edge / scale)
    is_zero = steps == 0
    scale = np.where(is_zero, scale, edge / np.where(is_zero, np.float32(1), steps))
    return _stored(scale, np.where(is_zero, np.float32(0), edge), dtype)


def _cut(low: np.ndarray, high: np.ndarray, bits: int, dtype: mx.Dtype) -> Grid:
    """Return the grid of a range that lacks as much at either end; its scale may be 0."""
    steps = np.float32(2**bits - 1)
    scale = (high - low) / np.float32(steps + CUT[bits])
    half = np.float32(0.5)
    return _stored(scale, (low + high) * half - scale * (steps * half), dtype)


def nearest(
    groups: np.ndarray, grid: Grid, bits: int, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Return the codes (G, N), whole float32, that come nearest to the weights; 0 of a scale 0."""
    codes = np.subtract(groups, grid.bias, out=out)
    codes *= _inverse(grid.scale)
    np.rint(codes, out=codes)
    return np.clip(codes, 0, 2**bits - 1, out=codes)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes, uint8, as MLX stores them: one stream of bits, least first, (n,) uint32."""
    eights = codes.reshape(-1).view("<u8")
    for width in (8, 16, 32):  # of two neighbours the upper one moves down to the lower one
        low = np.uint64((2**64 - 1) // (2**width + 1))
        shift = np.uint64((8 - bits) * width // 8)
        eights = (eights & low) | ((eights & ~low) >> shift)
    if bits in (2, 4, 8):
        return eights.astype(f"<u{bits}").view("<u4")
    # Eight codes take as many bytes as a code has bits.
    octets = eights.view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(octets).reshape(-1).view("<u4")


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(0), 1 / np.where(scale == 0, np.float32(1), scale))


def _tried(
    groups: np.ndarray, grid: Grid, bits: int, rest: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return each group's squared error in squared steps, (N,), and the codes, uint8.

    rest, codes: scratch.
    """
    np.subtract(groups, grid.bias, out=rest)
    rest *= 1 / grid.scale
    np.rint(rest, out=codes)
    np.clip(codes, 0, 2**bits - 1, out=codes)
    rest -= codes
    np.multiply(rest, rest, out=rest)
    return _sum(rest), codes.astype(np.uint8)


def _solved(
    groups: np.ndarray, total: np.ndarray, codes: np.ndarray, product: np.ndarray, dtype: mx.Dtype
) -> Grid:
    """Return the grid of least squared error for codes; scale 0 where they are all the same.

    total: the groups' sums (N,). product: scratch.
    """
    n = np.float32(len(codes))
    mean = _sum(codes) / n
    np.multiply(codes, codes, out=product)
    spread = _sum(product) - n * mean * mean
    np.multiply(codes, groups, out=product)
    shared = _sum(product) - mean * total
    is_flat = spread < 0.5
    scale = np.where(is_flat, np.float32(0), shared / np.where(is_flat, np.float32(1), spread))
    return _stored(scale, total / n - scale * mean, dtype)


def _sum(columns: np.ndarray) -> np.ndarray:
    """Add up columns (G, N), from the first row to the last.

    Not by einsum, which on some processors multiplies and adds in one rounding, nor one column by
    itself, whose numbers NumPy adds up in another order.
    """
    if columns.shape[1] == 1:
        return columns.cumsum(axis=0)[-1]
    return columns.sum(axis=0)


def _stored(scale: np.ndarray, bias: np.ndarray, dtype: mx.Dtype) -> Grid:
    return Grid(*rounded(np.stack((scale, bias)), dtype))


def rounded(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Return float32 values as the dtype holds them: to nearest, ties to even; no NaN."""
    if dtype == mx.float32:
        return values
    if dtype == mx.float16:
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    # Half of the last kept place, less a little where that place is even; the rest is cut off.
    upward = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + upward) & np.uint32(0xFFFF0000)).view(np.float32)
