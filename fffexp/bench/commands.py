"""`fffexp bench inference|training|model|overhead`: a command line to measurements to a table and JSON."""

import ctypes
import os
import platform
from dataclasses import replace

from fffexp.bench.setting import INFERENCE, MODEL, TRAINING, Setting
from fffexp.commandline import PositiveInt, check_file
from fffexp.errors import UserError, one_line
from fffexp.files import hold

DEVICES = ("cpu", "cuda", "mps", "xpu")


def inference(setting: Setting = INFERENCE, peers: bool = False) -> None:
    """Time inference of layers of equal training width, interleaved, beside the machine's limits.

    Args:
        setting: what is timed.
        peers: also fastfeedforward from PyPI, where it is installed.
    """
    use_huge_pages()
    _run("inference", setting, peers)


def training(setting: Setting = TRAINING, peers: bool = False) -> None:
    """Time training steps of layers of equal training width, interleaved: forward, backward and optimizer.

    Args:
        setting: what is timed.
        peers: also fastfeedforward from PyPI, where it is installed.
    """
    _run("training", setting, peers)


def model(setting: Setting = MODEL) -> None:
    """Time an MLP and a transformer block with each layer: the layer's speedup is not the model's.

    Args:
        setting: what is timed.
    """
    use_huge_pages()
    _run("model", setting)


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
    from fffexp.report.tables import table

    print(table(compare(layers or [], epochs, rounds, threads), {"bare, s": ".3f", "fit, s": ".3f", "ratio": ".3f"}))


def use_huge_pages() -> None:
    """For all contenders and limits alike: else the time of a large layer is in part that of page tables.

    To be called before torch is imported, which looks at its first allocation. Training keeps torch's default, in which
    fresh memory is a part of a step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _run(task: str, setting: Setting, peers: bool = False) -> None:
    """Measure, write records as they come, and print the table of all that the file has."""
    import torch

    from fffexp.bench import machine
    from fffexp.bench.contenders import layer_class, public_layers
    from fffexp.bench.measure import measure
    from fffexp.bench.records import ResultsFile, report

    _check_device(setting.device)
    dense, *others = public_layers()
    layers = setting.layers or [dense, *others]
    if task == "model":  # speedups are over the first
        layers = [dense, *(name for name in layers if name != dense)]
    for name in (*layers, *setting.layer_args):
        layer_class(name)
    check_file("--json", setting.json)
    with hold(setting.json):
        results = ResultsFile(task, setting)
        where = results.environment
        kernels = (where["instruction_set"] or "no kernel") + ", huge pages" * where["huge_pages"]
        print(f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {kernels}", flush=True)
        _steady_memory()
        for threads in setting.threads if task != "model" else ():
            torch.set_num_threads(threads)
            if str(threads) not in results.limits:
                limits = machine.measure_limits(getattr(torch, setting.dtype), setting.device)
                results.limits[str(threads)] = limits
            gemm, read = (rate / 1e9 for rate in results.limits[str(threads)].values())
            print(f"limits, {threads} threads, {setting.dtype}: products {gemm:.1f} GFLOP/s, memory {read:.1f} GB/s")
        for r in measure(task, replace(setting, layers=layers), results.limits, peers, results.has):
            results.add(r)
            width, batch, threads = (r[key] for key in ("training_width", "batch_size", "threads"))
            print(f"{r['layer']}, {r['backend']}, width {width}, batch {batch}, threads {threads}", flush=True)
    print(f"\n{setting.in_features} -> {setting.out_features}, leaves and experts of {setting.leaf_width}; medians\n")
    print(report(results.records, task))
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
