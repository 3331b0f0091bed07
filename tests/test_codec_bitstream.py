"""The bytes of compressed files: range coder, packed bits, header, and what is refused."""

import bisect
import itertools
import math
import random

import pytest

from codec.bitstream import (
    MAX_PIXELS,
    Fit,
    FormatError,
    Geometry,
    Header,
    Mode,
    RangeDecoder,
    RangeEncoder,
    Tiles,
    check_of,
    pack,
    pack_bits,
    unpack,
    unpack_bits,
    varint,
)
from utils.errors import UserError

CASES = [pytest.param(300, id="300"), pytest.param(20_000, id="20000", marks=pytest.mark.long)]


class Alphabet:
    """Symbols with random shares, some of them much likelier than others."""

    def __init__(self, draws):
        self.total_bits = draws.choice([8, 16, 18, 20])
        count = draws.choice([2, 3, 40, 200])
        weights = [draws.random() ** draws.choice([1, 8, 20]) + 1e-9 for _ in range(count)]
        spread = (1 << self.total_bits) - count
        self.sizes = [1 + int(spread * weight / sum(weights)) for weight in weights]
        self.sizes[draws.randrange(count)] += (1 << self.total_bits) - sum(self.sizes)
        self.starts = list(itertools.accumulate(self.sizes, initial=0))[:-1]

    def draw(self, draws, count):
        """Symbols as likely as their shares, or, now and then, any: long runs of carries come from those."""
        if draws.random() < 0.5:
            return draws.choices(range(len(self.sizes)), weights=self.sizes, k=count)
        return [draws.choice([0, len(self.sizes) - 1]) for _ in range(count)]

    def write(self, symbols):
        encoder = RangeEncoder()
        for symbol in symbols:
            encoder.encode(self.starts[symbol], self.sizes[symbol], self.total_bits)
        return encoder.finish()

    def read(self, payload, count):
        """Symbols up to one that nobody writes, and how many came before the first that is not certain."""
        decoder, symbols, certain = RangeDecoder(payload), [], 0
        for _ in range(count):
            try:
                symbol = bisect.bisect_right(self.starts, decoder.target(self.total_bits)) - 1
            except FormatError:  # above the last one, where rounding leaves a gap
                break
            decoder.consume(self.starts[symbol], self.sizes[symbol], self.total_bits)
            symbols.append(symbol)
            certain += decoder.certain
        return symbols, certain

    def bits(self, symbols):
        return sum(self.total_bits - math.log2(self.sizes[symbol]) for symbol in symbols)


def streams(count, seed, longest=70):
    """(alphabet, symbols) at random."""
    draws = random.Random(seed)
    for _ in range(count):
        alphabet = Alphabet(draws)
        yield alphabet, alphabet.draw(draws, draws.randrange(1, longest))


# ------------------------------------------------------------------------------------------------- range coder


@pytest.mark.parametrize("count", CASES)
def test_the_range_coder_reads_what_it_wrote(count):
    for alphabet, symbols in streams(count, seed=1):
        assert alphabet.read(alphabet.write(symbols), len(symbols))[0] == symbols


@pytest.mark.parametrize("count", CASES)
def test_a_payload_of_any_length_is_under_a_byte_over_the_ideal_and_half_a_byte_in_the_mean(count):
    draws, lengths = random.Random(2), range(1, 41)
    over = {length: [] for length in lengths}
    for _ in range(count):
        alphabet, encoder, bits = Alphabet(draws), RangeEncoder(), 0.0
        for length, symbol in zip(lengths, alphabet.draw(draws, len(lengths)), strict=True):
            encoder.encode(alphabet.starts[symbol], alphabet.sizes[symbol], alphabet.total_bits)
            bits += alphabet.bits([symbol])
            over[length].append(encoder.num_bytes() - bits / 8)
    assert max(map(max, over.values())) < 1 + 1e-5  # shares are cut to 2 ** -40 of the interval
    assert max(sum(values) / len(values) for values in over.values()) < 0.5


def test_the_length_is_known_while_writing():
    for alphabet, symbols in streams(200, seed=3):
        encoder = RangeEncoder()
        assert encoder.num_bytes() == 0
        for symbol in symbols:
            encoder.encode(alphabet.starts[symbol], alphabet.sizes[symbol], alphabet.total_bits)
            assert encoder.num_bytes() == len(encoder.finish())


def test_no_shorter_payload_decodes_to_the_symbols():
    for alphabet, symbols in streams(60, seed=4, longest=5):
        payload = alphabet.write(symbols)
        if not 1 <= len(payload) <= 2:
            continue
        for shorter in itertools.product(range(256), repeat=len(payload) - 1):
            with pytest.raises((FormatError, AssertionError)):
                assert alphabet.read(bytes(shorter), len(symbols))[0] == symbols


def test_a_carry_runs_through_bytes_of_255():
    """After the lower half, the highest symbols: the bytes are 7f ff ff ..., which a carry would make 80 00 00 ..."""
    encoder = RangeEncoder()
    encoder.encode(0, 1, 1)
    for _ in range(40):
        encoder.encode((1 << 16) - 1, 1, 16)
    assert encoder.finish()[:70] == b"\x7f" + b"\xff" * 69
    encoder.encode((1 << 16) - 1, 1, 16)
    assert len(encoder.finish()) == encoder.num_bytes()
    decoder = RangeDecoder(encoder.finish())
    assert decoder.target(1) == 0
    decoder.consume(0, 1, 1)
    for _ in range(41):
        assert decoder.target(16) == (1 << 16) - 1
        decoder.consume((1 << 16) - 1, 1, 16)


@pytest.mark.parametrize("count", CASES)
def test_symbols_of_a_cut_payload_are_certain_while_zeros_and_ones_behind_it_agree(count):
    for alphabet, symbols in streams(count // 4, seed=5, longest=30):
        payload = alphabet.write(symbols)
        for size in range(len(payload)):
            cut = payload[:size]
            found, certain = alphabet.read(cut, len(symbols))
            ones, _ = alphabet.read(cut + b"\xff" * 200, len(symbols))
            agree = [one == other for one, other in zip(found, ones, strict=False)]
            assert certain == (agree + [False]).index(False)
            assert found[:certain] == symbols[:certain]
            assert certain < len(symbols)


def test_a_symbol_that_nobody_writes_is_refused():
    decoder = RangeDecoder(b"")
    for _ in range(2):  # leaves a range that 2 ** 20 does not divide
        decoder.consume(0, 65533, 20)
    decoder.code = decoder.range - 1
    with pytest.raises(FormatError, match="no symbol is written so"):
        decoder.target(20)


def test_the_numbers_of_a_decoder_stay_short_however_much_is_read_behind_a_payload():
    decoder, longest = RangeDecoder(b"\x12\x34"), 0
    for _ in range(2000):
        target = decoder.target(20)
        decoder.consume(target, 1, 20)
        longest = max(longest, decoder.code.bit_length(), decoder.slack.bit_length())
    assert decoder.place > 4000 and not decoder.certain and longest <= 64


# ------------------------------------------------------------------------------------------- bits, numbers, checks


def test_packed_bits_come_back():
    draws = random.Random(6)
    for _ in range(200):
        width, count = draws.randrange(0, 17), draws.randrange(0, 40)
        values = [draws.randrange(1 << width) for _ in range(count)]
        data = pack_bits(values, width)
        assert len(data) == -(-width * count // 8)
        assert unpack_bits(data, width, count) == values


class Watched(int):
    """A number that notes how long the one is that it is put behind."""

    longest = 0

    def __ror__(self, other):
        Watched.longest = max(Watched.longest, other.bit_length())
        return other | int(self)


class Sliced(bytes):
    """Bytes that note how many of them are taken at once."""

    longest = 0

    def __getitem__(self, place):
        Sliced.longest = max(Sliced.longest, len(super().__getitem__(place)))
        return super().__getitem__(place)


@pytest.mark.parametrize("width", [3, 10, 12])
def test_many_numbers_are_packed_and_unpacked_as_one_integer_would_be_and_never_become_one(width):
    draws = random.Random(7)
    values = [draws.randrange(1 << width) for _ in range(5000)]
    bits = "".join(f"{value:0{width}b}" for value in values)
    data = pack_bits(map(Watched, values), width)
    assert data == int(bits.ljust(8 * len(data), "0"), 2).to_bytes(len(data), "big")
    assert unpack_bits(Sliced(data), width, len(values)) == values
    assert Watched.longest <= 64 * width and Sliced.longest <= 8 * width


def test_bits_are_packed_highest_first():
    assert pack_bits([0b1000000001, 0b0000000011], 10) == bytes([0b10000000, 0b01000000, 0b00110000])


def test_numbers_are_of_7_bits_a_byte():
    assert varint(0) == b"\0"
    assert varint(127) == b"\x7f"
    assert varint(300) == b"\xac\x02"


def test_the_checks_are_the_published_ones():
    """Check values of CRC-8/SAE-J1850 and CRC-32 in the catalogue of parametrised CRC algorithms."""
    assert check_of(b"123456789", 1) == b"\x4b"
    assert check_of(b"123456789", 4) == bytes.fromhex("cbf43926")


# ------------------------------------------------------------------------------------------------- header


def header_of(payload, num_tokens=32, geometry=None, mode=Mode.NETWORK):
    return Header(mode, b"to", b"e", num_tokens, len(payload), geometry)


def test_a_header_takes_8_bytes_for_32_tokens_and_10_for_256():
    assert len(header_of(bytes(18)).pack(bytes(18))) == 8
    assert len(header_of(bytes(384), num_tokens=256).pack(bytes(384))) == 10
    geometry = Geometry(640, 480, Fit.PAD)
    assert len(header_of(bytes(18), geometry=geometry).pack(bytes(18))) == 13


def random_header(draws):
    mode = draws.choice(list(Mode))
    num_tokens, geometry = draws.choice([1, 2, 32, 64, 65, 256, 4096]), None
    if draws.random() < 0.7:
        fit, tiles = draws.choice(list(Fit)), None
        if fit == Fit.TILE:
            columns, rows = draws.randrange(1, 9), draws.randrange(1, 9)
            lengths = [draws.randrange(1, num_tokens + 1) for _ in range(columns * rows)]
            lengths[draws.randrange(len(lengths))] = num_tokens
            tiles = Tiles(columns, rows, tuple(lengths))
        geometry = Geometry(draws.randrange(1, 9000), draws.randrange(1, 5000), fit, draws.randrange(1, 9), tiles)
    total = sum(geometry.tiles.lengths) if geometry and geometry.tiles else num_tokens
    payload = draws.randbytes(draws.randrange(total // 60, 2 * total + 2))
    return header_of(payload, num_tokens, geometry, mode), payload


@pytest.mark.parametrize("count", CASES)
def test_a_header_comes_back_as_it_was(count):
    draws = random.Random(7)
    for _ in range(count):
        header, payload = random_header(draws)
        file = unpack(pack(header, payload))
        assert (file.header, file.payload, file.is_cut) == (header, payload, False)
        assert file.header_size + len(payload) == len(pack(header, payload))


def test_a_cut_file_keeps_its_header():
    header, payload = header_of(bytes(range(1, 19))), bytes(range(1, 19))
    data = pack(header, payload)
    for size in range(len(data)):
        if size < 8:
            with pytest.raises(FormatError, match=rf"ends within its header, after {size} bytes"):
                unpack(data[:size])
        else:
            file = unpack(data[:size])
            assert (file.header, file.payload, file.is_cut) == (header, payload[: size - 8], True)


@pytest.mark.parametrize("count", CASES)
def test_a_flipped_bit_is_detected(count):
    """By the check, or, where the file then seems to be cut, by an entropy model that there is not.

    A header that reads differently from some bit on may be missed once in 256 times, as docs/format.md says.
    """
    draws, tried, missed = random.Random(8), 0, []
    for _ in range(count // 10):
        header, payload = random_header(draws)
        data = pack(header, payload)
        for bit in draws.sample(range(8 * len(data)), min(8 * len(data), 200)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            tried += 1
            try:
                file = unpack(bytes(flipped))
            except FormatError:
                continue
            assert file.is_cut
            if file.header.entropy == header.entropy:
                missed.append(bit // 8)
                assert file.header_size != len(data) - len(payload)
    assert all(5 <= place < 24 for place in missed)  # in the fields of varying length
    assert len(missed) <= tried / 20_000


def with_check(fields, payload=b"", size=1):
    return fields + check_of(fields + payload, size) + payload


WHOLE = bytes.fromhex("1d52746f653e01")  # network, "to", "e", 32 tokens, a byte of payload
REFUSED = {
    "nothing": (b"", "ends within its header, after 0 bytes"),
    "another kind of file": (b"\x89PNG\r\n\x1a\n", "begins with 89 50, and not with 1d 5x"),
    "a later version": (bytes.fromhex("1d56746f653e01") + b"xx", "is of version 2, and this reads version 1"),
    "a mode of the future": (bytes.fromhex("1d53746f653e01") + b"xx", "there is no mode 3"),
    "a byte too many": (with_check(WHOLE, b"x") + b"y", "1 bytes too many"),
    "a wrong check": (WHOLE + b"\0x", "its check does not fit"),
    "a number of 5 bytes": (bytes.fromhex("1d52746f65fefefefe01") + b"xx", "a number in its header has a wrong form"),
    "a number longer than needed": (
        bytes.fromhex("1d52746f65be0001") + b"xx",
        "a number in its header has a wrong form",
    ),
    "too many tokens": (b"\x1d\x52toe" + varint(2 * 4096) + b"\x01xx", "1 to 4096 tokens, got 4097"),
    "too long a payload": (b"\x1d\x52toe\x00\x05xx", "1 tokens cannot need a payload of 5 bytes"),
    "another fit": (b"\x1d\x52toe\x01\x01" + bytes([4 << 3]) + b"\0\0xx", "there is no fit 4"),
    "too wide": (b"\x1d\x52toe\x01\x01\0" + varint(65535) + b"\0xx", "1 to 65535 pixels in width, got 65536"),
    "too many pixels": (
        b"\x1d\x52toe\x01\x01\0" + varint(65534) * 2 + b"xx",
        f"1 to {MAX_PIXELS} pixels, got {65535 * 65535}",
    ),
    "too many tiles": (
        b"\x1d\x52toe\x01\x01" + bytes([3 << 3]) + b"\0\0" + varint(256) + varint(255) + b"\0xx",
        "1 to 65536 tiles, got 65792",
    ),
    "a tile of more tokens than the most": (
        b"\x1d\x52toe\x03\x01" + bytes([3 << 3]) + b"\0\0\0\0\x02xx",
        "1 to 2 least tokens of a tile, got 3",
    ),
    "tiles that lack the least": (
        b"\x1d\x52toe\x07\x01" + bytes([3 << 3]) + b"\0\0\x01\0\0" + b"\xf0xx",
        "its tiles must have 1 to 4 tokens",
    ),
    "tiles with bits too many": (
        b"\x1d\x52toe\x07\x01" + bytes([3 << 3]) + b"\0\0\x01\0\0" + b"\x31xx",
        "its tiles must have 1 to 4 tokens",
    ),
    "millions of tokens in no bytes": (
        b"\x1d\x52toe"
        + varint(2 * 255 + 1)
        + b"\0"
        + bytes([3 << 3])
        + b"\0\0"
        + varint(255) * 2
        + varint(255)
        + b"xx",
        "a payload of 0 bytes may not hold 16777216 tokens",
    ),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_file_is_refused_in_one_sentence(data, message):
    with pytest.raises(FormatError, match=message):
        unpack(data)


def test_what_a_file_cannot_hold_is_refused_when_writing():
    for header in (header_of(b"", num_tokens=4097), header_of(b"", geometry=Geometry(70000, 1))):
        with pytest.raises(UserError, match=r"a \.1dp file holds 1 to"):
            header.pack(b"")


@pytest.mark.parametrize("count", [2000, pytest.param(200_000, marks=pytest.mark.long)])
def test_random_bytes_are_refused_and_nothing_else(count):
    draws = random.Random(9)
    for _ in range(count):
        data = draws.randbytes(draws.randrange(60))
        if draws.random() < 0.9:
            data = bytes([0x1D, 0x50 | draws.randrange(3)]) + data
        try:
            file = unpack(data)
        except FormatError:
            continue
        assert len(file.payload) <= len(data) and len(file.header.lengths) <= 1 << 16
