"""The stage-1 teacher: a pixel VQGAN trained to reconstruct."""

from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from modeling.pixel_vqgan import PixelVQGAN
from modeling.tasks.reconstruction import ReconstructionTask


class TeacherTask(ReconstructionTask):
    """How the published teacher was trained is published nowhere; these are stage 2's losses and a codebook loss."""

    def __init__(self, config: DictConfig):
        model = PixelVQGAN(config)
        if config.experiment.get("init_weight"):
            model = PixelVQGAN.from_pretrained(config.experiment.init_weight, config=config)
        super().__init__(model, model.quantize, config)

    def evaluate(self, model: PixelVQGAN, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.score(model(batch["image"])[0], batch["image"])

    def preview(self, model: PixelVQGAN, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"original": batch["image"], "reconstruction": model(batch["image"])[0]}
