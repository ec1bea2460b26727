"""Compiles the CPU kernels, once for a torch and a compiler, into the user's cache."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_SOURCES, _TORCH = Path(__file__).with_name("csrc"), Path(torch.__file__).parent
_FLAGS = ["-O3", "-fPIC", "-std=c++20", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden"]
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mprefer-vector-width=512"
_X86 = {"avx2": "-mavx2 -mfma", "avx512": _AVX512}
# kernel.cpp is compiled once per instruction set; which one runs is decided when it is loaded
_INSTRUCTION_SETS = {"plain": "", **(_X86 if platform.machine().lower() in ("x86_64", "amd64") else {})}


class BuildError(RuntimeError):
    """There is no compiler, or it failed."""


def build() -> Path:
    """Path of the operators, compiled unless this torch and compiler have done so before; raises BuildError."""
    if not (compiler := _compiler()):
        raise BuildError("no C++ compiler is found: install g++, or name one in CXX")
    sources = (source.read_text() for source in sorted(_SOURCES.iterdir()))
    parts = [torch.__version__, compiler, str(compiler_version()), str(_FLAGS), *sources]
    key = hashlib.sha256("".join(f"{part}\0" for part in parts).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fffexp"
    library = cache / f"operators-{key[:16]}.so"
    if library.exists():
        return library
    from filelock import FileLock  # comes with torch

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
    if not (compiler := _compiler()):
        return None
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compile(compiler: str, library: Path) -> None:
    include = f"-isystem{_TORCH}/include"
    torch_flags = [include, f"{include}/torch/csrc/api/include", "-fopenmp"]
    units = {name: [f"{_SOURCES}/{name}.cpp", *torch_flags] for name in ("operators", "skip_zeros")}
    for name, flags in _INSTRUCTION_SETS.items():
        units[name] = [f"{_SOURCES}/kernel.cpp", f"-DKERNELS=kernels_{name}", *flags.split()]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = {f"{folder}/{name}.o": given for name, given in units.items()}
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, ([compiler, *_FLAGS, "-c", *given, "-o", made] for made, given in objects.items())))
        # the process has loaded torch's libraries already, libgomp among them
        libraries = [f"-L{_TORCH}/lib", "-ltorch_cpu", "-lc10"]
        _run([compiler, "-shared", "-fopenmp", *objects, "-o", f"{folder}/operators.so", *libraries])
        os.replace(f"{folder}/operators.so", library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = done.stdout.splitlines()
        errors = [line for line in lines if "error" in line]
        raise BuildError(f"the C++ compiler failed: {[*errors, *lines, 'no message'][0]}")
