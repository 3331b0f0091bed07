"""Score images from their first tokens against completed ones, in which a generator invents the other tokens.

    python3 scripts/evaluate_completion.py --config configs/fashion/eval.yaml --checkpoint one-d-piece_fashion \\
        --features efficientnet_lite0 --lengths 1,2,4,8,16 --num_images 1000

For each length there is a row of the plain prefix, and one for each way of completing it: faithful, the likeliest
tokens, and vivid, drawn ones; with --labels the generator is told the class.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from modeling.completion import WAYS, Completion, load_completion
from modeling.modules.masking import image_seeds
from modeling.networks.judges import Judges
from modeling.titok import TiTok
from modeling.tokenizers import encode_tokens, load_tokenizer
from utils.config import load_config
from utils.evaluation.arguments import add_arguments, add_tokenizer_arguments, tokenizer_facts
from utils.evaluation.metrics import to_uint8
from utils.evaluation.report import Row, plot_curves, tokens_text
from utils.evaluation.session import Session
from utils.files import sha256_of
from utils.inference import Arithmetic, add_speed_arguments, parse_lengths, prepared


def main() -> None:
    arguments = parse_arguments()
    from data.evaluation_images import evaluation_images, record_of  # torchvision is slow to import

    config = load_config(arguments.config, arguments.overrides)
    with Session(arguments.device, arguments.output_dir) as session:
        judges = Judges(arguments.features, arguments.weights, arguments.perceptual, session.processes)
        tokenizer, located = load_tokenizer(config, arguments.checkpoint, device=session.device)
        lengths = parse_lengths(arguments.lengths, tokenizer.num_latent_tokens)
        load = partial(load_completion, tokenizer, located.name, checkpoint=arguments.generator, device=session.device)
        completions = {way: load(way=way) for way in WAYS}
        arithmetic = prepared(arguments, tokenizer, *(each.generator for each in completions.values()))
        comparison = judges.comparison(tokenizer.image_size)
        batch_size = arguments.batch_size or config.training.per_gpu_batch_size
        batches = evaluation_images(config, arguments.num_images, **session.share(batch_size))
        for batch in session.each(batches):
            pixels, keys = batch["image"].to(session.device), batch["__key__"]
            labels = batch["class_id"] if arguments.labels else None
            seeds = image_seeds(arguments.seed, keys)
            comparison.update(
                pixels, versions(tokenizer, completions, pixels, lengths, seeds, labels, arithmetic), keys
            )
        rows = rows_of(comparison.finish(names_of(lengths)), lengths)
        record = session.record(
            **record_of(batches, comparison, session),
            **tokenizer_facts(arguments, located.name, located.weights),
            generator=completions["vivid"].name,
            generator_sha256=sha256_of(completions["vivid"].weights),
            samplers={way: asdict(completion.settings) for way, completion in completions.items()},
            labels=arguments.labels,
            lengths=lengths,
            seed=arguments.seed,
            sampler_precision=arguments.precision,
            **judges.record(),
        )
        seen = f"{record['originals']['seen']:,} images"
        curves = {"curves.png": lambda path: plot_curves(path, rows, seen, over="tokens")}
        session.report(f"{seen} scored", {"rows": rows, "protocol": record}, rows, figures=curves)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_tokenizer_arguments(parser, required=True)
    parser.add_argument("--generator", help="what invents (default: the bundled one of a bundled tokenizer)")
    parser.add_argument("--lengths", default="1,2,4,8,16", help="known tokens (default: %(default)s)")
    parser.add_argument("--labels", action="store_true", help="tell the generator the class of each image")
    parser.add_argument("--seed", type=int, default=42, help="of what is invented (default: %(default)s)")
    add_arguments(parser, output_dir="output/evaluate_completion")
    add_speed_arguments(parser)
    return parser.parse_args()


@torch.no_grad()
def versions(
    tokenizer: TiTok,
    completions: Mapping[str, Completion],
    pixels: Tensor,
    lengths: Sequence[int],
    seeds: Sequence[int],
    labels: Tensor | None,
    arithmetic: Arithmetic,
) -> dict[str, Tensor]:
    """Images (B, 3, P, P) uint8 from each number of first tokens: the prefix alone, and completed in each way."""
    tokens, found = encode_tokens(tokenizer, pixels / 255), {}
    for length in lengths:
        prefix = tokens[:, :length]
        with arithmetic():
            found[tokens_text(length)] = to_uint8(tokenizer.decode_tokens(prefix))
            for way, completion in completions.items():
                whole = completion.tokens(prefix, seeds, labels)
                found[f"{tokens_text(length)}, {way}"] = to_uint8(tokenizer.decode_tokens(whole))
    return found


def names_of(lengths: Sequence[int]) -> list[str]:
    """Of the versions."""
    return [
        name for length in lengths for name in (tokens_text(length), *(f"{tokens_text(length)}, {w}" for w in WAYS))
    ]


def rows_of(scores: Mapping[str, Row], lengths: Sequence[int]) -> list[Row]:
    """A row for each version, with the scores of its name."""
    rows = []
    for length in lengths:
        for way in (None, *WAYS):
            name = tokens_text(length) if way is None else f"{tokens_text(length)}, {way}"
            system = "prefix alone" if way is None else f"completed, {way}"
            rows.append({"name": name, "system": system, "tokens": length} | scores[name])
    return rows


if __name__ == "__main__":
    run(main)
