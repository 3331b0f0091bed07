"""Images whose tokens begin alike, for people: what the prefixes are, how frequent, and sheets of their images."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.images import contact_sheet, tile_side
from utils.token_statistics import frequent_prefixes, nearest_prefixes, with_prefix

NUM_LISTED = 10
NUM_NEAREST = 5
ROW_LENGTH = 10  # images
TILE_RANGE = 96, 192  # pixels a side
Prefix = tuple[int, ...]


def parse_prefix(text: str, tokens: np.ndarray) -> Prefix:
    """The codes of a --prefix such as 774,864.

    Args:
        tokens: Of all images, (n, N).

    Raises:
        UserError: It is no such thing, or no image's tokens begin with it.
    """
    words, num_tokens = text.split(","), tokens.shape[1]
    if not all(re.fullmatch(r"\d{1,9}", word.strip()) for word in words):
        raise UserError(f"--prefix takes codes such as 774 or 774,864, got {text}")
    if len(words) > num_tokens:
        raise UserError(f"--prefix must have at most {num_tokens} codes, the length of a sequence, got {len(words)}")
    prefix = tuple(int(word) for word in words)
    if not len(with_prefix(tokens, prefix)):
        nearest = nearest_prefixes(tokens, prefix, NUM_NEAREST)
        listed = "; ".join(f"{text_of(other)} ({count} images)" for other, count in nearest)
        raise UserError(f"no image's tokens begin with {text_of(prefix)}; the nearest that exist are {listed}")
    return prefix


def text_of(prefix: Prefix) -> str:
    return ",".join(map(str, prefix))


def most_frequent(tokens: np.ndarray) -> tuple[list[Prefix], str]:
    """The most frequent first codes of tokens (n, N), and a list of them and of the most frequent pairs."""
    codes = frequent_prefixes(tokens, 1)
    lines = [f"{len(tokens):,} images; {len(codes)} different first codes, the most frequent:"]
    lines += _counts(codes[:NUM_LISTED], len(tokens))
    if tokens.shape[1] > 1:
        pairs = frequent_prefixes(tokens, 2)
        lines.append(f"{len(pairs)} different first pairs, the most frequent:")
        lines += _counts(pairs[:NUM_LISTED], len(tokens))
    return [prefix for prefix, _ in codes[:NUM_LISTED]], "\n".join(lines)


def _counts(prefixes: Sequence[tuple[Prefix, int]], num_images: int) -> list[str]:
    return [
        f"  {text_of(prefix):>12} {count:8,} {'image ' if count == 1 else 'images'} {count / num_images:7.2%}"
        for prefix, count in prefixes
    ]


def drawn(indices: np.ndarray, most: int, draws: np.random.Generator) -> np.ndarray:
    """All of few indices, some of many, sorted."""
    return indices if len(indices) <= most else np.sort(draws.choice(indices, most, False))


def title_of(prefix: Prefix, num_found: int, num_shown: int, num_images: int) -> str:
    """What stands over the images with a prefix."""
    some = f", {num_shown} shown" if num_shown < num_found else ""
    tokens_are = "token" if len(prefix) == 1 else "tokens"
    return f"first {tokens_are} {text_of(prefix)}: {num_found:,} of {num_images:,} images{some}"


def grid(images: Sequence[Image.Image], columns: int, title: str) -> Image.Image:
    """Rows of images; where they are fewer than a row, a narrower one, and no place is blank but in the last row."""
    rows = [images[first : first + columns] for first in range(0, len(images), columns)]
    return contact_sheet(rows, title=title, tile=tile_side(images[0].width, *TILE_RANGE))


def overview(
    shown: Mapping[Prefix, np.ndarray], found: Mapping[Prefix, np.ndarray], images: Mapping[int, Image.Image]
) -> Image.Image:
    """A row of images for each prefix, beside the prefix and the number of images that have it.

    Args:
        shown, found: Indices of some and of all the images with a prefix.
        images: By index.
    """
    rows = [[images[index] for index in indices[:ROW_LENGTH].tolist()] for indices in shown.values()]
    titles = [f"{text_of(prefix)}   ({len(indices):,})" for prefix, indices in found.items()]
    return contact_sheet(rows, row_titles=titles, tile=tile_side(rows[0][0].width, *TILE_RANGE))
