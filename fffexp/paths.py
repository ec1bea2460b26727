"""Where outputs go: below one folder, which FFFEXP_OUTPUTS moves."""

import os
from pathlib import Path


def outputs(*parts: str) -> Path:
    """A path below the folder of all that is written without being given a path.

    "checkpoints" has a folder for each run, by its id; "studies" one for each study, by its name; "artifacts" is what
    MLflow keeps beside a local database; "cache" what data had to unpack or tokenize, which is made anew if missing.
    """
    return Path(os.environ.get("FFFEXP_OUTPUTS") or "outputs", *parts)


def tracking_uri(given: str | None = None) -> str:
    """The MLflow store: what was given, else MLFLOW_TRACKING_URI, else SQLite in the outputs."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{outputs('mlflow.db')}"


def storage(given: str | None = None) -> str:
    """The Optuna storage: what was given, else FFFEXP_STORAGE, else SQLite in the outputs."""
    return given or os.environ.get("FFFEXP_STORAGE") or f"sqlite:///{outputs('optuna.db')}"
