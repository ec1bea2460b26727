"""`fffexp bench inference|training|model|overhead`: a command line to measurements to a table and JSON."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fffexp.commandline import NonNegativeInt, PositiveFloat, PositiveInt, check_file
from fffexp.errors import UserError, one_line
from fffexp.files import hold
from fffexp.report.tables import table

if TYPE_CHECKING:
    from fffexp.bench.contenders import Point
    from fffexp.bench.records import ResultsFile, Timed

DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Args:
        layers: public names such as FF, or class paths such as own.MyLayer of a file own.py in the current folder; all
            public ones by default.
        depths: each layer has 2^depth leaves or experts, and a dense one as many neurons as all of them.
        leaf_width: hidden neurons of a leaf or expert.
        in_features: size of an input.
        out_features: size of an output.
        batch_sizes: rows of an input.
        threads: of torch.
        top_k: experts of a sample, where a layer leaves the choice.
        device: cpu, cuda, cuda:N or mps.
        dtype: of weights and inputs.
        backend: a kernel by name; auto takes the fastest that serves.
        layer_args: further arguments of constructors, such as {"own.MyLayer": {"rank": 4}}; else a constructor gets
            those of width, depth, leaf_width, num_experts, expert_width and top_k that it has.
        seconds: of timing at each point.
        json: file for the records; those that it has already are not measured again.
    """

    layers: list[str] = field(default_factory=list)
    depths: list[NonNegativeInt] = field(default_factory=lambda: [2, 5, 8, 11])
    leaf_width: PositiveInt = 32
    in_features: PositiveInt = 768
    out_features: PositiveInt = 768
    batch_sizes: list[PositiveInt] = field(default_factory=lambda: [1, 16, 256, 2048])
    threads: list[PositiveInt] = field(default_factory=lambda: [1])
    top_k: PositiveInt = 1
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    backend: Literal["auto", "native", "triton", "eager"] = "auto"
    layer_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: PositiveFloat = 2.0
    json: Path | None = None

    def point(self, depth: int) -> "Point":
        """Sizes of the layers of a depth."""
        import torch

        from fffexp.bench.contenders import Point

        sizes = (self.in_features, self.out_features, depth, self.leaf_width, self.top_k)
        return Point(*sizes, getattr(torch, self.dtype), self.device, self.backend, self.layer_args)


TRAINING = Setting(depths=[5, 7], batch_sizes=[256], top_k=2, seconds=3.0)
MODEL = Setting(depths=[5, 8], batch_sizes=[128, 2048])


def inference(setting: Setting = Setting(), peers: bool = False) -> None:  # it is frozen
    """Time inference of layers of equal training width, interleaved, beside the machine's limits.

    Args:
        setting: what is timed.
        peers: also fastfeedforward from PyPI, where it is installed.
    """
    use_huge_pages()
    from fffexp.bench.inference import run_point

    _time_layers("inference", setting, peers, run_point)


def training(setting: Setting = TRAINING, peers: bool = False) -> None:
    """Time training steps of layers of equal training width, interleaved: forward, backward and optimizer.

    Args:
        setting: what is timed.
        peers: also fastfeedforward from PyPI, where it is installed.
    """
    from fffexp.bench.training import run_point

    _time_layers("training", setting, peers, run_point)


def model(setting: Setting = MODEL) -> None:
    """Time an MLP and a transformer block with each layer: the layer's speedup is not the model's.

    Args:
        setting: what is timed.
    """
    use_huge_pages()
    from fffexp.bench.model import row, run_point

    def measure(setting: Setting, results: "ResultsFile") -> Iterable["Timed"]:
        for depth in setting.depths:
            batches, point = setting.batch_sizes, setting.point(depth)
            yield from run_point(setting.layers, point, batches, setting.threads, results.has, setting.seconds)

    _run("model", setting, measure, row)


def overhead(
    layers: list[str] | None = None, epochs: PositiveInt = 1, rounds: PositiveInt = 5, threads: PositiveInt = 1
) -> None:
    """Time a fit of Fashion-MNIST against a bare PyTorch loop, in turn, without validation and tracking.

    Args:
        layers: public names or class paths; all public ones by default.
        epochs: of one timing.
        rounds: timings of each.
        threads: of torch.
    """
    from fffexp.bench.overhead import compare

    print(table(compare(layers or [], epochs, rounds, threads), {"bare, s": ".3f", "fit, s": ".3f", "ratio": ".3f"}))


def use_huge_pages() -> None:
    """For all contenders and limits alike: else the time of a large layer is in part that of page tables.

    To be called before torch is imported, which looks at its first allocation. Training keeps torch's default, in which
    fresh memory is a part of a step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _time_layers(task: str, setting: Setting, peers: bool, run_point: Callable[..., Iterable["Timed"]]) -> None:
    import torch

    from fffexp.bench.machine import measure_limits
    from fffexp.bench.records import row

    def measure(setting: Setting, results: "ResultsFile") -> Iterable["Timed"]:
        limits = {}
        for threads in setting.threads:
            torch.set_num_threads(threads)
            limits[threads] = results.limits(threads) or measure_limits(getattr(torch, setting.dtype), setting.device)
            results.set_limits(threads, limits[threads])
            gemm, read = limits[threads].gemm_flops_per_s / 1e9, limits[threads].read_bytes_per_s / 1e9
            print(f"limits, {threads} threads, {setting.dtype}: products {gemm:.1f} GFLOP/s, memory {read:.1f} GB/s")
        for depth in setting.depths:
            point = setting.point(depth)
            yield from run_point(
                setting.layers, point, setting.batch_sizes, limits, peers, results.has, setting.seconds
            )

    _run(task, setting, measure, row)


def _run(
    task: str,
    setting: Setting,
    measure: Callable[[Setting, "ResultsFile"], Iterable["Timed"]],
    row: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> None:
    """Measure, write records as they come, and print the table of all that the file has."""
    from fffexp.bench.contenders import layer_class, public_layers
    from fffexp.bench.records import FORMATS, SETTING, ResultsFile
    from fffexp.environment import environment

    _check_device(setting.device)
    setting = replace(setting, layers=setting.layers or list(public_layers()))
    for name in (*setting.layers, *setting.layer_args):
        layer_class(name)
    check_file("--json", setting.json)
    with hold(setting.json):
        where = environment(setting.threads, setting.device)
        common = {key: task if key == "task" else getattr(setting, key) for key in SETTING}
        results = ResultsFile(setting.json, common, where)
        kernels = where["instruction_set"] or "no kernel"
        print(f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {kernels}", end="")
        print(", huge pages" if where["huge_pages"] else "", flush=True)
        _steady_memory()
        for record in measure(setting, results):
            results.add(record)
            start = [record.layer, record.backend, f"width {record.training_width}", f"batch {record.batch_size}"]
            print(*start, f"threads {record.threads}", sep=", ", flush=True)
    print(f"\n{setting.in_features} -> {setting.out_features}, leaves and experts of {setting.leaf_width}; medians\n")
    print(table([row(record) for record in results.records], FORMATS))
    if setting.json:
        print(f"written to {setting.json}")


def _check_device(device: str) -> None:
    import torch

    try:
        known = torch.device(device).type in DEVICES
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: torch cannot use it here ({one_line(str(error))}): give cpu") from error
    if not known:
        raise UserError(f"--device {device}: give {', '.join(DEVICES)} or one with a number, such as cuda:1")


def _steady_memory() -> None:
    """Let malloc keep what is freed: else all contenders' steps take page faults, and different ones."""
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**31 - 1)
