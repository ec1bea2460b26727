"""What a study file may say."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, TPESampler

from fffexp.configs import given, load_config, parse_yaml
from fffexp.errors import UserError, one_line
from fffexp.study.results import LATENCY

Direction = Literal["maximize", "minimize"]
Values = dict[str, Any]

CONFIG = "config"  # the key that adds a --config file


@dataclass
class Parameter:
    """A hyperparameter: `choices`, a range from `low` to `high`, or neither where a layer's points are listed.

    Args:
        keys: keys of the config that get the value, as on the command line without the dashes. `config` adds a
            config file; with no key at all the parameter only describes the point.
        choices: the values to choose from; with a name each, points, tables and figures have the names.
        low: least value; a range of whole numbers if both ends are.
        high: largest value, included.
        log: whether the range is searched by its logarithm.
    """

    keys: list[str]
    # Any, because jsonargparse may take a whole number for a real one where both are allowed
    choices: list[Any] | dict[str, Any] | None = None
    low: Any = None
    high: Any = None
    log: bool = False

    def check(self, where: str, listed: bool) -> None:
        """Raise UserError if no value, or no single meaning, is left."""
        ranged = self.low is not None or self.high is not None
        if listed and not ranged and self.choices is None:
            return
        if (self.choices is not None) == ranged or (ranged and None in (self.low, self.high)):
            raise UserError(f"{where}: give either choices, or low and high")
        if self.choices is not None and not (isinstance(self.choices, list | dict) and self.choices):
            raise UserError(f"{where}.choices is {self.choices}: list at least one value, or give each a name")
        if not self.keys:
            raise UserError(f"{where}.keys is empty: name the config key that gets the value")
        if ranged:
            for end in ("low", "high"):
                if type(getattr(self, end)) not in (int, float):
                    raise UserError(
                        f"{where}: {end} is {getattr(self, end)!r}; it must be a number, such as 4 or 1.0e-3"
                    )
            if self.low > self.high:
                raise UserError(f"{where}: low is {self.low} and high is {self.high}: swap them")
            if self.log and self.low <= 0:
                raise UserError(f"{where}: low is {self.low}, which has no logarithm: raise it or drop log")

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Value of this trial, or its name."""
        if self.choices is not None:
            return trial.suggest_categorical(name, list(self.choices))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def setting(self, value: Any) -> Any:
        """What the config gets for a value or the name of one."""
        return self.choices[value] if isinstance(self.choices, dict) else value

    def contains(self, value: Any) -> bool:
        """Whether it can be chosen."""
        if self.choices is not None:
            return value in self.choices
        if self.low is None:
            return True
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return type(value) in ((int,) if whole else (int, float)) and bool(self.low <= value <= self.high)

    def examples(self) -> list[Any]:
        """All choices, or the ends of a range; of real numbers, which seldom contradict others, only the first."""
        if self.choices:
            return list(self.choices)
        return [self.low, self.high] if isinstance(self.low, int) else [self.low]


@dataclass
class LayerSpace:
    """One of the layers that a study compares: a space that is searched, or points that are listed.

    Args:
        config: config of the layer, relative to the study file.
        configs: several of them, each on top of those before.
        space: its parameters, by the short names that tables show.
        initial_trials: values that are tried before the sampler chooses. A parameter that is left out has the
            value that it has in the first of them.
        points: all values that are tried, instead of a search; parameters that are left out as above.
    """

    config: str | None = None
    configs: list[str] = field(default_factory=list)
    space: dict[str, Parameter] = field(default_factory=dict)
    initial_trials: list[Values] = field(default_factory=list)
    points: list[Values] | None = None

    @property
    def files(self) -> list[str]:
        """All configs."""
        return [*([self.config] if self.config else []), *self.configs]

    def fixed(self, trial: int) -> Values:
        """Values that are given for the layer's trial of this number; none where the sampler chooses."""
        entries = self.initial_trials if self.points is None else self.points
        return entries[0] | entries[trial] if trial < len(entries) else {}


@dataclass(frozen=True)
class Point:
    """A trial of a study: its number over all layers, the label of its layer, and the values that are given."""

    number: int
    label: str
    values: Values


@dataclass
class StudySpec:
    """A comparison of layers; every layer that is searched gets the same number of trials.

    Args:
        name: of the study, and of its MLflow experiment.
        configs: what all trials share, relative to the study file.
        layers: space or points of each layer, by a label of your choice.
        seeds: every trial is the mean over these.
        trials_per_layer: trials of each layer that is searched.
        evaluation_seeds: finalists are trained again on these, which selection has not seen.
        sampler: how Optuna chooses; TPE unless given.
        overrides: further config keys and their values.
        objectives: metrics and what to do with them; the monitored metric of the task and the latency unless given.
        constraints: metrics and the largest value that is feasible; with one objective only.
        pruner: stops hopeless trials early, by the monitored metric; with one objective only.
        vectorize_seeds: train a trial's seeds at once, which is faster; neither speed nor memory is measured then.
        test: read the test set after each training, where nothing is selected because all points are listed.
        patience: with vectorize_seeds, end a seed's training after so many epochs without an improvement.
        fit: with vectorize_seeds, whether the monitored metric is "measured" on the training data after each epoch, as
            on validation, or also "awaited" by the patience.
        folder: of the study file.
    """

    name: str
    configs: list[str]
    layers: dict[str, LayerSpace]
    seeds: list[int]
    trials_per_layer: int | None = None
    evaluation_seeds: list[int] = field(default_factory=list)
    sampler: BaseSampler = field(default_factory=lambda: TPESampler(seed=0))
    overrides: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Direction] = field(default_factory=dict)
    constraints: dict[str, float] = field(default_factory=dict)
    pruner: BasePruner | None = None
    vectorize_seeds: bool = False
    test: bool = False
    patience: int | None = None
    fit: Literal["ignored", "measured", "awaited"] = "ignored"
    folder: Path = Path()

    @property
    def searched(self) -> list[str]:
        """Labels of the layers that are searched."""
        return [label for label, part in self.layers.items() if part.points is None]

    def check(self) -> None:
        """Raise UserError at a contradiction."""
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", self.name):
            raise UserError(f"name is {self.name!r}; it names a folder: up to 100 letters, digits, _, - and .")
        if not isinstance(self.overrides, dict):
            raise UserError("overrides is not a mapping of config keys to values")
        if not self.layers:
            raise UserError("layers is empty: name at least one layer and its space")
        for key in ("seeds", *(["evaluation_seeds"] if self.searched or self.evaluation_seeds else [])):
            seeds = getattr(self, key)
            if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
                raise UserError(f"{key} is {seeds}: name at least one seed, none twice and none below 0")
        if shared := sorted(set(self.seeds) & set(self.evaluation_seeds)):
            raise UserError(
                f"evaluation_seeds shares {shared} with seeds: finalists need seeds that selection did not see"
            )
        if self.searched and (self.trials_per_layer is None or self.trials_per_layer < 1):
            raise UserError(f"trials_per_layer is {self.trials_per_layer}; a layer without points needs at least 1")
        if self.test and self.searched:
            raise UserError("test: the test set is for finalists where layers are searched; leave it out")
        if self.patience is not None and not (self.vectorize_seeds and self.patience > 0):
            raise UserError("patience goes with vectorize_seeds, and is at least 1; else use EarlyStopping")
        if self.fit != "ignored" and not self.vectorize_seeds:
            raise UserError(f"fit: {self.fit} goes with vectorize_seeds; leave it out")
        self._check_objectives()
        for label, part in self.layers.items():
            self._check_layer(label, part)

    def _check_objectives(self) -> None:
        if len(self.objectives) != 1 and self.pruner is not None:
            raise UserError(
                "pruner: trials with several objectives cannot be pruned; "
                "name one under objectives, and make others a constraint"
            )
        if len(self.objectives) != 1 and self.constraints:
            raise UserError("constraints go with a single objective: name one under objectives")
        if self.vectorize_seeds:
            measured = [*self.objectives, *self.constraints]
            if (
                len(measured) > 1
                or self.pruner is not None
                or any(n.startswith(("speed/", "memory/")) for n in measured)
            ):
                raise UserError(
                    "vectorize_seeds: seeds that train at once are neither timed nor pruned; "
                    "leave one metric of the task as the only objective, and constraints and pruner out"
                )

    def _check_layer(self, label: str, part: LayerSpace) -> None:
        where, listed = f"layers.{label}", part.points is not None
        if "/" in label or label == "runs":
            raise UserError(f"{where}: a label has no slash, and is not runs: call it something else")
        if not part.files:
            raise UserError(f"{where}.config is missing: name the config of the layer")
        if not listed and not part.space:
            raise UserError(f"{where}.space is empty: name at least one parameter, or list points")
        if listed and (part.initial_trials or not part.points):
            raise UserError(f"{where}.points: list at least one, and no initial_trials beside them")
        for name, parameter in part.space.items():
            parameter.check(f"{where}.space.{name}", listed)
        keys = [key for parameter in part.space.values() for key in parameter.keys if key != CONFIG]
        keys += [*self.overrides, "name", "seed_everything", "test"]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise UserError(f"{where}.space: {twice[0]} is set twice, or by the study too: leave one out")
        if len(part.initial_trials) > (self.trials_per_layer or 0):
            raise UserError(f"{where}.initial_trials has {len(part.initial_trials)} entries: raise trials_per_layer")
        for index, values in enumerate(part.points or part.initial_trials):
            entry = f"{where}.{'points' if listed else 'initial_trials'}[{index}]"
            if unknown := sorted(values.keys() - part.space.keys()):
                raise UserError(f"{entry}: {unknown[0]} is not in the space")
            if index == 0 and (missing := sorted(part.space.keys() - values.keys())):
                raise UserError(f"{entry}: {missing[0]} is missing; the first entry gives all parameters")
            for name, value in values.items():
                if not part.space[name].contains(value):
                    raise UserError(f"{entry}: {name} = {value} is not among the choices or within low and high")

    def check_files(self) -> None:
        """Raise UserError if a config is missing, or validation is left out."""
        for config in self.files():
            if not (self.folder / config).is_file():
                raise UserError(f"config {config} is not there; paths are relative to the study file")
        for label in self.layers:
            if given(self.arguments(label, self.corners(label)[0], None)).get("trainer.limit_val_batches") == 0:
                raise UserError("trainer.limit_val_batches is 0: a study selects on validation; leave it out")

    def files(self) -> list[str]:
        """All configs that trials may have."""
        files = list(self.configs)
        for label, part in self.layers.items():
            named = {name: parameter for name, parameter in part.space.items() if CONFIG in parameter.keys}
            values = [(parameter, corner[name]) for corner in self.corners(label) for name, parameter in named.items()]
            files += [*part.files, *(str(parameter.setting(value)) for parameter, value in values)]
        return list(dict.fromkeys(files))

    def count(self, label: str) -> int:
        """Trials of a layer."""
        points = self.layers[label].points
        return (self.trials_per_layer or 0) if points is None else len(points)

    def points(self) -> list[Point]:
        """All trials in the order of their numbers: the layers in turn, each until it has no more."""
        turns = max(map(self.count, self.layers))
        order = [(turn, label) for turn in range(turns) for label in self.layers if turn < self.count(label)]
        return [Point(number, label, self.layers[label].fixed(turn)) for number, (turn, label) in enumerate(order)]

    def corners(self, label: str) -> list[Values]:
        """Values to check before anything is trained.

        All points; or all parameters at their first values, each alone at its others, those of the initial trials, and
        all at their last.
        """
        part = self.layers[label]
        corners = list(map(part.fixed, range(self.count(label) if part.points else len(part.initial_trials))))
        if part.points is None:
            values = {name: parameter.examples() for name, parameter in part.space.items()}
            firsts, lasts = ({name: some[index] for name, some in values.items()} for index in (0, -1))
            alone = [{**firsts, name: value} for name, some in values.items() for value in some[1:]]
            corners = [firsts, *alone, *corners, lasts]
        return [corner for index, corner in enumerate(corners) if corner not in corners[:index]]

    def arguments(self, label: str, values: Values, seed: int | None, test: bool = False) -> list[str]:
        """Command line of one fit, or of several seeds at once if no seed is given."""
        part = self.layers[label]
        pairs = [(key, p.setting(values[name])) for name, p in part.space.items() for key in p.keys]
        configs = [*self.configs, *part.files, *(str(value) for key, value in pairs if key == CONFIG)]
        settings = {**self.overrides, **{key: value for key, value in pairs if key != CONFIG}}
        settings |= {"name": self.name, "test": test} | ({} if seed is None else {"seed_everything": seed})
        files = [f"--config={self.folder / config}" for config in configs]
        return ["fit", *files, *(f"--{key}={_flag(value)}" for key, value in settings.items())]

    def recipe(self, label: str, values: Values) -> str:
        """Digest of all that decides the result of a point but its seed; comments and paths do not count."""
        settings = given(self.arguments(label, values, None)[1:])
        ends = (self.patience, self.fit) if self.fit == "awaited" else self.patience
        return _digest([{k: v for k, v in settings.items() if k not in ("name", "test")}, ends])[:12]

    def default_objectives(self, monitor: str, mode: str) -> dict[str, Direction]:
        """Those given, else the monitored metric and, where it is measured, the latency."""
        if self.objectives:
            return self.objectives
        first: dict[str, Direction] = {monitor: "maximize" if mode == "max" else "minimize"}
        return first if self.vectorize_seeds else first | {LATENCY: "minimize"}


def load(path: Path, edit: Callable[[dict[str, Any]], None] | None = None) -> tuple[StudySpec, str]:
    """Read a study file; the study, and its text for `parse`.

    Args:
        path: of the YAML file.
        edit: changes what the file says, such as to leave points out, before it is checked.

    Raises:
        UserError: no such file, or what it says cannot be.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study file {path} cannot be read ({error}): give the path of a YAML file") from error
    if edit is not None:
        content = parse_yaml(text, f"study file {path}")
        edit(content)
        text = yaml.safe_dump(content, sort_keys=False)
    return parse(text, path.parent.absolute(), str(path)), text


def parse(text: str, folder: Path, source: str) -> StudySpec:
    """The study that a text describes; its paths are relative to the folder.

    Raises:
        UserError: what it says cannot be.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudySpec, None, skip={"folder"})
    content = parse_yaml(text, f"study file {source}")
    # values for configs: parsed here, a class among them would be made
    raw = parse_yaml(text, source)
    overrides = raw.get("overrides", {})
    choices = {keys: parameter.get("choices") for keys, parameter in _parameters(raw)}
    content.pop("overrides", None)
    for _, parameter in _parameters(content):
        parameter.pop("choices", None)
    try:
        spec = StudySpec(**parser.instantiate(parser.parse_object(content)).as_dict(), folder=folder)
        spec.overrides = overrides
        for (label, name), values in choices.items():
            spec.layers[label].space[name].choices = values
        spec.check()
        spec.check_files()
    except ArgumentError as error:
        raise UserError(f"study file {source}: {one_line(str(error))}") from error
    except UserError as error:
        raise UserError(f"study file {source}: {error}") from error
    return spec


def _parameters(content: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    layers = content.get("layers")
    for label, part in layers.items() if isinstance(layers, dict) else ():
        space = part.get("space") if isinstance(part, dict) else None
        for name, parameter in space.items() if isinstance(space, dict) else ():
            if isinstance(parameter, dict):
                yield (label, name), parameter


def digest(spec: StudySpec, text: str) -> str:
    """Changes when anything that decides a trial's result does; comments do not."""
    return _digest([parse_yaml(text, spec.name), *(load_config(spec.folder / file) for file in spec.files())])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
