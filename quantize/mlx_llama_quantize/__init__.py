"""Which tensors of a Llama are packed, in how many bits, and the packing itself."""

from mlx_llama_quantize.packing import packed_entries, quantize_weights
from mlx_llama_quantize.spec import QuantSpec

__all__ = ["QuantSpec", "packed_entries", "quantize_weights"]
