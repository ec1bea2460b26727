"""`fffexp reproduce table1`: FF against FFF at equal training width (arXiv 2308.14711, section 4.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fffexp.paper import controls, runs, stability
from fffexp.paper.cells import CONFIGS, DATA, Cell, Layer, Reduction
from fffexp.paper.paper import printed
from fffexp.paper.results import save

Protocol = Literal["paper", "best"]

HARDENING = 3.0
# A net whose training and validation accuracy have not improved for so many epochs has stopped improving.
PATIENCE = 20


def cells(
    protocol: Protocol, training_widths: Sequence[int], leaf_widths: Sequence[int], layers: Sequence[Layer]
) -> list[Cell]:
    """All cells, the longest trainings first.

    Raises:
        UserError: a leaf width that does not fit a training width.
    """
    reductions: tuple[Reduction | None, ...] = ("sum", "mean") if protocol == "paper" else (None,)
    found = []
    for width in sorted(training_widths, reverse=True):
        for layer in layers:
            if layer == "FF":
                found.append(Cell("FF", width))
                continue
            for leaf_width in sorted(leaf_widths):
                for reduction in reductions if layer == "FFF" else (None,):
                    found.append(Cell(layer, width, leaf_width, reduction))
    return list(dict.fromkeys(found))


def training(cell: Cell, data: str, protocol: Protocol) -> runs.Training:
    """Of a cell."""
    if protocol == "best":
        return runs.Training(cell.best_arguments(data))
    args = [*DATA[data], f"--config={CONFIGS}/recipe/paper_table1.yaml", *cell.layer_arguments()]
    if cell.reduction:
        args.append(f"--model.aux_weights.hardening_{cell.reduction}={HARDENING}")
    return runs.Training(args, PATIENCE)


def measure(
    data: str,
    protocol: Protocol,
    wanted: Sequence[Cell],
    seeds: Sequence[int],
    with_controls: bool,
    jobs: int,
    path: Path | None,
) -> dict[str, Any]:
    """The table; cells and seeds that the file has are not trained again, and each is written when it is done.

    Raises:
        UserError: the file is of another measurement.
    """
    setting = {"table": "table1", "data": data, "protocol": protocol}
    found = runs.begin(path, setting, lambda cell: training(cell, data, protocol))
    everything = list(wanted)
    if with_controls:
        controls.choose(found, [cell for cell in wanted if cell.layer == "FFF"])
        save(path, found)
        everything += controls.cells(found, wanted)

    how = {cell: training(cell, data, protocol) for cell in everything}
    runs.complete(found, how, seeds, jobs, path, lambda cell: in_paper(cell, data))
    return found


def in_paper(cell: Cell, data: str) -> dict[str, float]:
    """What is printed of a cell, by metric; the table has no MoE."""
    paper = printed(data, cell.leaf_width, cell.training_width) if cell.layer in ("FF", "FFF") else None
    return dict(zip(("M_A", "G_A"), paper, strict=True)) if paper else {}


def report(found: dict[str, Any]) -> str:
    """Accuracies, then the controls and the stability."""
    rows = [runs.line(row) for row in found["cells"] if row["metric"] in ("G_A", "M_A")]
    parts = ["\n".join([runs.HEADER, *rows, runs.LEGEND]), runs.above_paper(found["cells"])]
    return "\n\n".join(part for part in (*parts, controls.report(found), stability.report(found)) if part)
