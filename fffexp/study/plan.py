"""What a study has to do: the trials of its search, then those of its finalists."""

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from fffexp.study.spec import StudySpec
from fffexp.study.summary import pareto_front


def search_work(spec: StudySpec) -> dict[int, dict[str, Any]]:
    """Slots of the search and what is fixed of their values: the layers in turn, each as often as the others."""
    work = {}
    for slot in range(spec.trials):
        trial, index = divmod(slot, len(spec.layers))
        layer, part = list(spec.layers.items())[index]
        work[slot] = {"layer": layer} | {f"{layer}.{name}": value for name, value in part.fixed(trial).items()}
    return work


def finals_name(spec: StudySpec) -> str:
    """Name in the storage of the study that holds the finalists' trainings."""
    return f"{spec.name}/finalists"


def finals_work(spec: StudySpec, search: optuna.Study) -> dict[int, dict[str, Any]]:
    """Slots of the finalists: every one with every final seed."""
    pairs = [(number, seed) for seed in spec.evaluation_seeds for number in finalists(spec, search)]
    return {slot: {"trial": number, "seed": seed} for slot, (number, seed) in enumerate(pairs)}


def pareto(spec: StudySpec, trials: list[FrozenTrial]) -> list[int]:
    """Numbers of the trials that no other beats in every objective; with one objective, of the best."""
    done = [t for t in trials if t.state == TrialState.COMPLETE and t.user_attrs.get("feasible", True)]
    front = pareto_front([t.values for t in done], list(spec.objectives.values()))
    return [done[i].number for i in front]


def finalists(spec: StudySpec, search: optuna.Study) -> list[int]:
    """The Pareto set, and the front of each layer by itself, so that every layer is compared at its best."""
    trials = search.get_trials(deepcopy=False)
    numbers = set(pareto(spec, trials))
    for layer in spec.layers:
        numbers |= set(pareto(spec, [t for t in trials if t.params.get("layer") == layer]))
    return sorted(numbers)


def chosen(trial: FrozenTrial) -> tuple[str, dict[str, Any]]:
    """Layer and hyperparameters of a trial, under their short names."""
    layer = trial.params["layer"]
    return layer, {n.removeprefix(f"{layer}."): v for n, v in trial.params.items() if n != "layer"}
