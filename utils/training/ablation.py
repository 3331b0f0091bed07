"""The arms of an ablation: which trainings they are, and the commands that train and score each, run once."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from utils.config import load_config
from utils.errors import UserError
from utils.files import write_json
from utils.paths import ROOT
from utils.processes import num_cores

SETTINGS = "settings.json"
KEYS = {"train", "finish", "evaluate", "num_contribution_images", "seeds", "arms"}
# A generator's configuration and changes: whose images' tokens an entropy model is fitted to; that is trained on them.
OPTIONAL = {"entropy", "generation", "num_generated_images"}
BAR = re.compile(r"\d%\|")  # in a line of a log: of a progress bar
FEATURES = "efficientnet_lite0"  # of Frechet distances, where a list has `generation`


@dataclass(frozen=True)
class Trial:
    """One arm with one seed.

    Args:
        overrides: `a.b=c` for the training configuration.
        train: The training configuration.
    """

    arm: str
    title: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    train: str


def read_arms(path: Path) -> dict[str, Any]:
    """The plan in a file of arms, checked for its keys."""
    try:
        plan = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as a list of arms: {reason}") from error
    if not isinstance(plan, dict) or not KEYS <= set(plan) <= KEYS | OPTIONAL:
        raise UserError(f"{path} must have the keys {', '.join(sorted(KEYS))}, see configs/ablations")
    if not isinstance(plan["arms"], dict) or not plan["arms"]:
        raise UserError(f"{path}: arms must be a mapping of names to arms, see configs/ablations")
    if ("generation" in plan) != ("num_generated_images" in plan):
        raise UserError(f"{path}: generation and num_generated_images belong together, see configs/ablations")
    for name, arm in plan["arms"].items():
        keys = set(arm) if isinstance(arm, dict) else set()
        if not {"title", "overrides"} <= keys <= {"title", "overrides", "seeds", "train"}:
            raise UserError(f"{path}: arm {name} must have a title and overrides, and may have seeds and train")
        if not isinstance(arm["overrides"], dict):
            raise UserError(f"{path}: overrides of arm {name} must be a mapping of keys to values, or {{}}")
    return dict(plan)


def trials_of(plan: Mapping[str, Any], output_dir: Path) -> Iterator[Trial]:
    for name, arm in plan["arms"].items():
        for seed in arm.get("seeds", plan["seeds"]):
            values = {**arm["overrides"], "training.seed": seed}
            overrides = tuple(f"{key}={'null' if value is None else value}" for key, value in values.items())
            train = arm.get("train", plan["train"])
            yield Trial(name, arm["title"], seed, overrides, output_dir / f"{name}-{seed}", train)


def settings_of(trial: Trial, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the list says of how a trial is run: not what the configurations that it names hold."""
    of_all = {key: plan[key] for key in sorted((KEYS | OPTIONAL) & set(plan) - {"seeds", "arms"})}
    return of_all | {"train": trial.train, "overrides": list(trial.overrides)}


def refuse_another(trial: Trial, plan: Mapping[str, Any]) -> None:
    """Raise where the trial's folder holds results of other settings."""
    record = trial.folder / SETTINGS
    if record.exists() and read_json(record) != settings_of(trial, plan):
        raise UserError(
            f"{trial.folder} was run with other settings, which are in its {SETTINGS}: give another --output_dir, or "
            "delete that folder to run it again"
        )


def run_all(trials: Sequence[Trial], plan: Mapping[str, Any], parallel: int) -> None:
    """Every step of every trial that is not done yet, `parallel` trials at a time.

    Raises:
        UserError: The first command that fails ends all; the text names its log.
    """
    todo = {trial: list(steps_of(trial, plan)) for trial in trials}
    places: SimpleQueue[int] = SimpleQueue()
    for place in range(parallel):
        places.put(place)
    failed = Event()
    with (
        tqdm(total=sum(map(len, todo.values())), unit="command", dynamic_ncols=True) as bar,
        ThreadPoolExecutor(parallel) as pool,
    ):

        def work(trial: Trial) -> None:
            place = places.get()
            try:
                if not failed.is_set():
                    write_json(trial.folder / SETTINGS, settings_of(trial, plan))
                    run_trial(trial, todo[trial], environment(place, parallel), bar, failed)
            except BaseException:
                failed.set()
                raise
            finally:
                places.put(place)

        for job in [pool.submit(work, trial) for trial in trials]:
            job.result()


def run_trial(
    trial: Trial, steps: Sequence[tuple[Path, list[str]]], environ: Mapping[str, str], bar: tqdm, failed: Event
) -> None:
    """The steps whose results are not there; stops before the next one when another trial has failed."""
    for result, command in steps:
        if failed.is_set():
            return
        if not result.exists():
            bar.set_postfix_str(f"{trial.folder.name}: {command[0].removesuffix('.py')}")
            execute(trial, command, environ)
        bar.update()


def steps_of(trial: Trial, plan: Mapping[str, Any]) -> Iterator[tuple[Path, list[str]]]:
    """The commands of a trial in their order, each behind the file that is there when it is done."""

    def output(name: str) -> list[str]:
        return ["--output_dir", str(trial.folder / name)]

    stage1, model, tokens = (trial.folder / name for name in ("stage1", "model", "tokens"))
    yield (
        stage1 / "model.safetensors",
        ["train_tokenizer.py", f"config={ROOT / trial.train}", *trial.overrides, f"experiment.output_dir={stage1}"],
    )
    # Stage 2 before its first step: the teacher's decoder as it is.
    sizes = [override for override in trial.overrides if override.startswith("model.")]
    finish = [f"experiment.init_weight={stage1}", f"experiment.output_dir={model}", "training.max_train_steps=0"]
    yield (
        model / "model.safetensors",
        ["train_tokenizer.py", f"config={ROOT / plan['finish']}", *sizes, *finish],
    )
    source = ["--config", str(ROOT / plan["evaluate"][0]), "--checkpoint", str(model)]
    changes = [*plan["evaluate"][1:], *sizes]
    features = FEATURES if "generation" in plan else "none"
    yield (
        trial.folder / "scores" / "metrics.json",
        ["evaluate_reconstruction.py", *source, "--features", features, *output("scores"), *changes],
    )
    num_images = str(plan["num_contribution_images"])
    yield (
        trial.folder / "contribution" / "diffs.npz",
        ["generate_token_contribution_data.py", *source, "--num_images", num_images, *output("contribution"), *changes],
    )
    yield (
        tokens / "labels.npy",
        ["reconstruct_tokenizer.py", *source, "--tokens", "--labels", "--without_image", *output("tokens"), *changes],
    )
    data = ["--data", str(tokens / "tokens.npz"), "--labels", str(tokens / "labels.npy")]
    yield tokens / "analysis.json", ["analyze_tokens.py", *data]
    yield from steps_on_tokens(trial, model, plan)


def steps_on_tokens(trial: Trial, model: Path, plan: Mapping[str, Any]) -> Iterator[tuple[Path, list[str]]]:
    """Tokenize the training images, fit an entropy model to them, train a generator on them and score its samples."""
    wanted = [plan[key] for key in ("entropy", "generation") if key in plan]
    token_set = trial.folder / "token_set"
    if wanted:
        source = ["--config", str(ROOT / wanted[0][0]), "--checkpoint", str(model)]
        yield token_set / "eval" / "manifest.json", ["pretokenize.py", *source, "--output_dir", str(token_set)]
    if "entropy" in plan:
        output = trial.folder / "entropy"
        fit = ["--token_set", str(token_set), "--tokenizer", str(model), "--output_dir", str(output), "--force"]
        yield output / "entropy.json", ["fit_entropy_model.py", *fit, *plan["entropy"][1:]]
    if "generation" in plan:
        config, *changes = plan["generation"]
        generator, output = trial.folder / "generator", trial.folder / "generation"
        places = [f"experiment.tokenizer_checkpoint={model}", f"dataset.params.token_set={token_set}"]
        places += [f"experiment.output_dir={generator}", f"training.seed={trial.seed}"]
        yield generator / "model.safetensors", ["train_generator.py", f"config={ROOT / config}", *places, *changes]
        source = ["--checkpoint", str(generator), "--reference", scored_images(plan), "--features", FEATURES]
        count = ["--num_images", str(plan["num_generated_images"]), "--output_dir", str(output)]
        yield output / "metrics.json", ["evaluate_generation.py", *source, *count]


def scored_images(plan: Mapping[str, Any]) -> str:
    """The shards or the folder of the images that arms are scored on."""
    config, *changes = plan["evaluate"]
    dataset = load_config(ROOT / config, changes).dataset
    shards = None if dataset.get("type") == "folder" else dataset.params.eval_shards_path_or_url
    return str(shards or dataset.params.eval_folder)


def execute(trial: Trial, command: Sequence[str], environ: Mapping[str, str]) -> None:
    """Run one of our commands, all that it prints into the trial's log."""
    log = trial.folder / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / command[0]), *command[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environ,
        )
    if done.returncode:
        lines = (line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines())
        last = next((line for line in reversed([*lines]) if line and not BAR.search(line)), "without a word")
        raise UserError(f"{command[0]} of {trial.folder.name} ended with status {done.returncode} ({last}); see {log}")


def environment(place: int, parallel: int) -> dict[str, str]:
    """For the run in one of `parallel` places: its share of the CPU's threads, and its GPU where there are some."""
    environ = dict(os.environ)
    if parallel > 1:
        environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // parallel)))
        if (count := torch.cuda.device_count()) > 1:
            given = environ.get("CUDA_VISIBLE_DEVICES")  # some of the machine's, by number or name
            visible = given.split(",") if given else [str(number) for number in range(count)]
            environ["CUDA_VISIBLE_DEVICES"] = visible[place % count]
    return environ


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
