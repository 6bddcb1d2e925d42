"""What bfloat16 costs the bundled models: labels on scenes of the world, against float32's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zs3fast import Segmenter
from zs3fast.data.world import WorldDataset
from zs3fast.inference.segmenter import TINY, find_weights

SCENES = 6


@pytest.mark.parametrize("method", ["zegclip", "tagclip", "clip_rc", "maskclip"])
def test_labels_agree_in_99_percent_of_pixels(method: str) -> None:
    scenes = WorldDataset("test", length=SCENES)
    images = [np.asarray(scenes[i].image) for i in range(SCENES)]
    labels = []
    for dtype in (torch.float32, torch.bfloat16):
        segmenter = Segmenter.from_pretrained(find_weights(f"{TINY}-{method}"), dtype=dtype)
        labels.append([segmenter(image, scenes.class_names).labels for image in images])
    equal = np.mean([np.mean(a == b) for a, b in zip(*labels, strict=True)])
    assert equal >= 0.99, f"{method}: {equal:.4f}"
