"""`fffexp reproduce minilm`: a pretrained encoder's feedforward layers made into trees, beside what else makes it fast.

The file of its results is completed run by run; the report and the picture are made of it alone.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fffexp import paths
from fffexp.adapt.replace import replace_feedforward
from fffexp.environment import environment
from fffexp.errors import UserError, refuse
from fffexp.files import save_json
from fffexp.layers import feedforward_layers
from fffexp.paper.encoder import (
    SETTING,
    Encoder,
    Record,
    found_among_ten,
    layer_factory,
    make,
    quality,
    timed,
)
from fffexp.paper.rows import note
from fffexp.report.tables import table
from fffexp.statistics import mean_interval

CONTENDERS: Mapping[str, Mapping[str, Any]] = SETTING["contenders"]
Point = tuple[int, int]  # batch size, threads


class Results:
    """Runs by contender and minutes, and times by contender, batch size and threads, in a JSON file.

    UserError if the file holds something else, or was measured with other settings.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.runs, self.times = path, list[Record](), list[Record]()
        self.environments: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            setting = content["minilm"]
            self.runs, self.times, self.environments = (content[key] for key in ("runs", "times", "environments"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--json {path}: it holds no results of this command: give another file") from error
        refuse((setting != _setting(), f"--json {path} holds another measurement: give another file, or remove it"))

    def run(self, name: str, minutes: float | None) -> Record | None:
        """The run of a contender as it is described now, if there is one."""
        wanted = {"contender": name, "spec": CONTENDERS[name], "minutes": minutes}
        return next((run for run in self.runs if all(run[key] == value for key, value in wanted.items())), None)

    def last(self, name: str) -> Record | None:
        """The run of a contender with the most minutes."""
        runs = [run for minutes in budgets_of(name, SETTING["minutes"]) if (run := self.run(name, minutes))]
        return max(runs, key=lambda run: run["minutes"] or 0, default=None)

    def time(self, name: str, batch_size: int, threads: int) -> Record | None:
        """How long a contender takes, if that was measured."""
        wanted = {"contender": name, "spec": CONTENDERS[name], "batch_size": batch_size, "threads": threads}
        return next((each for each in self.times if all(each[key] == value for key, value in wanted.items())), None)

    def add(self, run: Record | None = None, times: Sequence[Record] = ()) -> None:
        """Keep a run or times of a contender, in place of older ones, and write the file."""
        here = environment(SETTING["timing"]["threads"], "cpu")
        if here not in self.environments:
            self.environments.append(here)
        for kept, new in ((self.runs, [run] if run else []), (self.times, times)):
            own = {(each["contender"], each.get("minutes")) for each in new}
            kept[:] = [each for each in kept if (each["contender"], each.get("minutes")) not in own]
            number = self.environments.index(here)
            kept += [each | {"spec": CONTENDERS[each["contender"]], "environment": number} for each in new]
        if self.path:
            lists = {"environments": self.environments, "runs": self.runs, "times": self.times}
            save_json(self.path, {"minilm": _setting()} | lists)


def _setting() -> Record:
    # what all runs have in common
    return {key: SETTING[key] for key in ("pairs", "max_tokens", "distillation")}


def points() -> list[Point]:
    """What a contender is timed at."""
    return [*product(SETTING["timing"]["sentences"], SETTING["timing"]["threads"])]


def shown() -> list[Point]:
    """Of these, what is compared and drawn: on the fewest threads."""
    return [point for point in points() if point[1] == min(SETTING["timing"]["threads"])]


def budgets_of(name: str, minutes: Sequence[float]) -> list[float | None]:
    """The budgets that a contender has runs of: None alone for what is not converted."""
    return [*sorted(minutes)] if "layer" in CONTENDERS[name] else [None]


def missing(
    results: Results, names: Sequence[str], minutes: Sequence[float], times: bool
) -> tuple[list[tuple[str, float | None]], list[str]]:
    """Runs that the file lacks, the shorter conversions of all contenders first, and contenders to be timed."""
    wanted = dict.fromkeys(
        (name, each) for budget in sorted(minutes) for name in names for each in budgets_of(name, [budget])
    )
    untimed = [name for name in names if not all(results.time(name, *point) for point in points())]
    return [each for each in wanted if not results.run(*each)], untimed if times else []


def complete(
    results: Results, encoder: Encoder, runs: Sequence[tuple[str, float | None]], untimed: Sequence[str]
) -> None:
    """Make, test and time what is missing."""
    torch.set_num_threads(1)
    for name, minutes in runs:
        _converted(results, encoder, name, minutes)
    for name in untimed:
        results.add(times=[*timed(encoder, name, _model(encoder, name))])
        print(f"{name:28} timed", flush=True)


def _converted(results: Results, encoder: Encoder, name: str, minutes: float | None) -> None:
    model, made = make(encoder, CONTENDERS[name], minutes)
    if minutes is not None:
        (path := _weights(name, minutes)).parent.mkdir(parents=True, exist_ok=True)
        torch.save({each: layer.state_dict() for each, layer in feedforward_layers(model).items()}, path)
    run = {"contender": name, "minutes": minutes} | quality(encoder, model) | made
    results.add(run)
    budget = f"{minutes:g} minutes" if minutes is not None else ""
    print(f"{name:28}{budget:12} cosine {run['cosine']:.4f}  recall@10 {run['recall@10']:.2%}", flush=True)


def _weights(name: str, minutes: float) -> Path:
    return paths.outputs("minilm", f"{name.replace(' ', '_')}-{minutes:g}.pt")


def _model(encoder: Encoder, name: str) -> torch.nn.Module:
    # to be timed: of its longest conversion whose weights are at hand
    for minutes in reversed(budgets_of(name, SETTING["minutes"])):
        if minutes is None:
            return make(encoder, CONTENDERS[name], None)[0]
        if (path := _weights(name, minutes)).exists():
            model = copy.deepcopy(encoder.model)
            replace_feedforward(model, layer_factory(CONTENDERS[name]))
            for each, weights in torch.load(path, weights_only=True).items():
                feedforward_layers(model)[each].load_state_dict(weights)
            return model.eval().requires_grad_(False)
    return make(encoder, CONTENDERS[name], min(SETTING["minutes"]))[0]


def front(results: Results, batch_size: int, threads: int) -> list[str]:
    """Contenders that find more than all that are as fast, the fastest first."""
    timed = [(name, results.time(name, batch_size, threads), results.last(name)) for name in CONTENDERS]
    known = [(time["speedup"], run["recall@10"], name) for name, time, run in timed if time and run]
    ordered = sorted(known, reverse=True)
    return [name for i, (_, recall, name) in enumerate(ordered) if all(recall > other for _, other, _ in ordered[:i])]


def _fronts(results: Results) -> str:
    lines = [
        f"batch {batch}, {threads} thread{'s' * (threads > 1)}: {', '.join(names)}"
        for batch, threads in points()
        if (names := front(results, batch, threads))
    ]
    return "\n".join(["the best recall@10 at their speed, the fastest first", *lines] if lines else [])


def report(results: Results) -> str:
    """Who wins at equal time, quality after each budget, and the times."""
    return "\n\n".join(
        part
        for part in (_fronts(results), _compared(results), _quality(results), _times(results), _about(results))
        if part
    )


def _compared(results: Results) -> str:
    # each tree beside the dense layer of its inference size, after equal minutes
    rows = []
    for name, spec in CONTENDERS.items():
        run = results.last(name) if "beside" in spec else None
        other = results.run(spec["beside"], run["minutes"]) if run else None
        if not run or not other:
            continue
        pairs = zip(found_among_ten(run), found_among_ten(other), strict=True)
        mean, interval = mean_interval([100.0 * (a - b) for a, b in pairs])
        low, high = interval or (mean, mean)
        rows.append(
            {"contender": name, "beside": spec["beside"], "minutes": run["minutes"]}
            | {"recall@10, points": f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"}
            | {"": "ahead" if low > 0 else "behind" if high < 0 else "not significant"}
            | {f"x as fast, b{b}": _ratio(results, name, spec["beside"], b, t) for b, t in shown()}
        )
    return table(rows, dict.fromkeys((f"x as fast, b{b}" for b, _ in shown()), ".2f"))


def _ratio(results: Results, name: str, other: str, *point: int) -> float | None:
    mine, theirs = (results.time(each, *point) for each in (name, other))
    return mine["speedup"] / theirs["speedup"] if mine and theirs else None


def _quality(results: Results) -> str:
    rows = []
    for name in CONTENDERS:
        last = results.last(name)
        if not last:
            continue
        row: Record = {"contender": name, "neurons": last.get("layer", {}).get("inference_size")}
        for key, title in (("cosine", "cosine"), ("recall@1", "@1"), ("recall@10", "@10")):
            for minutes in sorted(SETTING["minutes"]):
                run = results.run(name, minutes if "layer" in CONTENDERS[name] else None)
                row[f"{title} {minutes:g}'"] = run and (100 if "@" in key else 1) * run[key]
        row |= {"converted, min": last["processor_s"] / 60, "steps": last.get("steps")}
        rows.append(row)
    formats = {key: ".4f" if "cosine" in key else ".1f" for row in rows for key in row if "'" in key}
    return table(rows, formats | {"converted, min": ".1f"})


def _times(results: Results) -> str:
    rows = []
    for name in CONTENDERS:
        times = {point: results.time(name, *point) for point in points()}
        if any(times.values()):
            ms = {f"b{b} t{t}, ms": each and each["ms"] for (b, t), each in times.items()}
            ratios = {f"b{b} t{t}, x": each and each["speedup"] for (b, t), each in times.items()}
            rows.append({"contender": name, **ms, **ratios})
    return table(rows, {key: ".3f" if "ms" in key else ".2f" for row in rows for key in row if "," in key})


def _about(results: Results) -> str:
    loads = [each["load_before"] for each in results.times if each["load_before"] is not None]
    quiet = f" Load of the machine before a timing: at most {max(loads):.1f}." if loads else ""
    return note(
        f"all-MiniLM-L6-v2, {SETTING['pairs']} definitions of a dictionary as queries, their headwords as documents; "
        "no entry of the test is in the text of the conversion. neurons: of an MLP for one token, those that route "
        "included (the original has 1536). cosine: mean over queries and documents to the original's embeddings. @1, "
        "@10: recall in percent. 2', 10', 30': minutes of conversion, of processor time on one thread, everything "
        "included; steps: of the longest. One seed. points: difference in recall@10, 95% interval over queries. "
        "ms: milliseconds per sentence of the whole model without the tokenizer, by batch size (b) and threads (t), "
        f"and x: how many times as fast as the original in the same rounds.{quiet}"
    )
