"""The state of a run: saved, restored so that training goes on bit for bit, and left as final weights."""

import contextlib
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from utils.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    checkpoints,
    latest_checkpoint,
    prune,
    write_checkpoint,
    writing,
)
from utils.errors import UserError
from utils.files import write_json
from utils.processes import INTERRUPTED, TIME_IS_UP
from utils.training.optimizer import take_settings
from utils.training.run import Run

WORLD = "world.json"  # in a checkpoint: how far the run is, on how many processes, and how it draws from shards
# What decides beside seed and rank which samples of the shards are in a batch: changed, the streams would give batches
# again that they have given.
DRAWN_BY = (
    "dataset.params.num_workers_per_gpu",
    "experiment.save_every",
    "training.gradient_accumulation_steps",
    "training.per_gpu_batch_size",
)


def save(run: Run) -> None:
    """Write checkpoint-STEP, and delete the ones that are not to be kept."""
    experiment = run.config.experiment
    with run.paused():
        run.saved_step = run.step
        write_checkpoint(run.output_dir, run.step, lambda folder: write_state(run, folder), run.processes)
        if run.processes.is_main:
            prune(run.output_dir, run.step, experiment.keep_last, experiment.keep_every)


def write_state(run: Run, folder: Path) -> None:
    """This rank's files of a checkpoint."""
    run.accelerator.save_state(str(folder))
    if run.task.state:
        state = {name: value.contiguous().cpu() for name, value in run.task.state.items()}
        save_file(state, folder / f"task_state_{run.processes.rank}.safetensors")
    if run.processes.is_main:
        run.model.save_pretrained(folder / "unwrapped_model")
        if run.ema is not None:
            run.ema.model.save_pretrained(folder / "ema_model")
        write_json(
            folder / WORLD,
            {
                "num_processes": run.processes.world_size,
                "global_batch": run.global_batch,
                "images_seen": run.images_seen,
                "owes_evaluation": run.owes_evaluation,
                "sources": run.task.sources,
                "drawn_by": drawn_by(run),
                "reseeded_at": run.reseeded_at,
            },
        )


def resume(run: Run) -> None:
    """Continue from the newest whole checkpoint, naming broken ones that were passed over.

    Raises:
        UserError: The folder holds a checkpoint where none is to be continued, or only broken ones, or one that does
            not fit, or one that is farther than this run goes.
    """
    found = find_checkpoint(run)
    if found is None:
        return
    run.step, folder = found
    run.saved_step = run.step
    with run.processes.careful(), fitting(folder):
        world = json.loads((folder / WORLD).read_text())
        check_sources(run, world.get("sources", {}))  # none in checkpoints of before
        run.images_seen, run.owes_evaluation = world["images_seen"], world["owes_evaluation"]
        changes = changed_draws(run, world.get("drawn_by", {}))  # none in checkpoints of before
        run.reseeded_at = run.step if changes else world.get("reseeded_at", 0)
        tell_differences(run, folder, world, changes)
        missing = players_to_come(run, folder)
        with without(run, missing):
            run.accelerator.load_state(str(folder))
        for player, optimizer in run.optimizers.items():
            take_settings(optimizer, run.task.modules[player], run.config)
        if run.ema is not None:
            run.ema.model.load_state_dict(load_file(folder / "ema_model" / WEIGHTS_FILE))
        same_world = world["num_processes"] == run.processes.world_size
        state = folder / f"task_state_{run.processes.rank if same_world else 0}.safetensors"
        # There is none of a run without any state; all that there is now belongs to players who are yet to come.
        if run.task.state and (state.is_file() or not missing):
            for name, value in load_file(state).items():
                run.task.state[name].copy_(value)
        if run.processes.is_main and run.step < run.total_steps:
            take_back_weights(run)
    run.processes.meet()


def players_to_come(run: Run, folder: Path) -> list[str]:
    """Players that a checkpoint lacks because its run was to end before their first step; they begin from nothing."""
    num_saved = sum(path.is_file() for path in folder.glob("optimizer*.bin"))
    missing = list(run.optimizers)[num_saved:]
    if any(run.task.first_step(player) < run.step for player in missing):
        return []  # they should have played already: it is no checkpoint of such a run
    for player in missing:
        run.say(f"new            the {player}, which {folder} lacks: it begins at step {run.task.first_step(player)}")
    return missing


@contextlib.contextmanager
def without(run: Run, players: list[str]) -> Iterator[None]:
    """What Accelerate loads inside leaves these last players as they are."""
    accelerator, everything = run.accelerator, (run.accelerator._models, run.accelerator._optimizers)
    accelerator._models, accelerator._optimizers = (prepared[: len(prepared) - len(players)] for prepared in everything)
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = everything


def take_back_weights(run: Run) -> None:
    """Remove the weights of an end that no longer is one: a folder with them would mean them, and not what follows."""
    path = run.output_dir / WEIGHTS_FILE
    if path.is_file():
        path.unlink()
        run.say(f"removed        {path}: the run had ended and goes on; until its new end the newest checkpoint counts")


def continues(run: Run) -> bool:
    """Whether a checkpoint in the output folder is to be continued."""
    return bool(run.config.experiment.get("resume", True))


def find_checkpoint(run: Run) -> tuple[int, Path] | None:
    """(step, folder) of the newest whole one, which the main process looks for; None in a new run."""
    found = None
    with run.processes.careful():
        if run.processes.is_main:
            if not continues(run) and checkpoints(run.output_dir):
                raise UserError(
                    f"experiment.resume is False, and {run.output_dir} holds checkpoints: delete what it holds "
                    "to start from scratch, give another experiment.output_dir, or leave experiment.resume out "
                    "to continue"
                )
            found = latest_checkpoint(run.output_dir, run.say)
            if found is None and checkpoints(run.output_dir):
                raise UserError(
                    f"no checkpoint in {run.output_dir} is whole: restore one, or delete what it holds to start "
                    "from scratch"
                )
            if found is None:
                refuse_a_model(run.output_dir)
            if found is not None and found[0] > run.total_steps:
                raise UserError(
                    f"{found[1]} is farther than training.max_train_steps {run.total_steps}: raise that, or give "
                    "another experiment.output_dir"
                )
    run.processes.meet()
    return run.processes.gather(found)[0]


def refuse_a_model(folder: Path) -> None:
    """Raise where a new run would end by replacing a model, which until then would count as the run's own."""
    there = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if (folder / name).exists()]
    if there:
        raise UserError(
            f"{folder} holds {' and '.join(there)} but no checkpoint to continue from: give another "
            "experiment.output_dir, or delete what it holds to start from scratch"
        )


def check_sources(run: Run, begun: dict[str, str]) -> None:
    """Refuse to go on with other weights, such as a teacher's, than those that training has begun with."""
    for name, now in run.task.sources.items():
        if (was := begun.get(name, now)) != now:
            raise ValueError(f"the weights of {name} were {was[:12]} when it began, and are {now[:12]} now")


def drawn_by(run: Run) -> dict[str, int]:
    """The values of DRAWN_BY by which batches are drawn from shards; none of other data."""
    if run.config.dataset.get("type", "shards") != "shards":
        return {}
    return {key: OmegaConf.select(run.config, key) for key in DRAWN_BY}


def changed_draws(run: Run, before: dict[str, int]) -> list[str]:
    """The values of DRAWN_BY that are others than before, for people."""
    now = drawn_by(run)
    was = now | before
    # Without workers the process itself is the one.
    return [f"{key} {was[key]} -> {now[key]}" for key in now if max(1, was[key]) != max(1, now[key])]


def tell_differences(run: Run, folder: Path, world: dict[str, Any], changes: list[str]) -> None:
    """Say where the run goes on in other circumstances than those in which the checkpoint was written.

    Args:
        changes: Those of what batches are drawn by.
    """
    if world["num_processes"] != run.processes.world_size:
        run.say(
            f"{folder} was written by {world['num_processes']} processes, now there are {run.processes.world_size}: "
            "training continues, with other batches than an uninterrupted run has"
        )
    if world["global_batch"] != run.global_batch:
        run.say(
            f"the global batch was {world['global_batch']} images and is {run.global_batch} now: change "
            "training.gradient_accumulation_steps or per_gpu_batch_size to keep it"
        )
    if changes:
        run.say(
            f"{folder} drew its batches from shards otherwise ({', '.join(changes)}): training continues with a fresh "
            "seed for them, so that no batch comes again, and with other batches than an uninterrupted run has"
        )


@contextlib.contextmanager
def fitting(checkpoint: Path) -> Iterator[None]:
    """Say of a whole checkpoint that is not this run's what is wrong with it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{checkpoint} holds more than tensors and was refused, because loading such a pickle could run code: "
            "delete it, or give another experiment.output_dir"
        ) from error
    except (RuntimeError, ValueError, KeyError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{checkpoint} does not fit this configuration ({reason}): give another experiment.output_dir, or undo "
            "the change"
        ) from error


def leave_weights(run: Run) -> None:
    """Put the final weights and their configuration into the output folder."""
    with run.processes.careful(), writing(run.output_dir):
        if run.processes.is_main:
            run.evaluated.save_pretrained(run.output_dir)
    run.processes.meet()


def finish(run: Run) -> None:
    """Say where the weights are; or exit, to be called again."""
    run.processes.meet()
    if run.step < run.total_steps or run.owes_evaluation:
        was_interrupted = run.processes.interrupted
        reason = "interrupted" if was_interrupted else "time is up"
        how = "the same command again" if continues(run) else "it again without experiment.resume=False"
        run.say(f"{reason}: step {run.step} is saved; run {how} to continue")
        # A job whose command would not continue is not to be requeued.
        sys.exit(TIME_IS_UP if continues(run) and not was_interrupted else INTERRUPTED)
    run.say(f"trained {run.step} steps; weights and config.json in {run.output_dir}")
