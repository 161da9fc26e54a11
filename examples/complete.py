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
    main(*sys.argv[1:])
