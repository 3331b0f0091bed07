"""What the bundled models have seen, and what is said of images of another kind."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

COLOUR = 4  # mean difference of a pixel's channels, of 255, above which an image counts as coloured
WHITE = 240  # of 255, from which on a pixel counts as white


def is_coloured(image: Image.Image) -> bool:
    return float(np.ptp(np.asarray(image), axis=2).mean()) > COLOUR


def is_on_white(image: Image.Image) -> bool:
    """Whether all four corners are white, as around emoji and logos, and nearly never in photographs."""
    pixels = np.asarray(image)
    return int(min(pixels[y, x].min() for y in (0, -1) for x in (0, -1))) >= WHITE


class Domain(NamedTuple):
    """What a bundled model has seen, and what shows that an RGB image is of another kind."""

    data: str
    kind: str
    is_unlike: Callable[[Image.Image], bool]
    difference: str


DOMAINS = {
    "one-d-piece_fashion": Domain("Fashion-MNIST", "grey garments", is_coloured, "in colour"),
    "one-d-piece_emoji": Domain("emoji", "emoji on white", lambda image: not is_on_white(image), "not on white"),
}


def note_on(model: str, unlike: Sequence[str]) -> str:
    """What to expect of images such as a model of `DOMAINS` has not seen; empty where there are none.

    Args:
        unlike: What they are called.
    """
    if not unlike:
        return ""
    others = len(unlike) - 1
    are = f" and {others} more are" if others else " is"
    return (
        f"note: {warning(model, unlike[0] + are)}. For photographs take --config configs/eval/one-d-piece_s256.yaml "
        "(from the hub)."
    )


def warning(model: str, images_are: str) -> str:
    """What to expect of images such as a model of `DOMAINS` has not seen, and which ones: "this image is"."""
    domain = DOMAINS[model]
    return f"{model} has seen nothing but {domain.kind}, and {images_are} {domain.difference}: expect a poor image"
