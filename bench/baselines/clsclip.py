"""ClsCLIP in plain PyTorch, as its equations read: one whole forward pass an (image, class) pair.

There is no official code. Written from the paper's equations 5 to 8 and the defaults chosen for what it leaves open, on
torch's own modules: nothing is shared between classes, the class token is replaced by copying the sequence, and its row
goes through every layer. Attention is nn.MultiheadAttention without weights, which runs on fused attention, so the
structure is as fast as plain PyTorch gets. Parameter names are those of zs3fast's model: its weights load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class PlainBlock(nn.Module):
    """Pre-norm transformer block of CLIP's image tower."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class PlainTower(nn.Module):
    def __init__(self, patch_size: int, width: int, layers: int, heads: int, grid: int, embed_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.grid = grid

    def stem(self, image: Tensor) -> Tensor:
        """[1, 3, H, W] -> [1, 1 + N, width] after `ln_pre`."""
        patches = self.conv1(image)
        size = patches.shape[2:]
        table = self.positional_embedding[1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=size, mode="bicubic", align_corners=False)
        x = (patches + table).flatten(2).transpose(1, 2)
        first = (self.class_embedding + self.positional_embedding[0]).expand(len(x), 1, -1)
        return self.ln_pre(torch.cat([first, x], dim=1))


class PlainDecoder(nn.Module):
    def __init__(self, width: int, patch_size: int, decoder_width: int, layers: int, heads: int, ffn: int):
        super().__init__()
        self.reduce = nn.Linear(width, decoder_width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(decoder_width, heads, ffn, batch_first=True) for _ in range(layers)
        )
        self.head = nn.ConvTranspose2d(decoder_width, 1, patch_size, patch_size)

    def forward(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.reduce(patches)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.transpose(1, 2).unflatten(2, size))


class PlainClsCLIP(nn.Module):
    """Image and text tokens in, one pass a pair.

    Args:
        grid: side of CLIP's own position table (14 for ViT-B/16 at 224).  nav_layers: whose class token is replaced.
    """

    def __init__(
        self,
        *,
        nav_layers: Sequence[int] = (2, 3, 4),
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        grid: int = 14,
        embed_dim: int = 512,
        text_width: int = 512,
        decoder_width: int = 64,
        decoder_layers: int = 2,
        decoder_heads: int = 4,
        decoder_ffn: int = 2048,
    ):
        super().__init__()
        self.encoder = PlainTower(patch_size, width, layers, heads, grid, embed_dim)
        self.navigation = nn.ModuleDict({str(i): nn.Linear(text_width, width) for i in nav_layers})
        self.decoder = PlainDecoder(width, patch_size, decoder_width, decoder_layers, decoder_heads, decoder_ffn)

    def pair(self, image: Tensor, text: Tensor) -> Tensor:
        """Mask logits [1, 1, H, W] of one image [1, 3, H, W] and one text token [D]."""
        x = self.encoder.stem(image)
        for i, block in enumerate(self.encoder.transformer.resblocks):
            if str(i) in self.navigation:
                x = torch.cat([self.navigation[str(i)](text).view(1, 1, -1), x[:, 1:]], dim=1)
            x = block(x)
        patch = self.encoder.conv1.kernel_size[0]
        return self.decoder(x[:, 1:], (image.shape[2] // patch, image.shape[3] // patch))

    def forward(self, images: Tensor, text_embeddings: Tensor) -> Tensor:
        """[B, 3, H, W] and [C, D] -> mask logits [B, C, H, W], pair by pair."""
        rows = [torch.cat([self.pair(image, text) for text in text_embeddings], dim=1) for image in images.split(1)]
        return torch.cat(rows)

    def class_scores(self, logits: Tensor) -> Tensor:
        """[B, C, H, W] of mask logits in pixels of the images."""
        return logits.sigmoid()

    def predict_labels(self, images: Tensor, text_embeddings: Tensor) -> Tensor:
        """Labels [B, H, W]."""
        return self.class_scores(self(images, text_embeddings)).argmax(1)
