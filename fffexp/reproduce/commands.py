"""`fffexp reproduce figure3`: arguments to measurements to figures."""

from pathlib import Path

from fffexp.bench.arguments import Parser, natural, positive
from fffexp.errors import UserError


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
    sub.add_argument("--json", type=Path, metavar="FILE", help="measurements; a file that is there is completed")
    sub.add_argument("--figure", type=Path, metavar="FILE", help="PNG; beside the JSON unless named")
    found = parser.parse_args(args)
    from fffexp.reproduce import figure3

    figure = found.figure or (found.json.with_suffix(".png") if found.json else Path("outputs/figure3.png"))
    if found.json and found.json.suffix != ".json":
        raise UserError(f"--json {found.json}: name a file that ends in .json")
    measured = figure3.measure(
        found.depths,
        found.batch_sizes,
        (found.in_features, found.out_features, found.leaf_width),
        found.threads,
        figure3.FF_DEPTH if found.ff_depth is None else found.ff_depth,
        found.json,
    )
    print(figure3.report(measured))
    figure3.draw(measured, figure)
    print(f"drawn to {figure}" + (f", measurements in {found.json}" if found.json else ""))
    return 0
