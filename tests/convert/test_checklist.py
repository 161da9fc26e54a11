from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mlx_llama.errors import CheckpointError
from mlx_llama_convert.checklist import expected_digests
from tiny_models import convert, write_meta


def write_checklist(folder: Path, algorithm: str, *, wrong: str | None = None) -> None:
    lines = []
    for name in ("consolidated.00.pth", "params.json"):
        digest = hashlib.new(algorithm, (folder / name).read_bytes()).hexdigest()
        lines.append(f"{digest[::-1] if name == wrong else digest}  {name}")
    (folder / "checklist.chk").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_right_digests_pass(tmp_path: Path, algorithm: str) -> None:
    meta = write_meta(tmp_path / "m")
    write_checklist(meta, algorithm)
    assert (convert(meta, tmp_path / "out") / "config.json").is_file()


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json"])
def test_wrong_digest_is_an_error_that_leaves_nothing(
    tmp_path: Path, algorithm: str, name: str
) -> None:
    meta = write_meta(tmp_path / "m")
    write_checklist(meta, algorithm, wrong=name)
    with pytest.raises(CheckpointError, match=f"{name}: {algorithm} is .* fetch this file again"):
        convert(meta, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["m"]


def test_tokenizers_own_list_is_read(tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "m")
    (meta / "tokenizer_checklist.chk").write_text(f"{'0' * 32}  tokenizer.model\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: md5"):
        convert(meta, tmp_path / "out")


def test_files_that_are_not_listed_are_not_checked(tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "m")
    (meta / "checklist.chk").write_text(f"{'0' * 32} *other.pth\n\n")
    assert expected_digests([meta / "params.json"]) == {}


def test_garbage_is_told(tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "m")
    (meta / "checklist.chk").write_text("<html>\n")
    with pytest.raises(CheckpointError, match="line 1 is no digest"):
        convert(meta, tmp_path / "out")
