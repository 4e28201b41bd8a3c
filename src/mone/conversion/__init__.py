# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pretrained vision transformers -> MoNE, and image MoNE -> video MoNE."""

from .image import mone_from_vit
from .video import mone_vivit_from_mone


__all__ = ["mone_from_vit", "mone_vivit_from_mone"]
