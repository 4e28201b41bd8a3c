# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labelled images from the Hub, from folders or from parquet files, and their transforms."""

import functools
from collections.abc import Callable

import PIL.Image
import torch
from datasets import DatasetDict, Image
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from ..pixels import bytes_to_pixels, check_bit_depth
from .augmentation import randaugment
from .sources import load_labelled_datasets, read_parquet


def load_image_datasets(*, image_column: str | None = None, cache_dir: str | None = None, **source) -> DatasetDict:
    """Load one source of labelled images: a data set on the Hub, folders (one per class) or parquet files.

    Args:
        image_column: by default the only column of images.
        cache_dir, source: as in [`load_labelled_datasets`]. Files are parquet, with an image column (bytes or
            `datasets.Image`) and a label column.

    Returns:
        "train" and "validation" (those that exist), with the columns "image", in whatever mode, and "label", a
        `ClassLabel` or a list of them.

    Raises:
        ValueError, FileNotFoundError: as [`load_labelled_datasets`].
    """
    return load_labelled_datasets(
        "image",
        Image(),
        image_suffixes(),
        functools.partial(read_parquet, cache_dir=cache_dir),
        column=image_column,
        cache_dir=cache_dir,
        **source,
    )


def image_suffixes() -> set[str]:
    """Of the files that Pillow opens, in lower case and with the dot; also by what was registered with it so far."""
    suffixes = PIL.Image.registered_extensions()  # first: it also fills what the next line reads
    kinds = set(PIL.Image.OPEN) - {"MPEG", "HDF5", "GRIB", "BUFR"}  # which Pillow knows, but has no decoder for
    return {suffix for suffix, kind in suffixes.items() if kind in kinds}


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in RGB.

    Raises:
        ValueError: grey levels of more than 8 bits, which Pillow would cut to 0 and 255.
    """
    check_bit_depth(image.mode, "the image")
    return image.convert("RGB")


def make_image_transforms(
    image_processor: BaseImageProcessor,
    size: tuple[int, int],
    *,
    train: bool,
    flip: bool = True,
    min_crop: float = 0.08,
    randaugment_layers: int = 0,
    randaugment_magnitude: int = 10,
    as_bytes: bool = False,
) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """PIL image of any mode -> (C, height, width) float tensor, or uint8 in training with `as_bytes`.

    They raise ValueError for grey levels of more than 8 bits.

    Args:
        image_processor: the model's. It makes the images of an evaluation, so that these are what a pipeline sees;
            training takes its resampling and normalisation.
        size: (height, width) in pixels of training images.
        train: random resized crop and flip, the "inception crop" of AugReg.
        flip: mirror half of the training images.
        min_crop: least share of the image's area that a training crop keeps.
        randaugment_layers, randaugment_magnitude: as in [`randaugment`]; no layers for none.
        as_bytes: leave rescaling and normalisation of training images to [`MoNETrainer`], which does them on its
            device: workers are faster by that.

    Raises:
        ValueError: an option that is not allowed, or, for training, a processor that does more than rescale and
            normalise.
    """
    if not 0 < min_crop <= 1:
        raise ValueError(f"min_crop={min_crop} must be a share of the image's area, in (0, 1].")
    augment = randaugment(randaugment_layers, randaugment_magnitude)
    if not train:
        return functools.partial(_process, image_processor)
    crop = v2.RandomResizedCrop(size, scale=(min_crop, 1.0), interpolation=image_processor.resample, antialias=True)
    steps = [as_rgb, crop]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    scale, shift = bytes_to_pixels(image_processor, 3)
    steps += [*augment, v2.ToImage(), v2.ToPureTensor()]
    return v2.Compose(steps if as_bytes else [*steps, functools.partial(_pixels, scale=scale, shift=shift)])


def _process(image_processor: BaseImageProcessor, image: PIL.Image.Image) -> torch.Tensor:
    return image_processor(images=as_rgb(image), return_tensors="pt").pixel_values[0]


def _pixels(image: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return image * scale + shift
