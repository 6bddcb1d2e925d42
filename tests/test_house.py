"""What keeps the house in order: imports follow the arrows, every op has its doors, the front door is whole."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zs3fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "zs3fast"
OPS = (
    "attention_to_mask",
    "mask_loss",
    "masks_to_bits",
    "masks_to_labels",
    "proposal_attention",
    "proposals_to_labels",
    "refine_maps",
    "region_bridge_attention",
    "relationship_descriptor",
    "self_similarity_attention",
)

# A room may import the rooms listed for it (and itself). Left to right is the way data flows.
FOUNDATION = {"types", "utils", "ops"}
STAGES = {"text", "encoders", "heads", "labels", "proposals"}
INFERENCE = FOUNDATION | STAGES | {"models", "weights", "inference"}
ARROWS: dict[str, set[str]] = {
    "utils": set(),
    "types": {"utils"},  # results draw and save themselves
    "kernels": set(),
    "ops": {"types", "utils", "kernels"},
    **{stage: FOUNDATION for stage in STAGES},
    "models": FOUNDATION | STAGES,
    "weights": FOUNDATION | STAGES | {"models"},
    "inference": INFERENCE,
    "data": FOUNDATION | {"text"},
    "evaluation": INFERENCE | {"data"},
    "training": INFERENCE | {"data", "evaluation"},
    "train": {"training"},
    "tiny": INFERENCE | {"data", "evaluation", "training", "__init__"},
    "cli": INFERENCE | {"data", "evaluation", "training", "tiny", "__init__", "_version"},
    "__init__": FOUNDATION | {"_version", "text", "data", "models", "weights", "inference"},
    "__main__": {"cli"},
    "app": INFERENCE | {"data"},
    "compat": {"types", "utils", "ops", "labels", "models"},
    "_version": set(),
    "segmenter": {"inference"},  # former addresses that stay importable
    "compiled": {"inference"},
}


def rooms_imported(path: Path) -> set[str]:
    """First-level rooms of zs3fast that a file imports anywhere, lazily too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "zs3fast" else [f"zs3fast.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "zs3fast":
                rooms.add("__init__")
            elif name.startswith("zs3fast."):
                room = name.split(".")[1]
                known = (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()
                rooms.add(room if known else "__init__")
    return rooms


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_imports_follow_the_arrows() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        assert room in ARROWS, f"{path.name} is in no room of the plan"
        bad = rooms_imported(path) - ARROWS[room] - {room}
        wrong += [f"{path.relative_to(ROOT)} imports {', '.join(sorted(bad))}"] if bad else []
    assert not wrong, "\n".join(wrong)


def test_kernels_know_no_op_and_no_other_kernel() -> None:
    names = {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        text = path.read_text()
        assert "zs3fast.ops" not in text, path.name
        for other in names - {path.stem}:
            assert f"kernels.{other}" not in text and f"kernels import {other}" not in text, (path.name, other)


def test_no_kernel_imports_a_reference() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        assert "reference" not in {
            node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
        }


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_five_doors(op: str) -> None:
    doors = [
        PACKAGE / "ops" / f"{op}.py",
        ROOT / "kernels" / f"{op}.py",
        ROOT / "csrc" / op / "cpu.cpp",
        ROOT / "tests" / "ops" / f"test_{op}.py",
        ROOT / "bench" / "ops" / f"{op}.py",
    ]
    assert [str(door) for door in doors if not door.exists()] == []
    assert op in zs3fast.ops.__all__


def test_front_door() -> None:
    names = "clearclip clip_rc clsclip maft maskclip naclip rcs scclip sclip tagclip zegclip"
    assert zs3fast.list_models() == names.split()
    for name in zs3fast.__all__:
        assert getattr(zs3fast, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'segmentor'"):
        zs3fast.segmentor  # noqa: B018


def test_import_is_light() -> None:
    """open_clip takes seconds and some 200 MB; a model from a checkpoint needs none of it."""
    code = "import sys, zs3fast; assert not {'open_clip', 'PIL', 'typer'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_import_works_without_triton_and_extension(tmp_path: Path) -> None:
    """On a machine with neither, the reference backend runs."""
    for folder in ("zs3fast", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = """
import sys
sys.modules["triton"] = None
import torch, zs3fast
from zs3fast.ops import _dispatch
assert zs3fast.__file__.startswith(sys.argv[1]), zs3fast.__file__
labels = zs3fast.ops.masks_to_labels(torch.randn(1, 3, 4, 4), (8, 8))
assert labels.shape == (1, 8, 8)
assert {op for op, backend in _dispatch._logged if backend != "reference"} == set()
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr


def test_the_extension_holds_no_emulation() -> None:
    """What stands in for hardware that is not there is built for tests alone, from tests/ops/emulated."""
    names = [path.name for path in (ROOT / "csrc").rglob("*")]
    assert not [name for name in names if "emulat" in name or "software" in name]
