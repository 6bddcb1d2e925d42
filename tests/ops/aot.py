"""Ahead-of-time compilation of Triton kernels for GPUs that are not here, and what came out of it.

    report = compile_for("zs3fast.kernels.<op>:<op>_fwd_kernel", {"x": "*fp32", "C": "i32"}, {"BLOCK": 64}, arch=90)
    report.assert_clean(tensor_cores=False)

A process whose TRITON_INTERPRET is set cannot compile, and the tests set it where no GPU is; so the compiling is done
in one child process per batch. Starting it costs seconds: give `compile_all` everything at once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block can have
_TENSOR_CORE_PTX = re.compile(r"^\s*(?:@\S+\s+)?(?:mma\.|wgmma\.mma_async|tcgen05\.mma)", re.MULTILINE)


@dataclass(frozen=True)
class AotRequest:
    """One kernel at one configuration for one architecture.

    kernel:      "package.module:function", or the kernel object itself (compiled or interpreted form).
    signature:   {argument: type} of the run-time arguments: "*fp16", "*i64", "i32", "fp32", ...
    constexprs:  {argument: value}; a pointer that is None goes here. Names in neither mapping are an error.
    aligned:     arguments whose value is a multiple of 16 (strides, sizes), as the launcher would find out; pointers
                 are always taken as aligned.
    """

    kernel: Any
    signature: Mapping[str, str]
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
        pointers = ",".join(sorted({t for t in self.signature.values() if t.startswith("*")}))
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

    def assert_clean(self, tensor_cores: bool | None = None) -> None:
        """No spills, shared memory that fits, tensor cores used (True), unused (False) or not asked about (None)."""
        assert self.spills == 0, f"{self.request}: {self.spills} bytes spilled a thread ({self.registers} registers)"
        limit = SHARED_LIMIT[self.arch]
        assert self.shared_bytes <= limit, f"{self.request}: {self.shared_bytes} bytes of shared memory, limit {limit}"
        if tensor_cores is not None:
            used = self.uses_tensor_cores
            assert used == tensor_cores, f"{self.request}: tensor cores used: {used}"


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Sequence[str] = (),
) -> AotReport:
    """Compile one kernel; see `AotRequest`. Raises RuntimeError with the compiler's message."""
    return compile_all([AotRequest(kernel, signature, constexprs, arch, num_warps, num_stages, aligned)])[0]


def compile_all(requests: Iterable[AotRequest]) -> list[AotReport]:
    """Compile many kernels in one child process, in the order asked. Raises RuntimeError naming every failure."""
    requests = list(requests)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "asked.json"), Path(folder, "answered.json")
        asked.write_text(json.dumps([asdict(r) | {"kernel": r.name} for r in requests]))
        child = subprocess.run(
            [sys.executable, __file__, asked, answered], env=environment, capture_output=True, text=True, check=False
        )
        if child.returncode != 0:
            raise RuntimeError(f"the compiling process ended with {child.returncode}:\n{child.stderr}")
        answers = json.loads(answered.read_text())
    failures = [f"{request}:\n{a['error']}" for request, a in zip(requests, answers, strict=True) if "error" in a]
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(requests)} kernels did not compile\n" + "\n".join(failures))
    return [AotReport(str(request), request.arch, **a) for request, a in zip(requests, answers, strict=True)]


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = request["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), function)
    signature, constexprs = request["signature"], request["constexprs"]
    unknown = (set(signature) | set(constexprs)) - set(kernel.arg_names)
    missing = set(kernel.arg_names) - set(signature) - set(constexprs)
    if unknown or missing:
        raise ValueError(f"arguments not of the kernel: {sorted(unknown)}; without type or value: {sorted(missing)}")
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name in request["aligned"]
    }
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs, attributes),
        target=GPUTarget("cuda", request["arch"], 32),
        options={"num_warps": request["num_warps"], "num_stages": request["num_stages"]},
    )
    return {
        "ptx": compiled.asm["ptx"],
        "shared_bytes": compiled.metadata.shared,
        "uses_tensor_cores": bool(_TENSOR_CORE_PTX.search(compiled.asm["ptx"])),
        **_resources(compiled.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of the one kernel in `cubin`, read with the cuobjdump that triton ships."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": used["REG"], "spills": max(used["STACK"], used["LOCAL"])}


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
