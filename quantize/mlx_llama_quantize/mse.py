"""Scales and biases of least squared error, in MLX's affine format.

MLX takes them from the least and the largest weight of a group. Here they are searched: from a
range that is a little narrower, scale and bias are solved for by least squares, the codes are
chosen anew, and so on. What is compared is what will be read: scale and bias as stored, bfloat16 or
float16 rounding included. MLX's own scale and bias are one of the candidates, so that no group is
ever worse off.

In NumPy, a thousand groups at a time, each of them a column (G, N): MLX's elementwise operations on
a CPU, where packing runs, take several times as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_llama.config import QuantFormat

CHUNK = 1 << 16  # weights, float32: what stays in a core's cache
SHRINK = 0.92  # of the range, where the search begins
ROUNDS = 2  # of solving for scale and bias
EPSILON = np.float32(1e-7)  # MLX's least scale

Packed = tuple[mx.array, mx.array, mx.array]  # weight, scales, biases


@dataclass(slots=True)
class Grid:
    """Scale and bias of groups, (N,) float32, as they are stored."""

    scale: np.ndarray
    bias: np.ndarray


def quantize(values: mx.array, form: QuantFormat) -> Packed:
    """Pack values (out, in), evaluated, as `mx.quantize` does; scales have the values' dtype."""
    n_rows, width = values.shape
    groups = np.array(values.astype(mx.float32)).reshape(-1, form.group_size)
    codes = np.empty(groups.shape, np.uint8)
    scale, bias = (np.empty(len(groups), np.float32) for _ in range(2))
    step = max(1, CHUNK // form.group_size)
    for start in range(0, len(groups), step):
        rows = slice(start, start + step)
        columns = np.ascontiguousarray(groups[rows].T)
        grid = search(columns, form.bits, values.dtype)
        codes[rows] = nearest(columns, grid, form.bits).astype(np.uint8).T
        scale[rows], bias[rows] = grid.scale, grid.bias
    return packed(codes.reshape(n_rows, width), scale, bias, form, values.dtype)


def packed(
    codes: np.ndarray, scale: np.ndarray, bias: np.ndarray, form: QuantFormat, dtype: mx.Dtype
) -> Packed:
    """Return the arrays of a model directory for codes (out, in) uint8 and a grid of its groups."""
    n_rows, width = codes.shape
    weight = mx.array(pack_codes(codes, form.bits).reshape(n_rows, -1))
    per_row = (n_rows, width // form.group_size)
    scales, biases = (mx.array(a.reshape(per_row)).astype(dtype) for a in (scale, bias))
    mx.eval(weight, scales, biases)
    return weight, scales, biases


def search(groups: np.ndarray, bits: int, dtype: mx.Dtype) -> Grid:
    """Return the best grid found for each of the groups (G, N) float32."""
    low, high = groups.min(axis=0), groups.max(axis=0)
    best = minimum_maximum(low, high, bits, dtype)
    codes, rest = np.empty_like(groups), np.empty_like(groups)
    error = _try(groups, best, bits, codes, rest)
    middle, half = (low + high) / 2, (high - low) * np.float32(SHRINK / 2)
    grid = _stored(2 * half / np.float32(2**bits - 1), middle - half, dtype)
    total = groups.sum(axis=0)
    for step in range(ROUNDS + 1):
        found = _try(groups, grid, bits, codes, rest)
        is_better = found < error
        for kept, new in ((error, found), (best.scale, grid.scale), (best.bias, grid.bias)):
            np.copyto(kept, new, where=is_better)
        if step < ROUNDS:
            grid = _solved(groups, total, codes, grid, dtype)
    return best


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


def nearest(groups: np.ndarray, grid: Grid, bits: int) -> np.ndarray:
    """Return the codes (G, N), whole float32, that come nearest to the weights."""
    codes = groups - grid.bias
    codes *= _inverse(grid.scale)
    np.rint(codes, out=codes)
    return np.clip(codes, 0, 2**bits - 1, out=codes)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes, uint8, as MLX stores them: one stream of bits, least first, (n,) uint32."""
    if bits == 8:
        return codes.reshape(-1).view("<u4")
    eights = codes.reshape(-1, 8)
    if bits in (2, 4):  # whole codes in every byte
        per_byte = 8 // bits
        octets = eights[:, 0::per_byte].copy()
        for place in range(1, per_byte):
            octets |= eights[:, place::per_byte] << np.uint8(place * bits)
        return octets.reshape(-1).view("<u4")
    words = eights[:, 0].astype("<u8")
    for place in range(1, 8):
        words |= eights[:, place].astype("<u8") << np.uint64(place * bits)
    # Eight codes take as many bytes as a code has bits.
    octets = words.view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(octets).reshape(-1).view("<u4")


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(0), 1 / np.where(scale == 0, np.float32(1), scale))


def _try(
    groups: np.ndarray, grid: Grid, bits: int, codes: np.ndarray, rest: np.ndarray
) -> np.ndarray:
    """Write the nearest codes, return the squared error of each group (N,); rest is scratch."""
    np.subtract(groups, grid.bias, out=rest)
    rest *= _inverse(grid.scale)
    np.rint(rest, out=codes)
    np.clip(codes, 0, 2**bits - 1, out=codes)
    rest -= codes
    error = np.einsum("gn,gn->n", rest, rest) * grid.scale * grid.scale
    return np.where(grid.scale == 0, np.float32(np.inf), error)


def _solved(
    groups: np.ndarray, total: np.ndarray, codes: np.ndarray, grid: Grid, dtype: mx.Dtype
) -> Grid:
    """Return the grid of least squared error for codes that stand; the old one where none is.

    total: the groups' sums (N,).
    """
    n = np.float32(len(codes))
    mean = codes.sum(axis=0) / n
    spread = np.einsum("gn,gn->n", codes, codes) - n * mean * mean
    shared = np.einsum("gn,gn->n", codes, groups) - mean * total
    is_flat = spread < 0.5  # all codes are the same: any scale does
    scale = np.where(is_flat, grid.scale, shared / np.where(is_flat, np.float32(1), spread))
    return _stored(scale, total / n - scale * mean, dtype)


def _stored(scale: np.ndarray, bias: np.ndarray, dtype: mx.Dtype) -> Grid:
    return Grid(rounded(scale, dtype), rounded(bias, dtype))


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
