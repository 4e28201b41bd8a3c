# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Sources of labelled examples, by images: folders and parquet files, their classes and their columns.

Not `test_sources.py`, of which there is one in `tests/conversion`: pytest wants module names that differ.
"""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from pictures import picture, write_folder, write_parquet

from mone.data import load_image_datasets


def test_a_class_of_one_example_may_be_held_out(tmp_path, cache):
    folder = write_folder(tmp_path / "train", ["cat", "dog"], per_class=10)
    for name in ("emu", "fox", "gnu"):
        write_folder(tmp_path / "train", [name], per_class=1)
    for seed in range(4):
        splits = load_image_datasets(train_dir=folder, seed=seed, cache_dir=cache)
        for split in splits.values():
            assert split.features["label"].names == ["cat", "dog", "emu", "fox", "gnu"]
        labels = [*splits["train"]["label"], *splits["validation"]["label"]]
        assert sorted(labels) == [0] * 10 + [1] * 10 + [2, 3, 4]
    for share in (1.0, 3, -0.1):
        with pytest.raises(ValueError, match=f"validation_split={share} must be a share"):
            load_image_datasets(train_dir=folder, validation_split=share, cache_dir=cache)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_do_not_go_together(tmp_path, cache, streaming):
    one = write_parquet(tmp_path / "one.parquet", [0, 1, 2], ClassLabel(names=["x", "y", "z"]))
    other = write_parquet(tmp_path / "other.parquet", [0, 1, 2], ClassLabel(names=["z", "x", "y"]))
    empty = write_parquet(tmp_path / "empty.parquet", [], ClassLabel(names=["x", "y", "z"]))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes((tmp_path / "one.parquet").read_bytes()[:200])
    options = {"validation_split": 0, "cache_dir": cache, "streaming": streaming}
    with pytest.raises(ValueError, match=r"other\.parquet numbers its classes otherwise than .*one"):
        load_image_datasets(train_file=[one, other], **options)
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be read as a parquet file"):
        load_image_datasets(train_file=[one, str(broken)], **options)
    with pytest.raises(ValueError, match=r"hold no rows"):
        load_image_datasets(train_file=[empty], **options)
    split = load_image_datasets(train_file=[empty, one], **options)["train"]
    assert [row["label"] for row in split] == [0, 1, 2]
    # In different sets they are renumbered.
    splits = load_image_datasets(train_file=[one], validation_file=[other], cache_dir=cache, streaming=streaming)
    assert [row["label"] for row in splits["validation"]] == [2, 0, 1]


def test_classes_of_other_columns_may_differ(tmp_path, cache):
    files = []
    for number, names in enumerate((["a", "b"], ["b", "a", "c"])):
        features = Features(
            {"image": Image(), "label": ClassLabel(names=["x", "y"]), "source": ClassLabel(names=names)}
        )
        rows = {"image": [picture(0), picture(1)], "label": [0, 1], "source": [0, 1]}
        files.append(str(tmp_path / f"{number}.parquet"))
        Dataset.from_dict(rows, features=features).to_parquet(files[-1])
    assert list(load_image_datasets(train_file=files, validation_split=0, cache_dir=cache)["train"]["label"]) == [
        *(0, 1, 0, 1),
    ]


def test_held_out_split_is_reproducible(tmp_path, cache):
    folder = write_folder(tmp_path / "train", ["cat", "dog"], per_class=10)
    splits = [load_image_datasets(train_dir=folder, validation_split=0.25, seed=3, cache_dir=cache) for _ in range(2)]
    assert [len(splits[0][name]) for name in ("train", "validation")] == [15, 5]
    pixels = [np.asarray(split["validation"][0]["image"]) for split in splits]
    assert np.array_equal(*pixels)


def test_columns_by_name_and_the_error_that_lists_them(tmp_path, cache):
    file = write_parquet(tmp_path / "t.parquet", [0, 1], ClassLabel(names=["a", "b"]), "img", "fine_label")
    splits = load_image_datasets(train_file=file, validation_split=0, label_column="fine_label", cache_dir=cache)
    assert list(splits) == ["train"]
    assert set(splits["train"].column_names) == {"image", "label"}
    with pytest.raises(ValueError, match=r"--label_column='label'.*\['img', 'fine_label'\]"):
        load_image_datasets(train_file=file, cache_dir=cache)


def test_sources_that_are_no_source(tmp_path, cache):
    with pytest.raises(ValueError, match="got none"):
        load_image_datasets()
    with pytest.raises(ValueError, match=r"--dataset_name.*--train_dir"):
        load_image_datasets(dataset_name="cifar10", train_dir="here")
    with pytest.raises(FileNotFoundError, match=r"no/such\.parquet does not exist"):
        load_image_datasets(train_file="no/such.parquet")


@pytest.mark.parametrize("name", ["plain/", "with [brackets]"])
def test_folder_names_as_people_type_them(tmp_path, cache, name):
    write_folder(tmp_path / name, ["cat", "dog"])
    (tmp_path / name / "stray.png").write_bytes(b"not in a class folder")
    splits = load_image_datasets(train_dir=f"{tmp_path}/{name}", validation_split=0, cache_dir=cache)
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert len(splits["train"]) == 6


def test_a_folder_without_images(tmp_path, cache):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty must be a folder that holds one folder of images per class"):
        load_image_datasets(train_dir=str(tmp_path / "empty"), cache_dir=cache)


def test_several_files_patterns_and_folders(tmp_path, cache):
    (tmp_path / "shards" / "deeper").mkdir(parents=True)
    label = ClassLabel(names=["a", "b"])
    for number, name in enumerate(["shards/train-0", "shards/train-1", "shards/deeper/train-2"]):
        write_parquet(tmp_path / f"{name}.parquet", [number % 2] * (number + 1), label)
    first, second = (str(tmp_path / "shards" / f"train-{number}.parquet") for number in (0, 1))
    for files, count in (
        ([first, second], 3),
        (str(tmp_path / "shards" / "train-*.parquet"), 3),
        (str(tmp_path / "shards"), 6),
        ([first, str(tmp_path / "shards" / "deeper")], 4),
    ):
        splits = load_image_datasets(train_file=files, validation_split=0, cache_dir=cache)
        assert len(splits["train"]) == count, files
    with pytest.raises(FileNotFoundError, match=r"test-\*\.parquet does not exist"):
        load_image_datasets(train_file=str(tmp_path / "test-*.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no parquet files"):
        load_image_datasets(train_file=str(tmp_path / "empty"))


def test_images_at_any_depth_belong_to_their_first_folder(tmp_path, cache):
    """As TinyImageNet has them; what is hidden, such as a file manager's copies, is none."""
    for name in ("cat", "dog"):
        write_folder(tmp_path / "train" / name, ["images"])
    write_folder(tmp_path / "train" / ".trash", ["dog"])
    (tmp_path / "train" / "cat" / "images" / "._0.png").write_bytes(b"no image")
    (tmp_path / "train" / "cat" / "boxes.txt").write_text("0.png 0 0 8 8")
    (tmp_path / "train" / "dog" / "more").symlink_to(tmp_path / "train" / "cat" / "images")
    train = load_image_datasets(train_dir=str(tmp_path / "train"), validation_split=0, cache_dir=cache)["train"]
    assert train.features["label"].names == ["cat", "dog"]
    assert train["label"] == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert train[0]["image"].mode == "RGB"


def test_links_that_lead_back_are_not_followed(tmp_path, cache):
    write_folder(tmp_path / "train", ["cat", "dog"], per_class=2)
    (tmp_path / "train" / "cat" / "back").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "dog" / "itself").symlink_to(tmp_path / "train" / "dog")
    train = load_image_datasets(train_dir=str(tmp_path / "train"), validation_split=0, cache_dir=cache)["train"]
    assert train["label"] == [0, 0, 1, 1]


def test_an_empty_class_folder_is_named(tmp_path, cache, caplog):
    folder = write_folder(tmp_path / "train", ["cat", "dog"])
    (tmp_path / "train" / "emu").mkdir()
    splits = load_image_datasets(train_dir=folder, validation_split=0, cache_dir=cache)
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert "the folders emu hold no images" in caplog.text
