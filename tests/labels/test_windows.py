"""The sliding-window layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zs3fast.labels.windows import sliding_windows


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), [(0, 0)]),
        ((512, 513), [(0, 0), (0, 1)]),
        ((512, 683), [(0, 0), (0, 171)]),  # a 375 x 500 photo
        ((512, 938), [(0, 0), (0, 426)]),
        ((512, 939), [(0, 0), (0, 426), (0, 427)]),
        ((700, 700), [(0, 0), (0, 188), (188, 0), (188, 188)]),
    ],
)
def test_official_layout(size, expected):
    assert sliding_windows(size, (512, 512), (426, 426)) == expected


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_windows_lie_inside_and_cover(height, width, crop_h, crop_w, step_h, step_w):
    crop = min(crop_h, height), min(crop_w, width)
    stride = min(step_h, crop[0]), min(step_w, crop[1])
    cover = np.zeros((height, width), int)
    windows = sliding_windows((height, width), crop, stride)
    for y, x in windows:
        assert 0 <= y <= height - crop[0] and 0 <= x <= width - crop[1]
        cover[y : y + crop[0], x : x + crop[1]] += 1
    assert cover.min() >= 1
    assert len(set(windows)) == len(windows) and windows == sorted(windows)
    rows, columns = len({y for y, _ in windows}), len({x for _, x in windows})
    assert rows == max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1
    assert columns == max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1


@pytest.mark.parametrize(
    ("size", "crop", "stride", "message"),
    [
        ((10, 20), (11, 5), (1, 1), "height 10, crop 11"),
        ((20, 10), (5, 11), (1, 1), "width 10, crop 11"),
        ((20, 20), (5, 5), (1, 0), "stride 0"),
        ((0, 20), (1, 5), (1, 1), "height 0"),
    ],
)
def test_impossible_layouts(size, crop, stride, message):
    with pytest.raises(ValueError, match=f"windows: .*{message}"):
        sliding_windows(size, crop, stride)
