"""The choice of a format for each tensor; a decision from names and shapes, before any data."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

from mlx_llama.config import MODES, QuantFormat
from mlx_llama.errors import OptionError
from mlx_llama.weights import EMBEDDING, OUTPUT, hf_module, is_matrix

GROUP_SIZES = (128, 64, 32)
DEFAULT_GROUP_SIZE = 64
DENSE = "dense"  # an override that leaves a tensor as it is
ATTENTION, FEED_FORWARD, EMBEDDINGS, HEAD = CLASSES = (
    "attention",
    "feed-forward",
    "embedding",
    "head",
)


def tensor_class(name: str, *, is_tied: bool) -> str | None:
    """Return which of `CLASSES` a tensor of Meta's name is in; None for a norm.

    A tied embedding is a head: its errors go straight into the logits.
    """
    if not is_matrix(name):
        return None
    if name == EMBEDDING:
        return HEAD if is_tied else EMBEDDINGS
    if name == OUTPUT:
        return HEAD
    return ATTENTION if ".attention." in name else FEED_FORWARD


@dataclass(frozen=True, slots=True)
class Override:
    """Other bits for some tensors. form: None leaves them dense; is_exact: its group was asked for.

    pattern: with * and ?, of a class, of Meta's name or of Hugging Face's module.
    """

    pattern: str
    form: QuantFormat | None
    is_exact: bool

    @classmethod
    def parse(cls, text: str, *, group_size: int = DEFAULT_GROUP_SIZE) -> Self:
        """Read PATTERN=BITS[:GROUP], PATTERN=MODE or PATTERN=dense. Raises OptionError.

        group_size: of an override that has none.
        """
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern or not value:
            raise OptionError(
                f"--override: found {text!r}, expected PATTERN=BITS[:GROUP], such as head=8 or "
                "'layers.0.*=6:32'"
            )
        if value == DENSE:
            return cls(pattern, None, True)
        if value in MODES and value != "affine":
            return cls(pattern, mode_format(value), True)
        bits, colon, group = value.partition(":")
        known_bits, known_groups = MODES["affine"]
        if bits not in map(str, known_bits) or (colon and group not in map(str, known_groups)):
            raise OptionError(
                f"--override {text!r}: expected bits of {', '.join(map(str, known_bits))}, groups "
                f"of {', '.join(map(str, known_groups))}, or {', '.join([*MODES][1:])} or {DENSE}"
            )
        return cls(pattern, QuantFormat(int(bits), int(group or group_size)), bool(colon))

    def matches(self, name: str, *, is_tied: bool) -> bool:
        """Whether a tensor of Meta's name is meant."""
        names = (tensor_class(name, is_tied=is_tied), name.removesuffix(".weight"), hf_module(name))
        return any(each is not None and fnmatchcase(each, self.pattern) for each in names)


def mode_format(mode: str, bits: int | None = None, group_size: int | None = None) -> QuantFormat:
    """Return the format of a mode; OptionError for bits or a group that it does not have."""
    known_bits, known_groups = MODES[mode]
    if mode == "affine":
        return QuantFormat(bits or 4, group_size or DEFAULT_GROUP_SIZE)
    for option, value, known in (
        ("--bits", bits, known_bits),
        ("--group-size", group_size, known_groups),
    ):
        if value is not None and value not in known:
            raise OptionError(f"{option} {value}: mode {mode} has {known[0]}; leave it out")
    return QuantFormat(known_bits[0], known_groups[0], mode)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """What is wanted for every matrix: a default, and overrides of which the last one counts."""

    bits: int
    group_size: int = DEFAULT_GROUP_SIZE
    mode: str = "affine"
    overrides: tuple[Override, ...] = ()
    is_tied: bool = False

    @property
    def default(self) -> QuantFormat:
        """The format of a tensor whose width the group size divides."""
        return QuantFormat(self.bits, self.group_size, self.mode)

    def override_of(self, name: str) -> Override | None:
        """Return the override that counts for a tensor."""
        matching = [o for o in self.overrides if o.matches(name, is_tied=self.is_tied)]
        return matching[-1] if matching and is_matrix(name) else None

    def wanted(self, name: str) -> QuantFormat | None:
        """Return what a tensor should become, whatever its width."""
        if not is_matrix(name):
            return None
        override = self.override_of(name)
        return override.form if override else self.default

    def format_of(self, name: str, shape: tuple[int, ...]) -> QuantFormat | None:
        """Return how a tensor is packed; None leaves it as it is.

        The group is the wanted one or the largest smaller one that divides the width. Norms, and
        matrices whose width no group divides, are not packed. Raises OptionError where the group of
        an override does not divide the width.
        """
        wanted = self.wanted(name)
        if wanted is None:
            return None
        fitting = fitted(wanted, shape[-1])
        override = self.override_of(name)
        if override and override.is_exact and fitting != wanted:
            raise OptionError(
                f"--override {override.pattern}: {name} has width {shape[-1]}, which "
                f"{wanted.group_size} does not divide"
            )
        return fitting

    def unused(self, names: Collection[str]) -> list[str]:
        """Return the patterns that mean no matrix."""
        return [
            o.pattern
            for o in self.overrides
            if not any(is_matrix(n) and o.matches(n, is_tied=self.is_tied) for n in names)
        ]


def fitted(form: QuantFormat, width: int) -> QuantFormat | None:
    """Return a format with the largest group up to its own that divides a width, if any does."""
    sizes = GROUP_SIZES if form.mode == "affine" else (form.group_size,)
    for group_size in sizes:
        if group_size <= form.group_size and width % group_size == 0:
            return QuantFormat(form.bits, group_size, form.mode)
    return None
