"""TagCLIP (arXiv 2304.07547) in its official structure, plain eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import official
from bench.baselines.zegclip import OfficialZegCLIP


class RelationshipDescriptor(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q_proj = nn.Linear(2 * width, width)


class TagCLIPHead(nn.Module):
    """ZegCLIP's head with a learned trusty token as the last class, and self-attention over the list in layer 0."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        self.disc_token = nn.Parameter(torch.empty(1, width))
        self.relationship_discriptor = RelationshipDescriptor(width)  # spelt as in the official checkpoints
        kinds = ["run"] + ["absent"] * (layers - 1)
        self.decoder = official.Decoder(
            [official.DecoderLayer(width, heads, 4 * width, dropout, self_attention=kind) for kind in kinds]
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, text: Tensor, global_token: Tensor, patch_map: Tensor) -> Tensor:
        """Mask logits [B, C + 1, h, w]; the last channel is the trusty map, sigmoid = P(unseen)."""
        text = torch.cat([text, self.disc_token], dim=0)
        queries = self.relationship_discriptor.q_proj(official.descriptor_input(text, global_token))
        return self.decoder(queries, patch_map)


class OfficialTagCLIP(OfficialZegCLIP):
    """The official network; see OfficialZegCLIP. `trusty_weighting`: "both" or "off"."""

    loss_weights = {"loss_mask": 20.0, "loss_dice": 1.0, "loss_disc": 10.0}

    def __init__(self, *, seen: Sequence[int], trusty_weighting: str = "both", **sizes):
        super().__init__(seen=seen, **sizes)
        if trusty_weighting not in ("both", "off"):
            raise ValueError(f"trusty_weighting: expected 'both' or 'off', got {trusty_weighting!r}")
        self.trusty_weighting = trusty_weighting

    def make_head(self, width: int, heads: int, layers: int, dropout: float) -> nn.Module:
        return TagCLIPHead(width, heads, layers, dropout)

    def class_scores(self, mask_logits: Tensor) -> Tensor:
        scores = self.upsample(mask_logits).sigmoid()
        unseen_probability = scores[:, -1:].clone()
        scores = official.offset_seen(scores[:, :-1], self.seen, self.seen_offset)
        if self.trusty_weighting == "both":
            seen = torch.as_tensor(self.seen, device=scores.device)
            unseen = torch.as_tensor(
                [c for c in range(scores.shape[1]) if c not in set(self.seen)], device=scores.device
            )
            scores[:, seen] = scores[:, seen] * (1 - unseen_probability)
            scores[:, unseen] = scores[:, unseen] * unseen_probability
        return scores

    def losses(self, images: Tensor, text_embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        classes = text_embeddings.shape[0]
        seen_labels = official.inductive_labels(labels, self.seen)
        logits = self.upsample(self(images, text_embeddings[self.seen]))
        class_logits, trusty_logits = logits[:, :-1], logits[:, -1:]
        accuracy = official.pixel_accuracy(class_logits, seen_labels)
        focal, dice, num_masks = official.mask_losses(class_logits, seen_labels)
        unseen = torch.zeros(256, dtype=logits.dtype, device=logits.device)
        unseen[[c for c in range(classes) if c not in set(self.seen)]] = 1
        trusty_logits = F.interpolate(trusty_logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        trusty = official.focal_loss(trusty_logits, unseen[labels.long()].unsqueeze(1), num_masks)
        parts = {"loss_mask": focal, "loss_dice": dice, "loss_disc": trusty}
        terms = {name: self.loss_weights[name] * value for name, value in parts.items()}
        return terms | {"total": sum(terms.values()), "acc_seg": accuracy}
