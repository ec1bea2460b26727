"""Searches over layers: what a study file says, running it, and what came out."""

import warnings

from optuna.exceptions import ExperimentalWarning

# heartbeats and the grouped sampler are chosen knowingly, and pinned
warnings.filterwarnings("ignore", category=ExperimentalWarning)
# a worker takes its trials itself, because taking them has to be locked, and keeps their heartbeats
warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with Study.optimize", UserWarning)
