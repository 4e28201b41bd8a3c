# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Metrics as `evaluate` modules that need no network: `evaluate.load("accuracy")` fetches code from the Hub."""

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

from ..data import IGNORED


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, as `{"accuracy": float}`, like the Hub's "accuracy"."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: lists of class numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and mean cross-entropy of single-label classification, for Trainer's `compute_metrics`.

    Examples that could not be read (label -100) are left out, and counted as "unreadable" where there are any.

    Raises:
        ValueError: no example could be read.
    """
    readable = prediction.label_ids != IGNORED
    logits, labels = prediction.predictions[readable], prediction.label_ids[readable]
    if not len(labels):
        raise ValueError(f"None of the {len(readable)} examples to evaluate on could be read.")
    metrics = Accuracy().compute(predictions=np.argmax(logits, axis=1), references=labels)
    # Trainer's own is the mean over batches, of which one without a readable example has none.
    metrics["loss"] = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).float(), torch.from_numpy(labels)
    ).item()
    if not readable.all():
        metrics["unreadable"] = int((~readable).sum())
    return metrics
