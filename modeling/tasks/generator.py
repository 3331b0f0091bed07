"""The generator: predict hidden tokens of a frozen tokenizer from the others and the class."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from modeling.losses import masked_accuracy_by_position, masked_token_loss
from modeling.maskgit import MaskGIT, generator_class, sampler_settings
from modeling.modules.masking import image_seeds, random_mask
from modeling.titok import TiTok
from modeling.tokenizers import TOKENIZERS
from modeling.weights import load_weights, locate
from utils.cli import UserError
from utils.config import lenient_config

NUM_BANDS = 8
NUM_PREVIEW_CLASSES = 10


def frozen_tokenizer(
    source: str | os.PathLike, config: Mapping | DictConfig | None = None, device: str | torch.device = "cpu"
) -> TiTok:
    """The tokenizer, of either stage, of a checkpoint; frozen and in evaluation mode.

    Args:
        source: As `modeling.weights.locate` takes it.
        config: Taken where the checkpoint has no configuration of its own.

    Raises:
        WeightsError: As `from_pretrained`.
    """
    located = locate(source)
    chosen = config if located.config is None else located.config
    # TiTok's own repositories are older than the key model.type; `from_pretrained` refuses what is no tokenizer.
    kind = OmegaConf.select(lenient_config(chosen or {}), "model.type")
    config = chosen if located.config is None else None
    tokenizer = TOKENIZERS.get(kind, TiTok).from_pretrained(located, config=config, device=device)
    return tokenizer.requires_grad_(False)


@torch.no_grad()
def encode_tokens(tokenizer: TiTok, images: Tensor) -> Tensor:
    """Tokens (B, N) of images (B, 3, P, P) in [0, 1], in float32: lower precision would change some of them."""
    with torch.autocast(images.device.type, enabled=False):
        return tokenizer.encode(images.float())[1]["min_encoding_indices"].flatten(1)


def tokenizer_fingerprint(tokenizer: TiTok) -> str:
    """SHA-256 of everything that decides which tokens an image gets: not of the decoder, so both stages have one."""
    digest = hashlib.sha256(f"{tokenizer.encoder.is_legacy} {tokenizer.quantize.use_l2_norm}".encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        if name == "latent_tokens" or name.startswith(("encoder.", "quantize.")):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class GeneratorTask:
    """Cross-entropy of the tokens that `random_mask` hides, and a tenth of it on those it shows (spec section 5).

    Batches hold either `image`, tokenized on the fly by `experiment.tokenizer_checkpoint`, or `tokens` (B, N), and
    `class_id` (B,), which must be a class of the generator.

    Args:
        check_tokenizer: Called before training with the tokenizer's fingerprint and its name in the config, to refuse
            tokens of another one.
    """

    def __init__(self, config: DictConfig, check_tokenizer: Callable[[str, str], None] | None = None):
        self.config, self.check_tokenizer = config, check_tokenizer
        self.model: MaskGIT = generator_class(config)(config)
        self.modules: dict[str, nn.Module] = {"model": self.model}
        self.state: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.class_dropout = config.model.generator.class_label_dropout
        self.loss_settings = {
            "label_smoothing": config.losses.label_smoothing,
            "unmasked_weight": config.losses.loss_weight_unmasked_token,
        }

    def start(self) -> None:
        if self.config.experiment.get("init_weight"):
            load_weights(self.model, self.config.experiment.init_weight)
        source = self.config.experiment.tokenizer_checkpoint
        self.tokenizer = frozen_tokenizer(source, self.config)
        ours = {"codes": self.model.codebook_size, "tokens": self.model.num_tokens}
        its = {"codes": self.tokenizer.codebook_size, "tokens": self.tokenizer.num_latent_tokens}
        for name in ours:
            if ours[name] != its[name]:
                raise UserError(
                    f"the generator is made for {ours[name]} {name} and the tokenizer {source} has {its[name]}: give "
                    "its model.vq_model section in the generator's configuration"
                )
        if not self.tokenizer.finetune_decoder and self.config.experiment.generate_every:
            raise UserError(
                f"previews need a tokenizer that decodes to pixels, and {source} is one of stage 1: take its stage 2, "
                "or set experiment.generate_every=0"
            )
        if self.check_tokenizer is not None:
            self.check_tokenizer(tokenizer_fingerprint(self.tokenizer), source)

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
        tokenizer, columns = self.tokenizer.to(device), {}
        for label in classes:
            condition = torch.full((count,), label)
            tokens = model.generate(condition, seeds=seeds, **sampler_settings(self.config))
            columns[class_name(self.config, label)] = tokenizer.decode_tokens(tokens)
        return columns

    def _tokens(self, batch: dict[str, Any]) -> Tensor:
        if "tokens" in batch:
            return batch["tokens"]
        return encode_tokens(self.tokenizer.to(batch["image"].device), batch["image"])


def class_name(config: DictConfig, label: int) -> str:
    """What class `label` is called: as `dataset.class_names` says, by its number where that is empty."""
    names = class_names(config)
    return names[label] if names else str(label)


def class_names(config: DictConfig) -> list[str]:
    """`dataset.class_names`, checked against the number of classes; empty where the config has none."""
    names = list((config.get("dataset") or {}).get("class_names") or [])
    num_classes = config.model.generator.get("condition_num_classes", 1000)
    if names and len(names) != num_classes:
        raise UserError(
            f"dataset.class_names must name all {num_classes} classes (model.generator.condition_num_classes) or none, "
            f"got {len(names)}"
        )
    return names
