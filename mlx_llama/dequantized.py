"""Products with packed matrices where a BLAS multiplies: dequantized, some rows at a time."""

from __future__ import annotations

import mlx.core as mx

from mlx_llama.config import QuantFormat

LEAST_ROWS = 8  # of x, from which on it pays
BYTES = 32 << 20  # of what is dequantized at once
NUMBER_BYTES = 2 * mx.float32.size  # MLX takes two floats for each number


def multiply(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, form: QuantFormat
) -> mx.array:
    """Multiply x (..., in) by a packed matrix: (..., out), some rows of it dequantized at a time.

    Evaluates: MLX would allocate all that a pass dequantizes before it computes the first product.
    """
    if biases is not None:  # numbers take the scales' dtype, and would be rounded to a smaller one
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    n_rows = max(1, BYTES // (x.shape[-1] * NUMBER_BYTES))
    parts: list[mx.array] = []
    for start in range(0, weight.shape[0], n_rows):
        rows = slice(start, start + n_rows)
        bias_rows = None if biases is None else biases[rows]
        dense = mx.dequantize(
            weight[rows],
            scales[rows],
            bias_rows,
            group_size=form.group_size,
            bits=form.bits,
            mode=form.mode,
        )
        parts.append(x @ dense.astype(mx.float32).T)
        del dense
        mx.eval(parts[-1])
    product = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
    mx.eval(product)  # or its parts would wait beside it
    return product
