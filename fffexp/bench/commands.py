"""`fffexp bench inference|training|model|fit`: arguments to measurements to a table and JSON."""

import argparse
import ctypes
import itertools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fffexp.bench import inference, model, training
from fffexp.bench.arguments import Parser, natural, positive
from fffexp.bench.contenders import LAYERS, Point
from fffexp.bench.machine import measure_limits
from fffexp.bench.records import Record, header, row, write
from fffexp.environment import environment
from fffexp.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def main(args: list[str]) -> int:
    """Parse and run."""
    parser = Parser(prog="fffexp bench", description="Time the layers.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, batches, depths, k in (
        ("inference", inference.run_point, (1, 16, 256, 2048), (2, 5, 8, 11), 1),
        ("training", training.run_point, (256,), (5, 7), 2),
    ):
        told = f"{name} of layers of equal training width, interleaved, beside the machine's limits"
        sub = commands.add_parser(name, help=told, description=told, allow_abbrev=False)
        _arguments(sub, batches, depths, k)
        sub.add_argument("--peers", action="store_true", help="also fastfeedforward from PyPI, where it is installed")
        sub.set_defaults(run=run)
    told = "an MLP and a transformer block with each layer: the layer's speedup is not the model's"
    sub = commands.add_parser("model", help=told, description=told, allow_abbrev=False)
    _arguments(sub, (128, 2048), (5, 8), 1)
    told = "what the framework costs beside a bare PyTorch loop, on Fashion-MNIST"
    sub = commands.add_parser("fit", help=told, description=told, allow_abbrev=False)
    for option, default in (("--epochs", 1), ("--rounds", 5), ("--threads", 1)):
        sub.add_argument(option, type=positive, default=default)
    found = parser.parse_args(args)
    if found.command == "fit":
        from fffexp.bench.overhead import fit

        fit(found.epochs, found.rounds, found.threads)
    elif found.command == "model":
        _models(found)
    else:
        _points(found, found.run)
    return 0


def _arguments(sub: argparse.ArgumentParser, batches: tuple[int, ...], depths: tuple[int, ...], k: int) -> None:
    several: dict[str, Any] = {"nargs": "+", "metavar": "N"}
    sub.add_argument("--layers", nargs="+", default=list(LAYERS), metavar="LAYER", help=" ".join(LAYERS))
    sub.add_argument("--depths", type=natural, default=list(depths), **several, help="2^depth leaves, experts")
    sub.add_argument("--leaf_width", type=positive, default=32, metavar="N")
    sub.add_argument("--in_features", type=positive, default=768, metavar="N")
    sub.add_argument("--out_features", type=positive, default=768, metavar="N")
    sub.add_argument("--batch_sizes", type=positive, default=list(batches), **several)
    sub.add_argument("--threads", type=positive, default=[1], **several)
    sub.add_argument("--top_k", type=positive, default=k, metavar="N", help="experts of a sample")
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--dtype", choices=list(DTYPES), default="float32")
    sub.add_argument("--backend", choices=["auto", "native", "triton", "eager"], default="auto")
    sub.add_argument("--json", type=Path, metavar="FILE")


def _models(found: argparse.Namespace) -> None:
    _check(found)
    where, records = environment(found.threads, found.device), []
    print(model.header(), flush=True)
    for depth, threads in itertools.product(found.depths, found.threads):
        for record in model.run_point(found.layers, _point(found, depth), found.batch_sizes, threads):
            records.append(record)
            print(model.row(record), flush=True)
            if found.json:
                content = {"environment": where, "records": model.as_json(records)}
                found.json.write_text(json.dumps(content, indent=1) + "\n")


def _point(found: argparse.Namespace, depth: int) -> Point:
    sizes = (found.in_features, found.out_features, depth, found.leaf_width)
    return Point(*sizes, found.top_k, DTYPES[found.dtype], found.device, found.backend)


def _check(found: argparse.Namespace) -> None:
    kind, _, index = found.device.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdigit():
        raise UserError(f"--device {found.device}: give cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {found.device}: torch sees no such CUDA device here")
    for name in found.layers:
        if name not in LAYERS:
            raise UserError(f"--layers: {name!r} is not one of {', '.join(LAYERS)}")
    if found.json:  # before minutes are spent on what cannot be written
        try:
            found.json.parent.mkdir(parents=True, exist_ok=True)
            found.json.open("a").close()
        except OSError as error:
            raise UserError(f"--json {found.json}: {error.strerror}") from error


def _points(found: argparse.Namespace, run: Callable[..., object]) -> None:
    _check(found)
    _steady_memory()
    dtype, limits = DTYPES[found.dtype], {}
    for threads in found.threads:
        torch.set_num_threads(threads)
        limits[threads] = measure_limits(dtype, found.device)
        each = limits[threads]
        gemm, read = each.gemm_flops_per_s / 1e9, each.read_bytes_per_s / 1e9
        print(
            f"limits, {threads} threads, {found.dtype}: products {gemm:.1f} GFLOP/s, memory {read:.1f} GB/s", flush=True
        )
    where = environment(found.threads, found.device)
    print(
        f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, {where['instruction_set'] or 'no kernel'}"
        + (", huge pages" if where["huge_pages"] else "")
    )
    print(f"{found.in_features} -> {found.out_features}, blocks of {found.leaf_width}; medians")
    print(header(found.command), flush=True)
    records: list[Record] = []
    for depth in found.depths:
        point = _point(found, depth)
        for record in run(found.layers, point, found.batch_sizes, limits, found.peers):  # type: ignore[attr-defined] # both give records
            records.append(record)
            print(row(record), flush=True)
            if found.json:  # as they come: nothing that is measured is lost
                write(found.json, where, {str(t): each for t, each in limits.items()}, records)
    if found.json:
        print(f"written to {found.json}")


def _steady_memory() -> None:
    """Let malloc keep what is freed: else all contenders' steps take page faults, and different ones."""
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**31 - 1)
