"""The rule of what is fetched, and the names that never are."""

from __future__ import annotations

import pytest

from mlx_llama.errors import DownloadError, OptionError
from mlx_llama_convert.hub_files import check_revision, choose_files, is_hub_name

SAFETENSORS = ["config.json", "model.safetensors", "tokenizer.json"]
META = ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"]


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3.2-1B-Instruct", "a/b", "karpathy/tiny_llamas", "O1/x.y-z"]
)
def test_hub_names(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "a", "a/", "/a", "a/b/c", "../x", "x/..", "../x/y", "./a/b", "/a/b", "a//b", "a/b/",
        "~/a", "a/.b", ".a/b", "a/b.", "-a/b", "a/b--c", "a/b..c", "a/b.git", "a\\b/c", "a/b\n",
        "a/b c", "a/b?c", "a/b#c", "a/b%2e", "ä/b", "a/" + "b" * 96, "https://host/a/b",
    ],
)  # fmt: skip
def test_paths_and_tricks_are_no_hub_names(name: str) -> None:
    assert not is_hub_name(name)


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "0" * 40, "a_b-c"])
def test_branches_tags_and_commits_are_taken(revision: str) -> None:
    check_revision(revision)  # an OptionError where it is not


@pytest.mark.parametrize(
    "revision", ["", "..", "../x", "a/../b", "/a", "a/", "a//b", "a\n", "-x", "a b", "a..b", ".a"]
)
def test_revisions_that_lead_elsewhere_are_refused(revision: str) -> None:
    with pytest.raises(OptionError, match="expected a branch, a tag or a commit"):
        check_revision(revision)


def test_safetensors_come_before_metas_files() -> None:
    others = ["README.md", "LICENSE.txt", "USE_POLICY.md", ".gitattributes", "image.png"]
    choice = choose_files([*META, *others, *SAFETENSORS, "generation_config.json"], where="r")
    assert choice.folder == ""
    assert not choice.is_meta
    assert choice.paths == (
        "LICENSE.txt",
        "USE_POLICY.md",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors",
    )


@pytest.mark.parametrize("lacking", SAFETENSORS)
def test_without_whole_safetensors_metas_files_are_taken(lacking: str) -> None:
    names = [name for name in SAFETENSORS if name != lacking]
    choice = choose_files([*names, *META, "original/orig_params.json"], where="r")
    assert choice.folder == "original"
    assert sorted(choice.paths) == META


def test_shards_need_their_index_and_all_of_them() -> None:
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    beside = ["config.json", "tokenizer.model", "model.safetensors.index.json"]
    assert choose_files([*shards, *beside], where="r").weights == tuple(shards)
    # One file that holds all stands beside the shards in some repositories.
    both = choose_files([*shards, *beside, "model.safetensors"], where="r")
    assert both.weights == tuple(shards)
    with pytest.raises(DownloadError, match="r: 2 files of weights, expected 3"):
        choose_files([*shards[1:], *beside], where="r")


def test_metas_files_at_the_top() -> None:
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    choice = choose_files([*names, "checklist.chk", "tokenizer_checklist.chk"], where="r")
    assert choice.folder == ""
    assert choice.is_meta
    assert set(choice.paths) == {*names, "checklist.chk", "tokenizer_checklist.chk"}


def test_a_tokenizer_one_level_up_belongs_to_metas_files() -> None:
    choice = choose_files([*META[:2], "tokenizer.model"], where="r")
    assert choice.paths == ("original/params.json", "tokenizer.model", META[0])


def test_a_gap_in_metas_ranks_is_told() -> None:
    with pytest.raises(DownloadError, match="not every consolidated"):
        choose_files([*META, "original/consolidated.02.pth"], where="r")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], "no safetensors and no consolidated"),
        (["a.gguf", "README.md"], "only GGUF files"),
        (["config.json", "pytorch_model.bin"], "no safetensors and no consolidated"),
        (["model.safetensors", "config.json"], "no tokenizer.model, tokenizer.json"),
        (["consolidated.00.pth"], "no params.json, tokenizer.model"),
    ],
)
def test_repositories_without_a_model_are_told(names: list[str], text: str) -> None:
    with pytest.raises(DownloadError, match=text):
        choose_files(names, where="r")


HOSTILE = [
    "../config.json",
    "/config.json",
    "original/../../consolidated.00.pth",
    "original//consolidated.01.pth",
    "original/../consolidated.01.pth",
    "model-00001-of-00002.safetensors/../../x",
    "..\\model.safetensors",
    "LICENSE/../../x",
    "LICENSE\n",
    "config.json\x00",
    "tokenizer.model\n",
    "model.safetensors.index.json/x",
    "~/tokenizer.json",
    "snapshots/x/config.json",
    "-rf",
    "",
]


def test_hostile_names_are_never_chosen() -> None:
    for names in (SAFETENSORS, META):
        assert sorted(choose_files([*names, *HOSTILE], where="r").paths) == names
    with pytest.raises(DownloadError):
        choose_files(HOSTILE, where="r")
