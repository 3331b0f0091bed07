"""ThumbHash and BlurHash: what web pages show while an image loads, in 20 to 30 bytes."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.evaluation.image_formats import Format

SIDE = 32  # pixels that a placeholder is drawn with before it is enlarged
LARGEST_THUMB = 100  # pixels a side that ThumbHash takes


@dataclass(frozen=True)
class ThumbHash(Format):
    """ThumbHash: a few frequencies of lightness and colour, one setting; no saturation is added when it is drawn."""

    def encode(self, pixels: np.ndarray, setting: float) -> bytes:
        from thumbhash.encode import rgba_to_thumbhash

        image = Image.fromarray(pixels).convert("RGBA")
        image.thumbnail((LARGEST_THUMB, LARGEST_THUMB))
        return bytes(rgba_to_thumbhash(*image.size, np.asarray(image).flatten().tolist()))

    def decode(self, data: bytes) -> np.ndarray:
        from thumbhash import thumbhash_to_image

        return np.array(thumbhash_to_image(data, base_size=SIDE, saturation_boost=1.0).convert("RGB"))


@dataclass(frozen=True)
class BlurHash(Format):
    """BlurHash: a text of colour waves; the setting's tens say how many across, its ones how many down."""

    def encode(self, pixels: np.ndarray, setting: float) -> bytes:
        import blurhash

        image = Image.fromarray(pixels)
        image.thumbnail((SIDE, SIDE))  # as its authors advise: waves so long lose nothing
        return blurhash.encode(np.asarray(image), *divmod(int(setting), 10)).encode("ascii")

    def decode(self, data: bytes) -> np.ndarray:
        import blurhash

        return np.array(blurhash.decode(data.decode("ascii"), SIDE, SIDE), dtype=np.uint8)


WAVES = sorted((10 * across + down for across in range(1, 6) for down in range(1, 6)), key=lambda x: x // 10 * (x % 10))
PLACEHOLDERS = {
    "thumbhash": ThumbHash("ThumbHash", "", (0,), lambda setting, side: {}, header=0, scales_down=False),
    "blurhash": BlurHash("BlurHash", "", tuple(WAVES), lambda setting, side: {}, header=0, scales_down=False),
}


def placeholder(name: str) -> Format:
    """The placeholder of that name.

    Raises:
        UserError: Its package is not installed.
    """
    try:
        if name == "thumbhash":
            import thumbhash  # noqa: F401
        else:
            import blurhash  # noqa: F401
    except ImportError as error:
        # thumbhash-python asks for a Pillow of before 11, and works with later ones.
        package = {"thumbhash": "--no-deps thumbhash-python", "blurhash": "blurhash"}[name]
        raise UserError(f"{name} needs a package that is not there: pip install {package}") from error
    return PLACEHOLDERS[name]
