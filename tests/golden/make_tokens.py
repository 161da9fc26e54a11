"""Make tests/golden/tokens.json: tokens as Meta's own code gives them, for texts and dialogs.

Needs llama-models (made with 0.3.0) and sentencepiece with protobuf, which the tests do not, and
Meta's tokenizer files: `python tests/golden/make_tokens.py SHARED`, the folder that holds
`tokenizers/llama2.model`, `tokenizers/llama3.model` and `checkpoints/stories260k`.
Large texts are stored as [number of tokens, SHA-256 of the ids as little-endian 32-bit numbers].
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer as Llama3Tokenizer
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as proto

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from token_texts import BROKEN_TEXTS, DATE, DIALOGS, LARGE_TEXTS, TEXTS, TOOL_DIALOG  # noqa: E402

Encode = Callable[[str], list[int]]
Dialog = Sequence[dict[str, str]]
DATES = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n"


def digest(ids: list[int]) -> list[int | str]:
    return [len(ids), hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()]


def llama3_dialog(chat: ChatFormat, dialog: Dialog, *, strip: bool) -> list[int]:
    messages = [
        RawMessage(role=m["role"], content=m["content"].strip() if strip else m["content"])
        for m in dialog
    ]
    return chat.encode_dialog_prompt(messages).tokens


def dated(dialog: Dialog) -> Dialog:
    if dialog[0]["role"] == "system":
        return [{"role": "system", "content": DATES + dialog[0]["content"]}, *dialog[1:]]
    return [{"role": "system", "content": DATES}, *dialog]


def llama2_dialog(sp: SentencePieceProcessor, dialog: Dialog) -> list[int]:
    """The rule of Meta's llama/generation.py, written down once more."""
    texts = [m["content"] for m in dialog]
    if dialog[0]["role"] == "system":
        texts = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}", *texts[2:]]
    ids: list[int] = []
    for start in range(0, len(texts) - 1, 2):
        user, answer = texts[start].strip(), texts[start + 1].strip()
        ids += [sp.bos_id(), *sp.encode(f"[INST] {user} [/INST] {answer} "), sp.eos_id()]
    return [*ids, sp.bos_id(), *sp.encode(f"[INST] {texts[-1].strip()} [/INST]")]


def codellama_dialog(sp: SentencePieceProcessor, dialog: Dialog) -> list[int]:
    """The rule of Meta's codellama llama/generation.py, answers addressed to the user."""
    if dialog[0]["role"] != "system":
        dialog = [{"role": "system", "content": ""}, *dialog]
    ids = [sp.bos_id()]
    for message in dialog:
        header = f" Source: {message['role']}"
        if message["role"] == "assistant":
            header += "\nDestination: user"
        ids += sp.encode(header)
        if message["content"]:
            ids += sp.encode("\n\n " + message["content"].strip())
        ids.append(sp.piece_to_id("<step>"))
    return [*ids, *sp.encode(" Source: assistant\nDestination: user"), *sp.encode("\n\n ")]


def with_step(path: Path) -> SentencePieceProcessor:
    """Llama 2's tokenizer with `<step>` behind its pieces, as Code Llama 70B has it."""
    model = proto.ModelProto()
    model.ParseFromString(path.read_bytes())
    model.pieces.add(piece="<step>", score=0.0, type=proto.ModelProto.SentencePiece.CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def main(shared: Path) -> None:
    sp = SentencePieceProcessor(model_file=str(shared / "tokenizers/llama2.model"))
    small = SentencePieceProcessor(
        model_file=str(shared / "checkpoints/stories260k/tokenizer.model")
    )
    llama3 = Llama3Tokenizer(shared / "tokenizers/llama3.model")
    chat = ChatFormat(llama3)
    step = with_step(shared / "tokenizers/llama2.model")

    def encode3(text: str) -> list[int]:
        return llama3.encode(text, bos=False, eos=False)

    encoders: dict[str, Encode] = {"llama2": sp.encode, "llama3": encode3, "small": small.encode}
    golden = {
        "texts": {name: [encode(text) for text in TEXTS] for name, encode in encoders.items()},
        "broken": [encode3(text) for text in BROKEN_TEXTS],
        "large": {
            name: {key: digest(encode(text)) for key, text in LARGE_TEXTS.items()}
            for name, encode in encoders.items()
        },
        "dialogs": {
            "llama2": [llama2_dialog(sp, d) for d in DIALOGS],
            "llama3": [llama3_dialog(chat, d, strip=True) for d in DIALOGS],
            "llama3.1": [llama3_dialog(chat, d, strip=False) for d in DIALOGS],
            "llama3.1 dated": [llama3_dialog(chat, dated(d), strip=False) for d in DIALOGS],
            "codellama-70b": [codellama_dialog(step, d) for d in DIALOGS],
        },
        "tool": llama3_dialog(chat, TOOL_DIALOG, strip=False),
    }
    text = json.dumps(golden, indent=0, separators=(",", ":"))
    # One line for each list of ids.
    text = text.replace(",\n", ",").replace("[\n", "[").replace("\n]", "]").replace("],", "],\n")
    (HERE / "tokens.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
