"""The files of a study: JSON, figures and a page."""

import base64
import shlex
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from fffexp.errors import UserError
from fffexp.files import replace
from fffexp.report import figures, text
from fffexp.study.results import Results, answer


def write(results: Results, folder: Path) -> list[Path]:
    """Write summary.json, pareto.png, history.png and report.html; the paths written.

    A reader never sees half a file.
    """
    summary = folder / "summary.json"
    results.save(summary)
    images = {"pareto.png": figures.png(figures.pareto(results)), "history.png": figures.png(figures.history(results))}
    contents = {**images, "report.html": report(results, *images.values()).encode()}
    return [summary, *(replace(folder / name, content) for name, content in contents.items())]


def report(results: Results, pareto_png: bytes, history_png: bytes) -> str:
    """One self-contained HTML page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"describe": text.describe, "latency": text.latency, "title": text.title}
    environment.filters |= {"count": text.count, "value": text.value, "quote": shlex.quote}
    template = environment.from_string(resources.files("fffexp.report").joinpath("page.html.jinja").read_text("utf-8"))
    try:
        found, missing = answer(results), ""
    except UserError as error:
        found, missing = None, str(error)
    return template.render(
        results=results,
        layers=list(dict.fromkeys(trial.layer for trial in results.trials)),
        found=found,
        missing=missing,
        verdict="" if found is None else text.verdict(results, found),
        differences=text.to_best(results, results.finalist_trials()),
        how_measured=text.how_measured(results),
        pareto_png=base64.b64encode(pareto_png).decode(),
        history_png=base64.b64encode(history_png).decode(),
    )
