"""The image tower in 8 bits against float32 and bfloat16: its time, and what it does to the labels.

    python bench/quantize.py                                          # all towers, into bench/results/<device>/
    python bench/quantize.py --models zegclip --compile --update
    python bench/quantize.py --device cuda --batch 1 16 --kinds int8 fp8
    python bench/quantize.py --weights model.safetensors --update     # scores of trained weights in the world

The tower of each method (CLIP ViT-B/16, random weights, the method's published image size) runs in float32, in
bfloat16 and quantised by `zs3fast.encoders.quantize`, in turns. Its output must be within 0.1 of the float32 one (norm
of the difference over norm), or nothing is printed; the error is part of each row. With --weights nothing is timed: a
saved model labels the validation scenes of the procedural world in float32 and in each kind, and rows hold pAcc, mIoU
over all classes, hIoU and the share of pixels that keep their float32 label.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench import contenders, harness  # noqa: E402
from bench.harness import Contender, relative_error, within_budget  # noqa: E402
from bench.setting import ONE_STAGE, Setting, make_inputs  # noqa: E402
from zs3fast.encoders.quantize import KINDS, quantize_encoder  # noqa: E402

BUDGET = 0.1
FLOAT = "float32"
CLASSES = 20
METHODS = (*ONE_STAGE, "maft")  # ClsCLIP's tower runs with its classes; its blocks are those of the others


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["int8", "int8-weights"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--compile", action="store_true", help="also time each through torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--weights", type=Path, default=None, help="score this file of zs3fast.weights.save instead")
    parser.add_argument("--scenes", type=int, default=None, help="scenes that --weights is scored on (all of them)")
    parser.add_argument("--tiny", action="store_true", help="a toy network: exercises this script, measures nothing")
    parser.add_argument("--json", type=Path, default=None, help="where to write (bench/results/<device>/quantize.json)")
    parser.add_argument("--update", action="store_true", help="keep the file's rows that are not measured anew")
    args = parser.parse_args(argv)
    if args.json is None and not args.tiny:
        args.json = harness.results_path("quantize", args.device)
    return args


# Time ----------------------------------------------------------------------------------------------------------------


def measure_towers(args: argparse.Namespace, method: str, batch: int) -> list[dict[str, Any]]:
    """A row a form of one method's tower."""
    setting = Setting(method, CLASSES, batch)
    setting = setting.tiny() if args.tiny else setting
    plain = contenders.make_ours(setting, contenders.make_baseline(setting).state_dict(), args.device)
    plain.requires_grad_(False)
    inputs = make_inputs(setting, args.device)
    with torch.inference_mode():
        expected = tower_call(plain, setting, inputs)()
        errors: dict[str, float] = {}
        calls = [
            Contender(name, call, partial(check, name, expected, errors))
            for name, call in tower_calls(args, plain, setting, inputs)
        ]
        times = harness.measure(calls, rounds=args.rounds, device=args.device)
    described = harness.environment(args.device)
    first, rows = times[FLOAT].median, []
    for name, timing in times.items():
        speed_up = first / timing.median
        print(
            f"{method} {setting.shape} {name:22s} {timing.median * 1e3:9.2f} ms  {speed_up:5.2f}x  "
            f"error {errors[name]:.1e}",
            flush=True,
        )
        extra = {"speed_up": round(speed_up, 3), "relative_error": float(f"{errors[name]:.3g}")}
        dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
        shape, about = setting.shape, {"device": args.device, "described": described}
        rows.append(
            harness.row(f"{method} tower", name, shape, timing, dtype=dtype, pass_="inference", **about, **extra)
        )
    return rows


def tower_calls(
    args: argparse.Namespace, plain: nn.Module, setting: Setting, inputs: tuple[Any, ...]
) -> list[tuple[str, Callable[[], Tensor]]]:
    """The forms of a tower by name, those that do not run here left out with a line that says why."""
    half = tuple(x.bfloat16() if isinstance(x, Tensor) else x for x in inputs)
    models = {FLOAT: (plain, inputs), "bfloat16": (copy.deepcopy(plain).bfloat16(), half)}
    for kind in args.kinds:
        for name, (model, given) in ((kind, (plain, inputs)), (f"{kind} bfloat16", models["bfloat16"])):
            try:
                models[name] = quantize_encoder(copy.deepcopy(model), kind), given
            except ValueError as error:
                print(f"{setting.name} {name} does not run here: {error}", flush=True)
    calls = [(name, tower_call(model, setting, given)) for name, (model, given) in models.items()]
    if args.compile:
        calls += [(f"{name} compiled", torch.compile(call)) for name, call in calls]
    return calls


def tower_call(model: nn.Module, setting: Setting, inputs: tuple[Any, ...]) -> Callable[[], Tensor]:
    """What runs the image tower alone: images to patch tokens, MAFT's to proposals."""
    if setting.method == "maft":
        return lambda: model.proposal_embeddings(inputs[0], inputs[2])
    return lambda: model.encoder(inputs[0]).patch_tokens


def check(name: str, expected: Tensor, errors: dict[str, float], got: Tensor) -> None:
    within_budget(name, got.float(), expected, BUDGET)
    errors[name] = relative_error(got.float(), expected)


# Accuracy ------------------------------------------------------------------------------------------------------------


def score_weights(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for float32 and each kind: scores in the world, and how many labels stay what they were."""
    from zs3fast.data import open_dataset
    from zs3fast.tiny.scoring import score, world_labeller, world_segmenter

    scenes = open_dataset("world", None, "val")
    described = harness.environment(args.device)
    labels: list[Tensor] = []  # of float32, scene by scene
    rows = []
    for kind in (FLOAT, *args.kinds):
        segmenter = world_segmenter(args.weights, scenes)
        segmenter.model.to(args.device)
        if kind != FLOAT:
            try:
                quantize_encoder(segmenter.model, kind)
            except ValueError as error:
                print(f"{kind} does not run here: {error}", flush=True)
                continue
        given: list[Tensor] = []
        label = noting(world_labeller(segmenter, scenes), given)
        scores = score(label, scenes, limit=args.scenes).scores.to_dict()
        labels = labels or given
        same = sum(int((a == b).sum()) for a, b in zip(labels, given, strict=True))
        extra = {name: scores[name] for name in ("pacc", "miou", "hiou")}
        extra["agreement"] = 100 * same / sum(a.numel() for a in labels)
        extra = {key: None if value is None else round(value, 3) for key, value in extra.items()}
        method = segmenter.model.method
        print(f"{method} {kind:12s} " + "  ".join(f"{key} {value}" for key, value in extra.items()), flush=True)
        about = {"pass_": "scores", "device": args.device, "described": described, "scenes": len(given)}
        rows.append(harness.row(f"{method} world", kind, "world-val", None, **about, **extra))
    return rows


def noting(label: Callable[..., Any], given: list[Tensor]) -> Callable[..., Any]:
    """`label`, every answer noted in `given`."""

    def call(*arguments: Any) -> Any:
        answer = label(*arguments)
        given.append(torch.as_tensor(answer).to("cpu", torch.int16))
        return answer

    return call


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    if args.weights is not None:
        rows = score_weights(args)
    else:
        rows = [row for method in args.models for batch in args.batch for row in measure_towers(args, method, batch)]
    if args.json is not None:
        (harness.update_results if args.update else harness.write_results)(args.json, rows)
        print(f"written to {args.json}")
    return rows


if __name__ == "__main__":
    main()
