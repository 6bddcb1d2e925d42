"""Proposal towers: plain CLIP without masks, and what section 3.7 of the method's description demands of masks."""

from __future__ import annotations

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.goldens_data import relative
from tests.tiny_clip import CONFIG, tiny_clip
from zs3fast import ops
from zs3fast.encoders.config import vision_config
from zs3fast.encoders.open_clip_weights import load_tower_state
from zs3fast.encoders.proposal_clip import ProposalClipResNet, ProposalClipViT

RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}


def vit(start_layer: int = 1) -> ProposalClipViT:
    encoder = ProposalClipViT(vision_config(CONFIG), start_layer=start_layer).eval()
    load_tower_state(encoder, tiny_clip().visual.state_dict())
    return encoder.double()


def resnet() -> ProposalClipResNet:
    torch.manual_seed(0)
    encoder = ProposalClipResNet(RESNET, 32).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in (b for name, b in encoder.named_buffers() if name.endswith(("mean", "var"))):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return encoder.double()


ENCODERS = {"vit-L0": lambda: vit(0), "vit-L1": vit, "vit-L2": lambda: vit(2), "resnet": resnet}
every_encoder = pytest.mark.parametrize("name", ENCODERS)


def images(size: tuple[int, int] = (64, 64), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).double()


def embed(encoder: nn.Module, pixels: Tensor, keep: Tensor) -> Tensor:
    """Proposal embeddings for bool masks [B, Nq, N]."""
    tokens, grid = encoder.trunk(pixels)
    assert keep.shape[-1] == grid[0] * grid[1]
    masks = keep.unflatten(-1, grid).double()
    return encoder.proposal_head(tokens, ops.masks_to_bits(masks, grid))


def random_masks(count: int, patches: int, density: float, seed: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, count, patches, generator=torch.Generator().manual_seed(seed)) < density


def patches_of(encoder: nn.Module, pixels: Tensor) -> int:
    grid = encoder.trunk(pixels)[1]
    return grid[0] * grid[1]


def test_without_masks_it_is_clip() -> None:
    """open_clip's own towers, at the size they were made for and, for the ViT, at another."""
    pixels, clip = images(), tiny_clip().double()
    for start_layer in (0, 1, 2):
        encoder = vit(start_layer)
        assert relative(encoder.image_head(encoder.trunk(pixels)[0]), clip.visual(pixels)) < 1e-12
    torch.manual_seed(0)
    sizes = {"layers": RESNET["layers"], "output_dim": 32, "heads": 4, "image_size": 64, "width": 8}
    tower = open_clip.modified_resnet.ModifiedResNet(**sizes).eval().double()
    encoder = ProposalClipResNet(RESNET, 32).eval().double()
    load_tower_state(encoder, tower.state_dict())
    assert relative(encoder.image_head(encoder.trunk(pixels)[0]), tower(pixels)) < 1e-12


def test_positions_are_resized_bicubically_with_corners() -> None:
    """Checked against a CLIP whose table was resized beforehand."""
    pixels, clip = images((96, 80)), tiny_clip().double()
    table = clip.visual.positional_embedding
    grid = table[1:].unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    wide = nn.functional.interpolate(grid, (6, 5), mode="bicubic", align_corners=True)[0].flatten(1).t()
    clip.visual.positional_embedding = nn.Parameter(torch.cat([table[:1], wide]))
    clip.visual.grid_size = (6, 5)
    encoder = vit()
    assert relative(encoder.image_head(encoder.trunk(pixels)[0]), clip.visual(pixels)) < 1e-12


@every_encoder
@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 9), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 99))
def test_proposals_do_not_know_each_other(name: str, count: int, density: float, seed: int) -> None:
    encoder, pixels = ENCODERS[name](), images()
    keep = random_masks(count, patches_of(encoder, pixels), density, seed)
    with torch.no_grad():
        all_of_them = embed(encoder, pixels, keep)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        assert relative(embed(encoder, pixels, keep[:, order]), all_of_them[:, order]) < 1e-12
        assert relative(embed(encoder, pixels, keep[:, :1]), all_of_them[:, :1]) < 1e-12
        more = torch.cat([keep, random_masks(3, keep.shape[-1], 0.5, seed + 1)], dim=1)
        assert relative(embed(encoder, pixels, more)[:, :count], all_of_them) < 1e-12


@every_encoder
def test_patches_do_not_know_the_proposals(name: str) -> None:
    """What a full mask sees is all the patches: it stays the same in any crowd."""
    encoder, pixels = ENCODERS[name](), images()
    patches = patches_of(encoder, pixels)
    full = torch.ones(2, 1, patches, dtype=torch.bool)
    with torch.no_grad():
        alone = embed(encoder, pixels, full)
        for seed in range(3):
            crowd = torch.cat([full, random_masks(5, patches, 0.3, seed)], dim=1)
            assert relative(embed(encoder, pixels, crowd)[:, :1], alone) < 1e-12


@every_encoder
def test_empty_masks_are_finite_and_equal(name: str) -> None:
    encoder, pixels = ENCODERS[name]().train(), images()
    keep = random_masks(5, patches_of(encoder, pixels), 0.4, 0)
    keep[:, 1] = keep[:, 3] = False
    out = embed(encoder, pixels, keep)
    assert torch.isfinite(out).all() and relative(out[:, 1], out[:, 3]) < 1e-12
    out[:, 1].sum().backward()
    grads = [p.grad for p in encoder.parameters() if p.requires_grad]
    assert all(torch.isfinite(g).all() for g in grads if g is not None) and any(g is not None for g in grads)


@pytest.mark.parametrize("start_layer", [0, 1, 2])
def test_a_full_mask_is_clip_with_the_class_column_hidden_from_patches(start_layer: int) -> None:
    encoder, pixels = vit(start_layer), images()
    with torch.no_grad():
        tokens, _ = encoder.trunk(pixels)
        patches = tokens.shape[1] - 1
        hidden = torch.zeros(patches + 1, patches + 1, dtype=torch.bool)
        hidden[1:, 0] = True  # patches do not see the class token

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)

        x = tokens
        for block in encoder.transformer.resblocks[start_layer:]:
            x = block(x, attend=attend)
        expected = encoder.ln_post(x[:, 0]) @ encoder.proj
        got = embed(encoder, pixels, torch.ones(2, 1, patches, dtype=torch.bool))
    assert relative(got[:, 0], expected) < 1e-12


def test_resnet_proposals_by_hand() -> None:
    """One softmax a head over {the mean itself} and the kept features."""
    encoder, pixels = resnet(), images()
    keep = random_masks(4, patches_of(encoder, pixels), 0.5, 3)
    with torch.no_grad():
        tokens, _ = encoder.trunk(pixels)
        pool = encoder.visual.attnpool
        got = embed(encoder, pixels, keep)
        for b in range(2):
            for n in range(4):
                rows = torch.cat([tokens[b, :1], tokens[b, 1:][keep[b, n]]])
                q, k, v = pool.q_proj(rows[:1]), pool.k_proj(rows), pool.v_proj(rows)
                heads = [
                    (q[:, s] @ k[:, s].t() / 64**0.5).softmax(-1) @ v[:, s]
                    for s in (slice(64 * i, 64 * i + 64) for i in range(pool.num_heads))
                ]
                assert relative(got[b, n], pool.c_proj(torch.cat(heads, -1))[0]) < 1e-12


def test_pixels_that_fill_no_patch_are_left_out() -> None:
    encoder = vit()
    with torch.no_grad():
        wide, exact = (encoder.trunk(images((70, 79))[..., :h, :w])[0] for h, w in ((70, 79), (64, 64)))
    assert wide.shape == exact.shape
    torch.testing.assert_close(wide, exact)


def test_errors() -> None:
    with pytest.raises(ValueError, match="start_layer: expected 0..2 for a tower of 3 layers, got 3"):
        ProposalClipViT(vision_config(CONFIG), start_layer=3)
    with pytest.raises(ValueError, match="images: expected H and W to be multiples of the patch size 16, got 16 x 8"):
        vit().trunk(images((16, 8)))
    with pytest.raises(ValueError, match=r"images: expected H and W of at least 32, got 16 x 64"):
        resnet().trunk(images((16, 64)))
