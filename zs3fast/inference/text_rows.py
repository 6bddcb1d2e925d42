"""The text side of a Segmenter: class lists to embeddings, kept for the last few lists."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zs3fast.models.base import ZeroShotModel
from zs3fast.text import whole_names
from zs3fast.text.vocabulary import ClassEntry, same_name

if TYPE_CHECKING:
    from zs3fast.text import TextEncoder
    from zs3fast.text.tower import Tokenizer

logger = logging.getLogger("zs3fast")

LISTS_KEPT = 16  # class lists whose embeddings stay at hand
_shared = threading.RLock()  # held while what threads share is built; a lock inside would make a Segmenter uncopyable


class TextRows:
    """Text embeddings of class lists for a model: from rows that were given, or from a text tower.

    Args:
        model: says which tower goes with it.  templates: sentences.  names_apart: a row for each name of a class.
        tokenizer, encoder: see `Segmenter`.  rows: [C, D] for `classes`, in place of a tower.
    """

    def __init__(
        self,
        model: ZeroShotModel,
        templates: tuple[str, ...],
        names_apart: bool,
        tokenizer: Tokenizer | None,
        encoder: TextEncoder | None,
        rows: Tensor | np.ndarray | None,
        classes: list[ClassEntry] | None,
    ):
        self.model, self.templates, self.names_apart = model, templates, names_apart
        self.classes, self.tokenizer, self._encoder = classes, tokenizer, encoder
        if encoder is not None and tokenizer is not None:
            encoder.tokenizer = tokenizer
        self.rows = None if rows is None else self._named(rows)
        self.kept: dict[tuple[ClassEntry, ...], Tensor] = {}

    @property
    def encoder(self) -> TextEncoder:
        """The text tower; built when first asked for, if none was given."""
        with _shared:
            if self._encoder is None:
                self._encoder = self._own_encoder().to(next(self.model.parameters()).device)
            return self._encoder

    def _own_encoder(self) -> TextEncoder:
        from zs3fast.text import TextEncoder

        config = self.model.config
        if not self.model.weights_loaded:
            logger.warning("the model's weights are untrained, so its text tower is too: labels mean nothing")
            return TextEncoder.from_open_clip(config["clip"], None, tokenizer=self.tokenizer)
        pretrained = config.get("pretrained")
        if not isinstance(config["clip"], str) and pretrained is None:
            raise ValueError("text_encoder: expected one, since this model's CLIP has no name to find a tower by")
        # A file may not say which activation its weights want; the image tower has it from whoever knew.
        quick_gelu = None if pretrained is None else config.get("quick_gelu")
        return TextEncoder.from_open_clip(
            config["clip"], pretrained or "openai", tokenizer=self.tokenizer, quick_gelu=quick_gelu
        )

    def embeddings(self, entries: tuple[ClassEntry, ...]) -> Tensor:
        """[C, D] on the model's device; the same tensor for as long as the list is among the last few."""
        device, rows = next(self.model.parameters()).device, self.kept.get(entries)
        if rows is None or rows.device != device:
            rows = (self._encoded(entries) if self.rows is None else self._chosen(entries, self.rows)).to(device)
            with _shared:
                self.kept[entries] = rows
                while len(self.kept) > LISTS_KEPT:
                    self.kept.pop(next(iter(self.kept)))
        return rows

    def moved(self, device: str | torch.device) -> None:
        """The tower goes along with the model."""
        with _shared:
            self.kept.clear()
            if self._encoder is not None:
                self._encoder.to(device)

    def release(self) -> None:
        """Let go of the tower; embeddings at hand stay."""
        with _shared:
            self._encoder = None

    def _encoded(self, entries: tuple[ClassEntry, ...]) -> Tensor:
        token = self.model.text_token
        if not self.names_apart:
            return self.encoder.encode(entries, self.templates, text_token=token)
        names = [name for entry in entries for name in entry]
        once = list(dict.fromkeys(names))  # a name may stand for two classes: one row, twice
        rows = self.encoder.encode(whole_names(once), self.templates, text_token=token)
        return rows[[once.index(name) for name in names]]

    def _named(self, text_embeddings: Tensor | np.ndarray) -> dict[str, Tensor]:
        rows = torch.as_tensor(text_embeddings).float()
        if self.classes is None:
            raise ValueError("class_names: expected the names of the rows of text_embeddings")
        if rows.dim() != 2 or len(rows) != len(self.classes):
            raise ValueError(
                f"text_embeddings: expected [C, D] with a row for each of {len(self.classes)} class_names, "
                f"got {list(rows.shape)}"
            )
        if rows.shape[1] != self.model.embed_dim:
            raise ValueError(f"text_embeddings: expected [C, {self.model.embed_dim}], got {list(rows.shape)}")
        return {same_name(name): row for entry, row in zip(self.classes, rows, strict=True) for name in entry}

    def _chosen(self, entries: Iterable[ClassEntry], rows: dict[str, Tensor]) -> Tensor:
        missing = [entry[0] for entry in entries if same_name(entry[0]) not in rows]
        if missing:
            known = ", ".join(entry[0] for entry in (self.classes or [])[:10])
            raise ValueError(f"classes: no text_embeddings for {', '.join(missing)}; there are rows for {known}, ...")
        return torch.stack([rows[same_name(entry[0])] for entry in entries])
