# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""A run of the training scripts: data sets cut to size, training and evaluation, as their options say."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import BaseImageProcessor, BaseVideoProcessor, PreTrainedModel

from ..data import LabelledExamples, LabelledStream, collate_examples, measure_input
from ..data.labels import Split, class_label, is_multi_label
from ..data.sources import count_rows, with_count
from ..flops import count_macs
from .arguments import MoNETrainingArguments
from .command_line import DataArguments, ModelArguments
from .metrics import classification_metrics
from .resumption import last_complete_checkpoint
from .trainer import MoNETrainer


logger = logging.getLogger(__name__)


def check_task(model_args: ModelArguments, data_args: DataArguments, args: MoNETrainingArguments) -> None:
    """Raise ValueError where there is nothing to do, or nothing trained to evaluate."""
    if not (args.do_train or args.do_eval or data_args.measure_input):
        raise ValueError("Nothing to do: give --do_train, --do_eval or both.")
    if not (args.do_train or data_args.measure_input or model_args.model_name_or_path):
        has_model = (Path(args.output_dir) / "config.json").is_file()
        hint = f" The one in --output_dir: --model_name_or_path {args.output_dir}." if has_model else ""
        raise ValueError(f"--do_eval without --do_train evaluates a trained model: give --model_name_or_path.{hint}")


def prepare_splits(
    splits: dict[str, Split], data_args: DataArguments, training_args: MoNETrainingArguments
) -> dict[str, Split]:
    """Check that what the run needs is there, and cut it to the numbers asked for; of a stream, its first rows.

    Raises:
        ValueError: names the missing split; or numbers that leave nothing.
    """
    for needed, name in ((training_args.do_train, "train"), (training_args.do_eval, "validation")):
        if needed and name not in splits:
            raise ValueError(f"No {name} set is given, but --do_{'train' if name == 'train' else 'eval'} needs one.")
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    for option, limit in zip(("--max_train_samples", "--max_eval_samples"), limits.values(), strict=True):
        if limit is not None and limit < 1:
            raise ValueError(f"{option} {limit} must be at least 1.")
    splits = {
        name: split if limits[name] is None else _first_rows(split, limits[name], data_args, training_args)
        for name, split in splits.items()
    }
    batch = training_args.per_device_train_batch_size * training_args.world_size
    drops = training_args.do_train and training_args.dataloader_drop_last and not data_args.streaming
    if drops and len(splits["train"]) < batch:
        raise ValueError(
            f"{len(splits['train'])} training examples are less than a batch of {batch}, and --dataloader_drop_last "
            "leaves them out. Lower --per_device_train_batch_size."
        )
    return splits


def _first_rows(split: Split, limit: int, data_args: DataArguments, training_args: MoNETrainingArguments) -> Split:
    if data_args.streaming:
        return with_count(split.take(limit), min(limit, count_rows(split)))
    return split.shuffle(seed=training_args.seed).select(range(min(limit, len(split))))


def label_fields(splits: dict[str, Split], loss: str | None = None) -> dict[str, dict | str]:
    """Config fields that name the classes, and the loss where it is known.

    Args:
        loss: "softmax", "sigmoid" or None, as `--loss`.

    Raises:
        ValueError: the softmax loss for examples with lists of labels.
    """
    names = class_label(next(iter(splits.values()))).names
    fields = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    several = any(is_multi_label(split) for split in splits.values())
    if several and loss == "softmax":
        raise ValueError("--loss softmax is for one label per example; these have lists of labels: --loss sigmoid.")
    if several or loss == "sigmoid":
        fields["problem_type"] = "multi_label_classification"
    elif loss == "softmax":
        fields["problem_type"] = "single_label_classification"
    return fields


def start_classifier(model: PreTrainedModel, bias: float | None, checkpoint: str | None) -> None:
    """Zero weights and this bias for a new classifier; None leaves it, and so does a trained one of `checkpoint`."""
    if bias is not None and checkpoint is not None and model.classifier.weight.any():
        logger.warning("head_bias=%s is for a new classifier: %s keeps its own.", bias, checkpoint)
    elif bias is not None:
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.fill_(bias)


def check_classifier(model: PreTrainedModel, source: str) -> None:
    """Raise ValueError before a classifier is evaluated that `source` did not have, which shows in its zeros."""
    weight = model.classifier.weight
    if weight.numel() and not weight.any():  # none of it here: ZeRO-3 has sharded it
        raise ValueError(f"{source} has no trained classifier to evaluate. Train one with --do_train.")


def make_examples(
    model: PreTrainedModel,
    splits: dict[str, Split],
    make_transforms: Callable[..., Callable],
    data_args: DataArguments,
    args: MoNETrainingArguments,
) -> dict[str, LabelledExamples | LabelledStream]:
    """The data sets of "train" and "validation", those that `splits` holds, with the targets of the model's loss.

    Args:
        make_transforms: `train=True` or `False` -> the transforms of a `LabelledExamples`.

    Raises:
        ValueError: the model does not allow a capacity of `args`, or is not for colours.
    """
    config, streamed = model.config, {}
    args.check_capacities(config)
    if config.num_channels != 3:
        raise ValueError(f"num_channels={config.num_channels} must be 3: images and videos are read in RGB.")
    if data_args.streaming:
        streamed = {
            "batch_size": args.per_device_train_batch_size,
            "num_workers": args.dataloader_num_workers,
            "buffer_size": data_args.shuffle_buffer_size,
            "process_index": args.process_index,
            "num_processes": args.world_size,
        }
    return {
        name: (LabelledStream if data_args.streaming else LabelledExamples)(
            split,
            make_transforms(train=name == "train"),
            args.seed,
            train=name == "train",
            num_labels=config.num_labels if config.problem_type == "multi_label_classification" else None,
            **streamed,
        )
        for name, split in splits.items()
    }


def report_input(
    examples: LabelledExamples | LabelledStream, data_args: DataArguments, args: MoNETrainingArguments
) -> dict[str, float]:
    """Time the input pipeline of a training, as `--measure_input` says, and print the result."""
    result = measure_input(
        examples,
        batch_size=args.per_device_train_batch_size,
        num_workers=args.dataloader_num_workers,
        num_batches=data_args.measure_input,
    )
    print(json.dumps(result, indent=2))
    return result


def train_and_evaluate(
    model: PreTrainedModel,
    processor: BaseImageProcessor | BaseVideoProcessor,
    data_sets: dict[str, LabelledExamples | LabelledStream],
    args: MoNETrainingArguments,
    task: str,
    num_clips: int = 1,
) -> dict[str, float]:
    """Do what the arguments say (do_train, do_eval, push_to_hub), from the last checkpoint in the output folder on.

    Args:
        model, processor: what to train and to save.
        data_sets: "train" and "validation", those needed, of [`make_examples`].
        task: of the Hub, "image-classification" or "video-classification".
        num_clips: of each video of the validation set, which all count in the compute.

    Returns:
        All metrics; they are also saved in the output folder.
    """
    if args.do_train:
        model.float()  # whatever the checkpoint is in: AdamW's steps are lost in half precision
    trainer = MoNETrainer(
        model=model,
        args=args,
        data_collator=collate_examples,
        train_dataset=data_sets.get("train"),
        eval_dataset=data_sets.get("validation"),
        processing_class=processor,
        compute_metrics=classification_metrics,
    )
    metrics = {}
    if args.do_train:
        checkpoint = args.resume_from_checkpoint
        if checkpoint in (None, "true", "True"):
            checkpoint = last_complete_checkpoint(args.output_dir)
        if checkpoint is not None:
            logger.info("Going on from the checkpoint %s.", checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        unreadable = _count_unreadable(data_sets["train"])
        if unreadable:
            result.metrics["train_unreadable"] = unreadable
            logger.warning("%d training examples could not be read and were replaced by others.", unreadable)
        trainer.save_model()
        trainer.save_state()
        if trainer.state.global_step > trainer._initial_global_step:  # one that had finished before keeps its numbers
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)
        else:
            logger.warning("The run in %s had finished: nothing was trained.", args.output_dir)
        metrics.update(result.metrics)
    if args.do_eval:
        result = trainer.evaluate()
        for capacity in args.eval_capacities:
            result[f"eval_capacity_{capacity:g}_gmacs"] = num_clips * count_macs(model.config, capacity) / 1e9
        trainer.log_metrics("eval", result)
        if not args.eval_capacities:  # which may be shares, for which the log has no format
            result["eval_capacity"] = trainer.capacity
        if num_clips > 1:
            result["eval_num_clips"] = num_clips
        trainer.save_metrics("eval", result)
        metrics.update(result)
    if args.push_to_hub:
        trainer.push_to_hub(tasks=task, tags=[task, "vision", "mone"])
    return metrics


def _count_unreadable(examples: LabelledExamples | LabelledStream) -> int:
    """Unreadable training examples, of all processes."""
    if isinstance(examples, LabelledStream):
        return sum(gather_object([examples.num_unreadable]))
    return len(set(gather_object(examples.unreadable)))
