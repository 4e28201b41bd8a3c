# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Writing frames as a video file with PyAV. Without torch and transformers."""

import os
from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np

from .video_decoding import check_positive


def write_video(
    path: str | os.PathLike,
    frames: np.ndarray,
    fps: int,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
) -> None:
    """Write a video in 4:2:0 colour, which every player shows. The same arguments make the same file.

    `path` exists only when complete: until then the file is hidden beside it, with `.part` after its name.

    Args:
        path: its ending is FFmpeg's name of the container, such as `.mp4`, `.webm` or `.mov`.
        frames: (T, height, width, 3) uint8 RGB, of even height and width, as colour is stored at half the size.
        fps: frames per second.
        codec: name of FFmpeg's encoder; the container must allow it.
        options: of the encoder, by FFmpeg's names.

    Raises:
        ValueError: `fps` or `frames` are not allowed, or PyAV has no such container or no such codec in it.
        FileNotFoundError: the folder of `path` does not exist.
    """
    path = Path(path)
    check_destination(path, fps)
    if frames.ndim != 4 or len(frames) == 0 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames must be a uint8 array (T, height, width, 3) with T of at least 1, got {frames.dtype} "
            f"{frames.shape}."
        )
    height, width = frames.shape[1:3]
    if height < 1 or width < 1 or height % 2 or width % 2:
        raise ValueError(f"frames must have a positive even height and width, got {height}x{width}.")

    unfinished = path.with_name(f".{path.name}.part")
    try:
        # bitexact: no random identifiers and no dates in the file.
        with av.open(str(unfinished), "w", format=path.suffix[1:], options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream(codec, rate=fps, options=options)
            stream.height, stream.width = height, width
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode(None))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_destination(path: str | os.PathLike, fps: int) -> None:
    """What [`write_video`] refuses before it has frames: a missing folder, an `fps` that is no positive integer."""
    check_positive(fps=fps)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {Path(path).parent}.")
