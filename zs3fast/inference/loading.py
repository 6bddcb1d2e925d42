"""Where a Segmenter's model comes from: a weight file, a name, or CLIP's own weights for methods without training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zs3fast import weights
from zs3fast.models.base import ZeroShotModel
from zs3fast.models.registry import create_model, list_models, model_class
from zs3fast.text import cache_dir
from zs3fast.utils.checkpoint_io import read_metadata, read_state_dict
from zs3fast.utils.options import one_of
from zs3fast.weights.files import METADATA_KEY, TEXT_PREFIX
from zs3fast.weights.official_maft import text_tower
from zs3fast.weights.packing import bundled, packed_models

if TYPE_CHECKING:
    from zs3fast.text import TextEncoder

TINY, TINY_DEFAULT = "zs3fast-tiny", "clip_rc"  # the small models in the package, and the best of them

_GRAPHS = (".onnx", ".xml", ".pt2")  # as `zs3fast export` writes them

# What segments where nothing is named: no training, OpenAI's CLIP.
DEFAULT_METHOD, DEFAULT_CLIP, DEFAULT_PRETRAINED = "scclip", "ViT-B-16", "openai"


def from_clip(
    method: str | None = None,
    clip: str | dict[str, Any] | None = None,
    pretrained: str | None = None,
    *,
    untrained: bool = False,
    quick_gelu: bool | None = None,
    **options: Any,
) -> ZeroShotModel:
    """A model of CLIP's weights alone, or with `untrained` of random ones.

    Args:
        method: None: the default, which needs no training.  clip: open_clip name or configuration; None: ViT-B-16.
        pretrained: an open_clip tag or a file. None: OpenAI's.
        untrained: random weights where CLIP's do not make a whole model: a decoder's, and without `pretrained` all.
        options: of the method.
    Raises:
        ValueError: a method whose decoder is trained, without `untrained`; weights that cannot be had.
    """
    if method is None:
        method = "maskclip" if "attention" in options else DEFAULT_METHOD  # which has an attention of its own
    one_of("method", method, list_models())
    clip = DEFAULT_CLIP if clip is None else clip
    if untrained:
        return create_model(method, clip=clip, pretrained=pretrained, quick_gelu=quick_gelu, **options)
    if not model_class(method).training_free:
        raise ValueError(
            f"{method} learns from masks, and no weights of it are given: give --weights (Segmenter.from_pretrained), "
            "a method without training, or --untrained to see that its parts work"
        )
    pretrained = DEFAULT_PRETRAINED if pretrained is None else pretrained
    return create_model(method, clip=clip, pretrained=pretrained, quick_gelu=quick_gelu, **options)


def find_weights(name_or_path: str | os.PathLike[str]) -> Path:
    """The weight file of a path, of a name in the cache folder, or of a name in the package."""
    path, kept = Path(name_or_path), cache_dir() / "weights"
    if path.is_file():
        if path.suffix in _GRAPHS:
            raise ValueError(
                f"name_or_path: expected weights, got {path}, a graph for another runtime (docs/export.md)"
            )
        return path
    named = kept / f"{os.fspath(name_or_path)}.safetensors"
    if named.is_file():
        return named
    own = {f"{TINY}-{method}": file for method, file in packed_models(bundled()).items()}
    chosen = f"{TINY}-{TINY_DEFAULT}" if os.fspath(name_or_path) == TINY else os.fspath(name_or_path)
    if chosen in own:
        return own[chosen]
    names = ", ".join(sorted(file.stem for file in kept.glob("*.safetensors"))) or "none"
    raise FileNotFoundError(
        f"name_or_path: no file {path}, no such name among the weights in {kept} ({names}), nor in the package "
        f"({', '.join([TINY, *own])}). `zs3fast convert` writes such files from official checkpoints"
    )


def read_weights(
    path: Path, official: dict[str, Any], with_text: bool = True, device: str | torch.device | None = None
) -> tuple[ZeroShotModel, TextEncoder | None]:
    """The model of a weight file, ours or an official checkpoint, and the text tower in it, if there is one.

    Args:
        official: options of `load_official`.  with_text: whether the tower is wanted.  device: where it goes.
    """
    if is_converted(path):
        if official:
            raise ValueError(
                f"official: expected none, as {path} carries its own settings, got {', '.join(sorted(official))}"
            )
        model, extra = weights.load(path)
    else:
        model, extra = read_official(path, **official)
    tower = {key: value for key, value in extra.items() if key.startswith(TEXT_PREFIX)}
    if not tower or not with_text:
        return model, None
    from zs3fast.text import TextEncoder

    encoder = TextEncoder.from_state_dict(tower, name=path.name)
    return model, encoder if device is None else encoder.to(device)


def read_official(path: Path, **options: Any) -> tuple[ZeroShotModel, dict[str, Tensor]]:
    """The model of an official checkpoint, and the text tower in it (empty if it has none); the file is read once."""
    state = read_state_dict(path)
    try:
        model = weights.load_official(state, **options)
    except weights.CheckpointError as error:
        raise weights.CheckpointError(f"{path}: {str(error).removeprefix('checkpoint: ')}") from None
    tower = {key: value for key, value in state.items() if key.startswith(TEXT_PREFIX)}
    return model, tower or text_tower(state, TEXT_PREFIX)


def is_converted(path: Path) -> bool:
    """Whether a weight file is one of ours, with its configuration inside."""
    if path.suffix != ".safetensors":
        return False
    return METADATA_KEY in read_metadata(path)
