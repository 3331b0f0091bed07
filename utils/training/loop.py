"""The one training loop: resume; update; log, show, evaluate, save when it is time; stop. It names no model."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from utils.cli import pick_device
from utils.errors import UserError
from utils.lock import FolderLock
from utils.processes import PATIENCE
from utils.speed import cpu_has_bfloat16
from utils.training.optimizer import learning_rate, peak_rate
from utils.training.report import Report, announce
from utils.training.resume import finish, leave_weights, resume, save
from utils.training.run import Run
from utils.training.task import Batch, Logs, Task


def train(
    task: Task,
    config: DictConfig,
    accelerator: Accelerator,
    training_batches: Callable[[int, int], Iterable[Batch]],
    evaluation_batches: Callable[[], Iterable[Batch]] | None = None,
    check_count: Callable[[int, int | None, int], None] | None = None,
) -> None:
    """Train `task` as `config` says, from the newest checkpoint of its output folder where there is one.

    Args:
        training_batches: Given the index of the first micro-batch and `Run.reseeded_at`, this rank's endless batches
            from there. Where they have an attribute `num_bad`, that is the number of samples skipped so far.
        evaluation_batches: This rank's share of the evaluation set, once; None where there is none. Attributes
            `expected` and `num_bad` go to `check_count(seen, expected, num_bad)`, which raises if images are missing.

    Raises:
        UserError: On the main process; the others exit with status 1.
        SystemExit: A checkpoint is saved, and the same command continues: status 75 (EX_TEMPFAIL) after SIGTERM or
            SIGUSR1, 130 after Ctrl-C.
    """
    if config.get("dry_run", False):
        accelerator.print(OmegaConf.to_yaml(config, resolve=True))
        announce(Run(task, config, accelerator))
        return
    task.start()
    run = Run(task, config, accelerator)
    with FolderLock(run.output_dir, run.processes):
        resume(run)
        announce(run)
        report = Report(run, evaluation_batches, check_count)
        report.announce_evaluations()
        stream = training_batches(run.step * run.accumulation, run.reseeded_at)
        with run.processes.noticing_signals(), report.progress:
            train_steps(run, report, stream)
            report.close()
            finish(run)


def train_steps(run: Run, report: Report, stream: Iterable[Batch]) -> None:
    """Update until the last step, or until time is up, with everything that is due in between."""
    experiment, batches = run.config.experiment, iter(stream)
    while not run.processes.called_off or run.step == run.total_steps:
        if run.step == run.total_steps:
            leave_weights(run)
        if run.owes_evaluation:  # only now, because it may take long: its step is saved
            report.evaluate()
        if run.step == run.total_steps or run.processes.called_off:
            break
        micro_batches = take(run, batches)
        report.add(update(run, micro_batches), micro_batches)

        if run.is_time(experiment.log_every):
            report.log(num_bad=getattr(stream, "num_bad", 0))
        if run.is_time(experiment.generate_every):
            report.show(micro_batches)
        if run.is_time(experiment.eval_every):
            run.owes_evaluation = report.evaluation_batches is not None
        if run.is_time(experiment.save_every):
            report.check_health()
            save(run)
    if run.processes.called_off and run.saved_step != run.step:
        report.check_health()
        save(run)


def take(run: Run, batches: Iterator[Batch]) -> list[Batch]:
    """The micro-batches of one update, as soon as every rank has its own."""
    waited = time.perf_counter()
    with run.processes.careful():
        micro_batches = [run.to_device(next(batches)) for _ in range(run.accumulation)]
    run.data_seconds += time.perf_counter() - waited
    run.processes.meet()
    return micro_batches


def update(run: Run, micro_batches: list[Batch]) -> Logs:
    """One step of every player on one global batch; returns what is to be logged.

    The players' turns alternate: each player's loss is taken on all micro-batches and the player steps, before the
    next player's loss is computed.
    """
    for module in run.task.modules.values():
        module.train()
    turns = [run.task.losses(batch, run.step) for batch in micro_batches]
    logs: Logs = {}
    while (player := backward(run, turns, logs)) is not None:
        logs[f"grad_norm/{player}"] = step_optimizer(run, player)
    if run.ema is not None:
        run.ema.update(run.model, num_updates=run.step)
    run.step += 1
    run.images_seen += run.global_batch
    return logs


def backward(run: Run, turns: list[Iterator[tuple[str, Tensor, Logs]]], logs: Logs) -> str | None:
    """Gradients of the next player's loss, averaged over the micro-batches; the player, None where all have stepped."""
    player = None
    for index, turn in enumerate(turns):
        with syncing(run, wanted=turn is turns[-1]):
            seed(run, index)
            with run.accelerator.autocast():
                item = next(turn, None)
            if item is None:
                continue
            player, loss, new = item
            run.accelerator.backward(loss / len(turns))
        for name, value in new.items():
            logs[name] = logs.get(name, 0) + value.detach().float() / len(turns)
    return player


def syncing(run: Run, wanted: bool) -> contextlib.ExitStack:
    """A context whose gradients travel between processes at once, or only stay here."""
    stack = contextlib.ExitStack()
    if not wanted:
        for module in run.task.modules.values():
            stack.enter_context(run.accelerator.no_sync(module))
    return stack


def step_optimizer(run: Run, player: str) -> Tensor:
    """Clip, set the learning rate, update; returns the gradient norm before clipping."""
    optimizer, training, schedule = run.optimizers[player], run.config.training, run.config.lr_scheduler.params
    run.accelerator.unscale_gradients(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
    first = run.task.first_step(player)
    rate = learning_rate(
        run.step - first,
        peak=peak_rate(player, run.config),
        end=schedule.end_lr,
        warmup_steps=schedule.warmup_steps,
        total_steps=run.total_steps - first,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    # All players' gradients: the model's loss has left some in the adversary.
    for other in run.optimizers.values():
        other.zero_grad()
    return norm


def seed(run: Run, micro_batch: int) -> None:
    """Seed every random draw of a step, so that a resumed run draws what an undisturbed one would."""
    key = [run.config.training.seed, run.step, micro_batch, run.processes.rank]
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def make_accelerator(config: DictConfig) -> Accelerator:
    """Accelerate with the config's precision; seeds, so that initial weights are the same on every process."""
    training = config.training
    if torch.cuda.is_available():
        # Both said, because torch by itself has TF32 on in convolutions and off in matrix products.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.enable_tf32
    on_cpu = pick_device().type == "cpu"
    precision = training.mixed_precision
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"training.mixed_precision must be no, fp16 or bf16, got {precision}")
    if on_cpu and precision == "bf16" and not cpu_has_bfloat16():
        precision = "no"
    # NCCL keeps its ten minutes: ranks meet over gloo before they use it, so one that is missing then is lost.
    patience = [InitProcessGroupKwargs(timeout=PATIENCE)] if on_cpu else []
    # The CPU is asked for explicitly: Accelerate would run several processes without a GPU as separate single ones.
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu, kwargs_handlers=patience)
    if precision != training.mixed_precision:
        accelerator.print("precision      float32: this processor emulates bfloat16, several times slower")
    torch.manual_seed(training.seed)
    return accelerator
