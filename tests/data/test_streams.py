# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Parquet shards as streams, against the same files with random access."""

import io
import itertools
import logging
import pickle
from multiprocessing.reduction import ForkingPickler

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from mone.data import IGNORED, LabelledExamples, LabelledStream, collate_examples, load_image_datasets, measure_input
from mone.data.sources import count_rows, with_count


SHARDS, ROWS = 4, 6


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """`datasets` sleeps for seconds at the end of each pass, for threads that read on."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)


def png(number: int) -> bytes:
    """A grey picture that tells its number."""
    file = io.BytesIO()
    PILImage.new("RGB", (4, 4), (number, number, number)).save(file, "png")
    return file.getvalue()


def write_shards(folder, label=lambda number: number % 3, feature=None, damaged=()):
    folder.mkdir(exist_ok=True)
    features = Features({"image": Image(), "label": feature or ClassLabel(names=["a", "b", "c"])})
    for shard in range(SHARDS):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        images = [{"bytes": png(n)[:30] if n in damaged else png(n), "path": f"{n}.png"} for n in numbers]
        rows = {"image": images, "label": [label(n) for n in numbers]}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"train-{shard:05d}.parquet"))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def number_and_noise(image) -> torch.Tensor:
    """What the picture is, and what a random transform drew."""
    return torch.stack([torch.tensor(float(np.asarray(image)[0, 0, 0])), torch.rand(())])


def stream_of(folder, **options) -> LabelledStream:
    splits = load_image_datasets(train_file=str(folder / "*.parquet"), streaming=True)
    return LabelledStream(splits["train"], number_and_noise, 3, **{"batch_size": 4, "buffer_size": 5, **options})


def test_workers_that_are_spawned_get_it(tmp_path):
    """Pickled, also where it numbers labels that have no names."""
    folder = write_shards(tmp_path, label=lambda number: "ba"[number % 2], feature=Value("string"))
    stream = stream_of(folder)
    again = pickle.loads(ForkingPickler.dumps(stream))
    for one, other in zip(stream, again, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and one["labels"] == other["labels"]


def numbers(examples) -> list[int]:
    return [int(example["pixel_values"][0]) for example in examples]


def test_evaluation_is_what_random_access_reads(shards, tmp_path):
    files = {"validation_file": str(shards), "cache_dir": str(tmp_path)}
    whole = load_image_datasets(**files)["validation"]
    stream = load_image_datasets(**files, streaming=True)["validation"]
    assert stream.features["label"] == whole.features["label"]
    assert count_rows(stream) == len(whole) == SHARDS * ROWS
    rows = LabelledExamples(whole, number_and_noise, train=False)
    for number, example in enumerate(LabelledStream(stream, number_and_noise, train=False)):
        assert example["pixel_values"][0] == rows[number]["pixel_values"][0] == number
        assert example["labels"] == rows[number]["labels"]
    assert number == 23


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_shuffled_and_the_same_again(shards, workers):
    def epoch(data, number):
        data.set_epoch(number)
        loader = torch.utils.data.DataLoader(data, 4, collate_fn=collate_examples, num_workers=workers)
        return torch.cat([batch["pixel_values"] for batch in loader])

    data = stream_of(shards, num_workers=workers)
    assert len(data) == SHARDS * ROWS
    first, second, again = (epoch(data, number) for number in (0, 1, 0))
    assert sorted(first[:, 0].tolist()) == list(range(SHARDS * ROWS)), "every example once"
    assert first[:, 0].tolist() != sorted(first[:, 0].tolist())
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert torch.equal(first, again)
    # The noise depends on seed, epoch and image: not on the place in the epoch, which depends on the workers.
    alone = epoch(stream_of(shards), 0)
    assert torch.equal(first[first[:, 0].argsort()], alone[alone[:, 0].argsort()])
    assert not torch.equal(first[first[:, 0].argsort()], second[second[:, 0].argsort()])


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_batches_leave_the_others_as_they_were(shards, workers):
    data = stream_of(shards, num_workers=workers)
    loader = torch.utils.data.DataLoader(data, 4, collate_fn=collate_examples, num_workers=workers)
    expected = [batch["pixel_values"] for batch in loader]
    data.skip_batches(3)
    got = [batch["pixel_values"] for batch in loader]
    assert [batch.shape for batch in got[:3]] == [(4,)] * 3, "nothing is decoded for them"
    for a, b in zip(got[3:], expected[3:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch(shards, processes):
    """By files where they divide their number, else by rows; with as many batches each."""
    parts = [stream_of(shards, process_index=i, num_processes=processes, batch_size=2) for i in range(processes)]
    seen = [numbers(part) for part in parts]
    assert [len(part) for part in seen] == [SHARDS * ROWS // processes] * processes
    assert sorted(itertools.chain(*seen)) == list(range(SHARDS * ROWS))


def test_workers_of_several_processes_share_the_files(shards):
    seen = []
    for index in range(2):
        part = stream_of(shards, process_index=index, num_processes=2, num_workers=2, batch_size=3)
        loader = torch.utils.data.DataLoader(part, 3, collate_fn=collate_examples, num_workers=2)
        seen += [number for batch in loader for number in batch["pixel_values"][:, 0].tolist()]
    assert sorted(seen) == list(range(SHARDS * ROWS))


def test_a_short_share_begins_again(tmp_path):
    """Every process has to take as many steps."""
    folder = write_shards(tmp_path / "shards")
    (folder / "train-00003.parquet").unlink()
    parts = [stream_of(folder, process_index=i, num_processes=2, batch_size=9) for i in range(2)]
    assert [len(numbers(part)) for part in parts] == [9, 9]
    assert len(numbers(stream_of(folder, batch_size=50))) == 50, "of 18: a batch is filled"


def test_more_workers_than_files_take_row_groups_or_are_refused(shards, tmp_path):
    numbers_of_files = load_dataset("parquet", data_files=str(shards / "*.parquet"), split="train", streaming=True)
    with pytest.raises(
        ValueError, match=r"5 workers in each of 1 processes .* there are 4 .*--dataloader_num_workers"
    ):
        LabelledStream(with_count(numbers_of_files, 24), number_and_noise, num_workers=5)
    rows = load_dataset("parquet", data_files=str(shards / "*.parquet"), split="train", cache_dir=str(tmp_path))
    rows.to_parquet(str(tmp_path / "one.parquet"), batch_size=6)
    splits = load_image_datasets(train_file=str(tmp_path / "one.parquet"), streaming=True)
    assert splits["train"].num_shards == 1
    data = LabelledStream(splits["train"], number_and_noise, batch_size=6, num_workers=2)
    loader = torch.utils.data.DataLoader(data, 6, collate_fn=collate_examples, num_workers=2)
    assert torch.cat([batch["pixel_values"][:, 0] for batch in loader]).sort().values.tolist() == list(range(24))


def test_an_evaluation_leaves_workers_idle_for_which_there_is_nothing(shards, tmp_path):
    rows = load_dataset("parquet", data_files=str(shards / "*.parquet"), split="train", cache_dir=str(tmp_path))
    rows.to_parquet(str(tmp_path / "one.parquet"), batch_size=12)
    splits = load_image_datasets(train_file=str(tmp_path / "one.parquet"), streaming=True)
    data = LabelledStream(splits["train"], number_and_noise, train=False, num_workers=3)
    loader = torch.utils.data.DataLoader(data, 6, collate_fn=collate_examples, num_workers=3)
    assert torch.cat([batch["pixel_values"][:, 0] for batch in loader]).sort().values.tolist() == list(range(24))
    assert data.split.num_shards == 2


def test_damaged_images_are_replaced_in_training_and_not_counted_in_evaluation(tmp_path, caplog):
    folder = write_shards(tmp_path / "shards", damaged={0, 7, 8, 23})
    data = stream_of(folder)
    with caplog.at_level(logging.WARNING):
        seen = numbers(data)
    assert len(seen) == 24 and not {0, 7, 8, 23} & set(seen)
    assert data.num_unreadable >= 4
    assert "7.png is skipped, as it cannot be read" in caplog.text
    splits = load_image_datasets(validation_file=str(folder), streaming=True)
    rows = list(LabelledStream(splits["validation"], number_and_noise, train=False))
    assert len(rows) == 24
    assert sum(row["labels"] == IGNORED for row in rows) == 4
    readable = [row for row in rows if row["labels"] != IGNORED]
    assert [row["labels"] for row in readable] == [n % 3 for n in numbers(readable)]


def test_only_damaged_images_are_an_error(tmp_path):
    folder = write_shards(tmp_path / "shards", damaged=set(range(24)))
    with pytest.raises(ValueError, match=r"None of 16 examples in a row can be read: cannot identify image file"):
        list(stream_of(folder))
    with pytest.raises(ValueError, match=r"None of the 24 examples can be read"):
        list(stream_of(folder, train=False))


def test_damaged_images_that_lie_together_are_left_out_of_an_evaluation(tmp_path):
    folder = write_shards(tmp_path / "shards", damaged=set(range(20)))
    data = stream_of(folder, train=False)
    labels = [example["labels"] for example in data]
    assert len(labels) == 24 and labels.count(IGNORED) == 20
    # Workers that have nothing else leave them out.
    loader = torch.utils.data.DataLoader(data, 2, collate_fn=collate_examples, num_workers=2)
    assert sorted(label for batch in loader for label in batch["labels"].tolist() if label != IGNORED) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("label", "feature", "names"),
    [
        (lambda n: 10 - n % 3, Value("int64"), ["8", "9", "10"]),
        (lambda n: "xyz"[n % 3], Value("string"), ["x", "y", "z"]),
        (lambda n: [n % 3, 2] if n % 4 else [], List(ClassLabel(names=["a", "b", "c"])), ["a", "b", "c"]),
        (lambda n: ["xyz"[n % 3]], List(Value("string")), ["x", "y", "z"]),
    ],
)
def test_labels_of_every_kind_are_those_of_random_access(tmp_path, label, feature, names):
    folder = write_shards(tmp_path / "shards", label, feature)
    files = {"validation_file": str(folder), "cache_dir": str(tmp_path / "cache")}
    whole = load_image_datasets(**files)["validation"]
    stream = load_image_datasets(**files, streaming=True)["validation"]
    assert stream.features["label"] == whole.features["label"]
    inner = getattr(whole.features["label"], "feature", whole.features["label"])
    assert inner.names == names
    assert [row["label"] for row in stream] == list(whole["label"])
    several = isinstance(label(0), list)
    for row, number in zip(
        LabelledStream(stream, number_and_noise, train=False, num_labels=3), range(24), strict=True
    ):
        expected = torch.zeros(3)
        for part in label(number) if several else [label(number)]:
            expected[names.index(str(part)) if str(part) in names else part] = 1
        assert torch.equal(row["labels"], expected)


def test_what_cannot_be_streamed(tmp_path, shards):
    with pytest.raises(ValueError, match="--streaming is for --dataset_name and for parquet files"):
        load_image_datasets(train_dir=str(tmp_path), streaming=True)
    (tmp_path / "list.csv").write_text("a.mp4,b")
    with pytest.raises(ValueError, match=r"reads parquet files only, not .*list\.csv"):
        load_image_datasets(train_file=str(tmp_path / "list.csv"), streaming=True)
    with pytest.raises(ValueError, match=r"classes \['c'\].*\['a', 'b'\]"):
        load_image_datasets(validation_file=str(shards), label_names=["a", "b"], streaming=True)
    with pytest.raises(ValueError, match=r"number of examples .* not known"):
        count_rows(load_dataset("parquet", data_files=str(shards / "*.parquet"), split="train", streaming=True))


@pytest.mark.parametrize("streaming", [True, False])
def test_the_input_pipeline_is_measured(shards, tmp_path, streaming):
    files = {"train_file": str(shards), "cache_dir": str(tmp_path), "validation_split": 0}
    split = load_image_datasets(**files, streaming=streaming)["train"]
    options = {"batch_size": 2, "num_workers": 2}
    data = (
        LabelledStream(split, number_and_noise, **options) if streaming else LabelledExamples(split, number_and_noise)
    )
    result = measure_input(data, **options, num_batches=5)
    assert result["examples"] == 10
    assert result["examples_per_second"] == 2 * result["examples_per_second_per_worker"] > 0
    few = stream_of(shards, batch_size=12, num_workers=2) if streaming else data
    with pytest.raises(ValueError, match="no more than 2 batches of 12"):
        measure_input(few, batch_size=12, num_workers=2)
