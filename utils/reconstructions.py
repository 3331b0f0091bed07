"""Images as a tokenizer gives them back from their first tokens, and the sheet and the tables that show them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from utils.evaluation.report import tokens_text
from utils.images import contact_sheet, tile_side

TILE_RANGE = 128, 256  # pixels a side on the sheet
LONGEST_NAME = 20  # characters
COLOUR = 4  # mean difference of a pixel's channels, of 255, above which an image counts as coloured


@dataclass(frozen=True)
class Reconstruction:
    """One image as the model gives it back; the dicts are by number of tokens.

    Attributes:
        tokens: (N,).
        psnr: In dB.
    """

    tokens: np.ndarray
    original: Image.Image
    images: dict[int, Image.Image]
    psnr: dict[int, float]
    ssim: dict[int, float]

    @property
    def is_coloured(self) -> bool:
        return float(np.ptp(np.asarray(self.original), axis=2).mean()) > COLOUR


class Reconstructions:
    """What is kept of many images: of all their tokens and scores, and whole those that are shown.

    Args:
        lengths: The numbers of tokens that they are decoded from.
        bits: Of a token.
        size: Pixels a side.
    """

    def __init__(self, lengths: Sequence[int], bits: float, size: int):
        self.lengths, self.bits, self.size = lengths, bits, size
        self.keys: list[str] = []
        self.tokens: list[np.ndarray] = []
        self.scores: list[list[tuple[float, float]]] = []
        self.coloured: list[str] = []
        self.shown: dict[str, Reconstruction] = {}

    def add(self, key: str, result: Reconstruction, show: bool) -> None:
        self.keys.append(key)
        self.tokens.append(result.tokens)
        self.scores.append([(result.psnr[length], result.ssim[length]) for length in self.lengths])
        if result.is_coloured:
            self.coloured.append(key)
        if show:
            self.shown[key] = result

    def sheet(self, title: str) -> Image.Image:
        """A row an image: the original, then what each number of tokens gives back."""
        results = self.shown.values()
        captions = []
        for result in results:
            row = [f"original\n{3 * self.size**2:,} bytes\nas raw RGB"]
            for length in self.lengths:
                row.append(f"{tokens_text(length)}\n{self.num_bytes(length)} bytes\n{result.psnr[length]:.1f} dB")
            captions.append(row)
        return contact_sheet(
            [[result.original, *result.images.values()] for result in results],
            row_titles=[clip(key) for key in self.shown],
            captions=captions,
            title=title,
            tile=tile_side(self.size, *TILE_RANGE),
        )

    def quality_table(self) -> str:
        """Rate and mean PSNR and SSIM by number of tokens."""
        lines = [f"mean over {len(self.keys)} images"] if len(self.keys) > 1 else []
        lines.append("tokens   bytes   bits/pixel   PSNR (dB)     SSIM")
        for length, (psnr, ssim) in zip(self.lengths, np.array(self.scores).mean(axis=0), strict=True):
            rate = length * self.bits / self.size**2
            lines.append(f"{length:6}   {self.num_bytes(length):5}   {rate:10.4f}   {psnr:9.2f}   {ssim:6.4f}")
        return "\n".join(lines)

    def image_table(self) -> str:
        """The PSNR of each image that is shown, by number of tokens."""
        width = max(len(clip(key)) for key in self.shown)
        lines = ["PSNR (dB) of each image, by number of tokens"]
        lines.append(" " * width + "".join(f"{length:8}" for length in self.lengths))
        for key, result in self.shown.items():
            lines.append(f"{clip(key):{width}}" + "".join(f"{result.psnr[length]:8.2f}" for length in self.lengths))
        return "\n".join(lines)

    def num_bytes(self, length: int) -> int:
        """What so many tokens take."""
        return math.ceil(length * self.bits / 8)


def clip(name: str) -> str:
    """A long name by its two ends."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 3]}...{name[-half:]}"
