"""CLIP ViT led by a text token: in some layers it takes the place of the class token (ClsCLIP eq. 5 to 7).

    i navigated:  [I_{i+1}, E_{i+1}] = Layer_i([L^i(T_c), E_i])         else:  Layer_i([I_i, E_i])

Up to the first navigated layer f nothing depends on the class: `prefix` runs once an image, `suffix` once an (image,
class) pair. The two differ in one key where they meet. With out_j and lse_j what layer f's patches get from each other,
and how much score stands behind it, the pair's attention is exact without computing it again:

    a_jc = sigmoid(q_j . k_c / sqrt(dh) - lse_j),   attended_jc = (1 - a_jc) out_j + a_jc v_c

so LN, the query, key and value products and all patch-patch attention of layer f are the image's too. Where a layer's
class output is replaced or thrown away, the class token is a key and a value and nothing more.

ViT-B/16 at 352 x 352, GMAC: prefix 7.9, suffix 37.9 a class, of which the merge takes 1.2. C classes cost at least
9.1 + 36.7 C where the plain form costs 45.8 C: 1.23x at C = 20, 1.25x in the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zs3fast.encoders.clip_vit import Block, ClipViT
from zs3fast.encoders.config import ClipVisionConfig
from zs3fast.ops.fused_linear import linear
from zs3fast.utils.weight_cache import WeightCache

INIT_STD = 0.02
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImagePrefix:
    """What of G images no class has touched yet; f is the first navigated layer, the depth of the tower without one.

    class_token: [G, 1, width] I_f.
    patches:     [G, N, width] E_f.
    grid_size:   (h, w) with h * w = N.
    queries:     [G, N, heads, dh] of layer f; None where its attention is not shared.
    attended:    [G, N, heads, dh] layer f's attention of the patches among themselves (and the prompts).
    lse:         [G, N, heads] its log-sum-exp, float32 (float64 for float64 weights).
    """

    class_token: Tensor
    patches: Tensor
    grid_size: tuple[int, int]
    queries: Tensor | None = None
    attended: Tensor | None = None
    lse: Tensor | None = None

    def __getitem__(self, images: Tensor | slice) -> ImagePrefix:
        """The images of an index tensor or a slice."""
        names = ("class_token", "patches", "queries", "attended", "lse")
        parts: dict[str, Any] = {name: getattr(self, name) for name in names}
        chosen: dict[str, Any] = {name: None if part is None else part[images] for name, part in parts.items()}
        return replace(self, **chosen)


@dataclass(frozen=True)
class ClassTokens:
    """What of C classes no image has touched yet, by navigated layer.

    count:       C.
    tokens:      [C, width] L^i(T) of the layers whose class output lives on.
    keys_values: both [C, heads, dh], those of L^i(T), of the layers where it does not.
    """

    count: int
    tokens: dict[int, Tensor]
    keys_values: dict[int, KeysValues]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, classes: Tensor | slice) -> ClassTokens:
        """The classes of an index tensor or a slice."""
        count = len(range(self.count)[classes]) if isinstance(classes, slice) else classes.shape[0]
        kept = {i: (k[classes], v[classes]) for i, (k, v) in self.keys_values.items()}
        return ClassTokens(count, {i: token[classes] for i, token in self.tokens.items()}, kept)


class NavigatedClipViT(ClipViT):
    """Frozen CLIP ViT whose class token is replaced by one of the class asked for, in some layers.

    The replacing token has no position and skips `ln_pre`. The position table stays at CLIP's own grid and is resized
    bicubically to that of the images.

    Args:
        config: sizes of the tower.
        nav_layers: the layers whose class token is replaced, any set; () is plain CLIP.
        num_prompts: learnable tokens in every layer on top (visual prompt tuning, the paper's table 2); 0: none. They
            alone train.
    """

    position_resize = ("bicubic", False, 0.0)

    def __init__(self, config: ClipVisionConfig, *, nav_layers: Sequence[int] = (2, 3, 4), num_prompts: int = 0):
        super().__init__(config, config.grid * config.patch_size, double_class_embedding=False)
        self.requires_grad_(False)
        self.nav_layers = check_layers(nav_layers, config.layers)
        if num_prompts < 0:
            raise ValueError(f"num_prompts: expected at least 0, got {num_prompts}")
        prompts = INIT_STD * torch.randn(config.layers, num_prompts, config.width)
        self.prompt_embeddings = nn.Parameter(prompts) if num_prompts else None
        self.prompts = num_prompts
        self._prompt_cache = WeightCache()

    @property
    def first(self) -> int:
        """f, the first navigated layer; the number of layers if there is none."""
        return self.nav_layers[0] if self.nav_layers else self.config.layers

    def class_output_lives(self, layer: int) -> bool:
        """Whether anything reads a layer's class output: not where it is replaced, nor after the last layer."""
        return layer + 1 < self.config.layers and layer + 1 not in self.nav_layers

    @property
    def shares_first(self) -> bool:
        """Whether layer f's attention is shared: its class token is a key and a value only."""
        return bool(self.nav_layers) and not self.class_output_lives(self.first)

    def prefix(self, images: Tensor) -> ImagePrefix:
        """Images [G, 3, H, W], normalised, up to layer f; without a graph unless there are prompts to train."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.prompt_embeddings is not None):
            x, grid = self.embed(images)
            prompts = self._prompts()
            for i in range(self.first):
                x = self.transformer.resblocks[i](x, prompts[i])
            shared = ImagePrefix(x[:, :1], x[:, 1:], grid)
            if not self.shares_first:
                return shared
            block = self.transformer.resblocks[self.first]
            return _among_themselves(block, shared, prompts[self.first])

    def class_tokens(self, tokens: dict[int, Tensor]) -> ClassTokens:
        """The replacing tokens [C, width] of each navigated layer, L^i(T), in the form `suffix` takes them."""
        if tuple(sorted(tokens)) != self.nav_layers:
            raise ValueError(f"tokens: expected those of layers {list(self.nav_layers)}, got {sorted(tokens)}")
        alive, keys_values = {}, {}
        for i, token in tokens.items():
            if self.class_output_lives(i):
                alive[i] = token
            else:
                k, v = self.transformer.resblocks[i].context(token.unsqueeze(1))
                keys_values[i] = k.squeeze(1), v.squeeze(1)
        return ClassTokens(next(iter(tokens.values())).shape[0], alive, keys_values)

    def suffix(self, prefix: ImagePrefix, classes: ClassTokens, *, pairwise: bool = False) -> Tensor:
        """From layer f to the last block; no `ln_post`, as that is for the class token.

        Args:
            prefix: of G images.  classes: C of them.
            pairwise: image i meets class i alone (G = C); else every image meets every class.
        Returns:
            Patch tokens [P, N, width], P = G, or P = G * C, image-major.
        """
        groups, each = prefix.patches.shape[0], 1 if pairwise else classes.count

        def spread(of_class: Tensor) -> Tensor:  # [C, ...] -> [P, 1, ...]
            wide = of_class if pairwise else of_class.expand(groups, *of_class.shape).flatten(0, 1)
            return wide.unsqueeze(1)

        start, prompts = self.first, self._prompts()
        if self.shares_first:
            k, v = (t.unsqueeze(1 if pairwise else 0) for t in classes.keys_values[start])
            x = self._merge_class(prefix, k, v)
            start += 1
        else:
            x = prefix.patches.unsqueeze(1).expand(-1, each, -1, -1).flatten(0, 1)
        for i in range(start, self.config.layers):
            block, context = self.transformer.resblocks[i], prompts[i]
            if i in classes.tokens:
                x = torch.cat([spread(classes.tokens[i]), x], dim=1)
            elif i in classes.keys_values:
                k, v = classes.keys_values[i]
                context = _join(context, (spread(k), spread(v)))
            elif not self.class_output_lives(i):
                context, x = _join(context, block.context(x[:, :1])), x[:, 1:]
            x = block(x, context)
        return x

    @torch.no_grad()
    def class_attention(self, image: Tensor, tokens: dict[int, Tensor] | None = None) -> Tensor:
        """What the class token of every layer attends to: its share on each patch, mean over heads, [layers, C, N].

        Each class takes its own way through the whole tower: for looking at, not for speed.

        Args:
            image: [1, 3, H, W], normalised.
            tokens: [C, width] of each navigated layer, as for `class_tokens`. None: CLIP's own class token, C = 1.
        """
        x, (h, w) = self.embed(image)
        if tokens is not None:
            x = x.expand(next(iter(tokens.values())).shape[0], -1, -1)
        shares = []
        for i, (block, prompts) in enumerate(zip(self.transformer.resblocks, self._prompts(), strict=True)):
            if tokens is not None and i in tokens:
                x = torch.cat([tokens[i].unsqueeze(1), x[:, 1:]], 1)
            normed = block.ln_1(x)
            q, own = block.attn.queries(normed[:, :1]), block.attn.context_keys_values(normed)
            k = _join(prompts, own)[0].permute(0, 2, 3, 1)  # [C, heads, dh, tokens]
            scores = (q @ k).float() * q.shape[-1] ** -0.5
            shares.append(scores.softmax(-1).mean(1)[:, 0, -h * w :])
            x = block(x, prompts)
        return torch.stack(shares)

    def _merge_class(self, prefix: ImagePrefix, k: Tensor, v: Tensor) -> Tensor:
        """Layer f of all pairs: the shared attention of the patches with one key and value, [1 or G, C, heads, dh].

        The dead class token of the pair is no query and has no MLP. Returns patches [G * C, N, width].
        """
        block = self.transformer.resblocks[self.first]
        assert prefix.queries is not None and prefix.attended is not None and prefix.lse is not None
        scores = torch.einsum("gnhd,gchd->gcnh", prefix.queries, k).to(prefix.lse.dtype) * k.shape[-1] ** -0.5
        share = torch.sigmoid(scores - prefix.lse.unsqueeze(1)).to(v.dtype)  # [G, C, N, heads]
        attended = torch.lerp(prefix.attended.unsqueeze(1), v.unsqueeze(2), share.unsqueeze(-1))
        x = prefix.patches.unsqueeze(1) + linear(block.attn.out_proj, attended.flatten(-2))
        x = x.flatten(0, 1)
        out: Tensor = block.mlp(block.ln_2(x), residual=x)
        return out

    def _prompts(self) -> list[KeysValues | None]:
        """Keys and values [1, K, heads, dh] of every layer's own prompts, or None for each."""
        blocks, prompts = self.transformer.resblocks, self.prompt_embeddings
        if prompts is None:
            return [None] * len(blocks)

        def compute() -> list[KeysValues]:
            return [block.context(p.unsqueeze(0)) for block, p in zip(blocks, prompts)]

        out: list[KeysValues | None] = self._prompt_cache.get(self.parameters(), compute)
        return out


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention and what it leaves out: the log-sum-exp of its scores.

        lse_j = log sum_m exp(q_j . k_m / sqrt(dh)),   out_j = sum_m exp(q_j . k_m / sqrt(dh) - lse_j) v_m

    The scores are stored: it runs once an image, and no public attention of torch returns lse on every device.

    Args:
        q: [..., n, dh].  k, v: [..., m, dh] with m >= 1.
    Returns:
        out [..., n, dh], lse [..., n] in float32 or wider.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse


def _among_themselves(block: Block, prefix: ImagePrefix, prompts: KeysValues | None) -> ImagePrefix:
    """The prefix with the shared half of a block's attention: `queries`, `attended` and `lse`."""
    attn = block.attn
    qkv = attn.in_proj(block.ln_1(prefix.patches))
    q, k, v = qkv.unflatten(-1, (3, attn.heads, -1)).unbind(2)  # [G, N, heads, dh]
    k, v = _join(prompts, (k, v))
    attended, lse = attention_with_lse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return replace(prefix, queries=q, attended=attended.transpose(1, 2), lse=lse.transpose(1, 2))


def _join(first: KeysValues | None, second: KeysValues) -> KeysValues:
    """Keys and values [P, n, heads, dh] of both; those of the first may have one row for all."""
    if first is None:
        return second
    k, v = (torch.cat([a.expand(b.shape[0], -1, -1, -1), b], dim=1) for a, b in zip(first, second))
    return k, v


def check_layers(nav_layers: Sequence[int], layers: int) -> tuple[int, ...]:
    """Navigated layers in order, or an error that names them."""
    indices = [int(i) for i in nav_layers]
    if len(set(indices)) != len(indices) or any(not 0 <= i < layers for i in indices):
        raise ValueError(f"nav_layers: expected different layers in 0..{layers - 1}, got {indices}")
    return tuple(sorted(indices))
