"""The clock: contenders measured side by side in one process, and the rows that say what was measured on what.

Rounds are interleaved (A B C, A B C, ...), so that a machine that slows down slows everyone down, and the median is
taken over rounds. A contender with a check is checked first: what fails its error budget is not timed.

    >>> with torch.inference_mode():
    ...     times = measure([Contender("reference", slow), Contender("ours", fast, check=close_enough)], rounds=10)
    >>> rows = [row("attention_to_mask", name, "voc20-512", time) for name, time in times.items()]
    >>> write_results(results_path("attention_to_mask"), rows)
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gpu_clock

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
KEY = ("name", "backend", "shape", "dtype", "pass")  # what makes two rows measurements of the same thing


def _memory_of_processes() -> Any:
    """The package's own measure of memory, read from its file: the process of a baseline imports no zs3fast."""
    spec = importlib.util.spec_from_file_location("memory", ROOT / "zs3fast" / "utils" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_memory = _memory_of_processes()
available_bytes, limit_memory, out_of_memory = _memory.available_bytes, _memory.limit_memory, _memory.out_of_memory
resident_bytes, reset_peak_resident = _memory.resident_bytes, _memory.reset_peak_resident
peak_resident_bytes = _memory.peak_resident_bytes


class OverBudget(AssertionError):
    """A contender's result is wrong: it is not timed."""


@dataclass(frozen=True)
class Contender:
    """Something to time. `run` takes nothing; `check` gets its result and raises OverBudget when that is wrong."""

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one sample a round; on a GPU also the bytes a call took at its peak and what
    `bench.gpu_clock.gpu_times` says of it."""

    samples: Sequence[float] = field(repr=False)
    peak_bytes: int | None = None
    gpu: dict[str, float | str] | None = None

    def percentile(self, percent: float) -> float:
        """The sample at this percentile, interpolated between neighbours."""
        ordered = sorted(self.samples)
        position = (len(ordered) - 1) * percent / 100
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def within_budget(name: str, got: Tensor, expected: Tensor, budget: float = 1e-5) -> None:
    """Raise OverBudget unless |got - expected| <= budget * |expected| (Euclidean norms) and all of got is finite."""
    if got.shape != expected.shape:
        raise OverBudget(f"{name}: shape {list(got.shape)}, expected {list(expected.shape)}")
    if not torch.isfinite(got).all():
        raise OverBudget(f"{name}: non-finite output")
    error = relative_error(got, expected)
    if error > budget:
        raise OverBudget(f"{name}: error {error:.2e} over budget {budget:.2e}")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, Euclidean norms."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def measure(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    min_sample_s: float = 1e-3,
    own_time: bool = False,
) -> dict[str, Timing]:
    """Check every contender, warm all of them up, then time them in interleaved rounds.

    Args:
        rounds: samples of each contender, at least 1.
        warmup: untimed calls of each, the checked one included.
        device: where they run; on "cuda" the clock stops after a synchronisation and peak memory is recorded.
        min_sample_s: a contender faster than this is called several times a sample.
        own_time: on "cuda", when everyone has been timed, the GPU's own time of each too (`bench.gpu_clock.gpu_times`).
    Returns:
        {name: Timing} in the order given. Nothing is returned of anyone when one contender fails its check.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    names = [c.name for c in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"contenders: names must differ, got {names}")
    device = torch.device(device)
    cuda = device.type == "cuda"

    def sample(run: Callable[[], Any], repeats: int) -> float:
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if cuda:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    for contender in contenders:
        result = contender.run()
        if contender.check is not None:
            contender.check(result)
        del result
    repeats, peaks = {}, {}
    for contender in contenders:
        for _ in range(warmup - 1):
            contender.run()
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        once = sample(contender.run, 1)
        peaks[contender.name] = torch.cuda.max_memory_allocated(device) - before if cuda else None
        repeats[contender.name] = max(1, round(min_sample_s / once))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for contender in contenders:
            samples[contender.name].append(sample(contender.run, repeats[contender.name]))
    own: dict[str, dict[str, float | str]] = {}
    if cuda and own_time:
        own = {c.name: gpu_clock.gpu_times(c.run, rounds=max(rounds, 5), device=device) for c in contenders}
    return {name: Timing(samples[name], peaks[name], own.get(name)) for name in names}


# What was measured on what -------------------------------------------------------------------------------------------


def device_name(device: str | torch.device = "cpu") -> str:
    """The GPU's or the CPU's name, as it gives it itself."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def device_slug(device: str | torch.device = "cpu") -> str:
    """The device's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def commit() -> str:
    """The commit of this checkout, with '-dirty' when tracked or new files other than results differ from it."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return "unknown"
    return revision + ("-dirty" if git("status", "--porcelain", "--", ".", ":!bench/results") else "")


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Everything about the machine and the versions that a number depends on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "zs3fast"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            versions[name] = version
    described: dict[str, Any] = {"device": device_name(device), "versions": versions, "commit": commit()}
    if torch.device(device).type == "cpu":
        described["threads"] = torch.get_num_threads()
        described["isa"] = torch.backends.cpu.get_cpu_capability()
    else:
        described["versions"]["cuda"] = torch.version.cuda
        described["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return described


def row(
    name: str,
    backend: str,
    shape: str,
    timing: Timing | None,
    *,
    dtype: torch.dtype = torch.float32,
    pass_: str = "forward",
    device: str | torch.device = "cpu",
    peak_bytes: int | None = None,
    described: dict[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One line of a results file: what ran, how long (milliseconds), how much memory (MiB), on what.

    Without a timing (memory was measured and nothing else) there are 0 rounds and the times are None.
    """
    peak = timing.peak_bytes if peak_bytes is None and timing is not None else peak_bytes
    # Digits, not decimals: a tiny size takes microseconds.
    times = {f"p{p}_ms": None if timing is None else _digits(timing.percentile(p) * 1e3) for p in (20, 50, 80, 99)}
    return {
        "name": name,
        "backend": backend,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": pass_,
        **times,
        **({} if timing is None or timing.gpu is None else timing.gpu),
        "rounds": 0 if timing is None else len(timing.samples),
        "peak_mib": None if peak is None else round(peak / 2**20, 1),
        **extra,
        **(environment(device) if described is None else described),
    }


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def results_path(name: str, device: str | torch.device = "cpu") -> Path:
    """Where a benchmark's results on this device are kept."""
    return RESULTS / device_slug(device) / f"{name}.json"


def write_results(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON to a temporary name beside `path`, then rename: no reader ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"rows": list(rows)}, indent=1) + "\n")
    temporary.replace(path)


def update_results(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, and keep those of the file that were not measured anew."""
    path = Path(path)
    measured = {tuple(r[k] for k in KEY) for r in rows}
    kept = [r for r in read_results(path) if tuple(r[k] for k in KEY) not in measured] if path.exists() else []
    write_results(path, kept + list(rows))


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return json.loads(Path(path).read_text())["rows"]
