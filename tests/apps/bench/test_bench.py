"""`mlx-llama bench`: rows, formats, refusals, peers, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from bench_peer import peer
from mlx_llama import native, ops
from mlx_llama.cache.rows import KVBits
from mlx_llama.config import QuantFormat
from mlx_llama_apps.bench import machine, random_model
from mlx_llama_apps.bench.cases import Case, Row, Sample, cases_of
from mlx_llama_apps.bench.scratch import work_folder
from mlx_llama_apps.inference import processors
from mlx_llama_apps.main import main
from processes import PATIENCE_S, interrupt, start
from tiny_models import write_model

FEW = ["--prompt", "8", "--generate", "4", "--repetitions", "2"]
BANDWIDTH = 1e9


@pytest.fixture(autouse=True)
def _no_read_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte is read by the test of the read test alone."""
    monkeypatch.setattr(machine, "measured_bandwidth", lambda **_: BANDWIDTH)


def test_rows_are_those_of_llama_bench(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(base_model), *FEW, "--depth", "0", "16"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    rows = [line for line in lines if re.match(r"(pp|tg)\d", line)]
    names = [re.split(r"  +", row)[0] for row in rows]
    assert names[:4] == ["pp8", "tg4", "pp8 @ d16", "tg4 @ d16"]
    assert all(re.search(r"\d ± \d", row) for row in rows[:4])
    assert "memory reads 1.0 GB/s, as measured" in captured.out


@pytest.mark.parametrize(("bits", "dtype"), [("16", "float16"), ("32", "float32")])
def test_one_repetition_has_no_deviation_and_the_cache_is_named(
    base_model: Path, capsys: pytest.CaptureFixture[str], bits: str, dtype: str
) -> None:
    """It said ± 0, and with --kv-bits 32 nothing of the cache."""
    asked = ["--kv-bits", bits, "--depth", "0", "--repetitions", "1", *FEW[:4]]
    assert main(["bench", str(base_model), *asked]) == 0
    out = capsys.readouterr().out
    assert "±" not in out
    without = ops.kernels() is None
    assert f"; the cache in {'float32' if without else dtype}; " in out
    assert main(["bench", str(base_model), *asked, "--json"]) == 0
    test = json.loads(capsys.readouterr().out)["tests"][0]["engines"]["mlx-llama"]
    assert test["deviation"] is None and len(test["repetitions"]) == 1


def test_json_holds_the_numbers_of_the_table(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(base_model), *FEW, "--depth", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    prompt, answer = found["tests"]
    assert prompt["name"] == "pp8 @ d4" and answer["name"] == "tg4 @ d4"
    assert found["engines"][0]["process_peak_bytes"] > 0
    ours = prompt["engines"]["mlx-llama"]
    assert len(ours["repetitions"]) == 2
    assert ours["tokens_per_s"] == pytest.approx(sum(ours["repetitions"]) / 2)
    assert ours["first_token_s"] == pytest.approx(sum(8 / r for r in ours["repetitions"]) / 2)
    assert prompt["read_bytes_per_token"] is None
    rate = answer["engines"]["mlx-llama"]["tokens_per_s"]
    assert answer["read_bytes_per_s"] == pytest.approx(rate * answer["read_bytes_per_token"])
    assert answer["share_of_bandwidth"] == pytest.approx(answer["read_bytes_per_s"] / BANDWIDTH)


def test_read_bytes_count_weights_without_the_embedding_and_the_cache(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """dim 64, two layers, 2 key/value heads of 16; the output is a matrix of its own."""
    assert main(["bench", str(base_model), *FEW, "--depth", "100", "--json"]) == 0
    (_, answer), model = (found := json.loads(capsys.readouterr().out))["tests"], found["model"]
    from mlx_llama.loading import open_model_directory

    vocabulary = open_model_directory(base_model).config.vocab_size
    number = ops.cache_dtype(mx.float32, KVBits()).size
    cached = 2 * 2 * 2 * 16 * number * (100 + 1 + 2)
    expected = model["weight_bytes"] - vocabulary * 64 * 4 + cached
    assert answer["read_bytes_per_token"] == expected


def test_markdown_is_a_table(base_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(base_model), *FEW, "--depth", "0", "--markdown"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert re.fullmatch(r"\| -+ \|( -+: \|)+", table[1])


def test_defaults_go_as_far_as_the_model(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model's context is 4096: nothing fits behind as many tokens, and that is said."""
    assert main(["bench", str(base_model), "--generate", "2", "--repetitions", "1", "--json"]) == 0
    told = capsys.readouterr()
    assert [test["name"] for test in json.loads(told.out)["tests"]] == ["pp512", "tg2"]
    assert (
        "depth 4096 is left out: with 512 tokens behind it that is 4608, and the model was trained "
        "for 4096 positions, two of them to begin and end with" in told.err
    )
    assert main(["bench", str(base_model), *FEW, "--depth", "0"]) == 0
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["4", "16"])
def test_a_shape_needs_no_model_and_leaves_nothing_behind(
    bits: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--shape", "15m", "--bits", bits, *FEW, "--depth", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["name"] == f"15m-{bits}bit"
    assert found["model"]["parameters"] == 15_191_712
    assert list((home / "cache" / "bench").iterdir()) == []


REFUSALS = [
    ([], 2, "MODEL is missing: give a model directory, or --shape NAME"),
    (["none"], 1, "none: no such folder"),
    (["MODEL", "--shape", "15m"], 2, "--shape 15m: takes the place of MODEL"),
    (["MODEL", "--bits", "4"], 2, "--bits: does nothing without --shape"),
    (["--shape", "15x"], 2, "--shape: found '15x', expected one of llama-1-7b"),
    (["--shape", "15m", "--bits", "7"], 2, "--bits: found 7, expected one of 2, 3"),
    (["--shape", "15m", "--bits", "16", "--activations", "int8"], 2, "--activations int8: "),
    (["--shape", "15m", "--dtype", "float16", "--kv-bits", "32"], 2, "--kv-bits 32: the model"),
    (["--shape", "15m", "--kv-bits", "8"], 2, "heads of 48 numbers cannot be packed"),
    (["--shape", "15m", "--depth", "9000"], 2, "--depth 9000: with 512 tokens behind it"),
    (["--shape", "llama-3.2-1b", "--rope-linear", "2"], 2, "--rope-linear"),
    (["MODEL", "--prompt", "0", "--generate", "0"], 2, "nothing to measure"),
    (["MODEL", "--prompt", "-1"], 2, "--prompt: found -1, expected 0 or more"),
    (["MODEL", "--repetitions", "0"], 2, "--repetitions: found 0, expected 1 to 1000"),
    (["MODEL", "--depth", "0", "3.5"], 2, "found '3.5', expected a whole number"),
    (["MODEL", "--depth", "4", "4"], 2, "--depth: 4 4 names one twice"),
    (["MODEL", "--depth", "4096"], 2, "--depth 4096: with 512 tokens behind it that is 4608"),
    (["MODEL", "--activations", "int8"], 2, "--activations int8: "),  # nothing is packed
    (["MODEL", "--activations", "int4"], 2, "found 'int4', expected one of float32, int8"),
    (["MODEL", "--json", "--markdown"], 2, "--json and --markdown: give one of them"),
    (["MODEL", "--peer", "python"], 2, "--peer: does nothing without --against"),
    (["MODEL", "--peer-model", "x"], 2, "--peer-model: does nothing without --against llama.cpp"),
    (["MODEL", "--against", "llama.cpp", "--peer-model", "x"], 2, "x: no such file"),
    (["MODEL", "--against", "mlx-lm", "--peer", "nowhere"], 2, "--peer nowhere: no such program"),
    (["MODEL", "--against", "ollama"], 2, "--against"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSALS)
def test_what_cannot_work_is_refused_in_one_line(
    arguments: list[str],
    code: int,
    message: str,
    base_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random_model, "write_random_model", None)  # nothing is made before
    given = [str(base_model) if word == "MODEL" else word for word in arguments]
    assert main(["bench", *given]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_kernels_it_says_how_much_slower_and_how_to_get_them(
    base_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_llama import native

    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(native, "missing_reason", lambda: "mlx_llama_kernels is not installed")
    monkeypatch.setattr(native, "can_be_built", lambda: True)
    assert main(["bench", str(base_model), *FEW, "--depth", "0"]) == 0
    out = capsys.readouterr().out
    assert "mlx_llama_kernels is not installed" in out and "times" in out and "make kernels" in out


def test_a_peer_runs_in_turns_on_the_same_weights_and_ratios_are_told(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--against", "mlx-lm", "--peer", peer(tmp_path), "--depth", "0"]
    assert main(["bench", str(base_model), *FEW, *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engines"][1]["name"] == "mlx-lm"
    assert found["engines"][1]["version"] == "9, float32"
    for test in found["tests"]:
        assert test["engines"]["mlx-lm"]["tokens_per_s"] == pytest.approx(100)
        assert test["ratio"] == pytest.approx(
            sum(test["engines"]["mlx-llama"]["repetitions"]) / 200, rel=1e-6
        )
    assert main(["bench", str(base_model), *FEW, *asked]) == 0
    assert re.search(r"mlx-lm +ratio", capsys.readouterr().out)


@pytest.mark.parametrize(("asked", "threads"), [([], processors()), (["--threads", "1"], 1)])
def test_llama_cpp_computes_by_as_many_threads_as_this_project(
    base_model: Path, tmp_path: Path, asked: list[str], threads: int
) -> None:
    """It took four by itself, and waited for itself on two processors."""
    if asked and ops.kernels() is None:
        pytest.skip("--threads counts those of the native kernels, which are not installed")
    log, file = tmp_path / "log", tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    program = peer(tmp_path, f"open({str(log)!r}, 'w').write(sys.argv[-2])")
    asked = ["--against", "llama.cpp", "--peer", program, "--peer-model", str(file), *asked]
    ours = ops.kernels()
    before = None if ours is None else ours.threads()
    try:
        assert main(["bench", str(base_model), *FEW, *asked, "--depth", "0"]) == 0
    finally:
        ops.use_threads(before)
    assert log.read_text(encoding="utf-8") == str(threads)


def test_a_peer_that_fails_is_told_in_one_line_and_nothing_is_lost(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = peer(tmp_path, 'sys.exit("no such memory") if asked["kind"] == "tg" else None')
    asked = ["--against", "mlx-lm", "--peer", fails, "--depth", "0"]
    assert main(["bench", str(base_model), *FEW, *asked]) == 1
    captured = capsys.readouterr()
    assert "--against mlx-lm: no such memory" in captured.err
    assert "1 of 2 tests were done, not tg4" in captured.err
    assert re.search(r"^pp8 .*100\.0", captured.out, re.MULTILINE)


def test_a_peer_that_crashes_is_told_by_its_signal(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crashes = peer(tmp_path, "import os; os.kill(os.getpid(), 11)")
    assert main(["bench", str(base_model), *FEW, "--against", "mlx-lm", "--peer", crashes]) == 1
    assert "--against mlx-lm: ended by SIGSEGV" in capsys.readouterr().err


def test_llama_bench_is_asked_for_one_test_at_a_time(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, log, file = tmp_path / "llama-bench", tmp_path / "log", tmp_path / "m.gguf"
    answer = '[{"avg_ns": 20000000, "model_type": "llama 1B Q4_0", "build_number": 7}]'
    program.write_text(f"#!/bin/sh\necho \"$@\" >>{log}\necho '{answer}'\n", encoding="utf-8")
    program.chmod(0o755)
    file.write_bytes(b"GGUF")
    asked = ["--against", "llama.cpp", "--peer", str(program), "--peer-model", str(file)]
    assert main(["bench", str(base_model), *FEW, *asked, "--depth", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engines"][1]["version"] == "llama-bench 7, llama 1B Q4_0"
    rates = [test["engines"]["llama.cpp"]["tokens_per_s"] for test in found["tests"]]
    assert rates == pytest.approx([400, 200])
    lines = log.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6  # each test is warmed up, then run twice
    assert f"-m {file} -r 1 -o json -p 8 -n 0 -d 16" in lines
    assert lines[-1].endswith("-p 0 -n 4 -d 16")


@pytest.mark.parametrize(
    ("against", "answer"),
    [
        ("mlx-lm", "hello"),
        ("mlx-lm", "[1]"),
        ("mlx-lm", "{}"),
        ("llama.cpp", "hello"),
        ("llama.cpp", '[{"x": 1}]'),
        ("llama.cpp", "[1]"),
    ],
)
def test_a_program_that_is_no_peer_is_told_in_one_line(
    against: str,
    answer: str,
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The name of llama-bench makes none of mlx-lm's peers one of llama.cpp's."""
    program = tmp_path / "llama-bench"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n", encoding="utf-8")
    program.chmod(0o755)
    asked = ["--against", against, "--peer", str(program), "--depth", "0"]
    assert main(["bench", str(base_model), *FEW, *asked]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--against {against}: {program} " in line
    assert "by --peer" in line


def test_a_packed_cache_is_told_beside_a_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_with_wide_heads = write_model(tmp_path / "m", params={"n_heads": 2, "n_kv_heads": 1})
    asked = ["--against", "mlx-lm", "--peer", peer(tmp_path), "--depth", "0"]
    asked += ["--kv-bits", "8", "--prefill-chunk", "4"]
    assert main(["bench", str(model_with_wide_heads), *FEW, *asked, "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert (model["kv_bits"], model["prefill_chunk"]) == ("8", 4)
    assert main(["bench", str(model_with_wide_heads), *FEW, *asked]) == 0
    out = capsys.readouterr().out
    assert "the cache in 8 bits (mlx-lm's is not packed); prompts in slices of 4" in out


def test_what_a_killed_run_left_is_removed_by_the_next_and_a_live_one_is_not(home: Path) -> None:
    """Gigabytes of random weights stayed in the cache for good."""
    code = (
        "import time\n"
        "from mlx_llama_apps.bench.scratch import work_folder\n"
        "with work_folder() as folder:\n"
        "    print(folder, flush=True); time.sleep(60)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MLX_LLAMA_HOME": str(home),
    }
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        (left / "weights").write_text("")
        with work_folder() as mine:
            assert left.is_dir()
        assert not mine.exists()
        process.terminate()
        process.wait(timeout=PATIENCE_S)
        assert left.is_dir()
    with work_folder():
        assert not left.exists()


def test_ctrl_c_prints_what_was_done_and_leaves_nothing_behind(tmp_path: Path, home: Path) -> None:
    slow = (
        "import sys, time\n"
        "from mlx_llama_apps import bench\n"
        "from mlx_llama_apps.bench import machine, ours\n"
        "machine.measured_bandwidth = lambda **_: None\n"
        "run = ours.OurEngine.run\n"
        "def slowly(self, case):\n"
        "    if not case.is_prompt:\n"
        "        print('now', flush=True); time.sleep(30)\n"
        "    return run(self, case)\n"
        "ours.OurEngine.run = slowly\n"
        "from mlx_llama_apps.main import main\n"
        "sys.exit(main())\n"
    )
    process = start(slow, "bench", "--shape", "15m", *FEW, "--depth", "0", home=home)
    out, errors = interrupt(process, at="now")
    assert process.returncode == 130
    assert re.search(r"^pp8 +\d", out, re.MULTILINE)
    assert errors == "1 of 2 tests were done, not tg4\n"
    assert list((home / "cache" / "bench").iterdir()) == []


@pytest.mark.parametrize(
    ("module", "where", "told"),
    [
        ("random_model", "write_random_model", "no test was done"),
        ("ours", "OurEngine.run", "0 of 2 tests were done, not pp8, tg4"),
        (
            "ours",
            "OurEngine.cost_of_rounding",
            "2 of 2 tests were done, not what rounded activations cost",
        ),
    ],
)
def test_ctrl_c_says_which_tests_were_not_done(
    tmp_path: Path, home: Path, module: str, where: str, told: str
) -> None:
    """Before the first test was over it said nothing."""
    slow = (
        "import sys, time\n"
        "from mlx_llama_apps import bench\n"
        f"from mlx_llama_apps.bench import machine, ours, {module}\n"
        "machine.measured_bandwidth = lambda **_: None\n"
        f"{module}.{where} = lambda *a: (print('now', flush=True), time.sleep(30))\n"
        "from mlx_llama_apps.main import main\n"
        "sys.exit(main())\n"
    )
    asked = ["--activations", "int8"] if "rounding" in where else []
    if asked and not native.takes_bytes(QuantFormat(4, 32)):
        pytest.skip("--activations int8 is refused: these instructions round none")
    process = start(slow, "bench", "--shape", "15m", *FEW, "--depth", "0", *asked, home=home)
    out, errors = interrupt(process, at="now")
    assert process.returncode == 130
    assert errors == f"{told}\n"
    assert bool(out) == bool(asked)


def test_rows_have_means_deviations_and_the_median_of_ratios() -> None:
    case = Case("tg", 10)
    times = {"ours": [1.0, 2.0, 0.5], "peer": [2.0, 2.0, 2.0]}
    row = Row(case, {name: [Sample(t) for t in values] for name, values in times.items()})
    assert row.rates("ours") == [10, 5, 20]
    assert row.mean("ours") == pytest.approx(35 / 3)
    assert row.deviation("ours") == pytest.approx(7.6376, abs=1e-4)
    assert row.deviation("peer") == 0
    assert row.ratio("ours", "peer") == 2
    assert row.first_token_s("ours") is None


def test_a_count_of_none_leaves_its_tests_out() -> None:
    assert [c.name for c in cases_of(512, 0, (0, 64))] == ["pp512", "pp512 @ d64"]
    assert [c.name for c in cases_of(0, 128, (0,))] == ["tg128"]
