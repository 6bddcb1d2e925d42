"""open_clip's configurations and weights, with its many failures in words of ours."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import ssl
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch import Tensor, nn

from zs3fast.utils.checkpoint_io import read_state_dict
from zs3fast.utils.options import close_names
from zs3fast.utils.packed_clip import TINY_CLIP, tiny_clip_state
from zs3fast.utils.torchscript import is_torchscript

downloads = logging.getLogger("zs3fast.downloads")
OPENAI_EXTRAS = {"input_resolution", "context_length", "vocab_size"}  # beside the weights, in OpenAI's state dicts
CHECKPOINT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # in a repository, as open_clip asks

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
    config = _named_config(clip)
    if config is None:
        import open_clip

        names = open_clip.list_models()
        close = close_names(clip, names, 5) or ["ViT-B-16", "ViT-L-14"]
        raise ValueError(f"clip: expected a model of open_clip, such as {', '.join(close)}, got {clip!r}")
    return config


def _named_config(clip: str) -> dict[str, Any] | None:
    """open_clip's configuration of that name; read from its folder where it is not imported, which takes seconds."""
    if "open_clip" in sys.modules:  # a program may have added its own
        import open_clip

        return open_clip.get_model_config(clip) if clip in open_clip.list_models() else None
    spec = importlib.util.find_spec("open_clip")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(place) / "model_configs" / f"{clip}.json"
        if "/" not in clip and file.is_file():
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return config
    return None


def uses_quick_gelu(clip: str | dict[str, Any], pretrained: str | None) -> bool:
    """The activation that weights were trained with: QuickGELU (OpenAI's CLIP) or GELU.

    A configuration or an architecture's name decides where it says QuickGELU ("ViT-B-16-quickgelu"), else the tag. A
    file is recognised by what open_clip knows of it: an `open_clip_config.json` beside it, its place in the hub's
    cache, its digest, or the form of OpenAI's own downloads; else by its architecture, if all its weights are alike.

    Raises:
        ValueError: a file that could be either. A wrong activation would give wrong results without a word.
    """
    config = clip_model_config(clip, ())
    named = bool(config.get("quick_gelu", False))
    if named or pretrained is None or isinstance(clip, dict):
        return named
    import open_clip

    tag = open_clip.get_pretrained_cfg(clip, pretrained)
    if tag:
        return bool(tag.get("quick_gelu", False))
    check_file(clip, pretrained)
    known = _known_file(clip, Path(pretrained))
    if known is None:
        tags = [open_clip.get_pretrained_cfg(clip, name) for name in open_clip.list_pretrained_tags_by_model(clip)]
        if all(bool(one.get("quick_gelu", False)) == named for one in tags):
            return named
        other = f"{clip}-quickgelu"
        way = f"clip={other!r} (--clip {other})" if _named_config(other) else "quick_gelu=True (--quick-gelu)"
        raise ValueError(
            f"pretrained: {pretrained} does not say whether its weights want QuickGELU or GELU, and {clip} has weights "
            f"of both kinds: expected {way} for OpenAI's, or quick_gelu=False (--no-quick-gelu) for LAION's"
        )
    return known


def _known_file(clip: str, path: Path) -> bool | None:
    """Whether the weights of a file want QuickGELU; None where nothing is known of it."""
    beside = path.parent / "open_clip_config.json"
    if beside.is_file():
        with suppress(OSError, ValueError, AttributeError):
            return bool(json.loads(beside.read_text(encoding="utf-8"))["model_cfg"].get("quick_gelu", False))
    if is_torchscript(path):  # only OpenAI has published such
        return True
    import open_clip

    tags = [open_clip.get_pretrained_cfg(clip, name) for name in open_clip.list_pretrained_tags_by_model(clip)]
    folders = {f"models--{tag['hf_hub'].strip('/').replace('/', '--')}": tag for tag in tags if tag.get("hf_hub")}
    for part in path.absolute().parts:
        if part in folders:
            return bool(folders[part].get("quick_gelu", False))
    digests = {digest: tag for tag in tags if (digest := _digest_in(tag.get("url", "")))}
    if path.name in {Path(tag["url"]).name for tag in digests.values()}:  # a name is no proof, its digest is
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)
        for digest, tag in digests.items():
            if found.startswith(digest):
                return bool(tag.get("quick_gelu", False))
    try:
        return True if OPENAI_EXTRAS <= set(_read_checkpoint(path)) else None
    except Exception as error:  # whatever a file that is none makes the unpickler and safetensors raise
        raise ValueError(_no_weights(clip, str(path), {}, error)) from None


def _digest_in(url: str) -> str:
    """The SHA-256 (or its beginning) that a download's address carries, as open_clip reads it."""
    found = re.search(r"/([0-9a-f]{64})/[^/]*$|-([0-9a-f]{8})\.\w+$", url)
    return (found[1] or found[2]) if found else ""


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class ClipState:
    """The weights of a CLIP by open_clip's keys: the image tower's and the text tower's, each without its prefix.

    text: None where the text tower is not CLIP's own (but of transformers, say).
    """

    image: dict[str, Tensor]
    text: dict[str, Tensor] | None


def clip_state(clip: str | dict[str, Any], pretrained: str) -> ClipState:
    """The weights of an open_clip tag or a checkpoint file; nothing is built for a plain CLIP, in memory or time.

    Args:
        pretrained: an open_clip tag, fetched where it is not in the hub's cache; a file: safetensors, what
            `torch.load(weights_only=True)` reads, or a TorchScript archive such as OpenAI's, of which no code is run;
            or "zs3fast-tiny-clip", the one in the package.
    Raises:
        ValueError: weights that cannot be found, fetched or read.
    """
    tag = _tag(clip, pretrained)
    if not tag:
        check_file(clip, pretrained)
    try:
        if pretrained == TINY_CLIP:
            state = tiny_clip_state()
        else:
            state = _read_checkpoint(_fetched(clip, pretrained, tag) if tag else Path(pretrained))
    except Exception as error:  # the hub, the network, zip files and the unpickler each raise their own
        raise ValueError(_no_weights(clip, pretrained, tag, error)) from None
    image = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    plain = {"conv1.weight", "class_embedding"} <= set(image) or "attnpool.c_proj.weight" in image
    if not plain:
        state = create_open_clip(clip, pretrained).state_dict()  # it knows many layouts besides its own
        image = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    text = {
        name.removeprefix("text."): value
        for name, value in state.items()
        if not name.startswith(("visual.", "logit_")) and name not in OPENAI_EXTRAS
    }
    return ClipState(image, text if "token_embedding.weight" in text else None)


def _tag(clip: str | dict[str, Any], pretrained: str | None) -> dict[str, Any]:
    import open_clip

    return dict(open_clip.get_pretrained_cfg(clip, pretrained)) if isinstance(clip, str) and pretrained else {}


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name; no code in it is run."""
    return read_state_dict(path, "pretrained", mapped=True, others=True)


def create_open_clip(
    clip: str | dict[str, Any], pretrained: str | None, *, quick_gelu: bool | None = None
) -> nn.Module:
    """open_clip's model, its text tower as a module of its own (`.visual`, `.text`).

    Args:
        pretrained: an open_clip tag, a checkpoint file that `torch.load(weights_only=True)` reads, "zs3fast-tiny-clip"
            (the one in the package; `clip` is its configuration, as in the settings *_world), or None.
        quick_gelu: overrides the activation.
    Raises:
        ValueError: weights that cannot be found, fetched or read.
    """
    import open_clip
    from open_clip.model import convert_to_custom_text_state_dict

    config = clip_model_config(clip, ("vision_cfg", "text_cfg"))
    gelu = uses_quick_gelu(clip, pretrained) if quick_gelu is None else quick_gelu
    tag = _tag(clip, pretrained)
    if pretrained and not tag:
        check_file(clip, pretrained)
    try:
        with quiet_open_clip():
            if isinstance(clip, dict):
                sizes = {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
                model = open_clip.CustomTextCLIP(**sizes, quick_gelu=gelu)
                if pretrained == TINY_CLIP:
                    model.load_state_dict(convert_to_custom_text_state_dict(tiny_clip_state()))
                elif pretrained is not None:
                    open_clip.load_checkpoint(model, pretrained)
                out: nn.Module = model
                return out
            if tag:
                pretrained = str(_fetched(clip, str(pretrained), tag))
            options = {} if gelu == config.get("quick_gelu", False) else {"quick_gelu": gelu}
            model = open_clip.create_model(
                clip, pretrained=pretrained, force_custom_text=True, pretrained_text=False, **options
            )
            return cast(nn.Module, model)
    except Exception as error:  # the hub, the network and the unpickler each raise their own
        raise ValueError(_no_weights(clip, str(pretrained), tag, error)) from None


def check_file(clip: str | dict[str, Any], pretrained: str) -> None:
    """Raise where `pretrained`, which is no tag of the model, is no file either."""
    import open_clip

    if pretrained == TINY_CLIP and isinstance(clip, dict):
        return
    if not os.path.isfile(pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(clip)) if isinstance(clip, str) else "none"
        raise ValueError(f"pretrained: expected a file or a tag of this model ({tags or 'none'}), got {pretrained!r}")


def _fetched(clip: str | dict[str, Any], pretrained: str, tag: dict[str, Any]) -> Path:
    """The file of a tag: out of the hub's cache, or downloaded. Without network it fails within seconds."""
    import open_clip

    hub = tag.get("hf_hub", "")
    kept = _in_cache(hub)
    if kept is not None:
        return kept
    if hub:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE=1 forbids it")
        reason = unreachable(constants.ENDPOINT)
        if reason is not None:
            raise OSError(reason)
    elif "url" in tag and not Path("~/.cache/clip").expanduser().joinpath(Path(tag["url"]).name).is_file():
        reason = unreachable(tag["url"])
        if reason is not None:
            raise OSError(reason)
    downloads.info("downloading the weights %r of %s from %s", pretrained, clip, hub.strip("/") or tag.get("url"))
    with quiet_open_clip():
        return Path(open_clip.download_pretrained(tag))


def _in_cache(hub: str) -> Path | None:
    """What the hub's cache holds of "owner/model/" or "owner/model/file"; asked first, as the network may be slow."""
    if not hub:
        return None
    from huggingface_hub import try_to_load_from_cache

    repository, name = os.path.split(hub)
    for file in (name,) if name else CHECKPOINT_NAMES:
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return Path(found)
    return None


def unreachable(address: str, seconds: float = 5.0) -> str | None:
    """Why a server does not answer at all, within `seconds`; None where it does, if only with an error.

    Libraries for downloads try again for up to a minute before they say so.
    """
    outcome: list[str | None] = []

    def ask() -> None:
        request = urllib.request.Request(address, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                outcome.append(None)
        except urllib.error.HTTPError:
            outcome.append(None)
        except (OSError, ValueError) as error:
            if isinstance(getattr(error, "reason", None), ssl.SSLError):  # it answers; others may trust its certificate
                outcome.append(None)
                return
            outcome.append(" ".join(str(error).split()) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name knows no time limit
    thread.start()
    thread.join(seconds)
    server = urllib.parse.urlsplit(address).hostname or address
    if not outcome:
        return f"no answer from {server} within {seconds:g} s"
    return None if outcome[0] is None else f"no connection to {server}: {outcome[0]}"


def _no_weights(clip: str | dict[str, Any], pretrained: str, tag: dict[str, Any], error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not tag:
        what = clip if isinstance(clip, str) else "this configuration"
        return f"pretrained: open_clip could not read {pretrained!r} as weights of {what}: {reason}"
    repository, name = os.path.split(tag.get("hf_hub", ""))
    source = f"huggingface.co/{repository}" if repository else tag.get("url", "")
    file = name or (CHECKPOINT_NAMES[0] if repository else Path(source).name)
    own, quick = str(clip), f"{clip}-quickgelu"
    if tag.get("quick_gelu") and not clip_model_config(clip, ()).get("quick_gelu") and _named_config(quick):
        own = quick
    return (
        f"pretrained: the weights {pretrained!r} of {clip} are not on this machine and could not be fetched. Run once "
        f"with network access (they come from {source} and stay in the hub's cache; HF_HUB_OFFLINE=1 keeps to that "
        f"cache), or download {file} from there elsewhere and pass it: --pretrained FILE --clip {own} (in Python "
        f"pretrained=FILE, clip={own!r}). `zs3fast demo` needs no download. The reason given: {reason}"
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
