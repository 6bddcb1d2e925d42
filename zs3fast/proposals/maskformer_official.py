"""detectron2's MaskFormer checkpoints (ZegFormer's and ZSSeg's generators are such) in transformers' MaskFormer.

Masks alone are taken: what these methods put in place of class scores (cosines with text) is none of MaskFormer's.
Key names are those of transformers' own conversion; no released file could be had to try this on.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from zs3fast.proposals._library import transformers
from zs3fast.utils.checkpoint_io import read_state_dict
from zs3fast.utils.errors import CheckpointError

logger = logging.getLogger("zs3fast")

_PIXEL, _QUERIES = "model.pixel_level_module", "model.transformer_module"
_NORM = ("weight", "bias", "running_mean", "running_var")
# What is read, and must be known to the last tensor (a pixel decoder with a transformer is another network); all else
# of a checkpoint (class heads, CLIP, the criterion) has no place in a generator of masks.
_READ = re.compile(
    r"backbone\.|sem_seg_head\.(?!predictor\.)|"
    r"sem_seg_head\.predictor\.(transformer|query_embed|input_proj|mask_embed)\."
)


def load_official_maskformer(path: str | os.PathLike[str], *, heads: int = 8) -> nn.Module:
    """transformers' MaskFormerForInstanceSegmentation with the weights of a detectron2 checkpoint, in eval mode.

    Sizes and depths are read off the tensors. Its class scores mean nothing.

    Args:
        path: a torch file, its tensors under "model" or not.
        heads: of the decoder, which the tensors do not tell.
    Raises:
        CheckpointError: missing, unexpected or misshapen weights, all named; a stem of three convolutions (R101c),
            which transformers' ResNet does not have.
    """
    given = read_state_dict(path)
    read = [name for name in given if _READ.match(name)]
    state: dict[str, Tensor] = {}
    unexpected = []
    for name in read:
        plain = name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")
        if plain in state:  # with the prefix and without
            unexpected.append(name)
        elif not plain.endswith("num_batches_tracked"):
            state[plain] = given[name]
    if "backbone.stem.conv2.weight" in state:
        raise CheckpointError(f"{path}: a stem of three convolutions (R50c, R101c), expected ResNet's own of one")
    if "backbone.stem.conv1.weight" not in state or "sem_seg_head.predictor.query_embed.weight" not in state:
        raise CheckpointError(f"{path} is no MaskFormer with a ResNet of detectron2: no stem or no queries in it")
    model = _model(state, heads, str(path))
    own = model.state_dict()
    renamed: dict[str, Tensor] = {}
    missing, shapes = [], []
    pairs = list(key_pairs(state, len(list(_layers(state)))))
    for official, names, part in pairs:
        name = next((name for name in names if name in own), names[0])
        if official not in state:
            missing.append(official)
            continue
        tensor = state[official]
        if name in own:
            wanted = list(own[name].shape)
            wanted[0] *= 1 if part is None else 3  # queries, keys and values are packed
            if list(tensor.shape) != wanted:
                shapes += [f"{official} {list(tensor.shape)}, expected {wanted}"] if not part else []
                renamed[name] = own[name]
                continue
        renamed[name] = tensor if part is None else tensor.chunk(3)[part]
    unexpected += sorted(state.keys() - {official for official, _, _ in pairs}) + sorted(renamed.keys() - own.keys())
    left = [name for name in own if name not in renamed and not name.endswith("num_batches_tracked")]
    left = [name for name in left if not name.startswith(("class_predictor.", "criterion."))]
    if missing or shapes or left or unexpected:
        wrong = {"missing": missing or left, "wrong shape": shapes, "unexpected": unexpected}
        said = "; ".join(f"{what}: {', '.join(names[:5])} ({len(names)})" for what, names in wrong.items() if names)
        raise CheckpointError(f"{path} does not fit MaskFormer; {said}")
    model.load_state_dict(renamed, strict=False)
    spare = len(given) - len(read)
    if spare:
        logger.info("%s: %d tensors beside the generator's are left out (class head, CLIP, criterion)", path, spare)
    whole: nn.Module = model.float().eval()
    return whole


def _layers(state: dict[str, Tensor]) -> Iterator[int]:
    """Indices of the decoder's layers."""
    index = 0
    while f"sem_seg_head.predictor.transformer.decoder.layers.{index}.linear1.weight" in state:
        yield index
        index += 1


def _depths(state: dict[str, Tensor]) -> list[int]:
    """Blocks of res2 to res5."""
    depths = []
    for stage in range(2, 6):
        blocks = {int(m[1]) for name in state if (m := re.match(rf"backbone\.res{stage}\.(\d+)\.", name))}
        depths.append(len(blocks))
    return depths


def _model(state: dict[str, Tensor], heads: int, source: str) -> Any:
    """A fresh model of the checkpoint's sizes."""
    library = transformers()
    wanted = [f"backbone.res{stage}.0.conv3.weight" for stage in range(2, 6)]
    wanted += ["sem_seg_head.layer_4.weight", "sem_seg_head.mask_features.weight"]
    wanted += ["sem_seg_head.predictor.transformer.decoder.layers.0.linear1.weight"]
    absent = [name for name in wanted if name not in state]
    if absent:
        raise CheckpointError(f"{source} does not fit MaskFormer; missing: {', '.join(absent)}")
    rows = ["sem_seg_head.predictor.query_embed.weight", wanted[6]]
    for name in ["backbone.stem.conv1.weight", *wanted[:6], *rows]:
        dims = 2 if name in rows else 4
        if state[name].dim() != dims:
            shape = list(state[name].shape)
            raise CheckpointError(
                f"{source} does not fit MaskFormer; wrong shape: {name} {shape}, expected {dims} dimensions"
            )
    backbone = library.ResNetConfig(
        embedding_size=len(state["backbone.stem.conv1.weight"]),
        hidden_sizes=[len(state[name]) for name in wanted[:4]],
        depths=_depths(state),
        layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    queries, width = state["sem_seg_head.predictor.query_embed.weight"].shape
    if heads < 1 or width % heads:
        raise ValueError(f"heads: expected a divisor of the decoder's width {width}, got {heads}")
    decoder = library.DetrConfig(
        backbone_config=backbone,
        num_queries=queries,
        d_model=width,
        encoder_layers=0,
        decoder_layers=len(list(_layers(state))),
        decoder_ffn_dim=len(state[wanted[6]]),
        decoder_attention_heads=heads,
    )
    config = library.MaskFormerConfig(
        backbone_config=backbone,
        decoder_config=decoder,
        fpn_feature_size=len(state["sem_seg_head.layer_4.weight"]),
        mask_feature_size=len(state["sem_seg_head.mask_features.weight"]),
        num_labels=1,
    )
    return library.MaskFormerForInstanceSegmentation(config)


def key_pairs(state: dict[str, Tensor], layers: int) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    """(official key, what transformers calls it: by versions, which third of a packed projection) of every weight."""
    yield from _backbone_pairs(state)
    head, fpn = "sem_seg_head", f"{_PIXEL}.decoder.fpn"
    yield f"{head}.layer_4.weight", (f"{fpn}.stem.0.weight",), None
    for end in ("weight", "bias"):
        yield f"{head}.layer_4.norm.{end}", (f"{fpn}.stem.1.{end}",), None
        yield f"{head}.mask_features.{end}", (f"{_PIXEL}.decoder.mask_projection.{end}",), None
        yield f"{head}.predictor.input_proj.{end}", (f"{_QUERIES}.input_projection.{end}",), None
        for index in range(3):
            official = f"{head}.predictor.mask_embed.layers.{index}.{end}"
            yield official, (f"mask_embedder.{index}.0.{end}",), None
    yield f"{head}.predictor.query_embed.weight", (f"{_QUERIES}.queries_embedder.weight",), None
    for source, target in ((3, 0), (2, 1), (1, 2)):
        for ours, theirs in (("adapter", "proj"), ("layer", "block")):
            place = f"{fpn}.layers.{target}.{theirs}"
            yield f"{head}.{ours}_{source}.weight", (f"{place}.0.weight",), None
            for end in ("weight", "bias"):
                yield f"{head}.{ours}_{source}.norm.{end}", (f"{place}.1.{end}",), None
    for layer in range(layers):
        yield from _decoder_pairs(layer)
    for end in ("weight", "bias"):
        yield f"{head}.predictor.transformer.decoder.norm.{end}", (f"{_QUERIES}.decoder.layernorm.{end}",), None


def _backbone_pairs(state: dict[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    encoder = f"{_PIXEL}.encoder"
    yield from _conv("backbone.stem.conv1", f"{encoder}.embedder.embedder")
    for stage, blocks in enumerate(_depths(state)):
        for block in range(blocks):
            official, place = f"backbone.res{stage + 2}.{block}", f"{encoder}.encoder.stages.{stage}.layers.{block}"
            for index in range(3):
                yield from _conv(f"{official}.conv{index + 1}", f"{place}.layer.{index}")
            if f"{official}.shortcut.weight" in state:
                yield from _conv(f"{official}.shortcut", f"{place}.shortcut")


def _conv(official: str, place: str) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    yield f"{official}.weight", (f"{place}.convolution.weight",), None
    for end in _NORM:
        yield f"{official}.norm.{end}", (f"{place}.normalization.{end}",), None


def _decoder_pairs(layer: int) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    official = f"sem_seg_head.predictor.transformer.decoder.layers.{layer}"
    place = f"{_QUERIES}.decoder.layers.{layer}"
    for ours, theirs in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")):
        for end in ("weight", "bias"):
            for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
                yield f"{official}.{ours}.in_proj_{end}", (f"{place}.{theirs}.{name}.{end}",), part
            names = (f"{place}.{theirs}.o_proj.{end}", f"{place}.{theirs}.out_proj.{end}")
            yield f"{official}.{ours}.out_proj.{end}", names, None
    for end in ("weight", "bias"):
        for index in (1, 2):
            yield f"{official}.linear{index}.{end}", (f"{place}.mlp.fc{index}.{end}", f"{place}.fc{index}.{end}"), None
        norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
        for index, name in enumerate(norms):
            yield f"{official}.norm{index + 1}.{end}", (f"{place}.{name}.{end}",), None
