# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Make a MoNE of a ViT: exactly the same model at capacity 1.0, ready to be fine-tuned to smaller budgets.

    python scripts/convert.py google/vit-base-patch16-224 outputs/mone-vit-base
    python scripts/convert.py facebook/dinov2-small outputs/mone-dinov2 --calibrate photos/
    python scripts/convert.py outputs/mone-vit-base outputs/mone-video --video --config_overrides num_frames=16

SOURCE is a folder, a name on the Hub, or a file of weights: ViT, DeiT, DINO, DINOv2, CLIP and SigLIP of transformers,
timm's ViTs, Scenic's ViT, MatViT and ViViT-FE (`mone.conversion.mone_from_vit` has the list). DESTINATION appears
when everything is written, model, image processor and code; an error leaves nothing behind.
"""

import argparse
import logging
import math
import sys
import tempfile
from pathlib import Path

from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from mone import MoNEConfig, MoNEViViTConfig
from mone.conversion import (
    CALIBRATION_IMAGES,
    calibrate,
    fit_image_processor,
    load_image_model,
    load_image_model_and_processor,
    load_image_processor,
    make_video_processor,
    mone_vivit_from_mone,
)
from mone.training.command_line import parse_overrides


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def main(argv: list[str] | None = None) -> Path:
    """Convert as `argv` (default: the command line) says; the folder of the new model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, name on the Hub, or file of weights")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a DESTINATION that has files")
    parser.add_argument(
        "--config_overrides", help="config fields to set: image_size=112,router_layers=(0,3),pooling=mean,..."
    )
    parser.add_argument("--num_labels", type=int, help="classes of a new classifier (default: the source's own)")
    parser.add_argument("--video", action="store_true", help="go on to the video model, as ViViT starts from a ViT")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="IMAGES",
        help=f"folder of images, at any depth: small experts and routers are fitted to {CALIBRATION_IMAGES} of them, "
        "from all over it, before any training; nothing changes at capacity 1.0 (default: they start at random)",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub (default: %(default)s)")
    parser.add_argument("--token", help="Hub token for private models")
    parser.add_argument("--cache_dir", help="where downloads are cached")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)

    taken = args.destination.exists() and (not args.destination.is_dir() or any(args.destination.iterdir()))
    if taken and not args.overwrite:
        parser.error(f"{args.destination} has files already. Give another DESTINATION, or --overwrite.")
    overrides = parse_overrides(args.config_overrides, MoNEViViTConfig if args.video else MoNEConfig)
    if args.num_labels is not None:
        overrides["num_labels"] = args.num_labels
    hub = {"revision": args.revision, "token": args.token, "cache_dir": args.cache_dir}

    if args.video:
        image_model, image_processor = load_image_model(args.source, **hub), load_image_processor(args.source, **hub)
        fit(image_model, image_processor, args)
        model = mone_vivit_from_mone(image_model, **overrides)
        processor = make_video_processor(model.config, image_processor)
    else:
        model, processor = load_image_model_and_processor(args.source, **hub, **overrides)
        fit(model, processor, args)
    write(args.destination, model, processor)
    print(f"{args.destination}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters")
    return args.destination


def fit(model: PreTrainedModel, processor: BaseImageProcessor | None, args: argparse.Namespace) -> None:
    """Calibrate the model if the command line asks for it."""
    if args.calibrate is None:
        return
    files = sorted(path for path in args.calibrate.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{args.calibrate} has no images, that is files ending in {IMAGE_SUFFIXES}.")
    processor = fit_image_processor(processor, args.source, model.config)
    images = [Image.open(path).convert("RGB") for path in files[:: math.ceil(len(files) / CALIBRATION_IMAGES)]]
    calibrate(model, processor(images, return_tensors="pt").pixel_values)


def write(destination: Path, model: PreTrainedModel, processor) -> None:
    """Save beside the destination, and give it its name at the end."""
    destination = destination.resolve()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as folder:
        new, old = Path(folder) / "new", Path(folder) / "old"
        new.mkdir()
        model.save_pretrained(new)
        processor.save_pretrained(new)
        if destination.exists():
            destination.rename(old)
        try:
            new.rename(destination)
        except BaseException:
            if old.exists():
                old.rename(destination)
            raise


if __name__ == "__main__":
    main()
