"""What `mlx-llama bench` is asked for: which tests, of what, beside whom. Flags and their checks.

`--help` reads this module, so it imports nothing that computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from mlx_llama.errors import OptionError
from mlx_llama_apps.flags import read_value

if TYPE_CHECKING:
    from mlx_llama_apps.bench.cases import Case

PROMPT, GENERATE, DEPTHS, REPETITIONS = 512, 128, (0, 4096), 5
ENDS, WHY_ENDS = 2, "two of them to begin and end with"
BITS = (2, 3, 4, 5, 6, 8, 16)
LLAMA_CPP = "llama.cpp"


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class CaseFlags:
    """Which tests are run, and how often."""

    prompt: Annotated[
        int | None,
        Parameter(help="tokens of the prompt that is read; 0 leaves it out (default: 512)"),
    ] = None
    generate: Annotated[
        int | None, Parameter(help="tokens that are generated; 0 leaves it out (default: 128)")
    ] = None
    depth: Annotated[
        list[int] | None,
        Parameter(
            help="tokens that the context holds before each test; several are several tests "
            "(default: 0 4096, as far as the model goes)",
            consume_multiple=1,
            converter=read_value,  # a list's is not inherited in a class of flags
        ),
    ] = None
    repetitions: Annotated[
        int, Parameter(help="of each test, after a short one that is not counted (default: 5)")
    ] = REPETITIONS

    def check(self) -> None:
        """Raise OptionError for counts that measure nothing."""
        for name, value in (("prompt", self.prompt), ("generate", self.generate)):
            if value is not None and value < 0:
                raise OptionError(f"--{name}: found {value}, expected 0 or more")
        if self.prompt == 0 and self.generate == 0:
            raise OptionError("--prompt 0 --generate 0: nothing to measure")
        if self.depth is not None and min(self.depth) < 0:
            raise OptionError(f"--depth: found {min(self.depth)}, expected 0 or more")
        if self.depth is not None and len(set(self.depth)) < len(self.depth):
            raise OptionError(f"--depth: {' '.join(map(str, self.depth))} names one twice")
        if not 1 <= self.repetitions <= 1000:
            raise OptionError(f"--repetitions: found {self.repetitions}, expected 1 to 1000")

    def cases(self, max_context: int) -> list[Case]:
        """Return the tests of a model trained for so many positions.

        Defaults go as far as the model; OptionError for what is asked for beyond.
        """
        from mlx_llama_apps.bench.cases import cases_of

        most = max_context - ENDS
        n_prompt, n_generate = self._counts(most)
        longest = max(n_prompt, n_generate)
        depths = self.depth
        if depths is None:
            depths = [depth for depth in DEPTHS if depth + longest <= most] or [0]
        if (deepest := max(depths) + longest) > most:
            raise OptionError(
                f"--depth {max(depths)}: with {longest} tokens behind it that is {deepest}, and "
                f"the model was trained for {max_context} positions, {WHY_ENDS}; lower --depth, "
                "--prompt or --generate"
            )
        return cases_of(n_prompt, n_generate, depths)

    def left_out(self, max_context: int) -> str | None:
        """Say which depths that are measured by default are beyond the model, and why."""
        longest = max(self._counts(max_context - ENDS))
        beyond = [depth for depth in DEPTHS if depth + longest > max_context - ENDS]
        if self.depth is not None or not beyond:
            return None
        return (
            f"depth {', '.join(map(str, beyond))} is left out: with {longest} tokens behind it "
            f"that is {max(beyond) + longest}, and the model was trained for {max_context} "
            f"positions, {WHY_ENDS}"
        )

    def _counts(self, most: int) -> tuple[int, int]:
        """Return how many tokens are read and generated; defaults go as far as so many."""
        n_prompt = min(PROMPT, most) if self.prompt is None else self.prompt
        n_generate = min(GENERATE, most) if self.generate is None else self.generate
        return n_prompt, n_generate


@dataclass(frozen=True, slots=True)
class Rival:
    """A peer to measure beside. file: the GGUF file that the user gave."""

    name: str
    program: str
    file: Path | None


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class PeerFlags:
    """Which other engine is measured in turns with this one."""

    against: Annotated[
        Literal["mlx-lm", "llama.cpp"] | None,
        Parameter(help="another engine to measure beside this one, in turns: mlx-lm or llama.cpp"),
    ] = None
    peer: Annotated[
        str | None,
        Parameter(
            help="the Python that has it, or llama-bench (default: this Python; llama-bench on "
            "PATH)"
        ),
    ] = None
    peer_model: Annotated[
        Path | None,
        Parameter(
            help="the GGUF file for llama.cpp (default: the same weights are written as one)"
        ),
    ] = None

    def check(self) -> None:
        """Raise OptionError for what could not take effect."""
        if self.against is None and self.peer is not None:
            raise OptionError("--peer: does nothing without --against; leave it out")
        if self.peer_model is not None:
            if self.against != LLAMA_CPP:
                raise OptionError("--peer-model: does nothing without --against llama.cpp")
            if not self.peer_model.is_file():
                raise OptionError(f"--peer-model {self.peer_model}: no such file")

    def rival(self) -> Rival | None:
        """Find the peer, before anything is made for it."""
        from mlx_llama_apps.bench.peers import find_peer

        if self.against is None:
            return None
        return Rival(self.against, find_peer(self.against, self.peer), self.peer_model)


def check_model(model: str | None, shape: str | None, bits: int | None) -> None:
    """Raise OptionError for what contradicts itself or could not take effect."""
    from mlx_llama_apps.bench.shapes import shape_named

    if model is None and shape is None:
        raise OptionError(
            "MODEL is missing: give a model directory, or --shape NAME for random weights"
        )
    if model is not None and shape is not None:
        raise OptionError(f"--shape {shape}: takes the place of MODEL {model}; leave one out")
    if shape is None and bits is not None:
        raise OptionError("--bits: does nothing without --shape; leave it out")
    if shape is not None:
        shape_named(shape)
    if bits is not None and bits not in BITS:
        raise OptionError(f"--bits: found {bits}, expected one of {', '.join(map(str, BITS))}")
