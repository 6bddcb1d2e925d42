"""Files of a bulk run: the images it is given, and the folder of Parquet shards that it fills, each id once.

Paths are fsspec's: local ones, or URLs such as s3://bucket/images where the package of that file system is installed.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as arrow_fs
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from pycocotools import mask as coco

from zs3fast.inference.bulk_tar import Sample, samples
from zs3fast.inference.results import result_stem, write_result
from zs3fast.types import Segmentation
from zs3fast.utils.console import first_line
from zs3fast.utils.files import lock, replacing
from zs3fast.utils.images import image_suffixes

MANIFEST = "bulk.json"
FORMAT = 1
RLE = pa.list_(pa.struct([("class", pa.int32()), ("counts", pa.binary())]))
LABELS = {"rle": RLE, "png": pa.binary(), "files": pa.string()}


def shard_schema(labels: str) -> pa.Schema:
    """Columns of a shard; `labels` is "rle", "png" or "files". See docs/bulk.md."""
    text = pa.string()
    return pa.schema(
        [("id", text), ("height", pa.int32()), ("width", pa.int32()), ("labels", LABELS[labels])]
        + [("shares", text), ("model", text), ("class_list", text), ("error", text)]
    )


def encode_labels(labels: np.ndarray, kind: str, num_classes: int) -> Any:
    """Labels int32 [H, W] (-1 = unlabelled) as a value of the column `labels`.

    rle: COCO's run lengths, one entry for each class that is there.  png: 8 bits and 255 = unlabelled, or for more than
    255 classes 16 bits and 65535.
    """
    if kind == "png":
        wide = num_classes > 255
        values = np.where(labels < 0, 65535 if wide else 255, labels).astype(np.uint16 if wide else np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        return buffer.getvalue()
    present = np.unique(labels[labels >= 0]).tolist()
    return [
        {"class": index, "counts": coco.encode(np.asfortranarray(labels == index, np.uint8))["counts"]}
        for index in present
    ]


def decode_labels(labels: Any, height: int, width: int) -> np.ndarray:
    """A value of the column `labels` as int32 [H, W], -1 = unlabelled: `encode_labels` undone."""
    if isinstance(labels, str):
        raise ValueError(f"labels: expected run lengths or a PNG's bytes, got a file of the run's folder, {labels}")
    if isinstance(labels, bytes):
        values = np.asarray(Image.open(io.BytesIO(labels)))
        out: np.ndarray = values.astype(np.int32)
        out[values == np.iinfo(np.uint8 if values.dtype == np.uint8 else np.uint16).max] = -1
        return out
    out = np.full((height, width), -1, np.int32)
    for entry in labels:
        out[coco.decode({"size": [height, width], "counts": entry["counts"]}).astype(bool)] = entry["class"]
    return out


@dataclass(frozen=True)
class Source:
    """What a run is given. fs: where it lies.  paths: of images, Parquet files or tars.  ids: of every row, each once.

    ids_by_file: for Parquet and tars, the ids of each file; for images None, an image's id is its address.
    samples: for tars, where each id's image lies; for others None.
    schemas: for Parquet, the columns id and bytes of each file; for others None.
    """

    fs: Any
    paths: list[str]
    ids: list[str]
    ids_by_file: list[list[str]] | None = None
    samples: list[Sample] | None = None
    schemas: list[pa.Schema] | None = None


_KINDS = {".parquet": "Parquet files", ".tar": "WebDataset shards"}  # anything else is taken for an image
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_LISTERS = 8  # files whose ids are read at once


def find_source(inputs: Sequence[str], output: str | None = None) -> Source:
    """The images of files, folders (with the folders in them) and globs; or the rows of Parquet files or of tars.

    output: a folder that is left out, with all in it, where an input holds it.

    Raises:
        ValueError, FileNotFoundError: nothing there, kinds mixed, several file systems, a file that is cut off, an id
            twice.
    """
    found: dict[str, None] = {}
    fs: Any = None
    for text in inputs:
        fs_here, path = _file_system(text, "INPUT")
        if fs is not None and fs_here != fs:
            raise ValueError(f"INPUT: expected one file system, got {inputs[0]} and {text}")
        fs = fs_here
        with _reached("INPUT", text):
            found.update(dict.fromkeys(_files(fs, path, text)))
    if output is not None:
        fs_there, path = _file_system(output, "OUTPUT")
        inside = f"{path.rstrip('/')}/"
        outside = {path: None for path in found if fs_there != fs or not path.startswith(inside)}
        if found and not outside:
            raise ValueError(f"INPUT: expected images outside of OUTPUT, all {len(found)} lie in {output}")
        found = outside
    paths = list(found)
    kinds = {_kind(path): path for path in paths}
    if len(kinds) > 1:
        (first, one), (second, other) = list(kinds.items())[:2]
        raise ValueError(f"INPUT: expected one kind of input, got {first} and {second}, such as {one} and {other}")
    kind = next(iter(kinds), "images")
    if kind == "images":
        return Source(fs, paths, [_address(fs, path) for path in paths])
    read = _parquet_rows if kind == _KINDS[".parquet"] else _tar_rows
    with ThreadPoolExecutor(_LISTERS) as pool:
        rows = list(pool.map(lambda path: read(fs, path), paths))
    by_file = [ids for ids, _, _ in rows]
    ids = [one for ids in by_file for one in ids]
    if not ids:
        raise ValueError(f"INPUT: expected rows, none in {len(paths)} of {kind}, such as {paths[0]}")
    if len(set(ids)) != len(ids):
        double, times = Counter(ids).most_common(1)[0]
        where = [path for path, ids in zip(paths, by_file, strict=True) if double in ids]
        raise ValueError(f"INPUT: expected every id once, got {double!r} {times} times in {' and '.join(where[:2])}")
    if kind == _KINDS[".parquet"]:
        return Source(fs, paths, ids, by_file, schemas=[schema for _, _, schema in rows])
    return Source(fs, paths, ids, by_file, [one for _, samples, _ in rows for one in samples])


def _kind(path: str) -> str:
    if path.lower().endswith(_COMPRESSED):
        raise ValueError(f"INPUT: expected tars that are not compressed, got {path}")
    return next((kind for suffix, kind in _KINDS.items() if path.lower().endswith(suffix)), "images")


def _file_system(url: str, what: str) -> tuple[Any, str]:
    """The file system of a path or URL by fsspec, or for s3:// without s3fs by pyarrow; and the path in it."""
    if not url.strip():  # fsspec takes it for the folder one is in
        raise ValueError(f"{what}: expected a path or URL, got {url!r}")
    try:
        system, inside = url_to_fs(url)
        return system, str(inside)
    except Exception as error:  # a file system whose package, or what that needs, is not there; or no file system
        scheme, _, path = url.partition("://")
        if scheme == "s3" and isinstance(error, ImportError):
            # pyarrow brings it; its gs:// tries for a quarter of an hour where there is none
            with _reached(what, url):
                native, _ = arrow_fs.FileSystem.from_uri(f"s3://{path.partition('/')[0]}")
            return ArrowFSWrapper(native), path
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(f"{what}: {url} cannot be opened ({first_line(error)})") from None


@contextmanager
def _reached(what: str, url: str) -> Iterator[None]:
    """Errors of a store that cannot be reached, or lets nobody in, with its URL."""
    try:
        yield
    except Exception as error:  # every store's package has a family of errors of its own
        if str(error).startswith(f"{what}: "):
            raise
        raise ValueError(f"{what}: {url} cannot be used ({first_line(error)})") from None


def _address(fs: Any, path: str) -> str:
    """An image's id: its path or URL."""
    return _storable(path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path)))


def _storable(name: str) -> str:
    """Bytes of a name that are not UTF-8 are spelt out, as Parquet holds none."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode()
    return name


def _files(fs: Any, path: str, given: str) -> list[str]:
    """What one argument names: sorted; hidden files, and in folders what is of no kind that is read, left out."""
    if fs.isfile(path):
        return [path]
    if fs.isdir(path):
        candidates = fs.find(path)
    elif any(character in path for character in "*?["):
        candidates = [match for match in fs.glob(path) if fs.isfile(match)]
    else:
        raise FileNotFoundError(
            f"INPUT: expected an image, a folder, a glob, a Parquet file or a tar, nothing is at {given}"
        )
    suffixes = (*image_suffixes(), *_KINDS)
    inside = [(name, name[len(path) :] if name.startswith(path) else name.rsplit("/", 1)[-1]) for name in candidates]
    kept = sorted(n for n, below in inside if n.lower().endswith(suffixes) and "/." not in f"/{below.lstrip('/')}")
    if not kept:
        raise ValueError(f"INPUT: expected images, Parquet files or tars, none in {given}")
    return kept


def _parquet_rows(fs: Any, path: str) -> tuple[list[str], list[Sample], pa.Schema]:
    """Ids of a Parquet file, and how its columns id and bytes are held; the bytes are read by Ray."""
    with _named("INPUT", path), fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        if any(schema.names.count(name) != 1 for name in ("id", "bytes")):
            got = ", ".join(schema.names) or "none"
            raise ValueError(f"INPUT: {path}: expected columns id and bytes, each once, got {got}")
        if not parquet.metadata.num_rows:  # a writer that had no rows did not know their types
            return [], [], pa.schema([])
        kinds = {name: schema.field(name).type for name in ("id", "bytes")}
        if not any(test(kinds["id"]) for test in _ID_TYPES):
            raise ValueError(f"INPUT: {path}: expected ids that are text or integers, got {kinds['id']}")
        if not any(test(kinds["bytes"]) for test in _BYTES_TYPES):
            raise ValueError(f"INPUT: {path}: expected bytes that are binary, got {kinds['bytes']}")
        ids = parquet.read(columns=["id"]).column("id")
        if ids.null_count:
            raise ValueError(f"INPUT: {path}: expected an id in every row, {ids.null_count} have none")
        return [str(one) for one in ids.to_pylist()], [], pa.schema(kinds)


_ID_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
_BYTES_TYPES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_null,  # no row has an image
)


def _tar_rows(fs: Any, path: str) -> tuple[list[str], list[Sample], pa.Schema]:
    """Ids and images of a WebDataset shard, by its headers."""
    try:
        with fs.open(path, "rb") as file:
            found = samples(file, image_suffixes())
    except tarfile.TarError as error:
        raise ValueError(f"INPUT: {path} is no whole plain tar, it may be cut off or damaged ({error})") from None
    except ValueError as error:
        raise ValueError(f"INPUT: {path}: {error}") from None
    if not any(sample.problem is None for _, sample in found):
        raise ValueError(f"INPUT: expected images in {path}, none of its {len(found)} samples has one")
    return [_storable(key) for key, _ in found], [sample for _, sample in found], pa.schema([])


@contextmanager
def _named(what: str, path: str) -> Iterator[None]:
    """What pyarrow says of a broken file, with its name."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:  # of damaged pages pyarrow says so by an OSError, without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"{what}: {path} is no whole Parquet file, it may be cut off or damaged ({reason})") from None


class Shards:
    """The output folder of a run. Picklable, as actors write to it.

    Args:
        url: the folder.  labels: "rle", "png" or "files".
    Raises:
        ValueError: no folder of a file system there is, or files asked for elsewhere than on a disk.
    """

    def __init__(self, url: str, labels: str):
        self.url, self.labels = url, labels
        self.fs, self.path = _file_system(url, "OUTPUT")
        self.local = isinstance(self.fs, LocalFileSystem)
        if labels == "files" and not self.local:
            raise ValueError(f"labels: expected rle or png for {url}, as files are written to local folders only")

    def write_files(self, result: Segmentation, one: str) -> str:
        """Write the files that `zs3fast segment` writes, named after the id and its hash; the label map's name.

        The same row again are the same files, so a run that was killed between them and their shard loses nothing.
        """
        stem = result_stem(Path(one.replace("\0", "_")), f"-{hashlib.sha256(one.encode()).hexdigest()[:12]}")
        write_result(replace(result, source=one), Path(self.path) / stem)
        return f"{stem}_labels.png"

    @property
    def manifest(self) -> str:
        return f"{self.path.rstrip('/')}/{MANIFEST}"

    def names(self) -> list[str]:
        """Paths of the finished shards."""
        self.fs.invalidate_cache()  # other processes write them
        return sorted(self.fs.glob(f"{self.path.rstrip('/')}/shard-*.parquet"))

    def begin(self, told: dict[str, Any]) -> None:
        """Make the folder one of the run `told` of, or see that it is: its model, class list and protocol.

        Raises:
            ValueError: a folder of something else, or of another run, saying what differs.
        """
        with _reached("OUTPUT", self.url):
            self._begin(told)

    def _begin(self, told: dict[str, Any]) -> None:
        if self.fs.isfile(self.path):
            raise ValueError(f"OUTPUT: expected a folder, got the file {self.url}")
        if not self.fs.exists(self.manifest):
            inside = [] if not self.fs.exists(self.path) else self.fs.ls(self.path, detail=False)
            if inside:
                raise ValueError(f"OUTPUT: expected an empty folder or one with {MANIFEST}, {self.url} holds others")
            self._write(self.manifest, json.dumps({"zs3fast_bulk": FORMAT, **told}, indent=1).encode())
            return
        try:
            begun = json.loads(self.fs.cat_file(self.manifest))
            kind = begun["zs3fast_bulk"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"OUTPUT: {self.manifest} is no manifest of a bulk run") from None
        if kind != FORMAT:
            raise ValueError(f"OUTPUT: {self.manifest}: expected format {FORMAT}, got {kind}")
        for key, now in told.items():
            if begun.get(key) != now:
                raise ValueError(
                    f"OUTPUT: {self.url} was begun with {_difference(key, begun.get(key), now)}; "
                    "take another folder, or the same settings"
                )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no other run writes to the folder; of local folders on systems with locks."""
        if not self.local:
            yield
            return
        with open(self.manifest) as file:
            if lock(file.fileno()) is False:
                raise ValueError(f"OUTPUT: expected a folder of this run alone, another is writing to {self.url}")
            yield

    def remove_unfinished(self) -> None:
        """Remove what killed writers left under temporary names; nothing else."""
        for name in self.fs.glob(f"{self.path.rstrip('/')}/.shard-*.parquet"):
            self.fs.rm_file(name)

    def settle(self) -> tuple[set[str], int]:
        """Ids that have a row, and how many of them an error; a second row of an id, which goes on no user's account
        but a lost node's (its work done twice, grouped otherwise), is taken out.

        Raises:
            ValueError: a shard that cannot be read, naming it; nothing is removed.
        """
        ids: set[str] = set()
        failed = 0
        for name in self.names():
            with _named("OUTPUT", name), self.fs.open(name, "rb") as file:
                table = pq.read_table(file, columns=["id", "error"])
            here = table.column("id").to_pylist()
            keep = [one not in ids for one in here]
            if not all(keep):
                with self.fs.open(name, "rb") as file:
                    table = pq.read_table(file).filter(pa.array(keep))
                if table.num_rows:
                    self._write(name, _as_bytes(table))
                else:
                    self.fs.rm_file(name)
            failed += table.num_rows - table.column("error").null_count
            ids.update(here)
        return ids, failed

    def write(self, rows: list[dict[str, Any]]) -> str:
        """Write a shard, whole or not at all, under a name made of its ids: the same rows again are the same file."""
        names = hashlib.sha256("\0".join(sorted(row["id"] for row in rows)).encode())
        path = f"{self.path.rstrip('/')}/shard-{names.hexdigest()[:32]}.parquet"
        self._write(path, _as_bytes(pa.Table.from_pylist(rows, shard_schema(self.labels))))
        return path

    def _write(self, path: str, content: bytes) -> None:
        if self.local:
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        else:
            self.fs.pipe_file(path, content)  # an object store shows an object when it is whole


def _as_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _difference(key: str, begun: Any, now: Any) -> str:
    """What a manifest says of a setting and what the run does, in a line: the first entry that differs."""
    if isinstance(begun, dict) and isinstance(now, dict):
        if "name" in now and "fingerprint" in now:
            return f"{key} {_both(begun)}, got {_both(now)}"
        inner = next(name for name in {**begun, **now} if begun.get(name) != now.get(name))
        return f"{key} {inner} {begun.get(inner)!r}, got {now.get(inner)!r}"
    return f"{key} {begun!r}, got {now!r}"


def _both(entry: dict[str, Any]) -> str:
    return f"{entry.get('name')} ({str(entry.get('fingerprint'))[:12]})"


def fingerprint(parts: Iterable[bytes]) -> str:
    """SHA-256 of byte strings, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
