"""Images for people and programs: single files, contact sheets, archives."""

import itertools
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from utils.evaluation.metrics import to_uint8
from utils.files import replacing

MARGIN, CAPTION_GAP = 8, 3  # pixels
INK, PAPER = (20, 20, 20), (255, 255, 255)


def to_pil(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to an image, clamped and rounded."""
    return Image.fromarray(to_uint8(pixels).permute(1, 2, 0).cpu().numpy())


def write_image(image: Image.Image, path: str | os.PathLike, about: Mapping[str, Any] | None = None) -> None:
    """Save, so that the file appears whole or not at all; the folder is made where it is missing.

    Args:
        about: What a PNG says of itself, as JSON, in the text chunk `about`.
    """
    texts = {}
    if about is not None:
        texts["pnginfo"] = PngInfo()
        texts["pnginfo"].add_text("about", json.dumps(about))
    with replacing(path) as aside:
        image.save(aside, **texts)


def tile_side(side: int, smallest: int, largest: int) -> int:
    """Pixels a side on a sheet, of images of `side`: small ones are enlarged by a whole number, all pixels alike."""
    return min(side * -(-smallest // side), largest)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] | None = None,
    title: str = "",
    tile: int = 128,
) -> Image.Image:
    """A labelled grid of images.

    Args:
        rows: Images of each row, all of one aspect; rows may be of different lengths.
        column_titles, row_titles: One per column and row; may be left out.
        captions: Lines under each image ("\\n" parts them), in the shape of `rows`.
        tile: Pixels a side of an image on the sheet. Images are enlarged by nearest neighbour, so that small ones
            keep their pixels, and reduced with antialias.
    """
    size = max(11, min(tile // 8, 18))
    font, bold = ImageFont.load_default(size), ImageFont.load_default(size + 2)
    line = max(size + 4, sum(font.getmetrics()))
    heading = sum(bold.getmetrics()) + 4  # a line of column titles: their descenders end above the images
    caption_lines = max((text.count("\n") + 1 for row in captions for text in row), default=0) if captions else 0
    left = MARGIN + max((int(bold.getlength(text)) + MARGIN for text in row_titles), default=0)
    top = MARGIN + (2 * line if title else 0) + (heading if column_titles else 0)
    # Between a caption and the next row twice as much as between two rows: the caption is of the row above.
    caption_height = CAPTION_GAP + caption_lines * line + MARGIN if caption_lines else 0
    cell_height = tile + caption_height + MARGIN
    num_columns = max(len(row) for row in rows)
    width = max(left + num_columns * (tile + MARGIN), int(bold.getlength(title)) + 2 * MARGIN)
    sheet = Image.new("RGB", (width, top + len(rows) * cell_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN), title, fill=INK, font=bold)
    for column, text in enumerate(column_titles):
        x = left + column * (tile + MARGIN) + tile // 2
        draw.text((x, top - heading), text, fill=INK, font=bold, anchor="ma")
    for index, row in enumerate(rows):
        y = top + index * cell_height
        if index < len(row_titles):
            draw.text((MARGIN, y + tile // 2), row_titles[index], fill=INK, font=bold, anchor="lm")
        for column, image in enumerate(row):
            x = left + column * (tile + MARGIN)
            sheet.paste(_fitted(image, tile), (x, y))
            lines = captions[index][column].split("\n") if captions else ()
            for below, text in zip(itertools.count(tile + CAPTION_GAP, line), lines, strict=False):
                draw.text((x + tile // 2, y + below), text, fill=INK, font=font, anchor="ma")
    return sheet


def _fitted(image: Image.Image, tile: int) -> Image.Image:
    enlarge = image.width <= tile
    return image.resize((tile, tile), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)


def preview_sheet(images: dict[str, Tensor], title: str = "", tile: int = 128) -> Image.Image:
    """A column per name, a row per image, of {name: (B, 3, H, W)} in [0, 1]."""
    columns = list(images.values())
    rows = [[to_pil(column[index]) for column in columns] for index in range(len(columns[0]))]
    return contact_sheet(rows, column_titles=list(images), title=title, tile=tile)


def to_array(pixels: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8, clamped and rounded."""
    return to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()


def write_archive(
    path: Path, parts: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray, about: Mapping[str, Any]
) -> None:
    """Stream `parts` of images (n, H, W, 3) uint8 into the .npz that the ADM evaluator reads: arr_0, labels as arr_1.

    Beside them stands `about`, as JSON. It appears whole or not at all, and the same images give the same bytes.
    """
    with replacing(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        # A ZipInfo of its own has a fixed date.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(part.tobytes())
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array(file, labels, allow_pickle=False)
        with archive.open(zipfile.ZipInfo("about.npy"), "w") as file:
            np.lib.format.write_array(file, np.array(json.dumps(about)), allow_pickle=False)
