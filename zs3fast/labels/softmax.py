"""Labels where names compete by a softmax: similarities of windows averaged, resized, compared.

    a      = mean over the windows that cover a canvas pixel of upsample(logits)       bilinear, align_corners=False
    z      = refine(resize(a, size)) * scale
    p_q    = softmax_q(z),   p_c = max over the names q of class c of p_q
    labels = argmax_c p_c,   scores = max_c p_c

A class may have several names, of which its best one counts. Since p_c rises with the largest z_q of the class, the
label is the class of argmax_q z_q. All steps are linear but the last, so the image is done in bands of rows, or with
`refine`, which looks around, in tiles of some names: nothing is stored at Q x H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zs3fast.labels.refinement import Pamr, Region, groups
from zs3fast.labels.resizing import between, taps

BAND_BYTES = 64 << 20
Refine = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Frame:
    """Where the logits [n, Q, h, w] of n windows lie.

    crop_size: (height, width) of a window.  canvas_size: of the image the windows lie on.  windows: n offsets (y, x),
    which together cover the canvas.  margin: rows and columns that were put before a window; padded_size: of the window
    with what was put around it, which is what its logits cover; None: nothing was.
    """

    crop_size: tuple[int, int]
    canvas_size: tuple[int, int]
    windows: Sequence[tuple[int, int]]
    margin: tuple[int, int] = (0, 0)
    padded_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rule:
    """How names compete.

    name_class: the class of each name, which together are 0..C-1; None: every name is a class.
    scale:      of the logits before the softmax.
    over_classes: divide p_c by its sum over classes, as NACLIP does: a softmax over each class's best name.
    area_thd:   every class but the first whose area is not above this share of the area of all but the first leaves the
                race (its names stay in the softmax); None: all stay.
    prob_thd:   pixels whose score is lower become class 0, the background.
    """

    name_class: Sequence[int] | None = None
    scale: float = 1.0
    over_classes: bool = False
    area_thd: float | None = None
    prob_thd: float = 0.0


def softmax_labels(
    logits: Tensor,
    size: tuple[int, int],
    *,
    crop_size: tuple[int, int],
    canvas_size: tuple[int, int],
    windows: Sequence[tuple[int, int]],
    margin: tuple[int, int] = (0, 0),
    padded_size: tuple[int, int] | None = None,
    rule: Rule | None = None,
    refine: Refine | None = None,
    band_bytes: int = BAND_BYTES,
) -> tuple[Tensor, Tensor]:
    """Labels int32 [H, W] of one image and the probability [H, W] of each, float32 at least.

    Args:
        logits: [n, Q, h, w], a row a window.
        size: (H, W) of the image.
        crop_size, canvas_size, windows, margin, padded_size: see `Frame`.
        rule: see `Rule`; None: every name is a class, nothing is left out.
        refine: maps [q, H, W] of some names -> the same, refined, each name on its own.
        band_bytes: how large the scores of a band may be; a band has one row at least, a group one class.

    Equal logits go to the lowest class index; a pixel with a NaN has the score NaN.
    """
    rule = rule or Rule()
    frame = Frame(crop_size, canvas_size, windows, margin, padded_size)
    classes = _classes(rule, logits)
    labels, scores = _race(logits, size, frame, rule, refine, classes, None, band_bytes)
    if rule.area_thd is not None:
        lost = small_classes(labels, int(classes.max()) + 1, rule.area_thd)
        if bool(lost.any()):
            labels, scores = _race(logits, size, frame, rule, refine, classes, lost, band_bytes)
    if rule.prob_thd:
        labels.masked_fill_(scores < rule.prob_thd, 0)
    return labels, scores


def softmax_scores(
    logits: Tensor, size: tuple[int, int], frame: Frame, rule: Rule | None = None, refine: Refine | None = None
) -> Tensor:
    """p_c [C, H, W], 0 for classes that left the race: the definition, with everything at full size."""
    rule = rule or Rule()
    classes = _classes(rule, logits)
    p = torch.empty(logits.shape[1], *size, dtype=_widened(logits).dtype, device=logits.device)
    for region, names, z in _pieces(logits, size, frame, refine, classes, BAND_BYTES):
        p[(names, *region)] = z * rule.scale
    p = _by_class(p.softmax(0), classes)
    if rule.over_classes:
        p = p / p.sum(0)
    if rule.area_thd is not None:
        p[small_classes(p.argmax(0), len(p), rule.area_thd)] = 0
    return p


def small_classes(labels: Tensor, classes: int, area_thd: float) -> Tensor:
    """Which of the classes, bool [C], are not above `area_thd` of what is not class 0; the first never is."""
    areas = torch.bincount(labels.flatten().long(), minlength=classes).double()
    small = areas <= area_thd * areas[1:].sum()
    small[0] = False
    return small


def _race(
    logits: Tensor,
    size: tuple[int, int],
    frame: Frame,
    rule: Rule,
    refine: Refine | None,
    classes: Tensor,
    lost: Tensor | None,
    band_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Labels and scores [H, W], before `prob_thd`; classes in `lost` [C] cannot win."""
    by_name = not rule.over_classes or int(classes[-1]) + 1 == len(classes)
    if isinstance(refine, Pamr) and by_name and frame.padded_size in (None, frame.crop_size):
        excluded = [] if lost is None else lost[classes].nonzero().flatten().tolist()
        names, scores = refine.best_names(
            logits,
            size,
            crop_size=frame.crop_size,
            canvas_size=frame.canvas_size,
            windows=frame.windows,
            scale=rule.scale,
            excluded=excluded,
        )
        if int(classes[-1]) + 1 < len(classes):
            of = classes.int()
            for row in names:  # one at a time: an index of the whole image would be twice its size
                row.copy_(of[row.long()])
        return names, scores
    wide = _widened(logits)
    best = wide.new_full(size, -torch.inf)
    total = wide.new_full(size, -torch.inf)  # log of the softmax's denominator
    labels = torch.zeros(size, dtype=torch.int32, device=logits.device)
    for region, part, z in _pieces(wide, size, frame, refine, classes, band_bytes):
        z, of = z * rule.scale, classes[part]
        if rule.over_classes:
            z, first = _by_class(z, of - of[0]), int(of[0])
            of = torch.arange(first, first + len(z), device=z.device)
        total[region] = torch.logaddexp(total[region], z.logsumexp(0))
        if lost is not None:
            z = z.masked_fill(lost[of][:, None, None], -torch.inf)
        top = z.max(0)
        wins = ~(top.values <= best[region])  # so written, NaN wins
        best[region] = torch.where(wins, top.values, best[region])
        labels[region] = torch.where(wins, of[top.indices].int(), labels[region])
    return labels, best.sub_(total).exp_()


def _classes(rule: Rule, logits: Tensor) -> Tensor:
    """The class of each name, int64 [Q], checked."""
    count = logits.shape[1]
    if rule.name_class is None:
        return torch.arange(count, device=logits.device)
    given = [int(c) for c in rule.name_class]
    if len(given) != count or given != sorted(given) or set(given) != set(range(given[-1] + 1)):
        raise ValueError(
            f"name_class: expected the class of each of {count} names, ascending from 0 without gaps, got {given}"
        )
    return torch.tensor(given, device=logits.device)


def _by_class(z: Tensor, classes: Tensor) -> Tensor:
    """The largest of each class's names: [q, ...] -> [C, ...]."""
    count = int(classes[-1]) + 1
    if count == len(z):
        return z
    return torch.stack([part.amax(0) for part in z.split(torch.bincount(classes).tolist())])


def _pieces(
    logits: Tensor, size: tuple[int, int], frame: Frame, refine: Refine | None, classes: Tensor, band_bytes: int
) -> Iterator[tuple[Region, slice, Tensor]]:
    """((rows, columns), names, z of these): bands of all names, or tiles of some names, classes kept together."""
    logits = _widened(logits)
    (height, width), count = size, logits.shape[1]
    canvas, every_column = frame.canvas_size, slice(0, width)
    if refine is None:
        row_bytes = logits.element_size() * (width + canvas[1] * max(canvas[0] / height, 1))  # of one name
        rows = max(int(band_bytes / (row_bytes * count)), 1)
        for start in range(0, height, rows):
            band = slice(start, min(start + rows, height))
            yield (band, every_column), slice(0, count), _resized(logits, size, band, frame)
        return
    most = next(groups(count, canvas[0] * canvas[1], size)).stop
    ends = (classes.bincount().cumsum(0)).tolist()  # where each class's names end
    start = 0
    while start < count:
        fitting = [end for end in ends if start < end <= start + most]
        end = fitting[-1] if fitting else next(end for end in ends if end > start)
        names = slice(start, end)
        maps = _canvas_rows(logits[:, names], (0, canvas[0]), frame)
        if isinstance(refine, Pamr):
            for region, z in refine.tiles(maps, size):
                yield region, names, z
        else:
            whole = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
            yield (slice(0, height), every_column), names, refine(whole)
        start = end


def _resized(logits: Tensor, size: tuple[int, int], band: slice, frame: Frame) -> Tensor:
    """Rows `band` [C, rows, W] of the canvas resized to `size`."""
    low, high, part = (tap[band] for tap in taps(frame.canvas_size[0], size[0]))
    rows = _canvas_rows(logits, (int(low[0]), int(high[-1]) + 1), frame)
    rows = between(rows, 1, low - low[0], high - low[0], part)
    return F.interpolate(rows[None], (len(low), size[1]), mode="bilinear", align_corners=False)[0]


def _canvas_rows(logits: Tensor, rows: tuple[int, int], frame: Frame) -> Tensor:
    """Rows [C, rows, width] of the canvas: the mean over windows of their upsampled logits."""
    (first, end), (height, width), (above, before) = rows, frame.crop_size, frame.margin
    padded = frame.padded_size or frame.crop_size
    zoom = taps(logits.shape[2], padded[0])
    total = logits.new_zeros(logits.shape[1], end - first, frame.canvas_size[1])
    cover = logits.new_zeros(end - first, frame.canvas_size[1])
    for window, (y, x) in zip(logits, frame.windows, strict=True):
        top, bottom = max(y, first), min(y + height, end)
        if top >= bottom:
            continue
        strip = between(window, 1, *(tap[top - y + above : bottom - y + above] for tap in zoom))
        strip = F.interpolate(strip[None], (bottom - top, padded[1]), mode="bilinear", align_corners=False)[0]
        total[:, top - first : bottom - first, x : x + width] += strip[..., before : before + width]
        cover[top - first : bottom - first, x : x + width] += 1
    return total.div_(cover)


def _widened(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
