"""The model card: `README.md` of a model directory, from its manifest."""

from __future__ import annotations

from typing import Any


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
        f"Converted by mlx-llama {manifest['version']} from a {source['layout']}.",
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
        "## Verified",
        "",
        _verified(manifest["verification"]),
        "",
        "The license of the source's weights applies to these, too.",
    ]
    return "\n".join(lines) + "\n"


def _verified(result: dict[str, Any] | None) -> str:
    if result is None:
        return "Not compared with the source (`--verify` does so)."
    return (
        f"{result['tokens']} tokens through the source's weights and these: same likeliest token "
        f"{result['same_top'] * 100:.1f} %, mean KL divergence {result['mean_kl']:.3g}, largest "
        f"difference of a logit {result['largest_difference']:.3g}."
    )
