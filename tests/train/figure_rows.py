"""Rows of a comparison, and a table's cells read back, for the tests of tables and pictures."""

import itertools

import numpy as np

from amtml_fast.train.figures.tables import Row

LABELS = {"avg_mkd": "AvgMKD", "amtml_kd": "AMTML-KD"}


def rows() -> list[Row]:
    return [
        Row("student", "Student alone", 75290, [0.89, 0.90, 0.94], 10.0),
        Row("avg_mkd", "AvgMKD", 75290, [0.91, 0.93, 0.92], 12.0),
        Row("amtml_kd", "AMTML [KD] | ours", 75290, [0.92, 0.94, 0.93], 13.5),
    ]


def teachers() -> list[Row]:
    return [Row("wide", "cnn-wide", 1234567, [0.99])]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("\\|", "¦").strip("| ").split(" | ")]


def grid(counts=(1, 3), students=("resnet8",), seeds=3, methods=("avg_mkd", "amtml_kd")) -> list[Row]:
    """Methods x students x numbers of teachers, and the student alone."""
    rng = np.random.default_rng(0)
    out = []
    for s, student in enumerate(students):
        accuracies = [0.9 + 0.01 * s + rng.normal(0, 0.001) for _ in range(seeds)]
        out.append(Row("student", "Student alone", 75290 * (s + 1), accuracies, student=student))
        for (m, method), count in itertools.product(enumerate(methods), counts):
            mean = 0.91 + 0.01 * s + 0.004 * m + 0.003 * count
            accuracies = [mean + rng.normal(0, 0.001) for _ in range(seeds)]
            label = LABELS.get(method, f"Method {method} with a long name")
            out.append(Row(method, label, 75290 * (s + 1), accuracies, student=student, teachers=count))
    return out
