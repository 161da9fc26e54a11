"""The likeliest answers of model directories, as token ids; as a program, with what is asked for.

python greedy_tokens.py off|any FOLDER... prints them as JSON, without a BLAS or with any.
"""

from __future__ import annotations

import json
import sys

import mlx_llama
from mlx_llama import blas

QUESTIONS = (
    "what does --top-k do?",
    "what is grouped-query attention?",
    "how do I convert Llama 3.1 70B?",
    "what is the capital of France?",
)


def greedy_tokens(folder: str) -> list[list[int]]:
    """Return the tokens of the answer to each question."""
    llama = mlx_llama.load(folder)
    answers = (
        llama.stream_chat([{"role": "user", "content": question}], temperature=0.0)
        for question in QUESTIONS
    )
    return [[step.token_id for step in answer] for answer in answers]


if __name__ == "__main__":
    if sys.argv[1] == blas.OFF:
        blas.choose(blas.OFF)
    from mlx_llama import ops

    tokens = [greedy_tokens(folder) for folder in sys.argv[2:]]
    print(json.dumps({"summary": ops.native_summary(), "tokens": tokens}))
