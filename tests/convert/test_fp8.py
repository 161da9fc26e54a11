"""Float8 weights and their scales: every row with its own, and every way in which they can lack."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from family import unpack
from mlx_llama.errors import CheckpointError
from mlx_llama.options import ConvertOptions
from mlx_llama.tensor_ref import TensorRef
from mlx_llama_convert import SourceModel, open_source
from mlx_llama_convert.fp8 import ScaledTensor
from mlx_llama_convert.pth import open_pth
from pth_writer import write_pth

ROW = "llama3.1-405b-fp8"
KEY = "1_feed_forward.w2_3"


def opened(folder: Path) -> SourceModel:
    return open_source(folder, ConvertOptions(kind="llama3.1"))


def float8_value(code: int) -> float:
    """Work out one e4m3fn code by the format's definition."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def scaled_tensor(folder: Path, codes: np.ndarray, scales: np.ndarray) -> ScaledTensor:
    write_pth(folder / "w.pth", {"w": (codes, "float8_e4m3fn")})
    write_pth(folder / "s.pt", {"s": scales})
    return ScaledTensor(open_pth(folder / "w.pth")["w"], open_pth(folder / "s.pt")["s"])


@pytest.mark.parametrize("is_column", [False, True])
def test_every_code_is_its_value_times_the_scale_of_its_row(
    tmp_path: Path, is_column: bool
) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scales = np.linspace(1e-4, 3.0, 16, dtype=np.float32)
    tensor = scaled_tensor(tmp_path, codes, scales.reshape(-1, 1) if is_column else scales)
    values = np.array([float8_value(code) for code in range(256)], np.float32).reshape(16, 16)
    expected = mx.array(values * scales[:, None]).astype(mx.bfloat16)
    found = tensor.read()
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("bfloat16", (16, 16), 256 + 64)
    assert mx.array_equal(found, expected, equal_nan=True)
    assert mx.array_equal(tensor.read(slice(3, 9)), expected[3:9], equal_nan=True)
    assert tensor.read(slice(5, 5)).shape == (0, 16)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    scales = np.array([1.0, bad], np.float32)
    tensor = scaled_tensor(tmp_path, np.ones((2, 4), np.uint8), scales)
    assert tensor.read(slice(0, 1)).shape == (1, 4)
    with pytest.raises(CheckpointError, match=r"s\.pt: 's' holds scales that are no numbers"):
        tensor.read()


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    arrays = {name: np.array(ref.read()) for name, ref in open_pth(path).items()}
    change(arrays)
    write_pth(path, arrays)


def cut(arrays: dict[str, np.ndarray]) -> None:
    arrays[KEY] = arrays[KEY][:-1]


def whole_numbers(arrays: dict[str, np.ndarray]) -> None:
    arrays[KEY] = arrays[KEY].astype(np.int32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda arrays: arrays.pop(KEY),
            f"'{KEY}' is missing, the scales of layers.1.feed_forward",
        ),
        (cut, f"'{KEY}' is float32 (31,), expected one number for each of the 32 rows"),
        (whole_numbers, f"'{KEY}' is int32 (32,)"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object], text: str
) -> None:
    folder = unpack(ROW, tmp_path / "m")
    rewrite(folder / "fp8_scales_3.pt", change)
    with pytest.raises(CheckpointError, match=rf"fp8_scales_3\.pt: {re.escape(text)}") as caught:
        opened(folder)
    assert str(caught.value).isprintable()


def test_missing_and_exchanged_files_are_refused(tmp_path: Path) -> None:
    folder = unpack(ROW, tmp_path / "m")
    second, third = folder / "fp8_scales_2.pt", folder / "fp8_scales_3.pt"
    second.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"fp8_scales_2\.pt: missing; .*consolidated\.02\.p"):
        opened(folder)
    third.rename(second)
    (tmp_path / "kept").rename(third)
    with pytest.raises(CheckpointError, match=r"fp8_scales_2\.pt: '1_feed_forward\.w1_2' is miss"):
        opened(folder)


def test_damaged_scales_are_refused(tmp_path: Path) -> None:
    folder = unpack(ROW, tmp_path / "m")
    file = folder / "fp8_scales_5.pt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"fp8_scales_5\.pt"):
        opened(folder)


def test_scales_that_nothing_needs_are_told(tmp_path: Path) -> None:
    folder = unpack(ROW, tmp_path / "m")
    more = {"0_feed_forward.w1_0": np.ones(3, np.float32)}
    rewrite(folder / "fp8_scales_0.pt", lambda arrays: arrays.update(more))
    assert any("1 of the scales belong to weights" in note for note in opened(folder).notes)
    plain = unpack("llama3.1-405b-mp8", tmp_path / "plain")
    (folder / "fp8_scales_0.pt").rename(plain / "fp8_scales_0.pt")
    source = opened(plain)
    assert any("fp8_scales_0.pt and its like are not used" in note for note in source.notes)
    assert not any(file.name.startswith("fp8") for file in source.files)


def test_float8_elsewhere_is_refused(tmp_path: Path) -> None:
    """Only feed-forward matrices have scales; float8 in another place has none to look for."""
    folder = unpack("llama3.1-8b", tmp_path / "m")
    refs: Mapping[str, TensorRef] = open_pth(folder / "consolidated.00.pth")
    arrays = {
        name: (np.array(ref.read().view(mx.uint16)), "bfloat16") for name, ref in refs.items()
    }
    name = "layers.0.attention.wo.weight"
    arrays[name] = (np.zeros(refs[name].shape, np.uint8), "float8_e4m3fn")
    write_pth(folder / "consolidated.00.pth", arrays)
    with pytest.raises(CheckpointError, match=r"wo\.weight is float8_e4m3fn, expected one of"):
        opened(folder)
