"""Serve the page with a slider: an image from 1 to all tokens, images by class, and what each token does.

    python3 scripts/demo.py
    python3 scripts/demo.py --checkpoint output/my_tokenizer --port 8000
    python3 scripts/demo.py --share

It needs Gradio: pip install -c constraints.txt -e '.[demo]'. The page is for this computer alone, and asks no other one
for anything; --host 0.0.0.0 opens it to the network, and --share to everybody, through Gradio's relay. Uploads are
bounded, and deleted as soon as they are read; what visitors see is their own. docs/demo.md says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, pick_device, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import os
import signal
import socket
import tempfile
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import gradio


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    status = 0
    with tempfile.TemporaryDirectory(prefix="one-d-piece-") as uploads:
        page, options = prepared(arguments, uploads)
        where = {"server_name": arguments.host, "server_port": arguments.port, "share": arguments.share}
        try:
            page.launch(**options, **where)
        except SystemExit as stopped:
            status = stopped.code
        except OSError as error:
            if "port" not in str(error).lower():
                raise
            what = "every port that was tried is" if arguments.port is None else f"port {arguments.port} is"
            raise UserError(f"{what} taken: name another one as --port") from error
    sys.stdout.flush()
    os._exit(status)  # the server's threads have kept Python from ending for minutes


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", help="configuration of the tokenizer; its own when not given")
    parser.add_argument(
        "--checkpoint", help="a tokenizer instead of the bundled ones: name, folder, training output, file or hub id"
    )
    parser.add_argument("--generator", help="a generator instead of the bundled ones; likewise")
    parser.add_argument("--host", help="address to listen at (default: 127.0.0.1, or GRADIO_SERVER_NAME)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on, or GRADIO_SERVER_PORT")
    parser.add_argument("--share", action="store_true", help="open a public address through Gradio's relay")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        raise UserError(f"--port must be 1 to 65535, got {arguments.port}")
    if arguments.host is not None:
        check_host(arguments.host)
    return arguments


def check_host(name: str) -> None:
    """Refuse an address where no server of this computer can listen: Gradio would find all ports taken."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(name.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {name} is no address of this computer ({error.strerror}): leave it out, or give 0.0.0.0 for all"
        ) from error


def prepared(arguments: argparse.Namespace, uploads: str) -> tuple["gradio.Blocks", dict]:
    """The page, and how it is launched.

    Args:
        uploads: An empty folder for what visitors send.
    """
    os.environ["GRADIO_TEMP_DIR"] = uploads
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which would ask for the newest version
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"the page needs Gradio ({error}): pip install -c constraints.txt -e '.[demo]'") from error
    from playground.models import Models
    from playground.page import LAUNCH, build

    models = Models(arguments.config, arguments.checkpoint, arguments.generator, pick_device(arguments.device))
    return build(models), LAUNCH


if __name__ == "__main__":
    run(main)
