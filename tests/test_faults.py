"""Injected faults, malicious files and random damage end as tests/faults.py says; docs/reliability.md shows how."""

import re

import pytest

from tests.faults import FAULTS, FUZZED, MARK, NUM_FLIPS, PAGE, flip, outcome

CASES = [
    pytest.param(fault, id=f"{kind}: {fault.name}", marks=[pytest.mark.long] * fault.is_long)
    for kind, faults in FAULTS.items()
    for fault in faults
]


@pytest.mark.parametrize("fault", CASES)
def test_a_fault_ends_as_designed(fault, tmp_path):
    assert re.search(fault.ends, outcome(fault.inject, tmp_path))


@pytest.mark.parametrize("name", FUZZED)
def test_random_damage_is_one_sentence_or_changes_nothing(name, tmp_path):
    assert flip(name, tmp_path, num_flips=12)["error"] > 0


@pytest.mark.long
@pytest.mark.parametrize("name", FUZZED)
def test_much_random_damage_is_one_sentence_or_changes_nothing(name, tmp_path):
    assert flip(name, tmp_path, NUM_FLIPS, seed=1)["error"] > 0


def test_the_page_shows_every_fault():
    _, _, tables = PAGE.read_text(encoding="utf-8").partition(MARK)
    shown = re.findall(r"^\| (.*?) \| ", tables, re.MULTILINE)
    expected = [text for faults in FAULTS.values() for text in ("fault", *(fault.name for fault in faults))]
    assert shown == [*expected, "file", *FUZZED]
