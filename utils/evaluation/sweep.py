"""Grids of sampler settings: their points, what is kept of them while they are measured, and their figures."""

import argparse
import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from utils.errors import UserError
from utils.evaluation.report import Row, is_measure, plot_curves, plot_grid
from utils.evaluation.session import Session
from utils.files import read_json, write_json
from utils.parts import check_plan, read_state

POINTS = "sweep_points.json"  # in the output folder while a sweep goes on
SEED, STEPS = "seed", "num_sample_steps"


class Sweep:
    """A grid of sampler settings, and of seeds.

    Args:
        texts: ["a=1,2", "b=word"], or "a=1,2,b=word" in one: the settings and their values.

    Raises:
        UserError: A text is no such thing, or a setting comes twice.
    """

    def __init__(self, texts: Sequence[str]):
        self.values: dict[str, list[Any]] = {}
        name = None
        for word in ",".join(texts).split(",") if texts else []:
            before, equals, after = word.partition("=")
            if equals:
                name, word = before, after
                if name in self.values:
                    raise UserError(f"--sweep takes each setting once, got {name} twice: list its values, {name}=A,B")
                self.values[name] = []
            if name is None or not word:
                raise UserError(f"--sweep takes NAME=VALUE,VALUE,..., got {' '.join(texts)}")
            self.values[name].append(_value(word))

    def check(self, settings: Sequence[str]) -> None:
        """Refuse names that are no `settings` of the sampler, and words for numbers."""
        check_names(self.values, [*settings, SEED], "--sweep")
        if wrong := [seed for seed in self.values.get(SEED, []) if not isinstance(seed, int)]:
            raise UserError(f"--sweep takes whole numbers as seed, got {wrong[0]}")

    def points(self) -> Iterator[dict[str, Any]]:
        """The settings of each point of the grid; one point that sets nothing for an empty one."""
        for values in itertools.product(*self.values.values()):
            yield dict(zip(self.values, values, strict=True))

    def figures(self, rows: Sequence[Row], shown: Sequence[Row], measure: str) -> dict[str, Callable[[Path], None]]:
        """What draws the rows of the points: a map or line of one or two settings, curves over the forward passes.

        Args:
            shown: The rows and those that are beside them, for the curves.
        """
        names = [name for name in self.values if name != SEED]
        drawn: dict[str, Callable[[Path], None]] = {}
        if len(names) in (1, 2) and len(rows) == len(list(self.points())):  # one recipe
            means = over_seeds(rows, names)
            drawn["sweep.png"] = lambda path: plot_grid(path, means, names, measure)
        if len(self.values.get(STEPS, [])) > 1:
            title = "Samplers, mean and range of seeds" if len(self.values.get(SEED, [])) > 1 else "Samplers"
            drawn["curves.png"] = lambda path: plot_curves(path, shown, title, over="passes")
        return drawn


def names_of(changed: Mapping[str, Any], name: str | None, settings: Any) -> Row:
    """What a point of a sweep is called, and which curve over the passes it is on.

    Args:
        changed: The settings of the point that the sweep names.
        name: Of the curve; its swept settings for None, and the sampler where there are none.
        settings: All of them: `sampler`, `num_passes`, and `num_tokens` of a draft.
    """
    texts = {key: f"{key} {value}" for key, value in changed.items()}
    system = name or ", ".join(text for key, text in texts.items() if key not in (SEED, STEPS)) or settings.sampler
    drafts = {"tokens": settings.num_tokens} if settings.num_tokens else {}
    return {
        "name": ", ".join([name] * bool(name) + list(texts.values())) or "samples",
        "system": system,
        "passes": settings.num_passes,
        **drafts,
    }


class Points:
    """The rows of a sweep's points that are measured, kept in a file until all are: one that was killed goes on.

    Args:
        known: Of the plan, all that the rows depend on, what is known before any work; a file of another is an error.

    Raises:
        UserError: The file is of another plan, or of another program.
    """

    def __init__(self, session: Session, known: Mapping[str, Any]):
        self.session, self.path = session, session.output_dir / POINTS
        self.plan: dict[str, Any] = {}
        self.there: dict[str, Any] = {"plan": {}, "rows": {}}
        if self.path.is_file():
            self.there = read_state(self.path, points_in)
            before = self.there["plan"]
            check_plan({name: before.get(name) for name in known}, plain(known), session.output_dir)
        session.processes.wait()  # until all have read it

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Go on with the rows that are there, once the whole plan is known."""
        self.plan = plain(plan)
        if self.there["plan"]:
            check_plan(self.there["plan"], self.plan, self.session.output_dir)

    def rows(self, point: Mapping[str, Any], measured: Callable[[Mapping[str, Any]], list[Row]]) -> list[Row]:
        """The rows of a point, measured now where they are not there yet."""
        key, done = json.dumps(point, sort_keys=True), self.there["rows"]
        if key not in done:
            done[key] = measured(point)
            if self.session.processes.is_main:
                write_json(self.path, {"plan": self.plan, "rows": done})
        return done[key]


def plain(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as it is read from a file."""
    return json.loads(json.dumps(plan))


def points_in(path: Path) -> dict[str, Any]:
    """The plan of a sweep, and the rows by point that it has."""
    found = read_json(path)
    return {name: {**found[name]} for name in ("plan", "rows")}


def check_names(names: Iterable[str], settings: Sequence[str], where: str) -> None:
    """Refuse names that are no `settings` of the sampler; they stand in `where`."""
    for name in names:
        if name not in settings:
            near = difflib.get_close_matches(str(name), settings, n=1)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(settings)}"
            raise UserError(f"{where} takes settings of the sampler, got {name}; {hint}")


def read_recipes(path: str) -> dict[str, dict[str, Any]]:
    """The samplers of a file, {name: {setting: value}}.

    Raises:
        ArgumentTypeError: There is none, or it holds something else.
    """
    try:
        recipes = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read ({error})") from error
    if not isinstance(recipes, dict) or not all(isinstance(recipe, dict) for recipe in recipes.values()):
        raise argparse.ArgumentTypeError(f"{path} must hold samplers, name: {{setting: value}}")
    return {str(name): recipe for name, recipe in recipes.items()}


def over_seeds(rows: Iterable[Row], names: Sequence[str]) -> list[Row]:
    """Rows that agree in `names` as one, with the means of their measures."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [{**group[0], **_means(group)} for group in groups.values()]


def _means(rows: Sequence[Row]) -> Row:
    return {name: fmean(row[name] for row in rows) for name in rows[0] if is_measure(name)}


def _value(word: str) -> Any:
    """A whole number, a number, true, false or a word."""
    for read in (int, float, {"true": True, "false": False}.__getitem__):
        try:
            return read(word)
        except (ValueError, KeyError):
            continue
    return word
