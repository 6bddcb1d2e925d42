"""Zero-shot scores in the procedural world: methods, ablations, settings, baselines, several seeds each.

    python bench/world.py                                    # three seeds of everything into bench/results/world.json
    python bench/world.py zegclip tagclip --seeds 0          # some variants, one seed
    python bench/world.py --readme docs/world.md               # write the table from the results file, measure nothing

All share one CLIP, the one in the package; a seed is that of the segmentation training: its weights, its order of
scenes. Scores are of 200 test scenes no training has seen, on the zero-shot split, whatever a variant was trained on.
What is in the results file is not measured again, and runs that are there are not trained again. All of it takes hours
on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

from bench import harness  # noqa: E402
from zs3fast.data.world import CLASS_NAMES, VERSION, WorldDataset  # noqa: E402
from zs3fast.utils.files import replacing  # noqa: E402
from zs3fast.utils.packed_clip import TINY_CLIP  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "world.json"
BLOCK = re.compile(r"(<!-- world -->\n).*?(<!-- /world -->)", re.DOTALL)
SCORES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")
SCENES = 200


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    method: of the setting METHOD_world; None: no training at all.  overrides: KEY=VALUE lines over it.
    setting: how it is trained and calibrated.  start: the variant whose weights self-training starts from.
    """

    method: str | None
    about: str
    overrides: tuple[str, ...] = ()
    setting: str = "inductive"
    start: str | None = None


VARIANTS = {
    "clip": Variant(None, "the CLIP alone: patches scored by text (maskclip)"),
    **{
        f"clip-{attention}": Variant(None, f"the same CLIP, {about}", (f"attention={attention}",))
        for attention, about in {
            "sclip": "SCLIP",
            "clearclip": "ClearCLIP",
            "naclip": "NACLIP",
            "rcs": "RCS",
            "scclip": "SC-CLIP",
            "vanilla": "its last block as it is",
        }.items()
    },
    "closed-set": Variant("zegclip", "ZegCLIP's network on class vectors without meaning", ("text.embeddings=CODES",)),
    "zegclip": Variant("zegclip", "ZegCLIP"),
    "tagclip": Variant("tagclip", "TagCLIP"),
    "tagclip-offset": Variant("tagclip", "TagCLIP with ZegCLIP's offset of 0.03", ("model.seen_offset=0.03",)),
    "tagclip-no-trusty": Variant(
        "tagclip",
        "TagCLIP without its trusty map, ZegCLIP's offset",
        ("model.trusty_token=false", "model.trusty_weighting='off'", "model.seen_offset=0.03"),
    ),
    "clip_rc-m1": Variant("clip_rc", "CLIP-RC, M = 1", ("model.regions=1",)),
    "clip_rc-m4": Variant("clip_rc", "CLIP-RC, M = 4", ("model.regions=4",)),
    "clip_rc": Variant("clip_rc", "CLIP-RC, M = 16"),
    "clip_rc-m64": Variant("clip_rc", "CLIP-RC, M = 64", ("model.regions=64",)),
    "clip_rc-no-recovery": Variant("clip_rc", "CLIP-RC without recovery loss", ("model.recovery_layers=null",)),
    "clip_rc-no-bridge": Variant(
        "clip_rc",
        "CLIP-RC without region bridge (one query a class, plain patches)",
        ("model.query_regions=false", "model.alignment=none"),
    ),
    "clip_rc-published": Variant(
        "clip_rc", "CLIP-RC, M = 16, published start", ("model.init=official", "model.output_gain=1.0")
    ),
    "clip_rc-l2": Variant("clip_rc", "CLIP-RC, recovery by L2", ("model.recovery_loss=l2",)),
    "clip_rc-kd": Variant("clip_rc", "CLIP-RC, recovery by KD", ("model.recovery_loss=kd",)),
    "clip_rc-no-decoder": Variant("clip_rc", "CLIP-RC, recovery without a decoder", ("model.recovery_layers=0",)),
    "clip_rc-updated": Variant("clip_rc", "CLIP-RC, region tokens trained", ("model.update_regions=true",)),
    "tagclip-zeros": Variant("tagclip", "TagCLIP, its token from zeros", ("model.trusty_init=zeros",)),
    "tagclip-dice": Variant("tagclip", "TagCLIP, trusty loss by dice", ("model.trusty_loss=dice",)),
    "tagclip-classes": Variant("tagclip", "TagCLIP, class prediction times mask", ("model.class_prediction=true",)),
    "clsclip": Variant("clsclip", "ClsCLIP, the best of 64 masks a pixel"),
    "clsclip-channel": Variant("clsclip", "ClsCLIP, a gate of channels", ("model.navigation=channel",)),
    "clsclip-spatial": Variant("clsclip", "ClsCLIP, a gate of places", ("model.navigation=spatial",)),
    "maft": Variant("maft", "MAFT, on the true regions: an upper bound"),
    "maft-l1": Variant("maft", "MAFT by L1, on the true regions", ("model.ma_loss=l1",)),
    "maft-kl": Variant("maft", "MAFT by KL, on the true regions", ("model.ma_loss=kl",)),
    "maft-no-distillation": Variant(
        "maft", "MAFT without distillation, on the true regions", ("proposals.distillation=false",)
    ),
    "maft-transductive": Variant(
        "maft", "MAFT, transductive, on the true regions", ("setting=transductive",), "transductive", "maft"
    ),
    "zegclip-transductive": Variant(
        "zegclip", "ZegCLIP, transductive", ("setting=transductive",), "transductive", "zegclip"
    ),
    "tagclip-transductive": Variant(
        "tagclip",
        "TagCLIP, transductive",
        ("setting=transductive", "model.trusty_token=false", "model.trusty_weighting='off'"),
        "transductive",
        "tagclip",
    ),
    "zegclip-supervised": Variant("zegclip", "ZegCLIP, all 64 classes labelled", ("setting=supervised",), "supervised"),
}


def run(
    name: str, seed: int, runs: Path, iterations: int | None, length: int = SCENES, clip: str = TINY_CLIP
) -> dict[str, Any]:
    """Train (if need be) and score one variant with one seed on the first `length` test scenes."""
    from zs3fast.tiny.scoring import score, world_labeller, world_segmenter

    variant, start = VARIANTS[name], time.perf_counter()
    scenes = WorldDataset("test", length=length)
    if variant.method is None:
        segmenter = clip_alone(scenes, *(line.partition("=")[2] for line in variant.overrides))
    else:
        segmenter = world_segmenter(trained(name, seed, runs, iterations, clip), scenes)
        if name == "closed-set":
            segmenter = type(segmenter)(
                segmenter.model, text_embeddings=np.load(class_codes(runs)), class_names=scenes.class_names
            )
    seconds = time.perf_counter() - start
    report = score(world_labeller(segmenter, scenes, variant.setting), scenes)
    values = {key: round(value, 3) for key, value in report.scores.headline().items() if key in SCORES}
    return {"variant": name, "seed": seed, **values, "train_s": round(seconds, 1), "score_s": round(report.seconds, 1)}


def trained(name: str, seed: int, runs: Path, iterations: int | None, clip: str = TINY_CLIP) -> Path:
    """The weight file of a variant's run."""
    from tools.world.build import trained_model

    variant = VARIANTS[name]
    lines = [f"seed={seed}", f"name={name}", *variant.overrides]
    lines = [line.replace("CODES", f"'{class_codes(runs)}'") for line in lines]
    if iterations is not None:
        lines.append(f"iterations={iterations}")
    if variant.start is not None:
        lines.append(f"init_from='{trained(variant.start, seed, runs, iterations, clip)}'")
    return trained_model(variant.method, runs, clip, name=f"world/{name}-{seed}", overrides=tuple(lines))


def clip_alone(scenes: WorldDataset, attention: str = "value") -> Any:
    """A method without training on the world's CLIP, the one in the package: windows and templates of MaskCLIP."""
    import zs3fast

    segmenter = zs3fast.Segmenter.from_pretrained("zs3fast-tiny-maskclip")
    model = zs3fast.create_model(**{**segmenter.model.config, "attention": attention, "residual": None})
    model.load_state_dict(segmenter.model.state_dict())
    return zs3fast.Segmenter(
        model, text_encoder=segmenter.text_encoder, class_names=scenes.class_names, templates="multi"
    )


def class_codes(runs: Path) -> Path:
    """Orthogonal unit vectors, a row a class: they tell classes apart and say nothing of them."""
    path = runs / "world" / "codes.npy"
    if not path.is_file():
        codes = np.linalg.qr(np.random.default_rng(0).standard_normal((128, len(CLASS_NAMES))))[0].T
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, codes.astype(np.float32))
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and, for several seeds, the standard deviation."""
    lines = ["| trained | " + " | ".join(SCORES) + " | seeds |", "| --- |" + " ---: |" * (len(SCORES) + 1)]
    for name, variant in VARIANTS.items():
        own = [row for row in rows if row["variant"] == name]
        if own:
            cells = [spread([row[key] for row in own]) for key in SCORES]
            lines.append(f"| {variant.about} | " + " | ".join(cells) + f" | {len(own)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean, and the sample's standard deviation where there is one."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def read(path: Path, length: int = SCENES) -> dict[str, Any]:
    """The results so far; of an earlier world, none. ValueError for those of another number of scenes."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    if content.get("world") != VERSION:
        return {"world": VERSION, "scenes": length, "rows": []}
    if content.get("scenes", length) != length:
        held = content["scenes"]
        raise ValueError(f"--scenes: {path} holds scores of {held} scenes, expected another file for {length}")
    return content


def fill(markdown: str, results: Path = RESULTS) -> str:
    """The text with its table rendered anew."""
    return BLOCK.sub(lambda match: match[1] + table(read(results)["rows"]) + match[2], markdown)


def main(argv: list[str] | None = None) -> int:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"{', '.join(VARIANTS)} (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--iterations", type=int, default=None, help="of every training (each setting's own)")
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"test scenes to score on ({SCENES})")
    parser.add_argument("--clip", default=TINY_CLIP, help="the CLIP below all: the package's, or a file of contrastive")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the results file")
    parser.add_argument("--readme", type=Path, default=None, help="write the table into this file and stop")
    args = parser.parse_args(argv)
    if args.readme is not None:
        text = fill(args.readme.read_text(), args.json)
        with replacing(args.readme) as temporary:
            temporary.write_text(text)
        return 0
    unknown = sorted(set(args.variants) - set(VARIANTS))
    if unknown:
        parser.error(f"unknown variants: {', '.join(unknown)}")
    try:
        read(args.json, args.scenes)
    except ValueError as error:
        parser.error(str(error))
    for seed in args.seeds:
        for name in args.variants or VARIANTS:
            results = read(args.json, args.scenes)
            if any((row["variant"], row["seed"]) == (name, seed) for row in results["rows"]):
                continue
            if VARIANTS[name].method is None and seed != args.seeds[0]:
                continue  # nothing is trained, nothing differs
            row = run(name, seed, args.runs, args.iterations, args.scenes, args.clip)
            print(json.dumps(row), flush=True)
            results = read(args.json, args.scenes)
            results["rows"].append({**row, "commit": harness.commit()})
            with replacing(args.json) as temporary:
                temporary.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
