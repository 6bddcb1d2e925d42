"""Ahead-of-time compilation of Triton kernels for GPUs that are not here, and what came out of it.

    [report] = compile_all([AotRequest("zs3fast.kernels.<op>:<op>_fwd_kernel", {"x": "*fp32"}, {"BLOCK": 64}, arch=90)])
    report.registers, report.spills, report.blocks_per_sm()

A process whose TRITON_INTERPRET is set cannot compile, and the tests set it where no GPU is; so the compiling is done
in child processes. Starting one costs seconds: give `compile_all` everything at once.

Registers are the compiler's choice, and another Triton may choose worse: what a kernel may spill stands in
aot_budget.json by version of Triton, and a version that is not there is reported, not failed (`judge`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHS = (80, 90, 100)
BUDGET = Path(__file__).with_name("aot_budget.json")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block can have
_TENSOR_CORE_PTX = re.compile(r"^\s*(?:@\S+\s+)?(?:mma\.|wgmma\.mma_async|tcgen05\.mma)", re.MULTILINE)


@dataclass(frozen=True)
class AotRequest:
    """One kernel at one configuration for one architecture.

    kernel:      "package.module:function", or the kernel object itself (compiled or interpreted form).
    signature:   {argument: type} of the run-time arguments: "*fp16", "*i64", "i32", "fp32", ...; of a tuple a list of
                 its elements' types, "constexpr" for those that are constants.
    constexprs:  {argument: value}; a pointer that is None goes here. Names in neither mapping are an error. Element 2
                 of the tuple x is "x.2", here and in `aligned`.
    aligned:     arguments whose value is a multiple of 16 (strides, sizes), as the launcher would find out; pointers
                 are always taken as aligned.
    """

    kernel: Any
    signature: Mapping[str, str | list[str]]
    constexprs: Mapping[str, Any]
    arch: int
    num_warps: int = 4
    num_stages: int = 3
    aligned: Sequence[str] = field(default=())

    @property
    def name(self) -> str:
        if isinstance(self.kernel, str):
            return self.kernel
        function = getattr(self.kernel, "fn", self.kernel)
        return f"{function.__module__}:{function.__name__}"

    def __str__(self) -> str:
        pointers = ",".join(sorted({t for t in self.signature.values() if isinstance(t, str) and t.startswith("*")}))
        return f"{self.name}[sm_{self.arch} {pointers} {dict(self.constexprs)} warps={self.num_warps}]"


@dataclass(frozen=True)
class AotReport:
    """What the compiler made: `registers` a thread, `spills` in bytes a thread, `shared_bytes` a block."""

    request: str
    arch: int
    ptx: str
    registers: int
    spills: int
    shared_bytes: int
    uses_tensor_cores: bool
    warps: int = 4
    sass: str = ""

    def blocks_per_sm(self) -> int:
        """How many blocks registers, shared memory and threads let an SM hold."""
        allocated = max(24, -(-self.registers // 8) * 8) * 32 * self.warps
        shared = self.shared_bytes + 1024  # what the system takes of each block
        return min(65536 // allocated, (SHARED_LIMIT[self.arch] + 1024) // shared, 2048 // (32 * self.warps), 32)

    def wrong(self, tensor_cores: bool | None = None) -> str | None:
        """What no compiler's choice excuses: shared memory that does not fit, tensor cores unused (or used)."""
        limit = SHARED_LIMIT[self.arch]
        if self.shared_bytes > limit:
            return f"{self.request}: {self.shared_bytes} bytes of shared memory, limit {limit}"
        if tensor_cores is not None and self.uses_tensor_cores != tensor_cores:
            return f"{self.request}: tensor cores used: {self.uses_tensor_cores}"
        return None


def judge(reports: Iterable[tuple[str, AotReport, bool | None]], version: str | None = None) -> list[str]:
    """What is wrong with (name, report, tensor cores wanted), one line each; [] where nothing is.

    A kernel may spill what aot_budget.json gives its name under this version of Triton, 0 bytes where it is silent. Of
    a version that has no budget, spills are a warning.
    """
    budgets = json.loads(BUDGET.read_text())
    version = version or triton_version()
    budget = budgets.get(version)
    wrong, unknown = [], []
    for name, report, tensor_cores in reports:
        problem = report.wrong(tensor_cores)
        wrong += [problem] if problem else []
        if report.spills > (budget or {}).get(name, 0):
            line = f"{name}: {report.spills} bytes spilled a thread ({report.registers} registers)"
            (unknown if budget is None else wrong).append(line)
    if unknown:
        known = ", ".join(sorted(budgets))
        warnings.warn(f"Triton {version} has no budget (known: {known}):\n" + "\n".join(unknown), stacklevel=2)
    return wrong


def triton_version() -> str:
    """Major and minor, as the keys of aot_budget.json."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def compile_all(requests: Iterable[AotRequest], jobs: int = 1, sass: bool = False) -> list[AotReport]:
    """Compile many kernels in `jobs` child processes, in the order asked; `sass`: keep what they disassemble to.

    Raises RuntimeError naming every failure, with the compiler's message.
    """
    requests = list(requests)
    jobs = max(1, min(jobs, len(requests)))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    answers: list[dict[str, Any]] = [{}] * len(requests)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for job in range(jobs):
            asked, answered = Path(folder, f"asked{job}.json"), Path(folder, f"answered{job}.json")
            mine = [asdict(r) | {"kernel": r.name, "sass": sass} for r in requests[job::jobs]]
            asked.write_text(json.dumps(mine))
            command = [sys.executable, __file__, str(asked), str(answered)]
            errors = Path(folder, f"errors{job}.txt")
            with errors.open("w") as stream:
                children.append((subprocess.Popen(command, env=environment, stderr=stream), answered, errors))
        for job, (child, answered, errors) in enumerate(children):
            if child.wait() != 0:
                raise RuntimeError(f"the compiling process ended with {child.returncode}:\n{errors.read_text()}")
            answers[job::jobs] = json.loads(answered.read_text())
    failures = [f"{request}:\n{a['error']}" for request, a in zip(requests, answers, strict=True) if "error" in a]
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(requests)} kernels did not compile\n" + "\n".join(failures))
    return [
        AotReport(str(request), request.arch, warps=request.num_warps, **a)
        for request, a in zip(requests, answers, strict=True)
    ]


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = request["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), function)
    signature, constexprs = request["signature"], request["constexprs"]
    given = {name.partition(".")[0] for name in (*signature, *constexprs)}
    unknown, missing = given - set(kernel.arg_names), set(kernel.arg_names) - given
    if unknown or missing:
        raise ValueError(f"arguments not of the kernel: {sorted(unknown)}; without type or value: {sorted(missing)}")
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    types = {name: tuple(kind) if isinstance(kind, list) else kind for name, kind in types.items()}

    def path(name: str) -> tuple[int, ...]:
        argument, *element = name.split(".")
        return (kernel.arg_names.index(argument), *map(int, element))

    pointers = [name for name, kind in types.items() if isinstance(kind, str) and kind.startswith("*")]
    attributes = {path(name): [["tt.divisibility", 16]] for name in (*pointers, *request["aligned"])}
    constexprs = {path(name): value for name, value in constexprs.items()}
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs, attributes),
        target=GPUTarget("cuda", request["arch"], 32),
        options={"num_warps": request["num_warps"], "num_stages": request["num_stages"]},
    )
    return {
        "ptx": compiled.asm["ptx"],
        "shared_bytes": compiled.metadata.shared,
        "uses_tensor_cores": bool(_TENSOR_CORE_PTX.search(compiled.asm["ptx"])),
        **_resources(compiled.asm["cubin"], request["sass"]),
    }


def _resources(cubin: bytes, sass: bool) -> dict[str, Any]:
    """Registers and spilled bytes of the one kernel in `cubin`, read with the tools that triton ships."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: str, *options: str) -> str:
            command = [str(tools / tool), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        text = run("cuobjdump", "--dump-resource-usage")
        listing = run("nvdisasm", "-c") if sass else ""
    used: dict[str, int] = {}
    for name in ("REG", "STACK", "LOCAL"):
        found = re.search(rf"\b{name}:(\d+)", text)
        assert found, f"cuobjdump says nothing of {name}: {text}"
        used[name] = int(found[1])
    return {"registers": used["REG"], "spills": max(used["STACK"], used["LOCAL"]), "sass": listing}


def _main(asked: str, answered: str) -> None:
    import traceback

    answers: list[dict[str, Any]] = []
    for request in json.loads(Path(asked).read_text()):
        try:
            answers.append(_compile(request))
        except Exception:  # one kernel that fails must not hide the others
            answers.append({"error": traceback.format_exc(limit=-3)})
    Path(answered).write_text(json.dumps(answers))


if __name__ == "__main__":
    _main(*sys.argv[1:])
