"""Masks as bits: 32 patches an int32, patch n in bit n % 32 of word n // 32, the bits behind the last patch 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def num_words(patches: int) -> int:
    """int32 words that hold one bit a patch."""
    return (patches + 31) // 32


def pack_bits(masks: Tensor) -> Tensor:
    """Bool [..., N] -> int32 [..., ceil(N / 32)], little-endian: the inverse of `unpack_bits`."""
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        raise TypeError(
            f"pack_bits: masks: expected a bool tensor, got {getattr(masks, 'dtype', type(masks).__name__)}"
        )
    if masks.ndim < 1:
        raise ValueError("pack_bits: masks: expected [..., N], got a tensor without dimensions")
    N = masks.shape[-1]
    words = num_words(N)
    bits = F.pad(masks, (0, 32 * words - N)).unflatten(-1, (words, 32)).long()
    out: Tensor = (bits * _places(masks.device)).sum(-1).to(torch.int32)
    return out


def unpack_bits(bits: Tensor, N: int) -> Tensor:
    """The masks that int32 words hold, as bool.

    Args:
        bits: [..., ceil(N / 32)] int32, patch n in bit n % 32 of word n // 32, as `masks_to_bits` gives them. Bits
              behind patch N - 1 are ignored.
        N:    patches.
    Returns:
        [..., N] bool.
    """
    if not isinstance(bits, Tensor) or bits.dtype != torch.int32:
        raise TypeError(
            f"unpack_bits: bits: expected an int32 tensor, got {getattr(bits, 'dtype', type(bits).__name__)}"
        )
    if bits.ndim < 1 or bits.shape[-1] != num_words(N):
        raise ValueError(f"unpack_bits: bits: expected [..., {num_words(N)}] for N = {N}, got shape {list(bits.shape)}")
    # not by quotients: ONNX takes those of negative words, which have bit 31, in float32
    found = bits.unsqueeze(-1) & _places(bits.device).to(torch.int32)
    return (found != 0).flatten(-2)[..., :N]


def _places(device: torch.device) -> Tensor:
    """What the 32 bits of an int32 count, the last one negative: to be summed up, which every runtime can."""
    place = torch.arange(32, device=device)
    powers = torch.pow(2.0, place.double()).long()  # AOTInductor's powers of integers are others
    return torch.where(place == 31, -1, 1) * powers
