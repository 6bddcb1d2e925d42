"""End to end: a JPEG file in, a label map in NumPy out; decode, resize, model and labels shown apart.

zs3fast is `zs3fast.utils.images.read_image` and a `Segmenter`, as a user calls them. The official pipeline is Pillow's
decoder, a bilinear resize of the short side to the window's on 8 bits, the official structure window by window, its
scores padded into the whole image, averaged, resized to the image's own size, softmax and argmax. Both cut the same
sliding windows. Stages are clocked inside the timed calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bench import contenders, harness
from bench.harness import Contender, OverBudget
from bench.setting import Setting, make_inputs

STAGES = ("decode", "resize", "model", "labels")
PICTURE = harness.ROOT / "assets" / "coffee.jpg"
PICTURE_SIZE = (500, 375)  # width and height: VOC's usual ones


def make_image(folder: str | Path, image: Path | None = None) -> Path:
    """The file to label: the one given, or the repository's photo at 500 x 375, quality 92."""
    if image is not None:
        return image
    path = Path(folder) / "picture.jpg"
    Image.open(PICTURE).convert("RGB").resize(PICTURE_SIZE).save(path, quality=92)
    return path


class Clock:
    """Seconds of each stage of each call: `start`, then `lap` at the end of every stage."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.calls: list[dict[str, float]] = []
        self.last = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.calls.append(dict.fromkeys(STAGES, 0.0))
        self.last = self.now()

    def lap(self, stage: str, *_: object) -> None:
        """Everything since the last lap belongs to `stage`."""
        now = self.now()
        self.calls[-1][stage] += now - self.last
        self.last = now

    def milliseconds(self, rounds: int) -> dict[str, float]:
        """Medians over the last `rounds` calls: those that were timed."""
        calls = self.calls[-rounds:]
        return {f"{stage}_ms": round(statistics.median(c[stage] for c in calls) * 1e3, 4) for stage in STAGES}


# zs3fast -------------------------------------------------------------------------------------------------------------


def make_segmenter(model: nn.Module, setting: Setting, device: str) -> Any:
    """A segmenter over prepared text embeddings: no text tower runs."""
    from zs3fast import Segmenter

    _, text = make_inputs(setting, device)
    names, dtype = [f"class {i}" for i in range(setting.classes)], next(model.parameters()).dtype
    return Segmenter(model, text_embeddings=text, class_names=names, dtype=dtype)


def ours(segmenter: Any, path: Path, clock: Clock) -> np.ndarray:
    """The file's labels, int32 [H, W]."""
    from zs3fast.utils.images import read_image

    hooks = [
        segmenter.model.register_forward_pre_hook(partial(lap_hook, clock, "resize")),
        segmenter.model.register_forward_hook(partial(lap_hook, clock, "model")),
    ]
    try:
        clock.start()
        pixels, _ = read_image(path)
        clock.lap("decode")
        labels = segmenter(pixels).labels
        clock.lap("labels")
    finally:
        for hook in hooks:
            hook.remove()
    return labels


def lap_hook(clock: Clock, stage: str, *_: object) -> None:
    clock.lap(stage)


# The official pipeline -----------------------------------------------------------------------------------------------


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def make_canvas(pixels: np.ndarray, side: int, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised [1, 3, H', W'], short side `side`; resized on 8 bits, without antialiasing."""
    scale = side / min(pixels.shape[:2])
    size = [int(n * scale + 0.5) for n in pixels.shape[:2]]
    image = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    return (image.float() - 255 * mean.view(3, 1, 1)) / (255 * std.view(3, 1, 1))


def window_corners(size: tuple[int, int], crop: int) -> list[tuple[int, int]]:
    """Top left corners (y, x) of the official test's windows: stride 426 / 512 of the crop, the last one moved back."""
    stride = max(426 * crop // 512, 1)
    axes = [[min(i * stride, n - crop) for i in range(max(n - crop + stride - 1, 0) // stride + 1)] for n in size]
    return [(y, x) for y in axes[0] for x in axes[1]]


def canvas_scores(model: nn.Module, canvas: Tensor, text: Tensor, lap: Callable[[str], None]) -> Tensor:
    """Scores [1, C, H', W'] of every class, averaged over the windows that cover a pixel."""
    height, width = canvas.shape[-2:]
    crop = model.image_size
    total = canvas.new_zeros(1, len(text), height, width)
    count = canvas.new_zeros(1, 1, height, width)
    for y, x in window_corners((height, width), crop):
        logits = model(canvas[:, :, y : y + crop, x : x + crop], text)
        lap("model")
        scores = model.class_scores(logits)
        total += F.pad(scores, (x, width - x - crop, y, height - y - crop))
        count[:, :, y : y + crop, x : x + crop] += 1
        lap("labels")
    return total / count


def official(model: nn.Module, text: Tensor, means: tuple[Tensor, Tensor], path: Path, clock: Clock) -> np.ndarray:
    """The file's labels, int64 [H, W]."""
    clock.start()
    pixels = read_pixels(path)
    clock.lap("decode")
    canvas = make_canvas(pixels, model.image_size, *means).to(text)
    clock.lap("resize")
    with torch.no_grad():
        scores = canvas_scores(model, canvas, text, clock.lap)
        scores = F.interpolate(scores, size=pixels.shape[:2], mode="bilinear", align_corners=False)
        labels = scores.softmax(dim=1).argmax(dim=1)[0].cpu().numpy()
    clock.lap("labels")
    return labels


# Contenders ----------------------------------------------------------------------------------------------------------


def check_ours(model: nn.Module, baseline: nn.Module, setting: Setting, path: Path, got: np.ndarray) -> None:
    """Raise OverBudget unless zs3fast's canvas is the official one and its labels are those of its canvas.

    The canvases may differ by one of 255 levels, where a resize on 8 bits rounds the other way, and no more.
    """
    from zs3fast.inference.predictors import prepare

    pixels = read_pixels(path)
    canvas = prepare(pixels, model.image_size, model.pixel_mean, model.pixel_std).unsqueeze(0)
    mean, std = (torch.tensor(list(values)) for values in (model.pixel_mean, model.pixel_std))
    levels = (canvas - make_canvas(pixels, model.image_size, mean, std)).abs() * 255 * std.view(3, 1, 1)
    if levels.max() > 1.01:
        raise OverBudget(f"resize: {float(levels.max()):.2f} of 255 levels apart, expected at most 1")
    check_labels(baseline, setting, canvas, got)


def check_labels(baseline: nn.Module, setting: Setting, canvas: Tensor, got: np.ndarray) -> None:
    """Raise OverBudget unless the official score of each label on this canvas is within rounding of the best."""
    _, text = make_inputs(setting, next(baseline.parameters()).device)
    exact = contenders.in_float32(baseline)
    with torch.no_grad():
        scores = canvas_scores(exact, canvas.to(text.device), text.float(), lambda _: None)
        scores = F.interpolate(scores, size=got.shape, mode="bilinear", align_corners=False)
        chosen = torch.from_numpy(got).long().to(scores.device)
        lost = scores[0].amax(0) - scores[0].gather(0, chosen.unsqueeze(0))[0]
    budget = 5e-5 if setting.dtype == "float32" else 4 * torch.finfo(setting.torch_dtype).eps
    if not float(lost.max()) <= budget:
        raise OverBudget(f"labels: a pixel's official score is {float(lost.max()):.2e} below the best")


def make_official(
    model: nn.Module,
    baseline: nn.Module,
    setting: Setting,
    path: Path,
    means: Sequence[Sequence[float]],
    device: str,
) -> tuple[Contender, Clock]:
    """The official pipeline around `model`, which is the baseline or made of it, and its clock.

    means: pixel mean and deviation.
    """
    clock = Clock(device)
    _, text = make_inputs(setting, device)
    mean, std = (torch.tensor(list(values)) for values in means)

    def check(got: np.ndarray) -> None:
        check_labels(baseline, setting, make_canvas(read_pixels(path), model.image_size, mean, std), got)

    run = partial(official, model, text, (mean, std), path, clock)
    return Contender("official", run, None if model is baseline else check), clock


def make_ours(
    segmenter: Any, baseline: nn.Module, setting: Setting, path: Path, device: str
) -> tuple[Contender, Clock]:
    """zs3fast's pipeline and its clock."""
    clock = Clock(device)
    check = partial(check_ours, segmenter.model, baseline, setting, path)
    return Contender("zs3fast", partial(ours, segmenter, path, clock), check), clock
