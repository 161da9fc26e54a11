"""A text cut into windows that are scored one by one, as llama-perplexity does.

Every window begins with BOS in place of its first token; its second half is scored, so that each
scored token has at least half a window before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_llama.errors import OptionError

LEAST_CONTEXT = 4


@dataclass(frozen=True, slots=True)
class Windows:
    """ids: (n, context) uint32. dropped: tokens behind the last whole window."""

    ids: np.ndarray
    dropped: int

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return self.ids.shape[1]

    @property
    def scored(self) -> slice:
        """Positions whose logits are scored."""
        return slice(self.context // 2, self.context - 1)

    @property
    def n_scored(self) -> int:
        """Scored tokens of a window."""
        return self.context - 1 - self.context // 2

    def targets(self, number: int) -> np.ndarray:
        """Return the tokens that the scored positions of a window should predict."""
        return self.ids[number, self.context // 2 + 1 :]

    def __len__(self) -> int:
        return len(self.ids)


def cut_windows(
    ids: Sequence[int], *, bos_id: int, context: int, option: str = "--text"
) -> Windows:
    """Cut a text's tokens (without BOS) into windows; a shorter text is one window of its own.

    option: what gave the text. Raises OptionError for one of fewer than LEAST_CONTEXT tokens.
    """
    if len(ids) < LEAST_CONTEXT:
        raise OptionError(
            f"{option}: {len(ids)} tokens, expected {LEAST_CONTEXT} at least, and better some "
            "thousands; give a longer one"
        )
    context = min(context, len(ids))
    n_windows = len(ids) // context
    windows = np.array(ids[: n_windows * context], dtype=np.uint32).reshape(n_windows, context)
    windows[:, 0] = bos_id
    return Windows(windows, len(ids) - n_windows * context)
