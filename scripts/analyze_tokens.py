"""What the tokens of a set of images tell: entropy by position, what follows what, what they say about the class.

    python3 scripts/reconstruct_tokenizer.py --config configs/fashion/eval.yaml --output_dir output/tokens \\
        --tokens --labels --without_image
    python3 scripts/analyze_tokens.py --data output/tokens/tokens.npz --labels output/tokens/labels.npy \\
        --config configs/fashion/eval.yaml

It prints two tables and writes analysis.json and analysis.png and .pdf. For each position: the entropy of its token,
how many codes it uses, and the entropy that is left when the token before it is known. Where classes are known, from
the tokens file or from --labels, for the first 1, 2, 4 and 8 tokens: the normalised mutual information with the class,
purity (the share of images of their cluster's most frequent class; a cluster is the images with the same tokens), and
how often two images of one cluster are of one class. All of it is computed again with shuffled labels (or tokens),
because few images seem to tell more than they do: a number means something as far as it differs from the shuffled one.
With --config or --checkpoint as well, a linear probe tells the class from the code vectors of those tokens, learnt on
4/5 of the images, tested on the rest.

With --bits it also tells how ordinary the images are: the bits of their tokens under the tokenizer's entropy model, of
all and by class; bits.png shows the most ordinary and the strangest ones.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
from typing import Any

import numpy as np

from data.token_images import labels_of
from utils.errors import UserError
from utils.figures import write_figure
from utils.files import write_json
from utils.images import write_image
from utils.result_folder import ResultPaths
from utils.token_report import class_table, draw, position_table
from utils.token_statistics import class_rows, entropy, position_rows, probe
from utils.tokens import Tokens, read_tokens

LENGTHS = (1, 2, 4, 8)
RESULTS = ("analysis.json", "analysis.png", "analysis.pdf")
BITS = "bits.png"


def main() -> None:
    with ResultPaths() as results:
        analyze(parse_arguments(), results)


def analyze(arguments: argparse.Namespace, results: ResultPaths) -> None:
    saved = read_tokens(arguments.data)
    tokens = saved.tokens
    labels = known_labels(arguments, saved)
    codebook = read_codebook(arguments, saved) if arguments.config or arguments.checkpoint else None
    draws = np.random.default_rng(arguments.seed)
    out = arguments.out or arguments.data.parent
    results.claim(*(out / name for name in (*RESULTS, BITS)))

    positions, classes = position_rows(tokens, draws), []
    result: dict[str, Any] = {"data": str(arguments.data), "num_images": len(tokens), "seed": arguments.seed}
    result["codes_used"] = len(np.unique(tokens))
    result["entropy_bits"] = entropy(tokens.reshape(-1))
    used = f"{result['codes_used']:,} codes used"
    if codebook is not None:
        result |= {"codebook_size": len(codebook), "usage": result["codes_used"] / len(codebook)}
        used += f" of {len(codebook):,} ({result['usage']:.1%})"
    print(f"{len(tokens):,} images; {used}; entropy of all tokens together {result['entropy_bits']:.2f} bits")
    print(f"\n{position_table(positions)}")
    if labels is not None:
        known = labels >= 0
        lengths = [length for length in LENGTHS if length <= tokens.shape[1]]
        classes = class_rows(tokens[known], labels[known], lengths, arguments.shuffles, draws)
        result |= {"num_labelled": int(known.sum()), "num_classes": len(np.unique(labels[known]))}
        if codebook is not None:
            probe(tokens[known], labels[known], codebook, classes, arguments.seed)
        print(f"\n{class_table(classes)}")
    if arguments.bits:
        result["bits"] = rows_of_bits(arguments, saved, labels, results.place(out / BITS))
    else:
        results.remove(out / BITS)  # of an earlier run, maybe of other tokens
    table, *figures = (results.place(out / name) for name in RESULTS)
    write_json(table, result | {"positions": positions, "classes": classes})
    write_figure(draw(positions, classes, len(tokens)), figures[0].with_suffix(""))
    print(f"\nwrote {', '.join((*RESULTS, *[BITS] * arguments.bits))} into {out}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="TOKENS.NPZ", help="a tokens file")
    parser.add_argument("--labels", type=Path, metavar="LABELS.NPY", help="class ids, -1: none (default: the file's)")
    parser.add_argument("--config", help="configuration of the tokenizer that made the tokens, for its code vectors")
    parser.add_argument("--checkpoint", help="that tokenizer: hub id, folder, training output, file, or step")
    parser.add_argument(
        "--shuffles", type=int, default=10, help="times that labels are shuffled (default: %(default)s)"
    )
    parser.add_argument(
        *("--output_dir", "--out"),
        dest="out",
        type=Path,
        metavar="DIR",
        help="where results go (default: beside the tokens)",
    )
    parser.add_argument("--seed", type=int, default=42, help="shuffles and splits (default: %(default)s)")
    parser.add_argument("--bits", action="store_true", help="tell how ordinary the images are, and show the strangest")
    arguments = parser.parse_args()
    for name, smallest in (("shuffles", 1), ("seed", 0)):
        if getattr(arguments, name) < smallest:
            raise UserError(f"--{name} must be {smallest} or more, got {getattr(arguments, name)}")
    return arguments


def rows_of_bits(arguments: argparse.Namespace, saved: Tokens, labels: np.ndarray | None, path: Path) -> list[dict]:
    """The bits of all images and of each class, printed; the sheet goes to `path`."""
    from codec.ordinariness import Ordinariness, bits_row, bits_table
    from modeling.identity import check_tokens_record

    named = arguments.checkpoint or (None if arguments.config else saved.about.get("tokenizer"))
    scores = Ordinariness(arguments.config, named)
    check_tokens_record(saved.about, scores.tokenizer, scores.name)
    bits = scores.bits(saved.tokens)
    rows = [bits_row("all", bits)]
    if labels is not None:
        rows += [bits_row(f"class {label}", bits[labels == label]) for label in np.unique(labels[labels >= 0])]
    strangest = [saved.keys[index] for index in np.argsort(-bits, kind="stable")[:5]]
    print(f"\n{bits_table(rows)}\nstrangest: {', '.join(strangest)} ({scores.name})")
    write_image(scores.sheet(saved.tokens, bits), path)
    return rows


def read_codebook(arguments: argparse.Namespace, saved: Tokens) -> np.ndarray:
    """The code vectors (V, C) as the decoder sees them."""
    import torch

    from modeling.identity import check_tokens_record
    from modeling.tokenizers import load_tokenizer

    tokens = saved.tokens
    tokenizer, located = load_tokenizer(arguments.config, arguments.checkpoint)
    num_tokens, num_codes = tokenizer.num_latent_tokens, tokenizer.codebook_size
    if tokens.shape[1] != num_tokens or not 0 <= tokens.min() <= tokens.max() < num_codes:
        raise UserError(
            f"{located.description} makes {num_tokens} tokens in 0..{num_codes - 1}, but {arguments.data} holds "
            f"{tokens.shape[1]} in {tokens.min()}..{tokens.max()}: name the tokenizer that made them"
        )
    check_tokens_record(saved.about, tokenizer, located.name)
    with torch.no_grad():
        codes = tokenizer.quantize.lookup(torch.arange(num_codes))
    return codes.numpy()


def known_labels(arguments: argparse.Namespace, saved: Tokens) -> np.ndarray | None:
    """The classes of --labels, or else those in the tokens file; None where they do not tell two apart."""
    labels = saved.labels if arguments.labels is None else labels_of(arguments.labels, saved.keys)
    if labels is not None and len(np.unique(labels[labels >= 0])) > 1:
        return labels
    if arguments.labels is not None:
        raise UserError(f"{arguments.labels} must tell two classes or more apart, and does not")
    return None


if __name__ == "__main__":
    run(main)
