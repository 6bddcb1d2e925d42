"""Official checkpoints -> our generator: one table of names, sizes read off the tensors, nothing left over.

The checkpoint's own parts are `backbone`, `sem_seg_head` and `clip_adapter.non_object_embedding`; every tensor of these
must be used. Other parts (CLIP's towers, the loss) are somebody else's. The published layout names `stem`, `res*`,
`pixel_decoder`, `predictor` and `interaction`; the leaves below them follow detectron2 and Mask2Former, whose
conventions are public. They were not compared with a released file: a name that turns out otherwise is one line here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zs3fast.proposals.freeseg.generator import FreeSegGenerator
from zs3fast.proposals.freeseg.resnet import STAGES, fold_norm
from zs3fast.utils.checkpoint_io import compare, read_state_dict, sketch, strict_load, unwrap_state_dict
from zs3fast.utils.errors import CheckpointError

# Our name -> the official one; the first pattern that matches the start of a name replaces it.
_PIXELS = "sem_seg_head.pixel_decoder"
_PREDICTOR = "sem_seg_head.predictor"
_INTERACTION = "sem_seg_head.interaction"
NAMES = (
    (r"non_object_embedding$", "clip_adapter.non_object_embedding"),
    (r"backbone\.", "backbone."),
    (r"pixel_decoder\.level_embed$", f"{_PIXELS}.transformer.level_embed"),
    (r"pixel_decoder\.layers\.", f"{_PIXELS}.transformer.encoder.layers."),
    (r"pixel_decoder\.adapter\.", f"{_PIXELS}.adapter_1."),
    (r"pixel_decoder\.smooth\.", f"{_PIXELS}.layer_1."),
    (r"pixel_decoder\.", f"{_PIXELS}."),
    (r"interaction\.layer_norm_([qk])\.", rf"{_INTERACTION}.layer_norm_\1_1."),
    (r"interaction\.gamma$", f"{_INTERACTION}.gamma"),
    (r"interaction\.", f"{_INTERACTION}.attn."),
    (
        r"decoder\.layers\.(\d+)\.cross_attention\.",
        rf"{_PREDICTOR}.transformer_cross_attention_layers.\1.multihead_attn.",
    ),
    (r"decoder\.layers\.(\d+)\.cross_norm\.", rf"{_PREDICTOR}.transformer_cross_attention_layers.\1.norm."),
    (r"decoder\.layers\.(\d+)\.self_attention\.", rf"{_PREDICTOR}.transformer_self_attention_layers.\1.self_attn."),
    (r"decoder\.layers\.(\d+)\.self_norm\.", rf"{_PREDICTOR}.transformer_self_attention_layers.\1.norm."),
    (r"decoder\.layers\.(\d+)\.ffn_norm\.", rf"{_PREDICTOR}.transformer_ffn_layers.\1.norm."),
    (r"decoder\.layers\.(\d+)\.", rf"{_PREDICTOR}.transformer_ffn_layers.\1."),
    (r"decoder\.norm\.", f"{_PREDICTOR}.decoder_norm."),
    (r"decoder\.", f"{_PREDICTOR}."),
)
NORM = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")  # beside each convolution of the backbone
OWN = re.compile(r"(backbone|sem_seg_head)\.|clip_adapter\.non_object_embedding$")
UNUSED = re.compile(r".*\.num_batches_tracked")  # where the backbone was saved with live batch normalisation


GeneratorWeightsError = CheckpointError  # the name it had here


def load_generator(
    checkpoint: str | os.PathLike[str] | dict[str, Tensor],
    *,
    heads: int = 8,
    groups: int = 32,
    multi_grid: Sequence[int] = (1, 2, 4),
    res5_dilation: int = 1,
) -> FreeSegGenerator:
    """The generator in eval mode and float32, every weight accounted for; see `FreeSegProposer.from_official`."""
    source = "checkpoint" if isinstance(checkpoint, dict) else os.fspath(checkpoint)
    state = _read(checkpoint, source)
    state = {key: value for key, value in state.items() if OWN.match(key) and not UNUSED.fullmatch(key)}
    if not any(key.startswith("sem_seg_head.") for key in state):
        raise GeneratorWeightsError(f"{source}: holds no mask generator (no key starts with 'sem_seg_head.')")
    sizes = read_sizes(state, source, heads, groups)
    sizes["backbone"].update(multi_grid=multi_grid, res5_dilation=res5_dilation)
    expected = official_shapes(sketch(lambda: FreeSegGenerator(**sizes), state.values(), source))
    shaped = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
    compare(shaped, state, source, model="FreeSeg's generator")
    generator = FreeSegGenerator(**sizes)
    strict_load(generator, _converted(generator, {key: value.float() for key, value in state.items()}), source)
    return generator.requires_grad_(False).eval()


def official_name(name: str) -> str:
    """Our parameter name -> the official one of the same tensor."""
    for pattern, official in NAMES:
        if re.match(pattern, name):
            return re.sub("^" + pattern, official, name)
    raise AssertionError(f"no official name for {name!r}")


def official_shapes(generator: FreeSegGenerator) -> dict[str, list[int]]:
    """Every official key the generator is made from, with its shape."""
    shapes = {}
    for name, tensor in generator.state_dict().items():
        official, shape = official_name(name), list(tensor.shape)
        if not name.startswith("backbone."):
            shapes[official] = shape
        elif name.endswith(".weight"):
            shapes[official] = shape
            shapes.update({official.removesuffix("weight") + part: shape[:1] for part in NORM})
    return shapes


def read_sizes(state: dict[str, Tensor], source: str, heads: int, groups: int) -> dict[str, dict[str, Any]]:
    """Arguments of `FreeSegGenerator` read off the shapes of official tensors."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in state:
            raise GeneratorWeightsError(f"{source}: has no {key!r}, which the generator's sizes are read from")
        return tuple(state[key].shape)

    def count(pattern: str) -> int:
        return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)

    blocks = [count(rf"backbone\.{stage}\.(\d+)\.") for stage in STAGES]
    encoder = f"{_PIXELS}.transformer.encoder.layers."
    levels, dim = shape(f"{_PIXELS}.transformer.level_embed")
    mask_dim = shape(f"{_PIXELS}.mask_features.weight")[0]
    class_layers = count(re.escape(_PREDICTOR) + r"\.class_embed\.layers\.(\d+)\.")
    inner, text_dim = shape(f"{_INTERACTION}.attn.k_proj.weight")
    return {
        "backbone": {
            "stem": [shape(f"backbone.stem.conv{index}.weight")[0] for index in (1, 2, 3)],
            "depths": blocks,
            "widths": [shape(f"backbone.{stage}.0.conv1.weight")[0] for stage in STAGES],
            "channels": [shape(f"backbone.{stage}.0.conv3.weight")[0] for stage in STAGES],
        },
        "pixel_decoder": {
            "dim": dim,
            "mask_dim": mask_dim,
            "layers": count(re.escape(encoder) + r"(\d+)\."),
            "heads": heads,
            "points": shape(f"{encoder}0.self_attn.attention_weights.weight")[0] // (heads * levels),
            "ffn_width": shape(f"{encoder}0.linear1.weight")[0],
            "groups": groups,
        },
        "interaction": {"dim": dim, "text_dim": text_dim, "inner": inner, "heads": heads},
        "decoder": {
            "dim": dim,
            "mask_dim": mask_dim,
            "layers": count(re.escape(_PREDICTOR) + r"\.transformer_ffn_layers\.(\d+)\."),
            "heads": heads,
            "queries": shape(f"{_PREDICTOR}.query_feat.weight")[0],
            "ffn_width": shape(f"{_PREDICTOR}.transformer_ffn_layers.0.linear1.weight")[0],
            "class_widths": [
                shape(f"{_PREDICTOR}.class_embed.layers.{index}.weight")[0] for index in range(class_layers)
            ],
            "levels": levels,
        },
    }


def _converted(generator: FreeSegGenerator, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors under our names, the backbone's frozen norms folded into its convolutions."""
    ours = {}
    for name in generator.state_dict():
        official = official_name(name)
        if not name.startswith("backbone."):
            ours[name] = state[official]
        elif name.endswith(".weight"):
            scale, shift, mean, variance = (state[official.removesuffix("weight") + part] for part in NORM)
            ours[name], ours[name.removesuffix("weight") + "bias"] = fold_norm(
                state[official], scale, shift, mean, variance
            )
    return ours


def _read(checkpoint: str | os.PathLike[str] | dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The named tensors of a file or a state dict; never unpickles code."""
    if isinstance(checkpoint, dict):
        return unwrap_state_dict(checkpoint, source)
    return read_state_dict(checkpoint, "checkpoint")
