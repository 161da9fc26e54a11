"""The `mlx-llama` command."""
