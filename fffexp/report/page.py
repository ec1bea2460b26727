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
    results.save(folder / "summary.json")
    contents = {
        "pareto.png": figures.png(figures.pareto(results)),
        "history.png": figures.png(figures.history(results)),
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (text.latency, text.settings, text.title, text.value, shlex.quote)}
    # 812, 12.3k, 1.23M
    environment.filters["count"] = lambda n: "-" if n is None else EngFormatter(sep="")(float(f"{n:.3g}"))
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
        **{name.replace(".", "_"): base64.b64encode(image).decode() for name, image in contents.items()},
    )
    contents["report.html"] = page.encode()
    return [folder / "summary.json", *(replace(folder / name, content) for name, content in contents.items())]
