"""Where zs3fast's time goes: encoder, decoder and labels, then operator by operator."""

from __future__ import annotations

import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench import contenders
from bench.setting import ONE_STAGE, Setting, make_inputs


def stage_times(model: nn.Module, setting: Setting, device: str, rounds: int = 5) -> dict[str, float]:
    """Median seconds of each stage of one prediction, the encoder told from the rest by hooks."""
    images, text = make_inputs(setting, device)
    cuda = torch.device(device).type == "cuda"
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        if cuda:
            torch.cuda.synchronize()
        marks[name] = time.perf_counter()

    hooks = [
        model.encoder.register_forward_pre_hook(lambda *_: mark("encoder starts")),
        model.encoder.register_forward_hook(lambda *_: mark("encoder ends")),
    ]
    samples: dict[str, list[float]] = {"encoder": [], "descriptor + decoder": [], "labels": []}
    try:
        for _ in range(rounds + 1):
            with torch.no_grad():
                out = model(images, text)
                mark("forward ends")
                model.predict_labels(out, size=tuple(images.shape[-2:]))
                mark("labels end")
            samples["encoder"].append(marks["encoder ends"] - marks["encoder starts"])
            samples["descriptor + decoder"].append(marks["forward ends"] - marks["encoder ends"])
            samples["labels"].append(marks["labels end"] - marks["forward ends"])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: median(values[1:]) for name, values in samples.items()}


def operator_times(model: nn.Module, setting: Setting, device: str, top: int = 15) -> list[tuple[str, int, float]]:
    """(operator, calls, seconds of its own) of one prediction, slowest first."""
    inputs = make_inputs(setting, device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.device(device).type == "cuda" else [])
    with torch.no_grad(), profile(activities=activities) as profiler:
        contenders.predict_ours(model, setting, inputs)
    on_gpu = torch.device(device).type == "cuda"
    events = [
        (e.key, e.count, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) * 1e-6)
        for e in profiler.key_averages()
    ]
    return sorted(events, key=lambda e: -e[2])[:top]


def report(console: Console, model: nn.Module, setting: Setting, device: str) -> None:
    """Both breakdowns as tables; of MAFT and ClsCLIP, whose encoders run in parts, the operators alone."""
    if setting.method in ONE_STAGE:
        stages = stage_times(model, setting, device)
        table = Table(title=f"{setting.method} {setting.shape}: stages", title_justify="left")
        for column in ("stage", "ms", "%"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for name, seconds in stages.items():
            table.add_row(name, f"{seconds * 1e3:.1f}", f"{100 * seconds / sum(stages.values()):.1f}")
        console.print(table)
    table = Table(title=f"{setting.method} {setting.shape}: operators", title_justify="left")
    for column in ("operator", "calls", "ms"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for name, calls, seconds in operator_times(model, setting, device):
        table.add_row(name, str(calls), f"{seconds * 1e3:.2f}")
    console.print(table)
