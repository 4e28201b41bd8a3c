# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Files are read back with the library's own decoder, which has tests of its own."""

import av
import numpy as np
import pytest

from mone.video_decoding import VideoReader
from mone.video_encoding import write_video


def make_frames(number=7, height=32, width=48):
    """Blocks of 8x8 pixels, each of a random grey: 4:2:0 keeps less of colours."""
    grey = np.random.default_rng(0).integers(0, 256, (number, height // 8, width // 8, 1), dtype=np.uint8)
    return grey.repeat(8, axis=1).repeat(8, axis=2).repeat(3, axis=3)


@pytest.mark.parametrize(("ending", "codec"), [("mp4", "libx264"), ("mov", "libx264"), ("webm", "libvpx-vp9")])
def test_written_frames_are_read_back(tmp_path, ending, codec):
    frames, path = make_frames(), tmp_path / f"video.{ending}"
    write_video(path, frames, 12, codec, {"crf": "10"})
    with VideoReader(path) as reader:
        assert len(reader) == 7
        read = reader.read(range(7))
    with av.open(path) as container:
        assert container.streams.video[0].average_rate == 12
    assert read.shape == frames.shape
    assert abs(read.astype(int) - frames).mean() < 4
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_options_reach_the_encoder(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (7, 32, 48, 3), dtype=np.uint8)
    sizes = []
    for crf in ("10", "45"):
        write_video(tmp_path / "a.mp4", noise, 8, options={"crf": crf})
        sizes.append((tmp_path / "a.mp4").stat().st_size)
    assert sizes[1] < sizes[0] / 2


def test_frames_need_not_be_contiguous(tmp_path):
    frames = make_frames()
    write_video(str(tmp_path / "a.mp4"), frames[::-1, ::-1], 8)
    write_video(str(tmp_path / "b.mp4"), frames[::-1, ::-1].copy(), 8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.webm"
    path.write_bytes(b"old")
    for arguments, message in ((("libx264",), "webm"), (("no-such-codec",), "no-such-codec")):
        with pytest.raises(ValueError, match=message):
            write_video(path, make_frames(), 8, *arguments)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_file_appears_only_when_complete(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.mp4", []
    replace = type(path).replace

    def look(self, target):
        seen.extend(file.name for file in tmp_path.iterdir())
        return replace(self, target)

    monkeypatch.setattr(type(path), "replace", look)
    write_video(path, make_frames(), 8)
    assert seen == [".a.mp4.part"]
    assert path.exists()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((0, 16, 16, 3), np.uint8), "T of at least 1"),
        (np.zeros((16, 16, 3), np.uint8), "must be a uint8 array"),
        (np.zeros((2, 16, 16, 1), np.uint8), "must be a uint8 array"),
        (np.zeros((2, 16, 16, 3), np.float32), "got float32"),
        (np.zeros((2, 15, 16, 3), np.uint8), "even height and width, got 15x16"),
        (np.zeros((2, 16, 17, 3), np.uint8), "even height and width, got 16x17"),
        (np.zeros((2, 0, 16, 3), np.uint8), "even height and width, got 0x16"),
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


def test_wrong_destinations_are_refused(tmp_path):
    for fps in (0, -1, 2.5, True, "8"):
        with pytest.raises(ValueError, match="fps="):
            write_video(tmp_path / "a.mp4", make_frames(), fps)
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_video(tmp_path / "missing" / "a.mp4", make_frames(), 8)
    for name in ("a.foo", "a"):
        with pytest.raises(ValueError, match="no container format"):
            write_video(tmp_path / name, make_frames(), 8)
    assert not list(tmp_path.iterdir())
