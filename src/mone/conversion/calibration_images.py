# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""The inputs that [`calibrate`] takes, from a folder of images.

    calibrate(model, read_images(find_images("photos"), processor))

Not in `mone.conversion` itself, which does without the libraries for data sets.
"""

import logging
from pathlib import Path

import torch
from PIL import Image, ImageOps
from transformers import BaseImageProcessor

from ..data.examples import UNREADABLE, decoding
from ..data.images import as_rgb, image_suffixes
from ..data.sources import visible_files
from .calibration import CALIBRATION_IMAGES


logger = logging.getLogger(__name__)


def find_images(folder: str | Path) -> list[Path]:
    """At most `CALIBRATION_IMAGES` images from all over the folder, at any depth, the same at every call.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: it has no images.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"Calibration needs a folder of images, and {folder} is none.")
    files = [Path(file) for file in visible_files(folder, image_suffixes())]
    if not files:
        raise ValueError(f"{folder} has no images, that is files ending in {', '.join(sorted(image_suffixes()))}.")
    count = min(len(files), CALIBRATION_IMAGES)
    return [files[number * len(files) // count] for number in range(count)]


def read_images(files: list[Path], processor: BaseImageProcessor) -> torch.Tensor:
    """(B, C, height, width) as `processor` makes them; a warning names an image that cannot be read and is left out.

    Raises:
        ValueError: none of them can be read.
    """
    pixel_values = []
    for path in files:
        try:
            with decoding(), Image.open(path) as image:
                image = as_rgb(ImageOps.exif_transpose(image))
            pixel_values.append(processor(image, return_tensors="pt").pixel_values)
        except UNREADABLE as error:
            logger.warning("%s is left out, as it cannot be read: %s", path, error)
    if not pixel_values:
        raise ValueError(f"None of the {len(files)} images can be read, of which the first is {files[0]}.")
    return torch.cat(pixel_values)
