"""Carries out a `ConversionPlan`: weights, tokenizer, configuration and manifest in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx_llama
from mlx_llama.config import config_to_hf
from mlx_llama.errors import OutputError
from mlx_llama.kinds import kind_named
from mlx_llama.loading import INDEX_NAME, open_model_directory
from mlx_llama.options import DEFAULT_TEMPERATURE, DEFAULT_TOP_P
from mlx_llama.safetensors_writer import SafetensorsWriter
from mlx_llama.strict_json import json_text
from mlx_llama_convert import checklist
from mlx_llama_convert.card import CARD_NAME, model_card
from mlx_llama_convert.hashing import Hasher
from mlx_llama_convert.output import JOURNAL, MANIFEST_NAME, Partial, new_directory
from mlx_llama_convert.plan import ConversionPlan
from mlx_llama_convert.resources import OTHER_BYTES, disk_bytes
from mlx_llama_convert.shard_files import build_index, plan_shards, shard_names
from mlx_llama_convert.tokenizer_files import write_tokenizer_files
from mlx_llama_convert.verification import compare_weights
from mlx_llama_quantize import quantize_weights
from mlx_llama_quantize.calibration import (
    Calibrated,
    Calibration,
    CalibrationRequest,
    calibration_key,
)
from mlx_llama_quantize.certificate import Request, by_layer, certify
from mlx_llama_quantize.keeping import told_when_stopped
from mlx_llama_quantize.plots import draw_certificate, draw_sensitivities, drawn
from mlx_llama_quantize.subject import Subject
from mlx_llama_quantize.walk_record import forget_stale

MAX_SHARD_BYTES = 5_000_000_000
PLOT_NAME = "certificate.svg"
SENSITIVITIES_NAME = "sensitivities.svg"
LICENSES = ("LICENSE*", "USE_POLICY*", "NOTICE*")

OnProgress = Callable[[int, int, str], None]  # bytes written, bytes to write, tensor
Digests = dict[str, str]  # hexadecimal by hashlib's name


def convert_checkpoint(
    plan: ConversionPlan,
    target: Path,
    *,
    n_threads: int,
    force: bool = False,
    verify: bool = False,
    certificate: Request | None = None,
    calibration: CalibrationRequest | None = None,
    command: Sequence[str] = (),
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the model directory `target`, whole or not at all; return its manifest.

    force: replace a model directory that is there. verify: run some tokens through the source's
    weights and the written ones (`compare_weights`). certificate: measure what was lost, for
    manifest and card. calibration: the text for methods that want one. command: what the user
    typed, for the manifest. on_note: told what is kept of an interrupted run. Files that such a run
    finished are kept when source and options are the same.
    Raises OutputError and CheckpointError.
    """
    _refuse_own_source(target, plan.source.files)
    sources, walk = _Sources(plan.source.files), _calibration(plan, calibration)
    job, needed = _job(plan, calibration), disk_bytes(plan.output_bytes)
    with (
        told_when_stopped("what was learned", walk and walk.folder),
        new_directory(
            target, force=force, needed_bytes=needed, job=job, on_note=on_note
        ) as partial,
        Hasher() as hasher,
    ):
        sources.hash_with(hasher)
        calibrated = walk and walk.run(on_progress=calibration and calibration.on_progress)
        _write_weights(plan, calibrated, partial, hasher, n_threads, on_progress)
        _write_beside(plan, partial.folder)
        manifest = _manifest(plan, sources.checked(), command)
        if verify:
            manifest["verification"] = asdict(compare_weights(plan.source, partial.folder))
        if certificate is not None:
            manifest["certificate"] = _certificate(plan, calibrated, partial.folder, certificate)
        manifest |= _chosen_by(plan, calibration, partial.folder)
        _finish(partial, hasher, manifest)
    if walk is not None:
        walk.forget()
    return manifest


class _Sources:
    """The source's files, hashed while the weights are written, and what checklists say of them.

    Raises CheckpointError for a checklist that is none.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._expected = checklist.expected_digests(files)
        self._digests: dict[Path, Future[Digests]] = {}

    def hash_with(self, hasher: Hasher) -> None:
        """Begin."""
        for path in self._files:
            algorithm, _ = self._expected.get(path, ("sha256", ""))
            names = ("sha256", "md5") if algorithm == "md5" else ("sha256",)
            self._digests[path] = hasher.submit(path, names=names)

    def checked(self) -> dict[Path, Digests]:
        """Wait for the digests; CheckpointError for a file that is not its checklist's."""
        found = {path: future.result() for path, future in self._digests.items()}
        for path, (algorithm, digest) in self._expected.items():
            checklist.compare(path, algorithm, expected=digest, found=found[path][algorithm])
        return found


def _refuse_own_source(target: Path, files: Sequence[Path]) -> None:
    """Refuse an output that would replace what it is made of."""
    resolved = target.resolve()
    for file in files:
        if file.resolve().is_relative_to(resolved):
            raise OutputError(f"{target}: holds the source ({file}); choose another --output")


def _calibration(plan: ConversionPlan, request: CalibrationRequest | None) -> Calibration | None:
    if request is None:
        return None
    forget_stale(request.states)
    return Calibration(
        plan.source.weights,
        plan.source.tokenizer,
        plan.forms,
        plan.options.method,
        request.text,
        request.states / calibration_key(_job(plan, request), request.text),
        dtype=plan.options.dtype,
        on_note=request.on_note,
    )


def _job(plan: ConversionPlan, calibration: CalibrationRequest | None) -> str:
    """Name what is being made: another source, options or text make another name."""
    stats = [(str(path), path.stat()) for path in plan.source.files]
    return json.dumps(
        {
            "version": mlx_llama.__version__,
            "mlx": version("mlx"),
            "files": [[path, s.st_size, s.st_mtime_ns] for path, s in stats],
            "options": asdict(plan.options),
            "config": config_to_hf(plan.config),
            "shard": MAX_SHARD_BYTES,
            "calibration": None if calibration is None else calibration.text.sha256,
        },
        sort_keys=True,
    )


def _write_weights(
    plan: ConversionPlan,
    calibrated: Calibrated | None,
    partial: Partial,
    hasher: Hasher,
    n_threads: int,
    on_progress: OnProgress | None,
) -> None:
    sizes = {name: plan.output_bytes_of(name) for name in plan.forms}
    shards = plan_shards(sizes, max_shard_bytes=MAX_SHARD_BYTES)
    entries = [[entry for name in names for entry in plan.entries_of(name)] for names in shards]
    total, done = sum(sizes.values()), 0
    hashing: list[tuple[str, Future[Digests]]] = []
    for number, file in enumerate(shard_names(len(shards))):
        if file in partial.finished:
            done += sum(sizes[name] for name in shards[number])
            continue
        pieces = quantize_weights(
            plan.source.weights if calibrated is None else calibrated.weights,
            plan.forms,
            dtype=plan.options.dtype,
            n_threads=n_threads,
            method="rtn" if plan.options.method == "rtn" else "mse",
            ready=calibrated,
            names=shards[number],
        )
        with (
            SafetensorsWriter(
                partial.folder / file, entries[number], metadata={"format": "mlx"}
            ) as writer,
            closing(pieces),  # pyright: ignore[reportArgumentType]
        ):
            for name, piece in pieces:
                writer.write(name, piece)
                done += piece.nbytes
                if on_progress is not None:
                    on_progress(done, total, name)
        hashing.append((file, hasher.submit(partial.folder / file)))
        _note_finished(partial, hashing, wait=False)
    _note_finished(partial, hashing, wait=True)
    if len(shards) > 1:
        _write_json(partial.folder / INDEX_NAME, build_index(entries))


def _note_finished(
    partial: Partial, hashing: list[tuple[str, Future[Digests]]], *, wait: bool
) -> None:
    """Write the files whose digests are known into the journal."""
    while hashing and (wait or hashing[0][1].done()):
        file, future = hashing.pop(0)
        partial.finish(file, future.result()["sha256"])


def _finish(partial: Partial, hasher: Hasher, manifest: dict[str, Any]) -> None:
    """Write what speaks of all the other files: the card, and the manifest last."""
    (partial.folder / CARD_NAME).write_text(model_card(manifest), encoding="utf-8")
    others = sorted(
        path.name
        for path in partial.folder.iterdir()
        if path.name not in (*partial.finished, JOURNAL)
    )
    digests = {name: hasher.submit(partial.folder / name) for name in others}
    hashed = partial.finished | {name: f.result()["sha256"] for name, f in digests.items()}
    manifest["files"] = {
        name: {"bytes": (partial.folder / name).stat().st_size, "sha256": hashed[name]}
        for name in sorted(hashed)
    }
    _write_json(partial.folder / MANIFEST_NAME, manifest)


def _write_beside(plan: ConversionPlan, folder: Path) -> None:
    """Write what a model directory holds beside the weights, but for what speaks of all files."""
    kind = kind_named(plan.config.kind)
    write_tokenizer_files(plan.source.tokenizer, kind, folder, max_context=plan.config.max_context)
    _write_json(folder / "config.json", _config_json(plan))
    _write_json(folder / "generation_config.json", _generation_json(plan))
    _copy_licenses(plan.source.path, folder)


def _copy_licenses(source: Path, folder: Path) -> None:
    """Copy the licence that travels with the weights; it may lie above Meta's `original/`."""
    place = source.resolve()
    places = [place.parent, place] if place.name == "original" else [place]
    for path in (
        p for place in places for pattern in LICENSES for p in sorted(place.glob(pattern))
    ):
        if path.is_file() and path.stat().st_size < OTHER_BYTES:
            (folder / path.name).write_bytes(path.read_bytes())


def _config_json(plan: ConversionPlan) -> dict[str, Any]:
    own = {
        "version": mlx_llama.__version__,
        "kind": plan.config.kind,
        "kind_reason": plan.source.kind.reason,
        "rope_factor_reason": plan.source.rope,
    }
    return {**config_to_hf(plan.config), "mlx_llama": own}


def _generation_json(plan: ConversionPlan) -> dict[str, Any]:
    """Return the source's recommendation, or Meta's own, with our stop tokens."""
    eos = [*plan.config.eos_ids]
    ids = {"bos_token_id": plan.config.bos_id, "eos_token_id": eos if len(eos) > 1 else eos[0]}
    if plan.source.generation is not None:
        return {**plan.source.generation, **ids}
    return {
        **ids,
        "do_sample": True,
        "temperature": DEFAULT_TEMPERATURE,
        "top_p": DEFAULT_TOP_P,
    }


def _manifest(
    plan: ConversionPlan,
    sources: dict[Path, Digests],
    command: Sequence[str],
) -> dict[str, Any]:
    """Return where the directory comes from and what was decided."""
    scaling = plan.config.rope_scaling
    return {
        "tool": "mlx-llama",
        "version": mlx_llama.__version__,
        "mlx_version": version("mlx"),
        "command": [*command],
        "source": {
            "name": plan.source.name,
            **(asdict(plan.source.origin) if plan.source.origin else {}),
            "layout": plan.source.layout,
            "files": [
                {"name": path.name, "bytes": path.stat().st_size, **sources[path]}
                for path in plan.source.files
            ],
        },
        "kind": {"value": plan.source.kind.value, "reason": plan.source.kind.reason},
        "rope_factor": None
        if scaling is None
        else {"value": scaling.factor, "reason": plan.source.rope},
        "parameters": plan.config.parameter_count,
        "weight_bytes": plan.output_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "matrices": plan.format_counts,
        "policy": plan.policy,
        "method": plan.options.method if plan.options.quantize else None,
        "notes": [*plan.notes],
        "sensitivities": None,
        "verification": None,
        "certificate": None,
    }


def _certificate(
    plan: ConversionPlan, calibrated: Calibrated | None, folder: Path, request: Request
) -> dict[str, Any]:
    """Measure what the written weights lost, and draw it where matplotlib is installed."""
    source = plan.source
    subject = Subject.of_weights(source.name, source.weights, source.tokenizer, source.files)
    result = open_model_directory(folder)
    weights = source.weights if calibrated is None else calibrated.weights
    certificate, scores = certify(weights, subject, result, request)
    layers, title = by_layer(certificate), f"What {source.name} lost"
    is_drawn = drawn(lambda: draw_certificate(folder / PLOT_NAME, scores, layers, title))
    plot = PLOT_NAME if is_drawn else None
    return {**asdict(certificate), "layers": layers, "plot": plot}


def _chosen_by(
    plan: ConversionPlan, calibration: CalibrationRequest | None, folder: Path
) -> dict[str, Any]:
    """Return what the manifest says of how bits and packed numbers were chosen."""
    found: dict[str, Any] = {}
    if plan.chosen is not None:
        found["sensitivities"] = _drawn(plan, plan.chosen, folder)
    if calibration is not None:
        text = calibration.text
        found["calibration"] = {"name": text.name, "sha256": text.sha256}
    return found


def _drawn(plan: ConversionPlan, chosen: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return how bits were chosen, and draw it where matplotlib is installed."""
    costs = {
        each["tensor"]: (max(each["measured"].values()), plan.forms[each["tensor"]])
        for each in chosen["tensors"]
    }
    title = f"What packing one matrix of {plan.source.name} costs"
    is_drawn = drawn(lambda: draw_sensitivities(folder / SENSITIVITIES_NAME, costs, title))
    return {**chosen, "plot": SENSITIVITIES_NAME if is_drawn else None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json_text(content, indent=2) + "\n", encoding="utf-8")
