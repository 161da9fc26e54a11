"""Hides the native kernels from each Python that has this folder on its path."""

import sys

sys.modules["mlx_llama_kernels"] = None  # pyright: ignore[reportArgumentType]
