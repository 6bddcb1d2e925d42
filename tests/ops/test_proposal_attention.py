"""proposal_attention: every backend against the definition, and the definition against joint attention."""

from __future__ import annotations

import re

import pytest
import torch

from tests.ops.budget import assert_within_budget
from zs3fast.ops import _dispatch, _extension, proposal_attention, unpack_bits, use_backend
from zs3fast.ops._bits import num_words, pack_bits
from zs3fast.ops.proposal_attention import reference

op = torch.ops.zs3fast.proposal_attention
op_backward = torch.ops.zs3fast.proposal_attention_backward

needs_cpp = pytest.mark.skipif(bool(_extension.objections()), reason="; ".join(_extension.objections()))
CPP = pytest.param("cpp", marks=needs_cpp)
BACKENDS = ["reference", CPP, "triton"]
KINDS = ("empty", "sparse", "mixed", "full")
SMALL = [  # B, heads, dh, Nq, N
    (2, 2, 8, 5, 20),
    (1, 2, 64, 18, 33),  # one row tile and two rows, one bit of the second word
    (1, 3, 12, 1, 70),
    (1, 1, 2, 17, 1),
    (2, 1, 8, 0, 20),  # no proposals
    (1, 2, 8, 4, 0),  # no patches
    (0, 2, 8, 5, 20),
]
LARGE = [
    (1, 2, 64, 100, 900),
    (2, 3, 64, 40, 577),
    (1, 2, 80, 33, 256),
    (2, 1, 128, 16, 300),
    (1, 2, 200, 20, 70),
]
CASES = [(b, s, k) for b in ("reference", "triton") for s in SMALL for k in ("mixed",)]
CASES += [(b, SMALL[1], k) for b in ("reference", "triton") for k in KINDS if k != "mixed"]
CASES += [pytest.param("cpp", s, k, marks=needs_cpp) for s in SMALL + LARGE for k in KINDS]
ANY = SMALL[0]
NAMES = ("dq", "dk_self", "dv_self", "dk", "dv")


def ids(value):
    if not isinstance(value, tuple):
        return None
    return "-".join(f"{label}{n}" for label, n in zip(("B", "heads", "dh", "Nq", "N"), value, strict=True))


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make_masks(kind, B, Nq, N, generator):
    """empty, full, 5 % at random, or rows of all sorts: empty, one patch, boxes, dense and full ones side by side."""
    chance = torch.rand(B, Nq, N, generator=generator)
    if kind in ("empty", "full"):
        return torch.full((B, Nq, N), kind == "full")
    if kind == "sparse":
        return chance < 0.05
    masks = chance < torch.rand(B, Nq, 1, generator=generator)
    masks[:, :16] |= chance[:, :16] < 0.9  # a dense tile
    masks[:, :16, N // 3 : N // 2] = False  # whose union has a gap
    masks[:, 1::7] = False
    masks[:, 2::7] = torch.arange(N) == N - 1
    return masks


def make(shape, kind="mixed", dtype=torch.float32, device="cpu", seed=0):
    """(q, k_self, v_self, k, v) as views of one packed projection [B, Nq + N, 3, heads, dh], a gradient and masks."""
    B, heads, dh, Nq, N = shape
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(B, Nq + N, 3, heads, dh, generator=generator).to(device, dtype)
    q, k, v = (x.transpose(1, 2) for x in (2 * packed).unbind(2))
    grad = torch.randn(B, heads, Nq, dh, generator=generator).to(device, dtype)
    tensors = (q[:, :, :Nq], k[:, :, :Nq], v[:, :, :Nq], k[:, :, Nq:], v[:, :, Nq:])
    return tensors, grad, make_masks(kind, B, Nq, N, generator).to(device)


def gradients_of(function, masks, scale=None):
    """(grad, q, k_self, v_self, k, v) -> their gradients, by autograd through `function`."""

    def gradients(grad, *tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(function(*tensors, masks, scale), tensors, grad)

    return gradients


def check(backend, tensors, grad, masks, scale=None):
    with use_backend(backend):
        output = proposal_attention(*tensors, masks, scale)
        got = gradients_of(proposal_attention, masks, scale)(grad, *tensors)
    assert output.dtype == grad.dtype
    assert_within_budget("output", output, reference, *tensors, masks, scale)
    assert_within_budget(f"({', '.join(NAMES)})", got, gradients_of(reference, masks, scale), grad, *tensors)
    return output


# The op against the definition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "shape", "kind"), CASES, ids=ids)
def test_output_and_gradients(backend, shape, kind):
    output = check(backend, *make(shape, kind, device=device_of(backend)))
    assert output.transpose(1, 2).is_contiguous()  # joining the heads is a view


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types(backend, dtype):
    tensors, grad, masks = make((1, 2, 64, 18, 70), "mixed", dtype, device_of(backend))
    with use_backend(backend):
        reasons = _dispatch.objections("proposal_attention", backend, *tensors)
    if backend == "triton" and reasons:
        assert device_of(backend) == "cpu" and dtype == torch.bfloat16, reasons
        pytest.skip("; ".join(reasons))
    check(backend, tensors, grad, masks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_row_is_its_own_value(backend):
    tensors, grad, masks = make((1, 2, 8, 19, 40), "mixed", device=device_of(backend))
    masks[:, 3] = masks[:, 17] = False
    with use_backend(backend):
        output = proposal_attention(*tensors, masks)
        grads = gradients_of(proposal_attention, masks)(grad, *tensors)
        nothing = proposal_attention(*(x[:, :, 17:18] for x in tensors[:3]), *tensors[3:], masks[:, 17:18])
    for row in (3, 17):
        assert torch.equal(output[:, :, row], tensors[2][:, :, row])
        torch.testing.assert_close(grads[2][:, :, row], grad[:, :, row])  # dv_self
        for g in grads[:2]:  # one score: its softmax is 1 whatever it is
            torch.testing.assert_close(g[:, :, row], torch.zeros_like(g[:, :, row]), rtol=0, atol=1e-5)
    assert torch.equal(nothing[:, :, 0], output[:, :, 17])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_masks(backend):
    tensors, grad, masks = make((1, 2, 8, 20, 45), device=device_of(backend))
    bits = pack_bits(masks)
    behind = bits.clone()
    behind[..., -1] |= -(1 << 13)  # bits of patches that are not there
    strided = torch.stack([behind, bits], dim=-1)[..., 0]
    with use_backend(backend):
        expected = proposal_attention(*tensors, masks)
        expected_grads = gradients_of(proposal_attention, masks)(grad, *tensors)
        for words in (bits, strided):
            assert torch.equal(proposal_attention(*tensors, words), expected)
            got = gradients_of(proposal_attention, words)(grad, *tensors)
            assert all(torch.equal(a, b) for a, b in zip(got, expected_grads, strict=True))


@pytest.mark.parametrize("N", [0, 1, 31, 32, 33, 900])
def test_packing_there_and_back(N):
    masks = torch.rand(2, 3, N, generator=torch.Generator().manual_seed(N)) < 0.5
    bits = pack_bits(masks)
    assert bits.dtype == torch.int32 and bits.shape == (2, 3, num_words(N))
    assert torch.equal(unpack_bits(bits, N), masks)
    if N > 32:
        word = sum(int(masks[0, 0, n]) << n for n in range(32))
        assert bits[0, 0, 0].item() & 0xFFFFFFFF == word


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["contiguous", "columns", "broadcast", "one query"])
def test_strides(backend, how):
    tensors, grad, masks = make((2, 2, 16, 18, 35), device=device_of(backend))
    if how == "contiguous":
        tensors, grad = [x.contiguous() for x in tensors], grad.contiguous()
    elif how == "columns":  # neighbouring columns far apart
        tensors = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
        masks = masks.transpose(1, 2).contiguous().transpose(1, 2)
    elif how == "broadcast":  # one image's patches for all, and the gradient of a sum
        tensors = [*tensors[:3], *(x[:1].expand_as(x) for x in tensors[3:])]
        masks = masks[:1].expand_as(masks)
        grad = torch.ones(1, device=grad.device).expand(grad.shape)
    else:  # the first masked layer: every proposal is the same token
        tensors = [*(x[:, :, :1].expand_as(x) for x in tensors[:3]), *tensors[3:]]
    check(backend, tensors, grad, masks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    tensors, grad, masks = make((1, 2, 8, 18, 35), device=device_of(backend))
    for scale in (0.0, 0.05, 1, -0.5):
        check(backend, tensors, grad, masks, scale)


@pytest.mark.parametrize("factor", [100.0, 1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend, factor):
    """Softmax of scores in the thousands is one-hot, and patches that are not kept may score highest of all."""
    tensors, grad, masks = make((1, 2, 16, 18, 70), device=device_of(backend))
    tensors = (tensors[0] * factor, *tensors[1:])
    with use_backend(backend):
        output = proposal_attention(*tensors, masks)
        got = gradients_of(proposal_attention, masks)(grad, *tensors)
    assert_within_budget("output", output, reference, *tensors, masks, fp32=1e-4)
    assert all(torch.isfinite(g).all() for g in got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_proposals_do_not_see_each_other(backend):
    """Removing and reordering proposals leaves the others as they are, whichever rows they share a tile with."""
    tensors, _, masks = make((1, 2, 16, 40, 70), device=device_of(backend))
    chosen = torch.tensor([39, 3, 20, 21, 0, 17], device=masks.device)
    with use_backend(backend):
        every = proposal_attention(*tensors, masks)
        few = proposal_attention(*(x[:, :, chosen] for x in tensors[:3]), *tensors[3:], masks[:, chosen])
    torch.testing.assert_close(few, every[:, :, chosen], rtol=1e-5, atol=1e-6)


@needs_cpp
def test_threads_do_not_change_a_bit():
    tensors, grad, masks = make((1, 1, 64, 40, 90))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with use_backend("cpp"):
                output = proposal_attention(*tensors, masks)
                results.append((output, *gradients_of(proposal_attention, masks)(grad, *tensors)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# The definition ------------------------------------------------------------------------------------------------------


def test_equals_joint_attention():
    """The published form: one attention over [proposals | patches] under identity | keep | nothing | everything."""
    (q, k_self, v_self, k, v), _, masks = make((2, 3, 8, 6, 20), dtype=torch.float64)
    Nq, N = 6, 20
    itself = torch.eye(Nq, dtype=torch.bool).expand(2, Nq, Nq)
    patches = torch.cat([torch.zeros(2, N, Nq, dtype=torch.bool), torch.ones(2, N, N, dtype=torch.bool)], dim=-1)
    joint = torch.cat([torch.cat([itself, masks], dim=-1), patches], dim=1).unsqueeze(1)
    tokens = torch.cat([q, k[:, :, :N]], dim=2)  # what patches ask does not matter here
    out = torch.nn.functional.scaled_dot_product_attention(
        tokens, torch.cat([k_self, k], dim=2), torch.cat([v_self, v], dim=2), attn_mask=joint
    )
    torch.testing.assert_close(proposal_attention(q, k_self, v_self, k, v, masks), out[:, :, :Nq])


@pytest.mark.parametrize("shape", [(1, 2, 2, 3, 4), (2, 1, 1, 2, 3)], ids=ids)
def test_gradcheck_of_the_definition(shape):
    tensors, _, masks = make(shape, dtype=torch.float64)
    masks[:, 0] = False
    tensors = [x.detach().requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *t: reference(*t, masks), tensors)
    assert torch.autograd.gradcheck(lambda *t: proposal_attention(*t, masks), tensors)


def test_default_scale_and_float64():
    tensors, _, masks = make(ANY, dtype=torch.float64)
    output = proposal_attention(*tensors, masks)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, reference(*tensors, masks, scale=8**-0.5), rtol=1e-12, atol=1e-12)


# Registration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", CPP])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph(backend, dynamic):
    tensors, grad, masks = make(ANY)

    def call(*args):
        return proposal_attention(*args) * 2

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend(backend):
        torch.testing.assert_close(compiled(*tensors, masks), call(*tensors, masks))
        expected, got = (gradients_of(f, masks)(grad, *tensors) for f in (call, compiled))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_export_with_any_number_of_proposals():
    class Attention(torch.nn.Module):
        def forward(self, q, k_self, v_self, k, v, masks):
            return proposal_attention(q, k_self, v_self, k, v, masks)

    proposals = torch.export.Dim("proposals", min=2, max=500)
    tensors, _, masks = make(ANY)
    shapes = ({2: proposals},) * 3 + ({},) * 2 + ({1: proposals},)
    program = torch.export.export(Attention(), (*tensors, masks), dynamic_shapes=shapes)
    assert "zs3fast.proposal_attention" in str(program.graph)
    tensors, _, masks = make((2, 2, 8, 31, 20))
    torch.testing.assert_close(program.module()(*tensors, masks), proposal_attention(*tensors, masks))


@pytest.mark.parametrize("backend", ["reference", CPP])
def test_autocast(backend):
    (q, k_self, *rest), _, masks = make(ANY)
    q = q.detach().requires_grad_()
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        output = proposal_attention(q, k_self.half(), *rest, masks)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert q.grad.dtype == torch.float32 and torch.isfinite(q.grad).all()


def test_only_tensors_that_want_gradients_get_them():
    (q, k_self, v_self, k, v), grad, masks = make(ANY)
    k = k.detach().requires_grad_()
    proposal_attention(q, k_self, v_self, k, v, masks).backward(grad)
    expected = gradients_of(reference, masks)(grad, q, k_self, v_self, k.detach(), v)[3]
    torch.testing.assert_close(k.grad, expected, rtol=1e-4, atol=1e-5)


def test_backends_say_why_not():
    tensors, _, masks = make((1, 1, 136, 2, 3))
    with use_backend("triton"), pytest.raises(RuntimeError, match="dh = 136, at most 128"):
        proposal_attention(*tensors, masks)
    if not _extension.objections():
        with use_backend("cpp"), pytest.raises(RuntimeError, match=r"float64 not built \(float32, float16, bfloat16\)"):
            proposal_attention(*(x.double() for x in tensors), masks)


# Mistakes ------------------------------------------------------------------------------------------------------------

T, P = torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 40, 8)  # tokens, patches
GOOD = {"q": T, "k_self": T, "v_self": T, "k": P, "v": P, "masks": torch.zeros(2, 3, 40, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": 3}, TypeError, "q: expected a tensor, got int"),
        ({"q": T.long()}, TypeError, "q: expected a floating-point tensor, got torch.int64"),
        ({"v_self": T[0]}, ValueError, "v_self: expected [B, heads, tokens, dh], got shape [2, 3, 8]"),
        ({"v": P.double()}, TypeError, "v: expected q's dtype torch.float32, got torch.float64"),
        ({"k": P.to("meta")}, ValueError, "k: expected q's device cpu, got meta"),
        ({"q": T[:, :0]}, ValueError, "q: expected at least one head of at least one column, got shape [2, 0, 3, 8]"),
        ({"k_self": T[:, :, :2]}, ValueError, "k_self: expected q's shape [2, 2, 3, 8], got [2, 2, 2, 8]"),
        ({"k": P[:, :1]}, ValueError, "k: expected [2, 2, N, 8] to go with q [2, 2, 3, 8], got [2, 1, 40, 8]"),
        ({"v": P[:, :, :39]}, ValueError, "v: expected k's shape [2, 2, 40, 8], got [2, 2, 39, 8]"),
        ({"masks": None}, TypeError, "masks: expected a tensor, got NoneType"),
        ({"masks": GOOD["masks"].float()}, TypeError, "masks: expected bool, or int32 bits, got torch.float32"),
        ({"masks": GOOD["masks"].to("meta")}, ValueError, "masks: expected q's device cpu, got meta"),
        ({"masks": GOOD["masks"][:, :, :39]}, ValueError, "masks: expected [2, 3, 40], N = 40, got [2, 3, 39]"),
        ({"masks": GOOD["masks"].int()}, ValueError, "masks: expected [2, 3, 2], ceil(40 / 32) words, got [2, 3, 40]"),
        ({"scale": "1"}, TypeError, "scale: expected a number or None, got str"),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
def test_mistakes(changed, error, message):
    with pytest.raises(error, match="^proposal_attention: " + re.escape(message)):
        proposal_attention(**(GOOD | changed))


def test_mistakes_with_bits():
    with pytest.raises(TypeError, match="^unpack_bits: bits: expected an int32 tensor, got torch.int64"):
        unpack_bits(torch.zeros(2, 2, dtype=torch.int64), 40)
    with pytest.raises(
        ValueError, match=re.escape("unpack_bits: bits: expected [..., 2] for N = 40, got shape [2, 3]")
    ):
        unpack_bits(torch.zeros(2, 3, dtype=torch.int32), 40)
