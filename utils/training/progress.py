"""What the metrics.jsonl of a run says of it: a summary of a few rows, and curves over the steps."""

import json
import re
from pathlib import Path
from typing import Any

from utils.checkpoint import checkpoints
from utils.errors import UserError
from utils.figures import plotting
from utils.log import METRICS_FILE

UNSOUND = re.compile(r"unsound_step-(\d+)\.json")
Line = dict[str, Any]  # what was logged at a step; None where a number was not finite


def read_metrics(folder: Path) -> list[Line]:
    """The lines of a run's metrics.jsonl, oldest first.

    Raises:
        UserError: The folder is no run's, or nothing has been logged yet.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        what = "has no" if folder.is_dir() else "does not exist, so neither does its"
        raise UserError(
            f"{folder} {what} {METRICS_FILE}: name the experiment.output_dir of a run (working directory {Path.cwd()})"
        )
    *texts, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # the last is being written
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
            lines[-1]["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged: line {number} is not what a run logs, but {text[:60]!r}") from error
    if not lines:
        raise UserError(f"{path} is empty: a run logs for the first time after experiment.log_every steps")
    return lines


def summary(folder: Path, lines: list[Line], total: int, now: float) -> str:
    """A few labelled rows of text.

    Args:
        total: Steps of the whole run.
        now: Seconds since the epoch.
    """
    step = lines[-1]["step"]
    age = duration(now - (folder / METRICS_FILE).stat().st_mtime)
    rows = {"run": str(folder), "step": f"{step:,} of {total:,} ({step / total:.1%}), logged {age} ago"}
    training = next((line for line in reversed(lines) if "loss/model" in line), None)
    if training is not None:
        rows |= {"loss": group(training, "loss/"), "gradient norm": group(training, "grad_norm/")}
        rows["speed"] = (
            f"{training['images_per_second']:,.1f} images/s, {training['data_time_share']:.0%} of the time waiting for "
            "data"
        )
        rows["time left"] = duration(training["eta_hours"] * 3600) if step < total else "none, it is done"
        rows["bad samples"] = f"{training['bad_samples']:,} since it was last started"
    evaluation = next((line for line in reversed(lines) if "eval/images" in line), None)
    if evaluation is not None:
        shown = {name: value for name, value in evaluation.items() if name not in ("eval/bad", "eval/seconds")}
        rows["evaluation"] = f"step {evaluation['step']:,}: {group(shown, 'eval/')}"
    rows["checkpoint"] = last_checkpoint(folder, now)
    if unsound := [(int(match[1]), path) for path in folder.iterdir() if (match := UNSOUND.fullmatch(path.name))]:
        number, path = max(unsound)
        passed = ", passed since" if step >= number else ""
        rows["unsound step"] = f"{number:,}{passed}: its losses and samples are in {path}"
    return "\n".join(f"{name:<14} {text}" for name, text in rows.items())


def last_checkpoint(folder: Path, now: float) -> str:
    if not (saved := checkpoints(folder)):
        return "none yet"
    step, path = saved[-1]
    return f"step {step:,}, saved {duration(now - path.stat().st_mtime)} ago"


def group(line: Line, prefix: str) -> str:
    """All numbers of a line whose names begin with `prefix`."""
    numbers = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
    return ", ".join(f"{name} {'not a number' if value is None else f'{value:.5g}'}" for name, value in numbers.items())


def duration(seconds: float) -> str:
    """ "2 d 3 h", "1 h 5 min", "40 s": the two largest units."""
    seconds = max(0, round(seconds))
    for unit, smaller, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part} {smaller}"
    return f"{seconds} s"


def draw(lines: list[Line], title: str) -> Any:
    """One panel for the losses, one for the gradient norms, and one for each measure of the evaluations."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {}, "grad_norm": {}}
    for line in lines:
        for name, value in line.items():
            kind, _, rest = name.partition("/")
            if kind == "eval" and rest not in ("images", "bad", "seconds"):
                kind, _, rest = rest.partition("@")
                rest = f"{rest} token{'s' * (rest != '1')}" if rest else ""
            elif kind not in ("loss", "grad_norm"):
                continue
            if value is not None:
                curves.setdefault(kind, {}).setdefault(rest, []).append((line["step"], value))
    pyplot = plotting()
    figure, axes = pyplot.subplots(len(curves), sharex=True, figsize=(8, 2.5 * len(curves)), layout="constrained")
    for axis, (kind, members) in zip(axes, curves.items(), strict=True):
        for name, points in members.items():
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
        axis.set(ylabel=kind, yscale="log" if kind == "grad_norm" else "linear")
        axis.grid(alpha=0.3)
        if any(members):
            axis.legend(fontsize="small", ncols=4)
    axes[-1].set_xlabel("step")
    figure.suptitle(title)
    return figure
