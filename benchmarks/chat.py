"""Measures the chat as a person meets it, at a pseudo-terminal.

    python benchmarks/chat.py MODEL [MODEL ...] [--interrupts 60] [--rounds 5] [--undo-tokens 7680]

Start: from exec to the prompt, the model in the disk's cache. Target: a second for a 1B model of 4
bits. Ctrl-C: from the byte to the prompt, at random moments of a prompt's reading and of an answer;
then until the model, too, is free: until `/stats` is answered. Target: 100 ms to the prompt. /undo:
from Enter to the prompt, of the first MODEL, behind a short and a long past, plain and packed.
Target: 50 ms whatever the length. Chats are saved, into a folder of their own.
"""

from __future__ import annotations

import argparse
import os
import pty
import random
import resource
import select
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from time import monotonic, sleep
from typing import Self

from measuring import await_quiet, print_table, spread

# How the line editor begins, by asking where the cursor is, and how it ends.
PROMPT, NO_PROMPT = b"\x1b[6n", b"\x1b[?2004l"
CURSOR = b"\x1b[1;1R"
PATIENCE_S = 600
CLEAR_DRAFT, CTRL_C, CTRL_D = "\x15", "\x03", "\x04"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Chat:
    """A chat behind a pseudo-terminal. A context manager that leaves it by Ctrl-D."""

    def __init__(self, home: Path, model: Path, *options: object) -> None:
        command = [str(Path(sys.executable).with_name("mlx-llama")), "chat", str(model)]
        env = {**os.environ, "MLX_LLAMA_HOME": str(home), "TERM": "xterm-256color"}
        self._seen = b""
        started = monotonic()
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.execve(command[0], [*command, *map(str, options)], env)
        self.until(PROMPT)
        self.ready_s = monotonic() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.send(CLEAR_DRAFT + CTRL_D)
        try:
            while os.read(self._terminal, 1 << 16):
                pass
        except OSError:  # it has gone
            pass
        os.waitpid(self._pid, 0)
        os.close(self._terminal)

    def send(self, text: str) -> None:
        """Type, as fast as the program takes it; what it wrote before counts no more."""
        self.read_for(0)
        self._seen = b""
        rest = text.encode()
        while rest:
            select.select([], [self._terminal], [])
            rest = rest[os.write(self._terminal, rest[:512]) :]
            self.read_for(0)

    def until(self, sign: bytes) -> float:
        """Wait until the program has written something; return the seconds it took."""
        started = monotonic()
        while sign not in self._seen:
            if monotonic() - started > PATIENCE_S:
                raise SystemExit(f"no {sign!r} within {PATIENCE_S} s: {self._seen[-500:]!r}")
            self.read_for(1)
        return monotonic() - started

    def read_for(self, seconds: float) -> None:
        """Take what comes, but wait no longer than that for it."""
        while select.select([self._terminal], [], [], seconds)[0]:
            try:
                text = os.read(self._terminal, 1 << 16)
            except OSError as error:
                raise SystemExit(f"the chat has ended: {self._seen[-500:]!r}") from error
            if PROMPT in text:
                os.write(self._terminal, CURSOR)
            self._seen += text
            seconds = 0

    def enter(self, text: str) -> float:
        """Send a line; return the seconds until the next prompt. It is typed first."""
        self.send(text)
        self.read_for(0.05)
        self.send("\r")
        return self.until(PROMPT)

    def paste(self, text: str) -> None:
        """Paste a message and send it."""
        self.send(f"\x1b[200~{text}\x1b[201~")
        self.read_for(0.2)
        self.send("\r")

    def interrupt(self) -> float:
        """Send Ctrl-C; return the seconds until the prompt."""
        self.send(CTRL_C)
        return self.until(PROMPT)

    def said(self, sign: bytes) -> bool:
        """Whether the program has written something since it was typed at."""
        return sign in self._seen

    def await_answer(self) -> None:
        """Wait until an answer streams."""
        while len(self._seen.rpartition(NO_PROMPT)[2]) < 100:
            self.until(NO_PROMPT)
            self.read_for(0.1)

    def n_tokens(self) -> int:
        """Return how many tokens the cache holds."""
        self.enter("/stats")
        return int(self._seen.rpartition(b"cache: ")[2].split()[0])


def prose(n_letters: int, dice: random.Random) -> str:
    """Return words that no other text begins with, so that nothing of them is cached."""
    words = ("".join(dice.choices(LETTERS, k=dice.randint(2, 8))) for _ in range(n_letters))
    text = ""
    while len(text) < n_letters:
        text += next(words) + " "
    return text


def starts(home: Path, model: Path, n_rounds: int) -> list[tuple[float, float]]:
    """Return wall and CPU seconds from exec to the prompt; the CPU's to the end."""
    found = []
    for number in range(n_rounds + 1):
        await_quiet(10)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with Chat(home, model, "--no-save") as chat:
            wall_s = chat.ready_s
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if number:  # once before the clock: compiled modules, the disk's cache
            found.append((wall_s, cpu_s))
    return found


def interrupts(
    home: Path, model: Path, n_times: int, dice: random.Random
) -> dict[str, list[tuple[float, float]]]:
    """Return (to the prompt, to a free model) in seconds, by what was interrupted."""
    found: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    with Chat(home, model, "--ignore-eos", "--context", 8192, "--seed", 1) as chat:
        for number in range(n_times):
            if number % 2:
                chat.send("go on\r")
                chat.await_answer()
                sleep(dice.random())
            else:
                chat.paste(prose(6000, dice))
                sleep(0.05 + dice.random())
            to_prompt_s = chat.interrupt()
            began = monotonic()
            phase = "prefill" if chat.said(b"before the answer began") else "decode"
            chat.send(CLEAR_DRAFT + "/stats\r")
            chat.until(b"begin the history")
            found[phase].append((to_prompt_s, to_prompt_s + monotonic() - began))
            chat.until(PROMPT)
            if number % 10 == 9:
                chat.enter("/clear")
    return found


def undos(
    home: Path, model: Path, n_tokens: int, n_times: int, bits: int
) -> dict[str, list[float]]:
    """Return seconds from Enter to the prompt behind so many tokens, n_times.

    Of a command that does nothing, of /undo, and of /undo in the chat when it is resumed.
    """
    dice = random.Random(n_tokens)
    found: dict[str, list[float]] = {"/system": [], "/undo": [], "/undo, resumed": []}
    options = ("--kv-bits", bits, "--context", n_tokens + 512, "--max-tokens", 2, "--ignore-eos")
    with Chat(home, model, *options) as chat:
        chat.enter("a beginning")
        while (missing := n_tokens - chat.n_tokens()) > 100:
            chat.paste(prose(missing, dice))  # a letter is a token at most
            chat.until(PROMPT)
        for _ in range(n_times):
            chat.enter("and then?")
            found["/system"].append(chat.enter("/system"))
            found["/undo"].append(chat.enter("/undo"))
        for _ in range(n_times):
            chat.enter("and then?")
    with Chat(home, model, "--resume", *options) as chat:
        found["/undo, resumed"] += [chat.enter("/undo") for _ in range(n_times)]
    return found


def in_ms(values: Sequence[float]) -> list[str]:
    """Show p50, p95 and the most, in milliseconds."""
    if len(values) < 2:
        return ["-", "-", "-"]
    cuts = quantiles(values, n=20, method="inclusive")
    return [f"{1000 * value:.0f}" for value in (cuts[9], cuts[18], max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", metavar="MODEL", nargs="+", type=Path)
    parser.add_argument("--interrupts", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--undo-tokens", type=int, default=7680)
    given = parser.parse_args()
    dice = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        rows = []
        for model in given.models:
            found = starts(home, model.absolute(), given.rounds)
            walls, cpus = zip(*found, strict=True)
            rows.append([model.name, spread(walls), spread(cpus)])
        print_table(["start", "to the prompt, s", "CPU to the end, s"], rows)
        print()
        rows = []
        for model in given.models:
            for phase, times in interrupts(home, model.absolute(), given.interrupts, dice).items():
                to_prompt, to_free = zip(*times, strict=True) if times else ((), ())
                row = [model.name, phase, str(len(times)), *in_ms(to_prompt), *in_ms(to_free)]
                rows.append(row)
        head = ["Ctrl-C in", "", "times", "p50 ms", "p95", "most"]
        print_table([*head, "model free: p50", "p95", "most"], rows)
        print()
        rows = []
        for bits in (16, 8):
            for n_tokens in (200, given.undo_tokens):
                times = undos(home, given.models[0].absolute(), n_tokens, 2 * given.rounds, bits)
                for command, found in times.items():
                    rows.append([command, str(n_tokens), str(bits), *in_ms(found)])
        print_table(["command", "tokens held", "KV bits", "p50 ms", "p95", "most"], rows)


if __name__ == "__main__":
    main()
