"""Score three trivial ways to store an image, beside which every tokenizer's figures belong.

  python3 scripts/evaluate_baselines.py --config configs/fashion/eval.yaml --features efficientnet_lite0

PCA: an image is 32 numbers, its coordinates on the first principal axes of the training images. k-means: an image
is one of 1,024 codes, the centre nearest to it of as many clusters of the training images. VQ: an image is cut into
as many patches as the configuration's tokenizer has tokens, and each is one of as many k-means codes, so it has the
tokenizer's bits. All are fitted on the configuration's training images and scored on its evaluation images, as
scripts/evaluate_reconstruction.py scores; the file baselines.json can be shown there by --beside. For small images:
all training images are held in memory.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse

from omegaconf import DictConfig, OmegaConf

from modeling.networks.judges import Judges
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import add_arguments, add_overrides
from utils.evaluation.baselines import (
    Baseline,
    as_images,
    as_rows,
    fit_kmeans,
    fit_patch_vq,
    fit_pca,
    patch_grid,
)
from utils.evaluation.report import Row
from utils.evaluation.session import Session

LARGEST = 64  # pixels a side: the covariance of 12,288 numbers takes 1.2 GB


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", default="configs/fashion/eval.yaml", help="of the images (default: %(default)s)")
    parser.add_argument("--num_components", type=int, default=32, help="numbers of the PCA (default: %(default)s)")
    parser.add_argument("--num_codes", type=int, default=1024, help="codes of k-means (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the k-means clusters (default: %(default)s)")
    add_arguments(parser, output_dir="output/evaluate_baselines", features="efficientnet_lite0")
    add_overrides(parser)
    arguments = parser.parse_args()
    for name, smallest in {"num_components": 1, "num_codes": 1, "seed": 0}.items():
        if getattr(arguments, name) < smallest:
            raise UserError(f"--{name} must be {smallest} or more, got {getattr(arguments, name)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.overrides)
    size = config.dataset.preprocessing.crop_size
    if size > LARGEST:
        raise UserError(f"these baselines are for images of up to {LARGEST} pixels a side, the config has {size}")
    vq_model = OmegaConf.select(config, "model.vq_model")
    if vq_model is None:
        raise UserError(
            f"--config must be a tokenizer's, whose tokens and codes the VQ gets, but {arguments.config} has no "
            "model.vq_model"
        )
    grid = patch_grid(vq_model.num_latent_tokens, size)
    with Session(arguments.device, arguments.output_dir, ["baselines.json"]) as session:
        if session.processes.world_size > 1:
            raise UserError("the baselines are fitted by one process: start this without torchrun")
        from data.evaluation_images import training_images  # torchvision is slow to import, too slow for --help

        judges = Judges(arguments.features, arguments.weights, arguments.perceptual, session.processes)
        images = as_rows(training_images(config, arguments.batch_size, session))
        print(f"fitting three baselines to {len(images):,} images, PCA first: some ten seconds without a bar")
        baselines = [
            fit_pca(images, arguments.num_components),
            fit_kmeans(images, arguments.num_codes, arguments.seed),
            fit_patch_vq(images, size, grid, vq_model.codebook_size, arguments.seed),
        ]
        facts = {"fitted_on": len(images), "seed": arguments.seed}
        del images
        score(arguments, config, baselines, judges, session, facts)


def score(
    arguments: argparse.Namespace,
    config: DictConfig,
    baselines: list[Baseline],
    judges: Judges,
    session: Session,
    facts: dict[str, int],
) -> None:
    """Hold what the baselines give back of the evaluation images against these."""
    from data.evaluation_images import evaluation_images, record_of

    size, device = config.dataset.preprocessing.crop_size, session.device
    comparison = judges.comparison(size)
    batches = evaluation_images(config, arguments.num_images, **session.share(arguments.batch_size))
    for batch in session.each(batches, "scoring"):
        pixels, flat = batch["image"], as_rows(batch["image"])
        versions = {name: as_images(restore(flat), pixels).to(device) for name, _, restore in baselines}
        comparison.update(pixels.to(device), versions, batch["__key__"])
    record = session.record(
        **record_of(batches, comparison, session),
        config=arguments.config,
        overrides=arguments.overrides,
        **facts,
        **judges.record(),
    )
    scores = comparison.finish([baseline.name for baseline in baselines])
    rows: list[Row] = [baseline.row(size) | scores[baseline.name] for baseline in baselines]
    summary = f"{record['originals']['seen']:,} images scored"
    session.report(summary, {"rows": rows, "protocol": record}, shown=rows, name="baselines.json")


if __name__ == "__main__":
    run(main)
