"""Numbers that several rooms share, such as the means and standard deviations of RGB in 0..1 that images are given."""

from __future__ import annotations

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

IGNORE = 255  # label of pixels that no dataset counts
REFINE_STEPS = 10  # of pixel-adaptive refinement, as SCLIP and NACLIP have it
