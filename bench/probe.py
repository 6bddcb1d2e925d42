"""One contender in a process of its own: start-up time and peak memory. Called by `run.py`; prints one JSON object."""

from __future__ import annotations

import time

START = time.perf_counter()

import argparse  # noqa: E402  (the clock starts before the imports it measures)
import ctypes  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench import contenders, harness  # noqa: E402
from bench.setting import Setting  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=("official", "zs3fast"))
    parser.add_argument("--setting", required=True, help="a Setting as JSON")
    parser.add_argument("--weights", required=True, help="official checkpoint to load")
    parser.add_argument("--pass", dest="pass_", choices=("inference", "training"), default="inference")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--memory-limit", type=int, default=None, help="bytes this process may take on the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = torch.device(args.device).type == "cuda"
    if args.memory_limit is not None and not cuda:
        harness.limit_memory(args.memory_limit)
    try:
        print(json.dumps(measure(args, cuda)))
    except (RuntimeError, MemoryError) as error:
        if not harness.out_of_memory(error):
            raise
        print(json.dumps({"out_of_memory": True}))


def measure(args: argparse.Namespace, cuda: bool) -> dict[str, float]:
    """Import, load and first call in seconds; peak memory of the process, and what the call added to it, in bytes."""
    setting = Setting(**json.loads(args.setting))
    ours = args.contender == "zs3fast"
    if ours:
        import zs3fast  # noqa: F401

    imported = time.perf_counter()
    if ours:
        model = contenders.make_ours(setting, args.weights, args.device)
    else:
        model = contenders.make_baseline(setting, args.device)
        model.load_state_dict(torch.load(args.weights)["state_dict"])
    loaded = time.perf_counter()

    call = contenders.make_call(args.contender, args.pass_, setting, model, args.device)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # freed memory of loading must not hide what the call takes
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    harness.reset_peak_resident()
    before = torch.cuda.memory_allocated() if cuda else harness.resident_bytes()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    if args.pass_ == "inference":
        call()  # on what the first call cached; a training step caches nothing
    peak = torch.cuda.max_memory_allocated() if cuda else harness.peak_resident_bytes()
    seconds = {"import_s": imported - START, "load_s": loaded - imported, "first_call_s": first}
    return {**{k: round(v, 3) for k, v in seconds.items()}, "peak_bytes": peak, "call_bytes": peak - before}


if __name__ == "__main__":
    main()
