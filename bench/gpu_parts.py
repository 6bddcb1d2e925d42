"""What `gpu_suite.py` runs, most valuable first: commands, time limits, and what each part needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(path.stem for path in (ROOT / "kernels").glob("[a-z]*.py"))
Command = Sequence[str]

# what is imported: what pip calls it
MODULES = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "open_clip": "open_clip_torch",
    "yaml": "pyyaml",
    "typer": "typer",
    "rich": "rich",
    "pytest": "pytest",
    "setuptools": "setuptools>=77",
}
LIBRARY = ("torch", "numpy", "PIL", "safetensors", "open_clip")
BENCH = (*LIBRARY, "rich", "yaml")
TESTS = (*BENCH, "pytest")
CALLS = {
    1: "build environment tests tests-cuda".split(),
    2: "ops-bf16 labels-cuda kernels memcheck ops-fp32 counters racecheck".split(),
    3: "models-bf16 compiled-bf16 training models-fp32 folder clsclip maft largest-batch".split(),
}
ORDER = [name for names in CALLS.values() for name in names]
CARRIED = {"open_clip": "open_clip_torch", "ftfy": "ftfy", "wcwidth": "wcwidth"}  # what a bare machine lacks
DRY_RUN_LIMIT = 3000.0  # seconds
PUBLISHED = "coco171 or ade847 or maft or M16 or M1024"  # sizes of tests/gpu/problems.py

ENVIRONMENT = """
import json, sys
import torch
import zs3fast
from bench import harness
from zs3fast.ops import _extension
try:
    import triton
except ImportError:
    pass
found = harness.environment(sys.argv[1]) | {"extension": _extension.info()}
if sys.argv[1] == "cuda":
    card = torch.cuda.get_device_properties(0)
    found["card"] = {
        "capability": f"{card.major}.{card.minor}", "processors": card.multi_processor_count,
        "memory_gib": round(card.total_memory / 2**30, 1), "l2_mib": card.L2_cache_size / 2**20,
    }
open(sys.argv[2], "w").write(json.dumps(found))
print(json.dumps(found, indent=1))
"""


@dataclass(frozen=True)
class Part:
    """One line of the summary.

    Args:
        commands: run one after the other, each whatever became of the one before; "{work}" is a folder for results.
        limit: seconds for all of them.  least: with fewer left of the budget the part is skipped.
        needs: modules that must be importable, and programs, named as in "nvcc!".
        skip: why it does not run at all.
    """

    name: str
    commands: Sequence[Command]
    limit: float
    least: float = 10.0
    needs: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    skip: str | None = None

    def missing(self) -> list[str]:
        """What it needs and this machine lacks, as one would ask for it."""
        modules = [MODULES[n] for n in self.needs if n in MODULES and importlib.util.find_spec(n) is None]
        return modules + [n[:-1] for n in self.needs if n.endswith("!") and not find_program(n[:-1])]


def find_program(name: str) -> str | None:
    """Of PATH, of the CUDA toolkit, or of the wheel of that name; "c++": any compiler that setup.py takes."""
    if name == "c++":
        named = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
        return next((path for path in map(shutil.which, named) if path), None)
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), folder) for folder in ("bin", "compute-sanitizer")]
    found = shutil.which(name) or next((str(h / name) for h in homes if (h / name).is_file()), None)
    if found is None and name in ("cmake", "ninja") and importlib.util.find_spec(name):
        return name
    return found


def architecture() -> str | None:
    """What ZS3FAST_CUDA_ARCHS should be for the first card: "90a" for compute capability 9.0; None without a card."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    first = said.stdout.strip().splitlines()[:1]
    if said.returncode or not first or "." not in first[0]:
        return None
    major, minor = first[0].strip().split(".")
    return major + minor + ("a" if int(major) >= 9 else "")


def python(*arguments: str) -> Command:
    return (sys.executable, *arguments)


def pytest(selection: str | None, *options: str) -> Command:
    """Prints where every thread stands when a test takes two minutes, so that a kernel that hangs is seen."""
    chosen = ("-k", selection) if selection else ()
    common = ("-p", "no:cacheprovider", "-o", "faulthandler_timeout=120", "--tb=short", "--no-header")
    return python("-m", "pytest", "tests/gpu", "-q", *common, *chosen, *options)


def make_parts(dry_run: bool, archs: str | None) -> list[Part]:
    """All parts in the order they run; `dry_run`: on the CPU, at sizes that measure nothing."""
    device = "cpu" if dry_run else "cuda"
    has_cuda = bool(sorted(ROOT.glob("csrc/*/cuda*.cu")))
    parts = [
        *machine_parts(dry_run, device, has_cuda, archs),
        *test_parts(dry_run),
        *model_parts(dry_run, device),
        *checker_parts(dry_run, has_cuda),
        *op_parts(dry_run, device),
        *later_parts(dry_run, device),
    ]
    if dry_run:  # nothing can hang, and the machine may be busy
        parts = [replace(part, limit=DRY_RUN_LIMIT) for part in parts]
    return sorted(parts, key=lambda part: ORDER.index(part.name))


def machine_parts(dry_run: bool, device: str, has_cuda: bool, archs: str | None) -> list[Part]:
    """The extension, built for this card; and what this machine is, with the extension it has then."""
    settings = {} if dry_run else {"ZS3FAST_EXTENSION": "1", "ZS3FAST_CUDA_ARCHS": archs or ""}
    needs = ["torch", "setuptools", "cmake!", "c++!"]
    if has_cuda and not dry_run:
        settings["ZS3FAST_CUDA"] = "1"
        needs.append("nvcc!")
    report = [python("-c", ENVIRONMENT, device, "{work}/environment.json")]
    if not dry_run:
        report = [("nvidia-smi",), (find_program("nvcc") or "nvcc", "--version"), *report]
    build = python("setup.py", "build_ext", "--inplace")
    return [
        Part("build", [build], 150, needs=needs, environment=settings),
        Part("environment", report, 60, needs=("torch",)),
    ]


def not_carried() -> list[str]:
    """What must be brought to a machine that fetches nothing, and is not there, as pip calls it."""
    return [wheel for module, wheel in CARRIED.items() if importlib.util.find_spec(module) is None]


def test_parts(dry_run: bool) -> list[Part]:
    """Small problems on every backend: Triton and what runs around it, then the CUDA kernel.

    A kernel that hangs takes its own part with it alone.
    """

    def report(name: str) -> tuple[str, str]:
        return "--junitxml", f"{{work}}/{name}.xml"

    if dry_run:  # every test body, on the backends that are fast on a CPU
        chosen = "not : and (not triton or masks_to_bits) and not reference and not test_half"
        environment = {"ZS3FAST_GPU_DRY_RUN": "1"}
        return [Part("tests", [pytest(chosen, *report("tests"))], DRY_RUN_LIMIT, 10, TESTS, environment)]
    workers = ()
    if importlib.util.find_spec("xdist"):  # compiling is what takes time, and it needs no GPU
        workers = ("-n", str(min(12, os.cpu_count() or 1)), "--dist", "loadgroup", "--max-worker-restart", "40")
    small = f"not ({PUBLISHED})"
    needs = (*TESTS, "triton")
    return [
        Part("tests", [pytest(f"{small} and not cuda", *report("tests"), *workers)], 190, 40, needs),
        Part("tests-cuda", [pytest(f"{small} and cuda", *report("tests-cuda"), *workers)], 80, 20, needs),
    ]


def model_parts(dry_run: bool, device: str) -> list[Part]:
    """Whole models: a process a method, so that one that fails its error budget takes no other with it."""

    def models(method: str, name: str, *options: str) -> Command:
        size = ("--tiny", "--rounds", "1", "--threads", "1") if dry_run else ("--batch", "1", "16", "--rounds", "20")
        where = ("--device", device, "--json", f"{{work}}/{name}-{method}.json")
        return python("bench/run.py", "--models", method, *size, *where, "--skip", "probes", *options)

    methods = ("zegclip",) if dry_run else ("zegclip", "tagclip", "clip_rc", "maft", "clsclip")
    half, full = ("--dtype", "bfloat16"), ("--dtype", "float32")
    classes = {m: ("--classes", "20" if m == "clsclip" or dry_run else "171") for m in methods}
    compiled = models("zegclip", "compiled-bf16", *half, *classes["zegclip"], *(() if dry_run else ("--compile",)))
    return [
        Part("models-bf16", [models(m, "models-bf16", *half, *classes[m]) for m in methods], 120, 20, BENCH),
        Part("compiled-bf16", [compiled], 90, 30, BENCH),
        Part("models-fp32", [models(m, "models-fp32", *full, *classes[m]) for m in methods[:3]], 90, 20, BENCH),
    ]


def checker_parts(dry_run: bool, has_cuda: bool) -> list[Part]:
    """compute-sanitizer over the GPU tests at their smallest size, on kernels of ours only."""
    sanitizer, ncu = find_program("compute-sanitizer"), find_program("ncu")
    ours = "|".join(OPS)
    backends = "cuda or triton" if has_cuda else "triton"
    absent = "dry run: there is no CUDA device to watch" if dry_run else None
    chosen = f"agrees and tiny and ({backends}) and (fp32 or bf16)"
    parts = []
    for tool in ("memcheck", "racecheck"):
        options = ("--tool", tool, "--kernel-regex", f"kns={ours}", "--error-exitcode", "7", "--print-limit", "20")
        command = (sanitizer or "compute-sanitizer", *options, *pytest(chosen))
        why = absent or (None if sanitizer else "compute-sanitizer is not installed")
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation: what lies behind it is known
        parts.append(Part(tool, [command], 75, 25, (*TESTS, "triton"), uncached, why))
    sections = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis")
    asked = [word for name in sections for word in ("--section", name)]
    options = ("--clock-control", "none", "--kernel-name", f"regex:{ours}", "--launch-count", "60", *asked)
    csv = ("--csv", "--page", "details", "--log-file", "{work}/counters.csv")
    published = f"agrees and ({PUBLISHED}) and ({backends}) and bf16"
    command = (ncu or "ncu", *options, *csv, *pytest(published))
    why = absent or (None if ncu else "ncu is not installed: the part kernels has times, without counters")
    return [*parts, Part("counters", [command], 75, 25, (*TESTS, "triton"), skip=why)]


def op_parts(dry_run: bool, device: str) -> list[Part]:
    parts = []
    for short, dtype in (("bf16", "bfloat16"), ("fp32", "float32")):
        size = ("--tiny", "--only", "relationship_descriptor", "--rounds", "1") if dry_run else ("--rounds", "5")
        command = python("bench/all_ops.py", f"{{work}}/ops-{short}", "--device", device, "--dtype", dtype, *size)
        parts.append(Part(f"ops-{short}", [command], 150, 20, BENCH))
    return parts


def later_parts(dry_run: bool, device: str) -> list[Part]:
    """Kernels of whole models by time, training steps, and what pairs and proposals cost."""
    tiny = ("--tiny", "--threads", "1") if dry_run else ()
    rounds = ("--rounds", "1") if dry_run else ("--rounds", "10")
    one = ("--classes", "20" if dry_run else "171", "--rounds", "1", "--device", device, *tiny)
    batch = () if dry_run else ("--batch", "16", "--dtype", "bfloat16")
    staged = [
        python("bench/run.py", "--models", method, *one, *batch, "--stages", "--skip", "official", "floors", "probes",
               "--json", f"{{work}}/kernels-{method}.json")
        for method in (("zegclip",) if dry_run else ("tagclip", "clip_rc", "maft"))
    ]  # fmt: skip
    step = ("step", "--device", device, "--json", "{work}/training.json", *tiny, *rounds)
    step += ("--models", "tagclip", "--classes", "20") if dry_run else ("--precision", "bf16", "fp32", "--batch", "16")
    side = ("tiny", "--rounds", "1", "--no-peaks") if dry_run else ("--dtype", "bfloat16", "--rounds", "5")
    clsclip = python("bench/clsclip.py", *side, "--device", device, "--json", "{work}/clsclip.json")
    parts = [
        Part("kernels", staged, 75, 20, BENCH),
        Part("training", [python("bench/training.py", *step)], 75, 25, BENCH),
        Part("clsclip", [clsclip], 60, 20, BENCH),
    ]
    folder = ("--tiny", "--threads", "1", "--rounds", "1")
    if not dry_run:
        folder = ("--dtype", "bfloat16", "--workers", "1", "8", "--batch-size", "1", "4")
    folder = python("bench/folder.py", *folder, "--device", device, "--json", "{work}/folder.json")
    parts.append(Part("folder", [folder], 60, 20, BENCH))
    if not dry_run:  # maft.py knows no toy network
        labels = [  # one window each: what the CUDA kernel, which auto does not take before it was measured, is for
            python("bench/ops/masks_to_labels.py", "voc20-512", "coco171-512", "coco171-512-b16", "ade847-640",
                   "--backend", backend, "--device", device, "--json", f"{{work}}/{backend}-masks_to_labels.json")
            for backend in ("triton", "cuda")
        ]  # fmt: skip
        parts.append(Part("labels-cuda", labels, 45, 15, BENCH))
        maft = python("bench/maft.py", *side, "--device", device, "--json", "{work}/maft.json")
        parts.append(Part("maft", [maft], 60, 20, BENCH))
        largest = ("largest", "--device", device, "--classes", "171", "--json", "{work}/largest.json")
        parts.append(Part("largest-batch", [python("bench/training.py", *largest)], 200, 60, BENCH))
    return parts
