"""What the columns of a prepared log are: names and sizes, nothing per row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DOMAIN_FIELD = "domain"  # the domain is also an id field, as in the published code


@dataclass(frozen=True)
class Schema:
    """Names and sizes, in the order of the columns of ``Batch``.

    Attributes:
        fields: the F id fields; the last is the domain.
        vocab_sizes: rows of each field's embedding table: n known ids + 1, row 0 = unknown.
        dense: the C dense features, scaled to [0, 1].
        domains: the D domain names.
        tasks: the T task names.
        bags: the multi-hot fields.
        bag_vocab_sizes: rows of each bag's embedding table, row 0 = unknown.
        bag_pooling: how the embeddings of a row's values become one: "mean" or "sum", for each bag.
        weighted: whether rows carry a weight of their loss.
    """

    fields: tuple[str, ...]
    vocab_sizes: tuple[int, ...]
    dense: tuple[str, ...]
    domains: tuple[str, ...]
    tasks: tuple[str, ...]
    bags: tuple[str, ...] = ()
    bag_vocab_sizes: tuple[int, ...] = ()
    bag_pooling: tuple[str, ...] = ()
    weighted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Schema:
        """The inverse of ``to_dict``."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
