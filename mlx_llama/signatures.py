"""What a file is when it is not the checkpoint that its name promises."""

from __future__ import annotations

_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")


def explain_foreign(head: bytes) -> str | None:
    """Say what the first bytes of a file show, and what to do; None when they show nothing."""
    if not head:
        return "the file is empty: download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
    if head.lstrip()[:1] == b"<":
        return "a web page, not the weights: the download was refused, try it again"
    if head.startswith(_LEGACY_TORCH):
        return (
            "written in PyTorch's legacy format (before 1.6), which is not read: "
            "load it with torch and save it again with torch.save"
        )
    return None
