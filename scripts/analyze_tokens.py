"""What the tokens of a set of images tell: entropy by position, what follows what, what they say about the class.

    python3 scripts/reconstruct_tokenizer.py --config configs/fashion/eval.yaml --output_dir output/tokens \\
        --tokens --labels --without_image
    python3 scripts/analyze_tokens.py --data output/tokens/tokens.npz --labels output/tokens/labels.npy \\
        --config configs/fashion/eval.yaml

It prints two tables and writes analysis.json and analysis.png and .pdf. For each position: the entropy of its token,
how many codes it uses, and the entropy that is left when the token before it is known. With --labels, for the first 1,
2, 4 and 8 tokens: the normalised mutual information with the class, purity (the share of images of their cluster's
most frequent class; a cluster is the images with the same tokens), and how often two images of one cluster are of
one class. All of it is computed again with shuffled labels (or tokens), because few images seem to tell more than
they do: a number means something as far as it differs from the shuffled one. With --config or --checkpoint as well, a
linear probe tells the class from the code vectors of those tokens, learnt on 4/5 of the images, tested on the rest.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import run
from utils.errors import UserError
from utils.figures import plotting, write_figure
from utils.files import write_json
from utils.token_statistics import (
    clusters,
    conditional_entropy,
    entropy,
    normalized_mutual_information,
    purity,
    read_labels,
    read_tokens,
    same_class,
)

LENGTHS = (1, 2, 4, 8)
TEST_SHARE = 1 / 5
CLASS_MEASURES = {"nmi": normalized_mutual_information, "purity": purity, "same_class": same_class}


def main() -> None:
    arguments = parse_arguments()
    tokens, keys = read_tokens(arguments.data)
    labels = None if arguments.labels is None else read_labels(arguments.labels, len(tokens))
    codebook = read_codebook(arguments, tokens) if arguments.config or arguments.checkpoint else None
    draws = np.random.default_rng(arguments.seed)

    positions = about_positions(tokens, draws)
    result: dict[str, Any] = {"data": str(arguments.data), "num_images": len(tokens), "seed": arguments.seed}
    result["codes_used"] = len(np.unique(tokens))
    result["entropy_bits"] = entropy(tokens.reshape(-1))
    if codebook is not None:
        result |= {"codebook_size": len(codebook), "usage": result["codes_used"] / len(codebook)}
    print_summary(result)
    print_positions(positions)
    classes = []
    if labels is not None:
        known = labels >= 0
        if len(np.unique(labels[known])) < 2:
            raise UserError(f"{arguments.labels} must tell two classes or more apart, and does not")
        lengths = [length for length in LENGTHS if length <= tokens.shape[1]]
        classes = about_classes(tokens[known], labels[known], lengths, arguments.shuffles, draws)
        result |= {"num_labelled": int(known.sum()), "num_classes": len(np.unique(labels[known]))}
        if codebook is not None:
            probe(tokens[known], labels[known], codebook, classes, arguments.seed)
        print_classes(classes)
    out = arguments.out or arguments.data.parent
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "analysis.json", result | {"positions": positions, "classes": classes})
    write_figure(draw(positions, classes, len(tokens)), out / "analysis")
    print(f"\nwrote analysis.json, analysis.png and analysis.pdf into {out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="TOKENS.NPZ", help="tokens and keys of images")
    parser.add_argument("--labels", type=Path, metavar="LABELS.NPY", help="class ids, -1 where there is none")
    parser.add_argument("--config", help="configuration of the tokenizer that made the tokens, for its code vectors")
    parser.add_argument("--checkpoint", help="that tokenizer: hub id, folder, training output, file, or step")
    parser.add_argument(
        "--shuffles", type=int, default=10, help="times that labels are shuffled (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: beside the tokens)")
    parser.add_argument("--seed", type=int, default=42, help="shuffles and splits (default: %(default)s)")
    arguments = parser.parse_args()
    for name, smallest in (("shuffles", 1), ("seed", 0)):
        if getattr(arguments, name) < smallest:
            raise UserError(f"--{name} must be {smallest} or more, got {getattr(arguments, name)}")
    return arguments


def read_codebook(arguments: argparse.Namespace, tokens: np.ndarray) -> np.ndarray:
    """The code vectors (V, C) as the decoder sees them."""
    import torch

    from modeling.tokenizers import load_tokenizer

    tokenizer, located = load_tokenizer(arguments.config, arguments.checkpoint)
    num_tokens, num_codes = tokenizer.num_latent_tokens, tokenizer.codebook_size
    if tokens.shape[1] != num_tokens or not 0 <= tokens.min() <= tokens.max() < num_codes:
        raise UserError(
            f"{located.description} makes {num_tokens} tokens in 0..{num_codes - 1}, but {arguments.data} holds "
            f"{tokens.shape[1]} in {tokens.min()}..{tokens.max()}: name the tokenizer that made them"
        )
    with torch.no_grad():
        codes = tokenizer.quantize.lookup(torch.arange(num_codes))
    return codes.numpy()


def about_positions(tokens: np.ndarray, draws: np.random.Generator) -> list[dict[str, Any]]:
    """Entropy, codes used, and what the token before tells, by position; entropies in bits."""
    rows = []
    for position in range(tokens.shape[1]):
        token = tokens[:, position]
        row = {"token": position + 1, "entropy": entropy(token), "codes_used": len(np.unique(token))}
        if position:
            before = tokens[:, position - 1]
            row["entropy_given_before"] = conditional_entropy(token, before)
            row["entropy_given_shuffled"] = conditional_entropy(token, draws.permutation(before))
        rows.append(row)
    return rows


def about_classes(
    tokens: np.ndarray, labels: np.ndarray, lengths: Sequence[int], num_shuffles: int, draws: np.random.Generator
) -> list[dict[str, Any]]:
    """What prefixes of the tokens tell about the class, beside the same with shuffled labels (mean, deviation)."""
    rows = []
    for length in lengths:
        cluster = clusters(tokens, length)
        row: dict[str, Any] = {"tokens": length, "clusters": int(cluster.max()) + 1}
        shuffled = [draws.permutation(labels) for _ in range(num_shuffles)]
        for name, measure in CLASS_MEASURES.items():
            by_chance = np.array([measure(cluster, others) for others in shuffled])
            row[name] = finite(measure(cluster, labels))
            row[f"{name}_shuffled"] = finite(by_chance.mean())
            row[f"{name}_shuffled_deviation"] = finite(by_chance.std())
        rows.append(row)
    return rows


def finite(value: float) -> float | None:
    """None for what is not defined: JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def probe(tokens: np.ndarray, labels: np.ndarray, codebook: np.ndarray, rows: list[dict[str, Any]], seed: int) -> None:
    """Add to each row the accuracy on held-out images of logistic regression on its tokens' code vectors."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng(seed).permutation(len(labels))
    test, training = np.split(order, [max(1, round(TEST_SHARE * len(order)))])
    if len(np.unique(labels[training])) < 2:
        raise UserError(f"a probe needs images of two classes to learn from, got {len(training)} of one")
    for row in rows:
        vectors = codebook[tokens[:, : row["tokens"]]].reshape(len(tokens), -1)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(vectors[training], labels[training])
        row["probe_accuracy"] = float(model.score(vectors[test], labels[test]))
        # What always answering with the most frequent class would get.
        values, counts = np.unique(labels[training], return_counts=True)
        row["probe_chance"] = float((labels[test] == values[counts.argmax()]).mean())
        row["probe_test_images"] = len(test)


def print_summary(result: Mapping[str, Any]) -> None:
    used = f"{result['codes_used']:,} codes used"
    if "usage" in result:
        used += f" of {result['codebook_size']:,} ({result['usage']:.1%})"
    print(f"{result['num_images']:,} images; {used}; entropy of all tokens together {result['entropy_bits']:.2f} bits")


def print_positions(rows: Sequence[Mapping[str, Any]]) -> None:
    print("\n token   entropy   codes used   entropy given the token before   (shuffled)")
    for row in rows:
        line = f"{row['token']:6} {row['entropy']:9.2f} {row['codes_used']:12,}"
        if "entropy_given_before" in row:
            line += f" {row['entropy_given_before']:32.2f} {row['entropy_given_shuffled']:12.2f}"
        print(line)


def print_classes(rows: Sequence[Mapping[str, Any]]) -> None:
    print("\n first tokens   clusters   NMI (shuffled)   purity (shuffled)   same class (shuffled)   linear probe")
    for row in rows:
        nmi, pure, same = (f"{text(row[name])} ({text(row[f'{name}_shuffled'])})" for name in CLASS_MEASURES)
        accuracy = text(row.get("probe_accuracy"))
        print(f"{row['tokens']:13} {row['clusters']:10,} {nmi:>16} {pure:>19} {same:>23} {accuracy:>14}")


def text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw(positions: Sequence[Mapping[str, Any]], classes: Sequence[Mapping[str, Any]], num_images: int) -> Any:
    """Entropies and codes used by position and, where there are labels, what the first tokens tell about the class."""
    pyplot = plotting()
    num_panels = 3 if classes else 2
    figure, axes = pyplot.subplots(1, num_panels, figsize=(4.6 * num_panels, 4.4), layout="constrained")
    numbers = [row["token"] for row in positions]
    marks = {"marker": "o", "markersize": 3, "linewidth": 1.3}
    axes[0].plot(numbers, [row["entropy"] for row in positions], label="of the token", **marks)
    for name, label, style in (
        ("entropy_given_before", "given the one before", "-"),
        ("entropy_given_shuffled", "given one of another image", ":"),
    ):
        axes[0].plot(numbers[1:], [row[name] for row in positions[1:]], label=label, linestyle=style, **marks)
    axes[0].set(xlabel="token", ylabel="bits", title="Entropy")
    axes[1].plot(numbers, [row["codes_used"] for row in positions], **marks)
    axes[1].set(xlabel="token", ylabel="different codes", title="Codes used")
    for axis in axes[:2]:
        axis.set_ylim(bottom=0)
    if classes:
        lengths = [row["tokens"] for row in classes]
        curves = {"nmi": "NMI", "same_class": "two of a cluster are of one class", "probe_accuracy": "linear probe"}
        for name, label in curves.items():
            if name not in classes[0]:
                continue
            colour = axes[2].plot(lengths, values_of(classes, name), label=label, **marks)[0].get_color()
            chance = "probe_chance" if name == "probe_accuracy" else f"{name}_shuffled"
            axes[2].plot(lengths, values_of(classes, chance), color=colour, linestyle=":", **marks)
        axes[2].set_xscale("log", base=2)
        axes[2].set_xticks(lengths, [str(length) for length in lengths])
        axes[2].set(xlabel="first tokens", ylim=(0, 1), title="The class (dotted: by chance)")
    for axis in (axes[0], *axes[2:]):
        axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16))  # within, it would hide a curve
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{num_images:,} images", fontsize=11)
    return figure


def values_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [np.nan if row[name] is None else row[name] for row in rows]


if __name__ == "__main__":
    run(main)
