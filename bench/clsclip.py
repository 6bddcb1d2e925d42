"""ClsCLIP and ClsCLIP+: many classes or boxes of one image, one pass a pair against what pairs can share.

    python bench/clsclip.py                       # all shapes, results in bench/results/<device>/clsclip.json
    python bench/clsclip.py classes-20 --rounds 5
    python bench/clsclip.py boxes-1 boxes-5 boxes-20 --no-peaks
    python bench/clsclip.py --device cuda

ViT-B/16 at 352 x 352, random weights, image and text tokens in, mask logits of every class out. "plain" is torch's own
modules, one whole pass a class; "one by one" is zs3fast's model called for one class (or box) at a time, "zs3fast" for
all of them. Boxes lie in an image of 500 x 375 pixels, each of a class of its own; scores [C, H, W] come out.

The bound by arithmetic, all terms counted: C (prefix + suffix + decoder) against prefix + merge + C (suffix + decoder -
merge). In GMAC 46.2, 231, 924, 3694 against 46.2, 195, 751, 2976 for C = 1, 5, 20, 80: at most 1.00x, 1.19x, 1.23x,
1.24x. Boxes share nothing but batches: 1.00x. The result is S * S * 4 bytes a class (0.5 MB) in every contender.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import zs3fast  # noqa: E402
from bench.baselines.clsclip import PlainClsCLIP  # noqa: E402
from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import DTYPES, OURS, OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast.models.clsclip_plus import ClsCLIPPlus, squash, zoom_windows  # noqa: E402
from zs3fast.proposals import make_boxes  # noqa: E402

COUNTS = {
    **{f"classes-{count}": count for count in (1, 5, 20, 80)},
    **{f"boxes-{count}": count for count in (1, 5, 20)},
    "tiny": 3,
}
PICTURE = (375, 500)
TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 48, "patch_size": 16, "head_width": 12},
    "text_cfg": {"width": 64},
}
PLAIN_TINY = {"width": 48, "layers": 6, "heads": 4, "grid": 4, "embed_dim": 32, "text_width": 64}


@functools.cache
def make_models(tiny: bool, device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """zs3fast's model and the plain structure with the same weights."""
    torch.manual_seed(0)
    options = {"clip": TINY, "image_size": 64} if tiny else {"clip": "ViT-B-16"}
    ours = zs3fast.create_model("clsclip", **options).eval().requires_grad_(False)
    for linear in ours.navigation.values():
        nn.init.normal_(linear.weight, std=0.1)  # so that classes differ
    plain = PlainClsCLIP(**(PLAIN_TINY if tiny else {})).eval().requires_grad_(False)
    plain.load_state_dict(ours.state_dict())
    return ours.to(device, dtype), plain.to(device, dtype)


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    """One contender's call; checked against the plain structure on the first, a middle and the last class."""
    tiny, dtype = shape == "tiny", DTYPES[args.dtype]
    ours, plain = make_models(tiny, args.device, dtype)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(COUNTS[shape], ours.embed_dim, generator=generator).to(args.device, dtype)
    checked = sorted({0, len(text) // 2, len(text) - 1})
    if "boxes" in shape:
        call, expect = make_boxes_call(name, ours, plain, text, generator, checked)
    else:
        side = ours.image_size
        image = torch.randn(1, 3, side, side, generator=generator).to(args.device, dtype)
        calls = {
            "plain": lambda: plain(image, text)[0],
            "one by one": lambda: torch.cat([ours(image, row).mask_logits for row in text.split(1)], dim=1)[0],
            OURS: lambda: ours(image, text).mask_logits[0],
        }
        call, expect = calls[name], lambda: plain(image, text[checked])[0]

    def run() -> Tensor:
        with torch.no_grad():
            return call()

    def check(got: Tensor) -> None:
        with torch.no_grad():
            within_budget(name, got[checked].float(), expect().float(), 1e-5 if dtype == torch.float32 else 0.05)

    return Contender(name, run, None if name == "plain" else check)


def make_boxes_call(
    name: str, ours: nn.Module, plain: nn.Module, text: Tensor, generator: torch.Generator, checked: list
):
    """ClsCLIP+ on seeded boxes, a class each: the call, and the plain scores of the checked classes."""
    count, (height, width) = len(text), PICTURE
    image = torch.randn(3, height, width, generator=generator).to(text)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.6
    size = 20 + torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.35
    words = [f"word {i}" for i in range(count)]
    boxes = make_boxes(torch.cat([corner, corner + size], dim=1), words, PICTURE)
    plus = ClsCLIPPlus(ours, no_box="empty")

    def each(model: nn.Module, classes: list[int]) -> Tensor:
        """One crop at a time through `model`, as eq. 9 reads."""
        scores = torch.zeros(len(classes), height, width, device=text.device)
        for row, c in enumerate(classes):
            ((x0, y0, x1, y1),) = zoom_windows(boxes.boxes[c : c + 1], PICTURE, plus.crop_margin)
            crop = squash(image[None, :, y0:y1, x0:x1], ours.image_size).to(text.dtype)
            out = model(crop, text[c : c + 1])
            logits = out if isinstance(out, Tensor) else out.mask_logits
            z = F.interpolate(logits.float(), size=(y1 - y0, x1 - x0), mode="bilinear", align_corners=False)
            scores[row, y0:y1, x0:x1] = z[0, 0].sigmoid()
        return scores

    everything = list(range(count))
    calls = {
        "plain": lambda: each(plain, everything),
        "one by one": lambda: each(ours, everything),
        OURS: lambda: plus.class_scores(image, text, boxes, words),
    }
    return calls[name], lambda: each(plain, checked)


SCRIPT = OpScript(
    op="clsclip",
    file=__file__,
    doc=__doc__,
    shapes=tuple(COUNTS),
    contenders=("plain", "one by one", OURS),
    make=make,
    dtypes=("float32", "bfloat16", "float16"),
    rounds=3,
)


def main(argv: list[str] | None = None) -> list[dict]:
    rows = run_script(SCRIPT, argv)
    for row in rows:
        if row["backend"] == "plain":
            others = [r for r in rows if r["shape"] == row["shape"] and r is not row]
            ratios = ", ".join(f"{r['backend']} {row['p50_ms'] / r['p50_ms']:.2f}x" for r in others)
            print(f"{row['shape']:19s} against plain: {ratios}")
    return rows


if __name__ == "__main__":
    main()
