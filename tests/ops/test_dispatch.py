"""The choice of a backend, and what an absent or broken extension looks like from outside."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zs3fast
from zs3fast.ops import _dispatch, _extension, _measured, masks_to_labels, relationship_descriptor, use_backend

LOGITS = torch.zeros(1, 2, 2, 2)


def test_use_backend_is_a_context_manager():
    before = _dispatch.requested_backend()
    with use_backend("reference"):
        assert _dispatch.requested_backend() == "reference"
        with use_backend("auto"):
            assert _dispatch.requested_backend() == "auto"
        assert _dispatch.requested_backend() == "reference"
    assert _dispatch.requested_backend() == before


def test_use_backend_is_restored_after_an_error():
    before = _dispatch.requested_backend()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert _dispatch.requested_backend() == before


def test_use_backend_process_wide():
    before = _dispatch.requested_backend()
    try:
        use_backend("reference")
        assert _dispatch.requested_backend() == "reference"
    finally:
        use_backend(before)


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="unknown backend 'tritn', expected one of auto, cuda, triton, cpp, reference"):
        use_backend("tritn")


def test_a_named_backend_runs_or_says_why_not():
    with use_backend("triton"), pytest.raises(RuntimeError) as error:
        masks_to_labels(LOGITS.double(), (4, 4))
    message = str(error.value)
    assert "masks_to_labels: backend 'triton' cannot take this request" in message
    assert "[1, 2, 2, 2] float64 cpu" in message and "float64 not built (float32, float16, bfloat16)" in message
    assert re.search("(cpp|reference) would run", message) and "\n" not in message


def test_a_backend_not_written_is_an_objection():
    visual, text, weight = torch.zeros(1, 4), torch.zeros(2, 4), torch.zeros(3, 8)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="this request: not written for this op"):
        relationship_descriptor(text, visual, weight)


def test_auto_never_fails():
    with use_backend("auto"):
        assert masks_to_labels(LOGITS.double(), (4, 4)).shape == (1, 4, 4)


def test_auto_logs_its_choice_once(caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_logged", set())
    with use_backend("auto"), caplog.at_level(logging.INFO, logger="zs3fast"):
        for _ in range(3):
            masks_to_labels(LOGITS, (4, 4))
    assert len(caplog.messages) == 1
    assert re.fullmatch(r"masks_to_labels runs on the \w+ backend", caplog.messages[0])


@pytest.mark.parametrize("op", _dispatch.registered())
def test_every_op_has_a_reference_that_never_objects(op):
    assert _dispatch.registered(op)["reference"].objections is _dispatch.never


def child(program: str, package: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter on the zs3fast that lies in the folder `package`."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        cwd=package,
        env=os.environ | {"PYTHONPATH": str(package)} | environment,
        capture_output=True,
        text=True,
    )


def test_environment_variable():
    program = "from zs3fast.ops import _dispatch; print(_dispatch.requested_backend())"
    package = Path(zs3fast.__file__).parents[1]
    assert child(program, package, ZS3FAST_BACKEND="reference").stdout.strip() == "reference"
    refused = child(program, package, ZS3FAST_BACKEND="quick")
    assert refused.returncode != 0 and "ZS3FAST_BACKEND: unknown backend 'quick'" in refused.stderr


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package without its extension."""
    source = Path(zs3fast.__file__).parent
    shutil.copytree(source, tmp_path / "zs3fast", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return tmp_path


TRY_CPP = """
import json, torch, zs3fast
from zs3fast.ops import _extension, masks_to_labels, use_backend
assert masks_to_labels(torch.zeros(1, 2, 2, 2), (4, 4)).eq(0).all()
message = None
with use_backend("cpp"):
    try:
        masks_to_labels(torch.zeros(1, 2, 2, 2), (4, 4))
    except RuntimeError as error:
        message = str(error)
try:
    _extension.module()
except RuntimeError as error:
    print(json.dumps([zs3fast.__file__, _extension.info(), message, str(error)]))
"""


def run_without_cpp(package: Path) -> tuple[dict, str, str, str]:
    done = child(TRY_CPP, package)
    assert done.returncode == 0, done.stderr
    where, info, message, error = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(package)
    return info, message, error, done.stderr


def test_an_absent_extension_is_an_objection(package):
    info, message, error, stderr = run_without_cpp(package)
    assert info["status"] == "absent"
    assert "the C++ extension is not built" in message and "reference would run" in message
    assert "the C++ extension is not built" in error
    assert "RuntimeWarning" not in stderr


def extension_name() -> str:
    import sysconfig

    return "_C" + sysconfig.get_config_var("EXT_SUFFIX")


def test_a_broken_extension_is_loud(package):
    mark = f"zs3fast-built-for-torch={torch.__version__};".encode()
    (package / "zs3fast" / extension_name()).write_bytes(b"not a library " + mark)
    info, message, error, stderr = run_without_cpp(package)
    assert info["status"] == "broken"
    assert f"the C++ extension {extension_name()} is broken" in message and "is broken" in error
    assert stderr.count("RuntimeWarning: zs3fast: the C++ extension") == 1


def test_an_extension_for_another_torch_is_not_loaded(package):
    """The real library with another version in its mark: loading it would work, and must not be tried."""
    built = next(Path(_extension.__file__).parents[1].glob("_C*"), None)
    if built is None:
        pytest.skip("the C++ extension is not built")
    mark = f"zs3fast-built-for-torch={torch.__version__};".encode()
    other = mark.replace(b"=" + torch.__version__.split(".")[0].encode() + b".", b"=1.")
    library = built.read_bytes()
    assert library.count(mark) == 1
    (package / "zs3fast" / extension_name()).write_bytes(library.replace(mark, other))
    info, message, _, stderr = run_without_cpp(package)
    assert info["status"] == "broken"
    assert f"built for torch 1.{torch.__version__[2:]}, running {torch.__version__}" in message
    assert stderr.count("RuntimeWarning: zs3fast: the C++ extension") == 1


def test_info_of_a_loaded_extension():
    info = _extension.info()
    if info["status"] != "loaded":
        pytest.skip(info["problem"])
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["cpu_capability"] in ("default", "avx2", "avx512")
    assert info["threads"] == torch.get_num_threads()
    assert info["compiler"]
    assert all(re.fullmatch(r"\d+[af]?", arch) for arch in info["cuda_archs"])


def test_an_extension_older_than_the_op_is_an_objection(monkeypatch):
    """A .so built before an op was written loads well and lacks its kernel: auto falls back, a request says why."""
    monkeypatch.setattr(_dispatch, "_implementations", dict(_dispatch._implementations))
    library = torch.library.Library("zs3fast_cpp", "FRAGMENT")  # the schema lives as long as this
    library.define("brand_new(Tensor x) -> Tensor")
    _dispatch.register("brand_new", "cpp", lambda x: 1 / 0, lambda x: [])
    _dispatch.register("brand_new", "reference", lambda x: x + 1, _dispatch.never)
    assert _dispatch.call("brand_new", torch.zeros(1)) == 1
    assert _dispatch.objections("brand_new", "cpp", torch.zeros(1)) == [
        "the extension was built before this op was written: build it again"
    ]


# CUDA C++ kernels ----------------------------------------------------------------------------------------------------


def on_a_card(monkeypatch, capability=(9, 0), archs="80,90a") -> SimpleNamespace:
    """What leads a request there: a float32 tensor of a card, to an extension with CUDA kernels of masks_to_labels."""
    monkeypatch.setattr(_extension, "objections", list)
    monkeypatch.setattr(_extension, "module", lambda: SimpleNamespace(cuda_archs=archs))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(_dispatch, "_has_kernel", lambda op, key: (op, key) == ("masks_to_labels", "CUDA"))
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)


@pytest.mark.parametrize(
    ("capability", "archs", "refusal"),
    [
        ((9, 0), "80,90a", None),
        ((8, 0), "80,90a", None),
        ((8, 6), "80,90a", None),  # code for 8.0 runs on all of 8.x
        ((10, 0), "80,90a", "built for sm_80, sm_90a, not for this card's sm_100 (ZS3FAST_CUDA_ARCHS)"),
        ((7, 5), "80,90a", "built for sm_80, sm_90a, not for this card's sm_75 (ZS3FAST_CUDA_ARCHS)"),
        ((12, 1), "120a", "built for sm_120a, not for this card's sm_121 (ZS3FAST_CUDA_ARCHS)"),
        ((9, 0), "", "the extension was built without CUDA (ZS3FAST_CUDA=1 says why)"),
    ],
)
def test_cuda_kernels_run_where_they_were_built_for(capability, archs, refusal, monkeypatch):
    tensor = on_a_card(monkeypatch, capability, archs)
    assert _dispatch.cuda_objections("masks_to_labels", tensor) == ([] if refusal is None else [refusal])


def test_cuda_kernels_of_an_op_written_later_are_an_objection(monkeypatch):
    tensor = on_a_card(monkeypatch)
    assert _dispatch.cuda_objections("brand_new", tensor) == [
        "the extension was built before this op was written: build it again"
    ]


def test_cuda_kernels_want_tensors_of_a_card_and_types_they_know():
    assert _dispatch.objections("masks_to_labels", "cuda", LOGITS.double())[:2] == [
        "runs on cuda tensors, not cpu",
        "float64 not built (float32, float16, bfloat16)",
    ]
    with use_backend("cuda"), pytest.raises(RuntimeError, match="request: runs on cuda tensors, not cpu"):
        masks_to_labels(LOGITS, (4, 4))


@pytest.fixture
def unmeasured(monkeypatch) -> str:
    """An op with kernels for a card of compute capability 9.0, which here take any tensor."""
    monkeypatch.setattr(_dispatch, "_implementations", dict(_dispatch._implementations))
    monkeypatch.setattr(_measured, "SPEEDUP_OVER_TRITON", {})
    on_a_card(monkeypatch)
    for backend in ("cuda", "triton", "reference"):
        _dispatch.register("quick", backend, lambda x, backend=backend: backend, _dispatch.never)
    return "quick"


def test_auto_leaves_out_a_cuda_kernel_that_was_not_measured(unmeasured):
    with use_backend("auto"):
        assert _dispatch.call(unmeasured, LOGITS) == "triton"
        assert _dispatch.objections(unmeasured, "cuda", LOGITS) == [
            "not measured faster than triton on sm_90: only use_backend('cuda') takes it"
        ]
    with use_backend("cuda"):
        assert _dispatch.objections(unmeasured, "cuda", LOGITS) == []
        assert _dispatch.call(unmeasured, LOGITS) == "cuda"


@pytest.mark.parametrize(
    ("table", "chosen"),
    [
        ({"quick": {"sm_90": 1.3}}, "cuda"),
        ({"quick": {"sm_90": 0.9}}, "triton"),
        ({"quick": {"sm_80": 1.3}}, "triton"),
        ({"slow": {"sm_90": 1.3}}, "triton"),
    ],
)
def test_auto_takes_a_cuda_kernel_where_it_was_measured_faster(table, chosen, unmeasured, monkeypatch):
    monkeypatch.setattr(_measured, "SPEEDUP_OVER_TRITON", table)
    with use_backend("auto"):
        assert _dispatch.call(unmeasured, LOGITS) == chosen


def test_the_measurements_name_ops_and_architectures():
    for op, archs in _measured.SPEEDUP_OVER_TRITON.items():
        assert "cuda" in _dispatch.registered(op)
        assert archs and all(re.fullmatch(r"sm_\d+", arch) and speedup > 1 for arch, speedup in archs.items())
