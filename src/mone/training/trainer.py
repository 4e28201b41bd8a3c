# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer with the capacities of every step and every evaluation."""

import contextlib
import copy
import functools
import logging
import math
import numbers
import os
import random
import shutil
import time
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import Trainer, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, default_compute_objective, speed_metrics

from ..capacity import as_plain, effective_capacity, paper_grid
from ..checkpoints import is_written_by_hand
from ..configuration_mone import MoNEConfig
from ..data import LabelledStream
from ..flops import count_macs
from ..modeling_mone import MoNELayer, classification_loss
from ..pixels import bytes_to_pixels
from ..routing import Router
from .arguments import MoNETrainingArguments
from .distillation import Teacher, distillation_loss
from .learning_rates import set_learning_rates
from .mixing import mixup, soft_labels
from .resumption import (
    check_not_deepspeed,
    check_settings,
    crosses_fsdp,
    describe_last_checkpoint,
    last_complete_checkpoint,
    load_model,
    load_optimizer,
    write_settings,
    writing_checkpoint,
)
from .schedules import CapacitySchedule, capacity_range, is_dense, steps_for_budget
from .shared_pass import SharedPass
from .signals import Interruption, protect_workers
from .statistics import StepStatistics
from .zero import local_shard, project_zero_alpha_


logger = logging.getLogger(__name__)


class MoNECallback(TrainerCallback):
    """What training does beside the steps."""

    def __init__(self, interruption: Interruption):
        self.interruption = interruption

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # Accelerate tells the data set its epoch in a single process only.
        data = getattr(train_dataloader, "dataset", None)  # a loader of the user's own may have none
        if hasattr(data, "set_epoch"):
            data.set_epoch(int(state.epoch + 1e-6))
        if isinstance(data, LabelledStream) and not args.ignore_data_skip:
            steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
            done = state.global_step % steps_per_epoch * args.gradient_accumulation_steps
            data.skip_batches(done)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.project_alpha_()
        project_zero_alpha_(model)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        # Of a checkpoint Trainer pushes weights and config, but not the code that the config names.
        if state.is_world_process_zero:
            custom_object_save(model, args.output_dir)

    def on_step_end(self, args, state, control, **kwargs):
        if self.interruption.signal is not None:
            control.should_save = control.should_training_stop = True


class MoNETrainer(Trainer):
    """Trainer for MoNE models; `args` is a [`MoNETrainingArguments`].

    Each training step runs at the capacities of `args.capacity_schedule`, each evaluation at `args.eval_capacities`.
    Where a step has several capacities (`joint`, or distillation from the dense model), the loss is the sum over
    them on the same batch; each is propagated back before the next, so that memory does not grow with their number.
    The routers may have their own learning rate and stay as they are while the dense model is trained, layers may have
    one that decays with their distance from the classifier, and alpha has no weight decay.

    Logged beside Trainer's own are, as means since the last log, the capacity, the routers' entropy (nats), the share
    of tokens of each expert (`router_load_0` is the smallest), images per second and the share of time spent waiting
    for data (`data_waiting`); each router's alpha; and the multiply-accumulates spent since the start (`macs`:
    forward, twice that for the backward, and the teacher's forward). `total_flos` is two operations for each of them.

    Training mixes examples (`args.mixup`) and smooths labels (`args.label_smoothing_factor`); evaluation does neither.
    `pixel_values` may be bytes (uint8): they are rescaled and normalised on the device, as `processing_class` would.
    The logits of several clips of a video, pixel_values (batch, clips, frames, channels, height, width), are averaged.

    A run ends with a message about the last complete checkpoint when its loss or its weights are not finite
    (FloatingPointError; such weights are never saved), when a checkpoint cannot be written (OSError), and after Ctrl-C
    or SIGTERM, where a run on one process saves a checkpoint first.

    Raises:
        TypeError: when it is made, for arguments of another class.
        ValueError: when it is made, for a capacity that the model does not allow, a teacher that does not fit, or
            several GPUs in one process, or rates of routers and layers for an optimiser of the user's own; when
            training goes on from a checkpoint, for other settings.
    """

    def __init__(self, model=None, args=None, *others, **kwargs):
        # As Trainer, which would make its own arguments.
        args = MoNETrainingArguments(output_dir="tmp_trainer") if args is None else args
        super().__init__(model, args, *others, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"This process has {self.args.n_gpu} GPUs, but trains on one: start a process for each by `accelerate "
                "launch`, or show it one by CUDA_VISIBLE_DEVICES=0."
            )
        config = self.model.config
        if self.model_init is None:  # else it was adapted when it was made
            self._adapt(self.model)
        self._optimizer_was_given = self.optimizer is not None
        if self._optimizer_was_given and (self.args.router_learning_rate is not None or self.args.layer_decay != 1):
            raise ValueError(
                f"router_learning_rate={self.args.router_learning_rate} and layer_decay={self.args.layer_decay} are "
                "for the optimiser that the trainer makes: give yours such groups, or pass optimizer_cls_and_kwargs."
            )
        self.schedule = self._make_schedule(anneal_steps=0)
        self._eval_capacity = None
        # Trainer's would also smooth the labels of evaluation, and does not know mixed ones.
        self.label_smoother = None
        self.teacher, self._teacher_logits = None, None
        if self.args.distill_from is not None:
            if config.problem_type == "regression" or config.num_labels < 2:
                raise ValueError(
                    f"distill_from={self.args.distill_from!r} needs classification, got "
                    f"problem_type={config.problem_type!r} and {config.num_labels} classes."
                )
            if self.args.distill_from != "self":
                if self.is_deepspeed_enabled:
                    unset_hf_deepspeed_config()  # by which ZeRO-3 would shard a model that it does not run
                self.teacher = Teacher(
                    self.args.distill_from, config, self.processing_class, token=self.args.hub_token
                ).to(self.args.device)
                if self.is_deepspeed_enabled:
                    self.accelerator.state.deepspeed_plugin.set_deepspeed_weakref()
        self._statistics = self._start_statistics()
        self._interruption = Interruption(at_once=self.args.world_size > 1)
        self.add_callback(MoNECallback(self._interruption))

    def _adapt(self, model) -> None:
        """Check a model, and make it one that is trained as `self.args` say."""
        config, args = model.config, self.args
        if not isinstance(args, MoNETrainingArguments):
            raise TypeError(f"args must be MoNETrainingArguments, got {type(args).__name__}.")
        args.check_capacities(config)
        self._problem_type_was_given = config.problem_type is not None
        multi_label = config.problem_type == "multi_label_classification"
        if args.bce_sum and not multi_label:
            raise ValueError(f"bce_sum needs problem_type='multi_label_classification', got {config.problem_type!r}.")
        if self.softens_labels and not (multi_label and args.label_smoothing_factor == 0):
            if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
                raise ValueError(
                    "mixup needs classification of at least 2 classes, and label_smoothing_factor of one label per "
                    f"example; got problem_type={config.problem_type!r} and {config.num_labels} classes."
                )
            config.problem_type = "single_label_classification"
        self._problem_type = config.problem_type  # which the model else finds with the first labels
        if args.compile_layers:
            # Every capacity needs its graph, in each layer whose stochastic depth differs: dynamo's limits are for
            # code that recompiles by mistake. Behind them layers would run uncompiled.
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
            for module in model.modules():
                if isinstance(module, MoNELayer):
                    module.compile(dynamic=False)

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        self._adapt(model)
        return model

    def _start_statistics(self) -> StepStatistics:
        config = self.model.config
        return StepStatistics(config.num_experts, config.router_type != "random", self.args.device)

    @property
    def capacity(self) -> float | list[float] | tuple[float, ...]:
        """Of training with the fixed schedule, and of evaluation without `args.eval_capacities`."""
        return self.model.config.capacity if self.args.capacity is None else as_plain(self.args.capacity)

    @property
    def _trains_densely(self) -> bool:
        return self.args.capacity_schedule == "fixed" and is_dense(self.capacity)

    # --- schedule and budget -----------------------------------------------------------------------------------------

    def _make_schedule(self, anneal_steps: int) -> CapacitySchedule:
        config, args = self.model.config, self.args
        grid = tuple(args.capacity_grid)
        if args.capacity_range:
            grid = capacity_range(*args.capacity_range)
        elif not grid:
            grid = paper_grid(config.num_experts)
        return CapacitySchedule(
            args.capacity_schedule,
            tuple(self.capacity) if isinstance(self.capacity, (list, tuple)) else self.capacity,
            grid,
            anneal_steps,
            config.num_experts,
            dense_first=args.distill_from == "self",
            seed=args.seed,
        )

    def step_capacities(self) -> tuple:
        """The capacities of the current optimiser step."""
        return self.schedule(self.state.global_step)

    def training_macs(self, capacities: tuple, image_size: tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of training on one example at `capacities`.

        The backward counts twice as much as the forward; what activation checkpointing computes again does not count.
        """
        macs = sum(3 * count_macs(self.model.config, capacity, image_size) for capacity in capacities)
        return macs + (0 if self.teacher is None else self.teacher.macs)

    def floating_point_ops(self, inputs) -> int:
        """Operations of one training step on `inputs`, two per multiply-accumulate."""
        pixel_values = inputs["pixel_values"]
        return 2 * self.training_macs(self.step_capacities(), tuple(pixel_values.shape[-2:])) * pixel_values.shape[0]

    def set_initial_training_values(self, args, dataloader):
        """As Trainer's, after which the schedule is known. With `args.iso_flops` as many steps as the budget pays for.

        The budget is what the dense model (capacity 1.0) spends in `args.num_train_epochs`, or `args.max_steps`.
        """
        if args.distill_from == "self" and self._trains_densely:
            raise ValueError("distill_from='self' needs capacities below 1.0 to teach, got 1.0 alone.")
        self._statistics = self._start_statistics()
        if args.capacity_schedule in ("fixed", "anneal"):
            self.model.config.capacity = self.capacity  # what it is trained for is what the saved model runs at
        values = super().set_initial_training_values(args, dataloader)
        _, steps_per_epoch, num_examples, _, batch_size, _, dense_steps = values
        anneal = args.anneal_steps
        self.schedule = self._make_schedule(round(anneal * dense_steps if anneal < 1 else anneal))
        if not args.iso_flops:
            return values

        last_batch = num_examples - (steps_per_epoch - 1) * batch_size
        if not 0 < last_batch <= batch_size:  # none that is smaller: dropped, or a stream
            last_batch = batch_size
        macs = functools.lru_cache(self.training_macs)

        def examples(step):
            return last_batch if step % steps_per_epoch == steps_per_epoch - 1 else batch_size

        dense = 3 * count_macs(self.model.config, 1.0)
        budget = dense * sum(examples(step) for step in range(dense_steps))
        steps, spent = steps_for_budget(lambda step: macs(self.schedule(step)) * examples(step), budget)
        logger.info(
            "isoFLOPs: %d steps (%.2f epochs) with the %s schedule are %.6g multiply-accumulates of training; "
            "%d steps (%.2f epochs) of the dense model are %.6g.",
            *(steps, steps / steps_per_epoch, args.capacity_schedule, spent),
            *(dense_steps, dense_steps / steps_per_epoch, budget),
        )
        args = copy.copy(args)
        args.max_steps = steps
        return super().set_initial_training_values(args, dataloader)

    def _hp_search_setup(self, trial):
        """As Trainer's, after which a trial's settings are known, and before weights are loaded that may not fit."""
        super()._hp_search_setup(trial)
        if self._resumed_from is not None:
            check_settings(self._resumed_from, self._settings())

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        """As Trainer's, which would take one step more where a run took its last one inside an epoch."""
        place = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else place

    # --- data --------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        """As Trainer's. A stream, which knows its process, is not split once more."""
        data, args = self.train_dataset, self.args
        if not isinstance(data, LabelledStream):
            return protect_workers(super().get_train_dataloader())
        loader = torch.utils.data.DataLoader(
            data,
            batch_size=data.batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            protect_workers(loader),
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """As Trainer's, with workers that outlive signals to all processes of a job."""
        return protect_workers(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As Trainer's; the wait for data is measured."""
        return super().get_batch_samples(self._statistics.timed(epoch_iterator), num_batches, device)

    # --- steps -------------------------------------------------------------------------------------------------------

    @property
    def softens_labels(self) -> bool:
        """Whether training turns class numbers into probabilities."""
        return self.args.mixup > 0 or self.args.label_smoothing_factor > 0

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As Trainer's. After Ctrl-C or SIGTERM raises KeyboardInterrupt, with a message that says how to go on.

        `resume_from_checkpoint=True` is the last complete checkpoint in `args.output_dir`, which may be none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        self._resumed_from = resume_from_checkpoint or None
        try:
            with self._interruption:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
            if self._interruption.signal is not None and self.state.global_step < self.state.max_steps:
                raise KeyboardInterrupt(self._interruption.signal.name)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"Training was stopped by {str(error) or 'Ctrl-C'} at step {self.state.global_step}. "
                f"{describe_last_checkpoint(self.args.output_dir)} Start the same command again to go on."
            ) from None
        return output

    def _prepare_inputs(self, inputs):
        """As Trainer's; pixels that come as bytes are rescaled and normalised as the processor would."""
        inputs = super()._prepare_inputs(inputs)
        if inputs["pixel_values"].dtype != torch.uint8:
            return inputs
        scale, shift = self._bytes_to_pixels
        return {**inputs, "pixel_values": inputs["pixel_values"] * scale + shift}

    @functools.cached_property
    def _bytes_to_pixels(self) -> list[torch.Tensor]:
        if self.processing_class is None:
            raise ValueError("pixel_values of bytes need a processing_class, by which to rescale and normalise them.")
        factors = bytes_to_pixels(self.processing_class, self.model.config.num_channels)
        return [factor.to(self.args.device) for factor in factors]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As Trainer's, forward and backward at each of the step's capacities; the sum of their losses.

        Raises:
            ValueError: several clips of each video, or no labels where they are mixed, smoothed or summed.
        """
        inputs = {**self._prepare_inputs(inputs), "output_router_logits": True}
        if inputs["pixel_values"].dim() > 5:
            raise ValueError(
                f"pixel_values of shape {tuple(inputs['pixel_values'].shape)} hold several clips of each video: "
                "training takes one."
            )
        if inputs.get("labels") is None and (self.softens_labels or self.args.bce_sum):
            raise ValueError("mixup, label_smoothing_factor and bce_sum need labels, and these batches have none.")
        if self.softens_labels:
            count = inputs["labels"].numel()
            inputs |= self._soften_labels(inputs["pixel_values"], inputs["labels"])
            if num_items_in_batch is not None:  # counts probabilities, as `classification_loss` does: many an example
                num_items_in_batch = num_items_in_batch * (inputs["labels"].numel() // count)
        if self.args.bce_sum:
            num_items_in_batch = num_items_in_batch / self.model.config.num_labels  # the number of examples
        if self.teacher is not None:
            with self.accelerator.autocast():
                self._teacher_logits = self.teacher(inputs["pixel_values"])
        *others, last = self.step_capacities()
        losses = []
        for capacity in others:
            with self._without_sync(model):
                losses.append(super().training_step(model, {**inputs, "capacity": capacity}, num_items_in_batch))
        losses.append(super().training_step(model, {**inputs, "capacity": last}, num_items_in_batch))
        self._teacher_logits = None
        loss = torch.stack(losses).sum()
        self._statistics.add_loss(loss, self.state.global_step, len(inputs["pixel_values"]))
        return loss

    @contextlib.contextmanager
    def _without_sync(self, model):
        """For a backward that another of the same micro-batch follows: processes exchange gradients in the last."""
        gradient_state = self.accelerator.gradient_state
        if not gradient_state.sync_gradients:  # nor does this micro-batch
            yield
            return
        gradient_state._set_sync_gradients(False)  # DeepSpeed would take an optimiser step
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            gradient_state._set_sync_gradients(True)

    def _soften_labels(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Smoothed and mixed: labels (batch,) or (batch, num_labels) -> probabilities (batch, num_labels)."""
        args = self.args
        if labels.dim() > 1 and not self._problem_type_was_given:
            raise ValueError(
                f"Labels of shape {tuple(labels.shape)} with mixup or label_smoothing_factor: set "
                "config.problem_type, 'multi_label_classification' for any number of classes, "
                "'single_label_classification' for probabilities of one."
            )
        labels = soft_labels(labels, self.model.config.num_labels, args.label_smoothing_factor, pixel_values.dtype)
        if args.mixup > 0:
            # Like the capacity, the same on every rank and after resumption.
            rng = random.Random(f"mixup-{args.seed}-{self.state.global_step}")
            pixel_values, labels = mixup(pixel_values, labels, args.mixup, rng)
        return {"pixel_values": pixel_values, "labels": labels}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As Trainer's; the logits of several clips of a video are averaged (paper: of 8).

        In training, the labels' loss and the teacher's are weighted by `args.distillation_weight`. The dense model
        that teaches itself has its labels alone.
        """
        if inputs["pixel_values"].dim() > 5:
            loss, logits = self._loss_of_clips(model, dict(inputs), num_items_in_batch)
            return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss
        if not model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("labels")  # which Trainer takes out for a loss of the user's own
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        capacity = inputs["capacity"]
        self._statistics.add_forward(
            effective_capacity(self.model.config.resolve_capacity(capacity)),
            outputs["router_logits"],
            outputs["expert_indices"],
        )
        if self.args.distill_from == "self" and is_dense(capacity):
            self._teacher_logits = outputs["logits"].detach()
        elif self._teacher_logits is not None:
            divergence = self._distillation_loss(outputs["logits"], labels, num_items_in_batch)
            weight = self.args.distillation_weight
            loss = (1 - weight) * loss + weight * divergence
        return loss

    def _loss_of_clips(self, model, inputs, num_items_in_batch):
        """Loss, None without labels, and mean logits (batch, num_labels) of several clips of each video."""
        labels, clips = inputs.pop("labels", None), inputs.pop("pixel_values").unbind(1)
        # One after the other: memory does not grow with their number.
        logits = torch.stack([model(pixel_values=clip, **inputs).logits for clip in clips]).mean(0)
        loss = None
        if labels is not None and self.compute_loss_func is not None:
            loss = self.compute_loss_func({"logits": logits}, labels, num_items_in_batch=num_items_in_batch)
        elif labels is not None:
            loss = classification_loss(self.model, logits, labels, num_items_in_batch)
        return loss, logits

    def _distillation_loss(self, logits, labels, num_items_in_batch):
        loss = distillation_loss(
            logits,
            self._teacher_logits,
            self.args.distillation_temperature,
            multi_label=self.model.config.problem_type == "multi_label_classification",
        )
        if num_items_in_batch is None:
            return loss
        # As the labels' loss: this micro-batch's part of the step, of all processes, whose gradients are averaged.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * (labels.numel() * processes / num_items_in_batch)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, *args, **kwargs):
        capacity = self.capacity if self._eval_capacity is None else self._eval_capacity
        return super().prediction_step(model, {**inputs, "capacity": capacity}, *args, **kwargs)

    @contextlib.contextmanager
    def _evaluating_at(self, capacity):
        """Evaluate at this capacity; None for what it would be without."""
        if capacity is not None:
            self.model.config.resolve_capacity(capacity)
        before = self._eval_capacity
        self._eval_capacity = before if capacity is None else capacity
        try:
            yield
        finally:
            self._eval_capacity = before

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test", capacity=None):
        """As Trainer's, at one `capacity` (default: `args.capacity`).

        Raises:
            ValueError: a capacity that is not allowed.
        """
        with self._evaluating_at(capacity):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", capacity=None
    ) -> dict[str, float]:
        """As Trainer's, at one `capacity`, or without it at `args.eval_capacities` (default: at `args.capacity`).

        With several capacities the metrics of each are named `{prefix}_capacity_{capacity:g}_...`, and
        `{prefix}_loss`, `{prefix}_accuracy`, ... are their means, by which the best checkpoint is chosen. Examples are
        read once for all of them; `{prefix}_runtime` and what is per second are of the whole. The logits of all
        capacities are kept at a time, on the device unless `args.eval_accumulation_steps` moves them.

        Raises:
            ValueError: a capacity that is not allowed.
        """
        with self._evaluating_at(capacity):
            if isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
                # Trainer calls this again for each of several data sets.
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            with self._not_training():
                if self._eval_capacity is not None or not self.args.eval_capacities:
                    return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
                loader = self.get_eval_dataloader(eval_dataset)
                return self._evaluate_capacities(loader, ignore_keys, metric_key_prefix)

    def _evaluate_capacities(self, loader, ignore_keys, metric_key_prefix) -> dict[str, float]:
        capacities, start = self.args.eval_capacities, time.time()
        # Metrics that gather batches themselves cannot tell capacities apart: these have a pass each.
        passes = [[capacity] for capacity in capacities] if self.args.batch_eval_metrics else [capacities]
        loss_only = self.compute_metrics is None or self.args.prediction_loss_only
        metrics, values = {}, {}
        for group in passes:
            with self._evaluating_together(group, metric_key_prefix, loss_only):
                output = self.evaluation_loop(
                    loader,
                    description=f"Evaluation at {', '.join(f'{capacity:g}' for capacity in group)}",
                    prediction_loss_only=loss_only,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=metric_key_prefix,
                )
            metrics |= output.metrics
        for capacity in capacities:
            prefix = f"{metric_key_prefix}_capacity_{capacity:g}"
            for key, value in metrics.items():
                if key.startswith(f"{prefix}_"):
                    values.setdefault(metric_key_prefix + key.removeprefix(prefix), []).append(value)
        metrics |= {
            key: sum(entries) / len(entries)
            for key, entries in values.items()
            if all(isinstance(entry, numbers.Real) for entry in entries)
        }
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=output.num_samples)
        # Once for all capacities: callbacks such as early stopping look for the means.
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextlib.contextmanager
    def _evaluating_together(self, capacities, metric_key_prefix, loss_only):
        """Have Trainer's evaluation loop run each batch at these capacities."""
        alone = {
            "compute_metrics": self.compute_metrics,
            "preprocess_logits_for_metrics": self.preprocess_logits_for_metrics,
            "prediction_step": self.prediction_step,  # of a subclass, too
        }

        def compute_metrics(capacity, prediction, **kwargs):
            with self._replaced(**alone), self._evaluating_at(capacity):  # metrics may predict, too
                return alone["compute_metrics"](prediction, **kwargs)

        shared = SharedPass(
            capacities,
            None if loss_only else compute_metrics,
            alone["preprocess_logits_for_metrics"],
            metric_key_prefix,
            passes_losses="loss" in self.args.include_for_metrics,
            filters_losses=self.args.logging_nan_inf_filter,
        )

        def prediction_step(model, inputs, *args, **kwargs):
            inputs, steps = self._prepare_inputs(inputs), []
            for capacity in capacities:
                with self._evaluating_at(capacity):
                    steps.append(alone["prediction_step"](model, inputs, *args, **kwargs))
            return shared.join(len(inputs["pixel_values"]), steps)

        with self._replaced(
            compute_metrics=shared.compute_metrics,
            preprocess_logits_for_metrics=shared.preprocess_logits,
            prediction_step=prediction_step,
        ):
            yield

    @contextlib.contextmanager
    def _replaced(self, **attributes):
        """With these attributes in the place of the trainer's, or of its class's."""
        own = vars(self)
        before = {name: own[name] for name in attributes if name in own}
        own.update(attributes)
        try:
            yield
        finally:
            for name in attributes:
                del own[name]
            own.update(before)

    def _determine_best_metric(self, metrics, trial):
        # After which Trainer saves the best alone, where a signal asked for a checkpoint.
        return super()._determine_best_metric(metrics, trial) or self._interruption.signal is not None

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """As Trainer's, by default by the means over `args.eval_capacities`."""
        return super().hyperparameter_search(hp_space, compute_objective or _objective_of_means, *args, **kwargs)

    def create_model_card(self, *args, **kwargs) -> None:
        """As Trainer's, unless output folder or the repo pushed to have a card that is no such draft: it stays."""
        if not self.is_world_process_zero():
            return
        card = Path(self.args.output_dir) / "README.md"
        config = self.model.config
        config._name_or_path = (
            config._name_or_path or self.args.output_dir
        )  # or the draft is "fine-tuned from" nothing
        if self.hub_model_id is not None and not card.exists():
            with contextlib.suppress(EntryNotFoundError):
                shutil.copyfile(hf_hub_download(self.hub_model_id, card.name, token=self.args.hub_token), card)
        if not is_written_by_hand(card):
            super().create_model_card(*args, **kwargs)

    @contextlib.contextmanager
    def _not_training(self):
        """Time that images per second leave out."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._statistics.start += time.perf_counter() - start

    # --- optimiser ---------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model) -> list[str]:
        """As Trainer's, but for tokens, positions and alpha, as in AugReg (big_vision decays kernels alone)."""
        kept = (".alpha", "cls_token", "register_tokens", "position_embeddings")
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(kept)]

    def create_optimizer(self, model=None):
        """As Trainer's, with the learning rates of `args.router_learning_rate` and `args.layer_decay`.

        Training of the dense model leaves the routers alone, unless they are given a rate: it cannot teach them which
        tokens to prefer, and `mone.conversion.calibrate` can start them afterwards.
        """
        created_here = self.optimizer is None
        optimizer = super().create_optimizer(model)
        idle = self._trains_densely and self.model.config.router_type == "learned"
        if idle and (self._optimizer_was_given or self.args.router_learning_rate is not None):
            whose = "Your optimiser" if self._optimizer_was_given else "router_learning_rate"
            logger.warning("%s also trains the routers, which learn nothing useful at capacity 1.0.", whose)
        if created_here:
            model = self.model if model is None else model
            router_learning_rate = self.args.router_learning_rate
            if idle and router_learning_rate is None:
                router_learning_rate = 0.0
            set_learning_rates(optimizer, model, router_learning_rate, self.args.layer_decay)
        return optimizer

    # --- logs and checkpoints ----------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        if "loss" in logs:
            self._check_finite()
            logs |= self._statistics.read(self.accelerator)
            for number, router in enumerate(m for m in self.model.modules() if isinstance(m, Router)):
                if router.router_type != "random":
                    # Of ZeRO-3's shards this process, if it is the one that logs, has the first.
                    alpha = getattr(router.alpha, "ds_tensor", router.alpha).detach()
                    logs[f"router_alpha_{number}"] = getattr(alpha, "full_tensor", lambda a=alpha: a)().item()
            logs["macs"] = self.state.total_flos / 2
        elif "train_loss" in logs:
            self._check_finite(weights=True)
        super().log(logs, start_time)

    def _check_finite(self, weights: bool = False) -> None:
        """Raise FloatingPointError, on all processes, if a loss since the start was not finite or a weight is not."""
        found = self._statistics.first_bad_step.view(1)
        if weights:
            finite = torch.stack([local_shard(p).isfinite().all() for p in self.model.parameters()]).all().view(1)
            found = torch.cat([found, (~finite).to(found)])
        found = self.accelerator.gather(found).view(self.accelerator.num_processes, -1).cpu()
        steps = found[:, 0][found[:, 0] >= 0]
        if not len(steps) and not (weights and found[:, 1].any()):
            return
        step, what = self.state.global_step, "Weights are not finite after"
        if len(steps):
            step, what = int(steps.min()), "The loss is not finite (NaN or infinite) at"
        raise FloatingPointError(
            f"{what} step {step}, with capacity {', '.join(map(str, self.schedule(step)))} and learning rate "
            f"{self._get_learning_rate():g}. Training stops, and these weights are not saved. "
            f"{describe_last_checkpoint(self.args.output_dir)} The same command would fail at the same step again: "
            "lower the learning rate or max_grad_norm, or warm up for longer."
        )

    def _save_checkpoint(self, model, trial):
        self._check_finite(weights=True)
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with self._not_training(), writing_checkpoint(folder, self.args.should_save):
            if self.args.should_save:
                write_settings(folder, self._settings())
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # What says that a checkpoint is complete, trainer_state.json, comes next and must not be ahead of a process.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_not_deepspeed(resume_from_checkpoint)
        if not crosses_fsdp(resume_from_checkpoint, self.is_fsdp_enabled):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_model(resume_from_checkpoint, self.model if model is None else model)

    def _settings(self) -> dict:
        """What a run must not change when it goes on: optimiser and schedule of the checkpoint would ignore it."""
        args = self.args
        names = (
            *("capacity_schedule", "capacity_grid", "capacity_range", "anneal_steps", "iso_flops", "seed"),
            *("learning_rate", "router_learning_rate", "layer_decay", "weight_decay", "mixup", "bce_sum"),
            *("label_smoothing_factor", "distill_from", "distillation_weight", "distillation_temperature"),
        )
        settings = {name: getattr(args, name) for name in names} | {"optim": getattr(args.optim, "value", args.optim)}
        config = self.model.config
        fields = {**MoNEConfig.__annotations__, **type(config).__annotations__}
        settings |= {f"config.{name}": getattr(config, name) for name in fields if name != "capacity"}
        settings["config.problem_type"] = self._problem_type
        if args.capacity_schedule in ("fixed", "anneal"):
            settings["capacity"] = self.capacity
        return settings

    def _load_optimizer_and_scheduler(self, checkpoint):
        if not self.is_deepspeed_enabled and not Path(checkpoint, SCHEDULER_NAME).is_file():
            logger.warning(
                "The checkpoint %s has weights only, as --save_only_model wrote it: optimiser and learning rate start "
                "anew at step %d, and the result is not that of a run in one go.",
                *(checkpoint, self.state.global_step),
            )
        if not crosses_fsdp(checkpoint, self.is_fsdp_enabled):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(checkpoint, self.model, self.optimizer.optimizer)
        path = os.path.join(checkpoint, SCHEDULER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))


def _objective_of_means(metrics: dict[str, float]) -> float:
    """Trainer's default, which would add the metrics of each capacity, their losses too, and a time."""
    left = ("_capacity_", "_model_preparation_time")
    return default_compute_objective({k: v for k, v in metrics.items() if not any(part in k for part in left)})
