"""What a study file may say."""

import hashlib
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from fffexp.errors import UserError, one_line

# heartbeats and the grouped sampler are chosen knowingly, and pinned
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
# lists are written as JSON, as all values are, and come back as they were
warnings.filterwarnings("ignore", "Choices for a categorical distribution should be a tuple", UserWarning)
# a worker takes its trials itself, because taking them has to be locked, and keeps their heartbeats
warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with Study.optimize", UserWarning)

Direction = Literal["maximize", "minimize"]


@dataclass
class Parameter:
    """One dimension of a search space: either `choices`, or a range from `low` to `high`.

    Args:
        keys: keys of the config that get the value, as on the command line without the dashes.
        choices: the values to choose from.
        low: least value; a range of whole numbers if both ends are.
        high: largest value, included.
        log: whether the range is searched by its logarithm.
    """

    keys: list[str]
    # Any, because jsonargparse may take a whole number for a real one where both are allowed
    choices: list[Any] | None = None
    low: Any = None
    high: Any = None
    log: bool = False

    def check(self, where: str) -> None:
        """Raise UserError if no value, or no single meaning, is left."""
        ranged = self.low is not None and self.high is not None
        if (self.choices is not None) == ranged or (self.low is None) != (self.high is None):
            raise UserError(f"{where}: give either choices, or low and high")
        if self.choices is not None and not self.choices:
            raise UserError(f"{where}.choices is empty: name at least one value")
        if not self.keys:
            raise UserError(f"{where}.keys is empty: name the config key that gets the value")
        if ranged:
            assert self.low is not None and self.high is not None
            for end in ("low", "high"):
                if type(getattr(self, end)) not in (int, float):
                    raise UserError(
                        f"{where}: {end} is {getattr(self, end)!r}; it must be a number, such as 4 or 1.0e-3"
                    )
            if self.low > self.high:
                raise UserError(f"{where}: low is {self.low} and high is {self.high}: swap them")
            if self.log and self.low <= 0:
                raise UserError(f"{where}: low is {self.low}, which has no logarithm: raise it or drop log")

    def suggest(self, trial: optuna.Trial, name: str) -> int | float | str:
        """Value of this trial."""
        if self.choices is not None:
            value = trial.suggest_categorical(name, self.choices)
            assert value is not None
            return value
        assert self.low is not None and self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def contains(self, value: Any) -> bool:
        """Whether it can be chosen."""
        if self.choices is not None:
            return value in self.choices
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return type(value) in ((int,) if whole else (int, float)) and bool(self.low <= value <= self.high)

    def examples(self) -> list[Any]:
        """All choices, or the ends of a range; of real numbers, which seldom contradict others, the first alone."""
        if self.choices:
            return self.choices
        return [self.low, self.high] if isinstance(self.low, int) else [self.low]


@dataclass
class LayerSpace:
    """One of the layers that a study compares.

    Args:
        config: config of the layer, relative to the study file.
        space: its parameters, by the short names that tables show.
        initial_trials: values that are tried before the sampler chooses: all those of an ablation, say. A
            parameter that is left out has the value that it has in the first of them.
    """

    config: str
    space: dict[str, Parameter]
    initial_trials: list[dict[str, Any]] = field(default_factory=list)

    def fixed(self, trial: int) -> dict[str, Any]:
        """Values that are given for the layer's trial of this number; none once the sampler chooses."""
        return self.initial_trials[0] | self.initial_trials[trial] if trial < len(self.initial_trials) else {}


@dataclass
class StudySpec:
    """A search over layers; every layer gets the same number of trials.

    Args:
        name: of the study, and of its MLflow experiment.
        configs: what all trials share, relative to the study file.
        layers: search space of each layer, by the layer's class name.
        trials_per_layer: trials of each layer.
        seeds: every trial is the mean over these.
        evaluation_seeds: finalists are trained again on these, which selection has not seen.
        overrides: further config keys and their values.
        objectives: metrics and what to do with them; the first is the accuracy to maximise.
        constraints: metrics and the largest value that is feasible; with one objective only.
        sampler: how Optuna chooses.
        pruner: stops hopeless trials early; with one objective only.
        vectorize_seeds: train a trial's seeds at once, which is faster; nothing but accuracy and stability is
            measured then, so for one objective without constraints or pruner.
    """

    name: str
    configs: list[str]
    layers: dict[str, LayerSpace]
    trials_per_layer: int
    seeds: list[int]
    evaluation_seeds: list[int]
    sampler: BaseSampler
    overrides: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Direction] = field(default_factory=lambda: dict(OBJECTIVES))
    constraints: dict[str, float] = field(default_factory=dict)
    pruner: BasePruner | None = None
    vectorize_seeds: bool = False
    folder: Path = Path()

    def check(self) -> None:
        """Raise UserError at a contradiction."""
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise UserError(f"name is {self.name!r}; it names a folder: letters, digits, _, - and . alone")
        if not self.layers:
            raise UserError("layers is empty: name at least one layer and its space")
        if self.trials_per_layer < 1:
            raise UserError(f"trials_per_layer is {self.trials_per_layer}; it must be at least 1")
        for key in ("seeds", "evaluation_seeds"):
            seeds = getattr(self, key)
            if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
                raise UserError(f"{key} is {seeds}: name at least one seed, none twice and none below 0")
        if shared := sorted(set(self.seeds) & set(self.evaluation_seeds)):
            raise UserError(
                f"evaluation_seeds shares {shared} with seeds: finalists need seeds that selection did not see"
            )
        if next(iter(self.objectives.items()), None) != ("val/accuracy", "maximize"):
            raise UserError("objectives must begin with val/accuracy: maximize")
        if len(self.objectives) > 1 and self.pruner is not None:
            raise UserError(
                "pruner: trials with several objectives cannot be pruned; "
                "drop the pruner, or make all but the first objective a constraint"
            )
        if len(self.objectives) > 1 and self.constraints:
            raise UserError("constraints go with a single objective; drop them or the further objectives")
        if self.vectorize_seeds and (len(self.objectives) > 1 or self.constraints or self.pruner is not None):
            raise UserError(
                "vectorize_seeds: seeds that train at once are neither timed nor pruned; "
                "leave val/accuracy as the only objective, and constraints and pruner out"
            )
        for layer, part in self.layers.items():
            where = f"layers.{layer}.space"
            if not part.space:
                raise UserError(f"{where} is empty: name at least one parameter")
            for name, parameter in part.space.items():
                parameter.check(f"{where}.{name}")
            self._check_first(layer, part)
            keys = [key for parameter in part.space.values() for key in parameter.keys]
            keys += [*self.overrides, "name", "seed_everything", "test"]
            if twice := sorted({key for key in keys if keys.count(key) > 1}):
                raise UserError(f"{where}: {twice[0]} is set twice, or by the study too: leave one out")

    def _check_first(self, layer: str, part: LayerSpace) -> None:
        if len(part.initial_trials) > self.trials_per_layer:
            raise UserError(
                f"layers.{layer}.initial_trials has {len(part.initial_trials)} entries: raise trials_per_layer"
            )
        for index, given in enumerate(part.initial_trials):
            where = f"layers.{layer}.initial_trials[{index}]"
            if unknown := sorted(given.keys() - part.space.keys()):
                raise UserError(f"{where}: {unknown[0]} is not in the space")
            if index == 0 and (missing := sorted(part.space.keys() - given.keys())):
                raise UserError(f"{where}: {missing[0]} is missing; the first entry gives all parameters")
            for name, value in given.items():
                if not part.space[name].contains(value):
                    raise UserError(f"{where}: {name} = {value} is not among the choices or within low and high")

    @property
    def trials(self) -> int:
        """Trials of all layers."""
        return self.trials_per_layer * len(self.layers)

    def corners(self, layer: str) -> list[dict[str, Any]]:
        """All parameters at their first values, each alone at its others, what is tried first, all at their last."""
        part = self.layers[layer]
        values = {name: parameter.examples() for name, parameter in part.space.items()}
        firsts, lasts = ({name: some[index] for name, some in values.items()} for index in (0, -1))
        alone = [{**firsts, name: value} for name, some in values.items() for value in some[1:]]
        corners = [firsts, *alone, *map(part.fixed, range(len(part.initial_trials))), lasts]
        return [corner for index, corner in enumerate(corners) if corner not in corners[:index]]

    def arguments(self, layer: str, values: dict[str, Any], seed: int | None, test: bool) -> list[str]:
        """Command line of one fit, or of replicas if there is no one seed."""
        part = self.layers[layer]
        settings = {key: values[name] for name, parameter in part.space.items() for key in parameter.keys}
        settings = {**self.overrides, **settings, "name": self.name, "test": test}
        if seed is not None:
            settings["seed_everything"] = seed
        configs = [f"--config={self.folder / config}" for config in (*self.configs, part.config)]
        return ["fit", *configs, *(f"--{key}={_flag(value)}" for key, value in settings.items())]


OBJECTIVES: dict[str, Direction] = {
    "val/accuracy": "maximize",
    "speed/latency_b256_ms": "minimize",
}


def load(path: Path) -> tuple[StudySpec, str]:
    """Read a study file; the study, and its text for `parse`.

    Raises:
        UserError: no such file, or what it says cannot be.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study file {path} cannot be read ({error}): give the path of a YAML file") from error
    return parse(text, path.parent.absolute(), str(path)), text


def parse(text: str, folder: Path, source: str) -> StudySpec:
    """The study that a text describes; its paths are relative to the folder."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudySpec, None, skip={"folder"})
    try:
        content = yaml.safe_load(text)
        if not isinstance(content, dict):
            raise UserError("it is not a mapping of keys to values")
        spec = StudySpec(**parser.instantiate(parser.parse_object(content)).as_dict(), folder=folder)
        spec.check()
    except yaml.YAMLError as error:
        raise UserError(f"study file {source} is not YAML: {' '.join(str(error).split())}") from error
    except ArgumentError as error:
        raise UserError(f"study file {source}: {one_line(str(error))}") from error
    except UserError as error:
        raise UserError(f"study file {source}: {error}") from error
    for config in (*spec.configs, *(part.config for part in spec.layers.values())):
        if not (folder / config).is_file():
            raise UserError(f"study file {source}: config {config} is not there; paths are relative to the study file")
    return spec


def digest(spec: StudySpec, text: str) -> str:
    """Changes when anything that decides a trial's result does; comments do not."""
    parts = [json.dumps(yaml.safe_load(text), sort_keys=True)]
    for config in (*spec.configs, *(part.config for part in spec.layers.values())):
        parts.append(json.dumps(yaml.safe_load((spec.folder / config).read_text()), sort_keys=True))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
