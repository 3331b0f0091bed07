"""From the bytes of an image to the pixels that a model sees."""

import io
import random
import warnings

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data import DataError

# An image of this many pixels takes 400 MB as RGB; larger ones are more likely attacks than photographs.
MAX_PIXELS = 1 << 27
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode_image(data: bytes) -> Image.Image:
    """Decode an image file to 8-bit RGB.

    Transparency is dropped and the orientation noted in a photograph's EXIF data is not applied, as in the published
    preprocessing; of 16-bit grey images the high byte is kept.

    Raises:
        DataError: The bytes are not a whole image of a known format, or it has more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images at its own limit; ours is checked below.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                _check_size(width, height)
                if image.mode.startswith("I"):
                    # convert() would clip 16 bits at 255: nearly everything would be white.
                    image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
                return image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of any class for broken bytes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"expected a whole image ({', '.join(FORMATS)}), got bytes that do not decode: {reason}"
        ) from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"expected an image of at most {MAX_PIXELS} pixels, got {width} x {height}: scale it down")


def resize_shorter_edge(image: Image.Image, size: int) -> Image.Image:
    """Scale an image so that its shorter edge has `size` pixels: bicubic, antialiased, on 8 bits."""
    shorter, longer = sorted(image.size)
    _check_size(size, size * longer // shorter)
    return F.resize(image, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)


class EvalTransform:
    """The pixels of an image for evaluation: shorter edge to the crop's size, centre crop.

    Args:
        crop_size: Side P of the result.
    """

    def __init__(self, crop_size: int):
        self.crop_size = crop_size

    @property
    def description(self) -> str:
        """What is done, for the record of an evaluation."""
        size = self.crop_size
        return f"8-bit RGB, shorter edge to {size} (bicubic, antialiased, on 8 bits), centre crop of {size} x {size}"

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """(3, P, P) uint8 from an RGB image of any size."""
        image = resize_shorter_edge(image, self.crop_size)
        return F.pil_to_tensor(F.center_crop(image, [self.crop_size]))


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
            image = F.center_crop(image, [self.crop_size])
        if self.random_flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return F.pil_to_tensor(image)
