"""Training on samples."""

from ssd_core.train.config import TrainConfig

__all__ = ["TrainConfig"]
