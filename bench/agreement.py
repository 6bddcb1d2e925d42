"""The price of bfloat16, and of 8 bits, in labels: the same weights in both types, on the world's scenes and on photos.

    python bench/agreement.py                                               # the models in the package, 200 test scenes
    python bench/agreement.py --goldens GOLDENS --photos DATA/VOCdevkit/VOC2012/JPEGImages   # official weights too
    python bench/agreement.py --scenes 20 --models zegclip
    python bench/agreement.py --quantize int8                               # bfloat16 with an image tower in 8 bits

Prints, a model, the share of pixels whose labels are equal in float32 and bfloat16 and, where the truth is known, the
mIoU of both. GOLDENS holds the official implementations' tiny networks with random weights: their scores lie closer
together than a trained model's. Softmax, LayerNorm and scores are computed in float32 in either type.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import zs3fast  # noqa: E402
from zs3fast.data.world import WorldDataset  # noqa: E402
from zs3fast.encoders.quantize import KINDS  # noqa: E402
from zs3fast.evaluation.ground_truth import TrueRegions  # noqa: E402
from zs3fast.inference.loading import bundled  # noqa: E402
from zs3fast.inference.segmenter import Segmenter  # noqa: E402
from zs3fast.tiny.scoring import score, world_labeller  # noqa: E402
from zs3fast.weights.packing import packed_models  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)
ONE_STAGE = ("zegclip", "tagclip", "clip_rc")
HEADS, SEEN = 4, (0, 1, 2, 4, 6)  # of the goldens' networks
Label = Callable[..., np.ndarray]


def equal_share(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Percent of all pixels whose two labels are equal."""
    equal = total = 0
    for a, b in pairs:
        equal += int((a == b).sum())
        total += a.size
    return 100 * equal / max(total, 1)


def form(dtype: torch.dtype, quantize: str | None) -> dict[str, Any]:
    """Options of one of the two Segmenters that are compared."""
    return {"dtype": dtype, "quantize": None if dtype == torch.float32 else quantize}


def of_the_world(method: str, count: int, quantize: str | None = None) -> tuple[float, float, float]:
    """Percent of equal labels of a model in the package, and its mIoU in float32 and bfloat16 (in these 8 bits)."""
    scenes = WorldDataset("test", length=count)
    labels: dict[torch.dtype, list[np.ndarray]] = {}
    miou = {}
    for dtype in DTYPES:
        regions = TrueRegions(scenes) if method == "maft" else None
        segmenter = Segmenter.from_pretrained(
            f"zs3fast-tiny-{method}", class_names=scenes.class_names, proposer=regions, **form(dtype, quantize)
        )
        segmenter.model.min_score = None
        label, kept = world_labeller(segmenter, scenes), labels.setdefault(dtype, [])

        def keeping(*args: object, label: Label = label, kept: list[np.ndarray] = kept) -> np.ndarray:
            kept.append(label(*args))
            return kept[-1]

        miou[dtype] = score(keeping, scenes).scores.miou
    return equal_share(zip(labels[DTYPES[0]], labels[DTYPES[1]], strict=True)), miou[DTYPES[0]], miou[DTYPES[1]]


def of_photos(path: Path, photos: list[Path], quantize: str | None = None) -> float:
    """Percent of equal labels of an official network on photos of any size."""
    arrays = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    weights = {key.removeprefix("weight/"): value for key, value in arrays.items() if key.startswith("weight/")}
    text = arrays["input/text_embeddings"]
    names = [f"class {i}" for i in range(len(text))]
    model = zs3fast.load_official(weights, seen=SEEN, num_classes=len(text), heads=HEADS, decoder_heads=HEADS)
    full, half = (
        Segmenter(model, text_embeddings=text, class_names=names, **form(dtype, quantize)) for dtype in DTYPES
    )
    return equal_share((full(photo).labels, half(photo).labels) for photo in photos)


def main(argv: list[str] | None = None) -> None:
    summary, _, examples = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    packed = list(packed_models(bundled()))
    parser.add_argument("--models", nargs="*", choices=packed, default=packed, help="of the package (all)")
    parser.add_argument("--quantize", choices=KINDS, default=None, help="the second form's image tower in 8 bits")
    parser.add_argument("--scenes", type=int, default=200, help="test scenes of the world (200)")
    parser.add_argument("--goldens", type=Path, default=None, help="folder of METHOD_tiny.npz with official weights")
    parser.add_argument("--photos", type=Path, default=None, help="folder of JPEG files for them")
    parser.add_argument("--limit", type=int, default=100, help="photos, the first by name (100)")
    args = parser.parse_args(argv)
    if (args.goldens is None) != (args.photos is None):
        parser.error("--goldens and --photos: give both or neither")
    second = "bfloat16" if args.quantize is None else f"bfloat16 and {args.quantize}"
    for method in args.models:
        equal, full, half = of_the_world(method, args.scenes, args.quantize)
        print(
            f"world  {method:10} {equal:7.3f} % equal, mIoU {full:6.2f} float32 {half:6.2f} {second}, "
            f"{args.scenes} scenes",
            flush=True,
        )
    if args.photos is not None:
        photos = sorted(args.photos.glob("*.jpg"))[: args.limit]
        if not photos:
            parser.error(f"--photos: no *.jpg in {args.photos}")
        for method in ONE_STAGE:
            share = of_photos(args.goldens / f"{method}_tiny.npz", photos, args.quantize)
            print(f"photos {method:10} {share:7.3f} % equal, {len(photos)} photos", flush=True)


if __name__ == "__main__":
    main()
