"""The one loop of all benchmarks: layers of a depth side by side, at each batch size and number of threads.

Inference and training stand beside what the machine could do; a model beside the layer in it.
"""

import ctypes
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fffexp.bench.contenders import Contender, inputs, layer_class, make, public_layers
from fffexp.bench.records import Record, ResultsFile, describe, measured, report
from fffexp.bench.setting import Setting
from fffexp.commandline import check_file
from fffexp.errors import UserError, one_line, refuse
from fffexp.files import hold
from fffexp.layers import FeedforwardLayer
from fffexp.models.transformer import TransformerBlock
from fffexp.timing import interleaved, median_ratio, rotating, synchronize

DEVICES = ("cpu", "cuda", "mps", "xpu")
REPEATS, GEMM_SIZE, READ_BYTES = 20, 2048, 2**30
# Inputs rotate until the weights that they touch exceed so many last-level caches, or are nearly the whole layer.
CACHES, WHOLE, MAX_INPUT_BYTES = 4, 0.95, 2**29
# A training pass is checked on so many rows in layers up to this size, on one in larger ones.
CHECKED_ROWS, CHECKED_SCALARS = 8, 2**24
# Of the models that a layer is timed in.
TOKENS, HEADS, CLASSES = 128, 12, 10


def run(task: str, setting: Setting, peers: bool = False) -> None:
    """Measure, write records as they come, and print the table of all that the file has."""
    _check_device(setting.device)
    layers = setting.layers or list(public_layers())
    if task == "model":  # speedups are over the first
        layers = list(dict.fromkeys([next(iter(public_layers())), *layers]))
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
                results.limits[str(threads)] = measure_limits(getattr(torch, setting.dtype), setting.device)
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
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: torch cannot use it here ({one_line(str(error))}): give cpu") from error
    refuse((kind not in DEVICES, f"--device {device}: give {', '.join(DEVICES)} or one with a number, such as cuda:1"))


def _steady_memory() -> None:
    # let malloc keep what is freed: else all contenders' steps take page faults, and different ones
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, size in ((-3, 32 * 2**20), (-1, 2**31 - 1)):  # thresholds of mmap and trim
            libc.mallopt(option, size)


def measure_limits(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Best of 20 products of 2048 x 2048 matrices, and then of 20 reads of 1 GiB, which empty the caches."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype) for _ in range(2))
    # in float32 whatever the dtype: a sum in bfloat16 would be bound by its arithmetic
    memory = torch.ones(READ_BYTES // 4, device=device)
    calls: dict[str, Callable[[], object]] = {"gemm": lambda: a @ b, "read": memory.sum}
    timed = partial(interleaved, seconds=0.0, device=device, rounds=(REPEATS, REPEATS), block_s=0)
    gemm, read = (min(timed({name: call})[name]) for name, call in calls.items())
    return {"gemm_flops_per_s": 2 * GEMM_SIZE**3 / gemm, "read_bytes_per_s": READ_BYTES / read}


def last_level_cache_bytes() -> int:
    """Of the processor; 32 MiB where it does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 2**20)


def measure(
    task: str,
    setting: Setting,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    peers: bool = False,
    has: Callable[[Mapping[str, Any]], bool] = lambda _: False,
) -> Iterator[Record]:
    """Records of all layers, of a task: inference, training or model.

    Limits of the machine are by number of threads; models need none. A record that is there already, which `has` says
    of what `describe` gives, is timed only beside others.
    """
    ways: dict[str, Callable[..., dict[str, Record]]] = {"": _training if task == "training" else _inference}
    if task == "model":
        ways = {body: partial(_model, body=body) for body in _bodies(setting)}
    for depth in setting.depths:
        contenders = make(setting, depth, peers)
        if task == "training":
            contenders = _with_forms(contenders, setting)
        for body, batch_size, threads in itertools.product(ways, setting.batch_sizes, setting.threads):
            more = {"model": body} if body else {}
            timed = {c.name: describe(task, c, setting, batch_size, threads) | more for c in contenders}
            wanted = [name for name in timed if not has(timed[name])]
            found = ways[body](contenders, setting, batch_size, threads) if wanted else {}
            for record in (timed[name] | found[name] for name in wanted):
                if limits:
                    rates = limits[str(threads)]
                    computed = record["flops"] / rates["gemm_flops_per_s"]
                    record["limit_s"] = max(computed, record["bytes"] / rates["read_bytes_per_s"])
                yield record


@torch.inference_mode()
def _inference(contenders: Sequence[Contender], setting: Setting, batch_size: int, threads: int) -> dict[str, Record]:
    batches = beyond_caches([c.layer for c in contenders], setting, batch_size)
    errors = {c.name: c.check(batches[0]) for c in contenders}
    calls: dict[str, Callable[[Tensor], object]] = {c.name: c.module for c in contenders}
    forms = {c.name: {} if c.is_peer else c.layer.fast_forms() for c in contenders}
    for c in contenders:
        for name, form in forms[c.name].items():
            c.compare(form(batches[0]), c.module(batches[0]), 1e3, f"output by {name}")
            calls[f"{c.name} {name}"] = form
    rotated = {name: rotating(call, batches) for name, call in calls.items()}
    seconds, found = interleaved(rotated, setting.seconds, device=setting.device, threads=threads), {}
    for c in contenders:
        scalars = c.layer.weights_read(batches[0]) + batch_size * (setting.in_features + setting.out_features)
        found[c.name] = record = measured(
            c,
            contenders,
            seconds,
            flops=batch_size * c.layer.flops_per_sample,
            bytes=scalars * batches[0].element_size(),
            max_abs_error=errors[c.name],
            visited_share=visited_share(c.layer, batches),
            peak_bytes=_peak(c.module, batches[0]) if setting.device.startswith("cuda") else None,
        )
        fastest = min(((statistics.median(seconds[f"{c.name} {name}"]), name) for name in forms[c.name]), default=None)
        if fastest and fastest[0] < record["median_s"]:
            record |= {"fastest_ff": fastest[1], "fastest_ff_s": fastest[0]}
    return found


def beyond_caches(layers: Sequence[Any], setting: Setting, batch_size: int) -> list[Tensor]:
    """Batches whose weights, of each sparse layer, do not fit the caches together, or are the whole layer."""
    batches = inputs(setting, batch_size, 8)
    most, size = max(8, MAX_INPUT_BYTES // batches[0].nbytes), batches[0].element_size()
    for layer in layers:
        while layer.num_experts > 1 and len(batches) < most and visited_share(layer, batches) < WHOLE:
            if layer.weights_read(torch.cat(batches)) * size > CACHES * last_level_cache_bytes():
                break
            batches = inputs(setting, batch_size, min(2 * len(batches), most))
    return batches


def visited_share(layer: Any, batches: Sequence[Tensor]) -> float:
    """Of the leaves or experts, those that any of the batches reaches."""
    return len(torch.cat([layer.route(batch).flatten() for batch in batches]).unique()) / layer.num_experts


def _peak(module: Callable[[Tensor], object], x: Tensor) -> int:
    torch.cuda.reset_peak_memory_stats(x.device)
    module(x)
    return torch.cuda.max_memory_allocated(x.device)


def _with_forms(contenders: Sequence[Contender], setting: Setting) -> list[Contender]:
    own, x = [c for c in contenders if not c.is_peer], inputs(setting, 1, 1)[0]
    forms = {f"{c.name} {name}": form for c in own for name, form in c.layer.training_forms().items()}
    others = [Contender(name, "", form, form, form.forward_reference) for name, form in forms.items()]
    for c in own + others:
        c.backend = c.layer.train().training_backend(x)
    return [*contenders, *others]


def _training(contenders: Sequence[Contender], setting: Setting, batch_size: int, threads: int) -> dict[str, Record]:
    batches, features = inputs(setting, batch_size, 8), setting.in_features + setting.out_features
    errors = {c.name: _check(c, batches[0]) for c in contenders}
    parts: dict[str, list[list[float]]] = {c.name: [] for c in contenders}
    steps = {c.name: _step(c, batches, setting.out_features, parts[c.name]) for c in contenders}
    seconds = interleaved(steps, setting.seconds, device=setting.device, threads=threads, rounds=(5, 51), block_s=0)
    found = {}
    for c in contenders:
        layer, everything = c.layer, c.layer.trains_all_experts
        weights = layer.parameter_count if everything else layer.weights_read(batches[0])
        deciding = (layer.training_size / layer.training_width - 1) * setting.in_features / features
        # without those of the warm-up
        medians = map(statistics.median, zip(*parts[c.name][-len(seconds[c.name]) :], strict=True))
        found[c.name] = measured(
            c,
            contenders,
            seconds,
            flops=batch_size * layer.training_flops_per_sample,
            bytes=(3 * weights + 2 * batch_size * features) * batches[0].element_size(),
            max_abs_error=errors[c.name],
            visited_share=1.0 if everything else visited_share(layer, batches),
            operations_over_ff=1 + deciding if everything and c.baseline != "ff" else None,
            **dict(zip(("forward_s", "backward_s", "optimizer_s"), medians, strict=True)),
        )
    return found


def _step(c: Contender, batches: Sequence[Tensor], out_features: int, parts: list[list[float]]) -> Callable[[], None]:
    # one step a call, its seconds to `parts`; SGD, the cheapest optimizer, hides least of what the layer costs
    optimizer = torch.optim.SGD(c.module.train().parameters(), lr=1e-9)
    following = itertools.cycle([(x, x.new_empty(len(x), out_features).normal_()) for x in batches])

    def now(x: Tensor) -> float:
        synchronize(x.device)
        return time.perf_counter()

    def run() -> None:
        x, grad = next(following)
        optimizer.zero_grad()
        start = time.perf_counter()
        output = c.module(x)
        forward = now(x)
        output.backward(grad)
        backward = now(x)
        optimizer.step()
        parts.append([forward - start, backward - forward, now(x) - backward])
        c.layer.routing = None

    return run


def _check(contender: Contender, x: Tensor) -> float:
    layer, module, asked = contender.layer, contender.module.train(), contender.layer.backend
    small = layer.parameter_count <= CHECKED_SCALARS
    rows = x[: CHECKED_ROWS if small else 1]
    decisions: Literal["soft", "hard"] = "hard" if layer.sparse_gradients else "soft"
    if not (contender.is_peer or layer.sparse_gradients):
        layer.routing_mode = decisions
        module.eval()  # the noise of a gate is not compared
        if not layer.has_soft_mode:
            layer.backend = "eager"  # what trains, where inference has another
    try:
        output, truth = module(rows), layer.forward_reference(rows, decisions if layer.has_soft_mode else "hard")
        error = contender.compare(output, truth)
        if small and not contender.is_peer:
            parameters = dict(layer.named_parameters())
            found, true = (
                torch.autograd.grad(y, [*parameters.values()], torch.ones_like(y), allow_unused=True)
                for y in (output, truth)
            )
            for (name, parameter), a, b in zip(parameters.items(), found, true, strict=True):
                if b is not None:  # hard decisions have no gradient
                    a = torch.zeros_like(parameter) if a is None else a.to_dense()
                    contender.compare(a, b, 10, f"gradient of {name}")
    finally:
        layer.routing_mode, layer.backend = "auto", asked
        module.train()
    return error


def mlp(layer: FeedforwardLayer) -> nn.Module:
    """(..., in) -> (..., classes): the layer between a projection of the input and a classifier."""
    first, classifier = nn.Linear(layer.in_features, layer.in_features), nn.Linear(layer.out_features, CLASSES)
    return nn.Sequential(first, nn.ReLU(), layer, classifier)


def _bodies(setting: Setting) -> Mapping[str, Callable[[FeedforwardLayer], nn.Module]]:
    if (width := setting.in_features) != setting.out_features:  # in the block a layer gives what it takes
        return {"MLP": mlp}
    heads = 1 if width % HEADS else HEADS
    return {"MLP": mlp, "transformer block": lambda layer: TransformerBlock(lambda i, o: layer, width, heads)}


@torch.inference_mode()
def _model(
    contenders: Sequence[Contender], setting: Setting, batch_size: int, threads: int, body: str
) -> dict[str, Record]:
    # speedups are over the first contender
    shape = (batch_size,) if body == "MLP" else (max(1, batch_size // TOKENS), min(batch_size, TOKENS))
    batches = [x.view(*shape, -1) for x in inputs(setting, math.prod(shape), 8)]
    calls: dict[str, Callable[[], object]] = {}
    for c in contenders:
        made = _bodies(setting)[body](c.layer).to(batches[0]).eval()
        c.check(batches[0].flatten(0, -2))
        calls |= {f"layer {c.name}": rotating(c.layer, batches), f"model {c.name}": rotating(made, batches)}
    seconds, found = interleaved(calls, setting.seconds, device=setting.device, threads=threads), {}
    for c in contenders:
        own = {part: seconds[f"{part} {c.name}"] for part in ("layer", "model")}
        layer_s, model_s = map(statistics.median, own.values())
        over = {f"{p}_speedup": median_ratio(seconds[f"{p} {contenders[0].name}"], own[p]) for p in own}
        found[c.name] = {"layer_s": layer_s, "model_s": model_s, "layer_share": layer_s / model_s, **over}
    return found
