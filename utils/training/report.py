"""What a run tells: its derived numbers, lines of metrics.jsonl, previews, evaluations, and steps that went wrong."""

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.checkpoint import latest_checkpoint, writing
from utils.config import RUN_CONFIG, keep_changed, save_config
from utils.errors import UserError
from utils.files import write_json
from utils.images import preview_sheet
from utils.log import RunLog
from utils.processes import num_cores
from utils.training.run import Run
from utils.training.task import Batch, Logs

WORTH_ADVICE = 0.2  # share of the time
MOST_CHANGES = 10  # of a configuration that are listed
VITAL = ("loss/", "grad_norm/")  # what a sound step has finite
Share = tuple[dict[str, float], dict[str, int]]  # sums over images, and counts, of a rank


def announce(run: Run) -> None:
    """Print the derived numbers with their arithmetic."""
    training, accelerator = run.config.training, run.accelerator
    batch, images = run.global_batch, run.config.experiment.max_train_examples
    run.say(f"output         {run.output_dir}")
    run.say(
        f"global batch   {training.per_gpu_batch_size} per process x {run.processes.world_size} processes x "
        f"{run.accumulation} accumulated = {batch} images"
    )
    run.say(
        f"steps          {run.total_steps:,}, that is {run.total_steps * batch:,} images = "
        f"{run.total_steps * batch / images:.1f} epochs of {images:,}"
    )
    for player, module in run.task.modules.items():
        parameters = list(accelerator.unwrap_model(module).parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in parameters) - trained
        run.say(f"{player:<14} {trained:,} parameters trained, {frozen:,} frozen")
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    run.say(f"device         {accelerator.device}, {precision}{', compiled' if run.compiles else ''}")
    if run.step:
        run.say(f"resuming after step {run.step}")


class Report:
    """The record of a run, its bar, and what is looked at on the way. All ranks make one and call it together.

    Args:
        evaluation_batches, check_count: As for `train`.
    """

    def __init__(
        self,
        run: Run,
        evaluation_batches: Callable[[], Iterable[Batch]] | None = None,
        check_count: Callable[[int, int | None, int], None] | None = None,
    ):
        self.run, self.evaluation_batches, self.check_count = run, evaluation_batches, check_count
        self.file = self._open_log()
        # A checkpoint is written before its step is evaluated; the log tells whether that was done after all.
        is_done = run.processes.gather(self.file is not None and run.step in self.file.evaluated_steps)[0]
        run.owes_evaluation = run.owes_evaluation and evaluation_batches is not None and not is_done
        self.progress = tqdm(
            initial=run.step, total=run.total_steps, unit="step", disable=not run.processes.is_main, dynamic_ncols=True
        )
        self.num_lines = 0
        self.preview_batch: Batch | None = None
        self._start_line()

    def announce_evaluations(self) -> None:
        """Print what they cost; evaluation data that are not there stop the run before its first step."""
        run, every = self.run, self.run.config.experiment.eval_every
        if self.evaluation_batches is None or not every:
            return
        expected = None
        with run.processes.careful():
            expected = getattr(self.evaluation_batches(), "expected", None)
        run.processes.meet()
        images = "all images" if expected is None else f"{expected:,} images"
        run.say(
            f"evaluation     {images} every {every:,} steps and at the end; fewer: dataset.params.max_eval_examples=N"
        )

    def _open_log(self) -> RunLog | None:
        """The output folder with the run's configuration; the log, on the main process."""
        run, log = self.run, None
        with run.processes.careful(), writing(run.output_dir):
            if run.processes.is_main:
                run.output_dir.mkdir(parents=True, exist_ok=True)
                self._tell_changes()
                save_config(run.config, run.output_dir / RUN_CONFIG)
                log = RunLog(run.output_dir, run.config, resume_step=run.step)
        run.processes.meet()
        with run.processes.careful():
            if not run.output_dir.is_dir():
                raise UserError(
                    f"{run.output_dir} is not visible from {platform.node()}: experiment.output_dir must be on a disk "
                    "that all nodes share"
                )
        return log

    def _tell_changes(self) -> None:
        """Say what this run's configuration has other than the one that it continues, which is kept."""
        kept_as = f"config-until-step-{self.run.step}"
        changes, copy = keep_changed(self.run.config, self.run.output_dir / RUN_CONFIG, kept_as)
        if changes:
            more = f" and {len(changes) - MOST_CHANGES} more" if len(changes) > MOST_CHANGES else ""
            self.run.say(
                f"changed        {'; '.join(changes[:MOST_CHANGES])}{more} (the configuration until now is kept as "
                f"{copy.name})"
            )

    def _start_line(self) -> None:
        """Forget what the last line of the log has told."""
        self.logs: list[Logs] = []  # of each step since
        self.keys: list[list[str]] = []
        self.run.data_seconds = self.run.paused_seconds = 0.0
        self.started = time.perf_counter()

    def add(self, logs: Logs, micro_batches: list[Batch]) -> None:
        """Keep what an update has returned, on the accelerator, until it is time to log."""
        self.logs.append(logs)
        self.keys.append([key for batch in micro_batches for key in batch.get("__key__", [])])
        self.progress.update()

    def write(self, numbers: dict[str, float]) -> None:
        with self.run.processes.careful(), writing(self.run.output_dir):
            if self.file is not None:
                self.file.write(self.run.step, numbers)

    def close(self) -> None:
        with self.run.processes.careful(), writing(self.run.output_dir):
            if self.file is not None:
                self.file.close()

    # ----------------------------------------------------------------------------------------------------- numbers

    def log(self, num_bad: int) -> None:
        """Mean of everything since the last line, over steps and ranks; the only wait for the accelerator."""
        run, reached = self.run, time.perf_counter()
        self.check_health()
        # While the host waited for data, the accelerator still worked on what is waited for here.
        starved = max(0.0, run.data_seconds - (time.perf_counter() - reached))
        numbers = self._means() | self._counts()
        bad, waited = run.processes.add_up(torch.tensor([num_bad, starved], dtype=torch.float64)).tolist()

        steps, seconds = len(self.logs), time.perf_counter() - self.started - run.paused_seconds
        rates = {player: optimizer.param_groups[0]["lr"] for player, optimizer in run.optimizers.items()}
        numbers |= {f"learning_rate/{player}": rate for player, rate in rates.items()}
        numbers |= {
            "images_per_second": steps * run.global_batch / seconds,
            "images_seen": run.images_seen,
            "data_time_share": waited / seconds / run.processes.world_size,
            "eta_hours": (run.total_steps - run.step) * seconds / steps / 3600,
            "bad_samples": int(bad),
        }
        self.num_lines += 1
        if self.num_lines == 2:  # the first line includes the loader's start
            self._advise(numbers["data_time_share"])
        self._start_line()
        self.progress.set_postfix(
            {"loss": f"{numbers['loss/model']:.4f}", "images/s": f"{numbers['images_per_second']:.0f}"}
        )
        self.write(numbers)

    def _means(self) -> dict[str, float]:
        """Each logged value's mean over the steps that have it, and over ranks."""
        names = sorted({name for logs in self.logs for name in logs})
        sums = torch.stack([sum(logs.get(name, torch.zeros(())) for logs in self.logs) for name in names])
        times = torch.tensor([sum(name in logs for logs in self.logs) for name in names], dtype=torch.float64)
        # Moved first: an Apple GPU has no float64.
        means = self.run.processes.add_up(sums.cpu().double() / times) / self.run.processes.world_size
        return dict(zip(names, means.tolist(), strict=True))

    def _counts(self) -> dict[str, float]:
        """What the task makes of its counters, which start from zero again."""
        counts = self.run.task.counts
        add_up = self.run.processes.add_up
        totals: dict[str, float] = {name: add_up(count.cpu().clone()) for name, count in counts.items()}
        numbers = self.run.task.summarize(totals)
        for count in counts.values():
            count.zero_()
        return numbers

    def _advise(self, data_time_share: float) -> None:
        cores = max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        advice = worker_advice(data_time_share, self.run.config.dataset.params.num_workers_per_gpu, cores)
        if advice:
            self.run.say(advice)

    # ----------------------------------------------------------------------------------------- steps that went wrong

    def check_health(self) -> None:
        """Stop where a loss or a gradient was no number or far too large, before the log or a checkpoint has it.

        Raises:
            UserError: With the first such step, the file that lists its samples, and the last checkpoint.
        """
        if not self.logs:
            return
        run = self.run
        sound = torch.stack([torch.stack(list(self._soundness(logs))).all() for logs in self.logs])
        num_unsound = run.processes.add_up((~sound).cpu().int()).tolist()  # ranks, by step
        if not any(num_unsound):
            return
        index = next(index for index, number in enumerate(num_unsound) if number)
        step = run.step - len(self.logs) + index + 1
        values = {name: f"{float(value):.4g}" for name, value in self.logs[index].items() if name.startswith(VITAL)}
        shares = run.processes.gather(values | {"samples": self.keys[index]})
        with run.processes.careful(), writing(run.output_dir):
            if run.processes.is_main:
                path, last = run.output_dir / f"unsound_step-{step}.json", latest_checkpoint(run.output_dir)
                write_json(path, {"step": step, "ranks": shares})
                raise UserError(
                    f"step {step} had {', '.join(f'{name} {value}' for name, value in values.items())}: lower "
                    f"optimizer.params.learning_rate, or look at the samples of that step, listed in {path}; the last "
                    f"good checkpoint is {last[1] if last else 'not there yet'}"
                )
        run.processes.meet()

    def _soundness(self, logs: Logs) -> Iterator[Tensor]:
        for name, value in logs.items():
            if name.startswith("loss/"):
                yield value.isfinite()
            if name.startswith("grad_norm/"):
                sound = value <= self.run.config.training.stop_grad_norm
                # The scaler of fp16 meets infinite gradients now and then, and leaves these steps out.
                yield sound if self.run.accelerator.scaler is None else sound | ~value.isfinite()

    # ------------------------------------------------------------------------------------------ looking at the model

    @torch.no_grad()
    def show(self, micro_batches: list[Batch]) -> None:
        """Save the task's images of the same few images each time, of the evaluation set where there is one."""
        run = self.run
        if not self._num_shown():
            return
        with run.processes.careful(), writing(run.output_dir):
            if self.file is not None:  # another rank may have no batch at all
                if self.preview_batch is None:
                    self.preview_batch = self._few_images(micro_batches)
                with self._own_randomness():
                    images = run.task.preview(run.evaluated, self.preview_batch)
                self.file.show(run.step, "preview", preview_sheet(images, f"step {run.step:,}"))
        run.processes.meet()

    def _few_images(self, micro_batches: list[Batch]) -> Batch:
        batch = micro_batches[0]
        if self.evaluation_batches is not None:
            batch = self.run.to_device(next(iter(self.evaluation_batches())))
        return {name: value[: self._num_shown()] for name, value in batch.items()}

    def _num_shown(self) -> int:
        return int(self.run.config.training.get("num_generated_images", 8))

    @torch.no_grad()
    def evaluate(self) -> None:
        """Mean of the task's numbers over the evaluation set; each rank adds up its share, the ranks meet once.

        In float32: in bfloat16 a tokenizer would give other tokens than the commands that evaluate it afterwards.
        Interrupted when time is up, and then still owed: a part of the set says nothing.
        """
        run, started = self.run, time.perf_counter()
        share: Share = ({}, {"images": 0, "bad": 0})
        expected = None
        with run.paused():
            with run.processes.careful(), self._own_randomness():
                share, expected = self._score_share()
            run.processes.meet()
            if run.processes.called_off:
                return
            numbers = add_up(run.processes.gather(share))
            with run.processes.careful():
                if self.check_count is not None:
                    self.check_count(numbers["images"], expected, numbers["bad"])
            run.processes.meet()
            numbers["seconds"] = time.perf_counter() - started
            self.write({f"eval/{name}": value for name, value in numbers.items()})
            run.owes_evaluation = False
            run.say(f"step {run.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

    def _score_share(self) -> tuple[Share, int | None]:
        """This rank's share of the images, and how many there are in all."""
        run, count = self.run, 0
        sums: dict[str, Any] = {}
        loader = self.evaluation_batches()
        expected = getattr(loader, "expected", None)
        bar = tqdm(
            total=expected, desc="evaluation", unit="image", leave=False, disable=not run.processes.is_main,
            dynamic_ncols=True,
        )  # fmt: skip
        with bar:
            for batch in loader:
                if run.processes.noticed:
                    break
                values = run.task.evaluate(run.evaluated, run.to_device(batch))
                for name, value in values.items():
                    sums.setdefault(name, []).append(value)
                count += len(value)
                bar.update(len(value) * run.processes.world_size)
        sums = {name: sum(float(value.cpu().double().sum()) for value in values) for name, values in sums.items()}
        return (sums, {"images": count, "bad": getattr(loader, "num_bad", 0)}), expected

    @contextlib.contextmanager
    def _own_randomness(self):
        """Draws made while looking at a model do not change what training draws next (each step is seeded anyway)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.run.config.training.seed)
            yield


def add_up(shares: list[Share]) -> dict[str, float]:
    """Means over all ranks' images, and counts; a rank without a batch has no sums."""
    totals = {name: sum(counts[name] for _, counts in shares) for name in shares[0][1]}
    names = sorted({name for sums, _ in shares for name in sums}, key=_by_length)
    return {name: sum(sums.get(name, 0.0) for sums, _ in shares) / totals["images"] for name in names} | totals


def _by_length(name: str) -> tuple[str, int]:
    """To sort psnr@8 before psnr@16."""
    measure, _, length = name.partition("@")
    return measure, int(length) if length.isdecimal() else 0


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
    found = f"{data_time_share:.0%} of the time is spent waiting for data: "
    if num_workers < num_cores:
        return found + (
            f"stop, and continue with dataset.params.num_workers_per_gpu={min(wanted, num_cores)} (now {num_workers}; "
            f"{num_cores} cores per process)"
        )
    return found + (
        f"{num_workers} workers already keep {num_cores} cores per process busy; faster storage, smaller images in the "
        "shards, more cores per process, or tokens made before (scripts/pretokenize.py) would help"
    )
