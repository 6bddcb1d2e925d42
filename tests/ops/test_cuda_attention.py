"""The tensor-core kernels without a GPU: their very bodies (csrc/<op>/cuda*_kernel.h), a warp of 32 lanes in lock step.

tests/ops/emulated/mma.h runs them and throws where a GPU would go wrong in silence: addresses out of bounds or off
their alignment, shared memory used by two warps without a barrier between them, copies not waited for; and so does
emulated/wgmma.h with warpgroups. They take the place of backends "cuda" and "cuda:wgmma" and are judged as
every kernel is. Launches, registers and speed are not seen this way.
"""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops import software_tiles
from tests.ops import test_proposal_attention as proposals
from tests.ops import test_region_bridge_attention as bridge
from tests.ops.budget import assert_within_budget
from tests.ops.cxx import shared_library
from zs3fast.ops import (
    _dispatch,
    _measured,
    _mma,
    masks_to_bits,
    proposal_attention,
    region_bridge_attention,
    use_backend,
)
from zs3fast.ops._bits import pack_bits
from zs3fast.ops.proposal_attention import _reference_backward_run as proposals_backward
from zs3fast.ops.proposal_attention import _reference_run as proposals_run
from zs3fast.ops.region_bridge_attention import _reference_backward_run as bridge_backward
from zs3fast.ops.region_bridge_attention import _reference_run as bridge_run

ROOT = Path(__file__).parents[2]
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
MISTAKES_OF_WARPGROUPS = Path(__file__).with_name("emulated") / "wgmma_mistakes.cpp"
BACKENDS = {"cuda": "", "cuda:wgmma": "_wgmma"}  # and what the names of their kernels end in
BOTH = pytest.mark.parametrize("kernels", BACKENDS, indirect=True)
WGMMA = pytest.mark.parametrize("kernels", ["cuda:wgmma"], indirect=True)
Long4 = ctypes.c_int64 * 4


class View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", Long4), ("begin", ctypes.c_uint64), ("end", ctypes.c_uint64))


def view(x: Tensor) -> View:
    storage = x.untyped_storage()
    strides = (*x.stride(), 0, 0, 0, 0)[:4]
    return View(x.data_ptr(), Long4(*strides), storage.data_ptr(), storage.data_ptr() + storage.nbytes())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    sources = sorted(
        {*Path(__file__).with_name("emulated").glob("*.cpp")} - {MISTAKES_OF_WARPGROUPS, software_tiles.SOURCE}
    )
    folders = (f"-I{ROOT / 'csrc'}", f"-I{Path(__file__).parent}")
    return shared_library(tmp_path_factory.mktemp("kernels") / "emulated.so", sources, "-O1", *folders)


def call(function, *arguments) -> None:
    """The function's error, if it has one, as a RuntimeError."""
    function.restype = ctypes.c_bool
    error = ctypes.create_string_buffer(200)
    if not function(*arguments, error, ctypes.c_int64(200)):
        raise RuntimeError(error.value.decode())


class Emulated:
    """The arguments of torch.ops.zs3fast.<op>, given to the kernels' bodies."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.bank_conflicts = 0

    def run(self, name: str, q: Tensor, tensors: list[Tensor], sizes: list[int], scale: float) -> tuple[Tensor, Tensor]:
        B, heads, rows, dh = q.shape
        output = torch.full((B, rows, heads, dh), torch.nan, dtype=q.dtype).transpose(1, 2)
        lse = torch.full((B, heads, rows), torch.nan)
        views = [view(x) for x in (*tensors, output, lse)]
        conflicts = ctypes.c_int64()
        call(
            getattr(self.library, name),
            (View * len(views))(*views),
            len(views),
            (ctypes.c_int64 * 8)(*sizes),
            dh,
            ctypes.c_bool(q.dtype == torch.bfloat16),
            ctypes.c_float(scale),
            ctypes.byref(conflicts),
        )
        self.bank_conflicts += conflicts.value
        return output, lse

    def proposal_attention(self, name, q, k_self, v_self, k, v, bits, scale):
        sizes = [*q.shape[:3], k.shape[2]]
        return self.run(name, q, [q, k_self, v_self, k, v, bits], sizes, scale)

    def region_bridge_attention(self, name, q, k, v, num_prefix, grid, regions, scale):
        prefix_q = q.shape[2] - grid[0] * grid[1] - regions[0] * regions[1]
        sizes = [*q.shape[:2], prefix_q, num_prefix, *grid, *regions]
        return self.run(name, q, [q, k, v], sizes, scale)


@pytest.fixture(autouse=True)
def kernels(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Emulated:
    """Backend "cuda" is the kernels' bodies on the CPU; what only a GPU tensor can have is no objection to them."""
    emulated = Emulated(library)
    monkeypatch.setattr(_dispatch, "cuda_objections", lambda op, tensor, dtypes, only=None: [])
    for op in ("proposal_attention", "region_bridge_attention"):
        for backend, name in BACKENDS.items():
            real = _dispatch.registered(op)[backend]
            stand_in = _dispatch.Implementation(partial(getattr(emulated, op), f"{op}{name}"), real.objections)
            monkeypatch.setitem(_dispatch._implementations[op], backend, stand_in)
    with use_backend(getattr(request, "param", "cuda")):
        yield emulated


# proposal_attention --------------------------------------------------------------------------------------------------

PROPOSALS = [  # B, heads, dh, Nq, N
    (1, 2, 64, 18, 33),
    (2, 1, 64, 40, 577),  # 19 key blocks of 32 for 8 warps
    (1, 1, 64, 1, 70),  # one proposal
    (1, 1, 64, 16, 256),
    (1, 2, 32, 17, 70),
    (1, 1, 128, 33, 300),
    (1, 1, 64, 5, 1),
    (1, 2, 64, 4, 0),  # no patches
    (2, 1, 64, 0, 20),  # no proposals
    (0, 2, 64, 5, 20),
]


LONG_PROPOSALS = [  # more tiles than a ring of the Hopper kernel holds
    (1, 1, 64, 130, 641),  # 6 tiles of 128 patches, the last of one, and 2 blocks of 128 proposals
    (1, 1, 128, 70, 330),  # 6 of 64, the last of 10
]


def fit(shape):
    """The shape, with heads of a width that the backend in use has."""
    wide = _dispatch.requested_backend() == "cuda:wgmma"
    return (*shape[:2], max(shape[2], 64 if wide else 0), *shape[3:])


def check_proposals(tensors, masks, scale=None):
    """Output within the budget and log-sum-exp as in float64; returns both."""
    bits, scale = pack_bits(masks), tensors[0].shape[-1] ** -0.5 if scale is None else scale
    output, lse = torch.ops.zs3fast.proposal_attention(*tensors, bits, scale)
    assert_within_budget("output", output, proposals.reference, *tensors, masks, scale)
    wide = proposals_run(*(x.double() for x in tensors), bits, scale)[1]
    torch.testing.assert_close(lse.double(), wide, rtol=1e-5, atol=1e-5)
    return output, lse


@HALF
@BOTH
@pytest.mark.parametrize("shape", PROPOSALS, ids=proposals.ids)
def test_proposals(shape, dtype):
    tensors, _, masks = proposals.make(fit(shape), "mixed", dtype)
    output, _ = check_proposals(tensors, masks)
    assert output.dtype == dtype and output.transpose(1, 2).is_contiguous()


@HALF
@WGMMA
@pytest.mark.parametrize("shape", LONG_PROPOSALS, ids=proposals.ids)
def test_proposals_of_many_tiles(shape, dtype):
    tensors, _, masks = proposals.make(shape, "mixed", dtype)
    check_proposals(tensors, masks)


@BOTH
@pytest.mark.parametrize("kind", [kind for kind in proposals.KINDS if kind != "mixed"])
def test_proposals_of_other_masks(kind):
    tensors, _, masks = proposals.make((1, 2, 64, 21, 150), kind, torch.bfloat16)
    output, _ = check_proposals(tensors, masks)
    if kind == "empty":
        assert torch.equal(output, tensors[2])


@HALF
@BOTH
def test_an_empty_row_is_its_own_value(dtype):
    tensors, _, masks = proposals.make((1, 2, 64, 19, 300), "mixed", dtype)
    masks[:, 3] = masks[:, 17] = False
    output = proposal_attention(*tensors, masks)
    for row in (3, 17):
        assert torch.equal(output[:, :, row], tensors[2][:, :, row])


def test_a_block_of_keys_that_no_row_keeps_is_not_read():
    """It is full of NaN, which a product would spread however small the probabilities are."""
    (q, k_self, v_self, k, v), _, masks = proposals.make((1, 2, 64, 20, 290), "full", torch.float16)
    k, v = k.clone(), v.clone()
    masks[:, :, 64:96] = masks[:, :, 256:] = False
    masks[:, :16, 96:192] = False  # of the first tile alone
    for x in (k, v):
        x[:, :, 64:96] = x[:, :, 256:] = torch.nan
    got = proposal_attention(q, k_self, v_self, k, v, masks)
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    assert_within_budget("output", got, proposals.reference, q, k_self, v_self, k, v, masks)


@BOTH
def test_proposals_bits_are_masks():
    tensors, _, masks = proposals.make((1, 2, 64, 20, 45), dtype=torch.float16)
    bits = pack_bits(masks)
    behind = bits.clone()
    behind[..., -1] |= -(1 << 13)  # bits of patches that are not there
    strided = torch.stack([behind, bits], dim=-1)[..., 0]
    expected = proposal_attention(*tensors, masks)
    for words in (bits, strided):
        assert torch.equal(proposal_attention(*tensors, words), expected)


@BOTH
@pytest.mark.parametrize("how", ["contiguous", "broadcast", "one query"])
def test_proposals_strides(how):
    tensors, _, masks = proposals.make((2, 2, 64, 18, 35), dtype=torch.bfloat16)
    if how == "contiguous":
        tensors = [x.contiguous() for x in tensors]
    elif how == "broadcast":
        tensors = [*tensors[:3], *(x[:1].expand_as(x) for x in tensors[3:])]
        masks = masks[:1].expand_as(masks)
    else:
        tensors = [*(x[:, :, :1].expand_as(x) for x in tensors[:3]), *tensors[3:]]
    check_proposals(tensors, masks)


@pytest.mark.parametrize("scale", [0.0, 0.05, 1, -0.5])
def test_proposals_scale(scale):
    tensors, _, masks = proposals.make((1, 1, 32, 18, 70), dtype=torch.float16)
    check_proposals(tensors, masks, float(scale))


@BOTH
def test_proposals_large_scores():
    """Softmax of scores in the thousands is one-hot, and patches that are not kept may score highest of all."""
    tensors, _, masks = proposals.make((1, 2, 64, 18, 70), dtype=torch.bfloat16)
    check_proposals((tensors[0] * 1e4, *tensors[1:]), masks)


@HALF
@BOTH
def test_proposals_residuals_are_what_a_backward_pass_needs(dtype):
    tensors, grad, masks = proposals.make((1, 2, 64, 18, 70), "mixed", dtype)
    output, lse = check_proposals(tensors, masks)
    got = proposals_backward(grad, *tensors, pack_bits(masks), output, lse, 64**-0.5)
    gradients = proposals.gradients_of(proposals.reference, masks)
    assert_within_budget("gradients", got, gradients, grad, *tensors)


def test_a_backward_pass_by_name_is_refused_in_words():
    tensors, _, masks = proposals.make((1, 1, 32, 3, 20), dtype=torch.float16)
    output = proposal_attention(tensors[0].detach().requires_grad_(), *tensors[1:], masks)
    with pytest.raises(RuntimeError, match="proposal_attention_backward: backend 'cuda'.*\n.*\n  cuda: not written"):
        output.sum().backward()
    with use_backend("reference"):  # as auto would: any other backend's
        proposal_attention(tensors[0].detach().requires_grad_(), *tensors[1:], masks).sum().backward()


# region_bridge_attention ---------------------------------------------------------------------------------------------

BRIDGES = [  # B, heads, dh, num_prefix, grid, regions
    (2, 2, 64, 4, (7, 5), (3, 2)),  # margins on both sides
    (1, 2, 64, 11, (6, 4), (1, 1)),  # M = 1
    (1, 1, 64, 11, (16, 16), (4, 4)),  # M = 16: one block of region rows
    (1, 1, 64, 2, (16, 17), (8, 8)),  # M = 64
    (1, 1, 64, 1, (9, 14), (9, 14)),  # M = N, the global token alone
    (1, 1, 64, 63, (8, 8), (3, 7)),  # 127 keys
    (1, 1, 64, 64, (8, 8), (2, 2)),  # two steps of 64 keys, none left over
    (1, 2, 32, 3, (5, 9), (2, 5)),  # windows of 2 x 1
    (1, 1, 128, 4, (12, 9), (5, 4)),
    (1, 1, 32, 1, (1, 1), (1, 1)),
    (0, 2, 64, 4, (3, 5), (1, 2)),
]
LONG_BRIDGES = [  # more tiles than a ring of the Hopper kernel holds
    (1, 1, 64, 11, (26, 26), (4, 4)),  # 6 tiles of 128 keys, the last of 47, and 6 blocks of 128 rows
    (1, 2, 64, 64, (8, 40), (2, 5)),  # 3 of 128, none left over
    (1, 1, 128, 5, (18, 18), (3, 3)),  # 6 of 64, the last of 9
]


def check_bridge(tensors, layout):
    """Output within the budget and log-sum-exp as in float64; returns both."""
    rest = layout["num_prefix"], layout["grid"], layout["regions"], tensors[0].shape[-1] ** -0.5
    output, lse = torch.ops.zs3fast.region_bridge_attention(*tensors, *rest)
    assert_within_budget("output", output, bridge.reference, *tensors, **layout)
    wide = bridge_run(*(x.double() for x in tensors), *rest)[1]
    torch.testing.assert_close(lse.double(), wide, rtol=1e-5, atol=1e-5)
    return output, lse


@HALF
@BOTH
@pytest.mark.parametrize("shape", BRIDGES, ids=bridge.ids)
def test_bridge(shape, dtype, kernels):
    for skip in (False, True):
        tensors, _, layout = bridge.make(fit(shape), dtype, skip=skip)
        output, _ = check_bridge(tensors, layout)
        assert output.dtype == dtype and output.transpose(1, 2).is_contiguous()
    assert kernels.bank_conflicts == 0


@HALF
@WGMMA
@pytest.mark.parametrize("shape", LONG_BRIDGES, ids=bridge.ids)
def test_bridge_of_many_tiles(shape, dtype):
    tensors, _, layout = bridge.make(shape, dtype)
    check_bridge(tensors, layout)


@WGMMA
def test_bridge_ignores_what_lies_behind_the_keys():
    """A tile ends where keys do: behind them lie the regions' values, which no patch of another region may take in."""
    (q, k, v), _, layout = bridge.make((1, 1, 64, 4, (7, 5), (3, 2)), torch.float16)
    expected = region_bridge_attention(q, k, v, **layout)
    v = v.clone()
    v[:, :, -1] = torch.inf  # of the last region
    got = region_bridge_attention(q, k, v, **layout)
    same = got.isfinite().all(-1)
    assert torch.equal(got[same], expected[same]) and int((~same).sum()) == 2 * 2 + 1  # its patches and itself


@BOTH
@pytest.mark.parametrize("how", ["contiguous", "broadcast"])
def test_bridge_strides(how):
    (q, k, v), _, layout = bridge.make((2, 2, 64, 3, (5, 4), (2, 2)), torch.bfloat16)
    if how == "contiguous":
        q, k, v = (x.contiguous() for x in (q, k, v))
    else:  # one head's values for all
        k, v = k[:, :1].expand_as(k), v[:1].expand_as(v)
    check_bridge((q, k, v), layout)


@BOTH
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5])
def test_bridge_scale(scale):
    tensors, _, layout = bridge.make((1, 1, 64, 3, (5, 4), (2, 2)), torch.float16)
    output = region_bridge_attention(*tensors, **layout, scale=scale)
    assert_within_budget("output", output, bridge.reference, *tensors, **layout, scale=scale)


@HALF
@BOTH
def test_bridge_residuals_are_what_a_backward_pass_needs(dtype):
    tensors, grad, layout = bridge.make((1, 2, 64, 4, (7, 5), (3, 2)), dtype)
    output, lse = check_bridge(tensors, layout)
    rest = layout["num_prefix"], layout["grid"], layout["regions"], 64**-0.5
    got = bridge_backward(grad, *tensors, output, lse, *rest)
    assert_within_budget("gradients", got, bridge.gradients_of(bridge.reference, layout), grad, *tensors)


# Objections ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "change", "refusal"),
    [
        ((1, 1, 40, 2, 3), lambda x: x, "heads of width dh = 40, built for 32, 64, 128"),
        ((1, 1, 64, 9, 9), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "needs neighbouring columns"),
        ((1, 1, 32, 9, 9), lambda x: torch.cat([x, x[..., :4]], -1)[..., :32], "rows at multiples of 16 bytes"),
        ((1, 1, 32, 9, 9), lambda x: torch.cat([x[..., :4], x, x[..., :4]], -1)[..., 4:36], "multiples of 16 bytes"),
    ],
    ids=["dh", "columns", "rows", "offset"],
)
def test_what_they_do_not_take(shape, change, refusal):
    tensors, _, masks = proposals.make(shape, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=f"cuda: .*{refusal}"):
        proposal_attention(*tensors[:4], change(tensors[4]), masks)
    (q, k, v), _, layout = bridge.make((1, 1, shape[2], 3, (5, 4), (2, 2)), torch.float16)
    with pytest.raises(RuntimeError, match=f"cuda: .*{refusal}"):
        region_bridge_attention(q, k, change(v), **layout)


@WGMMA
def test_what_the_hopper_kernel_does_not_take():
    (q, k, v), _, layout = bridge.make((1, 1, 32, 3, (5, 4), (2, 2)), torch.float16)
    with pytest.raises(RuntimeError, match="cuda:wgmma: heads of width dh = 32, built for 64, 128"):
        region_bridge_attention(q, k, v, **layout)
    (q, k, v), _, layout = bridge.make((1, 1, 64, 3, (5, 4), (2, 2)), torch.float16)
    with pytest.raises(RuntimeError, match="cuda:wgmma: needs the tokens of k and v to lie apart"):
        region_bridge_attention(q, k[:, :, :1].expand_as(k), v, **layout)
    with pytest.raises(RuntimeError, match="masks_to_bits: backend 'cuda:wgmma' (.|\n)*not written for this op"):
        masks_to_bits(torch.zeros(1, 1, 4, 4), (2, 2))


def test_cuda_is_the_hopper_kernel_where_it_was_measured_faster(monkeypatch):
    taken = []
    wgmma = _dispatch.Implementation(
        lambda *args: taken.append("wgmma"), lambda q, *_: ["dh"] if q.shape[-1] < 64 else []
    )
    monkeypatch.setitem(_dispatch._implementations["region_bridge_attention"], "cuda:wgmma", wgmma)
    monkeypatch.setattr(
        torch.ops.zs3fast_cpp, "region_bridge_attention", lambda *args: taken.append("mma"), raising=False
    )
    monkeypatch.setattr(_dispatch, "architecture_of", lambda device: "sm_90")
    wide, narrow = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 32)
    for table, q in (
        ({}, wide),
        ({"sm_80": 2.0}, wide),
        ({"sm_90": 0.9}, wide),
        ({"sm_90": 1.2}, wide),
        ({"sm_90": 1.2}, narrow),
    ):
        monkeypatch.setattr(_measured, "SPEEDUP_OF_WGMMA", {"region_bridge_attention": table} if table else {})
        _mma.run("region_bridge_attention", q)
    assert taken == ["mma", "mma", "mma", "wgmma", "mma"]


def test_one_row_may_lie_anywhere():
    one = torch.zeros(1, 1, 1, 64, dtype=torch.float16)
    assert _mma.shape_objections(one.as_strided((1, 1, 1, 64), (7, 5, 3, 1))) == []
    assert _mma.shape_objections(torch.zeros(1, 1, 0, 64)) == []


def test_float32_is_left_to_triton(monkeypatch):
    monkeypatch.undo()
    for op, x in (
        ("proposal_attention", torch.zeros(1, 1, 2, 64)),
        ("region_bridge_attention", torch.zeros(1, 1, 2, 64)),
    ):
        reasons = _dispatch.objections(op, "cuda", *[x] * 5)
        assert reasons[:2] == ["runs on cuda tensors, not cpu", "float32 not built (float16, bfloat16)"]


# The emulation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("exchange", None),
        ("race", "without a barrier between them"),
        ("barrier", "a barrier that not every warp reaches"),
        ("copy", None),
        ("copy not waited for", "NaN"),
        ("bank conflicts", None),
        ("outside", "global address outside every buffer"),
        ("outside, but not read", None),
        ("misaligned", "global address off its alignment of 16 bytes"),
        ("outside of shared memory", "shared address 1024 for 4 bytes"),
    ],
)
def test_the_emulation_sees_mistakes(name, error, library):
    conflicts = ctypes.c_int64()
    data = torch.zeros(256, dtype=torch.bfloat16)
    arguments = (library.mistakes, ctypes.byref(view(data)), name.encode(), ctypes.byref(conflicts))
    if error is None:
        call(*arguments)
    else:
        with pytest.raises(RuntimeError, match=error):
            call(*arguments)
    assert (conflicts.value > 0) == (name == "bank conflicts")


def test_a_product_of_matrices(library):
    """Rows loaded as matrices and multiplied: small integers, so that the sums are exact."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-9, 10, (n, 16), generator=generator).to(torch.bfloat16) for n in (16, 8))
    product = torch.full((16, 8), torch.nan)
    call(library.product, (View * 3)(view(a), view(b), view(product)))
    assert torch.equal(product, a.float() @ b.float().T)
