"""The models a page offers: loaded when first asked for, the last few kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from zs3fast.inference.loading import DEFAULT_METHOD, TINY, TINY_DEFAULT, find_weights, from_clip
from zs3fast.inference.options import SegmenterOptions
from zs3fast.inference.segmenter import Segmenter
from zs3fast.models.registry import list_models, model_class
from zs3fast.text import cache_dir
from zs3fast.utils.options import one_of
from zs3fast.weights.packing import bundled, packed_models

KEPT = 3  # models: two that are compared, and the one before

Loader = Callable[[], Segmenter]


class Models:
    """Segmenters by name.

    Args:
        loaders: what makes each, by the name it is offered under; the first is the one to begin with.
    """

    def __init__(self, loaders: Mapping[str, Loader]):
        self._loaders = dict(loaders)
        self._kept: OrderedDict[str, dict[int | None, Segmenter]] = OrderedDict()  # by steps of refinement
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self._loaders)

    def get(self, name: str, refine: int | None = None) -> Segmenter:
        """The segmenter of that name; a ValueError names those there are.

        Args:
            refine: steps of refinement, see `SegmenterOptions`; the weights are shared between all.
        """
        if not isinstance(name, str):
            raise ValueError(f"model: expected a name, got {type(name).__name__}")
        one_of("model", name, self.names)
        with self._lock:
            if name not in self._kept:
                self._kept[name] = {None: self._loaders[name]()}
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(name)
            like = self._kept[name]
            if refine not in like:
                base = like[None]
                like[refine] = Segmenter(
                    base.model,
                    text_encoder=base.text_encoder,
                    class_names=base.classes,
                    options=base.options.with_({"refine": refine}),
                )
            return like[refine]


def offered(
    weights: Iterable[str] = (),
    clip: str | None = None,
    pretrained: str | None = None,
    options: SegmenterOptions | None = None,
) -> Models:
    """Every model there is without being told more: weights given, those in the package and the cache, CLIP's own.

    MAFT needs proposals and is offered where `options` have a proposer.

    Args:
        weights: files or names, see `find_weights`; offered first.
        clip, pretrained: of the methods without training, as in `zs3fast segment`. Given, these come first as well.
    Raises:
        FileNotFoundError: weights that are not there, before any are loaded.
    """
    options = options or SegmenterOptions()
    given = {_shown(name): _file(find_weights(name), options) for name in weights}
    small = {
        f"{TINY}-{method}": _file(path, options)
        for method, path in sorted(packed_models(bundled()).items(), key=lambda item: item[0] != TINY_DEFAULT)
        if options.proposer is not None or model_class(method).protocol != "proposals"
    }
    kept = {path.stem: _file(path, options) for path in sorted((cache_dir() / "weights").glob("*.safetensors"))}
    which = f"{clip or 'ViT-B-16'}, {Path(pretrained).name if pretrained else 'openai'}"
    free = [method for method in list_models() if model_class(method).training_free]
    plain = {
        f"{method} ({which})": _plain(method, clip, pretrained, options)
        for method in sorted(free, key=lambda method: method != DEFAULT_METHOD)
    }
    first = {**given, **(plain if clip or pretrained else {})}
    return Models({**first, **small, **kept, **plain, **first})


def _shown(name: str) -> str:
    return Path(name).stem if Path(name).is_file() else name


def _file(path: Path, options: SegmenterOptions) -> Loader:
    return lambda: Segmenter.from_pretrained(path, options=options)


def _plain(method: str, clip: str | None, pretrained: str | None, options: SegmenterOptions) -> Loader:
    return lambda: Segmenter(from_clip(method, clip, pretrained, seen=[]), options=options)
