"""Labels that training by class needs: every image one, and each a class of the model."""

from collections.abc import Iterable, Iterator

from data import DataError
from data.batches import Batch

SUBFOLDERS = "put the images of each class into a subfolder of its name"


class Labelled:
    """Batches whose labels are looked at on the host, before an accelerator would have to be waited for.

    Attributes:
        num_bad, expected: The loader's.
    """

    def __init__(self, batches: Iterable[Batch], num_classes: int):
        self.batches, self.num_classes = batches, num_classes

    @property
    def num_bad(self) -> int:
        return self.batches.num_bad

    @property
    def expected(self) -> int | None:
        return self.batches.expected

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches on.

        Raises:
            DataError: An image has no label (-1), or one beyond the generator's classes.
        """
        for batch in self.batches:
            for key, label in zip(batch["__key__"], batch["class_id"].tolist(), strict=True):
                if not 0 <= label < self.num_classes:
                    got = "none" if label < 0 else label
                    raise DataError(
                        f"sample {key} must have a label in 0..{self.num_classes - 1}, got {got}: a generator learns "
                        f"classes; {SUBFOLDERS}, or correct the labels or model.generator.condition_num_classes"
                    )
            yield batch
