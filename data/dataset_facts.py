"""What a data set says of itself, its counts and classes, instead of those that a configuration inherits."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from data import DataError
from data.image_folder import open_folder
from data.labels import SUBFOLDERS
from data.shard_files import read_manifest
from data.shard_urls import resolve_shards
from data.tar_samples import manifest_facts
from data.token_loader import token_folder
from data.token_sets import MANIFEST, TokenSet

logger = logging.getLogger(__name__)


class Facts(NamedTuple):
    """Of one split.

    Attributes:
        source: Where the data are, for messages.
        num_images: None where nothing counts them.
        classes: Names by class id; empty where unknown.
        labels: Class ids, or the only ones that occur; None where they are not known before they are read.
    """

    source: str
    num_images: int | None
    classes: list[str]
    labels: np.ndarray | None = None


def describe_dataset(config: DictConfig) -> None:
    """Put the training set's own counts and classes into a configuration, before the first step.

    What is there may be inherited from another data set: the number of training images, the names of the classes and,
    for a generator, how many there are. A folder, a manifest of shards and a token set know better.

    Raises:
        DataError: The data are not there, or have no labels that a generator could learn.
    """
    kind = config.dataset.get("type", "shards")
    if config.get("dry_run", False) and kind != "folder":  # the other kinds' data may be elsewhere
        return
    facts = {"folder": _of_folder, "tokens": _of_tokens}.get(kind, _of_shards)(config)
    if facts.num_images is not None:
        OmegaConf.update(config, "experiment.max_train_examples", facts.num_images)
    if config.model.get("generator") is not None:
        _describe_classes(config, facts)
        if config.experiment.eval_every:
            check_class_ids(config, kind)


def check_class_ids(config: DictConfig, kind: str) -> None:
    """Refuse evaluation data whose class ids mean other classes than those of training; unnamed ones pass.

    Args:
        kind: `dataset.type` of the data. In a folder, evaluation images have the ids of the training folder anyway.
    """
    if kind == "shards" and config.dataset.params.get("eval_shards_path_or_url"):
        training, evaluation = (_of_shards(config, split) for split in ("train", "eval"))
    elif kind == "tokens" and (token_folder(config, "eval") / MANIFEST).is_file():
        training, evaluation = (_of_tokens(config, split) for split in ("train", "eval"))
    else:
        return
    if not training.classes:
        return
    for class_id, name in enumerate(evaluation.classes):
        trained = training.classes[class_id] if class_id < len(training.classes) else None
        if name != trained:
            raise DataError(
                f"class {class_id} must be the same in training and evaluation, and is {trained!r} in "
                f"{training.source} and {name!r} in {evaluation.source}: put the images into train/ and val/ of one "
                "folder, and make both again with data/make_shards.py --source FOLDER, --split train and --split val"
            )


def _describe_classes(config: DictConfig, facts: Facts) -> None:
    names, number = list(config.dataset.get("class_names") or []), config.model.generator.get("condition_num_classes")
    # Without names in the configuration, classes are called by their numbers.
    # A folder may be called by any bytes; YAML holds UTF-8 alone.
    classes = [name.encode("utf-8", "replace").decode("utf-8") for name in facts.classes]
    if classes and (len(classes) != number or (names and names != classes)):
        logger.warning("the %d classes and their names are those of %s", len(classes), facts.source)
        OmegaConf.update(config, "dataset.class_names", classes)
        OmegaConf.update(config, "model.generator.condition_num_classes", len(classes), force_add=True)
    if facts.labels is not None and np.any(facts.labels < 0):
        raise DataError(
            f"a generator learns classes, and {int(np.sum(facts.labels < 0)):,} of the {facts.num_images:,} images of "
            f"{facts.source} have none: {SUBFOLDERS}"
        )


def _of_folder(config: DictConfig) -> Facts:
    source = open_folder(config, "train")
    if config.dataset.params.get("eval_folder"):
        open_folder(config, "eval")  # so that a mistake is said early
    labels = np.array(source.class_ids or [-1] * len(source))
    return Facts(str(source.folder), len(source), list(source.classes), labels)


def _of_tokens(config: DictConfig, split: str = "train") -> Facts:
    token_set = TokenSet(token_folder(config, split))
    classes = list(token_set.manifest.get("classes", []))
    return Facts(f"the token set {token_set.folder}", len(token_set), classes, token_set.labels)


def _of_shards(config: DictConfig, split: str = "train") -> Facts:
    key = f"{split}_shards_path_or_url"
    shards = resolve_shards(config.dataset.params.get(key), f"dataset.params.{key}")
    num_images, num_classes = manifest_facts(shards)
    classes = (read_manifest(Path(shards[0]).parent) or {"classes": []})["classes"] if num_classes else []
    return Facts(f"the shards in {Path(shards[0]).parent}", num_images, list(classes))
