"""Class lists: published ones, strings, sequences and files."""

from __future__ import annotations

import pytest

from zs3fast.text import (
    class_names,
    datasets,
    parse_classes,
    read_class_file,
    seen_classes,
    unseen_classes,
    whole_names,
)
from zs3fast.text.templates import MULTI, SINGLE, resolve_templates

SPLITS = {  # dataset: (C, names of the unseen classes)
    "voc20": (20, ["pottedplant", "sheep", "sofa", "train", "tvmonitor"]),
    "coco171": (
        171,
        "cow giraffe suitcase frisbee skateboard carrot scissors cardboard clouds grass playingfield river road tree "
        "wall-concrete".split(),
    ),
    "context59": (59, "aeroplane bird boat cat cow fence keyboard motorbike sofa tvmonitor".split()),
    "context60": (60, "aeroplane bird boat cat cow fence keyboard motorbike sofa tvmonitor".split()),
}


@pytest.mark.parametrize("dataset", SPLITS)
def test_published_splits(dataset):
    count, unseen = SPLITS[dataset]
    names = class_names(dataset)
    assert len(names) == len(set(names)) == count
    assert [names[c] for c in unseen_classes(dataset)] == unseen
    assert sorted(seen_classes(dataset) + unseen_classes(dataset)) == list(range(count))


def test_landmarks_of_the_lists():
    coco = class_names("coco171")
    assert [coco[i] for i in (0, 60, 79, 80, 170)] == ["person", "dining table", "toothbrush", "banner", "wood"]
    assert class_names("context60") == ["background", *class_names("context59")]
    ade = class_names("ade150")
    assert (len(ade), len(set(ade)), ade[0], ade[8], ade[149]) == (150, 150, "wall", "windowpane", "flag")


def test_unknown_dataset_lists_the_known():
    with pytest.raises(ValueError, match="dataset: expected one of voc20, .*got 'voc'"):
        class_names("voc")
    with pytest.raises(ValueError, match="dataset: expected one with a published seen/unseen split, .*, got ade150"):
        seen_classes("ade150")
    known = "voc20 voc21 coco171 coco_object context59 context60 pc459 ade150 ade847 cityscapes"
    assert datasets() == known.split()


def test_lists_are_copies():
    class_names("voc20").append("moon")
    assert len(class_names("voc20")) == 20


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cat, grass", [("cat",), ("grass",)]),
        (["grass", "cat"], [("grass",), ("cat",)]),
        (["sofa, couch", " potted   plant "], [("sofa", "couch"), ("potted plant",)]),
        ([("sofa", "couch"), "cat"], [("sofa", "couch"), ("cat",)]),
        (whole_names(["screen, crt screen", "screen,  silver"]), [("screen, crt screen",), ("screen, silver",)]),
        ("猫, Straße", [("猫",), ("Straße",)]),
        (
            "salt &amp; pepper, 747, (other), 3d printer, t-shirt",
            [("salt &amp; pepper",), ("747",), ("(other)",)] + [("3d printer",), ("t-shirt",)],
        ),
        ([("cat; dog",), ("0: cat",)], [("cat; dog",), ("0: cat",)]),  # verbatim, as datasets name them
    ],
)
def test_parse_classes_keeps_order_and_synonyms(given, expected):
    assert parse_classes(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "classes: .*no class"),
        ("  ", "classes: .*no class"),
        ([], "classes: expected at least one class, got none"),
        ("cat,, dog", "classes: .*empty name in 'cat,, dog'"),
        (["cat", ""], "classes: .*no class"),
        ("cat, dog, Cat", r"classes: 'Cat' is given twice \(classes 1 and 3\)"),
        (["screen, silver", "screen, crt"], "classes: 'screen' is given twice"),
        (whole_names(["screen, crt", "Screen,  crt"]), "classes: 'Screen, crt' is given twice"),
        ([("cat", " ")], "classes: .*no class"),
        (["hot dog", "hot  dog"], "classes: 'hot dog' is given twice"),
        (["caf\u00e9", "cafe\u0301"], "classes: 'cafe\u0301' is given twice"),
        ([("salt & pepper",), ("salt &amp; pepper",)], "classes: 'salt &amp; pepper' is given twice"),
        (["salt &amp; pepper", "Salt & Pepper"], "classes: 'Salt & Pepper' is given twice"),
        (["men's room", "men\u2019s room"], "is given twice"),
        (["dog", "do\u200bg"], "is given twice"),
        (["dog", "\ufeffdog"], "is given twice"),
        (["dog", "dog\u00ad\u202e"], "is given twice"),
        ("cat;dog", "expected names with commas between them, got 'cat;dog'; write 'cat, dog'"),
        ("cat | dog, cow", "write 'cat, dog, cow'"),
        ("cat\ndog\n", "write 'cat, dog'"),
        ("\u732b\u3001\u72ac", "write '\u732b, \u72ac'"),
        ("0: cat", "got '0: cat'; write 'cat'"),
        ("0: cat, 1: dog", "write 'cat, dog'"),
        (["1. cat", "2. dog"], "got '1. cat'; write 'cat'"),
        (["1\tcat"], "write 'cat'"),
        (["- cat"], "write 'cat'"),
        ('["cat", "dog"]', "write 'cat, dog'"),
        ("['cat', 'dog']", "write 'cat, dog'"),
        ("cat, " + "x" * 5_000_000, "expected names of at most 1000 characters, got 5000000: 'xxx"),  # for hours
        ([("cat", "猫" * 1001)], "expected names of at most 1000 characters, got 1001: '猫猫"),
    ],
)
def test_bad_class_lists_name_the_argument(given, message):
    with pytest.raises(ValueError, match=message):
        parse_classes(given)


def test_classes_that_are_no_names():
    with pytest.raises(TypeError, match="classes: expected a name.*got 7"):
        parse_classes(["cat", 7])


def test_class_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeff# pets\ncat\n\n  sofa, couch   # furniture\ncafé\r\nC#\n".encode())
    assert read_class_file(path) == [("cat",), ("sofa", "couch"), ("café",), ("C#",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", "expected at least one class, got none"),
        (b"cat\ndog\ncat\n", r"'cat' is given twice \(classes 1 and 3\)"),
        (b"cat\nsofa,,couch\n", "line 2: .*empty name"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"cat;dog\n", "line 1: .*write 'cat, dog'"),
        (b"cat\n0: dog\n", "line 2: .*write 'dog'"),
        (b'["cat", "dog"', "is not JSON"),
        (b'["cat", 5]', "expected a list of names, .* got 5 for a name"),
        (b'["cat", [], "dog"]', "for a name"),
        (b'["cat", {"name": "dog"}]', "got an object for a name"),
        (b'["cat", "Cat"]', "'Cat' is given twice"),
        (b'{"cat": [], "cat": ["kitty"]}', "'cat' is given twice"),
        (b'{"0": "cat", "1": "dog"}', "got numbered names; write a list of them"),
        (b"[" * 100_000, "is not JSON"),
        ("cat".encode("utf-16"), "not UTF-8"),
        (b"cat\n" + b"x" * 1_000_000, "expected names of at most 1000 characters, got 1000000"),
    ],
)
def test_bad_class_files_are_named(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_class_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["classes.json", "classes.txt"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('["cat", "sofa"]', [("cat",), ("sofa",)]),  # on one line, which as text is one class
        ('[\n "screen, silver",\n ["sofa", "couch"]\n]', [("screen, silver",), ("sofa", "couch")]),
        (
            '\ufeff{"sofa": ["couch"], "cat": [], "dog": null, "tv": "telly"}',
            [("sofa", "couch"), ("cat",), ("dog",), ("tv", "telly")],
        ),
    ],
)
def test_class_files_of_json(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_class_file(tmp_path / name) == expected


@pytest.mark.parametrize("content", ['name\ncat\n"screen, silver"\n', 'cat\r\n\r\n"screen, silver",\r\n'])
def test_class_files_of_csv(tmp_path, content):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    assert read_class_file(tmp_path / "a.csv") == [("cat",), ("screen, silver",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [("cat,dog\n", "expected one column, a name a line, got 2 in 'cat,dog'"), ("cat;dog\n", "write 'cat, dog'")],
)
def test_csv_of_more_columns_is_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"a.csv: {message}|{message}"):
        read_class_file(tmp_path / "a.csv")


def test_templates():
    assert SINGLE == ("a photo of a {}",)
    assert len(MULTI) == len(set(MULTI)) == 15
    assert all(template.count("{}") == 1 and template.endswith(".") for template in MULTI)
    assert resolve_templates("single") == SINGLE and resolve_templates("multi") == MULTI
    assert resolve_templates("an X-ray of {}") == ("an X-ray of {}",)
    assert resolve_templates(["{}", "the {}"]) == ("{}", "the {}")


@pytest.mark.parametrize("templates", ["a photo", [], ["a {} {}"], ["a photo"], [3]])
def test_bad_templates(templates):
    with pytest.raises(ValueError, match="templates: "):
        resolve_templates(templates)
