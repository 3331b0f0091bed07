"""Generated images against a reference set: distances of sets."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from utils.evaluation.comparison import Originals
from utils.evaluation.feature_set import FeatureNetwork, FeatureSet
from utils.evaluation.report import Row, is_measure, plot_curves
from utils.evaluation.session import Session
from utils.evaluation.statistics import LEAST_PRECISION, Gaussian, frechet_distance, precision_recall
from utils.evaluation.sweep import POINTS, Sweep
from utils.processes import Processes

Batches = Iterable[tuple[list[str], Tensor]]  # keys, and images (B, 3, H, W) uint8


@dataclass(frozen=True)
class Reference:
    """What samples are measured against.

    Attributes:
        features: Of single images, (n, D), for precision and recall; None where only statistics are known.
        record: For the protocol.
    """

    gaussian: Gaussian
    features: Tensor | None
    record: dict[str, Any]

    def noting(self, **facts: Any) -> "Reference":
        """This with more facts in its record."""
        return replace(self, record={**facts, **self.record})


def seen_by(
    network: FeatureNetwork,
    batches: Batches,
    total: int | None,
    session: Session,
    what: str,
    with_logits: bool = True,
) -> FeatureSet:
    """All images of `batches` as the network sees them; `what` they are stands at the bar."""
    versions = ((keys, {what: images}) for keys, images in batches)
    return versions_seen_by(network, versions, [what], total, session, what, with_logits)[what]


def versions_seen_by(
    network: FeatureNetwork,
    batches: Iterable[tuple[list[str], Mapping[Any, Tensor]]],
    names: Sequence[Any],
    total: int | None,
    session: Session,
    what: str,
    with_logits: bool = True,
) -> dict[Any, FeatureSet]:
    """All versions of the images of `batches`, called `names` there, as the network sees them."""
    options = {"with_logits": with_logits, "with_features": True}
    found = {name: FeatureSet(network, session.processes, **options) for name in names}
    with session.progress(total, what) as done:
        for keys, versions in batches:
            for name, images in versions.items():
                found[name].update(images.to(session.device), keys)
            done(len(keys))
    return found


def reference_of(
    network: FeatureNetwork,
    session: Session,
    check_count: Callable[[int, int | None, int], None],
    batches: Batches,
    expected: int | None,
    num_skipped: Callable[[], int] = lambda: 0,
) -> Reference:
    """The images of `batches` as a reference.

    Args:
        check_count: As of `Session.counted`.
        num_skipped: Gives, after the last batch, the images that this process has left out as broken.
    """
    originals = Originals(session.processes)
    found = seen_by(network, noted(batches, originals), expected, session, "reference", with_logits=False)
    record = session.counted(originals, check_count, expected, num_skipped())
    return Reference(found.gaussian(), found.features(), record)


def noted(batches: Batches, seen: Originals) -> Batches:
    """The batches, each added to `seen` on its way."""
    for keys, images in batches:
        seen.add(images, keys)
        yield keys, images


def score(found: FeatureSet, reference: Reference, processes: Processes) -> dict[str, float]:
    """The measures of a set of samples; every process calls this together, the first one gets all of them.

    Those that need more images are left out, which `utils.evaluation.report.remarks` says.
    """
    scores = {found.network.key: frechet_distance(reference.gaussian, found.gaussian()), **found.inception_score()}
    features = found.features()
    fewest = 0 if reference.features is None else min(len(features), len(reference.features))
    if fewest >= LEAST_PRECISION and processes.is_main:
        device = processes.device if processes.device.type == "cuda" else torch.device("cpu")
        precision, recall = precision_recall(features.to(device), reference.features.to(device))
        scores |= {"precision": precision, "recall": recall}
    return scores


def report(
    session: Session,
    rows: Sequence[Row],
    beside: Sequence[Row],
    record: Mapping[str, Any],
    network: FeatureNetwork,
    sweep: Sweep,
) -> None:
    """Report the rows: over token counts with curves, over a sweep with a grid and its best point.

    Args:
        beside: Rows of other results, shown as far as these have the same measures.
    """
    shared = {"name", "system", "tokens", "passes", *filter(is_measure, rows[0])}
    shown = [*rows, *({name: value for name, value in row.items() if name in shared} for row in beside)]
    seen = record["samples"]["seen"]
    figures, notes = {}, []
    lengths = {row.get("tokens") for row in rows}
    if None not in lengths and (len(lengths) > 1 or len(rows) == 1):
        figures["curves.png"] = lambda path: plot_curves(path, shown, f"{seen:,} samples", over="tokens")
    elif len(rows) > 1:
        figures |= sweep.figures(rows, shown, network.key)
        best = min(rows, key=lambda row: row[network.key])
        notes.append(f"lowest {network.title}: {best[network.key]:.4g} at {best['name']}")
    results = {"rows": rows, "protocol": record}
    session.report(f"{seen:,} images scored", results, shown, notes=notes, figures=figures)
    if session.processes.is_main:
        (session.output_dir / POINTS).unlink(missing_ok=True)
