"""Texts and conversations on which tokenizers are compared; also used to make the golden values."""

from __future__ import annotations

TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n",
    "\t",
    "\r\n\r\n",
    "Hello world",
    " Hello world",
    "  Hello  world  ",
    "This is a test sentence.",
    "user",
    "system",
    "safe",
    "unsafe",
    "S10",
    "1234",
    "3.14159, 1000000 and 0x7f",
    "[INST] Hi [/INST]",
    "<<SYS>>\nBe brief.\n<</SYS>>\n\nHi",
    "<s>",
    "</s><unk><0x0A>",
    "<|eot_id|>",
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n",
    "<step>",
    "I'll say it's THEY'RE we'Ve DON'T 's'",
    "\u2019s curly",
    "def f(x):\n    return x  # comment\n\n\tif x:\n",
    "a\0b",
    "\0",
    "\x1c\x1d\x85\xa0\u2028\u3000x",
    "na\u00efve e\u0301 \u01c5 \u0130 \u00df \ufb01",
    "日本語のテキスト、そして漢字。",
    "你好，世界",
    "한국어 텍스트",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "שלום",
    "😀",
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪 👍🏽",
    "a😀b😀",
    "\u2581 \u2581\u2581x",
    "\ufffd\ufeff",
    "\U0010ffff\U000e0001",
    "supercalifragilisticexpialidocious",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "=" * 100,
    " " * 200,
    "\n" * 100,
    "http://example.org/a?b=c&d=%20#e",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋",
    "ſtraße K Å",
)

# What is no Unicode text: only Llama 3's code of Meta takes it.
BROKEN_TEXTS = ("\ud800", "a\ud800b", "\udc00\ud800", "x\ud83d\ude00y")

_PROSE = "The quick brown fox jumps over 12 lazy dogs; it's a test.\nЖук и 漢字 😀.\n"

# Too large to commit their tokens: compared by number and hash. The limits are Meta's cuts of
# 25,000 characters without change between white space and text, and of 400,000 at all.
LARGE_TEXTS = {
    "spaces_100k": " " * 100_000,
    "spaces_25000": "a" + " " * 25_000 + "b",
    "spaces_25001": "a" + " " * 25_001 + "b",
    "letters_24999": "a" * 24_999 + " b",
    "letters_25000": "a" * 25_000 + " b",
    "letters_25001": " b" + "a" * 25_001 + " b",
    "letters_1m": "a" * 1_000_000,
    "newlines_60k": "\n" * 60_000,
    "cjk_60k": "漢字" * 30_000,
    "emoji_50k": "😀" * 50_000,
    "mixed_runs": ("x" * 30_000 + " \t" * 20_000 + "é\n") * 5,
    "prose_1m": _PROSE * (1_000_000 // len(_PROSE)),
    "prose_runs": (_PROSE * 300 + "-" * 26_000 + "\u3000" * 26_000) * 8,
}

_HI = {"role": "user", "content": " Hi, who are you?\n"}
_I_AM = {"role": "assistant", "content": "I am a model. "}
_MORE = {"role": "user", "content": "日本語 😀?\n\nAnd code:\n    x = 1"}
_SYSTEM = {"role": "system", "content": " Be brief, say <|eot_id|>.\n"}
_BARE = {"role": "user", "content": "x"}
_EMPTY = {"role": "user", "content": ""}

DIALOGS: tuple[tuple[dict[str, str], ...], ...] = (
    (_BARE,),
    (_HI,),
    (_EMPTY,),
    (_SYSTEM, _HI),
    ({"role": "system", "content": ""}, _HI),
    (_HI, _I_AM, _MORE),
    (_SYSTEM, _HI, _I_AM, _MORE),
    (_SYSTEM, _HI, _I_AM, _MORE, {"role": "assistant", "content": "</s> ok"}, _BARE),
)
TOOL_DIALOG: tuple[dict[str, str], ...] = (
    _SYSTEM,
    _HI,
    _I_AM,
    {"role": "tool", "content": '{"result": 42}'},
)
DATE = "26 Jul 2024"
