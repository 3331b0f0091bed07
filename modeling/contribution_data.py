"""The token contributions of many images: portions that several processes measure and a killed run keeps, one file."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from modeling.contribution import Measurement, contributions
from utils.evaluation.contribution_figures import DATA
from utils.evaluation.session import Session
from utils.files import write_arrays
from utils.parts import Parts, check_plan, read_state


class Images(Protocol):
    """What `data.evaluation_images.NumberedImages` is."""

    expected: int | None
    num_skipped: int

    def __len__(self) -> int: ...

    def batches(self, numbers: np.ndarray, batch_size: int) -> Iterator[tuple[list[str], Tensor]]: ...


class ContributionData:
    """The file DATA of a session's output folder on its way.

    Args:
        chosen: Numbers of the images to take, sorted.
        plan: Everything that the result depends on, `mode` and `save_every` (images of a portion) among it.
    """

    def __init__(self, images: Images, chosen: np.ndarray, plan: Mapping[str, Any], session: Session):
        self.images, self.chosen, self.plan, self.session = images, chosen, plan, session
        self.path = session.output_dir / DATA

    def is_there(self) -> bool:
        """Whether the file is; one of another plan is an error."""
        if not self.path.is_file():
            return False
        check_plan(read_state(self.path, plan_in), dict(self.plan), self.session.output_dir)
        return True

    def how_long(self, measurement: Measurement, num_tried: int) -> str:
        """Do some images, and tell how long all of them would take."""
        some, num_processes = self.chosen[:num_tried], self.session.processes.world_size
        self._start(measurement, some)
        measurement.sums(self.images.batches(some[:1], measurement.num_images))  # the first one is slow
        start = time.monotonic()
        tried = int(measurement.sums(self.images.batches(some, measurement.num_images))["count"])
        seconds = (time.monotonic() - start) / tried
        return (
            f"{tried} images done, {seconds:.3g} s each; {len(self.chosen):,} on {num_processes} processes would take "
            f"{seconds * len(self.chosen) / num_processes / 60:,.1f} min; nothing was written"
        )

    def write(self, measurement: Measurement, facts: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """Measure what is missing and write the file: its arrays, on the first process.

        Args:
            facts: Further ones for the protocol.
        """
        self._start(measurement, self.chosen)
        parts, result = self._parts(measurement), None
        if self.session.processes.is_main:
            result = contributions(parts.total())
            record = self._record(int(result["count"]), facts)
            write_arrays(self.path, **result, protocol=np.array(json.dumps(record)))
            parts.remove()
        self.session.processes.wait()
        return result

    def _start(self, measurement: Measurement, some: np.ndarray) -> None:
        """What prefixes are measured from is the mean over all processes' images."""
        if measurement.mode == "prefix":
            processes = self.session.processes
            mine = some[processes.rank :: processes.world_size]
            counts = measurement.count_first_codes(self.images.batches(mine, measurement.num_images))
            measurement.start_from(processes.add_up(counts.cpu()))

    def _parts(self, measurement: Measurement) -> Parts:
        """The sums of all portions of the images, those that an earlier run has left included."""
        size, processes = self.plan["save_every"], self.session.processes
        portions = [self.chosen[first : first + size] for first in range(0, len(self.chosen), size)]
        parts = Parts(self.session.output_dir, dict(self.plan), len(portions), processes)
        todo = list(parts.mine())
        with self.session.progress(sum(len(portions[part]) for part in todo) * processes.world_size) as done:
            for part in todo:
                batches = self.images.batches(portions[part], measurement.num_images)
                parts.write(part, **measurement.sums(batches, done))
        processes.wait()
        return parts

    def _record(self, seen: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        images = self.images
        originals = {"expected": images.expected, "there": len(images), "chosen": len(self.chosen), "seen": seen}
        is_replaced = self.plan["mode"] == "replace"
        record = self.session.record(
            plan=self.plan,
            originals=originals | {"damaged_shards": images.num_skipped},
            **facts,
            change="replaced by a random other code" if is_replaced else "added to the tokens before it",
            unit="pixels in [0, 1]; absolute and squared change, summed over colour channels, mean over images",
        )
        # Rounding to 8 bits would make the small changes of late tokens nothing.
        return record | {"rounding": "none: images are clamped to [0, 1] before they are compared"}


def plan_in(path: Path) -> dict[str, Any]:
    """The plan of a finished file."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["protocol"]))["plan"]
