"""Options of generators of the transformers library that train in milliseconds."""

from __future__ import annotations

from typing import Any

SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "drop_path_rate": 0.0,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
DETR = {
    "model_type": "detr",
    "backbone_config": {"model_type": "resnet"},
    "num_queries": 6,
    "decoder_layers": 2,
    "decoder_ffn_dim": 16,
    "decoder_attention_heads": 2,
    "d_model": 16,
    "dropout": 0.0,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "maskformer": {
        "backbone_config": SWIN,
        "decoder_config": DETR,
        "fpn_feature_size": 32,
        "mask_feature_size": 32,
        "use_auxiliary_loss": True,
    },
    "mask2former": {
        "backbone_config": SWIN,
        "feature_size": 32,  # GroupNorm(32)
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 16,
        "dim_feedforward": 16,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "num_attention_heads": 2,
        "num_queries": 6,
        "train_num_points": 64,
    },
}
