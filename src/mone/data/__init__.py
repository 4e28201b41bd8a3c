# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Data sets, decoding and augmentation for training and evaluation."""

from .images import LabelledImages, collate_images, load_image_datasets, make_image_transforms


__all__ = ["LabelledImages", "collate_images", "load_image_datasets", "make_image_transforms"]
