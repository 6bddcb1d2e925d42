"""Methods by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from zs3fast.utils.options import did_you_mean

if TYPE_CHECKING:
    from zs3fast.models.base import ZeroShotModel

_FAMILY = ("clearclip", "naclip", "rcs", "sclip", "scclip")  # one model with another attention
_METHOD_FILES = {name: name for name in ("clip_rc", "clsclip", "maft", "maskclip", "tagclip", "zegclip")}
_METHOD_FILES |= dict.fromkeys(_FAMILY, "training_free")
_models: dict[str, type[ZeroShotModel]] = {}

Model = TypeVar("Model", bound="ZeroShotModel")


def register_model(method: str) -> Callable[[type[Model]], type[Model]]:
    """Class decorator: the model answers to `create_model(method)`."""

    def add(model: type[Model]) -> type[Model]:
        model.method = method
        _models[method] = model
        return model

    return add


def list_models() -> list[str]:
    """Names that `create_model` knows, sorted."""
    return sorted(_METHOD_FILES)


def create_model(method: str, **options: Any) -> ZeroShotModel:
    """A new model of a method.

    Args:
        method: one of `list_models()`.
        options: sizes and settings, the same for all methods: clip="ViT-B-16", pretrained=None (an open_clip tag, a
            path or None), num_prompts=10, image_size=512, seen=[...], num_classes=20; a method's own are in its class.
    Raises:
        ValueError, TypeError: unknown method, unknown option, or an option out of range.
    """
    return model_class(method)(**options)


def model_class(method: str) -> type[ZeroShotModel]:
    """The class of a method, whose attributes say what it can do; see `zs3fast.models.base.ZeroShotModel`."""
    if method not in _METHOD_FILES:
        raise ValueError(
            f"method: expected one of {', '.join(list_models())}, got {method!r}{did_you_mean(method, _METHOD_FILES)}"
        )
    importlib.import_module(f"zs3fast.models.{_METHOD_FILES[method]}")
    return _models[method]
