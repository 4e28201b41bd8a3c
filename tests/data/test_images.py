"""Image data sets and their transforms."""

import numpy as np
import pytest
import torch
from pictures import picture, write_folder
from PIL import Image as PILImage
from torchvision.transforms import v2
from transformers import ViTImageProcessor

from mone.conversion import resize_and_crop
from mone.data import LabelledExamples, collate_examples, load_image_datasets, make_image_transforms
from mone.training.signals import protect_workers


def test_folders(tmp_path, cache):
    splits = load_image_datasets(
        train_dir=write_folder(tmp_path / "train", ["cat", "dog", "emu"]),
        validation_dir=write_folder(tmp_path / "validation", ["dog", "emu"], per_class=1, mode="L"),
        cache_dir=cache,
    )
    assert {name: len(split) for name, split in splits.items()} == {"train": 9, "validation": 2}
    # The validation folder lacks a class: its numbers must still be those of the training set.
    assert splits["validation"].features["label"].names == ["cat", "dog", "emu"]
    assert sorted(splits["validation"]["label"]) == [1, 2]
    assert splits["validation"][0]["image"].mode == "L"
    transform = make_image_transforms(ViTImageProcessor(size={"height": 8, "width": 8}), (8, 8), train=True)
    assert transform(splits["validation"][0]["image"]).shape == (3, 8, 8)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_grey_levels_than_bytes_hold_are_refused(train, mode):
    """Pillow's conversion makes them black and white."""
    levels = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    image = PILImage.fromarray(np.arange(120, dtype=levels).reshape(10, 12) * 300)
    assert image.mode == mode
    transform = make_image_transforms(ViTImageProcessor(size={"height": 8, "width": 8}), (8, 8), train=train)
    with pytest.raises(ValueError, match=f"mode {mode!r}, grey levels of more than 8 bits"):
        transform(image)


def test_a_file_that_cannot_be_read_is_named(tmp_path, caplog, cache):
    folder = write_folder(tmp_path / "train", ["cat", "dog"])
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no image")
    split = load_image_datasets(train_dir=folder, cache_dir=cache)["train"]
    data = LabelledExamples(split, make_image_transforms(ViTImageProcessor(), (8, 8), train=False))
    for row in range(len(data)):
        data[row]
    (message,) = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert f" ({tmp_path / 'train' / 'dog' / '1.png'}) is skipped, as it cannot be read" in message


@pytest.mark.parametrize("min_crop", [-0.5, 0, 2])
def test_a_crop_that_is_no_share_of_the_image_makes_no_image_unreadable(min_crop):
    with pytest.raises(ValueError, match=rf"min_crop={min_crop} must be a share"):
        make_image_transforms(ViTImageProcessor(), (8, 8), train=True, min_crop=min_crop)


def test_evaluation_sees_what_the_image_processor_makes():
    processor = ViTImageProcessor(size={"height": 32, "width": 24}, do_normalize=False)
    image = picture(0, size=(48, 40))
    expected = processor(images=image, return_tensors="pt").pixel_values[0]
    assert torch.equal(make_image_transforms(processor, (32, 24), train=False)(image), expected)


def test_training_keeps_the_processors_resampling_and_normalisation():
    """With the whole image as the only possible crop, training differs from evaluation by nothing."""
    image = picture(0, size=(48, 48))
    for options in ({}, {"do_normalize": False}, {"resample": 0, "image_mean": [0.1, 0.2, 0.3]}):
        processor = ViTImageProcessor(size={"height": 32, "width": 32}, **options)
        augment = make_image_transforms(processor, (32, 32), train=True, flip=False, min_crop=1.0)
        torch.manual_seed(0)
        crops = [augment(image) for _ in range(200)]
        expected = processor(images=image, return_tensors="pt").pixel_values[0]
        assert min((crop - expected).abs().max() for crop in crops) < 0.02, options


def test_training_transform_flips_only_when_asked():
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    image = PILImage.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 4, 8))
    for flip, sides in ((True, {True, False}), (False, {True})):
        augment = make_image_transforms(processor, (8, 8), train=True, flip=flip, min_crop=1.0)
        torch.manual_seed(0)
        pixels = [augment(image) for _ in range(30)]
        assert {bool(x[0, 4, 0] > x[0, 4, 7]) for x in pixels if x[0, 4, 0] != x[0, 4, 7]} == sides


def test_workers_that_are_spawned(tmp_path, cache):
    """As on macOS and Windows, where they get the data set pickled."""
    split = load_image_datasets(train_dir=write_folder(tmp_path / "train", "ab"), cache_dir=cache)["train"]
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    training, evaluation = (
        LabelledExamples(split, make_image_transforms(processor, (8, 8), train=train), train=train)
        for train in (True, False)
    )
    data = torch.utils.data.ConcatDataset([training, evaluation])
    loader = torch.utils.data.DataLoader(
        data, batch_size=len(data), collate_fn=collate_examples, num_workers=1, multiprocessing_context="spawn"
    )
    (batch,) = protect_workers(loader)
    assert torch.equal(batch["pixel_values"], torch.stack([example["pixel_values"] for example in data]))


def test_an_evaluation_resized_and_cropped_is_torchvisions():
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    resize_and_crop(processor, 48, (32, 32))
    image = picture(0, size=(90, 60))
    got = make_image_transforms(processor, (32, 32), train=False)(image)
    pixels = v2.functional.pil_to_tensor(image)
    expected = v2.functional.center_crop(v2.functional.resize(pixels, [48], antialias=True), [32, 32])
    assert (got * 0.5 + 0.5 - expected / 255).abs().max() <= 1 / 255 + 1e-6
    with pytest.raises(ValueError, match="resize=31 must be at least the image size 32"):
        resize_and_crop(processor, 31, (32, 32))
