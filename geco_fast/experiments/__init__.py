"""Training runs: configuration, loop, checkpoints, metrics, pictures."""

from geco_fast.experiments.config import TrainConfig, TrainError
from geco_fast.experiments.evaluate import evaluate
from geco_fast.experiments.trainer import Interrupted, train

__all__ = ["Interrupted", "TrainConfig", "TrainError", "evaluate", "train"]
