"""Rows of a table of the paper: each metric of each layer over its seeds, beside the number that the paper prints."""

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from fffexp.report.tables import COLUMNS, table
from fffexp.statistics import Interval, above, mean_interval
from fffexp.study.results import Results, Trial

Row = dict[str, Any]  # as in JSON

PRINTED = yaml.safe_load(files("fffexp.paper").joinpath("printed.yaml").read_text())


class Metric(NamedTuple):
    """A number that the paper prints.

    Attributes:
        name: the paper's, and ours in JSON.
        title: in words.
        key: of a run.
        factor: accuracies are in percent.
        score: key by which runs are better or worse: the paper prints the epochs of the best run, not the fewest.
    """

    name: str
    title: str
    key: str
    factor: int
    score: str


METRICS = (
    Metric("G_A", "test accuracy", "test/accuracy", 100, "test/accuracy"),
    Metric("M_A", "train accuracy", "train/accuracy", 100, "train/accuracy"),
    Metric("ETT_G", "epochs to the best validation accuracy", "epochs_to_best", 1, "test/accuracy"),
    Metric("ETT_M", "epochs to the best train accuracy", "epochs_to_fit", 1, "train/accuracy"),
)


def width(trial: Trial) -> int:
    """Training width of the point; 0 where there is no layer."""
    return int(trial.params.get("training_width", 0))


def leaf_width(trial: Trial) -> int | None:
    """Hidden neurons of a leaf or an expert, None of a layer that has none."""
    return trial.params.get("leaf_width")


def is_tree(trial: Trial) -> bool:
    """Whether the point has a depth."""
    return "depth" in trial.params


def is_dense(trial: Trial) -> bool:
    """Whether the point is a layer without leaves or experts."""
    return width(trial) > 0 and leaf_width(trial) is None


def experts(trial: Trial) -> int:
    """Leaves or experts; 1 of a dense layer."""
    return width(trial) // (leaf_width(trial) or width(trial) or 1)


def describe(trial: Trial) -> dict[str, Any]:
    """The point as a row of JSON has it."""
    more = {name: trial.params.get(name) for name in ("leaf_width", "depth", "reduction")}
    return {"layer": trial.layer, "training_width": width(trial), **more}


def point(trial: Trial) -> dict[str, Any]:
    """The point as a row of text has it."""
    return {
        "layer": trial.layer,
        "w": width(trial),
        "leaf": leaf_width(trial),
        "loss reduction": trial.params.get("reduction"),
    }


def name(trial: Trial) -> str:
    """In a sentence."""
    leaves = leaf_width(trial)
    if leaves is not None:
        return f"{trial.layer}, {experts(trial)} {'leaves' if is_tree(trial) else 'experts'} of {leaves}"
    return f"{trial.layer} of {width(trial)}" if width(trial) else trial.layer


def layers(table: str) -> list[str]:
    """Classes of the layers that the paper's table has."""
    titles = [title for data in PRINTED[table].values() if isinstance(data, dict) for title in data]
    return list(dict.fromkeys(title.partition(" ")[0] for title in titles))


def printed(results: Results, trial: Trial) -> dict[str, float]:
    """Metrics that the paper prints for a point, none where it has none."""
    of = results.extra
    if of.get("blocks", 4) != 4:
        return {}
    title = " ".join(str(part) for part in (trial.layer, leaf_width(trial)) if part is not None)
    found = PRINTED[of["table"]]
    values = found.get(of["data"], {}).get(title, {}).get(width(trial), ())
    return dict(zip(found["metrics"], values, strict=False))


def ordered(results: Results) -> list[Trial]:
    """Trials with runs: the widest first, those of one layer after the other, wide leaves before narrow ones."""
    layers = list(dict.fromkeys(trial.layer for trial in sorted(results.trials, key=lambda t: t.number)))
    return sorted(
        (trial for trial in results.trials if trial.runs),
        key=lambda t: (-width(t), layers.index(t.layer), -(leaf_width(t) or 0), t.params.get("reduction", "")),
    )


def cells(results: Results) -> list[Row]:
    """A row for each point and metric, as in JSON."""
    return [
        row(results, trial, metric)
        for trial in ordered(results)
        for metric in METRICS
        if trial.by_seed(metric.key) and trial.by_seed(metric.score)
    ]


def row(results: Results, trial: Trial, metric: Metric) -> Row:
    """Of a point and a metric; `values` by seed, `best` and `worst` those of the best and the worst run."""
    runs = sorted(trial.runs, key=lambda run: run["seed"])
    values = [metric.factor * run[metric.key] for run in runs]
    ranked = sorted(zip((run[metric.score] for run in runs), values, strict=True))
    return {
        **describe(trial),
        "metric": metric.name,
        "paper": printed(results, trial).get(metric.name),
        "best": ranked[-1][1],
        "mean": sum(values) / len(values),
        "ci95": interval(values, metric.factor),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "worst": ranked[0][1],
        "values": values,
        "used_leaves": [run.get("routing/used_leaves") for run in runs],
        "collapsed": collapsed(trial),
        "rising": sum((run.get("epochs_to_fit") or 0) > 0.9 * run["epochs"] for run in runs),
        "diverged": sum(run["stability/nonfinite_steps"] > 0 for run in runs),
        "n": len(values),
    }


def interval(values: Sequence[float], factor: int) -> Interval | None:
    """Of a mean; percents are shares."""
    found = mean_interval([value / factor for value in values], unit=factor == 100)[1]
    return None if found is None else (factor * found[0], factor * found[1])


def collapsed(trial: Trial) -> int:
    """Runs that use fewer than half of their leaves or experts, or one alone."""
    used = trial.by_seed("routing/used_leaves", trial.runs).values()
    return sum(2 * n < experts(trial) or n == 1 for n in used)


def verdict(row: Row) -> str:
    """How an accuracy compares to the paper's best of ten: see LEGEND."""
    if row["paper"] is None or row["ci95"] is None or not row["metric"].endswith("_A"):
        return ""
    low, high = row["ci95"]
    if low > row["paper"]:
        return "better"
    if row["best"] >= row["paper"]:
        return "reproduced"
    if row["metric"] == "M_A" and 2 * row["rising"] > row["n"]:
        return "still rising"
    return "not reproduced" if high < row["paper"] else "inconclusive"


LEGEND = (
    "Accuracies in percent, with hard routing. paper: the best of its runs; diff: our best minus that; "
    "used: leaves or experts in use, fewest to most over the runs; collapsed: runs that use fewer than "
    "half, or one alone. better: the interval of the mean lies above the paper's number; reproduced: the "
    "best run reaches it; still rising: most runs had their best train accuracy in the last tenth of "
    "their epochs; not reproduced: the interval lies below it. "
)


FORMATS = {"paper": ".1f", "diff": "+.2f"} | dict.fromkeys(("best", "mean", "std", "worst"), ".2f")


def note(text: str) -> str:
    """What is said below a table, in lines."""
    return textwrap.fill(text.strip(), COLUMNS)


def report(results: Results, metric: Metric, shown: Iterable[Trial]) -> str:
    """The table of a metric, "" where nothing has it."""
    lines = []
    for trial in shown:
        if not trial.by_seed(metric.key):
            continue
        r = row(results, trial, metric)
        used = [int(n) for n in r["used_leaves"] if n is not None]
        lines.append(
            {
                **point(trial),
                "paper": r["paper"],
                "best": r["best"],
                "diff": None if r["paper"] is None else r["best"] - r["paper"],
                "mean": r["mean"],
                "95% interval": bounds(r["ci95"]),
                "std": r["std"],
                "worst": r["worst"],
                "n": r["n"],
                "used": "-".join(str(n) for n in sorted({min(used), max(used)})) if used else None,
                "collapsed": r["collapsed"],
                "verdict": verdict(r),
            }
        )
    return f"{metric.title}\n{table(lines, FORMATS)}" if lines else ""


def bounds(found: Interval | None, digits: int = 2, scale: float = 1) -> str | None:
    """An interval as text."""
    return None if found is None else f"[{scale * found[0]:.{digits}f}, {scale * found[1]:.{digits}f}]"


def above_paper(results: Results, shown: Iterable[Trial]) -> str:
    """In how many points the mean test accuracy of trees is above the paper's best of ten; "" where none has both."""
    tested = [
        row(results, trial, METRICS[0])
        for trial in shown
        if is_tree(trial) and len(trial.runs) > 1 and "G_A" in printed(results, trial)
    ]
    if not tested:
        return ""
    ps = above([each["values"] for each in tested], [each["paper"] for each in tested])
    better = sum(verdict(each) == "better" for each in tested)
    gone = sum(each["collapsed"] == each["n"] for each in tested)
    return "\n" + note(
        f"Trees: in {better} of {len(tested)} rows the 95% interval of the mean test accuracy lies above the paper's "
        f"best; every run has collapsed in {gone} of {len(tested)}; largest p of one-sided t-tests, adjusted for these "
        f"rows by Benjamini and Hochberg: {max(ps):.1e}"
    )
