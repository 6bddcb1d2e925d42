"""CLIP's image tower in 8 bits, for inference: linear layers by `fused_linear_int8` or torchao, all else as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zs3fast import ops
from zs3fast.encoders.clip_vit import Attention, ClipViT, Mlp
from zs3fast.ops.fused_linear import QUICK_GELU_SLOPE, linear
from zs3fast.ops.fused_linear_int8 import kernel_objections, kernels, quantize_weight

KINDS = ("int8", "int8-weights", "fp8")
FP8_CAPABILITY = (8, 9)  # the first GPUs that multiply float8
INSTALL = "pip install 'zs3fast[quantize]'"
Quantize = Callable[[Tensor], nn.Parameter]


@torch.no_grad()
def quantize_encoder(model: nn.Module, kind: str = "int8") -> nn.Module:
    """Put the linear layers of a model's CLIP image tower into 8 bits, in place; the tower runs forward only after.

    Of every block these are the query, key and value projection, the output projection and both layers of the MLP:

        y = s_x s_W (q_x q_W^T) + b,   q = round(x / s),   s = max |x| / 127, one a token and one a row of W

    "int8" on a CPU that `ops.fused_linear_int8` has a kernel for runs on it, where a token's 256 steps lie between its
    smallest and its largest element; everything else on torchao, which that alone does not need. Patch embedding,
    norms, attention, prompts, decoder and text stay as they are.

    Args:
        model: of any method, on its device and in eval mode. It is changed, and frozen altogether.
        kind: "int8": activations and weights, the scales of activations found as they come;
            "int8-weights": weights alone, which saves memory and no time;
            "fp8": activations and weights in float8 (e4m3), on GPUs of compute capability 8.9 and later. Scales are
            one a token and one a row for a bfloat16 model, one a tensor for others. Tested on the float8 products that
            torch has for the CPU; it has not run on a GPU.
    Returns:
        The model, with `model.quantized` = kind. It refuses `train()`, gradients, `state_dict()` (so
        `zs3fast.weights.save` too) and `load_state_dict()`: save or load before.
    Raises:
        TypeError: not a model.  ValueError: an unknown kind, a model in training mode or quantised before, a tower
        that is a ResNet, a device that does not do it.  ImportError: without torchao where it is needed.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"model: expected one of create_model or load_official, got {type(model).__name__}")
    if getattr(model, "quantized", None):
        raise ValueError(f"model: expected an image tower that is not quantised, got {model.quantized}")
    if not isinstance(encoder, ClipViT):
        raise ValueError(f"model: expected a ViT as image tower, got {type(encoder).__name__}, made of convolutions")
    if model.training:
        raise ValueError(
            "model: expected eval mode, as a quantised tower cannot train, got train mode; call model.eval()"
        )
    blocks = encoder.transformer.resblocks
    replaced: list[tuple[Attention, Mlp]]  # all before the first is put in place: an error leaves the model whole
    if runs_kernels(model, kind):
        replaced = [(Int8Attention(block.attn), Int8Mlp(block.mlp)) for block in blocks]
    else:
        quantize = _quantizer(kind, encoder.proj)
        replaced = [(QuantizedAttention(block.attn, quantize), QuantizedMlp(block.mlp, quantize)) for block in blocks]
    for block, (attn, mlp) in zip(blocks, replaced):
        block.attn, block.mlp = attn, mlp
        block.eval()
        block.ln_1.register_forward_pre_hook(_forward_only)  # whatever enters a block's layers passes this norm
    model.requires_grad_(False)
    model.quantized = kind  # type: ignore[assignment]  # of any method, so that no class of ours declares it
    model.train = partial(_stay_in_eval_mode, model)  # type: ignore[method-assign]  # this model's alone
    model.register_state_dict_pre_hook(_refuse_state)
    model.register_load_state_dict_pre_hook(_refuse_state)
    return model


def runs_kernels(model: nn.Module, kind: str | None) -> bool:
    """Whether the tower of a model, where it is, would run in these 8 bits on kernels of ours."""
    encoder = getattr(model, "encoder", None)
    if kind != "int8" or not isinstance(encoder, ClipViT) or encoder.proj.device.type != "cpu":
        return False
    mlp, attn = encoder.config.mlp_width, encoder.config.width
    sizes = ((3 * attn, attn), (attn, attn), (mlp, attn), (attn, mlp))
    return bool(kernels()) and not any(kernel_objections(*size) for size in sizes)


class Int8Linear(nn.Linear):
    """A linear layer on `ops.fused_linear_int8`: an int8 weight, its scales, which stay float32, and the bias.

    Made of the weight and bias of a layer; the bias is kept, not copied.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        codes, scale = quantize_weight(weight)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.bias = bias  # type: ignore[assignment]  # a tensor or None, not a parameter alone

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x)

    def fused(
        self, x: Tensor, activation: str = "none", residual: Tensor | None = None, rows: slice | None = None
    ) -> Tensor:
        """residual + activation(layer(x)), or of these rows of the weight."""
        weight, scale, bias = (
            t if rows is None or t is None else t[rows] for t in (self.weight, self.scale, self.bias)
        )
        bias = bias if bias is None else bias.to(x.dtype)
        if residual is not None and residual.dtype != x.dtype:  # under autocast
            return residual + ops.fused_linear_int8(x, weight, scale, bias, activation=activation)
        return ops.fused_linear_int8(x, weight, scale, bias, activation=activation, residual=residual)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Int8Linear:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # a model that becomes bfloat16: its scales do not
            self.scale = scale.to(self.scale.device)
        return self


class Int8Attention(Attention):
    """The same attention on `Int8Linear`; parts of the packed projection are rows of its weight."""

    def __init__(self, attn: Attention):
        nn.Module.__init__(self)
        self.heads = attn.heads
        self.packed = Int8Linear(attn.in_proj_weight, attn.in_proj_bias)
        self.out_proj = Int8Linear(attn.out_proj.weight, attn.out_proj.bias)

    def in_proj(self, x: Tensor, rows: slice | None = None) -> Tensor:
        return self.packed.fused(x, rows=rows)


class Int8Mlp(Mlp):
    """The MLP on `Int8Linear`."""

    def __init__(self, mlp: Mlp):
        nn.Module.__init__(self)
        self.c_fc = Int8Linear(mlp.c_fc.weight, mlp.c_fc.bias)
        self.c_proj = Int8Linear(mlp.c_proj.weight, mlp.c_proj.bias)
        self.quick = mlp.quick

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        hidden = linear(self.c_fc, x, "quick_gelu" if self.quick else "gelu")
        return linear(self.c_proj, hidden, residual=residual)


class QuantizedAttention(Attention):
    """The same attention on 8-bit projections. Parts of the packed one are cut once: torchao's weights cannot be cut
    in inference mode. They share its memory as long as the model stays on its device."""

    def __init__(self, attn: Attention, quantize: Quantize):
        nn.Module.__init__(self)
        self.heads = attn.heads
        width = attn.out_proj.in_features
        self.in_proj_weight = quantize(attn.in_proj_weight)
        self.in_proj_bias = attn.in_proj_bias
        self.query_weight, self.key_value_weight = (
            nn.Parameter(part, requires_grad=False)
            for part in (self.in_proj_weight[:width], self.in_proj_weight[width:])
        )
        self.out_proj = _linear(attn.out_proj.weight, attn.out_proj.bias, quantize)

    def in_proj(self, x: Tensor, rows: slice | None = None) -> Tensor:
        if rows is None:
            return F.linear(x, self.in_proj_weight, self.in_proj_bias)
        weight = self.key_value_weight if rows.start else self.query_weight
        return F.linear(x, weight, self.in_proj_bias[rows])


class QuantizedMlp(Mlp):
    """The MLP on 8-bit weights: c_proj(silu(c_fc(x))), QuickGELU's factors inside the weights, where scales take them.

    x sigmoid(a x) = silu(a x) / a.
    """

    def __init__(self, mlp: Mlp, quantize: Quantize):
        nn.Module.__init__(self)
        a = QUICK_GELU_SLOPE if mlp.quick else 1.0
        bias = nn.Parameter(a * mlp.c_fc.bias)
        self.c_fc = _linear(a * mlp.c_fc.weight, bias, quantize)
        self.c_proj = _linear(mlp.c_proj.weight / a, mlp.c_proj.bias, quantize)
        self.activation = F.silu if mlp.quick else F.gelu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out: Tensor = self.c_proj(self.activation(self.c_fc(x)))
        return out if residual is None else residual + out


def _quantizer(kind: str, like: Tensor) -> Quantize:
    """What turns a weight [out, in] into its 8-bit form, for towers on the device and of the type of `like`."""
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            PerRow,
            PerTensor,
            quantize_,
        )
        from torchao.utils import should_reduce_range
    except ImportError as error:
        raise ImportError(f"quantize_encoder needs torchao 0.18 or later: {INSTALL} ({error})") from None
    # torchao would set options of the compiler and the precision of matrix products for the whole process.
    alone = {"set_inductor_config": False}
    if kind == "int8":
        config = Int8DynamicActivationInt8WeightConfig(reduce_range=should_reduce_range(like.device), **alone)
    elif kind == "int8-weights":
        config = Int8WeightOnlyConfig(**alone)
    else:
        _check_fp8(like.device)
        scales = PerRow() if like.dtype == torch.bfloat16 else PerTensor()
        config = Float8DynamicActivationFloat8WeightConfig(granularity=scales, **alone)

    def quantize(weight: Tensor) -> nn.Parameter:
        holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        holder.weight = nn.Parameter(weight.detach(), requires_grad=False)
        quantize_(holder, config)
        if type(holder.weight) is nn.Parameter:  # left as it was
            raise ValueError(
                f"kind: expected weights with sides of a multiple of 16 for {kind}, got {list(weight.shape)}"
            )
        return holder.weight

    return quantize


def _check_fp8(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"kind: expected a model on a CUDA GPU for fp8, got {device}; int8 runs everywhere")
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ValueError(
            f"kind: fp8 needs compute capability 8.9 or later, {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}; int8 runs everywhere"
        )


def _linear(weight: Tensor, bias: nn.Parameter, quantize: Quantize) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = quantize(weight), bias
    return linear


def _forward_only(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Before the first norm of a block: torchao's products have no gradient, and take no empty input."""
    x = inputs[0]
    if norm.training:
        raise ValueError("model: expected eval mode of its quantised image tower, got train mode; call model.eval()")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("images: expected none that require a gradient, which no quantised tower gives, got some")
    if not x.numel():
        raise ValueError("images: expected at least one for a quantised image tower, got an empty batch")


def _stay_in_eval_mode(model: nn.Module, mode: bool = True) -> nn.Module:
    """In the place of `model.train`."""
    if mode:
        raise ValueError(f"model: its image tower is quantised ({model.quantized}), which is for inference only")
    return type(model).train(model, False)


def _refuse_state(model: nn.Module, *_: Any) -> None:
    raise ValueError(
        f"model: its image tower is quantised ({model.quantized}), weights of it are neither saved nor loaded; "
        "save before quantising, and quantise after loading"
    )
