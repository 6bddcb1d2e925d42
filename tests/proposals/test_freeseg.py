"""FreeSeg's generator against timm's ResNet, transformers' Mask2Former and a naive text interaction."""

from __future__ import annotations

import re

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tests.proposals.freeseg_oracle import (
    DECODER_LAYERS,
    DIM,
    HEADS,
    OPTIONS,
    TEXT_DIM,
    Bottleneck,
    Oracle,
    ResNet,
    class_texts,
    naive_interaction,
    official_state,
    resnet,
    resnet_features,
)
from zs3fast.proposals import MaskProposer, check_proposals, generator_input, resize_batch, soft_masks
from zs3fast.proposals.freeseg import FreeSegGenerator, FreeSegProposer, GeneratorWeightsError
from zs3fast.proposals.freeseg import interaction as interaction_file
from zs3fast.proposals.freeseg.decoder import attention_mask
from zs3fast.proposals.freeseg.loading import load_generator, official_shapes
from zs3fast.proposals.freeseg.resnet import fold_norm

FRAME = {"short_side": 64}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def proposer(oracle: Oracle) -> FreeSegProposer:
    return FreeSegProposer.from_official(official_state(oracle), **OPTIONS, **FRAME)


@pytest.fixture
def generator(proposer: FreeSegProposer) -> FreeSegGenerator:
    return proposer.generator


def images(batch: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_near(name: str, got: torch.Tensor, expected: torch.Tensor, budget: float = 1e-5) -> None:
    assert got.shape == expected.shape, f"{name}: {got.shape}, expected {expected.shape}"
    error = float((got - expected).norm() / expected.norm())
    assert error <= budget, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("dilation", [1, 2])
@torch.no_grad()
def test_backbone_equals_timm(oracle, dilation):
    oracle_net = resnet(dilation)
    state = official_state(oracle)  # dilation has no weights
    got = load_generator(state, **OPTIONS, res5_dilation=dilation).backbone(images())
    for name, ours, theirs in zip(("res2", "res3", "res4", "res5"), got, resnet_features(oracle_net, images())):
        assert_near(name, ours, theirs)
    assert got[3].shape[2:] == ((2, 3) if dilation == 1 else (4, 6))


def test_folded_norm_equals_batch_norm_in_float64():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, bias=False).double(), nn.BatchNorm2d(5).double().eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(1e-6, 2)  # down to where the epsilon counts
    weight, bias = fold_norm(conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), norm(conv(x)), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_pixel_decoder_equals_transformers(oracle, generator):
    features = resnet_features(oracle.resnet, images())
    expected = oracle.pixels(features)
    maps, mask_features = generator.pixel_decoder(features)
    assert [tuple(level.shape[2:]) for level in maps] == [(2, 3), (4, 6), (8, 12)]  # low to high resolution
    for index, (ours, theirs) in enumerate(zip(maps, expected.multi_scale_features)):
        assert_near(f"map {index}", ours, theirs)
    assert_near("mask features", mask_features, expected.mask_features)


@torch.no_grad()
def test_decoder_equals_transformers(oracle, generator):
    seed = torch.Generator().manual_seed(6)
    maps = [torch.randn(2, DIM, *size, generator=seed) for size in ((2, 3), (4, 6), (8, 12))]
    shared = torch.randn(2, DIM, 1, 1, generator=seed)  # so that some queries like no cell at all
    mask_features = shared + 0.5 * torch.randn(2, DIM, 16, 24, generator=seed)
    expected = oracle.decoder(maps, mask_features)
    visited = expected.masks_queries_logits[:-1]
    assert len(visited) == DECODER_LAYERS == len(generator.decoder.layers)
    seen = [
        nn.functional.interpolate(logits, maps[index % 3].shape[2:], mode="bilinear") >= 0
        for index, logits in enumerate(visited)
    ]
    assert any(not rows.flatten(2).any(-1).all() for rows in seen), "no query with an empty mask: weak test"
    assert 0.1 < torch.cat([rows.flatten().float() for rows in seen]).mean() < 0.9

    mask_logits, embeddings = generator.decoder(maps, mask_features)
    assert_near("mask logits", mask_logits, expected.masks_queries_logits[-1])
    last = expected.intermediate_hidden_states[-1].transpose(0, 1)
    assert_near("class embeddings", embeddings, oracle.heads.class_2(oracle.heads.class_1(last).relu()))


def test_empty_masks_become_full_ones():
    logits = torch.full((1, 3, 2, 2), -1.0)
    logits[0, 1, 0, 1] = 0.0  # a sigmoid of exactly one half is kept
    keep = attention_mask(logits)
    assert keep[0].tolist() == [[True] * 4, [False, True, False, False], [True] * 4]


@pytest.mark.parametrize("chunk", [1 << 24, 100])
@torch.no_grad()
def test_interaction_equals_the_naive_formula(oracle, generator, chunk, monkeypatch):
    monkeypatch.setattr(interaction_file, "CHUNK", chunk)
    seed = torch.Generator().manual_seed(7)
    maps = [torch.randn(2, DIM, *size, generator=seed) for size in ((2, 3), (4, 6), (8, 12), (16, 24))]
    text = class_texts(6)
    module = generator.interaction
    expected = naive_interaction(oracle.heads, maps, text)
    got = module(maps, module.text_keys(text, 4))
    for index, (ours, theirs) in enumerate(zip(got, expected)):
        assert_near(f"map {index}", ours, theirs)
    once = module(maps[1:], module.text_keys(text, 3))  # the text norm of these maps applied once less
    for index, (ours, theirs) in enumerate(zip(once, expected[1:])):
        assert float((ours - theirs).norm() / theirs.norm()) > 1e-4, f"map {index + 1}: re-applied norm has no effect"


def test_interaction_wants_keys_for_every_map(generator):
    with pytest.raises(ValueError, match="zip"):
        generator.interaction([torch.zeros(1, DIM, 2, 2)] * 2, generator.interaction.text_keys(class_texts(3), 1))


@torch.no_grad()
def test_generator_equals_all_parts_together(oracle, generator):
    text = class_texts(5)
    mask_logits, scores = generator(images(), text)
    expected_logits, expected_scores = oracle(images(), text)
    assert_near("mask logits", mask_logits, expected_logits, 1e-4)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-3, atol=1e-4)
    assert 0.05 < float(scores.max()) < 0.999, "saturated scores: weak test"
    without_text = oracle(images(), text, interact=False)[0]
    assert float((mask_logits - without_text).norm() / mask_logits.norm()) > 1e-2


def test_proposals_lie_on_the_frame_and_follow_the_class_list(proposer, generator):
    pictures = [picture(48, 60), picture(90, 48, seed=1)]
    text = class_texts(5)
    got = proposer(pictures, text)
    check_proposals(got, [(48, 60), (90, 48)])
    assert got.padded_size == (128, 96) and got.image_sizes == ((64, 80), (120, 64))
    assert got.mask_logits.shape == (2, 7, 32, 24) and got.masks is None and got.valid.all() and got.align_corners
    assert got.class_names is None and got.class_scores.shape == (2, 7, 6)
    torch.testing.assert_close(got.class_scores.sum(-1), torch.ones(2, 7))
    with torch.no_grad():
        mask_logits, scores = generator(generator_input(resize_batch(pictures, **FRAME)), text)
    assert torch.equal(got.mask_logits, mask_logits) and torch.equal(got.class_scores, scores)
    expected = nn.functional.interpolate(mask_logits, (128, 96), mode="bilinear", align_corners=True).sigmoid()
    assert torch.equal(soft_masks(got), expected)

    other = proposer(pictures, class_texts(5, seed=9))
    assert not torch.allclose(other.mask_logits, got.mask_logits, atol=1e-3)
    bound = proposer.for_vocabulary(text)
    assert isinstance(bound, MaskProposer)
    assert torch.equal(bound(pictures, ["a.jpg", "b.jpg"]).mask_logits, got.mask_logits)


def test_text_is_normalised_and_prepared_once(proposer, monkeypatch):
    calls = []
    module = proposer.generator.interaction
    prepare = module.text_keys
    monkeypatch.setattr(module, "text_keys", lambda *args: calls.append(1) or prepare(*args))
    text = class_texts(4)
    first = proposer([picture(64, 64)], text)
    assert torch.equal(proposer([picture(64, 64)], text).mask_logits, first.mask_logits) and len(calls) == 1
    scaled = proposer([picture(64, 64)], 3 * text)
    torch.testing.assert_close(scaled.mask_logits, first.mask_logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        module.gamma.mul_(2)
    assert not torch.allclose(proposer([picture(64, 64)], text).mask_logits, first.mask_logits, atol=1e-3)
    assert len(calls) == 3


def test_dropout_acts_in_training_mode_only(proposer):
    pictures, text = [picture(64, 64)], class_texts(4)
    quiet = proposer(pictures, text).mask_logits
    assert torch.equal(proposer(pictures, text).mask_logits, quiet)
    for part in (proposer.generator.pixel_decoder, proposer.generator.interaction):
        part.train()
        assert not torch.allclose(proposer(pictures, text).mask_logits, quiet, atol=1e-3)
        part.eval()
    proposer.generator.decoder.train()
    assert torch.equal(proposer(pictures, text).mask_logits, quiet)  # published without dropout there


def test_nothing_of_the_generator_trains(generator):
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    assert not generator.training


def test_missing_unexpected_and_misshapen_weights_are_all_named(oracle):
    state = official_state(oracle)
    del state["backbone.res4.0.conv2.norm.running_mean"]
    del state["sem_seg_head.interaction.gamma"]
    del state["clip_adapter.non_object_embedding"]
    state["sem_seg_head.predictor.surplus.weight"] = torch.zeros(2)
    state["sem_seg_head.predictor.decoder_norm.bias"] = torch.zeros(3)
    with pytest.raises(GeneratorWeightsError) as error:
        load_generator(state, **OPTIONS)
    message = str(error.value)
    assert re.search(
        r"missing \(3\): backbone\.res4\.0\.conv2\.norm\.running_mean, clip_adapter\.non_object_embedding, "
        r"sem_seg_head\.interaction\.gamma\n",
        message,
    )
    assert "unexpected (1): sem_seg_head.predictor.surplus.weight" in message
    assert f"wrong shape (1): sem_seg_head.predictor.decoder_norm.bias [3], expected [{DIM}]" in message


def test_every_official_tensor_of_the_generator_reaches_it(oracle, generator):
    """Names round-trip: the keys the generator asks for are those of the layout, and each one changes it."""
    state = official_state(oracle)
    own = {key for key in state if key.startswith(("backbone.", "sem_seg_head.", "clip_adapter.non_object"))}
    assert own == set(official_shapes(generator))
    moved = load_generator({key: value + 0.25 for key, value in state.items()}, **OPTIONS).state_dict()
    for name, before in generator.state_dict().items():
        assert not torch.equal(moved[name], before), name


def test_live_batch_norm_counters_and_other_parts_are_left_alone(oracle, generator):
    state = official_state(oracle)
    state["backbone.stem.conv1.norm.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    state["IPCLIP.something.new"] = torch.zeros(1)
    again = load_generator(state, **OPTIONS)
    assert all(torch.equal(one, two) for one, two in zip(again.state_dict().values(), generator.state_dict().values()))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files(oracle, generator, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = official_state(oracle)
    if suffix == ".pth":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "iteration": 3}, path)
    else:
        safetensors.torch.save_file(state, path)
    again = load_generator(path, **OPTIONS)
    assert all(torch.equal(one, two) for one, two in zip(again.state_dict().values(), generator.state_dict().values()))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(GeneratorWeightsError, match=f"{path}: not a readable"):
        load_generator(path, **OPTIONS)


def test_files_that_are_no_generator(oracle, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_generator(tmp_path / "absent.pth")
    with pytest.raises(GeneratorWeightsError, match="holds no mask generator"):
        load_generator({"IPCLIP.proj": torch.zeros(2)})
    state = official_state(oracle)
    del state["sem_seg_head.predictor.query_feat.weight"]
    with pytest.raises(GeneratorWeightsError, match="query_feat.weight', which the generator's sizes are read from"):
        load_generator(state, **OPTIONS)
    torch.save({"model": torch.zeros(1).numpy().dtype}, tmp_path / "code.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name in ("code.pth", "list.pth"):
        with pytest.raises(GeneratorWeightsError, match=name):
            load_generator(tmp_path / name)


def test_heads_that_do_not_fit(oracle):
    with pytest.raises(ValueError, match="heads: expected a divisor of the width 64, got 5"):
        load_generator(official_state(oracle), heads=5)
    with pytest.raises(ValueError, match="multi_grid: expected one factor for each of 3 blocks"):
        load_generator(official_state(oracle), heads=HEADS, multi_grid=(1, 2))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (torch.zeros(3, TEXT_DIM + 1), ValueError, r"expected \[C, 24\].*got \[3, 25\]"),
        (torch.zeros(0, TEXT_DIM), ValueError, "C >= 1"),
        (torch.zeros(TEXT_DIM), ValueError, r"got \[24\]"),
        (torch.full((2, TEXT_DIM), torch.nan), ValueError, "finite"),
        (np.zeros((2, TEXT_DIM)), TypeError, "expected a tensor"),
    ],
)
def test_bad_text(proposer, text, error, message):
    with pytest.raises(error, match=f"text_embeddings: .*{message}"):
        proposer([picture(64, 64)], text)
    with pytest.raises(error, match=f"text_embeddings: .*{message}"):
        proposer.for_vocabulary(text)


def test_broken_weights_are_told(proposer):
    with torch.no_grad():
        proposer.generator.decoder.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="output is not finite"):
        proposer([picture(64, 64)], class_texts(3))


def test_published_sizes_are_the_defaults():
    """ResNet-101 with a stem of 128, 6 encoder and 10 decoder layers, 100 queries, text of 512; no weights are made."""
    with torch.device("meta"):
        generator = FreeSegGenerator()
        net = ResNet(Bottleneck, [3, 4, 23, 3], num_classes=0, stem_width=64, stem_type="deep")
    shapes = official_shapes(generator)
    convolutions = sum(tensor.numel() for tensor in net.parameters() if tensor.dim() == 4)
    assert sum(int(np.prod(shape)) for key, shape in shapes.items() if _is_backbone_conv(key)) == convolutions
    base = "sem_seg_head."
    expected = {
        "backbone.stem.conv3.weight": [128, 64, 3, 3],
        "backbone.res5.2.conv3.norm.running_var": [2048],
        base + "pixel_decoder.input_proj.0.0.weight": [256, 2048, 1, 1],  # res5 first
        base + "pixel_decoder.transformer.encoder.layers.5.linear1.weight": [1024, 256],
        base + "pixel_decoder.transformer.encoder.layers.5.self_attn.sampling_offsets.bias": [8 * 3 * 4 * 2],
        base + "predictor.transformer_ffn_layers.9.linear1.weight": [2048, 256],
        base + "predictor.transformer_self_attention_layers.9.self_attn.in_proj_weight": [768, 256],
        base + "predictor.transformer_cross_attention_layers.9.multihead_attn.in_proj_bias": [768],
        base + "predictor.query_feat.weight": [100, 256],
        base + "predictor.mask_embed.layers.2.weight": [256, 256],
        base + "predictor.class_embed.layers.0.weight": [1024, 256],
        base + "predictor.class_embed.layers.1.weight": [512, 1024],
        base + "interaction.attn.out_proj.weight": [256, 2048],
        base + "interaction.layer_norm_k_1.bias": [512],
        "clip_adapter.non_object_embedding": [1, 512],
    }
    assert {key: shapes.get(key) for key in expected} == expected
    assert not any("layers.10." in key for key in shapes)


def _is_backbone_conv(key: str) -> bool:
    return key.startswith("backbone.") and key.endswith(".weight") and ".norm." not in key
