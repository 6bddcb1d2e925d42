"""CLIP weights through open_clip: same numbers as open_clip's own tower, and clear words when there is none."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from tests.goldens_data import relative
from tests.tiny import CLIP
from zs3fast.encoders.clip_vit import ClipViT
from zs3fast.encoders.config import vision_config
from zs3fast.encoders.open_clip_weights import load_clip_weights, load_tower_state


@pytest.mark.parametrize("quick", [True, False], ids=["quick_gelu", "gelu"])
def test_plain_tower_equals_open_clip(quick: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = {**CLIP, "quick_gelu": quick}
    theirs = open_clip.CLIP(**clip).eval()
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    ours = ClipViT(vision_config(clip), 64, double_class_embedding=False).eval()
    load_clip_weights(ours, clip, str(tmp_path / "clip.pt"))
    images = torch.randn(2, 3, 64, 64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            tokens, _ = ours.embed(images)
            for block in ours.transformer.resblocks:
                tokens = block(tokens)
            assert relative(ours.project(tokens)[:, 0], theirs.encode_image(images, normalize=True)) < 1e-5


def test_position_table_is_resized_once_to_the_new_grid() -> None:
    ours = ClipViT(vision_config(CLIP), 96)
    state = open_clip.CLIP(**CLIP).visual.state_dict()
    load_tower_state(ours, state)
    assert ours.positional_embedding.shape == (37, 48)
    assert torch.equal(ours.positional_embedding[0], state["positional_embedding"][0])


PLAIN = [
    "ViT-B-16",
    "ViT-B-16-quickgelu",
    "ViT-B-32",
    "ViT-L-14",
    "ViT-L-14-336",
    "ViT-H-14",
    "ViT-g-14",
    "ViT-bigG-14",
    "ViT-B-16-plus-240",
]


@pytest.mark.parametrize("name", PLAIN)
def test_sizes_of_plain_vits_are_open_clips(name: str) -> None:
    config = vision_config(name)
    with torch.device("meta"):
        ours = ClipViT(config, config.grid * config.patch_size)
        theirs = open_clip.create_model(name, load_weights=False, device="meta").visual
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert config.heads == theirs.transformer.resblocks[0].attn.num_heads


def test_activation_follows_the_weights() -> None:
    assert vision_config("ViT-B-16").quick_gelu  # every published checkpoint of these methods
    assert vision_config("ViT-B-16", "openai").quick_gelu
    assert not vision_config("ViT-B-16", "laion2b_s34b_b88k").quick_gelu
    assert not vision_config("ViT-B-16", "openai", quick_gelu=False).quick_gelu


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("ViT-B-61", r"clip: expected a model of open_clip, such as .*ViT-B-16.*, got 'ViT-B-61'"),
        (
            "RN50",
            r"clip: expected one such as ViT.*, got RN50, whose image tower is no plain CLIP ViT \(layers: a ResNet\)",
        ),
        (
            "ViT-B-16-SigLIP",
            r"ViT-B-16-SigLIP, whose .* \(timm_model_name: timm's vit_base_patch16_siglip_224, without a class",
        ),
        ("ViT-SO400M-14-SigLIP2", r"no plain CLIP ViT \(timm_model_name: .*, without a class token\)"),
        ("convnext_base", r"no plain CLIP ViT \(timm_model_name: timm's convnext_base, of convolutions\)"),
        ("EVA02-B-16", r"no plain CLIP ViT \(timm_model_name: timm's eva02_base_patch16_clip_224\)"),
        ("ViT-L-14-CLIPA", r"no plain CLIP ViT \(no_ln_pre=True; pool_type='avg'; final_ln_after_pool=True\)"),
        ("coca_ViT-B-32", r"attentional_pool"),
        ({"embed_dim": 4}, "clip: the configuration lacks vision_cfg"),
    ],
)
def test_unusable_towers_are_named(clip: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision_config(clip)


def test_unknown_weights_name_the_known_tags() -> None:
    encoder = ClipViT(vision_config(CLIP), 64)
    with pytest.raises(
        ValueError, match=r"pretrained: expected a file or a tag of this model \(openai.*\), got 'opanai'"
    ):
        load_clip_weights(encoder, "ViT-B-16", "opanai")
