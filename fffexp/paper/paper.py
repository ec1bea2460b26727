"""What arXiv 2308.14711 prints: accuracies in percent, the best of ten runs."""

WIDTHS = (16, 32, 64, 128)
LEAF_WIDTHS = (8, 4, 2, 1)

# Table 1: M_A and G_A by data, leaf width (None: FF) and training width in the order of WIDTHS
TABLE1: dict[str, dict[int | None, tuple[tuple[float, float], ...]]] = {
    "fashion_mnist": {
        None: ((91.0, 86.4), (94.8, 87.8), (98.5, 89.0), (99.3, 89.6)),
        8: ((86.7, 84.2), (87.8, 85.2), (88.8, 85.2), (90.5, 86.1)),
        4: ((86.4, 83.3), (86.6, 84.5), (89.1, 85.1), (89.0, 85.4)),
        2: ((84.5, 83.0), (85.4, 82.9), (87.2, 84.1), (87.3, 84.3)),
        1: ((79.7, 78.4), (79.4, 77.8), (79.9, 79.5), (78.7, 77.7)),
    },
    "mnist": {
        None: ((98.0, 95.2), (100, 96.6), (100, 97.7), (100, 98.1)),
        8: ((94.6, 93.1), (96.5, 93.9), (97.7, 94.2), (99.3, 94.9)),
        4: ((91.6, 90.8), (96.2, 93.1), (96.7, 93.3), (97.6, 93.6)),
        2: ((92.1, 90.3), (94.0, 91.4), (95.2, 92.1), (96.2, 92.4)),
        1: ((91.7, 89.9), (94.4, 92.0), (94.5, 91.4), (94.1, 92.0)),
    },
    "usps": {
        None: ((100, 93.1), (100, 93.7), (100, 94.1), (100, 94.2)),
        8: ((99.3, 92.2), (99.2, 91.8), (99.2, 92.3), (99.5, 92.1)),
        4: ((94.1, 87.6), (97.2, 89.5), (97.6, 90.6), (97.1, 90.3)),
        2: ((92.0, 85.5), (93.4, 86.4), (90.6, 84.4), (94.3, 88.1)),
        1: ((83.4, 77.0), (77.3, 74.2), (79.2, 77.1), (81.4, 77.8)),
    },
}


# Table 2, CIFAR10: M_A, its epoch, G_A, its epoch by layer and training width
TABLE2_WIDTHS = (64, 128, 256, 512, 1024)
TABLE2: dict[str, tuple[tuple[float, int, float, int], ...]] = {
    "FF": (
        (87.2, 307, 49.3, 55),
        (95.5, 200, 51.5, 46),
        (99.9, 105, 52.0, 48),
        (99.9, 85, 52.4, 31),
        (99.9, 82, 53.0, 21),
    ),
    "NoisyTopKMoE": (
        (57.8, 5354, 29.4, 4880),
        (62.0, 6074, 33.6, 938),
        (62.4, 2001, 33.9, 372),
        (65.4, 3834, 34.5, 315),
        (65.3, 1575, 35.2, 327),
    ),
    "FFF": (
        (85.8, 302, 45.9, 22),
        (90.1, 305, 45.5, 22),
        (91.2, 244, 44.4, 17),
        (96.2, 175, 43.7, 10),
        (96.0, 180, 41.3, 9),
    ),
}


# Table 3, CIFAR10: G_A by leaf width (None: FF) at a training width of 128
TABLE3 = {None: 84.7, 32: 83.6, 16: 83.2, 8: 82.8, 4: 81.6, 2: 80.1, 1: 79.8}


def printed3(leaf_width: int | None) -> dict[str, float]:
    """Metrics of a cell of table 3, none where the paper has none."""
    return {"G_A": TABLE3[leaf_width]} if leaf_width in TABLE3 else {}


def printed2(layer: str, training_width: int) -> dict[str, float]:
    """Metrics of a cell of table 2, none where the paper has none."""
    if layer not in TABLE2 or training_width not in TABLE2_WIDTHS:
        return {}
    row = TABLE2[layer][TABLE2_WIDTHS.index(training_width)]
    return dict(zip(("M_A", "ETT_M", "G_A", "ETT_G"), row, strict=True))


def printed(data: str, leaf_width: int | None, training_width: int) -> tuple[float, float] | None:
    """(M_A, G_A) of a cell of table 1, None where the paper has none."""
    row = TABLE1.get(data, {}).get(leaf_width)
    return row[WIDTHS.index(training_width)] if row and training_width in WIDTHS else None
