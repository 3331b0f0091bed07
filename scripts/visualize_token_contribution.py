"""Draw what each token contributes, from the data that scripts/generate_token_contribution_data.py makes.

    python3 scripts/visualize_token_contribution.py --input output/token_contribution
    python3 scripts/visualize_token_contribution.py --input output/token_contribution --tokens 1-8,16,32

It writes, as PNG and PDF: heatmaps_l1 and heatmaps_l2 (where in the image each token acts, on one logarithmic scale),
contributions (the mean over the image by token, with its standard error) and contribution_row (the same in one row);
and summary.json, the share of the whole that the first tokens carry, and how far each spreads. Tokens are counted from
1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse

import numpy as np

from utils.errors import UserError
from utils.evaluation.contribution_figures import (
    ARRAYS,
    DATA,
    NORMS,
    area_of_half,
    draw_curves,
    draw_maps,
    draw_rows,
    read_contributions,
)
from utils.evaluation.report import write_results
from utils.figures import FORMATS, write_figure
from utils.result_folder import ResultPaths


def main() -> None:
    with ResultPaths() as results:
        visualize(parse_arguments(), results)


def visualize(arguments: argparse.Namespace, results: ResultPaths) -> None:
    data, protocol = read_contributions(arguments.input)
    num_tokens = len(data["mean_l1"])
    tokens = parse_tokens(arguments.tokens, num_tokens)
    out = arguments.out or (arguments.input if arguments.input.is_dir() else arguments.input.parent)
    what = "replaced by another code" if protocol["plan"]["mode"] == "replace" else "added to those before it"
    figures = [f"heatmaps_{norm}" for norm in NORMS] + ["contributions", "contribution_row"]
    paths = [out / f"{name}.{ending}" for name in figures for ending in FORMATS] + [out / "summary.json"]
    results.claim(*paths)
    title = f"when one token is {what}; mean of {int(data['count']):,} images"
    for path in paths:
        results.place(path)
    for norm, name in NORMS.items():
        write_figure(draw_maps(data[f"length_to_diff_{norm}"], tokens, f"{name} {title}"), out / f"heatmaps_{norm}")
    write_figure(draw_curves(data, tokens, f"Change {title}"), out / "contributions")
    write_figure(draw_rows(data, tokens, f"Change {title}"), out / "contribution_row")

    shares = {norm: (data[f"mean_{norm}"].cumsum() / data[f"mean_{norm}"].sum()).tolist() for norm in NORMS}
    lengths = [2**power for power in range(num_tokens.bit_length()) if 2**power < num_tokens] + [num_tokens]
    print("first tokens   share of the absolute change   of the squared change")
    for length in lengths:
        print(f"{length:12}   {shares['l1'][length - 1]:28.1%}   {shares['l2'][length - 1]:21.1%}")
    summary = {f"share_of_first_{norm}": {length: shares[norm][length - 1] for length in lengths} for norm in NORMS}
    summary |= {name: data[name].tolist() for name in ARRAYS if not name.startswith("length")}
    areas = {norm: area_of_half(data[f"length_to_diff_{norm}"]) for norm in NORMS}
    summary |= {f"area_of_half_{norm}": area.tolist() for norm, area in areas.items()}
    eighth = max(1, num_tokens // 8)
    print(
        f"half of a token's absolute change lies on {areas['l1'][:eighth].mean():.1%} of the pixels, mean of the first "
        f"eighth of the tokens; {areas['l1'][num_tokens // 2 :].mean():.1%}, mean of the second half"
    )
    write_results(out / "summary.json", summary | {"count": int(data["count"]), "protocol": protocol})
    print(f"wrote heatmaps_l1, heatmaps_l2, contributions, contribution_row (PNG, PDF) and summary.json into {out}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help=f"folder with {DATA}, or that file")
    parser.add_argument("--tokens", help="tokens to draw, such as 1-8,16,32 (default: all)")
    parser.add_argument(
        *("--output_dir", "--out"),
        dest="out",
        type=Path,
        metavar="DIR",
        help="where the figures go (default: beside the data)",
    )
    return parser.parse_args()


def parse_tokens(text: str | None, num_tokens: int) -> np.ndarray:
    """Token numbers of a text such as "1-8,16", sorted, each once; all of them for None."""
    if text is None:
        return np.arange(1, num_tokens + 1)
    numbers: set[int] = set()
    for word in text.split(","):
        first, _, last = word.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or word.endswith("-"):
            raise UserError(f"--tokens takes numbers and ranges such as 1-8,16,32, got {text}")
        numbers.update(range(int(first), int(last or first) + 1))
    if not numbers or not 1 <= min(numbers) <= max(numbers) <= num_tokens:
        raise UserError(f"--tokens must be in 1..{num_tokens}, got {text}: the data have {num_tokens} tokens")
    return np.array(sorted(numbers))


if __name__ == "__main__":
    run(main)
