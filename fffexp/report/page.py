"""The files of a study: JSON, figures and a page."""

import base64
import shlex
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib.ticker import EngFormatter

from fffexp.errors import UserError
from fffexp.files import replace
from fffexp.report import figures, text
from fffexp.study.results import Results, answer


def write(results: Results, folder: Path) -> list[Path]:
    """Write summary.json, pareto.png, history.png and the self-contained report.html; the paths written.

    A reader never sees half a file.
    """
    summary = folder / "summary.json"
    results.save(summary)
    images = {"pareto.png": figures.png(figures.pareto(results)), "history.png": figures.png(figures.history(results))}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters = text.latency, text.settings, text.title, text.value, count, shlex.quote
    environment.filters |= {filter.__name__: filter for filter in filters}
    template = environment.from_string(resources.files("fffexp.report").joinpath("page.html.jinja").read_text("utf-8"))
    try:
        found, missing = answer(results), ""
    except UserError as error:
        found, missing = None, str(error)
    page = template.render(
        results=results,
        layers=list(dict.fromkeys(trial.layer for trial in results.trials)),
        found=found,
        missing=missing,
        verdict="" if found is None else text.verdict(results, found),
        differences=text.to_best(results, results.finalist_trials()),
        how_measured=text.how_measured(results),
        **{name.replace(".", "_"): base64.b64encode(image).decode() for name, image in images.items()},
    )
    contents = {**images, "report.html": page.encode()}
    return [summary, *(replace(folder / name, content) for name, content in contents.items())]


def count(number: float | None) -> str:
    """`812`, `12.3k`, `1.23M`."""
    return "-" if number is None else str(EngFormatter(sep="")(float(f"{number:.3g}")))
