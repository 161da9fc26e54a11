"""Downloads that a hub, a network or a name makes impossible: one line that says what to do."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from hub_pulls import FETCHED, FILES, NAME, contents, look_up, pull
from hub_server import HubServer, Repository
from mlx_llama.errors import DownloadError, MlxLlamaError, OptionError
from mlx_llama_convert import hub


def token(value: str) -> Callable[[pytest.MonkeyPatch, Repository], None]:
    return lambda patch, _: patch.setenv("HF_TOKEN", value)


def nothing(patch: pytest.MonkeyPatch, repository: Repository) -> None:
    """Leave all as it is."""


def status(value: int) -> Callable[[pytest.MonkeyPatch, Repository], None]:
    def change(patch: pytest.MonkeyPatch, repository: Repository) -> None:
        repository.tokens = None
        repository.status["config.json"] = value

    return change


@pytest.mark.parametrize(
    ("is_gated", "change", "text"),
    [
        (True, nothing, r"gated: accept its license at http.*/meta-llama/Llama-3.2-1B, then set"),
        (True, token("hf_other"), "gated, and your account may not read it yet: ask for access"),
        (True, token("hf_invalid"), "does not accept your token; make a new one"),
        (False, nothing, "no such repository at .* for someone without a token; check"),
        (False, token("hf_other"), "or a private one that your token does not open"),
        (False, status(403), r"forbids it \(status 403\)"),
        (False, status(404), r"no such repository"),
        (False, status(418), r"refuses \(status 418\)"),
        (False, status(429), r"too many requests \(status 429\)"),
        (False, status(503), r"has trouble \(status 503\); run the same command later"),
    ],
)
def test_refusals_are_one_line_that_says_what_to_do(
    server: HubServer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    is_gated: bool,
    change: Callable[[pytest.MonkeyPatch, Repository], None],
    text: str,
) -> None:
    repository = server.add(NAME, dict(FILES), tokens=("hf_right",), is_gated=is_gated)
    change(monkeypatch, repository)
    with pytest.raises(DownloadError, match=text) as caught:
        pull(server, cache)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{NAME}: ")
    assert capfd.readouterr() == ("", "")


def test_the_token_opens_and_stays_with_the_hub(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(NAME, dict(FILES), tokens=("hf_right",), is_gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert contents(pull(server, cache).folder).keys() == FETCHED
    assert {r.token for r in server.requests if not r.is_cdn} == {"hf_right"}
    assert {r.token for r in server.requests if r.is_cdn} == {None}


def test_a_missing_revision_is_told(server: HubServer, repository: Repository, cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"no revision v9; see http.*/commits"):
        look_up(server, cache, revision="v9")


def test_a_missing_network_is_told(cache: Path, server: HubServer) -> None:
    with pytest.raises(DownloadError, match=r"cannot reach http://127\.0\.0\.1:1 \("):
        hub.look_up(NAME, endpoint="http://127.0.0.1:1", cache=cache)


def test_a_hub_that_never_answers_is_told(
    cache: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "LIST_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DownloadError, match=rf"cannot reach {host} \(.*timed out"):
            hub.look_up(NAME, endpoint=host, cache=cache)


@pytest.mark.parametrize("page", [b"<html>Log in</html>", b"[]", b"{}", b'{"siblings": [{}]}'])
def test_a_login_page_of_the_network_is_told(
    server: HubServer, repository: Repository, cache: Path, page: bytes
) -> None:
    server.page = page
    with pytest.raises(DownloadError, match="does not answer as a hub does; check HF_ENDPOINT"):
        look_up(server, cache)


def test_hf_hub_offline_is_told(
    server: HubServer, repository: Repository, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.is_switched_off()
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set; unset it"):
        look_up(server, cache)
    assert server.requests == []


@pytest.mark.parametrize("commit", ["", "../../../x", "main", "0" * 39, "0" * 40 + "/.."])
def test_a_commit_that_is_none_is_refused(
    server: HubServer, repository: Repository, cache: Path, commit: str
) -> None:
    repository.commit = commit
    with pytest.raises(DownloadError, match="does not answer as a hub does"):
        look_up(server, cache)


def test_hostile_listings_write_nothing_outside(
    server: HubServer, repository: Repository, cache: Path, tmp_path: Path
) -> None:
    for name in ("../evil", "/evil", "original/../../../evil", "..", "config.json/../../evil"):
        repository.files[name] = b"evil"
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    assert contents(pull(server, cache).folder).keys() == FETCHED
    assert {path for path in tmp_path.rglob("*") if cache not in path.parents} == before | {cache}
    assert not [request for request in server.requests if "evil" in request.path]


def test_hashes_that_are_none_are_refused(
    server: HubServer, repository: Repository, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub_server._git_sha1", lambda _: "../../evil")
    with pytest.raises(DownloadError, match=r"gives no size and hash of config\.json"):
        look_up(server, cache)


@pytest.mark.parametrize("name", ["../x", "x/..", "/a/b", "a", "a/b/c", "./a/b"])
def test_names_with_tricks_never_reach_the_hub(server: HubServer, cache: Path, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: hub.look_up(name, endpoint=server.url, cache=cache),
        lambda: hub.find_cached(name, cache=cache),
    ]
    for call in calls:
        with pytest.raises(OptionError, match="no name of a hub repository"):
            call()
    assert server.requests == []


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a b"])
def test_revisions_with_tricks_never_reach_the_hub(
    server: HubServer, cache: Path, revision: str
) -> None:
    with pytest.raises(OptionError, match="--revision"):
        look_up(server, cache, revision=revision)
    with pytest.raises(OptionError, match="--revision"):
        hub.find_cached(NAME, revision=revision, cache=cache)
    assert server.requests == []


def test_what_is_not_cached_is_told(cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"revision main is not in the cache .* without --off"):
        hub.find_cached(NAME, cache=cache)


def test_metas_checklist_shows_what_the_cache_lacks(server: HubServer, cache: Path) -> None:
    shards = {f"original/consolidated.0{n}.pth": b"weights %d" % n for n in (0, 1)}
    listed = "\n".join(f"{'0' * 32}  {path[9:]}" for path in shards).encode()
    beside = {"original/params.json": b"{}", "original/tokenizer.model": b"tok"}
    server.add(NAME, {**shards, **beside, "original/checklist.chk": listed})
    snapshot = pull(server, cache)
    assert hub.find_cached(NAME, cache=cache) == snapshot
    assert snapshot.source == snapshot.folder / "original"
    (snapshot.source / "consolidated.01.pth").unlink()
    with pytest.raises(MlxLlamaError, match=r"not whole: .*consolidated\.01\.pth is missing"):
        hub.find_cached(NAME, cache=cache)
