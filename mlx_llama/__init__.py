"""Run Meta's Llama models on Apple's MLX.

Letters used in shapes everywhere: B batch, L new tokens, S cached tokens, H query heads,
K key/value heads, D head_dim, V vocabulary.

Importing this package is cheap: MLX loads with the first name that needs it (PEP 562), and with it
on Linux, where the native kernels are not installed, an optimised BLAS that is (`blas.py`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_llama.config import ModelConfig
    from mlx_llama.errors import MlxLlamaError
    from mlx_llama.generation import Stats, Step
    from mlx_llama.llama import Llama
    from mlx_llama.loading import load
    from mlx_llama.prompts import Message
    from mlx_llama.session import Session
    from mlx_llama.tokenizer import Tokenizer, open_tokenizer

__version__ = "0.1.0"

__all__ = [
    "Llama",
    "Message",
    "MlxLlamaError",
    "ModelConfig",
    "Session",
    "Stats",
    "Step",
    "Tokenizer",
    "__version__",
    "load",
    "open_tokenizer",
]

_HOMES = {
    "Llama": "llama",
    "Message": "prompts",
    "MlxLlamaError": "errors",
    "ModelConfig": "config",
    "Session": "session",
    "Stats": "generation",
    "Step": "generation",
    "Tokenizer": "tokenizer",
    "load": "loading",
    "open_tokenizer": "tokenizer",
}


class _BeforeMlx:
    """Stands among the finders of modules, and finds none.

    It stays: who leaves a list that is gone through hides the next finder.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Let `blas.py` do its work when MLX is about to be loaded."""
        if name == "mlx.core":
            import_module("mlx_llama.blas").take()


if sys.platform == "linux" and "mlx.core" not in sys.modules:
    sys.meta_path.insert(0, _BeforeMlx)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
