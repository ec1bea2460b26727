"""The one entry point: `fffexp fit|validate|test|predict|study|bench|reproduce|build`."""

import os
import sys
from collections.abc import Callable, Sequence

from fffexp.errors import NonFiniteLossError, UserError

USAGE = """usage: fffexp COMMAND [--help] ...

Which feedforward layer: dense FF, noisy top-k MoE or FFF?

  fit       train a layer by its configs, test the checkpoint that was best on validation
  validate  validation accuracy of a checkpoint (--ckpt_path)
  test      test accuracy of a checkpoint
  predict   classes of the test inputs by a checkpoint
  study     run, resume or show a search over layers (fffexp study --help)
  bench     benchmarks (fffexp bench --help)
  reproduce a paper's figure or table, measured again (fffexp reproduce --help)
  build     compile the CPU kernels now rather than at first use

fffexp COMMAND --help tells what a command takes.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 failed, 2 the user's mistake, told in one line."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "study": _study,
        "bench": _bench,
        "reproduce": _reproduce,
        "build": _build,
    }
    commands |= dict.fromkeys(("fit", "validate", "test", "predict"), _experiment)
    try:
        if args[0] not in commands:
            raise UserError(f"unknown command {args[0]!r}: one of {', '.join(commands)}")
        return commands[args[0]](args)
    except UserError as error:
        print(f"fffexp: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"fffexp: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fffexp: interrupted", file=sys.stderr)
        return 130


def _experiment(args: list[str]) -> int:
    # told before Lightning and torch are imported, which takes seconds
    from fffexp.errors import terminated_by_signal
    from fffexp.training.experiment import Context, run

    with terminated_by_signal():
        result = run(args, Context(fresh_process=True))
    if result is not None:
        for name, value in sorted(result.metrics.items()):
            print(f"{name:32} {value:.6g}")
        print(f"run {result.run_id}; compare runs: make ui")
    return 0


def _study(args: list[str]) -> int:
    from fffexp.study.commands import main as study

    return study(args[1:])


def _bench(args: list[str]) -> int:
    if args[1:2] in (["inference"], ["model"]):
        _use_huge_pages()
    from fffexp.bench.commands import main as bench

    return bench(args[1:])


def _reproduce(args: list[str]) -> int:
    if args[1:2] == ["figure3"]:
        _use_huge_pages()
    from fffexp.errors import terminated_by_signal
    from fffexp.paper.commands import main as reproduce

    with terminated_by_signal():  # the processes that train end with this one
        return reproduce(args[1:])


def _use_huge_pages() -> None:
    # For all contenders and limits alike: else the time of a large layer is in part that of page tables. Training
    # keeps torch's default, in which fresh memory is a part of a step. Torch, which is imported later, looks at its
    # first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _build(args: list[str]) -> int:
    from fffexp.kernels.build import BuildError, build

    if args[1:]:
        raise UserError("fffexp build takes no options; CXX names the compiler")
    try:
        print(build())
    except BuildError as error:
        raise UserError(str(error)) from error
    return 0
