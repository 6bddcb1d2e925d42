"""What a command's options choose: a class list, and the Segmenter of weights or of CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zs3fast.inference.options import SegmenterOptions
    from zs3fast.inference.segmenter import Segmenter
    from zs3fast.text.vocabulary import ClassEntry


def class_list(classes: str | None, classes_file: Path | None, dataset: str | None) -> list[ClassEntry] | None:
    """The classes of --classes, --classes-file or --dataset; None where none is given.

    Raises:
        ValueError: more than one is given; whatever reading it raises.
    """
    from zs3fast.text import class_names, parse_classes, read_class_file

    given = {"--classes": classes, "--classes-file": classes_file, "--dataset": dataset}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"expected one class list, got {' and '.join(named)}")
    if classes is not None:
        return parse_classes(classes, "--classes")
    if classes_file is not None:
        return read_class_file(classes_file)
    return None if dataset is None else [(name,) for name in class_names(dataset)]


def not_both(weights: str | None, clip: dict[str, Any]) -> None:
    """Raise where --weights are given and so are options that choose CLIP's instead: those of `clip` that are not None.

    Raises:
        ValueError: naming them.
    """
    needless = [f"--{name.replace('_', '-')}" for name, value in clip.items() if value is not None]
    if weights is not None and needless:
        raise ValueError(f"expected --weights or {' and '.join(needless)}, got both")


def segmenter_of(
    weights: str | None, entries: list[ClassEntry] | None, clip: dict[str, Any], options: SegmenterOptions
) -> tuple[Segmenter, str]:
    """The Segmenter of --weights, or of CLIP by --method, --clip and --pretrained (`clip`), and a name to show for it.

    Raises:
        ValueError: both are given; whatever loading raises.
    """
    from zs3fast.inference.loading import find_weights, from_clip
    from zs3fast.inference.segmenter import Segmenter

    not_both(weights, clip)
    if weights is not None:
        name = Path(find_weights(weights)).stem
        return Segmenter.from_pretrained(weights, class_names=entries, options=options), name
    model = from_clip(**clip, seen=[], num_classes=len(entries or ()))
    return Segmenter(model, class_names=entries, options=options), model.method
