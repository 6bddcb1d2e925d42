"""docs/methods.md: every table and figure of the papers has its row, and every command of a row runs.

Each command runs as it is printed, with options behind it that make it small: a CLIP of a few thousand weights, two
iterations, one image of a dataset of the published layout. What it writes is looked at.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.data.trees import folders, stripes, write_list
from tests.training.tiny_run import voc_tree
from zs3fast.training.config import list_configs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text()
HEADING = "## Every table and figure of the papers"
STATUSES = ("world:", "did not reproduce", "full data", "not here:", "see [efficiency]")
CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 12, "width": 24, "patch_size": 8, "head_width": 12},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 2},
}
CLASSES = {"voc20": 20, "coco171": 171, "context60": 60, "context59": 59, "ade847": 847, "voc5i": 20, "coco20i": 80}
SWITCH = re.compile(r"([a-z_.]+)=(\S+)")


@dataclass(frozen=True)
class Row:
    """A line of a table.  switches: the `model.KEY=VALUE` settings of each of its variants."""

    paper: str
    table: str
    values: str
    commands: tuple[str, ...]
    switches: tuple[tuple[str, ...], ...]
    status: str


def parse(page: str) -> list[Row]:
    section = page.partition(HEADING)[2].partition("\n## ")[0]
    found = []
    for paper, text in re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", section, re.DOTALL | re.MULTILINE):
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not line.startswith("| ") or cells[0] == "table":
                continue
            if paper == "Efficiency":
                continue
            assert len(cells) == 5, line
            table, values, commands, switches, status = cells
            found.append(
                Row(
                    paper,
                    table,
                    values,
                    tuple(re.findall(r"`([^`]+)`", commands)),
                    tuple(tuple(some.split()) for some in re.findall(r"`([^`]+)`", switches)),
                    status,
                )
            )
    return found


ROWS = parse(PAGE)


def jobs() -> list[tuple[str, tuple[str, ...]]]:
    """Every (command, switches) of the page, once."""
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    for row in ROWS:
        found |= {(command, ()): None for command in row.commands}
        found |= {(row.commands[0], some): None for some in row.switches}
    return list(found)


def kind(command: str, switches: tuple[str, ...]) -> str:
    """Commands of one kind go through the same code: one of each runs without the mark `slow`."""
    words = shlex.split(command)
    if words[0] == "python":
        return words[1]
    name = words[2] if words[1] == "train" else command.partition("runs/")[2]
    name = name.replace("maft_proposals", "generator")
    options = sorted(word for word in words if word.startswith("--") and word != "--set")
    return " ".join([words[1], name.partition("_")[0], *options, "switched" if switches else ""])


def parameters() -> list[Any]:
    seen, found = set(), []
    for command, switches in jobs():
        of_kind = kind(command, switches)
        marks = [pytest.mark.slow] if of_kind in seen else []
        seen.add(of_kind)
        found.append(pytest.param(command, switches, marks=marks, id=" ".join([command, *switches])[:150]))
    return found


def test_every_table_of_the_papers_has_a_row() -> None:
    expected = {
        "ZegCLIP": ("inductive", "transductive", "supervised", "efficiency", "prompts", "figures"),
        "TagCLIP": ("Table 2 (a)", "Table 2 (b)", "Table 2 (c)", "(d)", "Table 4", "Table 6", "Table 10", "figure"),
        "CLIP-RC": tuple(f"Table {n}:" for n in range(1, 9)),
        "MAFT": (
            "Table 1",
            "Table 2",
            "Tables 3, 5b and 6",
            *(f"Table 4{c}" for c in "abcde"),
            "Table 5a",
            "Table 7",
            "Table 8",
        ),
        "ClsCLIP": (
            "Table 1",
            "Table 2",
            "Table 3",
            "Table 4a",
            "Table 5a",
            "Table 6",
            "Table 7",
            "Tables 4b and 5b",
            "figures",
        ),
    }
    for paper, tables in expected.items():
        names = [row.table for row in ROWS if row.paper.startswith(paper)]
        for table in tables:
            assert any(table in name for name in names), f"{paper}: {table}"


def test_every_published_setting_is_trained_by_a_row() -> None:
    """Rows had the numbers of three datasets and the command of one."""
    found = {command.split()[2] for row in ROWS for command in row.commands if command.startswith("zs3fast train ")}
    assert {name for name in list_configs() if not name.endswith("_world") and "_small" not in name} == found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.paper.split()[0]} {row.table}")
def test_a_row_is_whole(row: Row) -> None:
    assert row.status.startswith(STATUSES), row.status
    assert bool(row.commands) != row.status.startswith("not here:")
    assert all(SWITCH.fullmatch(switch) for some in row.switches for switch in some)
    if row.status.startswith(("world:", "did not reproduce in the world")):
        assert any("bench/world.py" in command for command in row.commands), "no command makes what it says"


def test_numbers_are_those_of_the_published_rows() -> None:
    """The main results of a row, as `zs3fast eval` sets them beside ours."""
    from zs3fast.evaluation.paper_rows import PAPER_ROWS

    methods = {"zegclip": "ZegCLIP", "tagclip": "TagCLIP", "clip_rc": "CLIP-RC"}
    checked = 0
    for published in PAPER_ROWS:
        values = published.values
        if published.method in methods and list(values) == ["pAcc", "mIoU(S)", "mIoU(U)", "hIoU"]:
            if published.detail or published.source.startswith(("TagCLIP (first", "Exploring")):
                if published.method != "clip_rc":
                    continue
            text = " / ".join(f"{value:.1f}" for value in values.values())
            rows = [row for row in ROWS if row.paper.startswith((methods[published.method], "TagCLIP"))]
            assert any(text in row.values for row in rows), (published.method, published.dataset, text)
            checked += 1
    assert checked >= 20


# The commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small datasets in the published layouts, text embeddings and the repository's image."""
    root = tmp_path_factory.mktemp("papers")
    voc_tree(root / "VOCdevkit" / "VOC2012", train=4, val=2, side=144)
    two, wide = {"a": (1, 2, 9, 255), "b": (3, 8, 16, 2)}, (32, 32)
    masks = {name: stripes(values, wide) for name, values in two.items()}
    context = folders(root / "VOCdevkit" / "VOC2010", "JPEGImages", "SegmentationClassContext", masks)
    coco = root / "coco_stuff164k"
    for split in ("train", "val"):
        write_list(context / f"ImageSets/SegmentationContext/{split}.txt", two)
        raw = {"000000000001": (0, 20, 91, 181), "000000000002": (2, 4, 21, 1)}
        things = {name: stripes(values, wide) for name, values in raw.items()}
        folders(coco, f"images/{split}2017", f"annotations/{split}2017", things)
    for part in ("training", "validation"):
        ade = {name: mask.astype(np.uint16) for name, mask in masks.items()}
        ade |= {f"{i}": stripes((1, 3), wide, np.uint16) for i in range(11)}  # in more than 10 images: seen
        folders(root / "ADE20K_2021_17_01", f"images_detectron2/{part}", f"annotations_detectron2/{part}", ade, ".tif")
    write_list(root / "ADE20K_2021_17_01" / "class_names.txt", [f"name {i}" for i in range(847)])
    for name, count in CLASSES.items():
        rows = np.random.default_rng(count).standard_normal((count, 32))
        np.save(root / f"{name}.npy", (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    (root / "assets").mkdir()
    shutil.copy(ROOT / "assets" / "coffee.jpg", root / "assets")
    return root


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("ZS3FAST_CACHE", str(place / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return place


@pytest.mark.parametrize(("command", "switches"), parameters())
def test_a_command_runs(command: str, switches: tuple[str, ...], here: Path) -> None:
    words = shlex.split(command)
    if words[0] == "python":
        run_script(words, here)
    elif words[1] == "train":
        trained(words, switches)
    elif words[1] == "eval":
        evaluated(words)
    elif words[1] == "figures":
        drawn(words)
    else:
        assert words[:2] == ["zs3fast", "segment"], f"no test knows how to run {command!r}"
        segmented(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "switch"),
    [
        ("zegclip", "prompt_depth=2"),
        ("tagclip", "descriptor=attn:q_s_s"),
        ("clip_rc", "recovery_loss=l2"),
        ("maft", "ma_loss=kl"),
        ("clsclip", "navigation=channel"),
    ],
)
def test_switches_train_in_the_world_too(method: str, switch: str, here: Path) -> None:
    folder = Path("runs") / f"{method}-in-the-world"
    small = ["iterations=2", "batch_size=2", "schedule.warmup_iterations=0", "precision=fp32", "data.workers=0"]
    lines = [word for line in [*small, f"model.{switch}"] for word in ("--set", line)]
    invoke("train", f"{method}_world", *lines, "-o", str(folder), "--device", "cpu")
    key, _, value = switch.partition("=")
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"][key] == yaml.safe_load(value)
    assert (folder / "weights.safetensors").stat().st_size > 0


def invoke(*words: str) -> str:
    from zs3fast.cli import app

    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, f"zs3fast {shlex.join(words)}\n{result.output}\n{result.exception!r}"
    return result.output


def option(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def small_training(name: str) -> list[str]:
    """--set lines that make a published setting small."""
    from zs3fast.training.config import GENERATORS, load_config

    config = load_config(name)
    if config.method in GENERATORS:
        return small_generator(config)
    lines = [f"model.clip={json.dumps(CLIP)}", "model.pretrained=null", "data.crop_size=32", "data.workers=0"]
    lines += [f"text.embeddings={config.data.name}.npy", "epochs=null", "iterations=2", "batch_size=2"]
    lines += ["micro_batch=1", "schedule.warmup_iterations=0", "schedule.cycles=1", "precision=fp32"]
    lines += ["checkpoint.every=2", "checkpoint.export_at=[1]", "log.every=1", "log.tensorboard=false"]
    if config.method == "maft":
        lines += ["model.image_size=32", "proposals.proposer=ground_truth"]
    elif config.method == "clsclip":
        lines += ["model.text_token=projected", "model.decoder_ffn=32", "validation.every=0"]
    else:
        lines += ["model.num_prompts=2", "model.decoder_width=32", "validation.every=2"]
        lines += ["validation.limit=1", "validation.pictures=0"]
        lines += ["model.regions=4"] if config.method == "clip_rc" else []
    return [word for line in lines for word in ("--set", line)]


def small_generator(config: Any) -> list[str]:
    from tests.proposals.tiny_generators import OPTIONS

    lines = [f"model.options={json.dumps(OPTIONS[config.method])}", "model.pretrained=null", "data.crop_size=64"]
    lines += ["data.workers=0", "iterations=2", "batch_size=2", "micro_batch=1", "log.every=1", "log.tensorboard=false"]
    lines += ["checkpoint.every=2", "validation.every=2", "validation.limit=1"]
    return [word for line in lines for word in ("--set", line)]


def trained(words: list[str], switches: tuple[str, ...]) -> Path:
    """Train as the words say, small, with switches; the weights."""
    name = words[2]
    extra = [word for switch in switches for word in ("--set", f"model.{switch}")]
    plain = not switches and words[3:] == words[3:5]
    folder = Path("runs") / (name if plain else re.sub(r"[^\w=-]+", "-", "-".join([name, *words[5:], *switches])))
    start = option(words, "--init-from")
    if start is not None:
        needed(start)
    for word in words:
        if "=runs/" in word:
            needed(word.partition("=")[2])
    words = [re.sub(r"(weights_)\d+", r"\g<1>00000001", word) for word in words]
    asked = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    small = small_training(name)  # the command's own settings stand behind these, but for the length
    invoke("train", name, *small, *words[3:], *extra, "--set", "iterations=2", "-o", str(folder), "--device", "cpu")
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    for setting in [*asked, *(f"model.{switch}" for switch in switches)]:
        key, _, value = setting.partition("=")
        found: Any = kept
        for part in key.split("."):
            found = found[part]
        assert key == "iterations" or found == yaml.safe_load(value), setting
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    if kept["validation"]["every"]:
        assert (folder / "best.safetensors").is_file(), "nothing was scored"
    assert (folder / "weights.safetensors").stat().st_size > 0
    return folder / "weights.safetensors"


def needed(path: str) -> None:
    """Train what another row's command would have left at `path`."""
    name = Path(path).parts[1]
    if not Path(path).is_file() and not (Path("runs") / name / "weights.safetensors").is_file():
        command = next(c for row in ROWS for c in row.commands if c.startswith(f"zs3fast train {name} "))
        words = shlex.split(command)
        trained(words[:5], ())


def evaluated(words: list[str]) -> None:
    weights, dataset = option(words, "--weights"), option(words, "--dataset")
    assert weights and dataset
    needed(weights)
    if (option(words, "--proposer") or "").startswith("runs/"):
        needed(str(option(words, "--proposer")))
    output = Path("out") / re.sub(r"\W+", "-", "-".join(words[2:]))[-120:]
    words = [tiny_model_of(word) for word in words[2:]]
    small = ["--limit", "1", "--text-embeddings", f"{dataset}.npy", "-o", str(output), "--device", "cpu"]
    invoke("eval", *words, *small)
    report = json.loads((output / "report.json").read_text())
    assert report["dataset"] == dataset and report["images"] == 1
    asked = option(words, "--setting")
    assert asked is None or report["setting"] == asked
    assert report["scores"]["miou"] is not None
    for name in ("crops", "proposer", "boxes"):
        assert report["settings"].get(name) == option(words, f"--{name}")


def segmented(words: list[str]) -> None:
    weights = option(words, "--weights")
    assert weights
    needed(weights)
    np.save("two.npy", np.load("voc20.npy")[:2])
    output = Path("out") / weights.replace("/", "-")
    small = ["--text-embeddings", "two.npy", "-o", str(output), "--device", "cpu"]
    invoke("segment", *(tiny_model_of(word) for word in words[2:]), *small)
    assert list(output.glob("coffee*"))


def drawn(words: list[str]) -> None:
    method, weights = words[2], [words[i + 1] for i, word in enumerate(words) if word == "--weights"]
    for path in weights:
        needed(path)
    np.save("two.npy", np.load("voc20.npy")[:2])
    output = Path("out") / f"figures-{method}"
    small = ["--text-embeddings", "two.npy", "-o", str(output), "--device", "cpu"]
    invoke("figures", *(tiny_model_of(word) for word in words[2:]), *small)
    assert [path.name for path in output.iterdir()] == [
        "compare.png" if method == "compare" else f"coffee_{method}.png"
    ]


def tiny_model_of(word: str) -> str:
    """A model of the transformers library by name -> a folder with a random one of its kind."""
    kind, colon, name = word.partition(":")
    if not colon or "/" not in name:
        return word
    pytest.importorskip("transformers", reason="the proposals extra is not installed")
    from tests.proposals import tiny_models

    folder = Path("models") / kind
    if not folder.is_dir():
        if kind in ("rtdetr", "yolos", "detr"):
            model, processor = tiny_models.tiny_detector(kind)
            processor.save_pretrained(folder)
        else:
            model = sure_sam() if kind == "sam" else tiny_models.tiny_mask2former()
        model.save_pretrained(folder)
    return f"{kind}:{folder.resolve()}"


def sure_sam() -> torch.nn.Module:
    """A random SAM that is sure of its masks: of what another one says nothing would be left."""
    from tests.proposals.tiny_models import tiny_sam

    model = tiny_sam(scale=10)
    with torch.no_grad():
        for name, parameter in model.mask_decoder.iou_prediction_head.proj_out.named_parameters():
            parameter.fill_(float(name == "bias"))
    return model


def run_script(words: list[str], here: Path) -> None:
    script, rest = words[1], words[2:]
    path = here / "results" / f"{abs(hash(tuple(words)))}.json"
    if script == "bench/world.py":
        from bench import world

        small = ["--seeds", "0", "--iterations", "1", "--scenes", "2", "--runs", "runs", "--json", str(path)]
        path.parent.mkdir(exist_ok=True)
        assert world.main([*rest, *small]) == 0
        rows = json.loads(path.read_text())["rows"]
        assert [row["variant"] for row in rows] == [word for word in rest if not word.startswith("--")]
        assert all(0 <= row["pAcc"] <= 100 for row in rows)
        return
    assert script == "bench/run.py", f"no test knows how to run {script}"
    from bench import run
    from bench.run import parse_arguments

    threads = torch.get_num_threads()
    small = ["--tiny", "--threads", "1", "--rounds", "1", "--skip", "probes", "--json", str(path)]
    run.main([*rest, *small])
    torch.set_num_threads(threads)
    rows = json.loads(path.read_text())["rows"]
    asked = parse_arguments([*rest, *small])
    assert {row["name"].partition(" ")[0] for row in rows if "floor" not in row["backend"]} == set(asked.models)
