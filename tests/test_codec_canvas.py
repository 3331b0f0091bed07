"""Images of any size become squares and come back: exactly where nothing is lost, without seams, upright, on white."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from codec.bitstream import MAX_PIXELS, Fit, FormatError, Geometry, Tiles, pack_geometry
from codec.canvas import (
    UNKNOWN_GREY,
    check_cover,
    from_squares,
    padded_box,
    size_of,
    tile_count,
    tile_starts,
    to_canvas,
)
from data import DataError
from data.transforms import EvalTransform, as_shown, decode_as_stored
from tests.codec_images import photo
from utils.errors import UserError

SIDE = 16
SIZES = [(40, 25), (16, 16), (9, 30), (17, 15), (1, 1), (33, 100)]
FITS = pytest.mark.parametrize("fit", list(Fit), ids=[fit.name.lower() for fit in Fit])


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def back(canvas, squares=None, known=None):
    """The image of a canvas, or of other squares in their places."""
    squares = canvas.squares if squares is None else squares
    tiles = canvas.geometry.tiles if canvas.geometry else None
    columns, rows = (tiles.columns, tiles.rows) if tiles else (1, 1)
    known = np.ones(len(squares), dtype=bool) if known is None else known
    return from_squares(iter(squares.reshape(rows, columns, SIDE, SIDE, 3)), known, canvas.geometry, SIDE)


@FITS
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_images_come_back_in_their_size(fit, size):
    canvas = to_canvas(noise(*size), fit, SIDE)
    assert canvas.squares.shape[1:] == (SIDE, SIDE, 3) and canvas.squares.dtype == np.uint8
    assert back(canvas).size == (size if fit != Fit.CROP or size == (SIDE, SIDE) else (min(size),) * 2)
    np.testing.assert_allclose(canvas.shares.sum(), canvas.area, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_tiles_give_back_every_pixel(size):
    image = noise(*size)
    assert np.array_equal(np.asarray(back(to_canvas(image, Fit.TILE, SIDE))), np.asarray(image))


@FITS
def test_an_image_of_the_models_size_needs_no_geometry(fit):
    canvas = to_canvas(noise(SIDE, SIDE), fit, SIDE)
    assert canvas.geometry is None and np.array_equal(canvas.squares[0], np.asarray(noise(SIDE, SIDE)))


def test_a_crop_is_that_of_evaluation():
    image = photo(40, 25)
    expected = EvalTransform(SIDE)(image).permute(1, 2, 0).numpy()
    assert np.array_equal(to_canvas(image, Fit.CROP, SIDE).squares[0], expected)


def test_a_padded_image_counts_without_its_margins_and_loses_them():
    canvas = to_canvas(photo(40, 10), Fit.PAD, SIDE)
    assert padded_box(40, 10, SIDE) == (0, 6, 16, 10)
    assert canvas.shares.sum() == 16 * 4 == canvas.area
    marked = canvas.squares.copy()
    marked[canvas.shares == 0] = (255, 0, 255)
    assert np.array_equal(np.asarray(back(canvas, marked)), np.asarray(back(canvas)))


def test_tiles_are_spread_evenly_and_overlap():
    assert [tile_count(length, SIDE) for length in (1, 16, 17, 30, 31, 100)] == [1, 1, 2, 2, 3, 7]
    assert tile_starts(100, SIDE, 7) == [0, 14, 28, 42, 56, 70, 84]
    for length in range(1, 200):
        starts = tile_starts(length, SIDE, tile_count(length, SIDE))
        assert starts[0] == 0 and starts[-1] == max(0, length - SIDE)
        assert all(after - before <= SIDE - SIDE // 8 for before, after in zip(starts[:-1], starts[1:], strict=True))


def test_tiles_blend_without_seams():
    canvas = to_canvas(Image.new("RGB", (60, 40)), Fit.TILE, SIDE)
    levels = np.random.default_rng(0).integers(100, 120, len(canvas.squares))  # as of other brightness
    image = np.asarray(back(canvas, canvas.squares + levels[:, None, None, None].astype(np.uint8)))[..., 0].astype(int)
    within = max(np.abs(np.diff(image, axis=axis)).max() for axis in (0, 1))
    assert within <= np.ptp(levels) / 2 + 2  # no step as high as that from one tile to another


def test_shares_weigh_errors_of_tiles_as_the_image_does():
    canvas = to_canvas(noise(50, 40), Fit.TILE, SIDE)
    draws = np.random.default_rng(1)
    squares = (canvas.squares + draws.integers(-20, 21, canvas.squares.shape)).clip(0, 255).astype(np.uint8)
    weighted = np.square(squares.astype(float) - canvas.squares).mean(axis=-1) * canvas.shares
    of_image = np.square(np.asarray(back(canvas, squares)).astype(float) - np.asarray(noise(50, 40))).mean()
    assert of_image <= weighted.sum() / canvas.area <= 1.5 * of_image


def test_where_no_tile_is_known_the_image_is_grey():
    canvas = to_canvas(noise(44, 16), Fit.TILE, SIDE)  # three tiles
    image = np.asarray(back(canvas, known=np.array([True, False, False])))
    assert np.array_equal(image[:, :16], np.asarray(noise(44, 16))[:, :16])
    assert (image[:, 16:] == UNKNOWN_GREY).all()


@FITS
def test_a_tiff_that_pillow_turns_as_it_loads_comes_back_upright(fit):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    noise(40, 24).save(file, "TIFF", exif=exif)
    canvas = to_canvas(Image.open(file), fit, SIDE)
    assert back(canvas).size == ((24, 24) if fit == Fit.CROP else (24, 40))


def test_orientation_is_applied_and_noted():
    image = photo(40, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    canvas = to_canvas(decode_as_stored(file.getvalue()), Fit.TILE, SIDE)
    assert (canvas.geometry.width, canvas.geometry.height, canvas.geometry.orientation) == (40, 24, 6)
    assert size_of(canvas.geometry, SIDE) == (24, 40)
    assert np.array_equal(np.asarray(back(canvas)), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize(
    "kind, stored", [(5, struct.pack("<II", 6, 1)), (12, struct.pack("<d", 6))], ids=["rational", "double"]
)
def test_an_orientation_that_is_stored_as_a_fraction_is_one_of_the_eight(kind, stored):
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, kind, 1, 26, 0) + stored  # a rational, or a double
    file = io.BytesIO()
    photo(40, 24).save(file, "JPEG", exif=exif)
    geometry = to_canvas(decode_as_stored(file.getvalue()), Fit.STRETCH, SIDE).geometry
    assert pack_geometry(geometry) and size_of(geometry, SIDE) == (24, 40)


def test_what_is_transparent_becomes_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 2), (0, 0, 255, 255))
    pixels = np.asarray(as_shown(image))
    assert (pixels[0, 0] == 255).all() and pixels[2, 1].tolist() == [0, 0, 255]
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = 0
    assert (np.asarray(as_shown(palette)) == 255).all()


def test_sixteen_bits_keep_their_high_byte():
    image = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert (np.asarray(as_shown(image)) == 128).all()


def test_broken_and_too_large_images_are_errors_of_one_sentence():
    with pytest.raises(DataError, match="expected a whole image"):
        decode_as_stored(b"no image")
    file = io.BytesIO()
    noise(30, 30).save(file, "PNG")
    with pytest.raises(DataError, match="expected a whole image"):
        decode_as_stored(file.getvalue()[:200])
    with pytest.raises(UserError, match="at most 65,535 pixels a side and 67,108,864 in all, got 9000 x 8000"):
        to_canvas(Image.new("L", (9000, 8000)), Fit.CROP, SIDE)
    with pytest.raises(UserError, match="tiles of 4 x 4, and a .1dp file holds at most 65,536"):
        to_canvas(Image.new("L", (2000, 2000)), Fit.TILE, 4)


@pytest.mark.parametrize("columns, rows", [(2, 3), (3, 2), (41, 3), (3, 41)])
def test_tiles_that_cannot_be_those_of_their_image_are_refused(columns, rows):
    check_cover(Geometry(40, 40, Fit.TILE, tiles=Tiles(3, 3, (1,) * 9)), SIDE)
    with pytest.raises(FormatError, match="do not cover 40 pixels"):
        check_cover(Geometry(40, 40, Fit.TILE, tiles=Tiles(columns, rows, (1,) * (columns * rows))), SIDE)


def test_the_largest_image_is_allowed():
    assert size_of(Geometry(8192, MAX_PIXELS // 8192, Fit.STRETCH), SIDE) == (8192, 8192)
