"""Images from their first tokens: a generator of the same tokens invents the others."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from modeling.generators import check_its_tokenizer, class_names, load_generator
from modeling.maskgit import MaskGIT
from modeling.samplers.settings import SamplerSettings, sampler_settings
from modeling.titok import TiTok
from utils.class_names import parse_labels
from utils.errors import UserError
from utils.paths import ROOT

# Of the noise of the generator's own settings: faithful takes the likeliest tokens, vivid draws them.
WAYS = {"faithful": {"randomize_temperature": 0.0}, "vivid": {}}


class Completion:
    """What continues prefixes of one tokenizer's tokens.

    Args:
        settings: With a class that is not known there is no guidance, whatever they say.
        name: Of the generator, for messages.
        weights: Its file, for records.
    """

    def __init__(self, generator: MaskGIT, settings: SamplerSettings, name: str, weights: Path):
        self.generator, self.settings, self.name, self.weights = generator, settings, name, weights

    def label(self, text: str) -> int:
        """The class that a number or name means."""
        return parse_labels([text], class_names(self.generator.config), "--label")[0]

    def tokens(self, prefix: Tensor, seeds: Sequence[int], labels: Sequence[int] | None = None) -> Tensor:
        """All tokens (B, N) of images whose first ones are known, (B, K); the known ones stay.

        Args:
            seeds: One an image.
            labels: Their classes; None where they are not known.
        """
        if prefix.shape[1] >= self.generator.num_tokens:
            return prefix
        return cast(Tensor, self.generator.generate(labels, seeds=seeds, prefix=prefix, **asdict(self.settings)))


def load_completion(
    tokenizer: TiTok,
    name: str,
    way: str,
    checkpoint: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "cpu",
    **changes: Any,
) -> Completion:
    """The completion of a tokenizer's prefixes.

    Args:
        name: Of the tokenizer.
        way: One of `WAYS`.
        checkpoint: The generator; by default the bundled one that was trained with a bundled tokenizer of that name.
        changes: Of the generator's own sampler settings.

    Raises:
        UserError: There is no such generator, or it was trained with another tokenizer.
    """
    if way not in WAYS:
        raise UserError(f"the way of completing must be one of {', '.join(WAYS)}, got {way}")
    generator, located = load_generator(None, checkpoint or bundled_generator_of(name), device=device)
    check_its_tokenizer(generator, located, tokenizer, name)
    settings = replace(sampler_settings(generator.config, **changes), **WAYS[way])
    return Completion(generator, settings, located.name, located.weights)


def bundled_generator_of(tokenizer_name: str) -> str:
    """The name of the bundled generator that was trained with a bundled tokenizer."""
    for path in sorted((ROOT / "assets/models").glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        trained_with = config.get("experiment", {}).get("tokenizer_checkpoint")
        if "generator" in config["model"] and trained_with == tokenizer_name:
            return path.parent.name
    raise UserError(f"no bundled generator makes tokens of {tokenizer_name}: name one that does as --generator")
