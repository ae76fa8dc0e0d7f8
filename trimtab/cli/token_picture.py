"""Pictures for ``trimtab inspect --tokens``: reading one for a model's input, drawing what became of its patches."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import MissingDependencyError, UsageError

Pixels = NDArray[np.uint8]
"""``[height, width, 3]``, red, green and blue."""

SMALLEST_PANEL = 224
"""Pixels of the longer side of a panel, at least."""
SMALLEST_CELL = 16
"""Pixels of the side of a patch, at least."""
GAP, CAPTION, PANELS_IN_A_ROW, LINE = 8, 18, 4, 2


@dataclass(frozen=True)
class Panel:
    """What to draw over the picture once.

    Attributes:
        caption: one line above it.
        groups: i64 ``[rows * columns]``, patches with equal numbers were merged, -1 was dropped; None for the picture.
    """

    caption: str
    groups: NDArray[np.int64] | None = None


class Picture:
    """A picture file.

    Raises:
        UsageError: there is no such file, or it holds no picture.
        MissingDependencyError: pillow is not installed.
    """

    def __init__(self, path: Path) -> None:
        image = _pillow("Image")
        if not path.is_file():
            raise UsageError("there is no such picture", values={"picture": path}, fix="give a PNG or JPEG file")
        try:
            with image.open(path) as opened:
                self._image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
            raise UsageError(
                "the picture cannot be read",
                values={"picture": path, "error": " ".join(str(error).split())},
                rule="it is a file in a format that pillow reads, such as PNG or JPEG",
            ) from error

    def pixels(self, height: int, width: int) -> Pixels:
        """The whole picture at another size, without keeping its proportions."""
        resized = self._image.resize((width, height), _pillow("Image").Resampling.BICUBIC)
        return np.array(resized, dtype=np.uint8)


def model_input(pixels: Pixels, channels: int, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """``(pixels / 255 - mean) / std`` as ``[channels, height, width]``; one channel is the brightness."""
    image: NDArray[np.float32] = pixels.astype(np.float32) / np.float32(255)
    if channels == 1:
        image = _brightness(image)[..., None]
    scaled = (image - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)


def grid_of(patches: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of square patches that cover a picture; None where no whole numbers fit."""
    rows = math.isqrt(patches * height // width)
    if rows == 0 or patches % rows or rows * width * rows != patches * height:
        return None
    return rows, patches // rows


def cell_size(grid: tuple[int, int]) -> int:
    """The side of a patch in the drawing, in pixels."""
    return max(SMALLEST_CELL, math.ceil(SMALLEST_PANEL / max(grid)))


def panel_origin(grid: tuple[int, int], number: int) -> tuple[int, int]:
    """Top and left of panel ``number`` in the drawing."""
    rows, columns = grid
    cell = cell_size(grid)
    down, right = divmod(number, PANELS_IN_A_ROW)
    return GAP + CAPTION + down * (rows * cell + CAPTION + GAP), GAP + right * (columns * cell + GAP)


def draw(picture: Picture, grid: tuple[int, int], panels: Sequence[Panel]) -> bytes:
    """A PNG file with all panels, four in a row."""
    rows, columns = grid
    height, width = rows * cell_size(grid), columns * cell_size(grid)
    bottom = max(panel_origin(grid, number)[0] for number in range(len(panels))) + height + GAP
    right = max(panel_origin(grid, number)[1] for number in range(len(panels))) + width + GAP
    canvas = np.full((bottom, right, 3), 255, np.uint8)
    pixels = picture.pixels(height, width)
    for number, panel in enumerate(panels):
        top, left = panel_origin(grid, number)
        drawn = pixels if panel.groups is None else painted(pixels, grid, panel.groups)
        canvas[top : top + height, left : left + width] = drawn
    return _png(canvas, [(panel_origin(grid, number), panel.caption) for number, panel in enumerate(panels)])


def painted(pixels: Pixels, grid: tuple[int, int], groups: NDArray[np.int64]) -> Pixels:
    """``pixels`` with every group of several patches in its mean colour and outlined, and dropped patches greyed out.

    Args:
        pixels: the picture, ``[rows * cell, columns * cell, 3]``.
        grid: rows and columns of patches.
        groups: ``[rows * columns]``, the group of each patch, -1 for dropped.
    """
    cell = pixels.shape[0] // grid[0]
    at_pixel = groups.reshape(grid).repeat(cell, 0).repeat(cell, 1)
    result = pixels.copy()
    gone = at_pixel < 0
    faint = 150 + 0.3 * _brightness(pixels.astype(np.float32))
    result[gone] = faint[gone][:, None].astype(np.uint8)
    for group in np.unique(groups[groups >= 0]):
        if np.count_nonzero(groups == group) == 1:
            continue  # a patch alone keeps its pixels
        here = at_pixel == group
        result[here] = np.round(pixels[here].mean(0)).astype(np.uint8)
        result[here & _border(here)] = _line_colour(int(group))
    return result


def _border(here: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What of an area is within the width of a line from its outside."""
    padded = np.pad(here, LINE)
    height, width = here.shape
    inside = np.ones_like(here)
    for down in range(2 * LINE + 1):
        for right in range(2 * LINE + 1):
            inside &= padded[down : down + height, right : right + width]
    return ~inside


def _line_colour(group: int) -> tuple[int, ...]:
    """Colours that differ strongly for numbers that are close: hues a golden section apart."""
    red, green, blue = colorsys.hsv_to_rgb(group * 0.618034 % 1, 0.9, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _brightness(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[height, width]`` by the weights of ITU-R BT.601."""
    grey: NDArray[np.float32] = image @ np.asarray([0.299, 0.587, 0.114], np.float32)
    return grey


def _png(canvas: Pixels, captions: Sequence[tuple[tuple[int, int], str]]) -> bytes:
    image = _pillow("Image").fromarray(canvas)
    pen = _pillow("ImageDraw").Draw(image)
    for (top, left), text in captions:
        pen.text((left, top - CAPTION + 3), text, fill=(0, 0, 0))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _pillow(module: str) -> Any:
    try:
        if module == "Image":
            from PIL import Image

            return Image
        from PIL import ImageDraw

        return ImageDraw
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "drawing tokens needs a package that is not installed",
            values={"package": "pillow"},
            rule="pictures are read and written by pillow, which comes with the extra `report`",
            fix='pip install "trimtab[report]"',
        ) from error
