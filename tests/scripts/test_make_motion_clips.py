"""The motion data set maker: what the files hold, and runs that stop or are wrongly called. Frames: test_motion.py."""

import csv
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import make_motion_clips as script  # noqa: E402
from motion import CLASSES, PAIRS, render_clip  # noqa: E402


@pytest.fixture(scope="module")
def photographs():
    """24 parts of scikit-learn's two photographs."""
    parts = []
    for photograph in load_sample_images().images:
        for top in range(0, 400, 134):
            for left in range(0, 600, 160):
                parts.append(Image.fromarray(photograph[top : top + 134, left : left + 160]))
    return parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photographs):
    folder = tmp_path_factory.mktemp("photographs")
    for number, photograph in enumerate(photographs):
        (folder / str(number % 3)).mkdir(exist_ok=True)
        photograph.save(folder / str(number % 3) / f"{number}.{'png' if number % 2 else 'JPG'}", format="png")
    return folder


def as_png(photograph):
    file = io.BytesIO()
    photograph.save(file, format="png")
    return file.getvalue()


def arguments(folder, output_dir, clips=2, validation=1, **more):
    options = {"clips_per_class": clips, "validation_clips_per_class": validation, "size": 16, "frames": 4, **more}
    named = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return ["--images", str(folder), "--output_dir", str(output_dir), *named]


def contents(output_dir):
    files = sorted(path for path in output_dir.rglob("*") if path.is_file())
    return {str(path.relative_to(output_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# What the files hold


def test_the_files(tmp_path, folder, capsys):
    output = tmp_path / "out"
    script.main(arguments(folder, output, size=32, frames=7, fps=5))
    assert "16 clips of 8 classes" in capsys.readouterr().out

    for split, count in (("train", 2), ("validation", 1)):
        rows = list(csv.DictReader((output / split / "labels.csv").open()))
        assert sorted({row["label"] for row in rows}) == sorted(CLASSES)
        assert len(rows) == count * 8
        assert {row["path"] for row in rows} == {
            path.relative_to(output / split).as_posix() for path in (output / split).glob("*/*")
        }
        assert all(row["path"].startswith(row["label"] + "/") for row in rows)

    splits = script.split_photographs(photos := script.find_photographs(folder), seed=0)
    for number, (ending, codec) in enumerate((("mp4", "h264"), ("webm", "vp9"))):
        for pair, names in enumerate(PAIRS):
            draw = np.random.default_rng([0, 0, pair, number])
            both = script.draw_photographs(photos, splits["train"], draw, 32, set())
            source = render_clip(*both, names[0], draw, frames=7)
            halved = [av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p") for frame in source]
            halved = np.stack([frame.to_ndarray(format="rgb24") for frame in halved]).astype(float)
            decoded = [decode(output / "train" / name / f"0000{number}.{ending}") for name in names]
            assert decoded[0].shape == (7, 32, 32, 3)
            # Decoded too, the frames of a pair are the same: the encoder leaves no trace of the direction.
            np.testing.assert_array_equal(decoded[0], decoded[1][::-1])
            # Colour at half the resolution costs more than the quantiser.
            assert np.abs(decoded[0] - halved).mean() < 3
            assert np.abs(decoded[0] - source.astype(float)).mean() < 10
        with av.open(str(output / "train" / "up" / f"0000{number}.{ending}")) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name.endswith(codec)
            assert stream.average_rate == 5
            assert all(packet.is_keyframe for packet in container.demux(stream) if packet.size)


@pytest.mark.parametrize("size", [16, 50, 224])
def test_any_even_size_is_written(tmp_path, photographs, size):
    clip = render_clip(*photographs[:2], "up", np.random.default_rng(0), frames=2, size=size)
    for ending in ("mp4", "webm"):
        script.encode_clip(tmp_path / f"a.{ending}", clip, 240)
        assert decode(tmp_path / f"a.{ending}").shape == clip.shape


def test_the_same_arguments_make_the_same_files(tmp_path, folder):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        script.main(arguments(folder, tmp_path / name, seed=seed))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[path] != c[path] for path in a if not path.endswith(".csv"))


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_one_format_only(tmp_path, folder, kind):
    script.main(arguments(folder, tmp_path / "out", validation=0, format=kind))
    assert {path.suffix for path in (tmp_path / "out").glob("*/*/*")} == {f".{kind}"}
    assert not (tmp_path / "out" / "validation").exists()


def test_no_photograph_is_in_both_splits(tmp_path, monkeypatch):
    """Photographs of one colour each, some of them twice under another name."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        for copy in range(1 + number % 2):
            image = Image.new("RGB", (8, 8), (20 * number, 0, 0))
            image.save(tmp_path / "images" / f"{copy}-{number}.png")
    drawn = []
    monkeypatch.setattr(script, "render_clip", lambda *a, **k: drawn.append(a[:2]) or render_clip(*a, **k))
    script.main(arguments(tmp_path / "images", tmp_path / "out", clips=10, validation=5))

    colours = [[image.getpixel((0, 0)) for image in images] for images in drawn]
    assert len(colours) == 4 * 15
    assert all(foreground != background for foreground, background in colours)
    train, validation = ({c for both in part for c in both} for part in (colours[:40], colours[40:]))
    assert len(train) == 10
    assert len(validation) == 2
    assert not train & validation


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_a_parquet_file(tmp_path, photographs, kind):
    encoded = [as_png(photograph) for photograph in photographs]
    column = pa.array([{"bytes": b, "path": None} for b in encoded] if kind == "struct" else encoded)
    path = tmp_path / "images.parquet"
    pq.write_table(pa.table({"label": list(range(24)), "image": column, "other": column}), path, row_group_size=5)

    assert list(script.find_photographs(path, "other").values()) == encoded
    script.main([*arguments(path, tmp_path / "out"), "--image_column", "image"])
    assert len(list((tmp_path / "out").glob("train/*/*"))) == 16
    with pytest.raises(ValueError, match=r"image columns \['image', 'other'\]; name one with --image_column"):
        script.find_photographs(path)
    with pytest.raises(ValueError, match="--image_column is 'label'; allowed are"):
        script.find_photographs(path, "label")


def test_unreadable_images_are_named_and_passed_over(tmp_path, photographs, capsys):
    for number, photograph in enumerate(photographs[:6]):
        photograph.save(tmp_path / f"{number}.png")
    for number in range(6, 12):
        (tmp_path / f"{number}.jpg").write_bytes(b"no image" * number)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    # Of 12, two are for validation; the seed puts readable ones there.
    seed = next(
        seed
        for seed in range(100)
        if not {"0.png", *(f"{n}.jpg" for n in range(6, 12))}
        & set(script.split_photographs(script.find_photographs(tmp_path), seed)["validation"])
    )
    script.main(arguments(tmp_path, tmp_path / "out", clips=5, seed=seed))
    errors = capsys.readouterr().err
    assert errors.count("0.png cannot be read as an image") == 1
    assert errors.count("6.jpg cannot be read as an image") == 1
    assert len(list((tmp_path / "out").glob("train/*/*"))) == 40


def test_an_image_whose_decoder_fails_is_passed_over(photographs, monkeypatch, capsys):
    """As Pillow's for AVIF does, by a RuntimeError."""
    contents, convert = {}, Image.Image.convert
    for number, photograph in enumerate(photographs[:3]):
        photograph.save(file := io.BytesIO(), "GIF" if number == 0 else "PNG")
        contents[str(number)] = file.getvalue()

    def fail_for_gif(image, mode):
        if image.format == "GIF":
            raise RuntimeError("Failed to decode frame 0")
        return convert(image, mode)

    monkeypatch.setattr(Image.Image, "convert", fail_for_gif)
    unreadable = set()
    for seed in range(3):
        script.draw_photographs(contents, list(contents), np.random.default_rng(seed), 32, unreadable)
    assert unreadable == {"0"} and "0 cannot be read as an image" in capsys.readouterr().err


# Runs that stop, go on or are refused


def test_an_interrupted_run_goes_on(tmp_path, folder, monkeypatch):
    script.main(arguments(folder, tmp_path / "whole"))
    expected = contents(tmp_path / "whole")

    # Stopped in the middle of the 6th file.
    replace, files = Path.replace, []

    def stop(path, target):
        files.append(target)
        if len(files) == 6:
            path.write_bytes(path.read_bytes()[:500])
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            script.main(arguments(folder, tmp_path / "out"))
    stopped = contents(tmp_path / "out")
    complete = {path: digest for path, digest in stopped.items() if path.endswith((".mp4", ".webm"))}
    assert len(complete) == 5
    assert complete.items() <= expected.items()
    assert not any(path.endswith("labels.csv") for path in stopped)

    times = {path: (tmp_path / "out" / path).stat().st_mtime_ns for path in complete}
    script.main(arguments(folder, tmp_path / "out"))
    assert contents(tmp_path / "out") == expected
    assert times == {path: (tmp_path / "out" / path).stat().st_mtime_ns for path in complete}


def test_control_c_says_how_to_go_on(tmp_path, folder):
    command = [sys.executable, str(ROOT / "scripts/make_motion_clips.py"), *arguments(folder, tmp_path, clips=2000)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def listen():  # shells let what they run in the background ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=listen) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "train/left/00000.mp4").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "The same command goes on from here." in errors
    assert "Traceback" not in errors


def test_more_clips_can_be_added(tmp_path, folder, capsys):
    script.main(arguments(folder, tmp_path / "a", clips=1, validation=0))
    script.main(arguments(folder, tmp_path / "a", clips=3, validation=2))
    script.main(arguments(folder, tmp_path / "b", clips=3, validation=2))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert_refused(
        arguments(folder, tmp_path / "a", clips=2, validation=2), "8 videos more than are asked for", capsys
    )


def assert_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("clips_per_class", 0, "--clips_per_class is 0; allowed are whole numbers from 1 to"),
        ("validation_clips_per_class", -1, "--validation_clips_per_class is -1; allowed are whole numbers from 0 to"),
        ("frames", 1, "--frames is 1; allowed are whole numbers from 2 to"),
        ("size", 8, "--size is 8; allowed are whole numbers from 16 to 1024"),
        ("size", 33, "--size is 33; allowed are even numbers"),
        ("fps", 0, "--fps is 0; allowed are whole numbers from 1 to 240"),
        ("seed", -1, "--seed is -1; allowed are whole numbers from 0 to"),
        ("format", "avi", "invalid choice: 'avi'"),
    ],
)
def test_wrong_numbers_are_refused_before_any_work(tmp_path, folder, capsys, option, value, message):
    assert_refused(arguments(folder, tmp_path / "out", **{option: value}), message, capsys)
    assert not (tmp_path / "out").exists()


def test_wrong_images_are_refused_before_any_work(tmp_path, photographs, capsys):
    few, wrong, text = tmp_path / "few", tmp_path / "wrong.parquet", tmp_path / "images.txt"
    few.mkdir()
    for number in range(6):  # only three are different
        photographs[number % 3].save(few / f"{number}.png")
    wrong.write_text("no parquet")
    text.write_text("no images")
    for source, message in (
        (tmp_path / "none", "none, which does not exist"),
        (few, "few holds 3 different images; at least 4 are needed"),
        (wrong, "wrong.parquet cannot be read as a parquet file"),
        (text, "images.txt; allowed are a folder and a file that ends in .parquet"),
    ):
        assert_refused(arguments(source, tmp_path / "out"), message, capsys)
    assert not (tmp_path / "out").exists()


def test_clips_of_other_arguments_are_not_mixed(tmp_path, folder, photographs, capsys):
    script.main(arguments(folder, tmp_path / "out", clips=1))
    before = contents(tmp_path / "out")
    for option, value, was in (("size", 32, 16), ("frames", 5, 4), ("seed", 1, 0), ("format", "mp4", "both")):
        message = f"was made with --{option} {was}, which is now {value}"
        assert_refused(arguments(folder, tmp_path / "out", clips=1, **{option: value}), message, capsys)
    for number, photograph in enumerate(photographs[:5]):
        (tmp_path / "other").mkdir(exist_ok=True)
        photograph.save(tmp_path / "other" / f"{number}.png")
    assert_refused(arguments(tmp_path / "other", tmp_path / "out", clips=1), "--images 24 images", capsys)
    assert contents(tmp_path / "out") == before

    (tmp_path / "out" / "settings.json").unlink()
    assert_refused(arguments(folder, tmp_path / "out", clips=1), "holds videos of another origin", capsys)
