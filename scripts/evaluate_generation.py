"""Score generated images against a reference set: Frechet distance, Inception Score, precision and recall.

Samples that are there, against the reference statistics of the ADM evaluator (gFID):
  python3 scripts/evaluate_generation.py --samples samples/samples.npz --reference VIRTUAL_imagenet256_labeled.npz

Straight from a generator (by default the bundled one), without a network:
  python3 scripts/evaluate_generation.py --checkpoint maskgit_fashion --num_images 10000 \\
      --reference configs/fashion/eval.yaml --features efficientnet_lite0

A grid of sampler settings:
  python3 scripts/evaluate_generation.py ... --sweep guidance_scale=2,4,6 randomize_temperature=1.5,3

The images of the first 1, 2, 4, ... of the same sampled tokens, beside the tokenizer's reconstructions:
  python3 scripts/evaluate_generation.py ... --lengths 1,2,4,8 --beside output/evaluate_reconstruction/metrics.json

Samples and reference are a .npy or .npz file or a folder; the reference may also be a configuration (its evaluation
images) or shards (DIR/name-{000000..000049}.tar). On several processes: torchrun --nproc_per_node N ...
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from modeling.checkpoints.locate import Located
from modeling.generators import add_sampler_arguments, chosen_settings, load_generator, load_its_tokenizer, sample
from modeling.maskgit import MaskGIT
from modeling.networks.frechet import SetFeatures
from modeling.networks.judges import feature_record, load_features
from modeling.titok import TiTok
from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import add_beside_argument, add_common_arguments, add_feature_arguments, parse_lengths
from utils.evaluation.comparison import Originals
from utils.evaluation.feature_set import FeatureSet
from utils.evaluation.metrics import to_uint8
from utils.evaluation.protocol import exact_arithmetic, protocol
from utils.evaluation.report import Row, is_measure, plot_curves, plot_grid, read_results, table, write_results
from utils.evaluation.statistics import Gaussian, add_up, frechet_distance, precision_recall
from utils.files import sha256_of
from utils.inference import Arithmetic, add_speed_arguments, prepared
from utils.processes import Processes

INCEPTION = "fid"
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


@dataclass(frozen=True)
class Source:
    """A generator with its tokenizer, and how they compute."""

    generator: MaskGIT
    tokenizer: TiTok
    generator_located: Located
    tokenizer_located: Located
    arithmetic: Arithmetic

    def record(self) -> dict[str, Any]:
        return {
            "generator": self.generator_located.name,
            "generator_sha256": sha256_of(self.generator_located.weights),
            "tokenizer": self.tokenizer_located.name,
            "tokenizer_sha256": sha256_of(self.tokenizer_located.weights),
        }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", help="generated images: .npy, .npz (arr_0) or a folder; sampled when not given")
    parser.add_argument("--reference", required=True, help=".npz, .npy, folder, configuration or shards")
    parser.add_argument("--config", help="configuration of the generator")
    parser.add_argument(
        "--checkpoint", help="the generator: hub id, folder, training output, file, step or bundled name"
    )
    parser.add_argument("--tokenizer_checkpoint", help="its tokenizer (default: the one it was trained with)")
    parser.add_argument("--num_images", type=int, help="images to sample (default: 50000), or to expect in --samples")
    parser.add_argument("--seed", type=int, default=42, help="of the sampled images (default: %(default)s)")
    parser.add_argument(
        "--sweep", nargs="+", metavar="NAME=A,B,...", help="sampler settings to try, each with each (one or two names)"
    )
    parser.add_argument(
        "--lengths", help="token counts, such as 1,2,4,8: each image is sampled once and decoded at each (default: all)"
    )
    add_beside_argument(parser)
    add_feature_arguments(parser)
    add_common_arguments(parser, output_dir="output/evaluate_generation")
    add_sampler_arguments(parser)
    add_speed_arguments(parser)
    arguments = parser.parse_args()
    if arguments.samples and (arguments.config or arguments.checkpoint or arguments.sweep or arguments.lengths):
        raise UserError("--samples are there already: leave out --config, --checkpoint, --sweep and --lengths")
    if arguments.samples and (arguments.compile or arguments.precision != "fp32"):
        raise UserError("--samples are there already: --precision and --compile are for a generator")
    if arguments.sweep and arguments.lengths:
        raise UserError("--sweep scores all tokens: leave out either it or --lengths")
    if arguments.features == "none":
        raise UserError("--features none leaves nothing to measure: name a network")
    if arguments.num_images is not None and arguments.num_images < 2:
        raise UserError(f"--num_images must be 2 or more, got {arguments.num_images}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    sweep = parse_sweep(arguments.sweep or [])
    exact_arithmetic()
    processes = Processes(arguments.device)
    try:
        evaluate(arguments, sweep, processes)
    finally:
        processes.close()


def evaluate(arguments: argparse.Namespace, sweep: dict[str, list], processes: Processes) -> None:
    from data.image_sets import open_images  # torchvision is slow to import, too slow for --help

    network = load_features(arguments, processes)
    batch_size = arguments.batch_size or 64
    rows: list[Row] = []
    if arguments.samples:
        samples = open_images(arguments.samples)
        size = min(samples.height, samples.width)
        reference = load_reference(arguments.reference, size, network, batch_size, processes)
        beside = read_beside(arguments.beside, reference)
        share = {"batch_size": batch_size, "rank": processes.rank, "world_size": processes.world_size}
        found = scored_set(samples.batches(**share), len(samples), network, processes, "samples")
        seen = found.count()
        expected = arguments.num_images or len(samples)
        if seen != expected:
            raise UserError(f"expected {expected} images in {arguments.samples}, got {seen}")
        rows.append({"name": Path(arguments.samples).stem, **score(found, reference, processes)})
        facts = {"samples": {"source": arguments.samples, "expected": expected, "seen": seen}}
    else:
        source = load_source(arguments, processes)
        lengths = lengths_of(source.tokenizer, arguments.lengths)
        size = source.tokenizer.image_size
        reference = load_reference(arguments.reference, size, network, batch_size, processes)
        beside = read_beside(arguments.beside, reference)
        expected = seen = arguments.num_images or 50_000
        settings = chosen_settings(source.generator.config, arguments)
        unknown = [name for name in sweep if name not in settings]
        if unknown:
            raise UserError(f"--sweep takes settings of the sampler ({', '.join(settings)}), got {unknown[0]}")
        for values in itertools.product(*sweep.values()):
            changed = dict(zip(sweep, values, strict=True))
            name = ", ".join(f"{key} {value:g}" for key, value in changed.items()) or "samples"
            batches = generated(source, lengths, expected, arguments.seed, batch_size, settings | changed, processes)
            for length, found in scored_sets(batches, lengths, expected, network, processes, name).items():
                if found.count() != expected:
                    raise UserError(f"expected {expected} sampled images, got {found.count()}")
                row = {"name": name, **changed}
                if arguments.lengths:
                    row = {"name": f"{length} sampled token{'s' if length > 1 else ''}"}
                    row |= {"system": source.generator_located.name, "tokens": length}
                rows.append(row | score(found, reference, processes))
        facts = {
            "samples": {"expected": expected, "seen": seen, "seed": arguments.seed, "sampler": settings},
            "sweep": sweep or None,
            "lengths": lengths,
            **source.record(),
            "sampler_precision": arguments.precision,
            "compiled": arguments.compile,
        }
    record = protocol(processes, **facts, reference=reference.record, feature_network=feature_record(network))
    report(arguments, processes, rows, beside, record, sweep, network)


def read_beside(paths: list[str], reference: Reference) -> list[Row]:
    """The rows of other results on the reference images; of statistics alone the images are not known."""
    fingerprint = reference.record.get("sha256", "unknown")
    return [row for path in paths for row in read_results(path, fingerprint)]


def load_source(arguments: argparse.Namespace, processes: Processes) -> Source:
    generator, located = load_generator(arguments.config, arguments.checkpoint, device=processes.device)
    tokenizer, tokenizer_located = load_its_tokenizer(
        generator, located, arguments.tokenizer_checkpoint, device=processes.device
    )
    return Source(generator, tokenizer, located, tokenizer_located, prepared(arguments, generator, tokenizer))


def lengths_of(tokenizer: TiTok, text: str | None) -> list[int]:
    """The lengths of --lengths, which the tokenizer is asked for before any image is made; all tokens without."""
    lengths = parse_lengths(text) if text else [tokenizer.num_latent_tokens]
    tokens = torch.zeros(1, tokenizer.num_latent_tokens, dtype=torch.long, device=tokenizer.latent_tokens.device)
    with torch.no_grad():
        for length in lengths:
            tokenizer.decode_tokens(tokens, length)
    return lengths


def generated(
    source: Source,
    lengths: list[int],
    count: int,
    seed: int,
    batch_size: int,
    settings: dict[str, Any],
    processes: Processes,
) -> Iterator[tuple[list[str], dict[int, Tensor]]]:
    """This process's share of `count` images, the classes in turn: keys, and 8-bit images by number of tokens."""
    mine = range(processes.rank, count, processes.world_size)
    classes = source.generator.num_classes
    wanted = [(index % classes, index // classes) for index in mine]
    done = 0
    drawing = {"seed": seed, "batch_size": batch_size, "arithmetic": source.arithmetic, **settings}
    for tokens, pixels in sample(source.generator, source.tokenizer, wanted, **drawing):
        indices = mine[done : done + len(pixels)]
        done += len(pixels)
        versions = {tokens.shape[1]: pixels}
        with torch.no_grad(), source.arithmetic():
            for length in lengths:
                if length not in versions:
                    versions[length] = source.tokenizer.decode_tokens(tokens, length).float()
        yield [f"{index:08d}" for index in indices], {length: to_uint8(versions[length]) for length in lengths}


def scored_set(
    batches: Batches,
    total: int | None,
    network: SetFeatures,
    processes: Processes,
    what: str,
    with_logits: bool = True,
) -> FeatureSet:
    """All images of `batches` as the network sees them."""
    versions = ((keys, {what: images}) for keys, images in batches)
    return scored_sets(versions, [what], total, network, processes, what, with_logits)[what]


def scored_sets(
    batches: Iterable[tuple[list[str], Mapping[Any, Tensor]]],
    names: list,
    total: int | None,
    network: SetFeatures,
    processes: Processes,
    what: str,
    with_logits: bool = True,
) -> dict[Any, FeatureSet]:
    """All versions of the images of `batches`, called `names` there, as the network sees them."""
    found = {name: FeatureSet(network, processes, with_logits=with_logits, with_features=True) for name in names}
    with tqdm(total=total, desc=what, unit="image", disable=not processes.is_main, dynamic_ncols=True) as bar:
        for keys, versions in batches:
            for name, images in versions.items():
                found[name].update(images.to(processes.device), keys)
            bar.update(len(keys) * processes.world_size)
    return found


def score(found: FeatureSet, reference: Reference, processes: Processes) -> dict[str, float]:
    scores = {found.network.key: frechet_distance(reference.gaussian, found.gaussian()), **found.inception_score()}
    features = found.features()
    if reference.features is not None and processes.is_main:
        device = processes.device if processes.device.type == "cuda" else torch.device("cpu")
        precision, recall = precision_recall(features.to(device), reference.features.to(device))
        scores |= {"precision": precision, "recall": recall}
    return scores


def load_reference(source: str, size: int, network: SetFeatures, batch_size: int, processes: Processes) -> Reference:
    """The reference set as the network sees it; of an ADM archive its statistics, if the network is Inception.

    Args:
        size: Pixels a side of the samples, to which shards are cropped.
    """
    from data.image_sets import open_images, read_statistics
    from data.image_shards import check_count, evaluation_loader
    from data.transforms import EvalTransform

    record: dict[str, Any] = {"source": source}
    originals = Originals(processes)
    if source.endswith((".yaml", ".yml")) or ".tar" in source:
        if ".tar" in source:
            config = shards_config(source, size)
        else:
            config = load_config(source)
            if config.dataset.type == "tokens":  # a generator's configuration: its images stand in shards
                config.dataset.type = "shards"
        config_size = config.dataset.preprocessing.crop_size
        if config_size != size:
            raise UserError(f"the samples have {size} pixels a side, and {source} crops its images to {config_size}")
        loader = evaluation_loader(config, rank=processes.rank, world_size=processes.world_size, batch_size=batch_size)
        batches = noted(originals, ((batch["__key__"], batch["image"]) for batch in loader))
        found = scored_set(batches, loader.expected, network, processes, "reference", with_logits=False)
        num_bad = int(add_up(torch.tensor(loader.num_bad), processes))
        check_count(found.count(), loader.expected, num_bad)
        record |= originals.record(loader.expected, num_bad) | {"preparation": EvalTransform(size).description}
        return Reference(found.gaussian(), found.features(), record)
    statistics = read_statistics(source) if network.key == INCEPTION else None
    record |= {"preparation": "images as they are given"}
    images = open_images(source) if statistics is None or statistics.has_images else None
    features = gaussian = None
    if images is not None:
        share = {"batch_size": batch_size, "rank": processes.rank, "world_size": processes.world_size}
        batches = noted(originals, images.batches(**share))
        found = scored_set(batches, len(images), network, processes, "reference", with_logits=False)
        features, gaussian = found.features(), found.gaussian()
        check_count(found.count(), len(images))
        record |= originals.record(len(images))
    if statistics is not None:
        gaussian = Gaussian(torch.from_numpy(statistics.mean), torch.from_numpy(statistics.covariance))
        record |= {"statistics": "mu and sigma of the file, of the Inception in TensorFlow"}
    return Reference(gaussian, features, record)


def noted(originals: Originals, batches: Batches) -> Batches:
    """The batches, each added to `originals` on its way."""
    for keys, images in batches:
        originals.add(images, keys)
        yield keys, images


def shards_config(shards: str, size: int):
    """Just enough configuration to read shards."""
    params = {"eval_shards_path_or_url": shards, "num_workers_per_gpu": 1, "num_eval_examples": None}
    return OmegaConf.create(
        {"dataset": {"type": "shards", "params": params, "preprocessing": {"crop_size": size}}, "training": {}}
    )


def parse_sweep(texts: list[str]) -> dict[str, list]:
    """["a=1,2", "b=3"], or "a=1,2,b=3" in one, as {"a": [1, 2], "b": [3]}."""
    sweep: dict[str, list] = {}
    name = None
    for word in ",".join(texts).split(",") if texts else []:
        before, equals, after = word.partition("=")
        if equals:
            name, word = before, after
            sweep[name] = []
        try:
            number = float(word)
        except ValueError as error:
            raise UserError(f"--sweep takes NAME=NUMBER,NUMBER,..., got {' '.join(texts)}") from error
        if name is None:
            raise UserError(f"--sweep takes NAME=NUMBER,NUMBER,..., got {' '.join(texts)}")
        sweep[name].append(int(number) if name == "num_sample_steps" else number)
    if len(sweep) > 2:
        raise UserError(f"--sweep takes one or two settings, got {', '.join(sweep)}")
    return sweep


def report(
    arguments: argparse.Namespace,
    processes: Processes,
    rows: list[Row],
    beside: list[Row],
    record: dict[str, Any],
    sweep: dict[str, list],
    network: SetFeatures,
) -> None:
    if not processes.is_main:
        return
    output_dir = Path(arguments.output_dir)
    shared = {"name", "system", "tokens", *filter(is_measure, rows[0])}
    shown = rows + [{name: value for name, value in row.items() if name in shared} for row in beside]
    print(table(shown))
    write_results(output_dir / "metrics.json", {"rows": rows, "protocol": record})
    written = [output_dir / "metrics.json"]
    if arguments.lengths:
        plot_curves(output_dir / "curves.png", shown, f"{record['samples']['seen']:,} samples", over="tokens")
        written.append(output_dir / "curves.png")
    elif len(rows) > 1:
        plot_grid(output_dir / "sweep.png", rows, list(sweep), network.key)
        written.append(output_dir / "sweep.png")
        best = min(rows, key=lambda row: row[network.key])
        print(f"lowest {network.title}: {best[network.key]:.4g} at {best['name']}")
    print(f"{record['samples']['seen']:,} images scored; wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    run(main)
