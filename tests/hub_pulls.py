"""A repository of a few small files, looked up and pulled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hub_server import HubServer
from mlx_llama_convert import hub
from mlx_llama_convert.hub_cache import Listing, Snapshot

NAME = "meta-llama/Llama-3.2-1B"
WEIGHTS = bytes(range(256)) * 1600
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "README.md": b"# read me",
    "original/consolidated.00.pth": b"not wanted",
}
FETCHED = {"config.json", "tokenizer.json", "model.safetensors"}


def look_up(server: HubServer, cache: Path, **settings: Any) -> Listing:
    return hub.look_up(NAME, endpoint=server.url, cache=cache, **settings)


def pull(server: HubServer, cache: Path, **settings: Any) -> Snapshot:
    return hub.download(look_up(server, cache, **settings), endpoint=server.url)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def blobs(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*/blobs/*"))
