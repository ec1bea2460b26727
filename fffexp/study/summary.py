"""What a study found: its statistics, tables, the answer to a latency budget, and its files."""

import base64
import json
import math
import os
import shlex
import statistics as basic
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict

from fffexp.errors import UserError
from fffexp.study.statistics import Interval, mean_interval, overlap, paired_difference

LATENCY = "speed/latency_b256_ms"
COLUMNS = 120

# what decides the size of a layer; other hyperparameters are called by their initials
_SHORT = {"width": "w", "depth": "d", "leaf_width": "l", "num_experts": "e", "expert_width": "ew", "k": "k"}


class Sizes(TypedDict):
    """What a layer costs, as the layer counts it."""

    training_width: int
    training_size: int
    inference_width: int
    inference_size: int
    parameters: int
    flops_per_sample: int


# the functional form, because of the slash in the names
Final = TypedDict("Final", {"val/accuracy": list[float], "test/accuracy": list[float], "latency_ms": list[float]})


class Trial(TypedDict):
    """One trial of the search, and if it became a finalist its trainings on fresh seeds."""

    number: int
    state: str
    params: dict[str, Any]
    values: list[float] | None
    run_id: str | None
    seeds: list[int]
    mean: float | None
    ci95: list[float] | None
    sizes: Sizes | None
    final: Final | None
    test_mean: float | None
    test_ci95: list[float] | None
    ties: list[int]


class Summary(TypedDict):
    """What summary.json says."""

    study: str
    directions: list[str]
    metrics: list[str]
    trials: list[Trial]
    pareto: list[int]
    finalists: list[int]
    best: int | None
    wall_s: float


def pareto_front(values: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """Indices of the points that no other dominates; equal points all stay.

    Args:
        values: one point a row, one objective a column.
        directions: "maximize" or "minimize", one an objective.
    """
    signs = [{"maximize": 1.0, "minimize": -1.0}[direction] for direction in directions]
    points = [tuple(s * v for s, v in zip(signs, row, strict=True)) for row in values]

    def dominated(point: tuple[float, ...]) -> bool:
        return any(o != point and all(x >= y for x, y in zip(o, point, strict=True)) for o in points)

    return [i for i, point in enumerate(points) if not dominated(point)]


def fill_statistics(summary: Summary) -> None:
    """Compute means, intervals and ties from each trial's `final`, in place."""
    for trial in summary["trials"]:
        trial["mean"], trial["ci95"] = _interval(trial, "val/accuracy")
        trial["test_mean"], trial["test_ci95"] = _interval(trial, "test/accuracy")
        trial["ties"] = []
    finalists = finalist_trials(summary)
    for trial in finalists:
        trial["ties"] = sorted(
            other["number"]
            for other in finalists
            if other is not trial
            and (a := _pair(trial["ci95"])) is not None
            and (b := _pair(other["ci95"])) is not None
            and overlap(a, b)
        )


def finalist_trials(summary: Summary) -> list[Trial]:
    """The finalists, fastest first; those not measured yet come last."""
    by_number = {trial["number"]: trial for trial in summary["trials"]}
    trials = [by_number[number] for number in summary["finalists"]]
    return sorted(trials, key=lambda t: math.inf if (ms := latency_ms(t)) is None else ms)


def latency_ms(trial: Trial) -> float | None:
    """Median latency of a finalist over its fresh seeds, in milliseconds a batch of 256."""
    found = list(_by_seed(trial, "latency_ms").values())
    return basic.median(found) if found else None


def label(trial: Trial) -> str:
    """Size of a trial's layer in a few characters: `d4 l8`; without known sizes, `#12`."""
    known = [f"{short}{trial['params'][name]}" for name, short in _SHORT.items() if name in trial["params"]]
    return " ".join(known) or f"#{trial['number']}"


def table(summary: Summary) -> str:
    """The finalists, fastest first, for a terminal of 120 columns."""
    trials = finalist_trials(summary)
    if not trials:
        return f"study {summary['study']} has no finalists: no trial was completed"
    short = _short_names(name for trial in trials for name in trial["params"])
    head = [("", "no"), ("", "layer"), ("", "hyperparameters"), ("val acc", "%"), ("test acc", "%"), ("latency", "ms")]
    head += [("FLOPs a", "sample"), ("infer.", "size"), ("", "params"), ("tied", "with")]
    rows = [_row(trial, short, summary) for trial in trials]
    widths = [max(map(len, column)) for column in zip(*(list(zip(*head, strict=True)) + rows), strict=True)]
    # what is too long for the terminal is wrapped, and that can only be the hyperparameters
    widths[2] = max(15, min(widths[2], COLUMNS - sum(widths[:2] + widths[3:]) - 2 * (len(widths) - 1)))
    lines = [_line(cells, widths) for cells in zip(*head, strict=True)]
    lines.append("  ".join("-" * width for width in widths))
    for cells in rows:
        for i, part in enumerate(textwrap.wrap(cells[2], widths[2]) or [""]):
            lines.append(_line([*(cells[:2] if i == 0 else ["", ""]), part, *(cells[3:] if i == 0 else [])], widths))
    notes = [
        how_measured(summary),
        '"tied with": finalists whose validation interval overlaps. "*": on the Pareto front of the search.',
        "hyperparameters: " + ", ".join(f"{s} {name}" for name, s in short.items() if s not in (name, f"{name}=")),
    ]
    return "\n".join(lines + [""] + [line for note in notes for line in textwrap.wrap(note, COLUMNS)])


def how_measured(summary: Summary) -> str:
    """A sentence on intervals, seeds and the test set."""
    counts = {len(trial["seeds"]) for trial in finalist_trials(summary) if trial["final"]}
    if not counts:
        return "No finalist has been trained on fresh seeds yet."
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)}))) + " fresh seed" + "s" * (counts != {1})
    return (
        f"±: half width of the 95% t interval of the mean over {seeds}, unseen by the search (-: undefined for one). "
        "The test set was read once a training, after selection on validation."
    )


@dataclass(frozen=True)
class Answer:
    """The best finalist within a budget, and what it is compared with: the best FF, or another layer if it is FF."""

    best: Trial
    rival: Trial | None
    difference: float | None
    interval: Interval | None
    seeds: int

    @property
    def shown(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.interval is not None and not overlap(self.interval, (0.0, 0.0))

    def verdict(self) -> str:
        """The difference in words."""
        if self.rival is None:
            return ""
        a, b = self.best["params"]["layer"], self.rival["params"]["layer"]
        if self.difference is None:
            return f"{a} and {b} share no seed: no difference shown"
        line = f"{100 * self.difference:+.2f} points"
        if self.interval is not None:
            line += f" [{100 * self.interval[0]:+.2f}, {100 * self.interval[1]:+.2f}]"
        else:
            line += " [-]"
        if not self.shown:
            why = "the interval spans 0" if self.interval is not None else "one seed gives no interval"
            return f"{line}: no difference shown ({why})"
        return f"{line}: {a} is {'better' if self.difference > 0 else 'worse'} than {b}"


def answer(summary: Summary, max_latency_ms: float | None = None) -> Answer:
    """The best finalist within a latency budget, by mean validation accuracy over fresh seeds.

    Raises:
        UserError: no finalist was retrained, or none fits the budget.
    """
    name = summary["study"]
    measured = [(t, ms) for t in finalist_trials(summary) if t["mean"] is not None and (ms := latency_ms(t))]
    if not measured:
        raise UserError(f"study {name} has no retrained finalist yet: go on with `fffexp study resume {name}`")
    # from the fastest on, so that max takes the faster of two that are equal
    fitting = [trial for trial, ms in measured if max_latency_ms is None or ms <= max_latency_ms]
    if not fitting:
        raise UserError(
            f"nothing in study {name} fits {max_latency_ms:g} ms: its fastest finalist takes {_up(measured[0][1])} ms; "
            "raise --max_latency_ms to at least that"
        )
    best = max(fitting, key=_mean)
    is_ff = best["params"]["layer"] == "FF"
    rivals = [trial for trial in fitting if (trial["params"]["layer"] == "FF") != is_ff]
    if not rivals:
        return Answer(best, None, None, None, 0)
    rival = max(rivals, key=_mean)
    a, b = (_by_seed(trial, "test/accuracy") for trial in (best, rival))
    if not a.keys() & b.keys():
        return Answer(best, rival, None, None, 0)
    return Answer(best, rival, *paired_difference(a, b))


def show(summary: Summary, max_latency_ms: float | None = None) -> str:
    """Which layer to use within a latency budget, in a few lines.

    Raises:
        UserError: no finalist was retrained, or none fits the budget.
    """
    found = answer(summary, max_latency_ms)
    best, rival = found.best, found.rival
    layer = best["params"]["layer"]
    within = "with any latency" if max_latency_ms is None else f"within {max_latency_ms:g} ms"
    ties = ", ".join(map(str, best["ties"]))
    lines = [
        f"study {summary['study']}: best finalist {within}, by validation accuracy on fresh seeds",
        "",
        f"  {layer} (trial {best['number']})",
        *textwrap.wrap(
            f"config               {describe(best)}", COLUMNS, initial_indent="  ", subsequent_indent=" " * 23
        ),
        f"  test accuracy        {accuracy(best['test_mean'], best['test_ci95'])}",
        f"  validation accuracy  {accuracy(best['mean'], best['ci95'])}" + (f"  (tied with {ties})" if ties else ""),
        f"  latency              {_latency(best)} for a batch of 256",
    ]
    if best["run_id"]:
        lines.append(f"  MLflow run           {best['run_id']} (its config.yaml reruns it)")
    lines.append("")
    if rival is None:
        other = "No other layer" if layer == "FF" else "No FF"
        why = "was retrained" if max_latency_ms is None else f"fits {max_latency_ms:g} ms"
        lines.append(f"{other} among the finalists {why}.")
    else:
        which = "other layer" if layer == "FF" else "FF"
        rival_layer = rival["params"]["layer"]
        lines += [
            f"best {which} {within}: {rival_layer} (trial {rival['number']}), {describe(rival)}",
            f"  test accuracy        {accuracy(rival['test_mean'], rival['test_ci95'])}",
            f"  latency              {_latency(rival)}",
            "",
            f"test accuracy, {layer} minus {rival_layer}, paired over {found.seeds} seed{'s' * (found.seeds != 1)}:",
            f"  {found.verdict()}",
        ]
    lines += ["", "Brackets are 95% t intervals over fresh seeds."]
    return "\n".join(lines)


def describe(trial: Trial) -> str:
    """Hyperparameters in full: `depth=4 leaf_width=8 lr=0.0123`."""
    params = {name: value for name, value in trial["params"].items() if name != "layer"}
    return " ".join(f"{n}={v:.3g}" if isinstance(v, float) else f"{n}={v}" for n, v in params.items())


def accuracy(mean: float | None, interval: Sequence[float] | None) -> str:
    """`97.21% [96.80, 97.62]`, with `-` for what there is not."""
    if mean is None:
        return "-"
    bounds = f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]" if interval else "[-]"
    return f"{100 * mean:.2f}% {bounds}"


def write(summary: Summary, folder: Path) -> list[Path]:
    """Write summary.json, pareto.png, history.png and report.html; the paths written.

    A reader never sees half a file.
    """
    # matplotlib is slow to import, and a worker needs only the functions above
    from fffexp.study import figures

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
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"metric": _metric, "count": _count, "describe": describe, "accuracy": accuracy}
    environment.filters |= {"latency": _latency, "quote": shlex.quote}
    template = environment.from_string(resources.files("fffexp.study").joinpath("report.html.jinja").read_text("utf-8"))
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


def _interval(trial: Trial, metric: str) -> tuple[float | None, list[float] | None]:
    values = list(_by_seed(trial, metric).values())
    if not values:
        return None, None
    mean, interval = mean_interval(values)
    return mean, None if interval is None else list(interval)


def _by_seed(trial: Trial, metric: str) -> dict[int, float]:
    if trial["final"] is None:
        return {}
    values: Mapping[str, Any] = trial["final"]
    # a value that was not finite is null once it has been through JSON
    pairs = zip(trial["seeds"], values[metric], strict=True)
    return {seed: value for seed, value in pairs if value is not None and math.isfinite(value)}


def _pair(interval: Sequence[float] | None) -> Interval | None:
    return None if interval is None else (interval[0], interval[1])


def _mean(trial: Trial) -> float:
    assert trial["mean"] is not None
    return trial["mean"]


def _short_names(names: Iterable[str]) -> dict[str, str]:
    short: dict[str, str] = {}
    # known names first, so that no other takes their letter
    for name in sorted(dict.fromkeys(names), key=lambda name: name not in _SHORT):
        letters = _SHORT.get(name, name if len(name) < 4 else "".join(word[0] for word in name.split("_") if word))
        if name != "layer":
            short[name] = f"{name}=" if letters in short.values() else letters
    return short


def _row(trial: Trial, short: Mapping[str, str], summary: Summary) -> list[str]:
    sizes: Mapping[str, Any] = trial["sizes"] or {}
    ms = latency_ms(trial)
    return [
        f"{trial['number']}{'*' if trial['number'] in summary['pareto'] else ' '}",
        str(trial["params"]["layer"]),
        " ".join(short[name] + _brief(value) for name, value in trial["params"].items() if name != "layer"),
        _plus_minus(trial["mean"], trial["ci95"]),
        _plus_minus(trial["test_mean"], trial["test_ci95"]),
        "-" if ms is None else f"{ms:#.3g}",
        _count(sizes.get("flops_per_sample")),
        _count(sizes.get("inference_size")),
        _count(sizes.get("parameters")),
        _ties(trial, len(summary["finalists"]) - 1),
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = (1, 2, 9)
    padded = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=False)))
    return "  ".join(padded).rstrip()


def _ties(trial: Trial, others: int) -> str:
    if trial["ci95"] is None:
        return "-"
    if not trial["ties"]:
        return "none"
    if len(trial["ties"]) == others > 3:
        return "all"
    first = " ".join(map(str, trial["ties"][:2]))
    more = len(trial["ties"]) - 2
    return f"{first} +{more}" if more > 0 else first


def _plus_minus(mean: float | None, interval: Sequence[float] | None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.2f} ± " + (f"{50 * (interval[1] - interval[0]):.2f}" if interval else "-")


def _brief(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if 10 <= abs(value) < 1e4 else f"{value:.2g}"
    return str(value)


def _count(value: float | None) -> str:
    """`812`, `12.3k`, `1.23M`."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:g}"


def _latency(trial: Trial) -> str:
    ms = latency_ms(trial)
    return "-" if ms is None else f"{ms:#.3g} ms"


def _metric(value: float | None, name: str) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.2f}%" if name.endswith("accuracy") else f"{value:#.3g}"


def _up(value: float) -> str:
    """Three digits, rounded up: a budget of that much is enough."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / step) * step:.3g}"


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
