# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pretrained vision transformers -> MoNE, and image MoNE -> video MoNE."""

from .calibration import CALIBRATION_IMAGES, calibrate, check_untrained, start_routers
from .channel_order import order_channels
from .image import load_image_model, load_image_model_and_processor, mone_from_vit
from .processors import fit_image_processor, load_image_processor, make_video_processor, resize_and_crop
from .sources import check_source
from .video import load_video_model, mone_vivit_from_mone, set_labels


__all__ = [
    "CALIBRATION_IMAGES",
    "calibrate",
    "check_source",
    "check_untrained",
    "fit_image_processor",
    "load_image_model",
    "load_image_model_and_processor",
    "load_image_processor",
    "load_video_model",
    "make_video_processor",
    "mone_from_vit",
    "mone_vivit_from_mone",
    "order_channels",
    "resize_and_crop",
    "set_labels",
    "start_routers",
]
