"""Where outputs go: below one folder, which FFFEXP_OUTPUTS moves."""

import os
from pathlib import Path


def outputs() -> Path:
    """The folder of all that is written without being given a path."""
    return Path(os.environ.get("FFFEXP_OUTPUTS") or "outputs")


def checkpoints() -> Path:
    """The checkpoints of each run, in a folder named by its id."""
    return outputs() / "checkpoints"


def studies() -> Path:
    """The results of each study, in a folder of its name."""
    return outputs() / "studies"


def artifacts() -> Path:
    """What MLflow keeps beside its database, where that is a local one."""
    return outputs() / "artifacts"


def tracking_uri(given: str | None = None) -> str:
    """The MLflow store: what was given, else MLFLOW_TRACKING_URI, else SQLite in the outputs."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{outputs() / 'mlflow.db'}"


def storage(given: str | None = None) -> str:
    """The Optuna storage: what was given, else FFFEXP_STORAGE, else SQLite in the outputs."""
    return given or os.environ.get("FFFEXP_STORAGE") or f"sqlite:///{outputs() / 'optuna.db'}"
