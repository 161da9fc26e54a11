"""The checkpoint in the box, used as the real model it is."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

import mlx_llama
from mlx_llama_apps import bundled, paths
from mlx_llama_apps.chat.store import VERSION
from mlx_llama_apps.main import main
from processes import PATIENCE_S
from tiny_models import write_meta

MAX_BYTES = 16_000_000
ASKED = [
    ("what does --top-k do?", "keep this many likeliest tokens"),
    ("what is grouped-query attention?", "share one key"),
    ("how much memory does an 8B need at 4 bits?", "4.52 GB"),
    ("how do I convert Llama 3.1 70B?", "mlx-llama convert Llama-3.1-70B-Instruct"),
    ("what is the capital of France?", "I do not know"),
]


ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
PROMPT = r">(\x08| )"


def command(*arguments: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from mlx_llama_apps.entry import run_main; run_main()",
        *arguments,
    ]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MLX_LLAMA_HOME": str(home)}


class Terminal:
    """A chat behind a pseudo-terminal, with no model named."""

    def __init__(self, home: Path) -> None:
        program, *arguments = command("chat")
        self.child: pexpect.spawn[str] = pexpect.spawn(
            program,
            arguments,
            env={**environment(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            dimensions=(24, 200),
            timeout=PATIENCE_S,
            encoding="utf-8",
        )

    def expect(self, pattern: str) -> str:
        """Wait for a text; return what came before it, without escape codes."""
        self.child.expect(pattern)
        return ESCAPE.sub("", self.child.before or "")

    def ask(self, text: str) -> str:
        self.child.send(text + "\r")
        return self.expect(r"context (\d+) of (\d+)")


@contextmanager
def chatting(home: Path) -> Iterator[Terminal]:
    """Start a chat; leave it at the end, and see that it ends well."""
    terminal = Terminal(home)
    try:
        yield terminal
        terminal.child.send("\x04")
        terminal.child.expect(pexpect.EOF)
        terminal.child.close()
        assert terminal.child.exitstatus == 0
    finally:
        terminal.child.close(force=True)


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the bundled checkpoint was converted once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def converted(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_LLAMA_HOME", str(shared_home))
    return paths.resolve_model("bundled")


def test_it_is_small_and_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = bundled.checkpoint()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
    names = {path.name for path in folder.iterdir()}
    assert names >= {"consolidated.00.pth", "params.json", "tokenizer.model", "checklist.chk"}
    assert "README.md" in names  # the model card
    out = tmp_path / "out"
    assert main(["convert", "bundled", "--verify", "-o", str(out)]) == 0
    assert "4 bits" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == 8.0
    assert config["quantization"]["bits"] == 4
    assert not [name for name, entry in config["quantization"].items() if entry is False]


def test_chat_without_a_model_converts_it_and_answers(home: Path) -> None:
    with chatting(home) as terminal:
        plan = terminal.expect("done in")
        assert "Meta checkpoint, 1 file" in plan
        assert "× 8 bits" in plan
        terminal.expect("bundled-8bit: llama3.1-instruct")
        terminal.expect(PROMPT)
        assert "share one key" in terminal.ask("what is grouped-query attention?")
        assert "4.52 GB" in terminal.ask("how much memory does an 8B need at 4 bits?")
        assert "8.53 GB" in terminal.ask("and at 8 bits?")
        terminal.expect(PROMPT)
    with chatting(home) as terminal:
        assert "done in" not in terminal.expect(PROMPT)


@pytest.mark.parametrize("bits", ["8", "4"])
def test_it_answers(
    converted: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, bits: str
) -> None:
    model = str(converted)
    if bits == "4":
        model = str(tmp_path / "four")
        assert main(["convert", "bundled", "--bits", "4", "-o", model]) == 0
        capsys.readouterr()
    for question, fact in ASKED:
        assert main(["run", model, question]) == 0
        assert fact in capsys.readouterr().out, question


def test_stdout_has_the_answer_alone_also_when_it_is_converted_first(home: Path) -> None:
    done = subprocess.run(
        command("run", "bundled", "what does --seed do?"),
        env=environment(home),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "makes the answer repeatable" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert "done in" in done.stderr


def test_every_command_takes_the_name(
    converted: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["verify", "bundled"]) == 0
    assert main(["show", "bundled", "--json"]) == 0
    assert main(["convert", "bundled", "--dry-run"]) == 0
    capsys.readouterr()
    text = tmp_path / "text.txt"
    text.write_text("The KV cache holds the keys and values of the tokens so far.\n" * 8)
    asking = ["compare", "bundled", "bundled", "--text", str(text), "--context", "64", "--json"]
    assert main([*asking, "--no-costs"]) == 0
    assert json.loads(capsys.readouterr().out)["divergence"]["kld"]["mean"]["value"] == 0


def test_a_system_prompt_gives_it_a_name(converted: Path) -> None:
    llama = mlx_llama.load(converted)
    for name in ("Marvin", "Grace"):
        session = llama.session()
        messages = [
            {"role": "system", "content": f"Your name is {name}."},
            {"role": "user", "content": "what is your name?"},
        ]
        answer = "".join(step.text for step in session.stream(messages, temperature=0))
        assert name in answer


def test_a_full_context_slides_and_it_still_answers(converted: Path) -> None:
    llama = mlx_llama.load(converted)
    forgotten: list[int] = []
    session = llama.session(context=96, on_full="slide")
    for _ in range(6):
        steps = session.ask("what does --top-k do?", temperature=0, on_forget=forgotten.append)
        answer = "".join(step.text for step in steps)
    assert forgotten
    assert "keep this many likeliest tokens" in answer


def test_plain_text_goes_on(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "what is RMSNorm?\nRMSNorm divides a vector by its root mean"
    assert main(["run", str(converted), text, "--raw", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out.startswith(" square")


def test_a_directory_of_other_weights_is_made_anew(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = paths.resolve_model("bundled")
    manifest = json.loads((made / "manifest.json").read_text())
    for file in manifest["source"]["files"]:
        file["md5"] = "0" * 32
    (made / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert paths.resolve_model("bundled") == made
    assert "done in" in capsys.readouterr().err
    assert paths.resolve_model("bundled") == made
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("part", ["version", "weights"])
def test_one_of_another_version_or_cut_short_is_made_anew(
    home: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    made = paths.resolve_model("bundled")
    if part == "version":
        manifest = json.loads((made / "manifest.json").read_text())
        (made / "manifest.json").write_text(json.dumps({**manifest, "version": "0.0.1"}))
    else:
        os.truncate(made / "model.safetensors", 1000)
    capsys.readouterr()
    assert main(["verify", str(paths.resolve_model("bundled"))]) == 0
    assert "done in" in capsys.readouterr().err
    assert paths.resolve_model("bundled") == made
    assert capsys.readouterr().err == ""


MANIFESTS = ["{", "[]", "{}", *(f'{{"source":{{"files":{f}}}}}' for f in ("5", '["x"]', "[{}]"))]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_that_says_nothing_is_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], manifest: str
) -> None:
    bundled.target().mkdir(parents=True)
    (bundled.target() / "manifest.json").write_text(manifest)
    assert main(["run", "bundled", "Hi"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "bundled-8bit: the bundled model belongs there, and this is another" in line
    assert (bundled.target() / "manifest.json").read_text() == manifest


def test_another_model_of_that_name_stays(
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A conversion of the user's own folder `bundled` was replaced without a word."""
    write_meta(tmp_path / "here" / "bundled")
    monkeypatch.chdir(tmp_path / "here")
    assert main(["convert", "./bundled", "--bits", "8"]) == 0
    monkeypatch.chdir(tmp_path)
    before = (bundled.target() / "manifest.json").read_bytes()
    capsys.readouterr()
    assert main(["run", "bundled", "Hi"]) == 1
    assert "rename the folder" in capsys.readouterr().err
    assert main(["chat"]) == 2
    assert "MODEL is missing" in capsys.readouterr().err
    assert (bundled.target() / "manifest.json").read_bytes() == before


def test_a_file_of_the_users_in_it_is_not_lost(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = paths.resolve_model("bundled")
    (made / "notes.txt").write_text("mine")
    (made / "model.safetensors").unlink()
    capsys.readouterr()
    assert main(["show", "bundled"]) == 1
    assert "or holds more; rename the folder" in capsys.readouterr().err
    assert (made / "notes.txt").read_text() == "mine"


def test_two_first_uses_at_once_both_answer(home: Path) -> None:
    both = [
        subprocess.Popen(
            command("run", "bundled", "what does --seed do?"),
            env=environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        assert "makes the answer repeatable" in out


def test_the_second_use_waits_for_the_first(home: Path) -> None:
    folder = bundled.target().parent
    folder.mkdir(parents=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with subprocess.Popen(
        command("show", "bundled"), env=environment(home), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "waiting for it" in process.stderr.readline()
        assert not bundled.target().exists()
        os.close(lock)
        assert process.wait(timeout=PATIENCE_S) == 0


def test_what_is_being_made_is_no_model_at_hand(home: Path, converted: Path) -> None:
    """A quantization that was interrupted while it compared took the guide's place in `chat`."""
    partial = home / "data" / "models" / "mine-4bit.partial"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{}")
    (partial / ".mlx-llama-partial").write_text("")
    done = pipe_to_chat(home, home.parent)
    assert done.returncode == 0, done.stderr
    assert "done in" in done.stderr


def pipe_to_chat(home: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("chat", *arguments),
        env=environment(home),
        cwd=cwd,
        input="what does --seed do?",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_chat_without_a_model_takes_no_folder_of_that_name(
    tmp_path: Path, home: Path, kind: str
) -> None:
    """`chat` looked for the name "bundled" where the user stood."""
    place = tmp_path / "bundled"
    make = {"file": place.touch, "folder": place.mkdir}
    make.get(kind, lambda: place.symlink_to(tmp_path / "nowhere" / "foo"))()
    done = pipe_to_chat(home, tmp_path)
    assert "makes the answer repeatable" in done.stdout, done.stderr
    assert [path.name for path in (home / "data" / "models").iterdir()] == ["bundled-8bit"]


def test_a_chat_with_it_goes_on_where_it_was_removed(home: Path) -> None:
    with chatting(home) as terminal:
        terminal.expect(PROMPT)
        terminal.ask("what does --seed do?")
    shutil.rmtree(home / "data" / "models")
    done = pipe_to_chat(home, home, "--resume")
    assert "makes the answer repeatable" in done.stdout, done.stderr
    assert "done in" in done.stderr


def test_a_chat_with_a_model_that_is_gone_says_how_to_go_on(home: Path) -> None:
    chats = home / "data" / "chats"
    chats.mkdir(parents=True)
    header = {"type": "chat", "version": VERSION, "model": "/nowhere/tiny"}
    (chats / "20260101-000000.jsonl").write_text(json.dumps(header) + "\n")
    done = pipe_to_chat(home, home, "--resume")
    assert "chat MODEL --resume 20260101-000000" in done.stderr


def test_a_folder_of_that_name_goes_first(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundled").symlink_to(base_model)
    monkeypatch.chdir(tmp_path)
    assert paths.resolve_model("bundled").resolve() == base_model.resolve()


def test_an_installation_without_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundled, "_FOLDER", tmp_path / "gone")
    assert main(["chat"]) == 1
    assert re.search("bundled checkpoint is missing; install", capsys.readouterr().err)


def test_odd_inputs_end(converted: Path) -> None:
    llama = mlx_llama.load(converted)
    for text in ("", "?", "a" * 400, "Wo ist der Bahnhof?", "\N{FIRE} " * 60, "zxcv qwer " * 80):
        messages = [{"role": "user", "content": text}]
        steps = list(llama.stream_chat(messages, temperature=0, max_tokens=256))
        assert steps[-1].finish_reason == "eos", text


def test_make_chat_needs_no_model() -> None:
    makefile = Path(__file__).resolve().parents[2] / "Makefile"
    plan = subprocess.run(
        ["make", "-n", "-C", str(makefile.parent), "chat", f"VENV={Path(sys.prefix)}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "make chat needs a model" not in plan.stdout
