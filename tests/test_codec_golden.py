"""Files that were written once and must decode for ever; `python3 -m tests.codec_golden` wrote them."""

import re
from pathlib import Path

import numpy as np
import pytest

from codec.bitstream import Fit, FormatError, Geometry, Header, Mode, pack, unpack
from codec.entropy import StaticTables, read_tokens, write_tokens
from tests import page_reader
from tests.codec_golden import STORES as GOLDEN_STORES
from tests.codec_golden import models_of, path_of, read_vectors
from utils.paths import ROOT

SETS = sorted((ROOT / "tests/golden").glob("v*"))
FILES = sorted(path for folder in SETS for path in folder.glob("*.1dp"))
PAGE = (ROOT / "docs/format.md").read_text()
STORES = {}


def stores_of(folder):
    return {case["store"] for case in read_vectors(folder)["files"].values()}


def models_for(store, folder):
    if (folder, store) not in STORES:
        STORES[folder, store] = models_of(store, folder)
    return STORES[folder, store]


def test_there_is_a_set_for_every_version():
    assert [folder.name for folder in SETS] == ["v1"]
    assert len(FILES) == len(read_vectors(SETS[0])["files"]) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_golden_file_decodes_as_ever(path: Path):
    expected, data = read_vectors(path.parent)["files"][path.name], path.read_bytes()
    models = models_for(expected["store"], path.parent)
    assert data.hex() == expected["hex"]
    read = read_tokens(data, models)
    header = read.header
    assert header.mode.name.lower() == expected["mode"] and header.entropy.hex() == expected["entropy"]
    tokens = [row[:length].tolist() for row, length in zip(read.tokens, header.lengths, strict=True)]
    assert tokens == expected["tokens"]
    if header.geometry:
        assert [header.geometry.fit.name.lower(), header.geometry.width, header.geometry.height] == expected["geometry"]
        assert header.geometry.orientation == expected["orientation"]
    for size, certain in enumerate(expected["certain_when_cut"], start=read.header_size):
        assert read_tokens(data[:size], models).certain.tolist() == certain
    assert read.header_size + len(expected["certain_when_cut"]) == len(data)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_flipped_bit_of_a_golden_file_is_an_error(path: Path):
    data = path.read_bytes()
    models = models_for(read_vectors(path.parent)["files"][path.name]["store"], path.parent)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            read_tokens(bytes(flipped), models)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_golden_file_is_refused_by_every_other_model(path: Path):
    own = read_vectors(path.parent)["files"][path.name]["store"]
    for store in stores_of(path.parent) - {own}:
        models = models_for(store, path.parent)
        if models.tokenizer != models_for(own, path.parent).tokenizer:
            with pytest.raises(FormatError, match="written with the tokenizer"):
                read_tokens(path.read_bytes(), models)


@pytest.mark.parametrize("path", [path for path in FILES if path.parent == SETS[-1]], ids=lambda path: path.name)
def test_golden_tokens_are_written_as_ever(path: Path):
    """Of the version that is written now."""
    expected = read_vectors(path.parent)["files"][path.name]
    models, file = models_for(expected["store"], path.parent), unpack(path.read_bytes())
    tokens = read_tokens(path.read_bytes(), models).tokens
    assert write_tokens(tokens, models, file.header.geometry, file.header.mode) == path.read_bytes()


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_golden_shares_are_as_ever(folder):
    for store, cases in read_vectors(folder)["shares"].items():
        network = models_for(store, folder).by_mode[Mode.NETWORK]
        for case in cases:
            tokens = np.array(case["after"], dtype=np.int64)[None]
            assert network.logits(tokens)[0].tolist() == case["logits"]
            assert network.frequencies(tokens)[0].tolist() == case["shares"]


# ---------------------------------------------------------------------------------------------------- the page itself


@pytest.mark.parametrize("store", sorted(stores_of(SETS[0])))
def test_a_reader_written_from_the_page_alone_reads_whole_and_cut_files(store):
    folder, cases = SETS[0], read_vectors(SETS[0])["files"]
    bundled = store not in GOLDEN_STORES
    model = page_reader.Store(path_of(store, folder).read_bytes())
    for case in [case for case in cases.values() if case["store"] == store][: 6 if bundled else None]:
        data = bytes.fromhex(case["hex"])
        assert page_reader.read(data, model) == case["tokens"]
        first = len(data) - len(case["certain_when_cut"])
        for size in range(first, len(data), 7 if bundled else 1):
            certain = case["certain_when_cut"][size - first]
            expected = [row[:count] for row, count in zip(case["tokens"], certain, strict=True)]
            assert page_reader.read(data[:size], model) == expected


def test_the_page_shows_a_file_by_fixed_bits():
    payload = bytes.fromhex("81403ffc")
    data = pack(Header(Mode.FIXED, bytes.fromhex("a1b2"), b"\0", 3, 4), payload)
    assert data.hex(" ") == "1d 50 a1 b2 8a 04 04 cc 81 40 3f fc"
    for part in ("1d 50 ", "a1 b2 ", "8a ", "04 ", "cc ", "81 40 3f fc"):
        assert f"\n{part}" in PAGE


def test_the_page_shows_a_file_with_geometry():
    geometry = Geometry(640, 480, Fit.PAD, orientation=6)
    data = pack(Header(Mode.NETWORK, bytes.fromhex("a1b2"), b"\xc3", 5, 2, geometry), bytes.fromhex("73c8"))
    assert data.hex(" ") == "1d 52 a1 b2 c0 09 02 0d ff 04 df 03 6b 73 c8"
    for part in ("1d 52 a1 b2 c0 ", "09 ", "02 ", "0d ", "ff 04  df 03 ", "6b ", "73 c8"):
        assert f"\n{part}" in PAGE


class Shares(StaticTables):
    """The page's four codes."""

    def __init__(self):
        super().__init__(np.zeros((1, 4), np.int8), np.zeros(5, np.uint16), total_bits=4)
        self._shares = np.array([[9, 4, 2, 1]])


def test_the_page_shows_the_range_coder():
    payload = Shares().encode(np.array([0, 1, 3, 0, 2]))
    assert payload.hex(" ") == "73 c8"
    assert Shares().decode(payload[:1], 5, is_whole=False)[1] == 4
    assert "| end | | | `73 c8` |" in PAGE


def test_every_number_of_the_page_that_the_code_has_is_the_codes():
    from codec import bitstream, entropy

    assert f"{bitstream.MAX_SIDE:,} pixels" in PAGE and f"1..{bitstream.MAX_TOKENS}" in PAGE
    assert f"at most {bitstream.MAX_TILES:,}" in PAGE and bitstream.MAX_PIXELS == 2**26
    assert bitstream.MAX_TOKEN_BYTES == 4 and "over 4 bytes a token" in PAGE
    assert f"more than {bitstream.TOKENS_PER_BYTE} (L + {bitstream.FREE_BYTES}) tokens" in PAGE
    first, last = [int(value) for value in entropy.EXP2[:3]], [int(value) for value in entropy.EXP2[-2:]]
    assert re.search(rf"{first[0]}, {first[1]}, {first[2]}, \.\.\., {last[0]}, {last[1]}", PAGE)


def test_a_file_of_the_next_version_says_so():
    data = bytearray(FILES[0].read_bytes())
    data[1] |= 1 << 2
    with pytest.raises(FormatError, match="of version 2, and this reads version 1"):
        unpack(bytes(data))
