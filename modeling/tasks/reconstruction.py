"""Training of a network that puts pixels out: reconstruction, perceptual and adversarial terms (spec section 4)."""

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.func import functional_call

from modeling.losses import (
    RECONSTRUCTION_LOSSES,
    generator_adversarial_loss,
    hinge_discriminator_loss,
    lecam_loss,
    mean_of_decodings,
    repeat_like,
)
from modeling.modules.codebook import CodebookCare, codebook_summary
from modeling.modules.discriminator import NLayerDiscriminator
from modeling.networks.perceptual import PerceptualDistance
from utils.errors import UserError
from utils.evaluation.metrics import psnr, ssim

LECAM_DECAY = 0.999


class ReconstructionTask:
    """Minimise the difference between `model(image)` and `image`; an adversary joins at `discriminator_start`.

    Shared by the teacher (pixel VQGAN) and stage 2. The model returns (reconstruction, quantizer's dict).
    """

    def __init__(self, model: nn.Module, quantizer: nn.Module, config: DictConfig):
        losses = config.losses
        if losses.reconstruction_loss not in RECONSTRUCTION_LOSSES:
            raise UserError(
                f"losses.reconstruction_loss must be one of {', '.join(RECONSTRUCTION_LOSSES)}, "
                f"got {losses.reconstruction_loss}"
            )
        self.weights = losses
        self.reconstruction_loss = RECONSTRUCTION_LOSSES[losses.reconstruction_loss]
        self.perceptual = PerceptualDistance(losses.perceptual_loss) if losses.perceptual_weight else None
        self.modules: dict[str, nn.Module] = {"model": model}
        self.frozen: list[nn.Module] = [] if self.perceptual is None else [self.perceptual]
        self.state: dict[str, Tensor] = {}
        self.sources: dict[str, str] = {}
        self.discriminator = None
        if losses.discriminator_start < config.training.max_train_steps and losses.discriminator_weight:
            self.discriminator = self.modules["discriminator"] = NLayerDiscriminator()
            self.state |= {"lecam_ema_real": torch.zeros(()), "lecam_ema_fake": torch.zeros(())}
        self.care = CodebookCare(quantizer, config.training.max_train_steps, **config.training.codebook)
        self.state |= self.care.state
        self.care.state = self.state
        self.counts = {"codes": torch.zeros(quantizer.codebook_size, dtype=torch.long)}

    def first_step(self, player: str) -> int:
        return self.weights.discriminator_start if player == "discriminator" else 0

    def losses(self, batch: dict[str, Any], step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        images, weights = batch["image"], self.weights
        self.care.begin(step)
        _to_device(self.perceptual, images)
        reconstruction, result = self.decoded(batch, step)
        self._count(result["min_encoding_indices"])
        decoded, full_weight = reconstruction.float(), weights.get("full_weight", 1.0)  # a teacher decodes once
        logs = {"reconstruction_loss": mean_of_decodings(self.reconstruction_loss, decoded, images, full_weight)}
        loss = weights.reconstruction_weight * logs["reconstruction_loss"]
        quantizer_loss = result["commitment_loss"] + weights.get("codebook_weight", 1.0) * result["codebook_loss"]
        logs["quantizer_loss"] = quantizer_loss
        loss = loss + (0.0 if self.care.quantizer.bypass else weights.quantizer_weight) * quantizer_loss
        if "prefix_loss" in result:
            logs["prefix_loss"] = result["prefix_loss"]
            loss = loss + weights.prefix_weight * logs["prefix_loss"]
        if self.perceptual is not None:
            logs["perceptual_loss"] = mean_of_decodings(self.perceptual, decoded, images, full_weight)
            loss = loss + weights.perceptual_weight * logs["perceptual_loss"]
        adversarial = self.discriminator is not None and step >= weights.discriminator_start
        if adversarial:
            # Detached parameters: the adversary is scored with, not trained, and its wrapper hears nothing of it.
            frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            score = functional_call(self.discriminator, frozen, (decoded,))
            logs["adversarial_loss"] = generator_adversarial_loss(score)
            loss = loss + weights.discriminator_weight * weights.discriminator_factor * logs["adversarial_loss"]
        yield "model", loss, {"loss/model": loss, **logs}

        if adversarial:
            loss, logs = self._discriminator_loss(images, decoded.detach())
            yield "discriminator", loss, {"loss/discriminator": loss, **logs}

    def decoded(self, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What the trained network makes of a batch in a step."""
        return self.modules["model"](batch["image"])

    def _discriminator_loss(self, images: Tensor, decoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge loss on images and decoded ones, and LeCam's, whose running means move on."""
        # One pass for both kinds: the wrapper synchronises once, and GroupNorm keeps the images apart.
        both = torch.cat([repeat_like(images, decoded), decoded])
        real, fake = self.modules["discriminator"](both).float().chunk(2)
        hinge = hinge_discriminator_loss(real, fake)
        means = real.mean(), fake.mean()
        emas = self.state["lecam_ema_real"], self.state["lecam_ema_fake"]
        lecam = lecam_loss(*means, *(ema.clone() for ema in emas))
        for ema, mean in zip(emas, means, strict=True):
            ema.lerp_(mean.detach(), 1 - LECAM_DECAY)
        loss = self.weights.discriminator_factor * hinge + self.weights.lecam_regularization_weight * lecam
        return loss, {"hinge_loss": hinge, "lecam_loss": lecam, "logits_real": means[0], "logits_fake": means[1]}

    def summarize(self, counts: dict[str, Tensor]) -> dict[str, float]:
        return codebook_summary(counts["codes"])

    def score(self, reconstruction: Tensor, images: Tensor, suffix: str = "") -> dict[str, Tensor]:
        """PSNR, SSIM and the perceptual distance of each image, of what would be written: clamped images."""
        reconstruction = reconstruction.float().clamp(0, 1)
        scores = {f"psnr{suffix}": psnr(reconstruction, images), f"ssim{suffix}": ssim(reconstruction, images)}
        if self.perceptual is not None:
            _to_device(self.perceptual, images)
            scores[f"perceptual{suffix}"] = self.perceptual.per_image(reconstruction, images)
        return scores

    def _count(self, codes: Tensor) -> None:
        codes = codes.flatten()
        self.counts["codes"].scatter_add_(0, codes, torch.ones_like(codes))


def _to_device(network: nn.Module | None, images: Tensor) -> None:
    if network is not None:
        network.to(images.device)
