"""scripts/compress.py, decompress.py and inspect_compressed.py: files, folders, streams, exit status, and faults."""

import dataclasses
import errno
import io
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from codec.bitstream import Fit, Geometry, Mode, pack, unpack
from codec.conversions import Conversion
from codec.files import BATCH, Settings, load_codec
from scripts import compress, decompress, inspect_compressed
from tests.codec_images import NUM_TOKENS, SIDE, photo, save_codec
from utils.cli import run
from utils.paths import ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_codec(tmp_path_factory.mktemp("codec") / "model")


@pytest.fixture
def folder(tmp_path):
    """A tree of images: two sound ones, one in a subfolder."""
    (tmp_path / "images/deep").mkdir(parents=True)
    photo(SIDE, SIDE).save(tmp_path / "images/one.png")
    photo(30, 20, seed=1).save(tmp_path / "images/deep/two.png")
    return tmp_path


@pytest.fixture
def command(model, monkeypatch, capsysbinary):
    """Run a command in this process: (exit status, what it wrote, what it said)."""

    def command(main, *arguments, stdin=b"", checkpoint=model):
        module = sys.modules[main.__module__]
        named = () if module is inspect_compressed else ("--checkpoint", checkpoint, "--device", "cpu")
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments), *map(str, named)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = 0
        try:
            run(main, keeps_memory=module is not inspect_compressed)
        except SystemExit as exit_:
            status = exit_.code or 0
        out, err = capsysbinary.readouterr()
        return status, out, err.decode()

    return command


def png(width=SIDE, height=SIDE, seed=0):
    file = io.BytesIO()
    photo(width, height, seed).save(file, "PNG")
    return file.getvalue()


def test_a_file_goes_there_and_back(folder, command):
    status, out, err = command(compress.main, folder / "images/one.png", "--tokens", 4)
    assert (status, out) == (0, b"") and err.startswith("1 image: ") and "bits per pixel" in err and " dB;" in err
    assert (folder / "images/one.1dp").is_file()
    status, out, err = command(decompress.main, folder / "images/one.1dp", "-o", folder / "back.png")
    assert (status, out) == (0, b"") and err.startswith(f"wrote {folder / 'back.png'}: {SIDE} x {SIDE} pixels from ")
    assert Image.open(folder / "back.png").size == (SIDE, SIDE)


def test_the_tree_of_a_folder_is_kept(folder, command):
    status, _, err = command(compress.main, folder / "images", "-o", folder / "small")
    assert status == 0 and err.startswith("2 images, on average: ") and f"in all, in {folder / 'small'}\n" in err
    names = ["deep/two.1dp", "one.1dp"]
    assert sorted(path.relative_to(folder / "small").as_posix() for path in (folder / "small").rglob("*.*")) == names
    assert command(decompress.main, folder / "small", "-o", folder / "back")[0] == 0
    assert sorted(path.name for path in (folder / "back").rglob("*.png")) == ["one.png", "two.png"]


def test_the_working_directory_is_named_too(folder, command, monkeypatch):
    monkeypatch.chdir(folder / "images")
    photo(SIDE, SIDE).save("two.png")
    assert command(compress.main, ".")[2].endswith(" bytes in all, in .\n")
    assert command(decompress.main, ".", "--force")[2] == "wrote 3 images into .\n"


def test_streams_carry_the_file_and_nothing_else(command):
    status, file, err = command(compress.main, "-", "--tokens", 3, stdin=png())
    assert status == 0 and unpack(file).header.num_tokens <= 3 and "bytes" in err
    status, image, err = command(decompress.main, "-", stdin=file)
    assert (status, err.count("\n")) == (0, 1) and err.startswith("wrote the standard output: ")
    assert Image.open(io.BytesIO(image)).format == "PNG"


def test_more_tokens_than_a_file_has_are_said(folder, command):
    command(compress.main, folder / "images", "-o", folder / "small", "--tokens", 2)
    _, _, err = command(decompress.main, folder / "small/one.1dp", "--tokens", 77)
    assert "the file has fewer tokens than the 77 of --tokens" in err
    _, _, err = command(decompress.main, folder / "small", "-o", folder / "back", "--tokens", 77)
    assert err.startswith(f"wrote 2 images into {folder / 'back'}\n2 of 2 files have fewer tokens than the 77")


def test_more_tokens_than_the_model_makes_are_said(folder, command):
    for flags, said in (((), ""), (("--fit", "tile"), " a tile")):
        status, _, err = command(compress.main, folder / "images/one.png", "--force", "--tokens", 77, *flags)
        assert status == 0 and f"the model makes {NUM_TOKENS}{said}, fewer than the 77 of --tokens\n" in err
    assert "fewer" not in command(compress.main, folder / "images/one.png", "--force", "--tokens", NUM_TOKENS)[2]


def test_tokens_of_tiles_are_counted_together(folder, command):
    photo(2 * SIDE, SIDE).save(folder / "wide.png")  # tiles overlap
    command(compress.main, folder / "wide.png", "--fit", "tile")
    assert command(decompress.main, folder / "wide.1dp", "-o", folder / "back.png", "--tokens", 1)[2].endswith(
        f"{2 * SIDE} x {SIDE} pixels from 3 tokens in 3 tiles\n"
    )


def test_one_is_not_written_in_the_plural(folder, command):
    flags = ("--tokens", 1, "--mode", "fixed", "--bare")
    _, payload, err = command(compress.main, folder / "images/one.png", "-o", "-", *flags)
    assert len(payload) == 1 and err.startswith("1 image: 1 byte, ") and ", 1 token, " in err and "; 1 byte in" in err


def test_progress_is_that_of_encoding(folder, model):
    """One batch of squares at a time, and nothing before the first is encoded."""
    codec, settings, seen = load_codec(checkpoint=str(model)), Settings(fit=Fit.TILE), []
    canvas = codec.canvas(photo(9 * SIDE, 8 * SIDE), settings)
    assert len(codec.drafts([canvas], settings, seen.append)) == 1
    assert len(canvas.squares) > BATCH and seen == [BATCH, len(canvas.squares) - BATCH]


def test_a_file_that_cannot_be_written_leaves_the_others(folder, command, monkeypatch):
    written = Conversion.write

    def write(self, data):
        if self.target.name == "two.1dp":
            raise OSError(errno.ENOSPC, "No space left on device", str(self.target))
        written(self, data)

    monkeypatch.setattr(Conversion, "write", write)
    status, _, err = command(compress.main, folder / "images", "-o", folder / "small")
    assert status == 1 and err.startswith("1 image: ") and (folder / "small/one.1dp").is_file()
    assert "1 of 2 files failed: " in err and "deep/two.png" in err and "free space there" in err


def test_an_image_of_another_kind_than_the_model_has_seen_is_said(folder, command):
    source = ROOT / "assets/fashion/sneaker.png"
    _, _, err = command(compress.main, source, "-o", folder / "a.1dp", checkpoint="one-d-piece_emoji")
    assert f"note: one-d-piece_emoji has seen nothing but emoji on white, and {source} is not on white" in err
    _, _, err = command(compress.main, source, "-o", folder / "b.1dp", checkpoint="one-d-piece_fashion")
    assert "note: " not in err


def test_nothing_is_replaced_unless_forced(folder, command):
    source = folder / "images/one.png"
    command(compress.main, source)
    before = (folder / "images/one.1dp").read_bytes()
    status, _, err = command(compress.main, source, "--tokens", 1)
    assert status == 1 and "one.1dp is there already: give --force to replace" in err
    assert (folder / "images/one.1dp").read_bytes() == before
    assert command(compress.main, source, "--tokens", 1, "--force")[0] == 0
    assert (folder / "images/one.1dp").read_bytes() != before
    status, _, err = command(compress.main, folder / "images", "--force")
    assert status == 0
    status, _, err = command(decompress.main, folder / "images")
    assert status == 1 and "are there already" in err


def test_a_folder_that_is_called_as_a_file_is_no_file(folder, command):
    small = folder / "small.1dp"
    assert command(compress.main, folder / "images", "-o", small)[0] == 0
    assert command(inspect_compressed.main, folder)[::2] == (0, "")
    status, _, err = command(decompress.main, folder, "-o", folder / "back")
    assert status == 0 and err.startswith("wrote 2 images into ")


def test_linked_folders_are_read_as_images_in_them_are_and_none_goes_in_circles(folder, command):
    command(compress.main, folder / "images", "-o", folder / "small")
    (folder / "linked").mkdir()
    (folder / "linked/there").symlink_to(folder / "small")
    status, _, err = command(decompress.main, folder / "linked", "-o", folder / "back")
    assert status == 0 and err.startswith("wrote 2 images into ")
    assert command(inspect_compressed.main, folder / "linked")[1].count(b"sound") == 2
    (folder / "small/deep/circle").symlink_to(folder / "small")
    for main in (decompress.main, inspect_compressed.main):
        assert "circle is a link to a folder that contains it: remove the link" in command(main, folder / "small")[2]


def test_two_images_never_become_one_file(folder, command):
    photo(SIDE, SIDE).save(folder / "images/one.jpg")
    status, _, err = command(compress.main, folder / "images", "-o", folder / "small")
    assert status == 1 and "one.jpg and " in err and "would both become" in err and not (folder / "small").exists()


def test_an_image_is_never_replaced_by_its_file(folder, command):
    source = folder / "images/one.png"
    status, _, err = command(compress.main, source, "-o", source, "--force")
    assert status == 1 and "would be replaced by what is made of it" in err
    assert Image.open(source).size == (SIDE, SIDE)


def test_broken_files_are_named_and_the_others_done(folder, command):
    (folder / "images/broken.png").write_bytes(b"no image")
    (folder / "images/cut.png").write_bytes(png()[:60])
    status, _, err = command(compress.main, folder / "images", "-o", folder / "small")
    assert status == 1 and "2 of 4 files failed: " in err and "broken.png" in err and "the others are done" in err
    (folder / "small/broken.1dp").write_bytes(b"\x1d\x50")
    status, _, err = command(decompress.main, folder / "small", "-o", folder / "back")
    assert status == 1 and "1 of 3 files failed: " in err and "ends within its header" in err
    assert len(list((folder / "back").rglob("*.png"))) == 2
    assert not list(folder.rglob(".*"))
    status, _, err = command(compress.main, folder / "images", "-o", folder / "none", "--budget", 3)
    assert status == 1 and "4 of 4 files failed: " in err and "others" not in err


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--tokens", 3, "--psnr", 20),
            "--tokens and --psnr were given: ask for one of --tokens, --max_bytes, --budget, ",
        ),
        (("--tokens", 0), "--tokens must be 1 or more, got 0"),
        (("--effort", 4), "an effort is 0 to 3, got 4"),
        (("--fast",), "fast is for psnr"),
        (("--max_bytes", 3), "bytes at least, and 3 are allowed"),
        (("--budget", 3), "a budget of 3 bytes is too small: 1 images take"),
        (("--bare", "--fit", "tile"), "bare payloads hold no tiles"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_sentence(folder, command, flags, message):
    status, out, err = command(compress.main, folder / "images/one.png", *flags)
    assert (status, out) == (1, b"") and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (folder / "images/one.1dp").exists()


@pytest.mark.parametrize("main", [compress.main, decompress.main])
def test_places_that_are_not_there_are_said(folder, command, main):
    assert "is neither a file nor a folder" in command(main, folder / "nowhere")[2]
    (folder / "empty").mkdir()
    assert "is a folder without files to read" in command(main, folder / "empty")[2]
    assert "so must be what is written" in command(main, folder / "images", "-o", "-")[2]


def test_a_budget_is_that_of_the_whole_folder(folder, command):
    command(compress.main, folder / "images", "-o", folder / "all")
    total = sum(path.stat().st_size for path in (folder / "all").rglob("*.1dp"))
    status, _, err = command(compress.main, folder / "images", "-o", folder / "less", "--budget", total - 3)
    sizes = [path.stat().st_size for path in (folder / "less").rglob("*.1dp")]
    assert status == 0 and sum(sizes) <= total - 3 and f"{sum(sizes)} bytes in all" in err


def test_a_quality_that_is_not_reached_is_said(folder, command):
    status, _, err = command(compress.main, folder / "images/one.png", "--psnr", 90)
    assert status == 0 and "1 of 1 do not reach psnr 90 with all tokens" in err


def test_the_head_of_a_file_can_be_read_alone(folder, command):
    command(compress.main, folder / "images/one.png", "-o", folder / "one.1dp")
    for name, flags in (("two", ("--tokens", 2)), ("all", ())):
        status, _, err = command(decompress.main, folder / "one.1dp", "-o", folder / f"{name}.png", *flags)
        assert status == 0 and "cut" not in err
    assert (folder / "two.png").read_bytes() != (folder / "all.png").read_bytes()


def test_a_cut_file_is_shown_and_said_to_be_cut(folder, command):
    _, file, _ = command(compress.main, "-", "--mode", "fixed", stdin=png())
    status, image, err = command(decompress.main, "-", stdin=file[:-2])
    assert status == 0 and "the file is cut" in err and Image.open(io.BytesIO(image)).size == (SIDE, SIDE)


def test_a_cut_file_is_said_to_be_cut_where_a_tile_lacks_some_of_the_tokens_that_are_asked_for(folder, command):
    photo(2 * SIDE, SIDE).save(folder / "wide.png")
    command(compress.main, folder / "wide.png", "--fit", "tile", "--mode", "fixed")
    whole = (folder / "wide.1dp").read_bytes()
    tokens, header_size = unpack(whole).header.lengths, unpack(whole).header_size
    for num_bytes, is_said in ((1, True), (-(-5 * (sum(tokens[:2]) + 1) // 8), False)):
        cut = whole[: header_size + num_bytes]
        status, _, err = command(decompress.main, "-", "--tokens", 1, stdin=cut)
        assert status == 0 and "fewer" not in err and ("the file is cut: shown is" in err) == is_said


def test_the_name_chooses_the_format_of_the_image(folder, command):
    command(compress.main, folder / "images/one.png", "-o", folder / "one.1dp")
    assert command(decompress.main, folder / "one.1dp", "-o", folder / "one.webp")[0] == 0
    assert Image.open(folder / "one.webp").format == "WEBP"
    status, _, err = command(decompress.main, folder / "one.1dp", "-o", folder / "one.txt")
    assert status == 1 and "has no ending of an image format" in err and not (folder / "one.txt").exists()


@pytest.mark.parametrize("size, ending", [((SIDE, SIDE), "blp"), ((16384, 1), "webp"), ((65535, 1), "pcx")])
def test_an_image_that_its_format_cannot_hold_is_one_sentence(folder, command, size, ending):
    photo(*size).save(folder / "images/one.png")
    flags = ("--fit", "stretch", "--tokens", 1)
    assert command(compress.main, folder / "images/one.png", "-o", folder / "one.1dp", *flags)[0] == 0
    status, _, err = command(decompress.main, folder / "one.1dp", "-o", folder / f"one.{ending}")
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert f"{size[0]} x {size[1]} pixels cannot be written as {ending.upper()} (" in err and "such as .png" in err
    assert not (folder / f"one.{ending}").exists()


@pytest.mark.parametrize("ending, size", [("ico", "192 x 256"), ("icns", "1024 x 1024")])
def test_a_format_that_would_change_the_size_is_refused(folder, command, ending, size):
    photo(300, 400).save(folder / "images/one.png")
    command(compress.main, folder / "images/one.png", "-o", folder / "one.1dp", "--fit", "stretch", "--tokens", 1)
    status, _, err = command(decompress.main, folder / "one.1dp", "-o", folder / f"one.{ending}")
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert f"300 x 400 pixels cannot be written as {ending.upper()} (it would become {size})" in err
    assert not (folder / f"one.{ending}").exists()


@pytest.mark.parametrize("mode", ["fixed", "tables", "network"])
def test_bare_payloads_go_there_and_back(command, mode):
    flags = ("--tokens", 1, "--mode", mode)
    status, payload, _ = command(compress.main, "-", "--bare", *flags, stdin=png())
    assert status == 0 and len(payload) <= 2
    status, image, _ = command(decompress.main, "-", "--bare", *flags, stdin=payload)
    assert status == 0 and Image.open(io.BytesIO(image)).size == (SIDE, SIDE)
    assert "--bare needs --tokens N" in command(decompress.main, "-", "--bare", stdin=payload)[2]
    assert "--mode is for --bare" in command(decompress.main, "-", "--mode", mode, stdin=payload)[2]


def test_a_bare_payload_has_exactly_the_tokens_that_are_asked_for(folder, command):
    """Of some of these images a shorter prefix is the nearest."""
    for seed in range(8):
        photo(SIDE, SIDE, seed).save(folder / f"images/{seed}.png")
    for flags, tokens in ((("--tokens", 5), 5), ((), NUM_TOKENS)):
        flags = ("--bare", "--mode", "fixed", "--force", *flags)
        status, _, err = command(compress.main, folder / "images", "-o", folder / "bare", *flags)
        assert status == 0 and f" {tokens}.0 tokens, " in err
        sizes = {path.stat().st_size for path in (folder / "bare").rglob("*.1dp")}
        assert sizes == {-(-5 * tokens // 8)}
    status, _, err = command(compress.main, "-", "--bare", "--tokens", NUM_TOKENS + 1, stdin=png())
    assert status == 1 and f"a payload holds 1 to {NUM_TOKENS} tokens, got {NUM_TOKENS + 1}" in err


def test_bare_payloads_of_a_folder_have_one_number_of_tokens(folder, command):
    flags = ("--bare", "--psnr", 10)
    status, _, err = command(compress.main, folder / "images", "-o", folder / "bare", *flags)
    assert status == 1 and "--psnr would give each of 2 payloads its own number of tokens" in err
    assert not (folder / "bare").exists()
    status, _, err = command(compress.main, folder / "images/one.png", "-o", folder / "one.1dp", *flags)
    assert status == 0 and " tokens, " in err


def test_inspection_tells_what_a_file_holds(folder, command):
    command(compress.main, folder / "images/deep/two.png", "-o", folder / "two.1dp", "--fit", "pad", "--mode", "fixed")
    command(compress.main, folder / "images/deep/two.png", "-o", folder / "tiles.1dp", "--fit", "tile")
    status, out, err = command(inspect_compressed.main, folder)
    assert (status, err) == (0, "")
    text = out.decode()
    for words in ("magic 1d, version 1, fixed", "an unknown tokenizer (", "30 x 20 pixels, padded", "bits a token",
                  "of them header", "sound", "in 2 x 2 tiles of "):  # fmt: skip
        assert words in text
    data = (folder / "two.1dp").read_bytes()
    status, out, _ = command(inspect_compressed.main, "-", stdin=data[:-2])
    assert status == 0 and "cut: " in out.decode()
    broken = data[:-1] + bytes([data[-1] ^ 1])
    status, _, err = command(inspect_compressed.main, "-", folder / "nowhere.1dp", stdin=broken)
    assert status == 1 and "error: -: the file is damaged" in err and "nowhere.1dp" in err


def test_inspection_tells_how_many_tokens_of_a_bundled_model_a_cut_file_holds(folder, command):
    whole = (ROOT / "tests/golden/v1/one-d-piece_fashion_plain_network.1dp").read_bytes()
    (folder / "cut.1dp").write_bytes(whole[:-4])
    for place in (folder / "cut.1dp", folder):
        status, out, err = command(inspect_compressed.main, place)
        assert (status, err) == (0, "")
        assert re.search(r"check +cut: \d+ of \d+ bytes of the payload are there, and \d+ tokens\n", out.decode())


def test_what_inspection_cannot_read_is_said(folder, command):
    (folder / "empty").mkdir()
    status, out, err = command(inspect_compressed.main, folder / "nowhere.1dp", folder / "empty")
    assert (status, out) == (1, b"")
    assert "nowhere.1dp: it cannot be read: No such file or directory" in err
    assert "empty: this is a folder without .1dp files" in err


@pytest.mark.skipif(os.name != "posix", reason="pipes end so on POSIX")
def test_decompression_ends_quietly_where_nobody_reads(folder):
    reading, writing = os.pipe()
    os.close(reading)
    file = ROOT / "tests/golden/v1/one-d-piece_fashion_plain_network.1dp"
    words = [sys.executable, "scripts/decompress.py", file]
    ended = subprocess.run([*words, "-o", "-"], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(os.name != "posix", reason="pipes end so on POSIX")
def test_inspection_ends_quietly_where_its_reader_has_seen_enough(folder):
    code = f"{sys.executable} scripts/inspect_compressed.py tests/golden/v1 | head -n 1"
    found = subprocess.run(code, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.startswith("tests/golden/v1/") and found.stderr == ""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc is Linux's")
@pytest.mark.parametrize("place", ["/proc", "/proc/deep/er"])
def test_a_place_where_no_file_can_be_is_one_sentence_before_the_work(folder, command, monkeypatch, place):
    monkeypatch.setattr("codec.files.load_codec", None)
    status, _, err = command(compress.main, folder / "images/one.png", "-o", f"{place}/x.1dp")
    assert status == 1 and err.count("\n") == 1
    assert "no file can be written into /proc (No such file or directory): no file can be made there" in err


def test_a_terminal_is_not_filled_with_bytes(command, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    status, out, err = command(compress.main, "-", stdin=png())
    assert (status, out) == (1, b"") and "the standard output is a terminal" in err


def test_inspection_needs_no_torch(folder, command):
    command(compress.main, folder / "images/one.png", "-o", folder / "one.1dp")
    code = f"""
import runpy, sys
sys.argv = ["inspect", {str(folder / "one.1dp")!r}]
try:
    runpy.run_path({str(ROOT / "scripts/inspect_compressed.py")!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_declared_sizes_cost_no_more_than_the_image_that_they_declare(model, folder, command):
    codec = load_codec(checkpoint=str(model))
    settings = Settings(fit=Fit.STRETCH, mode=Mode.FIXED)
    sound = unpack(codec.compress([photo(30, 20)], settings)[0].data)
    largest = dataclasses.replace(sound.header, geometry=Geometry(2**13, 2**13, Fit.STRETCH))
    beyond = dataclasses.replace(sound.header, geometry=Geometry(2**10, 2**10, Fit.STRETCH))
    file = bytearray(pack(beyond, sound.payload))
    (folder / "beyond.1dp").write_bytes(bytes(file).replace(b"\xff\x07\xff\x07", b"\xff\xff\x03\xff\xff\x03"))
    status, _, err = command(decompress.main, folder / "beyond.1dp", "-o", folder / "beyond.png")
    assert status == 1 and "a .1dp file holds 1 to 65535 pixels in width" in err
    (folder / "largest.1dp").write_bytes(pack(largest, sound.payload))
    assert command(inspect_compressed.main, folder / "largest.1dp")[0] == 0


def test_files_cut_anywhere_end_in_an_image_or_one_line(command):
    _, file, _ = command(compress.main, "-", "--mode", "fixed", stdin=png())
    for size in range(len(file)):
        status, out, err = command(decompress.main, "-", stdin=file[:size])
        assert status in (0, 1) and err.count("\n") == (1 if status else 2)
        assert (status == 0) == out.startswith(b"\x89PNG")
    assert 8 < len(file) <= 8 + -(-5 * NUM_TOKENS // 8)  # the best prefix may be shorter


def test_a_file_of_another_model_names_both(folder, command):
    _, file, _ = command(compress.main, "-", stdin=png())
    target = folder / "one.png"
    status, _, err = command(decompress.main, "-", "-o", target, stdin=file, checkpoint="one-d-piece_fashion")
    assert status == 1 and "one-d-piece_fashion (" in err and f"({unpack(file).header.tokenizer.hex()})" in err
    assert not target.exists()
