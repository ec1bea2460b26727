"""`fffexp reproduce`: a paper's tables and figures, printed from their files, and measured where those lack them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fffexp import paths
from fffexp.bench.commands import use_huge_pages
from fffexp.commandline import NonNegativeInt, PositiveInt, check_file
from fffexp.errors import UserError, terminated_by_signal
from fffexp.files import hold, strict_json

if TYPE_CHECKING:
    from fffexp.paper.studies import PaperStudy
    from fffexp.study.results import Results, Trial

Section = Callable[["Results", Sequence["Trial"]], str]
Format = Literal["text", "json"]
Table1Section = Literal["legend", "test_accuracy", "train_accuracy", "controls", "mixtures", "stability", "rivals"]
Table2Section = Literal["legend", "test_accuracy", "train_accuracy", "epochs", "stability"]
Table3Section = Literal["legend", "test_accuracy", "kept", "controls"]
PATCHES = {"fashion_mnist": 7, "cifar10": 4}  # pixels of a vision transformer's patch that divide the images


def table1(
    data: Literal["fashion_mnist", "mnist", "usps"] = "fashion_mnist",
    recipe: Literal["tuned", "printed"] = "tuned",
    training_widths: list[PositiveInt] | None = None,
    leaf_widths: list[PositiveInt] | None = None,
    layers: list[str] | None = None,
    controls: bool = False,
    seeds: PositiveInt = 10,
    jobs: PositiveInt = 2,
    show: list[Table1Section] | None = None,
    format: Format = "text",
    json: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Accuracy at equal training width (arXiv 2308.14711, table 1).

    Args:
        data: what is trained on.
        recipe: tuned, by configs/recipe/ (studies/paper/table1.yaml), or printed (studies/paper/table1_printed.yaml).
        training_widths: hidden neurons in all; those of the table's trees unless given.
        leaf_widths: hidden neurons of a leaf or an expert; all of the study unless given.
        layers: groups of the study; those that the paper's table has unless given.
        controls: dense layers of equal parameters, inference size and inference time beside each tree, too.
        seeds: how many, from 0 on.
        jobs: processes.
        show: sections that are printed; all unless given.
        format: json prints the rows of the file.
        json: file of the results; what it has is not trained again.
        figure: PNG; beside the JSON unless given.
    """
    from fffexp.paper import controls as compared
    from fffexp.paper import figure_table1, rows, stability
    from fffexp.paper.studies import PaperStudy

    study = PaperStudy("table1" if recipe == "tuned" else "table1_printed", data, seeds)
    groups = [label.partition(" ")[0] for label in study.content["layers"]]
    chosen = rows.layers("table1") if layers is None else layers
    if unknown := [layer for layer in chosen if layer not in groups]:
        raise UserError(f"--layers {unknown[0]}: --recipe {recipe} has {', '.join(dict.fromkeys(groups))}")
    training_widths = training_widths or study.values("training_width")
    leaf_widths = leaf_widths or study.values("leaf_width")
    trees = {f"{width}/{leaf}" for width in training_widths for leaf in leaf_widths}

    def wanted(label: str, point: dict[str, Any]) -> bool:
        in_table = point["training_width"] in training_widths and point.get("leaf_width") in (None, *leaf_widths)
        return (in_table and label.partition(" ")[0] in chosen) or (
            controls and bool(trees & {*point.get("beside", ())})
        )

    study.choose(wanted)
    test, train, *_ = rows.METRICS
    sections: dict[str, Section] = {
        "legend": lambda *_: rows.note(rows.LEGEND),
        "test_accuracy": lambda results, shown: rows.report(results, test, shown) + rows.above_paper(results, shown),
        "train_accuracy": lambda results, shown: rows.report(results, train, shown),
        "controls": compared.report_trees,
        "mixtures": compared.report_mixtures,
        "stability": stability.report,
        "rivals": stability.report_rivals,
    }
    with _files(json, figure, "table1") as drawn:
        results = study.open(json, {"table": "table1", "data": data, "recipe": recipe})
        results = study.complete(results, json, jobs)
        if controls and (untimed := compared.untimed(results, study.wanted(results))):
            compared.measure(results, untimed, study.build)
        _finish(study, results, json, sections, show, format)
        figure_table1.draw(results, drawn)


def table2(
    data: Literal["fashion_mnist", "cifar10"] = "fashion_mnist",
    training_widths: list[PositiveInt] | None = None,
    layers: list[str] | None = None,
    seeds: PositiveInt = 3,
    jobs: PositiveInt = 2,
    show: list[Table2Section] | None = None,
    format: Format = "text",
    json: Path | None = None,
) -> None:
    """Accuracy and epochs to train at equal training width, in a seventh of the epochs (arXiv 2308.14711, table 2).

    Args:
        data: what is trained on.
        training_widths: hidden neurons in all; all of the study unless given.
        layers: groups of studies/paper/table2.yaml; those that the paper's table has unless given.
        seeds: how many, from 0 on.
        jobs: processes.
        show: sections that are printed; all unless given.
        format: json prints the rows of the file.
        json: file of the results; what it has is not trained again.
    """
    from fffexp.paper import rows, stability
    from fffexp.paper.studies import PaperStudy

    study = PaperStudy("table2", data, seeds)
    chosen, widths = layers or rows.layers("table2"), training_widths or study.values("training_width")
    study.choose(lambda label, point: label.partition(" ")[0] in chosen and point["training_width"] in widths)
    test, train, *epochs = rows.METRICS
    sections: dict[str, Section] = {
        "legend": lambda *_: rows.note(rows.LEGEND),
        "test_accuracy": lambda results, shown: rows.report(results, test, shown),
        "train_accuracy": lambda results, shown: rows.report(results, train, shown),
        "epochs": lambda results, shown: "\n\n".join(rows.report(results, metric, shown) for metric in epochs),
        "stability": stability.report,
    }
    with _files(json):
        results = study.open(json, {"table": "table2", "data": data, "recipe": "printed"})
        _finish(study, study.complete(results, json, jobs), json, sections, show, format)


def table3(
    data: Literal["fashion_mnist", "cifar10"] = "fashion_mnist",
    leaf_widths: list[PositiveInt] | None = None,
    blocks: PositiveInt = 4,
    epochs: PositiveInt | None = None,
    seeds: PositiveInt = 3,
    jobs: PositiveInt = 2,
    show: list[Table3Section] | None = None,
    format: Format = "text",
    json: Path | None = None,
) -> None:
    """Accuracy, size and speed in a vision transformer (arXiv 2308.14711, table 3).

    Args:
        data: what is trained on.
        leaf_widths: hidden neurons of a leaf; all of the study unless given.
        blocks: of the transformer; the paper's has 4, with fewer more is left to the feedforward layers.
        epochs: of a training; those of configs/recipe/vit.yaml unless given.
        seeds: how many, from 0 on.
        jobs: processes.
        show: sections that are printed; all unless given.
        format: json prints the rows of the file.
        json: file of the results; what it has is not trained again.
    """
    from fffexp.paper import rows
    from fffexp.paper import table3 as report

    setting = {"table": "table3", "data": data, "recipe": "tuned", "blocks": blocks, "epochs": epochs}
    study = _vit("table3", data, seeds, {"model.network.init_args.num_blocks": blocks} | _epochs(epochs))
    leaf_widths = leaf_widths or study.values("leaf_width")
    trees = {f"128/{leaf}" for leaf in leaf_widths}
    study.choose(
        lambda _, point: (
            bool(trees & {*point["beside"]}) or not point["beside"]
            if "beside" in point
            else "depth" not in point or point["leaf_width"] in leaf_widths
        )
    )
    sections: dict[str, Section] = {
        "legend": lambda *_: rows.note(rows.LEGEND),
        "test_accuracy": lambda results, shown: rows.report(results, rows.METRICS[0], shown),
        "kept": report.report_kept,
        "controls": report.report_controls,
    }
    with _files(json):
        results = study.complete(study.open(json, setting), json, jobs)
        if report.untimed(results):
            report.measure(results, study.build)
        _finish(study, results, json, sections, show, format)


def figure3(
    depths: list[NonNegativeInt] | None = None,
    batch_sizes: list[PositiveInt] | None = None,
    leaf_width: PositiveInt = 32,
    in_features: PositiveInt = 768,
    out_features: PositiveInt = 768,
    ff_depth: NonNegativeInt = 5,
    threads: PositiveInt = 1,
    json: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Time of inference against the number of blocks (arXiv 2308.14711, figures 3 and 4).

    Args:
        depths: of the trees, 1 to 15 unless given; there are as many experts as leaves.
        batch_sizes: samples at once, 1 and 256 unless given.
        leaf_width: hidden neurons of a leaf or an expert.
        in_features: of the layers.
        out_features: of the layers.
        ff_depth: dense layers up to width leaf_width * 2^N.
        threads: of torch.
        json: file of the results; what it has is not measured again.
        figure: PNG; beside the JSON unless given.
    """
    use_huge_pages()
    from fffexp.paper import figure3 as figures

    depths, batch_sizes = depths or list(range(1, 16)), batch_sizes or [1, 256]
    with _files(json, figure, "figure3") as drawn:
        measured = figures.measure(
            depths, batch_sizes, (in_features, out_features, leaf_width), threads, ff_depth, json
        )
        print(figures.report(measured))
        figures.draw(measured, drawn)


def figure5(
    data: Literal["fashion_mnist", "mnist"] = "fashion_mnist",
    epochs: PositiveInt = 50,
    json: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Entropy of trees of depth 2, 3 and 4 over training, and the classes of their leaves (arXiv 2308.14711, figure 5).

    Args:
        data: what is trained on.
        epochs: of a training.
        json: file of the results; what it has is not trained again.
        figure: PNG; beside the JSON unless given.
    """
    from fffexp.paper.studies import PaperStudy

    _hardening(PaperStudy("figure5", data, None, _epochs(epochs)), json, figure)


def figure6(
    data: Literal["fashion_mnist", "cifar10"] = "fashion_mnist",
    epochs: PositiveInt = 15,
    json: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Entropy of each layer of a vision transformer, and the classes of its leaves (arXiv 2308.14711, figure 6).

    Args:
        data: what is trained on.
        epochs: of a training.
        json: file of the results; what it has is not trained again.
        figure: PNG; beside the JSON unless given.
    """
    _hardening(_vit("figure6", data, None, _epochs(epochs)), json, figure)


def _hardening(study: "PaperStudy", json: Path | None, figure: Path | None) -> None:
    from fffexp.paper import hardening

    name = study.content["name"]
    epochs = study.content["overrides"]["trainer.max_epochs"]
    with _files(json, figure, name) as drawn:
        results = study.open(json, {"figure": name, "data": study.data, "epochs": epochs})
        for trial in study.missing(results):
            metrics, watched = hardening.train(study.arguments(trial, 0))
            trial.runs.append({"seed": 0, **metrics})
            study.add(results, trial)
            results.extra.setdefault("trainings", {})[str(trial.number)] = watched
            if json:
                results.save(json)
        print(hardening.report(results))
        hardening.draw(results, drawn)


def conversion(
    data: Literal["fashion_mnist", "cifar10"] = "fashion_mnist",
    trees: list[str] | None = None,
    seeds: PositiveInt = 3,
    json: Path | None = None,
) -> None:
    """A trained vision transformer's layers made into trees, beside dense layers of their inference size.

    Args:
        data: what is trained on.
        trees: DEPTHxLEAF of each tree; those of conversion.yaml unless given.
        seeds: how many, from 0 on.
        json: file of the results; what it has is not trained again.
    """
    from fffexp.paper import conversion as converted

    study = _vit("table3", data, seeds, {})
    study.choose(lambda _, point: point.get("beside") == [])
    with _files(json):
        trees = trees or converted.SETTING["trees"]
        setting = {"conversion": "ViT", "data": data, "trees": trees, "distillation": converted.SETTING["distillation"]}
        results = study.open(json, setting)
        (dense,) = study.points()
        results.trials = results.trials or converted.points(trees, dense.recipe)
        for seed in study.content["seeds"]:
            if seed not in results.trials[0].by_seed(results.test_monitor):
                converted.measure(study.arguments(dense, seed), seed, results.trials)
                if json:
                    results.save(json)
        print(converted.report(results))


def _vit(name: str, data: str, seeds: int | None, overrides: dict[str, Any]) -> "PaperStudy":
    from fffexp.paper.studies import PaperStudy

    return PaperStudy(name, data, seeds, {"model.network.init_args.patch_size": PATCHES[data], **overrides})


def _epochs(epochs: int | None) -> dict[str, Any]:
    return {} if epochs is None else {"trainer.max_epochs": epochs}


@contextmanager
def _files(json: Path | None, figure: Path | None = None, name: str = "") -> Iterator[Path]:
    """Where the figure of this name goes, once the files can be written; nobody else writes the JSON meanwhile."""
    check_file("--json", json, ".json")
    drawn = figure or (json.with_suffix(".png") if json else paths.outputs() / f"{name}.png")
    if name:
        check_file("--figure", drawn, ".png")
    with hold(json), terminated_by_signal():
        yield drawn


def _finish(
    study: "PaperStudy",
    results: "Results",
    json: Path | None,
    sections: dict[str, Section],
    show: Sequence[str] | None,
    format: Format,
) -> None:
    """Add the rows, write the file if they changed, and print."""
    from fffexp.paper import rows

    before = results.to_json()
    results.extra["cells"] = rows.cells(results)
    if json and results.to_json() != before:
        results.save(json)
    shown = study.wanted(results)
    if format == "json":
        keys = ("table", "data", "recipe", "blocks", "epochs", "controls", "speeds")
        found = {key: results.extra[key] for key in keys if key in results.extra}
        points = [rows.describe(trial) for trial in shown]
        cells = [row for row in results.extra["cells"] if {key: row[key] for key in points[0]} in points]
        print(dumps(strict_json({**found, "seeds": results.seeds, "cells": cells}), indent=1))
        return
    print("\n\n".join(part for name in show or sections if (part := sections[name](results, shown))))
