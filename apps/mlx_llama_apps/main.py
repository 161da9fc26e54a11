"""The command line: subcommands, and the one place where errors become lines and exit codes.

Exit codes: 0, 1 error, 2 usage, 130 Ctrl-C. Imports no MLX, so that --help is quick.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import get_args

from cyclopts import (
    App,
    Argument,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    UnknownCommandError,
    UnusedCliTokensError,
)

import mlx_llama
from mlx_llama import blas
from mlx_llama.errors import GOES_ON, MlxLlamaError, OptionError, is_ctrl_c
from mlx_llama_apps import bench, chat, compare, convert, pull, quantize, run, show, verify
from mlx_llama_apps.flags import read_value
from mlx_llama_apps.terminal import visible, write_line

EXIT_ERROR, EXIT_USAGE, EXIT_CTRL_C = 1, 2, 130
WHAT_TO_GIVE = {
    "MODEL": "a model directory, such as mlx-llama convert makes of a checkpoint, or: bundled",
    "SOURCE": "the folder of a checkpoint, Meta's files or Hugging Face's, or a hub name",
    "A": "two models of one vocabulary, such as a model and what it was quantized from",
    "B": "a second model, of the same vocabulary as the first",
    "NAME": "a hub name, such as meta-llama/Llama-3.2-1B-Instruct",
}
STOPPED = {  # by command: what Ctrl-C says where nothing is kept
    "convert": "no output was made",
    "quantize": "no output was made",
    "compare": "nothing is kept: the same command begins anew",
}
LONG_OPTION = re.compile(r"--[A-Za-z][\w-]*")

app = App(
    name="mlx-llama",
    help="Meta's Llama checkpoints, quantized with MLX and run in your terminal.",
    version=mlx_llama.__version__,
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative=(), show_default=False, converter=read_value),
    help_epilogue="Each command has its own --help. --debug shows a traceback with an error.",
)
COMMANDS = {
    "convert": convert.convert,
    "quantize": quantize.quantize,
    "pull": pull.pull,
    "verify": verify.verify,
    "show": show.show,
    "run": run.run,
    "chat": chat.chat,
    "compare": compare.compare,
    "bench": bench.bench,
}
for _function in COMMANDS.values():
    app.command(_function)


def arguments_of(command: str, *, parse_docstring: bool = False) -> list[Argument]:
    """Return the arguments of a command, positional ones first."""
    collection = app[command].assemble_argument_collection(
        default_parameter=app.default_parameter, parse_docstring=parse_docstring
    )
    return [argument for argument in collection if argument.names != ("*",)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error is one line on stderr."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    tokens = chat.with_optional_values(tokens)
    tokens, is_debugged = _without_debug(tokens)
    command = tokens[0] if tokens and tokens[0] in COMMANDS else None
    try:
        if name := os.environ.get(blas.VARIABLE):
            blas.choose(name)
        _refuse_mistyped_option(command, tokens)
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return 0
    except CycloptsError as error:
        return _fail(_usage_line(error, command), EXIT_USAGE, is_debugged)
    except OptionError as error:
        return _fail(str(error), EXIT_USAGE, is_debugged)
    except MlxLlamaError as error:
        return _fail(str(error), EXIT_ERROR, is_debugged)
    except KeyboardInterrupt as error:
        return _stop(error, command, is_debugged)
    except BrokenPipeError:
        return _end_unread()
    except SystemExit as error:  # what rich makes of it
        if isinstance(error.__context__, BrokenPipeError):
            return _end_unread()
        raise
    except OSError as error:
        return _fail(f"{error.filename or 'output'}: {error.strerror}", EXIT_ERROR, is_debugged)
    except Exception as error:
        if is_ctrl_c(error):
            return _stop(error, command, is_debugged)
        line = f"unexpected {type(error).__name__}: {error}; --debug shows where"
        return _fail(line, EXIT_ERROR, is_debugged)


def run_main() -> None:
    """Run as the installed command."""
    if sys.stdout is None or sys.stderr is None:  # closed by who started us
        if sys.stderr is not None:
            line = "standard output is closed; send it to a file, or to /dev/null"
            print(f"mlx-llama: {line}", file=sys.stderr, flush=True)
        os._exit(EXIT_ERROR)
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # Not sys.exit: CPython kills daemon threads when it is torn down, and one that is inside MLX
    # then aborts the whole process.
    os._exit(code)


def _end_unread() -> int:
    """End well where who read us has gone (`| head`): Python would complain when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _stop(error: BaseException, command: str | None, is_debugged: bool) -> int:
    """End after Ctrl-C: say what is kept, as the exception's notes have it, or that nothing is."""
    if kept := "; ".join(getattr(error, "__notes__", ())):
        return _fail(f"stopped; {kept}: {GOES_ON}", EXIT_CTRL_C, is_debugged)
    if command in STOPPED:
        return _fail(f"stopped; {STOPPED[command]}", EXIT_CTRL_C, is_debugged)
    return EXIT_CTRL_C


def _fail(line: str, code: int, is_debugged: bool) -> int:
    if is_debugged:
        traceback.print_exc()
    write_line(visible(f"mlx-llama: {' '.join(line.split())}"), sys.stderr)
    return code


def _without_debug(tokens: list[str]) -> tuple[list[str], bool]:
    end = tokens.index("--") if "--" in tokens else len(tokens)
    kept = [token for token in tokens[:end] if token != "--debug"]
    return kept + tokens[end:], len(kept) != end


def _usage_line(error: CycloptsError, command: str | None) -> str:
    """Say what is wrong with the command line and where to look."""
    where = f"mlx-llama {command} --help" if command else "mlx-llama --help"
    said = _unknown(error) or _missing(error) or _too_many(error) or str(error).rstrip(". ")
    return f"{said}; see {where}"


def _unknown(error: CycloptsError) -> str | None:
    """Say what may stand in the place of an unknown command: all of them, the nearest first."""
    if not isinstance(error, UnknownCommandError):
        return None
    name = (error.unused_tokens or [""])[0]
    near = difflib.get_close_matches(name.lower(), COMMANDS, 1)
    hint = f", did you mean {near[0]}" if near else ""
    what = "the command comes first, found" if name.startswith("-") else "unknown command"
    return f"{what} {name!r:.40}{hint}; commands: {', '.join(COMMANDS)}"


def _missing(error: CycloptsError) -> str | None:
    """Say what a missing MODEL or SOURCE is, not only that it is missing."""
    if not isinstance(error, MissingArgumentError) or error.argument is None:
        return None
    name = error.argument.name
    return f"{name} is missing: give {WHAT_TO_GIVE[name]}" if name in WHAT_TO_GIVE else None


def _too_many(error: CycloptsError) -> str | None:
    if not isinstance(error, UnusedCliTokensError):
        return None
    rest = " ".join(error.unused_tokens or ())
    return f"too many arguments: {rest!r}; a prompt of several words goes into quotes"


def _is_switch(argument: Argument) -> bool:
    return argument.hint is bool or bool in get_args(argument.hint)


def _refuse_mistyped_option(command: str | None, tokens: list[str]) -> None:
    """Refuse unknown options: a PROMPT, which may begin with hyphens, would swallow them."""
    if command is None:
        return
    arguments = arguments_of(command)
    known = {name: not _is_switch(a) for a in arguments for name in a.names if name[:1] == "-"}
    known |= {"--help": False, "-h": False}
    asking: str | None = None  # the option whose value comes next
    for token in tokens[1:]:
        name = token.partition("=")[0]
        if asking is not None:
            if token in known:
                raise OptionError(
                    f"{asking} needs a value, found the option {token}; a value that looks like an "
                    f"option is written {asking}={token}"
                )
            asking = None
        elif token == "--":
            return
        elif name in known:
            asking = name if known[name] and "=" not in token else None
        elif LONG_OPTION.fullmatch(name):
            near = [option for option in known if option.startswith(name)]
            near += difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {near[0]}" if near else ""
            prompt = " (a prompt like this goes behind --)" if command == "run" else ""
            raise OptionError(
                f"unknown option {name}{hint}; see mlx-llama {command} --help{prompt}"
            )
