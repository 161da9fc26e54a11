"""Continue a text: python examples/complete.py MODEL "Once upon a time"."""

import sys

import mlx_llama


def main(model: str, prompt: str) -> None:
    llama = mlx_llama.load(model)
    print(prompt, end="")
    for step in llama.stream(prompt, temperature=0, max_tokens=40):
        print(step.text, end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python examples/complete.py MODEL TEXT", file=sys.stderr)
        sys.exit(2)
    try:
        main(*sys.argv[1:])
    except mlx_llama.MlxLlamaError as error:
        sys.exit(str(error))
