"""The choice of a format for each tensor; a decision from names and shapes, before any data."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_llama.config import QuantFormat
from mlx_llama.weights import is_matrix

GROUP_SIZES = (128, 64, 32)
DEFAULT_GROUP_SIZE = 64


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Bits per weight and weights per scale that are wanted for every matrix."""

    bits: int
    group_size: int = DEFAULT_GROUP_SIZE

    @property
    def default(self) -> QuantFormat:
        """The format of a tensor whose width the group size divides."""
        return QuantFormat(self.bits, self.group_size)

    def format_of(self, name: str, shape: tuple[int, ...]) -> QuantFormat | None:
        """Return how a tensor is packed; None leaves it as it is.

        The group is the wanted one or the largest smaller one that divides the width. Norms, and
        matrices whose width no group divides, are not packed.
        """
        if not is_matrix(name):
            return None
        for group_size in GROUP_SIZES:
            if group_size <= self.group_size and shape[-1] % group_size == 0:
                return QuantFormat(self.bits, group_size)
        return None
