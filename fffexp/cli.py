"""The one entry point: a table from commands to functions."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from typing import Any

from fffexp import configs
from fffexp.errors import NonFiniteLossError, UserError, report, terminated_by_signal

STUDY = ("run", "resume", "show", "trials", "best", "delete", "clean")
# "module:function" of each command; how a typed function becomes one, see commandline.py. Modules named here import
# quickly, and their functions torch and the like only when called.
COMMANDS: Mapping[str, Any] = {
    "fit": "fffexp.cli:fit",
    "validate": "fffexp.cli:validate",
    "test": "fffexp.cli:test",
    "predict": "fffexp.cli:predict",
    "study": {name: f"fffexp.study.commands:{name}" for name in STUDY},
    "report": "fffexp.study.commands:report",
    "bench": {name: f"fffexp.bench.commands:{name}" for name in ("inference", "training", "model", "overhead")},
    "reproduce": {
        name: f"fffexp.paper.commands:{name}"
        for name in ("table1", "table2", "table3", "figure3", "figure5", "figure6", "conversion")
    },
    "build": "fffexp.cli:build",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 failed, 2 the user's mistake, reported in one line."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.append(os.getcwd())  # so that `class_path: own.Net` finds own.py; last, to hide no installed package
    try:
        with terminated_by_signal():
            _dispatch(COMMANDS, args)
    except UserError as error:
        report(error)
        return 2
    except NonFiniteLossError as error:
        report(error)
        return 1
    except KeyboardInterrupt:
        report("interrupted")
        return 130
    return 0


def _dispatch(table: Mapping[str, Any], args: Sequence[str], parents: tuple[str, ...] = ()) -> None:
    if args[:1] == ["--version"] and not parents:
        print(f"fffexp {metadata.version('fffexp')}")
    elif not args or args[0] in ("-h", "--help"):
        _print_usage(table, " ".join(parents))
    elif args[0] not in table:
        raise UserError(f"unknown command {' '.join((*parents, args[0]))!r}: give one of {', '.join(table)}")
    elif isinstance(table[args[0]], Mapping):
        _dispatch(table[args[0]], args[1:], (*parents, args[0]))
    else:
        from fffexp.commandline import run_command

        run_command(_load(table[args[0]]), args[1:], " ".join((*parents, args[0])))


def _load(target: str) -> Callable[..., object]:
    module, _, name = target.partition(":")
    function: Callable[..., object] = getattr(import_module(module), name)
    return function


def _print_usage(table: Mapping[str, Any], parents: str) -> None:
    program = f"fffexp {parents}".strip()
    print(f"usage: {program} COMMAND [--help] ...\n")
    if not parents:
        print("Which feedforward layer: dense FF, a mixture of experts or FFF?\n")
    for name, entry in table.items():
        text = f"{' | '.join(entry)}" if isinstance(entry, Mapping) else (_load(entry).__doc__ or "").splitlines()[0]
        print(f"  {name:10} {text}")
    print(f"\n{program} COMMAND --help explains a command.")


def fit(*args: str) -> None:
    """Train a layer by its configs, and test the checkpoint that was best on validation."""
    _experiment("fit", *args)


def validate(*args: str) -> None:
    """Validate a checkpoint (--ckpt_path)."""
    _experiment("validate", *args)


def test(*args: str) -> None:
    """Test a checkpoint (--ckpt_path)."""
    _experiment("test", *args)


def predict(*args: str) -> None:
    """Print what a checkpoint (--ckpt_path) predicts for the test inputs."""
    _experiment("predict", *args)


def _experiment(*args: str) -> None:
    configs.check_devices(configs.given(args))  # at once, before the seconds that Lightning takes
    from fffexp.training.experiment import Context, run

    result = run(args, Context(fresh_process=True))
    if result is not None:
        for name, value in sorted(result.metrics.items()):
            print(f"{name:32} {value:.6g}")
        print(f"run {result.run_id}; compare runs: make ui")


def build() -> None:
    """Compile the CPU kernels now rather than at first use; CXX names the compiler."""
    from fffexp.kernels.build import BuildError, build

    try:
        print(build())
    except BuildError as error:
        raise UserError(str(error)) from error
