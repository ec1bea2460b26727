"""Compiles the CPU kernels, once for a torch and a compiler, into the user's cache."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_SOURCES = Path(__file__).with_name("csrc")
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
    try:
        printed = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    except BuildError:
        return None
    return printed.partition("\n")[0]


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
