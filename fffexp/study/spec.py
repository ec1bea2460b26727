"""What a study file may say."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jsonargparse
import optuna

from fffexp.configs import given, load_config, parse_yaml
from fffexp.errors import UserError, one_line, refuse
from fffexp.study.results import LATENCY

Direction = Literal["maximize", "minimize"]
Values = dict[str, Any]

CONFIG = "config"  # the key that adds a --config file

if TYPE_CHECKING:
    Verbatim = Any
else:

    class Verbatim:
        """A value for configs, as it stands: jsonargparse would make an object of what names a class."""

    jsonargparse.typing.register_type(Verbatim, type_check=lambda value, kind: True)


@dataclass
class Parameter:
    """A hyperparameter: `choices`, a range from `low` to `high`, or neither where a layer's points are listed.

    A range is of whole numbers if both ends, which it includes, are. Choices with a name each are known by these in
    points, tables and figures.
    """

    keys: list[str]  # of the config that get the value; `config` adds a file; without one the value only describes
    choices: Verbatim = None  # a list, or a mapping of names to values
    low: Any = None
    high: Any = None
    log: bool = False  # whether the range is searched by its logarithm

    def check(self, where: str, listed: bool) -> None:
        """Raise UserError if no value, or no single meaning, is left."""
        ends = [end for end in (self.low, self.high) if end is not None]
        if listed and not ends and self.choices is None:
            return
        choices, wrong = self.choices, [end for end in ends if type(end) not in (int, float)]
        refuse(
            (len(ends) != (2 if choices is None else 0), f"{where}: give either choices, or low and high"),
            (not (ends or choices), f"{where}.choices is {choices}: list at least one value, or give each a name"),
            (choices and not isinstance(choices, list | dict), f"{where}.choices is {choices}: give a list"),
            (not self.keys, f"{where}.keys is empty: name the config key that gets the value"),
            (wrong, f"{where}: {wrong} as low or high must be a number, such as 4 or 1.0e-3"),
        )
        if ends:
            refuse(
                (self.low > self.high, f"{where}: low is {self.low} and high is {self.high}: swap them"),
                (self.log and self.low <= 0, f"{where}: low is {self.low}, without a logarithm: raise it or drop log"),
            )

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Value of this trial, or its name."""
        if self.choices is not None:
            return trial.suggest_categorical(name, list(self.choices))
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return (trial.suggest_int if whole else trial.suggest_float)(name, self.low, self.high, log=self.log)

    def setting(self, value: Any) -> Any:
        """What the config gets for a value or the name of one."""
        return self.choices[value] if isinstance(self.choices, dict) else value

    def contains(self, value: Any) -> bool:
        """Whether it can be chosen."""
        if self.choices is not None:
            return value in self.choices
        known = {int, type(self.low), type(self.high)}
        return self.low is None or (type(value) in known and bool(self.low <= value <= self.high))


@dataclass
class LayerSpace:
    """One of the layers that a study compares: a space that is searched, or points that are listed."""

    config: str | None = None  # of the layer, relative to the study file
    configs: list[str] = field(default_factory=list)  # each on top of those before
    space: dict[str, Parameter] = field(default_factory=dict)  # by the short names that tables show
    # tried before the sampler chooses; parameters that are left out have the values of the first entry
    initial_trials: list[Values] = field(default_factory=list)
    points: list[Values] | None = None  # all that is tried, instead of a search; left out as above

    @property
    def files(self) -> list[str]:
        """All configs."""
        return [*([self.config] if self.config else []), *self.configs]

    def trials(self, count: int = 0) -> list[Values]:
        """The values that each trial is given; a search has as many trials as `count`, the last without any."""
        entries = self.initial_trials if self.points is None else self.points
        given = [entries[0] | entry for entry in entries]
        return given if self.points else given + [Values()] * (count - len(given))


class Point(NamedTuple):
    """A trial of a study: its number over all layers, the label of its layer, and the values that are given."""

    number: int
    label: str
    values: Values


@dataclass
class StudySpec:
    """A comparison of layers; every layer that is searched gets the same number of trials."""

    name: str  # of the study, and of its MLflow experiment
    configs: list[str]  # what all trials share, relative to the study file
    layers: dict[str, LayerSpace]  # by a label of your choice
    seeds: list[int]  # every trial is the mean over these
    trials_per_layer: int | None = None  # of each layer that is searched
    evaluation_seeds: list[int] = field(default_factory=list)  # finalists are trained again on these
    sampler: optuna.samplers.BaseSampler = field(default_factory=lambda: optuna.samplers.TPESampler(seed=0))
    overrides: Verbatim = field(default_factory=dict)  # further config keys and their values
    objectives: dict[str, Direction] = field(default_factory=dict)  # default: what the task monitors, and the latency
    constraints: dict[str, float] = field(default_factory=dict)  # the largest values; with one objective only
    pruner: optuna.pruners.BasePruner | None = None  # by the monitored metric; with one objective only
    vectorize_seeds: bool = False  # train a trial's seeds at once; neither speed nor memory is measured then
    test: bool = False  # read the test set after each training, where no layer is searched
    patience: int | None = None  # with vectorize_seeds, a seed's training ends after so many epochs without improvement
    # with vectorize_seeds, whether the metric is measured on the training data too, or also awaited by the patience
    fit: Literal["ignored", "measured", "awaited"] = "ignored"
    folder: Path = Path()  # of the study file
    text: str = ""  # that it holds

    @property
    def searched(self) -> list[str]:
        """Labels of the layers that are searched."""
        return [label for label, part in self.layers.items() if part.points is None]

    def _check(self) -> None:
        fresh = [("evaluation_seeds", self.evaluation_seeds)] if self.searched or self.evaluation_seeds else []
        named_seeds = [("seeds", self.seeds), *fresh]
        seeds = [f"{key} is {s}" for key, s in named_seeds if len({*s}) < len(s) or min(s, default=-1) < 0]
        shared = sorted(set(self.seeds) & set(self.evaluation_seeds))
        each, metrics = self.trials_per_layer, [*self.objectives, *self.constraints]
        several = len(self.objectives) != 1 and (self.pruner is not None or self.constraints)
        timed = self.pruner is not None or len(metrics) > 1 or any(m.startswith(("speed/", "memory/")) for m in metrics)
        alone = not self.vectorize_seeds and (self.patience is not None or self.fit != "ignored")
        named = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", self.name)
        refuse(
            (not named, f"name is {self.name!r}; it names a folder: up to 100 letters, digits, _, - and ."),
            (not isinstance(self.overrides, dict), "overrides is not a mapping of config keys to values"),
            (not self.layers, "layers is empty: name at least one layer and its space"),
            (seeds, f"{', '.join(seeds)}: name at least one seed, none twice and none below 0"),
            (shared, f"evaluation_seeds shares {shared} with seeds, which selection has seen: give others"),
            (self.searched and (each or 0) < 1, f"trials_per_layer is {each}; a layer without points needs at least 1"),
            (self.test and self.searched, "test: the test set is for the finalists of a search; leave it out"),
            (alone, "patience and fit go with vectorize_seeds; leave them out, or use EarlyStopping"),
            (self.patience is not None and self.patience < 1, f"patience is {self.patience}: give at least 1"),
            (several, "pruner and constraints go with a single objective: name one, and make others a constraint"),
            (self.vectorize_seeds and timed, "vectorize_seeds: nothing is timed or pruned: give one metric, no pruner"),
        )
        for label, part in self.layers.items():
            self._check_layer(f"layers.{label}", label, part)
        missing = [config for config in self._files() if not (self.folder / config).is_file()]
        refuse((missing, f"config {', '.join(missing)} is not there; paths are relative to the study file"))
        firsts = [given(self.arguments(label, self.corners(label)[0], None)) for label in self.layers]
        blind = any(first.get("trainer.limit_val_batches") == 0 for first in firsts)
        refuse((blind, "trainer.limit_val_batches is 0: a study selects on validation; leave it out"))

    def _check_layer(self, where: str, label: str, part: LayerSpace) -> None:
        listed, first, space = part.points is not None, len(part.initial_trials), part.space
        refuse(
            ("/" in label or label == "runs", f"{where}: a label has no slash, and is not runs: name it differently"),
            (not part.files, f"{where}.config is missing: name the config of the layer"),
            (not listed and not space, f"{where}.space is empty: name at least one parameter, or list points"),
            (listed and (first or not part.points), f"{where}.points: list at least one, and no initial_trials"),
        )
        for name, parameter in space.items():
            parameter.check(f"{where}.space.{name}", listed)
        keys = [key for parameter in space.values() for key in parameter.keys if key != CONFIG]
        keys += [*self.overrides, "name", "seed_everything", "test"]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        refuse(
            (twice, f"{where}.space: set twice, or by the study too: {', '.join(twice)}; leave one out"),
            (first > (self.trials_per_layer or 0), f"{where}.initial_trials has {first} entries: see trials_per_layer"),
        )
        for index, values in enumerate(part.points or part.initial_trials):
            unknown, missing = sorted(values.keys() - space.keys()), sorted(space.keys() - values.keys())
            outside = [f"{n} = {v}" for n, v in values.items() if n in space and not space[n].contains(v)]
            wrong = [
                *(f"{name} is not in the space" for name in unknown),
                *(f"{name} is missing; the first entry gives all parameters" for name in missing if index == 0),
                *(f"{value} is not among the choices or within low and high" for value in outside),
            ]
            refuse((wrong, f"{where}.{'points' if listed else 'initial_trials'}[{index}]: {'; '.join(wrong)}"))

    def _files(self) -> list[str]:
        corners = [(label, values) for label in self.layers for values in self.corners(label)]
        return list(dict.fromkeys(file for label, values in corners for file in self._configs(label, values)))

    def _configs(self, label: str, values: Values) -> list[str]:
        part = self.layers[label]
        named = [p.setting(values[name]) for name, p in part.space.items() for key in p.keys if key == CONFIG]
        return [*self.configs, *part.files, *map(str, named)]

    def points(self) -> list[Point]:
        """All trials in the order of their numbers: the layers in turn, each until it has no more."""
        columns = [part.trials(self.trials_per_layer or 0) for part in self.layers.values()]
        turns = [values for turn in zip_longest(*columns) for values in zip(self.layers, turn, strict=True)]
        taken = [(label, values) for label, values in turns if values is not None]
        return [Point(number, label, values) for number, (label, values) in enumerate(taken)]

    def corners(self, label: str) -> list[Values]:
        """Values to check before anything is trained.

        All points; or all parameters at their first values, all at their second and so on, so that each value occurs,
        those of the initial trials, and all at their last. Of real numbers only the least is among them.
        """
        part = self.layers[label]
        corners = part.trials()
        if part.points is None:
            ends = {n: [p.low, p.high] if isinstance(p.low, int) else [p.low] for n, p in part.space.items()}
            values = {n: list(p.choices or ends[n]) for n, p in part.space.items()}
            turns = [
                {n: some[i % len(some)] for n, some in values.items()} for i in range(max(map(len, values.values())))
            ]
            corners = [*turns, *corners, {name: some[-1] for name, some in values.items()}]
        return [corner for index, corner in enumerate(corners) if corner not in corners[:index]]

    def arguments(self, label: str, values: Values, seed: int | None, test: bool = False) -> list[str]:
        """Command line of one fit, or of several seeds at once if no seed is given."""
        space = self.layers[label].space
        settings = {key: p.setting(values[name]) for name, p in space.items() for key in p.keys if key != CONFIG}
        settings = {**self.overrides, **settings, "name": self.name, "test": test}
        settings |= {} if seed is None else {"seed_everything": seed}
        flags = (f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in settings.items())
        return ["fit", *(f"--config={self.folder / config}" for config in self._configs(label, values)), *flags]

    def recipe(self, label: str, values: Values) -> str:
        """Digest of all that decides the result of a point but its seed; comments and paths do not count."""
        settings = given(self.arguments(label, values, None)[1:])
        ends = (self.patience, self.fit) if self.fit == "awaited" else self.patience
        return _digest([{k: v for k, v in settings.items() if k not in ("name", "test")}, ends])[:12]

    def default_objectives(self, monitor: str, mode: str) -> dict[str, Direction]:
        """Those given, else the monitored metric and, where it is measured, the latency."""
        first: dict[str, Direction] = {monitor: "maximize" if mode == "max" else "minimize"}
        return self.objectives or (first if self.vectorize_seeds else first | {LATENCY: "minimize"})

    def digest(self) -> str:
        """Changes when anything that decides a trial's result does; comments do not."""
        return _digest([parse_yaml(self.text, self.name), *(load_config(self.folder / file) for file in self._files())])


def load(path: Path) -> StudySpec:
    """Read a study file; UserError if it cannot be read, or what it says cannot be."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study file {path} cannot be read ({error}): give the path of a YAML file") from error
    return parse(text, path.parent.absolute(), str(path))


def parse(text: str, folder: Path, source: str) -> StudySpec:
    """The study that a text describes, with paths relative to the folder; UserError if what it says cannot be."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudySpec, None, skip={"folder", "text"})
    content = parse_yaml(text, f"study file {source}")
    try:
        spec = StudySpec(**parser.instantiate(parser.parse_object(content)).as_dict(), folder=folder, text=text)
        spec._check()
    except (jsonargparse.ArgumentError, UserError) as error:
        raise UserError(f"study file {source}: {one_line(str(error))}") from error
    return spec


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
