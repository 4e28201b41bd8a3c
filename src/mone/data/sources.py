# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labelled data sets from the Hub, from folders or from files: what images and videos have in common."""

import glob
import logging
from collections.abc import Callable
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.features.features import FeatureType


logger = logging.getLogger(__name__)


def load_labelled_datasets(
    name: str,
    feature: FeatureType,
    read_folder: Callable[[str], Dataset],
    read_file: Callable[[str], Dataset],
    *,
    column: str | None = None,
    label_column: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    validation_split: float = 0.15,
    label_names: list[str] | None = None,
    seed: int = 42,
    token: str | None = None,
    cache_dir: str | None = None,
) -> DatasetDict:
    """Load one source of labelled examples: a data set on the Hub, folders (one per class) or files.

    Args:
        name: what the column of examples is called in the result, "image" or "video".
        feature: its type in the result.
        read_folder, read_file: path -> rows, for one of `train_dir`, `validation_dir`, `train_file`, ...
        column, label_column: their names in the source; by default the only column of `feature`'s type, else `name`,
            and "label" or "labels".
        dataset_name, dataset_config_name: a data set on the Hub.
        train_dir, validation_dir: folders that hold one folder per class.
        train_file, validation_file: files that list or hold the examples.
        validation_split: share of the training examples to hold out where no validation set is given.
        label_names: the classes, in order, of a model that is only evaluated; by default those of the training set.
        seed: of the held-out split.
        token: of the Hub, for private data sets.
        cache_dir: of `datasets`.

    Returns:
        "train" and "validation" (those that exist), with the columns `name` and "label", a `ClassLabel`.

    Raises:
        ValueError: no source or several, a folder without examples, a missing column, a row without a label, or
            classes that differ between the splits.
        FileNotFoundError: a folder or file that does not exist.
    """
    sources = {
        "--dataset_name": [dataset_name],
        "--train_dir/--validation_dir": [train_dir, validation_dir],
        "--train_file/--validation_file": [train_file, validation_file],
    }
    given = [option for option, values in sources.items() if any(values)]
    if len(given) != 1:
        raise ValueError(f"Exactly one source of data is needed out of {', '.join(sources)}; got {given or 'none'}.")

    if dataset_name:
        splits = load_dataset(dataset_name, dataset_config_name, token=token, cache_dir=cache_dir)
        if "validation" not in splits and "test" in splits:
            splits["validation"] = splits["test"]
    else:
        paths = {"train": train_file or train_dir, "validation": validation_file or validation_dir}
        paths = {split: path for split, path in paths.items() if path}
        for path in paths.values():
            if not Path(path).exists():
                raise FileNotFoundError(f"{path} does not exist.")
        # One by one: read together, folders would share the names of all their classes, and a class that only the
        # validation set has would go unnoticed.
        read = read_folder if train_dir or validation_dir else read_file
        splits = {split: read(path) for split, path in paths.items()}

    splits = DatasetDict(
        {
            split: _with_columns(splits[split], name, feature, column, label_column)
            for split in ("train", "validation")
            if split in splits
        }
    )
    if "train" in splits and "validation" not in splits and validation_split > 0:
        held_out = splits["train"].train_test_split(validation_split, seed=seed)
        splits = DatasetDict({"train": held_out["train"], "validation": held_out["test"]})
    return _with_class_labels(splits, label_names)


def read_parquet(path: str, cache_dir: str | None) -> Dataset:
    # A file's name is no pattern.
    return load_dataset("parquet", data_files=glob.escape(path), split="train", cache_dir=cache_dir)


def _with_columns(
    split: Dataset, name: str, feature: FeatureType, column: str | None, label_column: str | None
) -> Dataset:
    """Only `name` and "label", by those names."""
    found = [key for key, value in split.features.items() if isinstance(value, type(feature))]
    column = column or (found[0] if len(found) == 1 else name)
    label_column = label_column or ("labels" if "labels" in split.features else "label")
    for option, key in ((f"{name}_column", column), ("label_column", label_column)):
        if key not in split.features:
            raise ValueError(f"--{option}={key!r} is not among the columns {list(split.features)}: name one of them.")
    split = split.select_columns([column, label_column])
    renames = {column: name, label_column: "label"}
    split = split.rename_columns({old: new for old, new in renames.items() if old != new})
    return split.cast_column(name, feature)


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
        missing = sorted(set(expected) - set(split.features["label"].names))
        if missing:
            logger.warning(
                "The %s set has no examples of %d of the %d classes: %s.",
                *(name, len(missing), len(expected), ", ".join(missing[:20]) + (", ..." if len(missing) > 20 else "")),
            )
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
