"""`fffexp reproduce text`: layers in a small language model, compared by the rule of studies/text_rates.yaml."""

import statistics
from collections.abc import Mapping
from typing import Any

from fffexp.paper.comparisons import Comparison, Share, compare, equal_in_time, percent, shares
from fffexp.paper.rows import bounds, section
from fffexp.paper.speeds import BATCH_SIZES
from fffexp.statistics import format_difference, mean_interval
from fffexp.study.results import Results, Trial
from fffexp.training.language_model import TIMED_CONTEXT

EPOCH_STEPS = 300  # of studies/paper/text_*.yaml
BLOCKS = 2  # of configs/model/gpt.yaml
NONE, DENSE = "none", "dense 512"  # a layer recovers a share of what the second gains over the first
TIMES = tuple(f"{part} b{size}" for part in ("layer", "model") for size in BATCH_SIZES)
Budgets = dict[int, dict[str, Trial]]


def name(trial: Trial) -> str:
    """Of the contender."""
    return str(trial.params["contender"])


def budgets(results: Results) -> Budgets:
    """By steps of training, the trials that have runs by the name of their contender, in the order of the study."""
    found: Budgets = {}
    for trial in sorted((t for t in results.trials if t.runs), key=lambda t: (t.params["epochs"], t.number)):
        found.setdefault(EPOCH_STEPS * trial.params["epochs"], {})[name(trial)] = trial
    return found


def speeds(results: Results) -> dict[str, Mapping[str, Any]]:
    """What was timed, by the name of the contender."""
    return {speed["contender"]: speed for speed in results.extra.get("speeds", [])}


def mean(results: Results, trial: Trial) -> float:
    """Bits per byte of the test text over the seeds."""
    return statistics.mean(trial.by_seed(results.test_monitor).values())


def recovered(results: Results, budget: Mapping[str, Trial], contender: str) -> Share:
    """Share of what DENSE gains over NONE in as many steps, paired by seed; None where it is not bounded."""
    if not {NONE, DENSE, contender} <= budget.keys():
        return None
    return shares(results, budget[contender], budget[DENSE], budget[NONE])[1]


def at_equal_time(results: Results, budget: Mapping[str, Trial]) -> list[Comparison]:
    """Each contender beside the widest dense layer of its time, alone, at each batch size; `kinds` is the latter."""
    timed = {
        key: trial for key, trial in budget.items() if f"layer_b{BATCH_SIZES[0]}_ms" in speeds(results).get(key, {})
    }
    dense = {key: trial for key, trial in timed.items() if trial.layer == budget[DENSE].layer} if DENSE in timed else {}
    pairs = []
    for key, trial in timed.items() if dense else ():
        for size in () if key in dense else BATCH_SIZES:
            ms = {of: speeds(results)[of][f"layer_b{size}_ms"] for of in (key, *dense)}
            ratios = {int(dense[of].params["width"]): ms[of] / ms[key] for of in dense}
            width = equal_in_time(ratios)
            control = next(t for t in dense.values() if t.params["width"] == width)
            pairs.append((trial, control, (f"b{size}",), ratios[width]))
    return compare(results, pairs)


def report(results: Results) -> str:
    """All contenders, their sizes and times, and each against dense layers of its time."""
    return "\n\n".join(filter(None, (part(results) for part in (_bits, _recovered, _sizes, _equal_time))))


def _contenders(results: Results) -> dict[str, Trial]:
    # each by a trial of its longest training
    longest = {key: trial for trials in budgets(results).values() for key, trial in trials.items()}
    return dict(sorted(longest.items(), key=lambda item: min(t.number for t in results.trials if name(t) == item[0])))


def _bits(results: Results) -> str:
    lines: list[dict[str, Any]] = []
    for contender in _contenders(results):
        line: dict[str, Any] = {"layer": contender}
        for steps, trials in budgets(results).items():
            values = [*trials[contender].by_seed(results.test_monitor).values()] if contender in trials else []
            middle, ends = mean_interval(values) if values else (None, None)
            line[str(steps)] = None if middle is None else f"{middle:.3f} {bounds(ends, 3) or ''}".strip()
        lines.append(line)
    text = "By steps of 4,096 bytes: mean and 95% interval over seeds; less is better."
    return section("bits per byte of the test text", lines, text=text)


def _recovered(results: Results) -> str:
    per_budget = budgets(results)
    lines = [
        {"layer": key, **{str(steps): percent(recovered(results, trials, key)) for steps, trials in per_budget.items()}}
        for key in _contenders(results)
        if key not in (NONE, DENSE)
    ]
    text = f"Share of what {DENSE} gains over {NONE} in as many steps; 95% interval by Fieller, paired by seed."
    return section("recovered, %", [line for line in lines if any([*line.values()][1:])], text=text)


def _sizes(results: Results) -> str:
    timed, lines = speeds(results), []
    for key, trial in _contenders(results).items():
        per_layer = {of: (trial.sizes or {}).get(of, 0) / BLOCKS for of in ("inference_size", "flops_per_sample")}
        lines.append(
            {"layer": key, "neurons": round(per_layer["inference_size"]), "kFLOPs": per_layer["flops_per_sample"] / 1e3}
            | {time: timed.get(key, {}).get(f"{time.replace(' ', '_')}_ms") for time in TIMES}
        )
    text = (
        "neurons, kFLOPs: of one layer for a token. layer, model: median milliseconds for a batch of 1 and of 256 "
        "tokens, one thread, with trained weights on the validation text; the model decodes one token after up to "
        f"{TIMED_CONTEXT} others that a key-value cache holds."
    )
    return section("size and time", lines, {"kFLOPs": ".1f", **dict.fromkeys(TIMES, ".3f")}, text)


def _equal_time(results: Results) -> str:
    lines = [
        {"steps": steps, "layer": name(c.trial), "batch": c.kinds[0][1:], "dense of equal time": name(c.control)}
        | {"its time": f"{c.time_ratio:.2f}", "difference": format_difference(c.test, digits=3)}
        for steps, trials in budgets(results).items()
        for c in at_equal_time(results, trials)
    ]
    text = (
        "difference: bits per byte of the layer minus those of the dense layer, so less is better; 95% interval, "
        "paired by seed, p adjusted by Benjamini and Hochberg for all rows of a budget. its time: of the widest dense "
        "layer here that takes at most 1.15 of the layer's time (else of the narrowest), over it."
    )
    return section("against the dense layer of equal time", lines, text=text)
