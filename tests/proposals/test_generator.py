"""Mask generators of one's own: what trains, what stays, and the way into a file and out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.proposals.tiny_generators import OPTIONS, RESNET, SWIN

transformers = pytest.importorskip("transformers", reason="the proposals extra is not installed")
pytest.importorskip("scipy", reason="the proposals extra is not installed")

from zs3fast.proposals import load_mask_proposer, soft_masks  # noqa: E402
from zs3fast.proposals.generator import ProposalGenerator, load_generator, save_generator  # noqa: E402
from zs3fast.utils.errors import CheckpointError  # noqa: E402


def generator(method: str = "maskformer", **options: Any) -> ProposalGenerator:
    torch.manual_seed(0)
    return ProposalGenerator(method=method, image_size=64, options={**OPTIONS[method], **options})


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("method", OPTIONS)
def test_a_file_proposes_what_the_model_did(method: str, tmp_path: Path) -> None:
    model = generator(method).eval()
    path = tmp_path / "weights.safetensors"
    save_generator(model, path)
    loaded = load_generator(path)
    assert loaded.config == model.config and not loaded.training
    proposer = load_mask_proposer(str(path))
    pictures = [image(50, 70), image(60, 40)]
    expected, found = model.proposer()(pictures), proposer(pictures)
    assert torch.equal(expected.mask_logits, found.mask_logits) and found.class_scores is None
    assert found.padded_size == (960, 896) and found.mask_logits.shape[:2] == (2, 6)  # MAFT's frame, whatever the size


def test_the_network_reads_images_at_the_size_it_was_trained_at() -> None:
    model = generator().eval()
    sizes: list[torch.Size] = []
    model.network.register_forward_pre_hook(
        lambda module, args, given: sizes.append(given["pixel_values"].shape), with_kwargs=True
    )
    framed = model.proposer()([image(64, 64)])
    own = model.proposer(short_side=64, long_side=64)([image(64, 64)])
    assert sizes == [(1, 3, 64, 64), (1, 3, 64, 64)] and framed.padded_size == (640, 640)
    small = torch.nn.functional.interpolate(soft_masks(framed), size=(64, 64), mode="bilinear")
    assert float((small - soft_masks(own)).abs().max()) < 0.1  # regions lie where they did


def test_one_label_and_no_object() -> None:
    model = generator()
    assert model(torch.zeros(1, 3, 64, 64)).class_queries_logits.shape[-1] == 2
    assert model.network.config.id2label == {0: "object"}


def test_batch_norm_stays_as_it_came() -> None:
    """Published: frozen. Its statistics are in no checkpoint of a run either."""
    model = generator(backbone_config=RESNET).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    model(torch.randn(2, 3, 64, 64))
    assert norms and all(torch.equal(m.running_mean, old) for m, old in zip(norms, before))
    trained = {id(p) for p in model.trainable().values()}
    assert not any(id(p) in trained for m in norms for p in m.parameters())
    rest = len(list(model.parameters())) - sum(len(list(m.parameters())) for m in norms)
    assert len(trained) == rest > 0 and model.training


def classifier_in(folder: Path, kind: str) -> torch.nn.Module:
    """A random classifier of the library, saved: what a backbone trained on ImageNet is there."""
    torch.manual_seed(3)
    given = {"swin": SWIN, "resnet": RESNET}[kind]
    plain = {name: value for name, value in given.items() if name not in ("model_type", "out_features")}
    classifier = {
        "swin": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**plain)),
        "resnet": lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(**plain)),
    }[kind]()
    classifier.save_pretrained(folder)
    return classifier


@pytest.mark.parametrize(("method", "kind"), [("maskformer", "resnet"), ("mask2former", "swin")])
def test_a_pretrained_backbone_is_in_place(method: str, kind: str, tmp_path: Path) -> None:
    classifier = classifier_in(tmp_path / "classifier", kind)
    options = {name: value for name, value in OPTIONS[method].items() if name != "backbone_config"}
    model = ProposalGenerator(method=method, options=options, pretrained=str(tmp_path / "classifier"))
    assert model.weights_loaded
    theirs = {name.removeprefix(f"{kind}."): value for name, value in classifier.state_dict().items()}
    start = "network.model.pixel_level_module.encoder."
    backbone = {name.removeprefix(start).removeprefix(f"{kind}."): value for name, value in model.backbone().items()}
    same = [name for name in backbone if "hidden_states_norms" not in name]  # which no classifier has
    assert len(same) > 10 and all(torch.equal(backbone[name], theirs[name]) for name in same)
    save_generator(model, tmp_path / "weights.safetensors")
    (tmp_path / "classifier").rename(tmp_path / "gone")
    again = load_generator(tmp_path / "weights.safetensors")  # the file is whole without it
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_will_not_do_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method: expected one of maskformer, mask2former, got 'sam'"):
        ProposalGenerator(method="sam")
    with pytest.raises(ValueError, match="options: transformers' Mask2FormerConfig does not take them: "):
        ProposalGenerator(method="mask2former", options={"num_queries": "many"})
    with pytest.raises(ValueError, match="no folder './nowhere'"):
        ProposalGenerator(method="maskformer", pretrained="./nowhere")
    classifier_in(tmp_path / "swin", "swin")
    with pytest.raises(ValueError, match="swin is a SwinBackbone, maskformer has a .*; expected a ResNet"):
        ProposalGenerator(method="maskformer", options=OPTIONS["maskformer"], pretrained=str(tmp_path / "swin"))
    from zs3fast import weights
    from zs3fast.models.registry import create_model

    model = create_model("zegclip", clip={"embed_dim": 8, "vision_cfg": {"layers": 3, "width": 16, "head_width": 8}})
    weights.save(model, tmp_path / "zegclip.safetensors")
    with pytest.raises(CheckpointError, match="zegclip.safetensors: no mask generator inside"):
        load_mask_proposer(str(tmp_path / "zegclip.safetensors"))
    with pytest.raises(FileNotFoundError, match="no file .*absent.safetensors"):
        load_mask_proposer(str(tmp_path / "absent.safetensors"))
    save_generator(generator(), tmp_path / "generator.safetensors")
    with pytest.raises(CheckpointError, match="generator.safetensors: holds a mask generator, .*--proposer"):
        weights.load(tmp_path / "generator.safetensors")
