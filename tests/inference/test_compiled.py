"""What torch.compile is asked to do: one graph, class lists and weights as inputs, few shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.goldens_data import relative
from tests.tiny import ONE_STAGE, tiny_inputs, tiny_model
from zs3fast.inference import compiled
from zs3fast.inference.compiled import CompiledModel
from zs3fast.models.registry import list_models, model_class
from zs3fast.types import SegmentationOutput


class Graphs:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self):
        self.count, self.code = 0, ""

    def __call__(self, graph, inputs):
        self.count += 1
        self.code = graph.code
        return graph.forward


class Toy(nn.Module):
    """Quick to trace."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, 3))

    def forward(self, images, text_embeddings):
        masks = torch.einsum("bchw,dc,nd->bnhw", images, self.weight, text_embeddings)
        return SegmentationOutput(masks, images.mean((2, 3)), images.flatten(2))


def assert_same(got, out):
    assert relative(got.mask_logits, out.mask_logits) < 1e-5
    assert (got.trusty_logits is None) == (out.trusty_logits is None)
    if out.trusty_logits is not None:
        assert relative(got.trusty_logits, out.trusty_logits) < 1e-5


COMPILE = [method for method in list_models() if model_class(method).protocol.endswith("windows")]


@pytest.mark.parametrize("method", COMPILE)
@torch.no_grad()
def test_one_graph_for_many_windows_and_class_lists(method):
    model, graphs = tiny_model(method), Graphs()
    run, size = (
        CompiledModel(model, backend=graphs),
        (96, 96) if method == "scclip" else (64, 64),
    )  # it needs 31 patches
    for windows, classes in ((2, 7), (5, 7), (3, 4), (2, 4)):
        images, text = tiny_inputs(windows, size, classes)
        assert_same(run(images, text), model(images, text))
        assert_same(run(images, text.flip(0)), model(images, text.flip(0)))
    assert graphs.count == len(run.shapes) == 1, "counts of windows and classes are inputs"
    assert "prompt_proj" not in graphs.code, "keys and values of prompts are inputs"
    assert method not in ONE_STAGE or "prompt_norm" in graphs.code, "weights have their names there"
    images, text = tiny_inputs(1, size)
    assert_same(run(images, text), model(images, text))
    assert graphs.count == len(run.shapes) == 2, "torch tells a single window from several"


@torch.no_grad()
def test_new_weights_run_the_same_code():
    model, graphs = tiny_model("tagclip"), Graphs()
    run, (images, text) = CompiledModel(model, backend=graphs), tiny_inputs()
    before = run(images, text).mask_logits.clone()
    model.encoder.prompt_embeddings.mul_(3)
    model.decoder.layers[0].linear1.weight.mul_(2)
    after = run(images, text)
    assert_same(after, model(images, text))
    assert relative(after.mask_logits, before) > 1e-3 and graphs.count == 1


@torch.no_grad()
def test_models_do_not_share_torch_s_limit():
    """torch keeps 8 compiled versions of a piece of code. All models go through one piece: a ninth would be refused."""
    images, text = tiny_inputs()
    for _ in range(10):
        graphs = Graphs()
        CompiledModel(Toy(), backend=graphs)(images, text)
        assert graphs.count == 1


@torch.no_grad()
def test_more_shapes_than_may_be_compiled_run_as_the_model(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "MAX_SHAPES", 2)
    model, graphs = Toy(), Graphs()
    run = CompiledModel(model, backend=graphs)
    with caplog.at_level("WARNING", "zs3fast"):
        for size in ((64, 64), (48, 80), (64, 80), (80, 80), (64, 64)):
            images, text = tiny_inputs(size=size)
            assert_same(run(images, text), model(images, text))
    assert graphs.count == 2 and caplog.text.count("2 shapes are compiled, further ones run as they are") == 1


@torch.no_grad()
def test_sizes_of_another_model_are_not_learnt():
    """What Dynamo saw vary in one model of the process, it would take for an input in the next."""
    for _ in range(2):
        graphs = Graphs()
        run = CompiledModel(Toy(), backend=graphs)
        for size in ((64, 64), (48, 80)):
            run(*tiny_inputs(size=size))
        assert graphs.count == 2


def test_without_a_compiler_it_says_so():
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(RuntimeError, match="compile: torch.compile needs a C.. compiler on a CPU and found none"):
            CompiledModel(Toy())
