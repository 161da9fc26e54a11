"""`mlx-llama pull`, and `mlx-llama convert` with a name: from a hub to a model directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from huggingface_hub import constants

from hub_server import COMMIT, HubServer, files_of, forget_settings, running_hub
from mlx_llama_apps.main import main
from model_folders import TINY_SCALED, write_hf
from processes import PATIENCE_S
from tiny_models import write_meta

NAME = "meta-llama/Llama-3.2-1B-Instruct"
# Every way to a socket, in Python or in C, raises one of these events.
NO_SOCKETS = (
    "import sys\n"
    "def refuse(event, arguments):\n"
    "    if event.startswith('socket.'):\n"
    "        raise RuntimeError(f'{event} {arguments}')\n"
    "sys.addaudithook(refuse)\n"
)
RUN_MAIN = "import sys\nfrom mlx_llama_apps.main import main\nsys.exit(main())\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that this process takes for the real one, with a cache of its own."""
    forget_settings(monkeypatch, tmp_path)
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        yield running


@pytest.fixture
def meta(server: HubServer, tmp_path: Path) -> Path:
    """A Meta checkpoint, which the hub has in original/, its license above."""
    folder = write_meta(tmp_path / "Llama-3.2-1B-Instruct", is_tiktoken=True)
    original = files_of(folder, "original/")
    (folder / "LICENSE.txt").write_bytes(b"terms")
    server.add(NAME, {**original, "README.md": b"x", "LICENSE.txt": b"terms"})
    return folder


def environment(server: HubServer, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process that asks the server, with the same cache."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
    }


def model_files(folder: Path) -> dict[str, bytes]:
    """Return what a conversion made, but what says where it comes from."""
    told = ("manifest.json", "README.md")
    return {name: data for name, data in files_of(folder).items() if name not in told}


def test_metas_files_by_name_give_the_bytes_of_the_local_folder(
    server: HubServer, meta: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(meta), "-o", str(tmp_path / "local")]) == 0
    capsys.readouterr()
    assert main(["convert", NAME]) == 0
    captured = capsys.readouterr()
    out = home / "data" / "models" / "Llama-3.2-1B-Instruct-4bit"
    assert captured.out == f"{out}\n"
    assert "kind      llama3.2-instruct (the name 'Llama-3.2-1B-Instruct')" in captured.err
    assert model_files(out) == model_files(tmp_path / "local")
    source = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["source"]
    assert (source["name"], source["repository"]) == ("Llama-3.2-1B-Instruct", NAME)
    assert source["commit"] == COMMIT
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# Llama-3.2-1B-Instruct\n")
    assert f"({NAME}, commit {COMMIT})" in card
    fetched = {request.path.rpartition("/")[2] for request in server.asked("GET", "/resolve/")}
    assert fetched == {"LICENSE.txt", "params.json", "tokenizer.model", "consolidated.00.pth"}


def test_safetensors_by_name_give_the_bytes_of_the_local_folder(
    server: HubServer, meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_hf(tmp_path / "hf-local" / "Llama-3.2-1B-Instruct", TINY_SCALED)
    (folder / "LICENSE.txt").write_bytes(b"terms")
    server.repositories[NAME].files.update(files_of(folder))
    assert main(["convert", str(folder), "-o", str(tmp_path / "local")]) == 0
    assert main(["convert", NAME, "-o", str(tmp_path / "out")]) == 0
    assert "kind      llama2 (" not in capsys.readouterr().err
    assert model_files(tmp_path / "out") == model_files(tmp_path / "local")
    assert not server.asked("GET", "original/")


def test_pull_says_what_it_takes_and_prints_the_folder(
    server: HubServer, meta: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", NAME]) == 0
    captured = capfd.readouterr()
    folder = tmp_path / "hf/hub/models--meta-llama--Llama-3.2-1B-Instruct/snapshots" / COMMIT
    assert captured.out == f"{folder}\n"
    lines = captured.err.splitlines()
    assert lines[0] == f"hub       {NAME}, main is {COMMIT[:12]}"
    assert lines[1].startswith("files     Meta's files, 4 files, ")
    assert lines[2].startswith("rule      safetensors with config.json and a tokenizer where")
    assert "hashes are right" in lines[3]
    assert len(lines) == 4
    assert main(["pull", NAME, "--revision", COMMIT, "--quiet"]) == 0
    assert capfd.readouterr() == (f"{folder}\n", "")


def test_a_dry_run_downloads_nothing(
    server: HubServer, meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", NAME, "--dry-run"]) == 0
    assert "to download" in capsys.readouterr().out
    assert not server.asked("GET", "/resolve/")
    assert not (tmp_path / "hf").exists()
    assert main(["pull", NAME]) == 0
    assert main(["convert", NAME, "--dry-run"]) == 0
    assert "kind      llama3.2-instruct" in capsys.readouterr().out


def test_an_output_in_the_way_is_told_before_the_download(
    server: HubServer, meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert main(["convert", NAME, "-o", str(tmp_path / "out")]) == 1
    assert "exists; choose another --output" in capsys.readouterr().err
    assert server.requests == []


ERRORS = [
    (["pull"], 2, "NAME is missing: give a hub name, such as meta-llama/"),
    (["pull", "../x/y"], 2, "no name of a hub repository, expected owner/name"),
    (["pull", "/etc/passwd"], 2, "no name of a hub repository, expected owner/name"),
    (["pull", NAME, "--revision", "../x"], 2, "--revision: found '../x', expected a branch"),
    (["pull", NAME, "--revision", "v9"], 1, "no revision v9"),
    (["pull", "meta-llama/Nothing"], 1, "no such repository at http"),
    (["pull", "meta-llama/Gated"], 1, "gated: accept its license at http"),
    (["pull", "meta-llama/Empty"], 1, "no safetensors and no consolidated.*.pth in it"),
    (["convert", "meta-llama/Nothing"], 1, "give a folder by its path, such as ./meta-llama/Noth"),
    (["convert", "../x/y"], 1, "../x/y: no such folder"),
    (["convert", "./meta-llama/Nothing"], 1, "no such folder"),
    (["convert", "nothing"], 1, "nothing: no such folder"),
    (["convert", "META", "--revision", "main"], 2, "is no hub repository; leave it out"),
    (["convert", NAME, "--offline"], 1, "revision main is not in the cache"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "text"), ERRORS, ids=[" ".join(a) for a, _, _ in ERRORS]
)
def test_errors_are_one_line_and_an_exit_code(
    server: HubServer,
    meta: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    server.add("meta-llama/Gated", files_of(meta), tokens=(), is_gated=True)
    server.add("meta-llama/Empty", {"README.md": b"x"})
    is_local = not any(argument.startswith("meta-llama/") for argument in arguments)
    assert main([str(meta) if a == "META" else a for a in arguments]) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("mlx-llama: ")
    assert text in line
    if is_local or "--offline" in arguments:
        assert server.requests == []


def test_offline_opens_no_socket(server: HubServer, meta: Path, tmp_path: Path) -> None:
    assert main(["pull", NAME]) == 0
    server.requests.clear()
    out = tmp_path / "out"
    command = [sys.executable, "-c", NO_SOCKETS + RUN_MAIN, "convert", NAME]
    settings = {"env": environment(server, tmp_path), "capture_output": True, "text": True}
    done = subprocess.run([*command, "--offline", "-o", out], check=False, **settings)
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    online = subprocess.run([*command, "-o", f"{out}2"], check=False, **settings)
    assert (online.returncode, "socket." in online.stderr) == (1, True)  # the guard works
    assert server.requests == []
    assert "llama3.2-instruct" in (out / "config.json").read_text(encoding="utf-8")


def test_other_commands_open_no_socket_and_import_no_hub(
    server: HubServer, chat_model: Path, meta: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    commands = [
        ["convert", str(meta), "-o", out],
        ["show", out],
        ["run", out, "hello", "--max-tokens", "2"],
        ["pull", "--help"],
    ]
    code = (
        f"from mlx_llama_apps.main import main\n"
        f"codes = [main(command) for command in {commands!r}]\n"
        "found = [name for name in sys.modules if name.startswith(('huggingface_hub', 'httpx'))]\n"
        "sys.exit(str([codes, found]) if any(codes) or found else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", NO_SOCKETS + code],
        env=environment(server, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_pull_is_continued(
    server: HubServer, meta: Path, tmp_path: Path, how: signal.Signals
) -> None:
    data = server.repositories[NAME].files["original/consolidated.00.pth"]
    server.repositories[NAME].cuts["original/consolidated.00.pth"] = [len(data) // 2]
    server.halt_at_cuts = True
    command = [sys.executable, "-c", RUN_MAIN, "pull", NAME]
    process = subprocess.Popen(
        command, env=environment(server, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert server.cut_reached.wait(PATIENCE_S)
        blobs = tmp_path / "hf/hub/models--meta-llama--Llama-3.2-1B-Instruct/blobs"
        partial = _wait_for(blobs, nbytes=len(data) // 3)
        process.send_signal(how)
        output, errors = process.communicate(timeout=PATIENCE_S)
    server.released.set()
    server.halt_at_cuts = False
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert output == b""
    assert b"Traceback" not in errors
    assert (b"stopped; what was downloaded is kept in " in errors) == (how == signal.SIGINT)
    there = partial.stat().st_size
    server.requests.clear()
    assert main(["pull", NAME]) == 0
    ranges = {request.range for request in server.asked("GET", "consolidated")}
    assert ranges == {f"bytes={there}-"}
    (copy,) = blobs.parent.glob("snapshots/*/original/consolidated.00.pth")
    assert copy.read_bytes() == data


def test_a_terminal_gets_one_bar_of_ours(server: HubServer, meta: Path, tmp_path: Path) -> None:
    server.repositories[NAME].cuts["original/consolidated.00.pth"] = [300_000]
    server.halt_at_cuts = True
    child = pexpect.spawn(
        sys.executable,
        ["-c", RUN_MAIN, "pull", NAME],
        env={**environment(server, tmp_path), "TERM": "xterm", "COLUMNS": "100"},
        encoding="utf-8",
        timeout=PATIENCE_S,
    )
    with child:
        child.expect("rule ")
        child.expect(r"downloading.*━.*/.*kB")
        server.released.set()
        child.expect("hashes are right")
        child.expect(rf"snapshots/{COMMIT}\r\n")
        child.expect(pexpect.EOF)
    assert child.exitstatus == 0
    assert "Fetching" not in (child.before or "")


def _wait_for(blobs: Path, *, nbytes: int) -> Path:
    """Wait until a download has brought so many bytes."""
    for _ in range(1500):
        for partial in blobs.glob("*.incomplete"):
            if partial.stat().st_size >= nbytes:
                return partial
        time.sleep(0.02)
    raise AssertionError("nothing arrives")
