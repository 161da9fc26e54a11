"""Other engines beside ours: each a process of its own, which waits while another one works."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import sleep
from typing import IO, Any

from mlx_llama.errors import MlxLlamaError, OptionError
from mlx_llama_apps.bench.cases import Case, Engine, Sample
from mlx_llama_apps.bench.machine import peak_of
from mlx_llama_apps.inference import processors

MLX_LM, LLAMA_CPP = PEERS = ("mlx-lm", "llama.cpp")
MODULES = {MLX_LM: "mlx_lm", LLAMA_CPP: "llama_cpp"}
PROGRAMS = {MLX_LM: "peer_mlx_lm.py", LLAMA_CPP: "peer_llama_cpp.py"}
LLAMA_BENCH = "llama-bench"
POLL_S = 0.02


def find_peer(name: str, given: str | None) -> str:
    """Return the interpreter, or llama-bench, that runs a peer; OptionError where there is none.

    given: what the user named.
    """
    if given is not None:
        found = shutil.which(Path(given).expanduser())
        if found is None:
            raise OptionError(f"--peer {given}: no such program")
        return found
    if name == LLAMA_CPP and (found := shutil.which(LLAMA_BENCH)):
        return found
    if importlib.util.find_spec(MODULES[name]) is not None:
        return sys.executable
    if name == MLX_LM:
        raise OptionError(
            "--against mlx-lm: this Python has no mlx-lm; pip install mlx-lm, or name a Python "
            "that has it: --peer path/to/python"
        )
    raise OptionError(
        "--against llama.cpp: no llama-bench on PATH and no llama-cpp-python in this Python; name "
        "either, or a Python that has it: --peer path/to/llama-bench"
    )


def open_peer(
    name: str, program: str, model: Path, *, dtype: str, threads: int | None, context: int
) -> Engine:
    """Start a peer on a model and wait until it is loaded; MlxLlamaError when it fails.

    threads: None is every processor, as this project takes them. llama.cpp's library would take
    four, and wait for itself where there are fewer; llama-bench counts by itself.
    """
    if name == LLAMA_CPP and Path(program).name.startswith(LLAMA_BENCH):
        return LlamaBench(program, model, threads)
    if name == MLX_LM:
        arguments = [str(model), dtype]
    else:
        arguments = [str(model), str(threads or processors()), str(context)]
    script = Path(__file__).with_name(PROGRAMS[name])
    return PeerProcess(name, [program, "-P", str(script), *arguments])


class PeerProcess:
    """A peer that takes tests and gives samples, each a line of JSON."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self._program = name, command[0]
        self._peak: int | None = None
        self._errors: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        # In a session of its own: Ctrl-C is ours to handle. Our paths are none of its business.
        environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        try:
            self.version: str = self._answer("version", str)["version"]
        except BaseException:
            self.close()
            raise

    def run(self, case: Case) -> Sample:
        """Run a test once."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: why is what its answer tells
            print(json.dumps(asdict(case)), file=self._process.stdin, flush=True)
        answer = self._answer("seconds", float)
        self._peak = peak_of(self._process.pid)
        return Sample(answer["seconds"], answer.get("peak_bytes"))

    def read_bytes(self, case: Case) -> int | None:
        """Return None: nobody tells."""

    def process_peak(self) -> int | None:
        """Return the largest resident set of its process, in bytes."""
        return self._peak

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def _answer(self, key: str, kind: type) -> dict[str, Any]:
        """Return the next answer, which has this key."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            with suppress(ValueError, RecursionError):
                answer = json.loads(line)
                if isinstance(answer, dict) and isinstance(answer.get(key), kind):
                    return answer
            raise MlxLlamaError(
                f"--against {self.name}: {self._program} is no Python: it answers "
                f"{line.strip()!r:.60}; name one that has {self.name} by --peer"
            )
        code = self._process.wait()
        self._errors.seek(0)
        raise MlxLlamaError(f"--against {self.name}: {_reason(self._errors.read(), code)}")


class LlamaBench:
    """llama.cpp's own benchmark: every repetition is a run of it, which loads the model anew."""

    def __init__(self, program: str, model: Path, threads: int | None) -> None:
        self.name, self.version = LLAMA_CPP, LLAMA_BENCH
        self._command = [program, "-m", str(model), "-r", "1", "-o", "json"]
        if threads is not None:
            self._command += ["-t", str(threads)]
        self._process: subprocess.Popen[str] | None = None
        self._peak: int | None = None

    def run(self, case: Case) -> Sample:
        """Run a test once."""
        counts = (case.n_tokens, 0) if case.is_prompt else (0, case.n_tokens)
        asked = ["-p", str(counts[0]), "-n", str(counts[1]), "-d", str(case.depth)]
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            self._process = subprocess.Popen(
                [*self._command, *asked], stdout=output, stderr=errors, text=True,
                start_new_session=True,
            )  # fmt: skip
            while (code := self._process.poll()) is None:
                self._peak = max(self._peak or 0, peak_of(self._process.pid) or 0) or None
                sleep(POLL_S)
            output.seek(0)
            errors.seek(0)
            try:
                found = json.loads(output.read())[0]
                build, model = found.get("build_number", ""), found["model_type"]
                self.version = f"{LLAMA_BENCH} {build}, {model}"
                return Sample(found["avg_ns"] / 1e9)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                odd = f"{self._command[0]} gives no results of {LLAMA_BENCH}; name that by --peer"
                reason = _reason(errors.read(), code) if code else odd
                raise MlxLlamaError(f"--against {self.name}: {reason}") from error

    def read_bytes(self, case: Case) -> int | None:
        """Return None: nobody tells."""

    def process_peak(self) -> int | None:
        """Return the largest resident set of its runs, in bytes."""
        return self._peak

    def close(self) -> None:
        """End the run that is under way."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _reason(errors: str, code: int) -> str:
    """Return the last line that a program wrote before it failed, or its exit code."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}: it does not run here"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"ended with exit code {code}"
