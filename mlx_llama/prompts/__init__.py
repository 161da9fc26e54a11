"""Prompt formats: from messages to the exact tokens that Meta trained each chat model on.

No template is executed: the kind chooses one of the formats written here.
"""

from mlx_llama.errors import UnsupportedModelError
from mlx_llama.kinds import Kind
from mlx_llama.prompts.base import Message, PromptFormat, as_messages
from mlx_llama.prompts.codellama70b import CodeLlama70bFormat
from mlx_llama.prompts.llama2 import Llama2Format
from mlx_llama.prompts.llama3 import Llama3Format
from mlx_llama.prompts.plain import PlainFormat
from mlx_llama.tokenizer.base import Tokenizer

__all__ = ["Message", "PlainFormat", "PromptFormat", "as_messages", "prompt_format"]


def prompt_format(kind: Kind, tokenizer: Tokenizer) -> PromptFormat:
    """Return the format that a kind was trained on.

    Raises: UnsupportedModelError for a kind without one; TokenizerError when the tokenizer lacks
    the format's special tokens.
    """
    match kind.prompt:
        case "llama2":
            return Llama2Format(tokenizer)
        case "llama3":
            return Llama3Format(tokenizer, name="llama3", is_dated=False, is_stripped=True)
        case "llama3.1":
            return Llama3Format(tokenizer, name="llama3.1", is_dated=True, is_stripped=False)
        case "codellama-70b":
            return CodeLlama70bFormat(tokenizer)
        case "raw":
            raise UnsupportedModelError(
                f"{kind.name}: a base model has no chat format; use --raw to complete plain text, "
                "or --kind if it is an instruct model"
            )
    raise UnsupportedModelError(
        f"{kind.name}: no chat with the prompt format {kind.prompt!r}; use --raw and give the "
        "whole prompt"
    )
