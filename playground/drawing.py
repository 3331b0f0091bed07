"""What the page shows, as HTML: images as data in the page, so that nothing of a visitor is kept on a disk."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from playground.compressing import Opened, Prepared, Shown
from playground.exploring import Alike, Explored, Replacements
from playground.generating import Generated
from playground.models import Example

SMALL = 128  # pixels a side up to which an image is shown with its pixels, as squares
DIFFERENCE = 4  # times brighter than it is
THUMBNAIL = 96
MOST_BYTES = 256  # that are written out

# Compress


def stage(prepared: Prepared, num_tokens: int) -> str:
    """An image from its first tokens: beside the original, in numbers, and on the curve."""
    place = prepared.place(num_tokens)
    original, frame = prepared.original, prepared.frames[place]
    difference = np.abs(original.astype(int) - frame).clip(0, 255 // DIFFERENCE) * DIFFERENCE
    length, data = int(prepared.lengths[place]), prepared.files[place]
    a_tile = " a tile" if len(prepared.tokens) > 1 else ""
    return f"""
<div class="stage">
  {compared(original, frame, f"{length} token{'s' * (length > 1)}{a_tile}")}
  <div class="beside">
    {figure(frame, f"from {len(data):,} bytes", "decoded")}
    {figure(difference.astype(np.uint8), f"difference × {DIFFERENCE}", "difference")}
  </div>
</div>
{numbers(prepared, place)}
<div class="below">{curve(prepared, place)}{download(data, f"{prepared.name}_{length}.1dp")}</div>
{note(prepared.note)}"""


def compared(original: np.ndarray, frame: np.ndarray, title: str) -> str:
    """The original over what was decoded, up to a divider that can be dragged."""
    height, width = original.shape[:2]
    move = "document.documentElement.style.setProperty('--divider', this.value + '%')"
    return f"""<figure class="compared" style="aspect-ratio: {width} / {height}">
  {image(frame, f"decoded from {title}")}
  <div class="over">{image(original, "the original")}</div>
  <span class="divider"></span>
  <input type="range" min="0" max="100" step="0.1" value="50" aria-label="divider" oninput="{move}">
  <figcaption>original</figcaption><figcaption class="right">{title}</figcaption>
</figure>"""


def numbers(prepared: Prepared, place: int) -> str:
    total, size = int(prepared.lengths[-1]), len(prepared.files[place])
    psnr, ssim = prepared.psnr[place], prepared.ssim[place]
    return cards(
        {
            "tokens": (f"{prepared.lengths[place]}", f"of {total}"),
            "file": (f"{size:,}", "bytes"),
            "rate": (f"{8 * size / prepared.pixels:.3f}", "bpp"),
            "PSNR": (f"{psnr:.2f}" if np.isfinite(psnr) else "∞", "dB"),
            "SSIM": (f"{ssim:.3f}" if np.isfinite(ssim) else "–", ""),
        }
    )


def cards(values: dict[str, tuple[str, str]]) -> str:
    """A number each, with its unit."""
    written = (
        f'<div data-name="{name}"><dt>{name}</dt><dd>{value}<small>{unit}</small></dd></div>'
        for name, (value, unit) in values.items()
    )
    return f'<dl class="cards">{"".join(written)}</dl>'


CURVE = 560, 200, 44, 28  # width, height, margins left and below


def curve(prepared: Prepared, place: int) -> str:
    """PSNR against bytes, a point each length, the current one large."""
    width, height, left, below = CURVE
    sizes, psnr = prepared.sizes, np.where(np.isfinite(prepared.psnr), prepared.psnr, 99)
    across, up = _scale(sizes), _scale(psnr)

    def point(index: int) -> tuple[float, float]:
        x = left + (sizes[index] - across[0]) / (across[-1] - across[0]) * (width - left - 24)
        y = height - below - (psnr[index] - up[0]) / (up[-1] - up[0]) * (height - below - 12)
        return round(float(x), 1), round(float(y), 1)

    def at(value: float, ticks: np.ndarray, first: float, last: float) -> float:
        return first + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (last - first)

    lines = [
        f'<path class="grid" d="M{left} {y:.1f}H{width}"/><text x="{left - 6}" y="{y + 4:.1f}" '
        f'text-anchor="end">{tick:g}</text>'
        for tick in up
        for y in [at(tick, up, height - below, 12)]
    ]
    lines += [
        f'<text x="{at(tick, across, left, width - 24):.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>'
        for tick in across
    ]
    points = [point(index) for index in range(len(sizes))]
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in points)
    path = " ".join(f"{x},{y}" for x, y in points)
    x, y = points[place]
    now = f'<path class="now" d="M{x} {y}V{height - below}"/><circle class="now" cx="{x}" cy="{y}" r="6"/>'
    return f"""<figure class="curve"><svg viewBox="0 0 {width} {height}" role="img" aria-label="PSNR against bytes">
{"".join(lines)}<polyline points="{path}"/>{dots}{now}</svg>
<figcaption>PSNR (dB) against bytes of the file</figcaption></figure>"""


def _scale(values: np.ndarray) -> np.ndarray:
    """About five round numbers from below the least to above the most of some values."""
    span = max(float(values.max() - values.min()), 1.0)
    power = 10 ** np.floor(np.log10(span / 4))
    step = next(step * power for step in (1, 2, 5, 10) if span / (step * power) <= 5)
    return np.arange(np.floor(values.min() / step), np.floor(values.max() / step) + 2) * step


def opened(file: Opened, shown: Shown) -> str:
    """What is left of a file that was cut."""
    missing = '<p class="nothing">Not one token is left: move the slider to the right.</p>'
    width, height = shown.size
    was_cut = f" It was cut before it came here: whole it had {file.whole_size:,} bytes."
    about = f"Written with {file.model}. Grey: the header; blue: the tokens."
    invented = (
        f" All tokens beyond those of the file are invented by {shown.inventor}: this is not what was compressed."
    )
    picture = missing if shown.image is None else figure(shown.image, "", f"{file.name}, decoded")
    cut = "_cut" * (shown.num_bytes < len(file.data))
    return f"""
<div class="stage"><div class="single">{picture}</div></div>
{
        cards(
            {
                "tokens": (f"{shown.known:,}", f"of {shown.total:,}"),
                "file": (f"{shown.num_bytes:,}", f"of {len(file.data):,} bytes"),
                "image": (f"{width} × {height}", "pixels"),
            }
        )
    }
{written_out(file, shown.num_bytes)}
{note(about + was_cut * (len(file.data) < file.whole_size) + invented * bool(shown.inventor))}
<div class="below">{download(file.data[: shown.num_bytes], f"{file.name}{cut}.1dp")}</div>"""


def written_out(file: Opened, kept: int) -> str:
    """The bytes of a file: header, payload, and what was cut away."""

    def kind(place: int) -> str:
        return "gone" if place >= kept else "header" if place < file.header_size else "payload"

    shown = file.data[:MOST_BYTES]
    cells = "".join(f'<i class="{kind(place)}">{byte:02x}</i>' for place, byte in enumerate(shown))
    more = f"<span>… and {len(file.data) - MOST_BYTES:,} more</span>" if len(file.data) > MOST_BYTES else ""
    return f'<div class="bytes" aria-label="the bytes of the file">{cells}{more}</div>'


def download(data: bytes, name: str) -> str:
    encoded = base64.b64encode(data).decode()
    link = f'download="{escape(name)}" href="data:application/octet-stream;base64,{encoded}"'
    return f'<a class="download" {link}>Download <b>{escape(name)}</b><small>{len(data):,} bytes</small></a>'


def examples(found: Sequence[Example]) -> str:
    """Thumbnails to begin with."""
    buttons = (
        f'<button type="button" data-place="{place}" title="{escape(one.name)}">{thumbnail(one)}</button>'
        for place, one in enumerate(found)
    )
    return f'<div class="examples">{"".join(buttons)}</div>'


def thumbnail(example: Example) -> str:
    with Image.open(example.path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return image(np.asarray(small), example.name)


# Generate


def sampled(generated: Generated, num_tokens: int, colours: np.ndarray) -> str:
    """A generated image from its first tokens, at every length, and the steps that led to it."""
    place = generated.place(num_tokens)
    length, total = int(generated.lengths[place]), int(generated.lengths[-1])
    steps = zip(generated.guesses, generated.steps, strict=True)
    strip = "".join(
        f"{figure(guess, f'step {step}' if step else 'before', f'after step {step}', chips(tokens, colours))}"
        for step, (guess, tokens) in enumerate(steps)
    )
    shown = sorted({generated.place(2**power) for power in range(total.bit_length())} | {len(generated.lengths) - 1})
    prefixes = "".join(
        figure(generated.frames[index], f"{generated.lengths[index]}", f"{generated.lengths[index]} tokens")
        for index in shown
    )
    return f"""
<div class="stage"><div class="single">{figure(generated.frames[place], "", f"{length} tokens")}</div></div>
{cards({"sample": (escape(generated.about), ""), "tokens": (f"{length}", f"of {total}")})}
<h4>Coarse to fine: the first tokens alone</h4><div class="strip">{prefixes}</div>
<h4>Steps of sampling: what is known, and the likeliest for the rest</h4><div class="strip">{strip}</div>"""


def chips(tokens: np.ndarray, colours: np.ndarray) -> str:
    """A small square for every token; hollow where it is not known yet."""
    kinds = (
        '<i class="hollow"></i>' if token >= len(colours) else f'<i style="background:{colour(colours[token])}"></i>'
        for token in tokens.tolist()
    )
    return f'<span class="chips">{"".join(kinds)}</span>'


# Tokens


def token_row(explored: Explored, colours: np.ndarray, selected: int | None) -> str:
    """Every token as a button in the colour of its code."""
    buttons = (
        f'<button type="button" data-place="{place}" class="{_state(explored, place, selected)}" '
        f'style="background:{colour(colours[token])};color:{_ink(colours[token])}" '
        f'title="token {place + 1}: code {token}">'
        f"<b>{place + 1}</b>{token}</button>"
        for place, token in enumerate(explored.tokens.tolist())
    )
    return f'<div class="tokens">{"".join(buttons)}</div>'


def _ink(background: np.ndarray) -> str:
    """Black or white, whichever is read more easily on a colour: the one of the greater contrast by WCAG 2."""
    linear = (background / 255.0) ** 2.2
    return "#000" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "#fff"


def _state(explored: Explored, place: int, selected: int | None) -> str:
    changed = explored.tokens[place] != explored.original[place]
    return " ".join(["selected"] * (place == selected) + ["changed"] * bool(changed))


def explored_image(explored: Explored) -> str:
    count = int((explored.tokens != explored.original).sum())
    changed = f", {count} of them changed" * (count > 0)
    return f'<div class="single">{figure(explored.image, f"{escape(explored.about)}{changed}", "decoded")}</div>'


def replaced(found: Replacements | None) -> str:
    """What a token changes, and the images with other codes in its place, to be taken by a click."""
    if found is None:
        return '<p class="nothing">Click a token: its place takes other codes, and here is what they change.</p>'
    import matplotlib

    heat = (matplotlib.colormaps["inferno"](found.heat)[..., :3] * 255).round().astype(np.uint8)
    buttons = "".join(
        f'<button type="button" data-place="{found.place}" data-code="{code}" title="take code {code}">'
        f"{image(picture, f'with code {code}')}<span>{code}</span></button>"
        for code, picture in zip(found.codes.tolist(), found.images, strict=True)
    )
    title = f"what token {found.place + 1} changes: {found.mean:.1f} grey levels on average"
    return f"""<div class="replaced">{figure(heat, title, "heat map")}
<div><h4>Other codes in its place: click to take one</h4><div class="others">{buttons}</div></div></div>"""


def same_first(found: Alike) -> str:
    same = "no image begins" if not found.num_same else f"{found.num_same} begin{'s' * (found.num_same == 1)}"
    figures = "".join(
        figure(picture, "same" if place < found.num_same else "near", "a test image")
        for place, picture in enumerate(found.images)
    )
    order = "; first those, then" if found.num_same else ":"
    title = f"Of {found.total:,} test images {same} with the same token{order} the ones with a near code"
    return f'<h4>{title}</h4><div class="strip">{figures}</div>'


# Parts


def figure(pixels: np.ndarray, caption: str, alt: str, below: str = "") -> str:
    """An image with words under it; `alt` for who does not see it."""
    words = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{image(pixels, alt)}{below}{words}</figure>"


def image(pixels: np.ndarray, alt: str) -> str:
    """(H, W, 3) uint8 as an <img>; small ones keep their pixels when they are enlarged."""
    kind = ' class="pixels"' if max(pixels.shape[:2]) <= SMALL else ""
    return f'<img{kind} alt="{escape(alt)}" src="{data_uri(pixels)}">'


def data_uri(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def colour(values: Iterable[int]) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in values)


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""
