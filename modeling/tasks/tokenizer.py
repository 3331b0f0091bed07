"""The two stages of a tokenizer: predict the teacher's codes, then put pixels out."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from modeling.checkpoints.locate import locate
from modeling.checkpoints.pretrained import check_settings
from modeling.checkpoints.state import fingerprint, load_strict, read_state_dict
from modeling.generators import check_its_tokenizer, load_generator
from modeling.losses import code_prediction_loss, mean_of_decodings, repeat_like
from modeling.modules.codebook import CodebookCare, codebook_summary
from modeling.modules.lengths import LengthGains
from modeling.modules.perturbation import Perturbation
from modeling.one_d_piece import OneDPiece, powers_of_two
from modeling.pixel_vqgan import PixelVQGAN, load_teacher
from modeling.prefixes import check_decodable
from modeling.tasks.reconstruction import ReconstructionTask
from modeling.titok import TiTok
from modeling.tokenizers import build_tokenizer, default_lengths
from utils.errors import UserError
from utils.evaluation.metrics import psnr, ssim
from utils.evaluation.report import tokens_text
from utils.inference import frozen_arithmetic

SCRATCH = "scratch"  # experiment.init_weight of a stage 2 that starts from nothing


def evaluation_lengths(config: DictConfig, model: TiTok) -> list[int]:
    """`experiment.eval_lengths`; where it is empty, `default_lengths`.

    Raises:
        UserError: The tokenizer has no such prefix.
    """
    lengths = list(config.experiment.get("eval_lengths") or default_lengths(model))
    check_decodable(lengths, model, "experiment.eval_lengths")
    return lengths


class Stage1Task:
    """Cross-entropy of the decoder's logits against the frozen teacher's codes, and the quantizer's loss."""

    def __init__(self, config: DictConfig):
        self.config = config
        self.model = build_tokenizer(config)
        self.weights = config.losses
        self.lengths = evaluation_lengths(config, self.model)
        self.modules: dict[str, nn.Module] = {"model": self.model}
        self.frozen: list[nn.Module] = []
        self.care = CodebookCare(self.model.quantize, config.training.max_train_steps, **config.training.codebook)
        self.gains = gains_of(self.model)
        self.state = self.care.state
        share_state(self.gains, self.state)
        self.counts = {"codes": torch.zeros(self.model.codebook_size, dtype=torch.long)}
        self.sources: dict[str, str] = {}
        self.perturbation = perturbation(self.model, config)

    def start(self) -> None:
        if self.config.experiment.get("init_weight"):
            stage1_start(self.model, self.config.experiment.init_weight)
            self.sources["experiment.init_weight"] = fingerprint(self.model.state_dict())
        self.teacher = load_teacher(self.config, self.config.model.vq_model.pretrained_tokenizer_weight)
        self.frozen = [self.teacher]
        self.sources["model.vq_model.pretrained_tokenizer_weight"] = fingerprint(self.teacher.state_dict())

    def first_step(self, player: str) -> int:
        return 0

    def losses(self, batch: dict[str, Any], step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        images = batch["image"]
        self.care.begin(step)
        set_lengths(self.model, self.gains, step)
        with frozen_arithmetic(self.config.training.frozen_precision, images.device):
            pixel_codes = self.teacher.to(images.device).encode(images)
        logits, result = self.modules["model"](images, change=change_of(self.perturbation, batch))
        codes = result["min_encoding_indices"].flatten()
        self.counts["codes"].scatter_add_(0, codes, torch.ones_like(codes))
        prediction_loss = mean_of_decodings(code_prediction_loss, logits, pixel_codes, self.weights.full_weight)
        if self.gains is not None:
            prefixes = logits[: len(images)].detach().flatten(2).float()
            losses = F.cross_entropy(prefixes, pixel_codes, reduction="none").mean(dim=1)
            self.gains.watch(result["lengths"], losses)
        predicted = logits.detach().argmax(dim=1).flatten(1)
        quantizer_weight = 0.0 if self.care.quantizer.bypass else self.weights.quantizer_weight
        loss = prediction_loss + quantizer_weight * result["quantizer_loss"]
        logs = {}
        if "prefix_loss" in result:
            logs["prefix_loss"] = result["prefix_loss"]
            loss = loss + self.weights.prefix_weight * result["prefix_loss"]
        yield (
            "model",
            loss,
            {
                **logs,
                "loss/model": loss,
                "code_prediction_loss": prediction_loss,
                "quantizer_loss": result["quantizer_loss"],
                "commitment_loss": result["commitment_loss"],
                "codebook_loss": result["codebook_loss"],
                "code_accuracy": (predicted == repeat_like(pixel_codes, logits)).float().mean(),
            },
        )

    def summarize(self, counts: dict[str, Tensor]) -> dict[str, float]:
        return codebook_summary(counts["codes"])

    def evaluate(self, model: TiTok, batch: dict[str, Any]) -> dict[str, Tensor]:
        """PSNR and SSIM at each length, of images that the teacher's decoder makes of the predicted codes."""
        images = batch["image"]
        scores: dict[str, Tensor] = {}
        for length, image in self._decode(model, images):
            scores |= {f"psnr@{length}": psnr(image, images), f"ssim@{length}": ssim(image, images)}
        return scores

    def preview(self, model: TiTok, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = batch["image"]
        teacher = self.teacher.to(images.device)
        columns = {"original": images, "teacher": teacher.decode(teacher.encode(images))}
        return columns | {tokens_text(length): image for length, image in self._decode(model, images)}

    def _decode(self, model: TiTok, images: Tensor) -> Iterator[tuple[int, Tensor]]:
        teacher = self.teacher.to(images.device)

        def to_pixels(logits: Tensor) -> Tensor:
            # The expected pixel embedding, as stage 2 has it: 1.3 dB better than the likeliest code's.
            expected = torch.einsum("bvhw,vc->bchw", logits.softmax(dim=1), teacher.quantize.embedding.weight)
            return teacher.decoder(expected)

        return decode_lengths(model, images, self.lengths, to_pixels)


class Stage2Task(ReconstructionTask):
    """Decoder, pixel codebook and pixel decoder, trained on pixels through frozen tokens; the tokens too where asked.

    Starts from stage-1 weights (`experiment.init_weight`) and the teacher
    (`model.vq_model.pretrained_tokenizer_weight`), or from a finished tokenizer alone. Where the tokens are trained,
    `experiment.init_weight: scratch` starts from nothing: one stage in place of three.
    """

    def __init__(self, config: DictConfig):
        self.config = config
        self.model = build_tokenizer(config)
        self.lengths = evaluation_lengths(config, self.model)
        if not (self.model.freeze_tokens or config.losses.quantizer_weight):
            raise UserError(
                "model.vq_model.freeze_tokens: False trains the codebook, which needs losses.quantizer_weight above 0 "
                "(1.0 in stage 1)"
            )
        super().__init__(self.model, self.model.quantize, config)
        self.gains = gains_of(self.model)
        share_state(self.gains, self.state)
        self.perturbation = perturbation(self.model, config)

    def start(self) -> None:
        source = self.config.experiment.get("init_weight")
        if not source:
            raise UserError(
                "stage 2 starts from stage-1 weights, or from a finished tokenizer: set experiment.init_weight to one "
                f"(or to {SCRATCH}, for one stage that trains the tokens too)"
            )
        if source != SCRATCH:
            stage2_start(self.model, source, self.config.model.vq_model.pretrained_tokenizer_weight)
            self.sources["experiment.init_weight, or of the teacher,"] = fingerprint(self.model.state_dict())
        elif self.model.freeze_tokens:
            raise UserError(
                f"experiment.init_weight {SCRATCH} would freeze tokens that say nothing: set "
                "model.vq_model.freeze_tokens to False, or experiment.init_weight to weights"
            )
        else:  # the quantizer's tiny codes, all but equal, would be a standstill for what is a mean of them here
            nn.init.normal_(self.model.pixel_quantize.embedding.weight)
        if generator := OmegaConf.select(self.config, "training.perturb.generator"):
            self.perturbation.fill, weights = filled_by(generator, self.model, source)
            self.sources["training.perturb.generator"] = weights

    def decoded(self, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["image"]
        set_lengths(self.model, self.gains, step)
        decoded, result = self.modules["model"](images, change=change_of(self.perturbation, batch))
        if self.gains is not None:
            prefixes = decoded[: len(images)].detach().float()
            self.gains.watch(result["lengths"], (prefixes - images).square().flatten(1).mean(dim=1))
        return decoded, result

    def evaluate(self, model: TiTok, batch: dict[str, Any]) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        for length, image in decode_lengths(model, batch["image"], self.lengths):
            scores |= self.score(image, batch["image"], suffix=f"@{length}")
        return scores

    def preview(self, model: TiTok, batch: dict[str, Any]) -> dict[str, Tensor]:
        images = decode_lengths(model, batch["image"], self.lengths)
        return {"original": batch["image"]} | {tokens_text(length): image for length, image in images}


def gains_of(model: TiTok) -> LengthGains | None:
    """What looks after the draw of lengths where they are drawn by their gain.

    Raises:
        UserError: No lengths are drawn.
    """
    if model.config.model.vq_model.get("length_draw", "uniform") == "uniform":
        return None
    if not isinstance(model, OneDPiece) or model.tail_drop == "none":
        raise UserError(
            "model.vq_model.length_draw is for lengths that are drawn, and here every image keeps all of its tokens: "
            "leave it out, or take model.type=one_d_piece and a model.vq_model.tail_drop other than none"
        )
    drawn = None
    if model.tail_drop == "powers_of_two":
        drawn = torch.zeros(model.num_latent_tokens, dtype=torch.bool)
        drawn[powers_of_two(model.num_latent_tokens) - 1] = True
    return LengthGains(model.num_latent_tokens, drawn)


def share_state(gains: LengthGains | None, state: dict[str, Tensor]) -> None:
    """Make what `gains` knows a part of a task's state."""
    if gains is not None:
        state |= gains.state
        gains.state = state


def set_lengths(model: TiTok, gains: LengthGains | None, step: int) -> None:
    """What the model draws by in `step`."""
    if gains is not None:
        model.length_weights = gains.weights(step)


def perturbation(model: TiTok, config: DictConfig) -> Perturbation:
    """What `training.perturb` says, off where a configuration made before says nothing."""
    settings = {"images": 0.0, "tokens": 0.0, "neighbours": 1, **config.training.get("perturb", {})}
    if settings.pop("generator", "") and not model.freeze_tokens:
        raise UserError(
            "training.perturb.generator draws tokens of a finished tokenizer: train its decoder alone, in stage 2 with "
            "model.vq_model.freeze_tokens: True"
        )
    return Perturbation(model.quantize, **settings)


def change_of(perturbation: Perturbation, batch: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """What a training step does to the tokens of a batch before it decodes them; None for nothing."""
    return partial(perturbation, classes=batch["class_id"]) if perturbation else None


def filled_by(
    source: str, tokenizer: TiTok, tokenizer_source: str
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]:
    """Logits of a generator for tokens of which some are hidden, and the fingerprint of its weights.

    Raises:
        WeightsError: The generator could not be loaded, or is for another tokenizer.
    """
    generator, located = load_generator(checkpoint=source)
    check_its_tokenizer(generator, located, tokenizer, tokenizer_source)
    generator.requires_grad_(False)

    def fill(tokens: Tensor, hidden: Tensor, classes: Tensor) -> Tensor:
        if (classes >= generator.num_classes).any():  # waits for a GPU, which only this option does
            raise UserError(
                f"training.perturb.generator knows classes 0 to {generator.num_classes - 1}, got an image of class "
                f"{int(classes.max())}: train on the images that the generator learned, or on images without classes"
            )
        shown = tokens.masked_fill(hidden, generator.mask_token)
        return generator.to(tokens.device)(shown, classes.clamp(min=0), classes < 0)  # -1: it has no class

    return fill, fingerprint(generator.state_dict())


def stage1_start(model: nn.Module, source: str | os.PathLike) -> None:
    """Load a stage-1 tokenizer from a tokenizer of either stage, to train its tokens further.

    What stage 2 adds, `pixel_quantize` and `pixel_decoder`, is left out.

    Raises:
        WeightsError: As `load_weights`.
    """
    located = locate(source)
    check_settings(model, located)
    state = read_state_dict(located.weights)
    own = {name: value for name, value in state.items() if not name.startswith(("pixel_quantize.", "pixel_decoder."))}
    load_strict(model, own, located.description)


def stage2_start(model: nn.Module, source: str | os.PathLike, teacher_source: str | os.PathLike) -> None:
    """Load a stage-2 tokenizer from stage-1 weights and the pixel VQGAN that taught them, or from a finished tokenizer.

    The teacher's `quantize` and `decoder` become the tokenizer's `pixel_quantize` and `pixel_decoder`. A tokenizer that
    has been through stage 2 has its own, to be trained further, for example on other images; no teacher is read then.

    Raises:
        WeightsError: Either is missing or damaged, or they do not fill the model exactly, or give other tokens there.
    """
    located = locate(source)
    check_settings(model, located)
    state, description = read_state_dict(located.weights), located.description
    if not any(name.startswith("pixel_decoder.") for name in state):
        teacher = locate(teacher_source)
        check_settings(model, teacher, PixelVQGAN)
        description = f"{description} with the teacher {teacher.description}"
        for name, value in read_state_dict(teacher.weights).items():
            if name.startswith(("quantize.", "decoder.")):
                state[f"pixel_{name}"] = value
    load_strict(model, state, description)


def decode_lengths(
    model: TiTok, images: Tensor, lengths: list[int], to_pixels: Callable[[Tensor], Tensor] = lambda pixels: pixels
) -> Iterator[tuple[int, Tensor]]:
    """Encode once, decode at each length: yields (length, images (B, 3, P, P) clamped to [0, 1])."""
    z_quantized, _ = model.encode(images)
    for length in lengths:
        yield length, to_pixels(model.decode(z_quantized, length=length)).float().clamp(0, 1)


def tokenizer_task(config: DictConfig) -> Stage1Task | Stage2Task:
    """The stage that `model.vq_model.finetune_decoder` names."""
    return Stage2Task(config) if config.model.vq_model.finetune_decoder else Stage1Task(config)
