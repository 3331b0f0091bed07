"""Images that are there, scored as they are: against their originals, or generated ones against a reference."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from data import DataError
from data.batches import Loader, check_count
from data.evaluation_images import first_of
from data.image_folder import kind_of_images
from data.image_sets import AS_GIVEN, open_images, paired, read_statistics
from data.loaders import evaluation_loader
from utils.config import load_config
from utils.evaluation.comparison import Comparison, Originals
from utils.evaluation.feature_set import FeatureNetwork
from utils.evaluation.generation import Reference, noted, reference_of, score, seen_by
from utils.evaluation.report import Row
from utils.evaluation.session import Session
from utils.evaluation.statistics import LEAST_DISTANCE, Gaussian
from utils.files import sha256_of
from utils.inference import choose_batch_size

INCEPTION = "fid"  # the `key` of its network
BATCH_SIZE = 64


def score_pair(
    original: str,
    target: str,
    judge: Callable[[int], Comparison],
    session: Session,
    *,
    num_images: int | None,
    batch_size: int | str | None,
) -> tuple[Row, dict[str, Any]]:
    """One set of images against another: the row, and what the protocol says of them.

    Args:
        original, target: .npy or .npz files or folders.
        judge: Makes an empty comparison of images whose shorter side has so many pixels.
        num_images: Only the first ones; None for all.
        batch_size: As `choose_batch_size` takes it.
    """
    sets = paired([open_images(original), open_images(target)])
    originals, targets = (first_of(images, num_images) for images in sets)
    height, width, device = originals.height, originals.width, session.device
    name, comparison = Path(target).stem, judge(min(height, width))

    def try_batch(num: int) -> None:
        pixels = torch.zeros(num, 3, height, width, dtype=torch.uint8, device=device)
        judge(min(height, width)).update(pixels, {name: pixels}, list(map(str, range(num))))

    batch_size = choose_batch_size(batch_size or BATCH_SIZE, try_batch, device, most=len(originals))
    share = session.share(batch_size)
    pairs = zip(originals.batches(**share), targets.batches(**share), strict=True)
    with session.progress(len(originals)) as done:
        for (keys, images), (_, others) in pairs:
            comparison.update(images.to(device), {name: others.to(device)}, keys)
            done(len(keys))
    facts = {
        "originals": session.counted(comparison, check_count, len(originals)),
        "preparation": AS_GIVEN,
        "original": original,
        "target": target,
    }
    return {"name": name, "system": name, **comparison.finish([name])[name]}, facts


def score_samples(
    source: str, reference: str, network: FeatureNetwork, session: Session, *, num_images: int | None, batch_size: int
) -> tuple[Row, Reference, dict[str, Any]]:
    """Generated images that are there against a reference set: the row, the reference, and facts for the record.

    Args:
        source: A .npy or .npz file or a folder.
        reference: As of `load_reference`.
        num_images: Only the first ones; None for all.

    Raises:
        DataError: There are fewer than two samples.
    """
    samples = first_of(open_images(source), num_images)
    if len(samples) < LEAST_DISTANCE:
        raise DataError(f"{source} must hold {LEAST_DISTANCE} images or more to be scored as a set, got {len(samples)}")
    loaded = load_reference(reference, (samples.height, samples.width), network, batch_size, session)
    seen, batches = Originals(session.processes), samples.batches(**session.share(batch_size))
    found = seen_by(network, noted(batches, seen), len(samples), session, "samples")
    row = {"name": Path(source).stem, **score(found, loaded, session.processes)}
    return row, loaded, {"samples": {"source": source, **seen.record(len(samples))}}


def reference_images(source: str, size: tuple[int, int], **share: int) -> Loader:
    """The evaluation images of a configuration, or the images in shards, cropped to `size`.

    Args:
        source: Path of the configuration, or the shards (DIR/name-{000000..000049}.tar).
        size: Height and width.
        share: As of `data.evaluation_images.evaluation_images`.

    Raises:
        DataError: The configuration crops to another size, or no crop has this one.
    """
    if ".tar" in source:
        params = {"eval_shards_path_or_url": source, "num_workers_per_gpu": 1, "num_eval_examples": None}
        dataset = {"type": "shards", "params": params, "preprocessing": {"crop_size": min(size)}}
        config = OmegaConf.create({"dataset": dataset, "training": {}})
    else:
        config = load_config(source)
    if config.dataset.type == "tokens":  # a generator's configuration
        config.dataset.type = kind_of_images(config)
    check_size(size, (config.dataset.preprocessing.crop_size,) * 2, source)
    return evaluation_loader(config, **share)


def check_size(samples: tuple[int, int], reference: tuple[int, int], source: str) -> None:
    """Refuse samples of another size than the reference's images, which come from `source`."""
    if samples != reference:
        there, here = (f"{height} x {width} pixels" for height, width in (samples, reference))
        raise DataError(f"the samples have {there}, and the images of {source} {here}: give a reference of their size")


def load_reference(
    source: str, size: tuple[int, int], network: FeatureNetwork, batch_size: int, session: Session
) -> Reference:
    """The reference set of generated images as `network` sees it.

    Args:
        source: A configuration or shards, as of `reference_images`, or a .npy or .npz file or a folder. Of an archive
            of the ADM evaluator the statistics are taken, if the network is Inception.
        size: Height and width of the samples, to which shards are cropped.

    Raises:
        DataError: The reference's images have another size.
    """
    see = partial(reference_of, network, session, check_count)
    share = session.share(batch_size)
    if source.endswith((".yaml", ".yml")) or ".tar" in source:
        loader = reference_images(source, size, **share)
        batches = ((batch["__key__"], batch["image"]) for batch in loader)
        reference = see(batches, loader.expected, lambda: loader.num_bad)
        return reference.noting(source=source, preparation=loader.preparation)
    facts = {"source": source, "preparation": AS_GIVEN}
    statistics = read_statistics(source) if network.key == INCEPTION else None
    if statistics is None or statistics.has_images:
        images = open_images(source)
        check_size(size, (images.height, images.width), source)
        reference = see(images.batches(**share), len(images))
    else:
        reference = Reference(None, None, {})
    if statistics is not None:
        facts["statistics"] = "mu and sigma of the file, of the Inception in TensorFlow"
        facts["statistics_sha256"] = sha256_of(Path(source).expanduser())
        gaussian = Gaussian(torch.from_numpy(statistics.mean), torch.from_numpy(statistics.covariance))
        reference = replace(reference, gaussian=gaussian)
    return reference.noting(**facts)
