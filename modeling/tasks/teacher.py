"""The stage-1 teacher: a pixel VQGAN trained to reconstruct."""

from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from modeling.checkpoints.pretrained import load_weights
from modeling.checkpoints.registry import build
from modeling.checkpoints.state import fingerprint
from modeling.pixel_vqgan import PixelVQGAN
from modeling.tasks.reconstruction import ReconstructionTask


class TeacherTask(ReconstructionTask):
    """How the published teacher was trained is published nowhere; these are stage 2's losses and a codebook loss."""

    def __init__(self, config: DictConfig):
        self.config = config
        self.model = build(PixelVQGAN, config)
        super().__init__(self.model, self.model.quantize, config)

    def start(self) -> None:
        if self.config.experiment.get("init_weight"):
            load_weights(self.model, self.config.experiment.init_weight)
            self.sources["experiment.init_weight"] = fingerprint(self.model.state_dict())

    def evaluate(self, model: PixelVQGAN, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.score(model(batch["image"])[0], batch["image"])

    def preview(self, model: PixelVQGAN, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"original": batch["image"], "reconstruction": model(batch["image"])[0]}
