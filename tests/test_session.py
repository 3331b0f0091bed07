"""The session that all commands of evaluation share: its progress and its counts."""

import pytest
import torch

from utils.errors import UserError
from utils.evaluation import session as session_module
from utils.evaluation.comparison import Originals
from utils.evaluation.session import Session


@pytest.fixture
def session(tmp_path):
    with Session("cpu", tmp_path / "out") as session:
        yield session


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(session_module.time, "monotonic", lambda: now[0])
    return now


def test_long_work_says_once_after_the_first_seconds_how_long_it_will_take(session, clock, capsys):
    with session.progress(1000) as done:
        clock[0] = 1
        done(2)
        assert not capsys.readouterr().out
        for clock[0] in (6, 7, 8):
            done(4)
    assert capsys.readouterr().out == "1,000 images will take about 17 min; --num_images N takes fewer\n"


@pytest.mark.parametrize("total", [20, None])
def test_short_work_and_work_of_unknown_length_say_nothing(session, clock, capsys, total):
    with session.progress(total) as done:
        clock[0] = 6
        done(10)
    assert not capsys.readouterr().out


def test_the_images_seen_are_checked_and_recorded(session):
    checked = []
    originals = Originals(session.processes)
    with pytest.raises(UserError, match="no image to score"):
        session.counted(originals, lambda *counts: checked.append(counts), None)
    originals.add(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), list("abcd"))
    record = session.counted(originals, lambda *counts: checked.append(counts), 5, 1)
    assert checked == [(0, None, 0), (4, 5, 1)]
    assert (record["expected"], record["seen"], record["skipped"]) == (5, 4, 1)
