"""JPEG, JPEG 2000, WebP and AVIF through Pillow: whole files in memory, the best one that fits a budget of bytes."""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, features
from torch import Tensor

from utils.errors import UserError


@dataclass(frozen=True)
class Format:
    """One lossy format.

    Attributes:
        title: Its name in tables.
        settings: From the smallest file to the best image.
        options: Pillow's arguments for a setting and the image's shorter side.
        library: Pillow's name of the library behind it; None where it needs none.
        header: Bytes of a file that say nothing of the image, where a file of a small image does not tell.
        scales_down: Whether it is also tried on images that are scaled down first.
    """

    title: str
    pillow_name: str
    settings: tuple[float, ...]
    options: Callable[[float, int], dict]
    library: str | None = None
    header: int | None = None
    scales_down: bool = True

    def encode(self, pixels: np.ndarray, setting: float) -> bytes:
        """The file of an image (H, W, 3) uint8; grey ones are stored as grey where the format can."""
        file = io.BytesIO()
        image = Image.fromarray(pixels)
        if is_grey(pixels):
            image = image.convert("L")
        image.save(file, self.pillow_name, **self.options(setting, min(image.size)))
        return file.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        """(H, W, 3) uint8 of a file."""
        return decode(data)

    def files(self, pixels: np.ndarray, limit: int) -> Iterator[tuple[bytes, float]]:
        """Files of at most `limit` bytes and the seconds each took, from the lowest setting to where two are larger."""
        misses = 0
        for setting in self.settings:
            start = time.perf_counter()
            data = self.encode(pixels, setting)
            if len(data) <= limit:
                yield data, time.perf_counter() - start
                continue
            misses += 1
            if misses == 2:  # sizes need not rise strictly with the setting
                return


def is_grey(pixels: np.ndarray) -> bool:
    """The three channels of (H, W, 3) are equal."""
    return bool((pixels == pixels[..., :1]).all())


def decode(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 of a file."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def _jpeg2000_options(rate: float, side: int) -> dict:
    # The bare codestream: the usual container adds 85 bytes. More wavelet levels than the image has are an error.
    levels = min(6, side.bit_length())
    return {"quality_mode": "rates", "quality_layers": [rate], "irreversible": True, "no_jp2": True} | {
        "num_resolutions": levels
    }


QUALITIES = (0, 1, 2, 4, 7, 10, 14, 19, 25, 32, 40, 50, 60, 70, 80, 90)
RATES = (1000, 500, 250, 150, 100, 70, 50, 35, 25, 18, 13, 9, 6.5, 4.5, 3.2, 2.2, 1.5)
FORMATS = {
    "jpeg": Format("JPEG", "JPEG", QUALITIES, lambda quality, side: {"quality": quality, "optimize": True}, "jpg"),
    "jpeg2000": Format("JPEG 2000", "JPEG2000", RATES, _jpeg2000_options, "jpg_2000"),
    "webp": Format("WebP", "WEBP", QUALITIES, lambda quality, side: {"quality": quality, "method": 6}, "webp"),
    "avif": Format("AVIF", "AVIF", QUALITIES, lambda quality, side: {"quality": quality, "speed": 6}, "avif"),
}


def available(name: str) -> Format:
    """The format of that name.

    Raises:
        UserError: There is none, or this Pillow was built without it.
    """
    if name not in FORMATS:
        raise UserError(f"an image format is one of {', '.join(FORMATS)}, got {name}")
    if not features.check(FORMATS[name].library or "zlib"):
        raise UserError(f"this Pillow was built without {FORMATS[name].title}: install Pillow 11.3 or newer")
    return FORMATS[name]


@cache
def header_bytes(image_format: Format, grey: bool, side: int) -> int:
    """Bytes of a file that say nothing of the image: those of a small flat one at the lowest setting.

    It is 8 x 8, or the smallest that has the options of the image's shorter `side`: JPEG 2000 describes each level.
    """
    if image_format.header is not None:
        return image_format.header
    options = image_format.options(image_format.settings[0], side)
    sides = (8, *range(1, side + 1))
    small = next(size for size in sides if image_format.options(image_format.settings[0], size) == options)
    flat = np.full((small, small, 3), 128, np.uint8)
    if not grey:
        flat[..., 0] = 129
    return len(image_format.encode(flat, image_format.settings[0]))


@dataclass(frozen=True)
class Candidate:
    """An image stored one way.

    Attributes:
        num_bytes: Size of the file, header included.
        header: Bytes of its header.
        error: Mean squared error of what it gives back.
        scale: Of the sides it was stored with; 1 is plainly.
        encoding_time, decoding_time: In seconds.
    """

    num_bytes: int
    header: int
    error: float
    scale: float
    pixels: np.ndarray
    encoding_time: float = 0.0
    decoding_time: float = 0.0

    def counted_bytes(self, free_header: bool) -> int:
        """Size of the file, or of what is not header."""
        return max(0, self.num_bytes - self.header) if free_header else self.num_bytes


def candidates(
    image_format: Format, pixels: np.ndarray, scales: Sequence[float], limit: int, free_header: bool = False
) -> Iterator[Candidate]:
    """The image at every setting and scale whose file has at most `limit` bytes.

    Args:
        pixels: (H, W, 3) uint8.
        scales: Sides are multiplied by these before storing (Lanczos), and brought back after it (bicubic).
        free_header: Of what is not header.
    """
    height, width = pixels.shape[:2]
    for scale in scales:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = _resized(pixels, size, Image.Resampling.LANCZOS)
        header = header_bytes(image_format, is_grey(small), min(size))
        for data, encoding_time in image_format.files(small, limit + free_header * header):
            start = time.perf_counter()
            restored = _resized(image_format.decode(data), (width, height), Image.Resampling.BICUBIC)
            decoding_time = time.perf_counter() - start
            error = float(np.square(restored.astype(np.float32) - pixels.astype(np.float32)).mean())
            yield Candidate(len(data), header, error, scale, restored, encoding_time, decoding_time)


def _resized(pixels: np.ndarray, size: tuple[int, int], resampling: Image.Resampling) -> np.ndarray:
    """(H, W, 3) as (size[1], size[0], 3); itself where it has that size."""
    if pixels.shape[1::-1] == size:
        return pixels
    return np.array(Image.fromarray(pixels).resize(size, resampling))


def best_within(found: Sequence[Candidate], budget: int, free_header: bool = False) -> Candidate | None:
    """The candidate nearest to the image among those of at most `budget` bytes; None where none fits.

    Args:
        free_header: Of what is not header.
    """
    fitting = [candidate for candidate in found if candidate.counted_bytes(free_header) <= budget]
    return min(fitting, key=lambda candidate: (candidate.error, candidate.num_bytes), default=None)


class Storage:
    """What comes back of images that are stored in a format.

    Args:
        image_format: None gives the images themselves.

    Attributes:
        num_bytes: Of the files of all images so far, headers included.
    """

    def __init__(self, image_format: Format | None, setting: float):
        self.image_format, self.setting = image_format, setting
        self.num_bytes = 0

    def __call__(self, pixels: Tensor) -> np.ndarray:
        """(B, H, W, 3) uint8 of (B, 3, H, W) uint8."""
        images = pixels.permute(0, 2, 3, 1).numpy()
        if self.image_format is None:
            return images
        files = [self.image_format.encode(image, self.setting) for image in images]
        self.num_bytes += sum(map(len, files))
        return np.stack([decode(file) for file in files])
