"""The prompted encoder against the plain form: prompts as ordinary tokens that attend, and are thrown away after."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.goldens_data import relative
from tests.tiny import CLIP
from zs3fast.encoders.clip_vit import quick_gelu, resize_positions
from zs3fast.encoders.config import vision_config
from zs3fast.encoders.prompted import PromptedClipViT


def make(depth: int | None = None, prompts: int = 3, layers: int = 3, **options: object) -> PromptedClipViT:
    torch.manual_seed(0)
    clip = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "layers": layers}}
    encoder = PromptedClipViT(vision_config(clip), 64, num_prompts=prompts, prompt_depth=depth, **options).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # nothing at a value where a mistake would not show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def plain_block(block: torch.nn.Module, x: Tensor) -> Tensor:
    attn, y = block.attn, block.ln_1(x)
    q, k, v = F.linear(y, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    x = x + attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
    hidden = quick_gelu(block.mlp.c_fc(block.ln_2(x)))
    return x + block.mlp.c_proj(hidden)


def plain_encode(encoder: PromptedClipViT, images: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The official order of things: [class, prompts, patches] in every layer, prompt outputs overwritten."""
    x, _ = encoder.embed(images)
    batch, layers = images.shape[0], encoder.config.layers
    prompts = 0
    for layer, block in enumerate(encoder.transformer.resblocks):
        fresh = None
        if layer == 0 and depth >= 0:
            fresh = encoder.prompt_embeddings
        elif depth > 0 and layer <= depth:
            fresh = encoder.deep_prompt_embeddings[layer - 1 : layer]
        elif depth < 0 and layer >= max(layers + depth, 1):
            index = layer - (layers + depth)
            fresh = encoder.deep_prompt_embeddings[index : index + 1]
        keep = depth == 0 and layer > 0
        if fresh is not None:
            x = torch.cat([x[:, :1], encoder.prompt_proj(fresh).expand(batch, -1, -1), x[:, 1 + prompts :]], 1)
            prompts = fresh.shape[1]
        elif prompts and not keep:
            x = torch.cat([x[:, :1], x[:, 1 + prompts :]], 1)
            prompts = 0
        x = plain_block(block, x)
    if depth != 0:
        x = encoder.prompt_norm(x)
    x = encoder.ln_post(x) @ encoder.proj
    x = x / x.norm(dim=-1, keepdim=True)
    return x[:, 0], x[:, 1 + prompts :]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("depth", [4, 2, 1, 0, -2, -4, -5])
def test_every_prompt_depth_equals_the_plain_form(depth: int, grad: bool) -> None:
    encoder, images = make(depth, layers=5), torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(grad):
        global_token, patch_tokens = plain_encode(encoder, images, depth)
        features = encoder(images)
    assert relative(features.global_token, global_token) < 1e-5
    assert relative(features.patch_tokens, patch_tokens) < 1e-5
    assert features.grid_size == (4, 4)


@pytest.mark.parametrize("prompts", [1, 10, 100])
def test_default_depth_gives_every_layer_its_prompts(prompts: int) -> None:
    encoder, images = make(prompts=prompts), torch.randn(1, 3, 64, 64)
    assert encoder.deep_prompt_embeddings.shape == (2, prompts, 48)
    features = encoder(images)
    assert relative(features.patch_tokens, plain_encode(encoder, images, 2)[1]) < 1e-5


@pytest.mark.parametrize("size", [(32, 48), (96, 64), (16, 16), (64, 80)])
def test_any_multiple_of_the_patch_keeps_its_true_grid(size: tuple[int, int]) -> None:
    encoder, images = make(), torch.randn(1, 3, *size)
    features = encoder(images)
    assert features.grid_size == (size[0] // 16, size[1] // 16)
    assert relative(features.patch_tokens, plain_encode(encoder, images, 2)[1]) < 1e-5


def test_positions_are_resized_bilinearly_and_the_class_row_is_kept() -> None:
    table = torch.randn(1 + 14 * 14, 6)
    resized = resize_positions(table, (5, 9))
    square = table[1:].t().reshape(1, 6, 14, 14)
    expected = F.interpolate(square, size=(5, 9), mode="bilinear", align_corners=False)[0].reshape(6, 45).t()
    assert torch.equal(resized[0], table[0]) and torch.equal(resized[1:], expected)
    assert resize_positions(table, (14, 14)) is table


@pytest.mark.parametrize("how", [(False, 0.0), (False, 0.1), (True, 0.0)], ids=str)
@pytest.mark.parametrize("grid", [(4, 7), (20, 33), (14, 20), (1, 2)], ids=str)
def test_an_exported_graph_resizes_positions_bicubically_as_torch_does(
    grid: tuple[int, int], how: tuple[bool, float]
) -> None:
    class Resized(torch.nn.Module):
        def forward(self, table: torch.Tensor) -> torch.Tensor:
            return resize_positions(table, grid, "bicubic", *how)

    table = torch.randn(1 + 14 * 14, 6)
    program = torch.export.export(Resized(), (table,))
    assert not [node for node in program.graph.nodes if "bicubic" in str(node.target)]
    torch.testing.assert_close(program.module()(table), Resized()(table), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("double", "times"), [(True, 2), (False, 1)])
def test_class_embedding_counts_twice_as_in_the_official_code(double: bool, times: int) -> None:
    encoder = make(double_class_embedding=double)
    encoder.ln_pre = torch.nn.Identity()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before, _ = encoder.embed(images)
        embedding = encoder.class_embedding.clone()
        encoder.class_embedding.zero_()
        after, _ = encoder.embed(images)
    torch.testing.assert_close(before[0, 0] - after[0, 0], times * embedding, atol=1e-6, rtol=1e-6)
    assert torch.equal(before[:, 1:], after[:, 1:])


def test_cached_prompts_follow_the_weights() -> None:
    """Eval keeps the prompts' keys and values: a write to any weight they come from must be seen."""
    encoder, images = make(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        encoder(images)
        for name in (
            "prompt_embeddings",
            "deep_prompt_embeddings",
            "prompt_proj.weight",
            "transformer.resblocks.1.ln_1.bias",
        ):
            encoder.get_parameter(name).add_(0.3)
            assert relative(encoder(images).patch_tokens, plain_encode(encoder, images, 2)[1]) < 1e-5, name
        assert (
            relative(encoder.double()(images.double()).patch_tokens, plain_encode(encoder, images.double(), 2)[1])
            < 1e-12
        )


def test_only_prompts_train_and_each_sample_draws_its_own_dropout() -> None:
    encoder = make().train()
    assert {name for name, p in encoder.named_parameters() if p.requires_grad} == {
        "prompt_embeddings",
        "deep_prompt_embeddings",
        *(f"prompt_{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")),
    }
    dropped = encoder.project_prompts(encoder.prompt_embeddings, 64)
    assert not torch.equal(dropped[0], dropped[1])
    assert 0.05 < (dropped == 0).float().mean() < 0.15


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 64, 64), ValueError, r"images: expected \[B, 3, H, W\], got \[3, 64, 64\]"),
        (torch.zeros(1, 1, 64, 64), ValueError, r"images: expected \[B, 3, H, W\]"),
        (
            torch.zeros(1, 3, 64, 60),
            ValueError,
            r"images: expected H and W to be multiples of the patch size 16, got 64 x 60",
        ),
        (torch.zeros(1, 3, 0, 64), ValueError, r"images: expected H and W"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, r"images: expected normalised floating-point"),
        (torch.zeros(1, 3, 64, 64, device="meta"), ValueError, r"images: expected the model's device cpu, got meta"),
    ],
)
def test_bad_images_are_named(images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "prompt_depth: expected -3..2 for 3 layers, got 3"),
        ({"depth": -4}, "prompt_depth"),
        ({"prompts": 0}, "num_prompts: expected at least 1, got 0"),
        ({"prompts": "2"}, "num_prompts: expected at least 1, got '2'"),
        ({"prompts": 1.5}, "num_prompts: expected at least 1, got 1.5"),
        ({"depth": "1"}, "prompt_depth: expected -3..2 for 3 layers, got '1'"),
        ({"depth": 1.5}, "prompt_depth: expected -3..2 for 3 layers, got 1.5"),
    ],
)
def test_bad_sizes_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_empty_batch() -> None:
    assert make()(torch.zeros(0, 3, 64, 64)).patch_tokens.shape == (0, 16, 32)
