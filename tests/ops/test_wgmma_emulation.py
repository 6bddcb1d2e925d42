"""The emulation of a warpgroup (tests/ops/emulated/wgmma.h): one product of it is right, and every mistake is seen."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.cxx import shared_library
from tests.ops.test_cuda_attention import MISTAKES_OF_WARPGROUPS, ROOT, View, call, view

ACROSS = pytest.mark.parametrize("across", [False, True], ids=["columns", "across"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folders = (f"-I{ROOT / 'csrc'}", f"-I{Path(__file__).parent}")
    return shared_library(tmp_path_factory.mktemp("wgmma") / "mistakes.so", [MISTAKES_OF_WARPGROUPS], "-O1", *folders)


def product(library: ctypes.CDLL, across: bool, mistake: str) -> tuple[Tensor, Tensor]:
    """What came out and what should have; small integers, so that sums are exact."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-9, 10, (64, n), generator=generator).to(torch.bfloat16) for n in (16, 64))
    got = torch.full((64, 64), torch.nan)
    views = (View * 3)(view(a), view(b), view(got))
    call(library.wgmma_product, views, ctypes.c_bool(across), mistake.encode())
    tile = torch.cat([b[8:], torch.zeros(8, 64)]).float()  # zeros where the tensor has ended
    return got, a.float() @ (tile[16:32] if across else tile[:, 16:32].T)


@ACROSS
@pytest.mark.parametrize("mistake", ["none", "once"])
def test_a_product_of_a_warpgroup(across, mistake, library):
    got, expected = product(library, across, mistake)
    assert torch.equal(got, expected)


@ACROSS
@pytest.mark.parametrize("mistake", ["swizzle", "stride", "origin", "read before"])
def test_a_tile_that_is_not_what_the_descriptor_says_gives_another_product(across, mistake, library):
    got, expected = product(library, across, mistake)
    assert not torch.equal(got, expected)
    assert got.isnan().all() == (mistake == "read before")


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ("not published", "a barrier that the copy engine was not told of"),
        ("bytes", "every warp waits for a phase that does not end"),
        ("nobody arrives", "every warp waits for a phase that does not end"),
        ("not waited for", "is read and nobody told that it was there"),
        ("phase", "is read and nobody told that it was there"),
        ("not copied", "was not published to products"),
        ("no fence", "the left operand of a product changed since the last fence"),
        ("sums after the fence", "the sums of a product changed since the last fence"),
        ("operand after the fence", "the left operand of a product changed since the last fence"),
        ("operand in use", "the left operand of a product changed before it was finished"),
        ("sums in use", "the sums of a product were written to before it was finished"),
        ("open", "sums that are waited for are of a group that may be open"),
        ("not finished", "a warp ends with products that were not waited for"),
        ("warps", "the warps of a group issue different products"),
        ("in use", "nobody told"),
        ("free already", "nobody told"),
        ("arrived before", "is written to and nobody told that it was free"),
    ],
)
def test_mistakes_are_seen(mistake, error, library):
    with pytest.raises(RuntimeError, match=error):
        product(library, False, mistake)
