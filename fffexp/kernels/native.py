"""The compiled CPU backend: operators in C++ for inference, built once into the user's cache.

`fffexp::fff`, `fffexp::selected` and `fffexp::route` take float32 and bfloat16 rows (B, I). Their gradients are
computed by the grouped products of `eager`.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fffexp.kernels.grouped import grouped_mm, grouped_outer
from fffexp.kernels.naive import Blocks
from fffexp.routing.tree import block_counts

_SOURCES = Path(__file__).with_name("csrc")
_DTYPES = (torch.float32, torch.bfloat16)
_FLAGS = ["-O3", "-fPIC", "-std=c++20", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden"]
# kernel.cpp is compiled once per instruction set; which one runs is decided when it is loaded
_INSTRUCTION_SETS: dict[str, list[str]] = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    _INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    _INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512")
    ]


class BuildError(RuntimeError):
    """There is no compiler, or it failed."""


def build() -> Path:
    """Path of the compiled operators; they are compiled unless this torch and compiler have done so before.

    Raises:
        BuildError: no C++ compiler is found, or it refuses the source.
    """
    compiler, version = _compiler(), compiler_version()
    sources = sorted(_SOURCES.iterdir())
    key = hashlib.sha256()
    for part in (torch.__version__, compiler, str(version), str(_FLAGS), *(source.read_text() for source in sources)):
        key.update(part.encode() + b"\0")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fffexp"
    library = cache / f"operators-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "build.lock"):
            if not library.exists():
                print(f"fffexp: compiling the CPU kernels into {cache} (once, half a minute)", file=sys.stderr)
                _compile(compiler, library)
    except OSError as error:
        raise BuildError(f"the CPU kernels cannot be built in {cache}: {error}") from error
    return library


def compiler_version() -> str | None:
    """First line that the C++ compiler says of itself, or None if there is none."""
    try:
        told = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    except BuildError:
        return None
    return told.partition("\n")[0]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler is found: install g++, or name one in CXX")


def _compile(compiler: str, library: Path) -> None:
    torch_path = Path(torch.__file__).parent
    headers = [f"-isystem{torch_path / 'include'}", f"-isystem{torch_path / 'include/torch/csrc/api/include'}"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = {"operators": [*headers, "-fopenmp"]}
        objects |= {name: [f"-DKERNELS=kernels_{name}", *flags] for name, flags in _INSTRUCTION_SETS.items()}
        running = []
        for name, flags in objects.items():
            source = _SOURCES / ("operators.cpp" if name == "operators" else "kernel.cpp")
            command = [compiler, *_FLAGS, *flags, "-c", str(source), "-o", f"{folder}/{name}.o"]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        outputs = [process.communicate()[0] for process in running]
        for process, output in zip(running, outputs, strict=True):
            _succeeded(process.returncode, output)
        # the process has loaded torch's libraries already, libgomp among them
        made = Path(folder) / "operators.so"
        command = [compiler, "-shared", "-fopenmp", *(f"{folder}/{name}.o" for name in objects), "-o", str(made)]
        command += [f"-L{torch_path / 'lib'}", "-ltorch_cpu", "-lc10"]
        linked = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        _succeeded(linked.returncode, linked.stdout)
        made.replace(library)


def _succeeded(status: int, output: str) -> None:
    if status:
        lines = [line for line in output.splitlines() if "error" in line] or output.splitlines() or ["no message"]
        raise BuildError(f"the C++ compiler failed: {lines[0]}")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # a graph is traced for one backend
def available() -> bool:
    """Whether the operators are loaded; the first call builds them, or says once why they cannot be had."""
    return _load()


@functools.cache
def _load() -> bool:
    try:
        torch.ops.load_library(build())
    except (BuildError, OSError) as error:
        print(f"fffexp: {error}; plain PyTorch serves, more slowly", file=sys.stderr)
        return False
    _register()
    return True


# ---- activations that the kernel knows: its name, the value, the gradient from (gradient, preactivation)

_aten = torch.ops.aten
_GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "identity": (lambda z: z, lambda g, z: g),
    "relu": (torch.relu, lambda g, z: _aten.threshold_backward(g, z, 0)),
    "gelu": (nn.functional.gelu, lambda g, z: _aten.gelu_backward(g, z)),
    "gelu_tanh": (
        lambda z: nn.functional.gelu(z, approximate="tanh"),
        lambda g, z: _aten.gelu_backward(g, z, approximate="tanh"),
    ),
    "silu": (nn.functional.silu, lambda g, z: _aten.silu_backward(g, z)),
    "tanh": (torch.tanh, lambda g, z: _aten.tanh_backward(g, torch.tanh(z))),
}
_NAMES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
}


def activation_name(module: nn.Module) -> str | None:
    """What the kernel calls this activation, or None if it does not know it."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _NAMES.get(type(module))


def serves(weight: Tensor, activation: str | None) -> bool:
    """Whether the compiled operators can run with weights like this one."""
    return activation is not None and weight.is_cpu and weight.dtype in _DTYPES and available()


def _register() -> None:
    def rows(x: Tensor, *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], dtype=torch.long)

    def outputs(x: Tensor, _0: Any, _1: Any, _2: Any, _3: Any, output_weight: Tensor, *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], output_weight.shape[2])

    torch.library.register_fake("fffexp::route", rows)
    torch.library.register_fake("fffexp::soft", lambda z, logits, *_: (torch.empty_like(z), torch.empty_like(logits)))
    torch.library.register_fake(
        "fffexp::soft_backward",
        lambda grad_h, grad_weights, z, logits, *_: (torch.empty_like(z), torch.empty_like(logits)),
    )
    torch.library.register_fake("fffexp::fff_inference", outputs)
    for name, setup, backward in (
        ("fff", _fff_setup, _fff_backward),
        ("selected", _selected_setup, _selected_backward),
    ):
        torch.library.register_fake(f"fffexp::{name}", outputs)
        torch.library.register_autograd(f"fffexp::{name}", backward, setup_context=setup)


def fff(x_BI: Tensor, *arguments: Any) -> Tensor:
    """(B, O) of hard inference; the arguments are those of the operator `fffexp::fff`."""
    ops = torch.ops.fffexp
    output: Tensor = (ops.fff if torch.is_grad_enabled() else ops.fff_inference)(x_BI, *arguments)
    return output


def _selected_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.weighted = tensors[2] is not None
    ctx.save_for_backward(*tensors)


def _selected_backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
    x, block, weights, *blocks = ctx.saved_tensors
    grad_x, grad_weights, *grads = _gradients(grad_BO, x, block, weights, blocks, ctx.activation)
    return grad_x, None, grad_weights, *grads, None


def _fff_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _fff_backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
    x, node_weight, node_bias, *blocks = ctx.saved_tensors
    leaf = torch.ops.fffexp.route(x, node_weight, node_bias)
    grad_x, _, *grads = _gradients(grad_BO, x, leaf.unsqueeze(1), None, blocks, ctx.activation)
    # hard decisions: a node's gradient is zero almost everywhere
    return grad_x, None, None, *grads, None


def _gradients(
    grad_BO: Tensor, x_BI: Tensor, block_BK: Tensor, weights_BK: Tensor | None, blocks: list[Tensor], activation: str
) -> tuple[Tensor | None, ...]:
    """Of x, the weights and the blocks' four tensors; hidden activations are computed again, grouped by block."""
    w1, b1, w2, b2 = blocks
    value, derivative = _GRADIENTS[activation]
    k = block_BK.shape[1]
    block_R, order_R = block_BK.flatten().sort(stable=True)
    sample_R = order_R // k
    ends_G = block_counts(block_R, len(w1)).cumsum(0)
    x_RI, grad_RO = x_BI[sample_R], grad_BO[sample_R]
    z_RH = grouped_mm(x_RI, w1.mT, ends_G) + b1[block_R]
    h_RH = value(z_RH)
    grad_weights = None
    if weights_BK is not None:
        y_RO = grouped_mm(h_RH, w2, ends_G) + b2[block_R]
        flat = (y_RO.float() * grad_RO.float()).sum(1)
        grad_weights = torch.zeros_like(flat).index_copy(0, order_R, flat).view_as(weights_BK).to(weights_BK.dtype)
        grad_RO = grad_RO * weights_BK.flatten()[order_R].to(grad_RO.dtype).unsqueeze(1)
    grad_z = derivative(grouped_mm(grad_RO, w2.mT, ends_G), z_RH)
    grad_x = torch.zeros_like(x_BI).index_add(0, sample_R, grouped_mm(grad_z, w1, ends_G))
    grad_b1 = torch.zeros_like(b1).index_add(0, block_R, grad_z)
    grad_b2 = torch.zeros_like(b2).index_add(0, block_R, grad_RO)
    return (
        grad_x,
        grad_weights,
        grouped_outer(grad_z, x_RI, ends_G),
        grad_b1,
        grouped_outer(h_RH, grad_RO, ends_G),
        grad_b2,
    )


# ---- soft training: products over the whole width, and between them one pass over the hidden activations


class _SoftTree(torch.autograd.Function):
    """(y, logits, leaf weights) of a soft pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        node_weight: Tensor,
        node_bias: Tensor,
        scale: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # one node more than there are: products with an odd number of columns are slow
        nodes, node_bias = nn.functional.pad(node_weight, (0, 0, 0, 1)), nn.functional.pad(node_bias, (0, 1))
        logits = torch.addmm(node_bias, x, nodes.T)
        z = torch.addmm(b1.flatten(), x, w1.flatten(0, 1).T)
        h, weights = torch.ops.fffexp.soft(z, logits, scale, activation)
        ctx.save_for_backward(x, scale, nodes, w1, w2, b2, z, logits, h, weights)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return (h @ w2.flatten(0, 1)).addmm_(weights, b2), logits[:, :-1], weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_BO: Tensor | None, more_logits: Tensor | None, more_weights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, scale, nodes, w1, w2, b2, z, logits, h, weights = ctx.saved_tensors
        if grad_BO is None:
            grad_BO = x.new_zeros(x.shape[0], w2.shape[2])
        grad_h = grad_BO @ w2.flatten(0, 1).T
        grad_weights = grad_BO @ b2.T if more_weights is None else torch.addmm(more_weights, grad_BO, b2.T)
        grad_z, grad_logits = torch.ops.fffexp.soft_backward(
            grad_h, grad_weights, z, logits, scale, more_logits, ctx.activation
        )
        grad_x = (grad_z @ w1.flatten(0, 1)).addmm_(grad_logits, nodes) if ctx.needs_input_grad[0] else None
        grad_nodes = (grad_logits.T @ x)[:-1], grad_logits.sum(0)[:-1]
        grad_hidden = (grad_z.T @ x).view_as(w1), grad_z.sum(0).view(w1.shape[:2])
        grad_output = (h.T @ grad_BO).view_as(w2), weights.T @ grad_BO
        return grad_x, *grad_nodes, None, *grad_hidden, *grad_output, None


def soft_tree(
    x_BI: Tensor, node_weight: Tensor, node_bias: Tensor, scale: Tensor, blocks: Blocks, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, O) mixture of all leaves, (B, N) logits of the nodes, (B, leaves) weights; in float32.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    result: tuple[Tensor, Tensor, Tensor] = _SoftTree.apply(x_BI, node_weight, node_bias, scale, *blocks, activation)
    return result
