"""A tiny FreeSeg generator out of other people's modules (timm's ResNet, transformers' Mask2Former), and its weights
under the official names, written down from the published layout: nothing here is taken from the code under test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the proposals extra is not installed")
from timm.models.resnet import Bottleneck, ResNet  # noqa: E402  (timm comes with open_clip)
from transformers.models.mask2former import modeling_mask2former as hf  # noqa: E402

DIM, HEADS, TEXT_DIM, INNER, QUERIES, ENCODER_LAYERS, DECODER_LAYERS = 64, 4, 24, 48, 7, 2, 10
DEPTHS, STEM, WIDTHS = [2, 1, 2, 3], 8, (8, 16, 24, 32)
CHANNELS = [4 * width for width in WIDTHS]
MULTI_GRID = (1, 2, 4)
OPTIONS: dict[str, Any] = {"heads": HEADS}


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights that make every part matter: norms away from 1 and 0, running statistics that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.dim() == 1:
                tensor.copy_(("norm" in name or "bn" in name) * float(name.endswith("weight")) + 0.3 * noise)
            elif "level_embed" in name or "queries" in name:
                tensor.copy_(noise)
            else:
                tensor.copy_(noise * tensor[0].numel() ** -0.5)
    return module.eval()


def resnet(res5_dilation: int = 1) -> nn.Module:
    net = ResNet(Bottleneck, DEPTHS, num_classes=0, stem_width=STEM, stem_type="deep", channels=WIDTHS)
    if res5_dilation > 1:
        net.layer4[0].conv2.stride = net.layer4[0].downsample[0].stride = (1, 1)
    for block, factor in zip(net.layer4, MULTI_GRID):
        block.conv2.dilation = block.conv2.padding = (factor * res5_dilation,) * 2
    return randomise(net, 0)


def resnet_features(net: nn.Module, images: Tensor) -> list[Tensor]:
    x = net.maxpool(net.act1(net.bn1(net.conv1(images))))
    features = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        features.append(x)
    return features


def mask2former_config() -> Any:
    return transformers.Mask2FormerConfig(
        feature_size=DIM,
        mask_feature_size=DIM,
        hidden_dim=DIM,
        encoder_feedforward_dim=40,
        dim_feedforward=56,
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS + 1,
        num_attention_heads=HEADS,
        num_queries=QUERIES,
        dropout=0.0,
    )


def pixel_decoder() -> nn.Module:
    return randomise(hf.Mask2FormerPixelDecoder(mask2former_config(), CHANNELS), 1)


def masked_decoder() -> nn.Module:
    return randomise(hf.Mask2FormerTransformerModule(DIM, mask2former_config()), 2)


class Heads(nn.Module):
    """What Mask2Former has not: the class head and the interaction's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.class_1, self.class_2 = nn.Linear(DIM, 36), nn.Linear(36, TEXT_DIM)
        self.norm_q, self.norm_k = nn.LayerNorm(DIM), nn.LayerNorm(TEXT_DIM)
        self.q, self.k, self.v = nn.Linear(DIM, INNER), nn.Linear(TEXT_DIM, INNER), nn.Linear(TEXT_DIM, INNER)
        self.out = nn.Linear(INNER, DIM)
        self.gamma = nn.Parameter(torch.ones(DIM))
        self.non_object = nn.Parameter(torch.ones(1, TEXT_DIM))


def heads() -> Heads:
    parts = randomise(Heads(), 3)
    parts.non_object.data = class_texts(1, seed=4)
    return parts


def class_texts(count: int, seed: int = 0) -> Tensor:
    """[count, E] that resemble each other, as CLIP's do: class scores are then neither uniform nor one-hot."""
    return 1 + 0.1 * torch.randn(count, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def naive_interaction(parts: Heads, maps: list[Tensor], text: Tensor) -> list[Tensor]:
    """Head by head, pixel projections and all: map' = LN(map) + gamma * out(softmax(q k / sqrt(width)) v)."""
    out = []
    width = INNER // HEADS
    for level in maps:
        text = parts.norm_k(text)  # again and again
        q = parts.norm_q(level.flatten(2).transpose(1, 2))
        queries, keys, values = parts.q(q), parts.k(text), parts.v(text)
        attended = []
        for head in range(HEADS):
            rows = slice(head * width, (head + 1) * width)
            weights = (queries[..., rows] @ keys[:, rows].t() / width**0.5).softmax(-1)
            attended.append(weights @ values[:, rows])
        q = q + parts.gamma * parts.out(torch.cat(attended, dim=-1))
        out.append(q.transpose(1, 2).view_as(level))
    return out


class Oracle(nn.Module):
    """All parts, in the order of the method."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet, self.pixels, self.decoder, self.heads = resnet(), pixel_decoder(), masked_decoder(), heads()

    @torch.no_grad()
    def forward(self, images: Tensor, text: Tensor, interact: bool = True) -> tuple[Tensor, Tensor]:
        text = torch.cat([F.normalize(text, dim=-1), F.normalize(self.heads.non_object, dim=-1)])
        out = self.pixels(resnet_features(self.resnet, images))
        maps = [*out.multi_scale_features, out.mask_features]
        if interact:
            maps = naive_interaction(self.heads, maps, text)
        decoded = self.decoder(maps[:-1], maps[-1])
        embeddings = self.heads.class_2(
            self.heads.class_1(decoded.intermediate_hidden_states[-1].transpose(0, 1)).relu()
        )
        scores = (100 * F.cosine_similarity(embeddings[:, :, None], text[None, None], dim=-1)).softmax(-1)
        return decoded.masks_queries_logits[-1], scores


def official_state(oracle: Oracle) -> dict[str, Tensor]:
    """The weights as a detectron2 checkpoint names them, other parts of MAFT's checkpoints included."""
    state: dict[str, Tensor] = {}
    _add_resnet(state, oracle.resnet)
    _add_pixel_decoder(state, oracle.pixels)
    _add_decoder(state, oracle.decoder)
    _add_heads(state, oracle.heads)
    state["criterion.empty_weight"] = torch.ones(3)
    state["clip_adapter.pixel_mean"] = torch.zeros(3, 1, 1)
    state["clip_adapter.clip_model.logit_scale"] = torch.ones(())
    for tower in ("IPCLIP", "T", "clip_adapter.clip_model.visual"):
        state[f"{tower}.class_embedding"] = torch.zeros(4)
    return {key: value.detach().clone() for key, value in state.items()}


def _put(state: dict[str, Tensor], name: str, module: nn.Module) -> None:
    for part, tensor in module.state_dict().items():
        state[f"{name}.{part}"] = tensor


def _add_conv(state: dict[str, Tensor], name: str, conv: nn.Module, norm: nn.Module) -> None:
    state[f"{name}.weight"] = conv.weight
    for part in ("weight", "bias", "running_mean", "running_var"):
        state[f"{name}.norm.{part}"] = getattr(norm, part)


def _add_resnet(state: dict[str, Tensor], net: nn.Module) -> None:
    _add_conv(state, "backbone.stem.conv1", net.conv1[0], net.conv1[1])
    _add_conv(state, "backbone.stem.conv2", net.conv1[3], net.conv1[4])
    _add_conv(state, "backbone.stem.conv3", net.conv1[6], net.bn1)
    for stage, layer in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=2):
        for index, block in enumerate(layer):
            name = f"backbone.res{stage}.{index}"
            for number in (1, 2, 3):
                _add_conv(state, f"{name}.conv{number}", getattr(block, f"conv{number}"), getattr(block, f"bn{number}"))
            if block.downsample is not None:
                _add_conv(state, f"{name}.shortcut", block.downsample[0], block.downsample[1])


def _add_pixel_decoder(state: dict[str, Tensor], decoder: nn.Module) -> None:
    base = "sem_seg_head.pixel_decoder"
    _put(state, f"{base}.input_proj", decoder.input_projections)
    state[f"{base}.transformer.level_embed"] = decoder.level_embed
    for index, layer in enumerate(decoder.encoder.layers):
        name = f"{base}.transformer.encoder.layers.{index}"
        _put(state, f"{name}.self_attn", layer.self_attn)
        for official, theirs in (
            ("norm1", layer.self_attn_layer_norm),
            ("linear1", layer.fc1),
            ("linear2", layer.fc2),
            ("norm2", layer.final_layer_norm),
        ):
            _put(state, f"{name}.{official}", theirs)
    _put(state, f"{base}.mask_features", decoder.mask_projection)
    for name in ("adapter_1", "layer_1"):
        state[f"{base}.{name}.weight"] = getattr(decoder, name)[0].weight
        _put(state, f"{base}.{name}.norm", getattr(decoder, name)[1])


def _add_decoder(state: dict[str, Tensor], module: nn.Module) -> None:
    base = "sem_seg_head.predictor"
    for index, layer in enumerate(module.decoder.layers):
        cross = f"{base}.transformer_cross_attention_layers.{index}"
        own = f"{base}.transformer_self_attention_layers.{index}"
        ffn = f"{base}.transformer_ffn_layers.{index}"
        _put(state, f"{cross}.multihead_attn", layer.cross_attn)
        _put(state, f"{cross}.norm", layer.cross_attn_layer_norm)
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        state[f"{own}.self_attn.in_proj_weight"] = torch.cat([part.weight for part in projections])
        state[f"{own}.self_attn.in_proj_bias"] = torch.cat([part.bias for part in projections])
        _put(state, f"{own}.self_attn.out_proj", attention.out_proj)
        _put(state, f"{own}.norm", layer.self_attn_layer_norm)
        _put(state, f"{ffn}.linear1", layer.fc1)
        _put(state, f"{ffn}.linear2", layer.fc2)
        _put(state, f"{ffn}.norm", layer.final_layer_norm)
    _put(state, f"{base}.decoder_norm", module.decoder.layernorm)
    state[f"{base}.query_feat.weight"] = module.queries_features.weight
    state[f"{base}.query_embed.weight"] = module.queries_embedder.weight
    state[f"{base}.level_embed.weight"] = module.level_embed.weight
    for index, block in enumerate(module.decoder.mask_predictor.mask_embedder.layers):
        _put(state, f"{base}.mask_embed.layers.{index}", block.layers[0])


def _add_heads(state: dict[str, Tensor], parts: Heads) -> None:
    _put(state, "sem_seg_head.predictor.class_embed.layers.0", parts.class_1)
    _put(state, "sem_seg_head.predictor.class_embed.layers.1", parts.class_2)
    base = "sem_seg_head.interaction"
    state[f"{base}.gamma"] = parts.gamma
    _put(state, f"{base}.layer_norm_q_1", parts.norm_q)
    _put(state, f"{base}.layer_norm_k_1", parts.norm_k)
    for letter in ("q", "k", "v", "out"):
        _put(state, f"{base}.attn.{letter}_proj", getattr(parts, letter))
    state["clip_adapter.non_object_embedding"] = parts.non_object
