"""Batches of tokens from a token set, for training and evaluation of generators."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from data import DataError
from data.batches import Batch
from data.image_folder import GlobalBatches, evaluation_batches
from data.token_sets import MANIFEST, TokenSet, read_token_manifest
from utils.paths import ROOT

logger = logging.getLogger(__name__)


class TokenBatches:
    """Batches of one rank. No workers: reading a batch takes far less than the network's step.

    Attributes:
        num_bad: Always 0; broken images were counted when the set was made.
        expected: Images of an evaluation, all ranks together.
    """

    num_bad = 0

    def __init__(
        self,
        token_set: TokenSet,
        batches: Iterable[Any],
        variant_of: Callable[[int], np.ndarray] | None,
        expected: int | None = None,
    ):
        self.token_set, self.batches, self.variant_of = token_set, batches, variant_of
        self.expected = expected

    def __iter__(self) -> Iterator[Batch]:
        for samples in self.batches:
            if self.variant_of is None:
                yield self.token_set.batch(np.array(samples), 0)
            else:
                variants = np.array([self.variant_of(epoch)[index] for epoch, index in samples])
                yield self.token_set.batch(np.array([index for _, index in samples]), variants)


def training_tokens(config: DictConfig, start_batch: int, *, rank: int, world_size: int) -> TokenBatches:
    """Endless training batches of a rank, from any batch on: a permutation an epoch, a variant drawn for each image.

    Order and variants are functions of `training.seed`, the epoch and the image alone.
    """
    token_set = TokenSet(token_folder(config, "train"))
    seed = config.training.seed
    batches = GlobalBatches(
        len(token_set),
        config.training.per_gpu_batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start_batch=start_batch,
    )

    @functools.lru_cache(maxsize=2)
    def variant_of(epoch: int) -> np.ndarray:
        random = np.random.default_rng([seed, epoch, 1])  # the order is drawn from [seed, epoch]
        return random.integers(token_set.num_variants, size=len(token_set), dtype=np.uint16)

    return TokenBatches(token_set, batches, variant_of)


def evaluation_tokens(config: DictConfig, *, rank: int, world_size: int) -> TokenBatches:
    """This rank's share of the evaluation split, every image once, in its first variant (the centre crop).

    `dataset.params.max_eval_examples` takes so many of them, evenly spaced.
    """
    token_set = TokenSet(token_folder(config, "eval"))
    batch_size = config.training.per_gpu_batch_size
    most = config.dataset.params.get("max_eval_examples")
    expected = len(token_set) if most is None else min(most, len(token_set))
    batches = evaluation_batches(len(token_set), batch_size, rank=rank, world_size=world_size, num_taken=expected)
    return TokenBatches(token_set, batches, None, expected)


def token_loaders(
    config: DictConfig, *, rank: int, world_size: int
) -> tuple[Callable[..., TokenBatches], Callable[[], TokenBatches] | None]:
    """As `data.loaders.loaders`, for `dataset.type: tokens`."""
    place = {"rank": rank, "world_size": world_size}

    def training(start_batch: int, reseeded_at: int = 0) -> TokenBatches:
        return training_tokens(config, start_batch, **place)  # a permutation, which no setting makes repeat itself

    evaluation = functools.partial(evaluation_tokens, config, **place)
    if not (token_folder(config, "eval") / MANIFEST).is_file():
        logger.warning("no evaluation: there is no token set %s", token_folder(config, "eval"))
        evaluation = None
    return training, evaluation


def check_token_sets(config: DictConfig, identities: Mapping[str, str], tokenizer: str) -> None:
    """Refuse to train on tokens of another tokenizer. Does nothing unless `dataset.type` is tokens.

    Args:
        identities: What manifests know the tokenizer by that the generator is trained for: its `identity`, and the
            `fingerprint` of sets that were made before there was one.
        tokenizer: What that one is called in the error.
    """
    if config.dataset.get("type") != "tokens":
        return
    for split in ("train", "eval"):
        folder = token_folder(config, split)
        if split == "eval" and not (folder / MANIFEST).is_file():
            continue
        made_by = read_token_manifest(folder)["tokenizer"]
        rule = "identity" if "identity" in made_by else "fingerprint"
        if made_by[rule] != identities[rule]:
            raise DataError(
                f"the token set {folder} was made by another tokenizer: by {made_by['checkpoint']} ({rule} "
                f"{made_by[rule][:12]}), and the tokenizer is {tokenizer} ({rule} "
                f"{identities[rule][:12]}): make the set again with scripts/pretokenize.py, or name that tokenizer"
            )


def token_folder(config: DictConfig, split: str) -> Path:
    """The folder of a split of the token set that a configuration names."""
    name = config.dataset.params.get("token_set")
    if not name:
        raise DataError("dataset.params.token_set must name a token set when dataset.type is tokens, and it is empty")
    path = Path(name).expanduser()
    # As shards: from the current folder, then from the repository.
    return (path if path.is_dir() or not (ROOT / path).is_dir() else ROOT / path) / split
