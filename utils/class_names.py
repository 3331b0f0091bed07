"""Classes as people name them: numbers and names on a command line, and in the names of files."""

import re
from collections.abc import Sequence

from utils.errors import UserError

DEFAULT_CLASSES = 10  # shown where none are asked for, evenly spread over all


def parse_labels(texts: Sequence[str] | None, names: Sequence[str], flag: str = "--labels") -> list[int]:
    """Class ids of numbers and names ("Ankle boot"; case does not matter), each once, in the order given.

    Where classes are called by numbers, such as 2 or 10, a number that is a name means the class of that name.

    Args:
        names: Of all classes.
        flag: Where they were given.
    """
    if texts is None:
        count = min(DEFAULT_CLASSES, len(names))
        return [index * len(names) // count for index in range(count)]
    exact = {name: label for label, name in enumerate(names)}
    by_name = {name.casefold(): label for name, label in exact.items()} | exact
    labels = []
    for text in texts:
        label = by_name.get(text, by_name.get(text.casefold()))
        if label is None and text.isdecimal():
            label = int(text)
        if label is None or label >= len(names):
            numbers_only = list(names) == [str(number) for number in range(len(names))]
            known = "" if numbers_only else f" or one of {', '.join(names)}"
            raise UserError(f"{flag} takes a class, a number in 0..{len(names) - 1}{known}, got {text!r}")
        labels.append(label)
    return list(dict.fromkeys(labels))


def file_stem(label: int, names: Sequence[str]) -> str:
    """ "0_t-shirt-top", or the number alone where the class has no name."""
    number = f"{label:0{len(str(len(names) - 1))}d}"
    name = re.sub(r"[^a-z0-9]+", "-", names[label].casefold()).strip("-")
    return number if names[label] == str(label) or not name else f"{number}_{name}"
