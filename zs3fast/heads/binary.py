"""One binary mask an (image, class) pair: a light decoder of patch tokens (ClsCLIP section 3.3, after CLIPSeg's).

    logits = head(T_K(... T_1(W_r E))),   T: post-norm transformer layer, 4 heads, ReLU

No text, class token or position enters here. The head is a transposed convolution whose stride is its kernel and the
patch: patches do not overlap in its output, so it is one product and a reordering of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from zs3fast.heads.self_attention import TransformerLayer

HEADS = ("conv", "linear")
GATE_REDUCTION = 16


class BinaryDecoder(nn.Module):
    """Patch tokens [P, N, width] -> mask logits [P, 1, h', w'].

    Args:
        width: of the patch tokens.  patch_size: their side in pixels.
        decoder_width: after the reduction.  layers, heads, ffn_width: of the transformer layers.
        head: "conv": logits a pixel, (h', w') = (h, w) * patch_size; "linear": logits a patch, (h', w') = (h, w).
        dropout: see the attribute.
    """

    def __init__(
        self,
        width: int,
        patch_size: int,
        *,
        decoder_width: int = 64,
        layers: int = 2,
        heads: int = 4,
        ffn_width: int = 2048,
        head: str = "conv",
        dropout: float = 0.1,
    ):
        super().__init__()
        if decoder_width < 1 or decoder_width % heads:
            raise ValueError(f"decoder_heads: expected a divisor of decoder_width {decoder_width}, got {heads}")
        if layers < 1:
            raise ValueError(f"decoder_layers: expected at least 1, got {layers}")
        if head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {head!r}")
        self.reduce = nn.Linear(width, decoder_width)
        stack = nn.ModuleList(TransformerLayer(decoder_width, heads, ffn_width, dropout) for _ in range(layers))
        self.layers = cast(Sequence[TransformerLayer], stack)  # as a list it knows the type of its items
        conv = head == "conv"
        self.head = (
            nn.ConvTranspose2d(decoder_width, 1, patch_size, patch_size) if conv else nn.Linear(decoder_width, 1)
        )

    @property
    def dropout(self) -> float:
        """Of attention probabilities, attention output, hidden layer and FFN output of every layer, in training."""
        return self.layers[0].dropout

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        for layer in self.layers:
            layer.dropout = dropout

    def forward(self, patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
        x = self.reduce(patches)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self._masks(x).unflatten(1, grid_size).transpose(2, 3).flatten(3, 4).flatten(1, 2).unsqueeze(1)
        return out

    def _masks(self, x: Tensor) -> Tensor:
        """The head of every patch: logits [P, N, side, side] on its pixels, side 1 for the linear head."""
        if isinstance(self.head, nn.Linear):
            linear: Tensor = self.head(x)
            return linear.unsqueeze(-1)
        weight, bias = self.head.weight, self.head.bias  # [decoder_width, 1, side, side] and [1]
        assert bias is not None
        out: Tensor = (x @ weight.flatten(1) + bias).unflatten(-1, weight.shape[2:])
        return out


class ChannelGate(nn.Module):
    """E sigmoid(MLP(T)): the text weighs channels (ClsCLIP table 1); the exact form is ours.

    patches [G, 1, N, width], text [1 or G, C, text_width] -> [G, C, N, width].
    """

    def __init__(self, text_width: int, width: int):
        super().__init__()
        hidden = max(width // GATE_REDUCTION, 1)
        self.mlp = nn.Sequential(nn.Linear(text_width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, patches: Tensor, text: Tensor) -> Tensor:
        return patches * torch.sigmoid(self.mlp(text)).unsqueeze(-2)


class SpatialGate(nn.Module):
    """E sigmoid(E . W T / sqrt(width)): the text weighs patches (ClsCLIP table 1); the exact form is ours.

    patches [G, 1, N, width], text [1 or G, C, text_width] -> [G, C, N, width].
    """

    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.query = nn.Linear(text_width, width, bias=False)

    def forward(self, patches: Tensor, text: Tensor) -> Tensor:
        query = self.query(text) * patches.shape[-1] ** -0.5
        return patches * torch.sigmoid(patches @ query.unsqueeze(-1))
