"""Figures 5 and 6: how trees harden in training, and what they route on (arXiv 2308.14711).

Curves of the mean entropy of the choices in nats, log 2 where all are undecided.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from matplotlib.figure import Figure
from sklearn.metrics import mutual_info_score
from torch import Tensor

from fffexp.environment import environment, training_device
from fffexp.paper.rows import section
from fffexp.study.results import Results
from fffexp.training.callbacks.routing import BlockCounter
from fffexp.training.experiment import Context, run

SHARES = (0, 0.1, 0.25, 0.5, 1)  # of the training
ENTROPY = "routing/entropy"


def train(args: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train one tree by the arguments of a fit; its metrics, and what is drawn of it.

    That is the entropy of each layer by epoch, and how its leaves share the classes of the validation set: by the
    layer's path, inputs of each class that every leaf gets, (leaves, classes).
    """
    entropies, classes_by_leaf = dict[str, list[float]](), dict[str, list[list[int]]]()

    def keep(trainer: Trainer, task: Any) -> None:  # what was logged at the end of the epoch before
        for path in task.layers if trainer.callback_metrics else ():
            key = ENTROPY if len(task.layers) == 1 else f"{ENTROPY}/{path}"
            entropies.setdefault(path, []).append(float(trainer.callback_metrics[key]))

    def end(trainer: Trainer, task: Any) -> None:
        keep(trainer, task)
        classes_by_leaf.update(_classes_by_leaf(task.eval(), trainer.val_dataloaders))

    result = run(args, Context(callbacks=[LambdaCallback(on_train_epoch_start=keep, on_train_end=end)], quiet=True))
    assert result is not None
    where = environment([torch.get_num_threads()], training_device())
    return result.metrics, {"entropies": entropies, "classes_by_leaf": classes_by_leaf, "environment": where}


@torch.no_grad()
def _classes_by_leaf(task: Any, batches: Any) -> dict[str, list[list[int]]]:
    x, y = (torch.cat(part).to(task.device) for part in zip(*batches, strict=True))
    counts: dict[str, list[Tensor]] = {path: [] for path in task.layers}  # of the leaves, for each class
    for label in range(int(y.max()) + 1):
        counter = BlockCounter(task.layers)
        for rows in x[y == label].split(1024):
            task(rows)  # the tokens of an image have its class
        for path, mine in counter.finish().items():
            counts[path].append(mine)
    return {path: torch.stack(mine, dim=1).tolist() for path, mine in counts.items()}


def _curves(results: Results) -> list[tuple[str, str, list[float], list[list[int]]]]:
    # name of the training, path of the layer, entropies, classes by leaf
    return [
        (f"depth {trial.params['depth']}", path, entropies, drawn["classes_by_leaf"][path])
        for trial in results.trials
        if (drawn := results.extra["trainings"].get(str(trial.number)))
        for path, entropies in drawn["entropies"].items()
    ]


def report(results: Results) -> str:
    """A row for each layer: entropy after shares of the training, and the mutual information of leaf and class."""
    lines = []
    for title, path, entropies, counts in _curves(results):
        at = {f"{s:.0%}": f"{entropies[min(len(entropies) - 1, int(s * len(entropies)))]:.3f}" for s in SHARES}
        used, known = sum(sum(leaf) > 0 for leaf in counts), mutual_info_score(None, None, contingency=counts)
        lines.append({"tree": title, "layer": path, **at, "leaves": used, "class, nats": f"{known:.3f}"})
    return section(
        "",
        lines,
        text="Mean entropy of the choices in nats (undecided: 0.693) after these shares of the training; leaves "
        "that validation inputs reach at its end; mutual information of leaf and class (of ten classes at most "
        "2.303).",
    )


def draw(results: Results, path: Path) -> None:
    """Entropies over the epochs; where a model has several layers also the classes by leaf of each."""
    curves = _curves(results)
    several = len({path for _, path, *_ in curves}) > 1
    panels = 1 + several * len(curves)
    figure = Figure(figsize=(5 + 2.4 * (panels - 1), 3.8), layout="constrained")
    first, *others = figure.subplots(1, panels, squeeze=False, width_ratios=[2.2, *[1] * (panels - 1)])[0]
    for title, layer, entropies, _ in curves:
        first.plot(range(1, len(entropies) + 1), entropies, label=layer if several else title)
    first.set(xlabel="epoch", ylabel="mean entropy of the choices, nats", ylim=(0, None))
    first.grid(alpha=0.25)
    first.spines[["top", "right"]].set_visible(False)
    first.legend(frameon=False, fontsize=8)
    for axes, (_, layer, _, counts) in zip(others, curves, strict=False):
        shares = torch.tensor(counts, dtype=torch.float64)
        axes.imshow((shares / shares.sum(0).clamp_min(1)).T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(layer, fontsize=8)
        axes.set(xlabel="leaf", xticks=range(len(counts)), yticks=range(len(counts[0])))
        axes.set_ylabel("class: share of its tokens by leaf" if axes is others[0] else "")
    epochs = max(len(entropies) for *_, entropies, _ in curves)
    figure.suptitle(f"{results.extra['data']}, {epochs} epochs", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=130)
