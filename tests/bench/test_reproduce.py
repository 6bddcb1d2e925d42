"""Published rows run again: end to end on painted scenes and a small CLIP of our own."""

from __future__ import annotations

import json

import pytest
import torch

from bench.reproduce import main, rows
from tests.tiny_clip import CONFIG, tiny_clip
from zs3fast.evaluation.confusion import Confusion
from zs3fast.evaluation.partial import PartialResults


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to be in, with its own cache and a CLIP: weights and sizes."""
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_clip().state_dict(), "clip.pt")
    (tmp_path / "clip.json").write_text(json.dumps(CONFIG))
    return tmp_path


OWN = ("--clip", "clip.json", "--weights", "clip.pt", "--dataset", "world", "--device", "cpu")


def test_every_row_has_a_name_and_its_numbers() -> None:
    known = rows()
    assert {"sclip/voc20", "scclip/cityscapes", "zegclip/voc20-inductive", "maft/ade847-cross-dataset"} <= set(known)
    assert [row.values["mIoU"] for row in known["sclip/voc21"].published] == [59.1, 59.63]
    assert all(row.name.startswith(f"{row.method}/{row.dataset}") for row in known.values())


def test_a_row_from_weights_to_the_file_of_results(place, capsys) -> None:
    assert main(["scclip/voc20", *OWN, "--limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert "scclip/voc20: 2 images" in printed and "mIoU 84.30 (" in printed and "SC-CLIP" in printed
    assert main(["naclip/voc20", *OWN, "--limit", "1", "--refine", "0"]) == 0
    first, second = json.loads((place / "reproduced.json").read_text())
    assert (first["row"], first["images"], second["row"]) == ("scclip/voc20", 2, "naclip/voc20")
    ours, paper = first["ours"]["mIoU"], first["published"][0]
    assert paper["difference"]["mIoU"] == pytest.approx(ours - 84.3, abs=1e-3) and "torch" in first["versions"]
    assert "NaN" not in (place / "reproduced.json").read_text() and "nan" not in printed
    assert first["settings"]["protocol"] == "scclip" and second["settings"]["refine"] == 0


def test_an_interrupted_row_goes_on(place, monkeypatch) -> None:
    monkeypatch.setattr(PartialResults, "due", lambda self: True)
    plain, seen = Confusion.update, []

    def stops(self, *arguments):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Confusion, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        main(["sclip/voc20", *OWN, "--limit", "3"])
    assert main(["sclip/voc20", *OWN, "--limit", "3"]) == 0
    assert len(seen) == 4, "two images before it was stopped, one after"
    assert json.loads((place / "reproduced.json").read_text())[0]["images"] == 3
    assert not list((place / "runs").rglob("part-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zegclip/voc20-inductive", "--data", "x"), "error: --weights: zegclip/voc20-inductive is a trained row"),
        (("sclip/voc20", "--data", "nowhere", "--pretrained", "opneai"), "error: root: no folder nowhere"),
    ],
)
def test_mistakes_are_one_line(place, capsys, arguments, message) -> None:
    assert main([*arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_unknown_rows_and_broken_results_are_refused_at_once(place, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["sclip/voc22"])
    assert "no published row 'sclip/voc22'; did you mean sclip/voc2" in capsys.readouterr().err
    (place / "reproduced.json").write_text("{")
    assert main(["sclip/voc20", *OWN]) == 1
    assert "error: --json: reproduced.json is not JSON" in capsys.readouterr().err
