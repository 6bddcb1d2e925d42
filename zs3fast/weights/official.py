"""Official checkpoints -> our models, with sizes read off the tensors."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from zs3fast.models.base import ZeroShotModel
from zs3fast.models.registry import create_model
from zs3fast.utils.checkpoint_io import compare, read_state_dict, report, sketch, strict_load, unwrap_state_dict
from zs3fast.utils.errors import CheckpointError
from zs3fast.weights import official_maft

logger = logging.getLogger("zs3fast")

_VIT_B_16 = (768, 12, 12, 16, 512, 3072)  # width, layers, heads, patch, joint width, MLP width
Shape = Callable[[str], tuple[int, ...]]  # of the tensor under an official key


@dataclass(frozen=True)
class _Layout:
    """What the official checkpoints of a method look like.

    signature: of a key that they alone hold.  key: our parameter name -> theirs.
    decoder: prefix of the decoder's layers; None: they hold an image tower alone.
    options: the method's own options of `create_model`, read off the shapes and the keys, given the shared ones.
    unused: of keys that the forward pass never uses; None: it depends on the layer, see `_dead`.
    """

    signature: str
    key: Callable[[str], str]
    decoder: str | None = None
    options: Callable[[Shape, dict[str, Tensor], dict[str, Any]], dict[str, Any]] | None = None
    unused: str | None = None


def detect_method(keys: Sequence[str]) -> str | None:
    """The method whose official checkpoints have such keys, or None."""
    for method, layout in _LAYOUTS.items():
        if any(re.match(layout.signature, key) for key in keys):
            return method
    return None


def load_official(
    checkpoint: str | os.PathLike[str] | dict[str, Tensor],
    method: str | None = None,
    *,
    seen: Sequence[int] | None = None,
    num_classes: int | None = None,
    heads: int | None = None,
    decoder_heads: int = 8,
    image_size: int | None = None,
    start_layer: int = 8,
    **options: Any,
) -> ZeroShotModel:
    """A model in eval mode with the weights, and the meaning, of an official checkpoint.

    Args:
        checkpoint: a torch or safetensors file, or a state dict with official keys.
        method: "zegclip", "tagclip", "clip_rc" or "maft"; None reads it off the keys.
        seen, num_classes: the training vocabulary; they are not in the weights. Self-trained checkpoints want
            `seen_offset=0` as well.
        heads: attention heads of the encoder; None: width / 64.  decoder_heads: of the decoder.
        image_size: the side masks are upsampled to; None: the one the position table was stored for. MAFT: the side
            images are squashed to; None: 480.
        start_layer: MAFT's first masked layer; the other methods have none.
        options: further settings of the method, such as `seen_offset` or `trusty_weighting`.
    Raises:
        CheckpointError: unreadable, of another method, or with missing, surplus or misshapen weights (all named).
            Keys the official forward pass never uses are dropped; `text_encoder.*` is not the model's.
    """
    if isinstance(checkpoint, dict):
        source, state = "checkpoint", unwrap_state_dict(checkpoint, "checkpoint")
    else:
        source, state = os.fspath(checkpoint), read_state_dict(checkpoint)
    found = detect_method(list(state))
    if found is None:
        raise CheckpointError(
            f"{source}: no official checkpoint of a known method; its keys start with {sorted(state)[:3]}"
        )
    if method is not None and method != found:
        raise CheckpointError(f"{source}: expected weights of {method!r}, got those of {found!r}")
    vocabulary = {"seen": seen, "num_classes": num_classes, **options}
    if _LAYOUTS[found].decoder is None:
        tower = _tower_sizes(found, state, source, heads, "IPCLIP.")
        vocabulary.update(start_layer=start_layer, image_size=image_size or 480)
        build = partial(create_model, found, clip=tower["clip"], quick_gelu=True, **vocabulary)
        return _load(build, state, source, official_maft.is_other_part)
    sizes = _sizes(found, state, source, heads)
    if image_size is not None and image_size != sizes["image_size"]:
        logger.info("%s: trained at %d pixels, masks go to %d", source, sizes["image_size"], image_size)
    build = partial(create_model, found, **{**sizes, "decoder_heads": decoder_heads, **vocabulary})
    model = _load(build, state, source, lambda key: _dead(found, key, sizes))
    model.image_size = image_size or sizes["image_size"]
    return model


def _load(
    build: Callable[[], ZeroShotModel], state: dict[str, Tensor], source: str, dead: Callable[[str], bool]
) -> ZeroShotModel:
    """Every weight of the model from its official key; keys that are neither used nor `dead` are an error."""
    plan = sketch(build, state.values(), source)
    names = official_keys(plan)
    used = set(names.values())
    missing = [official for official in names.values() if official not in state]
    surplus = [key for key in state if key not in used and not dead(key)]
    if missing or surplus:
        raise CheckpointError(report(source, sorted(missing), sorted(surplus), []))
    ours = {name: state[official] for name, official in names.items()}
    compare(plan.state_dict(), ours, source)
    model = build()
    strict_load(model, ours, source)
    return model.eval()


def official_keys(model: ZeroShotModel) -> dict[str, str]:
    """Our parameter names -> the official ones of the same tensors."""
    return {name: _LAYOUTS[model.method].key(name) for name in model.state_dict()}


def _zegclip_key(name: str) -> str:
    room, _, rest = name.partition(".")
    return {
        "encoder": f"backbone.{rest}",
        "descriptor": f"decode_head.{rest}",
        "decoder": f"decode_head.decoder_1.{rest}",
    }[room]


def _tagclip_key(name: str) -> str:
    if name == "trusty_token":
        return "decode_head.disc_token"
    room, _, rest = name.partition(".")
    if room == "encoder":
        return f"backbone.{rest}"
    if room == "descriptor":
        return f"decode_head.relationship_discriptor.{rest}"  # official spelling
    mixer = re.fullmatch(r"query_mixers\.(\d+)\.(self_attn\..*|norm\.(weight|bias))", rest)
    if mixer:
        rest = f"layers.{mixer[1]}.{mixer[2].replace('norm.', 'norm1.')}"
    return f"decode_head.decoder.{rest}"


def _clip_rc_key(name: str) -> str:
    room, _, rest = name.partition(".")
    prefixes = {"encoder": "backbone.", "recovery": "decode_head.recovery_decoder."}
    return prefixes.get(room, "decode_head.") + rest


def _dead(method: str, key: str, sizes: dict[str, Any]) -> bool:
    """Whether the official forward pass never uses this tensor (or it is the text tower's)."""
    if key.startswith("text_encoder.") or key == "decode_head.loss_decode.criterion.empty_weight":
        return True
    layout = _LAYOUTS[method]
    if layout.unused is not None:
        return re.fullmatch(layout.unused, key) is not None
    layer = re.fullmatch(re.escape(layout.decoder or "") + r"layers\.(\d+)\.(\w+)\.(.+)", key)
    if not layer:
        return False
    index, part, rest = int(layer[1]), layer[2], layer[3]
    letters = sizes["layout"].split("_") if "layout" in sizes else ["n"] * sizes["decoder_layers"]
    if part in ("self_attn", "norm1"):
        return letters[index] == "n"
    last = index == len(letters) - 1
    return last and (part in ("linear1", "linear2", "norm2", "norm3") or rest.startswith(("v.", "proj.")))


def _tower_sizes(method: str, state: dict[str, Tensor], source: str, heads: int | None, prefix: str) -> dict[str, Any]:
    """open_clip name or configuration and image size of a ViT whose keys start with `prefix`."""

    def shape(key: str) -> tuple[int, ...]:
        return _shape(method, state, source, prefix + key)

    width, _, patch_size, _ = shape("conv1.weight")
    layers = _count(state, re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    embed_dim = shape("proj")[1]
    mlp_width = shape("transformer.resblocks.0.mlp.c_fc.weight")[0]
    grid = math.isqrt(shape("positional_embedding")[0] - 1)
    heads = heads or max(width // 64, 1)
    if width % heads:
        raise ValueError(f"heads: expected a divisor of the encoder's width {width}, got {heads}")
    name = _clip_name(width, layers, heads, patch_size, embed_dim, mlp_width, grid)
    return {"clip": name, "image_size": grid * patch_size, "embed_dim": embed_dim}


def _sizes(method: str, state: dict[str, Tensor], source: str, heads: int | None) -> dict[str, Any]:
    """Options of `create_model` read off the shapes."""
    tower = _tower_sizes(method, state, source, heads, "backbone.")
    del tower["embed_dim"]

    def shape(key: str) -> tuple[int, ...]:
        return _shape(method, state, source, key)

    deep = state.get("backbone.deep_prompt_embeddings")
    shallow = state.get("backbone.prompt_embeddings")
    prompts = shallow if deep is None else deep
    if prompts is None:
        raise CheckpointError(f"{source}: {_described(method)} has no prompt embeddings")
    depth = 0 if deep is None else deep.shape[0] * (-1 if shallow is None else 1)
    layout = _LAYOUTS[method]
    decoder = layout.decoder or ""
    sizes: dict[str, Any] = {
        **tower,
        "quick_gelu": True,
        "num_prompts": prompts.shape[1],
        "prompt_depth": depth,
        "decoder_width": shape(decoder + "layers.0.linear1.weight")[0],
        "decoder_layers": _count(state, re.escape(decoder) + r"layers\.(\d+)\."),
    }
    return sizes if layout.options is None else layout.options(shape, state, sizes)


def _clip_rc_options(shape: Shape, state: dict[str, Tensor], shared: dict[str, Any]) -> dict[str, Any]:
    recovery = _count(state, r"decode_head\.recovery_decoder\.decouple_q\.(\d+)\.")
    dim = shape("backbone.proj")[1]
    return {
        **{name: value for name, value in shared.items() if name != "prompt_depth"},
        "regions": shape("backbone.region_level_bridge")[0],
        "recovery_layers": recovery if "decode_head.recovery_decoder.linear_q_in.weight" in state else None,
        **_alignment(shape("decode_head.lateral_proj.weight"), dim),
    }


def _tagclip_options(shape: Shape, state: dict[str, Tensor], shared: dict[str, Any]) -> dict[str, Any]:
    layers = range(shared["decoder_layers"])
    mixed = [f"decode_head.decoder.layers.{i}.self_attn.in_proj_weight" in state for i in layers]
    return {
        **{name: value for name, value in shared.items() if name != "decoder_layers"},
        "layout": "_".join("a" if one else "n" for one in mixed),
        "trusty_token": "decode_head.disc_token" in state,
    }


# Tried in this order.
_LAYOUTS = {
    "maft": _Layout(signature=r"^(IPCLIP\.|clip_adapter\.)", key=official_maft.maft_key),
    "clip_rc": _Layout(
        signature=r"^(backbone\.region_level_bridge|decode_head\.decoder_q\.)",
        key=_clip_rc_key,
        decoder="decode_head.decoder_q.",
        options=_clip_rc_options,
        # every layer is live but for its self-attention; Jittor saves its mask too
        unused=r"decode_head\..*\.(self_attn\..*|norm1\.(weight|bias))|.*\.attn_mask",
    ),
    "tagclip": _Layout(
        signature=r"^decode_head\.(relationship_discriptor|decoder\.layers)\.",
        key=_tagclip_key,
        decoder="decode_head.decoder.",
        options=_tagclip_options,
    ),
    "zegclip": _Layout(
        signature=r"^decode_head\.(decoder_1\.layers|q_proj)\.",
        key=_zegclip_key,
        decoder="decode_head.decoder_1.",
    ),
}


def _alignment(shape: tuple[int, ...], dim: int) -> dict[str, str]:
    """Which tokens join the patches, where the width of the projection tells; one of two is told by an option."""
    known = {1: "none", 3: "region_global"}
    parts = shape[1] // dim
    return {"alignment": known[parts]} if parts in known else {}


def _shape(method: str, state: dict[str, Tensor], source: str, key: str) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"{source}: {_described(method)} has no {key!r}, which its sizes are read from")
    return tuple(state[key].shape)


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def _clip_name(
    width: int, layers: int, heads: int, patch_size: int, embed_dim: int, mlp_width: int, grid: int
) -> str | dict[str, Any]:
    """open_clip's name where the sizes are those of ViT-B-16 (whose tokenizer and text tower then fit), else a dict."""
    vision = {
        "width": width,
        "layers": layers,
        "head_width": width // heads,
        "patch_size": patch_size,
        "image_size": grid * patch_size,
        "mlp_ratio": mlp_width / width,
    }
    if (width, layers, heads, patch_size, embed_dim, mlp_width) == _VIT_B_16:
        return "ViT-B-16"
    return {"embed_dim": embed_dim, "vision_cfg": vision, "quick_gelu": True}


def _described(method: str) -> str:
    return f"this {method} checkpoint"
