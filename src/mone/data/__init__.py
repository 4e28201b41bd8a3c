# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Data sets, decoding and augmentation for training and evaluation."""

from .examples import IGNORED, LabelledExamples, collate_examples
from .images import load_image_datasets, make_image_transforms
from .speed import measure_input
from .streams import LabelledStream
from .videos import load_video_datasets, make_video_transforms


__all__ = [
    "IGNORED",
    "LabelledExamples",
    "LabelledStream",
    "collate_examples",
    "load_image_datasets",
    "load_video_datasets",
    "make_image_transforms",
    "make_video_transforms",
    "measure_input",
]
