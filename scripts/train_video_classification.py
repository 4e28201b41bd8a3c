# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune a MoNE for video classification: from a MoNE video checkpoint, from an image model, or from scratch.

    python scripts/train_video_classification.py --init_from google/vit-base-patch16-224 \\
        --train_file something-something-v2-train.json --validation_file something-something-v2-validation.json \\
        --video_dir 20bn-something-something-v2 --frame_sampling_rate 1 --flip false \\
        --capacity_schedule uniform --eval_capacities 0.2 0.4 1.0 --do_train --do_eval --output_dir outputs/ssv2

Videos come from folders (one per class), lists (Something-Something-v2, Kinetics-400, csv) or the Hub. The
augmentations are ViViT's and their defaults are those for Kinetics-400; a file that cannot be decoded is skipped and
counted. The arguments may also stand in a JSON or YAML file, such as those in scripts/recipes; options after it win
over it. A run that was stopped goes on from its last checkpoint in `--output_dir` when it is started again.
"""

import functools
import sys
from dataclasses import dataclass, field

from transformers import AutoVideoProcessor

from mone import MoNEViViTConfig, MoNEViViTForVideoClassification
from mone.configuration_mone import as_pair
from mone.conversion import (
    check_source,
    fit_image_processor,
    load_image_model,
    load_image_processor,
    load_video_model,
    make_video_processor,
    mone_vivit_from_mone,
    resize_and_crop,
    set_labels,
)
from mone.data import load_video_datasets, make_video_transforms
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
class VideoModelArguments(ModelArguments):
    """Of video models."""

    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Image MoNE, or a ViT that scripts/convert.py takes: the start of a new model's spatial encoder."
        },
    )


@dataclass
class VideoArguments(DataArguments):
    """Of videos."""

    video_column: str | None = field(default=None, metadata={"help": "Default: the only column of videos."})
    video_dir: str | None = field(
        default=None, metadata={"help": "Folder of the videos that a list names. Default: the list's own."}
    )
    sampling: str | None = field(
        default=None,
        metadata={
            "help": "dense: clips of frames that are --frame_sampling_rate apart. uniform: frames spread over the "
            "video. Default: the checkpoint's, else dense.",
            "choices": ["dense", "uniform"],
        },
    )
    frame_sampling_rate: int | None = field(
        default=None, metadata={"help": "Distance of a dense clip's frames. Default: the checkpoint's, else 2."}
    )
    num_clips: int | None = field(
        default=None,
        metadata={
            "help": "Clips of a video over whose logits an evaluation, and a pipeline of the saved model, averages; "
            "with uniform sampling one. Default: the checkpoint's, else 8."
        },
    )
    scale_jitter: list[float] = field(
        default_factory=lambda: [0.9, 1.33],
        metadata={"help": "Smallest and largest factor of the size to which training frames are resized."},
    )
    color_jitter: float = field(
        default=0.8, metadata={"help": "Probability to change a training clip's brightness, contrast and colour."}
    )
    grayscale: float = field(default=0.1, metadata={"help": "Probability to drop a training clip's colour."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate as `argv` (default: the command line) says; the metrics of the run."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, training_args = parse_arguments(argv, VideoModelArguments, VideoArguments)
    model, processor, data_sets = load(model_args, data_args, training_args)
    if data_args.measure_input:
        return report_input(data_sets["train"], data_args, training_args)
    num_clips = processor.clips_to_average
    return train_and_evaluate(model, processor, data_sets, training_args, "video-classification", num_clips)


def load(model_args: VideoModelArguments, data_args: VideoArguments, training_args: MoNETrainingArguments):
    """The model, its video processor and the data sets, with one set of labels."""
    check_task(model_args, data_args, training_args)
    # An empty one takes back a recipe's.
    checkpoint, init_from = model_args.model_name_or_path or None, model_args.init_from or None
    overrides = parse_overrides(model_args.config_overrides, MoNEViViTConfig)
    if checkpoint is not None and init_from is not None:
        raise ValueError("--model_name_or_path and --init_from exclude each other: give one of them.")
    if checkpoint is None and init_from is None and not overrides:
        raise ValueError("Give --model_name_or_path, --init_from, or --config_overrides for a new model.")
    names = None
    if init_from:
        check_source(init_from, **model_args.hub)
    if checkpoint:
        # Before the data: overrides that do not fit are found at once.
        model = load_video_model(checkpoint, **model_args.hub, **overrides)
        if not training_args.do_train:
            check_classifier(model, checkpoint)
            names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    splits = load_video_datasets(
        **data_args.source(),
        video_column=data_args.video_column,
        video_dir=data_args.video_dir,
        label_names=names,
        seed=training_args.seed,
        token=model_args.token,
        cache_dir=model_args.cache_dir,
    )
    splits = prepare_splits(splits, data_args, training_args)
    labels = label_fields(splits, model_args.loss)

    if checkpoint:
        set_labels(model, **labels)
    elif init_from:
        model = mone_vivit_from_mone(load_image_model(init_from, **model_args.hub), **labels, **overrides)
    else:
        model = MoNEViViTForVideoClassification(MoNEViViTConfig(**labels, **overrides))

    start_classifier(model, model_args.head_bias, checkpoint)
    options = {"sampling": data_args.sampling, "frame_sampling_rate": data_args.frame_sampling_rate}
    options["evaluation_clips"] = data_args.num_clips
    options = {name: value for name, value in options.items() if value is not None}
    if checkpoint:
        options["num_frames"] = model.config.num_frames
        processor = AutoVideoProcessor.from_pretrained(checkpoint, **model_args.hub, **options)
        processor = fit_image_processor(processor, checkpoint, model.config)
    else:
        image_processor = None
        if init_from:
            image_processor = load_image_processor(init_from, **model_args.hub)
            image_processor = fit_image_processor(image_processor, init_from, model.config)
        processor = make_video_processor(model.config, image_processor, **options)
    if model_args.attn_implementation is not None:
        model.set_attn_implementation(model_args.attn_implementation)
    if model_args.resize is not None:
        resize_and_crop(processor, model_args.resize, as_pair(model.config.image_size))
    transforms = functools.partial(
        make_video_transforms,
        processor,
        flip=data_args.flip,
        scale_jitter=tuple(data_args.scale_jitter),
        color_jitter=data_args.color_jitter,
        grayscale=data_args.grayscale,
        randaugment_layers=data_args.randaugment_layers,
        randaugment_magnitude=data_args.randaugment_magnitude,
        as_bytes=True,
    )
    return model, processor, make_examples(model, splits, transforms, data_args, training_args)


if __name__ == "__main__":
    main()
