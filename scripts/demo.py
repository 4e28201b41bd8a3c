# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""What `make demo` runs: a dense ViT becomes a MoNE on scikit-learn's handwritten digits, from training to pictures.

python scripts/demo.py [--output_dir outputs/demo]
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from train_image_classification import main as train_mone
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
    set_seed,
)

import mone
from mone.benchmark import interleaved_seconds
from mone.capacity import PAPER_GRID
from mone.conversion import mone_from_vit
from mone.data import LabelledExamples, collate_examples, load_image_datasets, make_image_transforms
from mone.plots import plot_accuracy_against_compute
from mone.visualization import draw_routed_tokens


CAPACITIES = [0.2, 0.3, 0.4, 0.6, 1.0]
BATCH_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=12, help="of the dense training; default: %(default)s")
    args = parser.parse_args()

    print("1. Handwritten digits (scikit-learn), written as folders of images")
    folders = write_digits(args.output_dir / "digits")

    print("\n2. A dense ViT, trained with transformers alone")
    dense_folder = args.output_dir / "vit"
    train_dense(dense_folder, folders, args.epochs)

    print("\n3. The same ViT as a MoNE, fine-tuned at sampled capacities (scripts/train_image_classification.py)")
    mone_folder = args.output_dir / "mone"
    config = mone_from_vit(AutoModelForImageClassification.from_pretrained(dense_folder)).config
    step_cost = statistics.mean(mone.count_macs(config, capacity) for capacity in PAPER_GRID)
    epochs = round(args.epochs * mone.count_macs(config, 1.0) / step_cost)
    print(f"{epochs} epochs cost as many multiply-accumulates as {args.epochs} of the dense ViT.")
    train_mone(
        [
            *("--model_name_or_path", str(dense_folder)),
            *("--train_dir", str(folders["train"]), "--validation_dir", str(folders["validation"])),
            *("--capacity_schedule", "uniform", "--eval_capacities", *map(str, CAPACITIES)),
            *("--do_train", "--do_eval", "--output_dir", str(mone_folder), "--flip", "false", "--min_crop", "0.6"),
            *("--num_train_epochs", str(epochs), "--learning_rate", "5e-4", "--warmup_steps", "20"),
            *("--router_learning_rate", "5e-3", "--lr_scheduler_type", "cosine", "--weight_decay", "0.05"),
            *("--per_device_train_batch_size", str(BATCH_SIZE), "--per_device_eval_batch_size", str(BATCH_SIZE)),
            *("--save_strategy", "no", "--report_to", "none", "--logging_steps", "50"),
        ]
    )

    print("\n4. Accuracy and speed at every capacity, beside the dense ViT")
    rows = compare(dense_folder, mone_folder, folders)
    print_table(rows)
    (args.output_dir / "results.json").write_text(json.dumps(rows, indent=2) + "\n")

    print("\n5. The pipeline, with a capacity for each call")
    images = sorted(folders["validation"].glob("*/*.png"))[::40][:6]
    classify = pipeline("image-classification", model=str(mone_folder), capacity=0.4)
    for capacity in (None, 0.2):
        label = "0.4, given at construction" if capacity is None else f"{capacity}, given at the call"
        options = {} if capacity is None else {"capacity": capacity}
        results = classify([str(image) for image in images], top_k=1, batch_size=4, **options)
        found = [
            f"{i.parent.name} as {r[0]['label']} ({r[0]['score']:.2f})" for i, r in zip(images, results, strict=True)
        ]
        print(f"capacity {label}: {', '.join(found)}")

    print("\n6. Pictures")
    model = AutoModelForImageClassification.from_pretrained(mone_folder)
    processor = AutoImageProcessor.from_pretrained(mone_folder)
    overlay, plot = args.output_dir / "routed_tokens.png", args.output_dir / "accuracy_against_compute.png"
    opened = [Image.open(image).convert("RGB") for image in images]
    # Not at 0.2, where Eq. 3 leaves the full model less than one token of 64.
    draw_routed_tokens(model, processor, opened, [0.3, 0.4, 0.6, 0.8], path=overlay, predictions=True)
    plot_accuracy_against_compute(rows, path=plot)
    for path in (overlay, plot, args.output_dir / "results.json", mone_folder):
        print(path)


def write_digits(folder: Path) -> dict[str, Path]:
    """1,797 digits of 8x8 pixels as RGB images of 32x32, in folders train/ and validation/ with one folder a class."""
    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    for name, images, labels in (("train", split[0], split[2]), ("validation", split[1], split[3])):
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / name / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((pixels * (255 / 16)).astype("uint8"))
            grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(path)
    return {"train": folder / "train", "validation": folder / "validation"}


def train_dense(output_dir: Path, folders: dict[str, Path], epochs: int) -> None:
    """Train and save a ViT of 1.8 M parameters on the digits."""
    set_seed(0)
    splits = load_image_datasets(train_dir=str(folders["train"]), validation_dir=str(folders["validation"]))
    names = splits["train"].features["label"].names
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=768,
        initializer_range=0.05,  # the usual 0.02 is for wider models
        image_size=32,
        patch_size=4,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    trainer = Trainer(
        model=ViTForImageClassification(config),
        args=TrainingArguments(
            output_dir=str(output_dir),
            num_train_epochs=epochs,
            learning_rate=1e-3,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            weight_decay=0.05,
            per_device_train_batch_size=BATCH_SIZE,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
        ),
        data_collator=collate_examples,
        train_dataset=LabelledExamples(
            splits["train"], make_image_transforms(processor, (32, 32), train=True, flip=False, min_crop=0.6)
        ),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()


@torch.inference_mode()
def compare(dense_folder: Path, mone_folder: Path, folders: dict[str, Path]) -> list[dict]:
    """One row for the dense ViT and one for each capacity: GMACs, accuracy and images per second."""
    dense = AutoModelForImageClassification.from_pretrained(dense_folder).eval()
    nested = AutoModelForImageClassification.from_pretrained(mone_folder).eval()
    processor = AutoImageProcessor.from_pretrained(mone_folder)
    paths = sorted(folders["validation"].glob("*/*.png"))
    images = [Image.open(path).convert("RGB") for path in paths]
    pixel_values = processor(images=images, return_tensors="pt").pixel_values
    labels = torch.tensor([nested.config.label2id[path.parent.name] for path in paths])

    models = {"dense ViT": (dense, None, {})}
    for capacity in CAPACITIES:
        models[f"MoNE {capacity:g}"] = (nested, capacity, {"capacity": capacity})
    batch = pixel_values[:BATCH_SIZE]
    seconds = interleaved_seconds(
        {name: lambda m=model, o=options: m(batch, **o) for name, (model, _, options) in models.items()}
    )
    rows = []
    for name, (model, capacity, options) in models.items():
        predicted = torch.cat([model(part, **options).logits.argmax(-1) for part in pixel_values.split(BATCH_SIZE)])
        rows.append(
            {
                "model": "MoNE" if capacity else "dense ViT",
                "capacity": capacity,
                "gmacs": mone.count_macs(nested.config, capacity or 1.0) / 1e9,
                "accuracy": (predicted == labels).float().mean().item(),
                "images_per_second": len(batch) / statistics.median(seconds[name]),
            }
        )
    return rows


def print_table(rows: list[dict]) -> None:
    dense = rows[0]
    print(f"{'model':<10} {'capacity':>8} {'GMACs':>7} {'less':>6} {'accuracy':>8} {'images/s':>8} {'faster':>6}")
    for row in rows:
        capacity = "" if row["capacity"] is None else f"{row['capacity']:g}"
        less, faster = dense["gmacs"] / row["gmacs"], row["images_per_second"] / dense["images_per_second"]
        print(
            f"{row['model']:<10} {capacity:>8} {row['gmacs']:>7.4f} {less:>5.2f}x {row['accuracy']:>8.1%} "
            f"{row['images_per_second']:>8.0f} {faster:>5.2f}x"
        )


if __name__ == "__main__":
    main()
