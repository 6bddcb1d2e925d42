"""CLIP's text tower, through open_clip: class names in, unit vectors out."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast.text.cache import cached, tensor_digest
from zs3fast.text.templates import resolve_templates
from zs3fast.text.tower import ClipTextTower, QuickGELU, Tokenizer, clip_tokenizer, is_clip_tokenizer
from zs3fast.text.vocabulary import ClassEntry, parse_classes
from zs3fast.utils.checkpoint_io import compare, sketch
from zs3fast.utils.open_clip import (
    clip_model_config,
    clip_state,
    create_open_clip,
    quiet_open_clip,
    uses_quick_gelu,
)

logger = logging.getLogger("zs3fast")
_tokenizing = threading.Lock()  # tokenizers of the hub keep settings of the call in themselves

TEXT_TOKENS = ("projected", "pre_projection")
CACHE_FORMAT = 2  # 1: a pass of one thread could disturb another's, and wrong rows were kept
_TEXT_KEYS = ("positional_embedding", "token_embedding.", "text_projection", "ln_final.", "transformer.")
_OPTIONAL_KEYS = ("attn_mask", "logit_scale", "logit_bias")  # of a whole CLIP state dict: no weights of the text tower


class TextEncoder:
    """Encodes class names with a CLIP text tower; several threads may share one.

    Args:
        tower: token ids [n, context] -> text features [n, D]; a `ClipTextTower`, open_clip's `TextTransformer`, or a
            module alike.
        tokenizer: list of n sentences -> token ids [n, context].
        name: what the weights are called, in cache keys and messages.
        cache: keep embeddings on disk, see `zs3fast.text.cache`.
        batch_size: sentences encoded at once.
    """

    def __init__(
        self, tower: nn.Module, tokenizer: Tokenizer, *, name: str = "", cache: bool = True, batch_size: int = 256
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.tower = tower.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.cache = cache
        self.batch_size = batch_size

    @classmethod
    def from_open_clip(
        cls,
        clip: str | dict[str, Any] = "ViT-B-16",
        pretrained: str | os.PathLike[str] | None = None,
        *,
        quick_gelu: bool | None = None,
        tokenizer: Tokenizer | None = None,
        cache: bool = True,
        batch_size: int = 256,
    ) -> TextEncoder:
        """The text tower of an open_clip model.

        Args:
            clip: open_clip model name, or a configuration dict (embed_dim, vision_cfg, text_cfg).
            pretrained: open_clip tag, checkpoint file or None: random weights, with a warning, and nothing is cached.
            quick_gelu: overrides the activation. None: what a tag was trained with, else the configuration's.
        Raises:
            ValueError: no such model (close names are listed), or weights that cannot be found, fetched or read.
        """
        config = clip_model_config(clip, ("vision_cfg", "text_cfg"))
        pretrained = None if pretrained is None else os.fspath(pretrained)
        name = clip if isinstance(clip, str) else "CLIP"
        if tokenizer is None:
            tokenizer = _tokenizer(clip, config)
        if pretrained is None:
            logger.warning("the text tower of %s has random weights: its embeddings mean nothing", name)
            cache = False
        options: dict[str, Any] = {"name": f"{name} {pretrained}", "cache": cache, "batch_size": batch_size}
        if quick_gelu is None:
            quick_gelu = uses_quick_gelu(clip, pretrained)
        if pretrained is not None:
            state = clip_state(clip, pretrained).text
            if state is not None:
                heads = config["text_cfg"].get("heads", 8)
                return cls.from_state_dict(state, heads=heads, quick_gelu=quick_gelu, tokenizer=tokenizer, **options)
        return cls(
            create_open_clip(clip, pretrained, quick_gelu=quick_gelu).get_submodule("text"), tokenizer, **options
        )

    @classmethod
    def from_state_dict(
        cls,
        state: dict[str, Tensor],
        *,
        heads: int | None = None,
        quick_gelu: bool = True,
        tokenizer: Tokenizer | None = None,
        name: str = "",
        cache: bool = True,
        batch_size: int = 256,
    ) -> TextEncoder:
        """A text tower from its weights, with sizes read off their shapes.

        Args:
            state: open_clip / OpenAI text keys (positional_embedding, token_embedding.weight, text_projection,
                ln_final.*, transformer.resblocks.*), alone, in a whole CLIP, or under `text_encoder.` as in official
                ZegCLIP checkpoints. Half-precision weights are promoted.
            heads: attention heads; None: width / 64, as in every OpenAI CLIP.
        Raises:
            ValueError: keys that are missing or unexpected, or have the wrong shape; all are listed.
        """
        weights = _text_weights(state)
        width = weights["ln_final.weight"].shape[0]
        heads = heads or max(width // 64, 1)
        if width % heads:
            raise ValueError(f"heads: expected a divisor of the text tower's width {width}, got {heads}")
        tower = sketch(  # on the meta device: random weights, which would take longer than all the rest, are not drawn
            partial(
                ClipTextTower,
                context_length=weights["positional_embedding"].shape[0],
                vocab_size=weights["token_embedding.weight"].shape[0],
                width=width,
                heads=heads,
                layers=len({key.split(".")[2] for key in weights if key.startswith("transformer.resblocks.")}),
                hidden=weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
                output_dim=weights["text_projection"].shape[1],
                activation=QuickGELU if quick_gelu else nn.GELU,
            ),
            weights.values(),
            "state: not a CLIP text tower",
        )
        _load_strictly(tower, weights)
        tokenizer = tokenizer or clip_tokenizer(tower.context_length)
        return cls(tower, tokenizer, name=name, cache=cache, batch_size=batch_size)

    @property
    def device(self) -> torch.device:
        return next(self.tower.parameters()).device

    def to(self, device: str | torch.device) -> TextEncoder:
        """Move the tower to a device."""
        self.tower.to(device)
        return self

    def encode(
        self,
        classes: str | Iterable[str | Sequence[str]],
        templates: str | Sequence[str] = "single",
        *,
        text_token: str = "projected",
    ) -> Tensor:
        """Text embeddings [C, D] of classes, float32, on the tower's device.

        Projected: unit rows. Each sentence of a name is encoded and normalised, a name is the normalised mean of its
        sentences, a class the normalised mean of its names (ZegCLIP's recipe; of one sentence and one name: the
        normalised feature). Before the projection: the same means, and nothing is normalised.

        Args:
            classes: as `parse_classes` takes them; order is kept.
            templates: "single", "multi", or sentences with one {} each.
            text_token: "projected", into the joint space; "pre_projection", the token at the end of the text after the
                last norm, as wide as the tower (what ClsCLIP reads).
        Raises:
            ValueError: empty or repeated classes, bad templates, a sentence too long for the tower, a tower that shows
                no token before its projection.
        """
        if text_token not in TEXT_TOKENS:
            raise ValueError(f"text_token: expected one of {', '.join(TEXT_TOKENS)}, got {text_token!r}")
        entries, templates = parse_classes(classes), resolve_templates(templates)
        sentences = [template.replace("{}", name) for entry in entries for name in entry for template in templates]
        tokens = self._tokenize(sentences)
        if not self.cache:
            return self._encode(tokens, entries, len(templates), text_token)
        key = {
            "format": CACHE_FORMAT,
            "model": self.name,
            "weights": tensor_digest(*self.tower.state_dict().values()),
            "architecture": f"{self.tower} heads={getattr(self.tower, 'heads', None)}",
            "device": self.device.type,
            "classes": entries,
            "templates": templates,
            "tokens": tensor_digest(tokens),
            "text_token": text_token,
        }
        return cached(key, lambda: self._encode(tokens, entries, len(templates), text_token)).to(self.device)

    @torch.no_grad()
    def _encode(self, tokens: Tensor, entries: list[ClassEntry], templates: int, text_token: str) -> Tensor:
        projected = text_token == "projected"
        read, scaled = (_features, _unit) if projected else (_end_tokens, _as_it_is)
        batches = tokens.to(self.device).split(self.batch_size)
        features = torch.cat([scaled(read(self.tower, batch).float()) for batch in batches])
        names = scaled(features.unflatten(0, (-1, templates)).mean(1))  # [all names, D]
        of_class = names.split([len(entry) for entry in entries])
        return torch.stack([scaled(rows.mean(0)) for rows in of_class])

    def _tokenize(self, sentences: list[str]) -> Tensor:
        with _tokenizing:
            tokens = self.tokenizer(sentences)
        # Tokenizers cut silently. CLIP's own lets us see the uncut length: words, start and end.
        encode = getattr(self.tokenizer, "encode", None) if is_clip_tokenizer(self.tokenizer) else None
        if encode is not None:
            context = tokens.shape[1]
            for sentence in sentences:
                if len(encode(sentence)) + 2 > context:
                    raise ValueError(f"classes: expected at most {context} tokens, the text tower's, got {sentence!r}")
        return tokens


def _features(tower: nn.Module, tokens: Tensor) -> Tensor:
    """`tower(tokens)`, without what lies behind the longest sentence: in a causal tower it reaches no feature."""
    if isinstance(tower, ClipTextTower) or not _pools_at_the_end(tower) or tower.attn_mask is None:
        out: Tensor = tower(tokens)
        return out
    ends, projection = _end_tokens(tower, tokens), tower.text_projection
    if projection is None:
        return ends
    out = projection(ends) if isinstance(projection, nn.Module) else ends @ projection
    return out


def _end_tokens(tower: nn.Module, tokens: Tensor) -> Tensor:
    """What `_features` projects: the tower's tokens after its last norm, at the end of each text; [n, width].

    The tower is shared, by threads too: nothing of it is changed to look inside.
    """
    if isinstance(tower, ClipTextTower):
        return tower.end_tokens(tokens)
    if not _pools_at_the_end(tower):
        raise ValueError(
            "text_token: 'pre_projection' needs a CLIP text tower that pools at the end of the text, got "
            f"{type(tower).__name__}"
        )
    theirs: Any = tower
    ends, mask = tokens.argmax(1), theirs.attn_mask
    length = tokens.shape[1] if mask is None else int(ends.max()) + 1
    dtype = theirs.transformer.get_cast_dtype()
    x = theirs.token_embedding(tokens[:, :length]).to(dtype) + theirs.positional_embedding[:length].to(dtype)
    x = theirs.ln_final(theirs.transformer(x, attn_mask=None if mask is None else mask[:length, :length]))
    out: Tensor = x[torch.arange(len(x), device=x.device), ends]
    return out


def _pools_at_the_end(tower: nn.Module) -> bool:
    """Whether it is open_clip's tower in CLIP's own form, whose feature is the token at the end of the text."""
    open_clip = sys.modules.get("open_clip.transformer")
    if open_clip is None or not isinstance(tower, open_clip.TextTransformer):
        return False
    plain = tower.cls_emb is None and tower.pool_type == "argmax"
    return plain and not tower.use_pad_mask and not tower.output_tokens


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=-1)


def _as_it_is(features: Tensor) -> Tensor:
    return features


def _tokenizer(clip: str | dict[str, Any], config: dict[str, Any]) -> Tokenizer:
    if isinstance(clip, dict):
        return clip_tokenizer(config["text_cfg"].get("context_length", 77))
    import open_clip

    try:
        with quiet_open_clip():
            out: Tokenizer = open_clip.get_tokenizer(clip)
            return out
    except Exception as error:  # tokenizers of some models come from the hub, which raises its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"clip: the tokenizer of {clip} could not be had from the hub: {reason}") from None


def _text_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "text_encoder."
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    weights = {key: value for key, value in (inside or state).items() if key.startswith(_TEXT_KEYS)}
    if inside:
        unexpected = sorted(set(inside) - set(weights) - set(_OPTIONAL_KEYS))
        if unexpected:
            raise ValueError(f"state: not a CLIP text tower: unexpected {unexpected[:10]}")
    needed = (
        "positional_embedding",
        "token_embedding.weight",
        "text_projection",
        "ln_final.weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
    )
    missing = [key for key in needed if key not in weights]
    if missing:
        raise ValueError(f"state: not a CLIP text tower: missing {', '.join(missing)}")
    flat = [key for key in needed if weights[key].dim() != (1 if key == "ln_final.weight" else 2)]
    if flat:
        shapes = ", ".join(f"{key} {list(weights[key].shape)}" for key in flat)
        raise ValueError(f"state: not a CLIP text tower: wrong rank of {shapes}")
    return {key: value.to(torch.float32, copy=True) for key, value in weights.items()}


def _load_strictly(tower: ClipTextTower, weights: dict[str, Tensor]) -> None:
    compare(tower.state_dict(), weights, "state: not a CLIP text tower")
    tower.load_state_dict(weights, assign=True)
    tower.attn_mask = tower.build_causal_mask()
