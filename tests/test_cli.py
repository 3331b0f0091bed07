"""What every command does with its arguments, before it does anything else."""

import argparse
import ast
import errno
import importlib
import io
import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest

from tests.evaluation_data import command
from utils.cli import Parser, checked, run
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
            OSError(errno.EROFS, "Read-only", "/disk/x.npz"),
            "/disk/x.npz could not be written or read (Read-only): make it",
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


OTHER_KINDS = {
    "evaluate_baselines": "--config={}",
    "evaluate_image_formats": "--config={} --budgets=16",
    "evaluate_reconstruction": "--config={} --features=none",
    "export_onnx": "--config={} --output_dir=o",
    "generate_token_contribution_data": "--config={}",
    "inference_generator": "--config={} --output_dir=o",
    "inference_tokenizer": "--config={} --output_dir=o --image=%s" % (ROOT / "assets/fashion/bag.png"),
    "pretokenize": "--config={} --output_dir=o",
    "reconstruct_tokenizer": "--config={} --output_dir=o",
    "sample_imagenet": "--config={} --num_images=1 --output_dir=o",
    "train_generator": "config={}",
    "train_teacher": "config={}",
    "train_tokenizer": "config={}",
}


@pytest.mark.parametrize("file", ["models/one-d-piece_fashion", "ablations/fashion_tail_drop"])
@pytest.mark.parametrize("script", OTHER_KINDS)
def test_a_configuration_of_another_kind_is_one_sentence(monkeypatch, capsys, tmp_path, script, file):
    monkeypatch.chdir(tmp_path)
    words = OTHER_KINDS[script].format(ROOT / f"configs/{file}.yaml").split()
    main = importlib.import_module(f"scripts.{script}").main
    status, _, said = command(monkeypatch, capsys, main, *words)
    assert status == 1 and said.startswith("error: ") and said.count("\n") == 1, said
    assert "give one of a whole model or run" in said or "has no" in said
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_keys_that_no_configuration_is_asked_for_keep_their_traceback(monkeypatch, capsys):
    for error in (AttributeError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            command(monkeypatch, capsys, fail(error))


PIPED = """
import sys
from utils.cli import run

def main():
    for number in range({}):
        print(number, file=sys.stdout)
    {}

run(main)
"""


@pytest.mark.parametrize("end", ["", "sys.exit(1)"])
@pytest.mark.parametrize("count", [3, 100_000])
@pytest.mark.skipif(os.name != "posix", reason="pipes end so on POSIX")
def test_a_command_ends_quietly_where_its_reader_has_seen_enough(count, end):
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-c", PIPED.format(count, end)]
    ended = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_pipe_that_is_not_the_output_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(BrokenPipeError):
        command(monkeypatch, capsys, fail(BrokenPipeError(errno.EPIPE, "Broken pipe")))


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


@pytest.mark.parametrize(
    "word",
    ["$HOMEX/x", "a/${HOMEX}/x", "--output_dir=$HOMEX", "--output_dir=${HOMEX}", "experiment.output_dir=$HOMEX/x"],
)
def test_a_variable_that_no_shell_has_replaced_is_an_error(word):
    with pytest.raises(UserError, match=r"holds \$\{?HOMEX\}?, which the shell has left as it is: write the path"):
        checked([word])


@pytest.mark.parametrize("word", ["a.b=x/${size}", "a.b=${c.d}", "{000..002}.tar", "5$", "$5", "a$ b"])
def test_what_holds_no_shell_variable_stays(word):
    assert checked([word]) == [word]


def test_a_file_may_be_called_like_a_variable(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in$cash.png").touch()
    assert checked(["in$cash.png"]) == ["in$cash.png"]


def test_a_run_starts_in_no_folder_called_like_a_variable():
    with pytest.raises(ConfigError, match=r"experiment.output_dir holds \$UNSET, and no shell reads it here"):
        load_config(STAGE1, ["experiment.output_dir=$UNSET/run"])


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


# Flags


def parser():
    parser = Parser("What it does.")
    parser.prog = "command.py"
    parser.add_argument("--image", required=True)
    parser.add_argument("--output_dir")
    parser.add_argument("--num_images", type=int)
    parser.add_argument("overrides", nargs="*")
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--imges", "x.png"], "there is no --imges; did you mean --image?"),
        (["--image=x.png", "--output-dir=out"], "there is no --output-dir; did you mean --output_dir?"),
        (["--image", "x.png", "-output_dir", "out"], "there is no -output_dir; did you mean --output_dir?"),
        (["--image", "x.png", "--zzz"], "there is no --zzz"),
        (["--num_images", "3"], "the following arguments are required: --image"),
        (["--image", "x.png", "--num_images", "many"], "argument --num_images: invalid int value: 'many'"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_with_what_was_probably_meant(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message} (command.py --help lists the flags)\n"


def test_flags_may_be_shortened_and_values_may_be_negative(capsys):
    found = parser().parse_args(["--im", "x.png", "--num_images", "-1", "a.b=c"])
    assert (found.image, found.num_images, found.overrides) == ("x.png", -1, ["a.b=c"])


COMMANDS = [
    path
    for folder in ("scripts", "data")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_every_command_takes_our_packages_first_and_the_parser_of_all_before_anything_slow(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports[:2] == ["import sys", "from pathlib import Path"] and imports[2].startswith("from utils.cli import ")
    assert text.index("sys.path.insert(0, str(Path(__file__).resolve().parents[1]))") < text.index("from utils.cli")
    names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert argparse.ArgumentParser.__name__ not in names


def test_ctrl_c_during_the_imports_is_one_word(tmp_path):
    for name in ("torch", "numpy", "omegaconf"):
        stub = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
        (tmp_path / f"{name}.py").write_text(stub)
    for path in COMMANDS[::5]:
        command = [sys.executable, path, "--help"]
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs do not
        options = {"capture_output": True, "text": True, "timeout": 600, "preexec_fn": heard}
        result = subprocess.run(command, env=environment, **options)
        assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "interrupted\n"), path


# What a terminal shows

FOLDER = "dataset.type=folder dataset.params.train_folder={assets}/fashion dataset.params.eval_folder={assets}/fashion"
CONFIGURED = f"--config {{configs}}/fashion/eval.yaml --output_dir {{out}} {FOLDER}"
SHOWN = {
    "scripts.compress": "{assets}/fashion --output {out}",
    "scripts.evaluate_codec": f"--psnr_only --checkpoint one-d-piece_fashion {CONFIGURED}",
    "scripts.evaluate_reconstruction": f"--features none --lengths 1 {CONFIGURED}",
    "scripts.generate_token_contribution_data": f"--num_images 2 {CONFIGURED}",
    "scripts.inference_generator": "--labels 0 --output_dir {out}",
    "scripts.inference_tokenizer": "--image {assets}/fashion --output_dir {out}",
    "scripts.pretokenize": f"--checkpoint one-d-piece_fashion {CONFIGURED}",
    "scripts.reconstruct_tokenizer": f"--tokens {CONFIGURED}",
    "scripts.sample_imagenet": "--checkpoint maskgit_fashion --num_images 4 --output_dir {out}",
    "data.make_shards": "--source {assets}/fashion --output_dir {out} --num_workers 0",
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("name", SHOWN)
def test_a_bar_has_a_total_and_the_last_words_say_where_the_results_are(monkeypatch, capsys, tmp_path, name):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    places = {"assets": ROOT / "assets", "configs": ROOT / "configs", "out": tmp_path / "out"}
    words = SHOWN[name].format(**places).split()
    status, printed, _ = command(monkeypatch, capsys, importlib.import_module(name).main, *words)
    said = terminal.getvalue()
    assert status == 0, said
    assert re.search(r"\| \d+/[1-9]\d* \[\d+:\d+<", said), said
    assert str(tmp_path / "out") in "".join((said + printed).splitlines()[-3:]), printed


def test_a_python_without_the_libraries_is_told_in_one_sentence():
    command = [sys.executable, "-S", "scripts/inspect_compressed.py", "none.1dp"]  # as outside of its environment
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.search(r"error: \w+ is not installed for .*: activate the environment", done.stderr)
