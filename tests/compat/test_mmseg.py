"""The official numbers through mmsegmentation's calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import zs3fast
from tests.goldens_data import HEADS, Golden, golden_files, relative
from tests.tiny import SEEN, tiny_inputs, tiny_labels, tiny_model
from zs3fast.compat.mmseg import Segmentor

FILES = [path for method in ("zegclip", "tagclip", "clip_rc") for path in golden_files(method)]
goldens = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


def official(golden: Golden, **options: object) -> Segmentor:
    text = golden["input/text_embeddings"]
    sizes = {"heads": HEADS, "decoder_heads": HEADS, "num_classes": len(text)}
    model = zs3fast.load_official(golden.group("weight"), seen=SEEN, **sizes, dropout=0.0)
    model.trusty_weighting = "off"
    return Segmentor(model, text, **options)


def samples(labels: torch.Tensor, **meta: object) -> list[SimpleNamespace]:
    return [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=label[None]), metainfo=dict(meta)) for label in labels]


@goldens
def test_scores_and_labels(path) -> None:
    golden = Golden(path)
    segmentor = official(golden, test_cfg={"mode": "whole"}).eval()
    images = golden["input/image"]
    with torch.no_grad():
        assert relative(segmentor.encode_decode(images), golden["eval/scores"]) < 1e-5
        features = segmentor.extract_feat(images)
        masks = segmentor.decode_head(features)
        assert relative(masks, golden["eval/mask_logits"][:, : masks.shape[1]]) < 1e-5
        metas = [{"img_shape": (64, 64), "ori_shape": (64, 64)}] * 2
        assert relative(segmentor.decode_head.predict(features, metas), golden["eval/scores"]) < 1e-5
    found = torch.cat([sample.pred_sem_seg.data for sample in segmentor.predict(images)])
    top = golden["eval/scores"].topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-6
    assert torch.equal(found[clear], golden["eval/labels"][clear])
    old = segmentor.simple_test(images, metas)
    assert np.array_equal(np.stack(old), found.numpy())


@goldens
def test_losses(path) -> None:
    golden = Golden(path)
    segmentor = official(golden).train()
    labels = golden["input/label"]
    losses = segmentor.loss(golden["input/image"], samples(labels))
    for name, loss in losses.items():
        assert relative(loss, golden[f"train/{name.removeprefix('decode.')}"]) < 1e-5, name
    assert relative(sum(losses.values()), golden["train/total"]) < 1e-5
    old = segmentor.forward(golden["input/image"], [{}] * 2, return_loss=True, gt_semantic_seg=labels[:, None])
    assert old.keys() == losses.keys() and all(torch.equal(old[name], losses[name]) for name in losses)


def test_windows_are_averaged_and_resized() -> None:
    """Against the sum over windows written out; a strip of one and a half windows, brought to another size."""
    _, text = tiny_inputs()
    segmentor = Segmentor(
        tiny_model("zegclip"), text, test_cfg={"mode": "slide", "crop_size": (64, 64), "stride": (48, 48)}
    )
    images = torch.randn(1, 3, 64, 112, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        left, right = segmentor.encode_decode(images[..., :64]), segmentor.encode_decode(images[..., 48:])
        expected = torch.cat([left[..., :48], (left[..., 48:] + right[..., :16]) / 2, right[..., 16:]], -1)
        torch.testing.assert_close(segmentor.slide_inference(images, [{}]), expected)
    (sample,) = segmentor.predict(images, samples(torch.zeros(1, 64, 112), ori_shape=(50, 90), img_shape=(64, 112)))
    big = F.interpolate(expected, size=(50, 90), mode="bilinear", align_corners=False)
    assert torch.equal(sample.pred_sem_seg.data, big.argmax(1)) and sample.seg_logits.data.shape == (7, 50, 90)
    with torch.no_grad():
        old = segmentor.inference(images, [{"ori_shape": (50, 90, 3)}], rescale=True)
    torch.testing.assert_close(old, big.softmax(1))


def test_flipped_and_padded_inputs_come_back() -> None:
    _, text = tiny_inputs()
    segmentor = Segmentor(tiny_model("zegclip"), text, test_cfg={"mode": "whole"})
    scores = torch.randn(1, 7, 64, 64)
    padded = F.pad(scores, (3, 5, 2, 6)).flip(-1)
    meta = {"ori_shape": (64, 64), "flip": True, "padding_size": (5, 3, 2, 6)}
    (sample,) = segmentor.postprocess_result(padded, [SimpleNamespace(metainfo=meta)])
    torch.testing.assert_close(sample.seg_logits.data, scores[0])


def test_parts_and_modes() -> None:
    images, text = tiny_inputs()
    model = tiny_model("zegclip")
    segmentor = Segmentor(model, text, class_names=list("abcdefg"))
    assert segmentor.backbone is model.encoder and segmentor.decode_head.num_classes == 7
    assert segmentor.dataset_meta["classes"] == tuple("abcdefg")
    assert segmentor.test_cfg == {"mode": "slide", "crop_size": (64, 64), "stride": (53, 53)}
    assert set(segmentor.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    with torch.no_grad():
        assert torch.equal(segmentor(images), model(images, text).mask_logits)
    assert set(segmentor(images, samples(tiny_labels()), mode="loss")) == {"decode.loss_mask", "decode.loss_dice"}
    assert segmentor(images, mode="predict")[0].pred_sem_seg.data.shape == (1, 64, 64)
    levels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    got = segmentor.data_preprocessor({"inputs": [levels]})["inputs"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.pixel_mean, model.pixel_std))
    torch.testing.assert_close(got[0], (levels / 255 - mean) / std)


def test_what_it_does_not_take() -> None:
    _, text = tiny_inputs()
    with pytest.raises(TypeError, match="model: expected one that decodes an encoded image .*, got maft"):
        Segmentor(tiny_model("maft"), text)
    with pytest.raises(ValueError, match="mode: expected one of tensor, loss, predict, got 'test'"):
        Segmentor(tiny_model("zegclip"), text)(torch.zeros(1, 3, 64, 64), mode="test")
    with pytest.raises(ValueError, match=r"test_cfg\['mode'\]: expected one of whole, slide, got 'tiles'"):
        Segmentor(tiny_model("zegclip"), text, test_cfg={"mode": "tiles"})
    for size in (None, 64, (64,), "64"):
        with pytest.raises(ValueError, match=r"test_cfg\['crop_size'\]: expected \(height, width\), got"):
            Segmentor(tiny_model("zegclip"), text, test_cfg={"mode": "slide", "crop_size": size, "stride": (53, 53)})
    with pytest.raises(ValueError, match=r"test_cfg\['stride'\]: expected a whole number, at least 1, got 0"):
        Segmentor(tiny_model("zegclip"), text, test_cfg={"mode": "slide", "crop_size": [64, 64], "stride": (53, 0)})
    with pytest.raises(
        ValueError, match=r"inputs: expected images of one size \[3, H, W\], got \[3, 8, 8\], \[3, 9, 8\]"
    ):
        Segmentor(tiny_model("zegclip"), text).data_preprocessor({"inputs": [torch.ones(3, 8, 8), torch.ones(3, 9, 8)]})
    with pytest.raises(ValueError, match="class_names: expected 7, a name a row, got 2"):
        Segmentor(tiny_model("zegclip"), text, class_names=["a", "b"])


class Wrapper:
    """mmengine's OptimWrapper as far as `train_step` knows it."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.optimizer = torch.optim.SGD(parameters, lr=0.1)

    def update_params(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@pytest.mark.parametrize("method", ["zegclip", "tagclip", "clip_rc"])
def test_what_runners_call(method: str) -> None:
    """1.x: loops of mmengine, images as they come from a loader. 0.x: `model(return_loss=..., **data)` by keywords."""
    text = tiny_inputs()[1]
    segmentor = Segmentor(tiny_model(method), text, class_names=[f"class {i}" for i in range(7)])
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    meta = {"ori_shape": (70, 90), "img_shape": (64, 64)}
    data = {"inputs": list(pixels), "data_samples": samples(tiny_labels(2), **meta)}
    images = segmentor.data_preprocessor(data)["inputs"]
    segmentor.eval()
    labels = [sample.pred_sem_seg.data[0].numpy() for sample in segmentor.test_step(data)]
    assert [label.shape for label in labels] == [(70, 90)] * 2
    assert np.array_equal(segmentor.val_step(data)[1].pred_sem_seg.data[0].numpy(), labels[1])
    old_meta = {"ori_shape": (70, 90, 3), "img_shape": (64, 64, 3), "flip": False}
    (old,) = segmentor(return_loss=False, rescale=True, img=[images[:1]], img_metas=[[old_meta]])
    assert old.shape == (70, 90) and float((old == labels[0]).mean()) > 0.99  # 0.x takes a softmax before the argmax
    mirrored = {**old_meta, "flip": True, "flip_direction": "horizontal"}
    views = {"img": [images[:1], images[:1].flip(-1)], "img_metas": [[old_meta], [mirrored]]}
    mean = sum(segmentor.inference(x, m, True) for x, m in zip(views["img"], views["img_metas"])) / 2
    (both,) = segmentor(return_loss=False, **views)
    assert np.array_equal(both, mean.argmax(1)[0].numpy())
    assert segmentor.CLASSES == segmentor.dataset_meta["classes"]

    segmentor.train()
    torch.manual_seed(1)
    terms = segmentor.loss(images, data["data_samples"])
    torch.manual_seed(1)
    batch = {"img": images, "img_metas": [old_meta] * 2, "gt_semantic_seg": tiny_labels(2)[:, None]}
    out = segmentor.train_step(batch, None)
    assert out["num_samples"] == 2 and set(out["log_vars"]) == {*terms, "loss"}
    assert out["log_vars"]["loss"] == pytest.approx(float(sum(terms.values()).detach()), rel=1e-5)
    name, weight = next(iter(segmentor.model.trainable().items()))
    before = weight.detach().clone()
    logged = segmentor.train_step(data, Wrapper(list(segmentor.model.trainable().values())))
    assert set(logged) == {*terms, "loss"} and not torch.equal(weight, before), name


def test_a_flipped_image_of_0_x_is_turned_back() -> None:
    text = tiny_inputs()[1]
    segmentor = Segmentor(tiny_model("zegclip"), text, test_cfg={"mode": "whole"}).eval()
    images = tiny_inputs()[0][:1]
    for direction, axis in (("horizontal", -1), ("vertical", -2)):
        meta = {"ori_shape": (64, 64), "flip": True, "flip_direction": direction}
        with torch.no_grad():
            turned = segmentor.inference(images, [meta], True)
            plain = segmentor.inference(images, [{"ori_shape": (64, 64)}], True)
        assert torch.equal(turned, plain.flip(axis))


@pytest.mark.parametrize(
    ("direction", "axes"), [("horizontal", -1), ("vertical", -2), ("diagonal", (-2, -1)), (None, -1)]
)
def test_every_flip_comes_back(direction: str | None, axes: int | tuple[int, ...]) -> None:
    """A diagonal one came back as a vertical one."""
    _, text = tiny_inputs()
    segmentor = Segmentor(tiny_model("zegclip"), text, test_cfg={"mode": "whole"})
    scores = torch.randn(1, 7, 64, 48)
    meta = {"ori_shape": (64, 48), "flip": True, "flip_direction": direction}
    (sample,) = segmentor.postprocess_result(scores.flip(axes), [SimpleNamespace(metainfo=meta)])
    assert torch.equal(sample.seg_logits.data, scores[0])
    with pytest.raises(ValueError, match="flip_direction: expected one of horizontal, vertical, diagonal, got 'up'"):
        segmentor.postprocess_result(scores, [SimpleNamespace(metainfo={**meta, "flip_direction": "up"})])


def test_calls_that_will_not_do() -> None:
    images, text, *_ = tiny_inputs()
    segmentor = Segmentor(tiny_model("zegclip"), text).eval()
    with pytest.raises(TypeError, match="inputs: expected images"):
        segmentor(return_loss=False)
    with pytest.raises(TypeError, match="forward: expected inputs, data_samples and mode, got rescale too"):
        segmentor(images, rescale=True)
    with pytest.raises(ValueError, match="img_metas: expected 2, a list for each of img, got 1"):
        segmentor(return_loss=False, img=[images, images], img_metas=[[{}]])


def strict_samples(monkeypatch: pytest.MonkeyPatch) -> type:
    """A sample whose fields take `PixelData` alone, as mmseg's do: mmengine's own where it is installed."""
    try:
        from mmengine.structures import BaseDataElement, PixelData
    except ModuleNotFoundError:

        class PixelData:  # type: ignore[no-redef]
            def __init__(self, *, data: torch.Tensor):
                self.data = data

        class BaseDataElement:  # type: ignore[no-redef]
            def __init__(self, *, metainfo: dict[str, object]):
                self.metainfo = metainfo

            def set_field(self, value: object, name: str, dtype: type) -> None:
                assert isinstance(value, dtype), f"{name}: {type(value)} is not {dtype}"
                self.__dict__[name] = value

        structures = ModuleType("mmengine.structures")
        structures.PixelData = PixelData  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mmengine.structures", structures)

    def field(name: str) -> property:
        return property(
            lambda self: getattr(self, f"_{name}"),
            lambda self, value: self.set_field(value, f"_{name}", dtype=PixelData),
        )

    names = ("gt_sem_seg", "seg_logits", "pred_sem_seg")
    sample = type("SegDataSample", (BaseDataElement,), {name: field(name) for name in names})
    sample.pixels = PixelData
    return sample


def test_samples_of_mmseg_are_filled_as_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    images, text = tiny_inputs()
    segmentor = Segmentor(tiny_model("zegclip"), text).eval()
    kind = strict_samples(monkeypatch)
    given = []
    for label in tiny_labels():
        sample = kind(metainfo={"ori_shape": (30, 40), "img_shape": (64, 64)})
        sample.gt_sem_seg = kind.pixels(data=label[None])
        given.append(sample)
    found = segmentor.predict(images, given)
    assert [type(sample) for sample in found] == [kind, kind]
    expected = segmentor.encode_decode(images).detach()
    expected = F.interpolate(expected, (30, 40), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(torch.cat([sample.pred_sem_seg.data for sample in found]), expected)
    assert found[0].seg_logits.data.shape == (7, 30, 40)
    assert set(segmentor.loss(images, given)) == {"decode.loss_mask", "decode.loss_dice"}


def test_a_step_runs_in_the_context_of_its_optimiser() -> None:
    """mmengine's wrappers open autocast there, or hold back the exchange of gradients."""
    text = tiny_inputs()[1]
    segmentor = Segmentor(tiny_model("zegclip", dropout=0.0), text).train()
    seen: list[bool] = []

    class Half(Wrapper):
        @contextmanager
        def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
            assert model is segmentor
            with torch.autocast("cpu", torch.bfloat16):
                yield

    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = {"inputs": list(pixels), "data_samples": samples(tiny_labels())}
    segmentor.backbone.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    wrapper = Half(list(segmentor.model.trainable().values()))
    assert torch.isfinite(segmentor.train_step(data, wrapper)["loss"])
    segmentor.loss(segmentor.data_preprocessor(data)["inputs"], data["data_samples"])
    assert seen == [True, False]


def test_batches_that_do_not_fit_are_one_line() -> None:
    images, text = tiny_inputs()
    segmentor = Segmentor(tiny_model("zegclip"), text).eval()
    for call in (segmentor.loss, segmentor.predict):
        with pytest.raises(ValueError, match="data_samples: expected 2, got 1"):
            call(images, samples(tiny_labels(1)))
    with pytest.raises(ValueError, match="data_samples: expected 2, got 0"):
        segmentor(images, mode="loss")
    with pytest.raises(ValueError, match="img_metas: expected ori_shape in each, to rescale to, got one without it"):
        segmentor.simple_test(images, [{"ori_shape": (30, 40, 3)}, {}])
    metas = [{"ori_shape": (30, 40, 3)}, {"ori_shape": (31, 40, 3)}]
    with pytest.raises(
        ValueError, match=r"img_metas: expected one ori_shape in a batch, got \[\(30, 40\), \(31, 40\)\]"
    ):
        segmentor.simple_test(images, metas)
