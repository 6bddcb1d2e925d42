"""Any number of images -> Parquet shards of label maps, each image exactly once, on Ray.

    ids -> read bytes (tasks) -> decode (threads), segment, write a shard (actors) -> receipts -> the driver

Ray hands out the work, holds readers back while actors are busy and starts actors that died again. Pixels never leave
an actor: it reads encoded bytes and writes encoded labels. A shard appears whole under a name made of its ids, so work
done twice (a node lost after its shard was written) is the same file; `Shards.settle` sees to the rest.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from zs3fast.inference.options import SegmenterOptions
from zs3fast.inference.segmenter import Segmenter
from zs3fast.models.base import ZeroShotModel
from zs3fast.utils.console import first_line
from zs3fast.utils.options import one_of

try:
    import pyarrow as pa
    import ray
    import ray.data

    from zs3fast.inference.bulk_files import LABELS, Shards, Source, encode_labels, find_source, fingerprint
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("ray", "pyarrow", "fsspec", "pycocotools"):
        raise
    raise ImportError(f"bulk needs {error.name}: pip install 'zs3fast[ray]'") from None

_READERS = 8  # files a task asks for at once: latency, not work
_READ_ROWS = 32  # rows a reading task hands on at a time, at most a shard's
_GAP = 1 << 16  # bytes between images of a tar that are read and dropped rather than asked around


@dataclass(frozen=True)
class BulkOptions:
    """How a bulk run works.

    labels: "rle" (COCO's) or "png", in the shards; or "files", as `zs3fast segment` writes them, in the output folder.
    min_score, background: as for a Segmenter's call.
    actors: models at work at once.  num_gpus, num_cpus: of each, may be fractions.
    shard_rows: rows of a shard, which is also what an actor that dies has to do again.
    batch_size: images whose windows share the model's batches.  workers: threads of an actor that decode; None: see
    `zs3fast.inference.streaming.default_workers`.
    dtype, quantize: what actors run the model in, see `SegmenterOptions`.
    address: of a Ray cluster, or "auto"; None: Ray is started on this machine, and ended with the run.
    """

    labels: str = "rle"
    min_score: float | None = None
    background: str | Sequence[str] = ()
    actors: int = 1
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    shard_rows: int = 256
    batch_size: int = 1
    workers: int | None = None
    dtype: str = "auto"
    quantize: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        one_of("labels", self.labels, list(LABELS))
        for name in ("actors", "shard_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("num_gpus", "num_cpus"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        SegmenterOptions(dtype=self.dtype, quantize=self.quantize)  # checks them
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers: expected 0 or more threads, got {self.workers}")


@dataclass(frozen=True)
class BulkReport:
    """What a run did. done: rows it wrote.  failed: rows of the folder that hold an error.  before: rows found done."""

    done: int
    failed: int
    before: int


def bulk(
    inputs: Sequence[str] | Source,
    output: str,
    segmenter: Segmenter,
    name: str,
    options: BulkOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BulkReport:
    """Segment every image of `inputs` that has no row in `output` yet.

    Args:
        inputs: images, folders, globs or URLs of these; or Parquet files with columns id and bytes, or WebDataset
            shards (tars). What lies in `output` is left out. Or what `find_source` found of these.
        output: a folder or its URL. It is refused where another model, class list or protocol began it.
        segmenter: the model and its classes, in float32 on the CPU and not quantized; it stays on the driver, actors
            have copies of their own, in the type that `options` asks for.
        name: what the manifest calls the model.
        progress: told (rows done, rows to do).
    Raises:
        ValueError, FileNotFoundError: arguments and files that are no good, before anything is written.
        RuntimeError: Ray gave up; what is finished stays, and the same call goes on from there.
    """
    options = options or BulkOptions()
    source = inputs if isinstance(inputs, Source) else find_source(inputs, output)
    segmenter.check(min_score=options.min_score, background=options.background)
    told = _told(segmenter, name, options)
    shards = Shards(output, options.labels)
    shards.begin(told)
    with shards.alone():
        shards.remove_unfinished()
        have, failed = shards.settle()
        missing = sum(one not in have for one in source.ids)
        if not missing:
            return BulkReport(0, failed, len(have))
        with ray_started(options.address, options.actors, options.num_gpus, options.num_cpus):
            done = 0
            for receipt in _receipts(source, have, shards, segmenter, told, options):
                done += receipt
                if progress is not None:
                    progress(done, missing)
        now, failed = shards.settle()
    lost = sum(one not in now for one in source.ids)
    if lost:
        raise RuntimeError(f"{lost} of {missing} rows are missing from {output}; run again for them")
    return BulkReport(len(now) - len(have), failed, len(have))


def _told(segmenter: Segmenter, name: str, options: BulkOptions) -> dict[str, Any]:
    """What the manifest holds: all that labels depend on."""
    entries = segmenter.classes
    if entries is None:
        raise ValueError("classes: expected class names, since the model has no list of its own")
    chosen = segmenter.options
    background = options.background if isinstance(options.background, str) else list(options.background)
    protocol = {
        "method": segmenter.model.method,
        "labels": options.labels,
        "min_score": options.min_score,
        "background": background or "",
        "templates": list(segmenter.templates),
        "dtype": options.dtype,
        "quantize": options.quantize,
        "protocol": None if chosen.protocol is None else str(chosen.protocol),
    }
    if chosen.refine is not None:  # else as ever: what earlier versions began goes on
        protocol["refine"] = chosen.refine_steps
    classes = [list(entry) for entry in entries]
    shown = ", ".join(entry[0] for entry in entries[:5]) + (", ..." if len(entries) > 5 else "")
    return {
        "model": {"name": name, "fingerprint": model_fingerprint(segmenter)},
        "class_list": {"name": shown, "fingerprint": fingerprint([json.dumps(classes).encode()]), "classes": classes},
        "protocol": protocol,
    }


def model_fingerprint(segmenter: Segmenter) -> str:
    """Of the model's configuration and weights, and its text tower's, whatever file they came from."""

    modules: tuple[nn.Module, ...] = (segmenter.model, segmenter.text_encoder.tower)

    def parts() -> Iterator[bytes]:
        config = {key: value for key, value in segmenter.model.config.items() if key != "class_names"}
        yield json.dumps(config, sort_keys=True, default=str).encode()
        for module in modules:
            for key, tensor in sorted(module.state_dict().items()):
                flat = tensor.detach().cpu().contiguous()
                yield f"{key} {flat.dtype} {list(flat.shape)}".encode()
                yield _raw(flat)

    return fingerprint(parts())


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _receipts(
    source: Source, have: set[str], shards: Shards, segmenter: Segmenter, told: dict[str, Any], options: BulkOptions
) -> Iterator[int]:
    """Run the pipeline; rows of each shard as it is written."""
    parts = ray.put((segmenter.model, segmenter.text_encoder))  # once, for all actors of a node
    device = "cuda" if options.num_gpus else "cpu"
    how = segmenter.options.with_({"device": device, "dtype": options.dtype, "quantize": options.quantize})
    dataset = _dataset(source, have, options).map_batches(
        _Worker,
        fn_constructor_args=(parts, segmenter.classes, how, told, shards),
        fn_constructor_kwargs={"options": options},
        batch_size=options.shard_rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_gpus=options.num_gpus or None,
        num_cpus=options.num_cpus,
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield sum(batch.column("rows").to_pylist())
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()
        raise RuntimeError(f"Ray gave up: {reason[-1] if reason else type(error).__name__}") from error


def _dataset(source: Source, have: set[str], options: BulkOptions) -> Any:
    """Rows (id, bytes, error) that are missing, read by tasks."""
    # Ray gives a task no fewer rows than a batch has: more than a shard's, and few images would all be one actor's.
    step = min(_READ_ROWS, options.shard_rows)
    if source.ids_by_file is None or source.samples is not None:
        left = [row for row in _places(source) if row["id"] not in have]
        parts = [left[at : at + options.shard_rows] for at in range(0, len(left), options.shard_rows)]
        read: Any = _read  # Ray's type of a function has no room for further arguments
        return ray.data.from_arrow([pa.Table.from_pylist(part, _PLACES) for part in parts]).map_batches(
            read, fn_args=(source.fs,), batch_format="pyarrow", batch_size=step, num_cpus=0.5
        )
    alike: dict[pa.Schema, list[str]] = {}  # Ray reads all files of a call by one schema
    for path, ids, schema in zip(source.paths, source.ids_by_file, source.schemas or (), strict=True):
        if not have.issuperset(ids):  # finished files are not opened again
            alike.setdefault(schema, []).append(path)
    known = ray.put(pa.array(sorted(have.intersection(source.ids)), pa.string()))
    without: Any = _without
    first, *others = (
        ray.data.read_parquet(
            paths, filesystem=source.fs, schema=schema, partitioning=None, file_extensions=None
        ).map_batches(without, fn_args=(known,), batch_format="pyarrow", batch_size=step, num_cpus=0.5)
        for schema, paths in alike.items()
    )
    return first.union(*others) if others else first


# Where a row's image lies: bytes start to end of a file, or all of it; or why there is none.
_PLACES = pa.schema(
    [("id", pa.string()), ("path", pa.binary()), ("start", pa.int64()), ("end", pa.int64()), ("error", pa.string())]
)


def _places(source: Source) -> Iterator[dict[str, Any]]:
    if source.samples is None or source.ids_by_file is None:
        for one, path in zip(source.ids, source.paths, strict=True):
            yield {"id": one, "path": os.fsencode(path)}
        return
    paths = (path for path, ids in zip(source.paths, source.ids_by_file, strict=True) for _ in ids)
    for one, path, sample in zip(source.ids, paths, source.samples, strict=True):
        place = {"start": sample.start, "end": sample.end} if sample.problem is None else {"error": sample.problem}
        yield {"id": one, "path": os.fsencode(path), **place}


def _read(table: Any, fs: Any) -> Any:
    """Bytes of a batch's images; one that cannot be read has an error in their place."""
    rows = table.to_pylist()

    def stretch(rows: list[dict[str, Any]]) -> list[tuple[bytes | None, str | None]]:
        start, end = rows[0]["start"], rows[-1]["end"]
        try:
            data = fs.cat_file(os.fsdecode(rows[0]["path"]), start=start, end=end)
        except Exception as error:  # every store's package has a family of errors of its own
            return [(None, first_line(error))] * len(rows)
        if start is None:
            return [(data, None)]
        if len(data) != end - start:  # another file by now
            return [(None, f"expected {end} bytes in the tar, got {start + len(data)}")] * len(rows)
        return [(data[row["start"] - start : row["end"] - start], None) for row in rows]

    with ThreadPoolExecutor(_READERS) as pool:
        read = [one for part in pool.map(stretch, _stretches(rows)) for one in part]
    found = dict(zip([row["id"] for row in rows if row["error"] is None], read, strict=True))
    both = [found.get(row["id"], (None, row["error"])) for row in rows]
    return _rows(table.column("id"), [data for data, _ in both], [error for _, error in both])


def _stretches(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that one request reads: images of a tar that lie next to each other, but for what is small."""
    out: list[list[dict[str, Any]]] = []
    for row in (row for row in rows if row["error"] is None):
        last = out[-1][-1] if out else None
        same = last is not None and row["start"] is not None and last["path"] == row["path"]
        if last is not None and same and 0 <= row["start"] - last["end"] <= _GAP:
            out[-1].append(row)
        else:
            out.append([row])
    return out


def _without(table: Any, known: Any) -> Any:
    """The rows of a Parquet file's batch that are not done."""
    import pyarrow.compute as pc

    ids = table.column("id").cast(pa.string())
    left = table.set_column(table.schema.get_field_index("id"), "id", ids)
    left = left.filter(pc.invert(pc.is_in(ids, value_set=ray.get(known))))
    data = left.column("bytes")
    errors = [None if valid else "the row holds no bytes" for valid in data.is_valid().to_pylist()]
    return _rows(left.column("id"), data.cast(pa.large_binary()), errors)


def _rows(ids: Any, data: Any, errors: list[str | None]) -> Any:
    data = pa.array(data, pa.large_binary()) if isinstance(data, list) else data
    return pa.table({"id": ids, "bytes": data, "error": pa.array(errors, pa.string())})


class _Worker:
    """An actor: its model, and a shard for every batch of rows.

    parts: reference to (model, text tower), which Ray holds once a node.
    """

    def __init__(
        self,
        parts: Any,
        classes: Any,
        how: SegmenterOptions,
        told: dict[str, Any],
        shards: Shards,
        *,
        options: BulkOptions,
    ):
        torch.set_num_threads(max(1, int(options.num_cpus)))
        model, tower = ray.get(parts)
        self.segmenter = actor_segmenter(model, tower, classes, how)
        self.shards, self.options = shards, options
        self.stamp = {key: told[key]["fingerprint"] for key in ("model", "class_list")}

    def __call__(self, table: Any) -> Any:
        files = self.shards if self.options.labels == "files" else None
        rows = segment_rows(self.segmenter, table.to_pylist(), self.options, files)
        if not rows:  # Ray asks with no rows for the columns
            return pa.table({"shard": pa.array([], pa.string()), "rows": pa.array([], pa.int64())})
        path = self.shards.write([{**row, **self.stamp} for row in rows])
        return pa.table({"shard": [path], "rows": pa.array([len(rows)], pa.int64())})


def actor_segmenter(model: ZeroShotModel, tower: Any, classes: Any, how: SegmenterOptions) -> Segmenter:
    """An actor's own segmenter of a model and a text tower that Ray handed it, which are on the CPU."""
    if how.device != "cpu":
        tower = tower.to(how.device)
    return Segmenter(model, text_encoder=tower, class_names=classes, options=how)


def segment_rows(
    segmenter: Segmenter, rows: list[dict[str, Any]], options: BulkOptions, shards: Shards | None = None
) -> list[dict[str, Any]]:
    """Rows of a shard for rows (id, bytes, error), in their order; an image that is no good is a row with its error.

    shards: where labels are written to that are files.

    Raises:
        torch.AcceleratorError: a GPU that no longer works is no image's error: the actor ends, Ray starts another.
    """
    files = [(row, io.BytesIO(row["bytes"])) for row in rows if row["error"] is None]
    by_file = {id(file): row["id"] for row, file in files}
    out = {row["id"]: _row(row["id"], error=row["error"]) for row in rows}

    def failed(file: Any, error: Exception) -> None:
        if isinstance(error, torch.AcceleratorError):
            raise error
        out[by_file[id(file)]] = _row(by_file[id(file)], error=first_line(error))

    results = segmenter.stream(
        [file for _, file in files],
        min_score=options.min_score,
        background=options.background,
        batch_size=options.batch_size,
        workers=options.workers,
        failed=failed,
    )
    with closing(results):
        for file, result in results:
            height, width = result.labels.shape
            counts = np.bincount(result.labels[result.labels >= 0], minlength=len(result.class_names))
            shares = [
                {"index": index, "name": name, "share": round(float(counts[index]) / result.labels.size, 6)}
                for index, name in enumerate(result.class_names)
                if counts[index]
            ]
            one = by_file[id(file)]
            out[one] = _row(
                one,
                height=height,
                width=width,
                labels=encode_labels(result.labels, options.labels, len(result.class_names))
                if shards is None
                else shards.write_files(result, one),
                shares=json.dumps(shares, ensure_ascii=False),
            )
    return list(out.values())


def _row(one: str, **values: Any) -> dict[str, Any]:
    return {"id": one, **dict.fromkeys(("height", "width", "labels", "shares", "error")), **values}


@contextmanager
def ray_started(address: str | None, actors: int, num_gpus: float, num_cpus: float) -> Iterator[None]:
    """Ray for the run: a cluster's, one that the caller has started, or one on this machine that ends with it."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send statistics of the machine to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # beyond the command's own: what it runs there is the command
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")  # 60: on a busy machine it starts ever more
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # 5: on a busy machine serve never starts
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what ends a run comes as an exception too
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        gpus = torch.cuda.device_count()
        if num_gpus * actors > gpus:
            raise ValueError(f"num_gpus: expected at most this machine's {gpus}, got {actors} x {num_gpus}")
        # Ray's CPUs are its book-keeping: actors may take all cores, and readers, which mostly wait, still get a turn.
        cpus = max(os.cpu_count() or 1, int(np.ceil(actors * num_cpus)) + 1)
        quiet.update(num_cpus=cpus, include_dashboard=False)
    try:
        ray.init("local" if address is None else address, **quiet)
    except Exception as error:  # Ray raises what it likes: a start that takes too long is a plain Exception
        ray.shutdown()  # what has started by then
        reason = first_line(error)
        if address is None:
            raise RuntimeError(f"Ray did not start on this machine: {reason}") from error
        raise ValueError(f"address: no Ray cluster answers at {address} ({reason})") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()
