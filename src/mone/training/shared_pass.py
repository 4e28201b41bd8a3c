# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Evaluation at several capacities in one pass: examples are read, decoded and moved to the device once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import EvalPrediction


class SharedPass:
    """Stands in for what Trainer's evaluation loop calls, and has it compute the metrics of each of `capacities`.

    Args:
        capacities: numbers, which name the metrics.
        compute_metrics, preprocess_logits: Trainer's, of one capacity; None as there.
        passes_losses: whether `compute_metrics` gets the losses.
        filters_losses: whether losses that are not finite are left out of their mean, as Trainer does.
    """

    def __init__(
        self,
        capacities: Sequence[float],
        compute_metrics: Callable[..., dict] | None,
        preprocess_logits: Callable | None,
        passes_losses: bool,
        filters_losses: bool,
    ):
        self.capacities = capacities
        self._compute_metrics, self._preprocess_logits = compute_metrics, preprocess_logits
        self._passes_losses, self._filters_losses = passes_losses, filters_losses
        self._losses = []

    def join(self, steps: Sequence[tuple]) -> tuple:
        """(loss, logits, labels) of Trainer's prediction step at each capacity -> one such tuple.

        Its loss is None and its logits are (losses, ...): losses (batch, capacities), then, if there are metrics to
        compute, the logits at each capacity. Without labels, where there is nothing to measure, all are None.
        """
        losses, logits, labels = zip(*steps, strict=True)
        if labels[0] is None:
            return None, None, None
        size = len(labels[0][0] if isinstance(labels[0], tuple) else labels[0])
        losses = torch.stack(losses).expand(size, -1)
        return None, (losses, *(() if self._compute_metrics is None else logits)), labels[0]

    def preprocess_logits(self, logits: tuple, labels) -> tuple:
        """Trainer's `preprocess_logits_for_metrics`."""
        losses, *others = logits
        if self._preprocess_logits is not None:
            others = [self._preprocess_logits(one, labels) for one in others]
        return (losses, *others)

    def compute_metrics(self, prediction: EvalPrediction, **kwargs) -> dict:
        """Trainer's, named "capacity_0.4_accuracy" and so on."""
        batches = prediction.predictions if isinstance(prediction.predictions, list) else [prediction.predictions]
        losses, *others = zip(*batches, strict=True)  # each a list of batches, which may be one of all examples
        self._losses += [torch.as_tensor(some).cpu().numpy() for some in losses]
        losses = np.concatenate(self._losses)
        metrics = {}
        for place, capacity in enumerate(self.capacities):
            measured = {"loss": self._mean(losses[:, place])}
            if self._compute_metrics is not None:
                one = EvalPrediction(
                    predictions=list(others[place]) if isinstance(prediction.predictions, list) else others[place][0],
                    label_ids=prediction.label_ids,
                    inputs=prediction.inputs,
                    losses=losses[:, place] if self._passes_losses else None,
                )
                measured |= self._compute_metrics(one, **kwargs) or {}
            metrics |= {f"capacity_{capacity:g}_{key}": value for key, value in measured.items()}
        return metrics

    def _mean(self, losses: np.ndarray) -> float:
        finite = np.isfinite(losses)
        return losses[finite if self._filters_losses and finite.any() else ...].mean().item()
