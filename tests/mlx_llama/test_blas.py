"""The BLAS that multiplies where the native kernels are missing: which one, when, how well."""

from __future__ import annotations

import subprocess
import sys
from ctypes import c_long
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama import blas, cgroups, dequantized, native, ops
from mlx_llama.blas import Blas
from mlx_llama.config import QuantFormat
from mlx_llama.errors import OptionError

ROOT = Path(__file__).parents[2]
NO_BLAS = "libm.so.6"  # on every Linux, and without cblas_sgemm
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a choice")
FORMS = [
    *(QuantFormat(bits=bits, group_size=64) for bits in (2, 3, 4, 5, 6, 8)),
    QuantFormat(bits=4, group_size=32, mode="mxfp4"),
]


class Library:
    """A library that was opened, as far as its threads go: 64 at most, as it was built."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.openblas_get_num_threads = self._get
        self.openblas_set_num_threads = self._set

    def _get(self) -> int:
        return self.n_threads

    def _set(self, n_threads: c_long) -> None:
        self.n_threads = min(n_threads.value, 64)


class Mute:
    """A library that has no threads to count."""


def found(library: object = None) -> Blas:
    return Blas("libtest.so.0", library or Mute())


@pytest.fixture
def with_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels, and MLX's own products in the place of a library's."""
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(blas, "taken", found)


def packed(form: QuantFormat, rows: int, columns: int) -> tuple[mx.array, ...]:
    weight = mx.random.normal((rows, columns), key=mx.random.key(1))
    return mx.quantize(weight, group_size=form.group_size, bits=form.bits, mode=form.mode)


@pytest.mark.usefixtures("with_blas")
def test_numbers_of_half_scales_are_not_rounded_to_halves() -> None:
    """They were, and products were off by 0.2 where MLX's own are by 0.00002."""
    form = QuantFormat(bits=4, group_size=64)
    weight, *numbers = packed(form, 96, 128)
    scales, biases = (array.astype(mx.bfloat16) for array in numbers)
    x = mx.random.normal((1, dequantized.LEAST_ROWS, 128), key=mx.random.key(2))
    expected = mx.quantized_matmul(x, weight, scales, biases, group_size=64, bits=4)
    found = ops.quantized_linear(x, weight, scales, biases, form)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("with_blas")
@pytest.mark.parametrize("form", FORMS, ids=QuantFormat.describe)
@pytest.mark.parametrize("rows_at_once", [1000, 24])
def test_many_rows_are_multiplied_by_a_dequantized_matrix(
    form: QuantFormat, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantized, "BYTES", rows_at_once * 128 * dequantized.NUMBER_BYTES)
    weight, scales, *rest = packed(form, 100, 128)
    biases = rest[0] if rest else None
    x = mx.random.normal((2, dequantized.LEAST_ROWS // 2, 128), key=mx.random.key(2))
    assert ops.is_dequantized(x) and not ops.is_dequantized(x[:, 1:])
    assert not ops.is_dequantized(x.astype(mx.bfloat16))
    product = ops.quantized_linear(x, weight, scales, biases, form)
    dense = mx.dequantize(
        weight, scales, biases, group_size=form.group_size, bits=form.bits, mode=form.mode
    )
    expected = np.array(x, np.float64) @ np.array(dense.astype(mx.float32), np.float64).T
    assert product.shape == (2, dequantized.LEAST_ROWS // 2, 100) and product.dtype == mx.float32
    np.testing.assert_allclose(product, expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("with_blas")
def test_dense_weights_become_float32_for_a_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.compute_dtype("bfloat16", is_quantized=False, asked=None) == mx.float32
    assert ops.prefill_chunk() == 512
    assert "products by libtest.so.0: " in ops.native_summary()
    monkeypatch.setattr(blas, "taken", lambda: None)
    assert ops.compute_dtype("bfloat16", is_quantized=False, asked=None) == mx.bfloat16
    assert ops.prefill_chunk() == 128
    assert "one thread" in ops.native_summary()


@pytest.mark.usefixtures("with_blas")
def test_threads_are_those_of_the_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(2)
    monkeypatch.setattr(blas, "taken", lambda: found(library))
    assert "libtest.so.0, 2 threads" in ops.native_summary()
    ops.use_threads(1)
    assert library.n_threads == 1
    with pytest.raises(OptionError, match="--threads 1000: this process may have 64 at most"):
        ops.use_threads(1000)
    monkeypatch.setattr(blas, "taken", found)
    with pytest.raises(OptionError, match="takes no number of threads; leave it out"):
        ops.use_threads(1)
    monkeypatch.setattr(blas, "taken", lambda: None)
    with pytest.raises(OptionError, match="a BLAS have threads to count"):
        ops.use_threads(1)


# --- which one -----------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("libnot-there.so.9", "cannot be opened"),
        (NO_BLAS, "without cblas_sgemm"),
        ("/nowhere/libopenblas.so.0", "cannot be opened"),
    ],
)
def test_what_was_asked_for_and_cannot_be_had_is_an_error(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "are_kernels_installed", lambda: False)
    with pytest.raises(OptionError, match=f"{message}.*; .*name another, or give off"):
        blas._chosen(name)


@linux
def test_none_is_looked_for_where_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def opens(name: str) -> Blas | None:
        opened.append(name)
        return None if len(opened) == 1 else found()

    monkeypatch.setattr(blas, "_opened", opens)
    monkeypatch.setattr(blas, "are_kernels_installed", lambda: True)
    assert blas._chosen(None) is None and opened == []
    assert blas._chosen("libopenblas.so.0") is None and opened == []
    monkeypatch.setattr(blas, "are_kernels_installed", lambda: False)
    assert blas._chosen("off") is None and opened == []
    assert blas._chosen(None) is not None and opened == [*blas.THREADS][:2]


@linux
def test_a_system_without_any_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "are_kernels_installed", lambda: False)
    monkeypatch.setattr(blas, "THREADS", {"libnot-there.so.9": ("", ""), NO_BLAS: ("", "")})
    assert blas._chosen(None) is None


def test_paths_below_the_current_folder_are_refused() -> None:
    for name in ("./libopenblas.so.0", "lib/libopenblas.so.0"):
        with pytest.raises(OptionError, match="expected off, the name of a library"):
            blas.choose(name)


def test_a_choice_that_comes_too_late_is_an_error() -> None:
    with pytest.raises(OptionError, match="no BLAS can be taken"):
        blas.choose("off")


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@linux
def test_it_is_taken_before_mlx_and_not_before_it_is_needed() -> None:
    code = (
        "import sys, mlx_llama\n"
        "from mlx_llama import blas\n"
        "def take(): print('mlx.core' in sys.modules, *sys.argv[1:])\n"
        "blas.take = take\n"
        "import mlx_llama.config; print('not yet')\n"
        "import mlx_llama.ops, mlx.core\n"
    )
    assert run_python(code).split("\n") == ["not yet", "False"]


@linux
def test_finders_behind_it_are_asked_for_mlx() -> None:
    code = (
        "import sys, mlx_llama\n"
        "class Behind:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'mlx.core': print('asked')\n"
        "sys.meta_path.insert(1, Behind)\n"
        "import mlx.core\n"
    )
    assert run_python(code) == "asked"


@linux
def test_a_choice_behind_a_look_for_mlx_is_an_error() -> None:
    """It was accepted, and had no effect."""
    code = (
        "import importlib.util, sys, mlx_llama\n"
        "from mlx_llama import blas\n"
        "importlib.util.find_spec('mlx.core')\n"
        "assert 'mlx.core' not in sys.modules\n"
        "try: blas.choose('off')\n"
        "except mlx_llama.MlxLlamaError as error: print(error)\n"
    )
    assert "mlx.core was looked for already" in run_python(code)


@linux
def test_what_cannot_be_opened_is_an_error_until_another_is_chosen() -> None:
    """The second import succeeded, on MLX's own."""
    code = (
        "import mlx_llama\n"
        "from mlx_llama import blas\n"
        "blas.are_kernels_installed = lambda: False\n"
        "blas.choose('libnot-there.so.9')\n"
        "for _ in range(2):\n"
        "    try: import mlx.core\n"
        "    except mlx_llama.MlxLlamaError as error: print('cannot be opened' in str(error))\n"
        "blas.choose('NONE')\n"
        "import mlx.core; print(blas.taken())\n"
    )
    assert run_python(code).split("\n") == ["True", "True", "None"]


@linux
def test_an_openblas_multiplies() -> None:
    try:
        assert blas._opened("libopenblas.so.0") is not None
    except OSError:
        pytest.skip("no libopenblas.so.0 is installed")
    code = (
        "import mlx_llama; from mlx_llama import blas; blas.are_kernels_installed = lambda: False\n"
        "blas.choose('libopenblas.so.0')\n"
        "import mlx.core as mx, numpy as np\n"
        "x, y = mx.random.normal((70, 300)), mx.random.normal((300, 50))\n"
        "expected = np.array(x, np.float64) @ np.array(y, np.float64)\n"
        "assert np.allclose(x @ y, expected, atol=1e-3)\n"
        "print(blas.taken().name, blas.taken().threads())\n"
    )
    name, threads = run_python(code).split()
    assert name == "libopenblas.so.0" and 1 <= int(threads) <= cgroups.usable_processors()


# --- the processors ------------------------------------------------------------------------------


def test_quotas_of_control_groups_limit_the_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, outer = tmp_path / "outer" / "inner", tmp_path / "outer"
    inner.mkdir(parents=True)
    monkeypatch.setattr(cgroups, "group_folders", lambda _: [inner, outer, tmp_path])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    assert cgroups.usable_processors() == 8
    (outer / "cpu.max").write_text("250000 100000\n")
    (inner / "cpu.max").write_text("max 100000\n")
    assert cgroups.usable_processors() == 3
    (inner / "cpu.max").unlink()
    (inner / "cpu.cfs_quota_us").write_text("50000\n")  # the first version's names
    (inner / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroups.usable_processors() == 1
    (inner / "cpu.cfs_quota_us").write_text("-1\n")
    assert cgroups.usable_processors() == 3
