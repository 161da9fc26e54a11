"""What the commands say of the native kernels."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mlx_llama import blas, native
from mlx_llama.config import QuantFormat
from mlx_llama_apps import inference
from mlx_llama_apps.main import main

MISSING = "mlx_llama_kernels is not installed"


@pytest.fixture
def packed_model(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = tmp_path / "packed"
    assert (
        main(["convert", str(base_model), "--bits", "4", "--group-size", "32", "-o", str(folder)])
        == 0
    )
    capsys.readouterr()
    return folder


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "taken", lambda: None)
    monkeypatch.setattr(blas, "are_kernels_installed", lambda: False)
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(native, "missing_reason", lambda: MISSING)
    monkeypatch.setattr(native, "can_be_built", lambda: True)


@pytest.mark.usefixtures("no_kernels")
def test_loading_says_once_what_is_missing_and_how_to_get_it(
    packed_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["run", str(packed_model), "--max-tokens", "2", "--raw", "in"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""  # too small a model to be slow
    monkeypatch.setattr(inference, "NOTICEABLE_BYTES", 0)
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert told.count(MISSING) == 1 and told.count("\n") == 1 and "make kernels" in told


@pytest.mark.usefixtures("no_kernels")
def test_show_says_what_is_missing(packed_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(packed_model), "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert kernels["missing"] == MISSING and kernels["other_formats"] == []
    assert kernels["formats"] == ["4 bits, group 32"]
    assert main(["show", str(packed_model)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "make kernels" in out and "apt install libopenblas0" in out


@pytest.mark.usefixtures("no_kernels")
def test_show_names_the_blas_that_multiplies_instead(
    packed_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "taken", lambda: blas.Blas("libopenblas.so.0", object()))
    assert main(["show", str(packed_model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"]["blas"] == "libopenblas.so.0"
    assert main(["show", str(packed_model)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "products by libopenblas.so.0" in out and "make kernels" in out
    assert "apt install" not in out


def test_a_blas_is_advised_where_it_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do not fit kept it from being taken, and it was advised."""
    monkeypatch.setattr(blas, "are_kernels_installed", lambda: False)
    assert "builds them (docs/cpu.md); where that cannot be, `apt" in inference.slower(None)
    assert "apt install" not in inference.slower("libopenblas.so.0")
    monkeypatch.setattr(blas, "_STATE", blas._State(asked=blas.OFF))
    assert "apt install" not in inference.slower(None)
    monkeypatch.setattr(blas, "_STATE", blas._State())
    monkeypatch.setattr(blas, "are_kernels_installed", lambda: True)
    told = inference.slower(None)
    assert "apt install" not in told and told.endswith(
        "`make kernels` builds them again (docs/cpu.md)"
    )


def test_a_blas_below_the_current_folder_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(blas.VARIABLE, "./libopenblas.so.0")
    assert main(["show", "bundled"]) == 2
    assert "MLX_LLAMA_BLAS=./libopenblas.so.0: expected off" in capsys.readouterr().err


@pytest.mark.usefixtures("no_kernels")
def test_threads_without_kernels_are_refused(
    packed_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(packed_model), "--threads", "2", "in"]) == 2
    assert "--threads 2: only the native CPU kernels" in capsys.readouterr().err


@pytest.mark.skipif(native.kernels() is None, reason="no native kernels")
def test_show_names_the_instructions_that_run(
    packed_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(packed_model)]) == 0
    assert "native kernels: " in capsys.readouterr().out


@pytest.mark.skipif(
    not native.takes_bytes(QuantFormat(4, 32)), reason="no kernels here round activations"
)
def test_show_says_when_activations_are_rounded(
    packed_model: Path, base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(packed_model), "--activations", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["activations"] == "int8"
    assert "activations in 8 bits" in found["kernels"]["summary"]
    assert main(["show", str(base_model), "--activations", "int8"]) == 2
    assert "are rounded: it has no packed matrix; leave it out" in capsys.readouterr().err


def test_kernels_that_refuse_arrays_are_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Built with another nanobind they loaded, and the first product failed."""

    def refuse(*arguments: object) -> None:
        raise TypeError("rms_norm(): incompatible function arguments")

    fake = ModuleType("mlx_llama_kernels")
    monkeypatch.setattr(fake, "INTERFACE", native.INTERFACE, raising=False)
    monkeypatch.setattr(fake, "rms_norm", refuse, raising=False)
    monkeypatch.setitem(sys.modules, "mlx_llama_kernels", fake)
    monkeypatch.setattr(native, "can_be_built", lambda: True)
    found, reason = native._found.__wrapped__()
    assert found is None and reason is not None
    assert "another nanobind: build it again" in reason


def test_kernels_of_older_sources_are_named_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lacked functions that were called then."""
    monkeypatch.setitem(sys.modules, "mlx_llama_kernels", ModuleType("mlx_llama_kernels"))
    monkeypatch.setattr(native, "can_be_built", lambda: True)
    assert native._found.__wrapped__() == (
        None,
        "mlx_llama_kernels is of another version of mlx-llama: build it again",
    )


@pytest.mark.skipif(native.kernels() is None, reason="no native kernels")
def test_more_threads_than_processors_are_told(
    packed_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were slow without a word."""
    kernels = native.kernels()
    assert kernels is not None
    before = kernels.threads()
    monkeypatch.setattr(inference, "processors", lambda: 1)
    arguments = ["run", str(packed_model), "--max-tokens", "2", "--raw", "in"]
    try:
        assert main([*arguments, "--threads", "2"]) == 0
        told = capsys.readouterr().err
        assert told == "--threads 2: more than the 1 processor here, and slower\n"
        assert main([*arguments, "--threads", "1"]) == 0
        assert capsys.readouterr().err == ""
    finally:
        kernels.use_threads(before)
