"""MAFT: parity with the official implementation, the invariants of its encoder, labels, errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import zs3fast
from bench.baselines.maft import OfficialIPCLIP, label_map
from tests.goldens_data import HEADS, Golden, golden_files, relative
from tests.tiny import tiny_model
from zs3fast.labels.proposal_targets import class_masks, soft_iou
from zs3fast.models.maft import as_proposals
from zs3fast.types import Proposals
from zs3fast.weights import CheckpointError, official_keys

FILES = golden_files("maft")
goldens = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
START = 2


def load(golden: Golden) -> torch.nn.Module:
    classes = len(golden["input/text_embeddings"]) - 1
    return zs3fast.load_official(golden.group("weight"), heads=HEADS, start_layer=START, num_classes=classes)


def inputs(golden: Golden) -> tuple[Tensor, Tensor, Tensor]:
    return golden["input/image"], golden["input/text_embeddings"], golden["input/proposal_masks"].float()


def tiny(**options: object) -> torch.nn.Module:
    return tiny_model("maft", image_size=96, **options)


def masks_of(batch: int, count: int, size: tuple[int, int] = (96, 96), seed: int = 3) -> Tensor:
    """Soft blobs, one of them empty, one full."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, count, 5, 5, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    masks[:, 0] = 0
    masks[:, -1] = 1
    return masks


def pictures(batch: int = 2, size: tuple[int, int] = (96, 96)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def text(classes: int = 7) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(classes, 32, generator=torch.Generator().manual_seed(2)), dim=-1)


@goldens
def test_outputs_are_the_official_ones(path: Path) -> None:
    golden = Golden(path)
    model, (images, embeddings, masks) = load(golden), inputs(golden)
    assert model.method == "maft" and not model.training
    with torch.no_grad():
        assert relative(model.proposal_embeddings(images, masks), golden["eval/proposal_embeddings"]) < 1e-5
        assert relative(model.image_embedding(images), golden["eval/image_embedding"]) < 1e-5
        out = model(images, embeddings, masks)
    assert relative(out.proposal_embeddings, golden["eval/proposal_embeddings"]) < 1e-5
    assert relative(out.proposal_logits, golden["eval/proposal_logits"][..., :-1]) < 1e-5
    probabilities = golden["eval/proposal_logits"][..., :-1].softmax(-1)
    assert (model.class_weights(out.proposal_logits, out.proposals) - probabilities).abs().max() < 1e-4


@goldens
def test_losses_and_gradients_are_the_official_ones(path: Path) -> None:
    golden = Golden(path)
    model, (images, embeddings, masks) = load(golden).train(), inputs(golden)
    model.loss_weights = {"ma": 1.0, "dis": 1.0}  # the goldens' sum; the default is the released code's 0.1
    gt_masks, gt_labels = golden["input/gt_masks"], golden["input/gt_labels"]
    for image in range(len(images)):
        rows = slice(image * gt_masks.shape[1], (image + 1) * gt_masks.shape[1])
        assert relative(soft_iou(masks[image], gt_masks[image]), golden["train/iou"][rows]) < 1e-5
    losses = model.loss(model(images, embeddings, masks), gt_masks, gt_labels, golden["input/teacher_embedding"])
    assert relative(losses["loss_ma"], golden["train/ma_loss"]) < 1e-5
    assert relative(losses["loss_dis"], golden["train/dis_loss"]) < 1e-5
    losses["loss"].backward()
    official = official_keys(model)
    expected, got = golden.group("grad"), {official[name]: p.grad for name, p in model.trainable().items()}
    assert got.keys() == expected.keys(), "other parameters train than the official recipe's"
    scale = max(grad.norm() for grad in expected.values())
    for key, grad in expected.items():
        assert (got[key] - grad).norm() < 1e-4 * max(grad.norm(), 1e-2 * scale), key


def test_default_weights_are_those_of_the_released_code() -> None:
    assert tiny().loss_weights == {"ma": 1.0, "dis": 0.1}


@goldens
def test_the_joint_form_agrees(path: Path) -> None:
    """The baseline of the benchmarks is the official structure: one attention over all tokens with a bool mask."""
    golden = Golden(path)
    images, _, masks = inputs(golden)
    joint = OfficialIPCLIP(grid=4, patch_size=16, width=48, layers=4, heads=HEADS, embed_dim=32, start_layer=START)
    weights = golden.group("weight")
    joint.load_state_dict({key.removeprefix("IPCLIP."): value for key, value in weights.items()}, strict=True)
    with torch.no_grad():
        assert relative(joint(images, masks), golden["eval/proposal_embeddings"]) < 1e-5
        assert relative(joint(images), golden["eval/image_embedding"]) < 1e-5


@goldens
def test_parts_of_a_whole_checkpoint(path: Path) -> None:
    """Released files hold the generator and frozen copies of CLIP as well; what is missing or odd is named."""
    state = Golden(path).group("weight")
    whole = {
        **state,
        **{key.replace("IPCLIP.", "T."): value for key, value in state.items()},
        "clip_adapter.clip_model.visual.proj": state["IPCLIP.proj"],
        "criterion.empty_weight": torch.ones(10),
        "sem_seg_head.predictor.query_feat.weight": torch.ones(2, 2),
    }
    model = zs3fast.load_official({"model": whole}, heads=HEADS, start_layer=START)
    assert torch.equal(model.encoder.proj, state["IPCLIP.proj"]) and model.image_size == 480
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): IPCLIP.odd"):
        zs3fast.load_official({**whole, "IPCLIP.odd": torch.ones(1)}, heads=HEADS, start_layer=START)
    with pytest.raises(CheckpointError, match=r"missing \(1\): IPCLIP.ln_post.bias"):
        zs3fast.load_official(
            {k: v for k, v in whole.items() if k != "IPCLIP.ln_post.bias"}, heads=HEADS, start_layer=2
        )
    with pytest.raises(ValueError, match="start_layer: expected 0..3"):
        zs3fast.load_official(state, heads=HEADS)  # 8 of the released towers


def test_labels_are_the_argmax_of_scores_on_each_image_s_own_frame() -> None:
    model = tiny()
    logits = torch.randn(2, 9, 24, 24, generator=torch.Generator().manual_seed(4)) * 4
    proposals = Proposals(
        mask_logits=logits,
        masks=None,
        valid=torch.ones(2, 9, dtype=torch.bool),
        padded_size=(96, 96),
        image_sizes=((96, 80), (64, 96)),
        original_sizes=((48, 40), (32, 48)),
        align_corners=True,
    )
    with torch.no_grad():
        out = model(pictures(), text(), proposals)
        scores, labels = model.class_scores(out, (50, 60)), model.predict_labels(out, (50, 60))
        details = model.label_details(out, (50, 60))
    assert scores.shape == (2, 7, 50, 60) and out.mask_logits.shape == (2, 7, 6, 6)
    assert torch.equal(labels, scores.argmax(1)) and torch.equal(details[0].long(), labels)
    torch.testing.assert_close(details[1], scores.amax(1), rtol=1e-5, atol=1e-6)
    weights = model.class_weights(out.proposal_logits, proposals)
    for i in range(2):
        expected = label_map(weights[i], logits[i], (96, 96), proposals.image_sizes[i], (50, 60))
        assert (labels[i] == expected).float().mean() > 0.999


def test_soft_masks_and_their_logits_agree() -> None:
    model, logits = tiny(), torch.randn(2, 5, 24, 24, generator=torch.Generator().manual_seed(5)) * 4
    soft = torch.nn.functional.interpolate(logits, (96, 96), mode="bilinear", align_corners=True).sigmoid()
    given = as_proposals(soft, 2)
    lazy = dataclasses.replace(given, masks=None, mask_logits=logits, align_corners=True)
    with torch.no_grad():
        a, b = model(pictures(), text(), given), model(pictures(), text(), lazy)
        assert relative(b.proposal_logits, a.proposal_logits) < 1e-5
        assert (model.predict_labels(a, (70, 90)) == model.predict_labels(b, (70, 90))).float().mean() > 0.999


def test_seen_offset_is_taken_off_at_the_end() -> None:
    model = tiny(seen_offset=0.1)
    with torch.no_grad():
        out = model(pictures(), text(), masks_of(2, 6))
        model.seen_offset = 0.0
        plain = model.class_scores(out, (40, 40))
        model.seen_offset = 0.1
        plain[:, model.seen] -= 0.1
        torch.testing.assert_close(model.class_scores(out, (40, 40)), plain, rtol=1e-5, atol=1e-5)
        assert (model.predict_labels(out, (40, 40)) == plain.argmax(1)).float().mean() > 0.999


def test_padding_rows_do_not_speak() -> None:
    model, masks = tiny(), masks_of(2, 6)
    one = as_proposals(masks, 2)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[:, 6:] = False
    padded = dataclasses.replace(one, masks=torch.cat([masks, torch.rand(2, 2, 96, 96)], 1), valid=valid)
    with torch.no_grad():
        a, b = model(pictures(), text(), one), model(pictures(), text(), padded)
        assert torch.equal(model.predict_labels(a, (40, 40)), model.predict_labels(b, (40, 40)))


def test_ensemble_uses_the_proposer_s_scores_and_the_usable_masks() -> None:
    model = tiny(ensemble=0.8)
    masks = masks_of(2, 6)
    own = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(6)).softmax(-1)
    proposals = dataclasses.replace(as_proposals(masks, 2), class_scores=own)
    with torch.no_grad():
        out = model(pictures(), text(), proposals)
    got, clip = model.class_weights(out.proposal_logits, proposals), out.proposal_logits.softmax(-1)
    clip[:, 0] = 1  # the empty mask
    is_seen = torch.tensor([c in model.seen for c in range(7)])
    share = torch.where(is_seen, 0.8, 0.2)
    torch.testing.assert_close(got, own[..., :-1] ** share * clip ** (1 - share))
    with pytest.raises(ValueError, match="proposals: expected class_scores of 8 columns, got 5"):
        model(pictures(), text(), dataclasses.replace(proposals, class_scores=own[..., :5]))


def test_a_training_step_moves_what_trains_and_nothing_else() -> None:
    model = tiny().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=1e-3)
    labels = torch.randint(0, 7, (2, 96, 96), generator=torch.Generator().manual_seed(7))
    gt_masks, gt_labels = class_masks(labels, 7)
    with torch.no_grad():
        teacher = tiny().image_embedding(pictures())
    losses = model.loss(model(pictures(), text(), masks_of(2, 6)), gt_masks, gt_labels, teacher)
    assert losses["loss_dis"] < 1e-10 < losses["loss_ma"]  # the student still is its teacher
    losses["loss"].backward()
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(model.trainable())
    assert not any(part in name for name in moved for part in ("conv1", "mlp", "encoder.proj", "ln_pre", "embedding"))


def test_no_ground_truth_is_no_loss() -> None:
    model = tiny().train()
    out = model(pictures(), text(), masks_of(2, 6))
    losses = model.loss(out, torch.zeros(2, 0, 96, 96), torch.zeros(2, 0, dtype=torch.int64))
    assert losses["loss"] == 0
    losses["loss"].backward()


def test_compiles_and_exports() -> None:
    model = tiny()

    class Pipeline(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor, embeddings: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
            out = self.model(images, embeddings, masks)
            return out.proposal_embeddings, self.model.predict_labels(out, (64, 80))

    args = pictures(), text(), masks_of(2, 6)
    with torch.no_grad():
        embeddings, labels = Pipeline()(*args)
        torch._dynamo.reset()
        for run in (torch.compile(Pipeline(), fullgraph=True), torch.export.export(Pipeline(), args).module()):
            got_embeddings, got_labels = run(*args)
            assert relative(got_embeddings, embeddings) < 1e-5
            assert (got_labels == labels).float().mean() > 0.999


def test_half_precision() -> None:
    model, args = tiny(), (pictures(), text(), masks_of(2, 6))
    with torch.no_grad():
        expected = model(*args).proposal_embeddings
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(model(*args).proposal_embeddings.float(), expected) < 0.05
        half = tiny().bfloat16()
        out = half(args[0].bfloat16(), args[1].bfloat16(), args[2])
        assert out.proposal_embeddings.dtype == torch.bfloat16
        assert relative(out.proposal_embeddings.float(), expected) < 0.05


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.rand(3, 4, 96, 96), r"proposals: expected masks \[B, Nq, H, W\] with B = 2, got \[3, 4, 96, 96\]"),
        (torch.rand(2, 96, 96), r"proposals: expected masks \[B, Nq, H, W\] with B = 2"),
        (torch.rand(2, 0, 96, 96), "proposals: expected at least one, got none"),
        (torch.full((2, 4, 96, 96), float("nan")), "proposals: the masks hold NaN"),
        (torch.full((2, 4, 96, 96), 3.0), r"proposals: soft masks are in 0..1, got 3..3; logits go in mask_logits"),
    ],
)
def test_masks_that_cannot_be(masks: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(pictures(), text(), masks)


def test_targets_that_cannot_be() -> None:
    model = tiny().train()
    out = model(pictures(), text(), masks_of(2, 6))
    with pytest.raises(ValueError, match=r"gt_masks: expected \[B, G, Hp, Wp\] with B = 2 on the proposals' frame"):
        model.loss(out, torch.zeros(2, 1, 48, 48), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"gt_labels: expected classes 0..6 or -1 \(none\), got 9..9"):
        model.loss(out, torch.zeros(2, 1, 96, 96), torch.full((2, 1), 9))
    with pytest.raises(ValueError, match="gt_labels: expected integers"):
        model.loss(out, torch.zeros(2, 1, 96, 96), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="out: expected an output of train mode for distillation"):
        evaluated = model.eval()(pictures(), text(), masks_of(2, 6))
        model.loss(evaluated, torch.zeros(2, 1, 96, 96), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 32))
    with pytest.raises(TypeError, match="proposals: expected Proposals or a tensor"):
        model(pictures(), text(), None)
    with pytest.raises(ValueError, match="ensemble: expected a share in 0..1, got 1.5"):
        tiny(ensemble=1.5)


def test_binary_masks_count_as_soft_ones() -> None:
    model, binary = tiny(), masks_of(2, 6) > 0.5
    with torch.no_grad():
        soft = model.proposal_embeddings(pictures(), binary.float())
        assert torch.equal(model.proposal_embeddings(pictures(), binary), soft)
        given = dataclasses.replace(as_proposals(binary.float(), 2), masks=binary)
        assert torch.equal(model(pictures(), text(), given).proposal_embeddings, soft)


def test_a_list_of_one_class_more_is_a_list() -> None:
    """Only the direct call takes the row behind the vocabulary for "no object", as official checkpoints have it."""
    model, masks = tiny(), masks_of(2, 6)
    with torch.no_grad():
        assert model(pictures(), text(8), masks).proposal_logits.shape[-1] == 7
        asked = model(pictures(), text(8), masks, non_object=False)
        assert asked.proposal_logits.shape[-1] == 8
        fewer = model(pictures(), text(8), masks, non_object=True)
    torch.testing.assert_close(fewer.proposal_logits, asked.proposal_logits[..., :7])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_sizes": ((96, 96),)}, "proposals: expected image_sizes of 2 images, as masks, got 1"),
        ({"image_sizes": ((96, 96),) * 3}, "proposals: expected image_sizes of 2 images, as masks, got 3"),
        ({"valid": torch.ones(2, 3, dtype=torch.bool)}, r"proposals: expected valid \[2, 6\], got \[2, 3\]"),
        ({"padded_size": (64, 64)}, r"proposals: expected masks of padded_size \[64, 64\], got \[96, 96\]"),
        ({"mask_logits": torch.zeros(2, 6, 24, 24)}, "proposals: expected mask_logits or masks, got both"),
        ({"class_scores": torch.full((2, 6, 5), 0.2)}, "proposals: expected class_scores of 8 columns, got 5"),
    ],
)
def test_proposals_that_do_not_fit_together(changes: dict[str, object], message: str) -> None:
    given = dataclasses.replace(as_proposals(masks_of(2, 6), 2), **changes)
    with pytest.raises(ValueError, match=message):
        tiny()(pictures(), text(), given)


def test_logits_are_exact_in_half_precision() -> None:
    """100 * cosine is rounded nowhere but in the embeddings; a zero embedding is no NaN."""
    model = tiny().half()
    proposals = as_proposals(masks_of(1, 3).half(), 1)
    rows = torch.tensor([[0, 1]])
    with torch.no_grad():
        out = model.classify_crops(pictures(1, (64, 64)).half(), rows, text().half(), proposals)
    exact = torch.nn.functional.normalize(out.proposal_embeddings[0, 1].float(), dim=-1)
    exact = 100 * exact @ torch.nn.functional.normalize(text().half().float(), dim=-1).t()
    assert out.proposal_logits.dtype == torch.float32 and out.proposal_logits.isfinite().all()
    assert (out.proposal_logits[0, 1] - exact).abs().max() < 1e-3
    assert (out.proposal_logits[0, 0] == 0).all(), "all classes alike"


def test_losses_of_table_4b_and_equation_5() -> None:
    """Each by its formula; eq. 5 stretches over all classes, the official code every class's row for itself."""
    generator = torch.Generator().manual_seed(5)
    masks = masks_of(1, 6)
    gt_masks = torch.zeros(1, 2, 96, 96, dtype=torch.bool)
    gt_masks[:, 0, :48], gt_masks[:, 1, 40:] = True, True
    gt_labels = torch.tensor([[3, 5]])
    rows = soft_iou(masks[0], gt_masks[0])
    embeddings = torch.randn(1, 6, 32, generator=generator)
    for iou_range, low, high in (("class", rows.amin(1, True), rows.amax(1, True)), ("all", rows.min(), rows.max())):
        wanted = (rows - low) / (high - low + 1e-8)
        for name in ("l1", "l2", "smooth_l1", "kl"):
            model = tiny(ma_loss=name, iou_range=iou_range)
            out = model(pictures(1), text(), masks)
            out = dataclasses.replace(out, proposal_logits=embeddings @ text().t())
            got = model.loss(out, gt_masks, gt_labels)["loss_ma"]
            predicted = out.proposal_logits.softmax(-1)[0, :, [3, 5]].t()
            difference = (predicted - wanted).abs()
            p, w = (x / x.sum(1, keepdim=True) for x in (predicted, wanted))
            expected = {
                "l1": difference.mean(),
                "l2": difference.square().mean(),
                "smooth_l1": difference.square().mean() / 2,
                "kl": (w * (w.clamp_min(1e-30).log() - p.log())).sum(1).mean(),
            }[name]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=f"{name} {iou_range}")


@pytest.mark.parametrize("freeze", [(), ("cls",), ("cls", "pos"), ("cls", "pos", "mlp", "conv"), None])
def test_units_that_are_frozen(freeze: tuple[str, ...] | None) -> None:
    model = tiny(freeze=freeze)
    units = {
        "cls": "class_embedding",
        "pos": "positional_embedding",
        "mlp": ".mlp.",
        "conv": "conv1",
        "proj": "encoder.proj",
    }
    frozen = tuple(units) if freeze is None else freeze
    for name, parameter in model.named_parameters():
        unit = next((key for key, part in units.items() if part in name), "conv" if "ln_pre" in name else None)
        assert parameter.requires_grad is (unit not in frozen), name
    assert model.config["freeze"] == (None if freeze is None else list(freeze))
    trained = sum(p.numel() for p in model.trainable().values())
    assert trained == sum(p.numel() for p in zs3fast.create_model(**model.config).trainable().values())


def test_units_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="freeze: expected one of cls, pos, mlp, conv, proj, got 'head'"):
        tiny(freeze=["cls", "head"])
    with pytest.raises(ValueError, match="ma_loss: expected one of smooth_l1, l1, l2, kl, got 'l3'"):
        tiny(ma_loss="l3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "cls"}, "freeze: expected a list of cls, pos, mlp, conv, proj, got 'cls'"),
        ({"freeze": 3}, "freeze: expected a list of cls, pos, mlp, conv, proj, got 3"),
        ({"ensemble": "x"}, "ensemble: expected a share in 0..1, got 'x'"),
        ({"ensemble": True}, "ensemble: expected a share in 0..1, got True"),
        ({"ensemble": float("nan")}, "ensemble: expected a share in 0..1, got nan"),
        ({"start_layer": 1.5}, "start_layer: expected 0..2 for a tower of 3 layers, got 1.5"),
        ({"start_layer": "1"}, "start_layer: expected 0..2 for a tower of 3 layers, got '1'"),
    ],
    ids=str,
)
def test_options_of_the_wrong_type(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)
