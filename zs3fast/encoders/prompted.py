"""CLIP ViT with deep visual prompts (visual prompt tuning, as ZegCLIP section 3.2 uses it)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.encoders.clip_vit import ClipViT
from zs3fast.encoders.config import ClipVisionConfig
from zs3fast.types import ImageFeatures
from zs3fast.utils.weight_cache import WeightCache

PromptContext = list[tuple[Tensor, Tensor] | None]  # a layer: keys and values [B or 1, K, heads, dh] of its prompts


class PromptedClipViT(ClipViT):
    """Frozen CLIP ViT whose blocks see learned prompt tokens between the class token and the patches.

    Args:
        config, image_size, double_class_embedding: as for `ClipViT`.
        num_prompts: K, prompts a layer.
        prompt_depth: which layers get prompts of their own (`total_d_layer` of the official code), L layers in all:
            L - 1 (default): every layer;
            0 < M < L - 1: layers 0..M, later layers see class token and patches alone;
            0 (shallow): inserted once at layer 0 and carried along as ordinary tokens, no `prompt_norm`;
            -M (reverse): the last M layers; layer 0 never gets any, so with M = L the first set is unused.
        dropout: of the projected prompts, in training.

    Only the parameters whose name contains "prompt" train; the rest is frozen.
    """

    def __init__(
        self,
        config: ClipVisionConfig,
        image_size: int,
        *,
        num_prompts: int,
        prompt_depth: int | None = None,
        double_class_embedding: bool = True,
        dropout: float = 0.1,
    ):
        super().__init__(config, image_size, double_class_embedding=double_class_embedding)
        depth = config.layers - 1 if prompt_depth is None else prompt_depth
        if type(depth) is not int or not -config.layers <= depth < config.layers:
            expected = f"expected {-config.layers}..{config.layers - 1} for {config.layers} layers"
            raise ValueError(f"prompt_depth: {expected}, got {depth!r}")
        if type(num_prompts) is not int or num_prompts < 1:
            raise ValueError(f"num_prompts: expected at least 1, got {num_prompts!r}")
        self.prompt_depth = depth
        self.dropout = dropout
        width = config.width
        bound = math.sqrt(6.0 / (3 * config.patch_size**2 + width))
        if depth >= 0:
            self.prompt_embeddings = nn.Parameter(torch.empty(1, num_prompts, width).uniform_(-bound, bound))
        if depth != 0:
            self.deep_prompt_embeddings = nn.Parameter(
                torch.empty(abs(depth), num_prompts, width).uniform_(-bound, bound)
            )
        self.prompt_proj = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.prompt_proj.weight, a=0, mode="fan_out")
        self.prompt_norm = nn.LayerNorm(width, eps=1e-6)
        self._prompt_cache = WeightCache()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("prompt" in name)

    def layer_prompts(self, layer: int) -> Tensor | None:
        """The prompt embeddings [1, K, width] that enter at this layer, before their projection, or None."""
        depth, layers = self.prompt_depth, self.config.layers
        if depth < 0:
            index = layer - (layers + depth)
            return self.deep_prompt_embeddings[index : index + 1] if layer > 0 and index >= 0 else None
        if layer == 0:
            return self.prompt_embeddings
        return self.deep_prompt_embeddings[layer - 1 : layer] if layer <= depth else None

    def project_prompts(self, prompts: Tensor, batch: int) -> Tensor:
        """Shared projection, then dropout: in training each sample and layer draws its own mask."""
        # a trainable parameter as a module's input under no_grad is what torch's FLOP counter stumbles over
        projected = self.prompt_proj(prompts if torch.is_grad_enabled() else prompts.detach())
        if self.training:
            projected = F.dropout(projected.expand(batch, -1, -1), self.dropout)
        out: Tensor = projected
        return out

    def prompt_context(self, batch: int) -> PromptContext:
        """Keys and values of every layer's own prompts: functions of the weights alone outside training."""

        def compute() -> PromptContext:
            prompts = (self.layer_prompts(layer) for layer in range(self.config.layers))
            blocks = self.transformer.resblocks
            return [None if p is None else b.context(self.project_prompts(p, batch)) for p, b in zip(prompts, blocks)]

        return compute() if self.training else self._prompt_cache.get(self.parameters(), compute)

    def kept_context(self) -> PromptContext | None:
        """What `forward` may be given, so that a compiled or recorded graph need not compute it; None: there is none.

        As long as the weights stay it is the same object.
        """
        return None if self.prompt_depth == 0 else self.prompt_context(1)

    def forward(self, images: Tensor, contexts: PromptContext | None = None) -> ImageFeatures:
        """Images [B, 3, H, W] -> unit global token [B, D] and patch tokens [B, N, D].

        Args:
            contexts: `kept_context()` of these weights, outside training; None: computed here.
        """
        x, grid = self.embed(images)
        x = self._shallow(x) if self.prompt_depth == 0 else self.prompt_norm(self._deep(x, contexts))
        joint = self.project(x)
        return ImageFeatures(global_token=joint[:, 0], patch_tokens=joint[:, 1:], grid_size=grid)

    def _deep(self, x: Tensor, contexts: PromptContext | None) -> Tensor:
        contexts = self.prompt_context(x.shape[0]) if contexts is None else contexts
        for block, context in zip(self.transformer.resblocks, contexts):
            x = block(x, context)
        return x

    def _shallow(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        prompts = self.project_prompts(self.prompt_embeddings, batch).expand(batch, -1, -1)
        tokens = torch.cat([x, prompts], dim=1)  # order does not matter: prompts carry no position
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            tokens = block(tokens)
        x, prompts = tokens[:, :length], tokens[:, length:]
        out: Tensor = last(x, last.context(prompts))
        return out
