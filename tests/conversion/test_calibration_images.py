# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Which images of a folder are calibrated on, and how they are read."""

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import ViTImageProcessor

from mone.conversion import calibration_images
from mone.conversion.calibration_images import find_images, read_images


@pytest.fixture
def processor():
    return ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3])


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 300, 700])
def test_they_are_from_all_over_the_folder(tmp_path, count):
    for number in range(count):
        (tmp_path / f"{number:03d}.jpg").touch()
    numbers = [int(path.stem) for path in find_images(tmp_path)]
    assert len(numbers) == min(count, 256) and numbers == sorted(set(numbers))
    assert numbers[0] == 0 and numbers[-1] >= count - 1 - count / 256


def test_hidden_files_are_none_and_other_folders_are_refused(tmp_path, image):
    with pytest.raises(NotADirectoryError, match=r"needs a folder of images, and .*never is none"):
        find_images(tmp_path / "never")
    (tmp_path / "._hidden.png").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"has no images, that is files ending in .*\.jpeg, .*\.png"):
        find_images(tmp_path)
    (tmp_path / "deep").mkdir()
    image.save(tmp_path / "deep" / "one.PNG")
    assert find_images(str(tmp_path)) == [tmp_path / "deep" / "one.PNG"]


def test_inputs_are_the_processors(tmp_path, image, processor):
    image.save(tmp_path / "0.png")
    image.convert("L").save(tmp_path / "1.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "2.png", exif=exif)
    pixel_values = read_images(find_images(tmp_path), processor)
    expected = processor([image, image.convert("L").convert("RGB"), image], return_tensors="pt").pixel_values
    assert pixel_values.shape == (3, 3, 24, 24)
    torch.testing.assert_close(pixel_values, expected, atol=0, rtol=0)


def test_what_cannot_be_read_is_left_out(tmp_path, image, processor, caplog, monkeypatch):
    def fail(image):  # as Pillow does for AVIF
        raise RuntimeError("Failed to decode frame 0")

    image.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    # Grey levels that 8 bits do not hold.
    Image.fromarray(np.full((40, 40), 30_000, dtype=np.uint16)).save(tmp_path / "grey16.png")
    with pytest.raises(ValueError, match=r"None of the 2 images can be read, of which the first is .*cut\.png"):
        read_images(find_images(tmp_path), processor)
    image.save(tmp_path / "whole.png")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="None of the 3 images can be read"):
        patch.setattr(calibration_images, "as_rgb", fail)
        read_images(find_images(tmp_path), processor)
    caplog.clear()
    assert len(read_images(find_images(tmp_path), processor)) == 1
    for name in ("cut", "grey16"):
        assert f"{name}.png is left out, as it cannot be read" in caplog.text
    assert "whole.png" not in caplog.text
