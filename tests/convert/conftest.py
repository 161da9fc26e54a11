"""A hub on this machine, a repository in it and a download cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_pulls import FILES, NAME
from hub_server import HubServer, Repository, forget_settings, running_hub


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub, and nothing of the user's own settings."""
    forget_settings(monkeypatch, tmp_path)
    with running_hub() as running:
        yield running


@pytest.fixture
def repository(server: HubServer) -> Repository:
    return server.add(NAME, dict(FILES))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
