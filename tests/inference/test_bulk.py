"""Bulk runs: every id has one row, whatever is broken, killed or asked for twice."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.inference.test_bulk_tar import write_tar
from zs3fast.cli import app
from zs3fast.inference.segmenter import Segmenter

pytest.importorskip("ray", reason="the extra [ray] is absent")
pytest.importorskip("pycocotools", reason="the extra [ray] is absent")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray  # noqa: E402

from zs3fast.inference import bulk as bulk_module  # noqa: E402
from zs3fast.inference import bulk_files  # noqa: E402
from zs3fast.inference.bulk import BulkOptions, bulk, segment_rows  # noqa: E402
from zs3fast.inference.bulk_files import (  # noqa: E402
    MANIFEST,
    Shards,
    decode_labels,
    encode_labels,
    find_source,
)

CLASSES = "red sand, star, grass"


def image_bytes(seed: int, height: int = 40, width: int = 56) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:05}.png").write_bytes(image_bytes(number, 40 + number % 3))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for shard in sorted(folder.glob("shard-*.parquet")) for row in pq.read_table(shard).to_pylist()]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.from_pretrained("zs3fast-tiny", class_names=CLASSES, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    os.environ["RAY_worker_niceness"] = "0"  # else a busy machine starves what is waited for
    os.environ["RAY_worker_register_timeout_seconds"] = "600"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.mark.parametrize("kind", ["rle", "png"])
@pytest.mark.parametrize(
    ("classes", "shape"), [(3, (7, 5)), (300, (40, 33)), (10_000, (9, 70)), (255, (16, 17)), (1, (1, 1))]
)
def test_labels_survive(kind: str, classes: int, shape: tuple[int, int]) -> None:
    labels = np.random.default_rng(classes).integers(-1, classes, shape).astype(np.int32)
    labels[0, 0] = classes - 1
    got = decode_labels(encode_labels(labels, kind, classes), *shape)
    assert got.dtype == np.int32 and (got == labels).all()
    nothing = np.full(shape, -1, np.int32)
    assert (decode_labels(encode_labels(nothing, kind, classes), *shape) == nothing).all()


def test_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "in" / "deeper", range(2))
    write_images(tmp_path / "in", range(2, 4))
    for name in ("._00000.png", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"x")
    all_ = [str(tmp_path / "in" / name) for name in ("00002.png", "00003.png", "deeper/00000.png", "deeper/00001.png")]
    assert find_source([str(tmp_path / "in")]).ids == all_
    assert find_source([f"file://{tmp_path}/in"]).ids == all_
    assert find_source([f"{tmp_path}/in/*.png"]).ids == all_[:2]
    assert find_source([f"{tmp_path}/in/**/*.png", str(tmp_path / "in"), all_[0]]).ids == all_, "each once"
    monkeypatch.chdir(tmp_path)
    assert find_source(["in"]).ids == all_, "an id does not depend on where the command was called"
    (tmp_path / "in" / os.fsdecode(b"\xff.png")).write_bytes(image_bytes(1))
    assert find_source([str(tmp_path / "in")]).ids[-1] == f"{tmp_path}/in/\\xff.png".replace("\\xff", "\\udcff")


def table(ids: list[Any], numbers: list[int] | None = None) -> pa.Table:
    return pa.table({"id": ids, "bytes": [image_bytes(number) for number in numbers or range(len(ids))]})


def test_inputs_that_are_no_good(tmp_path: Path) -> None:
    def refused(*inputs: Path | str, kind: type[Exception] = ValueError) -> str:
        with pytest.raises(kind) as raised:
            find_source([str(one) for one in inputs])
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "nothing is at" in refused(tmp_path / "absent", kind=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert "none in" in refused(tmp_path / "empty") and "none in" in refused(tmp_path / "*.jpg")
    pq.write_table(table(["a", "b", "a"]), tmp_path / "twice.parquet")
    assert "'a' 2 times" in refused(tmp_path / "twice.parquet")
    pq.write_table(table(["a", "b"]), tmp_path / "one.parquet")
    pq.write_table(table(["c", "b"]), tmp_path / "two.parquet")
    said = refused(tmp_path / "one.parquet", tmp_path / "two.parquet")
    assert "'b' 2 times" in said and "one.parquet" in said and "two.parquet" in said
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "lacks.parquet")
    assert "columns id and bytes" in refused(tmp_path / "lacks.parquet")
    pq.write_table(table(["a", None]), tmp_path / "null.parquet")
    assert "1 have none" in refused(tmp_path / "null.parquet")
    pq.write_table(table([0.5, 1.0]), tmp_path / "real.parquet")
    assert "text or integers, got double" in refused(tmp_path / "real.parquet")
    for kind in ([1], ["x"], [{"bytes": b"x", "path": "x"}], [[1, 2]]):
        pq.write_table(pa.table({"id": ["a"], "bytes": kind}), tmp_path / "kind.parquet")
        assert "kind.parquet: expected bytes that are binary, got" in refused(tmp_path / "kind.parquet")
    for names in (["id", "bytes", "id"], ["id", "bytes", "bytes"], ["bytes"], []):
        columns = [pa.array(["a"] if name == "id" else [b"x"]) for name in names]
        pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "names.parquet")
        assert "columns id and bytes, each once, got" in refused(tmp_path / "names.parquet")
    pq.write_table(pa.table({"id": ["a"], "bytes": pa.array([b"x"], pa.binary(1))}), tmp_path / "fixed.parquet")
    assert find_source([str(tmp_path / "fixed.parquet")]).ids == ["a"]
    pq.write_table(pa.table({"id": pa.nulls(0), "bytes": pa.nulls(0)}), tmp_path / "none.parquet")
    assert "expected rows, none in 1 of Parquet files" in refused(tmp_path / "none.parquet")
    assert find_source([str(tmp_path / "none.parquet"), str(tmp_path / "one.parquet")]).ids == ["a", "b"]
    whole = (tmp_path / "one.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    assert "half.parquet" in refused(tmp_path / "half.parquet")
    for length in (0, 3, 10, len(whole) - 1):  # a transfer may end anywhere
        (tmp_path / "half.parquet").write_bytes(whole[:length])
        assert "half.parquet is no whole Parquet file" in refused(tmp_path / "half.parquet")
    (tmp_path / "holes.parquet").write_bytes(whole[:20] + bytes(180) + whole[200:])  # damaged pages, a whole footer
    assert "holes.parquet is no whole Parquet file" in refused(tmp_path / "holes.parquet")
    write_images(tmp_path / "images", range(1))
    assert "got images and Parquet files" in refused(tmp_path / "images", tmp_path / "one.parquet")
    with pytest.raises(ValueError, match="INPUT: expected images outside of OUTPUT, all 1 lie in"):
        find_source([str(tmp_path / "images")], str(tmp_path / "images"))
    write_tar(tmp_path / "one.tar", {"a.png": b"x", "b.png": b"x"})
    write_tar(tmp_path / "two.tar", {"c.png": b"x", "b.jpg": b"x"})
    assert "got images and WebDataset shards" in refused(tmp_path / "images", tmp_path / "one.tar")
    said = refused(tmp_path / "one.tar", tmp_path / "two.tar")
    assert "'b' 2 times" in said and "one.tar" in said and "two.tar" in said
    write_tar(tmp_path / "both.tar", {"a.png": b"x", "a.jpg": b"x"})
    assert "both.tar: expected one image in a sample, got jpg and png in 'a'" in refused(tmp_path / "both.tar")
    write_tar(tmp_path / "text.tar", {"a.txt": b"x"})
    assert "none of its 1 samples" in refused(tmp_path / "text.tar")
    (tmp_path / "half.tar").write_bytes((tmp_path / "one.tar").read_bytes()[:1000])
    assert "half.tar is no whole plain tar" in refused(tmp_path / "one.tar", tmp_path / "half.tar")
    (tmp_path / "packed.tar.gz").write_bytes(b"")
    assert "not compressed" in refused(tmp_path / "packed.tar.gz")
    assert "foo://bucket" in refused("foo://bucket")
    assert "one file system" in refused(tmp_path / "images", "memory://x")


def test_a_file_system_that_fails_to_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """hdfs:// without Java raises an OSError that names nothing."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("Unable to load libjvm\nand more")

    monkeypatch.setattr(bulk_files, "url_to_fs", fail)
    with pytest.raises(ValueError, match="INPUT: hdfs://a/b cannot be opened .Unable to load libjvm and more"):
        find_source(["hdfs://a/b"])


def told(**changes: Any) -> dict[str, Any]:
    named = {key: {"name": f"{key} 1", "fingerprint": "a" * 64} for key in ("model", "class_list")}
    return {**named, "protocol": {"labels": "rle", "min_score": None}, **changes}


def row(one: str, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("height", "width", "labels", "shares", "model", "class_list", "error"))
    return {"id": one, **empty, **values}


@pytest.mark.parametrize("where", ["local", "memory"])
def test_another_run_is_refused(where: str, tmp_path: Path) -> None:
    url = str(tmp_path / "out") if where == "local" else f"memory://bulk-{tmp_path.name}"
    shards = Shards(url, "rle")
    shards.begin(told())
    shards.begin(told())
    for changes, wanted in (
        ({"model": {"name": "other", "fingerprint": "b" * 64}}, "model 1 (aaaaaaaaaaaa), got other (bbbbbbbbbbbb)"),
        ({"class_list": {"name": "x", "fingerprint": "c" * 64}}, "class_list 1 (aaaaaaaaaaaa), got x (cccccccccccc)"),
        ({"protocol": {"labels": "rle", "min_score": 0.5}}, "min_score None, got 0.5"),
    ):
        with pytest.raises(ValueError, match="was begun with") as raised:
            shards.begin(told(**changes))
        assert wanted in str(raised.value)
    shards.begin(told())
    shards.fs.pipe_file(shards.manifest, b"{}")
    with pytest.raises(ValueError, match="no manifest"):
        shards.begin(told())


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds others"):
        Shards(str(tmp_path), "rle").begin(told())
    with pytest.raises(ValueError, match="got the file"):
        Shards(str(tmp_path / "mine.txt"), "rle").begin(told())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("where", ["local", "memory"])
def test_shards(where: str, tmp_path: Path) -> None:
    """Rows again are the same file; grouped otherwise, an id keeps one row; what is half written goes, nothing else."""
    url = str(tmp_path / "out") if where == "local" else f"memory://shards-{tmp_path.name}"
    shards = Shards(url, "rle")
    shards.begin(told())
    first = shards.write([row("a"), row("b", error="broken")])
    assert shards.write([row("a"), row("b", error="broken")]) == first and shards.names() == [first]
    shards.write([row("b", error="broken"), row("c")])
    shards.write([row("a")])
    assert shards.settle() == ({"a", "b", "c"}, 1)
    left = [one for name in shards.names() for one in pq.read_table(shards.fs.open(name)).column("id").to_pylist()]
    assert sorted(left) == ["a", "b", "c"]
    half = f"{shards.path}/.shard-0.part.parquet"
    shards.fs.pipe_file(half, b"PAR1")
    shards.fs.pipe_file(f"{shards.path}/.keep", b"mine")
    assert shards.settle() == ({"a", "b", "c"}, 1)
    shards.remove_unfinished()
    assert not shards.fs.exists(half) and shards.fs.exists(f"{shards.path}/.keep")
    shards.fs.pipe_file(first, shards.fs.cat_file(first)[:-20])
    with pytest.raises(ValueError, match=Path(first).name):
        shards.settle()
    assert shards.fs.exists(first)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    shards = Shards(str(tmp_path), "rle")
    shards.begin(told())
    with shards.alone():
        with pytest.raises(ValueError, match="expected a folder of this run alone, another is writing"), shards.alone():
            pass
    with shards.alone():
        pass


def test_rows_are_what_the_segmenter_says(segmenter: Segmenter) -> None:
    """Broken and equal images among them: a row each, in order."""
    data = [image_bytes(0), b"no image", image_bytes(1, 33, 70), image_bytes(0), None]
    rows = [{"id": str(i), "bytes": one, "error": None if one else "gone"} for i, one in enumerate(data)]
    got = segment_rows(segmenter, rows, BulkOptions(background="grass"))
    assert [one["id"] for one in got] == list("01234")
    assert [one["error"] is None for one in got] == [True, False, True, True, False] and got[4]["error"] == "gone"
    assert "Pillow" in got[1]["error"] and got[1]["labels"] is None
    for index in (0, 2, 3):
        one, expected = got[index], segmenter(data[index], background="grass")
        assert (one["height"], one["width"]) == expected.labels.shape
        assert (decode_labels(one["labels"], one["height"], one["width"]) == expected.labels).all()
        for entry in json.loads(one["shares"]):
            assert entry["share"] == pytest.approx((expected.labels == entry["index"]).mean(), abs=1e-6)
            assert expected.class_names[entry["index"]] == entry["name"]


def test_a_gpu_that_fails_is_no_images_error(segmenter: Segmenter) -> None:
    """Else every row after it would be one with an error, and none be tried again."""
    import torch

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("device-side assert")

    rows = [{"id": "a", "bytes": image_bytes(0), "error": None}]
    hook = segmenter.model.encoder.register_forward_pre_hook(fail)
    try:
        with pytest.raises(torch.AcceleratorError):
            segment_rows(segmenter, rows, BulkOptions())
    finally:
        hook.remove()


def test_refinement_is_told_and_reaches_the_actors(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command's --refine, as segment has it; another number of steps is another run; without it as ever."""
    write_images(tmp_path / "in", range(2))
    seen: list[Any] = []
    monkeypatch.setattr(bulk_module, "ray_started", lambda *_: contextlib.nullcontext())

    def receipts(source: Any, have: Any, shards: Shards, made: Segmenter, told: Any, options: BulkOptions) -> list[int]:
        seen.append(told["protocol"].get("refine"))
        actor = bulk_module.actor_segmenter(made.model, made.text_encoder, made.classes, made.options)
        rows = [{"id": one, "bytes": Path(one).read_bytes(), "error": None} for one in source.ids if one not in have]
        stamp = {key: told[key]["fingerprint"] for key in ("model", "class_list")}
        shards.write([{**row, **stamp} for row in segment_rows(actor, rows, options)])
        return [len(rows)]

    monkeypatch.setattr(bulk_module, "_receipts", receipts)
    run = [str(tmp_path / "in"), str(tmp_path / "out"), "-w", "zs3fast-tiny", "-c", CLASSES]
    refined = Segmenter.from_pretrained("zs3fast-tiny", class_names=CLASSES, device="cpu", dtype="float32", refine=10)
    result = CliRunner().invoke(app, ["bulk", "--refine", *run])
    assert result.exit_code == 0, result.output
    for row in rows_of(tmp_path / "out"):
        labels = decode_labels(row["labels"], row["height"], row["width"])
        assert (labels == refined(row["id"]).labels).all() and (labels != segmenter(row["id"]).labels).any()
    for more in (["--refine", "3"], []):
        result = CliRunner().invoke(app, ["bulk", *more, *run])
        assert result.exit_code == 2 and len(result.output.splitlines()) == 1
        assert f"protocol refine 10, got {more[-1] if more else None}" in result.output
    run[1] = str(tmp_path / "plain")
    assert CliRunner().invoke(app, ["bulk", *run]).exit_code == 0 and seen == [10, None]


def test_a_ray_that_does_not_start_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray raises on a busy machine is a plain Exception, which once was a traceback."""
    write_images(tmp_path / "in", range(1))
    run = ["bulk", str(tmp_path / "in"), str(tmp_path / "out"), "-w", "zs3fast-tiny", "-c", CLASSES]
    for raised in (Exception("The current node timed out during startup.\nThis could"), TimeoutError("too long")):

        def late(*_: Any, raised: Exception = raised, **__: Any) -> None:
            raise raised

        monkeypatch.setattr(ray, "init", late)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        for more, code, said in (
            ([], 1, "Ray did not start on this machine: "),
            (["--address", "a:1"], 2, "no Ray cluster"),
        ):
            result = CliRunner().invoke(app, [*run, *more])
            assert result.exit_code == code and said in result.output and "Traceback" not in result.output
            assert len(result.output.splitlines()) == 1 and str(raised).split("\n")[0] in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MANIFEST]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": "gif"}, "labels"),
        ({"actors": 0}, "actors"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"num_cpus": -1}, "num_cpus"),
        ({"num_gpus": float("nan")}, "num_gpus"),
        ({"workers": -1}, "workers"),
        ({"dtype": "int4"}, "dtype"),
    ],
)
def test_options_that_are_no_good(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BulkOptions(**options)


def test_a_folder_twice_with_more_in_it(
    segmenter: Segmenter, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not done again; what came in the meantime is; nothing to do does not ask Ray."""
    write_images(tmp_path / "in", range(14))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    options, out = BulkOptions(shard_rows=4), tmp_path / "out"
    report = bulk([str(tmp_path / "in")], str(out), segmenter, "tiny", options)
    assert (report.done, report.failed, report.before) == (15, 1, 0)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    rows = {row["id"]: row for row in rows_of(out)}
    assert len(rows) == len(rows_of(out)) == 15
    for path in (tmp_path / "in").glob("*.png"):
        row = rows[str(path)]
        labels = decode_labels(row["labels"], row["height"], row["width"])
        assert (labels == segmenter(path).labels).all() and row["error"] is None
    assert "Pillow" in rows[str(tmp_path / "in" / "broken.jpg")]["error"]
    write_images(tmp_path / "in", range(14, 17))
    report = bulk([str(tmp_path / "in")], str(out), segmenter, "tiny", options)
    assert (report.done, report.failed, report.before) == (3, 1, 15)
    assert len({row["id"] for row in rows_of(out)}) == len(rows_of(out)) == 18
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}.items()
    monkeypatch.setattr(bulk_module, "ray", None)
    assert bulk([str(tmp_path / "in")], str(out), segmenter, "tiny", options).done == 0
    other = Segmenter.from_pretrained("zs3fast-tiny", class_names="red sand, box", device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="class_list"):
        bulk([str(tmp_path / "in")], str(out), other, "tiny", options)


def test_small_shards_are_work_for_every_actor(tmp_path: Path, local_ray: None) -> None:
    """Once readers handed on 32 rows whatever a shard had: one task and one actor for 24 images."""
    write_images(tmp_path / "in", range(24))
    write_tar(tmp_path / "x.tar", {f"{number}.png": image_bytes(number) for number in range(24)})
    for inputs in ("in", "x.tar"):
        dataset = bulk_module._dataset(find_source([str(tmp_path / inputs)]), set(), BulkOptions(shard_rows=4))
        sizes = [len(ray.get(one)) for one in dataset.materialize().to_arrow_refs()]
        assert sizes == [4] * 6


def test_webdataset_shards(segmenter: Segmenter, tmp_path: Path, local_ray: None) -> None:
    """Ids are the keys; what lies beside an image, between images or has none; a second run goes on inside a shard."""
    images = {f"a/{number:03}": image_bytes(number) for number in range(9)}
    first: dict[str, bytes] = {}
    for key, content in images.items():
        first |= {f"{key}.png": content, f"{key}.json": b"{}" * (1 + 70000 * (key == "a/003")), f"{key}.seg.png": b"x"}
    second = {"Grün 猫.png": image_bytes(20), "broken.png": b"x", "words.txt": b"x", os.fsdecode(b"\xff.png"): b"x"}
    write_tar(tmp_path / "0.tar", first)
    write_tar(tmp_path / "1.tar", second)
    options, out = BulkOptions(shard_rows=4), tmp_path / "out"  # inside the folder that is read below
    report = bulk([str(tmp_path / "*.tar")], str(out), segmenter, "tiny", options)
    assert (report.done, report.failed, report.before) == (13, 3, 0)
    rows = {row["id"]: row for row in rows_of(out)}
    assert set(rows) == {*images, "Grün 猫", "broken", "words", "\\udcff"} and len(rows_of(out)) == 13
    for key, content in {**images, "Grün 猫": second["Grün 猫.png"]}.items():
        got = decode_labels(rows[key]["labels"], rows[key]["height"], rows[key]["width"])
        assert (got == segmenter(content).labels).all()
    assert rows["words"]["error"] == "no image among txt" and "Pillow" in rows["broken"]["error"]
    lost = next(path for path in out.glob("shard-*") if "a/003" in pq.read_table(path).column("id").to_pylist())
    before = {row["id"] for row in pq.read_table(lost).to_pylist()}
    lost.unlink()
    report = bulk([str(tmp_path)], str(out), segmenter, "tiny", options)
    assert report.done == len(before) and sorted(row["id"] for row in rows_of(out)) == sorted(rows)


def test_a_tar_that_has_changed(tmp_path: Path) -> None:
    """Since its headers were read: rows with errors, never another image's bytes."""
    path = write_tar(tmp_path / "x.tar", {f"{number}.png": image_bytes(number) for number in range(3)})
    source = find_source([str(path)])
    table = pa.Table.from_pylist(list(bulk_module._places(source)), bulk_module._PLACES)
    read = bulk_module._read(table, source.fs)
    assert read.column("bytes").to_pylist() == [image_bytes(number) for number in range(3)]
    path.write_bytes(path.read_bytes()[:600])
    read = bulk_module._read(table, source.fs)
    assert read.column("bytes").null_count == 3 and all("bytes in the tar" in one for one in read["error"].to_pylist())


@pytest.mark.slow
def test_parquet_files(segmenter: Segmenter, tmp_path: Path, local_ray: None) -> None:
    """Ids that are numbers, bytes that are missing; a row that was done is left out of the second run."""
    images = [image_bytes(number) for number in range(5)] + [None]
    pq.write_table(pa.table({"bytes": images, "id": list(range(6)), "more": ["x"] * 6}), tmp_path / "a.parquet")
    options = BulkOptions(shard_rows=4, labels="png")
    inputs, out = [str(tmp_path / "*.parquet")], tmp_path / "out"
    assert bulk(inputs, str(out), segmenter, "tiny", options).failed == 1
    row = next(row for row in rows_of(out) if row["id"] == "3")
    assert (decode_labels(row["labels"], 40, 56) == segmenter(images[3]).labels).all()
    lost = next(path for path in out.glob("shard-*") if "3" in pq.read_table(path).column("id").to_pylist())
    gone = pq.read_table(lost).num_rows
    lost.unlink()
    report = bulk(inputs, str(out), segmenter, "tiny", options)
    assert (report.done, report.before) == (gone, 6 - gone)
    assert sorted(row["id"] for row in rows_of(out)) == list("012345")


@pytest.mark.slow
def test_parquet_files_of_unlike_types(segmenter: Segmenter, tmp_path: Path, local_ray: None) -> None:
    """Writers differ in what they call text and bytes; Ray read all by the first file's types."""
    kinds = [(pa.int64(), pa.binary()), (pa.string(), pa.large_binary()), (pa.large_string(), pa.binary())]
    kinds.append(kinds[1])  # alike but for a column that is not asked for
    for file, (text, data) in enumerate(kinds):
        ids = pa.array([file] if text == pa.int64() else [f"a{file}"], text)
        columns = {
            "more": pa.array([[1.0] if file % 3 else "x"]),
            "bytes": pa.array([image_bytes(file)], data),
            "id": ids,
        }
        folder = tmp_path / f"id={file}"  # no partition's name stands for a column
        folder.mkdir()
        pq.write_table(pa.table(columns), folder / f"{file}.PARQUET")
    pq.write_table(pa.table({"id": ["none"], "bytes": pa.nulls(1)}), tmp_path / "nulls.parquet")
    report = bulk([str(tmp_path)], str(tmp_path / "out"), segmenter, "tiny")
    assert (report.done, report.failed) == (5, 1)
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert sorted(rows) == ["0", "a1", "a2", "a3", "none"] and rows["none"]["error"] == "the row holds no bytes"
    for file, one in enumerate(("0", "a1", "a2", "a3")):
        assert (decode_labels(rows[one]["labels"], 40, 56) == segmenter(image_bytes(file)).labels).all()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["s3fs", "pyarrow"])
def test_buckets(package: str, segmenter: Segmenter, tmp_path: Path) -> None:
    """Against a server that speaks S3; through pyarrow where s3fs is absent. A bucket that is not there is said."""
    server_of = pytest.importorskip("moto.server", reason="moto[server] is absent").ThreadedMotoServer
    pytest.importorskip("s3fs", reason="s3fs is absent")
    import boto3

    server = server_of(port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    url = f"http://127.0.0.1:{port}"
    named = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1", "endpoint_url": url}
    absent = {"s3fs": "", "pyarrow": "sys.modules['s3fs'] = None; "}[package]
    code = f"import sys; {absent}from zs3fast.__main__ import main; main()"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **keys, "AWS_ENDPOINT_URL": url}
        said = ["bulk", *arguments, "-w", "zs3fast-tiny", "-c", CLASSES, "--shard-rows", "2"]
        return subprocess.run([sys.executable, "-c", code, *said], capture_output=True, text=True, env=environment)

    try:
        store = boto3.client("s3", **named)
        store.create_bucket(Bucket=package)
        for number in range(5):
            store.put_object(Bucket=package, Key=f"in/ä {number}.png", Body=image_bytes(number))
        write_tar(tmp_path / "x.tar", {f"{number}.png": image_bytes(number) for number in range(5)})
        store.put_object(Bucket=package, Key="tars/x.tar", Body=(tmp_path / "x.tar").read_bytes())
        for inputs, name in (("in/*.png", f"s3://{package}/in/ä {{}}.png"), ("tars", "{}")):
            out = f"s3://{package}/out-{inputs[:2]}"
            for before in ("", ", 5 were there"):
                ended = run(f"s3://{package}/{inputs}", out)
                assert ended.returncode == 0 and before in ended.stdout, ended
            found = store.list_objects_v2(Bucket=package, Prefix=f"out-{inputs[:2]}/shard-")["Contents"]
            shards = [store.get_object(Bucket=package, Key=one["Key"])["Body"].read() for one in found]
            rows = [row for shard in shards for row in pq.read_table(io.BytesIO(shard)).to_pylist()]
            assert sorted(row["id"] for row in rows) == [name.format(number) for number in range(5)]
            for row in rows:
                number = next(n for n in range(5) if row["id"] == name.format(n))
                labels = decode_labels(row["labels"], row["height"], row["width"])
                assert (labels == segmenter(image_bytes(number)).labels).all()
        for arguments in (("s3://no-bucket/in", "out"), (f"s3://{package}/in", "s3://no-bucket/out")):
            ended = run(*arguments)
            assert ended.returncode in (1, 2) and "s3://no-bucket" in ended.stderr
            assert len(ended.stderr.splitlines()) == 1
    finally:
        server.stop()


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "zs3fast", "bulk", *map(str, arguments), "-w", "zs3fast-tiny", "-c", CLASSES]


def test_help_without_ray() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv = ['zs3fast', 'bulk', *sys.argv[1:]]; from zs3fast.__main__ "
    )
    code += "import main; main()"
    run = [sys.executable, "-c", code]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0 and "--shard-rows" in shown.stdout, shown.stderr
    failed = subprocess.run([*run, "in", "out"], capture_output=True, text=True, timeout=100)
    assert failed.returncode == 2 and "zs3fast[ray]" in failed.stderr and len(failed.stderr.splitlines()) == 1


def test_what_the_command_says_of_bad_input(tmp_path: Path) -> None:
    write_images(tmp_path / "in", range(1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    inside, out = str(tmp_path / "in"), str(tmp_path / "out")
    for arguments, said in (
        ([str(tmp_path / "absent"), out], "nothing is at"),
        ([inside, str(tmp_path / "mine")], "holds others"),
        ([inside, str(tmp_path / "mine" / "notes.txt")], "OUTPUT: expected a folder, got the file"),
        ([inside, str(tmp_path / "mine" / "notes.txt" / "out")], "OUTPUT: "),
        ([inside, inside], "outside of OUTPUT"),
        (["", out], "INPUT: expected a path or URL, got ''"),
        ([inside, " "], "OUTPUT: expected a path or URL, got ' '"),
        (["foo://bucket/in", out], "INPUT: foo://bucket/in"),
        ([inside, "foo://bucket/out"], "OUTPUT: foo://bucket/out"),
        ([inside, out, "--labels", "gif"], "--labels"),
        ([inside, out, "--method", "maskclip"], "got both"),
        ([inside, out, "--dataset", "voc20"], "expected one class list"),
        ([inside, out, "--num-gpus", "-1"], "--num-gpus"),
    ):
        result = CliRunner().invoke(app, ["bulk", *arguments, "-w", "zs3fast-tiny", "-c", CLASSES])
        assert result.exit_code == 2 and said in result.output, result.output
        assert len(result.output.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "mine"], "nothing is written"


def children_named(pid: int, name: str) -> list[int]:
    import psutil

    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("images", "kills"), [(60, 2), pytest.param(2000, 20, marks=pytest.mark.slow)], ids=["2 kills", "20 kills"]
)
def test_killed_drivers_and_actors(images: int, kills: int, tmp_path: Path, local_ray: None) -> None:
    """kill -9 of an actor, then of the driver, at moments of all kinds; then one run to the end: each id once.

    Drivers share the test's Ray, as on a cluster: what a killed one's actors are at may outlive it. Every fourth has a
    Ray of its own, whose start is most of its time.
    """
    out = tmp_path / "out"
    write_images(tmp_path / "in", range(images))
    run = command(tmp_path / "in", out, "--shard-rows", 4)
    shared = [*run, "--address", ray.get_runtime_context().gcs_address]
    moments = np.random.default_rng(0)
    killed = attempts = 0
    while killed < kills:
        attempts += 1
        kind = run if attempts % 4 == 3 else shared
        process = subprocess.Popen(kind, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        have = shards_in(out)
        if attempts % 4 != 2:  # while shards are written
            while process.poll() is None and shards_in(out) <= have:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 0.3))
        else:  # while all of it starts
            time.sleep(moments.uniform(0, 5))
        if process.poll() is None:
            for pid in children_named(os.getpid(), "MapWorker")[:1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
                time.sleep(moments.uniform(0, 1))
        if process.poll() is None:
            process.kill()
            killed += 1
        assert process.wait() != 0, "it was done before it could be killed: take more images"
        assert attempts < 2 * kills
    done = subprocess.run(shared, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    ids = [row["id"] for row in rows_of(out)]
    assert len(ids) == images and set(ids) == set(find_source([str(tmp_path / "in")]).ids)
    assert {path.name for path in out.iterdir() if not path.name.startswith("shard-")} == {MANIFEST}


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("shard-*")))


@pytest.mark.slow
def test_a_killed_actor_is_started_again(tmp_path: Path) -> None:
    count, out = 200, tmp_path / "out"
    write_images(tmp_path / "in", range(count))
    run = command(tmp_path / "in", out, "--shard-rows", 8)
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(out.glob("shard-*")):
        time.sleep(0.05)
    victims = children_named(process.pid, "MapWorker")
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    ids = [row["id"] for row in rows_of(out)]
    assert len(ids) == len(set(ids)) == count


def test_label_files(segmenter: Segmenter, tmp_path: Path, local_ray: None) -> None:
    """As `segment` writes them, in OUTPUT; of equal names in two folders both; their rows say which."""
    for folder in ("a", "b"):
        write_images(tmp_path / "in" / folder, range(2))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    report = bulk([str(tmp_path / "in")], str(out), segmenter, "tiny", BulkOptions(labels="files"))
    assert (report.done, report.failed) == (5, 1)
    rows = {row["id"]: row for row in rows_of(out)}
    for path in sorted((tmp_path / "in").glob("*/*.png")):
        row, expected = rows[str(path)], segmenter(path)
        assert row["labels"].startswith(f"{path.stem}-") and row["error"] is None
        values = np.asarray(Image.open(out / row["labels"])).astype(np.int32)
        assert (np.where(values == 255, -1, values) == expected.labels).all()
        summary = json.loads((out / row["labels"].replace("_labels.png", ".json")).read_text())
        assert summary == {**summary, **expected.to_dict()} and (out / summary["overlay"]).is_file()
        with pytest.raises(ValueError, match="got a file"):
            decode_labels(row["labels"], row["height"], row["width"])
    assert rows[str(tmp_path / "in" / "broken.jpg")]["labels"] is None
    assert len(list(out.glob("*_labels.png"))) == len({row["labels"] for row in rows.values()}) - 1 == 4
    assert bulk([str(tmp_path / "in")], str(out), segmenter, "tiny", BulkOptions(labels="files")).done == 0
    with pytest.raises(ValueError, match="labels"):
        bulk([str(tmp_path / "in")], str(out), segmenter, "tiny", BulkOptions(labels="rle"))


def test_names_of_label_files(segmenter: Segmenter, tmp_path: Path) -> None:
    """Ids of shards are any text; their files stay in the folder, each of its own name."""
    ids = ["../up", "a/01", "b/01", "..", "nul\0", "long" * 99, "-"]
    rows = [{"id": one, "bytes": image_bytes(0), "error": None} for one in ids]
    (tmp_path / "out").mkdir()
    shards = Shards(str(tmp_path / "out"), "files")
    got = segment_rows(segmenter, rows, BulkOptions(labels="files"), shards)
    assert len({row["labels"] for row in got}) == len(ids) and [row["error"] for row in got] == [None] * len(ids)
    assert {path.name for path in (tmp_path / "out").glob("*_labels.png")} == {row["labels"] for row in got}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_label_files_are_local() -> None:
    with pytest.raises(ValueError, match="labels: expected rle or png for memory://out"):
        Shards("memory://out", "files")
