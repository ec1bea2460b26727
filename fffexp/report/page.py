"""The files of a summary: JSON, figures and a page."""

import base64
import json
import math
import os
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fffexp.errors import UserError
from fffexp.report import figures
from fffexp.report.text import accuracy, count_text, describe, how_measured, latency_text, metric_text
from fffexp.study.summary import Summary, answer, finalist_trials


def write(summary: Summary, folder: Path) -> list[Path]:
    """Write summary.json, pareto.png, history.png and report.html; the paths written.

    A reader never sees half a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = {"pareto.png": figures.png(figures.pareto(summary)), "history.png": figures.png(figures.history(summary))}
    contents = {
        "summary.json": (json.dumps(_strict(summary), indent=1, allow_nan=False) + "\n").encode(),
        **images,
        "report.html": report(summary, images["pareto.png"], images["history.png"]).encode(),
    }
    return [_replace(folder / name, content) for name, content in contents.items()]


def report(summary: Summary, pareto_png: bytes, history_png: bytes) -> str:
    """One self-contained HTML page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"metric": metric_text, "count": count_text, "describe": describe, "accuracy": accuracy}
    environment.filters |= {"latency": latency_text, "quote": shlex.quote}
    template = environment.from_string(resources.files("fffexp.report").joinpath("page.html.jinja").read_text("utf-8"))
    try:
        found, missing = answer(summary), ""
    except UserError as error:
        found, missing = None, str(error)
    layers = list(dict.fromkeys(trial["params"]["layer"] for trial in summary["trials"]))
    return template.render(
        summary=summary,
        layers=layers,
        finalists=finalist_trials(summary),
        found=found,
        missing=missing,
        how_measured=how_measured(summary),
        pareto_png=base64.b64encode(pareto_png).decode(),
        history_png=base64.b64encode(history_png).decode(),
    )


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, content: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
