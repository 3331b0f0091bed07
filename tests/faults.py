"""Faults for data and files, and how each must end. Also a program, which writes the tables of docs/reliability.md:

python3 -m tests.faults
"""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from codec.fitting import check_subject
from data import image_shards, loaders, shard_urls
from data.batches import check_count
from data.image_sets import open_images, paired, read_statistics
from data.loaders import evaluation_loader, training_loader
from data.shard_files import MANIFEST, read_manifest
from data.token_images import labels_of
from data.token_sets import KEYS, LABELS, TOKENS, TokenSet
from data.transforms import decode_image
from modeling.checkpoints.locate import locate_configured
from modeling.checkpoints.pretrained import Pretrained
from modeling.checkpoints.state import load_strict, read_state_dict
from modeling.generators import class_names
from modeling.maskgit import ImageBert
from modeling.one_d_piece import OneDPiece
from modeling.tasks.teacher import TeacherTask
from modeling.tasks.tokenizer import tokenizer_task
from tests.shard_data import (
    bomb,
    is_as_shown,
    lying_and_clear,
    make_config,
    make_shards,
    png,
    shard_spec,
    take,
    write_tar,
)
from tests.training_runs import job_config, make_images
from utils.checkpoint import METADATA_FILE, find_damage, latest_checkpoint, write_checkpoint
from utils.class_names import file_stem
from utils.cli import run as run_command
from utils.config import check_kind, load_config, save_config
from utils.errors import UserError
from utils.files import replacing
from utils.lock import FolderLock
from utils.paths import ROOT
from utils.processes import Processes
from utils.result_folder import ResultFolder
from utils.tokens import read_tokens
from utils.training import resume
from utils.training.loop import make_accelerator
from utils.training.run import Run

PAGE, MARK = ROOT / "docs/reliability.md", "<!-- what follows is written by python3 -m tests.faults -->\n"
PATIENCE = 300  # seconds until a fault counts as a hang
NUM_FLIPS = 200


class Fault(NamedTuple):
    """What is injected, how it must end, and the function that injects it into an empty folder.

    `ends` is a regular expression. The function returns what happened; a `UserError` is told as "stops: ...".
    """

    name: str
    ends: str
    inject: Callable[[Path], str]
    is_long: bool


FAULTS: dict[str, list[Fault]] = {
    kind: [] for kind in ("Training", "Evaluation", "Files from elsewhere", "Somebody's own files", "The Python API")
}


def fault(kind: str, name: str, ends: str, is_long: bool = False) -> Callable:
    def register(inject: Callable[[Path], str]) -> Callable:
        FAULTS[kind].append(Fault(name, ends, inject, is_long))
        return inject

    return register


in_training, in_evaluation, elsewhere, own_files, in_python = (functools.partial(fault, kind) for kind in FAULTS)


def outcome(inject: Callable[[Path], str], outside: Path) -> str:
    """How a fault ended. Whatever is neither a sentence nor a `UserError` passes through: it is a bug of ours.

    Raises:
        TimeoutError: It hangs.
        AssertionError: Code from a file has run, or something was written outside its folder.
    """

    def hang(number, frame):
        raise TimeoutError(f"no end within {PATIENCE} seconds")

    folder = outside / "outer/inner"
    folder.mkdir(parents=True)
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(PATIENCE)
    try:
        ended = inject(folder)
    except UserError as error:
        ended = f"stops: {error}"
    finally:
        signal.alarm(0)
    assert "\n" not in ended, ended
    assert [path.name for path in (*outside.iterdir(), *folder.parent.iterdir())] == ["outer", "inner"]
    assert not list(folder.rglob("ran")), "code from a file has run"
    return ended.replace(f"{folder}/", "").replace(str(folder), "FOLDER")


# Data that are damaged in the same way for training and for evaluation: (damage, reason), by name


@contextlib.contextmanager
def cut_shard(folder: Path) -> Iterator[str]:
    spec = two_shards(folder)
    shard = folder / "s-000001.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    yield spec


@contextlib.contextmanager
def flipped_header(folder: Path) -> Iterator[str]:
    spec = two_shards(folder)
    shard = folder / "s-000001.tar"
    with tarfile.open(shard) as tar:
        place = tar.getmembers()[20].offset
    data = bytearray(shard.read_bytes())
    data[place + 3] ^= 255
    shard.write_bytes(data)
    yield spec


@contextlib.contextmanager
def shard_that_vanishes(folder: Path) -> Iterator[str]:
    spec = two_shards(folder)
    found = shard_urls.resolve_shards(spec, "")
    with unittest.mock.patch.object(loaders, "resolve_shards", lambda spec, key: found):
        (folder / "s-000001.tar").unlink()
        yield spec


@contextlib.contextmanager
def server_that_stalls(folder: Path) -> Iterator[str]:
    two_shards(folder)
    over = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, output):
            if self.path == "/s-000000.tar":
                return super().copyfile(source, output)
            output.write(source.read(10_000))
            over.wait()

        def log_message(self, *_):
            pass

    def handler(*arguments):
        return Handler(*arguments, directory=str(folder))

    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        unittest.mock.patch.object(shard_urls, "TIMEOUT", 0.2),
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/s-{{000000..000001}}.tar"
        over.set()
        server.shutdown()


@contextlib.contextmanager
def command_that_stalls(folder: Path) -> Iterator[str]:
    two_shards(folder)
    with (
        unittest.mock.patch.object(shard_urls, "TIMEOUT", 0.2),
        unittest.mock.patch.dict(os.environ, {shard_urls.ALLOW_PIPE: "1"}),
    ):
        yield f"pipe:head -c 20000 {folder}/s-00000{{0,1}}.tar; sleep 600"


def sample(members: list[tuple[str, bytes]]) -> Callable:
    """A bad sample among thirty good ones."""

    @contextlib.contextmanager
    def damage(folder: Path) -> Iterator[str]:
        good = [(f"{number:02d}.png", png(number)) for number in range(30)]
        write_tar(folder / "s.tar", good[:20] + members + good[20:])
        yield str(folder / "s.tar")

    return damage


@contextlib.contextmanager
def link(folder: Path) -> Iterator[str]:
    with sample([("mark.txt", b"")])(folder) as spec, tarfile.open(spec, "a") as tar:
        member = tarfile.TarInfo("bad.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    yield spec


DAMAGES = {
    "a shard that is cut off": (cut_shard, "broken shard"),
    "a shard with a flipped bit in a header": (flipped_header, "broken shard"),
    "a shard that vanishes during the run": (shard_that_vanishes, "broken shard"),
    "a server that stalls in the middle of a shard": (server_that_stalls, "broken shard"),
    "a command that stalls in the middle of a shard": (command_that_stalls, "broken shard"),
    "an image that is cut off": (sample([("bad.png", png(0)[:100])]), "broken image"),
    "a tiny PNG that claims 60,000 x 60,000 pixels": (sample([("bad.png", bomb(60_000, 60_000))]), "broken image"),
    "a tiny PNG that claims 12,000 x 12,000 pixels": (sample([("bad.png", bomb(12_000, 12_000))]), "broken image"),
    "a label that is no number": (sample([("bad.png", png(0)), ("bad.cls", b"cat")]), "wrong label"),
    "a sample without an image": (sample([("bad.cls", b"1")]), "no image"),
    "a sample with two images of one name": (sample([("bad.png", png(0))] * 2), "two members of one name"),
    "a link to a file of this machine": (link, "no image"),
}


def two_shards(folder: Path) -> str:
    make_shards(folder, [20, 20])
    return shard_spec(folder, 2)


def train_on(spec: str, num_batches: int = 20, **params: Any) -> str:
    config = make_config(**{"train_shards_path_or_url": spec, "max_bad_fraction": 0.05} | params)
    loader = training_loader(config, rank=0, world_size=1, batches_per_chunk=5)
    take(loader, num_batches)
    reasons = ", ".join(f"{count} {reason}" for reason, count in loader.bad_reasons.items())
    return f"goes on: {loader.num_seen} images taken, {loader.num_bad} skipped and counted ({reasons or 'none'})"


def evaluate_on(spec: str, world_size: int = 1, **params: Any) -> str:
    config = make_config(eval_shards_path_or_url=spec, **params)
    ranks = [evaluation_loader(config, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [sum(len(batch["__key__"]) for batch in loader) for loader in ranks]
    check_count(sum(shares), ranks[0].expected, sum(loader.num_bad for loader in ranks))
    expected = ranks[0].expected  # none without a manifest
    return f"goes on: {' + '.join(map(str, shares))}{'' if expected is None else f' of {expected}'} images"


for _name, (_damage, _reason) in DAMAGES.items():

    @in_training(_name, rf"^goes on: 80 images taken, [1-9]\d* skipped and counted \(\d+ {_reason}\)$")
    def _(folder: Path, damage=_damage) -> str:
        with damage(folder) as spec:
            return train_on(spec)

    @in_evaluation(_name, rf"^stops: {_reason}: \S.*; evaluation needs every sample: repair the data, or set")
    def _(folder: Path, damage=_damage) -> str:
        with damage(folder) as spec:
            return evaluate_on(spec)


@in_training("more broken samples than dataset.max_bad_fraction", r"^stops: 11 of the first \d+ samples cannot")
def _(folder: Path) -> str:
    with sample([(f"bad{number}.png", b"") for number in range(3)])(folder) as spec:
        return train_on(spec, num_batches=1000, max_bad_fraction=0.01)


@in_training("a shard that is missing at the start", r"^stops: .*: 1 of 3 shards are not there, the first is s-")
def _(folder: Path) -> str:
    two_shards(folder)
    return train_on(shard_spec(folder, 3))


@in_training("nothing but shards without samples", "^stops: 100 shards in a row gave no sample; the last was empty")
def _(folder: Path) -> str:
    write_tar(folder / "s.tar", [("readme", b"hello")])
    return train_on(str(folder / "s.tar"), max_bad_fraction=1.0)


@in_training("a label beyond the classes of the manifest", r"^goes on: .*, [1-9]\d* skipped .*\(\d+ wrong label\)$")
def _(folder: Path) -> str:
    make_shards(folder, [12])
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"classes": manifest["classes"][:9]}))
    return train_on(shard_spec(folder, 1))


@in_training("kill -9 of a process that reads data", "^stops: a process that reads data was killed")
def _(folder: Path) -> str:
    spec = two_shards(folder)
    killed = unittest.mock.patch.object(image_shards, "decode_image", lambda data: os.kill(os.getpid(), signal.SIGKILL))
    with killed:
        return train_on(spec, num_workers_per_gpu=1)


@in_training("fewer steps than the checkpoint has", "^stops: checkpoint-3 is farther than .*max_train_steps 2: raise")
def _(folder: Path) -> str:
    write_checkpoint(folder, 3, lambda part: (part / "a").write_text("a"), Processes())
    return trained_from(folder, "training.max_train_steps=2")


@in_training("a run from scratch in another's folder", "^stops: experiment.resume is False, and .* holds checkpoints")
def _(folder: Path) -> str:
    write_checkpoint(folder, 3, lambda part: (part / "a").write_text("a"), Processes())
    return trained_from(folder, "experiment.resume=False")


@in_training("weights of an end whose checkpoints are gone", "^stops: .* holds model.safetensors but no checkpoint")
def _(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"of an earlier run")
    return trained_from(folder)


@in_training("a model of another program in the output folder", "^stops: .* holds config.json but no checkpoint")
def _(folder: Path) -> str:
    (folder / "config.json").write_text('{"architectures": ["Other"]}')
    return trained_from(folder)


@in_training("a warm-up of the codebook as long as the run", r"^stops: .*warmup_steps \(6\) must be fewer than")
def _(folder: Path) -> str:
    return trained_from(folder, "training.codebook.warmup_steps=6")


@in_training(
    "a number of tokens to evaluate that there is not", "^stops: experiment.eval_lengths must be in 1..4, got 8"
)
def _(folder: Path) -> str:
    tokenizer_task(job_config("stage1", folder, folder, "experiment.eval_lengths=[4,8]"))
    return "begun"


def trained_from(folder: Path, *overrides: str) -> str:
    make_images(folder, count=4)
    config = job_config("teacher", folder, folder, *overrides)
    run = Run(TeacherTask(config), config, make_accelerator(config))
    resume.resume(run)
    return f"from step {run.step} on"


@in_training("half of all images broken, two ranks", r"^both ranks stop: .*11 of the first \d+ samples", is_long=True)
def _(folder: Path) -> str:
    make_images(folder)
    for path in list((folder / "train").rglob("*.png"))[::2]:
        path.write_bytes(path.read_bytes()[:100])
    # Another process forks the ranks, because this one may have trained.
    train = f"Ranks(Path({str(folder)!r}), 'run', 'training.max_train_steps=999').wait()"
    program = f"from pathlib import Path; from tests.disturbed_runs import Ranks; print({train})"
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout
    assert printed == "[1, 1]\n", printed
    said = (folder / "run-0.log").read_text()
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    return f"both ranks stop: {said[said.index('error: ') + len('error: ') :].strip()}"


@in_evaluation("a rank without shards", r"^goes on: 7 \+ 0 of 7 images$")
def _(folder: Path) -> str:
    make_shards(folder, [7])
    return evaluate_on(shard_spec(folder, 1), world_size=2, num_workers_per_gpu=2)


@in_evaluation("a shard of another length than its manifest says", "^stops: expected 40 evaluation samples, got 41")
def _(folder: Path) -> str:
    spec = two_shards(folder)
    with tarfile.open(folder / "s-000001.tar", "a") as tar:
        member = tarfile.TarInfo("more.png")
        member.size = len(png(0))
        tar.addfile(member, io.BytesIO(png(0)))
    return evaluate_on(spec)


@in_evaluation("a manifest that is damaged", "^stops: manifest.json must be a manifest written by data/")
def _(folder: Path) -> str:
    spec = two_shards(folder)
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])
    return evaluate_on(spec)


# Files from elsewhere


class Code:
    """Pickled, it runs a command when it is loaded carelessly."""

    def __init__(self, folder: Path):
        self.command = f"touch {folder}/ran"

    def __reduce__(self):
        return os.system, (self.command,)


class Toy(Pretrained):
    """A model of one layer, whose configuration holds its width."""

    def __init__(self, config):
        super().__init__()
        self.config = OmegaConf.create(config)
        self.inner = nn.Linear(self.config.model.width, 2)


def toy(folder: Path, **model: Any) -> Path:
    """A checkpoint folder of a `Toy`, with other values in its configuration."""
    Toy({"model": {"width": 3}}).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model": {"width": 3} | model}))
    return folder


@elsewhere("weights that are a pickle with code", "^stops: evil.bin holds more than tensors .* refused")
def _(folder: Path) -> str:
    torch.save({"inner.weight": Code(folder)}, folder / "evil.bin")
    return f"read: {read_state_dict(folder / 'evil.bin')}"


@elsewhere("a bare pickle under the name of weights", "^stops: evil.pt is damaged or holds more .* refused")
def _(folder: Path) -> str:
    (folder / "evil.pt").write_bytes(pickle.dumps(Code(folder)))
    return f"read: {read_state_dict(folder / 'evil.pt')}"


@elsewhere("a pickle in a run's checkpoint, checksums right", "^stops: checkpoint-1 holds more than tensors")
def _(folder: Path) -> str:
    make_images(folder, count=4)
    config = job_config("teacher", folder, folder)
    first = Run(TeacherTask(config), config, make_accelerator(config))
    first.step = 1
    resume.save(first)
    saved = folder / "checkpoint-1"
    metadata = json.loads((saved / METADATA_FILE).read_text())
    torch.save({"state": Code(folder)}, saved / "optimizer.bin")
    data = (saved / "optimizer.bin").read_bytes()
    metadata["files"]["optimizer.bin"] = [len(data), hashlib.sha256(data).hexdigest()]
    (saved / METADATA_FILE).write_text(json.dumps(metadata))
    resume.resume(Run(TeacherTask(config), config, make_accelerator(config)))
    return "resumed"


@elsewhere("a token set whose labels are pickled objects", "^stops: the token set .* is damaged .*pickle")
def _(folder: Path) -> str:
    token_set(folder)
    np.save(folder / LABELS, np.array([Code(folder)] * 20), allow_pickle=True)
    return read_token_set(folder / LABELS)


@elsewhere("a token set with a token beyond its codebook", "^stops: .* sample '00003' has the token 99")
def _(folder: Path) -> str:
    token_set(folder)
    tokens = np.load(folder / TOKENS)
    tokens[3, 1, 2] = 99
    np.save(folder / TOKENS, tokens)
    return read_token_set(folder / TOKENS)


@elsewhere("an .npz of pickled statistics", "^stops: s.npz must be a reference archive .*cannot be read")
def _(folder: Path) -> str:
    np.savez(folder / "s.npz", mu=np.array([Code(folder)]), sigma=np.eye(1), allow_pickle=True)
    return f"read: {read_statistics(folder / 's.npz')}"


@elsewhere("an .npz of pickled images", "^stops: p.npz must hold images .*of uint8, got")
def _(folder: Path) -> str:
    np.savez(folder / "p.npz", arr_0=np.array([Code(folder)]), allow_pickle=True)
    return f"read: {open_images(folder / 'p.npz')}"


@elsewhere("shard members that webdataset would unpickle", r"^goes on: 2 images$")
def _(folder: Path) -> str:
    evil = [(f"{name}.{kind}", pickle.dumps(Code(folder))) for name in "ab" for kind in ("pyd", "pkl", "pickle", "pth")]
    write_tar(folder / "s.tar", sorted([*evil, ("a.png", png(0)), ("b.png", png(1))]))
    return evaluate_on(str(folder / "s.tar"))


@elsewhere("shard members named ../../x, /tmp/x and with line breaks", r"^goes on: 3 images$")
def _(folder: Path) -> str:
    write_tar(folder / "s.tar", [("../../x.png", png(0)), ("/tmp/x.png", png(1)), ("a\nb\x1b[2J.png", png(2))])
    return evaluate_on(str(folder / "s.tar"))


@elsewhere("a member that claims 2^40 bytes", "^stops: broken shard: .*member 0.png claims 10995116277")
def _(folder: Path) -> str:
    return evaluate_on(shard_with_header(folder, "0.png", 1 << 40))


@elsewhere("a member of negative size", "^stops: broken shard: .*member 0.txt claims -512 bytes")
def _(folder: Path) -> str:
    return evaluate_on(shard_with_header(folder, "0.txt", -512))


@elsewhere("16 KB of .tar.gz that unpack to a name of 16 MB", "^stops: .*member name claims 16777216")
def _(folder: Path) -> str:
    plain = Path(shard_with_header(folder, "name", 16 << 20, kind=tarfile.GNUTYPE_LONGNAME)).read_bytes()
    with gzip.open(folder / "s.tar.gz", "wb") as file:
        file.write(plain[:512] + bytes(16 << 20) + plain[512:])
    return evaluate_on(str(folder / "s.tar.gz"))


@elsewhere("a config that runs a shell command for its shards", "^stops: .*set ODP_ALLOW_PIPE=1 in the env")
def _(folder: Path) -> str:
    with unittest.mock.patch.dict(os.environ):
        os.environ.pop(shard_urls.ALLOW_PIPE, None)
        return train_on(f"pipe:touch {folder}/ran")


@elsewhere("a shard address with a command in its quotes", "^stops: .*shards cannot be read from gs://x")
def _(folder: Path) -> str:
    return train_on(f"gs://x';touch {folder}/ran;'")


@elsewhere("a config with a Python object", "^stops: foreign.yaml, line 1: not valid YAML: .*constructor")
def _(folder: Path) -> str:
    return config_of(folder, f"a: !!python/object/apply:os.system ['touch {folder}/ran']")


@elsewhere("a config that asks for the environment", r"^stops: foreign.yaml: a may refer to other keys as")
def _(folder: Path) -> str:
    return config_of(folder, "a: '${oc.env:HOME}'")


@elsewhere("a config whose aliases unfold to a billion values", "^stops: foreign.yaml, line 1: .*expansion")
def _(folder: Path) -> str:
    levels = [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghij")]
    return config_of(folder, "a: &a [x]\n" + "".join(levels))


@elsewhere("a config nested 5,000 deep", "^stops: foreign.yaml: cannot be read .*recursion")
def _(folder: Path) -> str:
    return config_of(folder, "a: " + "[" * 5000 + "]" * 5000)


@elsewhere("a checkpoint's config.json that asks for the environment", "^stops: the configuration of a check")
def _(folder: Path) -> str:
    Toy.from_pretrained(toy(folder / "model", note="${oc.env:HOME}"))
    return "loaded"


@elsewhere("a checkpoint's config.json that claims 10^12 weights", "^stops: the weights of model do not fit")
def _(folder: Path) -> str:
    Toy.from_pretrained(toy(folder / "model", width=10**12))
    return "loaded"


@elsewhere("a checkpoint's config.json with a word for a number", "^stops: the configuration with model desc")
def _(folder: Path) -> str:
    Toy.from_pretrained(toy(folder / "model", width="wide"))
    return "loaded"


@elsewhere("a checkpoint's config.json nested 5,000 deep", "^stops: model/config.json is not valid JSON")
def _(folder: Path) -> str:
    toy(folder / "model")
    (folder / "model/config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    Toy.from_pretrained(folder / "model")
    return "loaded"


@elsewhere("a class called ../../x, whose images are written", "^the images are called 0_x_000.png, ...$")
def _(folder: Path) -> str:
    config = {"dataset": {"class_names": ["../../x", "y"]}, "model": {"generator": {"condition_num_classes": 2}}}
    return f"the images are called {file_stem(0, class_names(config))}_000.png, ..."


@elsewhere("a folder of images with links to itself", "^stops: .* is a link to a folder that contains it")
def _(folder: Path) -> str:
    make_images(folder, count=4)
    for name in "ab":
        (folder / "train/class0" / name).symlink_to(folder / "train")
    return f"read: {len(open_images(folder / 'train'))} images"


def shard_with_header(folder: Path, name: str, size: int, kind: bytes = tarfile.REGTYPE) -> str:
    """A shard that opens with a member of a name and a claimed size."""
    write_tar(folder / "s.tar", [("good.png", png(0))])
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    (folder / "s.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + (folder / "s.tar").read_bytes())
    return str(folder / "s.tar")


def config_of(folder: Path, text: str) -> str:
    (folder / "foreign.yaml").write_text(text)
    return f"read: {load_config(folder / 'foreign.yaml')}"


def token_set(folder: Path) -> Path:
    """20 images, 2 variants, 4 tokens of a codebook of 16."""
    np.save(folder / TOKENS, np.random.default_rng(0).integers(0, 16, (20, 2, 4)).astype(np.uint16))
    np.save(folder / LABELS, np.arange(20))
    (folder / KEYS).write_text("".join(f"{number:05d}\n" for number in range(20)))
    facts = {"num_images": 20, "num_tokens": 4, "variants": ["one", "two"], "codebook_size": 16, "tokenizer": {}}
    (folder / MANIFEST).write_text(json.dumps(facts))
    return folder / TOKENS


def read_token_set(path: Path) -> str:
    tokens = TokenSet(path.parent)
    for variant in range(2):
        tokens.batch(np.arange(len(tokens)), variant)
    return f"{len(tokens)} images"


# Somebody's own files


@own_files("results called as the user's files are", "^stops: FOLDER holds dog_1.png, and no command of ours has left")
def _(folder: Path) -> str:
    (folder / "dog_1.png").write_bytes(png(0))
    ResultFolder(folder).claim(["dog_1.png", "dog_2.png"])
    return "written over"


@own_files("a result that the user has changed since", "^stops: FOLDER holds dog_1.png, and no command of ours")
def _(folder: Path) -> str:
    results = ResultFolder(folder)
    (results / "dog_1.png").write_bytes(png(0))
    results.finish()
    (folder / "dog_1.png").write_bytes(png(1))
    ResultFolder(folder).claim(["dog_1.png"])
    return "written over"


@own_files("a second run in one folder", "^stops: FOLDER is in use by process .*: wait for it, stop")
def _(folder: Path) -> str:
    reading, writing = os.pipe()
    other = os.fork()
    if not other:
        try:
            FolderLock(folder)
            os.write(writing, b"held")
            signal.pause()
        finally:
            os._exit(1)
    os.read(reading, 4)
    try:
        with FolderLock(folder):
            return "both run"
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


@own_files("an unset shell variable as output folder", "^stops: .*output_dir is empty .an unset shell variable")
def _(folder: Path) -> str:
    load_config(ROOT / "configs/fashion/stage1.yaml", ["experiment.output_dir="])
    return "the working directory"


@own_files("the home folder of nobody as output folder", "^stops: .*names the home folder of a user who is not known")
def _(folder: Path) -> str:
    save_config(OmegaConf.create(), "~nobody_of_this_name/config.yaml")
    return "a folder called ~nobody_of_this_name"


@own_files("a README.md of the user's where a model is saved", "^the README.md is still '# Mine'")
def _(folder: Path) -> str:
    (folder / "README.md").write_text("# Mine")
    Toy({"model": {"width": 3}}).save_pretrained(folder)
    return f"the README.md is still {(folder / 'README.md').read_text()!r}"


@own_files("a model of another program where one is saved", "^stops: config.json is there and not of ours")
def _(folder: Path) -> str:
    (folder / "config.json").write_text('{"architectures": ["Other"]}')
    Toy({"model": {"width": 3}}).save_pretrained(folder)
    return "replaced"


@own_files("a name of 300 letters for results", "^stops: .*cannot be created .File name too long.: name another")
def _(folder: Path) -> str:
    ResultFolder(folder / ("n" * 300))
    return "created"


@own_files("a device as the file of a result", "^stops: /dev/null is a device or a pipe, and files are written")
def _(folder: Path) -> str:
    with unittest.mock.patch.object(os, "replace", lambda *_: None), replacing("/dev/null") as aside:
        return f"{aside} replaces it"


@own_files("a file where a folder is needed", "^stops: .*cannot be created .*: name another folder")
def _(folder: Path) -> str:
    (folder / "results").write_text("")
    ResultFolder(folder / "results")
    return "created"


@own_files("pairs of images that do not belong together", "^stops: expected the same names in both folders, got")
def _(folder: Path) -> str:
    for side, names in (("a", "xy"), ("b", "xz")):
        (folder / side).mkdir()
        for name in names:
            (folder / side / f"{name}.png").write_bytes(png(0))
    return f"{len(paired([open_images(folder / 'a'), open_images(folder / 'b')]))} sets are compared"


@own_files(
    "labels of other images than the tokens", "^stops: labels.npy has no cat, which was tokenized .1 are missing"
)
def _(folder: Path) -> str:
    np.save(folder / "labels.npy", np.arange(2))
    (folder / "reconstruction.json").write_text(json.dumps({"keys": json.dumps(["bag", "dog"])}))
    return f"labels {labels_of(folder / 'labels.npy', ['bag', 'cat'])}"


@own_files("an entropy model's training of another tokenizer", "^stops: FOLDER holds the training of another tokenizer")
def _(folder: Path) -> str:
    check_subject(folder, {"tokenizer": "a" * 64})
    write_checkpoint(folder, 3, lambda part: (part / "a").write_text("a"), Processes())
    check_subject(folder, {"tokenizer": "b" * 64})
    return "goes on"


@own_files("a photograph lying on its side, an emoji on nothing", "^read as a viewer shows them: True$")
def _(folder: Path) -> str:
    lying_and_clear(folder)
    images = open_images(folder).read(0, 2).transpose(0, 3, 1, 2)
    return f"read as a viewer shows them: {is_as_shown(images)}"


@own_files("a TIFF of floats in 0..1000", "^stops: a.tif: expected samples of 8 or 16 bits, or floats in 0..1")
def _(folder: Path) -> str:
    Image.fromarray(np.linspace(0, 1000, 64, dtype=np.float32).reshape(8, 8)).save(folder / "a.tif")
    return f"read: {len(open_images(folder))} images"


@own_files("a configuration of another kind", "^stops: .* describes a generator, and this command needs a tokenizer")
def _(folder: Path) -> str:
    path = ROOT / "configs/fashion/generator.yaml"
    return f"is a {check_kind(load_config(path), path, 'tokenizer')}"


@own_files("a configuration of no model", "^stops: the configuration has no experiment.output_dir, which is read here")
def _(folder: Path) -> str:
    return f"found: {locate_configured(load_config(ROOT / 'configs/data/emoji.yaml'))}"


# The Python API


@in_python("pixels in 0..255 for a tokenizer", r"^stops: .*\[0, 1\]")
def _(folder: Path) -> str:
    return f"encoded: {bundled().encode(torch.full((1, 3, 32, 32), 255.0))[0].shape}"


@in_python("pixels that are no numbers for a tokenizer", "^stops: ")
def _(folder: Path) -> str:
    return f"encoded: {bundled().encode(torch.full((1, 3, 32, 32), torch.nan))[0].shape}"


@in_python("a token beyond the codebook to decode", "^stops: .*10000")
def _(folder: Path) -> str:
    return f"decoded: {bundled().decode_tokens(torch.full((1, 32), 10_000)).shape}"


@in_python("a seed of 2^64", r"^stops: seeds must be in 0..2\*\*64 - 1, got 18446744073709551616$")
def _(folder: Path) -> str:
    return f"sampled: {generator().generate([1], seeds=[2**64]).shape}"


@in_python("noise of infinite strength", "^stops: randomize_temperature must be a finite number of float32, got inf$")
def _(folder: Path) -> str:
    return f"sampled: {generator().generate([1], randomize_temperature=float('inf')).shape}"


@in_python("no labels", r"^sampled: \(0, 32\)$")
def _(folder: Path) -> str:
    return f"sampled: {tuple(generator().generate([]).shape)}"


@in_python("weights of which one is NaN", "^stops: .*inner.weight")
def _(folder: Path) -> str:
    toy(folder / "model")
    weights = {"inner.weight": torch.full((2, 3), torch.nan), "inner.bias": torch.zeros(2)}
    safetensors.torch.save_file(weights, folder / "model/model.safetensors")
    Toy.from_pretrained(folder / "model")
    return "loaded"


@in_python("a weight of 1e5 to store in half precision", "^stops: inner.weight has values up to 1e.05, and")
def _(folder: Path) -> str:
    model = Toy({"model": {"width": 3}})
    nn.init.constant_(model.inner.weight, 1e5)
    model.save_pretrained(folder / "model", dtype=torch.float16)
    return "stored"


def bundled() -> OneDPiece:
    return OneDPiece.from_pretrained("one-d-piece_fashion")


def generator() -> ImageBert:
    return ImageBert.from_pretrained("maskgit_fashion")


# Random damage: how a file is made, and what reads it: it tells of all images, tokens or weights, or has a UserError


def shard_file(folder: Path) -> Path:
    make_shards(folder, [12])
    return folder / "s-000000.tar"


def image_file(kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "p", kind)
        return folder / "p"

    return make


def arrays(name: str, **values: np.ndarray) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / name, **values)
        return folder / name

    return make


def weights_file(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        state = {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}
        (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(state, folder / name)
        return folder / name

    return make


def load_weights(path: Path) -> str:
    model = nn.Linear(3, 4)
    load_strict(model, read_state_dict(path), path)
    return "loaded"


def checkpoint_file(folder: Path) -> Path:
    write_checkpoint(folder, 1, lambda aside: None, Processes("cpu"))
    write_checkpoint(folder, 2, lambda aside: (aside / "state").write_bytes(bytes(range(256))), Processes("cpu"))
    return folder / "checkpoint-2/state"


def newest_checkpoint(path: Path) -> str:
    step, _ = latest_checkpoint(path.parents[1])
    if step == 1:
        raise UserError(str(find_damage(path.parent)))
    return "resumed from the newest"


def read_images(path: Path) -> str:
    images = open_images(path)
    return f"{images.read(0, len(images)).shape}"


def model_config(folder: Path) -> Path:
    return toy(folder / "model") / "config.json"


def load_model(path: Path) -> str:
    Toy.from_pretrained(path.parent)
    return "loaded"


def run_config(folder: Path) -> Path:
    save_config(load_config(ROOT / "configs/fashion/stage1.yaml"), folder / "config.yaml")
    return folder / "config.yaml"


def read_config(path: Path) -> str:
    load_config(path)
    return "read"


IMAGES = np.zeros((5, 8, 8, 3), np.uint8)
FUZZED: dict[str, tuple[Callable[[Path], Path], Callable[[Path], str]]] = {
    "a shard, in evaluation": (shard_file, lambda path: evaluate_on(str(path))),
    **{
        f"a {kind} image": (image_file(kind), lambda path: str(decode_image(path.read_bytes()).mode))
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    },
    "a manifest of shards": (
        lambda folder: shard_file(folder).parent / MANIFEST,
        lambda path: "read" if read_manifest(path.parent) else "none",
    ),
    **{f"weights, {name}": (weights_file(name), load_weights) for name in ("w.safetensors", "w.bin")},
    "a model's config.json": (model_config, load_model),
    "a file of a run's checkpoint": (checkpoint_file, newest_checkpoint),
    "a run's checkpoint, list of files": (
        lambda folder: checkpoint_file(folder).parent / METADATA_FILE,
        lambda path: newest_checkpoint(path.parent / "state"),
    ),
    "a configuration": (run_config, read_config),
    **{
        f"a token set, {name}": (lambda folder, name=name: token_set(folder).parent / name, read_token_set)
        for name in (TOKENS, LABELS, KEYS, MANIFEST)
    },
    "images.npz": (arrays("images.npz", arr_0=IMAGES), read_images),
    "statistics.npz": (
        arrays("statistics.npz", mu=np.zeros(4), sigma=np.eye(4)),
        lambda path: type(read_statistics(path) or open_images(path)).__name__,  # as evaluation does
    ),
    "tokens.npz": (
        arrays("tokens.npz", tokens=np.zeros((5, 4), np.int64), keys=np.array(list("abcde"))),
        lambda path: str(read_tokens(path)[0].shape),
    ),
}


def flip(name: str, folder: Path, num_flips: int, seed: int = 0) -> Counter[str]:
    """Damage a file so many times, by changed bytes and by cuts, and count how reading it ends.

    Raises:
        AssertionError: What was read without an error has other numbers than the whole file.
    """
    make, read = FUZZED[name]
    path = make(folder)
    whole, rng = path.read_bytes(), np.random.default_rng(seed)
    expected, endings = read(path), Counter()
    for number in range(num_flips):
        data = bytearray(whole)
        if number % 4 == 3:
            del data[rng.integers(len(data)) :]
        else:  # mostly at the beginning, where the headers are
            end = min(len(data), 1024) if number % 4 else len(data)
            for place in rng.integers(0, end, rng.integers(1, 4)):
                data[place] = rng.integers(256)
        path.write_bytes(data)

        def damaged_file(_: Path) -> str:
            return read(path)

        with tempfile.TemporaryDirectory() as outside:
            ended = outcome(damaged_file, Path(outside))
        if not ended.startswith("stops: "):
            assert ended == expected, (number, ended)
        endings["error" if ended.startswith("stops: ") else "read"] += 1
    path.write_bytes(whole)
    return endings


# The page


def main() -> None:
    logging.disable(logging.WARNING)  # each sample that is skipped
    started, text = time.perf_counter(), ""
    for kind, faults in FAULTS.items():
        text += f"\n### {kind}\n\n| fault | how it ended |\n|---|---|\n"
        for name, ends, inject, _ in faults:
            with tempfile.TemporaryDirectory() as outside:
                ended = outcome(inject, Path(outside))
            if not re.search(ends, ended):
                raise UserError(f"{name} did not end as designed, but: {ended}")
            text += f"| {name} | {in_a_cell(ended)} |\n"
            print(f"{name}: {ended}", flush=True)
    text += f"\n### Random damage\n\n{NUM_FLIPS} times each: up to three changed bytes, and every fourth time a cut. "
    text += "What is\nread nevertheless has as many images, tokens and weights as the whole file.\n\n"
    text += "| file | one-sentence error | read |\n|---|---|---|\n"
    for name in FUZZED:
        with tempfile.TemporaryDirectory() as folder:
            endings = flip(name, Path(folder), NUM_FLIPS)
        text += f"| {name} | {endings['error']} | {endings['read']} |\n"
        print(f"{name}: {dict(endings)}", flush=True)
    above, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(above + MARK + text, encoding="utf-8")
    count = sum(map(len, FAULTS.values()))
    print(f"{count} faults ended as designed, {len(FUZZED)} files x {NUM_FLIPS} damages too; written to {PAGE}")
    print(f"{time.perf_counter() - started:.0f} seconds")


def in_a_cell(text: str, limit: int = 125) -> str:
    """Without what changes from run to run, and without what a table would take for its own."""
    text = re.sub(r"127\.0\.0\.1:\d+", "HOST", re.sub(r"pid\(s\) \d+", "pid", text))
    text = re.sub(r"process \d+ on [^\s:]+", "process PID on HOST", text.replace(f"{ROOT}/", ""))
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


if __name__ == "__main__":
    run_command(main)
