"""A summary in words and tables."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fffexp.study.summary import Summary, Trial, answer, finalist_trials, latency_ms

COLUMNS = 120

# what decides the size of a layer; other hyperparameters are called by their initials
_SHORT = {
    "width": "w",
    "trees": "t",
    "depth": "d",
    "leaf_width": "l",
    "master_width": "m",
    "num_experts": "e",
    "expert_width": "ew",
    "top_k": "k",
}


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
        + f" Latencies come from {summary['machines']} machines, and compare only within one."
        * (summary["machines"] > 1)
    )


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
        f"  latency              {latency_text(best)} for a batch of 256",
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
            f"  latency              {latency_text(rival)}",
            "",
            f"test accuracy, {layer} minus {rival_layer}, paired over {found.seeds} seed{'s' * (found.seeds != 1)}:",
            f"  {found.verdict()}",
        ]
    lines += ["", "Brackets are 95% t intervals over fresh seeds."]
    return "\n".join(lines)


def describe(trial: Trial) -> str:
    """Hyperparameters in full: `depth=4 leaf_width=8 lr=0.0123`."""
    return settings({name: value for name, value in trial["params"].items() if name != "layer"})


def settings(values: Mapping[str, Any]) -> str:
    """`depth=4 lr=0.0123`."""
    return " ".join(f"{n}={v:.3g}" if isinstance(v, float) else f"{n}={v}" for n, v in values.items())


def accuracy(mean: float | None, interval: Sequence[float] | None) -> str:
    """`97.21% [96.80, 97.62]`, with `-` for what there is not."""
    if mean is None:
        return "-"
    bounds = f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]" if interval else "[-]"
    return f"{100 * mean:.2f}% {bounds}"


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
        count_text(sizes.get("flops_per_sample")),
        count_text(sizes.get("inference_size")),
        count_text(sizes.get("parameters")),
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


def count_text(value: float | None) -> str:
    """`812`, `12.3k`, `1.23M`."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:g}"


def latency_text(trial: Trial) -> str:
    """Median latency of a finalist with its unit."""
    ms = latency_ms(trial)
    return "-" if ms is None else f"{ms:#.3g} ms"


def metric_text(value: float | None, name: str) -> str:
    """A metric by what its name says it is: accuracies in percent."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.2f}%" if name.endswith("accuracy") else f"{value:#.3g}"
