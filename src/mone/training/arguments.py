# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""TrainingArguments, and what MoNE adds to them."""

import numbers
import os
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from ..capacity import as_plain
from ..configuration_mone import MoNEConfig
from .schedules import CAPACITY_SCHEDULES


@dataclass
class MoNETrainingArguments(TrainingArguments):
    """transformers' arguments and those of [`MoNETrainer`]; the help of each field says what it does.

    Raises:
        ValueError: a value that is out of range or does not go with another one; gives the values. Capacities are
            checked by `check_capacities`, once the model is known.
    """

    capacity: float | None = field(
        default=None,
        metadata={
            "help": "Effective capacity, in [1/2**(E-1), 1], of training with the fixed schedule, at the end of the "
            "anneal schedule, and of evaluation without --eval_capacities. Default: the model config's."
        },
    )
    capacity_schedule: str = field(
        default="fixed",
        metadata={
            "help": "fixed: every step at --capacity. uniform: every step at a capacity drawn from --capacity_grid or "
            "--capacity_range, so that one model serves every budget. anneal: from the dense model to --capacity. "
            "joint: every step at all nested widths, losses summed (MatViT).",
            "choices": list(CAPACITY_SCHEDULES),
        },
    )
    capacity_grid: list[float] = field(
        default_factory=list,
        metadata={"help": "Capacities of the uniform schedule. Default: the paper's 0.15, 0.25, ..., 0.95."},
    )
    capacity_range: list[float] = field(
        default_factory=list,
        metadata={"help": "Smallest and largest capacity that the uniform schedule draws from, in steps of 0.01."},
    )
    anneal_steps: float = field(
        default=0.5,
        metadata={
            "help": "Steps after which the anneal schedule has reached --capacity. A number below 1 is a share of the "
            "steps of --num_train_epochs or --max_steps (without those that --iso_flops adds)."
        },
    )
    iso_flops: bool = field(
        default=False,
        metadata={
            "help": "Train for as many steps as cost what the dense model costs in --num_train_epochs or --max_steps."
        },
    )
    distill_from: str | None = field(
        default=None,
        metadata={
            "help": "self: every step also trains the dense model, whose predictions teach the smaller ones. Or the "
            "folder or Hub name of a classifier of transformers with the same classes."
        },
    )
    distillation_weight: float = field(
        default=0.5, metadata={"help": "Share of the teacher in the loss, in [0, 1]; the labels have the rest."}
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature that softens both predictions."}
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
            "Default: --learning_rate, but 0 where training is at capacity 1.0 alone."
        },
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "What the learning rate is multiplied by from each layer to the one before, in (0, 1], from the "
            "classifier to the embeddings, but for the routers. For pretrained weights 0.65 to 0.75 is usual."
        },
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the layers one by one: one graph for each capacity and batch size, so that "
            "--dataloader_drop_last saves one. (--torch_compile compiles the whole model, which takes far longer.)"
        },
    )
    mixup: float = field(
        default=0.0,
        metadata={
            "help": "Parameter alpha of the Beta distribution by which two training examples and their labels are "
            "mixed; 0 for none."
        },
    )
    bce_sum: bool = field(
        default=False,
        metadata={
            "help": "Sum the sigmoid loss over the classes instead of averaging it, as AugReg does. It matters for "
            "--max_grad_norm and --adam_epsilon."
        },
    )
    total_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples of one optimiser step over all devices: sets --gradient_accumulation_steps by "
            "--per_device_train_batch_size and the number of processes."
        },
    )

    # MoNETrainer ends a run whose loss is not finite. This would hide it, and wait for the device at each step.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of the logged mean."}
    )

    def __post_init__(self):
        for name in ("eval_capacities", "capacity_grid", "capacity_range"):
            if isinstance(getattr(self, name), numbers.Real):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a list of capacities.")
            setattr(self, name, as_plain(list(getattr(self, name))))
        if self.capacity_schedule not in CAPACITY_SCHEDULES:
            raise ValueError(f"capacity_schedule={self.capacity_schedule!r} must be one of {CAPACITY_SCHEDULES}.")
        if not self.mixup >= 0:
            raise ValueError(f"mixup={self.mixup} must be 0 or a positive number.")
        if self.capacity_range and (len(self.capacity_range) != 2 or self.capacity_grid):
            raise ValueError(
                f"capacity_range={self.capacity_range} must be two capacities, without capacity_grid, "
                f"got capacity_grid={self.capacity_grid}."
            )
        if (self.capacity_grid or self.capacity_range) and self.capacity_schedule != "uniform":
            raise ValueError(
                f"capacity_grid={self.capacity_grid} and capacity_range={self.capacity_range} are for "
                f"capacity_schedule='uniform', got {self.capacity_schedule!r}."
            )
        names = [f"{c:g}" for c in self.eval_capacities if isinstance(c, numbers.Real)]
        if len(set(names)) < len(self.eval_capacities):
            raise ValueError(
                f"eval_capacities={self.eval_capacities} must be numbers that differ in their first six digits, which "
                "name their metrics; shares are for trainer.evaluate(capacity=...)."
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} must be in (0, 1].")
        if not self.anneal_steps >= 0:
            raise ValueError(f"anneal_steps={self.anneal_steps} must be 0 or more.")
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight={self.distillation_weight} must be in [0, 1].")
        if not self.distillation_temperature > 0:
            raise ValueError(f"distillation_temperature={self.distillation_temperature} must be above 0.")
        default = MoNETrainingArguments
        if self.distill_from is None and (self.distillation_weight, self.distillation_temperature) != (
            default.distillation_weight,
            default.distillation_temperature,
        ):
            raise ValueError(
                f"distillation_weight={self.distillation_weight} and distillation_temperature="
                f"{self.distillation_temperature} are for distill_from, which is not given."
            )
        if self.load_best_model_at_end and self.save_total_limit == 1:
            # Trainer keeps the best and the last then, too, until its end, where the last one goes: the same command
            # would train once more from the best one on.
            self.save_total_limit = 2
        if self.total_train_batch_size is not None:
            # By the variable that all launchers set: DeepSpeed wants the number before the processes are known.
            at_once = self.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", 1))
            if self.total_train_batch_size < 1 or self.total_train_batch_size % at_once:
                raise ValueError(
                    f"total_train_batch_size={self.total_train_batch_size} must be a multiple of {at_once}: "
                    f"per_device_train_batch_size={self.per_device_train_batch_size} times the number of processes."
                )
            self.gradient_accumulation_steps = self.total_train_batch_size // at_once
        if self.ddp_find_unused_parameters is None:
            # Every parameter has a part in every loss, at every capacity: there is nothing to search for.
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        if self.deepspeed_plugin is not None and self.deepspeed is None:
            # Of accelerate's configuration; transformers wants to be told of it once more, by --bf16.
            self.bf16, self.fp16 = self.mixed_precision == "bf16", self.mixed_precision == "fp16"
        if self.deepspeed_plugin is not None and not self.deepspeed_plugin.zero3_init_flag:
            # transformers leaves the flag alone and shards what from_pretrained loads, before it can be converted.
            unset_hf_deepspeed_config()

    def check_capacities(self, config: MoNEConfig) -> None:
        """Raise ValueError for a capacity that a model of this config does not allow."""
        capacity = config.capacity if self.capacity is None else self.capacity
        for value in (capacity, *self.eval_capacities, *self.capacity_grid, *self.capacity_range):
            config.resolve_capacity(value)
