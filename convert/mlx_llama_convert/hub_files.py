"""Which files of a hub repository are fetched; pure, and the only judge of foreign file names.

Takes the names that a repository lists, returns a `Choice`. A name is fetched because it is on our
list, never because it looks harmless, so none can lead out of the folder that it is written to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_llama.errors import DownloadError, OptionError

RULE = (
    "safetensors with config.json and a tokenizer where the repository has them, else Meta's "
    "consolidated.*.pth with params.json and tokenizer.model, in original/ or at the top"
)
DEFAULT_REVISION = "main"
SAFETENSORS, META = "safetensors", "Meta's files"
# What tells, in a cached snapshot, that one of the layouts is there.
LAYOUT_MARKS = ("config.json", "original/params.json", "params.json")

_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_HUB_NAME = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(?:/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)
_MAX_NAME_LENGTH = 96  # the hub's own limit

_NUMBERED = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")
_BESIDE_SAFETENSORS = (
    "config.json",
    "generation_config.json",
    *_TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_META_WEIGHTS = re.compile(r"consolidated\.([0-9]{2})\.pth")
_BESIDE_META = ("params.json", "tokenizer.model", "checklist.chk", "tokenizer_checklist.chk")
_TERMS = re.compile(r"(?:LICENSE|USE_POLICY|NOTICE)(?:\.(?:md|txt))?")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the hub lists it.

    path: in the repository. digest: lower-case hexadecimal, the SHA-256 of the content for large
    files, else the SHA-1 that git gives it; it is also its name in the cache.
    """

    path: str
    nbytes: int
    digest: str

    @property
    def algorithm(self) -> str:
        """Name of the hash, as people know it."""
        return "SHA-256" if len(self.digest) == 64 else "git SHA-1"


@dataclass(frozen=True, slots=True)
class Choice:
    """What is fetched of a repository.

    layout: how to call it. folder: where its weights lie, "" or "original". weights, others: paths
    in the repository, sorted.
    """

    layout: str
    folder: str
    weights: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def is_meta(self) -> bool:
        """Whether the files are in Meta's layout."""
        return self.layout == META

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths, the small files first: they say what the weights must be."""
        return (*self.others, *self.weights)


def is_hub_name(text: str) -> bool:
    """Tell whether a text has the form of a hub repository's name, `owner/name`."""
    return (
        len(text) <= _MAX_NAME_LENGTH
        and _HUB_NAME.fullmatch(text) is not None
        and not any(pair in text for pair in ("--", ".."))
        and not text.endswith(".git")
    )


def check_revision(revision: str) -> None:
    """Refuse what is no branch, tag or commit; OptionError."""
    if _REVISION.fullmatch(revision) is None or ".." in revision:
        raise OptionError(
            f"--revision: found {revision!r}, expected a branch, a tag or a commit, such as main"
        )


def choose_files(names: Iterable[str], *, where: str) -> Choice:
    """Choose the files of one whole model by `RULE`.

    names: paths in the repository. where: for messages. Raises DownloadError when no layout is
    whole, with what is missing.
    """
    here = set(names)
    terms = [name for name in here if _TERMS.fullmatch(name)]
    choice = _safetensors(here, terms) or _meta(here, terms)
    if choice is None:
        raise DownloadError(f"{where}: {_what_is_missing(here)}; choose another repository")
    _check_numbers(choice, where)
    return choice


def _safetensors(here: set[str], terms: Sequence[str]) -> Choice | None:
    numbered = sorted(name for name in here if _NUMBERED.fullmatch(name))
    # An index belongs to numbered files; a lone file needs none and may stand beside them.
    weights = [_SINGLE] if _SINGLE in here and not (numbered and _INDEX in here) else numbered
    has_tokenizer = any(name in here for name in _TOKENIZERS)
    if not (weights and "config.json" in here and has_tokenizer):
        return None
    index = [_INDEX] if weights == numbered and _INDEX in here else []
    others = [name for name in _BESIDE_SAFETENSORS if name in here]
    return Choice(SAFETENSORS, "", tuple(weights), tuple(sorted([*others, *index, *terms])))


def _meta(here: set[str], terms: Sequence[str]) -> Choice | None:
    for folder in ("original", ""):
        prefix = f"{folder}/" if folder else ""
        weights = sorted(
            name
            for name in here
            if name.startswith(prefix) and _META_WEIGHTS.fullmatch(name[len(prefix) :])
        )
        others = [prefix + name for name in _BESIDE_META if prefix + name in here]
        if prefix + "tokenizer.model" not in here and "tokenizer.model" in here:
            others.append("tokenizer.model")  # one level up, as in LLaMA 1 and Llama 2 downloads
        has_tokenizer = any(name.endswith("tokenizer.model") for name in others)
        if weights and prefix + "params.json" in here and has_tokenizer:
            return Choice(META, folder, tuple(weights), tuple(sorted({*others, *terms})))
    return None


def _check_numbers(choice: Choice, where: str) -> None:
    """Refuse a set of shards that its own numbers show to be incomplete."""
    found = [_NUMBERED.fullmatch(name) for name in choice.weights]
    if all(found):
        counts = {int(match[2]) for match in found if match}
        numbers = {int(match[1]) for match in found if match}
        expected = set(range(1, max(counts) + 1))
        if len(counts) > 1 or numbers != expected:
            raise DownloadError(
                f"{where}: {len(choice.weights)} files of weights, expected {max(counts)} by their "
                "names; the model is not whole"
            )
        return
    ranks = [int(match[1]) for name in choice.weights if (match := _META_WEIGHTS.search(name))]
    if ranks != list(range(len(ranks))):
        raise DownloadError(
            f"{where}: {choice.weights[-1]} is there, but not every consolidated.NN.pth before it; "
            "the model is not whole"
        )


def _what_is_missing(here: set[str]) -> str:
    safetensors = [name for name in here if name.endswith(".safetensors")]
    meta = [name for name in here if name.endswith(".pth")]
    if any(name.endswith(".gguf") for name in here) and not safetensors:
        return "only GGUF files, which are not converted"
    if not safetensors and not meta:
        return "no safetensors and no consolidated.*.pth in it"
    wanted = ("config.json", *_TOKENIZERS) if safetensors else ("params.json", "tokenizer.model")
    lacking = ", ".join(name for name in wanted if name not in here)
    return f"no whole model in it: weights, but they need more than is here (no {lacking})"
