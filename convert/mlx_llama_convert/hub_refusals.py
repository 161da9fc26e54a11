"""What the hub can refuse, each in one line that says what to do; pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum, auto


class Refusal(StrEnum):
    """Why nothing came."""

    GATED = auto()
    NO_REPOSITORY = auto()
    NO_REVISION = auto()
    NO_FILE = auto()
    BAD_TOKEN = auto()
    FORBIDDEN = auto()
    TOO_MANY = auto()
    DOWN = auto()
    OFFLINE = auto()
    UNREACHABLE = auto()
    OTHER = auto()


_LOGIN = "set HF_TOKEN to a token with read access"
_SPELLING = "check the spelling, and give a folder by its path, such as ./{name}"
_LINES: Mapping[Refusal, str] = {
    Refusal.GATED: f"gated: accept its license at {{page}}, then {_LOGIN}",
    Refusal.NO_REPOSITORY: "no such repository at {host} for someone without a token; "
    f"{_SPELLING}, and for a private one {_LOGIN}",
    Refusal.NO_REVISION: "no revision {revision}; see {page}/commits, or leave --revision out",
    Refusal.NO_FILE: "a listed file is not there ({detail}); run the same command again",
    Refusal.BAD_TOKEN: "{host} does not accept your token; make a new one at "
    "{host}/settings/tokens and set HF_TOKEN to it",
    Refusal.FORBIDDEN: "{host} forbids it ({detail}); look at {page} for what it asks of you",
    Refusal.TOO_MANY: "{host} has had too many requests ({detail}); run the same command later",
    Refusal.DOWN: "{host} has trouble ({detail}); run the same command later",
    Refusal.OFFLINE: "HF_HUB_OFFLINE is set; unset it to download",
    Refusal.UNREACHABLE: "cannot reach {host} ({detail}); check the network and run the same "
    "command again, it goes on where it stopped; convert --offline takes what is cached",
    Refusal.OTHER: "{host} refuses ({detail}); check HF_ENDPOINT and look at {page}",
}
# Where a token was sent and did not help.
_LINES_WITH_TOKEN: Mapping[Refusal, str] = {
    Refusal.GATED: "gated, and your account may not read it yet: ask for access at {page}; "
    "a fine-grained token also needs the right to read gated repositories",
    Refusal.NO_REPOSITORY: "no such repository at {host}, or a private one that your token does "
    f"not open; {_SPELLING}",
}


def refusal_of_status(status: int, *, has_token: bool) -> Refusal:
    """Name what a status code means where the hub gives no reason of its own."""
    match status:
        case 401:
            return Refusal.BAD_TOKEN if has_token else Refusal.NO_REPOSITORY
        case 403:
            return Refusal.FORBIDDEN
        case 404:
            return Refusal.NO_REPOSITORY
        case 429:
            return Refusal.TOO_MANY
        case _:
            return Refusal.DOWN if status >= 500 else Refusal.OTHER


def tell_refusal(
    refusal: Refusal, name: str, revision: str, host: str, *, has_token: bool, detail: str
) -> str:
    """Say in one line what was refused and what to do; detail is never the hub's own text."""
    lines = {**_LINES, **(_LINES_WITH_TOKEN if has_token else {})}
    line = lines[refusal].format(
        name=name, revision=revision, host=host, page=f"{host}/{name}", detail=detail
    )
    return f"{name}: {line}"
