"""The generator: predict hidden tokens of a frozen tokenizer from the others and the class."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from modeling.checkpoints.pretrained import load_weights
from modeling.checkpoints.registry import build
from modeling.checkpoints.state import fingerprint
from modeling.generators import TRAINED_WITH, check_sizes, class_names
from modeling.identity import identities, identity
from modeling.losses import masked_accuracy_by_position, masked_token_loss
from modeling.maskgit import MaskGIT, generator_class
from modeling.modules.masking import image_seeds, random_mask
from modeling.samplers.settings import sampler_settings
from modeling.tokenizers import encode_tokens, frozen_tokenizer
from utils.checkpoint import checkpoints
from utils.config import RUN_CONFIG, ConfigError, load_config
from utils.errors import UserError

NUM_BANDS = 8
NUM_PREVIEW_CLASSES = 10


class GeneratorTask:
    """Cross-entropy of the tokens that `random_mask` hides, and a tenth of it on those it shows (spec section 5).

    Batches hold either `image`, tokenized on the fly by `experiment.tokenizer_checkpoint`, or `tokens` (B, N), and
    `class_id` (B,), which must be a class of the generator.

    Args:
        check_tokenizer: Called before training with the tokenizer's `identities` and its name in the config, to refuse
            tokens of another one.
    """

    def __init__(self, config: DictConfig, check_tokenizer: Callable[[Mapping[str, str], str], None] | None = None):
        self.config, self.check_tokenizer = config, check_tokenizer
        self.model: MaskGIT = build(generator_class(config), config)
        self.modules: dict[str, nn.Module] = {"model": self.model}
        self.frozen: list[nn.Module] = []
        self.state: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.sources: dict[str, str] = {}
        self.class_dropout = config.model.generator.class_label_dropout
        self.loss_settings = {
            "label_smoothing": config.losses.label_smoothing,
            "unmasked_weight": config.losses.loss_weight_unmasked_token,
        }

    def start(self) -> None:
        if self.config.experiment.get("init_weight"):
            load_weights(self.model, self.config.experiment.init_weight)
            self.sources["experiment.init_weight"] = fingerprint(self.model.state_dict())
        source = self.config.experiment.tokenizer_checkpoint
        self.tokenizer = frozen_tokenizer(source, self.config)
        self.frozen = [self.tokenizer]
        check_sizes(self.model, self.tokenizer, source)
        check_continued(self.config, identity(self.tokenizer), source)
        # The configuration of a run begun before identities has no such key.
        OmegaConf.update(self.config, TRAINED_WITH, identity(self.tokenizer), force_add=True)
        if not self.tokenizer.finetune_decoder and self.config.experiment.generate_every:
            raise UserError(
                f"previews need a tokenizer that decodes to pixels, and {source} is one of stage 1: take its stage 2, "
                "or set experiment.generate_every=0"
            )
        if self.check_tokenizer is not None:
            self.check_tokenizer(identities(self.tokenizer), source)

    def first_step(self, player: str) -> int:
        return 0

    def losses(self, batch: dict[str, Any], step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        tokens = self._tokens(batch)
        shown, hidden = random_mask(tokens, self.model.mask_token)
        logits = self.modules["model"](shown, batch["class_id"], self.class_dropout)
        loss, logs = masked_token_loss(logits, tokens, hidden, **self.loss_settings)
        bands = masked_accuracy_by_position(logits, tokens, hidden, NUM_BANDS)
        logs |= {f"masked_accuracy/band_{band}": value for band, value in enumerate(bands, start=1)}
        yield "model", loss, {"loss/model": loss, **logs}

    def summarize(self, counts: dict[str, Tensor]) -> dict[str, float]:
        return {}

    def evaluate(self, model: MaskGIT, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss and masked accuracy of each image. What is hidden follows from its key, so any batching gives the same.

        The class is always given.
        """
        tokens = self._tokens(batch)
        nothing = torch.zeros(1, self.model.num_tokens, dtype=torch.long)
        hidden = torch.cat(
            [
                random_mask(nothing, self.model.mask_token, torch.Generator().manual_seed(seed))[1]
                for seed in image_seeds(self.config.training.seed, batch["__key__"])
            ]
        ).to(tokens.device)
        logits = model(tokens.masked_fill(hidden, self.model.mask_token), batch["class_id"], 0.0)
        scores = [
            masked_token_loss(*(values[None] for values in image), **self.loss_settings)
            for image in zip(logits, tokens, hidden, strict=True)
        ]
        return {
            "loss": torch.stack([loss for loss, _ in scores]),
            "masked_accuracy": torch.stack([logs["masked_accuracy"] for _, logs in scores]),
        }

    def preview(self, model: MaskGIT, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A column of `training.num_generated_images` samples for each of ten classes, the same seeds every time."""
        count, num_classes = self.config.training.num_generated_images, self.model.num_classes
        classes = range(0, num_classes, max(1, num_classes // NUM_PREVIEW_CLASSES))[:NUM_PREVIEW_CLASSES]
        seeds = image_seeds(self.config.training.seed, range(count))
        device = batch["class_id"].device
        tokenizer, names, columns = self.tokenizer.to(device), class_names(self.config), {}
        for label in classes:
            condition = torch.full((count,), label)
            tokens = model.generate(condition, seeds=seeds, **asdict(sampler_settings(self.config)))
            columns[names[label]] = tokenizer.decode_tokens(tokens)
        return columns

    def _tokens(self, batch: dict[str, Any]) -> Tensor:
        if "tokens" in batch:
            return batch["tokens"]
        tokenizer = self.tokenizer.to(batch["image"].device)
        return encode_tokens(tokenizer, batch["image"], self.config.training.frozen_precision)


def check_continued(config: DictConfig, own: str, source: str) -> None:
    """Refuse to go on with a generator that was begun on the tokens of another tokenizer.

    Args:
        own: The identity of the tokenizer of now.
        source: What it is called in the error.
    """
    folder = Path(config.experiment.output_dir)
    if not (config.experiment.get("resume", True) and (folder / RUN_CONFIG).is_file() and checkpoints(folder)):
        return
    try:
        begun = OmegaConf.select(load_config(folder / RUN_CONFIG), TRAINED_WITH)
    except ConfigError:  # a file that is broken is replaced, and says nothing
        return
    if begun and begun != own:
        raise UserError(
            f"{folder} holds a generator of another tokenizer's tokens ({begun[:12]}), and {source} is {own[:12]}: "
            "give another experiment.output_dir, or delete its checkpoints to train from scratch"
        )
