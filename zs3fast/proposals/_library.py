"""The transformers library behind one door: imported late, its errors told in our words."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

INSTALL = "pip install 'zs3fast[proposals]'"


def transformers() -> ModuleType:
    """The library, or an ImportError that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"this proposer needs the transformers library: {INSTALL} ({error})") from None
    return transformers


def load(model_class: str, name: str, model_types: tuple[str, ...] | None) -> nn.Module:
    """A pretrained model in eval mode, every weight accounted for.

    Args:
        model_class: name of a class of transformers.
        name: a repository of huggingface.co or a local folder.
        model_types: `model_type`s of the configuration that are accepted; None: any.
    Raises:
        ValueError: weights that are absent, of another architecture, or incomplete. ImportError: a missing library.
    """
    library = transformers()
    with _told(name):
        config = library.AutoConfig.from_pretrained(name)
    if model_types is not None and config.model_type not in model_types:
        raise ValueError(f"weights: expected {' or '.join(model_types)}, got {name!r}, a {config.model_type} model")
    with _told(name):
        model, report = getattr(library, model_class).from_pretrained(name, output_loading_info=True)
    parameters = {key for key, _ in model.named_parameters()}
    missing = sorted(parameters & set(report["missing_keys"]))
    shapes = sorted(str(item[0]) for item in report["mismatched_keys"])
    if missing or shapes:
        raise ValueError(
            f"weights: {name!r} does not fit {model_class}; missing: {', '.join(missing[:5]) or 'none'} "
            f"({len(missing)}), wrong shape: {', '.join(shapes[:5]) or 'none'} ({len(shapes)})"
        )
    out: nn.Module = model.float().eval()  # checkpoints of half precision too
    return out


def load_backbone(name: str) -> nn.Module:
    """The image backbone of a pretrained classifier (ResNet, Swin, ...), giving the maps of all four of its stages.

    Raises:
        ValueError: weights that are absent or are no backbone's. ImportError: a missing library.
    """
    library = transformers()
    with _told(name):
        config = library.AutoConfig.from_pretrained(name, out_features=[f"stage{number}" for number in range(1, 5)])
        kind = type(library.AutoBackbone.from_config(config))  # its own `from_pretrained` takes no folder
        model, report = kind.from_pretrained(name, config=config, output_loading_info=True)
    parameters = {key for key, _ in model.named_parameters() if "hidden_states_norms" not in key}  # of no classifier
    missing = sorted(parameters & set(report["missing_keys"]))
    if missing:
        raise ValueError(f"weights: {name!r} has no weights for {', '.join(missing[:5])} ({len(missing)} in all)")
    out: nn.Module = model.float()
    return out


def load_processor(name: str) -> Any:
    """The image processor that belongs to a checkpoint; a ValueError where it has none."""
    library = transformers()
    with _told(name, "preprocessor_config.json"):
        return library.AutoImageProcessor.from_pretrained(name)


def normalisation(name: str) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` for pixels in 0..255 that a checkpoint records; nothing where it records none."""
    library = transformers()
    try:
        with _told(name):
            recorded, _ = library.ImageProcessingMixin.get_image_processor_dict(name)
    except ValueError:  # the model came without a processor
        return {}
    keys = {"mean": "image_mean", "std": "image_std"}
    return {ours: tuple(255 * value for value in recorded[key]) for ours, key in keys.items() if recorded.get(key)}


@contextmanager
def _told(name: str, what: str = "config.json and model.safetensors") -> Iterator[None]:
    """Quiet hub and library loggers; their errors become one ValueError that says what to do."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("huggingface_hub", "transformers"))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)  # the hub announces each of its retries
    try:
        yield
    except ImportError as error:  # a model class that leans on another library
        reason = " ".join(str(error).split())
        raise ImportError(f"weights: {name!r} needs a library that is not installed: {INSTALL} ({reason})") from None
    except Exception as error:  # the hub, the network, safetensors and pickle each raise their own
        raise ValueError(_no_weights(name, what, error)) from None
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _no_weights(name: str, what: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    if os.path.isdir(name):
        return f"weights: the folder {name!r} does not hold readable weights, expected {what} in it. Reason: {reason}"
    if os.path.isabs(name) or name.startswith("."):
        return f"weights: no folder {name!r}; expected one with {what}, or a repository of huggingface.co"
    return (
        f"weights: {name!r} is not on this machine and could not be fetched. Run once with network access (it comes "
        f"from huggingface.co/{name} and stays in the hub's cache), or download that repository elsewhere "
        f"(`hf download {name} --local-dir FOLDER`) and pass FOLDER in its place. Reason: {reason}"
    )
