"""The page itself in Gradio: three tabs over the functions of this room. What belongs to a visitor is in `gr.State`."""

from collections.abc import Callable
from dataclasses import Field, fields
from functools import cache, wraps
from pathlib import Path
from typing import Any

import gradio as gr

from codec.conversions import EXTENSION
from codec.files import FITS
from codec.search import EFFORTS
from data.file_formats import IMAGE_ENDINGS
from modeling.samplers import SAMPLERS
from modeling.samplers.settings import SamplerSettings
from playground import drawing, exploring, generating, uploads
from playground.compressing import TARGETS, Opened, Prepared, cut, open_file, prepare
from playground.exploring import Explored
from playground.generating import Generated
from playground.models import Models
from utils.errors import UserError

STYLE = Path(__file__).with_name("style.css")
FONTS = ["system-ui", "sans-serif"]
THEME = gr.themes.Soft(
    primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"], text_size="sm"
).set(
    block_title_background_fill="none",
    block_title_text_color="*neutral_600",
    block_title_text_color_dark="*neutral_300",
    block_title_padding="0",
    block_label_background_fill="none",
    block_label_text_color="*neutral_600",
    block_label_text_color_dark="*neutral_300",
)
FIRST_TOKENS = 12  # shown of an image first
KEPT_SECONDS = 600  # an upload that was never read
STATE_SECONDS = 3600  # what belongs to a visitor
MOST_VISITORS = 100  # whose images are kept in memory; the oldest go first
TITLE = """<div class="title"><h1>One-D-Piece</h1>
<p>An image as a row of tokens, of which any first few are an image, too. Move the slider.</p></div>"""
# A click within a component that is made of HTML tells which of its buttons it was.
CLICK = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-place]');
  if (button) trigger('select', {place: Number(button.dataset.place), code: Number(button.dataset.code)});
});"""
# An image in the clipboard is taken as one that was dropped.
PASTE = """() => document.addEventListener('paste', event => {
  const input = document.querySelector('#drop input[type=file]');
  if (!input || !event.clipboardData?.files.length) return;
  input.files = event.clipboardData.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
})"""
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
# Sliders: nothing is computed, so nothing waits in a queue; of many moves the last one counts.
SHOWING = {"trigger_mode": "always_last", "queue": False, **QUIET}
# What runs a model: one at a time, whoever asks.
COMPUTING = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}


def build(models: Models) -> gr.Blocks:
    """The page; `launch` it with `LAUNCH`."""
    deleted = KEPT_SECONDS, KEPT_SECONDS
    with gr.Blocks(title="One-D-Piece", analytics_enabled=False, delete_cache=deleted, fill_width=True) as page:
        html(TITLE)
        prepared, opened = kept(), kept()
        with gr.Tabs():
            with gr.Tab("Compress"):
                Compress(models).build(page, prepared, opened)
            with gr.Tab("Generate"):
                Generate(models).build()
            with gr.Tab("Tokens") as tab:
                Tokens(models).build(tab, prepared, opened)
    return page


LAUNCH = {
    "theme": THEME,
    "css_paths": STYLE,
    "js": PASTE,
    "max_file_size": uploads.MAX_BYTES,
    "footer_links": [],
    "ssr_mode": False,
    "enable_monitoring": False,
    "state_session_capacity": MOST_VISITORS,
}


def kept(value: Any = None) -> gr.State:
    """What belongs to one visitor."""
    return gr.State(value, time_to_live=STATE_SECONDS)


def html(value: str = "", **options: Any) -> gr.HTML:
    """A part of the page that `drawing` writes, in the look of style.css alone."""
    return gr.HTML(value, apply_default_css=False, padding=False, **options)


def said(function: Callable, instead: Any = None) -> Callable:
    """A mistake of the visitor as words on the page.

    Args:
        instead: What the outputs become then; by default they stay as they are.
    """

    @wraps(function)
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (UserError, OSError) as error:
            if instead is None:
                raise gr.Error(str(error), print_exception=False) from error
            gr.Warning(str(error))
            return instead

    return wrapped


# Compress: `prepared` and `opened` are the image or the file that is shown, `source` the bytes that were chosen.


class Compress:
    """The first tab."""

    def __init__(self, models: Models):
        self.models = models
        self.examples = models.examples()
        self.prepared_example = cache(self.prepare_example)  # shared by all visitors

    def build(self, page: gr.Blocks, prepared: gr.State, opened: gr.State) -> None:
        source = kept()
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                endings = [*IMAGE_ENDINGS, EXTENSION]
                drop = gr.File(label="An image or a .1dp file", file_types=endings, height=150, elem_id="drop")
                thumbnails = html(drawing.examples(self.examples), js_on_load=CLICK, elem_id="examples")
                controls = self.controls()
                target, value, find = self.target()
            with gr.Column(scale=3, min_width=420):
                tokens = gr.Slider(1, 2, step=1, label="Tokens", elem_id="tokens")
                end = gr.Slider(1, 2, step=1, label="Bytes that are left", visible=False, elem_id="end")
                complete = gr.Button("Invent what is missing", visible=False, elem_id="complete")
                stage = html(elem_id="stage")
        shown = [prepared, opened, tokens, end, complete, stage]
        how = [*controls, tokens]
        refused = None, *[gr.skip()] * (1 + len(shown))  # ready for another file
        computing = {**COMPUTING, "show_progress_on": stage}
        drop.upload(said(self.take, instead=refused), [drop, *how], [drop, source, *shown], **computing)
        thumbnails.select(said(self.take_example), tokens, [*controls, source, *shown], **computing)
        page.load(self.first_example, None, [source, *shown], **computing)
        for control in controls:
            control.input(said(self.again), [source, *how], shown, **computing)
        gr.on([find.click, value.submit], said(self.find), [prepared, opened, target, value], [tokens, stage], **QUIET)
        tokens.input(self.show, [prepared, tokens], stage, **SHOWING)
        end.input(said(self.show_cut), [opened, end], stage, **SHOWING)
        complete.click(said(self.show_completed), [opened, end], stage, **computing)

    def controls(self) -> tuple[gr.Dropdown, gr.Radio, gr.Radio]:
        first = self.examples[0]
        model = gr.Dropdown(self.models.tokenizers, value=first.model, label="Model", elem_id="model")
        fit = gr.Radio(list(FITS), value=first.fit, label="Fit", info="how it becomes the model's square")
        effort = gr.Radio(range(len(EFFORTS)), value=0, label="Effort", info="how long better tokens are searched")
        return model, fit, effort

    def target(self) -> tuple[gr.Dropdown, gr.Number, gr.Button]:
        target = gr.Dropdown(list(TARGETS), value=next(iter(TARGETS)), label="Or a target", elem_id="target")
        with gr.Row(equal_height=True):
            value = gr.Number(
                20, label="Value of the target", show_label=False, container=False, min_width=80, elem_id="value"
            )
            find = gr.Button("Find", min_width=80, elem_id="find")
        return target, value, find

    def prepare_example(self, place: int) -> Prepared:
        example = self.examples[place]
        image = uploads.open_image(example.path.read_bytes())
        return prepare(self.models.codec(example.model), image, example.name, example.fit)

    # Each of these gives what the outputs become.

    def take(self, path: str | None, model: str, fit: str, effort: int, num_tokens: float) -> tuple:
        """A file that was dropped: nothing of it stays on the disk."""
        if path is None:
            raise UserError("no file came: choose it again")
        name, data = Path(path).stem, uploads.take(Path(path))
        if uploads.is_compressed(Path(path).name, data):
            return None, None, *self.opened(open_file(self.models, data, name))
        source = data, name
        return None, source, *self.again(source, model, fit, effort, num_tokens)

    def take_example(self, num_tokens: float, event: gr.EventData) -> tuple:
        example = self.examples[event.place]
        source = example.path.read_bytes(), example.name
        shown = self.prepared(self.prepared_example(event.place), num_tokens)
        return example.model, example.fit, 0, source, *shown

    def first_example(self) -> tuple:
        example = self.examples[0]
        source = example.path.read_bytes(), example.name
        return source, *self.prepared(self.prepared_example(0), FIRST_TOKENS)

    def again(self, source: tuple[bytes, str] | None, model: str, fit: str, effort: int, num_tokens: float) -> tuple:
        """The same image in another way."""
        if source is None:
            raise UserError("a .1dp file is shown, which has its model: choose an image first")
        data, name = source
        result = prepare(self.models.codec(model), uploads.open_image(data), name, fit, effort)
        return self.prepared(result, num_tokens)

    def prepared(self, result: Prepared, num_tokens: float) -> tuple:
        most = int(result.lengths[-1])
        is_movable = len(result.lengths) > 1
        num_tokens = min(int(num_tokens), most) if is_movable else most
        slider = gr.Slider(maximum=most, value=num_tokens, interactive=is_movable, visible=True)
        hidden = gr.Slider(visible=False), gr.Button(visible=False)
        return result, None, slider, *hidden, drawing.stage(result, num_tokens)

    def opened(self, file: Opened) -> tuple:
        size = len(file.data)
        slider = gr.Slider(maximum=size, value=size, visible=True)
        return gr.skip(), file, gr.Slider(visible=False), slider, gr.Button(visible=True), self.show_cut(file, size)

    def find(self, result: Prepared | None, file: Opened | None, target: str, value: float | None) -> tuple:
        if file is not None:  # `prepared` is what was shown before it
            raise UserError("a .1dp file is shown, and a target is for an image: choose one first")
        if result is None:
            raise UserError("there is no image yet: choose one first")
        num_tokens, is_reached = result.reaching(TARGETS[target], value)
        if not is_reached:
            gr.Warning(f"{target}: {value:g} is out of reach for this image; the nearest is shown")
        return num_tokens, drawing.stage(result, num_tokens)

    def show(self, result: Prepared | None, num_tokens: float) -> Any:
        return gr.skip() if result is None else drawing.stage(result, int(num_tokens))

    def show_cut(self, file: Opened | None, num_bytes: float) -> Any:
        if file is None:
            return gr.skip()
        return drawing.opened(file, cut(self.models.codec(file.model), file, int(num_bytes)))

    def show_completed(self, file: Opened | None, num_bytes: float) -> Any:
        """The file cut there, completed by a generator; the next move of the slider shows it plain."""
        if file is None:
            return gr.skip()
        return drawing.opened(file, cut(self.models.codec(file.model), file, int(num_bytes), self.models.completer))


# Generate: `made` is the generator's name and what it made.


class Generate:
    """The second tab."""

    def __init__(self, models: Models):
        self.models = models

    def build(self) -> None:
        made, first = kept(), self.models.painter(self.models.generators[0])
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                name = gr.Dropdown(self.models.generators, value=self.models.generators[0], label="Model")
                label = gr.Dropdown(_numbered(first.classes), value=0, label="Class", elem_id="class")
                seed = gr.Number(42, precision=0, label="Seed", elem_id="seed")
                go = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Accordion("Sampler", open=False):
                    controls = [_control(setting, first.settings) for setting in fields(SamplerSettings)]
            with gr.Column(scale=3, min_width=420):
                title = "Tokens that are decoded"
                tokens = gr.Slider(1, 2, step=1, label=title, visible=False, elem_id="made_tokens")
                stage = html('<p class="nothing">Choose a class, and generate.</p>', elem_id="made")
        name.input(said(self.choose), name, [label, *controls], **COMPUTING)
        asked = [name, label, seed, *controls]
        gr.on([go.click, seed.submit], said(self.generate), asked, [made, tokens, stage], **COMPUTING)
        tokens.input(self.show, [made, tokens], stage, **SHOWING)

    def choose(self, name: str) -> tuple:
        painter = self.models.painter(name)
        values = [getattr(painter.settings, setting.name) for setting in fields(SamplerSettings)]
        return gr.Dropdown(_numbered(painter.classes), value=0), *values

    def generate(self, name: str, label: int, seed: float | None, *values: Any) -> tuple:
        if seed is None:
            raise UserError("a seed is needed: write a number")
        names = [setting.name for setting in fields(SamplerSettings)]
        settings = SamplerSettings(**dict(zip(names, values, strict=True)))
        made = name, generating.generate(self.models.painter(name), label, seed, settings)
        most = int(made[1].lengths[-1])
        slider = gr.Slider(maximum=most, value=most, visible=len(made[1].lengths) > 1)
        return made, slider, self.show(made, most)

    def show(self, made: tuple[str, Generated] | None, num_tokens: float) -> Any:
        if made is None:
            return gr.skip()
        name, result = made
        colours = exploring.codebook_colours(self.models.painter(name).tokenizer)
        return drawing.sampled(result, int(num_tokens), colours)


def _numbered(classes: list[str]) -> list[tuple[str, int]]:
    return [(name, label) for label, name in enumerate(classes)]


def _control(setting: Field, settings: SamplerSettings) -> Any:
    """The control of a field of the sampler's settings."""
    title, about = setting.name.replace("_", " "), setting.metadata.get("help")
    value, choices = getattr(settings, setting.name), setting.metadata.get("choices")
    if setting.name == "sampler":
        choices = list(SAMPLERS)
    if choices:
        return gr.Dropdown(list(choices), value=value, label=title, info=about)
    if setting.type is bool:
        return gr.Checkbox(value, label=title, info=about)
    return gr.Number(value, label=title, info=about, precision=0 if setting.type is int else None)


# Tokens: `explored` are the tokens as they are now, `begun` the image that they are of.


class Tokens:
    """The third tab."""

    def __init__(self, models: Models):
        self.models = models

    def build(self, tab: gr.Tab, prepared: gr.State, opened: gr.State) -> None:
        explored, begun, draws = kept(), kept(), kept(0)
        html("<p>The image or the file of the first tab, token by token. Alike codes have alike colours.</p>")
        row = html(js_on_load=CLICK, elem_id="row")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                image = html(elem_id="explored")
                reset = gr.Button("As they were", elem_id="reset")
            with gr.Column(scale=2, min_width=420):
                changes = html(js_on_load=CLICK, elem_id="changes")
        alike = html(elem_id="alike")
        outputs = [explored, row, image, changes]
        begins = tab.select(said(self.begin), [prepared, opened, begun], [begun, *outputs], **COMPUTING)
        row.select(said(self.look), [explored, draws], [draws, *outputs], **COMPUTING)
        takes = changes.select(said(self.take), explored, outputs, **COMPUTING)
        resets = reset.click(said(self.undo), explored, outputs, **COMPUTING)
        for event in (begins, takes, resets):
            event.then(said(self.show_alike), explored, alike, **COMPUTING)

    def begin(self, result: Prepared | None, file: Opened | None, begun: Prepared | Opened | None) -> tuple:
        """Another image or file than last time; the same one stays as it was left."""
        shown = result if file is None else file  # `result` is what was shown before the file
        if shown is None or shown is begun:
            return (gr.skip(),) * 5
        codec = self.models.codec(shown.model)
        if file is None:
            return result, *self.show(exploring.explore(codec, result.tokens, result.name))
        return file, *self.show(exploring.explore_file(codec, file))

    def look(self, found: Explored | None, num_draws: int, event: gr.EventData) -> tuple:
        """A token was clicked: other codes are drawn for its place, others each time."""
        if found is None:
            return (gr.skip(),) * 5
        return num_draws + 1, *self.show(found, event.place, num_draws)

    def take(self, found: Explored | None, event: gr.EventData) -> tuple:
        """Another code was clicked."""
        if found is None:
            return (gr.skip(),) * 4
        changed = exploring.with_code(self.models.codec(found.model), found, event.place, event.code)
        return self.show(changed, event.place)

    def undo(self, found: Explored | None) -> tuple:
        if found is None:
            return (gr.skip(),) * 4
        codec = self.models.codec(found.model)
        return self.show(exploring.explore(codec, found.original[None], found.about))

    def show(self, found: Explored, place: int | None = None, num_draws: int = 0) -> tuple:
        codec = self.models.codec(found.model)
        changes = None if place is None else exploring.replacements(codec, found, place, num_draws)
        row = drawing.token_row(found, exploring.codebook_colours(codec.tokenizer), place)
        return found, row, drawing.explored_image(found), drawing.replaced(changes)

    def show_alike(self, found: Explored | None) -> Any:
        """Apart from the rest: the first time, hundreds of images are encoded for it."""
        if found is None:
            return gr.skip()
        return drawing.same_first(exploring.alike(self.models.codec(found.model), found.tokens))
