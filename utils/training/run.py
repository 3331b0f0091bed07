"""A run: a task's networks, their optimisers and average, and how far training is."""

import contextlib
import copy
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from utils.processes import Processes
from utils.speed import asked_to_compile, compile_blocks, pays_to_compile
from utils.training.optimizer import EMA, make_optimizer
from utils.training.task import Batch, Task


class Run:
    """What the loop updates, `report` describes, and `resume` saves.

    Attributes:
        in_float32: The model without the autocast that Accelerate puts around its forward pass; the same weights.
        step: Updates done.
        images_seen: Images in them, of all processes.
        reseeded_at: The step since which shards are drawn by another seed, 0: by that of the configuration alone.
        saved_step: Updates that the last checkpoint holds, -1 without one.
        owes_evaluation: The evaluation of this step is still to come, or was interrupted.
        compiles: The networks' blocks are compiled.
        data_seconds, paused_seconds: Time spent waiting for data, and not training, since the last line of the log.
    """

    def __init__(self, task: Task, config: DictConfig, accelerator: Accelerator):
        self.task, self.config, self.accelerator = task, config, accelerator
        self.output_dir = Path(config.experiment.output_dir)
        self.processes = Processes(accelerator.device)
        self.step = self.images_seen = self.reseeded_at = 0
        self.saved_step = -1
        self.owes_evaluation = False
        self.data_seconds = self.paused_seconds = 0.0
        self.accumulation = config.training.gradient_accumulation_steps
        self.model = task.modules["model"].to(accelerator.device)
        self.ema = EMA(self.model) if config.training.use_ema else None
        self.in_float32 = copy.copy(self.model)
        self.compiles = pays_to_compile(
            asked_to_compile(config.training.compile),
            accelerator.device,
            config.training.per_gpu_batch_size * self.accumulation * self.total_steps,
        )
        self.optimizers = {}
        for player, module in list(task.modules.items()):
            optimizer = make_optimizer(player, module.to(accelerator.device), config)
            if self.compiles:
                compile_blocks(module)
            task.modules[player], self.optimizers[player] = accelerator.prepare(module, optimizer)
        for network in task.frozen:
            network.to(accelerator.device)
            if self.compiles:
                compile_blocks(network)
        for state in (task.state, task.counts):
            state.update({name: value.to(accelerator.device) for name, value in state.items()})

    @property
    def global_batch(self) -> int:
        """Images in an update, of all processes."""
        return self.config.training.per_gpu_batch_size * self.processes.world_size * self.accumulation

    @property
    def total_steps(self) -> int:
        return self.config.training.max_train_steps

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated, shown and published: the average where there is one."""
        return (self.ema.model if self.ema is not None else self.in_float32).eval()

    def is_time(self, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last; never for 0."""
        return every > 0 and (self.step % every == 0 or self.step == self.total_steps)

    def to_device(self, batch: Batch) -> Batch:
        """Move a loader's batch; uint8 images become float32 in [0, 1]."""
        device = self.accelerator.device
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        if "image" in moved:
            moved["image"] = moved["image"].float() / 255
        return moved

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as time of training."""
        began = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - began

    def say(self, text: str) -> None:
        """Print once, and not once a machine."""
        if self.processes.is_main:
            tqdm.write(text)
