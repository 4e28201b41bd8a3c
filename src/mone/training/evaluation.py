# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Accuracy of a trained model at several capacities, as the rows of a model card and of a plot."""

import functools

from transformers import BaseImageProcessor, BaseVideoProcessor, PreTrainedModel

from ..data import LabelledExamples, LabelledStream, collate_examples
from ..flops import count_macs
from .arguments import MoNETrainingArguments
from .metrics import classification_metrics
from .trainer import MoNETrainer


def measure_accuracy(
    model: PreTrainedModel,
    processor: BaseImageProcessor | BaseVideoProcessor,
    examples: LabelledExamples | LabelledStream,
    args: MoNETrainingArguments,
    *,
    name: str = "MoNE",
    num_clips: int = 1,
    calibration: bool = False,
) -> list[dict]:
    """One row for each of `args.eval_capacities` (default: `args.capacity`, or the model's).

    Args:
        examples: of an evaluation (`train=False`).
        name: of the model, in the rows.
        num_clips: of each video, which all count in "gmacs".
        calibration: add "calibration_error".

    Returns:
        Rows with "model", "capacity", "gmacs", "accuracy", "loss" and, where there are any, "unreadable" examples.
        With several labels per example there is also "precision_at_1", which "accuracy" then repeats.
    """
    trainer = MoNETrainer(
        model=model,
        args=args,
        data_collator=collate_examples,
        eval_dataset=examples,
        processing_class=processor,
        compute_metrics=functools.partial(classification_metrics, calibration=calibration),
    )
    metrics = trainer.evaluate()
    rows = []
    for capacity in args.eval_capacities or [trainer.capacity]:
        prefix = f"eval_capacity_{capacity:g}_" if args.eval_capacities else "eval_"
        measured = {
            key: metrics[prefix + key]
            for key in ("accuracy", "precision_at_1", "loss", "calibration_error", "unreadable")
            if prefix + key in metrics
        }
        measured.setdefault("accuracy", measured.get("precision_at_1"))
        gmacs = num_clips * count_macs(model.config, capacity) / 1e9
        rows.append({"model": name, "capacity": capacity, "gmacs": gmacs, **measured})
    return rows
