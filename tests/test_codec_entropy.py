"""Entropy models: the same integers everywhere, exact files, and only `FormatError` for what is damaged."""

import dataclasses
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from codec.bitstream import Fit, FormatError, Geometry, Header, Mode, RangeDecoder, Tiles, mixed, pack, unpack
from codec.entropy import (
    EXP2,
    FILE,
    UNKNOWN,
    CausalNetwork,
    EntropyModels,
    FixedBits,
    StaticTables,
    entropy_models_of,
    load_entropy_models,
    read_tokens,
    save_entropy_models,
    shares,
    write_tokens,
)
from tests.codec_data import TOKENIZER, likely_tokens, random_arrays, random_models
from utils.errors import UserError
from utils.paths import ROOT

SIZES = {
    "pairs": {"num_tokens": 8, "codebook_size": 64, "token_size": 4, "width": 16},
    "shared": {
        "num_tokens": 12,
        "codebook_size": 50,
        "token_size": 4,
        "width": 16,
        "blocks": 2,
        "window": 3,
        "reach": 4,
    },
}
# As the garments' network, and one for 256 tokens of 12 bits.
FULL = {
    "pairs": {"num_tokens": 32, "codebook_size": 1024, "token_size": 12, "width": 128},
    "shared": {"num_tokens": 256, "codebook_size": 4096, "token_size": 12, "width": 96, "window": 32, "reach": 16},
}
MODELS = {name: random_models(**sizes) for name, sizes in SIZES.items()}
KINDS = pytest.mark.parametrize("kind", SIZES)
MODES = pytest.mark.parametrize("mode", list(Mode), ids=[mode.name.lower() for mode in Mode])


def contexts(sizes, count, seed=0):
    """Random tokens (count, p) for positions p, the first, the last and random ones, by p."""
    draws = np.random.default_rng(seed)
    some = [0, sizes["num_tokens"] - 1, *draws.integers(0, sizes["num_tokens"], count // 40)]
    places = draws.choice(some, count)
    for place in np.unique(places):
        yield draws.integers(0, sizes["codebook_size"], ((places == place).sum(), place))


# ----------------------------------------------------------------------------------------- the same integers everywhere


def logits_of_one(arrays, tokens):
    """The network by Python's own integers, as docs/format.md says it."""
    arrays = {name: array.tolist() for name, array in arrays.items()}
    place, width = len(tokens), len(arrays["head"])
    sums = list(arrays["position_bias"][place])
    for earlier, token in enumerate(tokens):
        matrix = matrix_of(arrays, earlier, place)
        for unit in range(width):
            sums[unit] += sum(code * row[unit] for code, row in zip(arrays["codes"][token], matrix or [], strict=False))
    hidden = [limited(value, arrays["position_scale"][place]) for value in sums]
    for weights, bias, scale in zip(arrays["hidden"], arrays["hidden_bias"], arrays["hidden_scale"], strict=True):
        sums = [bias[place][unit] + dot(hidden, weights, unit) for unit in range(width)]
        hidden = [value + limited(more, scale) for value, more in zip(hidden, sums, strict=True)]
    table = arrays["tables"][arrays["table_of_position"][place]]
    return [
        rescaled(dot(hidden, arrays["head"], token), arrays["head_scale"][0]) + 16 * entry
        for token, entry in enumerate(table)
    ]


def matrix_of(arrays, earlier, place):
    if arrays["pairs"]:
        return arrays["pairs"][place * (place - 1) // 2 + earlier]
    if place - earlier <= len(arrays["near"]):
        return arrays["near"][len(arrays["near"]) - (place - earlier)]
    return arrays["far"][earlier] if earlier < len(arrays["far"]) else None


def dot(values, weights, column):
    return sum(value * row[column] for value, row in zip(values, weights, strict=True))


def rescaled(value, scale):
    return (value * scale + 2**23) // 2**24


def limited(value, scale):
    return min(max(rescaled(value, scale), 0), 255)


def shares_of_one(logits, total_bits):
    """The shares by Python's own integers."""
    best = max(logits)
    weights = [int(EXP2[(best - logit) % 256]) >> (best - logit) // 256 for logit in logits]
    spread = 2**total_bits - len(logits)
    result = [1 + weight * spread // sum(weights) for weight in weights]
    result[logits.index(best)] += 2**total_bits - sum(result)
    return result


@KINDS
@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.long)])
def test_frequencies_are_those_of_plain_integers(kind, count):
    network = MODELS[kind].by_mode[Mode.NETWORK]
    for tokens in contexts(SIZES[kind], count):
        frequencies = network.frequencies(tokens)
        assert frequencies.dtype == np.int64
        for row, found in zip(tokens.tolist(), frequencies.tolist(), strict=True):
            assert found == shares_of_one(logits_of_one(network.arrays, row), network.total_bits)


def logits_in_torch(arrays, tokens, dtype):
    """The network in torch, its products in `dtype`."""
    arrays = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    place, size = tokens.shape[1], arrays["codes"].shape[1]
    codes = arrays["codes"][torch.from_numpy(tokens)].flatten(1)

    def product(values, weights):
        return (values.to(dtype) @ weights.to(dtype)).long()

    def rescaled(sums, scale):
        return (sums * scale + 2**23) >> 24

    sums = arrays["position_bias"][place].expand(len(tokens), -1)
    if len(arrays["pairs"]):
        first = place * (place - 1) // 2
        sums = sums + product(codes, arrays["pairs"][first : first + place].flatten(0, 1))
    else:
        window, reach = len(arrays["near"]), len(arrays["far"])
        split = max(0, place - window)
        sums = sums + product(codes[:, split * size :], arrays["near"][window - place + split :].flatten(0, 1))
        sums = sums + product(codes[:, : min(split, reach) * size], arrays["far"][: min(split, reach)].flatten(0, 1))
    hidden = rescaled(sums, arrays["position_scale"][place]).clamp(0, 255)
    for weights, bias, scale in zip(arrays["hidden"], arrays["hidden_bias"], arrays["hidden_scale"], strict=True):
        hidden = hidden + rescaled(product(hidden, weights) + bias[place], scale).clamp(0, 255)
    table = arrays["tables"][arrays["table_of_position"][place]]
    return rescaled(product(hidden, arrays["head"]), arrays["head_scale"]) + 16 * table


def frequencies_in_torch(arrays, tokens, total_bits, dtype=torch.float32):
    below = logits_in_torch(arrays, tokens, dtype)
    below = below.amax(dim=1, keepdim=True) - below
    weights = torch.from_numpy(EXP2)[below & 255] >> (below >> 8).clamp(max=31)
    spread = (1 << total_bits) - below.shape[1]
    found = 1 + torch.div(weights * spread, weights.sum(dim=1, keepdim=True), rounding_mode="floor")
    likeliest = (below == 0).int().argmax(dim=1, keepdim=True)
    return found.scatter_add(1, likeliest, (1 << total_bits) - found.sum(dim=1, keepdim=True)).numpy()


@pytest.fixture
def threads():
    """torch's number of threads is that of before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind, count", [("pairs", 2000), ("shared", 200)])
def test_numpy_and_torch_give_the_same_frequencies_on_one_thread_and_on_more(kind, count, threads):
    """Sums as large as the format allows, where float32 is about to round."""
    network = CausalNetwork(random_arrays(**FULL[kind]), total_bits=20)
    for tokens in contexts(FULL[kind], count):
        found = network.frequencies(tokens)
        for number in (1, 3):
            threads(number)
            assert np.array_equal(found, frequencies_in_torch(network.arrays, tokens, 20))
        assert np.array_equal(found[:3], frequencies_in_torch(network.arrays, tokens[:3], 20, torch.int64))


@pytest.mark.long
@pytest.mark.parametrize("kind", FULL)
def test_thousands_of_contexts_have_the_same_frequencies_in_numpy_and_torch(kind):
    network = CausalNetwork(random_arrays(**FULL[kind]), total_bits=20)
    for tokens in contexts(FULL[kind], 6000):
        found = network.frequencies(tokens)
        for dtype in (torch.float32, torch.int64):
            assert np.array_equal(found, frequencies_in_torch(network.arrays, tokens, 20, dtype))


@pytest.mark.parametrize("kind", FULL)
def test_neither_the_batch_nor_its_order_changes_frequencies(kind):
    network = CausalNetwork(random_arrays(**FULL[kind]), total_bits=20)
    tokens = np.random.default_rng(0).integers(0, network.codebook_size, (100, network.num_tokens // 2))
    together = network.frequencies(tokens)
    assert np.array_equal(together[::-1], network.frequencies(tokens[::-1]))
    assert np.array_equal(together[:33], network.frequencies(tokens[:33]))
    assert np.array_equal(together[:1], network.frequencies(tokens[:1]))


FINGERPRINT = """
import hashlib, numpy as np
from codec.entropy import CausalNetwork
from tests.codec_data import random_arrays
network = CausalNetwork(random_arrays(num_tokens=32, codebook_size=1024, token_size=12, width=128), total_bits=18)
tokens, found = np.random.default_rng(0).integers(0, 1024, (500, 31)), hashlib.sha256()
for place in (0, 1, 7, 16, 31):
    for size in (1, 8, 491):
        found.update(network.frequencies(tokens[:size, :place]).tobytes())
print(found.hexdigest())
"""


def test_neither_threads_nor_the_kernels_of_the_blas_change_frequencies():
    """OpenBLAS takes its matrix product from the processor's kind; an older kind sums in another order."""
    settings = [{"OPENBLAS_NUM_THREADS": "1"}, {"OPENBLAS_NUM_THREADS": "4"}]
    settings += [{"OPENBLAS_CORETYPE": "Prescott"}, {"OPENBLAS_CORETYPE": "Haswell"}]
    found = {
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout
        for environment in settings
    }
    assert len(found) == 1


@pytest.mark.parametrize("total_bits", [12, 18, 24])
def test_shares_are_at_least_1_and_add_up(total_bits):
    draws = np.random.default_rng(0)
    for spread in (0, 1, 300, 5000, 10**6):
        logits = draws.integers(-spread, spread + 1, (20, 1000))
        found = shares(logits, total_bits)
        assert found.min() >= 1
        assert (found.sum(axis=1) == 1 << total_bits).all()
        assert found[0].tolist() == shares_of_one(logits[0].tolist(), total_bits)


def test_a_bit_more_is_twice_the_share():
    found = shares(np.array([[0, 256, 512, 512 + 128]]), 20)[0] / 2**20
    assert np.allclose(found / found[0], [1, 2, 4, 4 * 2**0.5], rtol=1e-4)


def test_powers_of_two_are_exact_floors():
    """Doubles give the same: none of the values is close to a whole number."""
    values = [2 ** (20 - place / 256) for place in range(256)]
    assert EXP2.tolist() == [int(value) for value in values]
    assert min(value % 1 for value in values[1:]) > 1e-4 and max(value % 1 for value in values[1:]) < 1 - 1e-4
    assert EXP2.sum() == 193_897_387  # as docs/format.md says


# ------------------------------------------------------------------------------------------------------------ payloads


@KINDS
@MODES
def test_tokens_come_back_from_their_payloads(kind, mode):
    models = MODELS[kind]
    model = models.by_mode[mode]
    tokens = likely_tokens(models.by_mode[Mode.NETWORK], 60)
    payloads = model.encode_batch(tokens)
    assert payloads == [model.encode(row) for row in tokens]
    found, certain = model.decode_batch(payloads, [model.num_tokens] * len(tokens))
    assert np.array_equal(found, tokens) and (certain == model.num_tokens).all()
    for row, payload in zip(tokens[:10], payloads, strict=False):
        assert np.array_equal(model.decode(payload, model.num_tokens)[0], row)


@KINDS
@MODES
def test_a_batch_may_have_prefixes_of_any_lengths(kind, mode):
    models = MODELS[kind]
    model = models.by_mode[mode]
    tokens = likely_tokens(models.by_mode[Mode.NETWORK], 30)
    lengths = np.random.default_rng(0).integers(1, model.num_tokens + 1, len(tokens))
    payloads = model.encode_batch(tokens, lengths)
    assert payloads == [model.encode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    found, certain = model.decode_batch(payloads, lengths)
    assert certain.tolist() == lengths.tolist()
    for row, other, length in zip(found, tokens, lengths, strict=True):
        assert np.array_equal(row[:length], other[:length]) and (row[length:] == UNKNOWN).all()


@KINDS
@MODES
def test_bytes_and_bits_of_prefixes_are_those_of_real_payloads(kind, mode):
    models = MODELS[kind]
    model = models.by_mode[mode]
    tokens = likely_tokens(models.by_mode[Mode.NETWORK], 40)
    bits, sizes = model.prefix_bits(tokens), model.prefix_bytes(tokens)
    for length in range(1, model.num_tokens + 1):
        payloads = model.encode_batch(tokens[:, :length])
        assert sizes[:, length - 1].tolist() == [len(payload) for payload in payloads]
    over = sizes - bits / 8
    assert 0 <= over.max() < 1
    if mode != Mode.FIXED:
        assert over.mean() < 0.5


@KINDS
@MODES
def test_bytes_of_tiles_are_those_of_real_payloads(kind, mode):
    models = MODELS[kind]
    model = models.by_mode[mode]
    tokens = likely_tokens(models.by_mode[Mode.NETWORK], 12)
    lengths = np.random.default_rng(0).integers(1, model.num_tokens + 1, (20, 12))
    sizes = model.tiles_bytes(tokens, lengths)
    assert sizes.tolist() == [len(model.encode_tiles(tokens, kept)) for kept in lengths]


@KINDS
@MODES
def test_a_cut_payload_gives_a_prefix_of_the_tokens(kind, mode):
    models = MODELS[kind]
    model = models.by_mode[mode]
    tokens = likely_tokens(models.by_mode[Mode.NETWORK], 20)
    for row, payload in zip(tokens, model.encode_batch(tokens), strict=True):
        before = 0
        for size in range(len(payload)):
            found, certain = model.decode(payload[:size], model.num_tokens, is_whole=False)
            assert before <= certain < model.num_tokens
            assert np.array_equal(found[:certain], row[:certain]) and (found[certain:] == UNKNOWN).all()
            before = certain


@KINDS
@MODES
def test_tiles_share_one_payload_and_a_cut_takes_from_all_of_them(kind, mode):
    models = MODELS[kind]
    model = models.by_mode[mode]
    tokens = likely_tokens(models.by_mode[Mode.NETWORK], 9)
    lengths = [1, 3, model.num_tokens, 2, 5, 5, 4, 8, 1]
    payload = model.encode_tiles(tokens, lengths)
    assert len(payload) <= sum(map(len, model.encode_batch(tokens, lengths)))
    found, certain = model.decode_tiles(payload, lengths)
    assert certain.tolist() == lengths
    for size in range(len(payload)):
        found, certain = model.decode_tiles(payload[:size], lengths, is_whole=False)
        assert sum(certain) < sum(lengths)
        reached = max(certain)
        for tile, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
            assert min(length, reached - 1) <= certain[tile] <= length
            assert np.array_equal(found[tile, : certain[tile]], row[: certain[tile]])


@pytest.mark.parametrize("mode", [Mode.TABLES, Mode.NETWORK])
def test_a_payload_that_no_encoder_writes_is_refused(mode):
    """Zeros behind a payload, or other bytes: they decode to the same tokens, so that one file could have two forms."""
    models = MODELS["pairs"]
    model = models.by_mode[mode]
    row = likely_tokens(models.by_mode[Mode.NETWORK], 1)[0]
    for behind in (b"\0", b"\1", b"\0\0\0\7"):
        with pytest.raises(FormatError, match="its tokens are not written so"):
            model.decode(model.encode(row) + behind, model.num_tokens)


def test_fixed_bits_refuse_what_is_no_token():
    model = FixedBits(num_tokens=3, codebook_size=50)
    assert model.encode(np.array([1, 2, 49])) == bytes([0b00000100, 0b00101100, 0b01000000])
    with pytest.raises(FormatError, match="token 50 of a codebook of 50"):
        model.decode(bytes([0b00000100, 0b00101100, 0b10000000]), 3)
    with pytest.raises(FormatError, match="its tokens are not written so"):
        model.decode(bytes([0b00000100, 0b00101100, 0b01000001]), 3)


# --------------------------------------------------------------------------------------------------------------- files


def random_file(models, draws):
    """A file, its tokens (T, n) and lengths."""
    num_tokens, geometry = models.num_tokens, None
    lengths = [draws.randrange(1, num_tokens + 1)]
    if draws.random() < 0.4:
        columns, rows = draws.randrange(1, 4), draws.randrange(1, 4)
        lengths = [draws.randrange(1, num_tokens + 1) for _ in range(columns * rows)]
        tiles = Tiles(columns, rows, tuple(lengths))
        geometry = Geometry(draws.randrange(1, 3000), draws.randrange(1, 3000), Fit.TILE, draws.randrange(1, 9), tiles)
    elif draws.random() < 0.4:
        geometry = Geometry(draws.randrange(1, 3000), draws.randrange(1, 3000), Fit.PAD)
    mode = draws.choice([None, *models.by_mode])
    if draws.random() < 0.7:
        tokens = likely_tokens(models.by_mode[Mode.NETWORK], len(lengths), seed=draws.randrange(1 << 30))
    else:
        tokens = np.random.default_rng(draws.randrange(1 << 30)).integers(
            0, models.codebook_size, (len(lengths), num_tokens)
        )
    tokens = tokens[:, : max(lengths)]
    return write_tokens(tokens, models, geometry, mode), tokens, lengths


@KINDS
@pytest.mark.parametrize("count", [40, pytest.param(1500, marks=pytest.mark.long)])
def test_a_file_is_read_whole_by_its_head_and_cut_at_every_byte(kind, count):
    models, draws = MODELS[kind], random.Random(10)
    for _ in range(count):
        data, tokens, lengths = random_file(models, draws)
        read = read_tokens(data, models)
        assert not read.is_cut and read.certain.tolist() == lengths
        assert read.header_size + read.payload_size == len(data)
        for row, other, length in zip(read.tokens, tokens, lengths, strict=True):
            assert np.array_equal(row[:length], other[:length])
        few = draws.randrange(1, max(lengths) + 1)
        assert read_tokens(data, models, few).certain.tolist() == [min(few, length) for length in lengths]
        for size in range(read.header_size):
            with pytest.raises(FormatError):
                read_tokens(data[:size], models)
        for size in range(read.header_size, len(data)):
            cut = read_tokens(data[:size], models)
            assert cut.is_cut and sum(cut.certain) < sum(lengths)
            for row, other, certain in zip(cut.tokens, tokens, cut.certain, strict=True):
                assert np.array_equal(row[:certain], other[:certain])


def test_a_mode_that_makes_too_little_of_very_many_tokens_is_refused_and_not_taken():
    tables = np.full((1, 4), -127, np.int8)
    tables[0, 0] = 127
    nearly_free = StaticTables(tables, np.zeros(2048, np.uint16), 10)
    models = EntropyModels(bytes(32), {Mode.FIXED: FixedBits(2048, 4), Mode.TABLES: nearly_free})
    tokens = np.zeros(2048, np.int64)
    assert unpack(write_tokens(tokens, models)).header.mode == Mode.FIXED
    with pytest.raises(UserError, match="bytes of the mode tables may not hold 2048 tokens: leave the mode out"):
        write_tokens(tokens, models, mode=Mode.TABLES)


def test_the_smallest_mode_is_taken():
    models = MODELS["pairs"]
    likely = likely_tokens(models.by_mode[Mode.NETWORK], 1)[0]
    assert unpack(write_tokens(likely, models)).header.mode == Mode.NETWORK
    sizes = {}
    for seed in range(20):
        foreign = np.random.default_rng(seed).integers(0, models.codebook_size, models.num_tokens)
        data = write_tokens(foreign, models)
        forced = [len(write_tokens(foreign, models, mode=mode)) for mode in Mode]
        assert len(data) == min(forced)
        sizes[unpack(data).header.mode] = True
    assert Mode.FIXED in sizes  # what the network never saw would cost more by it


@KINDS
@pytest.mark.parametrize("count", [15, pytest.param(500, marks=pytest.mark.long)])
def test_every_flipped_bit_of_a_whole_file_is_an_error(kind, count):
    models, draws = MODELS[kind], random.Random(11)
    for _ in range(count):
        data, _, _ = random_file(models, draws)
        for bit in range(8 * len(data)) if len(data) < 60 else draws.sample(range(8 * len(data)), 100):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(FormatError):
                read_tokens(bytes(flipped), models)


@KINDS
@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.long)])
def test_damage_ends_in_an_error_or_in_tokens_of_the_codebook(kind, count):
    """Also where the check fits: somebody may have meant it."""
    models, draws = MODELS[kind], random.Random(12)
    files = [random_file(models, draws)[0] for _ in range(20)]
    for _ in range(count):
        data = draws.choice([damaged, forged])(draws.choice(files), draws)
        try:
            read = read_tokens(data, models)
        except FormatError:
            continue
        assert read.tokens.max(initial=0) < models.codebook_size
        assert read.tokens.size <= 1000 * (len(data) + 1000)


def forged(data, draws):
    """The file with another payload and perhaps another number of tokens, and a check that fits."""
    file = unpack(data)
    payload = damaged(file.payload, draws)
    num_tokens = draws.choice([file.header.num_tokens, draws.randrange(1, 5000)])
    header = dataclasses.replace(file.header, num_tokens=num_tokens, payload_size=len(payload))
    try:
        return pack(header, payload)
    except UserError:  # beyond what a file can hold
        return data


def damaged(data, draws):
    """Some bytes changed, put in and left out."""
    data = bytearray(data)
    for _ in range(draws.randrange(1, 4)):
        place = draws.randrange(len(data) + 1)
        data[place : place + draws.randrange(4)] = draws.randbytes(draws.randrange(4))
    return bytes(data)


@MODES
def test_a_payload_of_random_bytes_is_no_reason_to_fall(mode):
    model, draws = MODELS["pairs"].by_mode[mode], random.Random(13)
    for _ in range(300):
        payload, length = draws.randbytes(draws.randrange(20)), draws.randrange(1, model.num_tokens + 1)
        tokens, certain = np.zeros(0), 0
        try:
            tokens, certain = model.decode(payload, length, is_whole=False)
            model.decode(payload, length)
        except FormatError:
            pass
        assert certain <= length and tokens.max(initial=0) < model.codebook_size


# 4,096 tokens, a payload of a megabyte, 1 x 1 pixels as 256 x 256 tiles, each of 4,096 tokens
DECLARES_MUCH = bytes.fromhex("ff3fffff3f180000ff01ff01ff1f")


def test_few_bytes_that_declare_very_much_cost_little():
    """A header of 65,536 tiles of 4,096 tokens, cut behind it."""
    fixed = FixedBits(4096, 64)
    models = EntropyModels(TOKENIZER, {Mode.FIXED: fixed})
    fields = bytes.fromhex("1d50") + TOKENIZER[:2]
    fields += mixed(b"\0", fields + DECLARES_MUCH) + DECLARES_MUCH
    read = read_tokens(fields + b"1234" + b"some", models)
    assert read.is_cut and read.header.geometry.tiles.columns == 256
    assert read.tokens.nbytes < 1 << 20
    assert sum(read.certain) == 5


@pytest.mark.parametrize("num_tokens", [None, 1])
def test_a_whole_file_of_fixed_bits_that_declares_very_much_is_refused_before_there_is_an_array(num_tokens):
    """65,536 tiles of 256 tokens in a payload of one byte, for which 16,777,216 tokens were made before."""
    models = EntropyModels(TOKENIZER, {Mode.FIXED: FixedBits(256, 64)})
    geometry = Geometry(256, 256, Fit.TILE, tiles=Tiles(256, 256, (256,) * 65536))
    data = pack(Header(Mode.FIXED, TOKENIZER[:2], b"\0", 256, 1, geometry), b"x")
    tracemalloc.start()
    with pytest.raises(FormatError, match="its tokens are not written so"):
        read_tokens(data, models, num_tokens)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) < 30 and most < 3 << 20


def test_a_whole_file_of_few_bytes_for_many_tokens_is_read_with_short_numbers(monkeypatch):
    """As many tiles as the payload may hold, whose tokens go on for long behind it."""
    model, longest = MODELS["pairs"].by_mode[Mode.TABLES], []

    class Watched(RangeDecoder):
        def consume(self, *symbol):
            super().consume(*symbol)
            longest.append(max(self.code.bit_length(), self.slack.bit_length()))

    monkeypatch.setattr("codec.entropy.RangeDecoder", Watched)
    tiles = Tiles(128, 1, (8,) * 128)
    header = Header(Mode.TABLES, TOKENIZER[:2], model.identity[:1], 8, 1, Geometry(1000, 10, Fit.TILE, 1, tiles))
    read = read_tokens(pack(header, b"\x01"), MODELS["pairs"])
    assert write_tokens(read.tokens, MODELS["pairs"], header.geometry, Mode.TABLES) == pack(header, b"\x01")
    assert len(longest) == 1024 and max(longest) <= 64


def test_a_file_of_another_tokenizer_names_both():
    ours, others = MODELS["pairs"], dataclasses.replace(MODELS["pairs"], tokenizer=b"\xaa\xbb" + TOKENIZER[2:])
    data = write_tokens(np.arange(8), others)
    with pytest.raises(FormatError, match=r"written with the tokenizer aabb.*and this is 0001"):
        read_tokens(data, ours)


def test_a_file_of_another_entropy_model_names_both():
    sizes = SIZES["pairs"]
    ours, others = random_models(**sizes), random_models(**sizes, seed=1)
    data = write_tokens(np.arange(8), others, mode=Mode.NETWORK)
    theirs, mine = (models.by_mode[Mode.NETWORK].identity[:1].hex() for models in (others, ours))
    with pytest.raises(FormatError, match=rf"entropy model network {theirs} of this tokenizer, and it has {mine} now"):
        read_tokens(data, ours)
    with pytest.raises(FormatError, match=r"and it has none of that kind now"):
        read_tokens(data, EntropyModels(TOKENIZER, {Mode.FIXED: ours.by_mode[Mode.FIXED]}))


def test_more_tokens_than_an_image_has_are_refused():
    models = MODELS["pairs"]
    more = EntropyModels(TOKENIZER, {Mode.FIXED: FixedBits(9, 64)})
    with pytest.raises(FormatError, match="9 tokens, and an image has 8"):
        read_tokens(write_tokens(np.arange(9), more), models)


@pytest.mark.parametrize("number", [0, -1])
def test_no_tokens_cannot_be_read(number):
    data = write_tokens(np.arange(8), MODELS["pairs"])
    with pytest.raises(UserError, match=f"tokens to read must be 1 or more, got {number}"):
        read_tokens(data, MODELS["pairs"], number)


# ------------------------------------------------------------------------------------------------------- stored models


@KINDS
def test_a_stored_model_comes_back_as_it_was(kind, tmp_path):
    models = MODELS[kind]
    save_entropy_models(tmp_path / FILE, TOKENIZER, models.by_mode[Mode.NETWORK])
    first = (tmp_path / FILE).read_bytes()
    save_entropy_models(tmp_path / FILE, TOKENIZER, models.by_mode[Mode.NETWORK])
    assert (tmp_path / FILE).read_bytes() == first
    found = entropy_models_of(tmp_path, TOKENIZER, models.num_tokens, models.codebook_size)
    assert found.tokenizer == TOKENIZER
    assert {mode: model.identity for mode, model in found.by_mode.items()} == {
        mode: model.identity for mode, model in models.by_mode.items()
    }
    tokens = likely_tokens(models.by_mode[Mode.NETWORK], 5)
    assert found.best().encode_batch(tokens) == models.best().encode_batch(tokens)


def test_tables_may_be_stored_alone(tmp_path):
    tables = MODELS["pairs"].by_mode[Mode.TABLES]
    save_entropy_models(tmp_path / FILE, TOKENIZER, tables)
    assert sorted(load_entropy_models(tmp_path / FILE).by_mode) == [Mode.FIXED, Mode.TABLES]


def test_without_a_stored_model_there_are_fixed_bits(tmp_path):
    for folder in (None, tmp_path):
        assert list(entropy_models_of(folder, TOKENIZER, 8, 64).by_mode) == [Mode.FIXED]


def test_the_model_of_another_tokenizer_is_refused_by_name(tmp_path):
    save_entropy_models(tmp_path / FILE, TOKENIZER, MODELS["pairs"].by_mode[Mode.NETWORK])
    for tokenizer, num_tokens in ((bytes(32), 8), (TOKENIZER, 9)):
        with pytest.raises(UserError, match=r"belongs to another tokenizer: to 000102030405 of 8 tokens"):
            entropy_models_of(tmp_path, tokenizer, num_tokens, 64)


def test_identities_depend_on_all_that_decides():
    arrays = random_arrays(**SIZES["pairs"])
    seen = {CausalNetwork(arrays, 14).identity, CausalNetwork(arrays, 15).identity}
    seen |= {StaticTables(arrays["tables"], arrays["table_of_position"], 14).identity}
    for name in ("codes", "pairs", "hidden", "position_bias", "head_scale", "tables"):
        changed = {other: array.copy() for other, array in arrays.items()}
        changed[name].flat[0] += 1
        seen.add(CausalNetwork(changed, 14).identity)
    assert len(seen) == 9


def test_a_damaged_store_is_refused(tmp_path):
    path = tmp_path / FILE
    save_entropy_models(path, TOKENIZER, MODELS["pairs"].by_mode[Mode.NETWORK])
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-1], b"PK\3\4" + whole, whole.replace(b'"pairs"', b'"spare"')):
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            load_entropy_models(path)


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.long)])
def test_a_store_with_changed_bytes_loads_or_is_refused(count, tmp_path):
    path, draws = tmp_path / FILE, random.Random(14)
    save_entropy_models(path, TOKENIZER, MODELS["pairs"].by_mode[Mode.NETWORK])
    whole = path.read_bytes()
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draws.randrange(1, 5)):
            data[draws.randrange(2000 if draws.random() < 0.8 else len(data))] = draws.randrange(256)
        path.write_bytes(data)
        try:
            models = load_entropy_models(path)
            models.best().encode(np.zeros(models.num_tokens, dtype=np.int64))
        except UserError:
            pass


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("head", 127, "sums of an entropy network must stay below"),
        ("pairs", 127, "sums of an entropy network must stay below"),
        ("position_bias", 1 << 24, "sums of an entropy network must stay below"),
        ("head_scale", 0, "scales of an entropy network must be in"),
        ("position_scale", 1 << 28, "scales of an entropy network must be in"),
    ],
)
def test_a_network_whose_sums_float32_would_round_is_refused(name, value, message):
    arrays = random_arrays(num_tokens=30, codebook_size=4, token_size=40, width=300)
    arrays = {other: np.zeros_like(array) for other, array in arrays.items()}
    arrays |= {other: np.ones_like(arrays[other]) for other in arrays if other.endswith("scale")}
    arrays["codes"][:] = 127
    CausalNetwork(arrays, 14)
    arrays[name][:] = value
    with pytest.raises(UserError, match=message):
        CausalNetwork(arrays, 14)
