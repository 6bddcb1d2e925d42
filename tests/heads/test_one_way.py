"""One-way decoder: what its last layer's scores are computed in."""

from __future__ import annotations

import contextlib

import pytest
import torch

from zs3fast.heads.one_way import MaskAttention


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_half_types_are_products_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    """Labels compare them: rounded to 8 bits every tenth of neighbouring scores would be a tie."""
    torch.manual_seed(0)
    layer = MaskAttention(64, 4)
    queries, patches = torch.randn(2, 5, 64), torch.randn(2, 49, 64)
    if not autocast:
        layer, queries, patches = layer.to(dtype), queries.to(dtype), patches.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
        masks = layer(queries, patches)
        q = layer.q(queries)
    keys = patches.double() @ layer.k.weight.double().mT + layer.k.bias.double()
    expected = q.double() @ keys.mT * (16**-0.5 / 4)
    assert masks.dtype == torch.float32
    assert ((masks - expected).norm() / expected.norm()).item() < 1e-6
