"""scikit-learn's handwritten digits: no download, no files."""

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fffexp.data.base import InMemoryData, Part, Rows, pixels


class Digits(InMemoryData):
    """1797 handwritten digits of 8 x 8 pixels (UCI repository, the copy inside scikit-learn).

    The test part is a fixed, stratified fifth. Of the rest, stratified fold `seed % 5` is for validation;
    the folds are dealt anew by `seed // 5`, so that seeds 0 to 4 are the five folds of one deal.
    """

    in_shape = (1, 8, 8)
    num_classes = 10

    @override
    def load(self, part: Part) -> Rows:
        # 1.5 s that the other data sets should not pay for
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        rows = train if part == "train" else test
        return pixels(images[rows] / 16).reshape(-1, *self.in_shape), torch.from_numpy(labels[rows]).long()

    @override
    def split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        from sklearn.model_selection import StratifiedKFold

        deal, fold = divmod(self.seed, 5)
        train, val = list(StratifiedKFold(5, shuffle=True, random_state=deal).split(labels, labels))[fold]
        return torch.from_numpy(train), torch.from_numpy(val)
