"""One record a measured point, the table of them, and the JSON file that a command completes."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fffexp.bench.contenders import Contender, public_layers
from fffexp.bench.setting import Setting
from fffexp.environment import environment
from fffexp.errors import UserError, refuse
from fffexp.files import save_json
from fffexp.report.tables import table
from fffexp.timing import median_ratio

Record = dict[str, Any]  # as in JSON; what does not apply is None

# Records that were measured elsewhere are not comparable.
MACHINE = ("cpu", "cores", "device", "torch", "compiler", "instruction_set", "huge_pages")
SETTING = ("in_features", "out_features", "dtype", "device")
# Times are in seconds. `limit_s` is the larger of operations and distinct bytes at the machine's rates; `visited_share`
# is of the leaves or experts, over all batches that were timed; `fastest_ff` is a form faster than `linear`; the parts
# of a training step are apart; `operations_over_ff` are counted
MEASURED = (
    "median_s", "p10_s", "p90_s", "flops", "bytes", "limit_s", "max_abs_error", "visited_share",
    "speedup_over_ff", "speedup_over_moe", "speedup_over_peer", "fastest_ff", "fastest_ff_s",
    "forward_s", "backward_s", "optimizer_s", "operations_over_ff", "peak_bytes",
)  # fmt: skip


def describe(task: str, contender: Contender, setting: Setting, batch_size: int, threads: int) -> Record:
    """What a record says of its contender."""
    layer = contender.layer
    return {
        **{"task": task, "layer": contender.name, "backend": contender.backend},
        **{key: getattr(setting, key) for key in SETTING},
        **{key: getattr(layer, key, None) for key in ("training_width", "inference_width", "depth", "top_k")},
        "leaf_width": getattr(layer, "leaf_width", getattr(layer, "expert_width", None)),
        "num_experts": layer.num_experts if hasattr(layer, "top_k") else None,
        **{"batch_size": batch_size, "threads": threads},
    }


def measured(c: Contender, contenders: Sequence[Contender], seconds: Mapping[str, list[float]], **more: Any) -> Record:
    """What was measured of a contender, by the seconds of its rounds; `more` is what else is known.

    Speedups are medians of the paired ratios to the baselines that come before it, and of a tree to its peer.
    """
    own = seconds[c.name]
    tenths = statistics.quantiles(own, n=10, method="inclusive") if len(own) > 1 else own * 9
    found = dict.fromkeys(MEASURED) | {"median_s": statistics.median(own), "p10_s": tenths[0], "p90_s": tenths[-1]}
    before = {"ff": (), "moe": ("ff",)}.get(c.baseline, ("ff", "moe"))
    for other in reversed(contenders):
        if c.module is other.layer if other.is_peer else other.baseline in before:
            found[f"speedup_over_{other.baseline}"] = median_ratio(seconds[other.name], own)
    return found | more


class ResultsFile:
    """Records in a JSON file, or in memory where none is given; those that it has already are not measured again.

    `environment` is where the records to come are measured, `limits` what that can do by number of threads. A UserError
    if the file holds something else, or was measured in another setting or on another machine.
    """

    def __init__(self, task: str, setting: Setting) -> None:
        self.path, self.environment = setting.json, environment(setting.threads, setting.device)
        self._head: dict[str, Any] = {"environment": self.environment}
        self.records: list[Record] = []
        if self.path is not None and self.path.exists():
            self._load(self.path, {"task": task} | {key: getattr(setting, key) for key in SETTING})
        self.limits: dict[str, dict[str, float]] = self._head.get("limits_by_threads", {})

    def _load(self, path: Path, setting: Mapping[str, Any]) -> None:
        try:
            self._head = json.loads(path.read_text())
            self.records, there = self._head.pop("records"), self._head["environment"]
            differing = [key for key in setting if {record[key] for record in self.records} - {setting[key]}]
            differing += [key for key in MACHINE if there[key] != self.environment[key]]
        except OSError as error:
            raise UserError(f"--json {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--json {path}: it holds no records of this benchmark: name another file") from error
        refuse((differing, f"--json {path}: measured with another {' and '.join(differing)}: name another file"))
        if self.environment not in self._head.setdefault("environments", [there]):
            self._head["environments"].append(self.environment)
        print(f"{len(self.records)} records of {path} ({there['date']}, commit {there['commit']}) are kept")

    def has(self, timed: Mapping[str, Any]) -> bool:
        """Whether there is a record of what these fields describe; UserError if it is of another backend."""
        alike = [r for r in self.records if all(r[key] == timed[key] for key in timed if key != "backend")]
        for r in alike[:1]:
            backends = f"{r['layer']} was measured with the backend {r['backend']}, now it is {timed['backend']}"
            refuse((r["backend"] != timed["backend"], f"--json {self.path}: {backends}: name another file"))
        return bool(alike)

    def add(self, record: Record) -> None:
        """Keep and write a record."""
        self.records.append(record)
        if self.limits:  # `limits` are those of the first number of threads
            self._head |= {"limits": next(iter(self.limits.values())), "limits_by_threads": self.limits}
        if self.path:
            save_json(self.path, self._head | {"records": self.records})


SIZES = {"model": "model", "layer": "layer", "backend": "backend", "width": "training_width"}
SIZES |= {"depth": "depth", "batch": "batch_size", "threads": "threads"}
US, RATIO, SHARE = ",.1f", ".4g", ".0%"
# By task: title, with the name of the dense layer, format and value of a record; times in microseconds
COLUMNS: dict[str, tuple[tuple[str, str, Any], ...]] = {
    "inference": (
        ("median, us", US, lambda r: 1e6 * r["median_s"]),
        ("limit, us", US, lambda r: 1e6 * r["limit_s"]),
        ("of limit", SHARE, lambda r: r["limit_s"] / r["median_s"]),
        ("x {dense}", RATIO, lambda r: r["speedup_over_ff"]),
        ("x MoE", RATIO, lambda r: r["speedup_over_moe"]),
        ("x peer", RATIO, lambda r: r["speedup_over_peer"]),
        ("visited", SHARE, lambda r: r["visited_share"]),
        ("error", ".0e", lambda r: r["max_abs_error"]),
        ("other form, us", US, lambda r: r["fastest_ff_s"] and 1e6 * r["fastest_ff_s"]),
    ),
    "training": (
        ("median, us", US, lambda r: 1e6 * r["median_s"]),
        ("forward, us", US, lambda r: 1e6 * r["forward_s"]),
        ("backward, us", US, lambda r: 1e6 * r["backward_s"]),
        ("optimizer, us", US, lambda r: 1e6 * r["optimizer_s"]),
        ("step, {dense} = 1", RATIO, lambda r: r["speedup_over_ff"] and 1 / r["speedup_over_ff"]),
        ("counted", RATIO, lambda r: r["operations_over_ff"]),
    ),
    "model": (
        ("layer, us", US, lambda r: 1e6 * r["layer_s"]),
        ("model, us", US, lambda r: 1e6 * r["model_s"]),
        ("layer's share", SHARE, lambda r: r["layer_share"]),
        ("layer x {dense}", RATIO, lambda r: r["layer_speedup"]),
        ("model x {dense}", RATIO, lambda r: r["model_speedup"]),
    ),
}


def report(records: Sequence[Record], task: str) -> str:
    """The records as a table, with ratios to the dense layer and other baselines."""
    dense = next(iter(public_layers()))
    columns = [(title.format(dense=dense), spec, value) for title, spec, value in COLUMNS[task]]
    rows = [
        {title: r.get(key) for title, key in SIZES.items()} | {title: value(r) for title, _, value in columns}
        for r in records
    ]
    return table(rows, {title: spec for title, spec, _ in columns})
