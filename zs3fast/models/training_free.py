"""The methods that change CLIP's last block alone, by their own names: MaskCLIP with another attention."""

from __future__ import annotations

from typing import ClassVar

from zs3fast.models.maskclip import MaskCLIP
from zs3fast.models.registry import register_model


class Named(MaskCLIP):
    """MaskCLIP with a method's own attention, segmenting by its published protocol unless told otherwise.

    `image_size` is not used then: the protocol has its own sizes. Everything else, and its arguments, are there.
    """

    attention: ClassVar[str]

    @classmethod
    def check_attention(cls, attention: str | None) -> str:
        """The method's own attention, and no other."""
        if attention not in (None, cls.attention):
            raise ValueError(
                f"attention: expected {cls.attention!r} for {cls.method}, got {attention!r}; method maskclip takes any"
            )
        return cls.attention


@register_model("sclip")
class SCLIP(Named):
    """SCLIP (ECCV 2024): patches attend to like queries and to like keys."""

    attention = published_windows = "sclip"


@register_model("clearclip")
class ClearCLIP(Named):
    """ClearCLIP (ECCV 2024): patches attend to like queries; no residual connection, no MLP."""

    attention = published_windows = "clearclip"


@register_model("naclip")
class NACLIP(Named):
    """NACLIP (WACV 2025): patches attend to like keys, the nearer the more."""

    attention = published_windows = "naclip"


@register_model("rcs")
class RCS(Named):
    """The cross-correlation of ResCLIP (CVPR 2025): NACLIP's attention with that of earlier blocks."""

    attention = published_windows = "rcs"


@register_model("scclip")
class SCCLIP(Named):
    """SC-CLIP (2024): anomalous patches repaired, like patches made alike, earlier blocks taken in."""

    attention = published_windows = "scclip"
