# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""The image processor of a source, fitted to the model that is made of it."""

import json
import logging
import math
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    BaseVideoProcessor,
    BitImageProcessor,
    ViTImageProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict

from ..configuration_mone import MoNEConfig, MoNEViViTConfig, as_pair
from ..video_processing_mone import MoNEViViTVideoProcessor


logger = logging.getLogger(__name__)

# Files that describe an image processor: the first always, the others if they have this entry.
PROCESSOR_FILES = {
    "preprocessor_config.json": None,
    "processor_config.json": "image_processor",
    "config.json": "pretrained_cfg",  # timm's
}
NORMALISATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
# What a new image processor takes over from the source's.
KEPT_SETTINGS = ("resample", *NORMALISATION, "do_convert_rgb")


def load_image_processor(source: str | Path, **hub) -> BaseImageProcessor | None:
    """The image processor beside a checkpoint; None where there is none.

    Raises:
        OSError: says why one that is there, or may be there, cannot be loaded.
    """
    place = Path(source).parent if Path(source).is_file() else source
    try:
        if not has_image_processor(place, **hub):
            return None
        processor = AutoImageProcessor.from_pretrained(place, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"The image processor of {source} cannot be loaded: {error}") from error
    return from_timm_settings(processor.data_config) if hasattr(processor, "data_config") else processor


def has_image_processor(place: str | Path, **hub) -> bool:
    """Whether a folder or a repository on the Hub has a file that describes an image processor."""
    for name, entry in PROCESSOR_FILES.items():
        file = find_file(place, name, **hub)
        if file is not None and (entry is None or entry in json.loads(file.read_text(encoding="utf-8"))):
            return True
    return False


def find_file(place: str | Path, name: str, **hub) -> Path | None:
    """A file of a folder or of a repository on the Hub; None where there is none, or, offline, none in the cache.

    Raises:
        OSError: it cannot be fetched.
    """
    if Path(place).is_dir():
        file = Path(place) / name
        return file if file.exists() else None
    try:
        return Path(hf_hub_download(str(place), name, **hub))
    except LocalEntryNotFoundError:  # nothing in the cache, and no word from the Hub
        if is_offline_mode():
            return None
        raise
    except EntryNotFoundError:
        return None


def from_timm_settings(settings: dict) -> BitImageProcessor:
    """timm's evaluation transform as an image processor of transformers, which can be saved beside a MoNE.

    Of timm's crop modes, "squash" is the same, and so is "center" for square images. "border", which pads, becomes
    "center", with a warning.
    """
    height, width = settings["input_size"][1:]
    size, mode = {"height": height, "width": width}, settings["crop_mode"]
    resized = {k: math.floor(v / settings["crop_pct"]) for k, v in size.items()}
    if mode not in ("center", "squash"):
        logger.warning(
            "timm's crop_mode=%r has no counterpart in transformers, only 'center' and 'squash' have. Images are "
            "cropped at their centre instead: expect other predictions than timm's.",
            mode,
        )
    return BitImageProcessor(
        size=resized if mode == "squash" else {"shortest_edge": max(resized.values())},
        crop_size=size,
        resample=PILImageResampling[settings["interpolation"].upper()],
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
    )


def output_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """(height, width) of the images that a processor makes; None where they differ, or keep their own."""
    crops = getattr(processor, "do_center_crop", False)
    if not crops and not processor.do_resize:
        return None
    size = dict((processor.crop_size if crops else processor.size) or {})
    if crops and size.get("shortest_edge"):  # of a crop that is square
        return (size["shortest_edge"], size["shortest_edge"])
    if size.get("height") and size.get("width"):
        return (size["height"], size["width"])
    return None


def fit_image_processor(
    processor: BaseImageProcessor | None, source: str | Path, config: MoNEConfig
) -> BaseImageProcessor:
    """The processor, set to make images of the model's size; a new one where the source has none that can."""
    height, width = as_pair(config.image_size)
    size = {"height": height, "width": width}
    if processor is None:
        dinov2 = str(source).endswith(".onnx")
        mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if dinov2 else ([0.5] * 3, [0.5] * 3)
        logger.warning(
            "%s has no image processor. The new one normalises with mean %s and standard deviation %s: check that "
            "the model was trained with these.",
            *(source, mean, std),
        )
        return ViTImageProcessor(size=size, image_mean=mean, image_std=std)
    before, old_size = output_size(processor), dict(processor.size or {})
    if getattr(processor, "do_center_crop", False):
        before = before or (height, width)
        scales = {"height": height / before[0], "width": width / before[1]}  # of a squashed image
        scale = max(height, width) / max(before)
        processor.size = SizeDict(**{k: round(v * scales.get(k, scale)) for k, v in old_size.items() if v})
        processor.crop_size = SizeDict(**size)
    else:
        processor.size = SizeDict(**size)
    if isinstance(processor, BaseVideoProcessor):  # which always crops
        return processor
    if makes_size(processor, config):
        if before is None and processor.do_resize:
            logger.warning(
                "The image processor of %s resizes images to %s, in which they keep their shape. The model takes "
                "images of %dx%d only: they are squashed to it now.",
                *(source, {k: v for k, v in old_size.items() if v}, height, width),
            )
        return processor
    logger.warning(
        "The image processor of %s, a %s, cannot make images of %dx%d. The new one resizes them to that size, and "
        "normalises them as before: expect somewhat other predictions.",
        *(source, type(processor).__name__, height, width),
    )
    kept = {name: getattr(processor, name) for name in KEPT_SETTINGS if hasattr(processor, name)}
    return ViTImageProcessor(size=size, **kept)


def makes_size(processor: BaseImageProcessor, config: MoNEConfig) -> bool:
    """Whether a processor makes images of the model's size: not all of them take a height and a width."""
    height, width = as_pair(config.image_size)
    blank = torch.zeros(config.num_channels, height, width)
    try:
        images = processor(blank, input_data_format="channels_first", return_tensors="pt").pixel_values
    except Exception:  # whatever it raises
        return False
    return images.shape[-2:] == (height, width)


def resize_and_crop(processor: BaseImageProcessor, shortest_edge: int, size: tuple[int, int]) -> None:
    """Let a processor resize the shorter side of an image to `shortest_edge` and crop (height, width) at its centre.

    Raises:
        ValueError: the crop does not fit.
    """
    if shortest_edge < max(size):
        raise ValueError(f"resize={shortest_edge} must be at least the image size {max(size)}.")
    processor.do_resize = processor.do_center_crop = True
    processor.size = SizeDict(shortest_edge=shortest_edge)
    processor.crop_size = SizeDict(height=size[0], width=size[1])


def make_video_processor(
    config: MoNEViViTConfig, image_processor: BaseImageProcessor | None = None, **options
) -> MoNEViViTVideoProcessor:
    """A video processor for a model, which normalises as the image processor that its image model had.

    Args:
        image_processor: as [`fit_image_processor`] gives it for every source; without one, as ViViT's does.
        options: of the video processor, such as `sampling`.
    """
    height, width = as_pair(config.image_size)
    if image_processor is not None:
        options = {name: getattr(image_processor, name) for name in NORMALISATION} | options
    defaults = {
        "size": {"shortest_edge": round(256 / 224 * max(height, width))},  # ViViT's for Kinetics-400
        "crop_size": {"height": height, "width": width},
        "num_frames": config.num_frames,
    }
    return MoNEViViTVideoProcessor(**(defaults | options))
