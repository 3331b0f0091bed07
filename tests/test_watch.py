"""scripts/watch.py: what it says of a run, from the run's own files."""

import json
import os
import signal

import pytest
from omegaconf import OmegaConf
from PIL import Image

from scripts.watch import CLEAR, main
from tests.generator_data import call
from utils.errors import UserError
from utils.training.progress import duration, read_metrics, summary

TRAINING = {
    "loss/model": 3.21,
    "loss/discriminator": None,
    "grad_norm/model": 0.5,
    "images_per_second": 1234.5,
    "data_time_share": 0.07,
    "eta_hours": 1.1,
    "bad_samples": 1042,
}
EVALUATION = {"eval/psnr@1": 12.5, "eval/psnr@8": 20.0, "eval/images": 500, "eval/bad": 0, "eval/seconds": 3.0}


@pytest.fixture
def folder(tmp_path):
    """A run after 80 of 200 steps that is writing its next line; its files are of second 1,000,000."""
    lines = [{"step": 40} | TRAINING, {"step": 40} | EVALUATION, {"step": 80} | TRAINING]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 100, "lo')
    OmegaConf.save({"training": {"max_train_steps": 200}}, tmp_path / "config.yaml")
    (tmp_path / "checkpoint-60").mkdir()
    for path in tmp_path.iterdir():
        os.utime(path, (1e6, 1e6))
    return tmp_path


def test_the_rows_say_how_the_run_is_getting_on(folder):
    rows = summary(folder, read_metrics(folder), total=200, now=1e6 + 65)
    rows = {line[:14].strip(): line[15:] for line in rows.splitlines()}
    assert rows == {
        "run": str(folder),
        "step": "80 of 200 (40.0%), logged 1 min 5 s ago",
        "loss": "model 3.21, discriminator not a number",
        "gradient norm": "model 0.5",
        "speed": "1,234.5 images/s, 7% of the time waiting for data",
        "time left": "1 h 6 min",
        "bad samples": "1,042 since it was last started",
        "evaluation": "step 40: psnr@1 12.5, psnr@8 20, images 500",
        "checkpoint": "step 60, saved 1 min 5 s ago",
    }


def test_a_run_that_stopped_at_an_unsound_step_says_where_its_samples_are(folder):
    for step, told in ((77, "77, passed since: "), (104, "104: ")):  # the newest counts, and 104 is newer than 77
        path = folder / f"unsound_step-{step}.json"
        path.write_text("{}")
        rows = summary(folder, read_metrics(folder), total=200, now=1e6)
        assert rows.endswith(f"unsound step   {told}its losses and samples are in {path}")


def test_once_shows_and_draws_once(folder, monkeypatch, capsys, tmp_path):
    call(monkeypatch, main, folder, "--once", "--plot", tmp_path / "new/curves.png")
    assert capsys.readouterr().out.count("80 of 200") == 1
    with Image.open(tmp_path / "new/curves.png") as image:
        assert image.height > image.width / 2
    assert (tmp_path / "new/curves.pdf").exists()


def test_the_figures_have_the_whole_name_and_replace_nobody_elses(folder, monkeypatch, tmp_path):
    figures = tmp_path / "figures"
    for _ in range(2):
        call(monkeypatch, main, folder, "--once", "--plot", figures / "rate_1e-4.5")
    assert {path.name for path in figures.iterdir()} == {".results", "rate_1e-4.5.png", "rate_1e-4.5.pdf"}
    (figures / "mine.pdf").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds mine.pdf, and no .* has left it there: name another --plot, or"):
        call(monkeypatch, main, folder, "--once", "--plot", figures / "mine.png")
    assert (figures / "mine.pdf").read_bytes() == b"mine" and not (figures / "mine.png").exists()
    (figures / ".results").write_text("of another program\n")
    with pytest.raises(UserError, match=r"cannot be read .*: name another --plot, or move this one's files away"):
        call(monkeypatch, main, folder, "--once", "--plot", figures / "mine.png")
    with pytest.raises(UserError, match=r"--plot .*mine.pdf cannot be created"):
        call(monkeypatch, main, folder, "--once", "--plot", figures / "mine.pdf/curves.png")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_the_figures_of_a_watch_whose_terminal_was_closed_are_replaced(folder, monkeypatch, tmp_path, name):
    number = getattr(signal, name)
    before = signal.signal(number, lambda *_: pytest.fail("nobody hears it"))
    try:
        monkeypatch.setattr("time.sleep", lambda seconds: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit):
            call(monkeypatch, main, folder, "--plot", tmp_path / "figures/curves.png")
    finally:
        signal.signal(number, before)
    call(monkeypatch, main, folder, "--once", "--plot", tmp_path / "figures/curves.png")


def test_watching_follows_the_run_and_ends_with_it(folder, monkeypatch, capsys):
    def next_line(seconds):
        assert seconds == 0.5
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('ss/model": 3}\n' + json.dumps({"step": 200} | TRAINING) + "\n")

    monkeypatch.setattr("time.sleep", next_line)
    call(monkeypatch, main, folder, "--interval", "0.5")
    shown = capsys.readouterr().out
    assert "80 of 200" in shown and "200 of 200" in shown and "none, it is done" in shown
    assert CLEAR not in shown  # it is no terminal


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no metrics.jsonl: name the experiment.output_dir of a run"),
        ("", "is empty: a run logs for the first time after experiment.log_every steps"),
        ('{"step": 1, ', "is empty"),
        ('{"step": 1}\n[]\n', r"is damaged: line 2 is not what a run logs, but '\[\]'"),
    ],
)
def test_what_is_no_log_is_one_sentence(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="absent does not exist, so neither does its metrics.jsonl"):
        read_metrics(tmp_path / "absent")


def test_durations_have_two_units():
    assert [duration(seconds) for seconds in (0.4, 59, 3599, 3600, 90061)] == [
        "0 s",
        "59 s",
        "59 min 59 s",
        "1 h 0 min",
        "1 d 1 h",
    ]
