"""The names of the published training-free rows, and CLIP's 80 templates."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zs3fast.text import BACKGROUND_NAMES, IMAGENET, class_names, competing_names, datasets, resolve_templates


@pytest.mark.parametrize(
    ("dataset", "classes", "names"),
    [
        ("voc20", 20, 30),
        ("voc21", 21, 56),
        ("coco_object", 81, 113),
        ("context59", 59, 59),
        ("context60", 60, 60),
        ("cityscapes", 19, 19),
        ("coco171", 171, 171),
        ("ade150", 150, 150),
    ],
)
def test_as_many_names_as_published(dataset, classes, names):
    entries = competing_names(dataset)
    assert (len(entries), sum(map(len, entries)), len(class_names(dataset))) == (classes, names, classes)
    plain = competing_names(dataset, synonyms=False)
    assert len(plain) == classes and all(len(entry) == 1 for entry in plain)


def test_spellings():
    voc = competing_names("voc20")
    assert voc[3] == ("ship",) and voc[10] == ("table",) and voc[19][0] == "television monitor"
    assert voc[14][:2] == ("person", "person in shirt") and len(voc[14]) == 7
    assert competing_names("voc21")[0] == BACKGROUND_NAMES and len(BACKGROUND_NAMES) == 26
    assert competing_names("voc21", synonyms=False)[0] == ("background",)
    assert competing_names("context60")[0] == ("background",)
    assert competing_names("coco_object")[1][-1] == "body"
    changed = {}
    for dataset in ("coco171", "ade150"):
        pairs = zip(class_names(dataset), competing_names(dataset), strict=True)
        changed[dataset] = {name: entry[0] for name, entry in pairs if name != entry[0]}
        assert len(changed[dataset]) == 15
    assert changed["coco171"]["traffic light"] == "trafficlight"
    assert changed["ade150"]["chest of drawers"] == "chestofdrawers"
    assert changed["ade150"]["television"] == "televisionreceiver"
    with pytest.raises(ValueError, match="dataset: expected one of voc20, .*got 'voc22'; did you mean"):
        competing_names("voc22")
    assert set(datasets()) >= {"voc21", "coco_object", "cityscapes"}


def test_imagenet_templates_are_clips_own():
    import open_clip

    assert resolve_templates("imagenet") == IMAGENET and len(set(IMAGENET)) == 80
    assert [template("moon") for template in open_clip.OPENAI_IMAGENET_TEMPLATES] == [
        template.replace("{}", "moon") for template in IMAGENET
    ]


def test_templates_and_names_do_not_bring_open_clip():
    code = "import sys, zs3fast.text as t; t.competing_names('voc21'); assert not {'open_clip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_text_encoder_travels_to_other_processes():
    """Ray pickles it for its actors, and open_clip's tokenizers are of a module that no name leads to."""
    code = """
import pickle, subprocess, sys
from zs3fast.inference.segmenter import Segmenter
encoder = Segmenter.from_pretrained("zs3fast-tiny", device="cpu").text_encoder
assert "open_clip" not in sys.modules
check = "import pickle, sys; encoder = pickle.load(sys.stdin.buffer); print(encoder.tokenizer(['a star']).tolist())"
done = subprocess.run([sys.executable, "-c", check], input=pickle.dumps(encoder), capture_output=True, check=True)
assert done.stdout.decode().strip() == str(encoder.tokenizer(["a star"]).tolist())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
