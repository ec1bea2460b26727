"""The one entry point: a table from commands to functions."""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pkgutil import resolve_name
from typing import Any

from fffexp import configs
from fffexp.errors import NonFiniteLossError, UserError, report, terminated_by_signal

EXPERIMENT = {
    "fit": "Train a layer by its configs, and test the checkpoint that was best on validation.",
    "validate": "Validate a checkpoint (--ckpt_path).",
    "test": "Test a checkpoint (--ckpt_path).",
    "predict": "Print what a checkpoint (--ckpt_path) predicts for the test inputs, or continue a text (--prompt).",
}
STUDY = ("run", "resume", "show", "trials", "best", "delete", "clean")
TABLES = ("table1", "table2", "table3", "figure3", "figure5", "figure6", "conversion", "minilm", "text")
# else "module:function", of modules that import quickly; how a typed function becomes a command: see commandline.py
COMMANDS: Mapping[str, Any] = {
    **EXPERIMENT,
    "study": {name: f"fffexp.study.commands:{name}" for name in STUDY},
    "report": "fffexp.study.commands:report",
    "bench": {name: f"fffexp.bench.commands:{name}" for name in ("inference", "training", "model", "overhead")},
    "reproduce": {name: f"fffexp.paper.commands:{name}" for name in TABLES},
    "build": "fffexp.cli:build",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 failed, 2 the user's mistake, reported in one line."""
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.append(os.getcwd())  # so that `class_path: own.Net` finds own.py; last, to hide no installed package
    try:
        with terminated_by_signal():
            _dispatch(COMMANDS, sys.argv[1:] if argv is None else argv)
    except (UserError, NonFiniteLossError, KeyboardInterrupt) as error:
        report(str(error) or "interrupted")
        return 2 if isinstance(error, UserError) else 1 if isinstance(error, NonFiniteLossError) else 130
    return 0


def _dispatch(table: Mapping[str, Any], args: Sequence[str], parents: tuple[str, ...] = ()) -> None:
    name, *rest = args or ["--help"]
    command = (*parents, name)
    if command == ("--version",):
        print(f"fffexp {metadata.version('fffexp')}")
    elif name in ("-h", "--help"):
        _print_usage(table, " ".join(["fffexp", *parents]))
    elif name not in table:
        raise UserError(f"unknown command {' '.join(command)!r}: give one of {', '.join(table)}")
    elif isinstance(table[name], Mapping):
        _dispatch(table[name], rest, command)
    elif table[name] in EXPERIMENT.values():
        _experiment(args)
    else:
        from fffexp.commandline import run_command

        run_command(resolve_name(table[name]), rest, " ".join(command))


def _print_usage(table: Mapping[str, Any], program: str) -> None:
    print(f"usage: {program} COMMAND [--help] ...\n")
    if table is COMMANDS:
        print("Which feedforward layer: a dense one, a mixture of experts or a tree?\n")
    for name, entry in table.items():
        text = " | ".join(entry) if isinstance(entry, Mapping) else EXPERIMENT.get(name)
        print(f"  {name:10} {text or resolve_name(entry).__doc__.splitlines()[0]}")
    print(f"\n{program} COMMAND --help explains a command.")


def _experiment(args: Sequence[str]) -> None:
    configs.given(args)  # which refuses mistakes at once, before the seconds that Lightning takes
    from fffexp.training.experiment import Context, run

    result = run(args, Context(fresh_process=True))
    if result is not None:
        print(*(f"{name:32} {value:.6g}" for name, value in sorted(result.metrics.items())), sep="\n")
        print(f"run {result.run_id}; compare runs: make ui")


def build() -> None:
    """Compile the CPU kernels now rather than at first use; CXX names the compiler."""
    from fffexp.kernels.build import BuildError, build

    try:
        print(build())
    except BuildError as error:
        raise UserError(str(error)) from error
