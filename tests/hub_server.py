"""A hub on the loopback device: the parts of its protocol that downloads use, and its troubles.

Small files come from the hub itself, large ones (`LARGE`) by redirection from a second server, as
with the real hub. Every request is recorded.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from mlx_llama_convert import hub
from processes import PATIENCE_S

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".pth", ".safetensors", "tokenizer.model")


@dataclass
class Repository:
    """A model repository; the fields below `tokens` are troubles, by path.

    tokens: who may read it, None for everybody. is_gated: how the others are refused.
    cuts: after how many bytes of an answer the connection breaks, one for each answer.
    corrupt: files whose bytes are wrong. status: answered instead of the file.
    """

    files: dict[str, bytes]
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    tokens: tuple[str, ...] | None = None
    is_gated: bool = False
    cuts: dict[str, list[int]] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    status: dict[str, int] = field(default_factory=dict)
    ranges_ignored: bool = False


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    range: str | None
    token: str | None
    is_cdn: bool
    user_agent: str


class HubServer:
    """The hub.

    halt_at_cuts: whether a connection that is cut stays open, silent, until `released`. page: what
    a network's login page answers instead of the hub.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.halt_at_cuts = False
        self.page: bytes | None = None
        self.cut_reached = threading.Event()
        self.released = threading.Event()
        self._servers = [self._server(is_cdn) for is_cdn in (False, True)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)
        self._threads = [
            threading.Thread(target=s.serve_forever, args=(0.02,)) for s in self._servers
        ]
        for thread in self._threads:
            thread.start()

    def add(self, name: str, files: dict[str, bytes], **settings: Any) -> Repository:
        """Add a repository."""
        self.repositories[name] = Repository(files, **settings)
        return self.repositories[name]

    def asked(self, method: str, part: str) -> list[Request]:
        """Return the requests of a method whose path contains a text."""
        return [r for r in self.requests if r.method == method and part in r.path]

    def close(self) -> None:
        """Stop and free the ports."""
        self.released.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def _server(self, is_cdn: bool) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "is_cdn": is_cdn})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = False  # closing the server waits for its answers
        return server


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Run a hub for the time of a test."""
    hub = HubServer()
    try:
        yield hub
    finally:
        hub.close()


def forget_settings(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Set aside the user's own token, proxies and switches; do not wait between attempts."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    monkeypatch.setattr(hub, "RETRY_PAUSES_S", (0.0, 0.0))


def files_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Return a folder's files by their path in a repository."""
    return {
        prefix + path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    is_cdn: bool
    protocol_version = "HTTP/1.1"
    timeout = 10

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        bearer = self.headers.get("authorization")
        self._token = bearer.removeprefix("Bearer ") if bearer else None
        path = unquote(urlsplit(self.path).path)
        agent = self.headers.get("user-agent", "")
        self.hub.requests.append(
            Request(self.command, path, self.headers.get("range"), self._token, self.is_cdn, agent)
        )
        with suppress(BrokenPipeError, ConnectionResetError):
            if self.hub.page is not None:
                self._send_data(self.hub.page, "text/html")
            elif path.startswith("/api/models/"):
                self._api(path.removeprefix("/api/models/"))
            else:
                name, _, rest = path.lstrip("/").partition("/resolve/")
                self._resolve(name, *rest.partition("/")[::2])

    def _api(self, path: str) -> None:
        name, kind, revision = "", "", ""
        for kind in ("revision", "tree"):
            name, found, revision = path.partition(f"/{kind}/")
            if found:
                break
        repository = self._repository(name, revision)
        if repository is None:
            return
        entries = [_entry(*item) for item in repository.files.items()]
        if kind == "tree":
            self._json([{"type": "file", "path": e.pop("rfilename"), **e} for e in entries])
        else:
            about = {"id": name, "sha": repository.commit, "gated": repository.is_gated}
            self._json({**about, "private": False, "tags": [], "siblings": entries})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name, revision, is_file=True)
        if repository is None:
            return
        if path not in repository.files:
            self._refuse(404, "EntryNotFound")
            return
        if (status := repository.status.get(path)) is not None:
            self._refuse(status, None)
            return
        data = repository.files[path]
        if path.endswith(LARGE) and not self.is_cdn:
            self.send_response(302)
            self.send_header("Location", self.hub.cdn_url + self.path)
            self.send_header("X-Repo-Commit", repository.commit)
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(repository, path, data)

    def _send(self, repository: Repository, path: str, data: bytes) -> None:
        whole, start = len(data), 0
        wanted = self.headers.get("range")
        if path in repository.corrupt:
            data = bytes(len(data))
        if wanted and not repository.ranges_ignored:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            data = data[start:]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{_git_sha1(repository.files[path])}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = repository.cuts.get(path)
        if not cuts:
            self.wfile.write(data)
            return
        self.wfile.write(data[: cuts.pop(0)])
        self.wfile.flush()
        self.hub.cut_reached.set()
        if self.hub.halt_at_cuts:
            self.hub.released.wait(PATIENCE_S)
        self.close_connection = True

    def _repository(self, name: str, revision: str, *, is_file: bool = False) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(401 if self._token is None else 404, "RepoNotFound")
            return None
        if revision not in (repository.commit, *repository.revisions):
            self._refuse(404, "RevisionNotFound")
            return None
        is_closed = repository.tokens is not None and self._token not in repository.tokens
        if is_closed and not self.is_cdn:
            if self._token == "hf_invalid":
                self._refuse(401, None, "Invalid credentials in Authorization header")
                return None
            if not repository.is_gated:
                self._refuse(404 if self._token else 401, "RepoNotFound")
                return None
            if is_file:  # what a gated repository holds is public
                self._refuse(403 if self._token else 401, "GatedRepo")
                return None
        return repository

    def _json(self, content: object) -> None:
        self._send_data(json.dumps(content).encode(), "application/json")

    def _send_data(self, data: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str | None, message: str = "no\x1b[31m\nway") -> None:
        data = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message.replace("\n", " "))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _git_sha1(data)}
    entry["oid"] = entry["blobId"]
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(data), "pointerSize": 134}
    return entry


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
