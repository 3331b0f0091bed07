"""Score generated images against a reference set: Frechet distance, Inception Score, precision and recall.

Samples that are there, against the reference statistics of the ADM evaluator (gFID):
  python3 scripts/evaluate_generation.py --samples samples/samples.npz --reference VIRTUAL_imagenet256_labeled.npz

Straight from a generator (by default the bundled one), without a network:
  python3 scripts/evaluate_generation.py --checkpoint maskgit_fashion --num_images 10000 \\
      --reference configs/fashion/eval.yaml --features efficientnet_lite0

A grid of sampler settings (and seeds); a run that was killed goes on where it was:
  python3 scripts/evaluate_generation.py ... --sweep guidance_scale=2,4,6 randomize_temperature=1.5,3
  python3 scripts/evaluate_generation.py ... --recipes configs/samplers/fashion.yaml --sweep num_sample_steps=4,8 seed=1

The images of the first 1, 2, 4, ... of the same sampled tokens, beside the tokenizer's reconstructions:
  python3 scripts/evaluate_generation.py ... --lengths 1,2,4,8 --beside output/evaluate_reconstruction/metrics.json

Samples and reference are a .npy or .npz file or a folder; the reference may also be a configuration (its evaluation
images) or shards (DIR/name-{000000..000049}.tar). On several processes: torchrun --nproc_per_node N ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
from dataclasses import fields, replace
from functools import partial
from typing import Any

from modeling.generation_scores import GenerationScores, Source
from modeling.generators import load_generator, load_its_tokenizer
from modeling.networks.frechet import SetFeatures, set_features
from modeling.networks.judges import feature_record
from modeling.prefixes import check_decodable
from modeling.samplers import sampler_class
from modeling.samplers.settings import SAMPLER_FLAGS, SamplerSettings, sampler_settings
from modeling.titok import TiTok
from utils.errors import UserError
from utils.evaluation.arguments import add_beside_argument, add_common_arguments, add_feature_arguments
from utils.evaluation.generation import Reference, report
from utils.evaluation.report import Row, read_beside, tokens_text
from utils.evaluation.session import Session
from utils.evaluation.sweep import SEED, Points, Sweep, check_names, names_of, read_recipes
from utils.flags import given_fields
from utils.inference import (
    add_speed_arguments,
    parse_lengths,
    prepared,
)
from utils.sampling_record import add_sampling_arguments, sampling_record, take_like

NUM_IMAGES = 50_000


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--samples", help="generated images: .npy, .npz (arr_0) or a folder; sampled when not given")
    parser.add_argument("--reference", required=True, help=".npz, .npy, folder, configuration or shards")
    parser.add_argument("--config", help="configuration of the generator")
    parser.add_argument(
        "--checkpoint", help="the generator: hub id, folder, training output, file, step or bundled name"
    )
    parser.add_argument("--tokenizer_checkpoint", help="its tokenizer (default: the one it was trained with)")
    parser.add_argument(
        "--num_images", type=int, help="images to sample (default: 50000), or to take of --samples (all)"
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        metavar="NAME=A,B,...",
        help="sampler settings and seeds to try, each with each",
    )
    parser.add_argument(
        "--lengths", help="token counts, such as 1,2,4,8: each image is sampled once and decoded at each (default: all)"
    )
    parser.add_argument("--name", help="of this sampler in the curves of a sweep (default: its swept settings)")
    parser.add_argument(
        "--recipes",
        type=read_recipes,
        default={},
        metavar="FILE",
        help="YAML, {name: {setting: value}}: samplers to compare",
    )
    add_beside_argument(parser)
    add_feature_arguments(parser)
    add_common_arguments(parser, output_dir="output/evaluate_generation")
    add_sampling_arguments(parser, SamplerSettings, SAMPLER_FLAGS)
    add_speed_arguments(parser)
    arguments = parser.parse_args()
    check_samples(arguments)  # before seed and settings are filled in
    take_like(arguments, SamplerSettings)
    arguments.sweep = Sweep(arguments.sweep or [])
    check(arguments)
    return arguments


def check_samples(arguments: argparse.Namespace) -> None:
    """Refuse what says how to sample, where samples are given."""
    if not arguments.samples:
        return
    if arguments.config or arguments.checkpoint or arguments.sweep or arguments.lengths:
        raise UserError("--samples are there already: leave out --config, --checkpoint, --sweep and --lengths")
    settings = given_fields(arguments, SamplerSettings)
    is_told_how = arguments.recipes or arguments.like or arguments.seed is not None or settings
    if is_told_how or arguments.tokenizer_checkpoint or arguments.name:
        raise UserError(
            "--samples are there already: leave out --tokenizer_checkpoint, --name and what says how to sample "
            "(--recipes, --like, --seed, settings of a sampler)"
        )
    if arguments.compile or arguments.precision != "fp32":
        raise UserError("--samples are there already: --precision and --compile are for a generator")


def check(arguments: argparse.Namespace) -> None:
    """Refuse what does not go together, and settings that no sampler has."""
    settings = [setting.name for setting in fields(SamplerSettings)]
    arguments.sweep.check(settings)
    for name, recipe in arguments.recipes.items():
        check_names(recipe, settings, f"the recipe {name}")
    if arguments.lengths:
        parse_lengths(arguments.lengths)  # what is wrong for any tokenizer, before one is loaded
    if (arguments.sweep.values or arguments.recipes or arguments.num_tokens) and arguments.lengths:
        raise UserError(
            "--sweep, --recipes and --num_tokens score all sampled tokens: leave out either them or --lengths"
        )
    if arguments.name and (arguments.recipes or arguments.lengths):
        raise UserError("--name is of one sampler: leave it out with --recipes, which have names, and with --lengths")
    if arguments.features == "none":
        raise UserError("--features none leaves nothing to measure: name a network")
    if arguments.num_images is not None and arguments.num_images < 2:
        raise UserError(f"--num_images must be 2 or more, got {arguments.num_images}")


def main() -> None:
    arguments = parse_arguments()
    with Session(arguments.device, arguments.output_dir) as session:
        network = set_features(arguments.features, arguments.weights).to(session.device)
        rows_of = rows_of_samples if arguments.samples else rows_of_generator
        rows, reference, facts = rows_of(arguments, network, session)
        record = session.record(**facts, reference=reference.record, feature_network=feature_record(network))
        # Of reference statistics alone the images are not known.
        beside = read_beside(arguments.beside, reference.record.get("sha256", "unknown"))
        report(session, rows, beside, record, network, arguments.sweep)


def rows_of_samples(
    arguments: argparse.Namespace, network: SetFeatures, session: Session
) -> tuple[list[Row], Reference, dict[str, Any]]:
    """The row of samples that are there, the reference, and facts for the record."""
    from data.scored_sets import BATCH_SIZE, score_samples  # torchvision is slow to import, too slow for --help

    how = {"num_images": arguments.num_images, "batch_size": arguments.batch_size or BATCH_SIZE}
    row, *others = score_samples(arguments.samples, arguments.reference, network, session, **how)
    return [row], *others


def rows_of_generator(
    arguments: argparse.Namespace, network: SetFeatures, session: Session
) -> tuple[list[Row], Reference, dict[str, Any]]:
    """A row for each point of the sweep or each length, the reference, and facts for the record."""
    from data.scored_sets import BATCH_SIZE, load_reference

    source = load_source(arguments, session)
    lengths = lengths_of(source.tokenizer, arguments.lengths)
    batch_size, expected = arguments.batch_size or BATCH_SIZE, arguments.num_images or NUM_IMAGES
    base = sampler_settings(source.generator.config, **given_fields(arguments, SamplerSettings))
    grid = grid_of(arguments, base)
    facts = {
        "samples": {"expected": expected, "seen": expected, **sampling_record(base, arguments.seed)},
        "sweep": arguments.sweep.values or None,
        "recipes": arguments.recipes or None,
        "lengths": lengths,
        **source.record(),
        "sampler_precision": arguments.precision,
        "compiled": arguments.compile,
    }
    plan = {
        **facts,
        "features": arguments.features,
        "features_sha256": network.weights_sha256,
        "device": session.device.type,  # others draw other noise
    }
    points = Points(session, plan)  # errors before the work
    size = (source.tokenizer.image_size,) * 2
    reference = load_reference(arguments.reference, size, network, batch_size, session)
    read_beside(arguments.beside, reference.record.get("sha256", "unknown"))  # likewise
    points.begin({**plan, "reference": reference.record})
    scores = GenerationScores(source, lengths, expected, network, reference, session)
    drawing = {"seed": arguments.seed, "batch_size": batch_size}
    rows = [
        row
        for point, settings in grid
        for row in points.rows(point, partial(rows_of_point, scores, drawing, settings, bool(arguments.lengths)))
    ]
    return rows, reference, facts


def grid_of(arguments: argparse.Namespace, base: SamplerSettings) -> list[tuple[dict[str, Any], SamplerSettings]]:
    """The points of the sweep, of each recipe, and the sampler's settings there; no point names an unknown sampler."""
    recipes = {
        name: replace(base, **settings) for name, settings in (arguments.recipes or {arguments.name: {}}).items()
    }
    grid = []
    for changed in arguments.sweep.points():
        settings = {name: value for name, value in changed.items() if name != SEED}
        grid += [
            ({"changed": changed, "recipe": name}, replace(recipe, **settings)) for name, recipe in recipes.items()
        ]
    for _, settings in grid:
        sampler_class(settings.sampler)
    return grid


def rows_of_point(
    scores: GenerationScores,
    drawing: dict[str, Any],
    settings: SamplerSettings,
    by_length: bool,
    point: dict[str, Any],
) -> list[Row]:
    """Sample the images of a point of the sweep and score them: a row, or `by_length` one for each."""
    changed, names = point["changed"], names_of(point["changed"], point["recipe"], settings)
    if settings.num_tokens:
        scores = replace(scores, lengths=[settings.num_tokens])
    found = scores.of({**drawing, "seed": changed.get(SEED, drawing["seed"]), "settings": settings}, names["name"])
    if not by_length:
        return [{**names, **changed, **measures} for measures in found.values()]
    system = scores.source.generator_located.name
    return [
        {"name": tokens_text(length).replace(" ", " sampled "), "system": system, "tokens": length, **measures}
        for length, measures in found.items()
    ]


def load_source(arguments: argparse.Namespace, session: Session) -> Source:
    generator, located = load_generator(arguments.config, arguments.checkpoint, device=session.device)
    tokenizer, tokenizer_located = load_its_tokenizer(
        generator, located, arguments.tokenizer_checkpoint, device=session.device
    )
    settings = sampler_settings(generator.config, **given_fields(arguments, SamplerSettings))
    num_passes = (arguments.num_images or NUM_IMAGES) * settings.num_sample_steps
    arithmetic = prepared(arguments, generator, tokenizer, num_passes=num_passes)
    return Source(generator, tokenizer, located, tokenizer_located, arithmetic)


def lengths_of(tokenizer: TiTok, text: str | None) -> list[int]:
    """The lengths of --lengths, checked before any image is made; all tokens without."""
    lengths = parse_lengths(text) if text else [tokenizer.num_latent_tokens]
    check_decodable(lengths, tokenizer)
    return lengths


if __name__ == "__main__":
    run(main)
