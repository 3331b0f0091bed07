"""What visitors give: read within bounds, and deleted as soon as it is read."""

import contextlib
import io
from pathlib import Path

from PIL import Image

from codec.bitstream import MAGIC
from codec.conversions import EXTENSION
from data.file_formats import FORMATS
from data.transforms import decode_as_stored
from utils.errors import UserError

MAX_BYTES = 20 << 20
MAX_PIXELS = 1 << 25  # 100 MB as RGB, for every visitor


def take(path: Path) -> bytes:
    """The bytes of an uploaded file, which is gone then, and its folder too where it held no other.

    Raises:
        UserError: It is empty or too large.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path.name} has {size:,} bytes, and this page takes {MAX_BYTES:,}: scale it down first")
        if not size:
            raise UserError(f"{path.name} is empty: choose another file")
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def is_compressed(name: str, data: bytes) -> bool:
    """Whether a file means to be a .1dp."""
    return name.lower().endswith(EXTENSION) or data[:1] == bytes([MAGIC])


def open_image(data: bytes) -> Image.Image:
    """An image as it is stored, for a codec.

    Raises:
        UserError: It is none, or has too many pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
    except Exception:  # Pillow's plugins raise errors of any class; decoding says below what is wrong
        size = 0, 0
    check_pixels(*size)
    return decode_as_stored(data)


def check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"the image has {width:,} x {height:,} pixels, and this page takes {MAX_PIXELS // 10**6} million: scale "
            "it down first, or use scripts/compress.py"
        )
