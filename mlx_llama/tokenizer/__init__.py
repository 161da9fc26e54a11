"""Meta's tokenizers: one call opens a SentencePiece, tiktoken or `tokenizer.json` file."""

from mlx_llama.tokenizer.base import Detokenizer, Tokenizer
from mlx_llama.tokenizer.files import open_tokenizer

__all__ = ["Detokenizer", "Tokenizer", "open_tokenizer"]
