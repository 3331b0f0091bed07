"""Any generator: the one that a command line names, its tokenizer, its classes, and images from it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from modeling.checkpoints import WeightsError
from modeling.checkpoints.locate import Located, locate, locate_configured
from modeling.checkpoints.registry import declared_classes
from modeling.identity import has_mean_code, identity
from modeling.maskgit import MaskGIT, generator_class
from modeling.modules.masking import image_seeds
from modeling.samplers.settings import SamplerSettings
from modeling.titok import TiTok
from modeling.tokenizers import load_tokenizer
from utils.config import lenient_config, load_config
from utils.errors import UserError
from utils.inference import Arithmetic

BUNDLED_GENERATOR = "maskgit_fashion"
TRAINED_WITH = "experiment.tokenizer_identity"  # where a generator's configuration keeps its tokenizer's identity


def load_generator(
    config_path: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
) -> tuple[MaskGIT, Located]:
    """The generator that a command's --config and --checkpoint mean, in evaluation mode, and where its weights are.

    Neither means the bundled one. A checkpoint alone brings its own configuration; a configuration alone means the run
    in its output folder, or else the published model that it belongs to.

    Raises:
        ConfigError, WeightsError: The configuration or the weights could not be loaded, or do not fit one another.
    """
    if config_path is None:
        located = locate(BUNDLED_GENERATOR if checkpoint is None else checkpoint)
        config = located.config
    else:
        config = load_config(config_path)
        located = locate_configured(config, checkpoint, path=config_path)
    config = lenient_config(config or {})
    if OmegaConf.select(config, "model.generator") is None:
        if declared := [] if config_path else declared_classes(config):
            raise WeightsError(f"{located.description} is a {declared[-1].role}; give a generator")
        raise UserError(
            f"{config_path or located.description} is no generator's: its configuration has no section model.generator"
            + ("" if config_path else "; give --config")
        )
    return generator_class(config).from_pretrained(located, config=config, device=device), located


def load_its_tokenizer(
    generator: MaskGIT,
    located: Located,
    checkpoint: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
) -> tuple[TiTok, Located]:
    """The tokenizer that turns a generator's tokens into pixels, in evaluation mode, and where its weights are.

    Args:
        located: Where the generator was found, and the configuration beside it.
        checkpoint: By default the `experiment.tokenizer_checkpoint` of that configuration: what it was trained with.

    Raises:
        WeightsError: It could not be loaded, or does not fit the generator.
    """
    own = lenient_config(located.config or generator.config)
    named = checkpoint or OmegaConf.select(own, "experiment.tokenizer_checkpoint")
    if not named:
        raise WeightsError(f"{located.description} does not say which tokenizer it needs: give --tokenizer_checkpoint")
    try:
        tokenizer, tokenizer_located = load_tokenizer(checkpoint=named, device=device)
    except WeightsError as error:
        if checkpoint is not None:
            raise
        raise WeightsError(
            f"the tokenizer that the generator was trained with ({named}) could not be loaded: {error}; give another "
            "place as --tokenizer_checkpoint"
        ) from error
    check_its_tokenizer(generator, located, tokenizer, named)
    return tokenizer, tokenizer_located


def check_its_tokenizer(generator: MaskGIT, located: Located, tokenizer: TiTok, named: str | os.PathLike) -> None:
    """Refuse a tokenizer (called `named`) that a generator was not trained with.

    Args:
        located: Where the generator was found.
    """
    check_sizes(generator, tokenizer, named)
    if not _is_trained_with(lenient_config(located.config or generator.config), tokenizer):
        raise WeightsError(
            f"the tokenizer {named} is not the one that the generator was trained with, as after another "
            "training, or a copy in bfloat16: the generator's tokens mean something else to it. Give the one it was "
            "trained with as --tokenizer_checkpoint, or train the generator again"
        )


def _is_trained_with(own: DictConfig, tokenizer: TiTok) -> bool:
    """Whether a generator's configuration is of a training with this tokenizer; published ones do not say."""
    if expected := OmegaConf.select(own, TRAINED_WITH):
        return identity(tokenizer) == expected
    mean_code = OmegaConf.select(own, "experiment.tokenizer_mean_code")  # of generators trained before identities
    return not mean_code or has_mean_code(tokenizer, mean_code)


def check_sizes(generator: MaskGIT, tokenizer: TiTok, source: str | os.PathLike) -> None:
    """Refuse a tokenizer (called `source`) with other numbers of codes or tokens than the generator's."""
    ours = (generator.codebook_size, generator.num_tokens)
    its = (tokenizer.codebook_size, tokenizer.num_latent_tokens)
    if ours != its:
        raise WeightsError(
            f"the generator makes {ours[1]} tokens of {ours[0]} codes, and the tokenizer {source} has {its[1]} tokens "
            f"of {its[0]} codes: give the one that the generator is for"
        )


def class_names(config: Mapping | DictConfig) -> list[str]:
    """What the classes of a generator are called: `dataset.class_names`, or their numbers where it is empty."""
    names = list(OmegaConf.select(lenient_config(config), "dataset.class_names") or [])
    num_classes = config["model"]["generator"].get("condition_num_classes", 1000)
    if names and len(names) != num_classes:
        raise UserError(
            f"dataset.class_names must name all {num_classes} classes (model.generator.condition_num_classes) or none, "
            f"got {len(names)}"
        )
    return names or [str(label) for label in range(num_classes)]


def sample(
    generator: MaskGIT,
    tokenizer: TiTok,
    images: Sequence[tuple[int, int]],
    settings: SamplerSettings,
    *,
    seed: int,
    batch_size: int,
    arithmetic: Arithmetic = nullcontext,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sample images in batches: (tokens (b, N), pixels (b, 3, P, P) clamped to [0, 1]), N the settings' `num_tokens`.

    Args:
        images: (class label, number of the sample within its class). These two and `seed` decide an image; the others
            of its batch do not, up to rounding.
        arithmetic: The context in which the networks compute, see `utils.inference.prepared`.
    """
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        seeds = image_seeds(seed, [f"{label}/{number}" for label, number in batch])
        with torch.no_grad(), arithmetic():
            tokens = generator.generate(torch.tensor([label for label, _ in batch]), seeds=seeds, **asdict(settings))
            pixels = tokenizer.decode_tokens(tokens).float().clamp(0, 1)
        yield tokens, pixels


def sample_prefixes(
    generator: MaskGIT,
    tokenizer: TiTok,
    images: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    *,
    arithmetic: Arithmetic = nullcontext,
    **drawing: Any,
) -> Iterator[dict[int, Tensor]]:
    """Sample images as `sample` does, and decode the first tokens of each: {length: (b, 3, P, P), about [0, 1]}.

    Args:
        lengths: Numbers of tokens; all of them give the images of `sample`.
        drawing: Further arguments of `sample`.
    """
    for tokens, pixels in sample(generator, tokenizer, images, arithmetic=arithmetic, **drawing):
        versions = {tokens.shape[1]: pixels}
        with torch.no_grad(), arithmetic():
            for length in set(lengths) - {tokens.shape[1]}:
                versions[length] = tokenizer.decode_tokens(tokens, length).float()
        yield {length: versions[length] for length in lengths}
