# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Evaluate an image or video model at a list of capacities, videos also with several numbers of clips.

    python scripts/evaluate_checkpoint.py --model_name_or_path outputs/digits \\
        --validation_dir outputs/demo/digits/validation --eval_capacities 0.2 0.4 1.0 --calibration \\
        --output_dir outputs/evaluation

writes results.json, from which `scripts/make_model_card.py` makes a card (with a licence in its `--details`), and a
plot of accuracy against compute. Data are given as to the training scripts; with several labels per example, accuracy
is precision@1. Nothing is fetched but what is named.
"""

import json
import logging
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import train_image_classification
import train_video_classification
from train_image_classification import ImageArguments, ImageModelArguments
from train_video_classification import VideoArguments, VideoModelArguments
from transformers import AutoConfig

from mone.data import make_video_transforms
from mone.data.sources import count_rows
from mone.model_card import PRECISION_AT_1, compute_of_clips
from mone.plots import check_matplotlib, plot_accuracy_against_compute
from mone.training import measure_accuracy
from mone.training.command_line import parse_arguments


logger = logging.getLogger(__name__)


@dataclass
class EvaluationModelArguments(VideoModelArguments, ImageModelArguments):
    """Of both, so that recipes can be given."""


@dataclass
class EvaluationArguments(VideoArguments, ImageArguments):
    """What only an evaluation has, beside what training has."""

    clips: list[int] = field(
        default_factory=list,
        metadata={"help": "Evaluate videos with each of these numbers of clips. Default: --num_clips alone."},
    )
    calibration: bool = field(default=False, metadata={"help": "Also the expected calibration error, with 15 bins."})


def main(argv: list[str] | None = None) -> dict:
    """Evaluate as `argv` (default: the command line) says; what results.json holds."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse_arguments(argv, EvaluationModelArguments, EvaluationArguments)
    if not model_args.model_name_or_path:
        raise ValueError("Give --model_name_or_path.")
    check_matplotlib()
    model_args.init_from = data_args.train_dir = None  # of a recipe
    model_args.calibrate = False
    data_args.train_file, args.do_train, args.do_eval = [], False, True
    source = model_args.model_name_or_path
    model_type = AutoConfig.from_pretrained(source, **model_args.hub).model_type
    is_video, is_mone = model_type == "mone_vivit", model_type in ("mone", "mone_vivit")
    if not is_mone:
        logger.warning("%s is no MoNE and is converted: below capacity 1.0, nothing of it has been trained.", source)
    task = train_video_classification if is_video else train_image_classification
    model, processor, data_sets = task.load(model_args, data_args, args)
    examples = data_sets["validation"]
    size = count_rows(examples.split)
    num_clips = processor.clips_to_average if is_video else 1
    rows, numbers = [], data_args.clips if is_video else []
    for number in numbers or [num_clips]:
        name = "MoNE" if is_mone else "MoNE, converted and not trained"
        if numbers:
            examples.transforms = make_video_transforms(processor, train=False, num_clips=number)
            name = f"MoNE, {number}x1"
        rows += measure_accuracy(
            model, processor, examples, args, name=name, num_clips=number, calibration=data_args.calibration
        )

    data = data_args.dataset_name or data_args.validation_dir or " ".join(data_args.validation_file)
    results = {
        "task": "video-classification" if is_video else "image-classification",
        "dataset": {
            "name": data,
            "type": data_args.dataset_name or ("folder" if data_args.validation_dir else "file"),
            "split": "validation",
            "size": size,
        },
        "rows": rows,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "commands": [shlex.join(["python", "scripts/evaluate_checkpoint.py", *argv])],
    }
    if numbers:
        results["gmacs"] = "one video, all its clips"
    elif num_clips > 1:
        results["gmacs"] = compute_of_clips(num_clips)
    if any("precision_at_1" in row for row in rows):
        results["accuracy"] = PRECISION_AT_1
    if args.should_save:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        plot_accuracy_against_compute(rows, path=folder / "accuracy_against_compute.png")
        print(json.dumps(rows, indent=2))
    return results


if __name__ == "__main__":
    main()
