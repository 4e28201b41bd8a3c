# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune a MoNE for image classification, or train one from scratch.

    python scripts/train_image_classification.py --train_file train.parquet --validation_file test.parquet \\
        --config_overrides "hidden_size=128,num_hidden_layers=6,num_attention_heads=4,intermediate_size=512,\\
    image_size=32,patch_size=4" --capacity_schedule uniform --eval_capacities 0.2 0.4 1.0 \\
        --do_train --do_eval --output_dir outputs/cifar10

The arguments may also stand in a JSON or YAML file, such as those in scripts/recipes; options after it win over it:

    python scripts/train_image_classification.py scripts/recipes/augreg_s16_imagenet1k.yaml \\
        --train_file 'train-*.parquet' --validation_file 'validation-*.parquet'

A pretrained ViT starts closer to what it was at small capacities when it is calibrated on training images first:

    python scripts/train_image_classification.py --model_name_or_path facebook/dinov2-small --calibrate true ...

A run that was stopped goes on from its last checkpoint in `--output_dir` when it is started again.
"""

import functools
import sys
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from mone import MoNEConfig, MoNEForImageClassification
from mone.configuration_mone import as_pair
from mone.conversion import (
    CALIBRATION_IMAGES,
    calibrate,
    check_source,
    check_untrained,
    load_image_model_and_processor,
    resize_and_crop,
)
from mone.data import collate_examples, load_image_datasets, make_image_transforms
from mone.pixels import bytes_to_pixels
from mone.training import MoNETrainingArguments
from mone.training.command_line import DataArguments, ModelArguments, parse_arguments, parse_overrides
from mone.training.runs import (
    check_classifier,
    check_task,
    label_fields,
    make_examples,
    prepare_splits,
    report_input,
    start_classifier,
    train_and_evaluate,
)


@dataclass
class ImageModelArguments(ModelArguments):
    """Of image models."""

    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Before a checkpoint that was not trained as a MoNE is: fit small experts and routers to "
            f"{CALIBRATION_IMAGES} training images. At capacity 1.0 it stays the same."
        },
    )


@dataclass
class ImageArguments(DataArguments):
    """Of images."""

    image_column: str | None = field(default=None, metadata={"help": "Default: the only column of images."})
    min_crop: float = field(default=0.08, metadata={"help": "Least share of an image that a training crop keeps."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate as `argv` (default: the command line) says; the metrics of the run."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, training_args = parse_arguments(argv, ImageModelArguments, ImageArguments)
    model, processor, data_sets = load(model_args, data_args, training_args)
    if data_args.measure_input:
        return report_input(data_sets["train"], data_args, training_args)
    return train_and_evaluate(model, processor, data_sets, training_args, "image-classification")


def load(model_args: ImageModelArguments, data_args: ImageArguments, training_args: MoNETrainingArguments):
    """The model, its image processor and the data sets, with one set of labels."""
    check_task(model_args, data_args, training_args)
    checkpoint, overrides = model_args.model_name_or_path, parse_overrides(model_args.config_overrides)
    if checkpoint is None and not overrides:
        raise ValueError("Give --model_name_or_path, or --config_overrides for a new model.")
    names = None
    config = None if checkpoint is None else check_source(checkpoint, **model_args.hub)
    if model_args.calibrate:
        if checkpoint is None:
            raise ValueError("--calibrate is for a pretrained --model_name_or_path: a new model has nothing to keep.")
        if data_args.streaming:
            raise ValueError(
                "--calibrate needs random access to the training images, which --streaming has not: run "
                "`python scripts/convert.py SOURCE DESTINATION --calibrate IMAGES` first."
            )
    if config is not None and not training_args.do_train:
        names = [config.id2label[number] for number in range(config.num_labels)]
    splits = load_image_datasets(
        **data_args.source(),
        image_column=data_args.image_column,
        label_names=names,
        seed=training_args.seed,
        token=model_args.token,
        cache_dir=model_args.cache_dir,
    )
    splits = prepare_splits(splits, data_args, training_args)
    fields = label_fields(splits, model_args.loss) | overrides

    if checkpoint is None:
        model = MoNEForImageClassification(MoNEConfig(**fields))
        height, width = as_pair(model.config.image_size)
        processor = ViTImageProcessor(size={"height": height, "width": width})
    else:
        # Another number of classes than the checkpoint's gets a new classifier.
        model, processor = load_image_model_and_processor(checkpoint, **model_args.hub, **fields)
        if model_args.calibrate:
            check_untrained(model)
        if not training_args.do_train:
            check_classifier(model, checkpoint)
    start_classifier(model, model_args.head_bias, checkpoint)
    size = as_pair(model.config.image_size)
    if model_args.attn_implementation is not None:
        model.set_attn_implementation(model_args.attn_implementation)
    if model_args.resize is not None:
        resize_and_crop(processor, model_args.resize, size)
    transforms = functools.partial(
        make_image_transforms,
        processor,
        size,
        flip=data_args.flip,
        min_crop=data_args.min_crop,
        randaugment_layers=data_args.randaugment_layers,
        randaugment_magnitude=data_args.randaugment_magnitude,
        as_bytes=True,
    )
    data_sets = make_examples(model, splits, transforms, data_args, training_args)
    if model_args.calibrate and training_args.do_train:
        # The same in every process.
        generator = torch.Generator().manual_seed(training_args.seed)
        loader = DataLoader(
            data_sets["train"], CALIBRATION_IMAGES, shuffle=True, generator=generator, collate_fn=collate_examples
        )
        scale, shift = bytes_to_pixels(processor, model.config.num_channels)
        calibrate(model, next(iter(loader))["pixel_values"] * scale + shift)
    return model, processor, data_sets


if __name__ == "__main__":
    main()
