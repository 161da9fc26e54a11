"""The tokenizer files of a model directory, for us and for the programs that read Hugging Face's.

Takes an opened tokenizer and a kind, writes `tokenizer.model`, `tokenizer.json`,
`tokenizer_config.json`, `special_tokens_map.json` and, for a chat model, its template. The same
input gives the same bytes. The templates are our own, under `templates/`.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from mlx_llama.errors import OutputError, TokenizerError, UnsupportedModelError
from mlx_llama.kinds import Kind
from mlx_llama.tokenizer import Tokenizer
from mlx_llama.tokenizer.bpe import BpeTokenizer, special_names
from mlx_llama.tokenizer.files import format_of
from mlx_llama.tokenizer.spm import SentencePieceTokenizer
from mlx_llama_convert.tokenizer_json import Json, bpe_json, sentencepiece_json

TEMPLATES = ("llama2", "llama3", "llama3.1", "codellama-70b")
# What ends an answer in the formats where it is not what ends a text.
_ANSWER_ENDS = ("<|eot_id|>", "<step>")
# Published before 3.1, with other names for the special tokens that were not used yet.
_FIRST_NAMES = ("llama3", "llama3-instruct", "llama-guard-2")


def write_tokenizer_files(
    tokenizer: Tokenizer, kind: Kind, folder: Path, *, max_context: int
) -> list[str]:
    """Write all files into an empty folder and return their names.

    max_context: in tokens, what peers take as the longest text. A tokenizer that was read from a
    `tokenizer.json` keeps that file as it is and gets no `tokenizer.model`.

    Raises: OutputError when the folder refuses; TokenizerError when the source is gone.
    """
    contents: dict[str, bytes] = {}
    source = _source(tokenizer.path)
    if format_of(source) == "json":
        contents["tokenizer.json"] = source
    else:
        contents["tokenizer.model"] = source
        contents["tokenizer.json"] = _dump(_tokenizer_json(tokenizer, kind), indent=None)
    tokens = _named_tokens(tokenizer, kind)
    config = _config(tokens, max_context)
    if (template := chat_template(kind)) is not None:
        contents["chat_template.jinja"] = template.encode()
        config["chat_template"] = template
    contents["tokenizer_config.json"] = _dump(config, indent=2)
    contents["special_tokens_map.json"] = _dump(tokens, indent=2)
    for name, data in contents.items():
        _write(folder / name, data)
    return list(contents)


def chat_template(kind: Kind) -> str | None:
    """Return our Jinja template of the kind's prompt format, None where there is no chat."""
    if kind.prompt not in TEMPLATES:
        return None
    template = files("mlx_llama_convert") / "templates" / f"{kind.prompt}.jinja"
    return template.read_text(encoding="utf-8").removesuffix("\n")


def _tokenizer_json(tokenizer: Tokenizer, kind: Kind) -> Json:
    match tokenizer:
        case BpeTokenizer():
            scheme = "llama3" if kind.name in _FIRST_NAMES else "llama3.1"
            return bpe_json(tokenizer, special_names(scheme))
        case SentencePieceTokenizer():
            return sentencepiece_json(tokenizer)
    raise UnsupportedModelError(f"{tokenizer.path}: no tokenizer.json for {tokenizer.family}")


def _named_tokens(tokenizer: Tokenizer, kind: Kind) -> dict[str, str]:
    """Return the names of BOS, of EOS as peers use it (it ends an answer), and of unknown text."""
    by_id: dict[int, str] = {}
    for name, token_id in tokenizer.special_tokens.items():
        by_id.setdefault(token_id, name)  # the file's own names stand before aliases
    end = next((name for name in kind.stops if name in _ANSWER_ENDS), None)
    end_id = tokenizer.eos_id if end is None else tokenizer.special_tokens.get(end)
    if end_id is None:
        raise TokenizerError(
            f"{tokenizer.path}: no token {end}, which ends the answers of {kind.name}; check --kind"
        )
    tokens = {"bos_token": by_id[tokenizer.bos_id], "eos_token": by_id[end_id]}
    if tokenizer.family == "sentencepiece" and "<unk>" in tokenizer.special_tokens:
        tokens["unk_token"] = "<unk>"
    return tokens


def _config(tokens: dict[str, str], max_context: int) -> Json:
    # The class that takes tokenizer.json as it stands; "LlamaTokenizer" would change the spaces.
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "model_max_length": max_context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _dump(content: object, *, indent: int | None) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode()


def _source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read again: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
