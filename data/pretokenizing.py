"""One split of a data set, tokenized part by part into a token set, by a tokenizer that is a function here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from data.batches import FaultLog
from data.catalogue import Catalogue, CentreCrop, Part, Variants, check_skipped, decoded
from data.token_sets import FILES, token_dtype, write_token_set
from utils.parts import SOURCE, Parts
from utils.processes import Processes


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as a token set sees it.

    Attributes:
        encode: Images (B, 3, P, P) uint8 on the CPU to tokens (B, N).
        image_size: Side P.
        record: What the manifest says of it: its checkpoint and its identity.
    """

    encode: Callable[[Tensor], Tensor]
    image_size: int
    codebook_size: int
    num_tokens: int
    record: dict[str, str]


class Split:
    """The images of one split in all their variants, and what its token set depends on.

    Args:
        name: "train" or "eval".
        num_crops: Random crops of a training image, beside the centre one.

    Attributes:
        has_no_classes: The images lie in a folder without subfolders.
        plan: Everything that the tokens depend on, for `utils.parts.Parts`.
    """

    def __init__(self, config: DictConfig, name: str, num_crops: int, encoder: Encoder):
        preprocessing, seed = config.dataset.preprocessing, config.training.seed
        self.config, self.name, self.encoder = config, name, encoder
        is_train = name == "train"
        transform = Variants(preprocessing, num_crops, seed) if is_train else CentreCrop(preprocessing)
        self.variants = transform.names
        self.source = Catalogue(config, name, transform)
        self.has_no_classes = self.source.folder is not None and not self.source.classes
        self.strict = not is_train and not config.dataset.params.get("eval_skip_broken", False)
        self.plan = {
            "split": name,
            SOURCE: self.source.fingerprint(),
            "parts": [part.name for part in self.source.parts],
            "variants": self.variants,
            "resize_shorter_edge": preprocessing.resize_shorter_edge if is_train else preprocessing.crop_size,
            "crop_size": preprocessing.crop_size,
            "seed": seed,
            "identity": encoder.record["identity"],
        }
        if self.source.folder is not None:  # shards keep the plan of the sets that are there
            self.plan["decoding"] = self.source.decoding

    def try_batch(self, num_images: int) -> None:
        """Encode so many images, black ones, with all their variants."""
        size = self.encoder.image_size
        self.encoder.encode(torch.zeros(num_images * len(self.variants), 3, size, size, dtype=torch.uint8))

    def parts(self, folder: Path, batch_size: int, processes: Processes) -> Parts:
        """All parts, tokenized; those that an earlier run has left in `folder` are taken as they are."""
        parts = Parts(folder, self.plan, len(self.source.parts), processes, FILES)
        todo = list(parts.mine())
        sizes = [self.source.parts[index].num_images for index in todo]
        total = None if None in sizes else sum(sizes)
        options = {"unit": "image", "mininterval": 1.0, "dynamic_ncols": True, "disable": not processes.is_main}
        with tqdm(desc=self.name, total=total, **options) as progress:
            for number, index in enumerate(todo, start=1):
                progress.set_postfix_str(f"part {number} of this process's {len(todo)}")
                parts.write(index, **self.tokenize(self.source.parts[index], batch_size, progress))
        processes.wait()
        return parts

    def tokenize(self, part: Part, batch_size: int, progress: tqdm) -> dict[str, np.ndarray]:
        """Tokens (n, variants, N), labels (n,), keys (n,) and what was skipped, of one part."""
        faults = FaultLog(strict=self.strict)
        num_threads = self.config.dataset.params.num_workers_per_gpu
        dtype = token_dtype(self.encoder.codebook_size)
        tokens = [np.zeros((0, part.num_variants, self.encoder.num_tokens), dtype)]
        labels, keys = [], []
        for examples in decoded(part, batch_size=batch_size, num_threads=num_threads, faults=faults):
            images = torch.stack([example.image for example in examples])  # (B, variants, 3, P, P) uint8
            codes = self.encoder.encode(images.flatten(0, 1))
            tokens.append(codes.unflatten(0, images.shape[:2]).cpu().numpy().astype(dtype))
            labels += [example.class_id for example in examples]
            keys += [example.key for example in examples]
            progress.update(len(examples))
        return {
            "tokens": np.concatenate(tokens),
            "labels": np.array(labels, dtype=np.int64),
            "keys": np.array(keys, dtype=np.str_),
            "skipped": np.array([str(fault) for fault in faults.take()], dtype=np.str_),
        }

    def write(self, folder: Path, parts: Parts) -> Mapping[str, Any]:
        """Put the parts together as the token set `folder`; returns its manifest."""
        skipped = [fault for part in parts.read() for fault in part["skipped"].tolist()]
        num_images = sum(len(part["labels"]) for part in parts.read())
        check_skipped(num_images, skipped, self.config.dataset.max_bad_fraction)
        manifest = {
            "tokenizer": self.encoder.record,
            "codebook_size": self.encoder.codebook_size,
            "num_tokens": self.encoder.num_tokens,
            "variants": self.variants,
            "classes": self.source.classes,
            "skipped": skipped,
            "plan": self.plan,
        }
        return write_token_set(folder, parts.read, manifest)
