"""Three trivial ways to store an image, beside which every tokenizer's figures belong: PCA, k-means, VQ of patches."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError
from utils.evaluation.metrics import to_uint8
from utils.evaluation.report import Row


class Baseline(NamedTuple):
    """A way to store images.

    Attributes:
        bits: Of an image.
        restore: What comes back of images, (n, 3 P P) float32 in [0, 1] both.
    """

    name: str
    bits: float
    restore: Callable[[np.ndarray], np.ndarray]

    def row(self, size: int) -> Row:
        """What a row says of images of `size` pixels a side, before their scores."""
        stored = {"bytes_per_image": math.ceil(self.bits / 8), "bits_per_pixel": self.bits / size**2}
        return {"name": self.name, "system": self.name, **stored}


def as_rows(pixels: Tensor) -> np.ndarray:
    """(n, 3 P P) float32 in [0, 1] of images (n, 3, P, P) uint8."""
    return (pixels.flatten(1).float() / 255).numpy()


def as_images(rows: np.ndarray, like: Tensor) -> Tensor:
    """The reverse of `as_rows`, rounded, in the shape of `like`."""
    return to_uint8(torch.from_numpy(np.asarray(rows, dtype=np.float32)).view(like.shape))


def fit_pca(images: np.ndarray, num_components: int) -> Baseline:
    """An image is its coordinates on the first principal axes of `images`, (n, 3 P P)."""
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
    """An image is the nearest of `num_codes` cluster centres of `images`, (n, 3 P P)."""
    nearest = fit_codebook(images, num_codes, seed)
    return Baseline(f"one of {num_codes:,} k-means codes", math.log2(num_codes), nearest)


def fit_patch_vq(images: np.ndarray, size: int, grid: tuple[int, int], num_codes: int, seed: int) -> Baseline:
    """Each patch of a `grid` (rows, columns) is one of `num_codes`; `images` (n, 3 P P) have P = `size`."""
    rows, columns = grid
    num_patches, height, width = rows * columns, size // rows, size // columns
    flat, patched = "n (c rows h columns w)", "(n rows columns) (c h w)"
    sizes = {"c": 3, "rows": rows, "columns": columns, "h": height, "w": width}

    def cut(images: np.ndarray) -> np.ndarray:
        return rearrange(images, f"{flat} -> {patched}", **sizes)

    def join(patches: np.ndarray) -> np.ndarray:
        return rearrange(patches, f"{patched} -> {flat}", **sizes)

    # Over a quarter of Fashion-MNIST's patches are plain black. Beside their code the others seem rare, and would be
    # replaced again and again: 21.5 instead of 22.6 dB.
    nearest = fit_codebook(cut(images), num_codes, seed, reassignment_ratio=0)
    name = f"VQ of {height} x {width} pixels, {num_patches} codes of {num_codes:,}"
    return Baseline(name, num_patches * math.log2(num_codes), lambda images: join(nearest(cut(images))))


def patch_grid(num_patches: int, size: int) -> tuple[int, int]:
    """Rows and columns of equal patches, as near to squares as possible; of two ways the wider patches.

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

    class Shown(MiniBatchKMeans):
        """scikit-learn tells nobody else that a step is done."""

        def _mini_batch_convergence(self, *step):
            progress.set_description(name, refresh=False)
            progress.update()
            return super()._mini_batch_convergence(*step)

    kmeans = Shown(num_codes, batch_size=8192, max_iter=20, n_init=1, random_state=seed, **settings)
    num_steps = kmeans.max_iter * len(rows) // min(kmeans.batch_size, len(rows))
    name = f"k-means, {num_codes:,} codes"
    with tqdm(total=num_steps, desc=f"{name}: first centres", unit="step", dynamic_ncols=True) as progress:
        kmeans.fit(rows)
    return lambda rows: kmeans.cluster_centers_[kmeans.predict(rows)]
