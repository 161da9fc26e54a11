"""Say how likely a text is: python examples/score.py MODEL "The sky is blue."."""

import sys

import mlx.core as mx

import mlx_llama


def main(model: str, text: str) -> None:
    llama = mlx_llama.load(model)
    ids = llama.tokenizer.encode(text, bos=True)
    logits = llama.logits(ids[:-1])  # (L - 1, V): the scores of each next token
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(scores, mx.array(ids[1:])[:, None], axis=-1)
    perplexity = mx.exp(-mx.mean(chosen)).item()
    print(f"{len(ids) - 1} tokens, perplexity {perplexity:.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python examples/score.py MODEL TEXT", file=sys.stderr)
        sys.exit(2)
    try:
        main(*sys.argv[1:])
    except mlx_llama.MlxLlamaError as error:
        sys.exit(str(error))
