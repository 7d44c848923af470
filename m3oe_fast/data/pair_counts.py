"""Rows and labels of each (part, domain) and task, counted piece by piece, and what is odd about them."""

from __future__ import annotations

import numpy as np

from m3oe_fast.data.store import PARTS

MAX_WARNINGS = 10  # lines on domains with one class; a log with a thousand domains has thousands


class PairCounts:
    """Counts over the parts train, val, test, D domains and T tasks.

    Attributes:
        rows: int64 [3,D].
        ones, zeros: int64 [3,D,T], the labels that are 1, and 0; missing ones are neither.
    """

    def __init__(self, domains: tuple[str, ...], tasks: tuple[str, ...]) -> None:
        self.domains, self.tasks = domains, tasks
        self.rows = np.zeros((len(PARTS), len(domains)), np.int64)
        self.ones = np.zeros((*self.rows.shape, len(tasks)), np.int64)
        self.zeros = self.ones.copy()

    def add(self, part: np.ndarray, domain: np.ndarray, label: np.ndarray) -> None:
        """Count n rows.

        Args:
            part: int [n], 0 train, 1 val, 2 test.
            domain: int [n], 0..D-1.
            label: float [n,T] of 0, 1, NaN.
        """
        pair = part.astype(np.int64) * len(self.domains) + domain

        def count(pairs: np.ndarray) -> np.ndarray:
            return np.bincount(pairs, minlength=self.rows.size).reshape(self.rows.shape)

        self.rows += count(pair)
        for task, column in enumerate(label.T):
            self.ones[..., task] += count(pair[column == 1])
            self.zeros[..., task] += count(pair[column == 0])

    def warnings(self) -> list[str]:
        """A line for each (part, domain) without rows or (part, domain, task) without both classes, at first.

        Such a pair is no error: the loss leaves out pairs without labels, and an undefined AUC is null.
        """
        lines = []
        for place, part in enumerate(PARTS):
            for d, domain in enumerate(self.domains):
                if not self.rows[place, d]:
                    lines.append(f"{part} has no rows of domain {domain}")
                    continue
                for task, ones, zeros in zip(self.tasks, self.ones[place, d], self.zeros[place, d], strict=True):
                    if not ones or not zeros:
                        lines.append(
                            f"{part}, domain {domain}, task {task}: {ones} positive and {zeros} negative "
                            "labels, so its AUC is undefined"
                        )
        rest = len(lines) - MAX_WARNINGS
        return lines if rest <= 0 else [*lines[:MAX_WARNINGS], f"{rest} more domains or tasks like these"]
