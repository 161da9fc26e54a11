"""The model card: `README.md` of a model directory, from its manifest."""

from __future__ import annotations

from typing import Any

CARD_NAME = "README.md"


def model_card(manifest: dict[str, Any]) -> str:
    """Return the card's text: what the directory holds, what it was made of, how it was checked."""
    source, kind, rope = manifest["source"], manifest["kind"], manifest["rope_factor"]
    rows = [
        ("kind", f"{kind['value']} ({kind['reason']})"),
        ("parameters", f"{manifest['parameters']:,}"),
        ("matrices", ", ".join(f"{n} × {how}" for how, n in manifest["matrices"].items())),
        (
            "size",
            f"{manifest['weight_bytes']:,} bytes, {manifest['bits_per_weight']} bits a weight",
        ),
    ]
    if rope is not None:
        rows.append(("RoPE factor", f"{rope['value']:g} ({rope['reason']})"))
    lines = [
        f"# {source['name']}",
        "",
        f"Converted by mlx-llama {manifest['version']} from a {source['layout']}{_origin(source)}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        *(f"- {note}" for note in manifest["notes"]),
        *([""] if manifest["notes"] else []),
        "## Made of",
        "",
        "| file | bytes | SHA-256 |",
        "|---|---|---|",
        *(f"| {f['name']} | {f['bytes']:,} | `{f['sha256']}` |" for f in source["files"]),
        "",
        *_verified(manifest),
        *_chosen(manifest),
        *_lost(manifest),
        "The license of the source's weights applies to these, too.",
    ]
    return "\n".join(lines) + "\n"


def loss_line(manifest: dict[str, Any]) -> str | None:
    """Say what the predictions lost, in the card's words; None where they were not compared."""
    found = manifest["certificate"]
    if found is None or found["divergence"] is None:
        return None
    rows = dict(_measured(found["divergence"]))
    return (
        f"mean KL divergence {rows[_MEAN_KL]} nats, {_SAME_TOP} {rows[_SAME_TOP]}, "
        f"perplexity {rows[_PPL_OWN]} (source {rows[_PPL_SOURCE]})"
    )


def _origin(source: dict[str, Any]) -> str:
    if "repository" not in source:
        return ""
    return f" ({source['repository']}, commit {source['commit']})"


def _verified(manifest: dict[str, Any]) -> list[str]:
    """Return what `--verify` found; nothing where the certificate says more."""
    result = manifest["verification"]
    if result is None and manifest["certificate"] is not None:
        return []
    text = "Not compared with the source (`--verify` does so)."
    if result is not None:
        text = (
            f"{result['tokens']} tokens through the source's weights and these: same likeliest "
            f"token {result['same_top'] * 100:.1f} %, mean KL divergence {result['mean_kl']:.3g}, "
            f"largest difference of a logit {result['largest_difference']:.3g}."
        )
    return ["## Verified", "", text, ""]


def _chosen(manifest: dict[str, Any]) -> list[str]:
    """Return how bits were chosen, where a size was given: the table of sensitivities."""
    found = manifest["sensitivities"]
    if found is None:
        return []
    probes = [*found["tensors"][0]["measured"]]
    return [
        "## How bits were chosen",
        "",
        f"At most {found['target_bits_per_weight']:g} bits a weight, of which these cost least on "
        f"{found['text']['name']} ({found['text']['n_tokens']} scored tokens; SHA-256 "
        f"`{found['text']['sha256']}`). Measured: the mean KL divergence, nats, with one matrix "
        "packed and all others as they are.",
        "",
        *([f"![What packing costs]({found['plot']})"] if found["plot"] else [_NO_PLOT]),
        "",
        f"| matrix | {' | '.join(probes)} | chosen | expected |",
        f"|---|{'---|' * len(probes)}---|---|",
        *(
            f"| {each['tensor']} | {' | '.join(f'{x:.2e}' for x in each['measured'].values())} | "
            f"{each['chosen']} | {each['expected_kld']:.2e} |"
            for each in found["tensors"]
        ),
        "",
    ]


def _lost(manifest: dict[str, Any]) -> list[str]:
    """Return the certificate: what the quantized model lost against its source."""
    found = manifest["certificate"]
    if found is None:
        return []
    return [
        "## What was lost",
        "",
        *_predictions(manifest, found),
        "",
        *([f"![What was lost]({found['plot']})"] if found["plot"] else [_NO_PLOT]),
        "",
        "| layer | relative error of the weights |",
        "|---|---|",
        *(f"| {layer} | {100 * error:.2f} % |" for layer, error in found["layers"].items()),
        "",
        "`manifest.json` has the error of every tensor.",
        "",
    ]


_MEAN_KL, _SAME_TOP = "mean KL divergence, nats", "same top token"
_PPL_SOURCE, _PPL_OWN = "perplexity, source", "perplexity, this"
_NO_PLOT = "No picture: matplotlib was not installed (`pip install 'mlx-llama[plot]'`), or failed."


def _predictions(manifest: dict[str, Any], found: dict[str, Any]) -> list[str]:
    text, divergence = found["text"], found["divergence"]
    if divergence is None:
        return [
            "Predictions were not compared (`--no-report`): the error of the weights is all that "
            "was measured."
        ]
    rows = [
        ("bits per weight", f"{manifest['bits_per_weight']}"),
        *_measured(divergence),
        ("measured in", f"{found['elapsed_s']:.0f} s, {found['peak_bytes'] / 1e6:.0f} MB"),
    ]
    return [
        f"Both models read {text['name']} ({text['n_tokens']} tokens in windows of "
        f"{text['context']}, {text['n_scored']} of them scored, {found['dtype']}; SHA-256 "
        f"`{text['sha256']}`):",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]


def _measured(divergence: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers of a comparison, by name."""
    return [
        (_MEAN_KL, _pm(divergence["kld"]["mean"])),
        ("median, 99 %, largest", _three(divergence["kld"])),
        (_SAME_TOP, _pm(divergence["same_top"], 100, " %")),
        (_PPL_SOURCE, _pm(divergence["ppl_a"])),
        (_PPL_OWN, _pm(divergence["ppl_b"])),
        ("ratio", _pm(divergence["ratio"])),
        ("root mean square change of a probability", _pm(divergence["rms_dp"], 100, " %")),
    ]


def _pm(estimate: dict[str, float], scale: float = 1, unit: str = "") -> str:
    return f"{scale * estimate['value']:.5g} ± {scale * estimate['error']:.2g}{unit}"


def _three(kld: dict[str, Any]) -> str:
    values = (kld["quantiles"]["0.5"], kld["quantiles"]["0.99"], kld["maximum"])
    return ", ".join(f"{value:.3g}" for value in values)
