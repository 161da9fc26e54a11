"""`mlx-llama quantize`: a checkpoint becomes the best model of a size, and says what it lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_llama.errors import OptionError
from mlx_llama.options import ConvertOptions
from mlx_llama_apps import paths
from mlx_llama_apps.convert import PACKING, Care, bits_name, build, open_named
from mlx_llama_apps.flags import AS_USUAL, MakingFlags, QuantizeFlags, given
from mlx_llama_apps.progress import Stages
from mlx_llama_apps.terminal import StatusLine

if TYPE_CHECKING:
    from mlx_llama_quantize.texts import Text

METHOD = "mse"  # where the mode leaves a choice


def quantize(
    source: str,
    /,
    *,
    making: MakingFlags = AS_USUAL,
    flags: QuantizeFlags | None = None,
    calibration: Path | None = None,
    text: Path | None = None,
    no_report: bool = False,
) -> None:
    """Quantize a checkpoint with more care than `convert`, tensor by tensor as you say.

    Progress goes to stderr; the last line on stdout is the directory's path. What is done is kept:
    after Ctrl-C the same command goes on where it stopped.

    Parameters
    ----------
    source
        what `convert` takes, or an unquantized model directory
    calibration
        what gptq, awq, auto and --target-bpw learn from: UTF-8, or JSONL with text (default: a text
        that ships)
    text
        what both models read to be compared: UTF-8, or JSONL with text (default: a text that ships)
    no_report
        compare the weights alone, not what the models predict
    """
    from mlx_llama_quantize.texts import CERTIFICATE, read_text, shipped

    if no_report and text is not None:
        raise OptionError("--text: does nothing with --no-report; leave one of them out")
    read = None if no_report else read_text(text) if text else shipped(CERTIFICATE)
    wanted = given(flags)
    if wanted.get("mode", "affine") == "affine":
        wanted = {"method": METHOD, **wanted}
    options = ConvertOptions(**wanted)
    words = _calibration_text(options, calibration)
    target = making.output or paths.default_output(source, size=_size_name(options))
    opened = open_named(source, options, target, making)
    if opened is None:
        return
    with StatusLine(after_s=0.3) as status:
        care = _care(options, read, words, status, is_quiet=making.quiet)
        build(opened, options, target, making, care=care)


def _care(
    options: ConvertOptions,
    read: Text | None,
    words: Text | None,
    status: StatusLine,
    *,
    is_quiet: bool,
) -> Care:
    """Say what is learnt from words, and what is measured on the text that is read."""
    from mlx_llama_quantize.calibration import CalibrationRequest
    from mlx_llama_quantize.certificate import Request
    from mlx_llama_quantize.sensitivity import SurveyRequest

    is_surveyed = words is not None and options.target_bpw is not None
    is_calibrated = words is not None and options.method in calibrated_methods()
    parts = [*(("measuring", "trying formats") if is_surveyed else ())]
    parts += ["calibrating"] if is_calibrated else []
    parts += [PACKING, *([] if read is None else ["comparing"])]
    stages = Stages(status, parts, is_quiet=is_quiet)
    cache, note = paths.cache_folder(), stages.tell
    comparing = None if read is None else stages.of("comparing")
    certificate = Request(read, cache / "certificates", comparing, note)
    calibration = survey = None
    if words and is_calibrated:
        folder = cache / "calibrations"
        calibration = CalibrationRequest(words, folder, stages.of("calibrating"), note)
    if words and is_surveyed:
        folder, looking = cache / "sensitivities", stages.of("trying formats")
        survey = SurveyRequest(words, folder, stages.of("measuring"), note, looking)
    return Care(certificate, calibration, survey, stages)


def _size_name(options: ConvertOptions) -> str | None:
    """Name a size as it stands in the default output's name."""
    if options.target_bpw is not None:
        return f"{options.target_bpw:g}bpw"
    return bits_name(options)


def calibrated_methods() -> tuple[str, ...]:
    """Return the methods that learn from a text."""
    from mlx_llama_quantize.calibration import METHODS

    return METHODS


def _calibration_text(options: ConvertOptions, path: Path | None) -> Text | None:
    """Read what a method, or the choice of bits, learns from; None where nothing does."""
    from mlx_llama_quantize.texts import CALIBRATION, read_text, shipped

    if options.target_bpw is not None or options.method in calibrated_methods():
        return read_text(path) if path else shipped(CALIBRATION)
    if path is not None:
        raise OptionError(
            f"--calibration: does nothing with --method {options.method}; take --target-bpw or one "
            f"of {', '.join(calibrated_methods())}"
        )
    return None
