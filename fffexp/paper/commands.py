"""`fffexp reproduce`: arguments to measurements to figures and tables."""

import argparse
from pathlib import Path

from fffexp.bench.arguments import Parser, natural, positive
from fffexp.errors import UserError
from fffexp.paper.cells import LAYERS
from fffexp.paper.results import check_figure, hold


def main(args: list[str]) -> int:
    """Parse and run."""
    parser = Parser(prog="fffexp reproduce", description="Measure a paper's results again.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    told = "time of inference against the number of blocks (arXiv 2308.14711, figures 3 and 4)"
    sub = commands.add_parser("figure3", help=told, description=told, allow_abbrev=False)
    sub.add_argument("--depths", nargs="+", type=natural, default=list(range(1, 16)), metavar="N")
    sub.add_argument("--batch_sizes", nargs="+", type=positive, default=[1, 256], metavar="N")
    sub.add_argument("--leaf_width", type=positive, default=32, metavar="N")
    sub.add_argument("--in_features", type=positive, default=768, metavar="N")
    sub.add_argument("--out_features", type=positive, default=768, metavar="N")
    sub.add_argument("--ff_depth", type=natural, metavar="N", help="FF up to width leaf_width * 2^N (the paper's: 5)")
    sub.add_argument("--threads", type=positive, default=1, metavar="N")
    sub.add_argument("--figure", type=Path, metavar="FILE", help="PNG; beside the JSON unless named")
    sub.set_defaults(run=_figure3)
    _json(sub)
    told = "accuracy of FF and FFF at equal training width (arXiv 2308.14711, table 1)"
    sub = commands.add_parser("table1", help=told, description=told, allow_abbrev=False)
    sub.add_argument("--data", choices=("fashion_mnist", "mnist", "usps"), default="fashion_mnist")
    sub.add_argument("--protocol", choices=("paper", "best"), default="paper", help="as printed, or configs/recipe/")
    sub.add_argument("--training_widths", nargs="+", type=positive, default=[16, 32, 64, 128], metavar="N")
    sub.add_argument("--leaf_widths", nargs="+", type=positive, default=[8, 4, 2, 1], metavar="N")
    told = "of FF and FFF, and with --protocol best of the mixtures of experts too"
    sub.add_argument("--layers", nargs="+", choices=LAYERS, default=["FF", "FFF"], help=told)
    told = "FF of equal parameters, inference size and inference time beside each FFF (--protocol best)"
    sub.add_argument("--controls", action="store_true", help=told)
    _trainings(sub)
    sub.add_argument("--figure", type=Path, metavar="FILE", help="PNG; beside the JSON unless named")
    sub.set_defaults(run=_table1)
    _json(sub)
    told = "accuracy and epochs to train of FF, MoE and FFF at equal training width, in a seventh of the epochs of"
    told += " arXiv 2308.14711, table 2"
    sub = commands.add_parser("table2", help=told, description=told, allow_abbrev=False)
    sub.add_argument("--data", choices=("fashion_mnist", "cifar10"), default="fashion_mnist")
    sub.add_argument("--training_widths", nargs="+", type=positive, default=[64, 128, 256, 512, 1024], metavar="N")
    told = "SwitchMoE, which the paper does not have, takes one expert of 32 a sample, as FFF takes one leaf"
    sub.add_argument("--layers", nargs="+", choices=LAYERS, default=["FF", "NoisyTopKMoE", "FFF"], help=told)
    _trainings(sub, seeds=3)
    sub.set_defaults(run=_table2)
    _json(sub)
    told = "accuracy, size and speed of a vision transformer with FF, MoE and FFF (arXiv 2308.14711, table 3)"
    sub = commands.add_parser("table3", help=told, description=told, allow_abbrev=False)
    sub.add_argument("--data", choices=("fashion_mnist", "cifar10"), default="fashion_mnist")
    sub.add_argument("--leaf_widths", nargs="+", type=positive, default=[32, 16, 8, 4, 2, 1], metavar="N")
    told = "of the transformer (the paper's: 4); with fewer more is left to the feedforward layers"
    sub.add_argument("--blocks", type=positive, default=4, metavar="N", help=told)
    told = "of a training (default: 15, those of configs/recipe/vit.yaml)"
    sub.add_argument("--epochs", type=positive, metavar="N", help=told)
    _trainings(sub, seeds=3)
    sub.set_defaults(run=_table3)
    _json(sub)
    told = "a trained vision transformer's layers made into trees, beside FF of their inference size, not trained again"
    sub = commands.add_parser("conversion", help=told, description=told, allow_abbrev=False)
    sub.add_argument("--data", choices=("fashion_mnist", "cifar10"), default="fashion_mnist")
    trees = [(2, 32), (4, 32), (3, 16), (4, 8)]
    sub.add_argument("--trees", nargs="+", type=_tree, default=trees, metavar="DEPTHxLEAF", help="such as 4x32")
    sub.add_argument("--seeds", type=positive, default=3, metavar="N", help="how many, from 0 on")
    sub.set_defaults(run=_conversion)
    _json(sub)
    for name, told, data, epochs in (
        ("figure5", "entropy of trees of depth 2, 3 and 4 over training", ("fashion_mnist", "mnist"), 50),
        ("figure6", "entropy of each layer of a vision transformer over training", ("fashion_mnist", "cifar10"), 15),
    ):
        told = f"{told}, and the classes that their leaves get (arXiv 2308.14711, {name[:6]} {name[6:]})"
        sub = commands.add_parser(name, help=told, description=told, allow_abbrev=False)
        sub.add_argument("--data", choices=data, default="fashion_mnist")
        sub.add_argument("--epochs", type=positive, default=epochs, metavar="N")
        sub.add_argument("--figure", type=Path, metavar="FILE", help="PNG; beside the JSON unless named")
        sub.set_defaults(run=_entropies)
        _json(sub)
    found = parser.parse_args(args)
    if found.json and found.json.suffix != ".json":
        raise UserError(f"--json {found.json}: name a file that ends in .json")
    if "figure" in found:
        beside = found.json.with_suffix(".png") if found.json else Path(f"outputs/{found.command}.png")
        check_figure(found.figure or beside, "--figure" if found.figure or not found.json else "--json")
        found.figure = found.figure or beside
    with hold(found.json):
        found.run(found)
    return 0


def _trainings(sub: argparse.ArgumentParser, seeds: int = 10) -> None:
    sub.add_argument("--seeds", type=positive, default=seeds, metavar="N", help="how many, from 0 on")
    sub.add_argument("--jobs", type=positive, default=2, metavar="N", help="processes, one cell each")


def _json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", type=Path, metavar="FILE", help="results; a file that is there is completed")


def _figure3(found: argparse.Namespace) -> None:
    from fffexp.paper import figure3

    measured = figure3.measure(
        found.depths,
        found.batch_sizes,
        (found.in_features, found.out_features, found.leaf_width),
        found.threads,
        figure3.FF_DEPTH if found.ff_depth is None else found.ff_depth,
        found.json,
    )
    print(figure3.report(measured))
    figure3.draw(measured, found.figure)
    print(f"drawn to {found.figure}" + (f", measurements in {found.json}" if found.json else ""))


def _table1(found: argparse.Namespace) -> None:
    if found.protocol == "paper" and (found.controls or {*found.layers} - {"FF", "FFF"}):
        raise UserError("--protocol paper has FF and FFF alone: add --protocol best for controls and other layers")
    if found.controls and "FFF" not in found.layers:
        raise UserError("--controls stand beside FFF: add it to --layers")
    from fffexp.paper import runs, table1
    from fffexp.report import figure_table1

    wanted = table1.cells(found.protocol, found.training_widths, found.leaf_widths, found.layers)
    print(runs.HEADER, flush=True)
    seeds = range(found.seeds)
    measured = table1.measure(found.data, found.protocol, wanted, seeds, found.controls, found.jobs, found.json)
    print(table1.report(measured))
    figure_table1.draw(measured, found.figure)
    print(f"drawn to {found.figure}")


def _table2(found: argparse.Namespace) -> None:
    from fffexp.paper import runs, table2

    wanted = table2.cells(found.training_widths, found.layers)
    print(runs.HEADER, flush=True)
    measured = table2.measure(found.data, wanted, range(found.seeds), found.jobs, found.json)
    print(table2.report(measured))


def _table3(found: argparse.Namespace) -> None:
    from fffexp.paper import runs, table3

    wanted = table3.cells(found.leaf_widths)
    print(runs.HEADER, flush=True)
    seeds = range(found.seeds)
    measured = table3.measure(found.data, found.blocks, found.epochs, wanted, seeds, found.jobs, found.json)
    print(table3.report(measured))


def _tree(text: str) -> tuple[int, int]:
    depth, by, leaf_width = text.partition("x")
    if not by:
        raise argparse.ArgumentTypeError(f"{text!r} is not DEPTHxLEAF, such as 4x32")
    return natural(depth), positive(leaf_width)


def _conversion(found: argparse.Namespace) -> None:
    from fffexp.paper import conversion

    shapes = [conversion.Shape(*tree) for tree in found.trees]
    print(conversion.report(conversion.measure(found.data, shapes, range(found.seeds), found.json)))


def _entropies(found: argparse.Namespace) -> None:
    from fffexp.paper import entropies

    measured = entropies.measure(found.command, found.data, found.epochs, found.json)
    print(entropies.report(measured))
    entropies.draw(measured, found.figure)
    print(f"drawn to {found.figure}")
