"""What is shown of reconstructions: labels that tell images apart, captions that stand clear, kinds of images."""

import numpy as np
from PIL import Image

from utils.domains import is_coloured, is_on_white
from utils.images import contact_sheet, preview_sheet
from utils.reconstructions import LONGEST_NAME, Reconstruction, Reconstructions, clipped


def of(original):
    image = Image.new("RGB", original.size)
    return Reconstruction(np.zeros(4, int), original, {1: image, 4: image}, {1: 9.0, 4: 12.0}, {1: 0.5, 4: 0.6})


def kept(*names, colour="white"):
    found = Reconstructions("a model", [1, 4], bits=10, size=32)
    for name in names:
        found.add(name, of(Image.new("RGB", (32, 32), colour)), rank=0)
    return found


def test_long_names_are_labelled_by_their_ends_and_never_alike():
    assert clipped(["bag", "a_photograph_of_the_old_town.png"]) == ["bag", "a_photo..._town.png"[:7] + "...d_town.png"]
    alike = [f"holiday_2024_day_{day}_in_the_mountains" for day in ("one", "two", "two_evening")]
    labels = clipped([*alike, "bag"])
    assert len(set(labels)) == 4 and all(len(label) <= LONGEST_NAME for label in labels)
    assert "one" in labels[0] and "two" in labels[1]
    assert len(set(clipped(["x" * 99] * 3))) == 3


def test_the_table_of_images_has_a_label_of_its_own_for_each():
    alike = [f"holiday_2024_day_{day}_in_the_mountains" for day in ("one", "two")]
    lines = kept(*alike).image_table().splitlines()[2:]
    assert len({line.partition("  ")[0] for line in lines}) == 2


def test_a_caption_stands_clear_of_the_row_below():
    image = Image.new("RGB", (32, 32), "red")
    for tile in (96, 128, 256):
        captions = [["original\ngqpy\ngqpy"], ["gqpy\ngqpy\ngqpy"]]
        sheet = np.asarray(contact_sheet([[image], [image]], captions=captions, tile=tile)).astype(int)
        is_red = (sheet == (255, 0, 0)).all(axis=2).any(axis=1)
        is_ink = (sheet.sum(axis=2) < 500).any(axis=1) & ~is_red
        second_row = np.flatnonzero(is_red)[tile]
        last_ink = np.flatnonzero(is_ink[:second_row])[-1]
        first_ink = np.flatnonzero(is_ink)[0]
        assert second_row - last_ink > first_ink - np.flatnonzero(is_red)[tile - 1]  # nearer to its own image
        assert second_row - last_ink > 8


def test_column_titles_end_above_the_images():
    image = Image.new("RGB", (32, 32), "red")
    for tile in (32, 64, 128, 256):
        sheet = np.asarray(contact_sheet([[image]], column_titles=["gjpqy"], tile=tile)).astype(int)
        above = np.flatnonzero((sheet == (255, 0, 0)).all(axis=2).any(axis=1))[0] - 1
        assert (sheet[above] == 255).all()


def test_images_on_white_are_told_from_photographs():
    white = Image.new("RGB", (32, 32), "white")
    emoji = white.copy()
    emoji.paste((255, 200, 0), (4, 4, 28, 28))
    photograph = white.copy()
    photograph.paste((90, 120, 30), (0, 20, 32, 32))  # white sky over grass
    assert is_on_white(emoji) and is_coloured(emoji)
    assert not is_on_white(photograph)
    assert not is_coloured(white)


def test_a_preview_says_its_step():
    import torch

    columns = {"original": torch.zeros(1, 3, 8, 8), "4 tokens": torch.zeros(1, 3, 8, 8)}
    assert preview_sheet(columns, "step 2,000").height > preview_sheet(columns).height
