"""Stage 1 of MAFT: a mask generator of one's own, transformers' MaskFormer or Mask2Former with one label, "object".

It learns where the regions of seen classes are and never what they show, so that it finds those of others too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
from torch import Tensor, nn

from zs3fast.proposals import _library
from zs3fast.proposals.frames import SHORT_SIDE
from zs3fast.proposals.mask_transformers import TransformersMaskProposer, all_layers
from zs3fast.utils.checkpoint_io import compare, existing, read_safetensors, sketch, strict_load
from zs3fast.utils.constants import IMAGENET_MEAN, IMAGENET_STD
from zs3fast.utils.errors import CheckpointError
from zs3fast.utils.files import replacing
from zs3fast.utils.options import one_of

METADATA_KEY = "zs3fast_proposer"
LABEL = "object"
# method: configuration and model of transformers
GENERATORS = {
    "maskformer": ("MaskFormerConfig", "MaskFormerForInstanceSegmentation"),
    "mask2former": ("Mask2FormerConfig", "Mask2FormerForUniversalSegmentation"),
}


class ProposalGenerator(nn.Module):
    """A network of transformers that tells an object from none, as the training loop wants it.

    All of it is trained but BatchNorm, which stays as its backbone brought it (published: frozen).

    Args:
        method: "maskformer" or "mask2former".
        image_size: short side of the images that it proposes regions for.
        options: keyword arguments of the library's configuration; None: its defaults.
        pretrained: a backbone trained on ImageNet, by name ("microsoft/resnet-101"; for mask2former a Swin too) or in a
            local folder; None: `backbone_config` of the options, random.
    Raises:
        ValueError: options or a backbone that the library does not take. ImportError: transformers is not installed.
    """

    pixel_mean: ClassVar[tuple[float, float, float]] = IMAGENET_MEAN
    pixel_std: ClassVar[tuple[float, float, float]] = IMAGENET_STD
    pairwise: ClassVar[bool] = False
    self_training: ClassVar[bool] = False
    protocol: ClassVar[str] = "proposals"
    embed_dim: ClassVar[int] = 0  # class names are not read

    def __init__(
        self,
        *,
        method: str,
        image_size: int = SHORT_SIDE,
        options: Mapping[str, Any] | None = None,
        pretrained: str | None = None,
    ):
        super().__init__()
        config_class, model_class = GENERATORS[one_of("method", method, tuple(GENERATORS))]
        library = _library.transformers()
        backbone: Any = None if pretrained is None else _library.load_backbone(pretrained)
        given = {**(options or {}), **({} if backbone is None else {"backbone_config": backbone.config.to_dict()})}
        labels = {"id2label": {0: LABEL}, "label2id": {LABEL: 0}}
        try:
            config = getattr(library, config_class)(**{**given, **labels})
            self.network: Any = getattr(library, model_class)(config)
        except ImportError:
            raise
        except Exception as error:  # each version of the library raises its own
            raise ValueError(
                f"options: transformers' {config_class} does not take them: {' '.join(str(error).split())}"
            ) from None
        if backbone is not None:
            encoder = self.network.model.pixel_level_module.encoder
            if type(encoder) is not type(backbone):  # MaskFormer has a Swin of its own, with other names
                kinds = f"{type(backbone).__name__}, {method} has a {type(encoder).__name__}"
                raise ValueError(f"pretrained: {pretrained} is a {kinds}; expected a ResNet, or mask2former")
            strict_load(encoder, backbone.state_dict(), f"pretrained: {pretrained}")
        self.weights_loaded = backbone is not None
        self.image_size = image_size
        self.config = {"method": method, "image_size": image_size, "options": given, "pretrained": None}

    def train(self, mode: bool = True) -> ProposalGenerator:
        super().train(mode)
        for module in self._norms():
            module.eval()
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything but BatchNorm, by name."""
        fixed = {id(parameter) for module in self._norms() for parameter in module.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) not in fixed}

    def backbone(self) -> dict[str, nn.Parameter]:
        """The parameters of the backbone, by name."""
        start = "network.model.pixel_level_module.encoder."
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith(start)}

    def forward(self, images: Tensor) -> Any:
        """Images [B, 3, H, W], normalised -> the library's output, with the predictions of all layers."""
        return self.network(pixel_values=images, output_auxiliary_logits=True, **all_layers(self.network))

    def proposer(self, **options: Any) -> TransformersMaskProposer:
        """What asks this model for regions, in eval mode and as it stands; see `TransformersMaskProposer`."""
        return TransformersMaskProposer(self.network, classes=False, network_side=self.image_size, **options)

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def save_generator(model: ProposalGenerator, path: str | os.PathLike[str]) -> None:
    """Write a generator to one safetensors file, its configuration in the header; whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(model.config)})


def load_generator(path: str | os.PathLike[str]) -> ProposalGenerator:
    """Read a file written by `save_generator`, in eval mode.

    Raises:
        CheckpointError: not such a file, damaged, or with weights that do not fit its own configuration.
    """
    path = existing(Path(path))
    tensors, metadata = read_safetensors(path)
    if METADATA_KEY not in metadata:
        raise CheckpointError(f"{path}: no mask generator inside, expected one of `zs3fast train maft_proposals_...`")
    try:
        config = {**json.loads(metadata[METADATA_KEY]), "pretrained": None}  # the weights are here: none are fetched
        plan = sketch(lambda: ProposalGenerator(**config), tensors.values(), str(path))
        compare(plan.state_dict(), tensors, str(path))
        model = ProposalGenerator(**config)
    except CheckpointError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration cannot be used ({error})") from None
    strict_load(model, tensors, str(path))
    model.weights_loaded = True
    return model.eval()


def generator_proposer(path: str | os.PathLike[str], device: str = "cpu", **options: Any) -> TransformersMaskProposer:
    """The proposer of a file written by `save_generator`: its masks alone, made at the size it was trained at.

    Args:
        options: arguments of `TransformersMaskProposer`.
    """
    return load_generator(path).to(device).proposer(**options)
