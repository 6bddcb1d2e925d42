"""The ops: one file each, with the public function, its reference and its registration in torch.library."""

from zs3fast.ops._bits import unpack_bits
from zs3fast.ops._dispatch import use_backend
from zs3fast.ops.add_layer_norm import add_layer_norm
from zs3fast.ops.attention_to_mask import attention_to_mask
from zs3fast.ops.encoder_attention import encoder_attention
from zs3fast.ops.fused_linear import fused_linear
from zs3fast.ops.fused_linear_int8 import fused_linear_int8
from zs3fast.ops.mask_loss import MaskLossTerms, mask_loss
from zs3fast.ops.masks_to_bits import masks_to_bits
from zs3fast.ops.masks_to_labels import masks_to_labels
from zs3fast.ops.proposal_attention import proposal_attention
from zs3fast.ops.proposals_to_labels import proposals_to_labels
from zs3fast.ops.refine_maps import refine_maps, refine_maps_to_labels
from zs3fast.ops.region_bridge_attention import region_bridge_attention
from zs3fast.ops.relationship_descriptor import relationship_descriptor
from zs3fast.ops.self_similarity_attention import self_similarity_attention

__all__ = [
    "MaskLossTerms",
    "add_layer_norm",
    "encoder_attention",
    "fused_linear",
    "fused_linear_int8",
    "mask_loss",
    "attention_to_mask",
    "masks_to_bits",
    "masks_to_labels",
    "proposal_attention",
    "proposals_to_labels",
    "region_bridge_attention",
    "refine_maps",
    "refine_maps_to_labels",
    "relationship_descriptor",
    "self_similarity_attention",
    "unpack_bits",
    "use_backend",
]
