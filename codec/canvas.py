"""Images of any size as the squares that a model takes, and back: crop, pad, stretch, or overlapping tiles."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from codec.bitstream import MAX_PIXELS, MAX_SIDE, MAX_TILES, Fit, FormatError, Geometry, Tiles
from utils.errors import UserError

OVERLAP = 8  # tiles share at least one part of so many of their side
ORIENTATION = 0x0112  # the tag of EXIF data
TURNING_SIDES = (5, 6, 7, 8)  # the orientations that swap width and height
UNKNOWN_GREY = 128  # where a cut file says nothing


@dataclass(frozen=True)
class Canvas:
    """An image as squares.

    Args:
        squares: (T, P, P, 3) uint8; several with `Fit.TILE` alone, row by row.
        shares: (T, P, P) float32: how much each pixel counts in the image that comes back. Together they make up
            `area`: an error of the squares weighed so is that of the image, or with tiles at least as large.
        area: Pixels of the image that comes back, at the model's scale.
        geometry: None for an image of the model's size. That of tiles lacks their lengths.
    """

    squares: np.ndarray
    shares: np.ndarray
    area: int
    geometry: Geometry | None


def check_size(width: int, height: int) -> None:
    """Refuse what a file cannot hold.

    Raises:
        UserError: The image has more pixels.
    """
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise UserError(
            f"a .1dp file holds images of at most {MAX_SIDE:,} pixels a side and {MAX_PIXELS:,} in all, got "
            f"{width} x {height}: scale it down first"
        )


def orientation_of(image: Image.Image) -> int:
    """1..8 as EXIF data say; 1, upright, where they say nothing or are broken."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # they may be broken in any way
        return 1
    return int(orientation) if orientation in range(1, 9) else 1  # some files store a fraction


def to_canvas(image: Image.Image, fit: Fit, side: int) -> Canvas:
    """The squares of an image as it was opened, for a model of `side` x `side` pixels.

    Raises:
        UserError: It is larger than a file can hold.
    """
    from data.transforms import EvalTransform, as_shown  # torch is slow to import, too slow to tell a file's size

    check_size(*image.size)
    image.load()  # which turns a TIFF: only then its size and orientation agree
    stored, orientation, image = image.size, orientation_of(image), as_shown(image)
    if image.size == (side, side):
        return _single(np.asarray(image), side * side, None)
    geometry = Geometry(*stored, fit, orientation)
    if fit == Fit.TILE:
        return _tiled(np.asarray(image), geometry, side)
    if fit == Fit.CROP:
        return _single(EvalTransform(side)(image).permute(1, 2, 0).numpy(), side * side, geometry)
    if fit == Fit.STRETCH:
        return _single(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)), side * side, geometry)
    left, top, right, bottom = padded_box(*image.size, side)
    small = np.asarray(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC))
    square = np.pad(small, ((top, side - bottom), (left, side - right), (0, 0)), mode="edge")
    shares = np.zeros((side, side), np.float32)
    shares[top:bottom, left:right] = 1
    return Canvas(square[None], shares[None], small.shape[0] * small.shape[1], geometry)


def _single(square: np.ndarray, area: int, geometry: Geometry | None) -> Canvas:
    return Canvas(square[None], np.ones((1, *square.shape[:2]), np.float32), area, geometry)


def _tiled(pixels: np.ndarray, geometry: Geometry, side: int) -> Canvas:
    height, width = pixels.shape[:2]
    columns, rows = tile_count(width, side), tile_count(height, side)
    if columns * rows > MAX_TILES:
        raise UserError(
            f"{width} x {height} pixels are {columns * rows:,} tiles of {side} x {side}, and a .1dp file holds at most "
            f"{MAX_TILES:,}: scale the image down first, or fit it otherwise"
        )
    grown = np.pad(pixels, ((0, max(0, side - height)), (0, max(0, side - width)), (0, 0)), mode="edge")
    places = [(top, left) for top in tile_starts(height, side, rows) for left in tile_starts(width, side, columns)]
    squares = np.stack([grown[top : top + side, left : left + side] for top, left in places])
    down, across = _shares_along(height, side, rows), _shares_along(width, side, columns)  # (rows, P), (columns, P)
    shares = (down[:, None, :, None] * across[None, :, None, :]).reshape(len(squares), side, side)
    tiles = Tiles(columns, rows, ())
    geometry = Geometry(geometry.width, geometry.height, geometry.fit, geometry.orientation, tiles)
    return Canvas(squares, shares.astype(np.float32), width * height, geometry)


def tile_count(length: int, side: int) -> int:
    """Tiles along a line of `length` pixels, so that neighbours share at least `side // OVERLAP` of them."""
    overlap = side // OVERLAP
    return max(1, math.ceil((length - overlap) / (side - overlap)))


def tile_starts(length: int, side: int, count: int) -> list[int]:
    """First pixels of `count` tiles that are spread evenly over a line of `length` pixels."""
    reach = max(0, length - side)
    return [place * reach // (count - 1) for place in range(count)] if count > 1 else [0]


def tile_window(side: int) -> np.ndarray:
    """(P,) weights of a tile's pixels along one side: they rise evenly over the overlap, so that no seam shows."""
    place = np.arange(side) + 0.5
    return np.minimum(np.minimum(place, side - place) / max(1, side // OVERLAP), 1.0)


def _shares_along(length: int, side: int, count: int) -> np.ndarray:
    """(count, P): the weight of each tile's pixels in the blend along a line; 0 beyond its end."""
    starts, window = tile_starts(length, side, count), tile_window(side)
    total = np.zeros(max(length, side))
    for start in starts:
        total[start : start + side] += window
    shares = np.stack([window / total[start : start + side] for start in starts])
    shares[:, np.arange(side) >= length] = 0
    return shares


def padded_box(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of an image that is scaled into the middle of a square, its sides kept in ratio."""
    longer = max(width, height)
    across, down = (max(1, round(side * length / longer)) for length in (width, height))
    left, top = (side - across) // 2, (side - down) // 2
    return left, top, left + across, top + down


def counting_box(shares: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a square's pixels that count, by its shares (P, P): of a padded image without its margins."""
    down, across = (np.flatnonzero(shares.any(axis=axis)) for axis in (1, 0))
    return slice(down[0], down[-1] + 1), slice(across[0], across[-1] + 1)


def size_of(geometry: Geometry | None, side: int) -> tuple[int, int]:
    """Width and height of the image that comes back, upright; of a cropped one the square that was kept."""
    if geometry is None:
        return side, side
    width, height = geometry.width, geometry.height
    if geometry.orientation in TURNING_SIDES:
        width, height = height, width
    return (min(width, height),) * 2 if geometry.fit == Fit.CROP else (width, height)


def check_cover(geometry: Geometry | None, side: int) -> None:
    """Refuse tiles that do not cover their image.

    Raises:
        FormatError: They do not.
    """
    if geometry is None or geometry.tiles is None:
        return
    for length, count in zip(size_of(geometry, side), (geometry.tiles.columns, geometry.tiles.rows), strict=True):
        if count * side < length or count > length:
            raise FormatError(f"the file is damaged: {count} tiles of {side} pixels do not cover {length} pixels")


def from_squares(rows: Iterator[np.ndarray], known: np.ndarray, geometry: Geometry | None, side: int) -> Image.Image:
    """The image of its squares, upright and in its original size.

    Args:
        rows: For each row of tiles, from the top, (columns, P, P, 3) uint8; once (1, P, P, 3) of a single square.
        known: (T,), which tiles the file told anything of. Where none did, the image is grey.
    """
    size = size_of(geometry, side)
    if geometry is not None and geometry.tiles is not None:
        return Image.fromarray(_blended(rows, known, geometry.tiles, size, side))
    image = Image.fromarray(next(rows)[0])
    if geometry is not None and geometry.fit == Fit.PAD:
        image = image.crop(padded_box(*size, side))
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _blended(
    rows: Iterator[np.ndarray], known: np.ndarray, tiles: Tiles, size: tuple[int, int], side: int
) -> np.ndarray:
    """(H, W, 3) uint8. No more than a row of tiles is held in floats."""
    width, height = size
    window = np.outer(tile_window(side), tile_window(side))[..., None]
    lefts, tops = tile_starts(width, side, tiles.columns), tile_starts(height, side, tiles.rows)
    known = known.reshape(tiles.rows, tiles.columns)
    image = np.empty((height, width, 3), np.uint8)
    band = np.zeros((side, max(width, side), 4), np.float32)  # sums of weighted colours, and of weights
    for top, end, row, row_known in zip(tops, [*tops[1:], height], rows, known, strict=True):
        for left, tile, is_known in zip(lefts, row, row_known, strict=True):
            if is_known:
                band[:, left : left + side, :3] += window * tile
                band[:, left : left + side, 3:] += window
        done, left_over = band[: end - top, :width], band[end - top :]
        colours = done[..., :3] / np.maximum(done[..., 3:], 1e-6)
        image[top:end] = np.where(done[..., 3:] > 0, colours.round(), UNKNOWN_GREY)
        band = np.concatenate([left_over, np.zeros((side - len(left_over), *band.shape[1:]), np.float32)])
    return image
