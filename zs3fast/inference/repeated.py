"""CUDA graphs for sizes that come again: a small batch costs hundreds of launches, a replay is one.

**It has not run on a GPU.** `tests/gpu/test_pipeline.py` is what to run there; a recording that fails is said once, and
everything runs as it is from then on.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zs3fast.utils.recording import recording

logger = logging.getLogger("zs3fast")

MAX_RECORDINGS = 8  # each holds the memory of a forward pass
SMALL_BATCH = 2  # images; beyond, the kernels of a ViT take longer than their launches
_turn = threading.RLock()  # of all that replay; one inside would make a Segmenter uncopyable


class Logits(NamedTuple):
    """mask_logits: [B, C, h, w].  trusty_logits: [B, 1, h, w], or None."""

    mask_logits: Tensor
    trusty_logits: Tensor | None


Contexts = Any  # of `PromptedClipViT.kept_context`
Run = Callable[[Tensor, Tensor, Contexts], tuple[Tensor, Tensor | None]]
Replay = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor | None]]


def model_logits(model: nn.Module, images: Tensor, text: Tensor, contexts: Contexts) -> tuple[Tensor, Tensor | None]:
    """The logits of a one-stage method, from the keys and values of its prompts where there are any."""
    if contexts is None:
        out = model(images, text)
    else:
        out = model.decode(model.encode(images, contexts), model.check_text(text))  # type: ignore[operator]  # contexts: a one-stage one
    return out.mask_logits, out.trusty_logits


def kept_context(model: nn.Module) -> Contexts:
    """What of a model's encoder depends on weights alone, computed once; None where there is none."""
    keep = getattr(getattr(model, "encoder", None), "kept_context", None)
    return None if keep is None else keep()


class CudaGraph:
    """One call of `run`, recorded; called with other tensors of the same sizes it replays it.

    The results lie in memory that the next replay writes to.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], given: Sequence[Tensor]):
        self.inputs = [tensor.clone() for tensor in given]
        current, aside = torch.cuda.current_stream(given[0].device), torch.cuda.Stream(given[0].device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # what a first call compiles, chooses and allocates is none of the graph's
            run(*self.inputs)
        current.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads copy meanwhile
            self.outputs = run(*self.inputs)

    def __call__(self, given: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        for kept, tensor in zip(self.inputs, given, strict=True):
            kept.copy_(tensor)
        self.graph.replay()
        return self.outputs


class _Recorded(NamedTuple):
    """replay: None: seen once.  weights: where they lay.  contexts: held as long as the graph reads them."""

    replay: Replay | None
    weights: tuple[int, ...]
    contexts: Contexts


class Repeated:
    """Stands in for `run`: small batches whose sizes come again are replayed, all else runs as it is.

    The second call of a size is recorded, the third replays. Weights may be written to; where they lie elsewhere, or
    the prompts' keys and values are computed anew, the size is recorded anew. Threads take turns.

    Args:
        run: images, text embeddings and `contexts` -> logits; no output may be an input.
        weights: the tensors that `run` reads besides.
        record: what records a call; for tests.
    """

    def __init__(
        self,
        run: Run,
        weights: Callable[[], Iterable[Tensor]],
        record: Callable[[Callable[..., Any], Sequence[Tensor]], Replay] = CudaGraph,
    ):
        self._run, self._weights, self._record = run, weights, record
        self._kept: OrderedDict[tuple[Any, ...], _Recorded] = OrderedDict()
        self._through: Any = None  # an event: the last replay's results were copied
        self.broken = False

    def __len__(self) -> int:
        """How many sizes are recorded."""
        return sum(kept.replay is not None for kept in self._kept.values())

    def records(self, images: Tensor) -> bool:
        """Whether a call with these may be recorded."""
        return images.is_cuda

    def __call__(self, images: Tensor, text: Tensor, contexts: Contexts = None) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H, W], text embeddings [C, D] and the prompts' keys and values -> new tensors of logits."""
        plain = self.broken or len(images) > SMALL_BATCH or not len(images) or torch.is_grad_enabled()
        if plain or not self.records(images) or torch.is_autocast_enabled(images.device.type):
            return self._run(images, text, contexts)
        key = (images.device, images.shape, images.dtype, text.shape, text.dtype)
        with _turn:
            replay = self._replay(key, images, text, contexts)
            if replay is None:
                return self._run(images, text, contexts)
            if self._through is not None:  # other threads may have other streams
                torch.cuda.current_stream(images.device).wait_event(self._through)
            masks, trusty = replay([images, text])
            logits = masks.clone(), None if trusty is None else trusty.clone()
            if images.is_cuda:
                self._through = torch.cuda.current_stream(images.device).record_event()
            return logits

    def _replay(self, key: tuple[Any, ...], images: Tensor, text: Tensor, contexts: Contexts) -> Replay | None:
        """The recording of these sizes, made now if they were seen before; None: not yet."""
        weights = tuple(tensor.data_ptr() for tensor in self._weights())
        kept = self._kept.pop(key, None)
        if kept is not None and (kept.replay is None or kept.weights != weights or kept.contexts is not contexts):
            kept = _Recorded(self._recorded(images, text, contexts), weights, contexts)
        self._kept[key] = kept or _Recorded(None, weights, contexts)
        while len(self._kept) > MAX_RECORDINGS:
            self._kept.popitem(last=False)  # the one not asked for longest
        return self._kept[key].replay

    def _recorded(self, images: Tensor, text: Tensor, contexts: Contexts) -> Replay | None:
        def run(images: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
            return self._run(images, text, contexts)

        try:
            with recording():
                return self._record(run, [images, text])
        except RuntimeError as error:
            self.broken = True
            logger.warning("CUDA graphs are left: recording failed (%s); everything runs as it is", error)
            return None

    def __getstate__(self) -> dict[str, Any]:
        """Recordings stay with the model whose weights they read."""
        return {**self.__dict__, "_kept": OrderedDict(), "_through": None}


class RepeatedModel:
    """Stands in for `model(images, text_embeddings)` where only its logits are asked for, see `Repeated`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.repeated = Repeated(self._logits, self._weights)

    def __call__(self, images: Tensor, text_embeddings: Tensor) -> Any:
        """Images [B, 3, H, W] and text embeddings [C, D] -> what has the logits."""
        if not self.repeated.records(images):
            return self.model(images, text_embeddings)
        return Logits(*self.repeated(images, text_embeddings, kept_context(self.model)))

    # Methods, not functions of `model`: of a copy they are the copy's.
    def _logits(self, images: Tensor, text: Tensor, contexts: Contexts) -> tuple[Tensor, Tensor | None]:
        return model_logits(self.model, images, text, contexts)

    def _weights(self) -> list[Tensor]:
        return weights_of(self.model)


def weights_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a model."""
    return [*model.parameters(), *model.buffers()]
