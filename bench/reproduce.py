"""Published rows run again: a row's name in, ours beside the paper's out.

    python bench/reproduce.py --list                                    # the rows
    python bench/reproduce.py sclip/voc20 --data VOCdevkit/VOC2012      # CLIP's weights come through open_clip
    python bench/reproduce.py scclip/voc21 --data ... --limit 50        # a first look
    python bench/reproduce.py zegclip/voc20-inductive --data ... --weights voc_inductive.pth

Rows of methods without training need CLIP's weights alone, OpenAI's ViT-B/16, which open_clip fetches; `--weights`
takes them from a file. All others need the method's own checkpoint as `--weights`. A row is evaluated by its own
protocol; what was interrupted goes on when the same command is given again. Each finished row is appended to `--json`
with the versions that made it. None of them has been run where this was written: it had neither network nor datasets.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import harness  # noqa: E402
from zs3fast.evaluation.paper_rows import PAPER_ROWS, PaperRow  # noqa: E402
from zs3fast.utils.files import replacing  # noqa: E402
from zs3fast.utils.options import did_you_mean  # noqa: E402

if TYPE_CHECKING:
    from zs3fast.evaluation.evaluate import Report

TRAINING_FREE = "training-free"
PACKAGES = ("torch", "open_clip_torch", "numpy", "opencv-python-headless", "pillow")


@dataclass(frozen=True)
class Row:
    """What the published rows of one name have in common.

    name: METHOD/DATASET, with -SETTING behind it where the method is trained.  published: the rows.
    """

    name: str
    published: tuple[PaperRow, ...]

    @property
    def method(self) -> str:
        return self.published[0].method

    @property
    def dataset(self) -> str:
        return self.published[0].dataset

    @property
    def setting(self) -> str:
        return self.published[0].setting


def rows() -> dict[str, Row]:
    """Every row that can be asked for. Folds of pairs are `zs3fast eval --fold`'s."""
    found: dict[str, list[PaperRow]] = {}
    for row in PAPER_ROWS:
        if row.setting != "fold":
            behind = "" if row.setting == TRAINING_FREE else f"-{row.setting}"
            found.setdefault(f"{row.method}/{row.dataset}{behind}", []).append(row)
    return {name: Row(name, tuple(published)) for name, published in found.items()}


def evaluated(row: Row, args: argparse.Namespace, progress: Callable[[int, int], None] | None) -> Report:
    """The report of a row, gone on with where an earlier run of it was interrupted."""
    from zs3fast.evaluation.job import noted, prepare
    from zs3fast.evaluation.options import EvalOptions
    from zs3fast.evaluation.partial import PartialResults

    options: dict[str, Any] = {"dataset": args.dataset or row.dataset, "split": args.split, "setting": row.setting}
    options |= {"data": None if args.dataset == "world" else args.data, "device": args.device}
    options |= {"limit": args.limit, "workers": args.workers}
    if row.setting == TRAINING_FREE:
        clip = json.loads(Path(args.clip).read_text()) if args.clip.endswith(".json") else args.clip
        pretrained = args.pretrained if args.weights is None else str(args.weights)
        options |= {"method": row.method, "clip": clip, "pretrained": pretrained, "protocol": row.method}
        options["refine"] = args.refine
    elif args.weights is None:
        raise ValueError(f"--weights: {row.name} is a trained row, expected a checkpoint of {row.method}")
    else:
        options |= {"weights": str(args.weights), "trained_on": args.trained_on, "proposer": args.proposer}
    job = prepare(EvalOptions(**options))
    partial = PartialResults(folder_of(row, args) / "partial", {**job.settings, "limit": args.limit}, not args.restart)
    report = job.run(progress=progress, partial=partial)
    partial.clear()
    return noted(report, job.published)


def folder_of(row: Row, args: argparse.Namespace) -> Path:
    """Where what an interrupted run has counted lies."""
    return args.work / row.name.replace("/", "-")


def result(row: Row, report: Report, args: argparse.Namespace) -> dict[str, Any]:
    """What is kept of a run: ours, each published row with the difference, and what made it."""
    scores = report.scores.headline()  # of a split that the row has not, NaN, which is no JSON
    ours = {key: round(value, 3) for key, value in scores.items() if not math.isnan(value)}
    published = []
    for paper in row.published:
        differences = {key: round(ours[key] - value, 3) for key, value in paper.values.items() if key in ours}
        entry = {"source": paper.source, "detail": paper.detail, "values": dict(paper.values)}
        published.append({**entry, "difference": differences})
    return {
        "row": row.name,
        "ours": ours,
        "published": published,
        "images": report.images,
        "limit": args.limit,
        "dataset": report.dataset,
        "settings": report.settings,
        "notes": list(report.notes),
        "seconds": round(report.seconds, 1),
        "versions": versions(),
        "commit": harness.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions() -> dict[str, str]:
    """Of Python and of what decides a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(entry: dict[str, Any]) -> str:
    """Ours beside the published values, a line a published row."""
    lines = [f"{entry['row']}: {entry['images']} images in {entry['seconds']} s"]
    lines.append("  ours  " + ", ".join(f"{key} {value:.2f}" for key, value in entry["ours"].items()))
    for paper in entry["published"]:
        values = [
            f"{key} {value:.2f} ({entry['ours'][key] - value:+.2f})" if key in entry["ours"] else f"{key} {value:.2f}"
            for key, value in paper["values"].items()
        ]
        source = paper["source"] + (f", {paper['detail']}" if paper["detail"] else "")
        lines.append(f"  {', '.join(values)}  {source}")
    return "\n".join([*lines, *(f"  note: {note}" for note in entry["notes"])])


def kept(path: Path) -> list[dict[str, Any]]:
    """The runs in the results file."""
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--json: {path} is not JSON ({error}), expected a file of this script") from None
    if not isinstance(content, list):
        raise ValueError(f"--json: {path} holds no list of runs, expected a file of this script")
    return content


def main(argv: list[str] | None = None) -> int:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="such as sclip/voc20; see --list")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--data", type=Path, help="folder of the dataset")
    parser.add_argument("--dataset", help="evaluate on this dataset in place of the row's own, such as world")
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, help="only the first so many images")
    parser.add_argument("--weights", type=Path, help="CLIP's weights as a file, or a trained method's checkpoint")
    parser.add_argument("--pretrained", default="openai", help="open_clip tag of CLIP's weights")
    parser.add_argument("--clip", default="ViT-B-16", help="open_clip name of the CLIP, or a JSON file of its sizes")
    parser.add_argument("--refine", type=int, help="steps of refinement; left out: as the row has it")
    parser.add_argument("--trained-on", help="the dataset an official checkpoint was trained on")
    parser.add_argument("--proposer", help="mask proposals for maft")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; cuda if there is one")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images ahead")
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"), help="folder of unfinished runs")
    parser.add_argument("--restart", action="store_true", help="begin anew where a run was interrupted")
    parser.add_argument("--json", type=Path, default=Path("reproduced.json"), help="file the results are appended to")
    args = parser.parse_args(argv)
    known = rows()
    if args.list:
        print("\n".join(known))
        return 0
    if not args.rows:
        parser.error("expected the name of a row; --list prints them")
    for name in args.rows:
        if name not in known:
            parser.error(f"no published row {name!r}{did_you_mean(name, known, 3)}; --list prints them")
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kept(args.json)  # before hours of work
        for name in args.rows:
            report = evaluated(known[name], args, _progress())
            entry = result(known[name], report, args)
            print(table(entry), flush=True)
            done = [*kept(args.json), entry]
            with replacing(args.json) as temporary:
                temporary.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _progress() -> Callable[[int, int], None] | None:
    if not sys.stderr.isatty():
        return None
    return lambda done, total: print(f"\r{done}/{total}", end="" if done < total else "\n", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
