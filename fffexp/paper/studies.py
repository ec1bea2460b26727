"""A table of the paper as a study of studies/paper/: the part that is wanted, trained where its file lacks runs."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fffexp import paths
from fffexp.configs import read_yaml
from fffexp.errors import UserError
from fffexp.paper.rows import ordered
from fffexp.study.results import Results, Trial

if TYPE_CHECKING:
    from torch import nn

    from fffexp.study.spec import StudySpec

FOLDER = Path(__file__).parents[2] / "studies/paper"
DATA = {"fashion_mnist": "../../configs/data/fashion_mnist.yaml"}
HUB = "../../configs/data/hub.yaml"  # has the others


class PaperStudy:
    """A study of studies/paper/ with other data, seeds and settings, of which a part of the points is wanted.

    Args:
        name: of the file, without its ending.
        data: name of a data set.
        seeds: how many, from 0 on; those of the file if None.
        overrides: further config keys and their values.
    """

    def __init__(
        self, name: str, data: str, seeds: int | None = None, overrides: Mapping[str, Any] | None = None
    ) -> None:
        self.content = read_yaml(FOLDER / f"{name}.yaml")
        self.data = data
        more = dict(overrides or {})
        if data not in DATA:
            more["data.init_args.name"] = data
        self.content["configs"][0] = DATA.get(data, HUB)
        self.content["overrides"] = self.content.get("overrides", {}) | more
        if seeds is not None:
            self.content["seeds"] = list(range(seeds))

    def values(self, name: str) -> list[int]:
        """Those of a parameter among the points that have leaves."""
        groups = self.content["layers"].values()
        return sorted({point[name] for group in groups for point in group["points"] if "leaf_width" in point})

    def choose(self, wanted: Callable[[str, dict[str, Any]], bool]) -> None:
        """Keep the points that are wanted by the name of their group and their values.

        Raises:
            UserError: no point is left.
        """
        groups = self.content["layers"]
        for label, group in list(groups.items()):
            group["points"] = [point for point in group["points"] if wanted(label, point)]
            if not group["points"]:
                del groups[label]
        if not groups:
            name = self.content["name"]
            raise UserError(
                f"studies/paper/{name}.yaml has no such point: add it there, or choose from those that it lists"
            )

    @cached_property
    def spec(self) -> "StudySpec":
        """As it stands now."""
        from fffexp.study.spec import parse

        return parse(self.text, FOLDER, self.content["name"])

    @property
    def text(self) -> str:
        """Its YAML."""
        return yaml.safe_dump(json.loads(json.dumps(self.content)), sort_keys=False)  # of plain types alone

    def points(self) -> list[Trial]:
        """The points as trials without runs, numbered as in the study."""
        return [
            Trial(
                p.number,
                "WAITING",
                {"layer": self._layer(p.label), **p.values},
                recipe=self.spec.recipe(p.label, p.values),
            )
            for p in self.spec.points()
        ]

    def arguments(self, trial: Trial, seed: int) -> list[str]:
        """Of the fit of a point, as `points` has it or a file."""
        point = next(p for p in self.spec.points() if self.spec.recipe(p.label, p.values) == trial.recipe)
        return self.spec.arguments(point.label, point.values, seed, test=self.spec.test)

    def build(self, trial: Trial) -> "tuple[nn.Module, Sequence[int]]":
        """The untrained model of a point, and the shape of a sample."""
        from fffexp.training.experiment import build

        task, data, *_ = build(self.arguments(trial, 0))
        in_shape: Sequence[int] = getattr(data, "in_shape")  # noqa: B009, of a LightningDataModule that has one
        return task.network.eval(), in_shape

    def _layer(self, label: str) -> str:
        """Class of the layer of a group, as its configs name it."""
        found = "none"
        for config in self.spec.layers[label].files:
            model = read_yaml(FOLDER / config).get("model", {})
            found = ((model.get("layer") or {}).get("class_path") or found).rpartition(".")[2]
        return found

    def open(self, path: Path | None, extra: Mapping[str, Any]) -> Results:
        """What the file holds, or empty results where there is none yet.

        Args:
            path: of the file.
            extra: what the table is of, such as "table" and "data".

        Raises:
            UserError: it cannot be read, is of something else, or a point in it was trained by another recipe.
        """
        if path is None or not path.is_file():
            return Results(self.content["name"], "val/accuracy", "max", unit=True, extra=dict(extra))
        results = Results.load(path)
        if differing := [key for key, value in extra.items() if results.extra.get(key) != value]:
            key = differing[0]
            difference = f"{key} is {results.extra.get(key)} there and {extra[key]} here"
            raise UserError(
                f"--json {path}: it holds another measurement, {difference}: give another file, or remove it"
            )
        wanted = self.points()
        for trial in results.trials:
            if any(trial.params == each.params and trial.recipe != each.recipe for each in wanted):
                raise UserError(
                    f"--json {path}: {trial.layer} with {trial.params} was trained by another recipe: "
                    "give another file, or remove it"
                )
        return results

    def wanted(self, results: Results) -> list[Trial]:
        """The trials of the results that are among the points of this study."""
        recipes = {each.recipe for each in self.points()}
        return [trial for trial in ordered(results) if trial.recipe in recipes]

    def missing(self, results: Results) -> list[Trial]:
        """The points that lack a seed in the results."""
        have = {trial.recipe: {run["seed"] for run in trial.runs} for trial in results.trials}
        return [each for each in self.points() if not {*self.content["seeds"]} <= have.get(each.recipe, set())]

    def complete(self, results: Results, path: Path | None, jobs: int) -> Results:
        """Train what the results lack, and return them all."""
        if not self.missing(results):
            return results
        from fffexp.study.runner import StudyRunner

        stores = paths.storage(), paths.tracking_uri()
        return StudyRunner(self.spec, self.text, *stores, jobs, results_path=path, extra=results.extra).run()

    @staticmethod
    def add(results: Results, trial: Trial) -> None:
        """A point that was trained on its own, in place of what the results had of it."""
        results.trials = sorted(
            [t for t in results.trials if t.recipe != trial.recipe] + [trial], key=lambda t: t.number
        )
