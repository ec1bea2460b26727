"""`fffexp study run|show|resume`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fffexp import paths
from fffexp.commandline import PositiveInt
from fffexp.errors import UserError, terminated_by_signal

if TYPE_CHECKING:
    from fffexp.study.spec import StudySpec


def run(file: Path, jobs: PositiveInt = 1, storage: str | None = None, tracking_uri: str | None = None) -> None:
    """Run a study, or join it where it is already running.

    Args:
        file: study file, such as studies/digits_depth_leaf.yaml.
        jobs: worker processes on this machine.
        storage: Optuna storage (default: FFFEXP_STORAGE, else sqlite:///outputs/optuna.db).
        tracking_uri: MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///outputs/mlflow.db).
    """
    from fffexp.study.spec import load

    spec, text = load(file)
    _run(spec, text, jobs, paths.storage(storage), tracking_uri)


def resume(name: str, jobs: PositiveInt = 1, storage: str | None = None, tracking_uri: str | None = None) -> None:
    """Go on with a study that was interrupted.

    Args:
        name: of the study.
        jobs: worker processes on this machine.
        storage: Optuna storage (default: FFFEXP_STORAGE, else sqlite:///outputs/optuna.db).
        tracking_uri: MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///outputs/mlflow.db).
    """
    import optuna

    from fffexp.study.spec import parse
    from fffexp.study.store import open_storage

    url = paths.storage(storage)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    opened = open_storage(url)
    known = [n for n in optuna.get_all_study_names(opened) if not n.endswith("/finalists")]
    if name not in known:
        raise UserError(f"no study {name!r} in {url}; there are: {', '.join(known) or 'none'}")
    attrs = optuna.load_study(study_name=name, storage=opened).user_attrs
    if "digest" not in attrs:
        raise UserError(f"study {name!r} was interrupted before it began: use `fffexp study run` with its file")
    spec = parse(attrs["text"], Path(attrs["folder"]), f"of study {name}")
    _run(spec, attrs["text"], jobs, url, tracking_uri)


def show(name: str, max_latency_ms: float | None = None, trials: bool = False, against: int | None = None) -> None:
    """Print the best finalist within a latency budget, beside the best FF; or all trials of the search.

    Args:
        name: of the study, or a summary.json.
        max_latency_ms: largest latency of a batch of 256, in milliseconds.
        trials: print every trial, the best first, and how far it is from the best.
        against: number of the trial, of whatever layer, to print the differences to instead.
    """
    from fffexp.report import listing, text

    path = Path(name) if name.endswith(".json") else paths.studies() / name / "summary.json"
    if not path.is_file():
        raise UserError(f"{path} is not there: run the study first, from this folder (fffexp study run FILE)")
    if trials and max_latency_ms is not None:
        raise UserError("--trials lists the search, which --max_latency_ms does not choose from: leave one out")
    if against is not None and not trials:
        raise UserError("--against is for the list of trials: add --trials")
    try:
        summary = json.loads(path.read_text())
        known = summary.keys() >= {"study", "trials", "finalists"}
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise UserError(f"{path} is no summary of a study: give a study's name, or the summary.json of one")
    print(listing.trials(summary, against) if trials else text.show(summary, max_latency_ms))


def _run(spec: "StudySpec", text: str, jobs: int, url: str, tracking_uri: str | None) -> None:
    from fffexp.report.text import table
    from fffexp.study.runner import StudyRunner

    uri = paths.tracking_uri(tracking_uri)
    print(
        f"study {spec.name}: {spec.trials} trials, {jobs} jobs; Ctrl-C stops, `fffexp study resume {spec.name}` goes on"
    )
    with terminated_by_signal():
        result = StudyRunner(spec, text, url, uri, jobs).run()
    print(f"\n{table(result)}\n")
    print(
        f"took {result['wall_s']:.0f} s; written to {paths.studies() / spec.name}: report.html, pareto.png, history.png"
    )
    print(f"next: make ui, or fffexp study show {spec.name} --max_latency_ms 0.5")
