"""Ctrl-C where it is awkward."""

from __future__ import annotations

import threading
from typing import Any


def lost_lock() -> RuntimeError:
    """Return what becomes of Ctrl-C between a condition's letting go of its lock and its wait."""
    condition = threading.Condition()
    let_go = condition._release_save  # pyright: ignore[reportAttributeAccessIssue]

    def interrupted() -> Any:
        let_go()
        raise KeyboardInterrupt

    condition._release_save = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with condition:
            condition.wait()
    except RuntimeError as error:
        return error
    raise AssertionError("the lock was held")
