"""The recipes' numbers: sizes, crops under the 75 % rule, flips, normalisation, padding; one generator decides all."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zs3fast.data import Sample, open_dataset, train_transform
from zs3fast.data import transforms as T

REAL = os.environ.get("ZS3FAST_DATA")
MEAN, STD = (0.5, 0.25, 0.75), (0.5, 0.25, 0.125)


def sample(height=60, width=90, seed=0, classes=(0, 1, 2, 255)):
    rng = np.random.default_rng(seed)
    blocks = rng.choice(classes, (-(-height // 8), -(-width // 8))).astype(np.int32)
    labels = np.kron(blocks, np.ones((8, 8), np.int32))[:height, :width]
    return Sample(rng.integers(0, 256, (height, width, 3), np.uint8), labels, "x")


@pytest.fixture
def plain(monkeypatch):
    """The jitter left out, so that pixels can be followed."""
    monkeypatch.setattr(T, "colour_jitter", lambda image, rng, largest_hue=17: image)


@pytest.mark.parametrize("recipe", ["zegclip", "maft", "clsclip", "flip"])
def test_contract(recipe):
    transform = train_transform(recipe, 32)
    assert transform.crop_size == 32
    item = sample()
    before = item.image.copy(), item.labels.copy()
    images, labels = transform(item, np.random.default_rng(1))
    assert images.shape == (3, 32, 32) and images.dtype == torch.float32 and torch.isfinite(images).all()
    assert labels.shape == (32, 32) and labels.dtype == torch.int64
    assert set(labels.unique().tolist()) <= {0, 1, 2, 255}
    assert np.array_equal(item.image, before[0]) and np.array_equal(item.labels, before[1])
    again = transform(item, np.random.default_rng(1))
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    other = transform(item, np.random.default_rng(2))
    assert not torch.equal(images, other[0])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["zegclip", "maft", "clsclip", "flip"]), st.integers(1, 80), st.integers(1, 80), st.integers(0, 999)
)
def test_any_size(recipe, height, width, seed):
    images, labels = train_transform(recipe, 24)(sample(height, width, seed), np.random.default_rng(seed))
    assert images.shape == (3, 24, 24) and labels.shape == (24, 24) and torch.isfinite(images).all()


def test_default_sizes_and_statistics():
    levels = {"zegclip": (512, T.IMAGENET_MEAN, T.IMAGENET_STD)}
    levels |= {"maft": (640, T.CLIP_MEAN, T.CLIP_STD), "clsclip": (352, T.CLIP_MEAN, T.CLIP_STD)}
    levels |= {"flip": (128, T.CLIP_MEAN, T.CLIP_STD)}
    for recipe, (size, mean, std) in levels.items():
        transform = train_transform(recipe)
        assert transform.crop_size == size
        for table, m, s in zip(transform._normalised, mean, std):
            assert table[[0, 255]] == pytest.approx([-m / s, (1 - m) / s], rel=1e-6)
    assert [255 * m for m in T.IMAGENET_MEAN] == pytest.approx([123.675, 116.28, 103.53])
    assert [255 * s for s in T.IMAGENET_STD] == pytest.approx([58.395, 57.12, 57.375])
    assert [255 * m for m in T.CLIP_MEAN] == pytest.approx([122.7709383, 116.7460125, 104.09373615])
    assert [255 * s for s in T.CLIP_STD] == pytest.approx([68.5005327, 66.6321579, 70.3231630])


class Fixed:
    """A generator with given draws, in the order in which a recipe asks; then those of a real one."""

    def __init__(self, uniform=(), integers=(), random=()):
        self.queue = {"uniform": list(uniform), "integers": list(integers), "random": list(random)}
        self.asked = []

    def _next(self, kind, *arguments):
        self.asked.append((kind, *arguments))
        return self.queue[kind].pop(0)

    def uniform(self, low, high):
        return self._next("uniform", low, high)

    def integers(self, low, high, endpoint=False):
        assert endpoint
        return np.asarray(self._next("integers", low, np.asarray(high).tolist()))

    def random(self):
        return self._next("random")


def test_zegclip_follows_its_pixels(plain):
    """r = 1: short side 60 -> 32 by 32/60, the long one int(90 * 32/60 + 0.5) = 48; the crop at column 10, flipped."""
    item = sample()
    rng = Fixed(uniform=[1.0], integers=[(0, 10)] * 11, random=[0.2])
    images, labels = train_transform("zegclip", 32, mean=MEAN, std=STD)(item, rng)
    assert rng.asked[:2] == [("uniform", 0.5, 2), ("integers", 0, [0, 16])]
    whole = T.resize_bilinear(item.image, (32, 48))[:, 10:42][:, ::-1]
    for channel in range(3):
        expected = (whole[..., channel] / 255 - MEAN[channel]) / STD[channel]
        assert np.abs(images[channel].numpy() - expected).max() < 1e-5
    assert np.array_equal(labels.numpy(), T.resize_nearest(item.labels, (32, 48))[:, 10:42][:, ::-1])


def test_zegclip_pads_after_normalising(plain):
    """r = 0.5: 60 -> 16, 90 -> 24; what is left of 32 x 32 is 0 and ignored."""
    images, labels = train_transform("zegclip", 32, mean=MEAN, std=STD, ignore_index=65535)(
        sample(classes=(0, 65535)), Fixed(uniform=[0.5], integers=[(0, 0)] * 11, random=[0.9])
    )
    assert (labels[16:] == 65535).all() and (labels[:, 24:] == 65535).all()
    assert (images[:, 16:] == 0).all() and (images[:, :, 24:] == 0).all()
    assert (images[:, :16, :24] != 0).any()


@pytest.mark.parametrize(
    ("height", "width", "ratio", "size"),
    [
        (375, 500, 1.0, (512, 683)),  # 500 * 512 / 375 = 682.67
        (375, 500, 0.7513, (384, 512)),  # int(512 * 0.7513) = 384
        (375, 500, 1.999, (1023, 1364)),
        (100, 500, 1.0, (410, 2048)),  # the long side binds: 100 * 2048 / 500 = 409.6
        (500, 375, 1.0, (683, 512)),
    ],
)
def test_zegclip_sizes(monkeypatch, plain, height, width, ratio, size):
    seen = []
    monkeypatch.setattr(T, "_draw_window", lambda s, crop, rng: seen.append((s, crop)) or (0, 0, 1, 1))
    rng = Fixed(uniform=[ratio], random=[0.9])
    train_transform("zegclip")(
        Sample(np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.int32), ""), rng
    )
    assert seen[0] == (size, 512)


def crop_counts(left_share):
    """An image of class 1 but for a strip of class 2 at the right end; crops are drawn over its width."""
    labels = np.full((32, 200), 1, np.int32)
    labels[:, int(200 * left_share) :] = 2
    return Sample(np.zeros((32, 200, 3), np.uint8), labels, "x")


def test_75_percent_rule():
    ignored = np.full(25, 255)
    for labels, accepted in [
        ([1] * 74 + [2] * 26, True),
        ([1] * 75 + [2] * 25, False),  # less than, not at most
        ([1] * 100, False),
        ([1] * 74 + [2] * 26 + [255] * 300, True),
        ([1] * 75 + [255] * 25, False),
        ([255] * 100, False),
        ([1, 2, 3], True),
    ]:
        assert T.varied(np.array(labels), 255) is accepted, labels
    assert T.varied(np.array([1, 2, *ignored]), 255)
    assert T.varied(np.array([300, 846, 65535, 65535]), 65535)


def test_crops_are_redrawn_ten_times_at_most(plain):
    """The 12th offset is never drawn, and the 11th is kept although it breaks the rule."""
    item = crop_counts(0.9)
    offsets = [(0, left) for left in range(11)]
    rng = Fixed(uniform=[1.0], integers=list(offsets), random=[0.9])
    _, labels = train_transform("zegclip", 32)(item, rng)
    assert [kind for kind, *_ in rng.asked].count("integers") == 11
    assert (labels[:20] == 1).all() and (labels[20:] == 255).all()


def test_a_good_crop_ends_the_search(plain):
    item = crop_counts(0.9)  # class 2 from column 180; at scale 0.64 (128 / 200: the long side binds)
    scaled = T.resize_nearest(item.labels, (20, 128))
    good = 128 - 32
    assert T.varied(scaled[:, good:], 255)
    rng = Fixed(uniform=[1.0], integers=[(0, 0), (0, 5), (0, good), (0, 0)], random=[0.9])
    _, labels = train_transform("zegclip", 32)(item, rng)
    assert set(labels.unique().tolist()) == {1, 2, 255}
    assert rng.queue["integers"] == [(0, 0)]


def test_crops_of_random_pictures_obey_the_rule():
    """Where classes are mixed finely, the first draw is accepted; both classes are always there."""
    transform = train_transform("zegclip", 16)
    for seed in range(30):
        _, labels = transform(sample(64, 64, seed, classes=(0, 1, 2, 3)), np.random.default_rng(seed))
        assert T.varied(labels.numpy(), 255), seed


def test_maft_follows_its_pixels(plain):
    """Short side 12 tenths of 40 = 48, long side 72; Pillow's resize of the whole and the crop of it."""
    item = sample()
    rng = Fixed(integers=[12, (3, 20)], random=[0.2])
    images, labels = train_transform("maft", 40, mean=MEAN, std=STD)(item, rng)
    assert rng.asked == [("integers", 5, 15), ("integers", 0, [8, 32]), ("random",)]
    whole = Image.fromarray(item.image).resize((72, 48), Image.Resampling.BILINEAR)
    expected = np.asarray(whole)[3:43, 20:60][:, ::-1].astype(int)
    got = np.stack([images[c].numpy() * STD[c] + MEAN[c] for c in range(3)], -1) * 255
    assert np.abs(got - expected).max() <= 1.01  # a crop of the resize against the resize of a crop: rounding
    nearest = Image.fromarray(item.labels.astype(np.uint8)).resize((72, 48), Image.Resampling.NEAREST)
    assert np.array_equal(labels.numpy(), np.asarray(nearest)[3:43, 20:60][:, ::-1])


def test_maft_pads_with_grey_before_normalising(plain):
    images, labels = train_transform("maft", 40, mean=MEAN, std=STD)(
        sample(), Fixed(integers=[5, (0, 0)], random=[0.9])
    )  # 60 x 90 -> 20 x 30
    assert (labels[20:] == 255).all() and (labels[:, 30:] == 255).all() and (labels[:20, :30] != 255).any()
    for channel in range(3):
        grey = (128 / 255 - MEAN[channel]) / STD[channel]
        assert images[channel, 20:].numpy() == pytest.approx(grey, rel=1e-6)


@pytest.mark.parametrize("step", range(5, 16))
def test_maft_short_sides(monkeypatch, plain, step):
    """320, 384, ..., 960; a long side over 2560 binds."""
    seen = []
    monkeypatch.setattr(T, "_draw_window", lambda s, crop, rng: seen.append(s) or (0, 0, 1, 1))
    for height, width in ((375, 500), (100, 500)):
        item = Sample(np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.int32), "")
        train_transform("maft")(item, Fixed(integers=[step], random=[0.9]))
    assert seen[0][0] == 64 * step
    assert seen[1] == ((64 * step, 320 * step) if 320 * step <= 2560 else (512, 2560))


def test_clsclip_squashes(plain):
    """A crop of the whole height and width: every pixel of a 32 x 64 image at 16 x 16, aspect ratio lost."""
    item = sample(32, 64)
    rng = Fixed(uniform=[1.0, 0.0], integers=[(0, 0)], random=[0.9])
    images, labels = train_transform("clsclip", 16, mean=MEAN, std=STD)(item, rng)
    expected = np.asarray(Image.fromarray(item.image).resize((16, 16), Image.Resampling.BILINEAR))
    got = np.stack([images[c].numpy() * STD[c] + MEAN[c] for c in range(3)], -1) * 255
    assert np.abs(got - expected).max() < 1e-3
    assert np.array_equal(labels.numpy(), item.labels[1::2, 2::4])


def test_clsclip_crops_cover_half_to_all():
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = T.ClsclipTransform._draw_box((300, 400), rng)
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        assert 0.43 < (right - left) * (bottom - top) / 120000 <= 1  # less where a side is cut to the image's


@pytest.mark.parametrize("place", [(0, 0), (59, 89), (31, 44)])
def test_clsclip_keeps_one_pixel_of_the_class(place):
    """A single pixel, which squashing nearly always loses: the last resort is a window where nothing is lost."""
    labels = np.zeros((60, 90), np.int32)
    labels[place] = 7
    item = Sample(np.zeros((60, 90, 3), np.uint8), labels, "x")
    transform = train_transform("clsclip", 16)
    for seed in range(20):
        _, got = transform(item, np.random.default_rng(seed), class_index=7)
        assert (got == 7).any(), seed
    with pytest.raises(ValueError, match="class_index: expected a class in the image"):
        transform(item, np.random.default_rng(0), class_index=8)


def test_flip_keeps_every_pixel():
    """An image of the crop's size comes back whole, as it is or mirrored, its colours untouched."""
    item = sample(32, 32)
    transform = train_transform("flip", 32, mean=MEAN, std=STD)
    levels = torch.from_numpy(item.image / 255).permute(2, 0, 1)
    whole = ((levels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).float()
    truth = torch.from_numpy(item.labels).long()
    mirrored = set()
    for seed in range(8):
        images, labels = transform(item, np.random.default_rng(seed))
        flipped = not torch.allclose(images, whole)
        mirrored.add(flipped)
        assert torch.allclose(images, whole.flip(-1) if flipped else whole, atol=1e-6)
        assert torch.equal(labels, truth.flip(-1) if flipped else truth)
    assert mirrored == {True, False}


def test_flip_keeps_the_class():
    item = sample(64, 64)
    item.labels[:] = 0
    item.labels[20:30, 20:30] = 7
    for seed in range(20):
        _, labels = train_transform("flip", 40)(item, np.random.default_rng(seed), class_index=7)
        assert (labels == 7).any()
    with pytest.raises(ValueError, match="class_index: expected a class that a crop of the image can hold, got 9"):
        train_transform("flip", 40)(item, np.random.default_rng(0), class_index=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "tagclip"}, "recipe: expected one of zegclip, maft, clsclip, flip, got 'tagclip'"),
        ({"recipe": "maft", "crop_size": 0}, "crop_size: expected at least 1, got 0"),
        ({"recipe": "maft", "mean": (0.5,)}, "mean, std: expected three values"),
        ({"recipe": "maft", "std": (1, 1, 0)}, "mean, std: expected three values each, std above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_transform(**arguments)


@pytest.mark.skipif(not REAL, reason="ZS3FAST_DATA, the folder with real samples, is not set")
@pytest.mark.parametrize(("name", "recipe"), [("coco171", "zegclip"), ("ade150", "maft"), ("voc20", "clsclip")])
def test_real_pictures(name, recipe):
    """Full size: labels stay among those of the image, and the levels where the normalisation puts them."""
    dataset = open_dataset(name, REAL, "train")
    transform = train_transform(recipe)
    for index in range(3):
        item = dataset[index]
        images, labels = transform(item, np.random.default_rng(index))
        assert labels.shape == (transform.crop_size,) * 2
        assert set(labels.unique().tolist()) <= {*np.unique(item.labels).tolist(), 255}
        assert -2.2 < images.min() < images.mean() < images.max() < 2.7
