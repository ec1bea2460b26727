"""Data sets as Lightning data modules: embedded, on disk, or from the hub."""

from fffexp.data.arrays import Arrays
from fffexp.data.base import Batches, InMemoryData
from fffexp.data.digits import Digits
from fffexp.data.hub import Hub
from fffexp.data.idx import IDX, FashionMNIST
from fffexp.data.images import ImageFolder
from fffexp.data.table import Table
from fffexp.data.text import Text

__all__ = ["IDX", "Arrays", "Batches", "Digits", "FashionMNIST", "Hub", "ImageFolder", "InMemoryData", "Table", "Text"]
