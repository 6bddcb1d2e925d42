"""detectron2's MaskFormer layout into transformers' MaskFormer: names, strictness, and the same masks out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.proposals.tiny_models import picture, transformers
from zs3fast.proposals import TransformersMaskProposer, load_mask_proposer
from zs3fast.proposals.maskformer_official import key_pairs, load_official_maskformer
from zs3fast.utils.errors import CheckpointError

pytest.importorskip("scipy", reason="transformers' MaskFormer needs scipy")


def model_of(stages: list[int]) -> nn.Module:
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=stages, layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    decoder = transformers.DetrConfig(
        backbone_config=backbone, num_queries=5, d_model=32, encoder_layers=0, decoder_layers=2, decoder_ffn_dim=24,
        decoder_attention_heads=8,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=16, num_labels=3
    )
    model = transformers.MaskFormerForInstanceSegmentation(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2)
            elif "running_mean" in name or (tensor.is_floating_point() and tensor.dim() == 1):
                tensor.add_(0.2 * torch.randn_like(tensor))
    return model


def official_state(model: nn.Module, stages: list[int], prefix: str = "") -> dict[str, Tensor]:
    """The model's weights under detectron2's names, packed as it packs them."""
    own = model.state_dict()
    blocks = {f"backbone.res{s + 2}.{b}.conv1.weight": torch.empty(0) for s, n in enumerate(stages) for b in range(n)}
    shortcuts = {f"backbone.res{s + 2}.0.shortcut.weight": torch.empty(0) for s in range(4)}
    state: dict[str, Tensor] = {}
    for official, names, part in key_pairs({**blocks, **shortcuts}, 2):
        tensor = next((own[name] for name in names if name in own), None)
        if tensor is None:
            assert ".shortcut." in official, official
            continue
        state[official] = tensor if part in (None, 0) else torch.cat([state[official], tensor])
    return {
        name.replace("sem_seg_head.", f"sem_seg_head.{prefix}") if "predictor" not in name else name: tensor.clone()
        for name, tensor in state.items()
    }


STAGES = [1, 2, 1, 1]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return model_of(STAGES)


def test_names_are_those_of_the_library_s_conversion(model: nn.Module) -> None:
    state = official_state(model, STAGES)
    for name in (
        "backbone.stem.conv1.weight",
        "backbone.stem.conv1.norm.running_var",
        "backbone.res3.1.conv2.norm.bias",
        "backbone.res2.0.shortcut.weight"
        if "backbone.res2.0.shortcut.weight" in state
        else "backbone.res3.0.shortcut.weight",
        "sem_seg_head.adapter_1.norm.weight",
        "sem_seg_head.layer_4.weight",
        "sem_seg_head.mask_features.bias",
        "sem_seg_head.predictor.transformer.decoder.layers.1.multihead_attn.in_proj_weight",
        "sem_seg_head.predictor.transformer.decoder.norm.bias",
        "sem_seg_head.predictor.query_embed.weight",
        "sem_seg_head.predictor.mask_embed.layers.2.bias",
    ):
        assert name in state, name
    assert state["sem_seg_head.predictor.transformer.decoder.layers.0.self_attn.in_proj_weight"].shape == (96, 32)


@pytest.mark.parametrize("prefix", ["", "pixel_decoder."])
def test_the_same_masks_come_out(model: nn.Module, tmp_path: Path, prefix: str) -> None:
    state = official_state(model, STAGES, prefix)
    state |= {"clip_adapter.x": torch.zeros(2), "sem_seg_head.predictor.class_embed.layers.0.weight": torch.zeros(3)}
    path = tmp_path / "zegformer.pth"
    torch.save({"model": state}, path)
    images, frame = [picture(40, 56)], {"short_side": 64, "long_side": 128}
    found = load_mask_proposer(f"maskformer:{path}", **frame)(images)
    expected = TransformersMaskProposer(model, **frame)(images)
    torch.testing.assert_close(found.mask_logits, expected.mask_logits)
    assert found.class_scores is None and found.class_names is None and expected.class_scores is not None


def test_counts_of_batches_are_no_weights(model: nn.Module, tmp_path: Path) -> None:
    """Backbones with (synchronised) BatchNorm hold them."""
    state = official_state(model, STAGES, "pixel_decoder.")
    state["backbone.res3.1.conv2.norm.num_batches_tracked"] = torch.tensor(7)
    torch.save(state, tmp_path / "bn.pth")
    own = load_official_maskformer(tmp_path / "bn.pth").state_dict()
    assert all(
        torch.equal(own[k], v) for k, v in model.state_dict().items() if k.startswith("model.") and "num_" not in k
    )


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("backbone.res2.0.conv1.extra", torch.zeros(2), r"unexpected: backbone.res2.0.conv1.extra \(1\)"),
        (
            "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.linear1.weight",
            torch.zeros(2, 2),
            "unexpected: .*enc",
        ),
        (
            "sem_seg_head.pixel_decoder.input_proj.weight",
            torch.zeros(2, 2),
            "unexpected: sem_seg_head.input_proj.weight",
        ),
        ("sem_seg_head.pixel_decoder.layer_9.weight", torch.zeros(2), "unexpected: sem_seg_head.layer_9.weight"),
        ("sem_seg_head.layer_4.weight", torch.zeros(2), r"unexpected: sem_seg_head.*layer_4.weight \(1\)"),
        ("sem_seg_head.predictor.mask_embed.layers.3.bias", torch.zeros(2), "unexpected: .*mask_embed.layers.3.bias"),
        ("sem_seg_head.predictor.transformer.decoder.layers.0.norm4.bias", torch.zeros(2), "unexpected: .*norm4"),
        ("sem_seg_head.predictor.transformer.decoder.layers.5.norm1.bias", torch.zeros(32), "unexpected: .*layers.5"),
        *(
            (f"sem_seg_head.predictor.transformer.decoder.layers.1.{kind}_attn.in_proj_{end}", wrong, message)
            for kind in ("self", "multihead")
            for end, wrong, message in (
                ("weight", torch.zeros(2, 32), r"wrong shape: .*in_proj_weight \[2, 32\], expected \[96, 32\] \(1\)"),
                ("weight", torch.zeros(97, 32), r"wrong shape: .* \[97, 32\], expected \[96, 32\] \(1\)"),
                ("bias", torch.zeros(()), r"wrong shape: .*in_proj_bias \[\], expected \[96\] \(1\)"),
                ("bias", torch.zeros(95), r"wrong shape: .*in_proj_bias \[95\], expected \[96\] \(1\)"),
            )
        ),
        ("sem_seg_head.predictor.query_embed.weight", torch.zeros(5), r"wrong shape: .* \[5\], expected 2 dimensions"),
        ("sem_seg_head.predictor.query_embed.weight", torch.zeros(5, 16), r"wrong shape: .*expected"),
        ("sem_seg_head.pixel_decoder.mask_features.weight", torch.zeros(()), r"wrong shape: .* \[\], expected 4 dim"),
        (
            "backbone.stem.conv1.weight",
            torch.zeros(8, 3, 3, 3),
            r"wrong shape: .*\[8, 3, 3, 3\], expected \[8, 3, 7, 7\]",
        ),
        ("backbone.res4.0.conv3.weight", torch.zeros(16), r"wrong shape: .* \[16\], expected 4 dimensions"),
    ],
)
def test_nothing_of_the_generator_may_be_left_over_or_misshapen(
    model: nn.Module, tmp_path: Path, name: str, tensor: Tensor, message: str
) -> None:
    """A pixel decoder with a transformer went through as one without; packed projections broke with an IndexError."""
    path = tmp_path / "odd.pth"
    torch.save({"model": {**official_state(model, STAGES, "pixel_decoder."), name: tensor}}, path)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_official_maskformer(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_heads_that_do_not_divide_the_width(model: nn.Module, tmp_path: Path) -> None:
    torch.save(official_state(model, STAGES), tmp_path / "one.pth")
    with pytest.raises(ValueError, match="heads: expected a divisor of the decoder's width 32, got 5"):
        load_official_maskformer(tmp_path / "one.pth", heads=5)


def test_what_does_not_fit_is_named(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "broken.pth"
    norm = "backbone.res3.1.conv2.norm.bias"
    for change, message in (
        (lambda s: s.pop(norm), rf"missing: {norm} \(1\)"),
        (lambda s: s.update({norm: torch.zeros(3)}), rf"wrong shape: {norm} \[3\], expected \[4\]"),
        (lambda s: s.update({"backbone.res6.weight": torch.zeros(3)}), r"unexpected: backbone.res6.weight \(1\)"),
        (lambda s: s.update({"backbone.stem.conv2.weight": torch.zeros(3)}), "a stem of three convolutions"),
        (lambda s: s.pop("sem_seg_head.predictor.query_embed.weight"), "no stem or no queries"),
    ):
        state = official_state(model, STAGES)
        change(state)
        torch.save({"model": state}, path)
        with pytest.raises(CheckpointError, match=message):
            load_official_maskformer(path)
