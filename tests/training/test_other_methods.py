"""ClsCLIP and MAFT: their steps, and short runs on their own recipes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.tiny import SEEN, tiny_inputs, tiny_labels, tiny_model
from tests.tiny_clip import CONFIG as CLIP
from tests.tiny_clip import tiny_clip
from tests.training import tiny_run
from zs3fast import weights
from zs3fast.models.registry import create_model
from zs3fast.text import TextEncoder
from zs3fast.training import proposing
from zs3fast.training.config import TrainConfig, load_config
from zs3fast.training.loop import train
from zs3fast.training.proposing import connected_labels, usable
from zs3fast.training.setup import build_model, build_step, open_data, prompts, text_embeddings
from zs3fast.training.steps import PairStep, ProposalStep
from zs3fast.types import Proposals

VOCABULARY = {"clip": CLIP, "num_classes": 7, "seen": SEEN}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def pair_step() -> PairStep:
    torch.manual_seed(0)
    model = create_model("clsclip", image_size=64, nav_layers=(1,), decoder_width=16, decoder_ffn=32, **VOCABULARY)
    text = torch.randn(7, 64, generator=torch.Generator().manual_seed(4))
    return PairStep(model.eval(), text, ignore_index=255)


def test_pairs_are_a_mean_over_all_valid_pixels() -> None:
    step = pair_step()
    labels = tiny_labels(4)
    labels[0, 10:] = 255  # few valid pixels
    batch = {"images": tiny_inputs(4)[0], "labels": labels, "class_index": torch.tensor([0, 1, 4, 6])}
    whole = step(batch)["loss"]
    average = step.count(batch) / 2
    halves = [{name: value[i : i + 2] for name, value in batch.items()} for i in (0, 2)]
    got = sum(step(half, average)["loss"] for half in halves) / 2
    assert float(got.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    plain = sum(step(half)["loss"] for half in halves) / 2
    assert float(plain.detach()) != pytest.approx(float(whole.detach()), rel=1e-4)


def test_each_pair_takes_a_template_at_random() -> None:
    step = pair_step()
    prompts = 100 * torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(5))  # to matter without training
    shuffled = PairStep(step.model, step.text_embeddings, prompts=prompts, ignore_index=255)
    asked = torch.tensor([0, 1, 4, 6])
    batch = {"images": tiny_inputs(4)[0], "labels": tiny_labels(4), "class_index": asked}
    torch.manual_seed(3)
    drawn = torch.randint(4, (4,))
    assert len(set(drawn.tolist())) > 1
    torch.manual_seed(3)
    got = shuffled(batch)["loss"]
    rows = torch.zeros(7, 64)
    rows[asked] = prompts[drawn, asked]
    expected = PairStep(step.model, rows, ignore_index=255)(batch)["loss"]
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    others = PairStep(step.model, prompts[0], ignore_index=255)(batch)["loss"]
    assert float(others.detach()) != pytest.approx(float(expected.detach()), rel=1e-5)


def proposal_step(setting: str = "inductive") -> ProposalStep:
    torch.manual_seed(0)
    model = create_model("maft", start_layer=1, image_size=64, **VOCABULARY)
    text = tiny_inputs()[1]
    return ProposalStep(
        model, text, setting=setting, ignore_index=255, propose=connected_labels(255), clip_size=64
    ).train()


def maft_batch() -> dict[str, Tensor]:
    return {"images": tiny_inputs(2)[0], "labels": tiny_labels(2)}


def test_distillation_starts_at_nothing() -> None:
    """The teacher is the model as it was: no difference at first, one after a step, and it never trains."""
    step = proposal_step()
    terms = step(maft_batch())
    assert float(terms["loss_dis"].detach()) == pytest.approx(0, abs=1e-8)
    terms["loss"].backward()
    with torch.no_grad():
        for parameter in step.model.trainable().values():
            parameter -= 0.1 * parameter.grad.sign()
    assert step(maft_batch())["loss_dis"] > 0
    assert not any("teacher" in name for name, _ in step.named_parameters())


def test_inductive_maft_knows_the_seen_classes_alone() -> None:
    step = proposal_step()
    assert len(step.text_embeddings) == len(SEEN)
    batch = maft_batch()
    hidden = {**batch, "labels": torch.where(torch.isin(batch["labels"], torch.tensor(SEEN)), batch["labels"], 255)}
    assert torch.equal(step(batch)["loss"], step(hidden)["loss"])  # what is unseen might as well be unlabelled
    assert len(proposal_step("supervised").text_embeddings) == 7


def test_an_unlabelled_batch_trains_nothing_and_breaks_nothing() -> None:
    step = proposal_step()
    batch = {**maft_batch(), "labels": torch.full((2, 64, 64), 255)}
    loss = step(batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)


def test_a_proposers_own_classes_play_no_part_in_training() -> None:
    """Its class scores are for the ensemble of the test, and of other classes than those in training."""

    def propose(images: Tensor, labels: Tensor) -> Proposals:
        found = connected_labels(255)(images, labels)
        scores = torch.rand(*found.valid.shape, 4).softmax(-1)
        return usable(replace(found, class_scores=scores, class_names=("a", "b", "c")), images.device)

    torch.manual_seed(0)
    model = create_model("maft", start_layer=1, image_size=64, ensemble=0.8, **VOCABULARY)
    step = ProposalStep(
        model, tiny_inputs()[1], setting="inductive", ignore_index=255, propose=propose, clip_size=64
    ).train()
    assert torch.equal(step(maft_batch())["loss"], proposal_step()(maft_batch())["loss"])


def run_config(tmp_path: Path, method: str, **changes: object) -> TrainConfig:
    root = tiny_run.voc_tree(tmp_path / "VOC2012", side=192)  # tests of voc5i leave out small objects
    name, width = ("voc5i", 64) if method == "clsclip" else ("voc20", 32)
    text = tiny_run.text_file(tmp_path / "text.npy", 20, width)
    model = (
        {"nav_layers": [1], "decoder_width": 16, "decoder_ffn": 32}
        if method == "clsclip"
        else {"start_layer": 1, "image_size": 64}
    )
    data = {"name": name, "root": str(root), "recipe": method, "crop_size": 64, "workers": 0}
    data |= {"fold": 3} if method == "clsclip" else {}
    changes = {"text": {"embeddings": str(text)}, **changes}
    return tiny_run.config(tmp_path, method, model={"clip": CLIP, **model}, data=data, **changes)


def test_clsclip_trains_on_pairs(tmp_path: Path) -> None:
    schedule = {"kind": "cyclic_cosine", "cycles": 2, "min_lr": 1e-5}
    changes = {"iterations": None, "epochs": 4, "schedule": schedule, "checkpoint": {"every": 50}}
    config = run_config(tmp_path, "clsclip", **changes, validation={"every": 10, "metric": "miou", "limit": 3})
    result = train(config)
    found = losses(result.folder)
    assert np.mean(found[-5:]) < np.mean(found[:5])
    assert result.iterations == len(found) > 10 and result.best is not None
    assert weights.load(result.weights)[0].method == "clsclip"


def test_background_of_a_fold_needs_no_text(tmp_path: Path) -> None:
    """The file that `zs3fast eval` takes serves training too."""
    config = run_config(tmp_path, "clsclip")
    dataset = open_data(config)
    model = build_model(config, dataset)
    rows = text_embeddings(config, dataset, model)
    assert torch.equal(rows[:20], torch.from_numpy(np.load(tmp_path / "text.npy")).float()) and not rows[20].any()
    tiny_run.text_file(tmp_path / "text.npy", 21, 64)
    assert text_embeddings(config, dataset, model)[20].any()
    tiny_run.text_file(tmp_path / "text.npy", 19, 64)
    with pytest.raises(
        ValueError, match=r"text.embeddings: .*text.npy: expected a row for each of 21 classes of voc5i, got 19"
    ):
        text_embeddings(config, dataset, model)


def test_shuffled_templates_train(tmp_path: Path) -> None:
    """CLIPSeg's four sentences, by the text tower of the run's CLIP; its scores are of the method's own sentence."""
    safetensors.torch.save_file(tiny_clip().state_dict(), tmp_path / "clip.safetensors")
    words = {"shuffle": True}
    config = run_config(tmp_path, "clsclip", iterations=6, text=words)
    config = replace(config, model={**config.model, "pretrained": str(tmp_path / "clip.safetensors")})
    dataset = open_data(config)
    model = build_model(config, dataset)
    tokens = prompts(config, dataset, model)
    assert tokens.shape == (4, 21, 64)
    encoder = TextEncoder.from_open_clip(CLIP, str(tmp_path / "clip.safetensors"))
    expected = encoder.encode(["cow"], ["an image of a {}."], text_token=model.text_token)[0]
    # rows encoded in batches of different sizes agree to rounding: a matrix product may sum in another order
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(tokens[2, dataset.class_names.index("cow")], expected, **close)
    torch.testing.assert_close(text_embeddings(config, dataset, model), tokens[0], **close)
    step = build_step(config, dataset, model, tokens[0], torch.device("cpu"))
    assert torch.equal(step.prompts, tokens)
    assert len(losses(train(config).folder)) == 6
    with pytest.raises(ValueError, match="text.shuffle: expected false but for clsclip with its text tower"):
        text_embeddings(run_config(tmp_path, "maft", text=words), dataset, model)
    with pytest.raises(ValueError, match="text.shuffle: expected false but for clsclip with its text tower"):
        text_embeddings(replace(config, text=replace(config.text, embeddings="rows.npy")), dataset, model)


def test_maft_trains_on_proposals(tmp_path: Path) -> None:
    optimizer = {"lr": 1e-3, "no_decay": "norms", "clip_norm": 0.5}
    schedule = {"min_lr": 0.0, "warmup_iterations": 0}
    config = run_config(tmp_path, "maft", iterations=25, optimizer=optimizer, schedule=schedule)
    result = train(config)
    found = losses(result.folder)
    assert np.mean(found[-5:]) < np.mean(found[:5])
    model, _ = weights.load(result.weights)
    assert model.method == "maft" and model.class_names[0] == "aeroplane"


def test_proposers_are_looked_for_before_training(tmp_path: Path) -> None:
    config = run_config(tmp_path, "maft", proposals={"proposer": "mask2former:nowhere/at-all"})
    dataset = open_data(config)
    model = create_model("maft", clip=CLIP, num_classes=20, start_layer=1)
    with pytest.raises(ValueError, match="data.crop_size: .* expected 640, got 64"):
        build_step(config, dataset, model, torch.randn(20, 32), torch.device("cpu"))


@pytest.mark.parametrize(("setting", "told"), [("inductive", SEEN), ("supervised", list(range(7)))])
def test_inductive_training_tells_a_proposer_of_seen_classes_alone(monkeypatch, setting, told) -> None:
    """A proposer that is asked by class list gets the rows that training may know of."""
    lists: list[Tensor] = []

    class Listening:
        def for_vocabulary(self, text: Tensor):
            lists.append(text)
            return lambda pictures, names=None: None

    monkeypatch.setattr(proposing, "load_mask_proposer", lambda spec, device: Listening())
    config = replace(load_config("maft_voc20_inductive"), setting=setting)
    model, text = tiny_model("maft"), tiny_inputs()[1]
    common = {"ignore_index": 255, "precision": "fp32"}
    proposing.build_proposal_step(config, model, text, torch.device("cpu"), common)
    assert len(lists) == 1 and torch.equal(lists[0], text[told])


def test_self_training_of_maft_guesses_among_the_unseen() -> None:
    """Pixels of unseen classes take the best of them by A^c times mask; what they are is told to nobody."""
    step = proposal_step("transductive")
    model, batch = step.model, maft_batch()
    unseen = [c for c in range(7) if c not in SEEN]
    labels = batch["labels"]
    hidden = torch.isin(labels, torch.tensor(unseen))
    told = step._told(labels)
    assert set(told[hidden].tolist()) == {unseen[0]} and torch.equal(told[~hidden], labels[~hidden])
    proposals = step.propose(batch["images"], told)
    out = model(batch["images"], step.text_embeddings, proposals)
    guessed = model.pseudo_labels(out, labels)
    scores = torch.einsum("bqc,bqhw->bchw", out.proposal_logits.softmax(-1)[..., unseen], proposals.masks)
    expected = torch.where(hidden, torch.tensor(unseen)[scores.argmax(1)], labels)
    assert torch.equal(guessed, expected) and hidden.any() and set(guessed[hidden].tolist()) <= set(unseen)
    swapped = {**batch, "labels": torch.where(hidden, sum(unseen) - labels, labels)}  # the other unseen class
    assert torch.equal(step(batch)["loss"], step(swapped)["loss"]), "the loss knows which unseen class a pixel is"
    ignored = {**batch, "labels": torch.where(hidden, 255, labels)}
    assert not torch.equal(step(batch)["loss"], step(ignored)["loss"])


def test_pixels_without_a_proposal_get_no_pseudo_label() -> None:
    model = tiny_model("maft")
    images, text = tiny_inputs(1)
    masks = torch.zeros(1, 2, 64, 64)
    masks[0, 0, :, :32] = 1
    labels = torch.full((1, 64, 64), next(c for c in range(7) if c not in SEEN))
    guessed = model.pseudo_labels(model(images, text, masks), labels)
    assert (guessed[0, :, 40:] == 255).all() and not torch.isin(guessed[0, :, :24], torch.tensor([255, *SEEN])).any()
    everything = tiny_model("maft", seen=list(range(7)))
    assert everything.pseudo_labels(everything(images, text, masks), labels) is labels
