# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Write a model card from measured results: README.md, the plot and, from a model, pictures of its routing.

    python scripts/make_model_card.py model_cards/mone-tiny-cifar10

writes the card anew from `results.json` in that folder; `mone.model_card` describes its fields. A new one starts from
the output folder of a training and a file of what only a person knows (data set, licence, limits, commands, ...):

    python scripts/make_model_card.py model_cards/mone-digits --training outputs/digits --details digits.json \\
        --images one.png two.png --capacities 0.3 0.6
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageOps
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
)

import mone  # noqa: F401 - registers the Auto classes
from mone.data.images import as_rgb
from mone.model_card import OF_TRAINING, check_pictures, check_results, results_of_training, write_model_card
from mone.visualization import draw_routed_tokens, draw_routed_video


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the card; its name is the model's")
    parser.add_argument("--training", type=Path, help="output folder of a training script, with --do_eval")
    parser.add_argument("--details", type=Path, help="JSON file with more fields of results.json")
    parser.add_argument("--images", nargs="+", help="images on which to draw the routing of --training's model")
    parser.add_argument("--video", help="the same for a video model")
    parser.add_argument("--capacities", type=float, nargs="+", default=[0.3, 0.4, 0.6], help="of these pictures")
    parser.add_argument("--validate", action="store_true", help="ask the Hub whether the card's metadata are valid")
    args = parser.parse_args(argv)
    if (args.images or args.video) and args.training is None:
        parser.error("--images and --video need the model of --training.")

    path = args.folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if args.training is not None:
        results = {field: value for field, value in results.items() if field not in OF_TRAINING}
        results |= results_of_training(args.training)
    if args.details is not None:
        results |= json.loads(args.details.read_text(encoding="utf-8"))
    check_results(results)
    drawn = draw(args)
    others = [picture for picture in results.get("pictures", []) if picture["file"] not in drawn]
    check_pictures(args.folder, others)
    # From here on, nothing is known that could stop the card.
    args.folder.mkdir(parents=True, exist_ok=True)
    for file, (figure, _) in drawn.items():
        figure.savefig(args.folder / file)
    if drawn:
        results["pictures"] = others + [{"file": file, "caption": caption} for file, (_, caption) in drawn.items()]
    if args.training is not None or args.details is not None:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    card = write_model_card(args.folder)
    if args.validate:
        card.validate()
    print(args.folder / "README.md")


def draw(args: argparse.Namespace) -> dict[str, tuple]:
    """The pictures asked for, with their captions, by the name of their file."""
    pictures = {}
    shown = f"at capacities {', '.join(f'{capacity:g}' for capacity in args.capacities)}; the rest is faded"
    if args.images:
        model = AutoModelForImageClassification.from_pretrained(args.training)
        images = [as_rgb(ImageOps.exif_transpose(Image.open(image))) for image in args.images]
        processor = AutoImageProcessor.from_pretrained(args.training)
        figure = draw_routed_tokens(model, processor, images, args.capacities)
        pictures["routed_tokens.png"] = (figure, f"Tokens that the full model took {shown}.")
    if args.video:
        model = AutoModelForVideoClassification.from_pretrained(args.training)
        processor = AutoVideoProcessor.from_pretrained(args.training)
        figure = draw_routed_video(model, processor, args.video, args.capacities)
        pictures["routed_video.png"] = (figure, f"Tokens of a clip that the full model took {shown}.")
    return pictures


if __name__ == "__main__":
    main()
