"""Decoding: frames carry their number in their pixels, so that each one can be told after lossy coding."""

import io
import os
import random
import socket
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from hypothesis import given
from hypothesis import strategies as st
from videos import (
    HEIGHT,
    REAL,
    WIDTH,
    audio_only,
    make,
    make_ten_minutes,
    needs_real_videos,
    number_image,
    number_of,
    pack_b_frames,
    plain,
    remux,
    run_and_read_peaks,
    transcode,
)

from mone.video_decoding import (
    VideoDecodeError,
    VideoReader,
    clip_indices,
    dense_indices,
    uniform_indices,
)


def numbers_read(data, indices=None, **options) -> list[int]:
    with VideoReader(data, **options) as video:
        return [number_of(image) for image in video.read(np.arange(len(video)) if indices is None else indices)]


VARIABLE = np.cumsum(random.Random(0).choices([10, 33, 40, 200], k=400)).tolist()

# name -> arguments of `make`
KINDS = {
    "mp4 h264, B-frames": (90, "libx264", "mp4"),
    "mp4 h264, open groups": (
        90,
        "libx264",
        "mp4",
        {"x264-params": "keyint=24:min-keyint=24:open-gop=1:bframes=5:scenecut=0"},
    ),
    "mp4 h264, keyframes only": (90, "libx264", "mp4", {"g": "1"}),
    "mp4 h264, intra refresh": (
        90,
        "libx264",
        "mp4",
        {"x264-params": "keyint=24:intra-refresh=1:bframes=0:scenecut=0"},
    ),
    "mp4 fragments": (90, "libx264", "mp4", None, {"movflags": "frag_keyframe+empty_moov"}),
    "mp4 hevc, open groups": (
        90,
        "libx265",
        "mp4",
        {"x265-params": "keyint=30:min-keyint=30:open-gop=1:bframes=4:log-level=none:scenecut=0:pools=1"},
    ),
    "mkv h264": (90, "libx264", "matroska"),
    "mkv ffv1": (60, "ffv1", "matroska"),
    "webm vp8": (90, "libvpx", "webm"),
    "webm vp9": (90, "libvpx-vp9", "webm"),
    "webm av1": (60, "libsvtav1", "webm", {"g": "30", "preset": "12", "svtav1-params": "lp=1"}),
    "ts h264": (90, "libx264", "mpegts"),
    "ts mpeg2": (90, "mpeg2video", "mpegts", {"g": "15", "bf": "2"}),
    "mpeg program stream": (300, "mpeg2video", "mpeg", {"g": "15", "bf": "2"}),
    "avi mpeg4": (90, "mpeg4", "avi", {"g": "30", "bf": "2"}),
    "avi h264, made-up times": (90, "libx264", "avi"),
    "avi mjpeg": (90, "mjpeg", "avi", {}),
    "flv h264": (90, "libx264", "flv"),
    "raw h264, no times": (90, "libx264", "h264"),
    "gif": (40, "gif", "gif", {}),
}


@pytest.fixture(scope="session")
def videos():
    """Every kind, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = make(*KINDS[kind])
        return made[kind]

    return get


# ---- sampling ----


def test_uniform_takes_the_middles_of_equal_segments():
    assert uniform_indices(100, 4).tolist() == [12, 37, 62, 87]
    assert uniform_indices(8, 8).tolist() == list(range(8))
    assert uniform_indices(1, 3).tolist() == [0, 0, 0]


def test_uniform_repeats_evenly_where_frames_lack():
    assert uniform_indices(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_dense_places_clips():
    assert dense_indices(100, 4, 3, "start").tolist() == [0, 3, 6, 9]
    assert dense_indices(100, 4, 3).tolist() == [44, 47, 50, 53]
    firsts = {dense_indices(20, 4, 3, np.random.default_rng(seed))[0] for seed in range(300)}
    assert firsts == set(range(11))  # 10, 13, 16, 19 is the last clip that fits


def test_dense_random_start_is_reproducible():
    first, second = (dense_indices(500, 16, 2, np.random.default_rng(7)) for _ in range(2))
    assert first.tolist() == second.tolist()


def test_dense_lowers_the_stride_before_it_repeats_the_last_frame():
    assert dense_indices(13, 4, 4, "start").tolist() == [0, 4, 8, 12]
    assert dense_indices(12, 4, 4, "start").tolist() == [0, 3, 6, 9]
    assert dense_indices(4, 4, 4).tolist() == [0, 1, 2, 3]
    assert dense_indices(3, 6, 2).tolist() == [0, 1, 2, 2, 2, 2]
    assert dense_indices(3, 6, 2, np.random.default_rng(0)).tolist() == [0, 1, 2, 2, 2, 2]
    assert dense_indices(1, 1, 5).tolist() == [0]


def scenic_indices(total, num_clips, num_frames, stride):
    """dmvr's `sample_linspace_sequence` and `sample_sequence`, which Scenic's ViViT uses, for videos long enough."""
    if num_clips == 1:
        starts = [max(0, (total - num_frames * stride) // 2)]
    else:
        starts = np.linspace(0.0, max(0, total - num_frames * stride), num_clips).astype(np.int32)
    return [[start + step for step in range(0, num_frames * stride, stride)] for start in starts]


@pytest.mark.parametrize("total", [64, 65, 100, 250, 300, 1234])
@pytest.mark.parametrize("num_clips", [1, 2, 4, 8])
def test_clips_are_those_of_scenic(total, num_clips):
    assert clip_indices(total, num_clips, 32, 2).tolist() == scenic_indices(total, num_clips, 32, 2)


@given(
    total=st.integers(1, 400),
    num_clips=st.integers(1, 9),
    num_frames=st.integers(1, 40),
    stride=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_indices_are_in_range_and_in_order(total, num_clips, num_frames, stride, seed):
    clips = clip_indices(total, num_clips, num_frames, stride)
    assert clips.shape == (num_clips, num_frames) and clips.dtype == np.int64
    samples = [
        *clips,
        uniform_indices(total, num_frames),
        dense_indices(total, num_frames, stride, "start"),
        dense_indices(total, num_frames, stride, np.random.default_rng(seed)),
    ]
    for indices in samples:
        assert indices.shape == (num_frames,)
        assert indices.min() >= 0 and indices.max() < total and (np.diff(indices) >= 0).all()
        if total >= num_frames:  # nothing repeats without need
            assert len(set(indices.tolist())) == num_frames


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "8"])
def test_sampling_refuses(value):
    for call in (
        lambda: uniform_indices(value, 8),
        lambda: uniform_indices(8, value),
        lambda: dense_indices(8, value),
        lambda: dense_indices(8, 2, value),
        lambda: clip_indices(8, value, 2),
    ):
        with pytest.raises(ValueError, match=rf"={value!r} must be an integer of at least 1"):
            call()
    with pytest.raises(ValueError, match="must be 'centre', 'start' or a numpy"):
        dense_indices(8, 2, 1, value)


# ---- reading intact files ----


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_in_presentation_order(videos, kind):
    assert numbers_read(videos(kind)) == list(range(KINDS[kind][0]))


@pytest.mark.parametrize("kind", KINDS)
def test_any_indices_give_the_frames_of_a_full_decoding(videos, kind):
    total = KINDS[kind][0]
    generator = random.Random(kind)
    with VideoReader(videos(kind)) as video:
        full = video.read(np.arange(total))
        for size in (1, 1, 1, 2, 3, 5, 8, 16) * 3:
            indices = generator.choices(range(total), k=size)
            np.testing.assert_array_equal(video.read(indices), full[indices], err_msg=str(indices))
        for index in (0, total - 1, 29, 30, 31):
            np.testing.assert_array_equal(video.read([index]), full[[index]])


@pytest.mark.parametrize("kind", ["mp4 h264, B-frames", "mkv h264", "webm vp8", "webm vp9", "avi mpeg4"])
def test_pixels_are_those_of_a_plain_decoding(videos, kind):
    with VideoReader(videos(kind)) as video:
        np.testing.assert_array_equal(video.read(np.arange(len(video))), plain(videos(kind)))


@pytest.mark.parametrize("kind", ["mkv h264", "webm vp8", "webm vp9", "webm av1", "mp4 fragments", "ts h264"])
def test_the_container_reports_no_frame_count(videos, kind):
    with av.open(io.BytesIO(videos(kind))) as container:
        assert container.streams.video[0].frames == 0
    assert len(VideoReader(videos(kind))) == KINDS[kind][0]


def overwrite(data: bytes, positions, change) -> bytes:
    """The contents of some packets replaced by `change` of them."""
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for position in positions:
        assert data.count(packets[position]) == 1
        data = data.replace(packets[position], change(packets[position]))
    return data


def test_hidden_frames_do_not_count(videos):
    """VP8's alternate reference frames are packets of their own, with the show_frame bit off."""
    data = overwrite(videos("webm vp8"), [10, 44, 45], lambda packet: bytes([packet[0] & ~0x10]) + packet[1:])
    shown = [number for number in range(90) if number not in (10, 44, 45)]
    assert [number_of(image) for image in plain(data)] == shown
    assert numbers_read(data) == shown
    with VideoReader(data) as video:
        assert number_of(video.read([80])[0]) == 83
        assert video.frames_decoded < 40


@pytest.mark.parametrize("frames", [90, 5])
def test_two_frames_in_a_packet(frames):
    """XviD's and DivX's B-frames in avi, whose packets have each other's times."""
    data = pack_b_frames(make(frames, "mpeg4", "avi", {"g": "30", "bf": "2"}))
    assert [number_of(image) for image in plain(data)] == list(range(frames))
    assert numbers_read(data) == list(range(frames))
    for number in range(0, frames, 4):
        assert numbers_read(data, [number]) == [number]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_frame_rate_counts_frames_and_not_time(container):
    data = make(90, "libx264", container, times=VARIABLE)
    assert numbers_read(data) == list(range(90))
    assert numbers_read(data, [70, 3, 44]) == [70, 3, 44]


def test_variable_frame_rate_webm():
    assert numbers_read(make(60, "libvpx-vp9", "webm", times=VARIABLE), [50, 3, 44]) == [50, 3, 44]


@pytest.mark.parametrize("shift", [0, 90])  # the same times once more, or others among them
@pytest.mark.parametrize("length", [20, 90])
def test_times_that_start_again_count_as_they_come(shift, length):
    """Recordings put together byte by byte."""
    times = [shift + 40 * number for number in range(200)]
    data = make(length, "libx264", "mpegts") + make(length, "libx264", "mpegts", first=100, times=[0] * 100 + times)
    expected = [*range(length), *range(100, 100 + length)]
    assert [number_of(image) for image in plain(data)] == expected
    assert numbers_read(data) == expected
    assert numbers_read(data, [length + 15, 12]) == [115, 12]


@pytest.mark.parametrize("codec", ["ffv1", "libvpx", "libx264"])
def test_frames_at_the_same_time_all_count(codec):
    """2,000 frames a second, in a container that counts in milliseconds."""
    data = make(
        60, codec, "mov" if codec == "libx264" else "nut", {"g": "12", "bf": "0"} if codec == "libx264" else None
    )
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="matroska") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = number
            packet.time_base, packet.duration, packet.stream = Fraction(1, 2000), 1, stream
            output.mux(packet)
    data = file.getvalue()
    with av.open(io.BytesIO(data)) as container:
        assert len({packet.pts for packet in container.demux(video=0) if packet.size}) < 40
    assert numbers_read(data) == list(range(60))
    assert numbers_read(data, [31, 30, 29]) == [31, 30, 29]


def test_of_several_video_streams_the_main_one_is_read():
    """The one that players choose, and not a preview in front of it."""
    main, preview = make(60, scale=2), make(2, "mjpeg", "matroska", {}, first=2000)
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(preview)) as first,
        av.open(io.BytesIO(main)) as second,
        av.open(file, "w", format="matroska") as output,
    ):
        streams = [output.add_stream_from_template(source.streams.video[0]) for source in (first, second)]
        for source, stream in zip((first, second), streams, strict=True):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    output.mux(packet)
    assert numbers_read(file.getvalue(), [50, 3]) == [50, 3]


def test_frames_before_the_edit_list_are_not_shown():
    data = remux(make(60, options={"g": "30", "bf": "0"}), "mp4")
    with av.open(io.BytesIO(data)) as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        file = io.BytesIO()
        with av.open(file, "w", format="mp4", options={"avoid_negative_ts": "disabled"}) as output:
            stream = output.add_stream_from_template(source.streams.video[0])
            start = packets[10].pts
            for packet in packets:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, stream
                output.mux(packet)
    data = file.getvalue()
    assert [number_of(image) for image in plain(data)] == list(range(10, 60))
    assert numbers_read(data) == list(range(10, 60))
    assert numbers_read(data, [45, 0]) == [55, 10]


def test_sound_beside_the_video():
    data = make(90, audio=True)
    with VideoReader(data) as video:
        assert [number_of(image) for image in video.read([80, 0, 41])] == [80, 0, 41]


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize(
    "codec, container", [("libx264", "mp4"), ("libvpx-vp9", "webm"), ("libvpx", "webm"), ("ffv1", "matroska")]
)
def test_few_frames(total, codec, container):
    data = make(total, codec, container)
    assert numbers_read(data, dense_indices(total, 8)) == np.minimum(np.arange(8), total - 1).tolist()


def test_shapes_order_and_repetition(videos):
    with VideoReader(videos("mp4 h264, B-frames")) as video:
        clips = video.read(clip_indices(len(video), 3, 4, 2))
        assert clips.shape == (3, 4, HEIGHT, WIDTH, 3) and clips.dtype == np.uint8 and clips.flags.c_contiguous
        assert [number_of(image) for image in clips.reshape(-1, HEIGHT, WIDTH, 3)] == clip_indices(
            90, 3, 4, 2
        ).flatten().tolist()
        assert [number_of(image) for image in video.read([7, 7, 2, 7])] == [7, 7, 2, 7]
        assert video.read(5).shape == (HEIGHT, WIDTH, 3)


def test_transform_is_applied_to_each_wanted_frame_once(videos):
    calls = []

    def transform(image):
        calls.append(number_of(image))
        return image[::2, ::2, 0].astype(np.float32)

    with VideoReader(videos("mp4 h264, B-frames")) as video:
        images = video.read([9, 4, 9], transform)
    assert calls == [4, 9]
    assert images.shape == (3, HEIGHT // 2, WIDTH // 2) and images.dtype == np.float32


@pytest.mark.parametrize("indices", [[], [0.0, 1.0], [-1], [90], [0, 1000], ["1"], None, [True]])
def test_read_refuses(videos, indices):
    with VideoReader(videos("mp4 h264, B-frames")) as video, pytest.raises(ValueError, match="indices must be"):
        video.read(indices)


# ---- cost ----


@pytest.fixture(scope="session")
def ten_minutes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    make_ten_minutes(folder, ("mp4", "matroska", "mpegts"))
    return folder


@pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "long.ts"])
def test_a_long_video_is_not_decoded_whole(ten_minutes, name, monkeypatch):
    with VideoReader(ten_minutes / name) as video:
        assert len(video) == 15_000 and video.frames_decoded == 0
        # Nor read from its beginning.
        monkeypatch.setattr(video, "_open", lambda: pytest.fail("could not seek"))
        indices = dense_indices(len(video), 32, 2)
        assert [number_of(image) for image in video.read(indices)] == (indices % 250).tolist()
        assert video.frames_decoded <= 64 + 30 + 8  # the clip, up to a group before it, and what the decoder reorders

        before = video.frames_decoded
        indices = uniform_indices(len(video), 32)
        assert [number_of(image) for image in video.read(indices)] == (indices % 250).tolist()
        assert video.frames_decoded - before <= 32 * (30 + 8)


@pytest.mark.parametrize(
    "kind, group",
    [("mp4 h264, keyframes only", 1), ("webm vp9", 30), ("mp4 h264, open groups", 24), ("mp4 hevc, open groups", 30)],
)
def test_a_single_frame_costs_its_group_at_most(videos, kind, group):
    with VideoReader(videos(kind)) as video:
        for index in range(90):
            before = video.frames_decoded
            video.read([index])
            # Frames before a keyframe that are stored behind it cost the group before as well.
            assert video.frames_decoded - before <= group + 8, index


def test_sparse_frames_of_a_video_of_keyframes_cost_one_each(videos):
    with VideoReader(videos("mp4 h264, keyframes only")) as video:
        video.read([0, 20, 40, 60, 80])
        assert video.frames_decoded == 5


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from video_decoding import VideoReader, clip_indices
for name in sys.argv[2:]:
    with VideoReader(name) as video:
        video.read(clip_indices(len(video), 8, 32, 2))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_length(ten_minutes):
    source = Path(sys.modules[VideoReader.__module__].__file__).parent
    names = [ten_minutes / "short.mp4", ten_minutes / "long.mp4", ten_minutes / "long.mkv"]
    # By path, not as a package, which would bring torch.
    peaks = run_and_read_peaks(MEMORY, source, *names)
    assert len(peaks) == 3 and peaks[-1] - peaks[0] < 300, peaks


# ---- sources ----


def test_all_sources_agree(videos, tmp_path):
    data = videos("webm vp9")
    path = tmp_path / "a file, ü.webm"
    path.write_bytes(data)

    class Stream(io.RawIOBase):
        """Cannot seek, as a network response."""

        def __init__(self):
            self.file = io.BytesIO(data)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.file.readinto(buffer)

    with open(path, "rb") as file, open(os.fsencode(path), "rb") as half_read:
        half_read.read(1000)
        sources = [
            path,
            str(path),
            data,
            bytearray(data),
            memoryview(data),
            io.BytesIO(data),
            file,
            half_read,
            Stream(),
        ]
        for source in sources:
            assert numbers_read(source, [40, 7]) == [40, 7], source
        assert not file.closed


@pytest.mark.parametrize("name", ["clip.webm", "http:clip.webm", "%03d.webm"])  # neither protocol nor pattern
def test_relative_path(videos, tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(videos("webm vp9"))
    monkeypatch.chdir(tmp_path)
    assert numbers_read(name, [3]) == [3]


@pytest.mark.parametrize("source", [None, 3, ["a.mp4"], np.zeros((2, 4, 4, 3))])
def test_other_sources_are_refused(source):
    with pytest.raises(TypeError, match="must be a path, bytes or a binary file object"):
        VideoReader(source)


# ---- orientation ----

# What a player does to the stored image -> the matrix (a, b, c, d) with x' = a x + c y, y' = b x + d y.
ORIENTATIONS = {
    "none": ((1, 0, 0, 1), lambda image: image),
    "quarter turn left": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "half turn": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "quarter turn right": ((0, 1, -1, 0), lambda image: np.rot90(image, 3)),
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "upside down, mirrored": ((1, 0, 0, -1), lambda image: image[::-1]),
    "transposed": ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
    "transposed the other way": ((0, -1, -1, 0), lambda image: np.rot90(image, 2).transpose(1, 0, 2)),
}


def with_matrix(data: bytes, a, b, c, d) -> bytes:
    """Writes the display matrix into an mp4's track header."""
    old = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    new = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    start = data.index(old, data.index(b"tkhd"))
    return data[:start] + new + data[start + len(new) :]


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_display_matrix(videos, name):
    matrix, turn = ORIENTATIONS[name]
    data = videos("mp4 h264, B-frames")
    with VideoReader(with_matrix(data, *matrix)) as video:
        images = video.read([5, 77])
    stored = plain(data)
    np.testing.assert_array_equal(images, np.stack([turn(stored[5]), turn(stored[77])]))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_rotation_metadata(videos, container):
    data = remux(videos("mp4 h264, B-frames"), container, rotation=90)
    with av.open(io.BytesIO(data)) as source:
        assert next(source.decode(video=0)).rotation == 90  # counter-clockwise
    with VideoReader(data) as video:
        image = video.read([33])[0]
    assert image.shape == (WIDTH, HEIGHT, 3) and number_of(np.rot90(image, -1)) == 33


def test_frames_that_change_size_are_scaled_to_the_first():
    small, large = make(30, "libvpx", "webm"), make(30, "libvpx", "webm", scale=2, first=30)
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as output:
        stream = None
        for part, data in enumerate((small, large)):
            with av.open(io.BytesIO(data)) as source:
                stream = stream or output.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + part * 1200, packet.dts + part * 1200
                        packet.stream = stream
                        output.mux(packet)
    with VideoReader(file.getvalue()) as video:
        images = video.read(np.arange(60))
        assert images.shape[1:] == (HEIGHT, WIDTH, 3) and [number_of(image) for image in images] == list(range(60))


# ---- files that are no video ----


def test_audio_only(tmp_path):
    path = tmp_path / "sound.m4a"
    path.write_bytes(audio_only())
    with pytest.raises(VideoDecodeError, match=r"sound\.m4a: has no video stream, only audio"):
        VideoReader(path)


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w", format="mp3") as output:
        sound = output.add_stream("libmp3lame", rate=44100)
        cover = output.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        output.mux(cover.encode(av.VideoFrame.from_ndarray(number_image(1), format="rgb24")))
        output.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(sound.encode(frame))
        output.mux(sound.encode())
    with av.open(str(path)) as container:
        assert container.streams.video
    with pytest.raises(VideoDecodeError, match=r"song\.mp3: has no video stream, only audio, video"):
        VideoReader(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.mp4", b"", "not a video"),
        ("zeros.webm", bytes(5000), "not a video"),
        ("text.mp4", b"not a video at all\n" * 50, "not a video"),
        ("notes.txt", b"the library would draw this\n" * 50, "a text file"),
        ("noise.avi", random.Random(0).randbytes(20_000), "not a video"),
    ],
)
def test_not_a_video(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(VideoDecodeError, match=rf"{name}: {message}.* no frame could be read"):
        VideoReader(path)
    if name != "notes.txt":
        with pytest.raises(VideoDecodeError, match="given: not a video"):
            VideoReader(content, name="given")


def test_paths_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for a writer
    for path in (tmp_path, tmp_path / "pipe.mp4", tmp_path / "missing.mp4", "http://127.0.0.1:9/a.mp4"):
        with pytest.raises(VideoDecodeError, match="there is no such file, or it is not a regular file") as error:
            VideoReader(path)
        assert str(path) in str(error.value) and isinstance(error.value, ValueError)


def test_a_session_description_does_not_wait_for_the_network():
    description = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    with pytest.raises(VideoDecodeError, match="not a video"):
        VideoReader(description + b"a=rtpmap:96 H264/90000\n")


def test_a_playlist_does_not_reach_for_the_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/part.ts"
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{url}\n#EXT-X-ENDLIST\n".encode()
        path = tmp_path / "list.m3u8"
        path.write_bytes(playlist)
        for source in (path, playlist):
            with pytest.raises(VideoDecodeError):
                VideoReader(source)
        with pytest.raises(TimeoutError):
            server.accept()


def test_titles_in_unknown_encodings(videos):
    data = remux(videos("webm vp9"), "webm", options={})
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="webm") as output:
        output.metadata["title"] = "TITLETITLE"
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    data = file.getvalue()
    assert b"TITLETITLE" in data
    assert numbers_read(data.replace(b"TITLETITLE", b"\xff\xfe\xe4TITLE\xff\xff"), [4]) == [4]


# ---- damaged files ----


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("kind", ["mp4 h264, B-frames", "mkv h264", "webm vp8", "webm vp9", "ts h264", "avi mpeg4"])
def test_cut_off(videos, kind, share):
    data = videos(kind)[: int(len(videos(kind)) * share)]
    try:
        numbers = numbers_read(data, name="cut.video")
    except VideoDecodeError as error:
        assert str(error).startswith("cut.video: ") and "could be read" in str(error)
        # mp4 has its header, with everything needed to read it, at the end; avi promises a number of frames.
        assert kind.startswith("mp4") or share <= 0.3
    else:
        # A B-frame and its neighbours are stored out of order, so that the cut leaves gaps near the end.
        assert numbers[:-3] == list(range(len(numbers)))[:-3] and numbers == sorted(set(numbers)) and numbers


def test_cut_off_with_the_header_in_front(tmp_path):
    path = tmp_path / "faststart.mp4"  # in memory the library cannot put it there
    data = make(90, container_options={"movflags": "faststart"}, file=str(path))
    start = data.index(b"mdat")
    for share in (0.3, 0.8):
        cut = data[: start + int((len(data) - start) * share)]
        if share < 0.5:
            with pytest.raises(VideoDecodeError, match=r"truncated or damaged; only \d+ of 90 frames could be read"):
                VideoReader(cut)
        else:
            numbers = numbers_read(cut)
            assert 45 <= len(numbers) < 90 and numbers[:45] == list(range(45))


def damaged(data: bytes, positions) -> bytes:
    """The contents of some packets erased."""
    return overwrite(data, positions, lambda packet: bytes(len(packet)))


def test_a_frame_that_cannot_be_decoded_is_replaced_by_the_wanted_one_before():
    data = damaged(make(40, "mjpeg", "avi", {}), [10, 11, 30])
    assert len(VideoReader(data)) == 40
    assert numbers_read(data, range(8, 14)) == [8, 9, 9, 9, 12, 13]
    assert numbers_read(data, [30, 31, 11, 5]) == [5, 31, 5, 5]
    assert numbers_read(data, [10, 20]) == [20, 20]


def test_too_many_frames_that_cannot_be_decoded():
    data = damaged(make(40, "mjpeg", "avi", {}), range(5, 40))
    assert numbers_read(data, range(10)) == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]
    with VideoReader(data, name="bad.avi") as video:
        with pytest.raises(VideoDecodeError, match=r"^bad\.avi: damaged; only 5 of 11 frames could be decoded"):
            video.read(np.arange(11))
        with pytest.raises(VideoDecodeError, match=r"only 0 of 1 frames could be decoded"):
            video.read([20])


def test_damage_in_one_group_leaves_the_others(videos):
    data = damaged(videos("webm vp9"), [30])  # the second keyframe
    assert len(VideoReader(data)) == 90
    assert numbers_read(data, [5, 25, 70, 85]) == [5, 25, 70, 85]


@pytest.mark.parametrize(
    "kind",
    [
        "mp4 h264, B-frames",
        "mp4 fragments",
        "mkv h264",
        "webm vp8",
        "webm vp9",
        "webm av1",
        "ts h264",
        "avi mpeg4",
        "gif",
    ],
)
def test_random_damage_gives_frames_or_a_clear_error(videos, kind):
    generator = random.Random(kind)
    for _ in range(25):
        data = bytearray(videos(kind))
        start = generator.randrange(len(data))
        stop = min(len(data), start + generator.randrange(1, len(data) // 3))
        damage = generator.choice(["flip", "erase", "drop"])
        if damage == "flip":
            for place in generator.choices(range(len(data)), k=generator.choice([1, 10, 300])):
                data[place] = generator.randrange(256)
        elif damage == "erase":
            data[start:stop] = bytes(stop - start)
        else:
            del data[start:stop]
        try:
            with VideoReader(data, name="broken.file") as video:
                images = video.read(clip_indices(len(video), 2, 8, 2))
                assert images.shape[:2] == (2, 8) and images.dtype == np.uint8
                # Never more than: once to count, once by groups, once from the start.
                assert video.frames_decoded <= 3 * 130
        except VideoDecodeError as error:
            assert str(error).startswith("broken.file: ")


def test_colours_that_do_not_exist(videos):
    """Damage, or sloppy encoders: reserved numbers in the stream's colour description."""
    data = videos("mkv h264")
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="matroska") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        change = BitStreamFilterContext(
            "h264_metadata=matrix_coefficients=3:transfer_characteristics=3:colour_primaries=3",
            source.streams.video[0],
        )
        for packet in source.demux(video=0):
            for changed in change.filter(packet if packet.size else None):
                changed.stream = stream
                output.mux(changed)
    assert numbers_read(file.getvalue(), [60, 2]) == [60, 2]


# ---- real files ----


@needs_real_videos
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
class TestRealFiles:
    def test_mp4(self, path):
        full = plain(path.read_bytes())
        with VideoReader(path) as video:
            assert len(video) == len(full)
            for indices in (uniform_indices(len(full), 8), dense_indices(len(full), 16, 3), [len(full) - 1, 0]):
                np.testing.assert_array_equal(video.read(indices), np.stack([full[index] for index in indices]))

    def test_mkv_and_rotated(self, path):
        data = path.read_bytes()
        with VideoReader(path) as video:
            wanted = uniform_indices(len(video), 5)
            images, total = video.read(wanted), len(video)
        with VideoReader(remux(data, "matroska")) as video:
            assert len(video) == total
            np.testing.assert_array_equal(video.read(wanted), images)
        with VideoReader(remux(data, "mp4", rotation=-90)) as video:
            np.testing.assert_array_equal(video.read(wanted), np.rot90(images, -1, axes=(1, 2)))

    def test_webm(self, path):
        data = transcode(path, 60)
        full = plain(data)
        with VideoReader(data) as video:
            assert len(video) == 60
            np.testing.assert_array_equal(video.read([41, 59, 7]), np.stack([full[index] for index in (41, 59, 7)]))

    def test_truncated(self, path):
        data = path.read_bytes()
        for share in (0.2, 0.6, 0.9):
            try:
                with VideoReader(data[: int(len(data) * share)], name=path.name) as video:
                    assert video.read(uniform_indices(len(video), 4)).shape[0] == 4
            except VideoDecodeError as error:
                assert path.name in str(error)
