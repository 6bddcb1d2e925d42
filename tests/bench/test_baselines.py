"""The baselines compute what the official implementations compute: goldens made with those."""

from __future__ import annotations

import pytest
import torch

from bench import contenders
from bench.baselines import OFFICIAL
from bench.baselines.clip_rc import region_mask
from bench.setting import Setting, make_inputs
from tests.goldens_data import HEADS, SEEN, Golden, golden_files, relative

TINY = dict(
    seen=SEEN,
    num_prompts=3,
    image_size=64,
    width=48,
    layers=3,
    heads=HEADS,
    embed_dim=32,
    decoder_heads=HEADS,
    dropout=0.0,
)
FILES = [(method, path) for method in OFFICIAL for path in golden_files(method)]


@pytest.fixture(params=FILES, ids=[path.stem for _, path in FILES])
def case(request):
    method, path = request.param
    golden = Golden(path)
    weights = golden.group("weight")
    sizes = {"regions": len(weights["backbone.region_level_bridge"])} if method == "clip_rc" else {}
    model = OFFICIAL[method](**TINY, **sizes)
    model.load_state_dict(weights, strict=True)
    return method, model, golden


def test_every_method_has_a_golden():
    assert {method for method, _ in FILES} == set(OFFICIAL)


def test_inference_is_the_official_one(case):
    method, model, golden = case
    model.eval()
    images, text = golden["input/image"], golden["input/text_embeddings"]
    with torch.no_grad():
        names = ("global_token", "patch_map", "region_map")
        for name, tokens in zip(names, model.backbone(images)):
            assert relative(tokens, golden[f"eval/{name}"]) < 1e-5, name
        logits = model(images, text)
        assert relative(logits, golden["eval/mask_logits"]) < 1e-5
        if method == "tagclip":
            assert relative(model.class_scores(logits), golden["eval/scores_trusty"]) < 1e-5
            model.trusty_weighting = "off"
        assert relative(model.class_scores(logits), golden["eval/scores"]) < 1e-5
        top = golden["eval/scores"].topk(2, dim=1).values
        clear = top[:, 0] - top[:, 1] > 1e-5
        labels = model.predict_labels(images, text)
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear], golden["eval/labels"][clear])


def test_losses_and_gradients_are_the_official_ones(case):
    _, model, golden = case
    model.train()
    losses = model.losses(golden["input/image"], golden["input/text_embeddings"], golden["input/label"])
    expected = golden.group("train")
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert relative(losses[name].detach(), value) < 1e-5, name
    losses["total"].backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = golden.group("grad")
    assert {n for n, g in gradients.items() if g.any()} == {n for n, g in expected.items() if g.any()}
    for name, value in expected.items():
        weight = expected.get(name.replace("k.bias", "k.weight"))
        if name.endswith("k.bias") and value.norm() < 1e-5 * weight.norm():
            # a shift of all keys moves no softmax: the true gradient is zero, what is there is rounding
            assert gradients[name].norm() < 1e-5 * weight.norm(), name
        else:
            assert relative(gradients[name], value) < 1e-5, name


def test_mask_has_the_live_pairs_and_no_others():
    """(1 + K + N)^2 + 2 N + M where windows cover the grid; margins see no region; no row is empty."""
    for side, regions_side in ((4, 1), (4, 2), (4, 4), (8, 2)):
        patches, regions = side**2, regions_side**2
        live = (region_mask(4, side, regions_side) == 0).sum()
        assert live == (4 + patches) ** 2 + 2 * patches + regions
    mask = region_mask(1, 5, 2)  # windows of 2 x 2, the last row and column left over
    assert torch.equal(mask, mask.t()) and (mask == 0).any(dim=1).all()
    assert (mask[1:26, 26:] == 0).sum(1).reshape(5, 5).tolist() == [[1, 1, 1, 1, 0]] * 4 + [[0] * 5]


@pytest.mark.parametrize(
    "method, head, trainable",
    [
        ("zegclip", 13_136_896, 13_821_184),
        ("tagclip", 11_036_160, 11_720_448),
        ("clip_rc", 36_257_280, 36_941_568),
    ],
)
def test_parameter_counts_are_the_published_ones(method, head, trainable):
    with torch.device("meta"):
        model = OFFICIAL[method](seen=range(15))
    regions = 16 * 768 if method == "clip_rc" else 0
    assert sum(p.numel() for p in model.backbone.parameters()) == 87_512_832 + regions
    assert sum(p.numel() for p in model.decode_head.parameters()) == head
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_clip_rc_has_the_tensors_of_the_official_checkpoint():
    """496 tensors and 187,210,496 values with the text tower's 149 and 63,428,096; no mask, no loss buffers."""
    with torch.device("meta"):
        state = OFFICIAL["clip_rc"](seen=range(15)).state_dict()
    assert len(state) + 149 == 496
    assert sum(t.numel() for t in state.values()) + 63_428_096 == 187_210_496


@pytest.mark.parametrize("method", ["maft", "clsclip"])
def test_maft_s_and_clsclip_s_structures_give_our_scores(method):
    """Their encoders are held to the official goldens and equations with the models; this is image to labels."""
    setting = Setting(method, 7, batch=2).tiny()
    baseline = contenders.make_baseline(setting)
    ours = contenders.make_ours(setting, baseline.state_dict())
    images, text, *more = make_inputs(setting)
    with torch.no_grad():
        if method == "maft":  # what all proposals of a random network share must not decide
            shared = torch.nn.functional.normalize(ours(images, text, *more).proposal_embeddings.mean((0, 1)), dim=0)
            text = text - (text @ shared).unsqueeze(1) * shared
        out = ours(images, text, *more)
        expected = ours.class_scores(out, setting.label_size)
        logits = baseline(images, text, *more)
        labels = baseline.predict_labels(images, text, *more)
        assert relative(logits, contenders.raw_logits(out)) < 1e-5
        assert relative(baseline.class_scores(logits, *more), expected) < 1e-5
    top = expected.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-5
    assert clear.float().mean() > 0.5 and len(labels.unique()) > 1  # where no proposal lies all of MAFT's scores are 0
    assert torch.equal(labels[clear], expected.argmax(1)[clear])
