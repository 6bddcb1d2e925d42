"""Reading images as users have them: odd modes, odd shapes, rotated, animated, cut off, not images at all."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.trees import grey_png
from zs3fast.utils import images
from zs3fast.utils.images import image_files, read_image, read_mask_file


def gradient(height=20, width=30):
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, 255 - y * 255 // height], -1).astype(np.uint8)


def close(got, expected, atol):
    assert got.dtype == np.uint8 and got.shape == expected.shape
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= atol


def test_png_and_jpeg_from_a_path(tmp_path):
    rgb = gradient()
    Image.fromarray(rgb).save(tmp_path / "a.png")
    Image.fromarray(rgb).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    pixels, source = read_image(tmp_path / "a.png")
    assert np.array_equal(pixels, rgb) and source == str(tmp_path / "a.png")
    assert pixels.flags.writeable
    close(read_image(str(tmp_path / "a.jpg"))[0], rgb, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured(tmp_path, orientation):
    """All eight orientations: stored turned, read upright, from the file and from an opened PIL image alike."""
    upright = Image.fromarray(gradient())
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png")[0], gradient())
    with Image.open(tmp_path / "turned.png") as image:
        assert np.array_equal(read_image(image)[0], gradient())


def test_greyscale_modes(tmp_path):
    grey = gradient()[:, :, 0]
    for mode in ("L", "1"):
        image = Image.fromarray(grey).convert(mode)
        image.save(tmp_path / f"{mode}.png")
        expected = np.repeat(np.asarray(image.convert("L"))[:, :, None], 3, 2)
        assert np.array_equal(read_image(tmp_path / f"{mode}.png")[0], expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    """Pillow's own conversion clips: everything above 255 would be white."""
    values = np.array([[0, 1, 257, 300], [25700, 32768, 65278, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    expected = np.array([[0, 0, 1, 1], [100, 128, 254, 255]], np.uint8)
    for image in (tmp_path / f"x.{suffix}", values):
        got = read_image(image)[0]
        assert np.array_equal(got, np.repeat(expected[:, :, None], 3, 2))


def test_thirty_two_bit_integers(tmp_path):
    Image.fromarray(np.array([[0, 65535]], np.int32)).save(tmp_path / "fits.tif")
    assert read_image(tmp_path / "fits.tif")[0][0, :, 0].tolist() == [0, 255]
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "large.tif")
    with pytest.raises(ValueError, match="large.tif: expected 8 or 16 bits, got integers from 0 to 70000"):
        read_image(tmp_path / "large.tif")


def test_floating_point_pictures_have_no_known_range(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="f.tif: expected 8 or 16 bits a channel, got floating-point pixels"):
        read_image(tmp_path / "f.tif")


def test_cmyk(tmp_path):
    cmyk = Image.fromarray(gradient()).convert("CMYK")
    cmyk.save(tmp_path / "x.jpg", quality=100, subsampling=0)
    close(read_image(tmp_path / "x.jpg")[0], gradient(), 6)
    cmyk.save(tmp_path / "x.tif")
    close(read_image(tmp_path / "x.tif")[0], gradient(), 1)


def test_palette(tmp_path):
    image = Image.fromarray(gradient()).quantize(16)
    image.save(tmp_path / "x.png")
    assert np.array_equal(read_image(tmp_path / "x.png")[0], np.asarray(image.convert("RGB")))


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = 0, 128, 255
    expected = np.array([[[255, 255, 255], [227, 127, 127], [200, 0, 0]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    close(read_image(tmp_path / "rgba.png")[0], expected, 1)
    close(read_image(rgba)[0], expected, 1)
    close(read_image(torch.from_numpy(rgba).permute(2, 0, 1))[0], expected, 1)
    Image.fromarray(rgba[:, :, [0, 3]]).save(tmp_path / "la.png")
    close(read_image(tmp_path / "la.png")[0][:, :, 0], np.array([[255, 227, 200]], np.uint8), 1)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png")[0].tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame_is_used(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    with pytest.warns(UserWarning, match=f"x.{suffix} holds 3 frames, only the first is used"):
        pixels, _ = read_image(path)
    assert (pixels == [255, 0, 0]).all()


def test_an_opened_animation_is_read_from_its_start(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "x.gif") as image:
        image.seek(1)
        with pytest.warns(UserWarning, match="2 frames"):
            assert (read_image(image)[0] == [255, 0, 0]).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files_are_named(tmp_path, suffix, part):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=f"image: .*cut.{suffix} ") as caught:
        read_image(path)
    assert caught.value.__suppress_context__


def test_damage_inside_is_named(tmp_path):
    path = tmp_path / "bad.png"
    Image.fromarray(gradient()).save(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 10
    data[at : at + 8] = b"\0" * 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match="bad.png cannot be read"):
        read_image(path)


def test_not_pictures(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    for name in ("empty.jpg", "text.jpg"):
        with pytest.raises(ValueError, match=f"{name} is not an image"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="image: no file .*none.jpg"):
        read_image(tmp_path / "none.jpg")


def test_decompression_bombs(tmp_path):
    """A PNG header that promises 60000 x 60000 pixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(ValueError, match="bomb.png has more than .* pixels and may be a decompression bomb"):
        read_image(tmp_path / "bomb.png")


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "dot.png")
    assert read_image(tmp_path / "dot.png")[0].tolist() == [[[1, 2, 3]]]


def test_arrays_and_tensors():
    rgb = gradient()
    for image in (rgb, rgb / 255, (rgb / 255).astype(np.float32), torch.from_numpy(rgb).permute(2, 0, 1)):
        assert np.array_equal(read_image(image)[0], rgb)
    floats = torch.from_numpy(rgb).permute(2, 0, 1) / 255
    assert np.array_equal(read_image(floats)[0], rgb)
    close(read_image(floats.bfloat16())[0], rgb, 1)
    assert np.array_equal(read_image(floats.requires_grad_())[0], rgb)
    grey = np.repeat(rgb[:, :, :1], 3, 2)
    for image in (rgb[:, :, 0], rgb[:, :, :1], torch.from_numpy(rgb[:, :, 0]), torch.from_numpy(rgb[None, :, :, 0])):
        assert np.array_equal(read_image(image)[0], grey)
    assert np.array_equal(read_image(rgb[:, ::-1])[0], rgb[:, ::-1]), "negative strides"


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((2, 3, 4, 3), np.uint8), ValueError, r"got \[2, 3, 4, 3\]"),
        (np.zeros((3, 20, 30), np.uint8), ValueError, r"got \[3, 20, 30\]"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, r"got \[0, 5, 3\]"),
        (np.zeros(5, np.uint8), ValueError, r"got \[5\]"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "expected uint8, uint16 or floats in 0..1, got int64"),
        (np.zeros((4, 4, 3), bool), TypeError, "got bool"),
        (np.full((4, 4, 3), 128.0), ValueError, "expected floats in 0..1, got 128 to 128"),
        (np.full((4, 4, 3), np.nan), ValueError, "expected floats in 0..1, got nan"),
        (np.full((4, 4, 3), 1.0000001, np.float32), ValueError, "expected floats in 0..1, got 1.0000001 to 1.0000001$"),
        (torch.zeros(20, 30, 3), ValueError, r"channels first, \[3, H, W\], got \[20, 30, 3\]"),
        (torch.zeros(1, 3, 20, 30), ValueError, r"got \[1, 3, 20, 30\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), TypeError, "got int32"),
        (b"bytes", ValueError, "image: the data is not an image"),
        (5, TypeError, "expected a path, a PIL image, an array or a tensor, bytes or a file, got int"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_picture(image, error, message):
    with pytest.raises(error, match=message):
        read_image(image)


def multi_page_tiff(path):
    pages = [Image.fromarray(gradient()), Image.fromarray(gradient()[::-1])]
    pages[0].save(path, save_all=True, append_images=pages[1:])


@pytest.mark.parametrize("keep", [0.55, 0.7, 0.9])
def test_a_tiff_whose_second_page_is_cut_off_gives_its_first(tmp_path, keep):
    """Counting its frames, which walks to the missing page, let out a TypeError and ended a folder's run."""
    path = tmp_path / "pages.tif"
    multi_page_tiff(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.warns(UserWarning, match="pages.tif holds .* frames, only the first is used"):
        assert np.array_equal(read_image(path)[0], gradient())


def test_a_tiff_with_garbage_for_a_second_page_gives_its_first(tmp_path):
    path = tmp_path / "pages.tif"
    multi_page_tiff(path)
    first = path.read_bytes()
    data = bytearray(first)
    half = len(data) // 2
    data[half:] = np.random.default_rng(0).integers(0, 256, len(data) - half, np.uint8).tobytes()
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(read_image(path)[0], gradient())


@pytest.mark.parametrize("suffix", ["avif", "dds", "blp", "jp2", "ico", "tga", "psd", "ppm", "webp", "gif", "mpo"])
def test_whatever_a_decoder_raises_is_one_error_that_names_the_file(tmp_path, suffix):
    """Their decoders raise RuntimeErrors, NotImplementedErrors, TypeErrors, ... by the bytes they meet."""
    path, rng = tmp_path / f"x.{suffix}", np.random.default_rng(0)
    good = tmp_path / "good"
    if suffix == "psd":
        good.write_bytes(psd())
    else:
        image = Image.fromarray(gradient(32, 32))
        image = image.convert("P") if suffix == "blp" else image
        image.save(good, "JPEG2000" if suffix == "jp2" else suffix.upper())
    data = good.read_bytes()
    read_image(good)
    refused = 0
    for trial in range(150):
        bad = bytearray(data[: rng.integers(8, len(data) + 1)] if trial % 2 else data)
        for at in rng.integers(4, len(bad), rng.integers(1, 8)):
            bad[at] = rng.integers(0, 256)
        path.write_bytes(bad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_image(path)
            except ValueError as error:
                refused += 1
                assert str(error).startswith("image: ") and path.name in str(error)
    assert refused


def psd(layers=2):
    """A PSD of 4 x 3 red pixels with so many (empty) layers."""
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 3, 4, 8, 3)
    record = struct.pack(">iiiiH", 0, 0, 3, 4, 0) + b"8BIMnorm" + bytes([255, 0, 0, 0]) + struct.pack(">I", 0)
    info = struct.pack(">h", layers) + record * layers
    section = struct.pack(">I", len(info)) + info + struct.pack(">I", 0)
    pixels = bytes([255] * 12 + [0] * 24)
    return header + struct.pack(">II", 0, 0) + struct.pack(">I", len(section)) + section + struct.pack(">H", 0) + pixels


def test_a_psd_of_two_layers_gives_its_composite(tmp_path):
    """Its frames are its layers, counted from 1: there is no frame 0 to go to."""
    (tmp_path / "x.psd").write_bytes(psd())
    with Image.open(tmp_path / "x.psd") as image:
        assert image.n_frames == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, _ = read_image(tmp_path / "x.psd")
    assert pixels.shape == (3, 4, 3) and (pixels == [255, 0, 0]).all()


def test_an_opened_animation_stays_where_it_was(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "x.gif") as image:
        image.seek(2)
        with pytest.warns(UserWarning, match="3 frames"):
            read_image(image)
        assert image.tell() == 2


def test_bytes_and_files(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for source in (data, bytearray(data), io.BytesIO(data)):
        pixels, path = read_image(source)
        assert np.array_equal(pixels, gradient()) and path is None
    with open(tmp_path / "a.png", "rb") as file:
        assert np.array_equal(read_image(file)[0], gradient())
    with pytest.raises(ValueError, match="image: the data cannot be read"):
        read_image(data[:60])


def test_large_images_are_converted_in_strips_to_the_same_bytes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (37, 23, 4), np.uint8))
    sixteen = Image.fromarray(rng.integers(0, 65536, (37, 23), np.uint16))
    pictures = [rgba, rgba.convert("CMYK"), rgba.convert("RGB").quantize(9), sixteen, rgba.convert("1")]
    whole = [read_image(picture)[0] for picture in pictures]
    monkeypatch.setattr(images, "_STRIP", 100)
    for picture, expected in zip(pictures, whole, strict=True):
        assert np.array_equal(read_image(picture)[0], expected)


# masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_greys_of_few_bits_are_the_numbers_that_lie_in_the_file(tmp_path, bits):
    """Pillow scales them to 0..255: 1 of 4 bits was 17, another class."""
    values = np.arange(2**bits).reshape(1, -1).repeat(2, 0)
    grey_png(tmp_path / "m.png", values.tolist(), bits)
    read, note = read_mask_file(tmp_path / "m.png")
    assert np.array_equal(read, values) and note is None


@pytest.mark.parametrize("top", [1, 20, 149, 255])
def test_greys_of_a_pgm_are_its_numbers(tmp_path, top):
    values = np.arange(top + 1)
    (tmp_path / "m.pgm").write_bytes(f"P5 {top + 1} 1 {top}\n".encode() + bytes(values.tolist()))
    assert np.array_equal(read_mask_file(tmp_path / "m.pgm")[0], values[None])


@pytest.mark.parametrize("bits", [2, 4])
def test_greys_of_a_tiff_of_few_bits(tmp_path, bits):
    values = list(range(2**bits))
    packed = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(len(values) * bits // 8, "big")
    tags = [(256, 4, len(values)), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8 + 2 + 12 * 8 + 4), (278, 4, 1), (279, 4, len(packed))]
    body = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in tags)
    (tmp_path / "m.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + packed)
    assert read_mask_file(tmp_path / "m.tif")[0].tolist() == [values]


def test_sixteen_bit_and_palette_masks(tmp_path):
    values = np.array([[0, 1, 300, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "m.png")
    assert read_mask_file(tmp_path / "m.png")[0].tolist() == values.tolist()
    for colours, noted in (([0, 0, 0, 255, 0, 0], False), ([0, 0, 0, 1, 1, 1], False), ([0] * 3 + [120] * 3, True)):
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        image.putpalette(colours)
        image.save(tmp_path / "p.png")
        read, note = read_mask_file(tmp_path / "p.png")
        assert read.tolist() == [[0, 1]]
        assert (note is not None) == noted
    assert "p.png has a palette of greys; its indices (0, 1) are taken as labels, not the greys (0, 120)" in note


def test_masks_that_are_none(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "rgb.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(
        ValueError, match="labels: .*rgb.png: expected class indices in one channel, got an image of mode RGB"
    ):
        read_mask_file(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="labels: .*text.png is not an image"):
        read_mask_file(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="labels: no file .*none.png"):
        read_mask_file(tmp_path / "none.png")


# folders -------------------------------------------------------------------------------------------------------------


def test_what_of_a_folder_is_an_image(tmp_path):
    names = "b.jpg A.PNG c.webp ._a.jpg .a_labels.part.png x.pdf x.mpg x.h5 x.txt x.eps IMG.HEIC raw.nef x.tif".split()
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found, unread = image_files(tmp_path.iterdir())
    assert [path.name for path in found] == ["A.PNG", "b.jpg", "c.webp", "x.tif"]
    assert [path.name for path in unread] == ["IMG.HEIC", "raw.nef"]
