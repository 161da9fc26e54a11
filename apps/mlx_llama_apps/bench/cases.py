"""What is measured, in llama-bench's terms, and what one repetition gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Protocol

WARM_UP_TOKENS = 128  # of a prompt, a slice's worth; 2 of an answer


@dataclass(frozen=True, slots=True)
class Case:
    """Read a prompt (pp) or generate (tg) so many tokens behind a context of depth tokens."""

    kind: str
    n_tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        """What llama-bench calls it."""
        return f"{self.kind}{self.n_tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def is_prompt(self) -> bool:
        """Whether a prompt is read."""
        return self.kind == "pp"

    @property
    def context(self) -> int:
        """Positions that it takes: the first token behind what is read is drawn, too."""
        return self.depth + self.n_tokens + 2

    @property
    def warm_up(self) -> Case:
        """A short one like it."""
        n_tokens = min(self.n_tokens, WARM_UP_TOKENS if self.is_prompt else 2)
        return Case(self.kind, n_tokens, self.depth)


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition. peak_bytes: MLX's, weights included; None where an engine does not tell."""

    seconds: float
    peak_bytes: int | None = None


class Engine(Protocol):
    """Something that runs tests on one model. `close` ends it."""

    name: str
    version: str

    def run(self, case: Case) -> Sample:
        """Run a test once."""
        ...

    def read_bytes(self, case: Case) -> int | None:
        """Return the bytes that generating one token reads; None where that is not known."""
        ...

    def process_peak(self) -> int | None:
        """Return the largest resident set of its process, in bytes."""
        ...

    def close(self) -> None:
        """End it; safe to call at any time."""
        ...


@dataclass(slots=True)
class Row:
    """The repetitions of one test, by engine, ours first; each round holds one of every engine."""

    case: Case
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def rates(self, engine: str) -> list[float]:
        """Return tokens per second, one a repetition."""
        return [self.case.n_tokens / sample.seconds for sample in self.samples[engine]]

    def mean(self, engine: str) -> float:
        """Return the mean of the rates."""
        return fmean(self.rates(engine))

    def deviation(self, engine: str) -> float | None:
        """Return the sample's standard deviation of the rates; None for one repetition."""
        rates = self.rates(engine)
        return stdev(rates) if len(rates) > 1 else None

    def first_token_s(self, engine: str) -> float | None:
        """Return the mean time to the first token behind a prompt."""
        samples = self.samples[engine]
        return fmean(s.seconds for s in samples) if self.case.is_prompt else None

    def peak_bytes(self, engine: str) -> int | None:
        """Return the largest peak of the repetitions."""
        return max((s.peak_bytes for s in self.samples[engine] if s.peak_bytes), default=None)

    def ratio(self, engine: str, peer: str) -> float:
        """Return how many times as fast as a peer: the median of the rounds' own ratios."""
        pairs = zip(self.rates(engine), self.rates(peer), strict=True)
        return median(ours / theirs for ours, theirs in pairs)


def cases_of(prompt: int, generate: int, depths: Iterable[int]) -> list[Case]:
    """Return the tests in the order they are shown; a count of 0 leaves its tests out."""
    kinds = [(kind, n) for kind, n in (("pp", prompt), ("tg", generate)) if n]
    return [Case(kind, n, depth) for depth in depths for kind, n in kinds]
