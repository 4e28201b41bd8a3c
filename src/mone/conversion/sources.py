# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Where a ViT may come from: a folder, the Hub, a file of weights."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..checkpoints import describe_damage
from .onnx_dinov2 import read_onnx
from .tower import check_fit, check_labels, count_labels, follow_labels, number_labels, start_new_classifier
from .transformers_vits import LEFT, check_family


# What readers raise for a file that is cut short or of another kind.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, OSError, KeyError)
# Matches no key: given to `load_all`, it lets none be missing or of another shape.
NO_KEY = re.compile(r"(?!)")
# Under which files of training runs hold the weights; DINO's holds a student beside the teacher.
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "teacher")


def read_weights(file: Path) -> Mapping:
    """The weights in a file: .safetensors, .npz, .onnx, or one that torch saved.

    Raises:
        ValueError: names a file that is cut short, or is none of these.
    """
    if file.suffix == ".json":
        raise ValueError(f"{file} holds no weights: give its folder, {file.parent}.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.suffix == ".npz":
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    return dict(arrays)
            except ValueError as error:  # whose message advises to allow pickles
                raise ValueError(
                    f"{file} cannot be read as weights; it is cut short, or not of arrays alone."
                ) from error
        if file.suffix == ".onnx":
            return read_onnx(file)
        # Training runs (DINO, MAE, DeiT) save their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"{file} cannot be read as weights; it may be cut short: {error}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{file} holds a {type(content).__name__} and no state dict.")
    if any(isinstance(value, Mapping) for value in content.values()):
        raise ValueError(
            f"{file} holds {list(content)[:8]}, and none of {WRAPPERS}: load the state dict among these and give it."
        )
    return content


def load_config(source: str | Path, **hub) -> PreTrainedConfig:
    """The config of a folder or of a name on the Hub.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    if not Path(source).exists():
        try:
            validate_repo_id(str(source))
        except HFValidationError:
            raise OSError(
                f"There is no folder or file {str(source)!r}, nor can it be on the Hub, where a name is NAME or "
                "OWNER/NAME."
            ) from None
    return AutoConfig.from_pretrained(source, **hub)


def check_source(source: str | Path, **hub) -> PreTrainedConfig | None:
    """The config of a checkpoint that can become an image MoNE or is one; None for a file of weights.

    Raises:
        ValueError: names the architecture that cannot be mapped, and why.
    """
    if Path(source).is_file():
        return None
    config = load_config(source, **hub)
    if config.model_type != "mone":
        check_family(config)
    return config


def load_pretrained(source: str | Path, **hub) -> PreTrainedModel:
    """A ViT of transformers, or one of timm in transformers' wrapper.

    Raises:
        ValueError: names the architecture that cannot be mapped, and why; or as [`load_all`].
    """
    config = load_config(source, **hub)
    check_family(config)  # before the weights are fetched
    model_class = getattr(transformers, (config.architectures or [""])[0], None) or AutoModel
    if config.model_type == "timm_wrapper":
        model_class = AutoModelForImageClassification if config.num_labels else AutoModel
    return load_all(model_class, source, LEFT, **hub)


def load_all(model_class: type, source: str | Path, left: re.Pattern, **options) -> PreTrainedModel:
    """`model_class.from_pretrained`, whose weights are all the checkpoint's.

    Args:
        left: finds the keys that may be missing or of another shape, and are new then.
        options: of `from_pretrained`.

    Raises:
        ValueError: lists the keys that are missing, too many or of another shape, where transformers would only warn
            and make up values; or names the file that cannot be read.
    """
    try:
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        if damage := describe_damage(source, error, options):
            raise ValueError(damage) from error
        raise
    missing = sorted(key for key in info["missing_keys"] if not left.search(key))
    extra = sorted(info["unexpected_keys"])
    shapes = [mismatch for mismatch in sorted(info["mismatched_keys"]) if not left.search(mismatch[0])]
    check_fit(f"The weights of {source} do not fit {type(model).__name__}", missing, extra, shapes)
    return model


def load_classifier(
    model_class: type, source: str | Path, before: PreTrainedConfig, headless: type, **options
) -> PreTrainedModel:
    """[`load_all`] of a MoNE's own checkpoint as a classifier, which may be new, and starts at zero then.

    It is for another number of labels in `options`, and where the checkpoint is of a model without one.

    Args:
        before: the checkpoint's config.
        headless: the class of models without a classifier.
    """
    check_labels(options)
    options = number_labels(options)
    count = count_labels(options, before.num_labels)
    new = count != before.num_labels or before.architectures == [headless.__name__]
    model = load_all(model_class, source, re.compile(r"^classifier\.") if new else NO_KEY, **options)
    if new:
        start_new_classifier(model)
    else:
        follow_labels(model, before.id2label)
    return model
