"""The `zs3fast` command as a user meets it: files in, files out, one line an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.full_disk import files_up_to
from tests.inference.test_segmenter import NAMES, SEEN, make_model, photo, text_rows
from tests.tiny_clip import text_state, tiny_clip
from zs3fast import cli, weights
from zs3fast.cli import app
from zs3fast.inference.segmenter import Segmenter
from zs3fast.text import class_names, seen_classes
from zs3fast.weights.official import official_keys


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to be in, with its own cache."""
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(place):
    """Converted weights with a text tower, named in the cache."""
    path = place / "cache" / "weights" / "tiny.safetensors"
    path.parent.mkdir(parents=True)
    weights.save(make_model(), path, text_state(tiny_clip(), "text_encoder."))
    return "tiny"


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    if code:
        assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


def save_photo(path, size=(30, 40), seed=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(*size, seed=seed)).save(path)
    return path


def test_segment_one_file(place, tiny):
    picture = save_photo(place / "photo.png")
    output = run("segment", picture, "--weights", tiny, "--classes", "cat, moon, sky", "-o", "out")
    assert "1 of 1 images segmented" in output and "untrained" not in output
    assert sorted(file.name for file in (place / "out").iterdir()) == [
        "photo.json",
        "photo_labels.png",
        "photo_overlay.png",
    ]
    expected = Segmenter.from_pretrained(tiny)(picture, ["cat", "moon", "sky"])
    assert np.array_equal(np.asarray(Image.open("out/photo_labels.png")), expected.labels)
    assert np.array_equal(np.asarray(Image.open("out/photo_overlay.png")), np.asarray(expected.overlay()))
    summary = json.loads((place / "out" / "photo.json").read_text(encoding="utf-8"))
    assert {**expected.to_dict(), "labels": "photo_labels.png", "overlay": "photo_overlay.png"} == summary
    assert [entry["name"] for entry in summary["classes"]] == ["cat", "moon", "sky"]


def test_segment_folders_and_globs(place, tiny):
    for name in ("b/1.png", "b/2.JPG", "c/3.png", "c/deep/4.png"):
        save_photo(place / name)
    (place / "b" / "notes.txt").write_text("not an image, not tried")
    output = run("segment", "b", "c/**/*.png", "b/1.png", "--weights", tiny, "-o", "out")
    assert "4 of 4 images segmented" in output
    assert sorted(file.name for file in (place / "out").glob("*.json")) == ["1.json", "2.json", "3.json", "4.json"]


def test_a_second_run_over_the_same_folder_skips_its_own_results(place, tiny):
    save_photo(place / "a.png")
    for _ in range(2):
        assert "1 of 1 images" in run("segment", place, "--weights", tiny, "-o", place)


def test_the_same_stem_never_overwrites(place, tiny):
    for index, name in enumerate(("a/x.png", "b/x.png", "b/X.jpg", "b/x-2.png")):
        save_photo(place / name, seed=index)
    output = run("segment", "a", "b", "--weights", tiny, "-o", "out")
    assert "4 of 4" in output and "results are named x-4, its own is taken" in output
    stems = {file.stem: json.loads(file.read_text())["source"] for file in (place / "out").glob("*.json")}
    assert len(stems) == len({stem.casefold() for stem in stems}) == 4
    assert sorted(stems.values()) == ["a/x.png", "b/X.jpg", "b/x-2.png", "b/x.png"]
    assert stems["x-2"] == "b/x-2.png"


ODD_NAMES = ["..png", "...png", ".a.png", "猫" * 81 + ".png", "é" * 122 + ".png", os.fsdecode(b"caf\xe9.png")]


def test_results_of_odd_names_lie_in_the_output_folder(place, tiny):
    """`..png` wrote beside the output folder, over somebody's results.json; the others ended in "failed"."""
    for name in ODD_NAMES:
        save_photo(place / "in/x.png", (8, 8)).rename(place / "in" / name)
    (place / "results.json").write_text("mine")
    before = {path for path in place.iterdir() if path.name != "out"}
    output = run("segment", *(Path("in") / name for name in ODD_NAMES), "-w", tiny, "-o", "out")
    assert "6 of 6 images segmented" in output
    assert {path for path in place.iterdir() if path.name != "out"} == before
    assert (place / "results.json").read_text() == "mine"
    assert len(list((place / "out").iterdir())) == 18
    sources = {json.loads(path.read_text(encoding="utf-8"))["source"] for path in (place / "out").glob("*.json")}
    assert sources == {str(Path("in") / name) for name in ODD_NAMES}


def test_names_too_long_for_three_results_stay_apart(place, tiny):
    for name in ("猫" * 83 + "a.png", "猫" * 83 + "b.png"):
        save_photo(place / "in/x.png").rename(place / "in" / name)
    assert "2 of 2 images segmented" in run("segment", "in", "-w", tiny, "-o", "out")
    assert len(list((place / "out").iterdir())) == 6


def test_what_a_folder_holds_besides_images(place, tiny):
    save_photo(place / "in/a.jpg")
    for name in "._a.jpg .a_labels.part.png x.pdf x.mpg x.h5 notes.txt IMG_1.HEIC".split():
        (place / "in" / name).write_bytes(b"\0\5\x16\7")
    output = run("segment", "in", "-w", tiny, "-o", "out")
    assert "1 of 1 images segmented" in output and "failed" not in output
    assert "note in: IMG_1.HEIC is left out, as Pillow does not read .heic" in output
    (place / "in/a.jpg").unlink()
    assert "no images in in; IMG_1.HEIC is left out" in run("segment", "in", "-w", tiny, "-o", "out", code=2)


def test_control_characters_of_names_do_not_reach_the_terminal(place, tiny):
    save_photo(place / "in/x.png").rename(place / "in/a\x1b[31m\x07.png")
    (place / "in/b\x1b[31m.png").write_text("no image")
    output = run("segment", "in", "-w", tiny, "-c", "cat, c\x1b[31mow", "-o", "out", code=1)
    assert "1 of 2 images segmented" in output and "\\x1b" in output
    assert not set(output) & set("\x1b\x07")


def test_broken_pictures_are_listed_at_the_end(place, tiny):
    good = save_photo(place / "in" / "good.png")
    (place / "in" / "broken.jpg").write_bytes(b"no image")
    (place / "in" / "cut.png").write_bytes(good.read_bytes()[:200])
    output = run("segment", "in", "missing.png", "--weights", tiny, "-o", "out", code=1)
    assert "failed in/broken.jpg: image: in/broken.jpg is not an image" in output
    assert "failed in/cut.png: image: in/cut.png cannot be read" in output
    assert "failed missing.png: image: no file missing.png" in output
    assert output.endswith("1 of 4 images segmented, results in out")
    assert (place / "out" / "good.json").exists() and not (place / "out" / "cut.json").exists()


def test_warnings_are_one_line(place, tiny):
    frames = [Image.fromarray(photo(20, 20, seed=i)) for i in range(2)]
    frames[0].save(place / "x.gif", save_all=True, append_images=frames[1:])
    output = run("segment", "x.gif", "--weights", tiny)
    assert "warning x.gif: x.gif holds 2 frames, only the first is used" in output
    assert (place / "zs3fast_out" / "x.json").exists()


def test_threads_change_no_result(place, tiny):
    for index in range(5):
        save_photo(place / "in" / f"{index}.png", (30 + index, 40), seed=index)
    (place / "in" / "2.png").write_bytes(b"no image")
    written = {}
    for workers in (0, 3):
        output = run("segment", "in", "-w", tiny, "-o", f"out{workers}", "--workers", workers, code=1)
        assert output.endswith(f"4 of 5 images segmented, results in out{workers}") and "failed in/2.png" in output
        lines = [output.index(f"in/{index}.png -> ") for index in (0, 1, 3, 4)]
        assert lines == sorted(lines)
        written[workers] = {file.name: file.read_bytes() for file in (place / f"out{workers}").iterdir()}
    assert written[0] == written[3] and len(written[0]) == 12
    output = run("segment", "in", "-w", tiny, "-o", "out", "--batch-size", 3, code=1)
    assert "4 of 5" in output and {file.name for file in (place / "out").iterdir()} == set(written[0])


def test_warnings_of_threads_name_their_pictures(place, tiny):
    for name in ("x", "y", "z"):
        frames = [Image.fromarray(photo(20, 20, seed=i)) for i in range(2)]
        frames[0].save(place / f"{name}.gif", save_all=True, append_images=frames[1:])
    output = run("segment", "x.gif", "y.gif", "z.gif", "-w", tiny, "--workers", 3)
    for name in ("x", "y", "z"):
        assert output.count(f"warning {name}.gif: {name}.gif holds 2 frames, only the first is used") == 1


def test_torchrun_shares_the_images(place, tiny):
    """Each image by one of three processes, results as those of one; one process talks of failures, at the end."""
    for number in range(6):
        save_photo(place / "in" / f"{number}.png", seed=number)
    save_photo(place / "in" / "more" / "1.png", seed=9)  # whose results need another name on every process
    (place / "in" / "7.png").write_bytes(b"broken")
    arguments = ["segment", "in", "in/more", "--weights", tiny]
    run(*arguments, "-o", "one", code=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "zs3fast"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments, "-o", "three"], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 1
    assert done.stdout.count("7 of 8 images segmented") == 1 and done.stdout.count("-> three/") == 7, done
    assert done.stderr.count("failed in/7.png") == 1
    assert done.stderr.count("results are named 1-2") == 1
    one, three = (sorted((place / name).iterdir()) for name in ("one", "three"))
    assert [path.name for path in one] == [path.name for path in three] and len(one) == 21
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, three, strict=True))


def test_a_result_that_cannot_be_written_is_one_failure(place, tiny):
    for index in range(4):
        save_photo(place / "in" / f"{index}.png", (300, 300) if index == 1 else (30, 40), seed=index)
    with files_up_to(60_000):
        output = run("segment", "in", "-w", tiny, "-o", "out", code=1)
    assert "failed in/1.png: out/1_overlay.png: File too large" in output and output.endswith(
        "3 of 4 images segmented, results in out"
    )
    assert sorted(file.name for file in (place / "out").glob("1*")) == ["1_labels.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_leaves_whole_files_and_no_thread(place, tiny, monkeypatch, workers):
    for index in range(6):
        save_photo(place / "in" / f"{index}.png", seed=index)
    write = cli.write_result

    def interrupted(result, target):
        if target.name == "2":
            os.kill(os.getpid(), signal.SIGINT)  # reaches the main thread, as a terminal's would
            time.sleep(0.3)
        return write(result, target)

    monkeypatch.setattr(cli, "write_result", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
    try:
        result = CliRunner().invoke(app, ["segment", "in", "-w", tiny, "-o", "out", "--workers", str(workers)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code != 0 and "images segmented" not in result.output
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("zs3fast")]
    found = {file.name for file in (place / "out").iterdir()}
    done = 3 if workers else 2  # what a thread is writing is finished, what the main thread is writing is not begun
    ends = ("_labels.png", "_overlay.png", ".json")
    assert {f"{index}{end}" for index in range(done) for end in ends} <= found
    assert not [name for name in found if name.startswith((".", "4", "5"))] and len(found) % 3 == 0
    for file in (place / "out").glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))


def test_class_files_datasets_and_defaults(place, tiny):
    save_photo(place / "x.png")
    (place / "classes.txt").write_text("# mine\nmoon\nsofa, couch\n")

    def names(*options):
        run("segment", "x.png", "--weights", tiny, "-o", "out", *options)
        return [entry["name"] for entry in json.loads((place / "out" / "x.json").read_text())["classes"]]

    assert names("--classes-file", "classes.txt") == ["moon", "sofa"]
    assert names("--dataset", "voc20", "--templates", "single") == class_names("voc20")
    assert names() == NAMES, "the vocabulary of the weights"


def test_min_score_and_background(place, tiny):
    picture = save_photo(place / "x.png")
    expected = Segmenter.from_pretrained(tiny)(picture, min_score=0.5, background="dog")
    run("segment", picture, "--weights", tiny, "--min-score", "0.5", "--background", "dog", "-o", "out")
    labels = np.asarray(Image.open("out/x_labels.png"))
    assert np.array_equal(labels, np.where(expected.labels < 0, 255, expected.labels))


def test_prepared_embeddings(place, tiny):
    save_photo(place / "x.png")
    np.save("rows.npy", text_rows(5).numpy())
    run("segment", "x.png", "--weights", tiny, "--text-embeddings", "rows.npy", "-o", "out")
    expected = Segmenter(make_model(), text_embeddings=text_rows(5))("x.png")
    assert np.array_equal(np.asarray(Image.open("out/x_labels.png")), expected.labels)
    output = run("segment", "x.png", "--weights", tiny, "--text-embeddings", "rows.npy", "-c", "a, b", code=2)
    assert output == "error --text-embeddings: rows.npy: expected a row for each of 2 classes, got 5"


def test_untrained_weights_work_and_say_so_once(place):
    """Without any weights: the parts work, the labels mean nothing, and one note says so."""
    save_photo(place / "x.png")
    arguments = ("segment", "x.png", "--untrained", "--clip", "ViT-S-32-alt", "-c", "cat, dog", "--templates", "single")
    output = run(*arguments, "--seed", "3", "-o", "one")
    assert output.count("untrained") == 1 and "the labels mean nothing" in output and "random weights" not in output
    run(*arguments, "--seed", "3", "-o", "two")
    one, two = (json.loads((place / folder / "x.json").read_text()) for folder in ("one", "two"))
    assert one == two, "the seed decides"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-c", "cat", "--dataset", "voc20"], "expected one class list, got --classes and --dataset"),
        (["-c", "cat, Cat"], "--classes: 'Cat' is given twice (classes 1 and 2)"),
        (["-c", ""], "--classes: expected names with commas between them, got no class"),
        (["--dataset", "voc"], "--dataset: expected one of voc20, "),
        (["--classes-file", "none.txt"], "--classes-file: no file none.txt"),
        (["--weights", "none"], "--weights: no file none"),
        (["--device", "tpu"], "--device: 'tpu' cannot be used here"),
        (["--weights", "tiny", "--trained-on", "voc20"], "--trained-on: expected an official checkpoint"),
        (["--weights", "tiny", "--templates", "photo"], "templates: expected 'single', 'multi'"),
        (["--weights", "tiny", "--background", "sky, sky"], "background: 'sky' is given twice"),
        (["--weights", "tiny", "--quantize", "int4"], "quantize: expected one of int8, int8-weights, fp8, got 'int4'"),
        (["--weights", "tiny", "--dtype", "half16"], "--dtype: expected one of float32, bfloat16, float16, auto, got"),
        (["--weights", "tiny", "--dtype", "nn"], "--dtype: expected one of float32, bfloat16, float16, auto, got 'nn'"),
        (["--weights", "tiny", "--min-score", "nan"], "--min-score: expected a finite number"),
        ([], "expected class names: give --classes, --classes-file or --dataset"),
        (["-c", "cat", "--clip", "ViT-B16"], "clip: expected a model of open_clip, such as "),
        (["-c", "cat", "--method", "zegclipp"], "method: expected one of"),
        (["--weights", "tiny", "--workers", "-1"], "Invalid value for '--workers'"),
        (["--weights", "tiny", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--oops"], "No such option"),
        (["--min-score", "much"], "Invalid value for '--min-score'"),
    ],
)
def test_a_users_mistakes_are_one_line_and_exit_code_2(place, tiny, options, message):
    save_photo(place / "x.png")
    output = run("segment", "x.png", "-o", "out", *options, code=2)
    assert message in output
    assert not list(place.glob("out/*"))


def test_compile_without_a_compiler_is_a_usage_error(place, tiny):
    from torch._inductor import config

    save_photo(place / "x.png")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        output = run("segment", "x.png", "-w", tiny, "--compile", code=2)
    assert output.startswith("error --compile: torch.compile needs a C++ compiler on a CPU and found none")


def test_an_image_tower_in_8_bits(place, tiny):
    pytest.importorskip("torchao", reason="needs torchao (pip install 'zs3fast[quantize]')")
    save_photo(place / "x.png")
    run("segment", "x.png", "-w", tiny, "-c", "cat, moon, sky", "--quantize", "int8", "-o", "out")
    results = [
        Segmenter.from_pretrained(tiny, quantize=kind)("x.png", ["cat", "moon", "sky"]) for kind in ("int8", None)
    ]
    saved = json.loads((place / "out" / "x.json").read_text())
    assert saved["classes"] == results[0].to_dict()["classes"]
    assert not np.array_equal(results[0].scores, results[1].scores), "8 bits leave a trace"


def test_quantize_without_torchao_is_a_usage_error(place, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    save_photo(place / "x.png")
    output = run("segment", "x.png", "-w", tiny, "--quantize", "int8", code=2)
    assert output.startswith("error quantize_encoder needs torchao 0.18 or later: pip install 'zs3fast[quantize]'")


def test_a_model_in_half_precision(place, tiny):
    save_photo(place / "x.png")
    run("segment", "x.png", "-w", tiny, "-c", "cat, moon, sky", "--dtype", "bfloat16", "-o", "out")
    saved = json.loads((place / "out" / "x.json").read_text())["classes"]
    half, full = (Segmenter.from_pretrained(tiny, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert saved == half("x.png", ["cat", "moon", "sky"]).to_dict()["classes"]
    assert saved != full("x.png", ["cat", "moon", "sky"]).to_dict()["classes"]


def test_nothing_to_segment(place, tiny):
    (place / "empty").mkdir()
    assert run("segment", "empty", "-w", tiny, code=2) == "error INPUT: no images in empty"
    assert run("segment", "*.png", "-w", tiny, code=2) == "error INPUT: no images in *.png"


def test_a_failed_write_keeps_the_old_results(place, tiny):
    save_photo(place / "x.png")
    run("segment", "x.png", "-w", tiny, "-o", "out")
    before = {file.name: file.read_bytes() for file in (place / "out").iterdir()}
    save_photo(place / "x.png", seed=9)
    with files_up_to(40):
        assert "out/x_labels.png: File too large" in run("segment", "x.png", "-w", tiny, "-o", "out", code=1)
    assert {file.name: file.read_bytes() for file in (place / "out").iterdir()} == before


def official_checkpoint(path, **extra):
    model = make_model(class_names=None, num_classes=None, seen=None)
    state = {official_keys(model)[key]: value for key, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, **extra}}, path)


def test_convert(place, monkeypatch):
    """The tiny model's heads are 12 wide; official ones are 64, which is what the command assumes."""
    from zs3fast.weights import official

    monkeypatch.setattr(official, "load_official", lambda *a, f=official.load_official, **k: f(*a, heads=4, **k))
    monkeypatch.setattr(weights, "load_official", official.load_official)
    official_checkpoint("voc.pth", **text_state(tiny_clip(), "text_encoder."))
    assert run("convert", "none.pth", "x.safetensors", code=2) == "error OFFICIAL: no file none.pth"
    with files_up_to(10_000):
        output = run("convert", "voc.pth", "voc.safetensors", code=1)
        assert output.endswith("error voc.safetensors: File too large") and not list(place.glob("*voc*.safetensors"))
    output = run("convert", "voc.pth", "voc.safetensors", "--trained-on", "voc20", "--seen-offset", "0")
    assert "voc.safetensors: zegclip, 64 pixels, 15 of 20 classes seen, with its text tower" in output
    model, extra = weights.load("voc.safetensors")
    assert (model.seen, model.num_classes, model.seen_offset) == (seen_classes("voc20"), 20, 0)
    assert model.config["class_names"] == class_names("voc20")
    assert set(extra) == set(text_state(tiny_clip(), "text_encoder."))
    save_photo(place / "x.png")
    options = ("-c", "sofa, moon", "--templates", "single")
    run("segment", "x.png", "-w", "voc.safetensors", *options, "-o", "out")
    official_checkpoint("bare.pth")
    output = run("segment", "x.png", "-w", "voc.pth", *options, "-o", "raw")
    assert "note: no --trained-on for an official checkpoint" in output
    raw, converted = (np.asarray(Image.open(f"{folder}/x_labels.png")) for folder in ("raw", "out"))
    assert np.array_equal(raw, converted), "an offset of 0 and no offset are the same"
    output = run("convert", "bare.pth", "bare.safetensors")
    assert "training vocabulary not recorded, without a text tower" in output
    output = run("segment", "x.png", "-w", "bare.safetensors", code=2)
    assert output == "error expected class names: these weights carry none, give --classes, --classes-file or --dataset"


@pytest.mark.parametrize(
    ("official", "out", "message"),
    [
        ("none.pth", "x.safetensors", "no file none.pth"),
        ("junk.pth", "x.safetensors", "junk.pth: not a readable torch file"),
        ("other.pth", "x.safetensors", "other.pth: no official checkpoint of a known method"),
        ("other.pth", "x.pth", "OUT: expected a .safetensors file, got x.pth"),
    ],
)
def test_bad_conversions(place, official, out, message):
    (place / "junk.pth").write_bytes(b"junk")
    torch.save({"weight": torch.zeros(1)}, "other.pth")
    (place / "x.safetensors").write_bytes(b"old")
    assert message in run("convert", official, out, code=2)
    assert (place / "x.safetensors").read_bytes() == b"old"


def test_info(place, tiny):
    (place / "cache" / "text").mkdir()
    output = run("info")
    for fact in (
        "zs3fast 0.",
        f"torch {torch.__version__}",
        "extension",
        "devices cpu",
        "1 files",
        ": tiny",
        "0 files",
    ):
        assert fact in output
    for op in ("attention_to_mask", "masks_to_labels", "relationship_descriptor"):
        assert op in output
    assert "not written for this op" in output, "an objection in words"


def test_brackets_of_names_are_no_markup(place, monkeypatch):
    """`[x]` was left out of a name, `[/x]` ended in a traceback."""
    monkeypatch.setenv("ZS3FAST_CACHE", str(place / "[red]a[/x]"))
    assert "/[red]a[/x] (ZS3FAST_CACHE)" in run("info").replace(" ", "").replace("(ZS", " (ZS")
    folder = place / "my [x] {y}" / "[/z]"
    for split in ("train", "val"):
        save_photo(folder / split / "i" / "[bold]a.png")
        Image.fromarray(np.zeros((30, 40), np.uint8)).save(save_photo(folder / split / "m" / "[bold]a.png"))
    (folder / "d.yaml").write_text("images: '{split}/i'\nmasks: '{split}/m'\nnames: ['[c]', '[/d]']\n")
    monkeypatch.setenv("COLUMNS", "1000")
    output = run("data", "check", folder / "d.yaml")
    assert output.count(f"{folder}/d.yaml") == 2
    (folder / "val" / "i" / "[bold]a.png").write_bytes(b"")
    output = run("data", "check", folder / "d.yaml", code=1)
    assert f"broken {folder}/d.yaml val, first pair [bold]a: " in output


@pytest.mark.parametrize("command", ["segment", "convert", "info"])
def test_every_help_shows_an_example(command):
    assert f"Example: zs3fast {command}" in run(command, "--help")


def test_commands_are_those_that_work():
    output = run("--help")
    assert all(command in output for command in ("segment", "convert", "info", "demo", "train", "eval", "data"))
    run("worlds", code=2)


def test_python_m_zs3fast():
    done = subprocess.run([sys.executable, "-m", "zs3fast", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: zs3fast" in done.stdout


def test_seen_travels_with_the_weights(tiny):
    assert Segmenter.from_pretrained(tiny).model.seen == SEEN


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_interrupt_while_weights_load_ends_with_130(place, tiny, monkeypatch, wrapped):
    """Also where C code that it struck in makes another error of it."""
    from zs3fast.utils import checkpoint_io

    save_photo(place / "x.png")

    def interrupted(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            if wrapped:
                raise ImportError("numpy._core.multiarray failed to import")  # noqa: B904
            raise

    monkeypatch.setattr(checkpoint_io.safetensors, "safe_open", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        output = run("segment", "x.png", "-w", tiny, "-o", "out", code=130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert output.endswith("interrupted")
