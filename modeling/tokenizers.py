"""Any tokenizer: the one that a configuration describes, and the one that a command line names."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from modeling.checkpoints.locate import Located, locate, locate_configured
from modeling.checkpoints.registry import TOKENIZER, build, class_named, declared_classes
from modeling.titok import TiTok
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.reconstruction_files import Length, Made
from utils.images import to_array
from utils.inference import Arithmetic, frozen_arithmetic

BUNDLED_TOKENIZER = "one-d-piece_fashion"


def build_tokenizer(config: DictConfig) -> TiTok:
    """The tokenizer that `model.type` names, with initial weights."""
    return build(class_named(TOKENIZER, config.model.type, TiTok), config)


def load_tokenizer(
    config: str | os.PathLike | DictConfig | None = None,
    checkpoint: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
) -> tuple[TiTok, Located]:
    """The tokenizer that a command's --config and --checkpoint mean, in evaluation mode, and where its weights are.

    Neither means the bundled one. A checkpoint alone brings its own configuration; for a configuration alone see
    `locate_configured`.

    Args:
        config: The configuration, or the path of its file.

    Raises:
        ConfigError, WeightsError: The configuration or the weights could not be loaded, do not fit one another, or are
            no tokenizer that decodes to pixels.
    """
    if config is None:
        located = locate(BUNDLED_TOKENIZER if checkpoint is None else checkpoint)
    else:
        config = config if isinstance(config, DictConfig) else load_config(config)
        located = locate_configured(config, checkpoint)
    kind = tokenizer_class(config or located.config or {})
    tokenizer = kind.from_pretrained(located, config=config, device=device)
    if not tokenizer.finetune_decoder:
        raise UserError(
            f"{located.description} holds stage-1 weights, which decode to codes of the teacher and not to pixels: "
            "give a stage-2 checkpoint (train_tokenizer.sh with a stage-2 configuration makes one of them)"
        )
    return tokenizer, located


def tokenizer_class(config: Mapping | DictConfig) -> type[TiTok]:
    """The class that `model.type` names; TiTok's own repositories are older than that key.

    What is no tokenizer comes out as a TiTok, and `from_pretrained` refuses it.
    """
    return next((kind for kind in declared_classes(config) if issubclass(kind, TiTok)), TiTok)


def reconstruct(
    model: TiTok, pixels: Tensor, lengths: Sequence[int | None], arithmetic: Arithmetic = nullcontext
) -> tuple[Tensor, Iterator[tuple[int | None, Tensor]]]:
    """The tokens of images, and what is decoded from them at each length, one after the other.

    Args:
        pixels: (B, 3, P, P) uint8, on any device.
        lengths: Numbers of tokens; None for all.
        arithmetic: The context of decoding, see `utils.inference.prepared`.

    Returns:
        Tokens (B, N), and an iterator of (length, images (B, 3, P, P), unclamped).
    """
    place = model.latent_tokens
    with torch.no_grad():
        z_quantized, encoded = model.encode(pixels.to(place.device, place.dtype) / 255)

    def decoded() -> Iterator[tuple[int | None, Tensor]]:
        for length in lengths:
            with torch.no_grad(), arithmetic():
                images = model.decode(z_quantized, length=length)
            yield length, images

    return encoded["min_encoding_indices"][:, 0], decoded()


class Reconstructor(NamedTuple):
    """A tokenizer as scripts/reconstruct_tokenizer.py uses it, and what is wanted of it.

    Attributes:
        lengths: Numbers of tokens to decode from, None for all; empty for no images.
    """

    model: TiTok
    arithmetic: Arithmetic
    lengths: Sequence[Length]
    with_raw: bool
    with_tokens: bool

    def __call__(self, pixels: Tensor, batch_size: int) -> Made:
        """What the tokenizer makes of images (B, 3, P, P) uint8.

        Args:
            batch_size: To which fewer are filled up: arithmetic depends in its last bits on the size of a batch.
        """
        count = len(pixels)
        black = pixels.new_zeros(batch_size - count, *pixels.shape[1:])
        codes, decoded = reconstruct(self.model, torch.cat([pixels, black]), self.lengths, self.arithmetic)
        images, raws = {}, {}
        for length, batch in decoded:
            images[length] = to_array(batch[:count])
            if self.with_raw:
                raws[length] = batch[:count].float().permute(0, 2, 3, 1).cpu().numpy()
        return Made(images, raws, codes[:count].cpu().numpy().astype(np.int32) if self.with_tokens else None)


def default_lengths(model: TiTok) -> list[int]:
    """1, 2, 4, ... and all tokens; all tokens alone for a model that decodes nothing else."""
    total = model.num_latent_tokens
    if model.strict_length_assertion:
        return [total]
    return [2**power for power in range(total.bit_length()) if 2**power < total] + [total]


def frozen_tokenizer(
    source: str | os.PathLike, config: Mapping | DictConfig | None = None, device: str | torch.device = "cpu"
) -> TiTok:
    """The tokenizer, of either stage, of a checkpoint; frozen and in evaluation mode.

    Args:
        source: As `modeling.checkpoints.locate.locate` takes it.
        config: Taken where the checkpoint has no configuration of its own.

    Raises:
        WeightsError: As `from_pretrained`.
    """
    located = locate(source)
    chosen = config if located.config is None else located.config
    kind = tokenizer_class(chosen or {})
    config = chosen if located.config is None else None
    tokenizer = kind.from_pretrained(located, config=config, device=device)
    return tokenizer.requires_grad_(False)


@torch.no_grad()
def encode_tokens(tokenizer: TiTok, images: Tensor, precision: str = "fp32") -> Tensor:
    """Tokens (B, N) of images (B, 3, P, P) in [0, 1].

    Args:
        precision: "fp32", whatever autocast there is; "bf16" changes 1.4 % of the tokens (docs/benchmarks.md).
    """
    with frozen_arithmetic(precision, images.device):
        return tokenizer.encode(images.float())[1]["min_encoding_indices"].flatten(1)
