"""The static page: its own reader and writer of .1dp and its own networks give what Python's give."""

import dataclasses
import io
import json
import shutil
import subprocess
import tarfile
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from codec.bitstream import Fit, FormatError, Geometry, Mode, Tiles
from codec.canvas import from_squares, to_canvas
from codec.entropy import read_tokens, write_tokens
from data.transforms import EvalTransform
from modeling.tokenizers import encode_tokens, load_tokenizer
from tests import codec_golden
from tests.browser import PATIENCE, chromium, served
from tests.codec_data import likely_tokens
from tests.codec_golden import BUNDLED, STORES, VECTORS, models_of
from utils.images import to_array
from utils.paths import ROOT

GOLDEN = ROOT / "tests/golden/v1"
NODE = shutil.which("node")
pytestmark = [pytest.mark.xdist_group("page")]
RUN = "async jobs => JSON.stringify(await (await import('/tests/page_jobs.mjs')).run(JSON.parse(jobs)))"


@pytest.fixture(scope="module", params=["node", "chromium"])
def in_page(request):
    """Call it with jobs: what the page's code makes of each, in node and in a browser."""
    if request.param == "chromium":
        with chromium() as browser, served(ROOT) as address:
            page = browser.new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(f"{address}tests/golden/")
            yield lambda jobs: json.loads(page.evaluate(RUN, json.dumps(jobs)))
        return
    if NODE is None:
        pytest.skip("there is no node")
    yield in_node


def in_node(jobs):
    command = [NODE, ROOT / "tests/page_checks.mjs"]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@cache
def models_for(store):
    return models_of(store, GOLDEN)


def path_of(store):
    return codec_golden.path_of(store, GOLDEN).relative_to(ROOT).as_posix()


def as_page(geometry):
    return geometry and {
        **dataclasses.asdict(geometry),
        "fit": int(geometry.fit),
        "tiles": geometry.tiles and dataclasses.asdict(geometry.tiles),
    }


# ------------------------------------------------------------------------------------------------ the format


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / VECTORS).read_text())


def test_golden_files_are_read_whole_and_cut(in_page, golden):
    cases = list(golden["files"].values())
    jobs = []
    for case in cases:
        size = len(case["hex"]) // 2
        sizes = [*range(size - len(case["certain_when_cut"]), size), size]
        jobs.append({"job": "read", "store": path_of(case["store"]), "file": case["hex"], "sizes": sizes})
    for case, (*cut, whole) in zip(cases, in_page(jobs), strict=True):
        assert whole["tiles"] == case["tokens"]
        for read, certain in zip(cut, case["certain_when_cut"], strict=True):
            assert read["tiles"] == [row[:count] for row, count in zip(case["tokens"], certain, strict=True)]


def test_golden_tokens_are_written_to_the_golden_bytes(in_page, golden):
    cases = list(golden["files"].values())
    reads = [read_tokens(bytes.fromhex(case["hex"]), models_for(case["store"])) for case in cases]
    jobs = [
        {
            "job": "write",
            "store": path_of(case["store"]),
            "tiles": case["tokens"],
            "geometry": as_page(read.header.geometry),
            "mode": int(read.header.mode),
        }
        for case, read in zip(cases, reads, strict=True)
    ]
    assert in_page(jobs) == [case["hex"] for case in cases]


def test_golden_logits_and_shares_are_exact(in_page, golden):
    cases = [(path_of(store), case) for store, cases in golden["shares"].items() for case in cases]
    found = in_page([{"job": job, "store": s, "before": c["after"]} for s, c in cases for job in ("logits", "starts")])
    for (_, case), logits, starts in zip(cases, found[::2], found[1::2], strict=True):
        assert logits == case["logits"]
        assert np.diff(starts).tolist() == case["shares"]


def random_images(store, count, seed):
    """(tokens, geometry) of images: half of them drawn by the model's own shares, of all lengths and fits."""
    network = models_for(store).by_mode[Mode.NETWORK]
    draws = np.random.default_rng(seed)
    likely = likely_tokens(network, count, seed)
    even = draws.integers(0, network.codebook_size, likely.shape)
    for row in range(count):
        tokens = (likely if row % 2 else even)[row, : draws.integers(1, network.num_tokens + 1)]
        width, height = (int(side) for side in draws.integers(1, 5000, 2))
        fit = Fit(int(draws.integers(0, 3)))
        geometry = Geometry(width, height, fit, int(draws.integers(1, 9))) if draws.random() < 0.5 else None
        yield tokens.tolist(), geometry


def test_a_thousand_random_images_are_written_and_read_byte_for_byte(in_page):
    jobs, files, images = [], [], []
    for seed, store in enumerate((*STORES, *BUNDLED)):
        models = models_for(store)
        for tokens, geometry in random_images(store, 250, seed):
            files.append(write_tokens(np.array(tokens), models, geometry).hex())
            images.append((tokens, geometry))
            jobs.append({"job": "write", "store": path_of(store), "tiles": [tokens], "geometry": as_page(geometry)})
            jobs.append({"job": "read", "store": path_of(store), "file": files[-1]})
    found = in_page(jobs)
    assert len(files) == 1000 and found[::2] == files
    for (tokens, geometry), (read,) in zip(images, found[1::2], strict=True):
        assert read["tiles"] == [tokens] and read["geometry"] == as_page(geometry)


def test_payloads_of_all_prefixes_are_those_of_each(in_page):
    models = models_for(BUNDLED[0])
    tokens = likely_tokens(models.by_mode[Mode.NETWORK], 1)[0]
    found = in_page(
        [{"job": "prefixes", "store": path_of(BUNDLED[0]), "tokens": tokens.tolist(), "mode": mode} for mode in Mode]
    )
    for mode, payloads in zip(Mode, found, strict=True):
        expected = [models.by_mode[mode].encode(tokens[:length]).hex() for length in range(1, len(tokens) + 1)]
        assert payloads == expected


def damaged_files(golden, count):
    """Golden files with bytes changed, inserted, removed or cut; and bytes at random behind a sound beginning."""
    draws, cases = np.random.default_rng(0), list(golden["files"].values())
    for _ in range(count):
        case = cases[draws.integers(len(cases))]
        data = bytearray.fromhex(case["hex"])
        place = int(draws.integers(len(data)))
        kind = draws.integers(5)
        if kind == 0:
            data[place] ^= 1 << int(draws.integers(8))
        elif kind == 1:
            data[place] = int(draws.integers(256))
        elif kind == 2:
            data.insert(place, int(draws.integers(256)))
        elif kind == 3:
            del data[place : place + int(draws.integers(1, 4))]
        else:
            data[place:] = draws.bytes(int(draws.integers(1, 12)))
        yield case["store"], bytes(data)


def test_damaged_files_are_rejected_or_read_as_python_does(in_page, golden):
    files = list(damaged_files(golden, 2000))
    found = in_page([{"job": "read", "store": path_of(store), "file": data.hex()} for store, data in files])
    rejected = 0
    for (store, data), (read,) in zip(files, found, strict=True):
        try:
            expected = read_tokens(data, models_for(store))
        except FormatError:
            assert "error" in read, data.hex()
            rejected += 1
            continue
        tokens = [row[:count].tolist() for row, count in zip(expected.tokens, expected.certain, strict=True)]
        assert read.get("tiles") == tokens, data.hex()
    assert 1000 < rejected < 2000


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("size", [(32, 32), (100, 60), (28, 28), (33, 32), (500, 7), (1, 9), (60, 70)])
def test_an_image_becomes_the_square_that_python_makes(in_page, size):
    """Transparent and opaque. Very tall ones, which Pillow scales down first, may differ by a grey level."""
    width, height = size
    rgba = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    rgba[: height // 2, :, 3] = 255
    fits = [fit for fit in Fit if fit != Fit.TILE]
    image = {"job": "square", "width": width, "height": height, "rgba": rgba.tobytes().hex(), "side": 32}
    for fit, found in zip(fits, in_page([{**image, "fit": int(fit)} for fit in fits]), strict=True):
        canvas = to_canvas(Image.fromarray(rgba), fit, 32)
        assert found["square"] == canvas.squares[0].tobytes().hex()
        assert found["geometry"] == as_page(canvas.geometry)
        left, top, right, bottom = found["box"]
        assert (right - left) * (bottom - top) == canvas.area
        assert canvas.shares[0, top:bottom, left:right].all()


@pytest.mark.parametrize("size", [(256, 100), (33, 61), (20, 64), (32, 33), (32, 32)])
def test_an_image_is_cut_into_the_tiles_that_python_makes(in_page, size):
    width, height = size
    rgba = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    (found,) = in_page([{"job": "tiles", "width": width, "height": height, "rgba": rgba.tobytes().hex(), "side": 32}])
    canvas = to_canvas(Image.fromarray(rgba), Fit.TILE, 32)
    assert found["squares"] == [square.tobytes().hex() for square in canvas.squares]
    assert found["geometry"] == json.loads(json.dumps(as_page(canvas.geometry)))


def test_tiles_are_blended_as_python_does(in_page):
    draws = np.random.default_rng(0)
    geometry = Geometry(100, 60, Fit.TILE, 6, Tiles(3, 5, (1,) * 15))
    squares = draws.integers(0, 256, (5, 3, 32, 32, 3), dtype=np.uint8)
    known = draws.random(15) < 0.8
    expected = from_squares(iter(squares), known, geometry, 32)
    sent = [tile.tobytes().hex() for tile in squares.reshape(15, -1)]
    sent = [tile if is_known else None for tile, is_known in zip(sent, known, strict=True)]
    (found,) = in_page([{"job": "blend", "squares": sent, "geometry": as_page(geometry), "side": 32}])
    got = np.frombuffer(bytes.fromhex(found), np.uint8).reshape(100, 60, 3)
    assert expected.size == (60, 100) and np.abs(got.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("name, folder", [("one-d-piece_fashion", "fashion"), ("one-d-piece_emoji", "emoji")])
def test_tokens_are_pytorchs_and_images_within_a_grey_level(in_page, name, folder):
    tokenizer, _ = load_tokenizer(checkpoint=name)
    paths = sorted((ROOT / "assets" / folder).glob("*.png"))
    pixels = torch.stack([EvalTransform(32)(Image.open(path).convert("RGB")) for path in paths])
    tokens = encode_tokens(tokenizer, pixels / 255)
    model = f"assets/models/{name}"
    sent = [square.tobytes().hex() for square in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    assert in_page([{"job": "encode", "model": model, "pixels": square} for square in sent]) == tokens.tolist()
    jobs, expected = [], []
    for row, length in enumerate([1, 2, 5, 8, 16, 31, 32, 32]):
        jobs.append({"job": "decode", "model": model, "tokens": tokens[row, :length].tolist()})
        with torch.inference_mode():
            expected.append(to_array(tokenizer.decode_tokens(tokens[row : row + 1, :length]))[0])
    jobs.append({**jobs[4], "withSimd": False})
    for image, found in zip([*expected, expected[4]], in_page(jobs), strict=True):
        got = np.frombuffer(bytes.fromhex(found), np.uint8).reshape(32, 32, 3)
        assert np.abs(got.astype(int) - image).max() <= 1


@pytest.mark.long
@pytest.mark.parametrize(
    "name, shards", [("one-d-piece_fashion", "fashion_mnist_test"), ("one-d-piece_emoji", "emoji_test")]
)
def test_tokens_of_held_out_images_are_pytorchs(in_page, name, shards):
    """Prints how many, with -s."""
    tokenizer, _ = load_tokenizer(checkpoint=name)
    images = []
    for path in sorted((ROOT / "assets" / shards).glob("*.tar.gz")):
        with tarfile.open(path) as shard:
            files = [shard.extractfile(member).read() for member in shard if member.name.endswith(".png")]
            images += [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    pixels = torch.stack([EvalTransform(32)(image) for image in images[:1000]])
    sent = [square.tobytes().hex() for square in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    model = f"assets/models/{name}"
    found = np.array(in_page([{"job": "encode", "model": model, "pixels": square} for square in sent]))
    same = found == torch.cat([encode_tokens(tokenizer, part / 255) for part in pixels.split(100)]).numpy()
    print(f"\n{name}: {same.sum():,} of {same.size:,} tokens of {len(same):,} held-out images are PyTorch's")
    assert same.mean() > 0.999
