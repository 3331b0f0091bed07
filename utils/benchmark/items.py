"""What a benchmark times: works, and the setting (model, device, precision, batch) in which they are built."""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from utils.cli import pick_device
from utils.config import load_config
from utils.paths import ROOT
from utils.replay import SMALL_BATCH, replay_blocks
from utils.speed import LONG_WORK, compile_blocks, pays_to_compile

PUBLISHED = {
    "stage1": "configs/training/stage1/one-d-piece_{}256.yaml",
    "stage2": "configs/training/stage2/one-d-piece_{}256.yaml",
    "generator": "configs/training/generator/maskgit_one-d-piece_{}256.yaml",
}
CONFIGS = {
    "tiny": {phase: f"configs/fashion/{phase}.yaml" for phase in PUBLISHED},
    **{size: {phase: path.format(size.lower()) for phase, path in PUBLISHED.items()} for size in "SBL"},
}
RECOMMENDED = "S_recommended"  # its steps are timed with their tail drop
CONFIGS[RECOMMENDED] = CONFIGS["S"] | {
    phase: PUBLISHED[phase].format("s").replace(".yaml", "_recommended.yaml") for phase in ("stage1", "stage2")
}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """Something to time: its name, one turn of it, and how many images a turn handles (0: none).

    `every` is for work that training repeats: the number of turns of the item's previous work between two of this
    one, 0 for other work. `length` is the number of tokens where that varies.
    """

    name: str
    turn: Callable[[], object]
    num_images: int = 0
    every: int = 0
    length: int | None = None


Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """One model in one precision on one device."""

    model: str
    device: torch.device
    precision: str
    batch_size: int
    lengths: Sequence[int]
    compile: bool = False
    plain: bool = False
    clock: str = "wall"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def config(self, phase: str, *overrides: str) -> DictConfig:
        """The model's configuration of "stage1", "stage2" or "generator"."""
        return load_config(
            ROOT / CONFIGS[self.model][phase], [f"training.per_gpu_batch_size={self.batch_size}", *overrides]
        )

    def images(self, config: DictConfig) -> Tensor:
        side = config.dataset.preprocessing.crop_size
        return torch.rand(self.batch_size, 3, side, side, device=self.device)

    def prepared(self, model: Model) -> Model:
        """A model for inference, compiled where that is asked for; else small batches are replayed on CUDA."""
        model = model.to(self.device).eval()
        if self.compile:
            compile_blocks(model)
        elif self.device.type == "cuda" and not self.plain:
            replay_blocks(model)
        return model

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


Item = Callable[[Setting], Iterator[Work]]
Items = Mapping[str, Item]  # by the names that --only takes


def settings(arguments: argparse.Namespace) -> list[Setting]:
    """Every model and batch size that the command line asks for."""
    device = pick_device(arguments.device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    allow_tf32(arguments.precision == "tf32")
    return [
        Setting(
            model=model,
            device=device,
            precision=arguments.precision,
            batch_size=batch_size,
            lengths=arguments.lengths,
            compile=not arguments.plain
            and pays_to_compile(arguments.compile, device, LONG_WORK if batch_size > SMALL_BATCH else 0),
            plain=arguments.plain,
            clock=arguments.clock,
        )
        for model in arguments.model
        for batch_size in arguments.batch_size or [32 if device.type != "cpu" else 16 if model == "tiny" else 4]
    ]


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
