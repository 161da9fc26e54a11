"""Operations of a Llama on a processor, as MLX primitives.

Built against one version of MLX, whose C++ interface changes with every release; another one is
refused here, by name, where loading it would crash.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_llama_kernels._built_for import MLX_VERSION

if mx.__version__ != MLX_VERSION:
    raise ImportError(
        f"mlx_llama_kernels was built for mlx {MLX_VERSION}, found mlx {mx.__version__}: "
        "build it again (make kernels)"
    )

INTERFACE = 7  # grows whenever a function is added or takes something else; mlx_llama asks for it

from mlx_llama_kernels._kernels import (
    MOST_GROUPS,
    MOST_HEAD_DIM,
    TokenPass,
    append,
    append_packed,
    attention,
    attention_scratch,
    dequantize,
    draw,
    file_array,
    instructions,
    join_rows,
    keep_likeliest,
    least_squares,
    likeliest,
    matmul,
    product_scratch,
    quantize,
    quantized_matmul,
    rms_norm,
    rotate,
    scratch_bytes,
    swiglu,
    threads,
    use_byte_activations,
    use_instructions,
    use_threads,
)

__all__ = [
    "INTERFACE",
    "MLX_VERSION",
    "MOST_GROUPS",
    "MOST_HEAD_DIM",
    "TokenPass",
    "append",
    "append_packed",
    "attention",
    "attention_scratch",
    "dequantize",
    "draw",
    "file_array",
    "instructions",
    "join_rows",
    "keep_likeliest",
    "least_squares",
    "likeliest",
    "matmul",
    "product_scratch",
    "quantize",
    "quantized_matmul",
    "rms_norm",
    "rotate",
    "scratch_bytes",
    "swiglu",
    "threads",
    "use_byte_activations",
    "use_instructions",
    "use_threads",
]
