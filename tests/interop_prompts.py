"""What peers and we are asked to continue; also used to make the golden values."""

from __future__ import annotations

from dataclasses import replace

from random_models import CASES, Case

N_TOKENS = 64
RANDOM_CASE: Case = replace(CASES["llama3.2"], seed=300)
PROMPTS = {
    "stories260k": ("", "Once upon a time", "Lily and Tom went to the park.", "The dog "),
    "random": ("Hello world", "def f(x):\n    return x\n", "日本語 😀 \u00e9"),
}
