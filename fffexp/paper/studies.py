"""A table of the paper as a study of studies/paper/: the part that is wanted, trained where its file lacks runs."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fffexp import paths
from fffexp.configs import given, read_yaml
from fffexp.errors import UserError, refuse
from fffexp.paper.rows import ordered
from fffexp.study.results import Results, Trial

if TYPE_CHECKING:
    from fffexp.study.spec import Point, StudySpec

FOLDER = Path(__file__).parents[2] / "studies/paper"
DATA = {  # the hub has the others
    "fashion_mnist": "../../configs/data/fashion_mnist.yaml",
    "gcide": "../../configs/data/text_gcide.yaml",
    "python": "../../configs/data/text_python.yaml",
}
KEYS = {"epochs": "trainer.max_epochs", "blocks": "model.network.init_args.num_blocks"}
# pixels of a vision transformer's patch that divide the images
PATCH, PATCHES = "model.network.init_args.patch_size", {"fashion_mnist": 7, "mnist": 7, "cifar10": 4, "usps": 4}


class PaperStudy:
    """A study of studies/paper/, by its name, with other data, seeds and settings; a part of its points is wanted.

    `seeds` says how many, from 0 on; `more` are `epochs` and `blocks`. What is None is as in the file.
    """

    def __init__(self, name: str, data: str, seeds: int | None = None, **more: int | None) -> None:
        self.content = read_yaml(FOLDER / f"{name}.yaml")
        settings = self.content.setdefault("overrides", {})
        patch = {PATCH: PATCHES[data]} if PATCH in settings else {}
        settings |= {KEYS[name]: value for name, value in more.items() if value is not None} | patch
        settings |= {"data.init_args.name": data} if data not in DATA else {}
        self.content["configs"][0] = DATA.get(data, "../../configs/data/hub.yaml")
        self.content["seeds"] = self.content["seeds"] if seeds is None else list(range(seeds))

    def values(self, name: str) -> list[int]:
        """Those of a parameter among the points that have leaves."""
        groups = self.content["layers"].values()
        return sorted({point[name] for group in groups for point in group["points"] if "leaf_width" in point})

    def choose(self, wanted: Callable[[str, dict[str, Any]], bool]) -> None:
        """Keep the points that are wanted by the name of their group and their values; UserError if none is."""
        groups = self.content["layers"].items()
        kept = {label: [point for point in group["points"] if wanted(label, point)] for label, group in groups}
        self.content["layers"] = {label: group | {"points": kept[label]} for label, group in groups if kept[label]}
        missing = f"studies/paper/{self.content['name']}.yaml has no such point"
        refuse((not self.content["layers"], f"{missing}: add it there, or choose from those that it lists"))

    @cached_property
    def spec(self) -> "StudySpec":
        """As it stands now."""
        from fffexp.study.spec import parse

        plain = json.loads(json.dumps(self.content))  # of plain types alone
        return parse(yaml.safe_dump(plain, sort_keys=False), FOLDER, self.content["name"])

    @cached_property
    def _by_recipe(self) -> "dict[str, Point]":
        return {self.spec.recipe(point.label, point.values): point for point in self.spec.points()}

    def points(self) -> list[Trial]:
        """The points as trials without runs, numbered as in the study; a layer is called as its configs name it."""
        configs = {p.label: given(self.spec.arguments(p.label, p.values, None)) for p in self._by_recipe.values()}
        paths = {label: str(found.get("model.layer.class_path", "none")) for label, found in configs.items()}
        return [
            Trial(p.number, "WAITING", {"layer": paths[p.label].rpartition(".")[2], **p.values}, recipe=recipe)
            for recipe, p in self._by_recipe.items()
        ]

    def arguments(self, trial: Trial, seed: int) -> list[str]:
        """Of the fit of a point, as `points` has it or a file."""
        point = self._by_recipe[str(trial.recipe)]
        return self.spec.arguments(point.label, point.values, seed, test=self.spec.test)

    def open(self, path: Path | None, extra: Mapping[str, Any]) -> Results:
        """What the file holds, or empty results where there is none yet; `extra` is what they are of.

        UserError if it cannot be read, is of something else, or a point in it was trained by another recipe.
        """
        if path is None or not path.is_file():
            return Results(self.content["name"], "val/accuracy", "max", unit=True, extra=dict(extra))
        results, wanted = Results.load(path), self.points()
        differing = [
            f"it holds another measurement, {key} is {there} there and {value} here"
            for key, value in extra.items()
            if (there := results.extra.get(key)) != value
        ]
        differing += [
            f"{trial.layer} with {trial.params} was trained by another recipe"
            for trial in results.trials
            if any(trial.params == each.params and trial.recipe != each.recipe for each in wanted)
        ]
        if differing:
            raise UserError(f"--json {path}: {differing[0]}: give another file, or remove it")
        return results

    def wanted(self, results: Results) -> list[Trial]:
        """The trials of the results that are among the points of this study."""
        return [trial for trial in ordered(results) if trial.recipe in self._by_recipe]

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
        return StudyRunner(self.spec, *stores, jobs, path=path, extra=results.extra).run()
