# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""How fast examples are read, decoded and transformed."""

import itertools
import time

import torch

from .examples import collate_examples


def measure_input(
    data: torch.utils.data.Dataset, *, batch_size: int = 64, num_workers: int = 1, num_batches: int = 20
) -> dict[str, float]:
    """Examples per second of a data set, as a training that never waits for the model would read them.

    The first batch of each worker is not timed: it starts the worker and opens files.

    Args:
        data: `LabelledExamples`, in random order, or a `LabelledStream` made for this `batch_size` and `num_workers`.
        num_workers: worker processes; 0 reads in this process.
        num_batches: to time; fewer where the data set ends.

    Returns:
        "examples_per_second", "examples_per_second_per_worker", and what they were measured with.

    Raises:
        ValueError: the data set has no batch to time.
    """
    loader = torch.utils.data.DataLoader(
        data,
        batch_size,
        shuffle=None if isinstance(data, torch.utils.data.IterableDataset) else True,
        collate_fn=collate_examples,
        num_workers=num_workers,
    )
    workers = max(num_workers, 1)
    batches = iter(loader)
    for _ in itertools.islice(batches, workers):
        pass
    start, examples = time.perf_counter(), 0
    for batch in itertools.islice(batches, num_batches):
        examples += len(batch["labels"])
    if not examples:
        raise ValueError(f"There are no more than {workers} batches of {batch_size}: nothing is left to time.")
    speed = examples / (time.perf_counter() - start)
    return {
        "examples_per_second": speed,
        "examples_per_second_per_worker": speed / workers,
        "num_workers": num_workers,
        "batch_size": batch_size,
        "examples": examples,
    }
