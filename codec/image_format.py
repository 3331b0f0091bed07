"""Compressed files as one of the image formats that are compared at equal bytes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from codec.bitstream import Fit
from codec.canvas import to_canvas
from codec.files import Codec, Settings, header_bytes
from codec.rate import Choice, best_within
from utils.evaluation.image_formats import Format


@dataclass(frozen=True, kw_only=True)
class CompressedFormat(Format):
    """The .1dp files of a tokenizer; its settings are the most bytes that a file may have.

    Args:
        codec: The tokenizer with its entropy models.
        written: Fit and effort; whatever their goal is, the files are those of the settings.
    """

    codec: Codec
    written: Settings

    def files(self, pixels: np.ndarray, limit: int) -> Iterator[tuple[bytes, float]]:
        """The best file within each setting and `limit`; each took the seconds of all that was tried for it."""
        start = time.perf_counter()
        (draft,) = self.codec.drafts([self.codec.canvas(Image.fromarray(pixels), self.written)], self.written)
        drafted, seen = time.perf_counter() - start, set()
        for most in self.settings:
            start = time.perf_counter()
            option = best_within(draft.options.sizes, draft.options.errors, min(most, limit))
            if option is not None and option not in seen:
                data = self.codec.write(draft, Choice(option), self.written).data
                yield data, drafted + time.perf_counter() - start
            seen.add(option)

    def decode(self, data: bytes) -> np.ndarray:
        return np.asarray(self.codec.decompress([data])[0])


def as_format(codec: Codec, budgets: Sequence[int], side: int, *, effort: int = 0, fit: Fit = Fit.CROP) -> Format:
    """The files of a codec.

    Args:
        budgets: Of whole files, in bytes.
        side: Of the images, which are square, in pixels.
        effort, fit: As of `codec.files.Settings`.
    """
    tokenizer, geometry = codec.tokenizer, to_canvas(Image.new("RGB", (side, side)), fit, codec.side).geometry
    most, num_tiles = tokenizer.num_latent_tokens, 1
    if geometry is not None and (tiles := geometry.tiles):
        num_tiles = tiles.columns * tiles.rows
        geometry = replace(geometry, tiles=replace(tiles, lengths=(most,) * num_tiles))
    header = header_bytes(most, num_tiles * most, geometry)
    words = [f"effort {effort}"] * (effort > 0) + ["tiles"] * (fit == Fit.TILE)
    return CompressedFormat(
        title=", ".join(["One-D-Piece (.1dp)", *words]),
        pillow_name="",
        settings=tuple(sorted({*budgets, *(budget + header for budget in budgets)})),
        options=lambda setting, side: {},
        header=header,
        scales_down=False,
        codec=codec,
        written=Settings(fit=fit, effort=effort),
    )
