"""The record of a run: metrics.jsonl always, trackers as views of it."""

import json
import math
import os
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from utils.errors import UserError
from utils.files import write_text
from utils.images import write_image

METRICS_FILE = "metrics.jsonl"
WANDB_ID = "wandb_id.txt"


class RunLog:
    """Writes each set of numbers as one line of `metrics.jsonl` and to the trackers the config enables.

    Use on the main process only. A resumed run forgets lines of steps that it will do again.

    Attributes:
        evaluated_steps: Those that have an evaluation on file, of a resumed run.

    Args:
        folder: Output folder of the run.
        resume_step: Updates already done.
    """

    def __init__(self, folder: Path, config: DictConfig, resume_step: int = 0):
        self.path = folder / METRICS_FILE
        kept = []
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= resume_step]
            write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.evaluated_steps = {_step(line) for line in kept if "eval/images" in line}
        self.wandb = None
        if config.training.get("enable_wandb", False):
            self.wandb = _start_wandb(folder, config, is_resumed=resume_step > 0)
        self.tensorboard = None
        if config.training.get("enable_tensorboard", False):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Append one whole line; `step` is the number of updates done. Not-a-numbers become null."""
        line = {"step": step} | {key: _plain(value) for key, value in numbers.items()}
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:  # a full disk takes half a line
            os.truncate(self.path, size)
            raise
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, step)

    def show(self, step: int, name: str, image: Image.Image) -> None:
        """Save an image as `previews/NAME-STEP.png` and show it in the trackers."""
        write_image(image, self.path.parent / "previews" / f"{name}-{step:08d}.png")
        if self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Image(image)}, step=step)
        if self.tensorboard is not None:
            self.tensorboard.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()


def _start_wandb(folder: Path, config: DictConfig, is_resumed: bool):
    """The run of wandb, one for a training however often it is interrupted: its id is kept in the output folder."""
    import wandb

    path = folder / WANDB_ID
    known = path.read_text(encoding="utf-8").strip() if is_resumed and path.exists() else None
    try:
        run = wandb.init(
            project=config.experiment.project,
            name=config.experiment.name,
            dir=str(folder),
            config=OmegaConf.to_container(config, resolve=True),
            id=known or None,
            resume="allow",
        )
        write_text(path, f"{run.id}\n")
        return run
    except (wandb.Error, OSError) as error:
        raise UserError(
            f"wandb could not start ({str(error).strip().splitlines()[0]}): log in with `wandb login`, or set "
            "WANDB_MODE=offline, or switch it off with training.enable_wandb=False"
        ) from error


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, from a run that was killed while writing it


def _plain(value: float) -> float | None:
    return value if isinstance(value, int | str) else (round(float(value), 8) if math.isfinite(value) else None)
