"""Real model classes of the transformers library, small enough to run in milliseconds; random weights, no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="the proposals extra is not installed")

WORDS = {0: "N/A", 1: "person", 2: "dining table"}
_DETR = {
    "num_queries": 6,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "d_model": 16,
}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiny_mask2former(**options: Any) -> nn.Module:
    pytest.importorskip("scipy", reason="transformers' Mask2Former needs scipy")
    torch.manual_seed(0)
    config = transformers.Mask2FormerConfig(
        backbone_config=_swin(),
        feature_size=32,  # GroupNorm(32)
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=3,
        **options,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def tiny_maskformer() -> nn.Module:
    pytest.importorskip("scipy", reason="transformers' MaskFormer needs scipy")
    torch.manual_seed(0)
    decoder = transformers.DetrConfig(backbone_config=_resnet(), **_DETR)
    config = transformers.MaskFormerConfig(
        backbone_config=_swin(), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=4
    )
    return transformers.MaskFormerForInstanceSegmentation(config).eval()


def tiny_sam(scale: float = 1.0) -> nn.Module:
    """`scale` spreads the weights of the mask decoder, so that masks and IoU predictions differ from point to point."""
    torch.manual_seed(0)
    vision = transformers.SamVisionConfig(
        hidden_size=16,
        output_channels=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[0],
        num_pos_feats=8,
        initializer_range=0.2,
        mlp_dim=16,
    )
    prompt = transformers.SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16
    )
    config = transformers.SamConfig(
        vision_config=vision.to_dict(), prompt_encoder_config=prompt.to_dict(), mask_decoder_config=decoder.to_dict()
    )
    model = transformers.SamModel(config).eval()
    with torch.no_grad():
        for parameter in model.mask_decoder.parameters():
            parameter.mul_(scale)
    return model


def tiny_detector(kind: str) -> tuple[nn.Module, Any]:
    """A detector and its processor: "detr", "rtdetr" or "yolos"."""
    torch.manual_seed(0)
    shared = {"id2label": WORDS, "label2id": {word: index for index, word in WORDS.items()}}
    edges = {"shortest_edge": 64, "longest_edge": 128}
    if kind == "detr":
        config = transformers.DetrConfig(backbone_config=_resnet(), **_DETR, **shared)
        return _spread(transformers.DetrForObjectDetection(config), 0, 0.5), transformers.DetrImageProcessor(size=edges)
    if kind == "yolos":
        config = transformers.YolosConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=[64, 64],
            patch_size=8,
            num_detection_tokens=4,
            **shared,
        )
        return _spread(transformers.YolosForObjectDetection(config), 2, 0.5), transformers.YolosImageProcessor(
            size=edges
        )
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
        layer_type="basic",
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[8, 8, 8],
        encoder_hidden_dim=16,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=5,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_denoising=0,
        **shared,
    )
    processor = transformers.RTDetrImageProcessor(size={"height": 64, "width": 64})
    return _spread(transformers.RTDetrForObjectDetection(config), 0, 0.2), processor


def _spread(model: nn.Module, seed: int, scale: float) -> nn.Module:
    """Fresh detectors say the same of every query; larger weights tell the queries apart."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * scale)
    return model.eval()


def _swin() -> Any:
    return transformers.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _resnet() -> Any:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
