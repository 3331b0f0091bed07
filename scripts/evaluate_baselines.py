"""Score two trivial ways to store a picture, beside which every tokenizer's figures belong.

  python3 scripts/evaluate_baselines.py --config configs/fashion/eval.yaml --features efficientnet_lite0

PCA: a picture is 32 numbers, its coordinates on the first principal axes of the training pictures. k-means: a picture
is one of 1,024 codes, the centre nearest to it of as many clusters of the training pictures. Both are fitted on the
configuration's training pictures and scored on its evaluation pictures, as scripts/evaluate_reconstruction.py scores;
the file baselines.json can be shown there by --beside. For small pictures: all training pictures are held in memory.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from modeling.evaluation import Networks, add_arguments
from utils.cli import UserError, run
from utils.config import load_config
from utils.evaluation.metrics import to_uint8
from utils.evaluation.protocol import exact_arithmetic, protocol
from utils.evaluation.report import Row, table, write_results
from utils.processes import Processes

LARGEST = 64  # pixels a side: the covariance of 12,288 numbers takes 1.2 GB


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fashion/eval.yaml", help="of the pictures (default: %(default)s)")
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
        raise UserError(f"these baselines are for pictures of up to {LARGEST} pixels a side, the config has {size}")
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
    pictures = read_all(train, batch_size)
    print(f"fitting PCA with {arguments.num_components} numbers to {len(pictures):,} pictures")
    pca = fit_pca(pictures, arguments.num_components)
    print(f"fitting k-means with {arguments.num_codes} codes")
    kmeans = fit_kmeans(pictures, arguments.num_codes, arguments.seed)
    num_fitted = len(pictures)
    del pictures

    pca_name, code_name = f"PCA, {arguments.num_components} numbers", f"one of {arguments.num_codes:,} k-means codes"
    comparison = networks.comparison(size)
    batches = evaluation_loader(config, rank=0, world_size=1, batch_size=batch_size)
    for batch in tqdm(batches, desc="scoring", dynamic_ncols=True):
        pixels = batch["image"]
        flat = as_rows(pixels)
        versions = {
            pca_name: as_pictures(pca.inverse_transform(pca.transform(flat)), pixels),
            code_name: as_pictures(kmeans.cluster_centers_[kmeans.predict(flat)], pixels),
        }
        device = processes.device
        versions = {name: version.to(device) for name, version in versions.items()}
        comparison.update(pixels.to(device), versions, batch["__key__"])
    seen = comparison.count()
    check_count(seen, batches.expected, batches.num_bad)
    scores = comparison.finish([pca_name, code_name])
    bits = math.log2(arguments.num_codes)
    rows: list[Row] = [
        # As 16-bit floats, which lose nothing that is seen on 8 bits.
        {
            "name": pca_name,
            "system": pca_name,
            "bytes_per_image": 2 * arguments.num_components,
            "bits_per_pixel": 16 * arguments.num_components / size**2,
            **scores[pca_name],
        },
        {
            "name": code_name,
            "system": code_name,
            "bytes_per_image": math.ceil(bits / 8),
            "bits_per_pixel": bits / size**2,
            **scores[code_name],
        },
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
    """All pictures of the evaluation set, (n, 3 P P) float32 in [0, 1], in the order of their keys."""
    from data.image_shards import check_count, evaluation_loader

    batches = evaluation_loader(config, rank=0, world_size=1, batch_size=batch_size)
    rows, keys = [], []
    for batch in tqdm(batches, desc="reading", dynamic_ncols=True):
        rows.append(batch["image"].flatten(1))
        keys += batch["__key__"]
    check_count(len(keys), batches.expected, batches.num_bad)
    pictures = torch.cat(rows)[torch.tensor(np.argsort(np.array(keys), kind="stable"))]
    return as_rows(pictures)


def as_rows(pixels: Tensor) -> np.ndarray:
    return (pixels.flatten(1).float() / 255).numpy()


def as_pictures(rows: np.ndarray, like: Tensor) -> Tensor:
    return to_uint8(torch.from_numpy(np.asarray(rows, dtype=np.float32)).view(like.shape))


def fit_pca(pictures: np.ndarray, num_components: int):
    from sklearn.decomposition import PCA

    if num_components > min(pictures.shape):
        raise UserError(f"--num_components must be at most {min(pictures.shape)} here, got {num_components}")
    # Both solvers are exact; each is the fast one for its shape.
    many = len(pictures) > pictures.shape[1]
    return PCA(num_components, svd_solver="covariance_eigh" if many else "full").fit(pictures)


def fit_kmeans(pictures: np.ndarray, num_codes: int, seed: int):
    from sklearn.cluster import MiniBatchKMeans

    if num_codes > len(pictures):
        raise UserError(f"--num_codes must be at most {len(pictures)}, one a training picture, got {num_codes}")
    kmeans = MiniBatchKMeans(num_codes, batch_size=8192, max_iter=20, n_init=1, random_state=seed)
    return kmeans.fit(pictures)


if __name__ == "__main__":
    run(main)
