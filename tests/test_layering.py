"""The packages depend on one another in one direction, and heavy imports stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "mlx_llama": ROOT / "mlx_llama",
    "mlx_llama_quantize": ROOT / "quantize" / "mlx_llama_quantize",
    "mlx_llama_convert": ROOT / "convert" / "mlx_llama_convert",
    "mlx_llama_apps": ROOT / "apps" / "mlx_llama_apps",
}
ORDER = list(PACKAGES)
ONLY_IN_APPS = {"rich", "prompt_toolkit", "cyclopts", "platformdirs"}
NEVER = {"torch", "transformers", "pickle", "tokenizers", "jinja2"}


# The one file that imports it, and only inside functions: a slow import that most commands do not
# need.
ONLY_IN = {
    "huggingface_hub": PACKAGES["mlx_llama_convert"] / "hub.py",
    "mlx_llama_kernels": PACKAGES["mlx_llama"] / "native.py",
    # Programs that another interpreter runs.
    "mlx_lm": PACKAGES["mlx_llama_apps"] / "bench" / "peer_mlx_lm.py",
    "llama_cpp": PACKAGES["mlx_llama_apps"] / "bench" / "peer_llama_cpp.py",
}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
        yield from imports_of(node)


def imports_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_only_what_is_below_them(package: str) -> None:
    above = set(ORDER[ORDER.index(package) + 1 :])
    for file in PACKAGES[package].rglob("*.py"):
        for name in imports(file):
            top = name.partition(".")[0]
            assert top not in above, f"{file} imports {name}"
            assert top not in NEVER, f"{file} imports {name}"
            if package != "mlx_llama_apps":
                assert top not in ONLY_IN_APPS, f"{file} imports {name}"


@pytest.mark.parametrize("package", ORDER)
def test_some_imports_stay_in_one_file(package: str) -> None:
    for file in PACKAGES[package].rglob("*.py"):
        for name in imports(file):
            top = name.partition(".")[0]
            assert ONLY_IN.get(top, file) == file, f"{file} imports {name}"
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = imports_of(node)
                assert not ONLY_IN.keys() & {n.partition(".")[0] for n in names}, f"{file}"


@pytest.mark.parametrize("package", ORDER[:-1])
def test_library_code_does_not_print_exit_or_read_the_environment(package: str) -> None:
    for file in PACKAGES[package].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "exit", "input"), f"{file}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("environ", "getenv"), f"{file}:{node.lineno}"


def test_only_ops_asks_which_device_runs() -> None:
    asking = {"default_device", "is_available", "metal", "cuda"}
    for file in PACKAGES["mlx_llama"].rglob("*.py"):
        if file.name in ("ops.py", "token_pass.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
            assert "native" not in [*names, *(n.split(".")[-1] for n in imports_of(node))], file
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in asking, f"{file}:{node.lineno}"
