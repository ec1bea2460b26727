"""Training the cells of a table, many seeds at once and a cell a process, and what comes of them as rows."""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from fffexp.environment import environment, training_device
from fffexp.errors import UserError
from fffexp.paper.cells import ORDER, Cell
from fffexp.paper.results import load, save
from fffexp.statistics import Paired, above, mean_interval

# Metric, the key of a run, its factor (accuracies in percent), and the key by which runs are better or worse: the paper
# tells the epochs of the best run, not the fewest.
METRICS = (
    ("M_A", "train_accuracy", 100, "train_accuracy"),
    ("G_A", "test_accuracy", 100, "test_accuracy"),
    ("ETT_M", "epochs_to_fit", 1, "train_accuracy"),
    ("ETT_G", "epochs_to_best", 1, "test_accuracy"),
)


class Training(NamedTuple):
    """Of a cell: arguments of `fffexp fit`, and when it ends before its last epoch as in `Replicas.train`."""

    args: list[str]
    patience: int | None = None
    fit_matters: bool = True
    train_accuracy: bool = True

    def recipe(self) -> str:
        """Changes when one of these does, or what the configs hold; comments do not count."""
        named = "--config="
        read = [
            yaml.safe_load(Path(arg.removeprefix(named)).read_text()) if arg.startswith(named) else arg
            for arg in self.args
        ]
        told = json.dumps([read, self.patience, self.fit_matters], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]


def begin(path: Path | None, setting: dict[str, Any], training: Callable[[Cell], Training]) -> dict[str, Any]:
    """The table in the file, or an empty one.

    Args:
        path: of the file.
        setting: what the table is of.
        training: that of a cell today.

    Raises:
        UserError: the file is of another measurement, of a version that told less of a run, or of another recipe.
    """
    empty: dict[str, Any] = {"environments": [], "seeds": [], "cells": [], "controls": [], "runs": []}
    found = {**setting, **empty} | (load(path, setting) or {})
    if any("layer" not in run or "recipe" not in run for run in found["runs"]):
        raise UserError(f"--json {path}: it is of an earlier version: give another file, or remove it")
    for cell in cells(found):
        if {run["recipe"] for run in of(found, cell)} != {training(cell).recipe()}:
            told = f"--json {path}: {cell.layer} of width {cell.training_width} was trained by another recipe"
            raise UserError(f"{told}: give another file, or remove it")
    return found


def complete(
    found: dict[str, Any],
    wanted: Mapping[Cell, Training],
    seeds: Sequence[int],
    jobs: int,
    path: Path | None,
    printed: Callable[[Cell], Mapping[str, float]],
    together: bool = True,
) -> None:
    """Train the seeds of the cells that are not among found["runs"]; what is trained is written at once.

    Args:
        found: the table, which gets the runs.
        wanted: how each cell is trained, the longest trainings first.
        seeds: of every cell.
        jobs: processes.
        path: where the table is written.
        printed: what the paper prints for a cell, by metric.
        together: whether the seeds of a cell train at once.
    """
    have = {(Cell.of(run), run["seed"]) for run in found["runs"]}
    missing = {cell: [seed for seed in seeds if (cell, seed) not in have] for cell in wanted}
    todo = {cell: seeds for cell, seeds in missing.items() if seeds}
    where = environment([1], training_device())
    if todo and where not in found["environments"]:
        found["environments"].append(where)  # another commit, machine or day
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin) as pool:
        parts = [
            (cell, part) for cell, seeds in todo.items() for part in ([seeds] if together else [[s] for s in seeds])
        ]
        running = {pool.submit(train, wanted[cell], part): cell for cell, part in parts}
        try:
            for future in as_completed(running):
                cell = running[future]
                new = asdict(cell) | {"recipe": wanted[cell].recipe()}
                found["runs"] += [new | replica for replica in future.result()]
                summarize(found, printed)
                save(path, found)
                for row in found["cells"]:
                    if Cell.of(row) == cell and row["metric"] == "G_A":
                        print(line(row), flush=True)
        except BaseException:  # Ctrl-C and SIGTERM too: no worker may train on
            workers = list(pool._processes.values())  # shutdown forgets them
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()
            raise
    summarize(found, printed)


def summarize(found: dict[str, Any], printed: Callable[[Cell], Mapping[str, float]]) -> None:
    """Seeds and rows of the runs, beside what the paper prints."""
    found["seeds"] = sorted({run["seed"] for run in found["runs"]})
    found["cells"] = [row for cell in cells(found) for row in rows(of(found, cell), printed(cell))]


def _begin() -> None:
    torch.set_num_threads(1)
    # hardened choices multiply to numbers that are slow and as good as 0
    torch.set_flush_denormal(True)


def train(how: Training, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The replicas of a cell, as JSON."""
    from fffexp.training.vectorized import Replicas

    return [asdict(replica) for replica in Replicas(how.args, seeds).train(*how[1:])]


def of(found: Mapping[str, Any], cell: Cell) -> list[dict[str, Any]]:
    """The runs of a cell by seed."""
    return sorted((run for run in found["runs"] if Cell.of(run) == cell), key=lambda run: run["seed"])


def cells(found: Mapping[str, Any]) -> list[Cell]:
    """That have runs: the widest first, FF before the others, wide leaves before narrow ones."""
    return sorted(
        {Cell.of(run) for run in found["runs"]},
        key=lambda c: (-c.training_width, ORDER.index(c.layer), -(c.leaf_width or 0), c.reduction or ""),
    )


def rows(runs: Sequence[Mapping[str, Any]], printed: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each metric of a cell, beside the number that the paper prints."""
    cell = Cell.of(runs[0])
    made = []
    for metric, key, factor, score in METRICS:
        if runs[0][key] is None:
            continue
        values = [factor * run[key] for run in runs]
        mean, interval = mean_interval(values)
        ranked = sorted(zip((run[score] for run in runs), values, strict=True))
        made.append(
            {
                **cell.describe(),
                "metric": metric,
                "paper": printed.get(metric),
                "best": ranked[-1][1],
                "mean": mean,
                "ci95": interval,
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "worst": ranked[0][1],
                "values": values,
                "used_leaves": [run["used_blocks"] for run in runs],
                "collapsed": collapsed(runs),
                "rising": sum((run["epochs_to_fit"] or 0) > 0.9 * run["epochs"] for run in runs),
                "diverged": sum(run["nonfinite_steps"] > 0 for run in runs),
                "n": len(values),
            }
        )
    return made


def collapsed(runs: Sequence[Mapping[str, Any]]) -> int:
    """Runs that use fewer than half of their leaves or experts, or one alone."""
    used = [(run["used_blocks"], Cell.of(run).blocks) for run in runs]
    return sum(n is not None and (2 * n < blocks or n == 1) for n, blocks in used)


HEADER = (
    f"{'layer':13}{'w':>5}{'leaf':>5}{'reading':>8}{'metric':>7}{'paper':>7}{'best':>8}{'diff':>7}{'mean':>8}"
    f"{'95% interval':>18}{'std':>7}{'worst':>8}{'n':>4}{'used':>8}{'collapsed':>10}  verdict"
)


LEGEND = (
    "Percent, with hard decisions. M_A: best training accuracy; G_A: test accuracy of the weights that were best on\n"
    "validation; ETT_M, ETT_G: epochs to those, in best and worst of the runs with the best and the worst of them;\n"
    "paper: the best of its runs, diff: best less that; used: leaves or experts in use, least to most over the runs;\n"
    "collapsed: runs that use fewer than half, or one alone. better: the interval of the mean lies above the paper's;\n"
    "reproduced: the best run reaches it; still rising: most runs had their best training accuracy in the last tenth\n"
    "of the epochs that they had."
)


def line(row: Mapping[str, Any]) -> str:
    """A row of the printed table."""
    r = row
    interval = "" if r["ci95"] is None else "[{:.2f}, {:.2f}]".format(*r["ci95"])
    paper = "" if r["paper"] is None else f"{r['paper']:.1f}"
    std = "" if r["std"] is None else f"{r['std']:.2f}"
    start = f"{r['layer']:13}{r['training_width']:5}{r['leaf_width'] or '':>5}{r['reduction'] or '':>8}{r['metric']:>7}"
    diff = "" if r["paper"] is None else f"{r['best'] - r['paper']:+.2f}"
    numbers = f"{paper:>7}{r['best']:8.2f}{diff:>7}{r['mean']:8.2f}{interval:>18}{std:>7}{r['worst']:8.2f}{r['n']:4}"
    used = [blocks for blocks in r["used_leaves"] if blocks is not None]
    spread = "" if not used else str(min(used)) if min(used) == max(used) else f"{min(used)}-{max(used)}"
    return f"{start}{numbers}{spread:>8}{r['collapsed']:10}  {verdict(r)}".rstrip()


def difference(test: Paired) -> str:
    """Of two accuracies in points, its interval and p."""
    interval = "" if test.interval is None else " [{:+.2f}, {:+.2f}]".format(*(100 * x for x in test.interval))
    return f"{100 * test.difference:+.2f}{interval}" + ("" if test.p is None else f"  p {test.p:.1e}")


def verdict(row: Mapping[str, Any]) -> str:
    """How an accuracy stands to the paper's best of ten: see LEGEND."""
    if row["paper"] is None or row["ci95"] is None or not row["metric"].endswith("_A"):
        return ""
    low, high = row["ci95"]
    if low > row["paper"]:
        return "better"
    if row["best"] >= row["paper"]:
        return "reproduced"
    if row["metric"] == "M_A" and 2 * row["rising"] > row["n"]:
        return "still rising"
    return "not reproduced" if high < row["paper"] else "not told apart"


def above_paper(rows: Sequence[Mapping[str, Any]]) -> str:
    """In how many cells the mean test accuracy of FFF is above the paper's best of ten; "" where none can be tested."""
    tested = [row for row in rows if row["layer"] == "FFF" and row["metric"] == "G_A" and row["paper"] and row["n"] > 1]
    if not tested:
        return ""
    ps = above([row["values"] for row in tested], [row["paper"] for row in tested])
    shown = sum(row["ci95"][0] > row["paper"] for row in tested)
    collapsed = sum(row["collapsed"] == row["n"] for row in tested)
    of = f"of {len(tested)} cells" + (", each reading for itself," if tested[0]["reduction"] else "")
    return (
        f"FFF: in {shown} {of} the 95% interval of the mean G_A lies above the paper's best;\n"
        f"every run has collapsed in {collapsed} of {len(tested)};\n"
        f"largest p of one-sided t-tests, adjusted for all cells by Benjamini and Hochberg: {max(ps):.1e}"
    )
