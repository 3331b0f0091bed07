"""The numbers that a configuration may hold: whole ones and others, from where to where."""

import math
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

LARGEST = 2**63 - 1  # what torch and numpy take as a seed
FINITE = sys.float_info.max
POSITIVE = math.nextafter(0, 1)

# Keys, `*` for any letters, the first that fits; the smallest and the largest whole number.
COUNTS = {
    "training.max_train_steps": (0, LARGEST),  # 0: what is loaded is saved as it is
    "training.per_gpu_batch_size": (1, LARGEST),
    "training.gradient_accumulation_steps": (1, LARGEST),
    "training.seed": (0, LARGEST),
    "training.num_generated_images": (0, LARGEST),
    "training.codebook.*_steps": (0, LARGEST),
    "training.codebook.*_every": (0, LARGEST),
    "experiment.max_train_examples": (1, LARGEST),
    "experiment.save_every": (1, LARGEST),
    "experiment.log_every": (1, LARGEST),
    "experiment.*_every": (0, LARGEST),
    "experiment.keep_last": (0, LARGEST),
    "lr_scheduler.params.warmup_steps": (0, LARGEST),
    "losses.discriminator_start": (0, LARGEST),
    "dataset.params.num_workers_per_gpu": (0, LARGEST),
    "dataset.params.shuffle_buffer_size": (1, LARGEST),
    "dataset.params.*_eval_examples": (1, LARGEST),
    "dataset.preprocessing.*_edge": (1, LARGEST),
    "dataset.preprocessing.crop_size": (1, LARGEST),
}
# The same for numbers. Clipping and the emergency stop are switched off by .inf.
MEASURES = {
    "optimizer.params.*learning_rate": (0, FINITE),
    "optimizer.params.weight_decay": (0, FINITE),
    "optimizer.params.beta*": (0, math.nextafter(1, 0)),
    "lr_scheduler.params.learning_rate": (0, FINITE),
    "lr_scheduler.params.end_lr": (0, FINITE),
    "losses.*weight*": (0, FINITE),
    "losses.label_smoothing": (0, 1),
    "training.*_grad_norm": (POSITIVE, math.inf),  # 0 would train nothing
    "dataset.max_bad_fraction": (0, 1),
}
OPTIONAL = "dataset.*"  # null: not given, as of a run that reads no images


def complaint(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the first number outside its range: its key, what is expected and what came; None if all fit.

    Args:
        values: A configuration's values by dotted key, resolved. Keys that this file does not list hold anything.
    """
    for key, value in values.items():
        for limits, kinds, noun in ((COUNTS, int, "a whole number"), (MEASURES, int | float, "a number")):
            pattern = next((pattern for pattern in limits if fnmatchcase(key, pattern)), None)
            if pattern is None or (value is None and fnmatchcase(key, OPTIONAL)):
                continue
            low, high = limits[pattern]
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:  # NaN lies nowhere
                return f"{key} must be {noun} {_between(low, high, value)}, got {value!r}"
    return None


def _between(low: float, high: float, value: Any) -> str:
    if high == math.nextafter(1, 0):
        return f"from {low} to below 1"
    if high == 1 or (high == LARGEST and isinstance(value, int) and value > high):
        return f"from {low} to {high}"
    if low == POSITIVE:
        return "above 0 (.inf: no limit)"
    return f"of at least {low}" + (", and finite" if high == FINITE else "")
