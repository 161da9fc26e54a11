"""Train a small Llama on two CPU cores and write it as Meta does.

    python -m training.train OUT --minutes 60
    python -m training.train OUT-student --minutes 20 --distill OUT

OUT holds consolidated.00.pth (bfloat16), params.json, tokenizer.model and checklist.chk after
every save, beside state.pt, from which the same command goes on after an interruption, and
curve.svg. Needs torch, tokenizers and matplotlib; seeded, so that the text is always the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.dialogs import Guide
from training.heldout import questions
from training.model import Llama, Shape
from training.text import Encoder, Row, batch, open_tokenizer
from training.tokenizer import train_tokenizer

WARM_UP_STEPS, LAST_SHARE = 100, 0.02  # of the peak rate, at the end
MATRIX_RATE, OTHER_RATE = 5e-3, 2e-3  # Muon's, for the layers' matrices, and AdamW's, for the rest
SAVE_EVERY_S, LOG_EVERY, N_PROBES = 300, 50, 160
BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 0.1, 1.0


@dataclass(slots=True)
class Run:
    """What a run is made of and how far it has come."""

    out: Path
    model: Llama
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    elapsed_s: float = 0.0
    tokens: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    probes: list[tuple[int, float]] = field(default_factory=list)


def main() -> None:
    """Train until the minutes are over."""
    options = parse()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    guide = Guide()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer_path = options.out / "tokenizer.model"
    if options.distill and not tokenizer_path.exists():
        shutil.copyfile(options.distill / "tokenizer.model", tokenizer_path)
    if not tokenizer_path.exists():
        train_tokenizer(tokenizer_path, guide, seed=options.seed)
    tokenizer = open_tokenizer(tokenizer_path)
    encoder = Encoder(tokenizer)
    teacher = None if options.distill is None else load(options.distill)
    make = Shape if teacher is None else Shape.student
    run = open_run(options.out, make(tokenizer.vocab_size))
    count = sum(weight.numel() for weight in run.model.parameters())
    say(f"{count / 1e6:.2f} M parameters, vocabulary {tokenizer.vocab_size}, step {run.step}")
    taught = json.dumps(guide.program.taught(), indent=1, ensure_ascii=False) + "\n"
    (options.out / "taught.json").write_text(taught, encoding="utf-8")
    if options.compile:
        run.model.hidden = torch.compile(run.model.hidden, dynamic=True)
    train(run, options, encoder, guide, teacher)
    write_checkpoint(run)
    draw(run)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder to write, or to go on with")
    parser.add_argument("--minutes", type=float, default=60, help="of training in all (60)")
    parser.add_argument("--steps", type=int, help="end after so many steps, whatever the time")
    parser.add_argument("--distill", type=Path, metavar="TEACHER", help="folder of a finished run")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of a step (2048)")
    parser.add_argument(
        "--compile", action="store_true", help="1.4 times as fast, where a C++ compiler is"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--seed", type=int, default=1, help="of text and weights (1)")
    return parser.parse_args()


def train(
    run: Run, options: argparse.Namespace, encoder: Encoder, guide: Guide, teacher: Llama | None
) -> None:
    """Take steps until the time is over; the rate follows the time that was used."""
    probes = probe_rows(encoder, guide)
    started, saved, recent = time.monotonic() - run.elapsed_s, time.monotonic(), []
    while (done := share_done(run, options)) < 1:
        rows = batch(
            encoder, guide, seed=options.seed, step=run.step, n_tokens=options.batch_tokens
        )
        loss = loss_of(run.model, rows, teacher)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_NORM)
        for optimizer, peak in zip(run.optimizers, (MATRIX_RATE, OTHER_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(run.step, done)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        run.step += 1
        run.tokens += sum(len(row.ids) for row in rows)
        run.elapsed_s = time.monotonic() - started
        if run.step % LOG_EVERY == 0:
            run.losses.append((run.tokens, sum(recent) / len(recent)))
            speed = run.tokens / run.elapsed_s
            say(f"{run.elapsed_s / 60:6.1f} min  step {run.step}  {run.tokens / 1e6:.2f} M tokens  "
                f"loss {run.losses[-1][1]:.4f}  {speed:.0f} tokens/s")  # fmt: skip
            recent = []
        if time.monotonic() - saved > SAVE_EVERY_S:
            finish_save(run, probes)
            saved = time.monotonic()
    finish_save(run, probes)


def share_done(run: Run, options: argparse.Namespace) -> float:
    """Return how much of the run is over: of its steps where they are given, else of its time."""
    if options.steps is not None:
        return run.step / options.steps
    return run.elapsed_s / (60 * options.minutes)


def finish_save(run: Run, probes: list[Row]) -> None:
    """Probe, write the checkpoint and the state."""
    share = probe(run.model, probes)
    run.probes.append((run.tokens, share))
    say(f"held-out answers right to the last token: {share:.1%}")
    write_checkpoint(run)
    save_state(run)


def rate(step: int, done: float) -> float:
    """Return the share of the peak learning rate: a linear start, then a cosine."""
    cosine = LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return cosine * min(1.0, (step + 1) / WARM_UP_STEPS)


def padded(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Return ids and mask, (B, L) each, padded on the right, where nothing looks."""
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = torch.tensor(row.is_learnt)
    return ids, mask


def loss_of(model: Llama, rows: list[Row], teacher: Llama | None) -> Tensor:
    """Return the mean over learnt tokens: of -ln p, or of the divergence from the teacher."""
    ids, mask = padded(rows)
    wanted = mask[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.output(model.hidden(ids[:, :-1])[wanted])
    if teacher is None:
        return functional.cross_entropy(logits.float(), ids[:, 1:][wanted])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        aim = teacher.output(teacher.hidden(ids[:, :-1])[wanted])
    ours, theirs = (x.float().log_softmax(-1) for x in (logits, aim))
    return functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def probe_rows(encoder: Encoder, guide: Guide) -> list[Row]:
    """Return held-out conversations of which the last answer counts."""
    rows = []
    for entry in questions(guide):
        messages: Any = entry["messages"]
        ids = [encoder.tokenizer.bos_id]
        for message in messages:
            ids += encoder.header(message["role"]) + encoder.tokenizer.encode(message["content"])
            ids.append(encoder.eot)
        ids += encoder.header("assistant")
        answer = [*encoder.tokenizer.encode(str(entry["answer"])), encoder.eot]
        rows.append(Row(ids + answer, [False] * len(ids) + [True] * len(answer)))
    return sorted(random.Random(0).sample(rows, N_PROBES), key=lambda row: len(row.ids))


def probe(model: Llama, rows: list[Row]) -> float:
    """Return the share of answers that greedy decoding would give to the last token."""
    n_right = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(rows), 24):
            ids, mask = padded(rows[start : start + 24])
            found = model(ids[:, :-1]).argmax(-1) == ids[:, 1:]
            n_right += int((found | ~mask[:, 1:]).all(dim=1).sum())
    return n_right / len(rows)


def open_run(out: Path, shape: Shape) -> Run:
    """Begin a run, or take it up where its state was saved."""
    model = Llama(shape)
    matrices = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    tables = [model.tok_embeddings.weight, model.output.weight]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": tables, "weight_decay": WEIGHT_DECAY},
        {"params": norms, "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    run = Run(out, model, [muon, torch.optim.AdamW(groups, betas=BETAS, fused=True)])
    if (path := out / "state.pt").exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(run.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        for name, value in state.items():
            setattr(run, name, value)
    return run


def save_state(run: Run) -> None:
    """Write what the run goes on from; the old state stays until the new one is whole."""
    names = ("step", "elapsed_s", "tokens", "losses", "probes")
    state = {name: getattr(run, name) for name in names}
    state |= {"model": run.model.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in run.optimizers]
    torch.save(state, run.out / "state.part")
    (run.out / "state.part").replace(run.out / "state.pt")


def write_checkpoint(run: Run) -> None:
    """Write Meta's files."""
    weights = {name: weight.to(torch.bfloat16) for name, weight in run.model.state_dict().items()}
    torch.save(weights, run.out / "consolidated.00.pth")
    text = json.dumps(run.model.shape.params())
    (run.out / "params.json").write_text(text, encoding="utf-8")
    names = ("consolidated.00.pth", "params.json", "tokenizer.model")
    sums = (f"{hashlib.md5((run.out / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (run.out / "checklist.chk").write_text("".join(sums), encoding="ascii")


def load(folder: Path) -> Llama:
    """Open a finished run."""
    shape = Shape(**json.loads((folder / "params.json").read_text(encoding="utf-8")))
    model = Llama(shape)
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.eval()


def draw(run: Run) -> None:
    """Draw loss and held-out accuracy over the tokens that were seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    left = figure.subplots()
    left.plot([n / 1e6 for n, _ in run.losses], [loss for _, loss in run.losses], color="C0")
    left.set(xlabel="million tokens", ylabel="loss on answers (nats a token)", yscale="log")
    right = left.twinx()
    right.plot(
        [n / 1e6 for n, _ in run.probes], [100 * p for _, p in run.probes], "o-", color="C1", ms=3
    )
    right.set(ylabel="held-out answers exact (%)", ylim=(0, 100))
    figure.savefig(run.out / "curve.svg")


def say(line: str) -> None:
    """Report progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
