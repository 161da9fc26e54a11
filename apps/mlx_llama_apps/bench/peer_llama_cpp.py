"""llama.cpp as a peer, through llama-cpp-python: run by the interpreter that has it, as a program.

Takes a GGUF file, a number of threads and the longest context. Says when it is ready, then answers
each test, a line of JSON, with a line of JSON.
"""

import ctypes
import json
import os
import random
import sys
from importlib.metadata import version
from time import perf_counter

BATCH = 512


def main() -> None:
    """Answer until the parent ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints
    engine = LlamaCpp(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    name = f"llama-cpp-python {version('llama_cpp_python')}, {engine.description}"
    print(json.dumps({"version": name}), file=answers)
    for line in sys.stdin:
        print(json.dumps(engine.measure(**json.loads(line))), file=answers)


class LlamaCpp:
    """A model and a context of llama.cpp's own interface, used as llama-bench uses it."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 999
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not load it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"{path}: llama.cpp makes no context of {context} tokens")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.memory = llama_cpp.llama_get_memory(self.context)
        text = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(self.model, text, 128)
        self.description = text.value.decode()
        self.filled = 0

    def measure(self, kind: str, n_tokens: int, depth: int) -> dict:
        """Run one test and return what it took; a depth is read once and kept."""
        if self.filled != depth:
            self.forget(0)
            self.read(depth)
            self.filled = depth
        started = perf_counter()
        if kind == "pp":
            self.read(n_tokens)
        else:
            for _ in range(n_tokens):
                self.read(1)
        seconds = perf_counter() - started
        self.forget(depth)
        return {"seconds": seconds, "peak_bytes": None}

    def forget(self, kept: int) -> None:
        """Drop all but the first tokens."""
        self.api.llama_memory_seq_rm(self.memory, 0, kept, -1)

    def read(self, n_tokens: int) -> None:
        """Compute random tokens, and wait for the last one's scores."""
        ids = random.Random(0).choices(range(self.n_vocab), k=n_tokens)
        for start in range(0, n_tokens, BATCH):
            part = ids[start : start + BATCH]
            tokens = (self.api.llama_token * len(part))(*part)  # kept: the batch holds its address
            batch = self.api.llama_batch_get_one(tokens, len(part))
            if self.api.llama_decode(self.context, batch):
                raise SystemExit("llama.cpp: a batch could not be computed")
        self.api.llama_synchronize(self.context)


if __name__ == "__main__":
    main()
