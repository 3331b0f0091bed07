"""A generator's images, sampled and decoded from some numbers of their tokens, scored against a reference set."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modeling.checkpoints.locate import Located
from modeling.generators import sample_prefixes
from modeling.maskgit import MaskGIT
from modeling.titok import TiTok
from utils.errors import UserError
from utils.evaluation.feature_set import FeatureNetwork
from utils.evaluation.generation import Reference, score, versions_seen_by
from utils.evaluation.metrics import to_uint8
from utils.evaluation.session import Session
from utils.files import sha256_of
from utils.inference import Arithmetic


@dataclass(frozen=True)
class Source:
    """A generator with its tokenizer, and how they compute."""

    generator: MaskGIT
    tokenizer: TiTok
    generator_located: Located
    tokenizer_located: Located
    arithmetic: Arithmetic

    def record(self) -> dict[str, Any]:
        """For the protocol."""
        return {
            "generator": self.generator_located.name,
            "generator_sha256": sha256_of(self.generator_located.weights),
            "tokenizer": self.tokenizer_located.name,
            "tokenizer_sha256": sha256_of(self.tokenizer_located.weights),
        }

    def images(
        self, lengths: Sequence[int], count: int, session: Session, drawing: Mapping[str, Any]
    ) -> Iterator[tuple[list[str], dict[int, Tensor]]]:
        """This process's share of `count` images, the classes in turn: keys, and 8-bit images by number of tokens.

        Args:
            drawing: Further arguments of `sample`.
        """
        mine = range(session.processes.rank, count, session.processes.world_size)
        classes = self.generator.num_classes
        wanted = [(index % classes, index // classes) for index in mine]
        drawing = {"arithmetic": self.arithmetic, **drawing}
        done = 0
        for versions in sample_prefixes(self.generator, self.tokenizer, wanted, lengths, **drawing):
            images = {length: to_uint8(pixels) for length, pixels in versions.items()}
            indices = mine[done : done + len(images[lengths[0]])]
            done += len(indices)
            yield [f"{index:08d}" for index in indices], images


@dataclass(frozen=True)
class GenerationScores:
    """Scores `count` images of a source against a reference, as `network` sees both."""

    source: Source
    lengths: Sequence[int]
    count: int
    network: FeatureNetwork
    reference: Reference
    session: Session

    def of(self, drawing: Mapping[str, Any], what: str) -> dict[int, dict[str, float]]:
        """The measures by number of tokens; every process calls this together.

        Args:
            drawing: The arguments of `sample` that say how.
            what: What is sampled, for the bar.
        """
        batches = self.source.images(self.lengths, self.count, self.session, drawing)
        found = versions_seen_by(self.network, batches, self.lengths, self.count, self.session, what)
        scores = {}
        for length, seen in found.items():
            if seen.count() != self.count:
                raise UserError(f"expected {self.count} sampled images, got {seen.count()}")
            scores[length] = score(seen, self.reference, self.session.processes)
        return scores
