"""What every command does with its arguments, before it does anything else."""

import errno
import io
import sys

import pytest

from tests.evaluation_data import command
from utils.cli import checked, run
from utils.config import ConfigError, load_config
from utils.errors import UserError
from utils.paths import ROOT, expanded

STAGE1 = ROOT / "configs/fashion/stage1.yaml"


def fail(error):
    def main():
        raise error

    main.__module__ = "command"
    return main


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "No space left", "/full/x.npz"),
            "/full/x.npz could not be written or read (No space left): free space there",
        ),
        (
            OSError(errno.EROFS, "Read-only", "/disk/.x.part.npz"),
            "/disk could not be written or read (Read-only): make it",
        ),
        (
            OSError(errno.ENAMETOOLONG, "Too long"),
            "a file of the results could not be written or read (Too long): give a shorter name",
        ),
        (OSError("10 requested and 2 written"), "could not be written (10 requested and 2 written): is the disk full?"),
    ],
)
def test_what_a_disk_refuses_is_one_sentence(monkeypatch, capsys, error, sentence):
    status, _, said = command(monkeypatch, capsys, fail(error))
    assert status == 1 and said.startswith("error: ") and sentence in said and said.count("\n") == 1


def test_errors_of_files_that_are_faults_of_ours_keep_their_traceback(monkeypatch, capsys):
    with pytest.raises(FileNotFoundError):
        command(monkeypatch, capsys, fail(FileNotFoundError(errno.ENOENT, "No such file", "x")))


def test_text_that_a_terminal_cannot_print_does_not_end_a_command(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["command.py"])
    run(lambda: print("wrote pêche.png"))
    terminal.flush()
    assert terminal.buffer.getvalue() == b"wrote p\\xeache.png\n"


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


@pytest.mark.parametrize("word", ["{}/x", "--output_dir={}/x", "experiment.output_dir={}/x", "config={}/x.yaml", "{}"])
def test_a_home_folder_is_expanded_wherever_a_path_begins(home, word):
    assert checked([word.format("~")]) == [word.format(home)]


@pytest.mark.parametrize("word", ["a~/x", "--seed=1", "x=a~b", "titok", "{000..002}.tar"])
def test_what_begins_with_no_home_folder_stays(word):
    assert checked([word]) == [word]


def test_the_home_folder_of_nobody_is_an_error():
    with pytest.raises(UserError, match="~no-such-user/x names the home folder of a user who is not known"):
        expanded("~no-such-user/x")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--output_dir="], "--output_dir is empty"),
        (["--seed", "1", "--checkpoint", ""], "--checkpoint is empty"),
        (["image", ""], "an argument is empty"),
    ],
)
def test_an_empty_argument_is_an_error(words, what):
    with pytest.raises(UserError, match=what):
        checked(words)
    assert checked(["experiment.init_weight="]) == ["experiment.init_weight="]


def test_a_command_starts_in_no_empty_folder(monkeypatch, capsys):
    from scripts import export_model

    arguments = ("--checkpoint", "one-d-piece_fashion", "--output_dir", "")
    status, _, error = command(monkeypatch, capsys, export_model.main, *arguments)
    assert status == 1 and error.startswith("error: --output_dir is empty")


@pytest.mark.parametrize("value", ["", " ", "null"])
def test_a_run_starts_in_no_empty_folder(value):
    with pytest.raises(ConfigError, match="experiment.output_dir is empty"):
        load_config(STAGE1, [f"experiment.output_dir={value}"])


def test_a_configuration_writes_and_reads_in_the_home_folder(home, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"defaults: [{STAGE1}]\nexperiment:\n  output_dir: ~/runs\n")
    assert load_config("~/mine.yaml").experiment.output_dir == f"{home}/runs"
    assert load_config(STAGE1, ["experiment.init_weight=~/w"]).experiment.init_weight == f"{home}/w"
