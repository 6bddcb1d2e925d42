"""The light decoder: CLIPSeg's parts by hand, the head as one product, and the gates of table 1."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.goldens_data import relative
from zs3fast.heads.binary import BinaryDecoder, ChannelGate, SpatialGate


def make(head: str = "conv", **options: int) -> BinaryDecoder:
    torch.manual_seed(0)
    decoder = BinaryDecoder(48, 16, head=head, **{"decoder_width": 32, "ffn_width": 64, **options}).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():  # nothing at a value where a mistake would not show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def plain_layer(layer: torch.nn.TransformerEncoderLayer, x: Tensor, heads: int) -> Tensor:
    """Post-norm: LN(x + attention), LN(x + FFN)."""
    attn = layer.self_attn
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    x = layer.norm1(x + attn.out_proj((weights @ v).transpose(1, 2).flatten(2)))
    return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("head", ["conv", "linear"])
def test_decoder_equals_its_parts(head: str, grad: bool) -> None:
    decoder, patches, (h, w) = make(head), torch.randn(3, 15, 48), (3, 5)
    with torch.set_grad_enabled(grad):
        x = decoder.reduce(patches)
        for layer in decoder.layers:
            x = plain_layer(layer, x, 4)
        square = x.transpose(1, 2).unflatten(2, (h, w))  # [3, 32, 3, 5]
        if head == "conv":
            expected = decoder.head(square)
        else:
            expected = torch.einsum("c,nchw->nhw", decoder.head.weight[0], square).unsqueeze(1) + decoder.head.bias
        got = decoder(patches, (h, w))
    assert got.shape == ((3, 1, 48, 80) if head == "conv" else (3, 1, 3, 5))
    assert relative(got, expected) < 1e-5


def test_dropout_in_training_only() -> None:
    decoder, patches = make(), torch.randn(2, 9, 48)
    assert torch.equal(decoder(patches, (3, 3)), decoder(patches, (3, 3)))
    decoder.train()
    assert not torch.equal(decoder(patches, (3, 3)), decoder(patches, (3, 3)))


@pytest.mark.parametrize("width", [64, 128, 256])
def test_published_sizes(width: int) -> None:
    """Spec section 4: 0.63, 1.32, 2.89 million parameters."""
    decoder = BinaryDecoder(768, 16, decoder_width=width)
    count = sum(p.numel() for p in decoder.parameters())
    assert f"{count / 1e6:.2f}" == {64: "0.63", 128: "1.32", 256: "2.89"}[width]


@pytest.mark.parametrize("groups", [1, 2])
def test_gates_weigh_channels_and_patches(groups: int) -> None:
    torch.manual_seed(0)
    patches, text = torch.randn(2, 9, 32), torch.randn(5, 20)
    channel, spatial = ChannelGate(20, 32), SpatialGate(20, 32)
    for b in range(2):
        for c in range(5):
            weight = channel.mlp[2](channel.mlp[0](text[c]).relu()).sigmoid()
            got = channel(patches.unsqueeze(1), text.expand(groups, -1, -1))[b, c]
            assert weight.shape == (32,) and relative(got, patches[b] * weight) < 1e-5
            weight = (patches[b] @ (spatial.query.weight @ text[c]) / 32**0.5).sigmoid().unsqueeze(-1)
            got = spatial(patches.unsqueeze(1), text.expand(groups, -1, -1))[b, c]
            assert weight.shape == (9, 1) and relative(got, patches[b] * weight) < 1e-5
    assert channel.mlp[0].out_features == 2  # width / 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_width": 30}, "decoder_heads: expected a divisor of decoder_width 30, got 4"),
        ({"layers": 0}, "decoder_layers: expected at least 1, got 0"),
        ({"head": "bilinear"}, "head: expected one of conv, linear, got 'bilinear'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
