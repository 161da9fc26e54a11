from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from interrupts import lost_lock
from mlx_llama.errors import OutputError
from mlx_llama_convert import output
from mlx_llama_convert.output import JOURNAL, REPLACED, new_directory


def write(target: Path, text: str, *, force: bool = False) -> None:
    with new_directory(target, force=force, needed_bytes=1) as partial:
        (partial.folder / "config.json").write_text(text)
        manifest = {"tool": "mlx-llama", "files": {"config.json": {}}}
        (partial.folder / "manifest.json").write_text(json.dumps(manifest))


def test_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_directory(target, force=False, needed_bytes=1) as partial:
        assert partial.folder == target.with_name("out.partial")
        (partial.folder / "config.json").write_text("{}")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["config.json"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), SystemExit(3)])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    with (
        pytest.raises(type(error)),
        new_directory(tmp_path / "out", force=False, needed_bytes=1) as partial,
    ):
        (partial.folder / "a").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    with (
        pytest.raises(OutputError, match="No space left"),
        new_directory(tmp_path / "out", force=False, needed_bytes=1) as partial,
    ):
        (partial.folder / "a").write_text("half")
        raise full
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_work(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"GB free, 1000000000\.00 GB needed"),
        new_directory(tmp_path / "out", force=False, needed_bytes=10**18),
    ):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_existing_target_is_refused_and_forced(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="exists"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    write(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "manifest.json"]


def test_force_does_not_replace_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="replaces only what mlx-llama wrote"):
        write(tmp_path / "out", "new", force=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="replaces only what mlx-llama wrote"):
        write(tmp_path / "file", "new", force=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_failure_with_force_keeps_the_old_output(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with (
        pytest.raises(RuntimeError),
        new_directory(tmp_path / "out", force=True, needed_bytes=1),
    ):
        raise RuntimeError
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_remains_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mlx_llama_convert.output import new_directory\n"
        "with new_directory(Path(sys.argv[1]), force=False, needed_bytes=1) as partial:\n"
        "    (partial.folder / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    write(tmp_path / "out", "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "manifest.json"]


def test_kill_between_the_renames_loses_neither_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / JOURNAL).touch()
    (tmp_path / "out").rename(partial / REPLACED)
    monkeypatch.setattr(output, "_publish", lambda *_: pytest.fail("stopped before the end"))
    with pytest.raises(pytest.fail.Exception):
        write(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_foreign_partial_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="not ours"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out.partial" / "mine").read_text() == "mine"


def test_second_writer_is_refused_while_the_first_works(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out", force=False, needed_bytes=1) as partial:
        (partial.folder / "config.json").write_text("first")
        with pytest.raises(OutputError, match="another conversion"):
            write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "config.json").read_text() == "first"


def test_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "file" / "out", "x")


def finish(target: Path, job: str, error: BaseException | None) -> None:
    """Finish one file of two, then stop as told."""
    with new_directory(target, force=False, needed_bytes=1, job=job) as partial:
        for name in ("one", "two"):
            if name not in partial.finished:
                (partial.folder / name).write_text(f"{name} of {job}")
                if name == "two" and error is not None:
                    raise error
                digest = hashlib.sha256((partial.folder / name).read_bytes()).hexdigest()
                partial.finish(name, digest)


STOPS = [KeyboardInterrupt(), lost_lock(), OSError(errno.ENOSPC, "No space left on device")]


@pytest.mark.parametrize("stop", STOPS)
def test_finished_files_are_kept_for_the_same_job(tmp_path: Path, stop: BaseException) -> None:
    with pytest.raises((KeyboardInterrupt, RuntimeError, OutputError)) as caught:
        finish(tmp_path / "out", "a", stop)
    said = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert f"1 finished file is kept in {tmp_path / 'out.partial'}" in said[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    before = (tmp_path / "out.partial" / "one").stat().st_mtime_ns
    (tmp_path / "out.partial" / "rest").write_text("of the file that was being written")
    finish(tmp_path / "out", "a", None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one", "two"]
    assert (tmp_path / "out" / "one").stat().st_mtime_ns == before


def test_another_job_starts_over_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "out", "a", KeyboardInterrupt())
    notes: list[str] = []
    with new_directory(
        tmp_path / "out", force=False, needed_bytes=1, job="b", on_note=notes.append
    ) as partial:
        assert partial.finished == {}
        (partial.folder / "one").write_text("b")
    assert any("starting over" in note for note in notes)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["one"]


def test_damaged_file_is_made_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "out", "a", KeyboardInterrupt())
    (tmp_path / "out.partial" / "one").write_text("damaged")
    finish(tmp_path / "out", "a", None)
    assert (tmp_path / "out" / "one").read_text() == "one of a"


@pytest.mark.parametrize(
    "line", ['{"file": "../../mine", "sha256": "x"}', '{"file"', "[1]", '{"file": "gone"}', "\x00"]
)
def test_journal_that_was_cut_or_forged_does_no_harm(tmp_path: Path, line: str) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "out", "a", KeyboardInterrupt())
    with (tmp_path / "out.partial" / JOURNAL).open("a") as journal:
        journal.write(line + "\n")
    finish(tmp_path / "out", "a", None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one", "two"]
    assert (tmp_path / "mine").read_text() == "mine"


def test_stopping_between_the_renames_keeps_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")
    rename, calls = Path.rename, list[Path]()

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="exists"),
        new_directory(tmp_path / "out", force=False, needed_bytes=1),
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_empty_partial_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    write(tmp_path / "out", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_partial_folder_of_another_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = output._publish

    def publish_and_meet_another(folder: Path, target: Path) -> None:
        publish(folder, target)
        folder.mkdir()
        (folder / JOURNAL).touch()

    monkeypatch.setattr(output, "_publish", publish_and_meet_another)
    write(tmp_path / "out", "new")
    assert (tmp_path / "out.partial" / JOURNAL).exists()


def test_force_does_not_replace_a_folder_with_more_in_it(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.tex is not of it"):
        write(tmp_path / "out", "new", force=True)


def test_force_does_not_replace_other_peoples_models(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).write_text("theirs")
    with pytest.raises(OutputError, match="replaces only what mlx-llama wrote"):
        write(tmp_path / "out", "new", force=True)


def test_current_folder_can_be_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path(), "new", force=True)
    assert (tmp_path / "here" / "config.json").read_text() == "new"
