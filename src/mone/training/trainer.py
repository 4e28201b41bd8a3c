# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer with a capacity for every step and every evaluation."""

import contextlib
import random
import shutil
import time
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import Trainer, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_utils import speed_metrics

from ..capacity import relative_widths
from ..checkpoints import is_written_by_hand
from ..flops import count_macs
from ..modeling_mone import classification_loss
from ..routing import Router
from .schedules import PAPER_GRID, capacity_at_step


class MoNECallback(TrainerCallback):
    """What training does beside the steps."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # Accelerate tells the data set its epoch in a single process only.
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch + 1e-6))

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.project_alpha_()

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        # Of a checkpoint Trainer pushes weights and config, but not the code that the config names.
        if state.is_world_process_zero:
            custom_object_save(model, args.output_dir)


class MoNETrainer(Trainer):
    """Trainer for MoNE models; `args` is a [`MoNETrainingArguments`].

    Each training step runs at the capacity of `args.capacity_schedule`, each evaluation at `args.eval_capacities`.
    The routers may have their own learning rate, alpha has no weight decay, and `total_flos` counts what the model
    computed at the capacities it ran at (forward and backward, two operations per multiply-accumulate).

    Training mixes examples (`args.mixup`) and smooths labels (`args.label_smoothing_factor`); evaluation does neither.
    The logits of several clips of a video, pixel_values (batch, clips, frames, channels, height, width), are averaged.

    Raises:
        ValueError: when it is made, for a capacity that the model does not allow.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.model.config
        self.capacity = config.capacity if self.args.capacity is None else self.args.capacity
        for capacity in (self.capacity, *self.args.eval_capacities):
            config.resolve_capacity(capacity)
        if self.args.capacity_schedule == "fixed":
            config.capacity = self.capacity  # what it is trained for is what the saved model runs at
        # With fewer than four experts the smallest model is larger than the grid's first entries.
        smallest = relative_widths(config.num_experts)[0]
        self.grid = tuple(capacity for capacity in PAPER_GRID if capacity >= smallest)
        self._eval_capacity = self.capacity
        # Trainer's would also smooth the labels of evaluation, and does not know mixed ones.
        self.label_smoother = None
        if self.softens_labels:
            if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
                raise ValueError(
                    "mixup and label_smoothing_factor need single-label classification of at least 2 classes, got "
                    f"problem_type={config.problem_type!r} and {config.num_labels} classes."
                )
            config.problem_type = "single_label_classification"
        self.add_callback(MoNECallback())

    @property
    def softens_labels(self) -> bool:
        """Whether training turns class numbers into probabilities."""
        return self.args.mixup > 0 or self.args.label_smoothing_factor > 0

    def step_capacity(self) -> float:
        """The capacity of the current optimiser step."""
        return capacity_at_step(
            self.args.capacity_schedule,
            self.state.global_step,
            capacity=self.capacity,
            seed=self.args.seed,
            grid=self.grid,
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = {**self._prepare_inputs(inputs), "capacity": self.step_capacity()}
        if self.softens_labels:
            inputs |= self._soften_labels(inputs["pixel_values"], inputs["labels"])
            if num_items_in_batch is not None:
                num_items_in_batch = num_items_in_batch * self.model.config.num_labels
        return super().training_step(model, inputs, num_items_in_batch)

    def _soften_labels(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Smoothed and mixed: labels (batch,) -> probabilities (batch, num_labels)."""
        num_labels, smoothing = self.model.config.num_labels, self.args.label_smoothing_factor
        labels = torch.nn.functional.one_hot(labels, num_labels).to(pixel_values.dtype)
        labels = labels * (1 - smoothing) + smoothing / num_labels
        if self.args.mixup > 0:
            # Like the capacity, the same on every rank and after resumption, and the same for images and clips.
            share = random.Random(f"mixup-{self.args.seed}-{self.state.global_step}").betavariate(
                self.args.mixup, self.args.mixup
            )
            pixel_values, labels = (torch.lerp(x, x.roll(1, 0), 1 - share) for x in (pixel_values, labels))
        return {"pixel_values": pixel_values, "labels": labels}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As Trainer's; the logits of several clips of a video are averaged (paper: of 8)."""
        if inputs["pixel_values"].dim() < 6:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels, clips = inputs.pop("labels", None), inputs.pop("pixel_values").unbind(1)
        # One after the other: memory does not grow with their number.
        logits = torch.stack([model(pixel_values=clip, **inputs).logits for clip in clips]).mean(0)
        loss = None if labels is None else classification_loss(self.model, logits, labels, num_items_in_batch)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        return super().prediction_step(model, {**inputs, "capacity": self._eval_capacity}, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """As Trainer's, at `args.eval_capacities` (default: one evaluation at `args.capacity`).

        With several capacities the metrics of each are named `{prefix}_capacity_{capacity:g}_...`, and
        `{prefix}_loss`, `{prefix}_accuracy`, ... are their means, by which the best checkpoint is chosen.
        """
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if several or not self.args.eval_capacities:  # Trainer calls this again for each of several data sets
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        loader = self.get_eval_dataloader(eval_dataset)
        metrics, values = {}, {}
        try:
            for capacity in self.args.eval_capacities:
                self._eval_capacity = capacity
                prefix = f"{metric_key_prefix}_capacity_{capacity:g}"
                start = time.time()
                output = self.evaluation_loop(
                    loader,
                    description=f"Evaluation at capacity {capacity:g}",
                    prediction_loss_only=True if self.compute_metrics is None else None,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=prefix,
                )
                for key, value in output.metrics.items():
                    values.setdefault(metric_key_prefix + key.removeprefix(prefix), []).append(value)
                metrics.update(output.metrics)
                metrics.update(speed_metrics(prefix, start, num_samples=output.num_samples))
        finally:
            self._eval_capacity = self.capacity
        metrics.update({key: sum(entries) / len(entries) for key, entries in values.items()})
        # Once for all capacities: callbacks such as early stopping look for the means.
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args, **kwargs) -> None:
        """As Trainer's, unless output folder or the repo pushed to have a card that is no such draft: it stays."""
        if not self.is_world_process_zero():
            return
        card = Path(self.args.output_dir) / "README.md"
        if self.hub_model_id is not None and not card.exists():
            with contextlib.suppress(EntryNotFoundError):
                shutil.copyfile(hf_hub_download(self.hub_model_id, card.name, token=self.args.hub_token), card)
        if not is_written_by_hand(card):
            super().create_model_card(*args, **kwargs)

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".alpha")]

    def create_optimizer(self, model=None):
        """As Trainer's; the routers go into groups of their own where `args.router_learning_rate` is given."""
        created_here = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created_here and self.args.router_learning_rate is not None:
            modules = (self.model if model is None else model).modules()
            routers = {p for module in modules if isinstance(module, Router) for p in module.parameters()}
            for group in list(optimizer.param_groups):
                moved = [p for p in group["params"] if p in routers]
                if moved:
                    group["params"] = [p for p in group["params"] if p not in routers]
                    optimizer.add_param_group({**group, "params": moved, "lr": self.args.router_learning_rate})
        return optimizer

    def floating_point_ops(self, inputs) -> int:
        """Operations of one training step on `inputs`: 2 per MAC, and twice the forward's for the backward."""
        pixel_values = inputs["pixel_values"]
        macs = count_macs(self.model.config, self.step_capacity(), image_size=tuple(pixel_values.shape[-2:]))
        return 6 * macs * pixel_values.shape[0]
