# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labelled videos from the Hub, from folders or from lists of files, and their transforms."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Video
from torchvision.transforms import v2
from transformers.image_utils import SizeDict

from ..video_decoding import VideoReader, dense_indices, uniform_indices
from ..video_processing_mone import MoNEViViTVideoProcessor, check_num_clips
from .augmentation import randaugment
from .sources import load_labelled_datasets, make_dataset, read_parquet, walk
from .video_lists import read_video_list


logger = logging.getLogger(__name__)

SUFFIXES = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".mpg", ".mpeg", ".m4v"),
    *(".ts", ".flv", ".wmv", ".3gp", ".ogv"),  # not .gif, which is a preview beside a video more often than one
)
FEATURE = Video(decode=False)


def load_video_datasets(
    *, video_column: str | None = None, video_dir: str | None = None, cache_dir: str | None = None, **source
) -> DatasetDict:
    """Load one source of labelled videos: a data set on the Hub, folders (one per class) or files that list them.

    Listed videos that do not exist, as is common with Kinetics, are counted in the log and left out. What a list names
    with its suffix may have any.

    Args:
        video_column: by default the only column of videos.
        video_dir: folder of the videos that a list names; by default the list's own.
        cache_dir, source: as in [`load_labelled_datasets`]. Files are parquet with videos inside (bytes or
            `datasets.Video`), or a list of videos with labels as [`read_video_list`] takes it.

    Returns:
        "train" and "validation" (those that exist), with the columns "video" (`{"path", "bytes"}`) and "label", a
        `ClassLabel` or a list of them.

    Raises:
        ValueError, FileNotFoundError: as [`load_labelled_datasets`]; a list that cannot be understood, or none of
            whose videos exists.
    """
    return load_labelled_datasets(
        "video",
        FEATURE,
        SUFFIXES,
        functools.partial(_read_files, video_dir=video_dir, cache_dir=cache_dir),
        column=video_column,
        cache_dir=cache_dir,
        **source,
    )


def _read_files(paths: list[str], label_column: str | None, video_dir: str | None, cache_dir: str | None) -> Dataset:
    if all(path.endswith(".parquet") for path in paths):
        return read_parquet(paths, label_column, cache_dir)
    rows = [row for path in paths for row in _read_list(path, video_dir)]
    return make_dataset(rows, "video", FEATURE)


def _read_list(path: str, video_dir: str | None) -> list[tuple[str, str]]:
    """(file, label) of the videos that a list names and that exist."""
    root = Path(video_dir or Path(path).parent)
    if not root.is_dir():
        raise FileNotFoundError(f"--video_dir={str(root)!r} is no folder.")
    # One walk instead of a question for each of what may be 240,000 files.
    found = {}
    for folder, _, names in walk(root):
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES):
                file = os.path.join(folder, name)
                relative = os.path.relpath(file, root)
                found[relative] = file
                found.setdefault(os.path.splitext(relative)[0], file)
    rows, missing = [], []
    for name, label in read_video_list(path):
        # Kinetics is kept both flat and in a folder for each class.
        candidates = (os.path.normpath(name), os.path.join(label, name), os.path.join(label.replace(" ", "_"), name))
        file = next((found[candidate] for candidate in candidates if candidate in found), None)
        if file is None and os.path.isfile(root / name):  # elsewhere, or of another suffix
            file = os.path.join(root, name)
        if file is None:
            missing.append(name)
        else:
            rows.append((file, label))
    if not rows:
        raise ValueError(
            f"None of the {len(missing)} videos that {path} lists is in {root}; for example {missing[:3]}."
        )
    if missing:
        logger.warning(
            "%d of the %d videos that %s lists are not in %s and are left out; for example %s.",
            *(len(missing), len(missing) + len(rows), path, root, missing[0]),
        )
    return rows


def make_video_transforms(
    video_processor: MoNEViViTVideoProcessor,
    *,
    train: bool,
    num_clips: int | None = None,
    flip: bool = True,
    scale_jitter: tuple[float, float] = (1.0, 1.0),
    color_jitter: float = 0.0,
    grayscale: float = 0.0,
    randaugment_layers: int = 0,
    randaugment_magnitude: int = 10,
    as_bytes: bool = False,
) -> Callable[[dict], torch.Tensor]:
    """Row of a `Video` column -> (F, C, height, width) float tensor; in evaluation, with the clips axis before.

    Augmentations are ViViT's (Scenic, `projects/vivit`), the same for all frames of a clip.

    Args:
        video_processor: the model's. It makes the clips of an evaluation, so that these are what a pipeline sees;
            training takes its sampling, sizes and normalisation.
        train: a clip at a random time and place, augmented as below.
        num_clips: of a video in evaluation, with linearly spaced starts; default: the processor's `clips_to_average`.
        flip: mirror half of the training clips.
        scale_jitter: smallest and largest factor of the size to which training frames are resized before the crop.
        color_jitter: probability to change brightness, contrast, saturation and hue.
        grayscale: probability to drop the colour.
        randaugment_layers, randaugment_magnitude: as in [`randaugment`]; no layers for none.
        as_bytes: uint8 in training, as in [`make_image_transforms`].

    Raises:
        ValueError: an option that is not allowed.
    """
    low, high = scale_jitter
    if not 0 < low <= high:
        raise ValueError(f"scale_jitter={scale_jitter} must be two factors, 0 < smallest <= largest.")
    for name, value in (("color_jitter", color_jitter), ("grayscale", grayscale)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be a probability in [0, 1].")
    distort = randaugment(randaugment_layers, randaugment_magnitude)
    if not train:
        num_clips = video_processor.clips_to_average if num_clips is None else num_clips
        check_num_clips(num_clips, video_processor.do_sample_frames, video_processor.sampling)
        return functools.partial(_read_clips, video_processor, num_clips=num_clips)

    steps = [v2.RandomHorizontalFlip()] if flip else []
    if color_jitter:
        steps.append(v2.RandomApply([v2.ColorJitter(32 / 255, 0.4, 0.4, 0.2)], color_jitter))
    if grayscale:
        steps.append(v2.RandomGrayscale(grayscale))
    steps += distort
    augment = v2.Compose(steps) if steps else v2.Identity()

    return functools.partial(
        _read_training_clip, video_processor, augment=augment, scale_jitter=scale_jitter, as_bytes=as_bytes
    )


# Transforms are of functions of the module, not of others inside them: workers that are spawned have to get them.


def _read_clips(video_processor: MoNEViViTVideoProcessor, video: dict, num_clips: int) -> torch.Tensor:
    return video_processor([_source(video)], num_clips=num_clips, return_tensors="pt").pixel_values[0]


def _read_training_clip(
    video_processor: MoNEViViTVideoProcessor,
    video: dict,
    augment: v2.Transform,
    scale_jitter: tuple[float, float],
    as_bytes: bool,
) -> torch.Tensor:
    low, high = scale_jitter
    factor = low + (high - low) * torch.rand(()).item()
    size = SizeDict(**{side: round(length * factor) for side, length in dict(video_processor.size).items()})
    height, width = video_processor.crop_size["height"], video_processor.crop_size["width"]
    vertical, horizontal = torch.rand(2).tolist()  # place of the crop, the same in all frames

    def resize_and_crop(frame: np.ndarray) -> np.ndarray:
        frame = torch.from_numpy(frame).permute(2, 0, 1)
        frame = video_processor.resize(frame, size, resample=video_processor.resample)
        # A frame smaller than the crop is padded with black.
        top, left = round(vertical * (frame.shape[1] - height)), round(horizontal * (frame.shape[2] - width))
        return v2.functional.crop(frame, top, left, height, width).numpy()

    with VideoReader(_source(video)) as reader:
        clip = torch.from_numpy(reader.read(_random_indices(video_processor, len(reader)), resize_and_crop))
    if as_bytes:
        return augment(clip)
    return video_processor.rescale_and_normalize(
        augment(clip),
        video_processor.do_rescale,
        video_processor.rescale_factor,
        video_processor.do_normalize,
        video_processor.image_mean,
        video_processor.image_std,
    )


def _random_indices(video_processor: MoNEViViTVideoProcessor, total: int) -> np.ndarray:
    """Frames of one training clip: at a random time, or all over the video where the processor takes them so."""
    if video_processor.sampling == "uniform":
        return uniform_indices(total, video_processor.num_frames)
    generator = np.random.default_rng(torch.randint(2**63 - 1, ()).item())
    return dense_indices(total, video_processor.num_frames, video_processor.frame_sampling_rate, generator)


def _source(video: dict) -> str | bytes:
    return video["path"] if video["bytes"] is None else video["bytes"]
