"""Finding the extension, and how many threads work."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from kernels_oracle import INSTALLED, needs_kernels
from mlx_llama import blas, native, ops
from mlx_llama.errors import OptionError


@needs_kernels
def test_another_mlx_is_refused_by_name() -> None:
    code = (
        "import mlx.core as mx; mx.__version__ = '9.9.9'\n"
        "from mlx_llama import native\n"
        "assert native.kernels() is None\n"
        "print(native.missing_reason())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "found mlx 9.9.9: build it again (make kernels)" in done.stdout


@needs_kernels
def test_threads_are_those_of_the_environment() -> None:
    code = "import mlx_llama_kernels; print(mlx_llama_kernels.threads())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert done.stdout.strip() == "1"


@needs_kernels
def test_threads_can_be_chosen() -> None:
    assert INSTALLED is not None
    before = INSTALLED.threads()
    ops.use_threads(2)
    assert INSTALLED.threads() == 2
    ops.use_threads(before)


def test_threads_without_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "taken", lambda: None)
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(native, "missing_reason", lambda: "mlx_llama_kernels is not installed")
    with pytest.raises(OptionError, match=r"--threads 2: .* mlx_llama_kernels is not installed"):
        ops.use_threads(2)


@needs_kernels
def test_stubs_name_what_there_is() -> None:
    import mlx_llama_kernels

    stubs = Path(mlx_llama_kernels.__file__).with_name("_kernels.pyi").read_text(encoding="utf-8")
    told = {}
    for node in ast.parse(stubs).body:
        if isinstance(node, ast.FunctionDef):
            told[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            told |= {f"{node.name}.{method.name}": method for method in methods}
    public = [getattr(mlx_llama_kernels, name) for name in mlx_llama_kernels.__all__]
    classes = {thing.__name__ for thing in public if isinstance(thing, type)}
    functions = {thing.__name__ for thing in public if callable(thing)} - classes
    assert {name for name in told if "." not in name} == functions
    assert {name.partition(".")[0] for name in told if "." in name} == classes
    for name, node in told.items():
        documented = attrgetter(name)(mlx_llama_kernels).__doc__ or ""
        signature = documented.partition("\n")[0]
        names = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
        assert re.findall(r"(\w+): ", signature) == names, signature
