"""A model's way from windows to logits under torch.compile, as one graph."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger("zs3fast")

_turn = threading.RLock()  # of the threads that share a model; one inside would make it uncopyable
MAX_SHAPES = 8  # a CUDA graph each, with the memory of a forward pass; torch's own limit is 8 as well


class Logits(NamedTuple):
    """mask_logits: [B, C, h, w].  trusty_logits: [B, 1, h, w], or None."""

    mask_logits: Tensor
    trusty_logits: Tensor | None


class CompiledModel:
    """Stands in for `model(images, text_embeddings)` where only its logits are asked for, and no gradient.

    Text embeddings are an input: another list of as many classes runs the same code, and so do new weights.
        - CPU: numbers of images and classes are inputs too, so that it compiles once for several images and classes,
          and again for a single one of either. Another size of images compiles again.
        - CUDA: "reduce-overhead", a CUDA graph with static buffers for each (images, classes), the images filled up to
          the next power of two, so that a few graphs serve any number of windows. Threads take turns.
          This branch has not run on a GPU so far; `tests/gpu/test_pipeline.py` is what to run there.
    Beyond `MAX_SHAPES` of these, others run as the plain model; the log says so once.

    Args:
        model: a one-stage method in eval mode.
        backend: of torch.compile.
    Raises:
        RuntimeError: the compiler that torch.compile needs on the model's device is not there.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor"):
        device = next(model.parameters()).device
        if backend == "inductor":
            _check_compiler(device)
        self.model = model
        self.cuda_graphs = device.type == "cuda"
        self.shapes: set[tuple[object, ...]] = set()

        def logits(images: Tensor, text_embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
            out = model(images, text_embeddings)
            return out.mask_logits, out.trusty_logits

        # torch keeps what it compiled with the code, which all models here would share, and its limit with them.
        own = FunctionType(logits.__code__.replace(), logits.__globals__, closure=logits.__closure__)
        mode, dynamic = ("reduce-overhead", False) if self.cuda_graphs else (None, None)
        compiled = torch.compile(own, fullgraph=True, dynamic=dynamic, backend=backend, mode=mode)
        self._run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] = compiled

    def __call__(self, images: Tensor, text_embeddings: Tensor) -> Logits:
        """Images [B, 3, H, W] and text embeddings [C, D] -> the logits."""
        if not self.cuda_graphs:
            return self._call(images, text_embeddings)
        with _turn:  # a graph's buffers are one call's
            return self._call(images, text_embeddings)

    def _call(self, images: Tensor, text_embeddings: Tensor) -> Logits:
        given, images = images, filled_up(images) if self.cuda_graphs else images
        if not self._takes(images, text_embeddings):
            out = self.model(given, text_embeddings)
            return Logits(out.mask_logits, out.trusty_logits)
        if not self.cuda_graphs:
            # Marks are left on a tensor, and these two may be others' as well.
            images, text_embeddings = images.view_as(images), text_embeddings.view_as(text_embeddings)
            for tensor in (images, text_embeddings):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            return Logits(*self._run(images, text_embeddings))
        torch.compiler.cudagraph_mark_step_begin()
        masks, trusty = self._run(images, text_embeddings)
        # The next call writes to the same memory.
        return Logits(masks[: len(given)].clone(), None if trusty is None else trusty[: len(given)].clone())

    def _takes(self, images: Tensor, text_embeddings: Tensor) -> bool:
        """Whether this shape is compiled, or may still be."""
        counts = [len(images), len(text_embeddings)]
        if not self.cuda_graphs:
            counts = [min(count, 2) for count in counts]  # torch tells one from several
        shape = (*counts, *images.shape[1:], images.dtype, text_embeddings.dtype)
        with _turn:
            return self._counted(shape)

    def _counted(self, shape: tuple[object, ...]) -> bool:
        if shape not in self.shapes and len(self.shapes) >= MAX_SHAPES:
            if len(self.shapes) == MAX_SHAPES:
                self.shapes.add(())  # said
                logger.warning("compile: %d shapes are compiled, further ones run as they are", MAX_SHAPES)
            return False
        self.shapes.add(shape)
        return True


def filled_up(images: Tensor) -> Tensor:
    """Images [B, ...] and zeros up to the next power of two."""
    missing = (1 << (len(images) - 1).bit_length()) - len(images)
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise RuntimeError("compile: torch.compile needs Triton on a GPU, and there is none; `pip install triton`")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise RuntimeError(
            "compile: torch.compile needs a C++ compiler on a CPU and found none; install g++, or name one by CXX"
        ) from None
