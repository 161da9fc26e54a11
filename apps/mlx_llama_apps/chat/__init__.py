"""`mlx-llama chat`: a conversation in the terminal, made of parts that know little of each other.

`talk` is the conversation on the inference thread, with `store`, its file, and `folders`, where all
files are; `commands` the table of what begins with a slash, with `settings`; `view` all that is
drawn, with `streaming`, `blocks` and `markdown`; `reader` the keyboard, with `hush` for when nobody
reads it. `conversation` joins them, with `answers`, `shelf` for the saved chats, and `parts`, what
those share; `command` reads the flags.
"""

from mlx_llama_apps.chat.command import chat, with_optional_values

__all__ = ["chat", "with_optional_values"]
