# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Make a MoNE of a ViT: exactly the same model at capacity 1.0, ready to be fine-tuned to smaller budgets.

    python scripts/convert.py google/vit-base-patch16-224 outputs/mone-vit-base
    python scripts/convert.py facebook/dinov2-small outputs/mone-dinov2 --calibrate photos/
    python scripts/convert.py outputs/mone-vit-base outputs/mone-video --video --config_overrides num_frames=16

SOURCE is a folder, a name on the Hub, or a file of weights: ViT, DeiT, DINO, DINOv2, CLIP and SigLIP of transformers,
timm's ViTs, Scenic's ViT, MatViT and ViViT-FE (`mone.conversion.mone_from_vit` has the list). DESTINATION appears
when everything is written, model, image processor and code; an error leaves nothing behind. A MoNE as SOURCE, also one
for video, gets other sizes and labels.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from transformers import AutoVideoProcessor, BaseImageProcessor, PreTrainedModel

from mone import MoNEConfig, MoNEViViTConfig, MoNEViViTForVideoClassification
from mone.conversion import (
    CALIBRATION_IMAGES,
    calibrate,
    fit_image_processor,
    load_image_model,
    load_image_model_and_processor,
    load_image_processor,
    load_video_model,
    make_video_processor,
    mone_vivit_from_mone,
)
from mone.conversion.calibration_images import find_images, read_images
from mone.conversion.channel_order import check_image_model
from mone.conversion.sources import load_config
from mone.training.command_line import parse_overrides


# Of a video model, and of the image model that it is made of.
SHARED_FIELDS = ("num_experts", "router_layers", "router_type", "num_attention_heads", "hidden_act", "layer_norm_eps")


def main(argv: list[str] | None = None) -> Path:
    """Convert as `argv` (default: the command line) says; the folder of the new model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, name on the Hub, or file of weights")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in DESTINATION")
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
        "from all over it, before any training; logits at capacity 1.0 stay the same (default: they start at random)",
    )
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub (default: %(default)s)")
    parser.add_argument("--token", help="Hub token for private models")
    parser.add_argument("--cache_dir", help="where downloads are cached")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)

    reason = check_destination(args.destination, args.source, args.overwrite)
    if reason:
        parser.error(reason)
    hub = {"revision": args.revision, "token": args.token, "cache_dir": args.cache_dir}
    files = None if args.calibrate is None else find_images(args.calibrate)
    kind = "file" if Path(args.source).is_file() else load_config(args.source, **hub).model_type
    # A file may hold a ViViT-FE.
    has_video = args.video or kind in ("file", "mone_vivit")
    overrides = parse_overrides(args.config_overrides, MoNEViViTConfig if has_video else MoNEConfig)
    if args.num_labels is not None:
        overrides["num_labels"] = args.num_labels

    if kind == "mone_vivit" and not args.video:
        model = load_video_model(args.source, **hub, **overrides)
        processor = AutoVideoProcessor.from_pretrained(args.source, **hub, num_frames=model.config.num_frames)
        processor = fit_image_processor(processor, args.source, model.config)
        fit(model, processor, files)
    elif args.video:
        fields = {name: overrides[name] for name in SHARED_FIELDS if name in overrides}
        image_model = load_image_model(args.source, **hub, **fields)
        if isinstance(image_model, MoNEViViTForVideoClassification):
            raise ValueError(f"{args.source} is a video model already: leave out --video.")
        image_processor = fit_image_processor(
            load_image_processor(args.source, **hub), args.source, image_model.config
        )
        fit(image_model, image_processor, files)
        model = mone_vivit_from_mone(image_model, **overrides)
        processor = make_video_processor(model.config, image_processor)
    else:
        model, processor = load_image_model_and_processor(args.source, **hub, **overrides)
        fit(model, processor, files)
    write(args.destination, model, processor)
    print(f"{args.destination}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters")
    return args.destination


def check_destination(destination: Path, source: str, overwrite: bool) -> str | None:
    """Why the destination must not be replaced; None where it may, as it is new, empty or a folder of one model."""
    if not destination.exists():
        return None
    for path in (Path(source), Path.cwd()):
        if path.exists() and path.resolve().is_relative_to(destination.resolve()):
            return f"{destination} would be replaced, and {path} with it. Give another DESTINATION."
    if not destination.is_dir():
        return f"{destination} is a file. DESTINATION is a folder."
    content = sorted(destination.iterdir())
    if not content:
        return None
    if not overwrite:
        return f"{destination} has files already. Give another DESTINATION, or --overwrite."
    folders = [path.name for path in content if path.is_dir()]
    if folders:
        return f"{destination} holds folders, which --overwrite does not remove: {folders[:5]}."
    if destination / "config.json" not in content:
        return (
            f"{destination} has no config.json, and --overwrite replaces models only. It holds "
            f"{[path.name for path in content[:5]]}."
        )
    return None


def fit(model: PreTrainedModel, processor: BaseImageProcessor, files: list[Path] | None) -> None:
    """Calibrate the model if there are files of images."""
    if files is not None:
        check_image_model(model)  # first: a video model's processor takes no images
        calibrate(model, read_images(files, processor))


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
