"""Learning rate as a function of the iteration alone: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from zs3fast.training.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, iteration: int, iterations: int, lr: float) -> float:
    """Learning rate of iteration t = 0 .. T - 1.

    poly:          (lr - min_lr) (1 - t / T)^power + min_lr; for t < W times 1 - (1 - t / W)(1 - warmup_ratio), with
                   W = warmup_iterations.
    cyclic_cosine: min_lr + (lr - min_lr) (1 + cos(pi s)) / 2, s = position within the cycle, 0 at its start; `cycles`
                   of equal length.

    Sources: ZegCLIP's recipe (poly with warm-up), MAFT's (poly to 0), ClsCLIP's (cyclic cosine annealing).
    """
    t, floor = iteration, schedule.min_lr
    if schedule.kind == "cyclic_cosine":
        position = (t * schedule.cycles / iterations) % 1.0
        return floor + (lr - floor) * (1 + math.cos(math.pi * position)) / 2
    rate = (lr - floor) * (1 - t / iterations) ** schedule.power + floor
    if t < schedule.warmup_iterations:
        rate *= 1 - (1 - t / schedule.warmup_iterations) * (1 - schedule.warmup_ratio)
    out: float = rate
    return out
