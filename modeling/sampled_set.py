"""Many sampled images of every class: parts that several processes make and a killed run keeps, then one archive."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from modeling.generators import sample
from modeling.maskgit import MaskGIT
from modeling.samplers.settings import SamplerSettings
from modeling.titok import TiTok
from utils.errors import UserError
from utils.files import read_json, write_json
from utils.images import to_array, write_archive, write_image
from utils.inference import choose_batch_size
from utils.parts import Parts, check_plan, read_state
from utils.processes import Processes
from utils.sampling_record import sampling_record

IMAGES_PER_PART = 256  # what a kill may cost each process
DONE, NPZ, PNG = "samples.json", "samples.npz", "png"


class SampledSet:
    """The images of a plan in a folder: image i is of class i % num_classes.

    Args:
        plan: Everything that the images depend on, and what of them is written (`npz`, `png`).
    """

    def __init__(self, folder: Path, plan: dict[str, Any]):
        self.folder, self.plan = folder, plan
        self.num_images: int = plan["num_images"]

    def is_done(self) -> bool:
        """Whether these images are there; those of another plan, or some that are missing, are an error."""
        if not (self.folder / DONE).is_file():
            return False
        check_plan(read_state(self.folder / DONE, plan_in), self.plan, self.folder)
        if missing := next((path for path in self._promised() if not path.is_file()), None):
            raise UserError(
                f"{self.folder / DONE} says that {missing} is there, and it is not: delete that folder, or give "
                "another --output_dir"
            )
        return True

    def _promised(self) -> Iterator[Path]:
        """The files that hold the images."""
        if self.plan["npz"]:
            yield self.folder / NPZ
        if self.plan["png"]:
            for index in range(self.num_images):
                yield self.folder / PNG / png_name(index, index % self.plan["num_classes"])

    def make(
        self,
        generator: MaskGIT,
        tokenizer: TiTok,
        drawing: Mapping[str, Any],
        batch_size: int | str,
        processes: Processes,
    ) -> Parts:
        """Sample what is missing; all processes call this together.

        Args:
            drawing: Further arguments of `sample`.
            batch_size: As `choose_batch_size` takes it.
        """

        def try_batch(num: int) -> None:
            list(sample(generator, tokenizer, [(0, number) for number in range(num)], batch_size=num, **drawing))

        num_parts = -(-self.num_images // IMAGES_PER_PART)
        parts = Parts(self.folder, self.plan, num_parts, processes, [NPZ, DONE, PNG])
        shares = {part: range(self.num_images)[part * IMAGES_PER_PART :][:IMAGES_PER_PART] for part in parts.mine()}
        most = min(self.num_images, IMAGES_PER_PART)
        drawing = {**drawing, "batch_size": choose_batch_size(batch_size, try_batch, processes.device, most)}
        pngs = self.folder / PNG if self.plan["png"] else None
        total = sum(map(len, shares.values()))
        with tqdm(total=total, unit="image", mininterval=1.0, disable=not processes.is_main) as progress:
            for part, indices in shares.items():
                parts.write(part, images=sample_part(generator, tokenizer, indices, drawing, pngs, progress))
        processes.wait()
        return parts

    def finish(self, parts: Parts, generator: str) -> list[str]:
        """On one process: put the parts together, as far as the plan says so; what was written where.

        Args:
            generator: Where it was found.
        """
        size, written = self.plan["image_size"], []
        if self.plan["npz"]:
            labels = np.arange(self.num_images, dtype=np.int64) % self.plan["num_classes"]
            shape = (self.num_images, size, size, 3)
            about = {name: self.plan[name] for name in ("seed", "passes", "sampler", "generator", "tokenizer")}
            write_archive(self.folder / NPZ, (part["images"] for part in parts.read()), shape, labels, about)
            written.append(f"{self.folder / NPZ}: arr_0 {shape} uint8, arr_1 labels")
        if self.plan["png"]:
            written.append(str(self.folder / PNG))
        write_json(self.folder / DONE, {"generator": generator, "plan": self.plan})
        parts.remove()
        return written


def plan_in(path: Path) -> dict[str, Any]:
    """The plan of finished images; older files leave out the settings that have their defaults."""
    plan = read_json(path)["plan"]
    return plan | sampling_record(SamplerSettings(**plan["sampler"]), plan["seed"])


def png_name(index: int, label: int) -> str:
    return f"{index:06d}_{label:03d}.png"


def sample_part(
    generator: MaskGIT,
    tokenizer: TiTok,
    indices: Sequence[int],
    drawing: Mapping[str, Any],
    pngs: Path | None,
    progress: tqdm,
) -> np.ndarray:
    """(n, P, P, 3) uint8 of the images with these numbers.

    Args:
        drawing: Keyword arguments of `sample`.
        pngs: Folder for each as NUMBER_CLASS.png; None for no files.
    """
    wanted = [(index % generator.num_classes, index // generator.num_classes) for index in indices]
    arrays = []
    for _, pixels in sample(generator, tokenizer, wanted, **drawing):
        arrays.append(to_array(pixels))
        progress.update(len(pixels))
    images = np.concatenate(arrays)
    if pngs is not None:
        for index, (label, _), image in zip(indices, wanted, images, strict=True):
            write_image(Image.fromarray(image), pngs / png_name(index, label))
    return images
