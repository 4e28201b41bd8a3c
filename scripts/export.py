# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""A trained image or video classifier as an ONNX file at one capacity, in float32 or int8.

python scripts/export.py outputs/demo/mone outputs/mone_0.4.onnx --capacity 0.4
python scripts/export.py outputs/demo/mone outputs/mone_0.4_int8.onnx --capacity 0.4 --int8
"""

import argparse
import tempfile
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
)

from mone import MoNEViViTConfig, count_macs
from mone.export import export_onnx, quantize_onnx


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name on the Hub")
    parser.add_argument("destination", type=Path, help="the file to write")
    parser.add_argument(
        "--capacity", nargs="+", type=float, help="one number, or a share for each expert; default: the model's"
    )
    parser.add_argument("--int8", action="store_true", help="quantise weights and activations of the projections")
    args = parser.parse_args(argv)
    if args.destination.is_dir():
        parser.error(f"{args.destination} is a folder: name the file to write.")
    capacity = args.capacity[0] if args.capacity and len(args.capacity) == 1 else args.capacity

    is_video = isinstance(AutoConfig.from_pretrained(args.model), MoNEViViTConfig)
    model_class = AutoModelForVideoClassification if is_video else AutoModelForImageClassification
    model = model_class.from_pretrained(args.model).float()
    try:
        processor = (AutoVideoProcessor if is_video else AutoImageProcessor).from_pretrained(args.model)
    except OSError:
        processor = None
        print("No processor beside the model: the file will not say how to normalise its input.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx") if args.int8 else args.destination
        export_onnx(model, file, capacity, processor=processor)
        if args.int8:
            quantize_onnx(file, args.destination)
    megabytes = sum(f.stat().st_size for f in args.destination.parent.glob(f"{args.destination.name}*")) / 1e6
    gmacs = count_macs(model.config, capacity) / 1e9
    print(f"{args.destination}: {megabytes:.1f} MB, {gmacs:.3g} GMACs for one input")


if __name__ == "__main__":
    main()
