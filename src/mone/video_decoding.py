# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Which frames of a video to take, and decoding them from real files with PyAV. Without torch and transformers.

A frame's *index* is its place among the frames that a file shows, in presentation order, from 0: the n-th frame that
a player would draw, however long each one stays (variable frame rate). Containers' own frame counts are not used:
webm and mkv have none, others err. One pass over the packets, without decoding, finds the frames instead.

```python
>>> with VideoReader("clip.webm") as video:
...     clips = video.read(clip_indices(len(video), 8, 32, stride=2))  # (8, 32, height, width, 3) uint8
```
"""

import bisect
import io
import itertools
import numbers
import os
from collections.abc import Callable, Iterator

import av
import numpy as np


# Below this share of readable frames, a damaged file is an error and not a shorter video.
MIN_READABLE = 0.5
# Decoding this many unwanted frames costs less than a seek.
MAX_GAP = 8
# Decoders hold back 16 frames at most: time stamps that ask for more reordering are broken.
MAX_REORDERING = 16
# Start code of a frame (ISO/IEC 14496-2, section 6.2.1).
MPEG4_FRAME = b"\0\0\1\xb6"


def uniform_indices(total: int, num_frames: int) -> np.ndarray:
    """Frames spread evenly over a video: the middles of `num_frames` segments of equal length.

    Args:
        total: frames of the video, at least 1.
        num_frames: frames to take, at least 1. Where there are more than `total`, frames repeat, evenly.

    Returns:
        (num_frames,) int64, not decreasing.

    Raises:
        ValueError: if an argument is not an integer of at least 1.
    """
    check_positive(total=total, num_frames=num_frames)
    return (2 * np.arange(num_frames) + 1) * total // (2 * num_frames)


def dense_indices(
    total: int, num_frames: int, stride: int = 1, start: str | np.random.Generator = "centre"
) -> np.ndarray:
    """One clip: `num_frames` frames, `stride` apart.

    Where the clip does not fit, `stride` is lowered to the largest that does; a video of fewer than `num_frames`
    frames is taken whole and its last frame repeated. (Scenic keeps the stride and starts over from the first frame,
    which shows the model a jump.)

    Args:
        total: frames of the video, at least 1.
        num_frames: frames to take, at least 1.
        stride: distance between them in frames, at least 1.
        start: `"centre"`: the middle clip, placed as Scenic does; `"start"`: the first; a generator: uniform among
            all that fit.

    Returns:
        (num_frames,) int64, not decreasing.

    Raises:
        ValueError: if a number is not an integer of at least 1, or `start` is none of these.
    """
    stride = _fitting_stride(total, num_frames, stride)
    if isinstance(start, np.random.Generator):
        first = int(start.integers(max(1, total - (num_frames - 1) * stride)))
    elif start in ("centre", "start"):
        first = max(0, total - num_frames * stride) // 2 if start == "centre" else 0
    else:
        raise ValueError(f"start={start!r} must be 'centre', 'start' or a numpy.random.Generator.")
    return np.minimum(first + stride * np.arange(num_frames), total - 1)


def clip_indices(total: int, num_clips: int, num_frames: int, stride: int = 1) -> np.ndarray:
    """`num_clips` clips with linearly spaced starts, the first at frame 0: Scenic's evaluation of ViViT.

    Clips overlap where the video is short. Strides that do not fit and missing frames are as in `dense_indices`.

    Args:
        total: frames of the video, at least 1.
        num_clips: clips, at least 1. A single one is the middle one, as in Scenic.
        num_frames: frames of a clip, at least 1.
        stride: distance between a clip's frames, at least 1.

    Returns:
        (num_clips, num_frames) int64.

    Raises:
        ValueError: if an argument is not an integer of at least 1.
    """
    check_positive(num_clips=num_clips)
    if num_clips == 1:
        return dense_indices(total, num_frames, stride)[None]
    stride = _fitting_stride(total, num_frames, stride)
    starts = np.linspace(0, max(0, total - num_frames * stride), num_clips).astype(np.int64)
    return np.minimum(starts[:, None] + stride * np.arange(num_frames), total - 1)


def _fitting_stride(total: int, num_frames: int, stride: int) -> int:
    check_positive(total=total, num_frames=num_frames, stride=stride)
    return max(1, min(stride, (total - 1) // max(1, num_frames - 1)))


def check_positive(**numbers_by_name: int) -> None:
    """Raise ValueError, which names it, for what is no integer of at least 1."""
    for name, value in numbers_by_name.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


class VideoDecodeError(ValueError):
    """A file cannot be used as a video. The message names it and says what is wrong and how much could be read."""


class VideoReader:
    """The frames of a video file by index, decoding no more of it than needed.

    Opening reads the packets once, without decoding, to learn which frames there are (files whose time stamps are
    missing or broken are decoded once instead, keeping nothing). Then `read` seeks to the keyframe before each wanted
    frame where that is cheaper than decoding on.

    Damaged files: frames whose data the file no longer holds (cut off) or that the container marks as corrupt do not
    count, as if the video ended or skipped there. A frame that is there and cannot be decoded is replaced by the
    nearest earlier one that `read` was asked for (else the nearest later one). Either is an error once less than half
    of the frames are readable.

    Not applied: pixel aspect ratio, deinterlacing.

    Args:
        source (`str`, `os.PathLike`, `bytes` or binary file object):
            A local file, its content, or a file object, which is read from its start and not closed; one that cannot
            seek is read into memory. URLs are the caller's to fetch.
        name (`str`, *optional*, defaults to the path or the file object's name):
            What error messages call the file.

    Attributes:
        frames_decoded (`int`): Frames decoded so far, for tests and for judging cost.

    Raises:
        VideoDecodeError: the file is missing, empty, no video, cut off before its half, has no video stream (audio
            only, cover pictures) or no decoder, or holds no frame.
        TypeError: `source` is of another type.
    """

    def __init__(self, source, *, name: str | None = None):
        if isinstance(source, (str, os.PathLike)):
            path = os.fsdecode(source)
            self.name = name or path
            # Not left to the library: it would wait on a named pipe for ever.
            if not os.path.isfile(path):
                raise VideoDecodeError(f"{self.name}: there is no such file, or it is not a regular file.")
            # With the protocol: a name such as "a:b.mp4" would be taken for one.
            self._file, self._protocols = f"file:{path}", "file"
        elif isinstance(source, (bytes, bytearray, memoryview)) or hasattr(source, "read"):
            given = getattr(source, "name", None)
            self.name = name or (given if isinstance(given, str) else f"<{type(source).__name__}>")
            if not hasattr(source, "read"):
                source = io.BytesIO(source)
            elif not (hasattr(source, "seek") and getattr(source, "seekable", lambda: True)()):
                source = io.BytesIO(source.read())
            self._file, self._protocols = source, "none"
        else:
            raise TypeError(
                f"source must be a path, bytes or a binary file object, got {type(source).__name__}: {source!r:.100}"
            )
        self._container = None
        self._size = None
        self.frames_decoded = 0
        try:
            self._open()
            self._scan()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file. A file object that was given stays open."""
        if self._container is not None:
            self._container.close()

    def __len__(self) -> int:
        """Number of frames that can be read, at least 1."""
        return self._num_frames

    def read(self, indices, transform: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        """The frames at `indices`, upright as their rotation metadata says.

        Args:
            indices: integers in [0, len(self)), of any shape, in any order. A repeated index is decoded once.
            transform: applied to each frame as soon as it is decoded, for instance to make it smaller. At no time are
                more frames in memory than the transformed ones that were asked for and the one at work.

        Returns:
            `indices.shape` + (height, width, 3) uint8 RGB, or + the shape of the transform's results. A frame whose
            size differs from the first one's (videos may change theirs) is scaled to it before the transform.

        Raises:
            ValueError: an index is out of range or no integer, or there is none.
            VideoDecodeError: less than half of the frames can be decoded.
        """
        indices = np.asarray(indices)
        if indices.size == 0 or not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"indices must be integers, at least one, got {indices!r:.100}.")
        wanted, inverse = np.unique(indices, return_inverse=True)
        if wanted[0] < 0 or wanted[-1] >= len(self):
            raise ValueError(
                f"indices must be in [0, {len(self) - 1}] for {self.name}, got {wanted[0]} to {wanted[-1]}."
            )
        images = self._collect(wanted.tolist(), transform or (lambda image: image))
        if not np.array_equal(wanted, indices.reshape(-1)):  # else no second copy
            images = images[inverse.reshape(-1)]
        return images.reshape(*indices.shape, *images.shape[1:])

    def _open(self) -> None:
        """(Re)opens the file at its first packet."""
        self.close()
        if not isinstance(self._file, str):
            self._file.seek(0)
        try:
            self._container = av.open(
                self._file,
                # Playlists and session descriptions in the place of a video must not use the network.
                options={"protocol_whitelist": self._protocols},
                # Titles in unknown encodings would raise UnicodeDecodeError.
                metadata_errors="replace",
            )
        except av.error.FFmpegError as error:
            raise VideoDecodeError(
                f"{self.name}: not a video, or its header is damaged or cut off; no frame could be read "
                f"({error.strerror})."
            ) from error
        if self._container.format.name == "tty":  # the library draws text files
            raise VideoDecodeError(f"{self.name}: a text file and not a video; no frame could be read.")
        streams = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic  # an audio file's cover
        ]
        if not streams:
            kinds = sorted({stream.type for stream in self._container.streams})
            raise VideoDecodeError(f"{self.name}: has no video stream, only {', '.join(kinds) or 'none at all'}.")
        best = self._container.streams.best("video")
        self._stream = best if best in streams else streams[0]
        self._decoder = self._stream.codec_context
        if self._decoder is None:
            raise VideoDecodeError(f"{self.name}: there is no decoder for its video stream; no frame could be read.")
        self._decoder.thread_count = 1  # data-loader workers decode side by side

    def _scan(self) -> None:
        """Finds the frames, their order and the keyframes."""
        # mp4 lists all of its packets, cut off or not.
        promised = sum(entry.size > 0 for entry in self._stream.index_entries)
        is_vp8 = self._decoder.name in ("vp8", "libvpx")
        # DivX and XviD put two frames into one packet of an avi, and their times on others.
        may_pack = self._decoder.name == "mpeg4" and self._container.format.name == "avi"
        is_packed = False
        self._seen, self._decoding_times = [], []
        shown, keyframes = [], []
        for position, packet in enumerate(self._packets()):
            self._seen.append((packet.pts, packet.size))
            self._decoding_times.append(packet.pts if packet.dts is None else packet.dts)
            is_packed = is_packed or (may_pack and bytes(packet).count(MPEG4_FRAME) > 1)
            # VP8 has packets that only help to predict others (RFC 6386, section 9.1).
            hidden = is_vp8 and not memoryview(packet)[0] & 0x10
            if not (hidden or packet.is_discard or packet.is_corrupt):
                shown.append(position)
                if packet.is_keyframe:
                    keyframes.append(position)
        if not shown or len(self._seen) < MIN_READABLE * promised:
            of = f" of {promised}" if promised else ""
            raise VideoDecodeError(
                f"{self.name}: truncated or damaged; only {len(shown)}{of} frames could be read, and at least one and "
                f"{MIN_READABLE:.0%} are needed."
            )
        times = [self._seen[position][0] for position in shown]
        self._timed = not is_packed and None not in times and len(set(times)) == len(times)
        if self._timed:
            order = np.argsort(times)
            shift = np.abs(order - np.arange(len(order))).max()
            # Time stamps in decoding order, though the decoder reorders: made up (avi has none, for one).
            self._timed = shift <= MAX_REORDERING and not (shift == 0 and self._decoder.has_b_frames)
        if self._timed:
            self._positions = np.array(shown)[order]  # frame -> packet
            self._index_of_time = {times[place]: index for index, place in enumerate(order.tolist())}
            self._keyframes = keyframes
            self._num_frames = len(shown)
        else:
            self._num_frames = sum(1 for _ in self._decode(0))
            if not self._num_frames:
                raise VideoDecodeError(f"{self.name}: none of its {len(shown)} frames could be decoded.")

    def _collect(self, wanted: list[int], transform: Callable) -> np.ndarray:
        """The transformed frames of `wanted`, which is sorted and without repetitions."""
        images = None
        missing = {index: place for place, index in enumerate(wanted)}
        attempts = self._groups(wanted)
        if attempts != [(0, wanted)]:
            # Where these do not give all, behind a false keyframe or around damage: from the start.
            attempts.append((0, wanted))
        for start, group in attempts:
            if missing.keys().isdisjoint(group):
                continue
            trusted = start == 0
            for index, frame in self._decode(start):
                # A seek that does not give the keyframe itself led to the midst of an intra refresh.
                trusted = trusted or index <= self._index_of_time[self._seen[start][0]]
                if not trusted:
                    break
                if index in missing:
                    image = transform(self._to_rgb(frame))
                    if images is None:
                        images = np.empty((len(wanted), *image.shape), image.dtype)
                    images[missing.pop(index)] = image
                if index >= group[-1] or not missing:
                    break
        found = [place for place, index in enumerate(wanted) if index not in missing]
        if not found or len(found) < MIN_READABLE * len(wanted):
            raise VideoDecodeError(
                f"{self.name}: damaged; only {len(found)} of {len(wanted)} frames could be decoded, and at least one "
                f"and {MIN_READABLE:.0%} are needed."
            )
        for place in missing.values():
            images[place] = images[found[max(0, bisect.bisect(found, place) - 1)]]
        return images

    def _groups(self, wanted: list[int]) -> list[tuple[int, list[int]]]:
        """Frames to decode in one go, with the packet to begin at: a keyframe, or the first one."""
        if not self._timed:
            return [(0, wanted)]
        groups, end = [], 0
        for index in wanted:
            position = int(self._positions[index])
            # The last keyframe decoded and shown no later: frames between a keyframe and its predecessors in
            # presentation order (open groups) need the keyframe before as well.
            place = bisect.bisect_right(self._keyframes, position) - 1
            while place >= 0 and self._seen[self._keyframes[place]][0] > self._seen[position][0]:
                place -= 1
            start = self._keyframes[place] if place >= 0 else 0
            if groups and start - end <= MAX_GAP:
                groups[-1][1].append(index)
            else:
                groups.append((start, [index]))
            end = position
        return groups

    def _decode(self, start: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames with their indices, in presentation order, decoding from packet `start` on."""
        count = 0
        for packet in itertools.chain(self._packets_from(start), (None,)):  # None: what the decoder holds back
            try:
                frames = self._decoder.decode(packet)
            except av.error.FFmpegError:
                continue  # a damaged packet
            for frame in frames:
                self.frames_decoded += 1
                index = self._index_of_time.get(frame.pts) if self._timed else count
                count += 1
                if index is not None:
                    yield index, frame

    def _packets_from(self, start: int) -> Iterator[av.Packet]:
        """The stream's packets from number `start` on: seeking where possible, else reading from the beginning."""
        if start > 0:
            try:
                # To the time of decoding: some formats seek by it, and in the others it is no later.
                self._container.seek(self._decoding_times[start], stream=self._stream)
            except av.error.FFmpegError:
                pass  # a format that cannot
            else:
                # Some formats land elsewhere, or make up other time stamps from there.
                packets = itertools.dropwhile(
                    lambda packet: (packet.pts, packet.size) != self._seen[start], self._packets()
                )
                first = next(packets, None)
                if first is not None:
                    yield first
                    yield from packets
                    return
        self._open()
        yield from itertools.islice(self._packets(), start, None)

    def _packets(self) -> Iterator[av.Packet]:
        """The stream's packets from where the file stands, up to the end or to where reading fails."""
        try:
            for packet in self._container.demux(self._stream):
                # Empty packets, some files' repeated frames, would end the decoding.
                if packet.size:
                    yield packet
        # IndexError: PyAV, at the end, where damage made it see streams that the header does not have.
        except (av.error.FFmpegError, IndexError):
            pass

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """(height, width, 3) uint8, upright."""
        self._size = self._size or (frame.width, frame.height)
        try:
            image = frame.to_ndarray(format="rgb24", width=self._size[0], height=self._size[1], threads=1)
        except av.error.FFmpegError as error:  # damage that makes up a colour space, for one
            raise VideoDecodeError(
                f"{self.name}: damaged; a frame in {frame.format.name} cannot be converted to RGB ({error.strerror})."
            ) from error
        matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
        if matrix is not None:
            # x' = a x + c y, y' = b x + d y, to the nearest multiple of 90 degrees.
            a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
            if abs(b) > abs(a):
                image, a, d = image.transpose(1, 0, 2), c, b
            image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return np.ascontiguousarray(image)
