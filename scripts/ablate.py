"""Train the arms of an ablation at equal steps, score each at 1, 2, 4, ... tokens, and lay them side by side.

    python3 scripts/ablate.py --arms configs/ablations/fashion_tail_drop.yaml

Each arm and seed is stage 1 of a tokenizer, whose predicted codes the teacher's decoder makes into images. The steps
are the commands of the README: train_tokenizer, evaluate_reconstruction, generate_token_contribution_data,
reconstruct_tokenizer --tokens, analyze_tokens. Each writes into OUTPUT_DIR/ARM-SEED and is left out where it is done,
so a run that was killed goes on where it was, and an arm that is added later is all that is run; where a list says
something else of an arm than the one that ran it, that is an error. At the end stand OUTPUT_DIR/ablation.json,
ablation.md (the tables) and ablation.png and .pdf (the curves).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.report import read_results, title_of
from utils.figures import plotting, write_figure
from utils.files import write_json
from utils.paths import ROOT

CURVES = ("psnr", "ssim", "perceptual_efficientnet_lite0")
SETTINGS = "settings.json"
KEYS = {"train", "finish", "evaluate", "num_contribution_images", "seeds", "arms"}


@dataclass(frozen=True)
class Trial:
    """One arm with one seed.

    Args:
        overrides: `a.b=c` for the training configuration.
    """

    arm: str
    title: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path


def main() -> None:
    arguments = parse_arguments()
    plan = read_arms(arguments.arms)
    trials = list(trials_of(plan, arguments.output_dir))
    for trial in trials:  # a misspelt key is an error before anything trains
        load_config(ROOT / plan["train"], trial.overrides)
        refuse_another(trial, plan)
    run_all(trials, plan, arguments)
    arms = {}
    for trial in trials:
        arms.setdefault(trial.arm, []).append(results_of(trial))
    images = read_json(trials[0].folder / "scores" / "metrics.json")["protocol"]["originals"]
    baselines = [row for path in arguments.beside for row in read_results(path, images["sha256"])]
    text = "\n\n".join(tables(arms, baselines))
    print(text)
    write_json(arguments.output_dir / "ablation.json", {"plan": plan, "arms": arms, "beside": baselines})
    (arguments.output_dir / "ablation.md").write_text(text + "\n", encoding="utf-8")
    write_figure(draw(arms, baselines), arguments.output_dir / "ablation")
    print(f"{len(trials)} runs of {len(arms)} arms; wrote ablation.json, .md, .png, .pdf into {arguments.output_dir}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, required=True, metavar="FILE", help="the list of arms, a YAML file")
    parser.add_argument("--output_dir", type=Path, help="default: output/ablation/NAME, where FILE is NAME.yaml")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="runs side by side, which share the CPU's threads and take the GPUs in turn (default: %(default)s)",
    )
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="FILE", help="results on the same images to show beside the arms"
    )
    arguments = parser.parse_args()
    arguments.output_dir = arguments.output_dir or Path("output/ablation") / arguments.arms.stem
    if arguments.parallel < 1:
        raise UserError(f"--parallel must be 1 or more, got {arguments.parallel}")
    return arguments


def read_arms(path: Path) -> dict[str, Any]:
    """The plan in a file of arms, checked for its keys."""
    try:
        plan = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a list of arms: {error}") from error
    if not isinstance(plan, dict) or set(plan) != KEYS or not plan["arms"]:
        raise UserError(f"{path} must have the keys {', '.join(sorted(KEYS))}, see configs/ablations")
    for name, arm in plan["arms"].items():
        if not {"title", "overrides"} <= set(arm) <= {"title", "overrides", "seeds"}:
            raise UserError(f"{path}: arm {name} must have a title and overrides, and may have seeds")
    return plan


def trials_of(plan: Mapping[str, Any], output_dir: Path) -> Iterator[Trial]:
    for name, arm in plan["arms"].items():
        for seed in arm.get("seeds", plan["seeds"]):
            values = {**arm["overrides"], "training.seed": seed}
            overrides = tuple(f"{key}={value}" for key, value in values.items())
            yield Trial(name, arm["title"], seed, overrides, output_dir / f"{name}-{seed}")


# ------------------------------------------------------------------------------------------------- running the commands


def settings_of(trial: Trial, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the list says of how a trial is run: not what the configurations that it names hold."""
    return {key: plan[key] for key in sorted(KEYS - {"seeds", "arms"})} | {"overrides": list(trial.overrides)}


def refuse_another(trial: Trial, plan: Mapping[str, Any]) -> None:
    """Raise where the trial's folder holds results of other settings."""
    record = trial.folder / SETTINGS
    if record.exists() and read_json(record) != settings_of(trial, plan):
        raise UserError(
            f"{trial.folder} was run with other settings, which are in its {SETTINGS}: give another --output_dir, or "
            "delete that folder to run it again"
        )


def run_all(trials: Sequence[Trial], plan: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Every step of every trial that is not done yet; the first that fails ends all, and names its log."""
    todo = {trial: list(steps_of(trial, plan)) for trial in trials}
    places: SimpleQueue[int] = SimpleQueue()
    for place in range(arguments.parallel):
        places.put(place)
    with (
        tqdm(total=sum(map(len, todo.values())), unit="step", dynamic_ncols=True) as bar,
        ThreadPoolExecutor(arguments.parallel) as pool,
    ):
        failed = Event()

        def work(trial: Trial) -> None:
            place = places.get()
            try:
                if not failed.is_set():
                    trial.folder.mkdir(parents=True, exist_ok=True)
                    write_json(trial.folder / SETTINGS, settings_of(trial, plan))
                for result, command in todo[trial]:
                    if failed.is_set():
                        return
                    if not result.exists():
                        bar.set_postfix_str(f"{trial.folder.name}: {command[0].removesuffix('.py')}")
                        execute(trial, command, environment(place, arguments.parallel))
                    bar.update()
            except BaseException:
                failed.set()
                raise
            finally:
                places.put(place)

        for job in [pool.submit(work, trial) for trial in trials]:
            job.result()


def steps_of(trial: Trial, plan: Mapping[str, Any]) -> Iterator[tuple[Path, list[str]]]:
    """The commands of a trial in their order, each behind the file that is there when it is done."""

    def output(name: str) -> list[str]:
        return ["--output_dir", str(trial.folder / name)]

    stage1, model, tokens = (trial.folder / name for name in ("stage1", "model", "tokens"))
    yield (
        stage1 / "model.safetensors",
        ["train_tokenizer.py", f"config={ROOT / plan['train']}", *trial.overrides, f"experiment.output_dir={stage1}"],
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
    yield (
        trial.folder / "scores" / "metrics.json",
        ["evaluate_reconstruction.py", *source, "--features", "none", *output("scores"), *changes],
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
        last = log.read_text(encoding="utf-8").rstrip().splitlines()[-1]
        raise UserError(f"{command[0]} of {trial.folder.name} ended with status {done.returncode} ({last}); see {log}")


def environment(place: int, parallel: int) -> dict[str, str]:
    """For the run in one of `parallel` places: its share of the CPU's threads, and its GPU where there are some."""
    environ = dict(os.environ)
    if parallel > 1:
        environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // parallel)))
        if torch.cuda.device_count() > 1:
            environ["CUDA_VISIBLE_DEVICES"] = str(place % torch.cuda.device_count())
    return environ


# ------------------------------------------------------------------------------------------------- laying side by side


def results_of(trial: Trial) -> dict[str, Any]:
    """The numbers of a finished trial.

    Returns:
        "curves": a row for each number of tokens; "head": the share of the first eighth of the tokens in the absolute
        contribution of all; "codes_used": by position; "nmi", "nmi_shuffled", "purity", "purity_shuffled": of the first
        token and the class.
    """
    folder = trial.folder
    scores, analysis = read_json(folder / "scores" / "metrics.json"), read_json(folder / "tokens" / "analysis.json")
    with np.load(folder / "contribution" / "diffs.npz", allow_pickle=False) as file:
        contribution = file["mean_l1"]
    first = analysis["classes"][0]
    return {
        "title": trial.title,
        "seed": trial.seed,
        "curves": [{name: row[name] for name in ("tokens", "bytes_per_image", *CURVES)} for row in scores["rows"]],
        "contribution": contribution.tolist(),
        "head": float(contribution[: max(1, len(contribution) // 8)].sum() / contribution.sum()),
        "perplexity": scores["codebook"]["perplexity"],
        "entropy": [row["entropy"] for row in analysis["positions"]],
        "codes_used": [row["codes_used"] for row in analysis["positions"]],
        **{name: first[name] for name in ("nmi", "nmi_shuffled", "purity", "purity_shuffled")},
    }


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


Arms = Mapping[str, Sequence[Mapping[str, Any]]]  # results of each seed, by arm


def tables(arms: Arms, baselines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: each curve by number of tokens, then what else there is; means over seeds, and half their range."""
    lengths = [row["tokens"] for row in next(iter(arms.values()))[0]["curves"]]
    for name in CURVES:
        rows = []
        for seeds in arms.values():
            values = zip(*([row[name] for row in seed["curves"]] for seed in seeds), strict=True)  # by length
            rows.append([seeds[0]["title"], *map(spread, values)])
        for row in baselines:
            note = f"{row['name']}: {row['bytes_per_image']:g} bytes"
            rows.append([note, *[""] * (len(lengths) - 1), spread([row[name]])])
        yield markdown([f"{title_of(name)} at tokens", *map(str, lengths)], rows)
    columns = {
        "share of the first eighth": lambda seed: 100 * seed["head"],
        "perplexity": lambda seed: seed["perplexity"],
        "codes used, first token": lambda seed: seed["codes_used"][0],
        "codes used, last token": lambda seed: seed["codes_used"][-1],
        "fewest": lambda seed: min(seed["codes_used"]),
        "NMI of first token and class": lambda seed: seed["nmi"],
        "shuffled": lambda seed: seed["nmi_shuffled"],
        "purity": lambda seed: seed["purity"],
        "purity, shuffled": lambda seed: seed["purity_shuffled"],
    }
    rows = [
        [seeds[0]["title"], *(spread([float(value(seed)) for seed in seeds]) for value in columns.values())]
        for seeds in arms.values()
    ]
    yield markdown(["arm", *columns], rows)


def spread(values: Sequence[float]) -> str:
    """The mean, and half the range where there are several."""
    mean = f"{np.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.2g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(arms: Arms, baselines: Sequence[Mapping[str, Any]]) -> Any:
    """PSNR and perceptual distance by number of tokens, and what the first tokens carry of the contribution of all."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 5), layout="constrained")
    curves = dict(zip(("psnr", "perceptual_efficientnet_lite0"), axes, strict=False))
    colours = pyplot.get_cmap("tab10").colors
    for seeds, colour in zip(arms.values(), colours * len(arms), strict=False):
        look = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.2}
        for place, seed in enumerate(seeds):
            tokens = [row["tokens"] for row in seed["curves"]]
            label = seed["title"] if place == 0 else None
            for name, axis in curves.items():
                axis.plot(tokens, [row[name] for row in seed["curves"]], label=label, **look)
            share = np.cumsum(seed["contribution"]) / sum(seed["contribution"])
            axes[2].plot(range(1, len(share) + 1), 100 * share, **look)
    for name, axis in curves.items():
        for row, line in zip(baselines, ("--", ":", "-."), strict=False):
            label = f"{row['name']}: {row['bytes_per_image']:g} bytes"
            axis.axhline(row[name], color="black", linewidth=1, linestyle=line, label=label)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="tokens", title=title_of(name))
    axes[2].plot([0, len(share)], [0, 100], color="grey", linewidth=0.8, linestyle="--")
    axes[2].set(xlabel="first tokens", ylabel="%", title="Share of the contribution (dashed: equal shares)")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


if __name__ == "__main__":
    run(main)
