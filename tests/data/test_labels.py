# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labels of every kind as class numbers that all splits share."""

import logging
import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from pictures import picture, write_folder, write_parquet

from mone.data import LabelledExamples, collate_examples, load_image_datasets


def test_a_class_that_validation_lacks_is_named(tmp_path, cache, caplog):
    with caplog.at_level(logging.WARNING):
        load_image_datasets(
            train_dir=write_folder(tmp_path / "train", ["cat", "dog", "emu"], per_class=1),
            validation_dir=write_folder(tmp_path / "validation", ["dog", "emu"], per_class=1),
            cache_dir=cache,
        )
    assert "The validation set has no examples of 1 of the 3 classes: cat." in caplog.text


def test_a_class_that_only_validation_has(tmp_path, cache):
    with pytest.raises(ValueError, match=r"validation set has the classes \['fox'\].*\['cat', 'dog'\]"):
        load_image_datasets(
            train_dir=write_folder(tmp_path / "train", ["cat", "dog"]),
            validation_dir=write_folder(tmp_path / "validation", ["cat", "fox"]),
            cache_dir=cache,
        )


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([1, 0, 1], ClassLabel(names=["b", "a"]), ["b", "a"]),
        (["x", "y", "x"], Value("string"), ["x", "y"]),
        ([10, 9, 10], Value("int64"), ["9", "10"]),  # numbers in the order of numbers, not of their digits
        (["²", "1", "²"], Value("string"), ["1", "²"]),  # which is a digit, but no number
    ],
)
def test_parquet_labels_of_every_kind(tmp_path, cache, labels, feature, names):
    splits = load_image_datasets(
        train_file=write_parquet(tmp_path / "train.parquet", labels, feature),
        validation_file=write_parquet(tmp_path / "validation.parquet", labels, feature),
        cache_dir=cache,
    )
    for split in splits.values():
        assert split.features["label"].names == names
        original = [names[label] if isinstance(feature, ClassLabel) else str(label) for label in labels]
        assert [names[label] for label in split["label"]] == original
        assert np.array_equal(np.asarray(split[2]["image"]), np.asarray(picture(2)))


def test_labels_of_an_existing_model(tmp_path, cache):
    """Evaluation only: the numbers are the model's, whatever classes the folder happens to have."""
    splits = load_image_datasets(
        validation_dir=write_folder(tmp_path / "v", ["dog"]), label_names=["emu", "dog"], cache_dir=cache
    )
    assert set(splits["validation"]["label"]) == {1}


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, None, 1], "int64"),
        ([0.0, math.nan, 1.0], "float32"),
        ([0.0, -1.0, 1.0], "float32"),
        (["a", "", "b"], "string"),
        (["a", " ", "b"], "string"),
    ],
)
def test_a_row_without_a_label(tmp_path, cache, labels, feature):
    file = write_parquet(tmp_path / "t.parquet", labels, Value(feature))
    with pytest.raises(ValueError, match=f"Row 1 of the train set has no label: {labels[1]!r}"):
        load_image_datasets(train_file=file, validation_split=0, cache_dir=cache)
    with pytest.raises(ValueError, match=f"Row 1 of .*t.parquet has no label: {labels[1]!r}"):
        load_image_datasets(train_file=file, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_two_columns_of_labels(tmp_path, cache, streaming):
    file = str(tmp_path / "two.parquet")
    label = ClassLabel(names=["a", "b"])
    Dataset.from_dict(
        {"image": [picture(0), picture(1)], "label": [0, 1], "labels": [1, 0]},
        features=Features({"image": Image(), "label": label, "labels": label}),
    ).to_parquet(file)
    options = {"train_file": file, "validation_split": 0, "cache_dir": cache, "streaming": streaming}
    with pytest.raises(ValueError, match="two columns, label and labels: say which by --label_column"):
        load_image_datasets(**options)
    split = load_image_datasets(**options, label_column="label")["train"]
    assert [row["label"] for row in split] == [0, 1]


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([[0, 2], [], [1]], List(ClassLabel(names=["a", "b", "c"]))),
        ([["a", "c"], [], ["b"]], List(Value("string"))),
        ([[0, 2], [], [1]], List(Value("int64"))),
    ],
)
def test_any_number_of_labels(tmp_path, cache, labels, feature):
    file = write_parquet(tmp_path / "train.parquet", labels, feature, label_column="labels")
    split = load_image_datasets(train_file=file, validation_split=0, cache_dir=cache)["train"]
    assert list(split["label"]) == [[0, 2], [], [1]]
    assert split.features["label"].feature.names == (
        ["0", "1", "2"] if feature.feature == Value("int64") else list("abc")
    )
    data = LabelledExamples(split, lambda image: torch.zeros(1), num_labels=3)
    batch = collate_examples([data[i] for i in range(3)])
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    broken = write_parquet(tmp_path / "broken.parquet", [[0], [1, None]], List(Value("int64")))
    with pytest.raises(ValueError, match="Row 1 of the train set has no label"):
        load_image_datasets(train_file=broken, validation_split=0, cache_dir=cache)
