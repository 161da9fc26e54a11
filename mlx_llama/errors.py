"""The errors that a caller can act on; `str(error)` is one line.

Every message says what failed, where (path, tensor, option), what was found against what was
expected, and what to do next. Only the command line turns them into exit codes.
"""


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
    """An option has a value that it cannot have, or that could not take effect."""


class OutputError(MlxLlamaError):
    """The output cannot be written: it exists, or the disk refuses."""


class DownloadError(MlxLlamaError):
    """The hub or the network refuses: no access, no such repository, no connection, wrong bytes."""
