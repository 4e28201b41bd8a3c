# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Training of MoNE models on transformers' Trainer."""

from .arguments import MoNETrainingArguments
from .distillation import Teacher, distillation_loss
from .evaluation import measure_accuracy
from .metrics import Accuracy, PrecisionAt1, calibration_error, classification_metrics
from .schedules import CapacitySchedule
from .trainer import MoNETrainer


__all__ = [
    "Accuracy",
    "CapacitySchedule",
    "MoNETrainer",
    "MoNETrainingArguments",
    "PrecisionAt1",
    "Teacher",
    "calibration_error",
    "classification_metrics",
    "distillation_loss",
    "measure_accuracy",
]
