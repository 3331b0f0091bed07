"""What each token contributes to the image: the change at every pixel when it is replaced, or added to a prefix."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from modeling.titok import TiTok
from modeling.tokenizers import encode_tokens
from utils.evaluation.statistics import doubled
from utils.inference import Arithmetic, choose_batch_size

NORMS = {"l1": Tensor.abs, "l2": Tensor.square}


def other_codes(tokens: Tensor, keys: list[str], *, codebook_size: int, num_draws: int, seed: int) -> Tensor:
    """For each token `num_draws` codes that differ from it, drawn uniformly with repetition: (B, N, num_draws).

    They depend on the seed and the image's key alone, and not on the images beside it.

    Args:
        tokens: (B, N) in 0..codebook_size-1.
        keys: Names of the B images.
    """
    drawn = []
    for key in keys:
        name = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        draws = np.random.default_rng([seed, name])
        drawn.append(draws.integers(1, codebook_size, size=(tokens.shape[1], num_draws)))
    steps = torch.from_numpy(np.stack(drawn)).to(tokens.device)
    return (tokens[..., None] + steps) % codebook_size  # a step of 1..V-1 never comes back to the same code


@torch.no_grad()
def replacement_changes(
    tokenizer: TiTok, tokens: Tensor, codes: Tensor, batch_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """How the images change when one token at a time is replaced (arXiv 2501.10064, the token contributions).

    Args:
        tokens: (B, N).
        codes: What each token is replaced with, in turn: (B, N, K).
        batch_size: Most token sequences that are decoded at once; B x K where that is more.

    Yields:
        Indices of T tokens, and what replacing each of them changes, (B, T, K, 3, P, P) in [-1, 1].
    """
    num_images, num_tokens, num_draws = codes.shape
    whole = images_of(tokenizer, tokens)[:, None, None]
    step = max(1, batch_size // (num_images * num_draws))
    for first in range(0, num_tokens, step):
        indices = slice(first, min(first + step, num_tokens))
        places = torch.arange(indices.start, indices.stop, device=tokens.device)
        changed = tokens[:, None, None].repeat(1, len(places), num_draws, 1)  # (B, T, K, N)
        changed.scatter_(3, places[None, :, None, None].expand(*changed.shape[:3], 1), codes[:, indices, :, None])
        yield indices, images_of(tokenizer, changed.flatten(0, 2)).unflatten(0, changed.shape[:3]) - whole


@torch.no_grad()
def prefix_changes(tokenizer: TiTok, tokens: Tensor, no_tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """How the images change when each token is added to the ones before it; as `replacement_changes`, with K = 1.

    Args:
        tokens: (B, N).
        no_tokens: The image that the first token is added to, (3, P, P).
    """
    before = no_tokens
    for length in range(1, tokens.shape[1] + 1):
        images = images_of(tokenizer, tokens[:, :length])
        yield slice(length - 1, length), (images - before)[:, None, None]
        before = images


@torch.no_grad()
def mean_of_one_token(tokenizer: TiTok, counts: Tensor, batch_size: int) -> Tensor:
    """The mean of the images that the first token alone gives, (3, P, P).

    It stands for the prefix of no tokens, from which no model decodes: what is known before any token is read.

    Args:
        counts: How often each code is the first one, (V,).
    """
    codes = counts.nonzero()[:, 0]
    total: Tensor | float = 0.0
    for some in codes.split(batch_size):
        images = images_of(tokenizer, some[:, None].to(tokenizer.latent_tokens.device))
        total = total + torch.einsum("b,bchw->chw", counts[some].to(images), images)
    return total / counts.sum()


def images_of(tokenizer: TiTok, tokens: Tensor) -> Tensor:
    """Images (B, 3, P, P) of tokens (B, K) as people see them: clamped to [0, 1], not rounded, since small changes
    would be lost."""
    return tokenizer.decode_tokens(tokens).float().clamp(0, 1)


class Contributions:
    """Sums over images of the pixel changes that the tokens make, in float64.

    Args:
        num_tokens, image_size: N and P.
        device: Where the changes are.
    """

    def __init__(self, num_tokens: int, image_size: int, device: str | torch.device = "cpu"):
        self.device = doubled(torch.empty(0, device=device)).device
        self.count = 0
        self.sums = {}
        for norm in NORMS:
            self.sums[f"map_{norm}"] = self._zeros(num_tokens, image_size, image_size)
            self.sums[f"mean_{norm}"] = self._zeros(num_tokens)
            self.sums[f"square_{norm}"] = self._zeros(num_tokens)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def update(self, tokens: slice, change: Tensor) -> None:
        """Add what tokens change in some images: (B, T, K, C, P, P), averaged over K, summed over the channels C."""
        for norm, size_of in NORMS.items():
            maps = doubled(size_of(change).sum(dim=3).mean(dim=2))  # (B, T, P, P)
            means = maps.mean(dim=(2, 3))  # (B, T)
            self.sums[f"map_{norm}"][tokens] += maps.sum(dim=0)
            self.sums[f"mean_{norm}"][tokens] += means.sum(dim=0)
            self.sums[f"square_{norm}"][tokens] += means.square().sum(dim=0)

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums and the count, to be kept, and added to those of other images."""
        return {name: value.cpu().numpy() for name, value in self.sums.items()} | {"count": np.array(self.count)}


class Measurement:
    """Adds up what the tokens of images change, under one set of settings.

    Args:
        arithmetic: The context in which the tokenizer decodes.
        mode: "replace", each token by others in turn, or "prefix", each added to those before it.
        num_draws: Codes that replace each token.
        seed: Draws them.
        batch_size: Most token sequences that are decoded at once, as `choose_batch_size` takes it.
    """

    def __init__(
        self, tokenizer: TiTok, arithmetic: Arithmetic, *, mode: str, num_draws: int, seed: int, batch_size: int | str
    ):
        self.tokenizer, self.arithmetic, self.mode = tokenizer, arithmetic, mode
        self.num_draws, self.seed = num_draws, seed
        self.device = tokenizer.latent_tokens.device
        self.batch_size = choose_batch_size(batch_size, self._try_batch, self.device)
        self.no_tokens: Tensor | None = None

    @torch.no_grad()
    def _try_batch(self, num: int) -> None:
        tokens = torch.zeros(num, self.tokenizer.num_latent_tokens, dtype=torch.long, device=self.device)
        with self.arithmetic():
            images_of(self.tokenizer, tokens)

    @property
    def num_images(self) -> int:
        """Images in a batch."""
        return max(1, self.batch_size // self.num_draws)

    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens (B, N) of images (B, 3, P, P) uint8."""
        with torch.no_grad():
            return encode_tokens(self.tokenizer, pixels.to(self.device).float() / 255)

    def count_first_codes(self, batches: Iterable[tuple[list[str], Tensor]]) -> Tensor:
        """How often each code is an image's first token, (V,): what prefixes are measured from is made of it."""
        counts = torch.zeros(self.tokenizer.codebook_size, dtype=torch.long)
        for _, pixels in batches:
            counts += self.encode(pixels)[:, 0].cpu().bincount(minlength=len(counts))
        return counts

    def start_from(self, counts: Tensor) -> None:
        """Take the mean image of the first tokens that were counted, over all images, for that of no tokens."""
        with self.arithmetic():
            self.no_tokens = mean_of_one_token(self.tokenizer, counts, self.batch_size)

    def sums(
        self, batches: Iterable[tuple[list[str], Tensor]], done: Callable[[int], None] = lambda num: None
    ) -> dict[str, np.ndarray]:
        """The sums of `Contributions.arrays` over images.

        Args:
            batches: Keys and images (B, 3, P, P) uint8.
            done: Told of the images of each batch that is done.
        """
        total = Contributions(self.tokenizer.num_latent_tokens, self.tokenizer.image_size, self.device)
        for keys, pixels in batches:
            tokens = self.encode(pixels)
            with self.arithmetic():
                for places, change in self._changes(keys, tokens):
                    total.update(places, change)
            total.count += len(keys)
            done(len(keys))
        return total.arrays()

    def _changes(self, keys: list[str], tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
        if self.mode == "prefix":
            assert self.no_tokens is not None, "start_from comes first"
            return prefix_changes(self.tokenizer, tokens, self.no_tokens)
        draws = {"codebook_size": self.tokenizer.codebook_size, "num_draws": self.num_draws}
        codes = other_codes(tokens, keys, seed=self.seed, **draws)
        return replacement_changes(self.tokenizer, tokens, codes, self.batch_size)


def contributions(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means over images, from the sums that `Contributions.arrays` gives.

    Returns:
        `length_to_diff_l1` and `length_to_diff_l2`, (N, P, P): the mean absolute and squared change at each pixel,
        summed over the channels, which each token makes. `mean_l1` and `mean_l2`, (N,): their means over the pixels;
        `standard_error_l1` and `standard_error_l2`: those means' standard errors over images, NaN for one image.
        `count`: the number of images.
    """
    count = int(sums["count"])
    result = {f"length_to_diff_{norm}": sums[f"map_{norm}"] / count for norm in NORMS}
    for norm in NORMS:
        result[f"mean_{norm}"] = mean = sums[f"mean_{norm}"] / count
        spread = np.maximum(sums[f"square_{norm}"] / count - mean**2, 0)
        result[f"standard_error_{norm}"] = np.sqrt(spread / (count - 1)) if count > 1 else np.full_like(mean, np.nan)
    return result | {"count": np.array(count)}
