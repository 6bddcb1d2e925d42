"""The navigated encoder against its plain form: one pass a pair, every token a query, the class token replaced."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.goldens_data import relative
from tests.tiny import CLIP
from zs3fast import ops
from zs3fast.encoders.clip_vit import quick_gelu
from zs3fast.encoders.config import vision_config
from zs3fast.encoders.navigated import NavigatedClipViT, attention_with_lse
from zs3fast.encoders.open_clip_weights import load_tower_state

LAYERS, WIDTH = 6, 48
LAYER_SETS = [(2, 3, 4), (0, 1, 2), (1, 3, 5), (3, 4, 5), (5,), (0,), (4,), (1, 2), (0, 1, 2, 3, 4, 5)]


def make(nav_layers: tuple[int, ...] = (2, 3, 4), prompts: int = 0) -> NavigatedClipViT:
    torch.manual_seed(0)
    clip = {**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "layers": LAYERS}}
    encoder = NavigatedClipViT(vision_config(clip), nav_layers=nav_layers, num_prompts=prompts).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # nothing at a value where a mistake would not show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def make_tokens(encoder: NavigatedClipViT, classes: int) -> dict[int, Tensor]:
    """Random L^i(T): large enough to turn the attention."""
    generator = torch.Generator().manual_seed(1)
    return {i: 3 * torch.randn(classes, WIDTH, generator=generator) for i in encoder.nav_layers}


def plain_block(block: torch.nn.Module, x: Tensor) -> Tensor:
    attn, y = block.attn, block.ln_1(x)
    q, k, v = F.linear(y, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    x = x + attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
    hidden = quick_gelu(block.mlp.c_fc(block.ln_2(x)))
    return x + block.mlp.c_proj(hidden)


def plain_pair(encoder: NavigatedClipViT, image: Tensor, tokens: dict[int, Tensor]) -> list[Tensor]:
    """Inputs of every layer, then the output, [1, 1 + N, width], of one image [1, 3, H, W] and tokens [width]."""
    x, _ = encoder.embed(image)
    states = []
    for i, block in enumerate(encoder.transformer.resblocks):
        if i in tokens:
            x = torch.cat([tokens[i].view(1, 1, -1), x[:, 1:]], dim=1)
        states.append(x)
        if encoder.prompt_embeddings is None:
            x = plain_block(block, x)
        else:
            prompts = encoder.prompt_embeddings[i]
            x = plain_block(block, torch.cat([x, prompts.unsqueeze(0)], dim=1))[:, : -len(prompts)]
    return [*states, x]


def plain_all(
    encoder: NavigatedClipViT, images: Tensor, tokens: dict[int, Tensor], pairs: list[tuple[int, int]]
) -> Tensor:
    rows = [
        plain_pair(encoder, images[b : b + 1], {i: token[c] for i, token in tokens.items()})[-1][:, 1:]
        for b, c in pairs
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("prompts", [0, 5])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("nav_layers", LAYER_SETS, ids=str)
def test_every_image_with_every_class_equals_the_plain_form(
    nav_layers: tuple[int, ...], grad: bool, prompts: int
) -> None:
    """Shared prefix, one merged key, class keys and values made once, dead class rows: all at once, for any layers."""
    encoder, images = make(nav_layers, prompts), torch.randn(2, 3, 64, 48)
    tokens = make_tokens(encoder, 3)
    with torch.set_grad_enabled(grad):
        expected = plain_all(encoder, images, tokens, [(b, c) for b in range(2) for c in range(3)])
        got = encoder.suffix(encoder.prefix(images), encoder.class_tokens(tokens))
    assert got.shape == (6, 12, WIDTH)
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("nav_layers", [(2, 3, 4), (1, 3, 5), (5,)], ids=str)
def test_pairs_equal_the_plain_form(nav_layers: tuple[int, ...]) -> None:
    encoder, images = make(nav_layers), torch.randn(3, 3, 64, 64)
    tokens, pairs = make_tokens(encoder, 4), [(0, 3), (2, 1), (2, 1), (0, 0), (1, 2)]
    image, c = torch.tensor(pairs).unbind(1)
    with torch.no_grad():
        got = encoder.suffix(encoder.prefix(images)[image], encoder.class_tokens(tokens)[c], pairwise=True)
    assert relative(got, plain_all(encoder, images, tokens, pairs)) < 1e-5


@pytest.mark.parametrize("nav_layers", [(2, 3, 4), (2,), (0, 1)], ids=str)
def test_the_prefix_is_all_that_no_class_touches(nav_layers: tuple[int, ...]) -> None:
    """E_i is one for all classes up to layer f, and of its class's own right after."""
    encoder, image = make(nav_layers), torch.randn(1, 3, 64, 64)
    tokens = make_tokens(encoder, 2)
    first, second = (
        [state[:, 1:] for state in plain_pair(encoder, image, {i: t[c] for i, t in tokens.items()})] for c in (0, 1)
    )
    f = nav_layers[0]
    assert all(torch.equal(a, b) for a, b in zip(first[: f + 1], second[: f + 1]))
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(first[f + 1 :], second[f + 1 :]))
    prefix = encoder.prefix(image)
    assert relative(prefix.patches, first[f]) < 1e-6
    assert prefix.grid_size == (4, 4) and prefix.class_token.shape == (1, 1, WIDTH)


def test_the_prefix_runs_once_and_its_attention_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images, five classes: rows that go through each block's MLP and query projection."""
    encoder, images = make(), torch.randn(2, 3, 64, 64)
    mlp_rows, query_rows = [0] * LAYERS, [0] * LAYERS
    linear = ops.fused_linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        for i, block in enumerate(encoder.transformer.resblocks):
            if weight is block.attn.in_proj_weight:
                query_rows[i] += x.shape[:-1].numel()
        return linear(x, weight, bias, **options)

    for i, block in enumerate(encoder.transformer.resblocks):
        block.mlp.register_forward_pre_hook(
            lambda _, args, i=i: mlp_rows.__setitem__(i, mlp_rows[i] + args[0].shape[:-1].numel())
        )
    monkeypatch.setattr(ops, "fused_linear", counted)
    with torch.no_grad():
        encoder.suffix(encoder.prefix(images), encoder.class_tokens(make_tokens(encoder, 5)))
    patches, pairs = 16, 10
    assert mlp_rows == [2 * (patches + 1)] * 2 + [pairs * patches] * 2 + [pairs * (patches + 1), pairs * patches]
    assert query_rows == [2 * (patches + 1)] * 2 + [2 * patches] + [
        pairs * patches,
        pairs * (patches + 1),
        pairs * patches,
    ]


def test_without_navigated_layers_it_is_clip() -> None:
    """Patch tokens of open_clip's own tower after its last block, before its last norm."""
    torch.manual_seed(0)
    theirs = open_clip.CLIP(**CLIP).visual.eval()
    ours = NavigatedClipViT(vision_config(CLIP), nav_layers=()).eval()
    load_tower_state(ours, theirs.state_dict())
    theirs.ln_post = torch.nn.Identity()
    theirs.output_tokens = True
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        prefix = ours.prefix(images)
        assert relative(prefix.patches, theirs(images)[1]) < 1e-5
        assert relative(prefix.class_token.squeeze(1) @ ours.proj, theirs(images)[0]) < 1e-5


def test_positions_are_resized_bicubically_from_clips_own_grid() -> None:
    encoder, images = make(()), torch.randn(1, 3, 96, 80)
    square = encoder.positional_embedding[1:].t().reshape(1, WIDTH, 4, 4)
    resized = F.interpolate(square, size=(6, 5), mode="bicubic", align_corners=False)[0].flatten(1).t()
    patches = encoder.conv1(images).flatten(2).transpose(1, 2) + resized
    assert relative(encoder.embed(images)[0][:, 1:], encoder.ln_pre(patches)) < 1e-6
    assert encoder.positional_embedding.shape == (17, WIDTH)  # stored as CLIP has it, whatever the images


def test_attention_with_lse_is_attention() -> None:
    q, k, v = torch.randn(3, 5, 8), torch.randn(3, 9, 8), torch.randn(3, 9, 8)
    out, lse = attention_with_lse(q, k, v)
    assert relative(out, F.scaled_dot_product_attention(q, k, v)) < 1e-6
    assert relative(lse, (q @ k.transpose(-1, -2) * 8**-0.5).exp().sum(-1).log()) < 1e-6
    half = attention_with_lse(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32


def test_the_merge_is_safe_where_one_key_takes_all() -> None:
    """Class scores far above and far below the patches': shares of exactly 1 and 0, no overflow."""
    encoder, images = make(), torch.randn(1, 3, 64, 64)
    for scale in (1e4, 1e-4):
        with torch.no_grad():
            encoder.transformer.resblocks[2].ln_1.weight.mul_(scale)
            tokens = make_tokens(encoder, 2)
            got = encoder.suffix(encoder.prefix(images), encoder.class_tokens(tokens))
            assert torch.isfinite(got).all()
            assert relative(got, plain_all(encoder, images, tokens, [(0, 0), (0, 1)])) < 1e-4


def test_gradients_reach_every_token_and_no_weight_of_the_frozen_tower() -> None:
    encoder, images = make(), torch.randn(2, 3, 64, 64, requires_grad=True)
    tokens = {i: token.requires_grad_() for i, token in make_tokens(encoder, 3).items()}
    prefix = encoder.prefix(images)
    assert not prefix.patches.requires_grad and not prefix.attended.requires_grad  # no graph before the first class
    encoder.suffix(prefix, encoder.class_tokens(tokens)).square().sum().backward()
    got = {i: token.grad.clone() for i, token in tokens.items()}
    assert all(grad.abs().sum() > 0 for grad in got.values())
    assert all(parameter.grad is None for parameter in encoder.parameters()) and images.grad is None
    for token in tokens.values():
        token.grad = None
    plain_all(encoder, images.detach(), tokens, [(b, c) for b in range(2) for c in range(3)]).square().sum().backward()
    for i, token in tokens.items():
        assert relative(got[i], token.grad) < 1e-5, f"gradient of the token of layer {i}"


def test_gradients_reach_the_prompts_of_every_layer() -> None:
    encoder, images = make(prompts=3), torch.randn(1, 3, 64, 64)
    assert [name for name, p in encoder.named_parameters() if p.requires_grad] == ["prompt_embeddings"]
    tokens = make_tokens(encoder, 2)
    encoder.suffix(encoder.prefix(images), encoder.class_tokens(tokens)).square().sum().backward()
    got = encoder.prompt_embeddings.grad.clone()
    encoder.prompt_embeddings.grad = None
    plain_all(encoder, images, tokens, [(0, 0), (0, 1)]).square().sum().backward()
    assert relative(got, encoder.prompt_embeddings.grad) < 1e-5
    assert (got.abs().sum((1, 2)) > 0).all()


def test_cached_prompts_follow_the_weights() -> None:
    encoder, images = make(prompts=3), torch.randn(1, 3, 64, 64)
    tokens = make_tokens(encoder, 1)
    for name in ("prompt_embeddings", "transformer.resblocks.1.ln_1.bias"):
        with torch.no_grad():
            encoder.prefix(images)
            encoder.get_parameter(name).add_(0.3)
            got = encoder.suffix(encoder.prefix(images), encoder.class_tokens(tokens))
            assert relative(got, plain_all(encoder, images, tokens, [(0, 0)])) < 1e-5, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nav_layers": (2, 6)}, r"nav_layers: expected different layers in 0..5, got \[2, 6\]"),
        ({"nav_layers": (-1,)}, "nav_layers"),
        ({"nav_layers": (2, 2)}, "nav_layers: expected different layers"),
        ({"prompts": -1}, "num_prompts: expected at least 0, got -1"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_tokens_of_other_layers_are_named() -> None:
    with pytest.raises(ValueError, match=r"tokens: expected those of layers \[2, 3, 4\], got \[2, 3\]"):
        make().class_tokens({2: torch.zeros(1, WIDTH), 3: torch.zeros(1, WIDTH)})
