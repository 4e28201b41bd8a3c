# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labelled data sets from the Hub, from folders or from files: what images and videos have in common."""

import dataclasses
import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset, SplitDict, SplitInfo, load_dataset
from datasets.features.features import FeatureType

from .labels import Split, classes_of, default_label_column, with_class_labels, with_class_labels_of_streams


logger = logging.getLogger(__name__)


def load_labelled_datasets(
    name: str,
    feature: FeatureType,
    suffixes: Iterable[str],
    read_files: Callable[[list[str], str | None], Dataset],
    *,
    column: str | None = None,
    label_column: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    train_file: str | Sequence[str] | None = None,
    validation_file: str | Sequence[str] | None = None,
    validation_split: float = 0.15,
    label_names: list[str] | None = None,
    streaming: bool = False,
    seed: int = 42,
    token: str | None = None,
    cache_dir: str | None = None,
) -> dict[str, Split]:
    """Load one source of labelled examples: a data set on the Hub, folders (one per class) or files.

    Args:
        name: what the column of examples is called in the result, "image" or "video".
        feature: its type in the result.
        suffixes: of the files in `train_dir` and `validation_dir` that are examples, in lower case, with the dot.
        read_files: paths and `label_column` -> rows, for `train_file` and `validation_file`.
        column, label_column: their names in the source; by default the only column of `feature`'s type, else `name`,
            and "label" or "labels".
        dataset_name, dataset_config_name: a data set on the Hub.
        train_dir, validation_dir: folders that hold one folder per class, in which examples may lie at any depth.
        train_file, validation_file: files that list or hold the examples: paths, patterns (`"train-*.parquet"`), and
            folders, of which all parquet files are taken.
        validation_split: share of the training examples to hold out where no validation set is given; a data set on
            the Hub that has none but a test set has that for one.
        label_names: the classes, in order, of a model that is only evaluated; by default those of the training set.
        streaming: read parquet files or the Hub while training runs, without a copy of the data in the cache. There is
            no random access then: nothing is held out, and shuffling is by file and in a buffer.
        seed: of the held-out split.
        token: of the Hub, for private data sets.
        cache_dir: of `datasets`.

    Returns:
        "train" and "validation" (those that exist), with the columns `name` and "label", a `ClassLabel` or, where
        examples have any number of labels, a list of `ClassLabel`. A stream's images are not decoded yet, and
        [`count_rows`] tells its length.

    Raises:
        ValueError: no source or several, a folder without examples, a missing column, a row without a label (an empty
            list of labels is allowed), classes that differ between the splits, or a source that cannot be streamed.
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

    if not 0 <= validation_split < 1:
        raise ValueError(f"validation_split={validation_split} must be a share of the training examples, in [0, 1).")
    if streaming and (train_dir or validation_dir):
        raise ValueError("--streaming is for --dataset_name and for parquet files, not for folders of single files.")
    if dataset_name:
        splits = load_dataset(dataset_name, dataset_config_name, token=token, cache_dir=cache_dir, streaming=streaming)
        if "validation" not in splits and "test" in splits:
            splits["validation"] = splits["test"]
    elif train_dir or validation_dir:
        paths = {split: path for split, path in (("train", train_dir), ("validation", validation_dir)) if path}
        for path in paths.values():
            if not Path(path).exists():
                raise FileNotFoundError(f"{path} does not exist.")
            if not Path(path).is_dir():
                raise ValueError(f"{path} must be a folder that holds one folder of {name}s per class.")
        # One by one: read together, folders would share the names of all their classes, and a class that only the
        # validation set has would go unnoticed.
        splits = {
            split: make_dataset(_read_folder(path, name, suffixes), name, feature) for split, path in paths.items()
        }
    else:
        paths = {"train": train_file, "validation": validation_file}
        files = {split: find_files(path) for split, path in paths.items() if path}
        read = _stream_parquet if streaming else read_files
        splits = {split: read(paths, label_column) for split, paths in files.items()}

    if streaming:  # images are decoded where one that cannot be is passed over
        feature = dataclasses.replace(feature, decode=False)
    splits = {
        split: _with_columns(splits[split], name, feature, column, label_column)
        for split in ("train", "validation")
        if split in splits
    }
    if streaming:
        return with_class_labels_of_streams(splits, label_names, {} if dataset_name else files, label_column)
    if "train" in splits and "validation" not in splits and validation_split > 0:
        # After the classes are known: one of few examples may be in one of the two only.
        numbered = with_class_labels(splits, label_names)["train"]
        held_out = numbered.train_test_split(validation_split, seed=seed)
        return DatasetDict(train=held_out["train"], validation=held_out["test"])
    return with_class_labels(splits, label_names)


def _read_folder(path: str, name: str, suffixes: Iterable[str]) -> list[tuple[str, str]]:
    """(file, class) of all examples in a folder's folders, each of which is a class; what is hidden is left out."""
    # Not `datasets`' own, for which the class is the last folder of a path, and which passes over webm.
    rows, empty = [], []
    for folder in sorted(Path(path).iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        files = visible_files(folder, suffixes)
        rows += [(file, folder.name) for file in files]
        if not files:
            empty.append(folder.name)
    if not rows:
        raise ValueError(
            f"{path} must be a folder that holds one folder of {name}s per class; allowed are "
            f"{', '.join(sorted(suffixes))}."
        )
    if empty:
        logger.warning("%s: the folders %s hold no %ss, which makes no classes of them.", path, ", ".join(empty), name)
    return rows


def visible_files(folder: str | Path, suffixes: Iterable[str]) -> list[str]:
    """Files of these suffixes, in lower case and with the dot, at any depth; no hidden ones, nor in hidden folders."""
    found = []
    for parent, folders, files in walk(folder):
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in suffixes:
                found.append(os.path.join(parent, file))
    return found


def walk(folder: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that follows links, but not into a folder that it was in, or that holds `folder`."""
    seen = {str(parent) for parent in Path(folder).resolve().parents}
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
        else:
            seen.add(place)
            yield parent, folders, files


def make_dataset(rows: list[tuple[str, str]], name: str, feature: FeatureType) -> Dataset:
    """Of (file, label)."""
    files, labels = zip(*rows, strict=True)
    return Dataset.from_dict({name: files, "label": labels}).cast_column(name, feature)


def find_files(paths: str | Sequence[str]) -> list[str]:
    """Files as named, those of a pattern, and the parquet files of a folder, in the order of their names.

    Raises:
        FileNotFoundError: a path that is none of these.
    """
    found = []
    for path in [paths] if isinstance(paths, str) else paths:
        if Path(path).is_file():
            files = [path]
        elif Path(path).is_dir():
            files = sorted(str(file) for file in Path(path).rglob("*.parquet"))
            if not files:
                raise FileNotFoundError(f"The folder {path} holds no parquet files.")
        else:
            files = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
            if not files:
                raise FileNotFoundError(f"{path} does not exist.")
        found += files
    return found


def read_parquet(files: list[str], label_column: str | None, cache_dir: str | None) -> Dataset:
    """The rows of all files, in order.

    Raises:
        ValueError: names a file that is none, or whose classes are others than the first one's; or no file has rows.
    """
    filled, _ = _check_parquet(files, label_column)
    return _load_parquet(filled, cache_dir=cache_dir)


def _load_parquet(files: Iterable[str], **options) -> Split:
    escaped = [glob.escape(file) for file in files]  # a file's name is no pattern
    return load_dataset("parquet", data_files=escaped, split="train", **options)


def _check_parquet(files: list[str], label_column: str | None) -> tuple[list[str], int]:
    """The files that have rows, as `datasets` fails on the others, and the number of all rows."""
    filled, count, first = [], 0, None
    for file in files:
        try:
            content = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} cannot be read as a parquet file; it may be cut short: {error}") from error
        if not content.metadata.num_rows:
            continue
        filled.append(file)
        count += content.metadata.num_rows
        features = Features.from_arrow_schema(content.schema_arrow)
        classes = classes_of(features.get(label_column or default_label_column(features)))
        if classes is not None:
            first = first or (file, classes.names)
            if classes.names != first[1]:  # by which `datasets` reads all of them
                raise ValueError(
                    f"{file} numbers its classes otherwise than {first[0]}: {classes.names[:5]}, ... and "
                    f"{first[1][:5]}, ... Write them with one list of classes."
                )
    if not filled:
        raise ValueError(f"The parquet files hold no rows: {files[:5]}.")
    return filled, count


def _stream_parquet(files: list[str], label_column: str | None) -> IterableDataset:
    other = [file for file in files if not file.endswith(".parquet")]
    if other:
        raise ValueError(f"--streaming reads parquet files only, not {other[0]}.")
    filled, count = _check_parquet(files, label_column)
    return with_count(_load_parquet(filled, streaming=True), count)


def with_count(stream: IterableDataset, count: int) -> IterableDataset:
    """The stream, of which [`count_rows`] knows the length."""
    name = str(stream.split)
    stream.info.splits = SplitDict({name: SplitInfo(name, num_examples=count)})
    return stream


def count_rows(split: Split) -> int:
    """Number of rows, of a stream as its source tells it.

    Raises:
        ValueError: the source does not.
    """
    if isinstance(split, Dataset):
        return len(split)
    known = (split.info.splits or {}).get(str(split.split))
    if known is None or not known.num_examples:
        raise ValueError("The number of examples of this stream is not known: load it without --streaming.")
    return known.num_examples


def _with_columns(
    split: Split, name: str, feature: FeatureType, column: str | None, label_column: str | None
) -> Split:
    """Only `name` and "label", by those names."""
    if split.features is None:
        raise ValueError("The columns of this stream are not known: load it without --streaming.")
    found = [key for key, value in split.features.items() if isinstance(value, type(feature))]
    column = column or (found[0] if len(found) == 1 else name)
    label_column = label_column or default_label_column(split.features)
    for option, key in ((f"{name}_column", column), ("label_column", label_column)):
        if key not in split.features:
            raise ValueError(f"--{option}={key!r} is not among the columns {list(split.features)}: name one of them.")
    # First, as every later step of a stream would decode by the type that the column has before.
    split = split.cast_column(column, feature).select_columns([column, label_column])
    renames = {column: name, label_column: "label"}
    return split.rename_columns({old: new for old, new in renames.items() if old != new})
