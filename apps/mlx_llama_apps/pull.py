"""`mlx-llama pull`: a checkpoint from the Hugging Face hub; `convert` fetches by it too."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from mlx_llama_apps.progress import byte_bar, remark
from mlx_llama_apps.terminal import size

if TYPE_CHECKING:
    from mlx_llama_convert.hub_cache import Listing, Snapshot


def pull(name: str, /, *, revision: str = "main", quiet: bool = False) -> None:
    """Download a checkpoint from the Hugging Face hub, without converting it.

    Fetches safetensors with config.json and a tokenizer where the repository has them, else Meta's
    consolidated.*.pth; only files that are needed, into the hub's usual cache. An interrupted
    download is continued, every file's hash is checked. HF_TOKEN opens gated repositories.
    Progress goes to stderr; the last line on stdout is the snapshot's folder.

    Parameters
    ----------
    name
        the repository, such as meta-llama/Llama-3.2-1B-Instruct
    revision
        branch, tag or commit (default: main)
    quiet
        show no progress
    """
    from mlx_llama_convert import hub

    print(fetch(hub.look_up(name, revision=revision), is_quiet=quiet).folder)


def fetch(listing: Listing, *, is_quiet: bool = False) -> Snapshot:
    """Download what the cache lacks and say so on stderr."""
    from mlx_llama_convert import hub
    from mlx_llama_quantize.keeping import told_when_stopped

    for line in [] if is_quiet else listing_lines(listing):
        remark(line)
    missing, started = listing.missing_nbytes, monotonic()
    with (
        told_when_stopped("what was downloaded", listing.root),
        byte_bar("downloading", is_quiet=is_quiet) as on_progress,
    ):
        snapshot = hub.download(listing, on_progress=on_progress)
    if missing and not is_quiet:
        remark(f"fetched   {size(missing)} in {monotonic() - started:.1f} s, hashes are right")
    return snapshot


def listing_lines(listing: Listing) -> list[str]:
    """Return what will be downloaded, as it is shown before any work."""
    from mlx_llama_convert.hub_files import RULE

    count, missing = len(listing.files), listing.missing_nbytes
    return [
        f"hub       {listing.name}, {listing.revision} is {listing.commit[:12]}",
        f"files     {listing.choice.layout}, {count} files, {size(listing.nbytes)}, "
        f"{size(missing) if missing else 'nothing'} to download",
        f"rule      {RULE}",
    ]
