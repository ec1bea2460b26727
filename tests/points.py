"""Points of a table with made-up runs."""

from typing import Any

from fffexp.study.results import Results, Trial


def trial(number: int, layer: str, accuracies: list[float], **params: Any) -> Trial:
    """A point with a run for each accuracy in percent; sizes as the layers count them, of 784 -> 10."""
    runs = [
        {
            "seed": seed,
            "val/accuracy": value / 100,
            "test/accuracy": value / 100,
            "train/accuracy": value / 100,
            "epochs_to_best": 2 + seed,
            "epochs_to_fit": 3,
            "epochs": 10,
            "stability/val_monitor_std": 0.01,
            "stability/loss_spikes": 1,
            "stability/nonfinite_steps": 0,
        }
        for seed, value in enumerate(accuracies)
    ]
    width, leaf = params["training_width"], params.get("leaf_width")
    if leaf is not None:
        for run in runs:
            run |= {"routing/used_leaves": width // leaf, "stability/dead_leaves": 0}
    size = width if leaf is None else leaf + params["depth"] if "depth" in params else 2 * leaf + width // leaf
    neurons = width if "depth" not in params else width + 2 ** params["depth"] - 1
    sizes = {"training_width": width, "inference_width": leaf or width, "inference_size": size}
    return Trial(number, "COMPLETE", {"layer": layer, **params}, runs=runs, sizes=sizes | {"parameters": 795 * neurons})


def table(*trials: Trial, **extra: Any) -> Results:
    """Table 1 of these points."""
    setting = {"table": "table1", "data": "fashion_mnist", "recipe": "tuned"} | extra
    found = Results("table1", "val/accuracy", "max", unit=True, trials=list(trials), extra=setting)
    found.update()
    return found
