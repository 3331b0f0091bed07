"""Score three trivial ways to store an image, beside which every tokenizer's figures belong.

  python3 scripts/evaluate_baselines.py --config configs/fashion/eval.yaml --features efficientnet_lite0

PCA: an image is 32 numbers, its coordinates on the first principal axes of the training images. k-means: an image
is one of 1,024 codes, the centre nearest to it of as many clusters of the training images. VQ: an image is cut into
as many patches as the configuration's tokenizer has tokens, and each is one of as many k-means codes, so it has the
tokenizer's bits. All are fitted on the configuration's training images and scored on its evaluation images, as
scripts/evaluate_reconstruction.py scores; the file baselines.json can be shown there by --beside. For small images:
all training images are held in memory.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from modeling.networks.judges import Networks
from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import add_arguments
from utils.evaluation.metrics import to_uint8
from utils.evaluation.protocol import exact_arithmetic, protocol
from utils.evaluation.report import Row, table, write_results
from utils.processes import Processes

LARGEST = 64  # pixels a side: the covariance of 12,288 numbers takes 1.2 GB


class Baseline(NamedTuple):
    """A way to store images.

    Attributes:
        bits: Of an image.
        restore: What comes back of images, (n, 3 P P) float32 in [0, 1] both.
    """

    name: str
    bits: float
    restore: Callable[[np.ndarray], np.ndarray]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fashion/eval.yaml", help="of the images (default: %(default)s)")
    parser.add_argument("--num_components", type=int, default=32, help="numbers of the PCA (default: %(default)s)")
    parser.add_argument("--num_codes", type=int, default=1024, help="codes of k-means (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the k-means clusters (default: %(default)s)")
    add_arguments(parser, output_dir="output/evaluate_baselines")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values of the configuration to change")
    return parser.parse_args()


def main() -> None:
    from data.image_shards import check_count, evaluation_loader  # torchvision is slow to import, too slow for --help
    from data.transforms import EvalTransform

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
    exact_arithmetic()
    processes = Processes(arguments.device)
    if processes.world_size > 1:
        raise UserError("the baselines are fitted by one process: start this without torchrun")
    networks = Networks(arguments, processes)
    batch_size = arguments.batch_size

    train = config.copy()
    train.dataset.params.eval_shards_path_or_url = config.dataset.params.train_shards_path_or_url
    train.dataset.params.eval_folder = config.dataset.params.train_folder
    train.dataset.params.num_eval_examples = None  # as the manifest says
    images = read_all(train, batch_size)
    print(f"fitting three baselines to {len(images):,} images")
    baselines = [
        fit_pca(images, arguments.num_components),
        fit_kmeans(images, arguments.num_codes, arguments.seed),
        fit_patch_vq(images, size, grid, vq_model.codebook_size, arguments.seed),
    ]
    num_fitted = len(images)
    del images

    comparison = networks.comparison(size)
    batches = evaluation_loader(config, rank=0, world_size=1, batch_size=batch_size)
    for batch in tqdm(batches, desc="scoring", dynamic_ncols=True):
        pixels = batch["image"]
        flat = as_rows(pixels)
        versions = {baseline.name: as_images(baseline.restore(flat), pixels) for baseline in baselines}
        device = processes.device
        versions = {name: version.to(device) for name, version in versions.items()}
        comparison.update(pixels.to(device), versions, batch["__key__"])
    seen = comparison.count()
    check_count(seen, batches.expected, batches.num_bad)
    scores = comparison.finish([baseline.name for baseline in baselines])
    rows: list[Row] = [
        {
            "name": name,
            "system": name,
            "bytes_per_image": math.ceil(bits / 8),
            "bits_per_pixel": bits / size**2,
            **scores[name],
        }
        for name, bits, _ in baselines
    ]
    record = protocol(
        processes,
        originals=comparison.record(batches.expected, batches.num_bad),
        preparation=EvalTransform(size).description,
        config=arguments.config,
        overrides=arguments.overrides,
        fitted_on=num_fitted,
        seed=arguments.seed,
        **networks.record(),
    )
    path = Path(arguments.output_dir) / "baselines.json"
    write_results(path, {"rows": rows, "protocol": record})
    print(table(rows))
    print(f"{seen:,} images scored; wrote {path}")


def read_all(config: DictConfig, batch_size: int | None) -> np.ndarray:
    """All images of the evaluation set, (n, 3 P P) float32 in [0, 1], in the order of their keys."""
    from data.image_shards import check_count, evaluation_loader

    batches = evaluation_loader(config, rank=0, world_size=1, batch_size=batch_size)
    rows, keys = [], []
    for batch in tqdm(batches, desc="reading", dynamic_ncols=True):
        rows.append(batch["image"].flatten(1))
        keys += batch["__key__"]
    check_count(len(keys), batches.expected, batches.num_bad)
    images = torch.cat(rows)[torch.tensor(np.argsort(np.array(keys), kind="stable"))]
    return as_rows(images)


def as_rows(pixels: Tensor) -> np.ndarray:
    return (pixels.flatten(1).float() / 255).numpy()


def as_images(rows: np.ndarray, like: Tensor) -> Tensor:
    return to_uint8(torch.from_numpy(np.asarray(rows, dtype=np.float32)).view(like.shape))


def fit_pca(images: np.ndarray, num_components: int) -> Baseline:
    from sklearn.decomposition import PCA

    if num_components > min(images.shape):
        raise UserError(f"--num_components must be at most {min(images.shape)} here, got {num_components}")
    # Both solvers are exact; each is the fast one for its shape.
    many = len(images) > images.shape[1]
    pca = PCA(num_components, svd_solver="covariance_eigh" if many else "full").fit(images)
    # As 16-bit floats, which lose nothing that is seen on 8 bits.
    bits = 16 * num_components
    return Baseline(f"PCA, {num_components} numbers", bits, lambda rows: pca.inverse_transform(pca.transform(rows)))


def fit_kmeans(images: np.ndarray, num_codes: int, seed: int) -> Baseline:
    nearest = fit_codebook(images, num_codes, seed)
    return Baseline(f"one of {num_codes:,} k-means codes", math.log2(num_codes), nearest)


def fit_patch_vq(images: np.ndarray, size: int, grid: tuple[int, int], num_codes: int, seed: int) -> Baseline:
    """Each patch of a `grid` (rows, columns) is one of `num_codes`; images have `size` pixels a side."""
    rows, columns = grid
    num_patches, height, width = rows * columns, size // rows, size // columns

    def cut(images: np.ndarray) -> np.ndarray:
        patches = images.reshape(-1, 3, rows, height, columns, width).transpose(0, 2, 4, 1, 3, 5)
        return patches.reshape(-1, 3 * height * width)

    def join(patches: np.ndarray) -> np.ndarray:
        images = patches.reshape(-1, rows, columns, 3, height, width).transpose(0, 3, 1, 4, 2, 5)
        return images.reshape(-1, 3 * size**2)

    # Over a quarter of Fashion-MNIST's patches are plain black. Beside their code the others seem rare, and would be
    # replaced again and again: 21.5 in place of 22.6 dB.
    nearest = fit_codebook(cut(images), num_codes, seed, reassignment_ratio=0)
    name = f"VQ of {height} x {width} pixels, {num_patches} codes of {num_codes:,}"
    return Baseline(name, num_patches * math.log2(num_codes), lambda images: join(nearest(cut(images))))


def patch_grid(num_patches: int, size: int) -> tuple[int, int]:
    """Rows and columns of equal patches, as near to squares as can be; of two ways the wider patches.

    Raises:
        UserError: So many equal patches do not cover images of `size` pixels a side.
    """
    grids = [
        (rows, num_patches // rows)
        for rows in range(size, 0, -1)
        if size % rows == 0 and num_patches % rows == 0 and size % (num_patches // rows) == 0
    ]
    if not grids:
        raise UserError(
            f"images of {size} x {size} pixels cannot be cut into {num_patches} equal patches, one a token: give a "
            "number that can, such as model.vq_model.num_latent_tokens=32"
        )
    return min(grids, key=lambda grid: max(grid) / min(grid))


def fit_codebook(rows: np.ndarray, num_codes: int, seed: int, **settings: float) -> Callable[[np.ndarray], np.ndarray]:
    """What gives, for each row, the nearest of `num_codes` k-means centres of `rows`."""
    from sklearn.cluster import MiniBatchKMeans

    if num_codes > len(rows):
        raise UserError(
            f"{num_codes} codes need as many training images or patches, got {len(rows)}: give more images, or "
            "fewer codes (--num_codes, model.vq_model.codebook_size)"
        )
    kmeans = MiniBatchKMeans(num_codes, batch_size=8192, max_iter=20, n_init=1, random_state=seed, **settings)
    kmeans.fit(rows)
    return lambda rows: kmeans.cluster_centers_[kmeans.predict(rows)]


if __name__ == "__main__":
    run(main)
