"""open_clip's configurations and models, with its many failures in words of ours."""

from __future__ import annotations

import difflib
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# open_clip is imported where it is used: it takes seconds and some 200 MB, and a checkpoint's sizes need none of it.


def clip_model_config(clip: str | dict[str, Any], parts: tuple[str, ...] = ("vision_cfg",)) -> dict[str, Any]:
    """The open_clip model configuration (embed_dim, vision_cfg, text_cfg) of a name, or the dict itself.

    Raises:
        ValueError: open_clip has no model of that name (the message lists close ones), or the dict lacks a part.
    """
    if isinstance(clip, dict):
        missing = [key for key in ("embed_dim", *parts) if key not in clip]
        if missing:
            raise ValueError(f"clip: the configuration lacks {', '.join(missing)}, expected those of open_clip")
        return clip
    if not isinstance(clip, str):
        raise TypeError(f"clip: expected an open_clip model name or configuration dict, got {type(clip).__name__}")
    import open_clip

    config = open_clip.get_model_config(clip) if clip in open_clip.list_models() else None
    if config is None:
        close = difflib.get_close_matches(clip, open_clip.list_models(), n=5, cutoff=0.4) or ["ViT-B-16", "ViT-L-14"]
        raise ValueError(f"clip: open_clip has no model {clip!r}; close names: {', '.join(close)}")
    return config


def uses_quick_gelu(clip: str | dict[str, Any], pretrained: str | None) -> bool:
    """The activation of a configuration, or of the tag its weights come from."""
    import open_clip

    config = clip_model_config(clip, ())
    tag = open_clip.get_pretrained_cfg(clip, pretrained) if isinstance(clip, str) and pretrained else {}
    return bool(tag.get("quick_gelu", False)) or bool(config.get("quick_gelu", False))


def create_open_clip(
    clip: str | dict[str, Any], pretrained: str | None, *, quick_gelu: bool | None = None
) -> nn.Module:
    """open_clip's model, its text tower as a module of its own (`.visual`, `.text`).

    Args:
        pretrained: an open_clip tag, a checkpoint file that `torch.load(weights_only=True)` reads, or None.
        quick_gelu: overrides the activation.
    Raises:
        ValueError: weights that cannot be found, fetched or read.
    """
    import open_clip

    config = clip_model_config(clip, ("vision_cfg", "text_cfg"))
    gelu = uses_quick_gelu(clip, pretrained) if quick_gelu is None else quick_gelu
    tag = open_clip.get_pretrained_cfg(clip, pretrained) if isinstance(clip, str) and pretrained else {}
    if pretrained and not tag:
        _check_file(clip, pretrained)
    try:
        with quiet_open_clip():
            if isinstance(clip, dict):
                sizes = {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
                model = open_clip.CustomTextCLIP(**sizes, quick_gelu=gelu)
                if pretrained is not None:
                    open_clip.load_checkpoint(model, pretrained)
                return model
            options = {} if gelu == config.get("quick_gelu", False) else {"quick_gelu": gelu}
            return open_clip.create_model(
                clip, pretrained=pretrained, force_custom_text=True, pretrained_text=False, **options
            )
    except Exception as error:  # the hub, the network and the unpickler each raise their own
        raise ValueError(_no_weights(clip, pretrained, tag, error)) from None


def _check_file(clip: str | dict[str, Any], pretrained: str) -> None:
    import open_clip

    if not os.path.isfile(pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(clip)) if isinstance(clip, str) else "none"
        raise ValueError(
            f"pretrained: {pretrained!r} is neither a file nor a tag; tags of this model: {tags or 'none'}"
        )
    if zipfile.is_zipfile(pretrained):
        with zipfile.ZipFile(pretrained) as archive:
            scripted = any(name.split("/", 1)[-1] == "constants.pkl" for name in archive.namelist())
        if scripted:  # OpenAI's own downloads
            raise ValueError(
                f"pretrained: {pretrained!r} is a TorchScript archive, which holds code and is not loaded; expected a "
                "state dict, or the tag 'openai' for the same weights"
            )


def _no_weights(clip: str | dict[str, Any], pretrained: str | None, tag: dict[str, Any], error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not tag:
        what = clip if isinstance(clip, str) else "this configuration"
        return f"pretrained: open_clip could not read {pretrained!r} as weights of {what}: {reason}"
    hub = tag.get("hf_hub", "").strip("/")
    return (
        f"pretrained: the weights {pretrained!r} of {clip} are not on this machine and could not be fetched. Run once "
        f"with network access (they come from huggingface.co/{hub} and stay in the hub's cache), or download the file "
        f"elsewhere and pass its path. The reason given: {reason}"
    )


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """open_clip and the hub report through logs and warnings what we report in our own words."""
    root, hub = logging.getLogger(), logging.getLogger("huggingface_hub")
    hub_level = hub.level

    def drop(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root.addFilter(drop)
    hub.setLevel(logging.ERROR)  # it announces each of its retries
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="open_clip")
            yield
    finally:
        root.removeFilter(drop)
        hub.setLevel(hub_level)
