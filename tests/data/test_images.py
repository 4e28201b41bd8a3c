"""Image data sets from folders and parquet files, and their transforms."""

import logging
import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from torchvision.transforms import v2
from transformers import EfficientNetImageProcessor, MobileViTImageProcessor, ViTImageProcessor

from mone.conversion import resize_and_crop
from mone.data import LabelledExamples, bytes_to_pixels, collate_examples, load_image_datasets, make_image_transforms
from mone.data.augmentation import randaugment
from mone.training.resumption import protect_workers


def picture(seed: int, size=(12, 10), mode="RGB") -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


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


def test_a_class_that_validation_lacks_is_named(tmp_path, cache, caplog):
    with caplog.at_level(logging.WARNING):
        load_image_datasets(
            train_dir=write_folder(tmp_path / "train", ["cat", "dog", "emu"], per_class=1),
            validation_dir=write_folder(tmp_path / "validation", ["dog", "emu"], per_class=1),
            cache_dir=cache,
        )
    assert "The validation set has no examples of 1 of the 3 classes: cat." in caplog.text


def test_a_class_that_only_validation_has(tmp_path, cache):
    with pytest.raises(ValueError, match=r"validation set has the classes \['fox'\].*\['cat', 'dog'\]"):
        load_image_datasets(
            train_dir=write_folder(tmp_path / "train", ["cat", "dog"]),
            validation_dir=write_folder(tmp_path / "validation", ["cat", "fox"]),
            cache_dir=cache,
        )


def test_a_class_of_one_example_may_be_held_out(tmp_path, cache):
    folder = write_folder(tmp_path / "train", ["cat", "dog"], per_class=10)
    for name in ("emu", "fox", "gnu"):
        write_folder(tmp_path / "train", [name], per_class=1)
    for seed in range(4):
        splits = load_image_datasets(train_dir=folder, seed=seed, cache_dir=cache)
        for split in splits.values():
            assert split.features["label"].names == ["cat", "dog", "emu", "fox", "gnu"]
        labels = [*splits["train"]["label"], *splits["validation"]["label"]]
        assert sorted(labels) == [0] * 10 + [1] * 10 + [2, 3, 4]
    for share in (1.0, 3, -0.1):
        with pytest.raises(ValueError, match=f"validation_split={share} must be a share"):
            load_image_datasets(train_dir=folder, validation_split=share, cache_dir=cache)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_do_not_go_together(tmp_path, cache, streaming):
    one = write_parquet(tmp_path / "one.parquet", [0, 1, 2], ClassLabel(names=["x", "y", "z"]))
    other = write_parquet(tmp_path / "other.parquet", [0, 1, 2], ClassLabel(names=["z", "x", "y"]))
    empty = write_parquet(tmp_path / "empty.parquet", [], ClassLabel(names=["x", "y", "z"]))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes((tmp_path / "one.parquet").read_bytes()[:200])
    options = {"validation_split": 0, "cache_dir": cache, "streaming": streaming}
    with pytest.raises(ValueError, match=r"other\.parquet numbers its classes otherwise than .*one"):
        load_image_datasets(train_file=[one, other], **options)
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be read as a parquet file"):
        load_image_datasets(train_file=[one, str(broken)], **options)
    with pytest.raises(ValueError, match=r"hold no rows"):
        load_image_datasets(train_file=[empty], **options)
    split = load_image_datasets(train_file=[empty, one], **options)["train"]
    assert [row["label"] for row in split] == [0, 1, 2]
    # In different sets they are renumbered.
    splits = load_image_datasets(train_file=[one], validation_file=[other], cache_dir=cache, streaming=streaming)
    assert [row["label"] for row in splits["validation"]] == [2, 0, 1]


def test_classes_of_other_columns_may_differ(tmp_path, cache):
    files = []
    for number, names in enumerate((["a", "b"], ["b", "a", "c"])):
        features = Features(
            {"image": Image(), "label": ClassLabel(names=["x", "y"]), "source": ClassLabel(names=names)}
        )
        rows = {"image": [picture(0), picture(1)], "label": [0, 1], "source": [0, 1]}
        files.append(str(tmp_path / f"{number}.parquet"))
        Dataset.from_dict(rows, features=features).to_parquet(files[-1])
    assert list(load_image_datasets(train_file=files, validation_split=0, cache_dir=cache)["train"]["label"]) == [
        *(0, 1, 0, 1),
    ]


def test_held_out_split_is_reproducible(tmp_path, cache):
    folder = write_folder(tmp_path / "train", ["cat", "dog"], per_class=10)
    splits = [load_image_datasets(train_dir=folder, validation_split=0.25, seed=3, cache_dir=cache) for _ in range(2)]
    assert [len(splits[0][name]) for name in ("train", "validation")] == [15, 5]
    pixels = [np.asarray(split["validation"][0]["image"]) for split in splits]
    assert np.array_equal(*pixels)


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([1, 0, 1], ClassLabel(names=["b", "a"]), ["b", "a"]),
        (["x", "y", "x"], Value("string"), ["x", "y"]),
        ([10, 9, 10], Value("int64"), ["9", "10"]),  # numbers in the order of numbers, not of their digits
        (["²", "1", "²"], Value("string"), ["1", "²"]),  # which is a digit, but no number
    ],
)
def test_parquet_labels_of_every_kind(tmp_path, cache, labels, feature, names):
    splits = load_image_datasets(
        train_file=write_parquet(tmp_path / "train.parquet", labels, feature),
        validation_file=write_parquet(tmp_path / "validation.parquet", labels, feature),
        cache_dir=cache,
    )
    for split in splits.values():
        assert split.features["label"].names == names
        original = [names[label] if isinstance(feature, ClassLabel) else str(label) for label in labels]
        assert [names[label] for label in split["label"]] == original
        assert np.array_equal(np.asarray(split[2]["image"]), np.asarray(picture(2)))


def test_columns_by_name_and_the_error_that_lists_them(tmp_path, cache):
    file = write_parquet(tmp_path / "t.parquet", [0, 1], ClassLabel(names=["a", "b"]), "img", "fine_label")
    splits = load_image_datasets(train_file=file, validation_split=0, label_column="fine_label", cache_dir=cache)
    assert list(splits) == ["train"]
    assert set(splits["train"].column_names) == {"image", "label"}
    with pytest.raises(ValueError, match=r"--label_column='label'.*\['img', 'fine_label'\]"):
        load_image_datasets(train_file=file, cache_dir=cache)


def test_labels_of_an_existing_model(tmp_path, cache):
    """Evaluation only: the numbers are the model's, whatever classes the folder happens to have."""
    splits = load_image_datasets(
        validation_dir=write_folder(tmp_path / "v", ["dog"]), label_names=["emu", "dog"], cache_dir=cache
    )
    assert set(splits["validation"]["label"]) == {1}


def test_sources_that_are_no_source(tmp_path, cache):
    with pytest.raises(ValueError, match="got none"):
        load_image_datasets()
    with pytest.raises(ValueError, match=r"--dataset_name.*--train_dir"):
        load_image_datasets(dataset_name="cifar10", train_dir="here")
    with pytest.raises(FileNotFoundError, match=r"no/such\.parquet does not exist"):
        load_image_datasets(train_file="no/such.parquet")


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


@pytest.mark.parametrize(
    "options",
    [{}, {"do_normalize": False}, {"image_mean": [0.1, 0.2, 0.3], "rescale_factor": 1 / 127.5}, {"do_rescale": False}],
)
def test_bytes_become_the_same_pixels(options):
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, **options)
    scale, shift = bytes_to_pixels(processor, 3)
    results = []
    for as_bytes in (False, True):
        torch.manual_seed(0)
        transform = make_image_transforms(processor, (16, 24), train=True, randaugment_layers=2, as_bytes=as_bytes)
        results.append(transform(picture(0, size=(48, 40))))
    floats, given = results
    assert given.dtype == torch.uint8 and given.shape == floats.shape == (3, 16, 24)
    torch.testing.assert_close(given * scale + shift, floats, atol=1e-6, rtol=0)
    image = picture(0, size=(32, 32))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) * scale + shift
    torch.testing.assert_close(pixels, processor(image, return_tensors="pt").pixel_values[0], atol=1e-5, rtol=1e-6)
    evaluated = make_image_transforms(processor, (32, 32), train=False, as_bytes=True)(picture(0))
    assert evaluated.dtype == torch.float32, "what an evaluation sees is the processor's own"


@pytest.mark.parametrize("as_bytes", [False, True])
def test_processors_that_do_more_to_pixels_are_refused(as_bytes):
    size = {"height": 16, "width": 16}
    for processor, message in (
        (MobileViTImageProcessor(), "MobileViTImageProcessor has do_flip_channel_order=True"),
        (EfficientNetImageProcessor(size=size, rescale_offset=True), "EfficientNetImageProcessor has rescale_offset="),
    ):
        with pytest.raises(ValueError, match=message):
            make_image_transforms(processor, (16, 16), train=True, as_bytes=as_bytes)


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


@pytest.mark.parametrize("name", ["plain/", "with [brackets]"])
def test_folder_names_as_people_type_them(tmp_path, cache, name):
    write_folder(tmp_path / name, ["cat", "dog"])
    (tmp_path / name / "stray.png").write_bytes(b"not in a class folder")
    splits = load_image_datasets(train_dir=f"{tmp_path}/{name}", validation_split=0, cache_dir=cache)
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert len(splits["train"]) == 6


def test_a_folder_without_images(tmp_path, cache):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty must be a folder that holds one folder of images per class"):
        load_image_datasets(train_dir=str(tmp_path / "empty"), cache_dir=cache)


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, None, 1], "int64"),
        ([0.0, math.nan, 1.0], "float32"),
        ([0.0, -1.0, 1.0], "float32"),
        (["a", "", "b"], "string"),
        (["a", " ", "b"], "string"),
    ],
)
def test_a_row_without_a_label(tmp_path, cache, labels, feature):
    file = write_parquet(tmp_path / "t.parquet", labels, Value(feature))
    with pytest.raises(ValueError, match=f"Row 1 of the train set has no label: {labels[1]!r}"):
        load_image_datasets(train_file=file, validation_split=0, cache_dir=cache)
    with pytest.raises(ValueError, match=f"Row 1 of .*t.parquet has no label: {labels[1]!r}"):
        load_image_datasets(train_file=file, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_two_columns_of_labels(tmp_path, cache, streaming):
    file = str(tmp_path / "two.parquet")
    label = ClassLabel(names=["a", "b"])
    Dataset.from_dict(
        {"image": [picture(0), picture(1)], "label": [0, 1], "labels": [1, 0]},
        features=Features({"image": Image(), "label": label, "labels": label}),
    ).to_parquet(file)
    options = {"train_file": file, "validation_split": 0, "cache_dir": cache, "streaming": streaming}
    with pytest.raises(ValueError, match="two columns, label and labels: say which by --label_column"):
        load_image_datasets(**options)
    split = load_image_datasets(**options, label_column="label")["train"]
    assert [row["label"] for row in split] == [0, 1]


def test_several_files_patterns_and_folders(tmp_path, cache):
    (tmp_path / "shards" / "deeper").mkdir(parents=True)
    label = ClassLabel(names=["a", "b"])
    for number, name in enumerate(["shards/train-0", "shards/train-1", "shards/deeper/train-2"]):
        write_parquet(tmp_path / f"{name}.parquet", [number % 2] * (number + 1), label)
    first, second = (str(tmp_path / "shards" / f"train-{number}.parquet") for number in (0, 1))
    for files, count in (
        ([first, second], 3),
        (str(tmp_path / "shards" / "train-*.parquet"), 3),
        (str(tmp_path / "shards"), 6),
        ([first, str(tmp_path / "shards" / "deeper")], 4),
    ):
        splits = load_image_datasets(train_file=files, validation_split=0, cache_dir=cache)
        assert len(splits["train"]) == count, files
    with pytest.raises(FileNotFoundError, match=r"test-\*\.parquet does not exist"):
        load_image_datasets(train_file=str(tmp_path / "test-*.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no parquet files"):
        load_image_datasets(train_file=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([[0, 2], [], [1]], List(ClassLabel(names=["a", "b", "c"]))),
        ([["a", "c"], [], ["b"]], List(Value("string"))),
        ([[0, 2], [], [1]], List(Value("int64"))),
    ],
)
def test_any_number_of_labels(tmp_path, cache, labels, feature):
    file = write_parquet(tmp_path / "train.parquet", labels, feature, label_column="labels")
    split = load_image_datasets(train_file=file, validation_split=0, cache_dir=cache)["train"]
    assert list(split["label"]) == [[0, 2], [], [1]]
    assert split.features["label"].feature.names == (
        ["0", "1", "2"] if feature.feature == Value("int64") else list("abc")
    )
    data = LabelledExamples(split, lambda image: torch.zeros(1), num_labels=3)
    batch = collate_examples([data[i] for i in range(3)])
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    broken = write_parquet(tmp_path / "broken.parquet", [[0], [1, None]], List(Value("int64")))
    with pytest.raises(ValueError, match="Row 1 of the train set has no label"):
        load_image_datasets(train_file=broken, validation_split=0, cache_dir=cache)


def test_images_at_any_depth_belong_to_their_first_folder(tmp_path, cache):
    """As TinyImageNet has them; what is hidden, such as a file manager's copies, is none."""
    for name in ("cat", "dog"):
        write_folder(tmp_path / "train" / name, ["images"])
    write_folder(tmp_path / "train" / ".trash", ["dog"])
    (tmp_path / "train" / "cat" / "images" / "._0.png").write_bytes(b"no image")
    (tmp_path / "train" / "cat" / "boxes.txt").write_text("0.png 0 0 8 8")
    (tmp_path / "train" / "dog" / "more").symlink_to(tmp_path / "train" / "cat" / "images")
    train = load_image_datasets(train_dir=str(tmp_path / "train"), validation_split=0, cache_dir=cache)["train"]
    assert train.features["label"].names == ["cat", "dog"]
    assert train["label"] == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert train[0]["image"].mode == "RGB"


def test_an_empty_class_folder_is_named(tmp_path, cache, caplog):
    folder = write_folder(tmp_path / "train", ["cat", "dog"])
    (tmp_path / "train" / "emu").mkdir()
    splits = load_image_datasets(train_dir=folder, validation_split=0, cache_dir=cache)
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert "the folders emu hold no images" in caplog.text


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


def test_randaugment_on_the_published_scale():
    """At 10 torchvision's operations are at full strength; larger magnitudes stay there."""
    (full,), (more,), (half,) = (randaugment(2, magnitude) for magnitude in (10, 15, 5))
    scale = full._AUGMENTATION_SPACE["Rotate"][0]
    for transform, degrees in ((full, 30), (more, 30), (half, 15)):
        assert transform.num_ops == 2
        assert scale(transform.num_magnitude_bins, 32, 32)[transform.magnitude] == degrees
    assert randaugment(0, 5) == []
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    augment = make_image_transforms(processor, (8, 8), train=True, randaugment_layers=2, randaugment_magnitude=15)
    assert augment(picture(0)).shape == (3, 8, 8)
    for layers, magnitude in ((-1, 5), (2, 31), (2, -1)):
        with pytest.raises(ValueError, match=f"randaugment_layers={layers} .*randaugment_magnitude={magnitude}"):
            make_image_transforms(
                processor, (8, 8), train=True, randaugment_layers=layers, randaugment_magnitude=magnitude
            )
