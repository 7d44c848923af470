"""Label rules: how a task's 0/1 label follows from a column, and the expressions that name them.

``click=rating>3`` is 1 where the column rating exceeds 3; ``click=is_click`` takes a column that
holds 0 and 1. A row without a value has the label NaN: not observed.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3oe_fast.errors import DataError

OPERATORS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_NAME = r"[^\s=<>!,/]+"
_RULE = re.compile(
    rf"\s*(?P<task>{_NAME})\s*=\s*(?P<column>{_NAME})\s*"
    rf"(?:(?P<comparison>{'|'.join(OPERATORS)})\s*(?P<number>[^\s=<>!,]+)\s*)?"
)


@dataclass(frozen=True)
class LabelRule:
    """One task's label: ``column comparison number``, or without comparison the 0/1 column."""

    task: str
    column: str
    comparison: str | None = None
    number: float = 0.0

    def apply(self, values: np.ndarray, where: str, line: Callable[[int], int | str]) -> np.ndarray:
        """float32 [N] of 0, 1 and NaN from the column's values, float64 [N].

        Args:
            values: the column; NaN = not observed.
            where: the file, for messages.
            line: how messages count row i.

        Raises:
            DataError: a 0/1 column holds something else.
        """
        if self.comparison is None:
            wrong = np.flatnonzero(~(np.isnan(values) | (values == 0) | (values == 1)))
            if len(wrong):
                raise DataError(
                    f"{where}, row {line(int(wrong[0]))}, field {self.column}: label {self.task} "
                    f"is {values[wrong[0]]:g}, not 0 or 1; use a rule: {self.task}={self.column}>3"
                )
            return values.astype(np.float32)
        holds = OPERATORS[self.comparison](values, self.number)
        return np.where(np.isnan(values), np.nan, holds).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "task": self.task,
            "column": self.column,
            "comparison": self.comparison,
            "number": self.number,
        }


def parse_labels(text: str) -> tuple[LabelRule, ...]:
    """Rules from ``TASK=COLUMN OPERATOR NUMBER,...`` (see the module).

    Raises:
        DataError: an expression that is none, a task named twice.
    """
    rules = tuple(_parse_rule(part, "--labels") for part in text.split(","))
    tasks = [rule.task for rule in rules]
    for task in tasks:
        if tasks.count(task) > 1:
            raise DataError(f"--labels {text!r}: task {task} is defined twice; rename one")
    return rules


def parse_rule(task: object, rule: object, where: str) -> LabelRule:
    """The rule of ``task`` from ``COLUMN OPERATOR NUMBER`` or ``COLUMN``; ``where`` is for messages.

    Raises:
        DataError: the task is no name, or the rule none.
    """
    if not isinstance(task, str) or not isinstance(rule, str):
        raise DataError(f"{where}: cannot read {task}: {rule!r}; write for example click: is_click or like: rating>3")
    return _parse_rule(f"{task}={rule}", where)


def _parse_rule(part: str, where: str) -> LabelRule:
    match = _RULE.fullmatch(part)
    try:
        if match is None:
            raise ValueError(part)
        number = float(match["number"] or 0.0)
        if not math.isfinite(number):  # nothing is above, below or equal to nan
            raise ValueError(part)
    except ValueError:
        raise DataError(
            f"{where}: cannot read {part.strip()!r}; write TASK=COLUMN>NUMBER (or >= < <= == !=) "
            "or TASK=COLUMN for a 0/1 column, for example click=rating>3,like=rating>4"
        ) from None
    return LabelRule(match["task"], match["column"], match["comparison"], number)
