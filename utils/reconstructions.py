"""Images as a tokenizer gives them back from their first tokens, and the sheet and the tables that show them."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from utils.domains import DOMAINS, note_on
from utils.evaluation.report import tokens_text
from utils.images import contact_sheet, tile_side

TILE_RANGE = 128, 256  # pixels a side on the sheet
LONGEST_NAME = 20  # characters


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


class Reconstructions:
    """What is kept of many images: of all their tokens and scores, and whole those that are shown.

    Args:
        model: Its name, by which `DOMAINS` knows it.
        lengths: The numbers of tokens that they are decoded from.
        bits: Of a token.
        size: Pixels a side.
        most_shown: Images that are kept whole.

    Attributes:
        unlike: Names of the images that are none such as the model has seen.
    """

    def __init__(self, model: str, lengths: Sequence[int], bits: float, size: int, most_shown: int = 16):
        self.model, self.lengths, self.bits, self.size = model, lengths, bits, size
        self.domain = DOMAINS.get(model)
        self.keys: list[str] = []
        self.tokens: list[np.ndarray] = []
        self.scores: list[list[tuple[float, float]]] = []
        self.most_shown = most_shown
        self.unlike: list[str] = []
        self._ranks: dict[str, int] = {}
        self.shown: dict[str, Reconstruction] = {}

    def add(self, key: str, result: Reconstruction, rank: int) -> None:
        """
        Args:
            rank: The images of the lowest ranks are those that are kept whole.
        """
        self.keys.append(key)
        self.tokens.append(result.tokens)
        self.scores.append([(result.psnr[length], result.ssim[length]) for length in self.lengths])
        if self.domain is not None and self.domain.is_unlike(result.original):
            self.unlike.append(key)
        self.shown[key], self._ranks[key] = result, rank
        if len(self.shown) > self.most_shown:
            del self.shown[max(self.shown, key=self._ranks.__getitem__)]

    @property
    def title(self) -> str:
        """The model's name, with what it has seen where that is known."""
        return f"{self.model} (bundled, trained on {self.domain.data})" if self.domain else self.model

    def sheet(self) -> Image.Image:
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
            row_titles=clipped(list(self.shown)),
            captions=captions,
            title=self.title,
            tile=tile_side(self.size, *TILE_RANGE),
        )

    def tables(self) -> str:
        """Everything that is said of the images in text, with blank lines between."""
        few = len(self.shown) == len(self.keys) > 1
        return "\n\n".join(filter(None, [self.quality_table(), self.image_table() if few else "", self.note()]))

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
        names = clipped(list(self.shown))
        width = max(map(len, names))
        lines = ["PSNR (dB) of each image, by number of tokens"]
        lines.append(" " * width + "".join(f"{length:8}" for length in self.lengths))
        for name, result in zip(names, self.shown.values(), strict=True):
            lines.append(f"{name:{width}}" + "".join(f"{result.psnr[length]:8.2f}" for length in self.lengths))
        return "\n".join(lines)

    def note(self) -> str:
        """What to expect of images such as the model has not seen; empty where there are none."""
        return note_on(self.model, [clip(name) for name in self.unlike])

    def num_bytes(self, length: int) -> int:
        """What so many tokens take."""
        return math.ceil(length * self.bits / 8)


def clipped(names: Sequence[str]) -> list[str]:
    """Labels for names: a long one by its two ends, or, where others have the same ends, from where they differ on."""
    labels = [clip(name) for name in names]
    for label in {label for label in labels if labels.count(label) > 1}:
        places = [place for place, other in enumerate(labels) if other == label]
        first = len(os.path.commonprefix([names[place] for place in places]))
        for number, place in enumerate(places, start=1):
            rest = names[place][first:]
            labels[place] = f"{number}: ...{rest[: LONGEST_NAME - 6]}"
    return labels


def clip(name: str) -> str:
    """A long name by its two ends."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 3]}...{name[-half:]}"
