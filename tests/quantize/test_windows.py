"""Windows: every token once, BOS first, the second half scored."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_llama.errors import OptionError
from mlx_llama_quantize.windows import cut_windows


def test_windows_begin_with_bos_and_score_their_second_half() -> None:
    windows = cut_windows(range(100, 121), bos_id=1, context=8)
    assert windows.ids.tolist() == [
        [1, 101, 102, 103, 104, 105, 106, 107],
        [1, 109, 110, 111, 112, 113, 114, 115],
    ]
    assert (len(windows), windows.dropped, windows.n_scored) == (2, 5, 3)
    # Positions 4 to 6 predict tokens 5 to 7.
    assert np.arange(8)[windows.scored].tolist() == [4, 5, 6]
    assert windows.targets(1).tolist() == [113, 114, 115]


def test_odd_windows_have_as_many_targets_as_positions() -> None:
    windows = cut_windows(range(7), bos_id=1, context=7)
    assert len(windows.targets(0)) == len(range(7)[windows.scored]) == windows.n_scored == 3


def test_short_text_is_one_window() -> None:
    assert cut_windows(range(10, 20), bos_id=1, context=512).ids.shape == (1, 10)


def test_text_without_anything_to_score_is_refused() -> None:
    with pytest.raises(OptionError, match="--text: 3 tokens, expected 4 at least"):
        cut_windows([1, 2, 3], bos_id=1, context=512)
