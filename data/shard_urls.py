"""Where shards are: the paths, URLs and commands that a config names, and how each is opened."""

import contextlib
import glob
import http.client
import io
import os
import re
import select
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.shardlists import expand_urls

from data import DataError
from utils.paths import ROOT

ALLOW_PIPE = "ODP_ALLOW_PIPE"  # an environment variable, because a config could set a key of its own
TIMEOUT = 60.0  # seconds without a byte from a server or a command
NUM_ATTEMPTS = 3  # to reach a server


def resolve_shards(spec: Any, key: str) -> list[str]:
    """The shards that a config names, in order: local paths (made absolute), URLs and commands.

    Args:
        spec: A path or URL with brace expansion (`shards/train-{000000..000320}.tar`), or a list of them. Relative
            paths are looked for from the current folder, then from the repository.
        key: The config key, for messages.

    Raises:
        DataError: Nothing is given, or a local shard is not there, or a URL has a scheme that nothing here reads, or
            there are commands (`pipe:...`) and the user has not allowed them.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec or [])
    if not patterns:
        raise DataError(f"{key} must name shards, for example shards/train-{{000000..000320}}.tar, and it is empty")
    try:
        names = [name.removeprefix("file://") for pattern in patterns for name in expand_urls(pattern)]
    except (ValueError, AssertionError) as error:
        raise DataError(f"{key} must be paths or URLs with brace expansion, got {spec!r} ({error})") from error
    for name in names:
        scheme = scheme_of(name)
        if scheme not in ("", "http", "https", "pipe"):
            raise DataError(
                f"{key}: shards cannot be read from {name}; use a path, http(s): or a command that writes the shard to "
                "its output, such as 'pipe:aws s3 cp s3://BUCKET/SHARD.tar -'"
            )
        if scheme == "pipe" and os.environ.get(ALLOW_PIPE) != "1":
            raise DataError(
                f"{key}: {name!r} runs a shell command, and a config from elsewhere may name any: if you trust it, set "
                f"{ALLOW_PIPE}=1 in the environment"
            )
    shards = [name if scheme_of(name) else _find_local(name) for name in names]
    if missing := [name for name, shard in zip(names, shards, strict=True) if shard is None]:
        if glob.has_magic(missing[0]):
            raise DataError(f"{key}: no shard is called {missing[0]}; * is not expanded: {_instead_of(missing[0])}")
        raise DataError(
            f"{key}: {len(missing)} of {len(names)} shards are not there, the first is {missing[0]}"
            f"{_looked_from(missing[0])}: make them with a script of data/, or correct the path"
        )
    return shards


def scheme_of(name: str) -> str:
    """`http` of http://..., nothing of a local path."""
    match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):", name)
    return match.group(1).lower() if match else ""


def _find_local(name: str) -> str | None:
    path = Path(name).expanduser()
    found = next((place for place in (path.absolute(), ROOT / path) if place.is_file()), None)
    return str(found) if found else None


def _instead_of(pattern: str) -> str:
    """What to write instead of a pattern with wildcards."""
    found = sorted(glob.glob(str(Path(pattern).expanduser())))
    if not found:
        return f"use braces, such as {re.sub(r'[*?[].*[*?]]?|[*?]', '{000000..000320}', pattern, count=1)}"
    for number in re.finditer(r"\d+", found[0]):
        before, after = found[0][: number.start()], found[0][number.end() :]
        braces = f"{before}{{{number[0]}..{found[-1].removeprefix(before).removesuffix(after)}}}{after}"
        with contextlib.suppress(ValueError):
            if list(expand_urls(braces)) == found:
                return f"write {braces}"
    return f"give a list, such as [{', '.join(found[:2])}{', ...' if len(found) > 2 else ''}]"


def _looked_from(name: str) -> str:
    if Path(name).expanduser().is_absolute():
        return ""
    return f" (looked from {' and '.join(dict.fromkeys([str(Path.cwd()), str(ROOT)]))})"


def open_shard(shard: str) -> BinaryIO:
    """Open one of `resolve_shards`.

    Raises:
        OSError: It is not there, or nothing comes for `TIMEOUT` seconds, now or while it is read.
    """
    scheme = scheme_of(shard)
    if not scheme:
        return open(shard, "rb")
    if scheme == "pipe":
        return CommandOutput(shard.partition(":")[2])
    for attempt in range(NUM_ATTEMPTS):
        try:
            return urllib.request.urlopen(shard, timeout=TIMEOUT)
        except OSError as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or attempt == NUM_ATTEMPTS - 1:
                raise
            time.sleep(2.0**attempt)
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
    raise AssertionError("the loop returns or raises")


class CommandOutput(io.RawIOBase):
    """What a shell command writes. Its failure or silence is an error, where a plain pipe would just end or wait."""

    def __init__(self, command: str):
        # A session of its own, so that closing ends whatever the shell has started.
        self.process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        output = self.process.stdout.fileno()
        if not select.select([output], [], [], TIMEOUT)[0]:
            raise TimeoutError(f"the command was silent for {TIMEOUT:g} seconds")
        data = os.read(output, len(buffer))
        buffer[: len(data)] = data
        if not data and (status := self._status()):
            raise OSError(f"the command ended with status {status}")
        return len(data)

    def _status(self) -> int:
        try:
            return self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the command did not end within {TIMEOUT:g} seconds of its output") from error

    def close(self) -> None:
        if not self.closed:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.process.stdout.close()
        super().close()
