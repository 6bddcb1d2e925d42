"""bench/agreement.py: equal labels are counted as pixels, and both types are run."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bench import agreement
from zs3fast.ops.fused_linear_int8 import kernels


def test_pixels_are_counted_not_images() -> None:
    zeros = np.zeros((2, 3), np.int32)
    assert agreement.equal_share([(zeros, zeros), (np.zeros((1, 2), np.int32), np.ones((1, 2), np.int32))]) == 75.0


def test_a_model_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    agreement.main(["--models", "zegclip", "--scenes", "1"])
    found = re.search(
        r"world  zegclip +([\d.]+) % equal, mIoU +([\d.]+) float32 +([\d.]+) bfloat16, 1 scenes",
        capsys.readouterr().out,
    )
    assert found and 90 < float(found[1]) <= 100 and abs(float(found[2]) - float(found[3])) < 5


@pytest.mark.skipif(not kernels(), reason="no int8 kernel of the extension on this machine")
def test_eight_bits(capsys: pytest.CaptureFixture[str]) -> None:
    agreement.main(["--models", "zegclip", "--scenes", "1", "--quantize", "int8"])
    found = re.search(r"([\d.]+) % equal, mIoU .* bfloat16 and int8, 1 scenes", capsys.readouterr().out)
    assert found and 90 < float(found[1]) < 100


def test_photos_need_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        agreement.main(["--photos", "."])
    assert "--goldens and --photos: give both or neither" in capsys.readouterr().err
