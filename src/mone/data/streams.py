# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Labelled images or videos that are read while they are needed, from many files, without random access."""

import dataclasses
import logging
import zlib
from collections.abc import Callable, Iterator

import torch
from datasets import Image, IterableDataset
from datasets.distributed import split_dataset_by_node

from .examples import (
    MAX_UNREADABLE_IN_A_ROW,
    UNREADABLE,
    decoding,
    ignored_target,
    seed_of,
    target,
    transform_with_seed,
)
from .labels import is_label
from .sources import count_rows


logger = logging.getLogger(__name__)


class LabelledStream(torch.utils.data.IterableDataset):
    """The counterpart of `LabelledExamples` for a stream, with the same rows and the same rules for unreadable ones.

    An epoch of training is of the same number of whole batches for every process and is shuffled by seed and epoch:
    the files, and the examples in a buffer. It depends on the numbers of processes and workers, and on nothing else:
    a stopped run goes on with the same examples. What a random transform draws depends on seed, epoch and the image
    or video alone.

    Each process, and in it each worker, reads files of its own; where there are too few, row groups. Where processes
    do not divide their number, each process reads them all and takes its share of the rows. Where the shares differ,
    the shorter ones are begun again.

    Args:
        split: stream of `load_image_datasets` or `load_video_datasets`.
        transforms, seed, train, num_labels: as in `LabelledExamples`.
        batch_size: of the loader of a training set.
        num_workers: of the loader.
        buffer_size: number of examples of a worker in memory, from which the next is drawn.
        process_index, num_processes: of training; an evaluation is read whole.

    Raises:
        ValueError: more workers than files and row groups to train on; the length of a training set is not known.
    """

    def __init__(
        self,
        split: IterableDataset,
        transforms: Callable,
        seed: int = 0,
        *,
        train: bool = True,
        num_labels: int | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        buffer_size: int = 1000,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.transforms = transforms
        self.seed = seed
        self.train = train
        self.num_labels = num_labels
        self.batch_size = batch_size
        (self._column,) = set(split.features) - {"label"}
        feature = split.features[self._column]
        self._decode = dataclasses.replace(feature, decode=True).decode_example if isinstance(feature, Image) else None
        # In shared memory: persistent workers keep the data set that they were started with.
        self._epoch, self._skipped, self._unreadable = torch.zeros(3, dtype=torch.int64).share_memory_().unbind()
        if split.num_shards < (num_processes if train else 1) * max(num_workers, 1):
            split = split.reshard()
        if train:
            self.num_batches = max(count_rows(split) // num_processes // batch_size, 1)
            split = split.shuffle(seed=seed, buffer_size=buffer_size)
            split = split_dataset_by_node(split, process_index, num_processes)
            if num_workers > split.num_shards:  # now of this process
                raise ValueError(
                    f"{num_workers} workers in each of {num_processes} processes need as many files or row groups to "
                    f"read: there are {split.num_shards} for a process. Lower --dataloader_num_workers."
                )
        self.split = split

    def __len__(self) -> int:
        if not self.train:
            raise TypeError("An evaluation ends when the stream does.")
        return self.num_batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of each epoch."""
        self._epoch.fill_(epoch)

    def skip_batches(self, count: int) -> None:
        """Let the first `count` batches of the next epoch be empty, which takes no decoding.

        For a run that goes on in the middle of an epoch: its trainer drops these batches.
        """
        self._skipped.fill_(count)

    @property
    def num_unreadable(self) -> int:
        """How often an example could not be read so far, by this process and its workers."""
        return self._unreadable.item()

    def __iter__(self) -> Iterator[dict]:
        self.split.set_epoch(self._epoch.item())
        examples = self._examples()
        if not self.train:
            yield from examples
            return
        worker, workers = _worker()
        # A loader takes batches from its workers in turn.
        own = len(range(worker, self.num_batches, workers)) * self.batch_size
        for _ in range(own):
            yield next(examples)

    def _examples(self) -> Iterator[dict]:
        worker, workers = _worker()
        empty = len(range(worker, self._skipped.item(), workers)) * self.batch_size if self.train else 0
        waiting, in_a_row, last = 0, 0, None
        while True:
            is_empty = True
            for row in self.split:
                is_empty = False
                if empty:
                    empty -= 1
                    yield {"pixel_values": torch.zeros(()), "labels": 0}
                    continue
                try:
                    example = self._read(row)
                except UNREADABLE as error:
                    name = row[self._column]["path"] or "An example"
                    logger.warning("%s is skipped, as it cannot be read: %s", name, error)
                    self._unreadable += 1
                    waiting += 1
                    in_a_row += 1
                    if self.train and in_a_row == MAX_UNREADABLE_IN_A_ROW:
                        raise ValueError(f"None of {in_a_row} examples in a row can be read: {error}") from error
                    continue
                in_a_row, last = 0, example["pixel_values"]
                # In the place of those before it that could not be read.
                yield from (self._instead(example) for _ in range(waiting))
                waiting = 0
                yield example
            if is_empty and self.train:
                raise ValueError(f"The stream has nothing to read for worker {worker} of {workers}.")
            if not self.train:
                break
        if waiting and last is None and workers == 1:
            raise ValueError(f"None of the {waiting} examples can be read.")
        if waiting and last is not None:  # else other workers have examples
            yield from (self._instead({"pixel_values": last}) for _ in range(waiting))

    def _instead(self, example: dict) -> dict:
        return example if self.train else {**example, "labels": ignored_target(self.num_labels)}

    def _read(self, row: dict) -> dict:
        if not is_label(row["label"]):
            raise ValueError(f"label={row['label']!r} is not a label.")
        value = row[self._column]
        content = value["bytes"] if value["bytes"] is not None else value["path"].encode()
        seed = seed_of(self.seed, self._epoch.item(), zlib.crc32(content))
        if self._decode is not None:
            with decoding():
                value = self._decode(value)
        return {
            "pixel_values": transform_with_seed(self.transforms, value, seed),
            "labels": target(row["label"], self.num_labels),
        }


def _worker() -> tuple[int, int]:
    """Number of this worker, and of all."""
    info = torch.utils.data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
