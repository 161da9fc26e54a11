"""`mlx-llama convert`: a checkpoint folder becomes a model directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_llama.errors import OptionError
from mlx_llama.options import ConvertOptions
from mlx_llama_apps import bundled, paths
from mlx_llama_apps.disk_wait import DiskWait
from mlx_llama_apps.flags import AS_USUAL, ConvertFlags, MakingFlags, given
from mlx_llama_apps.progress import Stages, byte_bar, remark
from mlx_llama_apps.pull import fetch, listing_lines
from mlx_llama_apps.terminal import size, write_line

if TYPE_CHECKING:
    from mlx_llama_convert.plan import ConversionPlan
    from mlx_llama_convert.resources import Needs
    from mlx_llama_convert.source import SourceModel
    from mlx_llama_quantize.calibration import CalibrationRequest
    from mlx_llama_quantize.certificate import Request
    from mlx_llama_quantize.sensitivity import SurveyRequest

PACKING = "packing"  # the part of the work that is always there
MAX_THREADS = 8  # packing is bound by memory beyond that


def convert(
    source: str,
    /,
    *,
    making: MakingFlags = AS_USUAL,
    flags: ConvertFlags | None = None,
    no_quantize: bool = False,
    verify: bool = False,
) -> None:
    """Turn a checkpoint into a model directory that mlx-llama, mlx-lm and LM Studio load.

    Progress goes to stderr; the last line on stdout is the directory's path. After Ctrl-C the same
    command goes on behind the last file that was finished.

    Parameters
    ----------
    source
        folder of Meta's files (consolidated.00.pth, params.json, tokenizer.model) or Hugging
        Face's (config.json, safetensors or pytorch_model.bin), or the name of a hub repository to
        download, such as meta-llama/Llama-3.2-1B-Instruct, or "bundled", the checkpoint in the box
    no_quantize
        keep the matrices as they are
    verify
        run 32 tokens through the source's weights and the written ones and compare the logits
    """
    wanted = given(flags)
    if no_quantize and "bits" in wanted:
        raise OptionError("--bits: does nothing with --no-quantize; leave one of them out")
    options = ConvertOptions(**wanted, quantize=not no_quantize)
    target = making.output or paths.default_output(source, size=bits_name(options))
    opened = open_named(source, options, target, making)
    if opened is not None:
        build(opened, options, target, making, verify=verify)


@dataclass(frozen=True, slots=True)
class Care:
    """What `quantize` does beyond converting.

    survey: what bits are chosen by, where a size was given. stages: where it shows how far it is.
    """

    certificate: Request
    calibration: CalibrationRequest | None
    survey: SurveyRequest | None
    stages: Stages


def build(
    source: SourceModel,
    options: ConvertOptions,
    target: Path,
    making: MakingFlags,
    *,
    verify: bool = False,
    care: Care | None = None,
    says_path: bool = True,
) -> None:
    """Show the plan and carry it out; the directory's path, if it says it, goes to stdout."""
    from mlx_llama_convert import make_plan
    from mlx_llama_convert.budget import open_budget, survey
    from mlx_llama_convert.output import check_target

    quiet = making.quiet
    budget = None if options.target_bpw is None else open_budget(source, options)
    plan = make_plan(source, options) if budget is None else budget.open_plan
    _announce(plan, target, dry_run=making.dry_run, quiet=quiet, care=care)
    if making.dry_run:
        check_target(target, force=making.force)  # the plan of what would be refused says so
        return
    if budget is not None:
        assert care is not None, "only quantize has a budget"
        assert care.survey is not None, "a budget is spent by measuring"
        plan = survey(budget, care.survey)
        care.stages.tell(*chosen_lines(plan))
    _carry_out(plan, target, force=making.force, verify=verify, quiet=quiet, care=care)
    if says_path:
        print(target)


def _announce(
    plan: ConversionPlan, target: Path, *, dry_run: bool, quiet: bool, care: Care | None
) -> None:
    """Show the plan and what it needs, and refuse a machine on which it cannot work."""
    from mlx_llama_convert.resources import needs_of, stage_bytes, walk_bytes

    walk = None if care is None else care.calibration
    needs = needs_of(
        weights=plan.config.parameter_count,
        output_bytes=plan.output_bytes,
        form=plan.config.quantization,
        target=target,
        n_threads=thread_count(),
        method=plan.options.method,
        stage_bytes=stage_bytes(
            plan,
            is_surveyed=care is not None and care.survey is not None,
            is_calibrated=walk is not None,
            is_compared=care is not None and care.certificate.text is not None,
        ),
        kept=walk and (walk.states, walk_bytes(plan)),
    )
    if dry_run or not quiet:
        parts = [PACKING] if care is None else care.stages.parts
        for line in [*plan_lines(plan, target), needs_line(needs, parts)]:
            write_line(line, sys.stdout if dry_run else sys.stderr)
    needs.check(target)


def bits_name(options: ConvertOptions) -> str | None:
    """Name a number of bits as it stands in the default output's name."""
    bits = options.weight_bits
    return None if bits is None else f"{bits}bit"


def open_named(
    source: str, options: ConvertOptions, target: Path, making: MakingFlags
) -> SourceModel | None:
    """Open a folder, the checkpoint in the box, or a hub repository's files after their download.

    A target that could not be written is refused before. A dry run says what would be downloaded
    where the cache lacks files, and returns None.
    """
    from mlx_llama_convert import hub, open_source
    from mlx_llama_convert.hub_files import DEFAULT_REVISION, is_hub_name
    from mlx_llama_convert.output import check_target
    from mlx_llama_convert.source import Origin

    if not making.dry_run:
        check_target(target, force=making.force)
    if not source:
        raise OptionError("SOURCE is empty: give a folder, a hub name, or . for this folder")
    folder = bundled.checkpoint() if paths.is_bundled(source) else paths.user_path(source)
    paths.user_path(str(folder.resolve()))  # the manifest has its name
    revision = making.revision
    if folder.exists() or not is_hub_name(source):
        if revision is not None:
            raise OptionError(f"--revision: {source} is no hub repository; leave it out")
        return open_source(folder, options)
    revision = revision or DEFAULT_REVISION
    if making.offline or hub.is_switched_off():
        snapshot = hub.find_cached(source, revision=revision)
    else:
        listing = hub.look_up(source, revision=revision)
        if making.dry_run and listing.missing_nbytes:
            for line in listing_lines(listing):
                write_line(line, sys.stdout)
            return None
        snapshot = fetch(listing, is_quiet=making.quiet)
    return open_source(snapshot.source, options, origin=Origin(snapshot.name, snapshot.commit))


def _carry_out(
    plan: ConversionPlan,
    target: Path,
    *,
    force: bool,
    verify: bool,
    quiet: bool,
    care: Care | None,
) -> None:
    from mlx_llama_convert import convert_checkpoint
    from mlx_llama_convert.card import CARD_NAME, loss_line

    packing = (
        byte_bar("converting", is_quiet=quiet)
        if care is None
        else nullcontext(care.stages.of(PACKING))
    )
    with DiskWait() as disk, packing as on_progress:
        manifest = convert_checkpoint(
            plan,
            target,
            n_threads=thread_count(),
            force=force,
            verify=verify,
            certificate=care and care.certificate,
            calibration=care and care.calibration,
            command=["mlx-llama", *sys.argv[1:]],
            on_progress=on_progress,
            on_note=None if quiet else remark,
        )
    if care is not None:
        care.stages.tell(care.stages.summary())
        if (lost := loss_line(manifest)) is not None:
            care.stages.tell(f"lost      {lost}; more in {target / CARD_NAME}")
    elif not quiet:
        elapsed = max(disk.seconds, 1e-9)
        rates = [size(int(count / elapsed)) for count in (plan.source_bytes, plan.output_bytes)]
        limit = ", limited by the disk" if disk.is_the_limit else ""
        remark(f"done in {elapsed:.1f} s, {rates[0]} read and {rates[1]} written a second{limit}")


def thread_count() -> int:
    """Return how many threads pack."""
    return min(os.cpu_count() or 1, MAX_THREADS)


def needs_line(needs: Needs, parts: Sequence[str]) -> str:
    """Say what the conversion takes and what the machine has.

    parts: of the work; those beside packing say themselves how long they will take.
    """
    free = "" if needs.memory_found is None else f" ({size(needs.memory_found)} free)"
    seconds = f"{needs.seconds:.0f} s" if needs.seconds >= 1 else "a second"
    besides = ""
    if more := ", ".join(part for part in parts if part != PACKING):
        besides = f" for {PACKING} alone (the time of {more} is told on the way)"
    return (
        f"needs     {size(needs.memory)} of memory{free}, {size(needs.disk)} of disk "
        f"({size(needs.disk_found)} free), about {seconds}{besides}"
    )


def plan_lines(plan: ConversionPlan, target: Path) -> list[str]:
    """Return the plan as it is shown before any work."""
    config, source = plan.config, plan.source
    stored = ", ".join(f"{count} × {how}" for how, count in plan.format_counts.items())
    lines = [
        f"source    {source.path} ({source.layout}, {size(plan.source_bytes)})",
        f"kind      {source.kind.value} ({source.kind.reason})",
        f"shape     {config.parameter_count / 1e6:,.1f} M parameters, {config.n_layers} layers, "
        f"dim {config.dim}, {config.n_heads} heads, {config.n_kv_heads} key/value heads, "
        f"vocabulary {config.vocab_size}",
    ]
    if config.rope_scaling is not None:
        lines.append(f"RoPE      factor {config.rope_scaling.factor:g} ({source.rope})")
    if plan.is_open:
        most = plan.options.target_bpw or 0.0
        nbytes = int(most * config.parameter_count / 8)
        lines += [
            "matrices  bits and group of each are chosen by what it costs, which is measured",
            f"output    {target} ({size(nbytes)} at most, {most:g} bits per weight)",
        ]
    else:
        lines += [
            f"matrices  {stored}",
            *(f"          {line}" for line in policy_lines(plan)),
            f"output    {target} ({size(plan.output_bytes)}, "
            f"{plan.bits_per_weight:.2f} bits per weight)",
        ]
    return lines + [f"note      {note}" for note in plan.notes]


def chosen_lines(plan: ConversionPlan) -> list[str]:
    """Say what was chosen by measuring."""
    stored = ", ".join(f"{count} × {how}" for how, count in plan.format_counts.items())
    expected = "" if plan.chosen is None else f", expected loss {plan.chosen['expected_kld']:.3g}"
    return [
        f"chosen    {stored}",
        *(f"          {line}" for line in policy_lines(plan)),
        f"          {size(plan.output_bytes)}, {plan.bits_per_weight:.3f} bits per weight{expected}"
        " nats a token",
    ]


def policy_lines(plan: ConversionPlan) -> list[str]:
    """Say of each class of tensor how it is stored."""
    lines: list[str] = []
    for each, counts in plan.policy.items():
        tied = " (the embedding, tied)" if each == "head" and plan.config.tied else ""
        lines.append(f"{each + tied}: {', '.join(f'{n} × {how}' for how, n in counts.items())}")
    return [*lines, "norms: never packed"]
