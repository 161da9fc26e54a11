"""Downloads from a hub on the loopback device, whole and with every trouble that it makes."""

from __future__ import annotations

import errno
import fcntl
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from hub_pulls import FETCHED, FILES, NAME, WEIGHTS, blobs, contents, look_up, pull
from hub_server import COMMIT, HubServer, Repository
from mlx_llama.errors import DownloadError, OutputError
from mlx_llama_convert import hub, hub_cache
from mlx_llama_convert.partial_file import PartialFile


def test_a_download_is_what_the_hubs_own_tools_find(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    snapshot = pull(server, cache)
    assert contents(snapshot.folder) == {path: FILES[path] for path in FETCHED}
    assert snapshot.source == snapshot.folder
    theirs = huggingface_hub.snapshot_download(NAME, cache_dir=cache, local_files_only=True)
    assert Path(theirs) == snapshot.folder
    (known,) = huggingface_hub.scan_cache_dir(cache).repos
    assert (known.repo_id, known.nb_files, known.refs.keys()) == (NAME, 3, {"main"})
    assert huggingface_hub.scan_cache_dir(cache).warnings == []


def test_what_the_hubs_own_tools_left_is_not_fetched_again(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    theirs = huggingface_hub.hf_hub_download(
        NAME, "model.safetensors", cache_dir=cache, endpoint=server.url
    )
    server.requests.clear()
    listing = look_up(server, cache)
    assert listing.missing_nbytes == sum(len(FILES[p]) for p in FETCHED) - len(WEIGHTS)
    snapshot = hub.download(listing, endpoint=server.url)
    assert snapshot.folder == Path(theirs).parent
    assert not server.asked("GET", "model.safetensors")


def test_nothing_is_asked_twice(server: HubServer, repository: Repository, cache: Path) -> None:
    first = pull(server, cache)
    assert {r.path.rpartition("/")[2] for r in server.asked("GET", "resolve")} == FETCHED
    server.requests.clear()
    assert pull(server, cache) == first
    (request,) = server.requests
    assert request.path == f"/api/models/{NAME}/revision/main"


def test_requests_carry_our_name_and_nothing_of_the_machine(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    pull(server, cache)
    assert {request.user_agent for request in server.requests} == {hub.USER_AGENT}


def test_progress_counts_all_bytes_and_never_goes_back(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    repository.cuts["model.safetensors"] = [100_000, 200_000]
    seen: list[tuple[int, int, str]] = []
    hub.download(
        look_up(server, cache), endpoint=server.url, on_progress=lambda *args: seen.append(args)
    )
    total = sum(len(FILES[path]) for path in FETCHED)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1] == (total, total, "model.safetensors")


def test_a_revision_has_its_own_snapshot(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    main = pull(server, cache)
    repository.commit, repository.revisions = "f" * 40, ("main", "refs/pr/1")
    repository.files["config.json"] = b'{"model_type": "llama", "new": 1}'
    other = pull(server, cache, revision="refs/pr/1")
    assert (main.commit, other.commit) == (COMMIT, "f" * 40)
    assert main.folder != other.folder
    assert len(server.asked("GET", "model.safetensors")) == 2  # once, with its redirection
    assert hub.find_cached(NAME, revision="refs/pr/1", cache=cache) == other
    assert hub.find_cached(NAME, cache=cache) == main
    assert hub.find_cached(NAME, revision=COMMIT, cache=cache) == main


def test_a_broken_connection_is_taken_up_where_it_broke(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    repository.cuts["model.safetensors"] = [100_000, 50_000]
    assert contents(pull(server, cache).folder)["model.safetensors"] == WEIGHTS
    ranges = [r.range for r in server.asked("GET", "model.safetensors") if r.is_cdn]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_the_next_run_continues_an_interrupted_one(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    repository.cuts["model.safetensors"] = [100_000, 0, 0]
    with pytest.raises(DownloadError, match=r"cannot reach .* goes on where it stopped"):
        pull(server, cache)
    listing = look_up(server, cache)
    assert listing.missing_nbytes == len(WEIGHTS) - 100_000
    with pytest.raises(DownloadError, match="the copy in the cache is not whole"):
        hub.find_cached(NAME, revision=COMMIT, cache=cache)
    server.requests.clear()
    snapshot = hub.download(listing, endpoint=server.url)
    assert contents(snapshot.folder)["model.safetensors"] == WEIGHTS
    assert [r.range for r in server.requests] == ["bytes=100000-"] * 2
    assert not [name for name in blobs(cache) if name.endswith(".incomplete")]


def test_a_server_without_ranges_sends_all_again(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    repository.cuts["model.safetensors"] = [100_000]
    repository.ranges_ignored = True
    assert contents(pull(server, cache).folder)["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_told_and_removed(
    server: HubServer, repository: Repository, cache: Path, path: str
) -> None:
    repository.corrupt.add(path)
    with pytest.raises(DownloadError, match=rf"{path}: wrong bytes arrived.*removed, run"):
        pull(server, cache)
    assert path not in contents(cache / "models--meta-llama--Llama-3.2-1B" / "snapshots")
    assert not [name for name in blobs(cache) if name.endswith(".incomplete")]
    repository.corrupt.clear()
    assert contents(pull(server, cache).folder)[path] == FILES[path]


def test_wrong_bytes_of_an_earlier_run_are_found(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    listing = look_up(server, cache)
    (file,) = (f for f in listing.files if f.path == "model.safetensors")
    listing.partial(file).parent.mkdir(parents=True)
    listing.partial(file).write_bytes(b"other" * 1000)
    with pytest.raises(DownloadError, match="wrong bytes arrived"):
        hub.download(listing, endpoint=server.url)
    listing.partial(file).write_bytes(WEIGHTS + b"too long")
    assert contents(hub.download(listing, endpoint=server.url).folder).keys() == FETCHED


def test_a_cached_file_of_a_wrong_size_is_fetched_again(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    snapshot = pull(server, cache)
    blob = (snapshot.folder / "model.safetensors").resolve()
    blob.write_bytes(WEIGHTS[:1000])
    assert look_up(server, cache).missing_nbytes == len(WEIGHTS)
    assert contents(pull(server, cache).folder)["model.safetensors"] == WEIGHTS


def test_a_file_that_is_longer_than_listed_is_refused(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    listing = look_up(server, cache)
    repository.files["model.safetensors"] = WEIGHTS + bytes(10_000_000)
    with pytest.raises(DownloadError, match="wrong bytes arrived"):
        hub.download(listing, endpoint=server.url)
    assert not [name for name in blobs(cache) if name.endswith(".incomplete")]


def test_two_downloads_do_not_write_one_file(
    server: HubServer, repository: Repository, cache: Path
) -> None:
    listing = look_up(server, cache)
    first = listing.files[0]
    listing.partial(first).parent.mkdir(parents=True)
    with listing.partial(first).open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="another download is writing here"):
            hub.download(listing, endpoint=server.url)
    assert hub.download(listing, endpoint=server.url).folder.is_dir()


def test_a_disk_without_links_gets_the_files_themselves(
    server: HubServer, repository: Repository, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    snapshot = pull(server, cache)
    assert not (snapshot.folder / "config.json").is_symlink()
    assert contents(snapshot.folder) == {path: FILES[path] for path in FETCHED}
    assert look_up(server, cache).missing_nbytes == 0


def test_a_full_disk_is_told_before_and_while_it_fills(
    server: HubServer, repository: Repository, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = look_up(server, cache)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(cache.parent)._replace(free=1000)
        patch.setattr(hub_cache.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OutputError, match=r"0\.00 GB free, 0\.00 GB to download"):
            hub.download(listing, endpoint=server.url)

    def full(self: PartialFile, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "write", full)
        with pytest.raises(OutputError, match="No space left on device; make room, what has"):
            hub.download(listing, endpoint=server.url)
    assert contents(hub.download(listing, endpoint=server.url).folder).keys() == FETCHED


def test_cached_models_are_those_that_can_be_loaded(tmp_path: Path) -> None:
    for name, kind, weights in (
        ("models--a--llama", "llama", "model.safetensors"),
        ("models--a--other", "qwen2", "model.safetensors"),
        ("models--a--meta", "llama", "consolidated.00.pth"),
    ):
        folder = tmp_path / name / "snapshots" / "0123"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(f'{{"model_type": "{kind}"}}', encoding="utf-8")
        (folder / weights).touch()
    (tmp_path / "models--a--broken" / "snapshots" / "0").mkdir(parents=True)
    found = [("a/llama", tmp_path / "models--a--llama" / "snapshots" / "0123")]
    assert hub.cached_models(tmp_path) == found
    assert hub.cached_models(tmp_path / "none") == []
