"""refine_maps: every backend against the reference and official answers; tiles, labels, memory; registration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.budget import assert_within_budget
from zs3fast.ops import _dispatch, refine_maps, refine_maps_to_labels, use_backend
from zs3fast.ops.refine_maps import neighbour_weights, reference, reference_labels

BACKENDS = ["reference", "cpp", "triton"]
CASES = {  # B, Q, (h, w) of the maps, size, options
    "as-they-are": (1, 5, (37, 53), None, {}),
    "upsampled": (2, 21, (14, 9), (50, 70), {"steps": 3, "dilations": (1, 2, 4)}),
    "long": (1, 1, (5, 5), (200, 33), {}),
    "farther-than-the-image": (1, 3, (6, 4), (12, 10), {"steps": 4, "dilations": (30,)}),
    "no-steps": (2, 9, (7, 8), (20, 33), {"steps": 0}),
    "one-pixel": (1, 2, (1, 1), (1, 1), {"steps": 2}),
    "six-dilations": (1, 2, (20, 21), (30, 31), {"steps": 2, "dilations": (1, 2, 4, 8, 12, 24, 3, 5, 7)}),
    "smaller": (1, 3, (40, 50), (20, 31), {"steps": 1}),
    "windows": (
        2, 7, (4, 4), (61, 45),
        {"steps": 3, "dilations": (1, 3), "crop_size": (20, 20), "canvas_size": (30, 32),
         "windows": [(0, 0), (0, 12), (10, 0), (10, 12)]},
    ),
    "small": (2, 9, (3, 4), (9, 11), {"steps": 2, "dilations": (1, 2, 4)}),
    "small-windows": (
        1, 5, (2, 2), (8, 9), {"steps": 2, "dilations": (2,), "crop_size": (4, 4), "canvas_size": (4, 6),
                               "windows": [(0, 0), (0, 2)]},
    ),
    "one-window": (1, 3, (4, 5), (31, 40), {"steps": 2, "crop_size": (16, 20), "canvas_size": (16, 20)}),
}  # fmt: skip
INTERPRETED = ["small", "small-windows", "farther-than-the-image", "no-steps", "one-pixel"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _case(name: str, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict]:
    B, Q, grid, size, options = CASES[name]
    torch.manual_seed(0)
    image = F.interpolate(torch.randn(B, 3, 11, 13), (40, 60), mode="bicubic")
    maps = torch.randn(B * len(options.get("windows", [0])), Q, *grid)
    return (image.to(dtype), maps.to(dtype), size), options


def _skip_unless_possible(backend: str, image: Tensor, maps: Tensor) -> None:
    with use_backend(backend):
        reasons = _dispatch.objections("refine_maps", backend, image, maps)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def _double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_reference(backend, name, dtype):
    if backend == "triton" and name not in INTERPRETED:
        pytest.skip("Triton's interpreter is slow: some of the cases")
    args, options = _case(name, dtype)
    _skip_unless_possible(backend, *args[:2])
    with use_backend(backend):
        got = refine_maps(*args, **options)
        labels, scores = refine_maps_to_labels(*args, **options, logit_scale=4.0)
    assert got.dtype == dtype and got.is_contiguous()
    assert_within_budget(name, got, reference, *args, **options)
    want, wide = reference_labels(*map(_double, args), **options, logit_scale=4.0)
    assert labels.dtype == torch.int32 and scores.dtype == torch.float32
    assert (labels != want).sum() <= 1e-3 * want.numel()
    assert_within_budget("scores", scores, lambda: wide)


def test_reference_is_the_formula():
    """Pixel by pixel with loops."""
    torch.manual_seed(0)
    image, z = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    want = torch.zeros_like(z)
    for y in range(6):
        for x in range(5):
            near = [
                (min(max(y + d * i, 0), 5), min(max(x + d * j, 0), 4))
                for d in (1, 3)
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
                if (i, j) != (0, 0)
            ]
            unlike = []
            for channel in image:
                samples = torch.stack([channel[p] for p in near] + [channel[y, x]] * 2)
                unlike.append([abs(channel[p] - channel[y, x]) / (1e-8 + 0.1 * samples.std()) for p in near])
            weights = (-torch.tensor(unlike, dtype=torch.float64).mean(0)).softmax(0)
            want[y, x] = sum(w * z[p] for w, p in zip(weights, near, strict=True))
    got = reference(image[None], z[None, None], steps=1, dilations=(1, 3))
    torch.testing.assert_close(got[0, 0], want)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_official_answers(backend):
    """The official logits before refinement are not kept: what windows and patches give takes their place."""
    folder = os.environ.get("ZS3FAST_GOLDENS")
    if not folder:
        pytest.skip("ZS3FAST_GOLDENS, the folder of official answers, is not set")
    sys.path.insert(0, folder)
    try:
        import training_free_reference as official
    finally:
        sys.path.remove(folder)
    golden = np.load(Path(folder, "training_free_tiny.npz"))
    meta = json.loads(str(golden["meta"]))
    weights = {k[7:]: torch.from_numpy(golden[k]) for k in golden.files if k.startswith("weight/")}
    tower = official.Tower(weights, meta["heads"], meta["patch"])
    canvas, text = torch.from_numpy(golden["input/canvas"]), torch.from_numpy(golden["input/text"])
    classes = torch.from_numpy(golden["input/name_class"]).long()
    crop, size = (meta["crop"],) * 2, tuple(meta["ori"])
    from zs3fast.labels.windows import sliding_windows

    windows = sliding_windows(tuple(canvas.shape[-2:]), crop, (meta["stride"],) * 2)
    crops = torch.cat([canvas[..., y : y + crop[0], x : x + crop[1]] for y, x in windows])
    for method, threshold in (("sclip", 0.0), ("naclip", 0.1)):
        logits = torch.einsum("bdhw,qd->bqhw", official.patches(tower, crops, method), text)
        frame = {"crop_size": crop, "canvas_size": tuple(canvas.shape[-2:]), "windows": windows}
        with use_backend(backend):
            names, scores = refine_maps_to_labels(canvas, logits, size, logit_scale=40.0, **frame)
            refined = refine_maps(canvas, logits, size, **frame)[0]
        labels = classes[names[0].long()].masked_fill(scores[0] < threshold, 0)
        want = torch.from_numpy(golden[f"eval/{method}_pamr/labels"])
        assert (labels != want).float().mean() <= 1e-3
        p = (40 * refined).softmax(0)
        p = torch.stack([p[classes == c].amax(0) for c in range(int(classes.max()) + 1)])
        p = p / p.sum(0) if method == "naclip" else p
        official_p = torch.from_numpy(golden[f"eval/{method}_pamr/probabilities_3"])
        ours = p[:, ::3, ::3]
        assert (ours - official_p).norm() <= 1e-5 * official_p.norm()


# --- properties ------------------------------------------------------------------------------------------------------


def test_weights_are_shares():
    weights = neighbour_weights(torch.randn(2, 3, 9, 7), (1, 2))
    assert weights.shape == (2, 16, 9, 7)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 9, 7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_flat_takes_all_neighbours_alike(backend):
    """White of a photo, normalised: upsampling it by rounded shares would leave noise that 1e-8 does not hide."""
    image = torch.full((1, 3, 7, 10), 2.6400)
    maps = torch.randn(1, 2, 21, 33)
    _skip_unless_possible(backend, image, maps)
    if backend == "reference":
        image, maps = image.double(), maps.double()
    with use_backend(backend):
        got = refine_maps(image, maps, steps=1, dilations=(1,))
    box = F.avg_pool2d(F.pad(maps, (1,) * 4, mode="replicate"), 3, 1, divisor_override=1)
    torch.testing.assert_close(got, (box - maps) / 8, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_colours_that_differ_are_kept_apart(backend):
    image = torch.zeros(1, 3, 12, 33)
    image[..., 16:] = 5
    maps = torch.rand(1, 1, 12, 33)
    maps[..., 16:] += 10
    _skip_unless_possible(backend, image, maps)
    with use_backend(backend):
        got = refine_maps(image, maps, steps=4, dilations=(2, 3))
    assert got[..., :16].max() < 1.5 and got[..., 16:].min() > 9.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_names_do_not_win_but_count(backend):
    args, options = _case("small")
    _skip_unless_possible(backend, *args[:2])
    with use_backend(backend):
        labels, scores = refine_maps_to_labels(*args, **options, logit_scale=2.0, excluded=[0, 7, 8])
        values = refine_maps_to_labels(*args, **options, excluded=(0, 7, 8))[1]
    assert not torch.isin(labels, torch.tensor([0, 7, 8])).any()
    refined = reference(*map(_double, args), **options)
    chosen = (2 * refined).softmax(1)
    torch.testing.assert_close(scores.double(), chosen.gather(1, labels[:, None].long())[:, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values.double(), refined.gather(1, labels[:, None].long())[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_to_the_lowest_name_and_nan_wins(backend):
    image, maps = torch.randn(1, 3, 6, 7), torch.zeros(1, 11, 6, 7)
    maps[:, 3:] = 1.0
    _skip_unless_possible(backend, image, maps)
    with use_backend(backend):
        assert (refine_maps_to_labels(image, maps, steps=2)[0] == 3).all()
        assert (refine_maps_to_labels(image, maps, steps=2, excluded=[3, 4])[0] == 5).all()
        maps[:, 9] = float("nan")
        labels, scores = refine_maps_to_labels(image, maps, steps=2, logit_scale=1.0)
    assert (labels == 9).all() and scores.isnan().all()


@pytest.mark.parametrize("backend", ["float64", *BACKENDS])
@pytest.mark.parametrize("windows", [False, True])
def test_nan_stays_where_a_resize_gives_it_no_weight(backend, windows):
    """Of an odd factor every third pixel is a sample itself, its neighbours' weights 0: fp32 and fp64 disagreed there,
    by how they rounded its position. The pixels before the first sample are it alone as well."""
    image, maps = torch.randn(1, 3, 15, 21), torch.randn(1, 2, 5, 7)
    maps[0, 1, 2, 3] = float("nan")
    maps[0, 0, 1, 1] = float("nan")
    options = {"crop_size": (15, 21), "canvas_size": (15, 21), "windows": [(0, 0)]} if windows else {}
    if backend == "float64":
        got = reference(image.double(), maps.double(), (15, 21), steps=0, **options)
    else:
        _skip_unless_possible(backend, image, maps)
        with use_backend(backend):
            got = refine_maps(image, maps, (15, 21), steps=0, **options)
    want = torch.zeros(1, 2, 15, 21, dtype=torch.bool)
    want[0, 1, 5:10, 8:13] = True
    want[0, 0, 2:7, 2:7] = True
    assert torch.equal(got.isnan(), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_no_farther_than_its_neighbours(backend):
    image, maps = torch.randn(1, 3, 40, 40), torch.randn(1, 2, 40, 40)
    maps[0, 1, 20, 20] = float("nan")
    _skip_unless_possible(backend, image, maps)
    with use_backend(backend):
        got = refine_maps(image, maps, steps=2, dilations=(3,))
    assert got[0, 0].isfinite().all()
    assert got[0, 1, 14:27, 14:27].isnan().any()
    got[0, 1, 14:27, 14:27] = 0
    assert got.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_out(backend):
    image, maps = torch.randn(0, 3, 6, 7), torch.randn(0, 2, 3, 4)
    _skip_unless_possible(backend, image, maps)
    with use_backend(backend):
        assert refine_maps(image, maps, (6, 7)).shape == (0, 2, 6, 7)
        assert refine_maps(torch.randn(2, 3, 6, 7), torch.randn(2, 0, 3, 4), (6, 7)).shape == (2, 0, 6, 7)
        labels, scores = refine_maps_to_labels(image, maps, (6, 7))
    assert labels.shape == scores.shape == (0, 6, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend):
    image, maps = torch.randn(2, 9, 8, 3).permute(0, 3, 1, 2), torch.randn(10, 9, 2, 3).permute(2, 3, 1, 0)
    _skip_unless_possible(backend, image, maps)
    before = maps.clone()
    with use_backend(backend):
        got = refine_maps(image, maps, steps=2, dilations=(1, 2))
        assert_within_budget("transposed", got, reference, image, maps, steps=2, dilations=(1, 2))
        assert refine_maps(image, maps, steps=0).data_ptr() != maps.data_ptr()
        got = refine_maps(image[:1], maps[:1].expand(1, -1, -1, -1)[:, 1:2], steps=1)
    assert_within_budget("sliced", got, reference, image[:1], maps[:1, 1:2], steps=1)
    assert torch.equal(maps, before)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_cpp_with_any_number_of_threads(threads):
    """Threads take names, or rows where names are few: both must agree, ties across their shares included."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for name in ("upsampled", "as-they-are", "long", "windows"):
            args, options = _case(name)
            _skip_unless_possible("cpp", *args[:2])
            with use_backend("cpp"), torch.inference_mode():
                got = refine_maps(*args, **options)
                labels, scores = refine_maps_to_labels(*args, **options, logit_scale=3.0)
            assert_within_budget(name, got, reference, *args, **options)
            want = reference_labels(*map(_double, args), **options, logit_scale=3.0)
            assert torch.equal(labels, want[0])
            assert_within_budget("scores", scores, lambda: want[1])  # noqa: B023
        with use_backend("cpp"):
            labels, _ = refine_maps_to_labels(torch.randn(1, 3, 8, 8), torch.ones(1, 23, 8, 8), excluded=[0, 1])
        assert (labels == 2).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_cpp_tiles_leave_no_seam(threads):
    """Images beyond 256 MiB of weights are done in tiles: around every place the answer is that of its surroundings."""
    before = torch.get_num_threads()
    height, width, steps, dilations = 1500, 2300, 3, (4, 8)
    torch.manual_seed(0)
    image = F.interpolate(torch.randn(1, 3, 150, 230), (height, width), mode="bilinear")
    maps = torch.randn(1, 2, 60, 92)
    _skip_unless_possible("cpp", image, maps)
    try:
        torch.set_num_threads(threads)
        with use_backend("cpp"):
            got = refine_maps(image, maps, (height, width), steps=steps, dilations=dilations)
            labels, scores = refine_maps_to_labels(image, maps, (height, width), steps=steps, dilations=dilations)
    finally:
        torch.set_num_threads(before)
    full, reach = F.interpolate(maps.double(), (height, width), mode="bilinear"), steps * max(dilations)
    for axis in range(2):  # strips across all columns, and across all rows, border to border
        for start in (0, 700, 1400 if axis == 0 else 2200):
            strip = slice(max(start - reach, 0), start + 100 + reach)
            part = (..., strip, slice(None)) if axis == 0 else (..., slice(None), strip)
            want = reference(image[part].double(), full[part], steps=steps, dilations=dilations)
            inner = slice(start - strip.start, start - strip.start + 100)
            outer = slice(start, start + 100)
            cut = (lambda x, s: x[..., s, :]) if axis == 0 else (lambda x, s: x[..., s])
            torch.testing.assert_close(cut(got, outer).double(), cut(want, inner), rtol=1e-4, atol=1e-5)
            sure = (cut(want, inner)[:, 0] - cut(want, inner)[:, 1]).abs() > 1e-5
            assert torch.equal(cut(labels, outer)[sure], cut(want, inner).argmax(1).int()[sure])
    torch.testing.assert_close(scores, got.amax(1))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_cpp_on_every_instruction_set(capability):
    """torch fixes the instruction set when it starts, hence a process each; one this CPU lacks falls back."""
    _skip_unless_possible("cpp", torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    program = """
from tests.ops.test_refine_maps import _case, _double
from tests.ops.budget import assert_within_budget
from zs3fast.ops import refine_maps, refine_maps_to_labels, use_backend
from zs3fast.ops.refine_maps import reference, reference_labels
import torch
use_backend("cpp")
for name in ("upsampled", "as-they-are", "windows"):
    args, options = _case(name)
    assert_within_budget(name, refine_maps(*args, **options), reference, *args, **options)
    labels, scores = refine_maps_to_labels(*args, **options, logit_scale=4.0)
    want = reference_labels(*map(_double, args), **options, logit_scale=4.0)
    assert torch.equal(labels, want[0])
    assert_within_budget("scores", scores, lambda: want[1])
print("agrees")
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "agrees\n", done.stderr


@pytest.mark.parametrize(("names", "limit_mib"), [(21, 100), (300, 100)])
def test_cpp_memory_beyond_input_and_result(names, limit_mib):
    """375 x 500, any number of names, from windows' logits: composed of torch ops 300 names are 3.4 GiB a step."""
    _skip_unless_possible("cpp", torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    program = f"""
import torch
from zs3fast.ops import refine_maps_to_labels, use_backend
from zs3fast.utils.memory import peak_resident_bytes, reset_peak_resident, resident_bytes
use_backend("cpp")
torch.set_num_threads(2)
image = torch.randn(1, 3, 336, 448)
def call(names):
    maps = torch.randn(6, names, 14, 14)
    windows = [(y, x) for y in (0, 112) for x in (0, 112, 224)]
    before = resident_bytes()
    reset_peak_resident()
    frame = dict(crop_size=(224, 224), canvas_size=(336, 448), windows=windows)
    refine_maps_to_labels(image, maps, (375, 500), logit_scale=40.0, steps=1, **frame)
    return (peak_resident_bytes() - before) / 2**20
call(1)
print(call({names}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < limit_mib


# --- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_opcheck(backend, labels):
    image, maps = torch.randn(1, 3, 6, 7), torch.randn(1, 3, 4, 5)
    _skip_unless_possible(backend, image, maps)
    with use_backend(backend):
        args = (image, maps, (8, 9), (8, 9), (8, 9), [0, 0], 2, [1, 2], 4.0, [1], labels)
        torch.library.opcheck(torch.ops.zs3fast.refine_maps, args)


def test_compiles_whole():
    (image, maps, size), options = _case("windows")

    def call(image, maps):
        return refine_maps(image, maps, size, **options) * 2, *refine_maps_to_labels(image, maps, size, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(image, maps), call(image, maps), strict=True):
        torch.testing.assert_close(got, want)


def test_reference_is_differentiable():
    image, maps = torch.randn(1, 2, 5, 6, dtype=torch.float64), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    maps.requires_grad_()
    call = lambda z: reference(image, z, (5, 6), steps=2, dilations=(1, 2))  # noqa: E731
    assert torch.autograd.gradcheck(call, (maps,), fast_mode=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps: expected 0 or more, got -1"),
        ({"steps": 1.0}, TypeError, "steps: expected an int, got float"),
        ({"dilations": ()}, ValueError, "dilations: expected at least one"),
        ({"dilations": (0, 8)}, ValueError, "dilations: expected at least one, each 1 or more, got \\(0, 8\\)"),
        ({"dilations": 8}, TypeError, "dilations: expected ints, got 8"),
        ({"size": (0, 4)}, ValueError, "size: expected at least"),
        ({"size": 4}, TypeError, "size: expected two ints"),
        ({"windows": [(0, 0)]}, ValueError, "windows: expected with crop_size and canvas_size"),
        ({"windows": [], "crop_size": (4, 4), "canvas_size": (4, 4)}, ValueError, "windows: expected one at least"),
        (
            {"windows": [(1, 0)], "crop_size": (4, 4), "canvas_size": (4, 4)},
            ValueError,
            "windows: expected \\(1, 0\\) of size \\(4, 4\\) to lie on the canvas, got \\(4, 4\\)",
        ),
        ({"crop_size": (4, 4), "canvas_size": (4, 6)}, ValueError, "none over pixel \\(0, 4\\)"),
        ({"maps": torch.zeros(2, 3, 4, 4)}, ValueError, "maps: expected 1 images \\* 1 windows"),
        ({"maps": torch.zeros(3, 4, 4)}, ValueError, "maps: expected \\[B, channels, height, width\\]"),
        ({"maps": torch.zeros(1, 3, 0, 4)}, ValueError, "maps: expected"),
        ({"image": torch.zeros(1, 0, 4, 4)}, ValueError, "image: expected one channel at least"),
        ({"image": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, TypeError, "image: expected a floating-point tensor"),
        ({"image": None}, TypeError, "image: expected a tensor"),
    ],
)
def test_bad_requests(change, error, message):
    arguments = {"image": torch.zeros(1, 3, 8, 8), "maps": torch.zeros(1, 3, 4, 4)} | change
    for call in (refine_maps, refine_maps_to_labels):
        with pytest.raises(error, match=message):
            call(**arguments)


def test_bad_rules():
    image, maps = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)
    for change, error, message in (
        ({"logit_scale": 0.0}, ValueError, "logit_scale: expected a positive number, got 0.0"),
        ({"logit_scale": "40"}, TypeError, "logit_scale: expected a number or None"),
        ({"excluded": [3]}, ValueError, "excluded: expected names 0..2, got \\[3\\]"),
        ({"excluded": [0, 1, 2]}, ValueError, "excluded: expected some of the 3 names to be left"),
    ):
        with pytest.raises(error, match=message):
            refine_maps_to_labels(image, maps, **change)
    with pytest.raises(ValueError, match="maps: expected one name at least"):
        refine_maps_to_labels(image, maps[:, :0])
    with pytest.raises(ValueError, match="not differentiable"):
        refine_maps(image, maps.requires_grad_())
