# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""TrainingArguments, and what MoNE adds to them."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .schedules import CAPACITY_SCHEDULES


@dataclass
class MoNETrainingArguments(TrainingArguments):
    capacity: float | None = field(
        default=None,
        metadata={
            "help": "Effective capacity of training with the fixed schedule, and of evaluation without "
            "--eval_capacities, in [1/2**(E-1), 1]. Default: the model config's."
        },
    )
    capacity_schedule: str = field(
        default="fixed",
        metadata={
            "help": "fixed: every step at --capacity. uniform: every step at a capacity drawn from the paper's grid "
            "0.15, 0.25, ..., 0.95, so that one model serves every budget.",
            "choices": list(CAPACITY_SCHEDULES),
        },
    )
    eval_capacities: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Evaluate at each of these. Metrics are named eval_capacity_0.4_accuracy; eval_accuracy and "
            "eval_loss are then their means."
        },
    )
    router_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of the routers and their alpha, which start at zero and move slowly. "
            "Default: --learning_rate."
        },
    )
    mixup: float = field(
        default=0.0,
        metadata={
            "help": "Parameter alpha of the Beta distribution by which two training examples and their labels are "
            "mixed; 0 for none. For one label per example."
        },
    )

    def __post_init__(self):
        # A YAML file gives a lone capacity as a number, and 1e-3 as text.
        if isinstance(self.eval_capacities, (int, float)):
            self.eval_capacities = [self.eval_capacities]
        for name in ("learning_rate", "router_learning_rate"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, float(getattr(self, name)))
        if self.capacity_schedule not in CAPACITY_SCHEDULES:
            raise ValueError(f"capacity_schedule={self.capacity_schedule!r} must be one of {CAPACITY_SCHEDULES}.")
        if not self.mixup >= 0:
            raise ValueError(f"mixup={self.mixup} must be 0 or a positive number.")
        super().__post_init__()
