"""`mlx-llama quantize`: a checkpoint becomes the best model of a size, and says what it lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mlx_llama.options import ConvertOptions
from mlx_llama_apps import paths
from mlx_llama_apps.convert import build, open_named, refuse_target
from mlx_llama_apps.flags import QuantizeFlags, given

METHOD = "mse"  # where the mode leaves a choice


def quantize(
    source: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    flags: QuantizeFlags | None = None,
    dry_run: bool = False,
    force: bool = False,
    quiet: bool = False,
    revision: str | None = None,
    offline: bool = False,
) -> None:
    """Quantize a checkpoint with more care than `convert`, tensor by tensor as you say.

    Progress goes to stderr; the last line on stdout is the directory's path.

    Parameters
    ----------
    source
        what `convert` takes, or an unquantized model directory
    output
        the directory to write (default: in the models folder, named after source and bits)
    dry_run
        print the plan and stop
    force
        replace a model directory that exists
    quiet
        print no plan and no progress
    revision
        branch, tag or commit of a hub repository (default: main)
    offline
        open no connection: take a hub repository's files from the cache
    """
    wanted = given(flags)
    if wanted.get("mode", "affine") == "affine":
        wanted = {"method": METHOD, **wanted}
    options = ConvertOptions(**wanted)
    target = output or paths.default_output(Path(source), bits=options.weight_bits)
    if not dry_run:
        refuse_target(target, force=force)
    opened = open_named(
        source, options, revision=revision, offline=offline, is_dry=dry_run, is_quiet=quiet
    )
    if opened is not None:
        build(opened, options, target, dry_run=dry_run, force=force, quiet=quiet)
