# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""The frames of the clips that make_motion_clips.py writes: one photograph that moves over another, in eight classes.

Why only time tells the classes apart is said there.

Axis letters: T frames, S height and width of a frame.
"""

import numpy as np
from PIL import Image, ImageOps


# Each pair is a motion and its reversal. Phase number i of (x, y, size, angle) is the one that pair number i advances.
PAIRS = (
    ("right", "left"),
    ("down", "up"),
    ("approach", "recede"),
    ("rotate_clockwise", "rotate_counter_clockwise"),
)
CLASSES = tuple(name for pair in PAIRS for name in pair)
SIZES = (0.35, 0.8)  # side of the moving photograph over that of the frame
TRAVEL = (0.4, 0.8)  # of the circle, in one clip


def render_clip(
    foreground: Image.Image,
    background: Image.Image,
    name: str,
    rng: np.random.Generator,
    *,
    frames: int = 16,
    size: int = 32,
) -> np.ndarray:
    """One photograph moving over another.

    Args:
        foreground, background: RGB images of any size; their central squares are used.
        name: the class, one of `CLASSES`.
        rng: where the clip starts and how fast it is. The same state gives both classes of a pair the same frames, in
            opposite order.
        frames: number of frames, T.
        size: height and width S in pixels.

    Returns:
        (T, S, S, 3) uint8 array.
    """
    if name not in CLASSES:
        raise ValueError(f"The class is {name!r}; allowed are {', '.join(CLASSES)}.")
    moving, backwards = divmod(CLASSES.index(name), 2)
    phases = np.repeat(rng.random((4, 1)), frames, axis=1)
    # At most a tenth of the circle per frame, so that the direction is clear in short clips too.
    phases[moving] += np.arange(frames) * rng.uniform(*TRAVEL) / max(frames - 1, 8)
    # Some frames at a time, so that the memory does not grow with the length of the clip.
    step = max(1, 2**20 // size**2)
    parts = [_render(foreground, background, phases[:, i : i + step] % 1, size) for i in range(0, frames, step)]
    return np.concatenate(parts)[:: -1 if backwards else 1]


def _render(foreground: Image.Image, background: Image.Image, phases: np.ndarray, size: int) -> np.ndarray:
    """Frames of the given phases (4, T); lengths are in units of the frame's side."""
    x, y, zoom, turn = phases.astype(np.float32)[..., None, None]
    # Slow in the middle and fast over the edges, where it is cut in two and harder to see.
    x, y = (position + np.sin(2 * np.pi * position) / (4 * np.pi) for position in (x, y))
    side = SIZES[0] * (SIZES[1] / SIZES[0]) ** zoom
    sine, cosine = np.sin(2 * np.pi * turn), np.cos(2 * np.pi * turn)

    # For each pixel, where it lies in the moving photograph: from its centre, along its axes.
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    dx = (pixels[None, None, :] - x + 0.5) % 1 - 0.5  # the frame is a torus
    dy = (pixels[None, :, None] - y + 0.5) % 1 - 0.5
    u, v = dx * cosine + dy * sine, dy * cosine - dx * sine
    opacity = np.minimum((side / 2 - np.abs(u)) * size + 0.5, 1).clip(0)
    opacity *= np.minimum((side / 2 - np.abs(v)) * size + 0.5, 1).clip(0)
    t, row, column = np.nonzero(opacity)

    # The photograph without the detail that its size in the frame cannot show, which would flicker.
    widths, which = np.unique(np.ceil(side[:, 0, 0] * size).astype(int), return_inverse=True)
    full = int(np.ceil(SIZES[1] * size))
    square = ImageOps.fit(foreground, (full, full), Image.Resampling.BICUBIC)
    textures = np.stack(
        [np.asarray(square.resize((w, w)).resize((full, full), Image.Resampling.BILINEAR)) for w in widths]
    )
    u, v, side = u[t, row, column], v[t, row, column], side[t, 0, 0]
    left = ((u / side + 0.5) * full - 0.5).clip(0, full - 1.001)
    top = ((v / side + 0.5) * full - 0.5).clip(0, full - 1.001)
    left, top, right, bottom = left.astype(int), top.astype(int), left % 1, top % 1  # bilinear interpolation
    colour = sum(
        weight[:, None] * textures[which[t], top + i, left + j]
        for i, j, weight in (
            (0, 0, (1 - bottom) * (1 - right)),
            (0, 1, (1 - bottom) * right),
            (1, 0, bottom * (1 - right)),
            (1, 1, bottom * right),
        )
    )
    behind = np.asarray(ImageOps.fit(background, (size, size), Image.Resampling.BICUBIC))
    frames = np.repeat(behind[None], phases.shape[1], axis=0)
    opacity = opacity[t, row, column][:, None]
    frames[t, row, column] = np.rint(opacity * colour + (1 - opacity) * behind[row, column])
    return frames
