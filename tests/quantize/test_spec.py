from __future__ import annotations

import pytest

from mlx_llama.config import QuantFormat
from mlx_llama.errors import OptionError
from mlx_llama_quantize import QuantSpec
from mlx_llama_quantize.spec import Override, mode_format, tensor_class

WQ, W2 = "layers.10.attention.wq.weight", "layers.0.feed_forward.w2.weight"


@pytest.mark.parametrize(
    ("name", "tied", "found"),
    [
        (WQ, False, "attention"),
        (W2, False, "feed-forward"),
        ("tok_embeddings.weight", False, "embedding"),
        ("tok_embeddings.weight", True, "head"),
        ("output.weight", False, "head"),
        ("norm.weight", False, None),
        ("layers.0.attention_norm.weight", False, None),
    ],
)
def test_every_matrix_has_a_class(name: str, tied: bool, found: str | None) -> None:
    assert tensor_class(name, is_tied=tied) == found


@pytest.mark.parametrize(
    ("override", "name", "found"),
    [
        ("attention=8", WQ, (8, 64)),
        ("attention=8:32", WQ, (8, 32)),
        ("layers.10.*=6", WQ, (6, 64)),
        ("layers.1.*=6", WQ, (4, 64)),
        ("model.layers.*.self_attn.q_proj=3", WQ, (3, 64)),
        ("*.w2=2", W2, (2, 64)),
        ("*.wq=dense", WQ, None),
        ("*=8", "norm.weight", None),
        ("head=8", "tok_embeddings.weight", (4, 64)),
    ],
)
def test_override_by_pattern(override: str, name: str, found: tuple[int, int] | None) -> None:
    form = QuantSpec(4, overrides=(Override.parse(override),)).format_of(name, (128, 128))
    assert (form and (form.bits, form.group_size)) == found


def test_last_override_counts() -> None:
    overrides = tuple(map(Override.parse, ("*=8", "attention=3", "*.wq=mxfp4")))
    spec = QuantSpec(4, overrides=overrides)
    assert spec.format_of(WQ, (64, 64)) == QuantFormat(4, 32, "mxfp4")
    assert spec.format_of(W2, (64, 64)) == QuantFormat(8, 64)


@pytest.mark.parametrize(
    "text", ["head", "=4", "head=", "head=7", "head=16", "head=4:16", "head=4:", "head=affine"]
)
def test_wrong_overrides_say_what_is_expected(text: str) -> None:
    with pytest.raises(OptionError, match=r"--override.*expected"):
        Override.parse(text)


def test_exact_group_that_does_not_divide_is_refused() -> None:
    spec = QuantSpec(4, overrides=(Override.parse("*.w2=4:64"),))
    with pytest.raises(OptionError, match=r"w2\.weight has width 96, which 64 does not divide"):
        spec.format_of(W2, (64, 96))


def test_override_that_means_nothing_is_found() -> None:
    spec = QuantSpec(4, overrides=(Override.parse("norm=8"), Override.parse("*.wq=8")))
    assert spec.unused(["norm.weight", WQ]) == ["norm"]


@pytest.mark.parametrize(
    ("mode", "bits", "group", "found"),
    [
        ("affine", None, None, QuantFormat(4, 64)),
        ("affine", 6, 128, QuantFormat(6, 128)),
        ("mxfp8", None, None, QuantFormat(8, 32, "mxfp8")),
        ("nvfp4", 4, None, QuantFormat(4, 16, "nvfp4")),
        ("mxfp4", 8, None, "--bits 8: mode mxfp4 has 4"),
        ("nvfp4", None, 64, "--group-size 64: mode nvfp4 has 16"),
    ],
)
def test_modes_have_their_own_bits(
    mode: str, bits: int | None, group: int | None, found: QuantFormat | str
) -> None:
    if isinstance(found, str):
        with pytest.raises(OptionError, match=found):
            mode_format(mode, bits, group)
    else:
        assert mode_format(mode, bits, group) == found
