"""TagCLIP: the trusty token, its learner, its target and loss, and the ablation variants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zs3fast
from tests.goldens_data import relative
from tests.tiny import NUM_CLASSES, SEEN, tiny_inputs, tiny_labels, tiny_model
from zs3fast.labels import targets


def test_output_contract_and_published_number_of_live_weights() -> None:
    """Spec section 10: 9,091,328 parameters with a gradient on VOC."""
    model = zs3fast.create_model("tagclip", clip="ViT-B-16", num_prompts=10, seen=list(range(15)), num_classes=20)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 9_091_328
    model = tiny_model("tagclip")
    images, text = tiny_inputs()
    out = model(images, text)
    assert out.mask_logits.shape == (2, NUM_CLASSES, 4, 4) and out.trusty_logits.shape == (2, 1, 4, 4)


def test_token_init() -> None:
    """Xavier on [1, D] is what the official code gives whatever its flag: bound sqrt(6 / (D + 1))."""
    token = tiny_model("tagclip").trusty_token
    assert 0 < token.abs().max() <= (6 / 33) ** 0.5
    assert (tiny_model("tagclip", trusty_init="zeros").trusty_token == 0).all()
    uniform = tiny_model("tagclip", trusty_init="uniform01").trusty_token
    assert (uniform >= 0).all() and uniform.mean() > 0.3


def test_head_init_is_xavier_with_zero_biases_where_the_official_head_zeroes_them() -> None:
    model = tiny_model("tagclip")
    bound = (6 / (96 + 32)) ** 0.5
    weight = model.decoder.query_mixers[0].self_attn.in_proj_weight
    assert 0.9 * bound < weight.abs().max() <= bound
    assert (model.descriptor.q_proj.bias == 0).all()
    assert (model.decoder.query_mixers[0].self_attn.out_proj.bias == 0).all()
    assert not (model.decoder.layers[0].linear1.bias == 0).any()


def test_token_changes_the_maps_through_the_learner_only() -> None:
    images, text = tiny_inputs()
    for layout, same in (("n_n_n", True), ("a_n_n", False), ("a_a_a", False)):
        model = tiny_model("tagclip", layout=layout)
        before = model(images, text).mask_logits
        with torch.no_grad():
            model.trusty_token.mul_(-3)
        close = relative(model(images, text).mask_logits, before) < 1e-6
        assert close == same, layout


def test_permuting_classes_permutes_the_maps() -> None:
    model = tiny_model("tagclip")
    images, text = tiny_inputs()
    order = torch.randperm(NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    before, after = model(images, text), model(images, text[order])
    assert relative(after.mask_logits, before.mask_logits[:, order]) < 1e-5
    assert relative(after.trusty_logits, before.trusty_logits) < 1e-5


@pytest.mark.parametrize("offset", [0.1, 0.0])
@pytest.mark.parametrize("mode", ["both", "seen", "unseen", "off"])
def test_weighting_modes(mode: str, offset: float) -> None:
    model = tiny_model("tagclip", seen_offset=offset, trusty_weighting=mode)
    images, text = tiny_inputs()
    out = model(images, text)
    p = F.interpolate(out.mask_logits, size=(64, 64), mode="bilinear", align_corners=False).sigmoid()
    u = F.interpolate(out.trusty_logits, size=(64, 64), mode="bilinear", align_corners=False).sigmoid()
    scores = p.clone()
    for c in range(NUM_CLASSES):
        if c in SEEN:
            scores[:, c] = (p[:, c] - offset) * ((1 - u[:, 0]) if mode in ("both", "seen") else 1)
        elif mode in ("both", "unseen"):
            scores[:, c] = p[:, c] * u[:, 0]
    torch.testing.assert_close(model.class_scores(out, (64, 64)), scores, atol=1e-6, rtol=1e-5)
    labels = model.predict_labels(out, (64, 64))
    top = scores.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-6
    assert torch.equal(labels[clear], scores.argmax(1)[clear])


def test_weights_of_the_other_polarity_give_the_same_meaning() -> None:
    images, text = tiny_inputs()
    ours, other = tiny_model("tagclip"), tiny_model("tagclip", trusty_polarity="seen")
    assert torch.equal(ours(images, text).trusty_logits, -other(images, text).trusty_logits)


def test_trusty_target_is_unseen_in_unmapped_labels_and_zero_on_ignored() -> None:
    labels = torch.tensor([[[0, 3, 5, 255, 6]]])
    assert targets.unseen_pixels(labels, SEEN, NUM_CLASSES).tolist() == [[[False, True, True, False, False]]]
    assert not targets.unseen_pixels(labels, range(NUM_CLASSES), NUM_CLASSES).any()


def trusty_focal(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    z = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    p = z.sigmoid()
    focal = torch.where(target, 0.25 * (1 - p) ** 2 * F.softplus(-z), 0.75 * p**2 * F.softplus(z))
    return focal.mean((1, 2)).sum()


@pytest.mark.parametrize("target", ["unseen", "not_seen"])
@pytest.mark.parametrize("loss", ["focal", "dice"])
def test_trusty_loss(loss: str, target: str) -> None:
    model = tiny_model("tagclip", trusty_loss=loss, trusty_target=target)
    images, text = tiny_inputs()
    labels = tiny_labels()
    labels[1][(labels[1] == 3) | (labels[1] == 5)] = 0  # no unseen pixel in the second image: dice counts it still
    out = model(images, text[SEEN])
    unseen = (labels == 3) | (labels == 5)
    wanted = unseen | (labels == 255) if target == "not_seen" else unseen
    n = sum(len(set(image.unique().tolist()) & set(SEEN)) for image in labels)
    if loss == "focal":
        expected = trusty_focal(out.trusty_logits, wanted) / n
    else:
        # journal eq. 11-12 as printed: dice of M_A = P(seen) and G_A = 1 on seen, 0 on unseen, where both are defined
        p = F.interpolate(out.trusty_logits, size=(64, 64), mode="bilinear", align_corners=False)[:, 0].sigmoid()
        defined = torch.ones_like(wanted) if target == "not_seen" else labels != 255
        m, g = (1 - p) * defined, ~wanted & defined
        overlap, total = (m * g).sum((1, 2)), m.sum((1, 2)) + g.sum((1, 2))
        expected = (1 - (2 * overlap + 1) / (total + 1)).sum() / n
    losses = model.loss(out, labels)
    torch.testing.assert_close(losses["loss_trusty"], 10 * expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses["loss"], losses["loss_mask"] + losses["loss_dice"] + losses["loss_trusty"])


@pytest.mark.parametrize("polarity", ["unseen", "seen"])
def test_dice_of_the_trusty_map_is_the_papers(polarity: str) -> None:
    """It was dice of the complement: 1 with next to no gradient where no pixel is unseen, and 1/3 is right."""
    model = tiny_model("tagclip", trusty_loss="dice", trusty_polarity=polarity)
    labels = torch.full((1, 64, 64), SEEN[0])
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)  # P(seen) = P(unseen) = 1/2, whatever the polarity
    none = torch.zeros_like(labels, dtype=torch.bool)
    loss = model._trusty_term(logits, none, none, torch.tensor(1.0))
    pixels = labels.numel()
    assert loss.item() == pytest.approx(1 - (pixels + 1) / (1.5 * pixels + 1), abs=1e-6)
    loss.backward()
    assert (logits.grad > 0).all()  # towards "not unseen"
    half = none.clone()
    half[:, :32] = True
    assert model._trusty_term(logits, half, none, torch.tensor(1.0)).item() == pytest.approx(0.5, abs=1e-3)
    assert model._trusty_term(logits, none, half, torch.tensor(1.0)).item() == pytest.approx(1 / 3, abs=1e-3)


def test_class_prediction_weighs_the_masks() -> None:
    images, text = tiny_inputs()
    plain = tiny_model("tagclip").eval()
    model = tiny_model("tagclip", class_prediction=True).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        out, before = model(images, text), plain(images, text)
    product = torch.sigmoid(out.class_logits)[..., None, None]
    masks = torch.cat([before.mask_logits, before.trusty_logits], 1).sigmoid()
    got = torch.cat([out.mask_logits, out.trusty_logits], 1).sigmoid()
    torch.testing.assert_close(got, product * masks, rtol=1e-5, atol=1e-6)
    assert before.class_logits is None and out.class_logits.shape == (2, NUM_CLASSES + 1)

    model.train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    labels = tiny_labels()
    out = model(images, text[SEEN])
    losses = model.loss(out, labels)
    present = torch.tensor([[float((image == c).any()) for c in SEEN] for image in labels])
    unseen = torch.tensor([[float(((image == 3) | (image == 5)).any())] for image in labels])
    expected = F.binary_cross_entropy_with_logits(out.class_logits, torch.cat([present, unseen], 1))
    torch.testing.assert_close(losses["loss_cls"], expected)
    losses["loss"].backward()
    assert model.class_prediction.weight.grad.abs().sum() > 0
    last = model.decoder.layers[-1]
    assert all(p.grad.abs().sum() > 0 for p in (last.multihead_attn.v.weight, last.linear2.weight))


@pytest.mark.parametrize("polarity", ["unseen", "seen"])
@pytest.mark.parametrize("target", ["unseen", "not_seen"])
def test_the_token_s_class_is_what_its_map_marks(polarity: str, target: str) -> None:
    """Its target was "an unseen class is there" whatever the map was trained to mark."""
    model = tiny_model("tagclip", class_prediction=True, trusty_polarity=polarity, trusty_target=target, dropout=0.0)
    images, text = tiny_inputs(4)
    out = model.train()(images, text[SEEN])
    labels = torch.full((4, 64, 64), 3)  # the first image: an unseen class alone
    labels[1] = 0  # a seen class alone
    labels[2, :9], labels[2, 9:] = 255, 0
    labels[3] = 255
    unseen = {"unseen": [1, 0, 0, 0], "not_seen": [1, 0, 1, 1]}[target]
    marked = torch.tensor(unseen if polarity == "unseen" else [0, 1, 1, 0]).float()
    present = torch.tensor([[float((image == c).any()) for c in SEEN] for image in labels])
    expected = F.binary_cross_entropy_with_logits(out.class_logits, torch.cat([present, marked[:, None]], 1))
    torch.testing.assert_close(model.loss(out, labels)["loss_cls"], expected)


@pytest.mark.parametrize("polarity", ["unseen", "seen"])
@pytest.mark.parametrize("target", ["unseen", "not_seen"])
@pytest.mark.parametrize("case", ["mixed", "no unseen", "no seen", "all ignored", "one pixel"])
def test_dice_of_the_trusty_map_as_printed(polarity: str, target: str, case: str) -> None:
    """Journal eq. 11-12 written out: dice of P(seen) against 1 on seen pixels, the ignored in no sum."""
    model = tiny_model("tagclip", trusty_loss="dice", trusty_polarity=polarity, trusty_target=target, dropout=0.0)
    images, text = tiny_inputs()
    labels = tiny_labels()
    if case == "no unseen":
        labels[(labels == 3) | (labels == 5)] = 6
    elif case == "no seen":
        labels[labels != 255] = 5
    elif case == "all ignored":
        labels[1] = 255
    elif case == "one pixel":
        labels[:] = 255
        labels[0, 5, 7], labels[1, 60, 2] = 2, 3
    out = model.train()(images, text[SEEN])
    raw = -out.trusty_logits if polarity == "seen" else out.trusty_logits  # the channel as it is trained
    full = F.interpolate(raw.double(), size=(64, 64), mode="bilinear", align_corners=False)[:, 0].sigmoid()
    seen = full if polarity == "seen" else 1 - full  # M_A
    total = torch.zeros((), dtype=torch.float64)
    for probability, label in zip(seen, labels):
        truth = torch.isin(label, torch.tensor(SEEN)).double()  # G_A
        counted = torch.ones_like(truth) if target == "not_seen" else (label != 255).double()
        overlap = (probability * truth * counted).sum()
        total = total + 1 - (2 * overlap + 1) / ((probability * counted).sum() + (truth * counted).sum() + 1)
    pairs = sum(len(set(label.unique().tolist()) & set(SEEN)) for label in labels)
    expected = 10 * total / max(pairs, 1)
    losses = model.loss(out, labels)
    torch.testing.assert_close(losses["loss_trusty"].double(), expected, rtol=2e-5, atol=2e-5)
    losses["loss_trusty"].backward()
    assert model.trusty_token.grad.isfinite().all()


def test_separate_and_merged_agree_when_inductive_and_differ_in_self_training() -> None:
    images, text = tiny_inputs()
    labels = tiny_labels()
    separate, merged = tiny_model("tagclip"), tiny_model("tagclip", unseen_labels="merged")
    inductive = [m.loss(m(images, text[SEEN]), labels)["loss"] for m in (separate, merged)]
    assert torch.equal(*inductive)
    out = separate(images, text)
    filled = separate._training_labels(out, labels, "transductive", NUM_CLASSES, 255)
    emptied = merged._training_labels(out, labels, "transductive", NUM_CLASSES, 255)
    unseen = targets.unseen_pixels(labels, SEEN, NUM_CLASSES)
    assert set(filled[unseen].tolist()) <= {3, 5} and (emptied[unseen] == 255).all()
    assert torch.equal(filled[~unseen], labels[~unseen]) and torch.equal(emptied[~unseen], labels[~unseen])


def test_without_the_token_there_is_no_trusty_map_and_no_trusty_loss() -> None:
    model = tiny_model("tagclip", trusty_token=False)
    images, text = tiny_inputs()
    out = model(images, text[SEEN])
    assert out.trusty_logits is None
    assert set(model.loss(out, tiny_labels())) == {"loss_mask", "loss_dice", "loss"}


VARIANTS = [
    "s_q",
    "q",
    "identity",
    "qmscq",
    "attn:q_s_s",
    "attn:qms_q_qmscq",
    "attn:qcs_qcs_qcs",
    "self_attn:qmscq",
    "self_attn:qms",
    "attn_cat:qms_s_q",
]


@pytest.mark.parametrize("descriptor", VARIANTS)
def test_descriptor_ablations_train_and_do_not_depend_on_class_order(descriptor: str) -> None:
    model = tiny_model("tagclip", layout="n_n_n", descriptor=descriptor)
    images, text = tiny_inputs()
    order = torch.randperm(NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    assert relative(model(images, text[order]).mask_logits, model(images, text).mask_logits[:, order]) < 1e-5
    model.train().loss(model(images, text[SEEN]), tiny_labels())["loss"].backward()
    silent = {name for name, p in model.descriptor.named_parameters() if p.grad is None}
    assert not silent
    rebuilt = zs3fast.create_model(**model.config)
    rebuilt.load_state_dict(model.state_dict())


def test_learnable_descriptor_is_closed_set() -> None:
    model = tiny_model("tagclip", descriptor="learnable", trusty_token=False)
    images, text = tiny_inputs()
    assert model(images, text).mask_logits.shape[1] == NUM_CLASSES
    with pytest.raises(ValueError, match="text_embeddings: expected the learnable descriptor's 7 classes, got 3"):
        model(images, text[:3])
    with pytest.raises(ValueError, match="trusty_token: expected False for descriptor 'learnable'"):
        tiny_model("tagclip", descriptor="learnable")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "a_b"}, "layout: expected letters a and n joined by '_', got 'a_b'"),
        ({"layout": None}, "layout: expected letters a and n joined by '_', got None"),
        ({"trusty_weighting": "true"}, "trusty_weighting: expected one of both, seen, unseen, off, got 'true'"),
        ({"trusty_loss": "tversky"}, "trusty_loss: expected one of focal, dice"),
        ({"trusty_init": "rand"}, "trusty_init: expected one of xavier, zeros, uniform01"),
        ({"trusty_polarity": "x"}, "trusty_polarity"),
        ({"unseen_labels": "x"}, "unseen_labels"),
        ({"trusty_target": "x"}, "trusty_target"),
        ({"descriptor": "attn:q_s"}, "descriptor: unknown 'attn:q_s'"),
        ({"descriptor": "qxs"}, "descriptor: unknown 'qxs'"),
        ({"descriptor": "attn_cat:qmscq_q_q"}, "expected inputs of width D for attn_cat"),
    ],
)
def test_bad_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model("tagclip", **options)
