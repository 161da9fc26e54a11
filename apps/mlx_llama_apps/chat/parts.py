"""What the chat at a terminal is made of, for those who need all of it."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_llama_apps.chat.reader import Reader
from mlx_llama_apps.chat.settings import Settings
from mlx_llama_apps.chat.talk import Talk
from mlx_llama_apps.chat.view import View
from mlx_llama_apps.inference import Inference


@dataclass(frozen=True, slots=True)
class Parts:
    """The conversation's thread, the screen, the keyboard, and what the chat goes by."""

    inference: Inference[Talk]
    view: View
    reader: Reader
    settings: Settings
