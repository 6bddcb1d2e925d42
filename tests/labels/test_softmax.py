"""Labels by softmax over averaged windows, band by band, against the whole thing at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zs3fast.labels.softmax import softmax_labels
from zs3fast.labels.windows import sliding_windows


def whole(logits, size, crop_size, canvas_size, windows):
    """Everything at full size, in float64."""
    total, cover = torch.zeros(logits.shape[1], *canvas_size).double(), torch.zeros(canvas_size)
    for window, (y, x) in zip(logits.double(), windows, strict=True):
        place = (..., slice(y, y + crop_size[0]), slice(x, x + crop_size[1]))
        total[place] += F.interpolate(window[None], crop_size, mode="bilinear", align_corners=False)[0]
        cover[place] += 1
    return F.interpolate((total / cover)[None], size, mode="bilinear", align_corners=False)[0].softmax(0)


@pytest.mark.parametrize("band_bytes", [1, 20_000, 64 << 20], ids=["a-row-a-band", "some", "one-band"])
@pytest.mark.parametrize(
    ("size", "canvas"),
    [((64, 64), (64, 64)), ((75, 100), (64, 85)), ((150, 71), (135, 64)), ((3, 2), (96, 64)), ((1, 40), (64, 2560))],
    ids="{0[0]}x{0[1]}".format,
)
def test_equals_the_whole(size, canvas, band_bytes):
    windows = sliding_windows(canvas, (64, 64), (32, 32))
    logits = 30 * torch.randn(len(windows), 5, 8, 8, generator=torch.Generator().manual_seed(0))
    frame = {"crop_size": (64, 64), "canvas_size": canvas, "windows": windows}
    labels, scores = softmax_labels(logits, size, **frame, band_bytes=band_bytes)
    expected = whole(logits, size, **frame)
    assert labels.dtype == torch.int32 and labels.shape == scores.shape == size
    torch.testing.assert_close(scores.double(), expected.amax(0), atol=1e-4, rtol=0)
    best = expected.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-3
    assert clear.float().mean() > 0.98 and torch.equal(labels[clear].long(), expected.argmax(0)[clear])


def test_windows_are_averaged_before_the_softmax():
    """The mean logit decides: 4 against 4.5, though both windows are all but certain, of different classes."""
    logits = torch.tensor([[8.0, 0.0], [0.0, 9.0]])[:, :, None, None].expand(2, 2, 4, 4)
    frame = {"crop_size": (4, 4), "canvas_size": (4, 4), "windows": [(0, 0), (0, 0)]}
    labels, scores = softmax_labels(logits, (4, 4), **frame)
    assert (labels == 1).all()
    torch.testing.assert_close(scores, torch.full((4, 4), 0.5).sigmoid())


def test_ties_nan_and_half_precision():
    frame = {"crop_size": (4, 4), "canvas_size": (4, 4), "windows": [(0, 0)]}
    logits = torch.zeros(1, 3, 4, 4)
    labels, scores = softmax_labels(logits, (4, 4), **frame)
    assert (labels == 0).all() and torch.allclose(scores, torch.tensor(1 / 3))
    logits[0, 1, 0, 0] = float("nan")
    assert softmax_labels(logits, (4, 4), **frame)[1].isnan().nonzero().tolist() == [[0, 0]]
    half = torch.randn(1, 3, 4, 4).bfloat16()
    got, expected = softmax_labels(half, (9, 9), **frame), softmax_labels(half.float(), (9, 9), **frame)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
