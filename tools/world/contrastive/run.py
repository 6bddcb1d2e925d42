"""The contrastive loop: open_clip's CLIP and loss on scenes that never repeat, our checkpoints, log and schedule.

An iteration depends on the configuration and its number alone: a run that is killed and resumed computes what it would
have computed. Another number of threads changes the rounding of sums and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from tools.world.contrastive.config import FREE, ContrastiveConfig, save_contrastive_config
from tools.world.contrastive.probe import normalised, zero_shot_probe
from zs3fast.data.sampling import PositionSampler, seed_worker
from zs3fast.data.world import ALL_STUFF, ALL_THINGS, VERSION, CaptionSet, name_of
from zs3fast.data.world.captions import words
from zs3fast.training import checkpoints
from zs3fast.training.config import changed_keys
from zs3fast.training.logs import RunLog
from zs3fast.training.loop import RunResult, previous_checkpoint
from zs3fast.training.optimiser import finite_step, make_optimizer, set_learning_rate
from zs3fast.training.schedules import learning_rate
from zs3fast.utils.distributed import DistEnv, dist_env
from zs3fast.utils.files import replacing
from zs3fast.weights.packing import pack_clip

METADATA_KEY = "zs3fast_clip"
_LARGEST_SCALE = math.log(100)  # of the logits, as CLIP


class ContrastiveStep(nn.Module):
    """A CLIP and its loss: a batch of pairs in, the loss and how many images find their own caption out."""

    def __init__(self, clip: nn.Module, precision: str = "fp32"):
        super().__init__()
        self.clip = clip
        self.loss = open_clip.ClipLoss()
        self.precision = precision

    def trainable(self) -> dict[str, nn.Parameter]:
        """All of it."""
        return dict(self.clip.named_parameters())

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Uint8 images [B, 3, S, S] and tokens [B, context] -> {"loss", "matched"}."""
        device = images.device.type
        # On CPU the fused attention's backward pass takes twice the time of the plain one for so few tokens.
        attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
        with attention, torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            image = self.clip.encode_image(normalised(images), normalize=True)
            text = self.clip.encode_text(tokens, normalize=True)
        image, text = image.float(), text.float()
        loss = self.loss(image, text, self.clip.logit_scale.exp())
        own = torch.arange(len(image), device=image.device)
        matched = ((image @ text.t()).detach().argmax(1) == own).float().mean()
        return {"loss": loss, "matched": matched}


class Collate:
    """Pairs to a batch; captions that the tower would cut are an error."""

    def __init__(self, tokenizer: open_clip.SimpleTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, items: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        captions = [item["caption"] for item in items]
        for sentence in captions:
            tokens = len(self.tokenizer.encode(sentence)) + 2
            if tokens > self.tokenizer.context_length:
                raise ValueError(
                    f"clip.text_cfg.context_length: expected at least {tokens}, for {sentence!r}, "
                    f"got {self.tokenizer.context_length}"
                )
        return torch.stack([item["images"] for item in items]), self.tokenizer(captions)


def build_clip(config: ContrastiveConfig) -> tuple[nn.Module, open_clip.SimpleTokenizer]:
    """open_clip's CLIP with seeded weights, and its tokenizer; tokens that no sentence has embed as zero."""
    torch.manual_seed(config.seed)
    clip = open_clip.CLIP(**config.clip)
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    used = tokenizer([*words(), *map(name_of, (*ALL_THINGS, *ALL_STUFF))]).unique()
    kept = torch.zeros(clip.vocab_size, 1)
    kept[used] = 1
    with torch.no_grad():
        clip.token_embedding.weight.mul_(kept)
    return clip, tokenizer


def train_clip(config: ContrastiveConfig, *, resume: bool = False) -> RunResult:
    """Train a CLIP as the configuration says, in this process.

    The run's folder gets config.yaml, log.jsonl, validation.jsonl (the zero-shot probe), checkpoints/,
    weights.safetensors, which open_clip loads, and packed.safetensors, which is small.

    Args:
        resume: go on from the folder's last checkpoint, or start if it has none.
    Raises:
        ValueError, OSError: a configuration or checkpoint that will not do.  RuntimeError: a loss that is not finite.
    """
    with dist_env(config.device) as env:
        if env.world > 1:
            raise ValueError(f"contrastive training runs in one process, got {env.world} by torchrun")
        with checkpoints.run_lock(config.folder):
            return _train(config, resume, env)


def rate(config: ContrastiveConfig, iteration: int) -> float:
    """The schedule's learning rate; on a cosine the warm-up rises linearly, which the schedule leaves out there."""
    lr = learning_rate(config.schedule, iteration, config.iterations, config.optimizer.lr)
    warmup = config.schedule.warmup_iterations if config.schedule.kind == "cyclic_cosine" else 0
    return lr * min(1.0, (iteration + 1) / (warmup + 1))


def _train(config: ContrastiveConfig, resume: bool, env: DistEnv) -> RunResult:
    previous = previous_checkpoint(config.folder, resume)
    clip, tokenizer = build_clip(config)
    step = ContrastiveStep(clip, config.precision).to(env.device).train()
    optimizer = make_optimizer(step, config.optimizer)
    start = _go_on(previous, config, step, optimizer) if previous else 0
    checkpoints.remove_leftovers(config.folder)
    save_contrastive_config(config, config.folder / "config.yaml")
    log = RunLog(config.folder, env, start, config.iterations, config.batch_size, config.log.tensorboard)
    data = CaptionSet(config.data.size, config.seed)
    sampler = PositionSampler(start, config.batch_size, stop_iteration=config.iterations)
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=config.data.workers,
        collate_fn=Collate(tokenizer),
        worker_init_fn=seed_worker,
    )
    terms: dict[str, float] = {}
    try:
        for iteration, (images, tokens) in enumerate(loader, start):
            losses = step(images.to(env.device), tokens.to(env.device))
            losses["loss"].backward()
            lr = rate(config, iteration)
            set_learning_rate(optimizer, lr)
            norm = finite_step(optimizer, losses, env, config.optimizer.clip_norm)
            with torch.no_grad():
                clip.logit_scale.clamp_(max=_LARGEST_SCALE)
            log.add(iteration, lr, {**losses, "gradient_norm": norm})

            done = iteration + 1
            saving = done % config.checkpoint.every == 0 or done == config.iterations
            if saving or done % config.log.every == 0:
                terms = log.flush()
            if saving:
                if config.probe_images:
                    _probe(clip, tokenizer, config, log, done)
                tensors = checkpoints.state_tensors(step, optimizer)
                facts = {"config": config.to_dict(), "world": VERSION, "iteration": done}
                checkpoints.write_checkpoint(config.folder, tensors, facts, config.checkpoint.keep)
    finally:
        log.close()
    return RunResult(config.folder, export_clip(clip, config), config.iterations, terms, None)


def _go_on(path: Path, config: ContrastiveConfig, step: ContrastiveStep, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint of the same run in place; the iteration it goes on with."""
    tensors, facts = checkpoints.read_checkpoint(path)
    changed = changed_keys(facts["config"], config.to_dict(), FREE)
    if facts["world"] != VERSION:
        changed.append(f"version of the world: {facts['world']} -> {VERSION}")
    if changed:
        raise ValueError(f"resume: {path} is of a run with another configuration: {'; '.join(changed)}")
    checkpoints.restore(tensors, step, optimizer, path)
    return facts["iteration"]


def _probe(clip: nn.Module, tokenizer: Callable, config: ContrastiveConfig, log: RunLog, done: int) -> None:
    found = zero_shot_probe(clip, tokenizer, size=config.data.size, number=config.probe_images)
    log.scores(done, found)
    log.note(f"probe at {done}: " + "  ".join(f"{name} {100 * value:.1f} %" for name, value in found.items()))


def export_clip(clip: nn.Module, config: ContrastiveConfig) -> Path:
    """weights.safetensors, whole, and packed.safetensors; both name the configuration in their header."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.state_dict().items()}
    metadata = {METADATA_KEY: json.dumps({"clip": config.clip, "world": VERSION, "seed": config.seed})}
    whole = config.folder / "weights.safetensors"
    for path, tensors in ((whole.with_name("packed.safetensors"), pack_clip(state)), (whole, state)):
        with replacing(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
            checkpoints.durable(temporary)
    return whole
