# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Evaluation at several capacities in one pass: examples are read, decoded and moved to the device once."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import EvalPrediction


class SharedPass:
    """Stands in for what Trainer's evaluation loop calls, and has it compute the metrics of each of `capacities`.

    To the loop, the logits of a batch are (losses (batch, capacities), logits at the first capacity, ...).

    Args:
        capacities: numbers, which name the metrics.
        compute_metrics: capacity, and what Trainer's gets, -> the metrics at that capacity; None for losses alone.
        preprocess_logits: Trainer's `preprocess_logits_for_metrics`.
        prefix: of the names of metrics.
        passes_losses: whether `compute_metrics` gets the losses.
        filters_losses: whether losses that are not finite are left out of their mean, as Trainer does.
    """

    def __init__(
        self,
        capacities: Sequence[float],
        compute_metrics: Callable[..., dict] | None,
        preprocess_logits: Callable | None,
        prefix: str,
        passes_losses: bool,
        filters_losses: bool,
    ):
        self._capacities, self._prefix = capacities, prefix
        self._compute_metrics, self._preprocess_logits = compute_metrics, preprocess_logits
        self._passes_losses, self._filters_losses = passes_losses, filters_losses
        self._losses = []

    def join(self, batch_size: int, steps: Sequence[tuple]) -> tuple:
        """(loss, logits, labels) of Trainer's prediction step at each capacity -> one such tuple for its loop.

        Without labels, where there is nothing to measure, all are None.
        """
        losses, logits, labels = zip(*steps, strict=True)
        if losses[0] is None:
            return None, None, None
        losses = torch.stack(losses).expand(batch_size, -1)
        if self._compute_metrics is None:
            return None, (losses,), losses  # no labels are kept, but without any the loop would measure nothing
        return None, (losses, *logits), labels[0]

    def preprocess_logits(self, logits: tuple, labels) -> tuple:
        """Trainer's `preprocess_logits_for_metrics`."""
        losses, *others = logits
        if self._preprocess_logits is not None:
            others = [
                self._preprocess_logits(one, labels if place == len(others) else copy.deepcopy(labels))
                for place, one in enumerate(others, start=1)
            ]
        return (losses, *others)

    def compute_metrics(self, prediction: EvalPrediction, **kwargs) -> dict:
        """Trainer's, named "eval_capacity_0.4_accuracy" and so on."""
        apart = isinstance(prediction.predictions, list)  # batch by batch
        batches = prediction.predictions if apart else [prediction.predictions]
        losses, *others = zip(*batches, strict=True)
        self._losses += [torch.as_tensor(some).cpu().numpy() for some in losses]
        metrics = {}
        for place, capacity in enumerate(self._capacities):
            measured = {}
            if kwargs.get("compute_result", True):
                measured["loss"] = self._mean(np.concatenate([some[:, place] for some in self._losses]))
            if self._compute_metrics is not None:
                own, passed = list(others[place]), [some[:, place] for some in losses]
                one = EvalPrediction(
                    predictions=own if apart else own[0],
                    label_ids=copy.deepcopy(prediction.label_ids),  # which metrics may write into
                    inputs=copy.deepcopy(prediction.inputs),
                    losses=(passed if apart else passed[0]) if self._passes_losses else None,
                )
                measured |= self._compute_metrics(capacity, one, **kwargs) or {}
            metrics |= {f"{self._prefix}_capacity_{capacity:g}_{key}": value for key, value in measured.items()}
        return metrics

    def _mean(self, losses: np.ndarray) -> float:
        finite = np.isfinite(losses)
        return losses[finite if self._filters_losses and finite.any() else ...].mean().item()
