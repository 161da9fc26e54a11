from mlx_llama.signatures import _LEGACY_TORCH,explain_foreign # moved to mlx_llama
