"""Text embeddings on disk, in safetensors files named after everything they depend on.

They lie in `$ZS3FAST_CACHE/text`, or `~/.cache/zs3fast/text` where the variable is unset. A file is written under a
temporary name and renamed; it is used only if it holds the very key it is looked up by and its bytes match their
checksum, and is computed and written again otherwise. Deleting the folder is always safe.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from zs3fast.utils.checkpoint_io import read_safetensors
from zs3fast.utils.errors import CheckpointError
from zs3fast.utils.files import replacing

logger = logging.getLogger("zs3fast")


def cache_dir() -> Path:
    """The folder of everything zs3fast keeps between runs: `$ZS3FAST_CACHE`, else `~/.cache/zs3fast`."""
    given = os.environ.get("ZS3FAST_CACHE")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "zs3fast"
    except RuntimeError:
        raise OSError("ZS3FAST_CACHE: expected a folder to keep files in, since this user has no home folder") from None


def tensor_digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' dtypes, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{array.dtype}{list(array.shape)}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached(key: dict[str, Any], compute: Callable[[], Tensor]) -> Tensor:
    """`compute()`, or what an earlier run stored under exactly this key. A cache that cannot be written only warns."""
    text = json.dumps(key, sort_keys=True)
    try:
        path = cache_dir() / "text" / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    except OSError as error:
        logger.warning("text embeddings are not cached: %s", error)
        return compute().cpu().contiguous()
    stored = _read(path, text)
    if stored is not None:
        return stored
    embeddings = compute().cpu().contiguous()
    try:
        with replacing(path) as temporary:
            save_file({"text_embeddings": embeddings}, temporary, {"key": text, "sha256": tensor_digest(embeddings)})
    except OSError as error:
        logger.warning("text embeddings were not cached in %s (ZS3FAST_CACHE): %s", path.parent, error)
    return embeddings


def _read(path: Path, key: str) -> Tensor | None:
    try:
        tensors, metadata = read_safetensors(path)
        embeddings = tensors["text_embeddings"]
    except FileNotFoundError:
        return None
    except (OSError, CheckpointError, KeyError) as error:
        logger.warning("%s is unreadable (%s): computing these text embeddings again", path, error)
        return None
    if metadata.get("key") != key or metadata.get("sha256") != tensor_digest(embeddings):
        logger.warning("%s does not hold what it should: computing these text embeddings again", path)
        return None
    return embeddings
