# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labelled images from the Hub, from folders or from parquet files, as batches of `pixel_values` and `labels`."""

import glob
import random
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from torchvision.transforms import v2
from transformers import BaseImageProcessor


def load_image_datasets(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    validation_split: float = 0.15,
    image_column: str | None = None,
    label_column: str | None = None,
    label_names: list[str] | None = None,
    seed: int = 42,
    token: str | None = None,
    cache_dir: str | None = None,
) -> DatasetDict:
    """Load one source of labelled images: a data set on the Hub, folders (one per class) or parquet files.

    Args:
        dataset_name, dataset_config_name: a data set on the Hub.
        train_dir, validation_dir: folders that hold one folder of images per class.
        train_file, validation_file: parquet files with an image column (bytes or `datasets.Image`) and a label column.
        validation_split: share of the training images to hold out where no validation set is given.
        image_column, label_column: their names; by default the only image column, and "label" or "labels".
        label_names: the classes, in order, of a model that is only evaluated; by default those of the training set.
        seed: of the held-out split.
        token: of the Hub, for private data sets.
        cache_dir: of `datasets`.

    Returns:
        "train" and "validation" (those that exist), with the columns "image" and "label", a `ClassLabel`.

    Raises:
        ValueError: no source or several, a folder without images, a missing column, a row without a label, or
            classes that differ between the splits.
        FileNotFoundError: a folder or file that does not exist.
    """
    sources = {
        "--dataset_name": [dataset_name],
        "--train_dir/--validation_dir": [train_dir, validation_dir],
        "--train_file/--validation_file": [train_file, validation_file],
    }
    given = [name for name, values in sources.items() if any(values)]
    if len(given) != 1:
        raise ValueError(f"Exactly one source of data is needed out of {', '.join(sources)}; got {given or 'none'}.")

    if dataset_name:
        splits = load_dataset(dataset_name, dataset_config_name, token=token, cache_dir=cache_dir)
        if "validation" not in splits and "test" in splits:
            splits["validation"] = splits["test"]
    else:
        paths = {"train": train_file or train_dir, "validation": validation_file or validation_dir}
        paths = {name: path for name, path in paths.items() if path}
        for path in paths.values():
            if not Path(path).exists():
                raise FileNotFoundError(f"{path} does not exist.")
        # One by one: read together, folders would share the names of all their classes, and a class that only the
        # validation set has would go unnoticed.
        read = _read_folder if train_dir or validation_dir else _read_parquet
        splits = {name: read(path, cache_dir) for name, path in paths.items()}

    splits = DatasetDict(
        {
            name: _with_columns(splits[name], image_column, label_column)
            for name in ("train", "validation")
            if name in splits
        }
    )
    if "train" in splits and "validation" not in splits and validation_split > 0:
        held_out = splits["train"].train_test_split(validation_split, seed=seed)
        splits = DatasetDict({"train": held_out["train"], "validation": held_out["test"]})
    return _with_class_labels(splits, label_names)


def _read_folder(path: str, cache_dir: str | None) -> Dataset:
    root = Path(path)
    if not any(file.is_file() for file in root.glob("*/**/*")):
        raise ValueError(f"{path} must be a folder that holds one folder of images per class.")
    # A folder with a single class keeps its labels, and its name is no pattern.
    files = f"{glob.escape(str(root))}/*/**"
    return load_dataset("imagefolder", data_files=files, split="train", drop_labels=False, cache_dir=cache_dir)


def _read_parquet(path: str, cache_dir: str | None) -> Dataset:
    return load_dataset("parquet", data_files=glob.escape(path), split="train", cache_dir=cache_dir)


def _with_columns(split: Dataset, image_column: str | None, label_column: str | None) -> Dataset:
    """Only "image" and "label", by those names."""
    images = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    image_column = image_column or (images[0] if len(images) == 1 else "image")
    label_column = label_column or ("labels" if "labels" in split.features else "label")
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in split.features:
            raise ValueError(
                f"--{option}={column!r} is not among the columns {list(split.features)}: name one of them."
            )
    split = split.select_columns([image_column, label_column])
    renames = {image_column: "image", label_column: "label"}
    split = split.rename_columns({old: new for old, new in renames.items() if old != new})
    return split.cast_column("image", Image(mode="RGB"))


def _with_class_labels(splits: DatasetDict, label_names: list[str] | None) -> DatasetDict:
    """Labels as class numbers with names, the same in every split."""
    for name, split in splits.items():
        for row, label in enumerate(split["label"]):
            if label is None or (isinstance(label, int) and label < 0):
                raise ValueError(f"Row {row} of the {name} set has no label: {label!r}.")
        if not isinstance(split.features["label"], ClassLabel):
            names = sorted({str(label) for label in split["label"]}, key=_numbers_first)
            splits[name] = _renumber(split, names)
    expected = label_names or next(iter(splits.values())).features["label"].names
    for name, split in splits.items():
        unknown = sorted(set(split.features["label"].names) - set(expected))
        if unknown:
            raise ValueError(f"The {name} set has the classes {unknown}, which are not among {expected}.")
        if split.features["label"].names != expected:
            splits[name] = _renumber(split, expected)
    return splits


def _renumber(split: Dataset, names: list[str]) -> Dataset:
    """`split` with its labels as numbers of `names`."""
    old, new = split.features["label"], ClassLabel(names=names)
    text = old.int2str if isinstance(old, ClassLabel) else str
    labels = [new.str2int(text(label)) for label in split["label"]]
    return split.remove_columns("label").add_column("label", labels, feature=new)


def _numbers_first(label: str) -> tuple:
    return (0, int(label), "") if label.isdigit() else (1, 0, label)


def make_image_transforms(
    image_processor: BaseImageProcessor,
    size: tuple[int, int],
    *,
    train: bool,
    flip: bool = True,
    min_crop: float = 0.08,
) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """PIL image -> (C, height, width) float tensor.

    Args:
        image_processor: the model's. It makes the images of an evaluation, so that these are what a pipeline sees;
            training takes its resampling and normalisation.
        size: (height, width) in pixels of training images.
        train: random resized crop and flip, the "inception crop" of AugReg.
        flip: mirror half of the training images.
        min_crop: least share of the image's area that a training crop keeps.
    """
    if not train:
        return lambda image: image_processor(images=image, return_tensors="pt").pixel_values[0]
    steps = [v2.RandomResizedCrop(size, scale=(min_crop, 1.0), interpolation=image_processor.resample, antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if image_processor.do_normalize:
        steps.append(v2.Normalize(mean=image_processor.image_mean, std=image_processor.image_std))
    return v2.Compose(steps)


class LabelledImages(torch.utils.data.Dataset):
    """Rows of a split, transformed when they are read: {"pixel_values": (C, height, width), "labels": int}.

    What a random transform draws depends on `seed`, the epoch and the row alone: not on the number of workers or
    ranks, and not on whether the run was stopped and resumed.

    Args:
        split: with the columns "image" and "label" (`load_image_datasets`).
        transforms: of one image (`make_image_transforms`).
        seed: of random transforms.
    """

    def __init__(self, split: Dataset, transforms: Callable, seed: int = 0):
        self.split = split
        self.transforms = transforms
        self.seed = seed
        # In shared memory: persistent workers keep the data set that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict:
        row = self.split[index]
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator only: torch.manual_seed would also reset those of the accelerators.
            torch.default_generator.manual_seed(
                random.Random(f"{self.seed}-{self._epoch.item()}-{index}").getrandbits(63)
            )
            return {"pixel_values": self.transforms(row["image"]), "labels": row["label"]}


def collate_images(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of `LabelledImages` -> `pixel_values` (batch, C, height, width) and `labels` (batch,)."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
