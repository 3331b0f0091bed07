"""The one training loop: resume; accumulate and update; log, show, evaluate, save when it is time; stop."""

import contextlib
import json
import math
import os
import pickle
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from utils.checkpoint import checkpoints, latest_checkpoint, prune, write_checkpoint, writing
from utils.cli import pick_device
from utils.config import RUN_CONFIG
from utils.ema import EMA
from utils.errors import UserError
from utils.files import write_json
from utils.images import preview_sheet
from utils.log import RunLog
from utils.processes import Ranks
from utils.schedule import learning_rate, parameter_groups
from utils.speed import compile_blocks, cpu_has_bfloat16

Batch = dict[str, Any]
Logs = dict[str, Tensor]
WORTH_ADVICE = 0.2  # share of the time
_VITAL = ("loss/", "grad_norm/")  # what a sound step has finite


class Task(Protocol):
    """What is trained, what is minimised, what is shown. The loop knows nothing else of a model.

    Attributes:
        modules: Trained networks by player, "model" first; the loop replaces them by their wrapped versions.
            "model" has `save_pretrained(folder)`, which writes `model.safetensors`.
        state: Small tensors that belong to the training state and to no network, saved for each rank.
        counts: Counters that the loop sums over the ranks, hands to `summarize` and clears, each time it logs.
    """

    modules: dict[str, nn.Module]
    state: dict[str, Tensor]
    counts: dict[str, Tensor]

    def start(self) -> None:
        """Load the weights that training starts from; not called for a dry run."""
        ...

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Logs]]:
        """Yield `(player, loss, logs)` per optimiser update; resumed after that player has stepped."""
        ...

    def first_step(self, player: str) -> int:
        """The step at which `player` is updated for the first time; its learning rate counts from there."""
        ...

    def summarize(self, counts: dict[str, Tensor]) -> dict[str, float]:
        """Numbers for the log from the counters of all ranks."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """One value per image, {name: (B,)}, of a model in evaluation mode."""
        ...

    def preview(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Images to look at, a column each: {title: (B, 3, P, P)} in [0, 1]."""
        ...


def train(
    task: Task,
    config: DictConfig,
    accelerator: Accelerator,
    training_batches: Callable[[int], Iterable[Batch]],
    evaluation_batches: Callable[[], Iterable[Batch]] | None = None,
    check_count: Callable[[int, int | None, int], None] | None = None,
) -> None:
    """Train `task` as `config` says, from the newest checkpoint of its output folder where there is one.

    Args:
        training_batches: Given the index of the first micro-batch, this rank's endless batches from there. Where it
            has an attribute `num_bad`, that is the number of samples skipped so far.
        evaluation_batches: This rank's share of the evaluation set, once; None where there is none. Attributes
            `expected` and `num_bad` go to `check_count(seen, expected, num_bad)`, which raises if images are missing.

    Raises:
        UserError: On the main process; the others exit with status 1.
        SystemExit: Status 75 (EX_TEMPFAIL) after SIGTERM or SIGUSR1: a checkpoint is saved, the same command goes on.
    """
    if config.get("dry_run", False):
        accelerator.print(OmegaConf.to_yaml(config, resolve=True))
        Run(task, config, accelerator).announce()
        return
    task.start()
    run = Run(task, config, accelerator)
    run.resume()
    run.announce()
    run.start_log()
    experiment, total = config.experiment, config.training.max_train_steps
    stream = training_batches(run.step * run.accumulation)
    batches = iter(stream)
    progress = tqdm(
        initial=run.step, total=total, unit="step", disable=not accelerator.is_main_process, dynamic_ncols=True
    )
    with run.ranks.heeding_signals(), progress:
        if run.owes_evaluation:
            run.evaluate(evaluation_batches, check_count)
        while run.step < total and not run.ranks.called_off:
            micro_batches = run.take(batches)
            run.update(micro_batches)
            progress.update()

            if run.is_time(experiment.log_every):
                run.log(progress, num_bad=getattr(stream, "num_bad", 0))
            if run.is_time(experiment.generate_every):
                run.show(evaluation_batches, micro_batches)
            if evaluation_batches is not None and run.is_time(experiment.eval_every):
                run.evaluate(evaluation_batches, check_count)
            if run.is_time(experiment.save_every) or run.ranks.called_off:
                run.save()
        run.finish()


class Run:
    """One run of the loop: networks, optimisers, step, log."""

    def __init__(self, task: Task, config: DictConfig, accelerator: Accelerator):
        self.task, self.config, self.accelerator = task, config, accelerator
        self.output_dir = Path(config.experiment.output_dir)
        self.ranks = Ranks(accelerator.process_index, accelerator.num_processes)
        self.step = self.images_seen = 0
        self.owes_evaluation = False  # the one of this step was broken off
        self.accumulation = config.training.gradient_accumulation_steps
        self.model = task.modules["model"].to(accelerator.device)
        self.ema = EMA(self.model) if config.training.use_ema else None
        self.optimizers = {}
        for player, module in list(task.modules.items()):
            optimizer = make_optimizer(player, module.to(accelerator.device), config)
            if config.training.compile:
                compile_blocks(module)
            task.modules[player], self.optimizers[player] = accelerator.prepare(module, optimizer)
        for state in (task.state, task.counts):
            state.update({name: value.to(accelerator.device) for name, value in state.items()})
        self.log_file: RunLog | None = None
        self.data_seconds = 0.0
        self._num_logged = 0
        # Of the steps since the last line of the log.
        self._logs: list[Logs] = []
        self._keys: list[list[str]] = []
        self._preview_batch: Batch | None = None
        self._log_start = (0, time.perf_counter())

    @property
    def global_batch(self) -> int:
        """Images in an update, of all processes."""
        return self.config.training.per_gpu_batch_size * self.accelerator.num_processes * self.accumulation

    # ------------------------------------------------------------------------------------------------ one update

    def take(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of one update, as soon as every rank has its own."""
        waited = time.perf_counter()
        with self.ranks.careful():
            micro_batches = [self.to_device(next(batches)) for _ in range(self.accumulation)]
        self.data_seconds += time.perf_counter() - waited
        self.ranks.meet()
        return micro_batches

    def update(self, micro_batches: list[Batch]) -> None:
        """One step of every player on one global batch.

        The players' turns alternate: each player's loss is taken on all micro-batches and the player steps, before
        the next player's loss is computed.
        """
        for module in self.task.modules.values():
            module.train()
        turns = [self.task.losses(batch, self.step) for batch in micro_batches]
        logs: Logs = {}
        while True:
            player = None
            for index, turn in enumerate(turns):
                last = index == len(turns) - 1
                with contextlib.ExitStack() as stack:
                    if not last:  # gradients travel between processes once an update
                        for module in self.task.modules.values():
                            stack.enter_context(self.accelerator.no_sync(module))
                    self.seed(index)
                    with self.accelerator.autocast():
                        item = next(turn, None)
                    if item is None:
                        continue
                    player, loss, new = item
                    self.accelerator.backward(loss / len(turns))
                for name, value in new.items():
                    logs[name] = logs.get(name, 0) + value.detach().float() / len(turns)
            if player is None:
                break
            logs[f"grad_norm/{player}"] = self.step_optimizer(player)
        self._logs.append(logs)
        self._keys.append([key for batch in micro_batches for key in batch.get("__key__", [])])
        if self.ema is not None:
            self.ema.update(self.model, num_updates=self.step)
        self.step += 1
        self.images_seen += self.global_batch

    def step_optimizer(self, player: str) -> Tensor:
        """Clip, set the learning rate, update; returns the gradient norm before clipping."""
        optimizer = self.optimizers[player]
        self.accelerator.unscale_gradients(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(player)
        optimizer.step()
        # All players' gradients: the model's loss has left some in the adversary.
        for other in self.optimizers.values():
            other.zero_grad()
        return norm

    def learning_rate(self, player: str) -> float:
        """The rate of the update with index `self.step`."""
        schedule = self.config.lr_scheduler.params
        first = self.task.first_step(player)
        return learning_rate(
            self.step - first,
            peak=_peak_rate(player, self.config),
            end=schedule.end_lr,
            warmup_steps=schedule.warmup_steps,
            total_steps=self.config.training.max_train_steps - first,
        )

    def seed(self, micro_batch: int) -> None:
        """Seed every random draw of a step, so that a resumed run draws what an undisturbed one would."""
        key = [self.config.training.seed, self.step, micro_batch, self.accelerator.process_index]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))

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

    def is_time(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.training.max_train_steps)

    # ------------------------------------------------------------------------------------ log, show, evaluate

    def announce(self) -> None:
        """Print the derived numbers with their arithmetic."""
        training, accelerator = self.config.training, self.accelerator
        world, images = accelerator.num_processes, self.config.experiment.max_train_examples
        batch = self.global_batch
        self.say(f"output         {self.output_dir}")
        self.say(
            f"global batch   {training.per_gpu_batch_size} per process x {world} processes x "
            f"{self.accumulation} accumulated = {batch} images"
        )
        self.say(
            f"steps          {training.max_train_steps:,}, that is {training.max_train_steps * batch:,} images = "
            f"{training.max_train_steps * batch / images:.1f} epochs of {images:,}"
        )
        for player in self.task.modules:
            module = accelerator.unwrap_model(self.task.modules[player])
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            frozen = sum(p.numel() for p in module.parameters()) - trained
            self.say(f"{player:<14} {trained:,} parameters trained, {frozen:,} frozen")
        precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        self.say(f"device         {accelerator.device}, {precision}")
        if self.step:
            self.say(f"resuming after step {self.step}")

    def say(self, text: str) -> None:
        """Print once, and not once a machine."""
        if self.ranks.is_main:
            tqdm.write(text)

    def start_log(self) -> None:
        with self.ranks.careful(), writing(self.output_dir):
            if self.ranks.is_main:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                OmegaConf.save(self.config, self.output_dir / RUN_CONFIG, resolve=True)
                self.log_file = RunLog(self.output_dir, self.config, resume_step=self.step)
        self.ranks.meet()
        with self.ranks.careful():
            if not self.output_dir.is_dir():
                raise UserError(
                    f"{self.output_dir} is not seen from {platform.node()}: experiment.output_dir must be on a disk "
                    "that all nodes share"
                )
        self._log_start = (self.step, time.perf_counter())

    def log(self, progress: tqdm, num_bad: int) -> None:
        """Mean of everything logged since the last time, over steps and ranks; the only wait for the accelerator."""
        reached = time.perf_counter()
        self.check_health()
        # While the host waited for data, the accelerator still worked on what is waited for here.
        starved = max(0.0, self.data_seconds - (time.perf_counter() - reached))
        names = sorted({name for logs in self._logs for name in logs})
        sums = torch.stack([sum(logs.get(name, torch.zeros(())) for logs in self._logs) for name in names]).double()
        times = torch.tensor([float(sum(name in logs for logs in self._logs)) for name in names]).to(sums)
        extra = torch.tensor([float(num_bad), starved], dtype=torch.float64)
        means = self.accelerator.reduce(sums / times, reduction="mean").tolist()
        bad, waited = self.accelerator.reduce(extra.to(sums.device), reduction="sum").tolist()
        counts = {name: self.accelerator.reduce(count, reduction="sum") for name, count in self.task.counts.items()}
        numbers = dict(zip(names, means, strict=True)) | self.task.summarize(counts)
        for count in self.task.counts.values():
            count.zero_()

        steps, seconds = self.step - self._log_start[0], time.perf_counter() - self._log_start[1]
        numbers |= {
            f"learning_rate/{player}": self.optimizers[player].param_groups[0]["lr"] for player in self.optimizers
        }
        numbers |= {
            "images_per_second": steps * self.global_batch / seconds,
            "images_seen": self.images_seen,
            "data_time_share": waited / seconds / self.accelerator.num_processes,
            "eta_hours": (self.config.training.max_train_steps - self.step) * seconds / steps / 3600,
            "bad_samples": int(bad),
        }
        self._num_logged += 1
        if self._num_logged == 2:  # the first time knows the loader's start as well
            params = self.config.dataset.params
            advice = worker_advice(numbers["data_time_share"], params.num_workers_per_gpu, self._num_cores())
            if advice:
                self.say(advice)
        self._logs, self._keys = [], []
        self.data_seconds, self._log_start = 0.0, (self.step, time.perf_counter())
        progress.set_postfix(
            {"loss": f"{numbers['loss/model']:.4f}", "images/s": f"{numbers['images_per_second']:.0f}"}
        )
        self.write_log(numbers)

    def _num_cores(self) -> int:
        """CPU cores of this machine for each of its ranks."""
        return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def write_log(self, numbers: dict[str, float]) -> None:
        with self.ranks.careful(), writing(self.output_dir):
            if self.log_file is not None:
                self.log_file.write(self.step, numbers)

    def check_health(self) -> None:
        """Stop where a loss or a gradient was no number or far too large, before the log or a checkpoint has it.

        Raises:
            UserError: With the first such step, the file that lists its samples, and the last checkpoint.
        """
        if not self._logs:
            return
        sound = torch.stack([torch.stack(list(self._soundness(logs))).all() for logs in self._logs])
        num_unsound = self.accelerator.reduce((~sound).float(), reduction="sum").tolist()  # ranks, by step
        if not any(num_unsound):
            return
        index = next(index for index, number in enumerate(num_unsound) if number)
        step = self.step - len(self._logs) + index + 1
        values = {name: f"{float(value):.4g}" for name, value in self._logs[index].items() if name.startswith(_VITAL)}
        shares = self.ranks.gather(values | {"samples": self._keys[index]})
        with self.ranks.careful(), writing(self.output_dir):
            if self.ranks.is_main:
                path, last = self.output_dir / f"unsound_step-{step}.json", latest_checkpoint(self.output_dir)
                write_json(path, {"step": step, "ranks": shares})
                raise UserError(
                    f"step {step} had {', '.join(f'{name} {value}' for name, value in values.items())}: lower "
                    f"optimizer.params.learning_rate, or look at the samples of that step, listed in {path}; the last "
                    f"good checkpoint is {last[1] if last else 'not there yet'}"
                )
        self.ranks.meet()

    def _soundness(self, logs: Logs) -> Iterator[Tensor]:
        for name, value in logs.items():
            if name.startswith("loss/"):
                yield value.isfinite()
            if name.startswith("grad_norm/"):
                sound = value <= self.config.training.stop_grad_norm
                # The scaler of fp16 meets infinite gradients now and then, and leaves these steps out.
                yield sound if self.accelerator.scaler is None else sound | ~value.isfinite()

    @property
    def evaluated(self) -> nn.Module:
        return (self.ema.model if self.ema is not None else self.model).eval()

    @torch.no_grad()
    def show(self, evaluation_batches: Callable[[], Iterable[Batch]] | None, micro_batches: list[Batch]) -> None:
        """Save the task's images of the same few images each time, of the evaluation set where there is one."""
        with self.ranks.careful(), writing(self.output_dir):
            if self.log_file is not None:  # another rank may have no batch at all
                if self._preview_batch is None:
                    count = self.config.training.get("num_generated_images", 8)
                    first = micro_batches[0]
                    if evaluation_batches is not None:
                        first = self.to_device(next(iter(evaluation_batches())))
                    self._preview_batch = {name: value[:count] for name, value in first.items()}
                with self._paused_randomness():
                    images = self.task.preview(self.evaluated, self._preview_batch)
                self.log_file.show(self.step, "preview", preview_sheet(images))
        self.ranks.meet()

    @torch.no_grad()
    def evaluate(self, batches: Callable[[], Iterable[Batch]], check_count: Callable | None) -> None:
        """Mean of the task's numbers over the evaluation set; each rank adds up its share, the ranks meet once.

        Broken off when time is up, and then owed: a part of the set says nothing.
        """
        started, sums, count, num_bad, expected = time.perf_counter(), {}, 0, 0, None
        most = self.config.dataset.params.get("max_eval_examples")
        share = math.inf if most is None else math.ceil(most / self.accelerator.num_processes)
        with self.ranks.careful(), self._paused_randomness():
            loader = batches()
            for batch in tqdm(loader, desc="evaluation", leave=False, disable=not self.accelerator.is_main_process):
                if self.ranks.noticed:
                    break
                with self.accelerator.autocast():
                    values = self.task.evaluate(self.evaluated, self.to_device(batch))
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.double().sum()
                count += len(value)
                if count >= share:
                    break
            num_bad, expected = getattr(loader, "num_bad", 0), getattr(loader, "expected", None)
        self.ranks.meet()
        self.owes_evaluation = self.ranks.called_off
        if self.owes_evaluation:
            return
        sums = {name: float(value) for name, value in sums.items()}
        numbers = _add_up(self.ranks.gather((sums, {"images": count, "bad": num_bad})))
        with self.ranks.careful():
            if check_count is not None and most is None:
                check_count(numbers["images"], expected, numbers["bad"])
        self.ranks.meet()
        numbers["seconds"] = time.perf_counter() - started
        self.write_log({f"eval/{name}": value for name, value in numbers.items()})
        self.say(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        self._log_start = (self.step, time.perf_counter())

    @contextlib.contextmanager
    def _paused_randomness(self):
        """Draws made while looking at a model do not change what training draws next (each step is seeded anyway)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.training.seed)
            yield

    # -------------------------------------------------------------------------------------------- save and resume

    def save(self) -> None:
        """Write checkpoint-STEP, and delete the ones that are not to be kept."""
        experiment = self.config.experiment
        self.check_health()
        write_checkpoint(self.output_dir, self.step, self._write_state, self.ranks)
        if self.ranks.is_main:
            prune(self.output_dir, self.step, experiment.keep_last, experiment.keep_every)
        self._log_start = (self.step, time.perf_counter())

    def _write_state(self, folder: Path) -> None:
        accelerator = self.accelerator
        accelerator.save_state(str(folder))
        if self.task.state:
            state = {name: value.contiguous().cpu() for name, value in self.task.state.items()}
            save_file(state, folder / f"task_state_{accelerator.process_index}.safetensors")
        if accelerator.is_main_process:
            self.model.save_pretrained(folder / "unwrapped_model")
            if self.ema is not None:
                self.ema.model.save_pretrained(folder / "ema_model")
            write_json(
                folder / "world.json",
                {
                    "num_processes": accelerator.num_processes,
                    "global_batch": self.global_batch,
                    "images_seen": self.images_seen,
                    "owes_evaluation": self.owes_evaluation,
                },
            )

    def resume(self) -> None:
        """Continue from the newest whole checkpoint, naming broken ones that were passed over."""
        if not self.config.experiment.get("resume", True):
            return
        accelerator, found = self.accelerator, None
        with self.ranks.careful():
            if self.ranks.is_main:
                found = latest_checkpoint(self.output_dir, self.say)
                if found is None and checkpoints(self.output_dir):
                    raise UserError(
                        f"no checkpoint in {self.output_dir} is whole: restore one, or delete them to start "
                        "from scratch"
                    )
        self.ranks.meet()
        found = self.ranks.gather(found)[0]
        if found is None:
            return
        self.step, folder = found
        with self.ranks.careful(), _fitting(folder):
            world = json.loads((folder / "world.json").read_text())
            self.images_seen, self.owes_evaluation = world["images_seen"], world["owes_evaluation"]
            same_world = world["num_processes"] == accelerator.num_processes
            if not same_world:
                self.say(
                    f"{folder} was written by {world['num_processes']} processes, now there are "
                    f"{accelerator.num_processes}: training goes on, but with other batches than an undisturbed run's"
                )
            if world["global_batch"] != self.global_batch:
                self.say(
                    f"the global batch was {world['global_batch']} images and is {self.global_batch} now: change "
                    "training.gradient_accumulation_steps or per_gpu_batch_size to keep it"
                )
            accelerator.load_state(str(folder))
            if self.ema is not None:
                self.ema.model.load_state_dict(load_file(folder / "ema_model" / "model.safetensors"))
            state = folder / f"task_state_{self.ranks.rank if same_world else 0}.safetensors"
            if self.task.state:
                for name, value in load_file(state).items():
                    self.task.state[name].copy_(value)
        self.ranks.meet()

    def finish(self) -> None:
        """Leave the final weights and their configuration in the output folder; or exit, to be called again."""
        is_complete = self.step == self.config.training.max_train_steps and not self.owes_evaluation
        with self.ranks.careful(), writing(self.output_dir):
            if self.ranks.is_main:
                self.log_file.close()
                if is_complete:
                    self.evaluated.save_pretrained(self.output_dir)
        self.ranks.meet()
        if not is_complete:
            self.say(f"time is up: step {self.step} is saved, the same command goes on from there")
            sys.exit(os.EX_TEMPFAIL)
        self.say(f"trained {self.step} steps; weights and config.json in {self.output_dir}")


@contextlib.contextmanager
def _fitting(checkpoint: Path) -> Iterator[None]:
    """Say of a whole checkpoint that is not this run's what is wrong with it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{checkpoint} holds more than tensors and was refused, because loading such a pickle could run code: "
            "delete it, or give another experiment.output_dir"
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{checkpoint} does not fit this configuration ({reason}): give another experiment.output_dir, or take "
            "back what was changed"
        ) from error


def make_accelerator(config: DictConfig) -> Accelerator:
    """Accelerate with the config's precision; seeds, so that initial weights are the same on every process."""
    training = config.training
    if torch.cuda.is_available():
        # Both said, because torch by itself has TF32 on in convolutions and off in matrix products.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.enable_tf32
    on_cpu = pick_device().type == "cpu"
    precision = training.mixed_precision
    if on_cpu and precision == "bf16" and not cpu_has_bfloat16():
        precision = "no"
    # Said plainly, because Accelerate takes several processes without an accelerator for so many single ones otherwise.
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu)
    if precision != training.mixed_precision:
        accelerator.print("precision      float32: this processor emulates bfloat16, several times slower")
    torch.manual_seed(training.seed)
    return accelerator


def worker_advice(data_time_share: float, num_workers: int, num_cores: int) -> str | None:
    """What to change where training waits for data; None where it hardly does.

    Args:
        data_time_share: Share of the time in which there was nothing to compute because data was missing, 0..1.
        num_workers: Processes that load data for each rank; 0: the rank itself.
        num_cores: CPU cores for each rank.
    """
    if data_time_share < WORTH_ADVICE:
        return None
    # Loading takes this share of the time already (with workers: all of it), and is to fit into the rest.
    loading = num_workers if num_workers else data_time_share
    wanted = math.ceil(loading / max(1 - data_time_share, 0.05))
    found = f"{data_time_share:.0%} of the time goes into waiting for data: "
    if num_workers < num_cores:
        return found + (
            f"stop, and go on with dataset.params.num_workers_per_gpu={min(wanted, num_cores)} (now {num_workers}; "
            f"{num_cores} cores a process)"
        )
    return found + (
        f"{num_workers} workers already keep {num_cores} cores a process busy; faster storage, smaller images in the "
        "shards, more cores a process, or tokens made before (scripts/pretokenize.py) would help"
    )


def make_optimizer(player: str, module: nn.Module, config: DictConfig) -> torch.optim.AdamW:
    if config.optimizer.name != "adamw":
        raise UserError(f"optimizer.name must be adamw, got {config.optimizer.name}")
    if config.lr_scheduler.scheduler != "cosine":
        raise UserError(f"lr_scheduler.scheduler must be cosine, got {config.lr_scheduler.scheduler}")
    params = config.optimizer.params
    device = next(module.parameters()).device
    return torch.optim.AdamW(
        parameter_groups([module], params.weight_decay),
        lr=_peak_rate(player, config),
        betas=(params.beta1, params.beta2),
        fused=device.type in ("cuda", "cpu"),
    )


def _peak_rate(player: str, config: DictConfig) -> float:
    """`optimizer.params.PLAYER_learning_rate` where there is one; the schedule's own otherwise."""
    return config.optimizer.params.get(f"{player}_learning_rate", config.lr_scheduler.params.learning_rate)


def _add_up(shares: list[tuple[dict[str, float], dict[str, int]]]) -> dict[str, float]:
    """Means over all ranks' images, and counts, of (sums, counts) by rank; a rank without a batch has no sums."""
    totals = {name: sum(counts[name] for _, counts in shares) for name in shares[0][1]}
    names = sorted({name for sums, _ in shares for name in sums})
    return {name: sum(sums.get(name, 0.0) for sums, _ in shares) / totals["images"] for name in names} | totals
