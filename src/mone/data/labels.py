# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labels as class numbers with names, the same in every split of a data set."""

import functools
import logging
from collections.abc import Callable, Iterable

import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, List
from datasets.features.features import FeatureType


logger = logging.getLogger(__name__)

Split = Dataset | IterableDataset


def default_label_column(columns: Iterable[str]) -> str:
    """The column of labels where none is named: "label" or "labels".

    Raises:
        ValueError: there are both.
    """
    found = {"label", "labels"} & set(columns)
    if len(found) == 2:
        raise ValueError("There are two columns, label and labels: say which by --label_column.")
    return found.pop() if found else "label"


def class_label(split: Split) -> ClassLabel | None:
    """The classes of the column "label", whose rows hold one of them, or a list; None where they have no names."""
    return classes_of(split.features["label"])


def classes_of(feature: FeatureType | None) -> ClassLabel | None:
    """The classes of a column of this type, of one of them a row or of a list."""
    feature = feature.feature if isinstance(feature, List) else feature
    return feature if isinstance(feature, ClassLabel) else None


def is_multi_label(split: Split) -> bool:
    """Whether a row of the column "label" is a list of classes."""
    return isinstance(split.features["label"], List)


def with_class_labels(splits: dict[str, Dataset], label_names: list[str] | None) -> DatasetDict:
    """Labels as class numbers with names, the same in every split.

    Args:
        splits: by name, with the column "label".
        label_names: the classes in order; by default those of the first split.

    Raises:
        ValueError: a row without a label, or classes that `label_names` or the first split lack.
    """
    for name, split in splits.items():
        for row, label in enumerate(split["label"]):
            if not is_label(label):
                raise ValueError(f"Row {row} of the {name} set has no label: {label!r}.")
        if class_label(split) is None:
            splits[name] = _renumber(split, _names(split["label"]))
    expected = _expected_names({name: class_label(split).names for name, split in splits.items()}, label_names)
    return DatasetDict(
        {
            name: split if class_label(split).names == expected else _renumber(split, expected)
            for name, split in splits.items()
        }
    )


def with_class_labels_of_streams(
    splits: dict[str, IterableDataset],
    label_names: list[str] | None,
    files: dict[str, list[str]],
    label_column: str | None,
) -> dict[str, IterableDataset]:
    """As [`with_class_labels`], of streams.

    Args:
        files: those that a split is read from. Where its classes have no names, their labels alone are read before.
        label_column: of the files.

    Raises:
        ValueError: as [`with_class_labels`]; or the classes have no names, and there are no files.
    """
    names = {}
    for name, split in splits.items():
        if class_label(split) is not None:
            names[name] = class_label(split).names
        elif name in files:
            names[name] = _names(_labels_of(files[name], label_column))
        else:
            raise ValueError(
                f"--streaming needs class names: the label column of the {name} set must be a ClassLabel or a list of "
                f"ClassLabel, not {split.features['label']!r}. Load it without --streaming."
            )
    expected = _expected_names(names, label_names)
    return {
        name: _renumber_stream(split, expected) if class_label(split) is None or names[name] != expected else split
        for name, split in splits.items()
    }


def _expected_names(names: dict[str, list[str]], label_names: list[str] | None) -> list[str]:
    """The classes of all splits, in order."""
    expected = label_names or next(iter(names.values()))
    for name, found in names.items():
        unknown = sorted(set(found) - set(expected))
        if unknown:
            raise ValueError(f"The {name} set has the classes {unknown}, which are not among {expected}.")
        missing = sorted(set(expected) - set(found))
        if missing:
            logger.warning(
                "The %s set has no examples of %d of the %d classes: %s.",
                *(name, len(missing), len(expected), ", ".join(missing[:20]) + (", ..." if len(missing) > 20 else "")),
            )
    return expected


def _labels_of(files: list[str], label_column: str | None) -> Iterable:
    for file in files:
        column = label_column or default_label_column(pq.read_schema(file).names)
        for row, label in enumerate(pq.read_table(file, columns=[column])[column].to_pylist()):
            if not is_label(label):
                raise ValueError(f"Row {row} of {file} has no label: {label!r}.")
            yield label


def _names(labels: Iterable) -> list[str]:
    return sorted({str(part) for label in labels for part in _as_list(label)}, key=_numbers_first)


def is_label(label) -> bool:
    """Whether it is one, or a list of any number of them; -1 stands for a label that is kept back, NaN for none."""
    return label is not None and all(
        part is not None
        and part == part
        and not (isinstance(part, (int, float)) and part < 0)
        and not (isinstance(part, str) and not part.strip())
        for part in _as_list(label)
    )


def _as_list(label) -> list:
    return label if isinstance(label, list) else [label]


def _renumbering(split: Split, names: list[str]) -> tuple[Callable, FeatureType]:
    """What turns a label of the split into one, or a list, of `names`, and the feature of the result."""
    old, new = class_label(split), ClassLabel(names=names)
    # No function inside this one: workers that are spawned have to get it, of a stream.
    number = functools.partial(_number, text=str if old is None else old.int2str, classes=new)
    return number, List(new) if is_multi_label(split) else new


def _number(label, text: Callable, classes: ClassLabel):
    numbers = [classes.str2int(text(part)) for part in _as_list(label)]
    return numbers if isinstance(label, list) else numbers[0]


def _renumber(split: Dataset, names: list[str]) -> Dataset:
    """`split` with its labels as numbers of `names`."""
    number, feature = _renumbering(split, names)
    labels = [number(label) for label in split["label"]]
    return split.remove_columns("label").add_column("label", labels, feature=feature)


def _renumber_stream(split: IterableDataset, names: list[str]) -> IterableDataset:
    number, feature = _renumbering(split, names)
    features = split.features.copy()
    features["label"] = feature
    return split.map(functools.partial(_number_row, number), input_columns="label", features=features)


def _number_row(number: Callable, label) -> dict:
    return {"label": number(label)}


def _numbers_first(label: str) -> tuple:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)
