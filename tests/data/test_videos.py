"""Video data sets from folders and lists, and the transforms of ViViT's training."""

import json
import logging
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value, Video

from mone import MoNEViViTVideoProcessor
from mone.data import LabelledExamples, LabelledStream, load_video_datasets, make_video_transforms
from mone.pixels import bytes_to_pixels


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from make_motion_clips import encode_clip


def frames_of(seed: int, count: int = 12, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    """Smooth enough to survive compression; every frame has a brightness of its own."""
    rng = np.random.default_rng(seed)
    coarse = np.repeat(np.repeat(rng.integers(0, 120, (count, size[0] // 8, size[1] // 8, 3)), 8, 1), 8, 2)
    return (coarse + 10 * np.arange(count)[:, None, None, None]).astype(np.uint8)


def write(path: Path, seed: int = 0, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_clip(path, frames_of(seed, **options), fps=8)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for name, classes in (("train", "cat dog emu"), ("validation", "dog emu")):
        for number, label in enumerate(classes.split()):
            for i, suffix in enumerate(("mp4", "webm")):
                write(root / name / label / f"{i}.{suffix}", seed=10 * number + i)
    (root / "train" / "cat" / "notes.txt").write_text("no video")
    return root


def processor_of(**options) -> MoNEViViTVideoProcessor:
    return MoNEViViTVideoProcessor(
        **{"num_frames": 4, "frame_sampling_rate": 2, "size": 36, "crop_size": 32, **options}
    )


def test_folders_with_webm(folder):
    splits = load_video_datasets(train_dir=str(folder / "train"), validation_dir=str(folder / "validation"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 4}
    assert splits["validation"].features["label"].names == ["cat", "dog", "emu"]
    assert splits["validation"]["label"] == [1, 1, 2, 2]
    paths = [row["path"] for row in splits["train"]["video"]]
    assert sorted(paths) == sorted(str(p) for p in (folder / "train").glob("*/*.[mw][pe]*"))


def test_a_folder_without_videos(folder):
    with pytest.raises(ValueError, match=r"one folder of videos per class.*\.webm"):
        load_video_datasets(train_dir=str(folder / "train" / "cat"))


@pytest.mark.parametrize("kind", ["ssv2", "kinetics", "csv"])
def test_lists_name_files_in_another_folder(folder, tmp_path, kind, caplog):
    videos, missing = tmp_path / "videos", 1
    if kind == "ssv2":
        names = [write(videos / f"{i}.webm", seed=i) for i in range(3)]
        file = tmp_path / "train.json"
        labels = ["Doing [this]", "Doing [that]", "Doing [this]", "Doing [this]"]
        file.write_text(json.dumps([{"id": str(i), "template": label} for i, label in enumerate(labels)]))
        expected = ["Doing this", "Doing that", "Doing this"]
    elif kind == "kinetics":
        names = [write(videos / "riding_a_bike" / f"id{i}_00000{i}_00001{i}.mp4", seed=i) for i in range(2)]
        names.append(write(videos / "id2_000002_000012.mp4", seed=2))
        file = tmp_path / "train.csv"
        rows = [f"riding a bike,id{i},{i},{10 + i},train" for i in range(4)]
        file.write_text("\n".join(["label,youtube_id,time_start,time_end,split", *rows]))
        expected = ["riding a bike"] * 3
    else:
        names = [write(videos / f"{i}.mp4", seed=i) for i in range(2)] + [write(tmp_path / "elsewhere.mp4")]
        file, missing = tmp_path / "train.csv", 0
        file.write_text(f"path,label\n0.mp4,b\n./1.mp4,a\n{names[2]},a\n")
        expected = ["b", "a", "a"]
    with caplog.at_level(logging.WARNING):
        splits = load_video_datasets(train_file=str(file), video_dir=str(videos), validation_split=0)
    assert [row["path"] for row in splits["train"]["video"]] == names
    of_number = splits["train"].features["label"].int2str
    assert [of_number(label) for label in splits["train"]["label"]] == expected
    warnings = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(warnings) == missing and all("1 of the 4 videos" in message for message in warnings)


def test_a_list_beside_its_videos(folder, tmp_path):
    write(tmp_path / "a.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    splits = load_video_datasets(train_file=str(tmp_path / "list.txt"), validation_split=0)
    assert splits["train"][0]["video"] == {"path": str(tmp_path / "a.mp4"), "bytes": None}


def test_a_list_names_files_elsewhere_and_of_any_suffix(tmp_path):
    write(tmp_path / "a.mp4")
    (tmp_path / "lists").mkdir()
    (tmp_path / "a.mp4").rename(tmp_path / "lists" / "a.vid")
    write(tmp_path / "b.mp4")
    (tmp_path / "lists" / "list.csv").write_text("a.vid,x\n../b.mp4,y\n")
    splits = load_video_datasets(train_file=str(tmp_path / "lists" / "list.csv"), validation_split=0)
    paths = [row["video"]["path"] for row in splits["train"]]
    assert paths == [str(tmp_path / "lists" / "a.vid"), str(tmp_path / "lists" / ".." / "b.mp4")]


def test_a_list_without_suffixes_names_videos_and_no_previews(tmp_path):
    for number in range(20):
        write(tmp_path / f"{number}.mp4")
        (tmp_path / f"{number}.gif").touch()
    (tmp_path / "list.csv").write_text("".join(f"{number},x\n" for number in range(20)))
    splits = load_video_datasets(train_file=str(tmp_path / "list.csv"), validation_split=0)
    assert all(row["video"]["path"].endswith(".mp4") for row in splits["train"])


def test_a_list_of_nothing_that_exists(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\na.mp4,cat\n")
    with pytest.raises(ValueError, match=r"None of the 1 videos .*list\.csv.*a\.mp4"):
        load_video_datasets(train_file=str(tmp_path / "list.csv"))
    with pytest.raises(FileNotFoundError, match="no/such"):
        load_video_datasets(train_file=str(tmp_path / "list.csv"), video_dir="no/such")


def test_parquet_with_the_videos_inside(folder, tmp_path):
    paths = sorted((folder / "train" / "cat").glob("0.mp4"))
    rows = {"clip": [{"path": None, "bytes": path.read_bytes()} for path in paths], "label": ["cat"]}
    features = Features({"clip": Video(decode=False), "label": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "v.parquet"))
    options = {"train_file": str(tmp_path / "v.parquet"), "cache_dir": str(tmp_path / "cache")}
    transforms = make_video_transforms(processor_of(), train=False)
    whole = LabelledExamples(load_video_datasets(**options, validation_split=0)["train"], transforms, train=False)
    stream = LabelledStream(load_video_datasets(**options, streaming=True)["train"], transforms, train=False)
    expected = processor_of()(str(paths[0]), num_clips=8, return_tensors="pt").pixel_values[0]
    for example in (whole[0], *stream):
        assert torch.equal(example["pixel_values"], expected)
        assert example["labels"] == 0


@pytest.mark.parametrize("num_clips", [1, 3])
def test_evaluation_sees_what_the_video_processor_makes(folder, num_clips):
    video = {"path": str(folder / "train" / "cat" / "1.webm"), "bytes": None}
    pixels = make_video_transforms(processor_of(), train=False, num_clips=num_clips)(video)
    expected = processor_of()(video["path"], num_clips=num_clips, return_tensors="pt").pixel_values[0]
    assert pixels.dim() == (4 if num_clips == 1 else 5)
    assert torch.equal(pixels, expected)


def plain(processor, **options):
    return make_video_transforms(processor, train=True, flip=False, **options)


def test_training_takes_clips_at_random_times_and_places(folder):
    """Without augmentation, each is a clip that the processor would cut out of the resized video."""
    video = {"path": str(folder / "train" / "cat" / "0.mp4"), "bytes": None}
    processor = processor_of()
    whole = processor(video["path"], do_sample_frames=False, do_center_crop=False, return_tensors="pt").pixel_values[0]
    assert whole.shape == (12, 3, 36, 50)
    transform, seen = plain(processor), set()
    for seed in range(60):
        torch.manual_seed(seed)
        clip = transform(video)
        places = [
            (start, top, left)
            for start in range(6)
            for top in range(5)
            for left in range(19)
            if torch.equal(clip, whole[start : start + 8 : 2, :, top : top + 32, left : left + 32])
        ]
        assert len(places) == 1
        seen.add(places[0])
    starts, tops, lefts = (set(values) for values in zip(*seen, strict=True))
    assert starts == set(range(6)) and tops == set(range(5)) and len(lefts) > 10


def test_bytes_become_the_same_pixels(folder):
    video = {"path": str(folder / "train" / "cat" / "0.mp4"), "bytes": None}
    processor = processor_of(image_mean=[0.1, 0.2, 0.3], rescale_factor=1 / 200)
    results = []
    for as_bytes in (False, True):
        torch.manual_seed(0)
        results.append(plain(processor, color_jitter=1.0, as_bytes=as_bytes)(video))
    scale, shift = bytes_to_pixels(processor, 3)
    assert results[1].dtype == torch.uint8
    torch.testing.assert_close(results[1] * scale + shift, results[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"train": False, "num_clips": 2}, {"train": True, "color_jitter": 1.0}])
def test_transforms_reach_workers_that_are_spawned(folder, options):
    video = {"path": str(folder / "train" / "cat" / "0.mp4"), "bytes": None}
    transforms, clips = make_video_transforms(processor_of(), **options), []
    for function in (transforms, pickle.loads(pickle.dumps(transforms))):
        torch.manual_seed(0)
        clips.append(function(video))
    assert torch.equal(*clips)


def test_uniform_sampling_in_training(folder):
    video = {"path": str(folder / "train" / "cat" / "0.mp4"), "bytes": None}
    processor = processor_of(sampling="uniform", size={"height": 32, "width": 32})
    expected = processor(video["path"], return_tensors="pt").pixel_values[0]
    assert torch.equal(plain(processor)(video), expected)


def test_scale_jitter_changes_the_size_before_the_crop(folder):
    video = {"path": str(folder / "train" / "cat" / "0.mp4"), "bytes": None}
    small = processor_of(num_frames=1, size=16, crop_size=32)
    torch.manual_seed(0)
    black = [(plain(small, scale_jitter=(0.5, 2.0))(video)[0].amax(0) == -1).float().mean().item() for _ in range(30)]
    # 16 pixels on the shorter side, 22.4 on the longer, times a factor up to 2, in a crop of 32 x 32.
    assert min(black) < 0.1 and max(black) > 0.7


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"color_jitter": 1.0}, 1.0),
        ({"color_jitter": 0.4}, 0.4),
        ({"grayscale": 0.3}, 0.3),
        ({"randaugment_layers": 2, "randaugment_magnitude": 20}, 0.9),
        ({"flip": True}, 0.5),
    ],
)
def test_augmentations_are_the_same_in_all_frames(folder, tmp_path, options, share):
    """A video whose frames are equal stays one; and they happen as often as asked for."""
    frames = np.repeat(frames_of(3, count=1), 4, axis=0)
    encode_clip(tmp_path / "still.mp4", frames, fps=8)
    video = {"path": str(tmp_path / "still.mp4"), "bytes": None}
    processor = processor_of(size={"height": 32, "width": 32})
    torch.manual_seed(0)
    reference = plain(processor)(video)
    transform = make_video_transforms(processor, train=True, **{"flip": False, **options})
    changed = 0
    for seed in range(60):
        torch.manual_seed(seed)
        clip = transform(video)
        assert clip.shape == reference.shape and clip.abs().max() <= 1.01
        torch.testing.assert_close(clip, clip[:1].expand_as(clip), atol=0.02, rtol=0)
        changed += not torch.equal(clip, reference)
    assert changed / 60 == pytest.approx(share, abs=0.2)
    if "grayscale" in options:
        grey = (reference - reference[:, :1]).abs().max()
        assert grey > 0.1, "the video has colours to lose"


@pytest.mark.parametrize(
    "options",
    [
        {"scale_jitter": (1.3, 0.9)},
        {"scale_jitter": (0.0, 1.0)},
        {"color_jitter": 1.5},
        {"grayscale": -0.1},
        {"randaugment_layers": -1},
        {"randaugment_magnitude": 31},
    ],
)
def test_options_that_are_not_allowed(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_video_transforms(processor_of(), train=True, **options)


@pytest.mark.parametrize(
    ("sampling", "num_clips", "message"),
    [("dense", 0, "num_clips=0 must be an integer"), ("uniform", 4, "num_clips=4 must be 1 unless .*'uniform'")],
)
def test_clips_that_are_not_allowed_are_no_unreadable_videos(sampling, num_clips, message):
    with pytest.raises(ValueError, match=message):
        make_video_transforms(processor_of(sampling=sampling), train=False, num_clips=num_clips)


def test_a_damaged_file_is_skipped_and_counted(folder, tmp_path, caplog):
    for i in range(3):
        write(tmp_path / "t" / "cat" / f"{i}.mp4", seed=i)
    (tmp_path / "t" / "cat" / "1.mp4").write_bytes(b"\x00" * 500)
    splits = load_video_datasets(train_dir=str(tmp_path / "t"), validation_split=0)
    data = LabelledExamples(splits["train"], plain(processor_of()))
    with caplog.at_level(logging.WARNING):
        assert all(torch.isfinite(data[i]["pixel_values"]).all() for i in range(3))
    assert data.unreadable == [1]
    assert "1.mp4" in caplog.text
