"""`mlx-llama chat`: a conversation in the terminal.

`talk` is the conversation on the inference thread, `commands` the table of what begins with a
slash, `screen` all that is drawn; `command` joins them.
"""

from mlx_llama_apps.chat.command import chat

__all__ = ["chat"]
