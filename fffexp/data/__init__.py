"""Data sets as Lightning data modules: embedded, on disk, or from the hub."""

from fffexp.data.base import Batches, ClassificationData
from fffexp.data.digits import Digits
from fffexp.data.hub import Hub
from fffexp.data.idx import IDX, FashionMNIST

__all__ = ["IDX", "Batches", "ClassificationData", "Digits", "FashionMNIST", "Hub"]
