"""`fffexp reproduce figure5|figure6`: how trees harden in training, and what they route on (arXiv 2308.14711).

The curves are what `fffexp fit` tracks; mean entropy of the choices in nats, log 2 where all are undecided.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient
from sklearn.metrics import mutual_info_score
from torch import Tensor

from fffexp import paths
from fffexp.environment import environment, training_device
from fffexp.errors import UserError
from fffexp.layers import FeedforwardLayer
from fffexp.paper.cells import CONFIGS, DATA, PATCHES, Cell
from fffexp.paper.results import load, save
from fffexp.paper.runs import Training
from fffexp.training.classification import ClassificationTask
from fffexp.training.experiment import Context, run

Name = Literal["figure5", "figure6"]
DEPTHS, LEAF_WIDTH, HARDENING = (2, 3, 4), 8, 3.0
VIT, VIT_HARDENING = Cell("FFF", 128, 32), 0.1
SHARES = (0, 0.1, 0.25, 0.5, 1)  # of the training


class ClassesByLeaf(Callback):
    """At the end of a training: how many inputs of each class every leaf of every layer gets, on validation.

    Attributes:
        counts: by the layer's path, (leaves, classes).
    """

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count, by hooks."""
        assert isinstance(pl_module, ClassificationTask)
        batches = trainer.val_dataloaders
        assert batches is not None
        x, y = (torch.cat(part).to(pl_module.device) for part in zip(*batches, strict=True))
        classes = int(y.max()) + 1
        leaves: dict[str, Tensor] = {}

        def route(path: str, layer: FeedforwardLayer, args: tuple[Tensor]) -> None:
            leaves[path] = layer.route(args[0]).squeeze(1)

        layers = pl_module.layers
        handles = [layer.register_forward_pre_hook(partial(route, path)) for path, layer in layers.items()]
        self.counts = {
            path: torch.zeros(layer.num_experts, classes, dtype=torch.long, device=x.device)
            for path, layer in layers.items()
        }
        pl_module.eval()
        for rows, labels in zip(x.split(1024), y.split(1024), strict=True):
            pl_module(rows)
            for path, leaf in leaves.items():
                each = labels.repeat_interleave(len(leaf) // len(labels))  # the tokens of an image have its class
                pairs = torch.bincount(leaf * classes + each, minlength=self.counts[path].numel())
                self.counts[path] += pairs.view(-1, classes)
        for handle in handles:
            handle.remove()


def arguments(name: Name, data: str, epochs: int) -> dict[str, list[str]]:
    """Of `fffexp fit`, for each training of the figure."""
    common = [*DATA[data], f"--name=reproduce {name}"]
    if name == "figure5":
        recipe = [f"--config={CONFIGS}/recipe/paper_table1.yaml", f"--trainer.max_epochs={epochs}"]
        loss = f"--model.aux_weights.hardening_mean={HARDENING}"
        trees = {f"d = {depth}": Cell("FFF", 2**depth * LEAF_WIDTH, LEAF_WIDTH) for depth in DEPTHS}
        return {told: [*common, *recipe, *cell.layer_arguments(), loss] for told, cell in trees.items()}
    pieces = ("model/one_cycle", "model/vit", "recipe/vit")
    args = [*common, *(f"--config={CONFIGS}/{piece}.yaml" for piece in pieces), f"--trainer.max_epochs={epochs}"]
    args += [f"--model.network.init_args.patch_size={PATCHES[data]}", *VIT.layer_arguments()]
    return {"ViT": [*args, f"--model.aux_weights.hardening_mean={VIT_HARDENING}"]}


def measure(name: Name, data: str, epochs: int, path: Path | None) -> dict[str, Any]:
    """Entropies by training, layer and epoch, and classes by leaf; a training that the file has is not made again.

    Raises:
        UserError: the file is of another measurement, or a mistake in the data.
    """
    kind = {"figure": name, "data": data, "epochs": epochs}
    found = load(path, kind) or {**kind, "trainings": []}
    wanted = arguments(name, data, epochs)
    done = {training["name"]: training["recipe"] for training in found["trainings"]}
    for told, recipe in done.items():
        if told not in wanted or Training(wanted[told]).recipe() != recipe:
            raise UserError(f"--json {path}: {told} was trained by another recipe: give another file, or remove it")
    for told, args in wanted.items():
        if told in done:
            continue
        classes = ClassesByLeaf()
        result = run(["fit", *args, "--seed_everything=0", "--test=false"], Context(callbacks=[classes]))
        assert result is not None
        client = MlflowClient(paths.tracking_uri(None))
        layers = list(classes.counts)
        entropies = {}
        for layer in layers:
            key = "routing/entropy" if len(layers) == 1 else f"routing/entropy/{layer}"
            history = sorted(client.get_metric_history(result.run_id, key), key=lambda metric: metric.step)
            entropies[layer] = [metric.value for metric in history]
        found["trainings"].append(
            {
                "name": told,
                "recipe": Training(args).recipe(),
                "val_accuracy": result.metrics["val/accuracy"],
                "entropies": entropies,
                "classes_by_leaf": {layer: counts.tolist() for layer, counts in classes.counts.items()},
                "environment": environment([torch.get_num_threads()], training_device()),
            }
        )
        save(path, found)
    return found


def report(found: dict[str, Any]) -> str:
    """A line a layer: entropy after shares of the training, and how much of the class a leaf tells."""
    shares = "".join(f"{share:>8.0%}" for share in SHARES)
    lines = [f"{'training':10}{'layer':18}{shares}{'leaves':>8}{'class, nats':>13}"]
    for training in found["trainings"]:
        for layer, entropies in training["entropies"].items():
            at = (entropies[min(len(entropies) - 1, int(share * len(entropies)))] for share in SHARES)
            counts = training["classes_by_leaf"][layer]
            used = sum(sum(leaf) > 0 for leaf in counts)
            told = mutual_info_score(None, None, contingency=counts)
            start = f"{training['name']:10}{layer:18}" + "".join(f"{entropy:8.3f}" for entropy in at)
            lines.append(f"{start}{used:8}{told:13.3f}")
    lines.append(
        "Mean entropy of the choices in nats (undecided: 0.693) after these shares of the training; leaves that\n"
        "validation inputs reach at its end; what the leaf tells of the class: their mutual information (of ten\n"
        "classes at most 2.303)."
    )
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Entropies over the epochs; for figure 6 also the classes by leaf of each layer."""
    curves = [
        (
            f"{training['name']} {layer}".removesuffix("layer").rstrip(" ."),
            entropies,
            training["classes_by_leaf"][layer],
        )
        for training in found["trainings"]
        for layer, entropies in training["entropies"].items()
    ]
    panels = 1 + (len(curves) if found["figure"] == "figure6" else 0)
    figure = Figure(figsize=(5 + 2.4 * (panels - 1), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    first, *others = figure.subplots(1, panels, squeeze=False, width_ratios=[2.2, *[1] * (panels - 1)])[0]
    for name, entropies, _ in curves:
        first.plot(range(1, len(entropies) + 1), entropies, label=name)
    first.set_xlabel("epoch")
    first.set_ylabel("mean entropy of the choices, nats")
    first.set_ylim(bottom=0)
    first.grid(alpha=0.25)
    first.spines[["top", "right"]].set_visible(False)
    first.legend(frameon=False, fontsize=8)
    for axes, (name, _, counts) in zip(others, curves, strict=False):
        shares = torch.tensor(counts, dtype=torch.float64)
        axes.imshow((shares / shares.sum(0).clamp_min(1)).T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("leaf")
        axes.set_xticks(range(len(counts)))
        axes.set_yticks(range(len(counts[0])))
    if others:
        others[0].set_ylabel("class: share of its tokens by leaf")
    figure.suptitle(f"{found['data']}, {found['epochs']} epochs", x=0.01, ha="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
