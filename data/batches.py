"""What all loaders share: batches, broken samples and their count, seeds."""

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from data import DataError

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
NO_LABEL = -1
NUM_LOGGED = 10  # broken samples that are logged one by one
# The share of broken samples is judged as of this many: one of the first ten says little.
NUM_JUDGED = 1000


class Example(NamedTuple):
    """One image as a model sees it: (3, P, P) uint8, its class (-1 without one) and its key."""

    image: torch.Tensor
    class_id: int
    key: str


class Fault(NamedTuple):
    """One sample or shard that could not be used."""

    reason: str
    shard: str
    key: str | None  # None: the shard itself
    detail: str

    def __str__(self) -> str:
        where = self.shard if self.key is None else f"{self.shard}, sample {self.key!r}"
        return f"{self.reason}: {where}: {self.detail}"


class SampleError(Exception):
    """A sample that cannot be used: `reason` is what is counted, `detail` what is shown."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class FaultLog:
    """Faults on their way to the main process; in strict mode the first one is an error."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.faults: list[Fault] = []

    def add(self, fault: Fault) -> None:
        if self.strict:
            raise DataError(
                f"{fault}; evaluation needs every sample: repair the data, or set dataset.params.eval_skip_broken=true "
                "to go on and count"
            )
        self.faults.append(fault)

    def take(self) -> list[Fault]:
        taken, self.faults = self.faults, []
        return taken


def collate(examples: Sequence[Example], faults: FaultLog) -> Batch:
    """A batch of examples, with the faults met since the last one."""
    return {
        "image": torch.stack([example.image for example in examples]),
        "class_id": torch.tensor([example.class_id for example in examples], dtype=torch.int64),
        "__key__": [example.key for example in examples],
        "__faults__": faults.take(),
    }


def faults_only(faults: FaultLog) -> Batch:
    return {"__faults__": faults.take()}


def failure(error: DataError) -> Batch:
    """A worker's error as a message: raised in a worker, it would arrive as a page of traceback."""
    return {"__error__": str(error)}


def seeded(*parts: int | str) -> random.Random:
    """A source of chance that depends on `parts` alone, the same in every process and on every machine."""
    text = ":".join(map(str, parts))
    return random.Random(text.encode("utf-8", "surrogateescape"))  # a part may be a file's name, of any bytes


class Loader:
    """Batches for one rank, and the count of what could not be used.

    A batch is a dict: `image` (B, 3, P, P) uint8, `class_id` (B,) int64, -1 where there is no label, `__key__` B names.

    Attributes:
        num_seen: Samples given out since iteration began.
        num_bad: Samples and shards that could not be used, since iteration began.
        bad_reasons: The same by reason.
        expected: Samples in the whole set, all ranks together; None where unknown.
        preparation: What is done to the images of an evaluation, for its record.

    Args:
        loader: Gives batches as `collate` makes them.
        max_bad_fraction: A larger share of broken samples, of a thousand at least, is an error; None allows any.
    """

    def __init__(
        self,
        loader: DataLoader,
        *,
        max_bad_fraction: float | None = None,
        expected: int | None = None,
        preparation: str = "",
    ):
        self.loader = loader
        self.max_bad_fraction = max_bad_fraction
        self.expected = expected
        self.preparation = preparation
        self._start_counting()

    def _start_counting(self) -> None:
        self.num_seen = 0
        self.bad_reasons: Counter[str] = Counter()

    @property
    def num_bad(self) -> int:
        return self.bad_reasons.total()

    def __iter__(self) -> Iterator[Batch]:
        """Give out batches.

        Raises:
            DataError: Too many broken samples, or in evaluation any.
        """
        self._start_counting()
        for batch in self._received():
            for fault in batch.pop("__faults__"):
                self._count(fault)
            if "image" in batch:
                self.num_seen += len(batch["__key__"])
                yield batch

    def _received(self) -> Iterator[Batch]:
        """What the workers send; an error or the death of one is raised here."""
        try:
            for batch in self.loader:
                if "__error__" in batch:
                    raise DataError(batch["__error__"])
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a process that reads data was killed ({str(error).splitlines()[0]}): if memory ran out, lower "
                "dataset.params.num_workers_per_gpu or dataset.params.shuffle_buffer_size"
            ) from error

    def _count(self, fault: Fault) -> None:
        self.bad_reasons[fault.reason] += 1
        if self.num_bad <= NUM_LOGGED:
            logger.warning("skipped %s%s", fault, " (more will only be counted)" if self.num_bad == NUM_LOGGED else "")
        tried = self.num_seen + self.num_bad
        if self.max_bad_fraction is not None and self.num_bad > self.max_bad_fraction * max(tried, NUM_JUDGED):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.bad_reasons.most_common())
            raise DataError(
                f"{self.num_bad} of the first {tried} samples cannot be used ({reasons}), more than "
                f"dataset.max_bad_fraction={self.max_bad_fraction} allows; the last one was {fault}: repair the data, "
                "or allow more"
            )


def check_count(seen: int, expected: int | None, num_bad: int = 0) -> None:
    """Compare the number of evaluated samples (all ranks together) with the expected one.

    Args:
        seen: Samples that were evaluated.
        expected: Samples that there are; None compares nothing.
        num_bad: Samples and shards that were skipped by permission; then fewer than expected are fine.

    Raises:
        DataError: The numbers differ.
    """
    if expected is None or seen == expected or (num_bad and seen < expected):
        return
    raise DataError(
        f"expected {expected} evaluation samples, got {seen}: shards are missing, incomplete or read twice; check "
        "dataset.params.eval_shards_path_or_url and num_eval_examples"
    )
