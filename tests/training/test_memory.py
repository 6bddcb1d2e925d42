"""What a training step keeps for its backward pass: nothing for frozen weights, and no more an image than is stated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import tiny_inputs, tiny_labels
from tests.training.test_steps import any_step
from zs3fast.utils.memory import kept_for_backward

# KiB that each image of 64 x 64 adds in the tiny models: 3 blocks of width 48 on 1 + 16 tokens, a decoder of width 32.
STATED = {"zegclip": 191, "tagclip": 235, "clip_rc": 589, "clsclip": 236, "maft": 164}
BLOCK = 10  # of a frozen block with prompts, in tensors [T, width]: two norms, q, k, v, attention, 4 of the activation


def kept_by(method: str, batch: int) -> dict[tuple[int, int], Tensor]:
    """What the step of a method keeps of so many images, all alike."""
    step = any_step(method, "fp32").train()
    images, labels = tiny_inputs(1)[0], tiny_labels(1)
    inputs = {
        "images": images.expand(batch, -1, -1, -1).contiguous(),
        "labels": labels.expand(batch, -1, -1).contiguous(),
        "class_index": torch.full((batch,), int(labels[0, 32, 32])),
    }
    return kept_for_backward(lambda: step(inputs))


def bytes_of(kept: dict[tuple[int, int], Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("method", STATED)
def test_memory_an_image_is_what_is_stated(method: str) -> None:
    each = (bytes_of(kept_by(method, 4)) - bytes_of(kept_by(method, 2))) / 2 / 1024
    assert each == pytest.approx(STATED[method], rel=0.03)


def test_a_frozen_block_keeps_ten_tokens_a_token() -> None:
    """Two tensors of QuickGELU's and the product behind a query that is a view of it would make it 16."""
    step = any_step("zegclip", "fp32").train()
    block = step.model.encoder.transformer.resblocks[1]
    width, tokens, prompts = 48, 17, 3
    x = torch.randn(4, tokens, width, requires_grad=True)
    context = block.context(torch.randn(4, prompts, width, requires_grad=True))
    kept = bytes_of(kept_for_backward(lambda: block(x, context))) / (4 * tokens * width * 4)
    longer = 2 * prompts / tokens  # keys and values of the prompts
    small = 0.3  # statistics of norms and softmax
    assert BLOCK + longer <= kept < BLOCK + longer + small


@pytest.mark.parametrize("method", STATED)
def test_frozen_layers_keep_no_inputs_for_weight_gradients(method: str) -> None:
    step = any_step(method, "fp32").train()
    read: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> None:
        read[name] = tensor.detach()  # which keeps the memory from being used anew

    frozen = [block for block in step.model.encoder.transformer.resblocks if frozen_mlp(block)]
    assert frozen
    for i, block in enumerate(frozen):
        block.mlp.c_fc.register_forward_pre_hook(lambda _, args, i=i: note(f"{i} c_fc", args[0]))
        block.mlp.c_proj.register_forward_pre_hook(lambda _, args, i=i: note(f"{i} c_proj", args[0]))
        if not block.attn.in_proj_weight.requires_grad:
            block.ln_1.register_forward_hook(lambda _, args, out, i=i: note(f"{i} in_proj", out))
    labels = tiny_labels(2)
    batch = {"images": tiny_inputs(2)[0], "labels": labels, "class_index": labels[:, 32, 32]}
    kept = kept_for_backward(lambda: step(batch))
    wasted = [n for n, t in read.items() if (t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) in kept]
    assert len(read) >= 2 * len(frozen) and wasted == []


def frozen_mlp(block: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in block.mlp.parameters())


@pytest.mark.parametrize("method", STATED)
def test_frozen_parameters_get_no_gradient(method: str) -> None:
    step = any_step(method, "fp32").train()
    labels = tiny_labels(2)
    step({"images": tiny_inputs(2)[0], "labels": labels, "class_index": labels[:, 32, 32]})["loss"].backward()
    trained = step.model.trainable()
    got = {name for name, parameter in step.model.named_parameters() if parameter.grad is not None}
    assert got and got <= trained.keys()


def test_kept_memory_counts_storages_once_and_no_weights() -> None:
    linear = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    assert bytes_of(kept_for_backward(lambda: linear(x).sum())) == 0
    assert bytes_of(kept_for_backward(lambda: (x[:2].exp() * x[:2].exp().t().t()).sum())) == 2 * 2 * 8 * 4
    linear.requires_grad_(True)
    assert bytes_of(kept_for_backward(lambda: linear(x).sum())) == 4 * 8 * 4
