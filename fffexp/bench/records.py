"""One record a measured point, as it is printed and written."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fffexp.bench.machine import Limits


@dataclass
class Record:
    """Times are medians in seconds; `limit_s` is the larger of operations and distinct bytes at the machine's rates."""

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
    median_s: float
    p10_s: float
    p90_s: float
    flops: int
    bytes: int
    limit_s: float
    max_abs_error: float
    visited_share: float  # of the blocks, over all batches that were timed
    speedup_over_ff: float | None = None
    speedup_over_moe: float | None = None
    speedup_over_peer: float | None = None
    fastest_ff: str | None = None  # where it is not `linear`
    fastest_ff_s: float | None = None
    forward_s: float | None = None  # the parts of a training step
    backward_s: float | None = None
    optimizer_s: float | None = None
    operations_over_ff: float | None = None  # of a soft training step, counted
    peak_bytes: int | None = None


def write(path: Path, environment: dict[str, Any], limits: dict[str, Limits], records: Sequence[Record]) -> None:
    """JSON; limits are those of the first number of threads, and all of them under `limits_by_threads`."""
    content = {
        "environment": environment,
        "limits": asdict(next(iter(limits.values()))),
        "limits_by_threads": {threads: asdict(each) for threads, each in limits.items()},
        "records": [asdict(record) for record in records],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def header(task: str) -> str:
    """Of the table whose rows are `row`."""
    start = f"{'layer':16}{'backend':12}{'w':>7}{'depth':>6}{'batch':>7}{'thr':>4}{'median':>11}"
    if task == "training":
        return start + f"{'forward':>11}{'backward':>11}{'optimizer':>11}{'x FF step':>10}{'x FF ops':>9}"
    return (
        start + f"{'limit':>11}{'of limit':>9}{'over FF':>9}{'over MoE':>9}{'over peer':>10}{'visited':>8}{'error':>9}"
    )


def row(record: Record) -> str:
    """A record as a line of the table."""
    r = record
    depth = "" if r.depth is None else str(r.depth)
    start = (
        f"{r.layer:16}{r.backend:12}{r.training_width:7}{depth:>6}{r.batch_size:7}{r.threads:4}{_time(r.median_s):>11}"
    )
    if r.task == "training":
        parts = "".join(f"{_time(part):>11}" for part in (r.forward_s, r.backward_s, r.optimizer_s))
        ratio = "" if r.speedup_over_ff is None else f"{1 / r.speedup_over_ff:.2f}"
        operations = "" if r.operations_over_ff is None else f"{r.operations_over_ff:.2f}"
        return start + parts + f"{ratio:>10}{operations:>9}"
    ratios = (r.speedup_over_ff, r.speedup_over_moe, r.speedup_over_peer)
    told = "".join(f"{'' if ratio is None else f'{ratio:.4g}x':>10}" for ratio in ratios)
    end = f"{r.limit_s / r.median_s:>9.0%}{told}{r.visited_share:>8.0%}"
    fastest = "" if r.fastest_ff_s is None else f"  {r.fastest_ff} {_time(r.fastest_ff_s)}"
    return start + f"{_time(r.limit_s):>11}" + end + f"{r.max_abs_error:>7.0e}" + fastest


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1e6 * seconds:.1f} us" if seconds < 1e-2 else f"{1e3 * seconds:.1f} ms"


def of_one(records: Iterable[Record], layer: str) -> Record | None:
    """The record of this layer, if there is one."""
    return next((record for record in records if record.layer == layer), None)
