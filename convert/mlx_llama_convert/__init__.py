"""Checkpoint files become a model directory."""

from mlx_llama_convert.conversion import convert_checkpoint
from mlx_llama_convert.plan import ConversionPlan, make_plan
from mlx_llama_convert.recognition import open_source
from mlx_llama_convert.source import SourceModel

__all__ = ["ConversionPlan", "SourceModel", "convert_checkpoint", "make_plan", "open_source"]
