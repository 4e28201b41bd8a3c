# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Metrics of a training's evaluations, and as `evaluate` modules for others', which need no network.

`evaluate.load("accuracy")` fetches code from the Hub.
"""

import datasets
import evaluate
import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction

from ..data import IGNORED


# Of the calibration error, as in Guo et al.'s tables.
NUM_BINS = 15


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


class PrecisionAt1(evaluate.Metric):
    """Share of examples whose prediction is among their labels, as `{"precision_at_1": float}`.

    Examples without labels are left out, as in AugReg's evaluation (big_vision, `evaluators/classification.py`).
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of predictions that are among the labels of their example.",
            citation="",
            inputs_description="predictions: a list of class numbers; references: lists of class numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.List(datasets.Value("int64"))}
            ),
        )

    def _compute(self, predictions, references):
        hits = [p in labels for p, labels in zip(predictions, references, strict=True) if len(labels)]
        if not hits:
            raise ValueError(f"None of the {len(references)} examples has a label.")
        return {"precision_at_1": float(np.mean(hits))}


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error in 15 bins of equal width (Guo et al., https://arxiv.org/abs/1706.04599), in [0, 1].

    Args:
        confidence: (examples,) probability of the predicted class.
        correct: (examples,) whether the prediction is right.
    """
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    gaps = np.bincount(bins, weights=correct.astype(float) - confidence, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def classification_metrics(prediction: EvalPrediction, calibration: bool = False) -> dict[str, float]:
    """Metrics of an evaluation, for Trainer's `compute_metrics`.

    With class numbers as labels, (batch,): "accuracy" and "loss", the mean cross-entropy. With 0 and 1 for each class,
    (batch, classes): "precision_at_1", of the examples that have a label, and "loss", the mean binary cross-entropy.

    Examples that could not be read (label -100) are left out, and counted as "unreadable" where there are any.

    Args:
        prediction: logits (batch, classes) and labels.
        calibration: add "calibration_error", of the probability of the predicted class: softmax, or sigmoid.

    Raises:
        ValueError: no example could be read, or none has a label; or labels of a regression.
    """
    multi_label = prediction.label_ids.ndim == 2
    readable = prediction.label_ids != IGNORED
    if multi_label:
        readable = readable.all(1)
    logits, labels = prediction.predictions[readable], prediction.label_ids[readable]
    if not len(labels):
        raise ValueError(f"None of the {len(readable)} examples to evaluate on could be read.")
    predicted = np.argmax(logits, axis=1)
    scores, targets = torch.from_numpy(logits).float(), torch.from_numpy(labels)
    # Not by the classes above: `evaluate` writes all that it is given into a cache, which may be read-only. And not
    # Trainer's own loss: that is the mean over batches, of which one without a readable example has none.
    if multi_label:
        if not np.isin(labels, (0, 1)).all():
            raise ValueError(
                "Labels of several values for an example must be 0 and 1 for each class, not a regression."
            )
        labelled, correct = labels.any(1), labels[np.arange(len(labels)), predicted] > 0
        loss = nn.functional.binary_cross_entropy_with_logits(scores, targets.float())
    else:
        labelled, correct = np.full(len(labels), True), predicted == labels
        loss = nn.functional.cross_entropy(scores, targets)
    if not labelled.any():
        raise ValueError(f"None of the {len(labels)} examples has a label.")
    metrics = {"precision_at_1" if multi_label else "accuracy": float(correct[labelled].mean()), "loss": loss.item()}
    if calibration:
        probability = (scores.sigmoid() if multi_label else scores.softmax(-1)).amax(-1).numpy()
        metrics["calibration_error"] = calibration_error(probability[labelled], correct[labelled])
    if not readable.all():
        metrics["unreadable"] = int((~readable).sum())
    return metrics
