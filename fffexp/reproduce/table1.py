"""`fffexp reproduce table1`: FF against FFF at equal training width (arXiv 2308.14711, section 4.1)."""

import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from fffexp.errors import UserError
from fffexp.reproduce.paper import printed
from fffexp.reproduce.results import load, save
from fffexp.study.statistics import mean_interval

Protocol = Literal["paper", "best"]
Reduction = Literal["sum", "mean"]

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = {
    "fashion_mnist": [f"--config={CONFIGS}/data/fashion_mnist.yaml"],
    "mnist": [f"--config={CONFIGS}/data/hub.yaml", "--data.name=mnist"],
    "usps": [f"--config={CONFIGS}/data/hub.yaml", "--data.name=usps"],
}
HARDENING = 3.0
# A net whose training and validation accuracy have not improved for so many epochs has stopped improving.
PATIENCE = 20


@dataclass(frozen=True)
class Cell:
    """A cell of the table; FF has no leaf width, and only the paper's FFF has a reduction."""

    training_width: int
    leaf_width: int | None
    reduction: Reduction | None

    @property
    def depth(self) -> int | None:
        """Of the tree."""
        return None if self.leaf_width is None else (self.training_width // self.leaf_width).bit_length() - 1

    def arguments(self, data: str, protocol: Protocol) -> list[str]:
        """What `fffexp fit` would take to train it."""
        pieces = ["recipe/paper_table1"] if protocol == "paper" else ["model/one_cycle", "trainer/averaged"]
        if protocol == "best" and self.leaf_width is not None:
            pieces.append("recipe/fff")
        args = [*DATA[data], *(f"--config={CONFIGS}/{piece}.yaml" for piece in pieces)]
        if self.leaf_width is None:
            args += ["--model.layer=FF", f"--model.layer.width={self.training_width}"]
        else:
            args += ["--model.layer=FFF", f"--model.layer.depth={self.depth}"]
            args.append(f"--model.layer.leaf_width={self.leaf_width}")
        if self.reduction:
            args.append(f"--model.coefficients.hardening_{self.reduction}={HARDENING}")
        return args


def cells(protocol: Protocol, training_widths: Sequence[int], leaf_widths: Sequence[int]) -> list[Cell]:
    """All cells, the longest trainings first.

    Raises:
        UserError: a leaf width that does not divide a training width into a power of 2 of leaves.
    """
    reductions: tuple[Reduction | None, ...] = ("sum", "mean") if protocol == "paper" else (None,)
    found = []
    for width in sorted(training_widths, reverse=True):
        found.append(Cell(width, None, None))
        for leaf_width in sorted(leaf_widths):
            leaves, rest = divmod(width, leaf_width)
            if rest or leaves & (leaves - 1) or not leaves:
                raise UserError(f"{width} hidden neurons are not a power of 2 of leaves of {leaf_width}")
            found += [Cell(width, leaf_width, reduction) for reduction in reductions]
    return found


def measure(
    data: str,
    protocol: Protocol,
    wanted: Sequence[Cell],
    seeds: Sequence[int],
    jobs: int,
    path: Path | None,
) -> dict[str, Any]:
    """The table; cells and seeds that the file has are not trained again, and each is written when it is done.

    Raises:
        UserError: the file is of another measurement.
    """
    setting = {"table": "table1", "data": data, "protocol": protocol}
    found = load(path, setting) or {**setting, "seeds": [], "cells": [], "runs": []}
    done = {(_cell(run), run["seed"]) for run in found["runs"]}
    missing = {cell: [seed for seed in seeds if (cell, seed) not in done] for cell in wanted}
    todo = {cell: todo for cell, todo in missing.items() if todo}
    patience = PATIENCE if protocol == "paper" else None
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {pool.submit(train, cell.arguments(data, protocol), todo[cell], patience): cell for cell in todo}
        try:
            for future in as_completed(running):
                cell = running[future]
                found["runs"] += [asdict(cell) | replica for replica in future.result()]
                _summarize(found)
                save(path, found)
                (row,) = (c for c in found["cells"] if c["metric"] == "G_A" and _cell(c) == cell)
                print(line(row), flush=True)
        except BaseException:
            workers = list(pool._processes.values())  # shutdown forgets them
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()
            raise
    _summarize(found)
    return found


def train(args: Sequence[str], seeds: Sequence[int], patience: int | None) -> list[dict[str, Any]]:
    """The replicas of a cell, as JSON."""
    from fffexp.replicas import Replicas

    return [asdict(replica) for replica in Replicas(args, seeds).train(patience)]


def _cell(record: dict[str, Any]) -> Cell:
    return Cell(record["training_width"], record["leaf_width"], record["reduction"])


def _summarize(found: dict[str, Any]) -> None:
    """Cells, of all the runs there are, widest first."""
    found["seeds"] = sorted({run["seed"] for run in found["runs"]})
    found["cells"] = []
    order = sorted(
        {_cell(run) for run in found["runs"]}, key=lambda c: (-c.training_width, c.leaf_width or 999, c.reduction or "")
    )
    for cell in order:
        runs = sorted((run for run in found["runs"] if _cell(run) == cell), key=lambda run: run["seed"])
        paper = printed(found["data"], cell.leaf_width, cell.training_width)
        for metric, key, scale in (
            ("M_A", "train_accuracy", 100),
            ("G_A", "test_accuracy", 100),
            ("ETT_M", "epochs_to_fit", 1),
            ("ETT_G", "epochs_to_best", 1),
        ):
            values = [scale * run[key] for run in runs]
            mean, interval = mean_interval(values)
            of_paper = paper[("M_A", "G_A").index(metric)] if paper and scale == 100 else None
            found["cells"].append(
                {
                    "layer": "FF" if cell.leaf_width is None else "FFF",
                    **asdict(cell),
                    "depth": cell.depth,
                    "metric": metric,
                    "paper": of_paper,
                    "best": max(values) if scale == 100 else min(values),
                    "mean": mean,
                    "ci95": interval,
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                    "worst": min(values) if scale == 100 else max(values),
                    "values": values,
                    "used_leaves": [run["used_blocks"] for run in runs],
                    "collapsed": sum(2 * (run["used_blocks"] or 999999) < 2 ** (cell.depth or 0) for run in runs),
                    "diverged": sum(run["nonfinite_steps"] > 0 for run in runs),
                    "n": len(values),
                }
            )


HEADER = (
    f"{'layer':6}{'w':>5}{'leaf':>5}{'reading':>9}{'metric':>8}{'paper':>7}{'best':>7}{'mean':>7}"
    f"{'95% interval':>16}{'std':>6}{'worst':>7}{'n':>4}{'collapsed':>11}  verdict"
)


def line(cell: dict[str, Any]) -> str:
    """A row of the printed table."""
    c = cell
    interval = "" if c["ci95"] is None else "[{:.2f}, {:.2f}]".format(*c["ci95"])
    paper = "" if c["paper"] is None else f"{c['paper']:.1f}"
    std = "" if c["std"] is None else f"{c['std']:.2f}"
    start = f"{c['layer']:6}{c['training_width']:5}{c['leaf_width'] or '':>5}{c['reduction'] or '':>9}{c['metric']:>8}"
    numbers = f"{paper:>7}{c['best']:7.2f}{c['mean']:7.2f}{interval:>16}{std:>6}{c['worst']:7.2f}{c['n']:4}"
    return f"{start}{numbers}{c['collapsed']:11}  {verdict(c)}"


def verdict(cell: dict[str, Any]) -> str:
    """How a cell stands to the paper's best of ten."""
    if cell["paper"] is None or cell["ci95"] is None:
        return ""
    low, high = cell["ci95"]
    if low > cell["paper"]:
        return "better: the interval of the mean lies above the paper's best"
    if cell["best"] >= cell["paper"]:
        return "reproduced: the best reaches the paper's best"
    return "not reproduced" if high < cell["paper"] else "not told apart"


def report(found: dict[str, Any]) -> str:
    """The table of accuracies."""
    rows = [line(cell) for cell in found["cells"] if cell["metric"] in ("G_A", "M_A")]
    return "\n".join([HEADER, *rows])
