"""The tokens of an image: what one of them changes, and which images begin with the same one."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codec.files import BATCH, Codec
from codec.rate import encode
from data.transforms import EvalTransform, decode_as_shown, decode_image
from modeling.contribution import NORMS, images_of, other_codes
from modeling.titok import TiTok
from playground.compressing import Opened
from playground.models import TOKENIZERS
from utils.errors import UserError
from utils.images import to_array
from utils.paths import ROOT

NUM_OTHERS = 8  # codes that a token is replaced with
NUM_ALIKE = 12  # images that are shown for their first token
TEST_SETS = dict(zip(TOKENIZERS, ("emoji_test", "fashion_mnist_test"), strict=True))
OTHER_IMAGES = ("photos", "emoji", "fashion")  # for a tokenizer of one's own


@dataclass(frozen=True)
class Explored:
    """The tokens of one square, as a visitor has changed them.

    Args:
        about: What they are of.
        tokens, original: (n,) of 1 to N, as they are and as the encoder, or a file, gave them.
        image: (P, P, 3) uint8, decoded from `tokens`.
    """

    model: str
    about: str
    tokens: np.ndarray
    original: np.ndarray
    image: np.ndarray


@dataclass(frozen=True)
class Replacements:
    """What one token does.

    Args:
        codes: (K,), others that were tried in its place.
        images: (K, P, P, 3) uint8, with each of them.
        heat: (P, P) in [0, 1], how much they change every pixel: the mean over the codes of the sum over the channels,
            in shares of the largest that there is at any pixel.
        mean: Change of a channel, in grey levels of 255, over all pixels.
    """

    place: int
    codes: np.ndarray
    images: np.ndarray
    heat: np.ndarray
    mean: float


@dataclass(frozen=True)
class Alike:
    """Images of a test set that begin most like another.

    Args:
        images: (n, P, P, 3) uint8, those with the same first token first, then those with a near one.
        num_same: How many of `total` have the same.
    """

    images: np.ndarray
    num_same: int
    total: int


def explore(codec: Codec, tokens: Sequence[np.ndarray], about: str) -> Explored:
    """Begin with the tokens, T arrays of 1 to N, of an image; of several tiles with those of the middle one."""
    middle = len(tokens) // 2
    if len(tokens) > 1:
        about = f"{about}, its middle tile of {len(tokens)}"
    return Explored(codec.name, about, tokens[middle], tokens[middle], decode(codec, tokens[middle][None])[0])


def explore_file(codec: Codec, opened: Opened) -> Explored:
    """Begin with the tokens that a compressed file holds.

    Raises:
        UserError: It was cut before the first token of its middle tile.
    """
    read = codec.read(opened.data)
    if not read.certain[len(read.certain) // 2]:
        raise UserError("the file was cut before its middle tile, whose tokens would be shown: choose another one")
    tiles = [tile[:count] for tile, count in zip(read.tokens, read.certain, strict=True)]
    return explore(codec, tiles, opened.name)


def with_code(codec: Codec, explored: Explored, place: int, code: int) -> Explored:
    """The same with another code in one place."""
    tokens = explored.tokens.copy()
    tokens[place] = code
    return Explored(explored.model, explored.about, tokens, explored.original, decode(codec, tokens[None])[0])


def decode(codec: Codec, tokens: np.ndarray) -> np.ndarray:
    """(B, P, P, 3) uint8 of tokens (B, N)."""
    return to_array(_images(codec, torch.tensor(tokens)))


@torch.inference_mode()
def _images(codec: Codec, tokens: Tensor) -> Tensor:
    return images_of(codec.tokenizer, tokens.to(codec.tokenizer.latent_tokens.device))


def replacements(codec: Codec, explored: Explored, place: int, seed: int = 0) -> Replacements:
    """Replace a token by others drawn by chance, as `modeling.contribution` does for whole sets of images."""
    tokens = torch.tensor(explored.tokens)[None]
    size = codec.tokenizer.codebook_size
    codes = other_codes(tokens, [explored.about], codebook_size=size, num_draws=NUM_OTHERS, seed=seed)[0, place]
    trials = tokens.repeat(NUM_OTHERS, 1)
    trials[:, place] = codes
    images = _images(codec, trials)
    change = NORMS["l1"](images - _images(codec, tokens)).cpu()  # (K, 3, P, P)
    heat = change.sum(dim=1).mean(dim=0).numpy()
    return Replacements(
        place, codes.numpy(), to_array(images), heat / max(heat.max(), 1e-6), 255 * float(change.mean())
    )


@cache
def codebook_colours(tokenizer: TiTok) -> np.ndarray:
    """(V, 3) uint8, a colour for every code: alike codes look alike, by the codebook's three main directions."""
    codes = torch.arange(tokenizer.codebook_size, device=tokenizer.latent_tokens.device)
    with torch.inference_mode():
        vectors = tokenizer.quantize.lookup(codes).double().cpu().numpy()
    vectors -= vectors.mean(axis=0)
    directions = np.linalg.svd(vectors, full_matrices=False)[2][:3]
    places = vectors @ directions.T  # (V, up to 3)
    places = np.pad(places, ((0, 0), (0, 3 - places.shape[1])))
    ranks = places.argsort(axis=0).argsort(axis=0) / max(1, len(places) - 1)  # every brightness equally often
    return (60 + 180 * ranks).astype(np.uint8)


@dataclass(frozen=True)
class FirstTokens:
    """The images of a set by their first tokens: images (n, P, P, 3) uint8, codes (n,)."""

    images: np.ndarray
    codes: np.ndarray


@cache
def first_tokens(codec: Codec) -> FirstTokens:
    """Of the bundled test images of the codec's model, or of all single images that are bundled; encoded once."""
    images = np.stack(list(_known_images(codec.name, codec.side)))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    codes = np.concatenate([encode(codec.tokenizer, some).tokens[:, 0].cpu().numpy() for some in pixels.split(BATCH)])
    return FirstTokens(images, codes)


def alike(codec: Codec, tokens: np.ndarray) -> Alike:
    """The test images whose first token is nearest to that of `tokens` (n,), by the distance in the codebook."""
    known = first_tokens(codec)
    lookup = codec.tokenizer.quantize.lookup
    device = codec.tokenizer.latent_tokens.device
    with torch.inference_mode():
        own = lookup(torch.tensor([int(tokens[0])], device=device))
        distances = (lookup(torch.tensor(known.codes, device=device)) - own).norm(dim=-1).cpu().numpy()
    nearest = np.lexsort((np.arange(len(distances)), distances))[:NUM_ALIKE]
    return Alike(known.images[nearest], int((known.codes == tokens[0]).sum()), len(known.codes))


def _known_images(model: str, side: int) -> Iterator[np.ndarray]:
    """(P, P, 3) uint8."""
    transform = EvalTransform(side)
    if model in TEST_SETS:
        for shard in sorted((ROOT / "assets" / TEST_SETS[model]).glob("*.tar.gz")):
            for data in _members(shard):
                yield transform(decode_image(data)).permute(1, 2, 0).numpy()
        return
    for folder in OTHER_IMAGES:
        for path in sorted((ROOT / "assets" / folder).glob("*.png")):
            yield transform(decode_as_shown(path.read_bytes())).permute(1, 2, 0).numpy()


def _members(shard: Path) -> Iterator[bytes]:
    """The images of a shard."""
    with tarfile.open(shard) as archive:
        for member in archive:
            if member.name.endswith(".png"):
                yield archive.extractfile(member).read()
