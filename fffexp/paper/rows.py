"""Rows of a table of the paper: each metric of each layer over its seeds, beside the number that the paper prints."""

import statistics
import textwrap
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from operator import itemgetter
from typing import Any

import yaml

from fffexp.report.tables import COLUMNS, table
from fffexp.statistics import Interval, adjusted, mean_interval, p_of_mean
from fffexp.study.results import Results, Trial

Row = dict[str, Any]  # as in JSON
Section = Callable[[Results, Sequence[Trial]], str]  # what is printed of the trials that are shown, "" for nothing

PRINTED = yaml.safe_load(files("fffexp.paper").joinpath("printed.yaml").read_text())
point_of = itemgetter("layer", "training_width", "leaf_width")  # of what `describe` gives

# the paper's name and ours in JSON, in words, the key of a run, a factor for percents, and the key by which runs are
# better or worse: the paper prints the epochs of the best run, not the fewest
Metric = namedtuple("Metric", "name title key factor score")
METRICS = (
    Metric("G_A", "test accuracy", "test/accuracy", 100, "test/accuracy"),
    Metric("M_A", "train accuracy", "train/accuracy", 100, "train/accuracy"),
    Metric("ETT_G", "epochs to the best validation accuracy", "epochs_to_best", 1, "test/accuracy"),
    Metric("ETT_M", "epochs to the best train accuracy", "epochs_to_fit", 1, "train/accuracy"),
)


def width(trial: Trial) -> int:
    """Training width of the point; 0 where there is no layer."""
    return int(trial.params.get("training_width", 0))


def size(trial: Trial, kind: str = "inference_size") -> int:
    """One of the sizes that the layer counts; 0 where there is no layer."""
    return (trial.sizes or {}).get(kind, 0)


def is_dense(trial: Trial) -> bool:
    """Whether the point is a layer without leaves or experts."""
    return width(trial) > 0 and "leaf_width" not in trial.params


def _experts(trial: Trial) -> int:
    return width(trial) // (trial.params.get("leaf_width") or width(trial) or 1)


def describe(trial: Trial) -> Row:
    """The point as a row of JSON has it."""
    more = {name: trial.params.get(name) for name in ("leaf_width", "depth", "reduction")}
    return {"layer": trial.layer, "training_width": width(trial), **more}


def point(trial: Trial) -> Row:
    """The point as a row of text has it."""
    more = {"leaf": trial.params.get("leaf_width"), "loss reduction": trial.params.get("reduction")}
    return {"layer": trial.layer, "w": width(trial), **more}


def name(trial: Trial) -> str:
    """In a sentence."""
    if "leaf_width" in trial.params:
        kind = "leaves" if "depth" in trial.params else "experts"
        return f"{trial.layer}, {_experts(trial)} {kind} of {trial.params['leaf_width']}"
    return f"{trial.layer} of {width(trial)}" if width(trial) else trial.layer


def layers(table: str) -> list[str]:
    """Classes of the layers that the paper's table has."""
    titles = [title for data in PRINTED[table].values() if isinstance(data, dict) for title in data]
    return list(dict.fromkeys(title.partition(" ")[0] for title in titles))


def printed(results: Results, trial: Trial) -> dict[str, float]:
    """Metrics that the paper prints for a point, none where it has none."""
    of = results.extra
    found = PRINTED[of["table"]]
    title = f"{trial.layer} {trial.params.get('leaf_width', '')}".strip()
    values = found.get(of["data"], {}).get(title, {}).get(width(trial), ()) if of.get("blocks", 4) == 4 else ()
    return dict(zip(found["metrics"], values, strict=False))


def ordered(results: Results) -> list[Trial]:
    """Trials with runs: the widest first, those of one layer after the other, wide leaves before narrow ones."""
    layers = list(dict.fromkeys(trial.layer for trial in sorted(results.trials, key=lambda t: t.number)))
    return sorted(
        (trial for trial in results.trials if trial.runs),
        key=lambda t: (-width(t), layers.index(t.layer), -t.params.get("leaf_width", 0), t.params.get("reduction", "")),
    )


def cells(results: Results, shown: Iterable[Trial] | None = None) -> list[Row]:
    """A row for each point, or each of some, and metric, as in JSON."""
    return [
        row(results, trial, metric)
        for trial in (ordered(results) if shown is None else shown)
        for metric in METRICS
        if trial.by_seed(metric.key) and trial.by_seed(metric.score)
    ]


def row(results: Results, trial: Trial, metric: Metric) -> Row:
    """Of a point and a metric; `values` by seed, `best` and `worst` those of the best and the worst run."""
    runs = sorted(trial.runs, key=lambda run: run["seed"])
    values = [metric.factor * run[metric.key] for run in runs]
    ranked = sorted(zip((run[metric.score] for run in runs), values, strict=True))
    # percents are shares
    _, ends = mean_interval([value / metric.factor for value in values], unit=metric.factor == 100)
    return {
        **describe(trial),
        "metric": metric.name,
        "paper": printed(results, trial).get(metric.name),
        "best": ranked[-1][1],
        "mean": sum(values) / len(values),
        "ci95": ends and (metric.factor * ends[0], metric.factor * ends[1]),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "worst": ranked[0][1],
        "values": values,
        "used_leaves": [run.get("routing/used_leaves") for run in runs],
        "collapsed": _collapsed(trial),
        "rising": sum((run.get("epochs_to_fit") or 0) > 0.9 * run["epochs"] for run in runs),
        "diverged": sum(run["stability/nonfinite_steps"] > 0 for run in runs),
        "n": len(values),
    }


def _collapsed(trial: Trial) -> int:
    # fewer than half of the leaves or experts are used, or one alone
    return sum(2 * n < _experts(trial) or n == 1 for n in trial.by_seed("routing/used_leaves", trial.runs).values())


def verdict(row: Row) -> str:
    """How an accuracy compares to the paper's best of ten: see LEGEND."""
    if row["paper"] is None or row["ci95"] is None or not row["metric"].endswith("_A"):
        return ""
    verdicts = {
        "better": row["ci95"][0] > row["paper"],
        "reproduced": row["best"] >= row["paper"],
        "still rising": row["metric"] == "M_A" and 2 * row["rising"] > row["n"],
        "not reproduced": row["ci95"][1] < row["paper"],
    }
    return next((name for name, holds in verdicts.items() if holds), "inconclusive")


LEGEND = (
    "Accuracies in percent, with hard routing. paper: the best of its runs; diff: our best minus that; "
    "used: leaves or experts in use, fewest to most over the runs; collapsed: runs that use fewer than "
    "half, or one alone. better: the interval of the mean lies above the paper's number; reproduced: the "
    "best run reaches it; still rising: most runs had their best train accuracy in the last tenth of "
    "their epochs; not reproduced: the interval lies below it. "
)
REPORTED = ("paper", "best", "diff", "mean", "95% interval", "std", "worst", "n", "used", "collapsed", "verdict")
FORMATS = {"paper": ".1f", "diff": "+.2f"} | dict.fromkeys(("best", "mean", "std", "worst"), ".2f")


def bounds(found: Interval | None, digits: int = 2, scale: float = 1) -> str | None:
    """An interval as text."""
    return found and f"[{scale * found[0]:.{digits}f}, {scale * found[1]:.{digits}f}]"


def note(text: str) -> str:
    """What is said below a table, in lines."""
    return textwrap.fill(text.strip(), COLUMNS)


def section(title: str, lines: Sequence[Row], formats: Mapping[str, str] | None = None, text: str = "") -> str:
    """A table below its title, and what is said below it; "" without any line."""
    return "\n".join(filter(None, (title, table(lines, formats), note(text)))) if lines else ""


def report(results: Results, metric: Metric, shown: Iterable[Trial]) -> str:
    """The table of a metric, "" where nothing has it."""
    lines = []
    for trial in (trial for trial in shown if trial.by_seed(metric.key)):
        r = row(results, trial, metric)
        used = [int(n) for n in r["used_leaves"] if n is not None]
        r |= {
            "diff": None if r["paper"] is None else r["best"] - r["paper"],
            "95% interval": bounds(r["ci95"]),
            "used": "-".join(str(n) for n in sorted({min(used), max(used)})) if used else None,
            "verdict": verdict(r),
        }
        lines.append(point(trial) | {column: r[column] for column in REPORTED})
    return section(metric.title, lines, FORMATS)


def above_paper(results: Results, shown: Iterable[Trial]) -> str:
    """In how many points the mean test accuracy of trees is above the paper's best of ten; "" where none has both."""
    trees = [trial for trial in shown if "depth" in trial.params and len(trial.runs) > 1]
    tested = [row(results, trial, METRICS[0]) for trial in trees if "G_A" in printed(results, trial)]
    if not tested:
        return ""
    ps = adjusted([p_of_mean(each["values"], each["paper"], "greater") for each in tested])
    better = sum(verdict(each) == "better" for each in tested)
    gone = sum(each["collapsed"] == each["n"] for each in tested)
    return "\n" + note(
        f"Trees: in {better} of {len(tested)} rows the 95% interval of the mean test accuracy lies above the paper's "
        f"best; every run has collapsed in {gone} of {len(tested)}; largest p of one-sided t-tests, adjusted for these "
        f"rows by Benjamini and Hochberg: {max(ps):.1e}"
    )


# None where a layer has no such thing
WITHIN: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "late std": lambda run: 100 * run["stability/val_monitor_std"],
    "spikes": lambda run: run["stability/loss_spikes"] / run["epochs"],  # some recipes have more epochs than others
    "nonfinite": lambda run: run["stability/nonfinite_steps"],
    "dead": lambda run: run.get("stability/dead_leaves"),
}


def measures(trial: Trial) -> Row:
    """Across seeds, and means over seeds of those within a run."""
    accuracies = [100 * run["test/accuracy"] for run in trial.runs]
    epochs = [run["epochs_to_best"] for run in trial.runs]
    within = {name: [v for run in trial.runs if (v := of(run)) is not None] for name, of in WITHIN.items()}
    return {
        "std": statistics.stdev(accuracies),
        "mean - worst": statistics.mean(accuracies) - min(accuracies),
        "collapsed": _collapsed(trial),
        "epochs": statistics.mean(epochs),
        "epochs std": statistics.stdev(epochs),
    } | {name: statistics.mean(values) if values else None for name, values in within.items()}


def _report_stability(_: Results, shown: Iterable[Trial]) -> str:
    return section(
        "stability",
        [point(trial) | measures(trial) for trial in shown if len(trial.runs) > 1],
        dict.fromkeys(("std", "mean - worst", *WITHIN), ".2f") | dict.fromkeys(("epochs", "epochs std"), ".1f"),
        "std, mean - worst: test accuracy over seeds in points; epochs: to the best validation accuracy; late "
        "std: of validation accuracy over the last quarter of the epochs; spikes: steps an epoch; nonfinite: "
        "steps; dead: leaves or experts that no training sample reaches; means over seeds. epochs and late "
        "std depend on the recipe as well.",
    )


TEST, TRAIN, *EPOCHS = METRICS
SECTIONS: dict[str, Section] = {
    "legend": lambda *_: note(LEGEND),
    "test_accuracy": lambda results, shown: report(results, TEST, shown) + above_paper(results, shown),
    "train_accuracy": lambda results, shown: report(results, TRAIN, shown),
    "epochs": lambda results, shown: "\n\n".join(report(results, metric, shown) for metric in EPOCHS),
    "stability": _report_stability,
}
