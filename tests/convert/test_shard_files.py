"""How tensors are spread over files, and the index."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama_convert.shard_files import build_index, plan_shards, shard_names


def test_shards_are_filled_in_order() -> None:
    sizes = {"a": 6, "b": 4, "c": 1, "d": 36, "e": 1}
    assert plan_shards(sizes, max_shard_bytes=10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert plan_shards({}, max_shard_bytes=10) == [[]]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), max_size=20),
    max_shard_bytes=st.integers(1, 40),
)
def test_plan_keeps_every_tensor_once_and_the_limit(sizes: list[int], max_shard_bytes: int) -> None:
    by_name = {str(i): size for i, size in enumerate(sizes)}
    shards = plan_shards(by_name, max_shard_bytes=max_shard_bytes)
    assert [name for shard in shards for name in shard] == list(by_name)
    for shard in shards:
        total = sum(by_name[name] for name in shard)
        assert total <= max_shard_bytes or len([name for name in shard if by_name[name]]) == 1


def test_names_and_index_are_those_of_hugging_face() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    index = build_index([[("b", "uint8", (6,))], [("a", "float16", (2,)), ("c", "uint8", ())]])
    assert json.dumps(index) == json.dumps(
        {
            "metadata": {"total_size": 11},
            "weight_map": {
                "a": "model-00002-of-00002.safetensors",
                "b": "model-00001-of-00002.safetensors",
                "c": "model-00002-of-00002.safetensors",
            },
        }
    )
