"""Downloads from the Hugging Face hub, into the cache that its own tools use.

`look_up` asks what a repository holds, `download` fetches what is missing, `find_cached` answers
without opening a socket. Every file is hashed while it arrives and compared with what the hub
lists; what an interrupted run left is continued. The only module that imports huggingface_hub
(lazily: it takes a while), which gives tokens, addresses, the connection and its errors. The
bytes are received here, because the library throws an interrupted file away and does not hash.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import mlx_llama
from mlx_llama.errors import DownloadError, OptionError
from mlx_llama_convert.hub_cache import (
    Listing,
    Snapshot,
    disk_told,
    is_model_folder,
    link,
    nbytes_of,
    prepare,
    read_snapshot,
    repository_folder,
    write_reference,
)
from mlx_llama_convert.hub_files import (
    DEFAULT_REVISION,
    LAYOUT_MARKS,
    HubFile,
    check_revision,
    choose_files,
    is_hub_name,
)
from mlx_llama_convert.hub_refusals import Refusal, refusal_of_status, tell_refusal
from mlx_llama_convert.partial_file import PartialFile

OnProgress = Callable[[int, int, str], None]  # bytes there, bytes in all, file

LIST_TIMEOUT_S = 30.0
RETRY_PAUSES_S = (0.5, 1.0, 2.0, 4.0)  # between attempts that brought nothing
USER_AGENT = f"mlx-llama/{mlx_llama.__version__}"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def look_up(
    name: str,
    *,
    revision: str = DEFAULT_REVISION,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Listing:
    """Ask the hub what a repository holds; one request.

    endpoint, cache: other places than the library's (HF_ENDPOINT, HF_HUB_CACHE).
    Raises DownloadError; OptionError for a name or revision that cannot be one.
    """
    _check_names(name, revision)
    from huggingface_hub import HfApi

    host = _host(endpoint)
    with _connection(name, revision, host):
        api = HfApi(endpoint=host, headers={"user-agent": USER_AGENT})
        try:
            info = api.model_info(
                name, revision=revision, files_metadata=True, timeout=LIST_TIMEOUT_S
            )
            commit = str(info.sha)
            listed = {str(sibling.rfilename): sibling for sibling in info.siblings or []}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DownloadError(_not_a_hub(name, host)) from error
    if not _COMMIT.fullmatch(commit):
        raise DownloadError(_not_a_hub(name, host))
    choice = choose_files(listed, where=name)
    files = tuple(_hub_file(name, listed[path]) for path in choice.paths)
    return Listing(name, revision, commit, choice, files, repository_folder(_cache(cache), name))


def download(
    listing: Listing, *, endpoint: str | None = None, on_progress: OnProgress | None = None
) -> Snapshot:
    """Fetch what the cache lacks; a file that an earlier run began is continued.

    on_progress(done, total, file) counts the bytes of all files, those that were there included.
    Raises DownloadError and OutputError; what has arrived stays for the next run.
    """
    prepare(listing)
    done, host = 0, _host(endpoint)
    with _connection(listing.name, listing.revision, host):
        for file in listing.files:

            def tell(nbytes: int, done: int = done, file: HubFile = file) -> None:
                if on_progress is not None:
                    on_progress(done + nbytes, listing.nbytes, file.path)

            _fetch(listing, file, host, tell)
            tell(file.nbytes)
            done += file.nbytes
    with disk_told(listing.root):
        write_reference(listing)
    return listing.snapshot


def find_cached(
    name: str, *, revision: str = DEFAULT_REVISION, cache: Path | None = None
) -> Snapshot:
    """Return the snapshot that an earlier download left; opens no socket.

    Raises DownloadError when it is not there or not whole.
    """
    _check_names(name, revision)
    from huggingface_hub import try_to_load_from_cache

    for mark in LAYOUT_MARKS:
        found = try_to_load_from_cache(name, mark, cache_dir=_cache(cache), revision=revision)
        if isinstance(found, str):
            break
    else:
        raise DownloadError(
            f"{name}: revision {revision} is not in the cache {_cache(cache)}; fetch it with the "
            "network: the same command without --offline, HF_HUB_OFFLINE unset"
        )
    try:
        return read_snapshot(name, Path(found).parents[mark.count("/")])
    except DownloadError as error:
        raise DownloadError(
            f"{name}: the copy in the cache is not whole: {error}; complete it with the network: "
            "the same command without --offline, HF_HUB_OFFLINE unset"
        ) from error


def cached_models(cache: Path | None = None) -> list[tuple[str, Path]]:
    """Return the Llamas in the cache that can be loaded as they are, by repository name.

    Of each repository the newest snapshot with config.json and safetensors; opens no connection.
    """
    found: list[tuple[str, Path]] = []
    for root in sorted(_cache(cache).glob("models--*")):
        snapshots = [p for p in root.glob("snapshots/*") if is_model_folder(p)]
        if snapshots:
            newest = max(snapshots, key=lambda path: path.stat().st_mtime)
            found.append((root.name.removeprefix("models--").replace("--", "/", 1), newest))
    return found


def is_switched_off() -> bool:
    """Tell whether the user has switched the hub off for all programs (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _check_names(name: str, revision: str) -> None:
    if not is_hub_name(name):
        raise OptionError(
            f"{name}: no name of a hub repository, expected owner/name, such as "
            "meta-llama/Llama-3.2-1B-Instruct"
        )
    check_revision(revision)


def _hub_file(name: str, sibling: Any) -> HubFile:
    """Read a file's entry; a large file has its SHA-256, another the hash that git gives it."""
    path = str(sibling.rfilename)
    nbytes = sibling.lfs.size if sibling.lfs else sibling.size
    digest = str(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
    if not isinstance(nbytes, int) or nbytes < 0 or not _DIGEST.fullmatch(digest):
        raise DownloadError(
            f"{name}: the hub gives no size and hash of {path}; if the repository is gated, ask "
            "for access on its page and set HF_TOKEN"
        )
    return HubFile(path, nbytes, digest)


def _fetch(listing: Listing, file: HubFile, host: str, on_bytes: Callable[[int], None]) -> None:
    if listing.is_here(file):
        return
    blob, part = listing.blob(file), listing.partial(file)
    with disk_told(part, passed=(_http_error(), ConnectionError)):
        if nbytes_of(blob) != file.nbytes:
            blob.unlink(missing_ok=True)
            with PartialFile(part, file) as partial:
                partial.take_up(on_bytes)
                _receive_all(_request(listing, file, host), partial, file, on_bytes)
                partial.publish(blob)
        link(blob, listing.snapshot.folder / file.path)


def _request(listing: Listing, file: HubFile, host: str) -> tuple[str, dict[str, str]]:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(listing.name, file.path, revision=listing.commit, endpoint=host)
    return url, build_hf_headers(headers={"user-agent": USER_AGENT, "accept-encoding": "identity"})


def _receive_all(
    request: tuple[str, dict[str, str]],
    partial: PartialFile,
    file: HubFile,
    on_bytes: Callable[[int], None],
) -> None:
    """Receive until the file is whole; a connection that breaks is taken up where it broke."""
    failures = 0
    while partial.nbytes < file.nbytes:
        before, error = partial.nbytes, None
        try:
            _receive(request, partial, file, on_bytes)
        except _http_error() as broken:
            if not _may_pass(broken):
                raise
            error = broken
        if partial.nbytes >= file.nbytes:
            return
        failures = 1 if partial.nbytes > before else failures + 1
        if failures > len(RETRY_PAUSES_S):
            raise error or DownloadError(
                f"{file.path}: the hub sends {partial.nbytes} of {file.nbytes} bytes and then no "
                "more; run the same command later, it goes on from there"
            )
        time.sleep(RETRY_PAUSES_S[failures - 1])


def _receive(
    request: tuple[str, dict[str, str]],
    partial: PartialFile,
    file: HubFile,
    on_bytes: Callable[[int], None],
) -> None:
    """Receive the rest of a file, as far as the connection lasts."""
    from huggingface_hub import constants, get_session, hf_raise_for_status

    url, headers = request
    if partial.nbytes:
        headers = {**headers, "range": f"bytes={partial.nbytes}-"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if response.status_code == 416:
            partial.restart()
            return
        hf_raise_for_status(response)
        place = response.headers.get("content-range", "")
        if response.status_code != 206 or not place.startswith(f"bytes {partial.nbytes}-"):
            partial.restart()  # what comes is the whole file
        for chunk in response.iter_bytes():
            partial.write(chunk)
            on_bytes(min(partial.nbytes, file.nbytes))
            if partial.nbytes > file.nbytes:
                return  # more than was announced; the check of size and hash tells


@contextmanager
def _connection(name: str, revision: str, host: str) -> Iterator[None]:
    """Close the connections at the end and tell a refusal in one line."""
    from huggingface_hub import close_session
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)  # our one line says what the library would warn of
    try:
        yield
    except (_http_error(), OfflineModeIsEnabled) as error:
        has_token = "authorization" in build_hf_headers()
        refusal, detail = _refusal(error, has_token=has_token)
        line = tell_refusal(refusal, name, revision, host, has_token=has_token, detail=detail)
        raise DownloadError(line) from error
    finally:
        logging.set_verbosity(verbosity)
        close_session()


def _refusal(error: Exception, *, has_token: bool) -> tuple[Refusal, str]:
    """Tell what an error of the library means; the more special classes come first."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return Refusal.OFFLINE, ""
    if not isinstance(error, errors.HfHubHTTPError):
        return Refusal.UNREACHABLE, str(error) or type(error).__name__
    status = error.response.status_code
    for kind, refusal in (
        (errors.GatedRepoError, Refusal.GATED),
        (errors.RepositoryNotFoundError, Refusal.NO_REPOSITORY),
        (errors.RevisionNotFoundError, Refusal.NO_REVISION),
        (errors.EntryNotFoundError, Refusal.NO_FILE),
    ):
        if isinstance(error, kind):
            return refusal, f"status {status}"
    return refusal_of_status(status, has_token=has_token), f"status {status}"


def _http_error() -> type[Exception]:
    """Return the base of all errors of a connection: httpx's, or httpx2's since version 2."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError


def _may_pass(error: Exception) -> bool:
    """Tell whether asking again can help: a broken connection, a server in trouble."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return True
    return error.response.status_code in (408, 429, 500, 502, 503, 504)


def _cache(cache: Path | None) -> Path:
    from huggingface_hub import constants

    return cache or Path(constants.HF_HUB_CACHE)


def _host(endpoint: str | None) -> str:
    from huggingface_hub import constants

    return endpoint or constants.ENDPOINT


def _not_a_hub(name: str, host: str) -> str:
    return (
        f"{name}: {host} does not answer as a hub does; check HF_ENDPOINT, and whether this "
        "network wants a login of its own"
    )
