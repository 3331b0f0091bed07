"""What the arms of an ablation came to: the numbers of each run, tables and curves."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.evaluation.report import title_of
from utils.figures import plotting
from utils.training.ablation import FEATURES, Trial, read_json

CURVES = ("psnr", "ssim", "perceptual_efficientnet_lite0")


def results_of(trial: Trial) -> dict[str, Any]:
    """The numbers of a finished trial.

    Returns:
        "curves": a row for each number of tokens; "head": the share of the first eighth of the tokens in the absolute
        contribution of all; "codes_used": by position; "nmi", "nmi_shuffled", "purity", "purity_shuffled": of the first
        token and the class; where an entropy model was fitted "bits", of each position under it, and "bytes" of its
        files, at each number of tokens of the curves; where a generator was trained "generation": the Frechet distance
        of its samples, their precision and recall, and the distance of the reconstructions from all tokens.
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
        **entropy_of(folder / "entropy" / "entropy.json"),
        **generation_of(folder / "generation" / "metrics.json", scores["rows"][-1]),
    }


def entropy_of(path: Path) -> dict[str, list[float]]:
    """The bits and bytes of the network, which is the smaller mode, where an entropy model was fitted."""
    if not path.exists():
        return {}
    mode = read_json(path)["modes"]["network"]
    return {"bits": mode["bits"], "bytes": mode["bytes"]}


def generation_of(path: Path, reconstructions: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """How good a generator's samples are, beside the `reconstructions` from all tokens, where one was trained."""
    if not path.exists():
        return {}
    (row,) = read_json(path)["rows"]
    distance = f"fd_{FEATURES}"
    found = {"distance": row[distance], "precision": row["precision"], "recall": row["recall"]}
    return {"generation": found | {"reconstructions": reconstructions[distance]}}


Arms = Mapping[str, Sequence[Mapping[str, Any]]]  # results of each seed, by arm


def tables(arms: Arms, baselines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: each curve by number of tokens, then what else there is; means over seeds, and half their range."""
    lengths = sorted({row["tokens"] for seeds in arms.values() for seed in seeds for row in seed["curves"]})
    for name in CURVES:
        rows = []
        for seeds in arms.values():
            values = zip(
                *(at_lengths(lengths, seed, [row[name] for row in seed["curves"]]) for seed in seeds), strict=True
            )
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
    if all("bits" in seed for seeds in arms.values() for seed in seeds):
        yield from entropy_tables(arms, lengths)
    if all("generation" in seed for seeds in arms.values() for seed in seeds):
        yield generation_table(arms)


def entropy_tables(arms: Arms, lengths: Sequence[int]) -> Iterator[str]:
    """Bits under the fitted entropy model and codes used at some positions, bytes at some lengths and at equal PSNR."""

    def table(title: str, columns: Sequence[Any], values: Callable[[Mapping[str, Any]], Sequence[float | None]]) -> str:
        rows = [[seeds[0]["title"], *map(spread, zip(*map(values, seeds), strict=True))] for seeds in arms.values()]
        return markdown([title, *map(str, columns)], rows)

    def some(values: Sequence[float]) -> list[float | None]:
        return [float(values[length - 1]) if length <= len(values) else None for length in lengths]

    yield table("bits of token", [*lengths, "mean"], lambda seed: [*some(seed["bits"]), float(np.mean(seed["bits"]))])
    yield table("codes used by token", lengths, lambda seed: some(seed["codes_used"]))
    yield table("bytes of a file of tokens", lengths, lambda seed: at_lengths(lengths, seed, seed["bytes"]))
    best = max(seed["curves"][-1]["psnr"] for seeds in arms.values() for seed in seeds)
    levels = [int(best) - below for below in reversed(range(4))]
    yield table("bytes at a PSNR (dB) of", levels, lambda seed: [bytes_at(level, seed) for level in levels])


def generation_table(arms: Arms) -> str:
    """How far a generator's samples are from the images that arms are scored on, and the reconstructions of these."""
    distance = title_of(f"fd_{FEATURES}")
    columns = {
        "distance": f"{distance} of samples",
        "precision": "precision",
        "recall": "recall",
        "reconstructions": f"{distance} of reconstructions",
    }
    rows = [
        [seeds[0]["title"], *(spread([seed["generation"][key] for seed in seeds]) for key in columns)]
        for seeds in arms.values()
    ]
    return markdown(["generator on the arm's tokens", *columns.values()], rows)


def bytes_at(level: float, seed: Mapping[str, Any]) -> float:
    """Bytes at which a trial reaches a PSNR, linear between the lengths that were scored; NaN where it does not."""
    psnrs = np.maximum.accumulate([row["psnr"] for row in seed["curves"]])
    return float(np.interp(level, psnrs, seed["bytes"], left=seed["bytes"][0], right=np.nan))


def at_lengths(lengths: Sequence[int], seed: Mapping[str, Any], values: Sequence[float]) -> list[float | None]:
    """Values at the lengths of a trial's curves, put to others; None at what its tokenizer has not."""
    known = dict(zip((row["tokens"] for row in seed["curves"]), values, strict=True))
    return [known.get(length) for length in lengths]


def spread(values: Sequence[float | None]) -> str:
    """The mean, and half the range where there are several; nothing where there is no value."""
    if None in values:
        return ""
    if np.isnan(values).any():
        return "not reached"
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
    looks = itertools.cycle(itertools.product(("-", "--", ":"), pyplot.get_cmap("tab10").colors))
    for seeds, (line, colour) in zip(arms.values(), looks, strict=False):
        look = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3, "linewidth": 1.2}
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
    axes[2].set(xlabel="first tokens", ylabel="%", title="Share of the contribution (thin dashes: equal shares)")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
