"""Strong, named things to measure against: the official structure of each method in plain eager PyTorch."""

from __future__ import annotations

from bench.baselines.clip_rc import OfficialCLIPRC
from bench.baselines.clsclip import PlainClsCLIP
from bench.baselines.maft import OfficialMAFT
from bench.baselines.tagclip import OfficialTagCLIP
from bench.baselines.zegclip import OfficialZegCLIP

OFFICIAL = {"zegclip": OfficialZegCLIP, "tagclip": OfficialTagCLIP, "clip_rc": OfficialCLIPRC}

__all__ = ["OFFICIAL", "OfficialCLIPRC", "OfficialMAFT", "OfficialTagCLIP", "OfficialZegCLIP", "PlainClsCLIP"]
