# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Where a ViT may come from: a folder, the Hub, a file of weights."""

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    ViTImageProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..configuration_mone import MoNEConfig, as_pair
from .onnx_dinov2 import read_onnx
from .transformers_vits import LEFT, check_family


logger = logging.getLogger(__name__)


def read_weights(file: Path) -> Mapping:
    """The weights in a file: .safetensors, .npz, .onnx, or one that torch saved.

    Raises:
        ValueError: names a file that is cut short, or is none of these.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        if file.suffix == ".onnx":
            return read_onnx(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, KeyError) as error:
        raise ValueError(f"{file} cannot be read as weights; it may be cut short: {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{file} holds a {type(content).__name__} and no state dict.")
    return content


def load_pretrained(source: str | Path, **hub) -> PreTrainedModel:
    """A ViT of transformers, or one of timm in transformers' wrapper, whose weights are all from the checkpoint.

    Raises:
        ValueError: names the architecture that cannot be mapped, or the keys that are missing, too many or of another
            shape; transformers would only warn, and make up the missing ones.
    """
    config = AutoConfig.from_pretrained(source, **hub)
    check_family(config)
    model_class = getattr(transformers, (config.architectures or [""])[0], None) or AutoModel
    if config.model_type == "timm_wrapper":
        model_class = AutoModelForImageClassification if config.num_labels else AutoModel
    try:
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **hub
        )
    except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise ValueError(f"The weights of {source} cannot be read; they may be cut short: {error}") from error
    missing = sorted(key for key in info["missing_keys"] if not LEFT.search(key))
    shapes = [f"{key} {tuple(have)} instead of {tuple(want)}" for key, have, want in sorted(info["mismatched_keys"])]
    if missing or info["unexpected_keys"] or shapes:
        raise ValueError(
            f"The weights of {source} do not fit {type(model).__name__}. Missing: {missing}; without counterpart: "
            f"{sorted(info['unexpected_keys'])}; of another shape: {shapes}."
        )
    return model


def load_image_processor(source: str | Path, **hub) -> BaseImageProcessor | None:
    """The image processor beside a checkpoint; None where there is none."""
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in ("preprocessor_config.json", "config.json")):
        return None
    try:
        return AutoImageProcessor.from_pretrained(folder if folder.is_dir() else source, **hub)
    except (OSError, ValueError, KeyError) as error:
        logger.info("%s has no image processor: %s", source, error)
        return None


def output_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """(height, width) of the images that a processor makes; None where they differ."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    size = dict(size or {})
    if size.get("height") and size.get("width"):
        return (size["height"], size["width"])
    return None


def fit_image_processor(processor: BaseImageProcessor | None, source: str | Path, config: MoNEConfig):
    """The processor, set to make images of the model's size; a new one where the source has none."""
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
    before = output_size(processor)
    if before == (height, width):
        return processor
    if getattr(processor, "do_center_crop", False):
        scale = max(height, width) / max(before)
        processor.size = type(processor.size)(**{k: round(v * scale) for k, v in dict(processor.size).items() if v})
        processor.crop_size = type(processor.crop_size)(**size)
    else:
        processor.size = type(processor.size)(**size)
    return processor
