"""Proposers by name: local folders that are right, wrong, half empty or absent, and a library that is not there."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.proposals.tiny_models import picture, tiny_detector, tiny_maskformer, tiny_sam, transformers
from zs3fast.proposals import (
    SamProposer,
    TransformersBoxProposer,
    TransformersMaskProposer,
    load_box_proposer,
    load_mask_proposer,
)

FRAME = {"short_side": 64}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """What HF_HUB_OFFLINE=1 sets when the hub is first imported: nothing is asked for over the network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_mask_proposers_from_a_folder(tmp_path):
    model = tiny_maskformer()
    model.save_pretrained(tmp_path)
    got = load_mask_proposer(f"maskformer:{tmp_path}", **FRAME)
    assert isinstance(got, TransformersMaskProposer) and got.mean == (123.675, 116.28, 103.53)
    pictures = [picture(64, 80)]
    expected = TransformersMaskProposer(model, **FRAME)(pictures)
    torch.testing.assert_close(got(pictures).mask_logits, expected.mask_logits)
    torch.testing.assert_close(got(pictures).class_scores, expected.class_scores)


def test_recorded_normalisation_is_used(tmp_path):
    tiny_maskformer().save_pretrained(tmp_path)
    transformers.MaskFormerImageProcessor(image_mean=[0.5, 0.25, 0.0], image_std=[1.0, 1.0, 0.5]).save_pretrained(
        tmp_path
    )
    got = load_mask_proposer(f"maskformer:{tmp_path}")
    assert got.mean == (127.5, 63.75, 0.0) and got.std == (255.0, 255.0, 127.5)


def test_sam_from_a_folder(tmp_path):
    model = tiny_sam(scale=14)
    model.save_pretrained(tmp_path)
    options = {"points_per_side": 4, "min_iou": 0.1, "min_stability": 0.3, **FRAME}
    got = load_mask_proposer(f"sam:{tmp_path}", **options)
    pictures = [picture(64, 80)]
    assert torch.equal(got(pictures).masks, SamProposer(model, **options)(pictures).masks)


@pytest.mark.parametrize("kind", ["detr", "rtdetr", "yolos", "detector"])
def test_box_proposers_from_a_folder(tmp_path, kind):
    model, processor = tiny_detector("yolos" if kind == "detector" else kind)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    got = load_box_proposer(f"{kind}:{tmp_path}", threshold=0.1)(picture(40, 60))
    expected = TransformersBoxProposer(model, processor, threshold=0.1)(picture(40, 60))
    assert got.names == expected.names and got.vocabulary == expected.vocabulary
    torch.testing.assert_close(got.boxes, expected.boxes, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spec", ["mask2former", "mask2former:", "sams:x", ":x", ""])
def test_unknown_kinds(spec):
    with pytest.raises(
        ValueError, match="proposer: expected KIND:NAME with KIND one of mask2former, maskformer, sam, freeseg, files"
    ):
        load_mask_proposer(spec)
    with pytest.raises(
        ValueError, match="boxes: expected KIND:NAME with KIND one of detr, rtdetr, yolos, detector, files"
    ):
        load_box_proposer(spec)


@pytest.mark.parametrize(
    ("load", "spec"),
    [
        (load_mask_proposer, "mask2former:facebook/mask2former-swin-tiny-ade-semantic"),
        (load_mask_proposer, "sam:facebook/sam-vit-huge"),
        (load_box_proposer, "detr:facebook/detr-resnet-50"),
    ],
)
def test_absent_weights_say_how_to_get_them(load, spec, monkeypatch, tmp_path, caplog):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = spec.partition(":")[2]
    with pytest.raises(ValueError, match="is not on this machine and could not be fetched") as caught:
        load(spec)
    message = str(caught.value)
    assert f"huggingface.co/{name}" in message and f"hf download {name} --local-dir FOLDER" in message
    assert "\n" not in message and caught.value.__suppress_context__ and not caplog.records


def test_absent_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match=f"weights: no folder '{tmp_path}/none'; expected one with config.json"):
        load_mask_proposer(f"sam:{tmp_path}/none")
    with pytest.raises(ValueError, match="does not hold readable weights, expected config.json"):
        load_mask_proposer(f"sam:{tmp_path}")
    tiny_sam().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="does not hold readable weights, expected .* model.safetensors"):
        load_mask_proposer(f"sam:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="does not hold readable weights"):
        load_mask_proposer(f"sam:{tmp_path}")


def test_weights_of_another_model(tmp_path):
    tiny_sam().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights: expected maskformer, got .*, a sam model"):
        load_mask_proposer(f"maskformer:{tmp_path}")
    with pytest.raises(ValueError, match="weights: expected rt_detr or rt_detr_v2, got .*, a sam model"):
        load_box_proposer(f"rtdetr:{tmp_path}")


def test_incomplete_and_misshapen_weights(tmp_path):
    """The library fills what is missing with noise and a warning."""
    tiny_sam().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = "mask_decoder.iou_token.weight"
    save_file({name: value for name, value in weights.items() if name != key}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"does not fit SamModel; missing: {key} \(1\), wrong shape: none"):
        load_mask_proposer(f"sam:{tmp_path}")
    save_file({**weights, key: weights[key][:, :3].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"does not .*{tmp_path.name}|{tmp_path.name}.* does not"):
        load_mask_proposer(f"sam:{tmp_path}")


def test_detector_without_its_processor(tmp_path):
    model, _ = tiny_detector("yolos")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected preprocessor_config.json in it"):
        load_box_proposer(f"yolos:{tmp_path}")


def test_library_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load, spec in ((load_mask_proposer, "sam:x"), (load_box_proposer, "detr:x")):
        with pytest.raises(ImportError, match=r"needs the transformers library: pip install 'zs3fast\[proposals\]'"):
            load(spec)


def test_library_a_model_leans_on(monkeypatch, tmp_path):
    tiny_maskformer().save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.utils.import_utils, "is_scipy_available", lambda: False)
    mapping = transformers.utils.import_utils.BACKENDS_MAPPING
    monkeypatch.setitem(mapping, "scipy", (lambda: False, mapping["scipy"][1]))
    with pytest.raises(ImportError, match=r"needs a library that is not installed: pip install 'zs3fast\[proposals\]'"):
        load_mask_proposer(f"maskformer:{tmp_path}")


def test_config_is_json(tmp_path):
    tiny_sam().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config)[:-20])
    with pytest.raises(ValueError, match="does not hold readable weights"):
        load_mask_proposer(f"sam:{tmp_path}")


def test_short_names_of_box_proposers(tmp_path, monkeypatch):
    """A detector's kind alone stands for a usual one, and a .json file needs no kind."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="facebook/detr-resnet-50.* could not be fetched"):
        load_box_proposer("detr")
    path = tmp_path / "gt.json"
    path.write_text('{"pictures": [{"file_name": "a.jpg", "boxes": [{"box": [1, 2, 9, 8], "name": "cat"}]}]}')
    assert load_box_proposer(str(path)).__class__ is load_box_proposer(f"files:{path}").__class__
    with pytest.raises(ValueError, match="boxes: expected KIND:NAME"):
        load_box_proposer("detector")
