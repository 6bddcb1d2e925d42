"""Everything that needs a GPU, in three calls of at most nine minutes: build, tests, benchmarks, checkers, counters.

    bench/gpu_suite.sh OUT --call 1     # build, environment, a chosen part of the tests on every backend
    bench/gpu_suite.sh OUT --call 2     # every op beside its contenders, compute-sanitizer, counters
    bench/gpu_suite.sh OUT --call 3     # whole models, eager and compiled, training steps, a folder
    bench/gpu_suite.sh OUT              # all of it, as far as the budget goes; needs a CUDA GPU, torch and nvcc
    bench/gpu_suite.sh OUT --only build tests --budget 300
    bench/gpu_suite.sh OUT --skip racecheck --limit tests=120
    bench/gpu_suite.sh OUT --dry-run    # every part on the CPU, at sizes that measure nothing

Parts run one after the other, most valuable first, each in processes of its own with a time limit: one that fails,
hangs or crashes leaves the rest alone. What no longer fits the budget is cut short or left out, which the summary says.
Nothing is fetched: open_clip_torch, ftfy and wcwidth must be carried to the machine (a folder of PYTHONPATH, filled by
`pip install --target`; xformers too, if it is to be compared), and where they lack the suite stops before it starts.
OUT holds, rewritten after every part: summary.json (every part with status, seconds and reason; the machine),
results.json (the benchmarks' rows), tests.xml (JUnit), counters.csv, and log.txt (everything that was printed).
The exit status is 0 if no part failed, 1 if one did, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu_parts import CALLS, ROOT, Command, Part, architecture, make_parts, not_carried  # noqa: E402

GRACE = 8.0  # seconds that an interrupted part has to write what it knows
RESERVE = 5.0  # of the budget, for the summary
KEPT = (
    "tests.xml",
    "tests-cuda.xml",
    "counters.csv",
)  # files of the work folder that go to OUT as they are
UNREADABLE = {  # what the tools say where a machine does not let them in
    "ERR_NVGPUCTRPERM": "the performance counters may not be read on this machine",
    "Failed to initialize the profiler": "ncu cannot reach the performance counters of this machine",
    "Device not supported": "compute-sanitizer does not support this device or its driver",
}


@dataclass
class Outcome:
    """What became of a part. status: passed, failed, cut (the budget ended), skipped."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    returncodes: list[int | None] = field(default_factory=list)


class Stopped(Exception):
    """The suite itself was asked to end."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="bench/gpu_suite.sh",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny: exercises the suite")
    parser.add_argument("--call", type=int, choices=(1, 2, 3), help="the parts of one call")
    parser.add_argument("--only", nargs="+", default=None, metavar="PART", help="these parts")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART", help="all parts but these")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything (540)")
    parser.add_argument("--limit", nargs="+", default=[], metavar="PART=SECONDS", help="other time limits")
    args = parser.parse_args(argv)
    args.archs = None if args.dry_run else architecture()
    if args.archs is None and not args.dry_run:
        parser.error("no CUDA device answers nvidia-smi; --dry-run runs every part on the CPU")
    if not args.dry_run and (lacking := not_carried()):
        parser.error(f"not installed, and nothing is fetched here: {', '.join(lacking)}; carry them in PYTHONPATH")
    args.parts = make_parts(args.dry_run, args.archs)
    names = [part.name for part in args.parts]
    try:
        args.limits = {name: float(seconds) for name, seconds in (item.split("=") for item in args.limit)}
    except ValueError:
        parser.error(f"--limit: expected PART=SECONDS, got {' '.join(args.limit)}")
    if unknown := {*(args.only or []), *args.skip, *args.limits} - set(names):
        parser.error(f"PART: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    chosen = args.only or (CALLS[args.call] if args.call else names)
    args.parts = [p for p in args.parts if p.name in chosen and p.name not in args.skip]
    return args


class Suite:
    """Runs parts and keeps OUT up to date."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.out, self.work = args, args.out, work
        self.started = time.monotonic()
        self.budget = args.budget
        self.outcomes: list[Outcome] = []
        self.missing = sorted({name for part in args.parts if not part.skip for name in part.missing()})
        self.out.mkdir(parents=True, exist_ok=True)
        for name in (*KEPT, "results.json", "summary.json"):
            (self.out / name).unlink(missing_ok=True)
        self.log_path = self.out / "log.txt"
        self.log_path.write_text("")

    def run(self) -> None:
        self.say(f"missing: {', '.join(self.missing)}" if self.missing else "nothing is missing")
        for part in self.args.parts:
            began = time.monotonic()
            try:
                outcome = self.run_part(part)
            except Stopped:
                outcome = Outcome(part.name, "failed", "the suite was told to stop")
                self.budget = 0.0
            outcome.seconds = round(time.monotonic() - began, 1)
            self.outcomes.append(outcome)
            self.keep()
            self.say(f"{outcome.status:7s} {part.name:14s} {outcome.seconds:6.1f} s  {outcome.reason}")

    def run_part(self, part: Part) -> Outcome:
        if part.skip:
            return Outcome(part.name, "skipped", part.skip)
        if missing := part.missing():
            return Outcome(part.name, "failed", f"missing: {', '.join(missing)}")
        left = self.budget - RESERVE - (time.monotonic() - self.started)
        own = self.args.limits.get(part.name, part.limit)
        if left < min(part.least, own):
            left_now = max(left, 0.0)
            return Outcome(part.name, "skipped", f"{left_now:.0f} s of the budget left, takes {part.least:.0f} or more")
        seconds = min(own, left)
        deadline = time.monotonic() + seconds
        start = self.log_path.stat().st_size
        codes = [self.run_command(command, part, deadline) for command in part.commands]
        with self.log_path.open("rb") as log:
            log.seek(start)
            said = log.read().decode(errors="replace")
        if None in codes:
            counts = f"; {tests}" if (tests := count_tests(self.work / "tests.xml", part)) else ""
            status, why = ("cut", " as the budget ended") if left < own else ("failed", "")
            return Outcome(part.name, status, f"stopped after {seconds:g} s{why}{counts}", returncodes=codes)
        return judge(part, codes, said, self.work)

    def run_command(self, command: Command, part: Part, deadline: float) -> int | None:
        """The exit status; None: time ran out before it ended. Then it is interrupted, and killed if it goes on."""
        words = [word.replace("{work}", str(self.work)) for word in command]
        environment = os.environ | {"PYTHONPATH": path_with_root(), "PYTHONUNBUFFERED": "1"} | part.environment
        with self.log_path.open("ab") as log:
            log.write(f"\n=== {part.name}: {shlex.join(words)[:600]}\n".encode())
            log.flush()
            if time.monotonic() >= deadline:
                log.write(b"=== not started: out of time\n")
                return None
            try:
                process = subprocess.Popen(
                    words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                log.write(f"{error}\n".encode())
                return 127
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)

    def keep(self) -> None:
        """Write what is known so far, whole files at a time."""
        rows = []
        for path in sorted(self.work.rglob("*.json")):
            found = read_json(path)
            if isinstance(found, dict) and "rows" in found:
                source = str(path.relative_to(self.work).with_suffix(""))
                rows += [{"source": source, **row} for row in found["rows"]]
        write(self.out / "results.json", json.dumps({"rows": rows}, indent=1) + "\n")
        for name in KEPT:
            if (self.work / name).is_file():
                write(self.out / name, (self.work / name).read_text(errors="replace"))
        summary = {
            "dry_run": self.args.dry_run,
            "seconds": round(time.monotonic() - self.started, 1),
            "budget": self.args.budget,
            "missing": self.missing,
            "failed": [o.name for o in self.outcomes if o.status == "failed"],
            "parts": [asdict(outcome) for outcome in self.outcomes],
            "failed_tests": [t for name in KEPT if name.endswith(".xml") for t in failed_tests(self.work / name)],
            "environment": read_json(self.work / "environment.json"),
        }
        write(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")

    def say(self, line: str) -> None:
        print(line, flush=True)
        with self.log_path.open("a") as log:
            log.write(f"--- {line}\n")


# A process ------------------------------------------------------------------------------------------------------------


def end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C first, so that pytest writes what it has; then the whole group is killed, whatever it started."""
    for sent, patience in ((signal.SIGINT, GRACE), (signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)):
        if process.poll() is not None and sent != signal.SIGKILL:
            continue
        try:
            os.killpg(process.pid, sent)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def path_with_root() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


# What came out of it --------------------------------------------------------------------------------------------------


def judge(part: Part, codes: list[int | None], said: str, work: Path) -> Outcome:
    """A part that ended by itself: its exit statuses, and the line that says why."""
    for mark, meaning in UNREADABLE.items():
        if mark in said:
            return Outcome(part.name, "skipped", meaning, returncodes=codes)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", said)
    tests = count_tests(work / "tests.xml", part) or (summaries[-1] if summaries else "")
    if not any(codes):
        return Outcome(part.name, "passed", tests, returncodes=codes)
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("===")]
    bad = sum(code != 0 for code in codes)
    reason = tests or f"{lines[-1][:200] if lines else 'it said nothing'}"
    which = f"{bad} of {len(codes)} commands failed; " if len(codes) > 1 else f"exit status {codes[0]}; "
    return Outcome(part.name, "failed", which + reason, returncodes=codes)


def count_tests(path: Path, part: Part) -> str:
    path = path.with_name(f"{part.name}.xml")
    suites = junit(path) if part.name.startswith("tests") else []
    total = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    ran = total["tests"] - total["skipped"]
    return f"{total['failures'] + total['errors']} of {ran} tests failed, {total['skipped']} skipped" if suites else ""


def failed_tests(path: Path) -> list[dict[str, str]]:
    """Names and first lines of what failed, as far as the report goes."""
    found = []
    for suite in junit(path):
        for case in suite.iter("testcase"):
            for fault in (*case.findall("failure"), *case.findall("error")):
                message = (fault.get("message") or "").splitlines() or [""]
                found.append({"test": f"{case.get('classname')}::{case.get('name')}", "message": message[0][:300]})
    return found


def junit(path: Path) -> list[ElementTree.Element]:
    try:
        return list(ElementTree.parse(path).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return []


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(path: Path, text: str) -> None:
    """To a temporary name beside `path`, then renamed: whoever fetches OUT never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def stop(_signal: int, _frame: object) -> None:
    raise Stopped


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    work = Path(tempfile.mkdtemp(prefix="zs3fast-gpu-suite-"))
    try:
        suite = Suite(args, work)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        suite.run()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    seconds = time.monotonic() - suite.started
    failed = [o.name for o in suite.outcomes if o.status == "failed"]
    counts = ", ".join(
        f"{sum(o.status == s for o in suite.outcomes)} {s}" for s in ("passed", "failed", "cut", "skipped")
    )
    suite.say(
        f"{counts} in {seconds:.0f} s{'; failed: ' + ', '.join(failed) if failed else ''}; everything is in {args.out}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
