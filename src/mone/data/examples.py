# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labelled images or videos as a PyTorch data set, and as batches of `pixel_values` and `labels`."""

import logging
import random
from collections.abc import Callable

import torch
from datasets import Dataset


logger = logging.getLogger(__name__)

# What reading a damaged or missing image or video raises; VideoDecodeError is a ValueError.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError)
# So many unreadable examples in a row are no accident.
MAX_UNREADABLE_IN_A_ROW = 16
# The label of an unreadable example in evaluation, which losses and metrics leave out.
IGNORED = -100


class LabelledExamples(torch.utils.data.Dataset):
    """Rows of a split, transformed when they are read: {"pixel_values": tensor, "labels": int}.

    What a random transform draws depends on `seed`, the epoch and the row alone: not on the number of workers or
    ranks, and not on whether the run was stopped and resumed.

    An example that cannot be read is named once in the log and skipped, so that one bad file does not end a long run:
    the next readable row takes its place, in training with its own label, in evaluation with the label -100, which is
    not counted.

    Args:
        split: with the column "label" and one of images or videos (`load_image_datasets`, `load_video_datasets`).
        transforms: of one image or video (`make_image_transforms`, `make_video_transforms`).
        seed: of random transforms.
        train: whether it is for training.
    """

    def __init__(self, split: Dataset, transforms: Callable, seed: int = 0, *, train: bool = True):
        self.split = split
        self.transforms = transforms
        self.seed = seed
        self.train = train
        (self._column,) = set(split.column_names) - {"label"}
        # In shared memory: persistent workers keep the data set that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(split), dtype=torch.bool).share_memory_()

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
        for attempt in range(MAX_UNREADABLE_IN_A_ROW):
            row = (index + attempt) % len(self)
            try:
                example = self._read(row)
            except UNREADABLE as error:
                if attempt == MAX_UNREADABLE_IN_A_ROW - 1:
                    raise
                if not self._unreadable[row]:
                    logger.warning("Row %d is skipped, as it cannot be read: %s", row, error)
                self._unreadable[row] = True
            else:
                if attempt and not self.train:
                    example["labels"] = IGNORED
                return example

    def _read(self, index: int) -> dict:
        row = self.split[index]
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator only: torch.manual_seed would also reset those of the accelerators.
            torch.default_generator.manual_seed(
                random.Random(f"{self.seed}-{self._epoch.item()}-{index}").getrandbits(63)
            )
            return {"pixel_values": self.transforms(row[self._column]), "labels": row["label"]}


def collate_examples(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of `LabelledExamples` -> `pixel_values` (batch, ...) and `labels` (batch,)."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
