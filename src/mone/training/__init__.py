# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Training of MoNE models on transformers' Trainer."""

from .arguments import MoNETrainingArguments
from .metrics import Accuracy, classification_metrics
from .schedules import PAPER_GRID, capacity_at_step
from .trainer import MoNETrainer


__all__ = [
    "PAPER_GRID",
    "Accuracy",
    "MoNETrainer",
    "MoNETrainingArguments",
    "capacity_at_step",
    "classification_metrics",
]
