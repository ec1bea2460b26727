"""`fffexp reproduce`: a paper's tables and figures, printed from their files, and measured where those lack them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import Any, Literal

from fffexp import paths
from fffexp.bench.commands import use_huge_pages
from fffexp.bench.setting import Setting
from fffexp.commandline import NonNegativeInt, PositiveFloat, PositiveInt, check_file
from fffexp.errors import refuse
from fffexp.files import hold, strict_json

Data = Literal["fashion_mnist", "mnist", "usps", "cifar10"]
Section = Literal[
    "legend", "test_accuracy", "train_accuracy", "epochs", "kept", "controls", "mixtures", "stability", "rivals"
]
POINT_S = 2.0  # of timing, for one batch size and depth of figure 3
ACCURACIES: list[Section] = ["legend", "test_accuracy", "train_accuracy"]


@dataclass(frozen=True)
class Table:
    """What of a table is trained and printed.

    Args:
        data: what is trained on.
        training_widths: hidden neurons in all; those of the table's trees unless given.
        leaf_widths: hidden neurons of a leaf or an expert; all of the study unless given.
        layers: groups of the study in studies/paper/; those that the table has unless given.
        seeds: how many, from 0 on.
        jobs: processes.
        show: sections that are printed.
        format: json prints the rows of the file.
        json: file of the results; what it has is not trained again.
    """

    data: Data = "fashion_mnist"
    training_widths: list[PositiveInt] | None = None
    leaf_widths: list[PositiveInt] | None = None
    layers: list[str] | None = None
    seeds: PositiveInt = 3
    jobs: PositiveInt = 2
    show: list[Section] = field(default_factory=list)
    format: Literal["text", "json"] = "text"
    json: Path | None = None


TABLE1 = Table(seeds=10, show=[*ACCURACIES, "controls", "mixtures", "stability", "rivals"])
TABLE2 = Table(show=[*ACCURACIES, "epochs", "stability"])
TABLE3 = Table(show=["legend", "test_accuracy", "kept", "controls"])


def table1(
    recipe: Literal["tuned", "printed"] = "tuned",
    controls: bool = False,
    figure: Path | None = None,
    table: Table = TABLE1,
) -> None:
    """Accuracy at equal training width (arXiv 2308.14711, table 1).

    Args:
        recipe: tuned, by configs/recipe/ (studies/paper/table1.yaml), or printed (studies/paper/table1_printed.yaml).
        controls: dense layers of equal parameters, inference size and inference time beside each tree, too.
        figure: PNG; beside the JSON unless given.
    """
    _table("table1", table, recipe, controls, figure)


def table2(table: Table = TABLE2) -> None:
    """Accuracy and epochs to train at equal training width, in a seventh of the epochs (arXiv 2308.14711, table 2)."""
    _table("table2", table, "printed")


def table3(blocks: PositiveInt = 4, epochs: PositiveInt | None = None, table: Table = TABLE3) -> None:
    """Accuracy, size and speed in a vision transformer (arXiv 2308.14711, table 3).

    Args:
        blocks: of the transformer; the paper's has 4, with fewer more is left to the feedforward layers.
        epochs: of a training; those of configs/recipe/vit.yaml unless given.
    """
    _table("table3", table, "tuned", controls=True, blocks=blocks, epochs=epochs)


def _table(
    name: str, table: Table, recipe: str, controls: bool = False, figure: Path | None = None, **more: int | None
) -> None:
    from fffexp.paper import comparisons, figure_table1, rows
    from fffexp.paper.studies import PaperStudy

    file = "table1_printed" if (name, recipe) == ("table1", "printed") else name
    study = PaperStudy(file, table.data, table.seeds, **more)
    groups = dict.fromkeys(label.partition(" ")[0] for label in study.content["layers"])
    layers = table.layers or (rows.layers(name) if name != "table3" else [*groups])
    for layer in layers:
        refuse((layer not in groups, f"--layers {layer}: studies/paper/{file}.yaml has {', '.join(groups)}"))
    widths = table.training_widths or study.values("training_width")
    leaf_widths = table.leaf_widths or study.values("leaf_width")
    trees = {f"{width}/{leaf}" for width in widths for leaf in leaf_widths}

    def wanted(label: str, point: dict[str, Any]) -> bool:
        # the third table has one mixture, of other leaf widths than its trees, and a model without layers
        leaves = point.get("leaf_width") in (None, *leaf_widths) or (name == "table3" and "depth" not in point)
        in_table = leaves and point["training_width"] in (0, *widths) and label.partition(" ")[0] in layers
        return in_table or (controls and not trees.isdisjoint(point.get("beside", ())))

    study.choose(wanted)
    with _files(table.json, figure, "table1" * (name == "table1")) as drawn:
        results = study.open(table.json, {"table": name, "data": table.data, "recipe": recipe, **more})
        results = study.complete(results, table.json, table.jobs)
        if controls:
            from fffexp.paper.speeds import MEASURE

            MEASURE[name](results, study)
        shown = study.wanted(results)
        before, results.extra["cells"] = results.to_json(), rows.cells(results)
        if table.json and results.to_json() != before:
            results.save(table.json)
        if table.format == "json":
            keys = ("table", "data", "recipe", "blocks", "epochs", "controls", "speeds")
            found = {key: results.extra[key] for key in keys if key in results.extra}
            print(dumps(strict_json({**found, "seeds": results.seeds, "cells": rows.cells(results, shown)}), indent=1))
        else:
            sections = rows.SECTIONS | comparisons.SECTIONS
            print("\n\n".join(part for name in table.show if (part := sections[name](results, shown))))
        if name == "table1":
            figure_table1.draw(results, drawn)


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

    sizes = leaf_width, in_features, out_features, batch_sizes or [1, 256], [threads]
    setting = Setting([], depths or [*range(1, 16)], *sizes, seconds=POINT_S, json=json)
    with _files(json, figure, "figure3") as drawn:
        measured = figures.measure(setting, ff_depth)
        print(figures.report(measured))
        figures.draw(measured, drawn)


def figure5(
    data: Data = "fashion_mnist", epochs: PositiveInt = 50, json: Path | None = None, figure: Path | None = None
) -> None:
    """Entropy of trees of depth 2, 3 and 4 over training, and the classes of their leaves (arXiv 2308.14711, figure 5).

    Args:
        data: what is trained on.
        epochs: of a training.
        json: file of the results; what it has is not trained again.
        figure: PNG; beside the JSON unless given.
    """
    _hardening("figure5", data, epochs, json, figure)


def figure6(
    data: Data = "fashion_mnist", epochs: PositiveInt = 15, json: Path | None = None, figure: Path | None = None
) -> None:
    """Entropy of each layer of a vision transformer, and the classes of its leaves (arXiv 2308.14711, figure 6).

    Args:
        data: what is trained on.
        epochs: of a training.
        json: file of the results; what it has is not trained again.
        figure: PNG; beside the JSON unless given.
    """
    _hardening("figure6", data, epochs, json, figure)


def _hardening(name: str, data: str, epochs: int, json: Path | None, figure: Path | None) -> None:
    from fffexp.paper import hardening
    from fffexp.paper.studies import PaperStudy

    study = PaperStudy(name, data, epochs=epochs)
    with _files(json, figure, name) as drawn:
        results = study.open(json, {"figure": name, "data": data, "epochs": epochs})
        for trial in study.missing(results):
            metrics, watched = hardening.train(study.arguments(trial, 0))
            trial.runs.append({"seed": 0, **metrics})
            others = [each for each in results.trials if each.recipe != trial.recipe]
            results.trials = sorted([*others, trial], key=lambda each: each.number)
            results.extra.setdefault("trainings", {})[str(trial.number)] = watched
            results.save(json)
        print(hardening.report(results))
        hardening.draw(results, drawn)


def conversion(
    data: Data = "fashion_mnist", trees: list[str] | None = None, seeds: PositiveInt = 3, json: Path | None = None
) -> None:
    """A trained vision transformer's layers made into trees, beside dense layers of their inference size.

    Args:
        data: what is trained on.
        trees: DEPTHxLEAF of each tree; those of conversion.yaml unless given.
        seeds: how many, from 0 on.
        json: file of the results; what it has is not trained again.
    """
    from fffexp.paper import conversion as converted
    from fffexp.paper.studies import PaperStudy

    study = PaperStudy("table3", data, seeds)
    study.choose(lambda _, point: point.get("beside") == [])
    with _files(json):
        trees = trees or converted.SETTING["trees"]
        setting = {"conversion": "ViT", "data": data, "trees": trees, "distillation": converted.SETTING["distillation"]}
        results, (dense,) = study.open(json, setting), study.points()
        results.trials = results.trials or converted.points(trees, dense.recipe)
        for seed in study.content["seeds"]:
            if seed not in results.trials[0].by_seed(results.test_monitor):
                converted.measure(study.arguments(dense, seed), seed, results.trials)
                results.save(json)
        print(converted.report(results))


def minilm(
    contenders: list[str] | None = None,
    minutes: list[PositiveFloat] | None = None,
    text: Path = Path("data/gcide/gcide.txt"),
    model: Path | None = None,
    untimed: bool = False,
    show: bool = False,
    json: Path = Path("docs/results/minilm.json"),
    figure: Path | None = None,
) -> None:
    """The feedforward layers of all-MiniLM-L6-v2 made into trees, beside int8 and narrow dense layers.

    Args:
        contenders: names in fffexp/paper/minilm.yaml; all unless given.
        minutes: budgets of a conversion, of processor time on one thread; those of minilm.yaml unless given.
        text: the dictionary that the test and the text of the conversion come from; make data fetches it.
        model: folder of the encoder; that of its package unless given.
        untimed: leave the timing to a later call, when the machine is quiet.
        show: print what the file has, and measure nothing.
        json: file of the results; what it has is not made again.
        figure: PNG; beside the JSON unless given.
    """
    from fffexp.paper import figure_minilm
    from fffexp.paper import minilm as converted
    from fffexp.paper.encoder import SETTING, Encoder, model_folder

    for name in contenders or ():
        refuse((name not in converted.CONTENDERS, f"--contenders {name}: there are {', '.join(converted.CONTENDERS)}"))
    for each in minutes or ():
        refuse((each not in SETTING["minutes"], f"--minutes {each:g}: minilm.yaml has {SETTING['minutes']}"))
    names, budgets = contenders or [*converted.CONTENDERS], minutes or SETTING["minutes"]
    with _files(json, figure, "minilm") as drawn:
        results = converted.Results(json)
        lacking = converted.missing(results, names, budgets, not untimed)
        if any(lacking) and not show:
            converted.complete(results, Encoder(model_folder(model), text), *lacking)
        print(converted.report(results))
        figure_minilm.draw(results, drawn)


def text(
    data: Literal["gcide", "python"] = "gcide",
    contenders: list[str] | None = None,
    steps: list[PositiveInt] | None = None,
    seeds: PositiveInt = 3,
    jobs: PositiveInt = 2,
    speeds: bool = False,
    json: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Layers in a small language model, against their size and time (studies/paper/text_gcide.yaml).

    Args:
        data: what is trained on; GCIDE, a dictionary, or the Python files of torch (studies/paper/text_python.yaml).
        contenders: names in the study; all unless given.
        steps: of a training; all of the study unless given.
        seeds: how many, from 0 on.
        jobs: processes.
        speeds: time the contenders with the weights of these trainings, which wants a quiet machine.
        json: file of the results; what it has is not trained again.
        figure: PNG; beside the JSON unless given. A second one, with _steps in its name, is of the course of training.
    """
    from fffexp.paper import figure_text
    from fffexp.paper import speeds as timing
    from fffexp.paper import text as language
    from fffexp.paper.studies import PaperStudy

    study = PaperStudy(f"text_{data}", data, seeds)
    groups, file = study.content["layers"], f"studies/paper/text_{data}.yaml"
    budgets = sorted({language.EPOCH_STEPS * point["epochs"] for of in groups.values() for point in of["points"]})
    for name in contenders or ():
        refuse((name not in groups, f"--contenders {name}: {file} has {', '.join(groups)}"))
    for count in steps or ():
        refuse((count not in budgets, f"--steps {count}: {file} has {budgets}"))
    part = speeds and (contenders or steps)
    refuse((part, "--speeds: contenders are compared, so all are timed: leave --contenders and --steps out"))
    epochs = {count / language.EPOCH_STEPS for count in steps or budgets}
    study.choose(lambda label, point: label in (contenders or groups) and point["epochs"] in epochs)
    with _files(json, figure, f"text_{data}") as drawn:
        results = study.complete(study.open(json, {"table": "text", "data": data}), json, jobs)
        if speeds:
            timing.in_language_model(results, study)
            results.save(json)
        print(language.report(results))
        figure_text.draw(results, drawn)


@contextmanager
def _files(json: Path | None, figure: Path | None = None, name: str = "") -> Iterator[Path]:
    # where the figure goes, once the files can be written; nobody else writes the JSON meanwhile
    check_file("--json", json, ".json")
    drawn = figure or (json.with_suffix(".png") if json else paths.outputs(f"{name}.png"))
    if name:
        check_file("--figure", drawn, ".png")
    with hold(json):
        yield drawn
