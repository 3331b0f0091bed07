"""From the bytes of an image to the pixels that a model sees."""

import io
import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data import DataError
from data.file_formats import FORMATS

# An image of this many pixels takes 400 MB as RGB; larger ones are more likely attacks than photographs.
MAX_PIXELS = 1 << 27
# What is done, for records.
AS_PUBLISHED = "8-bit RGB, transparency dropped, EXIF orientation not applied"
AS_SHOWN = "8-bit RGB, transparency on white, upright by EXIF"
# Tags of TIFF files
BITS_PER_SAMPLE, PHOTOMETRIC, SMALLEST_SAMPLE, LARGEST_SAMPLE = 258, 262, 340, 341
WHITE_IS_ZERO = 0


def decode_image(data: bytes) -> Image.Image:
    """Decode an image file to 8-bit RGB, as the published preprocessing does.

    Transparency is dropped and the orientation noted in a photograph's EXIF data is not applied (but to a TIFF, which
    Pillow turns by itself).

    Raises:
        DataError: The bytes are not a whole image of a known format and depth, or it has more than `MAX_PIXELS` pixels.
    """
    return _decoded(data, lambda image: image.convert("RGB"))


def decode_as_shown(data: bytes) -> Image.Image:
    """Decode a person's own image file to 8-bit RGB as a viewer shows it: upright, and transparency on white.

    Raises:
        DataError: As `decode_image`.
    """
    return _decoded(data, as_shown)


def decode_as_stored(data: bytes) -> Image.Image:
    """Decode a person's own image file with the transparency and the EXIF data that it has; see `as_shown`.

    Raises:
        DataError: As `decode_image`.
    """
    return _decoded(data, Image.Image.copy)


def as_shown(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode as a viewer shows it: upright, and transparency on white."""
    return _on_white(_upright(_with_eight_bits(image)))


def bytes_as_shown(data: bytes) -> bytes:
    """The file itself where `decode_image` gives what a viewer shows, and where it is broken; else that as a PNG."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            if is_upright and not image.has_transparency_data:
                return data
        file = io.BytesIO()
        decode_as_shown(data).save(file, "PNG")
        return file.getvalue()
    except Exception:  # whoever reads it says what is wrong
        return data


def check_size(width: int, height: int) -> None:
    """Refuse images of more than `MAX_PIXELS` pixels."""
    if width * height > MAX_PIXELS:
        raise DataError(f"expected an image of at most {MAX_PIXELS} pixels, got {width} x {height}: scale it down")


def _decoded(data: bytes, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images at its own limit; ours is checked below.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size(*image.size)
                image.load()
                return to_rgb(_with_eight_bits(image))
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of any class for broken bytes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, Image.DecompressionBombError):  # before we could look at its size
            raise DataError(f"expected an image of at most {MAX_PIXELS} pixels, got far more: scale it down") from error
        if isinstance(error, UnidentifiedImageError):  # its text names an object in memory
            reason = "it is in none of these formats, or its samples have another depth"
        raise DataError(
            f"expected a whole image ({', '.join(FORMATS)}), got bytes that do not decode: {reason}"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # an EXIF block may be broken in any way; viewers then show the pixels as they are stored
        return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _with_eight_bits(image: Image.Image) -> Image.Image:
    """The image in a mode that Pillow converts to RGB; one of more than 8 bits a sample in grey, scaled."""
    if image.mode in ("La", "RGBa"):  # premultiplied
        return image.convert(image.mode.upper())
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    low, high = _range_of(image, values)
    # Of whole numbers the high byte, of others the nearest.
    scaled = values >> (high.bit_length() - 8) if isinstance(high, int) else (values - low) * (255 / (high - low)) + 0.5
    grey = np.clip(scaled, 0, 255).astype(np.uint8)
    if _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    result, hidden = Image.fromarray(grey), image.info.get("transparency")
    if isinstance(hidden, int):
        result = Image.merge("LA", [result, Image.fromarray((values != hidden) * np.uint8(255))])
    result.info |= {name: value for name, value in image.info.items() if name != "transparency"}  # EXIF among them
    return result


def _range_of(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """Black and white of an image of deep samples, whole numbers where they are 0 and 2^bits - 1.

    Others are what a TIFF file says, or 0 and 1 of floats that are all between them.
    """
    if image.mode.startswith("I;") or image.format == "PNG":
        return 0, 2 ** (_tag(image, BITS_PER_SAMPLE) or 16) - 1
    low, high = _tag(image, SMALLEST_SAMPLE), _tag(image, LARGEST_SAMPLE)
    finite = bool(np.isfinite(values).all())
    if finite and low is not None and high is not None and low < high:
        return float(low), float(high)
    if finite and image.mode == "F" and 0 <= values.min() <= values.max() <= 1:
        return 0.0, 1.0
    raise DataError(
        f"expected samples of 8 or 16 bits, or floats in 0..1, got mode {image.mode}, "
        f"{'floats' if image.mode == 'F' else 'integers'} in {values.min():g}..{values.max():g}, and the file does not "
        "say which are black and white: save it with 8 or 16 bits a sample"
    )


def _tag(image: Image.Image, number: int) -> float | None:
    """The first value of a TIFF file's tag; None where there is none, as in all other files."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


def resize_shorter_edge(image: Image.Image, size: int) -> Image.Image:
    """Scale an image so that its shorter edge has `size` pixels: bicubic, antialiased, on 8 bits."""
    shorter, longer = sorted(image.size)
    check_size(size, size * longer // shorter)
    width, height = (side * size // shorter for side in image.size)  # rounded down, as torchvision does
    return image.resize((width, height), Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The square of `size` pixels in the middle; of two middles the one that torchvision takes."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class EvalTransform:
    """The pixels of an image for evaluation: shorter edge to the crop's size, centre crop.

    Args:
        crop_size: Side P of the result.
        decoding: How the image was made of its file, for the record.
    """

    def __init__(self, crop_size: int, decoding: str = AS_PUBLISHED):
        self.crop_size, self.decoding = crop_size, decoding

    @property
    def description(self) -> str:
        """What is done, for the record of an evaluation."""
        size = self.crop_size
        scaling = f"shorter edge to {size} (bicubic, antialiased, on 8 bits), centre crop of {size} x {size}"
        return f"{self.decoding}, {scaling}"

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """(3, P, P) uint8 from an RGB image of any size."""
        image = resize_shorter_edge(image, self.crop_size)
        return to_tensor(centre_crop(image, self.crop_size))


class TrainTransform:
    """The pixels of an image for training: shorter edge scaled, random or centre crop, random mirroring.

    Args:
        resize_shorter_edge: Pixels of the shorter edge before the crop, at least `crop_size`.
        crop_size: Side P of the result.
        random_crop: Crop anywhere, otherwise at the centre.
        random_flip: Mirror left and right with probability 1/2.
    """

    def __init__(self, resize_shorter_edge: int, crop_size: int, random_crop: bool, random_flip: bool):
        if resize_shorter_edge < crop_size:
            raise DataError(
                f"dataset.preprocessing.resize_shorter_edge must be at least crop_size ({crop_size}), got "
                f"{resize_shorter_edge}: the crop would not fit"
            )
        self.resize_shorter_edge = resize_shorter_edge
        self.crop_size = crop_size
        self.random_crop = random_crop
        self.random_flip = random_flip

    def __call__(self, image: Image.Image, rng: random.Random) -> torch.Tensor:
        """(3, P, P) uint8 from an RGB image of any size; all chance comes from `rng`."""
        image = resize_shorter_edge(image, self.resize_shorter_edge)
        if self.random_crop:
            left = rng.randint(0, image.width - self.crop_size)
            top = rng.randint(0, image.height - self.crop_size)
            image = image.crop((left, top, left + self.crop_size, top + self.crop_size))
        else:
            image = centre_crop(image, self.crop_size)
        if self.random_flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image)
