"""Data sets as Lightning data modules: embedded, on disk, or from the hub."""

from fffexp.data.base import Batches, InMemoryData
from fffexp.data.digits import Digits
from fffexp.data.hub import Hub
from fffexp.data.idx import IDX, FashionMNIST
from fffexp.data.table import Table
from fffexp.data.text import Text

__all__ = ["IDX", "Batches", "Digits", "FashionMNIST", "Hub", "InMemoryData", "Table", "Text"]
