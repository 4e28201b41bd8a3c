"""Rows of any split as a data set: reproducible augmentation, and files that cannot be read."""

import logging

import PIL.Image
import pytest
import torch
from datasets import Dataset

from mone.data import IGNORED, LabelledExamples, collate_examples
from mone.data.examples import decoding


def split_of(count: int, **columns) -> Dataset:
    return Dataset.from_dict({"image": list(range(count)), "label": [i % 3 for i in range(count)], **columns})


def noise(value) -> torch.Tensor:
    return value + torch.rand(2)


def test_rows_and_batches():
    data = LabelledExamples(split_of(6), lambda value: torch.full((3, 8, 8), float(value)))
    assert len(data) == 6
    batch = collate_examples([data[i] for i in (0, 5)])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pixel_values"].amax((1, 2, 3)).tolist() == [0, 5]
    assert batch["labels"].tolist() == [0, 2]


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    data = LabelledExamples(split_of(3), noise, seed=1)
    first = data[0]["pixel_values"]
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(data[0]["pixel_values"], first), "whatever the state of the global generator"
    torch.set_rng_state(state)
    data[1]
    assert torch.equal(torch.get_rng_state(), state), "and that is left alone"
    assert not torch.equal(data[1]["pixel_values"] - 1, first)
    data.set_epoch(1)
    assert not torch.equal(data[0]["pixel_values"], first)
    data.set_epoch(0)
    assert torch.equal(data[0]["pixel_values"], first)
    assert not torch.equal(LabelledExamples(split_of(3), noise, seed=2)[0]["pixel_values"], first)


def test_persistent_workers_see_the_epoch():
    data = LabelledExamples(split_of(3), noise)
    options = {"batch_size": 3, "collate_fn": collate_examples, "num_workers": 1, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(data, **options)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        batch = next(iter(loader))["pixel_values"]
        assert torch.equal(batch, torch.stack([data[i]["pixel_values"] for i in range(3)]))


def read_unless(damaged: set):
    def read(value):
        if value in damaged:
            raise OSError(f"{value}.jpg is broken")
        return torch.tensor(float(value))

    return read


def test_training_takes_the_next_readable_row_with_its_label(caplog):
    data = LabelledExamples(split_of(5), read_unless({1, 2, 4}))
    with caplog.at_level(logging.WARNING):
        got = [(row["pixel_values"].item(), row["labels"]) for row in (data[i] for i in range(5))]
    assert got == [(0, 0), (3, 0), (3, 0), (3, 0), (0, 0)]
    assert data.unreadable == [1, 2, 4]
    messages = [record.getMessage() for record in caplog.records]
    assert sum("1.jpg is broken" in message for message in messages) == 1, "named once, though met more often"
    data[1]
    assert len(caplog.records) == len(messages)


def test_evaluation_does_not_count_them():
    data = LabelledExamples(split_of(4), read_unless({1}), train=False)
    assert [data[i]["labels"] for i in range(4)] == [0, IGNORED, 2, 0]
    assert data[1]["pixel_values"].shape == data[0]["pixel_values"].shape


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_report_what_they_could_not_read(num_workers):
    data = LabelledExamples(split_of(12), read_unless({3, 8}))
    for _ in torch.utils.data.DataLoader(data, 4, collate_fn=collate_examples, num_workers=num_workers):
        pass
    assert data.unreadable == [3, 8]


def test_a_data_set_that_cannot_be_read_at_all_is_an_error():
    data = LabelledExamples(split_of(40), read_unless(set(range(40))))
    with pytest.raises(ValueError, match=r"None of 16 examples from row 3 on can be read: 18.jpg is broken"):
        data[3]
    for train in (True, False):
        small = LabelledExamples(split_of(2), read_unless({0, 1}), train=train)
        with pytest.raises(ValueError, match=r"None of 2 examples from row 0 on can be read: 1.jpg is broken"):
            small[0]


def test_the_place_of_an_unreadable_example_is_taken_by_one_that_was_read():
    read = []

    def transform(value):
        read.append(value)
        return read_unless(set(range(10, 40)))(value)

    data = LabelledExamples(split_of(40), transform, train=False)
    for index in (0, *range(10, 40)):
        data[index]
    assert len(read) == 1 + 2 * 30, "each is tried once, and the stand-in read once"


def test_a_damaged_folder_is_left_out_of_an_evaluation():
    data = LabelledExamples(split_of(40), read_unless(set(range(1, 39))), train=False)
    assert [data[i]["labels"] for i in range(40)] == [0, *[IGNORED] * 38, 39 % 3]


@pytest.mark.parametrize("error", [NotImplementedError, RecursionError])
def test_a_mistake_where_examples_are_decoded_is_not_hidden(error):
    with pytest.raises(error), decoding():
        raise error


@pytest.mark.parametrize("error", [PIL.Image.DecompressionBombError("too large"), RuntimeError("Failed to decode")])
def test_whatever_a_decoder_raises_is_of_the_file(error):
    class Split:
        column_names = features = {"image": None, "label": None}

        def __len__(self):
            return 2

        def __getitem__(self, index):
            if index == 0:
                raise error
            return {"image": 5.0, "label": 1}

    data = LabelledExamples(Split(), torch.tensor)
    assert data[0] == {"pixel_values": torch.tensor(5.0), "labels": 1} and data.unreadable == [0]

    def transform(value):
        raise error

    if isinstance(error, RuntimeError):  # of a transform: a mistake
        with pytest.raises(RuntimeError, match="Failed to decode"):
            LabelledExamples(split_of(2), transform)[0]


def test_a_mistake_in_a_transform_is_not_hidden():
    def transform(value):
        return value.no_such_method()

    with pytest.raises(AttributeError, match="no_such_method"):
        LabelledExamples(split_of(2), transform)[0]
