"""The errors that a caller can act on; `str(error)` is one line.

Every message says what failed, where (path, tensor, option), what was found against what was
expected, and what to do next. Only the command line turns them into exit codes.
"""

GOES_ON = "the same command goes on from there"  # behind what was kept when work was stopped


class MlxLlamaError(Exception):
    """The base of every error that this project raises on purpose."""


class CheckpointError(MlxLlamaError):
    """A file or folder of weights is missing, damaged, hostile or inconsistent."""


class UnsupportedModelError(MlxLlamaError):
    """The files are sound, but describe a model that is not run or not converted here."""


class QuantizationError(MlxLlamaError):
    """A tensor cannot be stored in the bits and groups that were asked for."""


class TokenizerError(MlxLlamaError):
    """A tokenizer file is missing, damaged, or belongs to another model."""


class ContextOverflowError(MlxLlamaError):
    """The prompt does not fit into the context; nothing is cut silently."""


class MemoryShortError(MlxLlamaError):
    """The machine has less memory than the model and its context need; nothing was begun."""


class OptionError(MlxLlamaError, ValueError):
    """An option has a value that it cannot have, or that could not take effect.

    option: its name, such as "kv_bits", where it is one of `mlx_llama.options`; None elsewhere.
    """

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class OutputError(MlxLlamaError):
    """The output cannot be written: it exists, or the disk refuses."""


class DownloadError(MlxLlamaError):
    """The hub or the network refuses: no access, no such repository, no connection, wrong bytes."""


def is_ctrl_c(error: BaseException) -> bool:
    """Whether an exception is Ctrl-C, or what a waiting thread makes of it.

    A signal that comes after `threading.Condition.wait` has let its lock go and before it waits
    ends in a RuntimeError: the lock cannot be let go twice. Waiting for a future or a queue is the
    same.
    """
    is_lost_lock = isinstance(error, RuntimeError) and isinstance(
        error.__context__, KeyboardInterrupt
    )
    return is_lost_lock or isinstance(error, KeyboardInterrupt)
