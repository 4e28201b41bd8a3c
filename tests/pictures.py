# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pictures of noise, alone, in folders and in parquet files."""

import numpy as np
from datasets import Dataset, Features, Image
from PIL import Image as PILImage


def picture(seed: int, size=(12, 10), mode="RGB") -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


def write_folder(root, classes, per_class=3, mode="RGB"):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture(10 * number + i, mode=mode).save(root / name / f"{i}.png")
    return str(root)


def write_parquet(path, labels, label_feature, image_column="image", label_column="label"):
    features = Features({image_column: Image(), label_column: label_feature})
    images = [picture(i) for i in range(len(labels))]
    Dataset.from_dict({image_column: images, label_column: labels}, features=features).to_parquet(str(path))
    return str(path)
