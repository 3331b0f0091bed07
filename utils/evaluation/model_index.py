"""The figures of a model card: those of a metrics.json, as the hub's `model-index` has them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from utils.errors import UserError
from utils.evaluation.report import MEASURES, NOT_DRAWN, is_measure, too_few_images
from utils.files import sha256_of

MODELS = {
    "checkpoint": "checkpoint_sha256",
    "generator": "generator_sha256",
}  # in a record


def read_figures(path: Path, weights: Path, task: str) -> list[EvalResult]:
    """The figures of a model in a metrics.json of evaluate_reconstruction.py or evaluate_generation.py.

    Not the Frechet distances of fewer images than they need, nor what is nearly another measure.

    Args:
        weights: The model's file, which must be the one that was measured.
        task: The hub's name of what the model does.

    Raises:
        UserError: The file cannot be read so, holds no figures, or is of other weights.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        record, rows = results["protocol"], results["rows"]
        kind = next(kind for kind in MODELS if kind in record)
        measured, own = record[MODELS[kind]], record[kind]
        images = record.get("originals") or record["reference"]
        known = {"task_type": task, "dataset_type": "images", **_data_set(record, images)}
        left_out = (*NOT_DRAWN, *(["fid", *_frechet(results["rows"])] if too_few_images(record) else []))
        ours = [row for row in rows if kind == "generator" or row.get("system", own) == own]
        found = [
            _figure(row, name, known)
            for row in ours
            for name, value in row.items()
            if is_measure(name) and name not in left_out and not isinstance(value, str)  # an infinite one
        ]
        if usage := results.get("codebook", {}).get("usage"):
            found.append(
                EvalResult(
                    **known,
                    metric_type="codebook_usage",
                    metric_name="Codebook usage",
                    metric_value=_rounded(usage),
                )
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(
            f"--metrics {path} must be a metrics.json that evaluate_reconstruction.py or evaluate_generation.py wrote "
            f"of a model, and cannot be read as one ({error!r})"
        ) from error
    if measured != sha256_of(weights):
        raise UserError(
            f"--metrics {path} was measured with other weights than {weights} (sha256 {str(measured)[:12]}): evaluate "
            "this checkpoint"
        )
    if not found:
        raise UserError(f"--metrics {path} holds no figures of {own}")
    return found


def _data_set(record: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    named = Path(str(images.get("source") or record.get("config")))
    name = "/".join(named.parts[-2:])  # such as fashion/eval.yaml, without the folders of this machine
    facts = {"num_images": images.get("seen"), "sha256": images.get("sha256") or images.get("statistics_sha256")}
    return {"dataset_name": name, "dataset_args": {key: value for key, value in facts.items() if value is not None}}


def _frechet(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for row in rows for name in row if name.startswith("fd_")]


def _rounded(value: float) -> float:
    """To six digits: the rest depends on the machine."""
    return float(f"{value:.6g}")


def _figure(row: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> EvalResult:
    """One number, with the name of the network that judged and what the row is of."""
    title = MEASURES[name][0] if name in MEASURES else f"FD-{name.removeprefix('fd_')}"
    args = {key: row[key] for key in ("tokens", "bytes_per_image", "bits_per_pixel") if key in row}
    return EvalResult(
        **known,
        metric_type=name,
        metric_name=f"{title}, {row['name']}",
        metric_value=_rounded(row[name]),
        metric_args=args or None,
    )
