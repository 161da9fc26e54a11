"""Ask two questions in one conversation: python examples/converse.py MODEL FIRST SECOND."""

import sys

import mlx_llama


def main(model: str, first: str, second: str) -> None:
    session = mlx_llama.load(model).session()
    for question in (first, second):
        steps = list(session.ask(question, temperature=0, max_tokens=40))
        stats = steps[-1].stats
        print("".join(step.text for step in steps))
        if stats is not None:
            print(f"  ({stats.cached_tokens} of {stats.prompt_tokens} prompt tokens were cached)")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        print("usage: python examples/converse.py MODEL FIRST SECOND", file=sys.stderr)
        sys.exit(2)
    try:
        main(*sys.argv[1:])
    except mlx_llama.MlxLlamaError as error:
        sys.exit(str(error))
