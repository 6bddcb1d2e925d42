"""CLIP-RC: regions, alignment, two-way decoder and recovery, each exact saving against its plain form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zs3fast
import zs3fast.weights
from tests.goldens_data import relative
from tests.tiny import CLIP, NUM_CLASSES, SEEN, tiny_inputs, tiny_labels, tiny_model
from zs3fast.encoders.clip_vit import quick_gelu
from zs3fast.heads.recovery import descriptor_l1, descriptors, recovery_loss
from zs3fast.heads.two_way import region_mean_masks
from zs3fast.models.clip_rc import ALIGNMENTS
from zs3fast.types import ImageFeatures


def plain_encode(encoder: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spec section 3: [G, P, I, R] as ordinary rows under one dense mask, prompts overwritten in every layer."""
    x, (h, w) = encoder.embed(images)
    batch, patches, prompts = len(images), h * w, encoder.prompt_embeddings.shape[1]
    rows, columns = encoder.regions
    first = 1 + prompts
    allowed = torch.zeros([first + patches + rows * columns] * 2, dtype=torch.bool)
    allowed[: first + patches, : first + patches] = True
    for m in range(rows * columns):
        token = first + patches + m
        allowed[token, token] = True
        for y in range(h):
            for z in range(w):
                inside = (y // (h // rows), z // (w // columns)) == (m // columns, m % columns)
                allowed[token, first + y * w + z] = allowed[first + y * w + z, token] = inside
    regions = encoder.ln_pre(encoder.region_level_bridge).expand(batch, -1, -1)
    tokens = torch.cat([x[:, :1], torch.zeros(batch, prompts, x.shape[-1]), x[:, 1:], regions], 1)
    for layer, block in enumerate(encoder.transformer.resblocks):
        own = encoder.prompt_embeddings if layer == 0 else encoder.deep_prompt_embeddings[layer - 1 : layer]
        own = encoder.prompt_proj(own).expand(batch, -1, -1)
        tokens = torch.cat([tokens[:, :1], own, tokens[:, first:]], 1)
        attn, y = block.attn, block.ln_1(tokens)
        q, k, v = F.linear(y, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
        tokens = tokens + attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp.c_proj(quick_gelu(block.mlp.c_fc(block.ln_2(tokens))))
    regions = tokens[:, first + patches :]
    tokens = torch.cat([encoder.prompt_norm(tokens[:, : first + patches]), regions], 1)
    tokens = encoder.ln_post(tokens) @ encoder.proj
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    return tokens[:, 0], tokens[:, first : first + patches], tokens[:, first + patches :]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("regions", "size"), [(1, (64, 64)), (4, (64, 64)), (16, (64, 64)), (9, (64, 80)), ((1, 3), (64, 112))]
)
def test_encoder_equals_the_dense_mask_form(regions: object, size: tuple[int, int], grad: bool) -> None:
    """Regions that do not divide the grid leave a margin; every number of them down to one a patch."""
    encoder = tiny_model("clip_rc", regions=regions).encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, _ = tiny_inputs(size=size)
    with torch.set_grad_enabled(grad):
        expected = plain_encode(encoder, images)
        got = encoder(images)
    for name, plain in zip(("global_token", "patch_tokens", "region_tokens"), expected):
        assert relative(getattr(got, name), plain) < 1e-5, name


def test_region_tokens_start_one_class_embedding_short_and_frozen() -> None:
    encoder = tiny_model("clip_rc").encoder
    row = encoder.class_embedding + encoder.positional_embedding[0]
    assert torch.equal(encoder.region_level_bridge, row.expand(4, -1)) and not encoder.region_level_bridge.requires_grad
    updated = tiny_model("clip_rc", update_regions=True)
    assert updated.encoder.region_level_bridge.requires_grad


def test_output_contract() -> None:
    model = tiny_model("clip_rc")
    images, text = tiny_inputs()
    out = model(images, text)
    assert out.mask_logits.shape == (2, NUM_CLASSES, 4, 4) and out.region_tokens.shape == (2, 4, 32)
    assert out.recovery_losses is None and model.train()(images, text).recovery_losses.shape == (2,)


@pytest.mark.parametrize("alignment", list(ALIGNMENTS))
def test_split_lateral_projection_equals_the_concatenation(alignment: str) -> None:
    module = tiny_model("clip_rc", alignment=alignment).alignment
    features = ImageFeatures(torch.randn(2, 32), torch.randn(2, 30, 32), (5, 6), torch.randn(2, 4, 32))
    square = features.region_tokens.transpose(1, 2).reshape(2, 32, 2, 2)
    up = F.interpolate(square, size=(5, 6), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    parts = {
        "region": up,
        "global": features.global_token.unsqueeze(1).expand(-1, 30, -1),
        "patch": features.patch_tokens,
    }
    used = [parts[part] for part in ("region", "global", "patch") if part in (*ALIGNMENTS[alignment], "patch")]
    expected = F.linear(torch.cat(used, -1), module.lateral_proj.weight, module.lateral_proj.bias)
    assert module.lateral_proj.in_features == 32 * len(used)
    assert relative(module(features, (2, 2)), expected) < 1e-5


def test_queries_are_region_major_product_first() -> None:
    model = tiny_model("clip_rc")
    images, text = tiny_inputs()
    features = model.encoder(images)
    visual = features.region_tokens + features.global_token.unsqueeze(1)
    pairs = [torch.cat([text * visual[:, m : m + 1], text.expand(2, -1, -1)], -1) for m in range(4)]
    expected = model.descriptor.q_proj(torch.cat(pairs, 1))
    with torch.no_grad():
        for _ in range(2):  # the second time from the cached text half
            assert relative(model.descriptor(text, visual).flatten(1, 2), expected) < 1e-5


def test_mean_first_masks_equal_the_mean_of_all_masks() -> None:
    queries, features = torch.randn(2, 4 * 7, 32), torch.randn(2, 16, 32)
    every = queries @ features.transpose(1, 2)  # [B, M * C, N]
    assert relative(region_mean_masks(queries, features, 4), every.unflatten(1, (4, 7)).mean(1)) < 1e-5


@pytest.mark.parametrize("chunk", [1, 5, 28, None])
def test_chunks_of_queries_change_nothing(chunk: int | None) -> None:
    model = tiny_model("clip_rc")
    images, text = tiny_inputs()
    plain = model(images, text).mask_logits
    model.decoder.query_chunk = chunk
    with torch.no_grad():
        assert relative(model(images, text).mask_logits, plain) < 1e-5


def test_rebuilt_descriptor_loss_equals_the_stored_one() -> None:
    text, visual = torch.randn(7, 8), torch.randn(2, 4, 8)
    recovered = torch.randn(2, 28, 16, requires_grad=True)
    pairs = [torch.cat([text * visual[:, m : m + 1], text.expand(2, -1, -1)], -1) for m in range(4)]
    expected = (recovered - torch.cat(pairs, 1)).abs().mean()
    (wanted,) = torch.autograd.grad(3 * expected, recovered)
    loss = descriptor_l1(recovered, text, visual)
    (got,) = torch.autograd.grad(3 * loss, recovered)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"query_regions": False, "alignment": "none", "recovery_layers": None},  # table 5: region tokens alone
        {"recovery_layers": None},
        {"recovery_layers": 0},
        {"recovery_layers": 0, "recovery_loss": "kd"},
        {"recovery_loss": "l2"},
        {"recovery_loss": "kd"},
        {"recovery_layers": 3},
        {"alignment": "global"},
        {"alignment": "region"},
        {"regions": 1},
        {"regions": 16},
        {"regions": (2, 1)},
        {"init": "intent"},
        {"update_regions": True},
    ],
    ids=str,
)
def test_every_switch_trains_and_rebuilds(options: dict[str, object]) -> None:
    model = tiny_model("clip_rc", **options).train()
    images, text = tiny_inputs()
    losses = model.loss(model(images, text[SEEN]), tiny_labels())
    recovers = options.get("recovery_layers", 1) is not None
    assert set(losses) == {"loss_mask", "loss_dice", "loss"} | (
        {"loss_recovery_q", "loss_recovery_k"} if recovers else set()
    )
    losses["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    again = zs3fast.create_model(**model.config)
    again.load_state_dict(model.state_dict())


def test_recovery_losses_of_table_8() -> None:
    got, wanted = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    kl = (wanted.softmax(-1) * (wanted.log_softmax(-1) - got.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(recovery_loss("kd", got, wanted), kl)
    torch.testing.assert_close(recovery_loss("l1", got, wanted), (got - wanted).abs().mean())
    torch.testing.assert_close(recovery_loss("l2", got, wanted), ((got - wanted) ** 2).mean())
    text, visual = torch.randn(3, 4), torch.randn(2, 5, 4)
    recovered = torch.randn(2, 15, 8)
    direct = recovery_loss("l1", recovered, descriptors(text, visual))
    torch.testing.assert_close(direct, descriptor_l1(recovered, text, visual))


def test_no_recovery_layer_leaves_no_parameter() -> None:
    model = tiny_model("clip_rc", recovery_layers=0)
    assert not [name for name, _ in model.named_parameters() if "recovery" in name]
    images, text = tiny_inputs()
    losses = model.train()(images, text).recovery_losses
    assert losses.shape == (2,) and (losses > 0).all() and losses.requires_grad


def test_no_gradient_reaches_the_recovery_targets() -> None:
    """With the decoder cut off, the recovery loss leaves the prompts alone."""
    model = tiny_model("clip_rc").train()
    images, text = tiny_inputs()
    for parameter in (*model.descriptor.parameters(), *model.alignment.parameters()):
        torch.nn.init.zeros_(parameter)
    model(images, text).recovery_losses.sum().backward()
    assert model.encoder.prompt_embeddings.grad is None or model.encoder.prompt_embeddings.grad.abs().max() == 0


def test_official_initialisation_starts_layers_as_copies_and_intent_does_not() -> None:
    first, second = (layer.state_dict() for layer in tiny_model("clip_rc").decoder.decoder_q.layers[:2])
    assert all(torch.equal(first[name], second[name]) for name in first)
    intent = tiny_model("clip_rc", init="intent").decoder.decoder_v.layers
    assert all((layer.linear2.weight == 0).all() and layer.linear1.weight.std() < 0.03 for layer in intent)


def test_output_gain_squared_scales_the_first_logits_and_nothing_else() -> None:
    """The last norms' biases start at 0, so both factors of the masks are proportional to the gain."""
    published, small = (tiny_model("clip_rc", init="intent", output_gain=gain)(*tiny_inputs()) for gain in (1.0, 0.25))
    torch.testing.assert_close(small.mask_logits, published.mask_logits / 16)
    torch.testing.assert_close(small.patch_tokens, published.patch_tokens)


def test_published_size_has_the_published_trainable_weights() -> None:
    """Spec section 11: 36.94M trainable, 8.41M of them in modules the forward pass never uses, which are not built."""
    model = zs3fast.create_model("clip_rc", clip="ViT-B-16", num_prompts=10, seen=range(15), num_classes=20)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == pytest.approx(36.94e6 - 8.41e6, abs=2e4)


def test_checkpoint_of_another_number_of_regions_can_be_repeated() -> None:
    """The rows of an official region_level_bridge are equal, so a checkpoint runs with any other M, and back again."""
    few, many, again = (tiny_model("clip_rc", regions=regions).eval() for regions in (4, 16, 4))
    bridge = "encoder.region_level_bridge"
    with torch.no_grad():
        again.encoder.region_level_bridge.zero_()
        for source, target, regions in ((few, many, 16), (many, again, 4)):
            state = source.state_dict()
            target.load_state_dict({**state, bridge: state[bridge][:1].expand(regions, -1)})
        first, other, second = (model(*tiny_inputs()) for model in (few, many, again))
    assert torch.equal(first.mask_logits, second.mask_logits)
    assert other.region_tokens.shape[1] == 16 and not torch.allclose(first.mask_logits, other.mask_logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": 20}, r"regions: expected a square number of region tokens, or \(rh, rw\), got 20"),
        ({"regions": 0}, "regions: expected a square number"),
        ({"regions": (0, 2)}, "regions: expected .* at least 1"),
        ({"regions": 25}, "regions: 5 x 5 regions do not fit a patch grid of 4 x 4; expected at most one a patch"),
        ({"prompt_depth": 1}, "prompt_depth: expected none, as CLIP-RC gives every layer its prompts, got 1"),
        ({"alignment": "all"}, "alignment: expected one of region_global, region, global, none, got 'all'"),
        ({"recovery_layers": -1}, "recovery_layers: expected a whole number, at least 0, got -1"),
        ({"recovery_layers": 1.5}, "recovery_layers: expected a whole number, at least 0, got 1.5"),
        ({"recovery_layers": True}, "recovery_layers: expected a whole number, at least 0, got True"),
        ({"recovery_layers": "1"}, "recovery_layers: expected a whole number, at least 0, got '1'"),
        ({"recovery_loss": "L1"}, "recovery_loss: expected one of l1, l2, kd, got 'L1'"),
        ({"init": "jittor"}, "init: expected one of official, intent"),
        ({"output_gain": 0}, "output_gain: expected a number above 0, got 0"),
        ({"decoder_heads": 5}, "decoder_heads: expected a divisor of the joint width 32, got 5"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model("clip_rc", **options)


def test_images_smaller_than_the_regions_are_refused() -> None:
    model = tiny_model("clip_rc", regions=16)
    images, text = tiny_inputs(size=(48, 64))
    with pytest.raises(ValueError, match="regions: 4 x 4 regions do not fit a patch grid of 3 x 4"):
        model(images, text)


def test_jittor_layout_loads() -> None:
    """Jittor files have no self_attn and norm1, wrap NumPy weights in "model" and carry their masks."""
    model = tiny_model("clip_rc")
    state = {official: model.state_dict()[ours] for ours, official in zs3fast.weights.official_keys(model).items()}
    state["backbone.transformer.resblocks.0.attn_mask"] = torch.zeros(24, 24)
    state = {name: tensor.numpy() for name, tensor in state.items()}
    again = zs3fast.load_official({"model": state}, seen=SEEN, num_classes=NUM_CLASSES, heads=4, decoder_heads=4)
    images, text = tiny_inputs()
    assert torch.equal(again(images, text).mask_logits, model(images, text).mask_logits)
    assert CLIP["vision_cfg"]["width"] == again.config["clip"]["vision_cfg"]["width"]
