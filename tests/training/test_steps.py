"""Steps: however the images of an iteration are split, the gradient is that of the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import NUM_CLASSES, SEEN, tiny_inputs, tiny_labels, tiny_model
from zs3fast.training import loop
from zs3fast.training.proposing import connected_labels
from zs3fast.training.setup import Shares, checkpoint_blocks
from zs3fast.training.steps import OneStageStep, PairStep, ProposalStep, Step
from zs3fast.utils.distributed import DistEnv


def uneven_batch(count: int = 4) -> dict[str, Tensor]:
    """Images that differ in how many classes they hold: one has none, one has one."""
    labels = tiny_labels(count)
    labels[0] = 255
    labels[1] = 4
    return {"images": tiny_inputs(count)[0], "labels": labels}


def without_dropout(step: Step) -> Step:
    """Training losses, the dropouts of evaluation."""
    step.eval()
    step.model.training = True
    return step


def gradients(step: Step, batch: dict[str, Tensor], parts: int) -> tuple[float, dict[str, Tensor]]:
    """Those of the training loop, in so many micro-batches."""
    step.zero_grad(set_to_none=True)
    images = len(batch["images"])
    split = Shares(images, images, images // parts, parts)
    terms = loop.gradients(step, step, batch, split, DistEnv(0, 1, torch.device("cpu")), (0, 0))
    return float(terms["loss"]), {n: p.grad.clone() for n, p in step.named_parameters() if p.grad is not None}


def sparse_batch(masks: int) -> dict[str, Tensor]:
    """Four images that hold so many masks, 0 or 1, together."""
    labels = torch.full((4, 64, 64), 255)
    labels[2, :30] = SEEN[1] if masks else 255
    return {"images": tiny_inputs(4)[0], "labels": labels}


@pytest.mark.parametrize("method", ["zegclip", "tagclip", "clip_rc"])
@pytest.mark.parametrize("setting", ["inductive", "supervised"])
@pytest.mark.parametrize("batch", [uneven_batch(), sparse_batch(1), sparse_batch(0)], ids=["uneven", "one", "none"])
def test_micro_batches_add_up(method: str, setting: str, batch: dict[str, Tensor]) -> None:
    options = {"seen": range(NUM_CLASSES)} if setting == "supervised" else {}
    model = tiny_model(method, **options)
    step = without_dropout(OneStageStep(model, tiny_inputs()[1], setting=setting, ignore_index=255))
    whole, expected = gradients(step, batch, 1)
    for parts in (2, 4):
        loss, got = gradients(step, batch, parts)
        assert loss == pytest.approx(whole, rel=1e-5)
        assert got.keys() == expected.keys()
        largest = float(max(grad.norm() for grad in expected.values()))
        for name, grad in expected.items():  # biases of keys have no gradient but rounding errors
            error = float((got[name] - grad).norm() / grad.norm().clamp_min(1e-3 * largest))
            assert error < 2e-4, f"{name}: {error:.1e}"


def test_count_is_that_of_the_loss() -> None:
    model = tiny_model("zegclip")
    text = tiny_inputs()[1]
    step = OneStageStep(model, text, setting="inductive", ignore_index=255)
    batch = uneven_batch()
    masks = sum(len(set(labels.unique().tolist()) & set(SEEN)) for labels in batch["labels"])
    assert float(step.count(batch)) == masks > 1
    step = without_dropout(step)
    assert torch.equal(step(batch, step.count(batch))["loss"], step(batch)["loss"])


def test_all_ignored_batch() -> None:
    step = OneStageStep(tiny_model("zegclip"), tiny_inputs()[1], setting="inductive", ignore_index=255)
    batch = {"images": tiny_inputs(2)[0], "labels": torch.full((2, 64, 64), 255)}
    terms = step(batch, step.count(batch).clamp_min(1))
    assert terms["loss_dice"].item() == 0 and terms["loss"].item() > 0


def test_self_training_fills_unseen_pixels() -> None:
    model = tiny_model("zegclip")
    step = OneStageStep(model, tiny_inputs()[1], setting="transductive", ignore_index=255)
    batch = uneven_batch()
    assert step.count(batch) is None
    step(batch)["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def any_step(method: str, precision: str) -> Step:
    """The step of a method, as the published recipes build it."""
    model, text = tiny_model(method), tiny_inputs()[1]
    options = {"ignore_index": 255, "precision": precision}
    if method == "clsclip":
        return PairStep(model, text, **options)
    if method == "maft":
        return ProposalStep(
            model, text, setting="inductive", propose=connected_labels(255), clip_size=64, distillation=True, **options
        )
    return OneStageStep(model, text, setting="inductive", **options)


@pytest.mark.parametrize("method", ["zegclip", "tagclip", "clip_rc", "clsclip", "maft"])
def test_bf16_keeps_the_loss_in_float32(method: str) -> None:
    batch = {**uneven_batch(), "class_index": torch.tensor([0, 4, 1, 2])}
    exact = without_dropout(any_step(method, "fp32"))(batch)["loss"]
    half = without_dropout(any_step(method, "bf16"))
    loss = half(batch)["loss"]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert loss.item() != exact.item()
    loss.backward()
    gradients = [p.grad for p in half.model.trainable().values() if p.grad is not None]
    assert gradients and all(grad.isfinite().all() for grad in gradients)


@pytest.mark.parametrize("method", ["zegclip", "clip_rc"])
def test_recomputed_blocks_give_the_same_gradients_from_less(method: str) -> None:
    text = tiny_inputs()[1]
    batch = uneven_batch()
    results, kept = [], []
    for recompute in (False, True):
        model = tiny_model(method)
        step = without_dropout(OneStageStep(model, text, setting="inductive", ignore_index=255))
        if recompute:
            checkpoint_blocks(model)
        stored: dict[int, int] = {}

        def note(tensor: Tensor, stored: dict[int, int] = stored) -> Tensor:
            stored[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = step(batch)["loss"]
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        kept.append(sum(stored.values()))
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize("method", ["zegclip", "tagclip", "clip_rc"])
def test_a_compiled_step_is_the_step(method: str) -> None:
    """Forward pass and loss in one graph, its backward in another: the loss and every gradient stay what they are."""
    torch._dynamo.reset()
    text, batch = tiny_inputs()[1], uneven_batch(2)
    batch["labels"][0] = tiny_labels(1)
    step = without_dropout(OneStageStep(tiny_model(method), text, setting="inductive", ignore_index=255))
    loss, expected = gradients(step, batch, 1)
    step.compile(backend="aot_eager", fullgraph=True)
    compiled_loss, got = gradients(step, batch, 1)
    assert compiled_loss == pytest.approx(loss, rel=1e-5) and got.keys() == expected.keys()
    largest = float(max(grad.norm() for grad in expected.values()))
    for name, grad in expected.items():  # biases of keys have no gradient but rounding errors
        error = float((got[name] - grad).norm() / grad.norm().clamp_min(1e-3 * largest))
        assert error < 2e-4, f"{name}: {error:.1e}"


def test_no_graph_before_the_first_trained_parameter() -> None:
    """Prompts in the last layer only: the layers before it store nothing."""
    model = tiny_model("zegclip", prompt_depth=-1)
    seen: list[bool] = []
    for block in model.encoder.transformer.resblocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    model.train()(*tiny_inputs())
    assert seen == [False] * (len(seen) - 1) + [True]


def test_images_without_a_seen_class_cost_maft_nothing() -> None:
    """Nothing to learn from, and still a loss to go backward from: other processes may have had more."""
    step = any_step("maft", "fp32").train()
    batch = {"images": tiny_inputs(2)[0], "labels": torch.full((2, 64, 64), 255)}
    batch["labels"][1, :32] = next(c for c in range(NUM_CLASSES) if c not in SEEN)
    terms = step(batch)
    assert terms["loss_ma"].item() == 0
    terms["loss"].backward()


def test_steps_are_modules_that_train_the_model() -> None:
    step = OneStageStep(tiny_model("zegclip"), tiny_inputs()[1], setting="inductive", ignore_index=255)
    assert isinstance(step, nn.Module) and "text_embeddings" not in step.state_dict()
    assert step.text_embeddings.shape[0] == len(SEEN)
