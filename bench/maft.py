"""MAFT's encoder: proposals in one masked pass, against the official joint form and against a CLIP pass a crop.

    python bench/maft.py                               # both shapes, results in bench/results/<device>/
    python bench/maft.py maft-100prop --rounds 5
    python bench/maft.py --device cuda --dtype bfloat16

CLIP ViT-B/16 with random weights, one image of 480 x 480 (30 x 30 patches), masked from layer 8, Nq soft proposals of
compact shape that cover a tenth of it each. "official joint" is one attention over all T = Nq + N tokens with a bool
mask a head, made again in every masked layer (`bench/baselines/maft.py`). "crops" embeds Nq images of 224 x 224
with the same tower, 25 at a time; cutting them out is not timed. It answers another question and is not checked.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench.baselines.maft import OfficialIPCLIP  # noqa: E402
from bench.harness import Contender, within_budget  # noqa: E402
from bench.op_script import DTYPES, OURS, OpScript  # noqa: E402
from bench.op_script import run as run_script  # noqa: E402
from zs3fast import create_model  # noqa: E402

SHAPES = {"maft-100prop": (480, 100), "maft-300prop": (480, 300), "tiny": (64, 3)}  # side, Nq
CONTENDERS = (OURS, "official joint", "crops")
CROP = 224


def blobs(count: int, side: int) -> Tensor:
    """Soft discs [1, Nq, side, side] that cover about a tenth of the image each."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(count, 2, 1, 1, generator=generator) * side
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = ((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2).sqrt()
    return torch.sigmoid((0.18 * side - distance) / (0.01 * side)).unsqueeze(0)


@functools.cache
def models(device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Ours and the official structure with the same weights."""
    torch.manual_seed(0)
    ours = create_model("maft").to(device, dtype).eval()
    joint = OfficialIPCLIP(grid=14, patch_size=16, width=768, layers=12, heads=12, embed_dim=512, start_layer=8)
    joint.load_state_dict(ours.encoder.state_dict())
    return ours, joint.to(device, dtype).eval()


def make(name: str, shape: str, pass_: str, args: argparse.Namespace) -> Contender:
    side, count = SHAPES[shape]
    dtype = DTYPES[args.dtype]
    ours, joint = models(args.device, dtype)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, side, side, generator=generator).to(args.device, dtype)
    masks = blobs(count, side).to(args.device, dtype)
    if name == "crops":
        crops = torch.randn(count, 3, CROP, CROP, generator=generator).to(args.device, dtype)

    @torch.inference_mode()
    def run() -> Tensor:
        if name == "crops":
            return torch.cat([ours.image_embedding(batch) for batch in crops.split(25)])
        return ours.proposal_embeddings(image, masks) if name == OURS else joint(image, masks)

    def check(got: Tensor) -> None:
        with torch.inference_mode():
            within_budget(name, got, joint(image, masks), 1e-5 if dtype == torch.float32 else 2e-2)

    return Contender(name, run, None if name == "crops" else check)


if __name__ == "__main__":
    run_script(
        OpScript(
            op="maft",
            file=__file__,
            doc=__doc__,
            shapes=SHAPES,
            contenders=CONTENDERS,
            make=make,
            passes=("inference",),
            dtypes=list(DTYPES),
            rounds=3,
        )
    )
