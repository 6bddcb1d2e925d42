"""What torch's FLOP counter sees of the ops."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from zs3fast.encoders.prompted import PromptedClipViT
from zs3fast.ops import attention_to_mask


def test_an_attention_counts_as_its_products_do() -> None:
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    with FlopCounterMode(display=False) as counter:
        output, masks = attention_to_mask(q, k, v, 0.3)
        assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 5 * 7 * 8)
        (output.sum() + masks.sum()).backward()
    assert counter.get_total_flops() == 7 * (2 * 2 * 3 * 5 * 7 * 8)


def test_counting_works_without_gradients() -> None:
    """A trainable parameter was a module's input, on which the counter puts a hook that no_grad refuses."""
    prompts = torch.nn.Parameter(torch.randn(1, 4, 6))
    holder = torch.nn.Module()
    holder.prompt_proj, holder.dropout = torch.nn.Linear(6, 6), 0.0
    holder.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        PromptedClipViT.project_prompts(holder, prompts, 2)
    assert counter.get_total_flops() == 2 * 4 * 6 * 6
