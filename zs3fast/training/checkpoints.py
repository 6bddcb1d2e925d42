"""Checkpoints of a run: one safetensors file each, written whole or not at all, checked when read.

A file holds the trained weights, AdamW's state, the state of the random generators and, in its header, iteration, data
position, learning rate, configuration and digests. Frozen weights are not stored: their digest is, and a resumed run
whose frozen weights or text embeddings differ is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from zs3fast.text.cache import tensor_digest
from zs3fast.training.trained import Trained
from zs3fast.utils.checkpoint_io import read_safetensors
from zs3fast.utils.distributed import assign, full_tensor
from zs3fast.utils.files import replacing
from zs3fast.weights import CheckpointError

METADATA_KEY = "zs3fast_training"
_NAME = re.compile(r"iteration_(\d{8})\.safetensors")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_held: set[Path] = set()  # folders that this process trains in


def checkpoint_path(folder: Path, iteration: int) -> Path:
    return folder / "checkpoints" / f"iteration_{iteration:08d}.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run's folder, oldest first."""
    found = (folder / "checkpoints").glob("*.safetensors")
    return sorted(path for path in found if _NAME.fullmatch(path.name))


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder for as long as this process lives (where the system has file locks).

    The lock is the process's own: reading workers, which outlive one that was killed for some seconds, do not hold it.
    A run that ends takes its lock file along, and folders that were made for it where there is nothing else in them.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held, path = folder.resolve(), folder / ".lock"
    busy = f"output: another run is training in {folder}"
    if held in _held:  # to its owner a process's lock is no obstacle, and closing the file again would drop it
        raise ValueError(busy)
    try:
        with _locked(path, busy):
            _held.add(held)
            try:
                yield
            finally:
                _held.remove(held)
                path.unlink(missing_ok=True)  # while it is locked: see `_locked`
    finally:
        for place in made:
            if any(place.iterdir()):
                break
            place.rmdir()


@contextmanager
def _locked(path: Path, busy: str) -> Iterator[None]:
    """A file of that name, locked by this process, or an error."""
    try:
        import fcntl
    except ImportError:  # not on every system
        path.touch()
        yield
        return
    while True:
        with open(path, "w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(busy) from None
            try:
                same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                same = False
            if not same:  # its former owner deleted it between our opening and locking it
                continue
            yield
            return


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of writers that were killed."""
    for path in (*folder.glob(".*.safetensors"), *(folder / "checkpoints").glob(".*.safetensors")):
        path.unlink()


def durable(path: Path) -> None:
    """Have the file and its folder's entry on the disk before going on: a rename must not outlive its contents."""
    for place in (path, path.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def state_tensors(model: Trained, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that changes in training, by name, on the CPU; every process must call this."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.trainable().items():
        tensors[f"weights.{name}"] = parameter
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}.{name}"] = value
    tensors = {name: full_tensor(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any], keep: int) -> Path:
    """Write `tensors` and `facts` (with "iteration"), then delete all but the last `keep` checkpoints."""
    path = checkpoint_path(folder, facts["iteration"])
    described = {**facts, "digest": _digest(tensors, facts)}
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(described)})
        durable(temporary)
    durable(path)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Raises:
        CheckpointError: truncated, damaged, or not a training checkpoint.
    """
    remedy = f"delete it to go on from an earlier one, if {path.parent} holds any"
    try:
        tensors, metadata = read_safetensors(path)
        facts = json.loads(metadata.get(METADATA_KEY, "null"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: the checkpoint is damaged ({error}); {remedy}") from None
    if facts is None:
        raise CheckpointError(f"{path}: not a training checkpoint (weights alone start a run through init_from)")
    if not isinstance(facts, dict) or facts.pop("digest", None) != _digest(tensors, facts):
        raise CheckpointError(f"{path}: the checkpoint is damaged (its contents do not match their digest); {remedy}")
    return tensors, facts


def restore(tensors: dict[str, Tensor], model: Trained, optimizer: torch.optim.Optimizer, source: Path) -> None:
    """Put a checkpoint's weights, optimiser state and random state in place."""
    trained = model.trainable()
    saved = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    wrong = sorted(trained.keys() ^ saved.keys())
    wrong += sorted(name for name in trained.keys() & saved.keys() if trained[name].shape != saved[name].shape)
    if wrong:
        raise CheckpointError(f"{source}: trained weights differ from this model's: {', '.join(wrong[:10])}")
    for name, parameter in trained.items():
        assign(parameter, saved[name])
        if f"step.{name}" not in tensors:
            continue  # it never had a gradient
        state = optimizer.state[parameter]
        for moment in _MOMENTS:
            value = tensors[f"{moment}.{name}"]
            if moment == "step":
                state[moment] = value.to(parameter.device, copy=True)
            else:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                assign(state[moment], value)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def frozen_digest(model: Trained, text_embeddings: Tensor) -> str:
    """A digest of what a checkpoint leaves out: the weights that are not trained, and the text embeddings."""
    trained = model.trainable()
    frozen = [value for name, value in sorted(model.state_dict().items()) if name not in trained]
    return tensor_digest(*frozen, text_embeddings)


def _digest(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """Of everything a checkpoint holds: names, types, shapes and values of its tensors, and its facts."""
    names = sorted(tensors)
    described = json.dumps([names, json.loads(json.dumps(facts))], sort_keys=True)
    return tensor_digest(torch.tensor(list(described.encode()), dtype=torch.uint8), *(tensors[n] for n in names))
