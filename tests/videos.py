"""Video files for the tests: made frame by frame, or from the real ones beside the repository."""

import io
import itertools
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


WIDTH, HEIGHT, BLOCK = 64, 48, 16
# Not part of the package: where there are none, the tests that need them are skipped.
REAL_FOLDER = Path(__file__).parents[2] / "shared" / "data" / "videos"
REAL = sorted(REAL_FOLDER.glob("*.mp4"))
needs_real_videos = pytest.mark.skipif(not REAL, reason=f"there are no real videos in {REAL_FOLDER}")


def number_image(number: int, scale: int = 1) -> np.ndarray:
    """12 blocks, black or white: the bits of `number`, lowest first, row by row."""
    bits = np.array([number >> bit & 1 for bit in range(12)]).reshape(3, 4)
    block = np.ones((BLOCK * scale, BLOCK * scale), int)
    return np.kron(bits, block)[..., None].repeat(3, -1).astype(np.uint8) * 200 + 25


def number_of(image: np.ndarray) -> int:
    """The number in an image of any size that `number_image` made."""
    height, width = image.shape[0] / 3, image.shape[1] / 4
    number = 0
    for bit in range(12):
        top, left = (bit // 4 + 0.25) * height, (bit % 4 + 0.25) * width
        block = image[int(top) : int(top + height / 2), int(left) : int(left + width / 2)]
        number |= int(block.mean() > 125) << bit
    return number


def make(
    number_of_frames=90,
    codec="libx264",
    container="mp4",
    options=None,
    container_options=None,
    *,
    times=None,
    scale=1,
    audio=False,
    first=0,
    file=None,
) -> bytes:
    """A video at 25 frames a second, or with frames at `times` in milliseconds."""
    if options is None:
        options = {"libx264": {"g": "30", "bf": "3", "preset": "veryfast"}}.get(codec, {"g": "30"})
    if codec.startswith("libvpx"):
        options = {"deadline": "realtime", "cpu-used": "8", "threads": "1", **options}
    file = file or io.BytesIO()
    with av.open(file, "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = WIDTH * scale, HEIGHT * scale
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            sound = output.add_stream("aac", rate=44100)
        for number in range(first, first + number_of_frames):
            frame = av.VideoFrame.from_ndarray(number_image(number, scale), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if audio:
            silence = np.zeros((1, 1024), np.float32)
            for start in range(0, 44100 * 4, 1024):
                frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 44100, start
                output.mux(sound.encode(frame))
            output.mux(sound.encode())
    return file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()


def remux(data, container="matroska", *, repeat=1, first=None, rotation=None, file=None, **open_options) -> bytes:
    """The same packets, or the `first` of them, in another container, `repeat` times one after the other."""
    file = file or io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container, **open_options) as output:
        template = source.streams.video[0]
        stream = output.add_stream_from_template(template)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        packets = [packet for packet in source.demux(template) if packet.size][:first]
        contents = [(bytes(packet), packet.pts, packet.dts, packet.duration, packet.is_keyframe) for packet in packets]
        length = max(packet.pts for packet in packets) - min(packet.pts for packet in packets)
        length += length // (len(packets) - 1)
        for turn in range(repeat):
            for content, pts, dts, duration, is_keyframe in contents:
                packet = av.Packet(content)
                packet.pts, packet.dts = pts + turn * length, dts + turn * length
                packet.duration, packet.is_keyframe = duration, is_keyframe
                packet.time_base, packet.stream = template.time_base, stream
                output.mux(packet)
    return file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()


def pack_b_frames(data) -> bytes:
    """An avi of MPEG-4 as DivX and XviD write it: each frame shown later comes with the one before it in a packet."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="avi") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        contents = [bytes(packet) for packet in source.demux(video=0) if packet.size]
        # By this a decoder knows the packets; "Lavc62.28.100" is as long.
        contents[0] = re.sub(rb"Lavc[\d.]{9}", b"DivX503b1393p", contents[0])
        kinds = [content[content.index(b"\0\0\1\xb6") + 4] >> 6 for content in contents]  # 0: I, 1: P, 2: B
        packed, number = [], 0
        while number < len(contents):
            last = number + 1
            while last < len(contents) and kinds[last] == 2:
                last += 1
            held = contents[number:last]
            # The last packet of such a group says only: no frame of its own.
            packed += [held[0] + held[1], *held[2:], b"\0\0\1\xb6\x57\xff"] if len(held) > 1 else held
            number = last
        for number, content in enumerate(packed):
            packet = av.Packet(content)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, number == 0
            output.mux(packet)
    return file.getvalue()


def transcode(path, number_of_frames, codec="libvpx-vp9", container="webm") -> bytes:
    """The first frames of a file, 160 x 96."""
    options = {"deadline": "realtime", "cpu-used": "8", "threads": "1"} if codec.startswith("libvpx") else {}
    file = io.BytesIO()
    with av.open(str(path)) as source, av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options={"g": "20", **options})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for frame in itertools.islice(source.decode(video=0), number_of_frames):
            output.mux(stream.encode(frame.reformat(160, 96, "yuv420p")))
        output.mux(stream.encode())
    return file.getvalue()


def audio_only() -> bytes:
    """An mp4 file of audio alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def make_ten_minutes(folder, containers=("mp4",)) -> None:
    """`short.mp4` of 250 frames, 320 x 240, and its packets 60 times, 15,000 frames (3.5 GB decoded), as `long.*`."""
    short = make(250, scale=5)
    (folder / "short.mp4").write_bytes(short)
    for container in containers:
        suffix = {"matroska": "mkv", "mpegts": "ts"}.get(container, container)
        (folder / f"long.{suffix}").write_bytes(remux(short, container, repeat=60))


def plain(data) -> list[np.ndarray]:
    """All frames, decoded by PyAV from the first to the last."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def run_and_read_peaks(code, *arguments) -> list[float]:
    """Runs `code`, which prints peaks of its memory, in a new process."""
    # By way of a shell, for on Linux a new process's ru_maxrss begins at the peak of the one that started it. That
    # of the tests may be larger than anything measured here.
    script = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]
