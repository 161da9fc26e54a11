"""The command line: subcommands, and the one place where errors become lines and exit codes.

Exit codes: 0, 1 error, 2 usage, 130 Ctrl-C. Imports no MLX, so that --help is quick.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError, MissingArgumentError

import mlx_llama
from mlx_llama.errors import MlxLlamaError, OptionError
from mlx_llama_apps import chat, convert, run, show

EXIT_ERROR, EXIT_USAGE, EXIT_CTRL_C = 1, 2, 130
WHAT_TO_GIVE = {
    "MODEL": "a model directory, such as mlx-llama convert makes of a checkpoint",
    "SOURCE": "the folder of a checkpoint, Meta's files or Hugging Face's",
}
OPTION = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)

app = App(
    name="mlx-llama",
    help="Meta's Llama checkpoints, quantized with MLX and run in your terminal.",
    version=mlx_llama.__version__,
    help_epilogue="Each command has its own --help. --debug shows a traceback with an error.",
)
app.command(convert.convert)
app.command(show.show)
app.command(run.run)
app.command(chat.chat)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error is one line on stderr."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    tokens, is_debugged = _without_debug(tokens)
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return 0
    except CycloptsError as error:
        return _fail(_usage_line(error, tokens), EXIT_USAGE, is_debugged)
    except OptionError as error:
        return _fail(str(error), EXIT_USAGE, is_debugged)
    except MlxLlamaError as error:
        return _fail(str(error), EXIT_ERROR, is_debugged)
    except KeyboardInterrupt:
        return EXIT_CTRL_C
    except BrokenPipeError:
        # Who read us has gone (`| head`); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = f"unexpected {type(error).__name__}: {error}; --debug shows where"
        return _fail(line, EXIT_ERROR, is_debugged)


def run_main() -> None:
    """Run as the installed command."""
    sys.exit(main())


def _fail(line: str, code: int, is_debugged: bool) -> int:
    if is_debugged:
        traceback.print_exc()
    print(f"mlx-llama: {' '.join(line.split())}", file=sys.stderr)
    return code


def _without_debug(tokens: list[str]) -> tuple[list[str], bool]:
    end = tokens.index("--") if "--" in tokens else len(tokens)
    kept = [token for token in tokens[:end] if token != "--debug"]
    return kept + tokens[end:], len(kept) != end


def _usage_line(error: CycloptsError, tokens: list[str]) -> str:
    """Say what is wrong with the command line and where to look."""
    command = tokens[0] if tokens and tokens[0] in app else None
    where = f"mlx-llama {command} --help" if command else "mlx-llama --help"
    return f"{_unknown_option(command, tokens) or _missing(error) or _plain(error)}; see {where}"


def _plain(error: CycloptsError) -> str:
    text = str(error).rstrip(". ")
    return text[:1].lower() + text[1:]


def _missing(error: CycloptsError) -> str | None:
    """Say what a missing MODEL or SOURCE is, not only that it is missing."""
    if not isinstance(error, MissingArgumentError) or error.argument is None:
        return None
    name = error.argument.name
    return f"{name} is missing: give {WHAT_TO_GIVE[name]}" if name in WHAT_TO_GIVE else None


def _unknown_option(command: str | None, tokens: list[str]) -> str | None:
    """Find a mistyped option, which a PROMPT that may begin with a hyphen would swallow."""
    if command is None:
        return None
    known = [
        name for argument in app[command].assemble_argument_collection() for name in argument.names
    ]
    end = tokens.index("--") if "--" in tokens else len(tokens)
    for token in tokens[1:end]:
        name = token.partition("=")[0]
        if OPTION.fullmatch(token) and name not in [*known, "--help", "-h"]:
            near = difflib.get_close_matches(name, known, n=1)
            return f"unknown option {name}" + (f", did you mean {near[0]}" if near else "")
    return None
