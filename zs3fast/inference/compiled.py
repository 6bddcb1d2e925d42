"""A model's way from windows to logits under torch.compile, as one graph."""

from __future__ import annotations

import copy
import logging
import threading
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from zs3fast.inference.repeated import Contexts, Logits, Repeated, kept_context, model_logits, weights_of

__all__ = ["CompiledModel", "Logits"]
logger = logging.getLogger("zs3fast")

MAX_SHAPES = 8  # torch's own limit of what it compiles of a piece of code
_turn = threading.Lock()  # of the threads that share a model; one inside would make it uncopyable


class CompiledModel:
    """Stands in for `model(images, text_embeddings)` where only its logits are asked for, and no gradient.

    Text embeddings are an input: another list of classes runs the same code, and so do new weights. Numbers of images
    and classes are inputs too, so that it compiles once for several images and classes, and again for a single one of
    either. Another size of images compiles again; beyond `MAX_SHAPES` of these, others run as the plain model, and the
    log says so once. Keys and values of prompts are an input as well, computed once. On CUDA small batches whose sizes
    come again are replayed, see `zs3fast.inference.repeated`; this has not run on a GPU so far.

    Args:
        model: a one-stage method in eval mode.
        backend: of torch.compile.
    Raises:
        RuntimeError: the compiler that torch.compile needs on the model's device is not there.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor"):
        if backend == "inductor":
            _check_compiler(next(model.parameters()).device)
        self.model, self.backend = model, backend
        self.shapes: set[tuple[object, ...]] = set()

        def logits(images: Tensor, text_embeddings: Tensor, contexts: Contexts) -> tuple[Tensor, Tensor | None]:
            return model_logits(model, images, text_embeddings, contexts)

        # torch keeps what it compiled with the code, which all models here would share, and its limit with them.
        own = FunctionType(logits.__code__.replace(), logits.__globals__, closure=logits.__closure__)
        self._compiled = torch.compile(own, fullgraph=True, backend=backend)
        self.repeated = Repeated(self._run, self._weights)

    def __call__(self, images: Tensor, text_embeddings: Tensor) -> Logits:
        """Images [B, 3, H, W] and text embeddings [C, D] -> the logits."""
        if self._takes(images, text_embeddings):
            return Logits(*self.repeated(images, text_embeddings, kept_context(self.model)))
        out = self.model(images, text_embeddings)
        return Logits(out.mask_logits, out.trusty_logits)

    def _run(self, images: Tensor, text_embeddings: Tensor, contexts: Contexts) -> tuple[Tensor, Tensor | None]:
        # Marks are left on a tensor, and these two may be others' as well.
        images, text_embeddings = images.view_as(images), text_embeddings.view_as(text_embeddings)
        for tensor in (images, text_embeddings):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
            for dim in range(1, tensor.ndim):  # or torch would learn from other models' sizes that they vary
                torch._dynamo.mark_static(tensor, dim)
        logits: tuple[Tensor, Tensor | None] = self._compiled(images, text_embeddings, contexts)
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        return CompiledModel(copy.deepcopy(self.model, memo), self.backend)  # what is compiled runs the model it is of

    def _weights(self) -> list[Tensor]:
        return weights_of(self.model)

    def _takes(self, images: Tensor, text_embeddings: Tensor) -> bool:
        """Whether this shape is compiled, or may still be."""
        counts = [min(count, 2) for count in (len(images), len(text_embeddings))]  # torch tells one from several
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
