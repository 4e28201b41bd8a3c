# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Metrics as `evaluate` modules that need no network: `evaluate.load("accuracy")` fetches code from the Hub."""

import datasets
import evaluate
import numpy as np


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
