"""What `run.py` measures together: all models, dtypes and backends of one class list and batch, over common floors."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bench import contenders, counting, end_to_end, harness, peers, stages
from bench.floors import ATTENTION, BYTES, PRODUCTS, BytesFloor, Floor
from bench.floors import NAMES as FLOORS
from bench.harness import Contender
from bench.setting import ONE_STAGE, PUBLISHED_REGIONS, Setting

REFUSAL = "cannot take this request"  # how zs3fast's ops say that the backend asked for does not run here
Key = tuple[Setting, str]  # what a contender runs, and what it is called


@dataclass
class Group:
    """Contenders to time side by side, and what is known of them before the clock starts.

    probed: start-up, memory and outcome.  stages: clocks of pipelines.  ops: which backend of zs3fast's ops.
    parameters: all, and those that train.  counted: the calls whose multiply-adds are counted.
    """

    entries: dict[Key, Contender] = field(default_factory=dict)
    probed: dict[Key, dict[str, Any]] = field(default_factory=dict)
    stages: dict[Key, end_to_end.Clock] = field(default_factory=dict)
    ops: dict[Key, str] = field(default_factory=dict)
    parameters: dict[Key, dict[str, int]] = field(default_factory=dict)
    counted: dict[Key, counting.Counted] = field(default_factory=dict)

    def add(self, setting: Setting, label: str, run: Callable[[], Any], check: Callable | None = None) -> Key:
        key = (setting, label)
        self.entries[key] = Contender(f"{setting.name} {setting.dtype} {label}", run, check)
        return key

    def count(self, key: Key, call: Callable[[], Any], model: nn.Module, *, ours: bool) -> None:
        """Note the parameters of a contender's model, and its call where its multiply-adds are counted."""
        self.parameters[key] = counting.parameters(model, key[0].method, ours)
        if isinstance(call, counting.Counted):
            self.counted[key] = call


def make_settings(args: argparse.Namespace, classes: int, batch: int, pass_: str) -> list[Setting]:
    """One setting a model and dtype; CLIP-RC has one a number of regions."""
    settings = [
        Setting(method, classes, batch, regions=m, dtype=dtype)
        for method in args.models
        if pass_ == "inference" or method in ONE_STAGE
        for m in (args.regions if method == "clip_rc" else [PUBLISHED_REGIONS])
        for dtype in args.dtype
    ]
    if args.quick:
        settings = [s.quick() for s in settings]
    if args.clsclip_classes is not None and classes > args.clsclip_classes:
        settings = [s for s in settings if s.method != "clsclip"]
    return [s.tiny() for s in settings] if args.tiny else settings


def measure_group(
    args: argparse.Namespace, console: Console, classes: int, batch: int, pass_: str
) -> list[dict[str, Any]]:
    """Rows of all models with one class list and batch size, floors last.

    All are there at once, so that a round has everyone; with --quick those over one floor are, and go before the next.
    """
    parts: dict[str, list[Setting]] = {}
    for setting in make_settings(args, classes, batch, pass_):
        parts.setdefault(setting.encoder_name if args.quick else "", []).append(setting)
    rows = []
    for settings in parts.values():
        rows += measure_settings(args, console, settings, pass_)
        gc.collect()
    return sorted(rows, key=lambda row: row["backend"] in FLOORS)


def measure_settings(
    args: argparse.Namespace, console: Console, settings: list[Setting], pass_: str
) -> list[dict[str, Any]]:
    """Rows of models that are timed side by side, and of the floors under them."""
    group, floors = Group(), {}
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings:
            baseline = contenders.make_baseline(setting, args.device)
            if pass_ != "end-to-end" and ("probes" not in args.skip or args.probes_only):
                probe(args, console, group, setting, baseline, pass_)
            if args.probes_only:
                continue
            add = add_pipelines if pass_ == "end-to-end" else add_models
            add(args, console, group, setting, baseline, pass_, Path(folder))
            weights = sum(p.numel() for p in baseline.parameters())
            floors.setdefault((setting.encoder_name, setting.dtype), (setting, weights))
        if "floors" not in args.skip and pass_ == "inference":
            for setting, weights in floors.values():
                group.add(setting, PRODUCTS, Floor(setting, False, args.device))
                group.add(setting, ATTENTION, Floor(setting, True, args.device))
                group.add(setting, BYTES, BytesFloor(setting, weights, args.device))
        timings = harness.measure(list(group.entries.values()), rounds=args.rounds, device=args.device)
    timed = dict(zip(group.entries, timings.values(), strict=True))
    described = harness.environment(args.device)
    return [make_row(args, group, key, timed.get(key), pass_, described) for key in timed or group.probed]


def add_models(
    args: argparse.Namespace, console: Console, group: Group, setting: Setting, baseline: nn.Module, pass_: str, _: Path
) -> None:
    """Images that are ready -> labels, or a training step."""
    device = args.device
    check_with = contenders.check_training if pass_ == "training" else contenders.check_inference

    def check(contender: str, model: nn.Module, _: object) -> None:
        check_with(contender, model, baseline, setting, device)

    def counted(call: Callable[[], Any], model: nn.Module) -> Callable[[], Any]:
        return counting.Counted(call, model) if pass_ == "inference" else call

    if "official" not in args.skip:
        call = counted(contenders.make_call("official", pass_, setting, baseline, device), baseline)
        key = group.add(setting, f"{setting.baseline} eager", call)
        group.count(key, call, baseline, ours=False)
    if args.compile:
        compiled = contenders.compile_baseline(baseline, setting)
        call = contenders.make_call("official", pass_, setting, compiled, device)
        group.add(setting, f"{setting.baseline} compiled", call, partial(check, "official", compiled))
    if pass_ == "inference" and torch.device(device).type == "cpu":
        for name in args.peers:
            add_peer(args, console, group, setting, baseline, name)
    if "zs3fast" in args.skip:
        return
    ours = contenders.make_ours(setting, baseline.state_dict(), device)
    for backend in args.backend:
        call = counted(contenders.make_call("zs3fast", pass_, setting, ours, device), ours)
        added = add_backend(console, group, setting, backend, call, partial(check, "zs3fast", ours))
        if added is not None:
            group.count(added, call, ours, ours=True)
    if args.stages and pass_ == "inference":
        stages.report(console, ours, setting, device)


def add_peer(
    args: argparse.Namespace, console: Console, group: Group, setting: Setting, baseline: nn.Module, name: str
) -> None:
    """The official structure in another runtime; one that does not run here is named and left out."""
    try:
        peer = peers.make_peer(name, baseline, setting, args.threads)
    except peers.PeerRefused as error:
        console.print(f"{setting.name} {setting.dtype} {error}", markup=False)
        return
    call = contenders.make_call("official", "inference", setting, peer, "cpu")

    def check(_: object) -> None:
        contenders.check_inference("official", peer, baseline, setting, "cpu")

    group.add(setting, f"{setting.baseline} {name}", call, check)


def add_pipelines(
    args: argparse.Namespace,
    console: Console,
    group: Group,
    setting: Setting,
    baseline: nn.Module,
    _: str,
    folder: Path,
) -> None:
    """An image on disk -> labels in NumPy."""
    path = end_to_end.make_image(folder, args.picture)
    ours = contenders.make_ours(setting, baseline.state_dict(), args.device)
    means = (ours.pixel_mean, ours.pixel_std)
    models = {"eager": baseline} if "official" not in args.skip else {}
    if args.compile:
        models["compiled"] = contenders.compile_baseline(baseline, setting)
    for kind, model in models.items():
        label = f"{setting.baseline} {kind}"
        contender, clock = end_to_end.make_official(model, baseline, setting, path, means, args.device)
        group.stages[group.add(setting, label, contender.run, contender.check)] = clock
    if "zs3fast" in args.skip:
        return
    segmenter = end_to_end.make_segmenter(ours, setting, args.device)
    for backend in args.backend:
        contender, clock = end_to_end.make_ours(segmenter, baseline, setting, path, args.device)
        key = add_backend(console, group, setting, backend, contender.run, contender.check)
        if key is not None:
            group.stages[key] = clock


def add_backend(
    console: Console, group: Group, setting: Setting, backend: str, run: Callable[[], Any], check: Callable
) -> Key | None:
    """zs3fast on one backend of its ops. One that does not take this request is named and left out: None."""
    from zs3fast.ops import _extension, use_backend

    def on_backend(call: Callable) -> Callable:
        def wrapped(*values: Any) -> Any:
            with use_backend(backend):
                return call(*values)

        return wrapped

    label = ours_label(backend)
    try:
        if backend != "auto":
            on_backend(run)()
    except RuntimeError as error:
        if REFUSAL not in str(error):
            raise
        why = " ".join(str(error).split())
        console.print(f"{setting.name} {setting.dtype} {label} does not run here: {why}", markup=False)
        return None
    key = group.add(setting, label, on_backend(run), on_backend(check))
    group.ops[key] = f"{backend}, extension {_extension.info()['status']}"
    return key


def ours_label(backend: str) -> str:
    return "zs3fast" if backend == "auto" else f"zs3fast ({backend})"


def make_row(
    args: argparse.Namespace,
    group: Group,
    key: Key,
    timing: harness.Timing | None,
    pass_: str,
    described: dict[str, Any],
) -> dict[str, Any]:
    setting, label = key
    floor = label in FLOORS
    extra = dict(group.probed.get(key, {}))
    if key in group.ops:
        extra["ops"] = group.ops[key]
    extra |= group.parameters.get(key, {})
    if key in group.counted:
        extra["gmac"] = group.counted[key].gmac
    if setting.encoder_regions:
        extra["regions"] = setting.regions
    if key in group.stages:
        extra["stages"] = group.stages[key].milliseconds(args.rounds)
    if timing is not None:
        extra["images_per_second"] = round((1 if pass_ == "end-to-end" else setting.batch) / timing.median, 4)
    shape = replace(setting, batch=1).shape + "-file" if pass_ == "end-to-end" else setting.shape
    return harness.row(
        setting.encoder_name if floor else setting.name,
        label,
        shape,
        timing,
        dtype=setting.torch_dtype,
        pass_=pass_,
        device=args.device,
        described=described,
        peak_bytes=extra.pop("peak_bytes", None),
        classes=setting.classes,
        prompts=setting.prompts,
        batch=setting.batch,
        floor=setting.encoder_name,
        **extra,
    )


def probe(
    args: argparse.Namespace, console: Console, group: Group, setting: Setting, baseline: nn.Module, pass_: str
) -> None:
    """Start-up seconds and peak memory of every contender, each in a fresh process that loads the same file.

    A contender without numbers says why in `outcome`: it ran out of memory, or of time.
    """
    available = harness.available_bytes()
    limit = available * 0.8 if args.memory_limit is None and available else (args.memory_limit or 0) * 2**30
    sides = [("official", f"{setting.baseline} eager", "auto")] if "official" not in args.skip else []
    if "zs3fast" not in args.skip:
        sides += [("zs3fast", ours_label(backend), backend) for backend in args.backend]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "official.pth"
        torch.save({"state_dict": baseline.state_dict()}, weights)
        for contender, label, backend in sides:
            command = [sys.executable, str(Path(__file__).with_name("probe.py")), contender, "--weights", str(weights)]
            command += ["--setting", json.dumps(asdict(setting)), "--pass", pass_, "--device", args.device]
            command += ["--threads", str(args.threads)]
            command += ["--memory-limit", str(int(limit))] if limit else []
            environment = {**os.environ, "ZS3FAST_BACKEND": backend}
            result = run_probe(command, environment, args.probe_timeout)
            if "refused" in result:
                continue  # this backend does not take the request: said where it is timed
            if "out_of_memory" in result:
                room = "the device" if torch.device(args.device).type == "cuda" else f"{limit / 2**30:.1f} GiB"
                result = {"outcome": f"does not fit in {room}"}
            elif "call_bytes" in result:
                result["call_mib"] = round(result.pop("call_bytes") / 2**20, 1)
            group.probed[setting, label] = result
            if args.probes_only:
                console.print(f"{setting.name} {label} {setting.shape} {setting.dtype} {pass_}: {result}")


def run_probe(command: list[str], environment: dict[str, str], timeout: float) -> dict[str, Any]:
    """What one process printed, or why it printed nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"outcome": f"not done in {timeout:g} s"}
    if done.returncode and REFUSAL in done.stderr:
        return {"refused": True}
    if done.returncode:
        raise RuntimeError(f"probe failed: {' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
