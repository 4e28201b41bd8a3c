# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Make videos of photographs that move over other photographs, in eight classes that only time tells apart.

    python scripts/make_motion_clips.py --images train.parquet --output_dir motion \\
        --clips_per_class 1000 --validation_clips_per_class 100

writes

    motion/train/<class>/00000.mp4, 00001.webm, ...     motion/train/labels.csv (columns path and label)
    motion/validation/<class>/...                       motion/validation/labels.csv

for the classes right, left, down, up, approach, recede, rotate_clockwise and rotate_counter_clockwise. No photograph
is in both splits. A run that was stopped goes on where it was when it is started again with the same arguments.

Nothing but the order of the frames gives a class away:

- The clips of a pair of classes (right and left, ...) with the same number are the same frames in opposite order.
  Every frame is compressed alone and with the same quantiser, so this holds for the decoded frames too, bit by bit;
  an ordinary encoder would make the first frame sharper than the next, which tells where the motion began.
- The two position coordinates, the size and the angle of the moving photograph each have a phase that is uniform on a
  circle, and a class advances one of them: what leaves on one side comes in on the other, and what has approached
  comes again from afar. So at any time all eight classes have the same distribution of frames.
"""

import argparse
import csv
import hashlib
import io
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from motion import CLASSES, PAIRS, render_clip
from PIL import Image
from tqdm import tqdm

from mone.data.examples import UNREADABLE, decoding
from mone.data.images import image_suffixes
from mone.data.sources import visible_files
from mone.video_encoding import write_video


VALIDATION_SHARE = 0.2  # of the photographs
# Only keyframes (g=1) with a constant quantiser: a frame's code does not depend on its place in the clip.
ENCODERS = {
    "mp4": ("libx264", {"preset": "veryfast", "qp": "20", "g": "1"}),
    "webm": (
        "libvpx-vp9",
        {
            **{"crf": "14", "qmin": "14", "qmax": "14", "b:v": "0", "g": "1"},
            **{"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "aq-mode": "0"},
        },
    ),
}
FORMATS = {"mp4": ("mp4",), "webm": ("webm",), "both": ("mp4", "webm")}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        help="folder with images at any depth, or parquet file with an image column",
    )
    parser.add_argument("--image_column", help="of the parquet file; default: the only column of images")
    parser.add_argument("--output_dir", type=Path, required=True, help="made where it does not exist")
    parser.add_argument("--clips_per_class", type=int, default=1000, help="for training; default: %(default)s")
    parser.add_argument("--validation_clips_per_class", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--frames", type=int, default=16, help="of a clip; default: %(default)s")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels; default: %(default)s")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="both",
        help="both: mp4 (H.264) and webm (VP9) in turn; default: %(default)s",
    )
    parser.add_argument("--fps", type=int, default=8, help="frames per second; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the same arguments make the same files; default: 0")
    args = parser.parse_args(argv)
    try:
        check_numbers(args)
        photographs = find_photographs(args.images, args.image_column)
        splits = split_photographs(photographs, args.seed)
        jobs = list_jobs(args)
        check_output_dir(args, photographs, [path for job in jobs for path in job[-1]])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    make_clips(args, photographs, splits, jobs)
    for split in dict.fromkeys(job[0] for job in jobs):
        write_labels(args.output_dir / split, [path for job in jobs if job[0] == split for path in job[-1]])


def check_numbers(args: argparse.Namespace) -> None:
    limits = {
        "clips_per_class": (1, 1_000_000),
        "validation_clips_per_class": (0, 1_000_000),
        "frames": (2, 10_000),
        "size": (16, 1024),
        "fps": (1, 240),
        "seed": (0, 2**63 - 1),
    }
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            raise ValueError(f"--{name} is {getattr(args, name)}; allowed are whole numbers from {least} to {most}.")
    if args.size % 2:
        raise ValueError(f"--size is {args.size}; allowed are even numbers, as colour is stored at half the size.")


def find_photographs(path: Path, column: str | None = None) -> dict[str, Path | bytes]:
    """Name -> file or encoded bytes of the images in a folder or a parquet file, one of each set of equal ones."""
    if path.is_dir():
        files = [Path(file) for file in visible_files(path, image_suffixes())]
        of_length = defaultdict(list)
        for file in files:
            of_length[file.stat().st_size].append(file)
        first = {}  # of equal files; only files of the same length have to be read to know
        for same in of_length.values():
            for file in same:
                first.setdefault(hashlib.sha256(file.read_bytes()).digest() if len(same) > 1 else file, file)
        photographs = {str(file.relative_to(path)): file for file in sorted(first.values())}
    elif path.suffix == ".parquet" and path.is_file():
        rows = {}
        for number, content in enumerate(read_image_column(path, column)):
            if content:
                rows.setdefault(content, f"row {number}")
        photographs = {name: content for content, name in rows.items()}
    elif path.exists():
        raise ValueError(f"--images is {path}; allowed are a folder and a file that ends in .parquet.")
    else:
        raise FileNotFoundError(f"--images is {path}, which does not exist.")
    if len(photographs) < 4:
        raise ValueError(
            f"{path} holds {len(photographs)} different images; at least 4 are needed, 2 for training and 2 for "
            f"validation. Those of a folder end in {', '.join(sorted(image_suffixes()))}."
        )
    return photographs


def read_image_column(path: Path, column: str | None) -> list[bytes | None]:
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as a parquet file: {error}") from error
    # Binary, or as `datasets` writes images, a struct of bytes and path.
    kinds = {
        field.name: field.type.field("bytes").type
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        else field.type
        for field in schema
    }
    found = [name for name, kind in kinds.items() if pa.types.is_binary(kind) or pa.types.is_large_binary(kind)]
    if column is None and len(found) != 1:
        raise ValueError(f"{path} has the image columns {found}; name one with --image_column.")
    if column is not None and column not in found:
        raise ValueError(f"--image_column is {column!r}; allowed are the image columns of {path}: {found}.")
    column = column or found[0]
    values = pq.read_table(path, columns=[column])[column]
    chunks = [chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk for chunk in values.chunks]
    return [content for chunk in chunks for content in chunk.to_pylist()]


def split_photographs(photographs: dict[str, Path | bytes], seed: int) -> dict[str, list[str]]:
    """Names of the training and of the validation photographs."""
    names = list(photographs)
    order = np.random.default_rng(seed).permutation(len(names))
    held_out = max(2, round(VALIDATION_SHARE * len(names)))
    return {
        "train": [names[i] for i in order[held_out:]],
        "validation": [names[i] for i in order[:held_out]],
    }


def list_jobs(args: argparse.Namespace) -> list[tuple[str, int, int, tuple[Path, Path]]]:
    """(split, pair, number, files of the pair's two classes) for all clips; all classes grow at the same time."""
    counts = {"train": args.clips_per_class, "validation": args.validation_clips_per_class}
    formats = FORMATS[args.format]
    return [
        (
            split,
            pair,
            number,
            tuple(args.output_dir / split / c / f"{number:05d}.{formats[number % len(formats)]}" for c in PAIRS[pair]),
        )
        for split, count in counts.items()
        for number in range(count)
        for pair in range(len(PAIRS))
    ]


def check_output_dir(args: argparse.Namespace, photographs: dict[str, Path | bytes], wanted: list[Path]) -> None:
    """Refuse to mix the clips of different arguments; write the arguments down where there are none yet."""
    content = hashlib.sha256()
    for name, source in photographs.items():
        mark = source.stat().st_size if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
        content.update(f"{name}\0{mark}\n".encode())
    settings = {name: getattr(args, name) for name in ("frames", "size", "format", "fps", "seed")}
    settings["images"] = f"{len(photographs)} images (sha256 {content.hexdigest()[:16]})"

    path = args.output_dir / "settings.json"
    clips = {clip for split in ("train", "validation") for clip in args.output_dir.glob(f"{split}/*/*.*")}
    clips = {clip for clip in clips if clip.suffix[1:] in ENCODERS}
    if path.exists():
        made = json.loads(path.read_text())
        for name, value in settings.items():
            if made.get(name) != value:
                raise ValueError(
                    f"{args.output_dir} was made with --{name} {made.get(name)}, which is now {value}; "
                    "give the same or another --output_dir."
                )
    elif clips:
        raise ValueError(
            f"{args.output_dir} holds videos of another origin ({min(clips)}); give another --output_dir."
        )
    left_over = clips.difference(wanted)
    if left_over:
        raise ValueError(
            f"{args.output_dir} holds {len(left_over)} videos more than are asked for ({min(left_over)}); ask for at "
            "least as many clips or give another --output_dir."
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def make_clips(args: argparse.Namespace, photographs: dict[str, Path | bytes], splits: dict, jobs: list) -> None:
    for folder in {path.parent for job in jobs for path in job[-1]}:
        folder.mkdir(parents=True, exist_ok=True)
    unreadable: set[str] = set()
    done = sum(path.exists() for job in jobs for path in job[-1])
    with tqdm(total=2 * len(jobs), initial=done, unit="clip") as progress:
        for split, pair, number, paths in jobs:
            missing = [path for path in paths if not path.exists()]
            if not missing:
                continue
            # From these numbers alone, so that a clip does not depend on which were made before.
            rng = np.random.default_rng([args.seed, list(splits).index(split), pair, number])
            foreground, background = draw_photographs(photographs, splits[split], rng, args.size, unreadable)
            frames = render_clip(foreground, background, PAIRS[pair][0], rng, frames=args.frames, size=args.size)
            for path in missing:
                encode_clip(path, frames if path == paths[0] else frames[::-1], args.fps)
                progress.update()


def draw_photographs(
    photographs: dict[str, Path | bytes], names: list[str], rng: np.random.Generator, size: int, unreadable: set[str]
) -> list[Image.Image]:
    """Two different photographs; those that cannot be read are named once and passed over."""
    drawn = []
    for number in rng.permutation(len(names)) if len(names) < 100 else rng.choice(len(names), 100, replace=False):
        source = photographs[names[number]]
        try:
            with decoding():
                image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
                image.draft("RGB", (size, size))  # large JPEG files need not be decoded in full
                drawn.append(image.convert("RGB"))
        except UNREADABLE as error:
            if names[number] not in unreadable:
                tqdm.write(f"{names[number]} cannot be read as an image and is passed over: {error}", file=sys.stderr)
            unreadable.add(names[number])
        if len(drawn) == 2:
            return drawn
    raise ValueError(f"Less than 2 of {min(len(names), 100)} images can be read, for example not {min(unreadable)}.")


def encode_clip(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write (T, H, W, 3) uint8 frames as the video that the name's ending says; `path` exists only when complete."""
    codec, options = ENCODERS[path.suffix[1:]]
    write_video(path, frames, fps, codec, options)


def write_labels(folder: Path, paths: list[Path]) -> None:
    """labels.csv of one split: paths relative to its folder, sorted."""
    unfinished = folder / ".labels.csv.part"
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label"])
        writer.writerows(sorted((path.relative_to(folder).as_posix(), path.parent.name) for path in paths))
    unfinished.replace(folder / "labels.csv")
    print(f"{len(paths)} clips of {len(CLASSES)} classes: {folder / 'labels.csv'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from here.")
