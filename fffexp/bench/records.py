"""One record a measured point, the table of them, and the JSON file that a command completes."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fffexp.bench.contenders import Contender, Point
from fffexp.bench.machine import Limits
from fffexp.errors import UserError
from fffexp.files import save_json
from fffexp.timing import median_ratio

# Records that were measured elsewhere are not comparable.
MACHINE = ("cpu", "cores", "device", "torch", "compiler", "instruction_set", "huge_pages")
SETTING = ("task", "in_features", "out_features", "dtype", "device")
BASELINES = ("ff", "moe")


@dataclass(kw_only=True)
class Timed:
    """What was timed; what does not apply is None."""

    task: str
    layer: str
    backend: str
    in_features: int
    out_features: int
    training_width: int
    inference_width: int
    depth: int | None
    leaf_width: int | None
    num_experts: int | None
    top_k: int | None
    batch_size: int
    threads: int
    dtype: str
    device: str


@dataclass(kw_only=True)
class Record(Timed):
    """Times are medians in seconds; `limit_s` is the larger of operations and distinct bytes at the machine's rates."""

    median_s: float
    p10_s: float
    p90_s: float
    flops: int
    bytes: int
    limit_s: float
    max_abs_error: float
    visited_share: float  # of the leaves or experts, over all batches that were timed
    speedup_over_ff: float | None = None
    speedup_over_moe: float | None = None
    speedup_over_peer: float | None = None
    fastest_ff: str | None = None  # where it is not `linear`
    fastest_ff_s: float | None = None
    forward_s: float | None = None  # the parts of a training step
    backward_s: float | None = None
    optimizer_s: float | None = None
    operations_over_ff: float | None = None  # counted
    peak_bytes: int | None = None


def describe(task: str, contender: Contender, point: Point, batch_size: int, threads: int) -> dict[str, Any]:
    """What a record says of its contender, the fields of Timed."""
    layer = contender.layer
    top_k = getattr(layer, "top_k", None)
    return {
        "task": task,
        "layer": contender.name,
        "backend": contender.backend,
        "in_features": point.in_features,
        "out_features": point.out_features,
        "training_width": layer.training_width,
        "inference_width": layer.inference_width,
        "depth": getattr(layer, "depth", None),
        "leaf_width": getattr(layer, "leaf_width", getattr(layer, "expert_width", None)),
        "num_experts": None if top_k is None else layer.num_experts,
        "top_k": top_k,
        "batch_size": batch_size,
        "threads": threads,
        "dtype": str(point.dtype).removeprefix("torch."),
        "device": point.device,
    }


def make_record(
    timed: Mapping[str, Any], contender: Contender, seconds: Mapping[str, list[float]], limits: Limits, **more: Any
) -> Record:
    """A record of a contender from the seconds of its rounds; `more` holds flops, bytes and what else is known."""
    own = seconds[contender.name]
    tenths = statistics.quantiles(own, n=10, method="inclusive") if len(own) > 1 else own * 9
    limit = max(more["flops"] / limits.gemm_flops_per_s, more["bytes"] / limits.read_bytes_per_s)
    return Record(**timed, median_s=statistics.median(own), p10_s=tenths[0], p90_s=tenths[-1], limit_s=limit, **more)


def speedups(contender: Contender, others: Sequence[Contender], seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians of the paired ratios to the baselines that come before the contender, and of a tree to its peer."""
    found: dict[str, float] = {}
    for other in others:
        place, own = (BASELINES.index(c.baseline) if c.baseline in BASELINES else 2 for c in (other, contender))
        peer = other.is_peer and contender.module is other.layer
        if peer or place < own:
            ratio = median_ratio(seconds[other.name], seconds[contender.name])
            found.setdefault(f"speedup_over_{other.baseline}", ratio)
    return found


class ResultsFile:
    """Records in a JSON file; those that it holds already are not measured again.

    Args:
        path: None keeps them in memory only.
        setting: what all of its records have in common, the fields SETTING of Timed.
        environment: where the records to come are measured.

    Raises:
        UserError: it holds something else, or was measured in another setting or on another machine.
    """

    def __init__(self, path: Path | None, setting: Mapping[str, Any], environment: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"environment": environment, "records": []}
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            records, measured = found["records"], found["environment"]
            differing = [key for key in SETTING if {record[key] for record in records} - {setting[key]}]
            differing += [key for key in MACHINE if measured[key] != environment[key]]
        except OSError as error:
            raise UserError(f"--json {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--json {path}: it holds no records of this benchmark: name another file") from error
        if differing:
            raise UserError(f"--json {path}: measured with another {' and '.join(differing)}: name another file")
        self.content = found
        added = found.setdefault("environments", [measured])
        if environment not in added:
            added.append(environment)
        print(f"{len(records)} records of {path} ({measured['date']}, commit {measured['commit']}) are kept")

    @property
    def records(self) -> list[dict[str, Any]]:
        """As they are in the file."""
        found: list[dict[str, Any]] = self.content["records"]
        return found

    def has(self, timed: Mapping[str, Any]) -> bool:
        """Whether there is a record of what these fields describe.

        Raises:
            UserError: there is, of another backend.
        """
        for record in self.records:
            if all(record[name] == value for name, value in timed.items() if name != "backend"):
                if record["backend"] != timed["backend"]:
                    raise UserError(
                        f"--json {self.path}: {record['layer']} was measured with the backend {record['backend']}, "
                        f"now it is {timed['backend']}: name another file"
                    )
                return True
        return False

    def limits(self, threads: int) -> Limits | None:
        """What the machine could do with so many threads, if that was measured."""
        found = self.content.get("limits_by_threads", {}).get(str(threads))
        return Limits(**found) if found else None

    def set_limits(self, threads: int, limits: Limits) -> None:
        """Keep them; `limits` are those of the first number of threads."""
        self.content.setdefault("limits", asdict(limits))
        self.content.setdefault("limits_by_threads", {})[str(threads)] = asdict(limits)

    def add(self, record: Timed) -> None:
        """Keep and write a record."""
        self.records.append(asdict(record))
        if self.path:
            order = ("environment", "environments", "limits", "limits_by_threads")
            save_json(self.path, {key: self.content[key] for key in order if key in self.content} | self.content)


TIMES = ("median", "limit", "forward", "backward", "optimizer", "other form", "layer", "model")
FORMATS = {f"{name}, us": ",.1f" for name in TIMES} | {
    **dict.fromkeys(("x FF", "x MoE", "x peer", "step, FF = 1", "counted", "layer x FF", "model x FF"), ".4g"),
    **dict.fromkeys(("of limit", "visited", "layer's share"), ".0%"),
    "error": ".0e",
}


def row(r: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a row of the table; times in microseconds."""
    start = {
        "layer": r["layer"],
        "backend": r["backend"],
        "width": r["training_width"],
        "depth": r["depth"],
        "batch": r["batch_size"],
        "threads": r["threads"],
        "median, us": 1e6 * r["median_s"],
    }
    if r["task"] == "training":
        parts = {f"{part}, us": 1e6 * r[f"{part}_s"] for part in ("forward", "backward", "optimizer")}
        step = r["speedup_over_ff"] and 1 / r["speedup_over_ff"]
        return start | parts | {"step, FF = 1": step, "counted": r["operations_over_ff"]}
    return start | {
        "limit, us": 1e6 * r["limit_s"],
        "of limit": r["limit_s"] / r["median_s"],
        "x FF": r["speedup_over_ff"],
        "x MoE": r["speedup_over_moe"],
        "x peer": r["speedup_over_peer"],
        "visited": r["visited_share"],
        "error": r["max_abs_error"],
        "other form, us": r["fastest_ff_s"] and 1e6 * r["fastest_ff_s"],
    }
