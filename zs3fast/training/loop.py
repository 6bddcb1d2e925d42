"""The training loop: one iteration is micro-batches forward and backward, one step of AdamW.

Everything an iteration draws or reads depends on the configuration and the iteration's number alone: samples and their
augmentation on their position in the run, dropout on (seed, iteration, micro-batch). So a run that is killed and
resumed computes what it would have computed, and as long as `micro_batch` stays, so does a run on another number of
processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor, nn

from zs3fast.data.datasets import ids_digest
from zs3fast.training import checkpoints, setup, validation
from zs3fast.training.config import FREE, TrainConfig, changed_keys, save_config
from zs3fast.training.export import export_weights
from zs3fast.training.logs import RunLog
from zs3fast.training.optimiser import finite_step, freeze, make_optimizer, set_learning_rate
from zs3fast.training.schedules import learning_rate
from zs3fast.training.steps import Batch, Step, Terms
from zs3fast.training.trained import Trained
from zs3fast.utils import distributed
from zs3fast.utils.console import stderr
from zs3fast.utils.distributed import DistEnv


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    folder: the run's folder.  weights: the exported weights, for `zs3fast segment --weights`.
    iterations: its length.
    terms: loss terms, and the norm of the gradients before clipping, of the last iteration that was computed here
        (empty if none was).
    best: {"metric", "value", "iteration"} of the best validation, or None.
    """

    folder: Path
    weights: Path
    iterations: int
    terms: dict[str, float]
    best: dict[str, Any] | None


def train(config: TrainConfig, *, resume: bool = False) -> RunResult:
    """Train as the configuration says, in this process or with those that torchrun started.

    The run's folder gets config.yaml, log.jsonl, checkpoints/, weights.safetensors and, with validation,
    best.safetensors, validation.jsonl and predictions/.

    Args:
        resume: go on from the folder's last checkpoint, or start if it has none (and say so). Without it a folder that
            holds checkpoints is left alone. `iterations` may be another number than before, the checkpoint's at least.
    Raises:
        ValueError, OSError: a configuration, data, weights or a checkpoint that will not do; before the first step.
        RuntimeError: a loss that is not finite.
    """
    with distributed.dist_env(config.device) as env:
        if not env.main:
            return _train(config, resume, env)
        with checkpoints.run_lock(config.folder):
            return _train(config, resume, env)


def _train(config: TrainConfig, resume: bool, env: DistEnv) -> RunResult:
    split = setup.shares(config, env.world)
    previous = previous_checkpoint(config.folder, resume)
    if resume and not previous and env.main:
        stderr.print(f"{escape(str(config.folder))} holds no checkpoint to resume: the run starts at its beginning")
    dataset = setup.open_data(config)
    if config.validation.every:
        validation.check(config)
    model = setup.build_model(config, dataset)
    text = setup.text_embeddings(config, dataset, model)
    data = setup.training_set(config, dataset, model)
    iterations = setup.iterations(config, len(data))
    config = replace(config, iterations=iterations, epochs=None)
    freeze(model)
    frozen = checkpoints.frozen_digest(model, text)
    source = {"dataset": f"{dataset.name} {dataset.split}", "items": len(data), "ids": ids_digest(dataset.ids)}
    tensors, facts = _read(previous, config, frozen, source) if previous else ({}, {"iteration": 0, "best": None})

    step = setup.build_step(config, dataset, model, text, env.device)
    unused = env.world > 1 and config.parallel == "ddp" and setup.unused_parameters(config, dataset, step) != []
    spread = distributed.parallelize(step, config.parallel, env, unused)
    optimizer = make_optimizer(model, config.optimizer)
    if previous:
        checkpoints.restore(tensors, model, optimizer, previous)
        del tensors
    start, best = facts["iteration"], facts["best"]
    if best is not None and best["metric"] != config.validation.metric:
        best = None  # scores of another kind do not compare
    if env.main:
        checkpoints.remove_leftovers(config.folder)
        save_config(config, config.folder / "config.yaml")
    log = RunLog(config.folder, env, start, iterations, split.total, config.log.tensorboard)
    if previous:
        log.note(f"going on from {previous} at iteration {start} of {iterations}")
        if facts["config"]["iterations"] != iterations:
            log.note(
                f"of {facts['config']['iterations']} iterations before: from here on the learning rate is that of a "
                f"run of {iterations}"
            )
    saved = {"config": config.to_dict(), "frozen": frozen, "data": source, "world": env.world}
    terms: dict[str, float] = {}
    try:
        batches = iter(setup.make_loader(data, config, split, env, start, iterations))
        for iteration in range(start, iterations):
            lr = learning_rate(config.schedule, iteration, iterations, config.optimizer.lr)
            batch = next(batches)
            if isinstance(batch, Exception):
                raise batch
            batch = _to_device(batch, env.device)
            losses = gradients(spread, step, batch, split, env, (config.seed, iteration))
            set_learning_rate(optimizer, lr)
            norm = finite_step(optimizer, losses, env, config.optimizer.clip_norm)
            log.add(iteration, lr, {**losses, "gradient_norm": norm})

            done = iteration + 1
            validating = config.validation.every and (done % config.validation.every == 0 or done == iterations)
            saving = done % config.checkpoint.every == 0 or done == iterations or done in config.checkpoint.export_at
            if validating or saving or done % config.log.every == 0:
                terms = log.flush()
            if validating:
                best = _validate(config, model, text, env, log, done, best)
            if done in config.checkpoint.export_at:
                export_weights(model, config.folder / f"weights_{done:08d}.safetensors", env)
            if saving:
                _save(config, model, optimizer, env, {**saved, "iteration": done, "lr": lr, "best": best})
    finally:
        log.close()
    weights = config.folder / "weights.safetensors"
    export_weights(model, weights, env)
    env.barrier()
    return RunResult(config.folder, weights, iterations, terms, best)


def gradients(
    spread: nn.Module,
    step: Step,
    batch: Batch,
    split: setup.Shares,
    env: DistEnv,
    seed: tuple[int, int],
) -> Terms:
    """Gradients of one iteration into `.grad`; the mean of its loss terms on this process."""
    parts = [{name: value[i : i + split.micro_batch] for name, value in batch.items()} for i in _starts(split)]
    average = step.count(batch)
    if average is not None:
        average = env.total(average).clamp_min(1) / (env.world * split.micro_batches)
    sums: Terms = {}
    for index, part in enumerate(parts):
        torch.manual_seed(_mix(*seed, env.rank * split.micro_batches + index))
        with distributed.accumulating(spread, more=index + 1 < len(parts)):
            terms = {name: term / len(parts) for name, term in spread(part, average).items()}
            terms["loss"].backward()
        for name, term in terms.items():
            sums[name] = sums[name] + term.detach() if name in sums else term.detach()
    return sums


def _starts(split: setup.Shares) -> range:
    return range(0, split.per_process, split.micro_batch)


def _mix(*numbers: int) -> int:
    """One seed from several numbers, unlike those of other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _to_device(batch: dict[str, Any], device: torch.device) -> Batch:
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}


def previous_checkpoint(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from."""
    found = checkpoints.list_checkpoints(folder)
    if found and not resume:
        raise ValueError(
            f"output: {folder} holds a run with checkpoints up to {found[-1].name}; --resume goes on with it, "
            "another --output starts anew"
        )
    return found[-1] if found else None


def _read(
    path: Path, config: TrainConfig, frozen: str, source: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint of the same run, or an error that names what differs."""
    tensors, facts = checkpoints.read_checkpoint(path)
    changed = changed_keys(facts["config"], config.to_dict(), (*FREE, "iterations"))  # a run may be extended
    if config.iterations < facts["iteration"]:
        raise ValueError(
            f"iterations: expected at least {facts['iteration']}, which {path} has, got {config.iterations}"
        )
    if changed:
        raise ValueError(f"resume: {path} is of a run with another configuration: {'; '.join(changed)}")
    if facts["frozen"] != frozen:
        raise ValueError(
            f"resume: the frozen weights or text embeddings differ from those that {path} was trained with"
        )
    trained_on = facts.get("data", source)  # the first checkpoints did not say
    if trained_on != source:
        before, now = (f"{d['dataset']}, {d['items']} items, ids {d['ids'][:8]}" for d in (trained_on, source))
        raise ValueError(f"resume: {path} was trained on other data: {before}; data.root holds {now}")
    return tensors, facts


def _save(config: TrainConfig, model: Trained, optimizer: Any, env: DistEnv, facts: dict[str, Any]) -> None:
    tensors = checkpoints.state_tensors(model, optimizer)
    if env.main:
        facts["position"] = facts["iteration"] * config.batch_size
        checkpoints.write_checkpoint(config.folder, tensors, facts, config.checkpoint.keep)


def _validate(
    config: TrainConfig,
    model: Trained,
    text: Tensor,
    env: DistEnv,
    log: RunLog,
    done: int,
    best: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """Score the model, draw some predictions, keep the weights if they are the best so far."""
    scores = validation.validate(config, model, text, env, log, done)
    value = scores.get(config.validation.metric)  # hIoU needs seen and unseen classes among the images
    log.note(f"validation at {done}: " + "  ".join(f"{name} {score:.2f}" for name, score in scores.items()))
    if value is None or (best is not None and not value > best["value"]):
        return best
    export_weights(model, config.folder / "best.safetensors", env)
    return {"metric": config.validation.metric, "value": value, "iteration": done}
