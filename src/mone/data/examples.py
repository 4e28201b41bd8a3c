# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labelled images or videos as a PyTorch data set, and as batches of `pixel_values` and `labels`."""

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator

import PIL.Image
import torch
from datasets import Dataset, Image


logger = logging.getLogger(__name__)

# What reading a damaged or missing image or video raises; VideoDecodeError is a ValueError.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError)
# So many unreadable training examples in a row are no accident.
MAX_UNREADABLE_IN_A_ROW = 16
# The label of an unreadable example in evaluation, which losses and metrics leave out.
IGNORED = -100


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Around decoding alone, where a RuntimeError, such as Pillow's for AVIF, is of the file."""
    try:
        yield
    except (NotImplementedError, RecursionError):  # mistakes
        raise
    except RuntimeError as error:
        raise OSError(f"it cannot be decoded: {error}") from error


def target(label: int | list[int], num_labels: int | None) -> int | torch.Tensor:
    """The target of a loss: a class number as it is, or, with `num_labels`, class numbers as 0 and 1 (num_labels,)."""
    if num_labels is None:
        return label
    labels = torch.zeros(num_labels)
    labels[label] = 1
    return labels


def ignored_target(num_labels: int | None) -> int | torch.Tensor:
    """What stands for the target of an example that could not be read."""
    return IGNORED if num_labels is None else torch.full((num_labels,), float(IGNORED))


def seed_of(*parts: int | str) -> int:
    """A seed for random transforms that depends on `parts` alone."""
    return random.Random("-".join(map(str, parts))).getrandbits(63)


def transform_with_seed(transforms: Callable, value, seed: int) -> torch.Tensor:
    """Random transforms from a seed; the global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator only: torch.manual_seed would also reset those of the accelerators.
        torch.default_generator.manual_seed(seed)
        return transforms(value)


class LabelledExamples(torch.utils.data.Dataset):
    """Rows of a split, transformed when they are read: {"pixel_values": tensor, "labels": int or (num_labels,)}.

    What a random transform draws depends on `seed`, the epoch and the row alone: not on the number of workers or
    ranks, and not on whether the run was stopped and resumed.

    An example that cannot be read is named once in the log and skipped, so that one bad file does not end a long run:
    the next readable row takes its place, in training with its own label, in evaluation with the label -100, which is
    not counted. Sixteen in a row end a training.

    Args:
        split: with the column "label" and one of images or videos (`load_image_datasets`, `load_video_datasets`).
        transforms: of one image or video (`make_image_transforms`, `make_video_transforms`).
        seed: of random transforms.
        train: whether it is for training.
        num_labels: number of classes of a model that takes any number of labels for an example: labels are then
            vectors of 0 and 1 (-100 where unreadable), as the multi-label loss takes them.
    """

    def __init__(
        self,
        split: Dataset,
        transforms: Callable,
        seed: int = 0,
        *,
        train: bool = True,
        num_labels: int | None = None,
    ):
        self.split = split
        self.transforms = transforms
        self.seed = seed
        self.train = train
        self.num_labels = num_labels
        (self._column,) = set(split.column_names) - {"label"}
        # In shared memory: persistent workers keep the data set that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(split), dtype=torch.bool).share_memory_()
        self._readable = torch.full((), -1).share_memory_()  # one that could be read

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self._epoch.fill_(epoch)

    @property
    def unreadable(self) -> list[int]:
        """Rows that could not be read so far, by this process and its workers."""
        return self._unreadable.nonzero().flatten().tolist()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict:
        limit = min(MAX_UNREADABLE_IN_A_ROW, len(self)) if self.train else len(self)
        others = ((index + attempt) % len(self) for attempt in range(1, limit))
        if not self.train and self._readable >= 0:  # whose values do not count
            others = itertools.chain([self._readable.item()], others)
        for row in itertools.chain([index], others):
            if row != index and self._unreadable[row]:
                continue
            try:
                example = self._read(row)
            except UNREADABLE as error:
                failure = error
                if not self._unreadable[row]:
                    logger.warning("%s is skipped, as it cannot be read: %s", self._name(row), error)
                self._unreadable[row] = True
            else:
                self._readable.fill_(row)
                if row != index and not self.train:
                    example["labels"] = ignored_target(self.num_labels)
                return example
        raise ValueError(f"None of {limit} examples from row {index} on can be read: {failure}") from failure

    def _name(self, row: int) -> str:
        """For messages: a row, and the file of its image. Of a video the error names it."""
        path = None
        if isinstance(self.split.features[self._column], Image):
            encoded = self.split.cast_column(self._column, Image(decode=False))
            path = encoded[row][self._column]["path"]
        return f"Row {row} ({path})" if path else f"Row {row}"

    def _read(self, index: int) -> dict:
        with decoding():
            row = self.split[index]
        seed = seed_of(self.seed, self._epoch.item(), index)
        return {
            "pixel_values": transform_with_seed(self.transforms, row[self._column], seed),
            "labels": target(row["label"], self.num_labels),
        }


def collate_examples(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of a data set -> `pixel_values` (batch, ...) and `labels` (batch,), or (batch, num_labels)."""
    labels = [row["labels"] for row in rows]
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.stack(labels) if isinstance(labels[0], torch.Tensor) else torch.tensor(labels),
    }
