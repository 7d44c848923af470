"""Second pass over a streamed log: encode chunk after chunk, append each row to its part, count."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from m3oe_fast.data.census import take_census
from m3oe_fast.data.chunk import Chunk
from m3oe_fast.data.encode import Encoder
from m3oe_fast.data.fit import fit
from m3oe_fast.data.log_schema import LogSchema
from m3oe_fast.data.pair_counts import PairCounts
from m3oe_fast.data.published_counts import Published
from m3oe_fast.data.schema import DOMAIN_FIELD
from m3oe_fast.data.store import DATASET, ENCODER, PARTS, Columns, PartFile, PartWriter, smallest_uint, write_json
from m3oe_fast.data.stream_split import make_split
from m3oe_fast.data.table import take_bag
from m3oe_fast.data.tabular import TabularLog

USERS_AT_A_TIME = 1 << 21  # rows whose users are told apart in memory together
BLOCK_ROWS = 1 << 18


def build_stream(
    folder: Path, log: TabularLog, split: str, split_seed: int, identity: str, published: Published | None = None
) -> None:
    """Write every file of the prepared log but the manifest into ``folder`` (existing, empty).

    Args:
        folder, log: from where, to where.
        split, split_seed: how its rows are divided.
        identity: digest of everything the rows depend on.
        published: counts that the log must have.

    Raises:
        DataError: the split is impossible, a value does not fit, or the log has other counts.
        OSError: the folder cannot be written.
    """
    notes, differences = _counted(log, published)
    divided = make_split(log, split, split_seed, folder)
    encoder, warnings = fit(log, divided)
    pairs = PairCounts(encoder.schema.domains, encoder.schema.tasks)
    wanted = {*log.columns("ids", "dense", "bags", "domain", "labels", "user", "weight"), *divided.columns}
    assign = divided.start()
    with ExitStack() as stack:
        writers = [stack.enter_context(PartWriter(folder / f"{part}.arrow")) for part in PARTS]
        for chunk in log.chunks(sorted(wanted)):
            part, columns = assign(chunk), encode_chunk(chunk, log.schema, encoder)
            pairs.add(part, columns["domain"], columns["label"])
            for place, writer in enumerate(writers):
                rows = np.flatnonzero(part == place)
                if len(rows):
                    writer.append({name: _taken(column, rows) for name, column in columns.items()})
    write_json(folder / ENCODER, encoder.to_dict())
    facts = {
        "name": log.name,
        "split": split,
        "split_seed": split_seed,
        "identity": identity,
        "best_auc": None,
        "counts": _counts(folder, pairs, has_users=log.schema.user is not None),
        "notes": notes,
        "warnings": [*differences, *warnings, *pairs.warnings()],
    }
    write_json(folder / DATASET, facts)


def encode_chunk(chunk: Chunk, schema: LogSchema, encoder: Encoder) -> Columns:
    """The columns of a part's file (see ``store``) for the rows of ``chunk``."""
    sizes = dict(zip(encoder.schema.fields, encoder.schema.vocab_sizes, strict=True))
    domain = chunk.domain(encoder.domain_rule)
    columns: Columns = {}
    for column in schema.ids:
        codes, texts = chunk.texts(column.name)
        ids = np.append(encoder.ids_of(column.name, texts), np.int32(0))
        columns[f"id:{column.name}"] = ids.astype(smallest_uint(sizes[column.name]))[codes]
    ids = encoder.ids_of(DOMAIN_FIELD, encoder.schema.domains)
    columns[f"id:{DOMAIN_FIELD}"] = ids.astype(smallest_uint(sizes[DOMAIN_FIELD]))[domain]
    for bag in schema.bags:
        (codes, texts), offsets = chunk.bag(bag.name, bag.separator)
        columns[f"bag:{bag.name}"] = encoder.ids_of(bag.name, texts).astype(np.uint32)[codes], offsets
    dense = np.empty((len(chunk), len(schema.dense)), np.float32)
    for place, name in enumerate(schema.dense):
        dense[:, place] = encoder.scale(name, chunk.dense(name))
    columns["dense"] = dense
    columns["domain"] = domain.astype(smallest_uint(len(encoder.schema.domains)))
    columns["label"] = chunk.label(schema.labels)
    if schema.weight is not None:
        columns["weight"] = chunk.weight(schema.weight)
    if schema.user is not None:
        columns["user"] = chunk.user(schema.user)
    return columns


def _counted(log: TabularLog, published: Published | None) -> tuple[list[str], list[str]]:
    """A note on the rows that are left out, and warnings about counts that differ from published ones."""
    if published is None and not log.schema.drop_others:
        return [], []
    census = take_census(log, () if published is None else tuple(published.counts.distinct))
    notes = [census.note(log.schema.domain.names)]
    return notes, [] if published is None else published.check(str(log.path), census.counts, census.rows)


def _taken(column: np.ndarray | tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> Any:
    return take_bag(*column, rows) if isinstance(column, tuple) else column[rows]


def _counts(folder: Path, pairs: PairCounts, has_users: bool) -> dict[str, Any]:
    """As ``Dataset.counts``; the users are read from the files in ``folder``."""
    none = [(None, None, [None] * len(pairs.domains))] * len(PARTS)
    users = count_users(folder, pairs.rows) if has_users else none
    return {
        part: {
            "rows": int(rows.sum()),
            "users": total,
            "new_users": new,
            "domains": {
                name: {"rows": int(count), "users": own}
                for name, count, own in zip(pairs.domains, rows, by_domain, strict=True)
            },
        }
        for part, rows, (total, new, by_domain) in zip(PARTS, pairs.rows, users, strict=True)
    }


def count_users(folder: Path, rows: np.ndarray) -> list[tuple[int, int, list[int]]]:
    """For each part its distinct users, those not among the training users, and the users of each domain.

    Exact in bounded memory: users are told apart one range of their hashes after the other.

    Args:
        folder: holds the parts' files.
        rows: int64 [3,D], the rows of each part and domain.
    """
    passes = 1 << int(np.ceil(np.log2(max(rows.sum() / USERS_AT_A_TIME, 1))))
    totals, new = np.zeros(len(PARTS), np.int64), np.zeros(len(PARTS), np.int64)
    by_domain = np.zeros_like(rows)
    for number in range(passes):
        train = None
        for place, part in enumerate(PARTS):
            pairs = _pairs(folder / f"{part}.arrow", number, passes)
            users = pairs["user"].unique()
            train = users if train is None else train
            totals[place] += len(users)
            new[place] += len(np.setdiff1d(users, train, assume_unique=True))
            by_domain[place] += np.bincount(pairs["domain"], minlength=rows.shape[1])
    return list(zip(totals.tolist(), new.tolist(), by_domain.tolist(), strict=True))


def _pairs(path: Path, number: int, passes: int) -> pd.DataFrame:
    """The distinct (user, domain) of a file whose user lies in range ``number`` of ``passes`` (a power of 2)."""
    file = PartFile(path)
    shift = np.int64(63 - (passes.bit_length() - 1))
    found = [pd.DataFrame({"user": np.empty(0, np.int64), "domain": np.empty(0, np.int64)})]
    for segment in file.segments:
        for start in range(0, len(segment["domain"]), BLOCK_ROWS):
            block = {}
            for name in ("user", "domain"):
                view = segment[name][start : start + BLOCK_ROWS]
                block[name] = np.empty(view.shape, view.dtype)
                file.copyto(block[name], view)
            user = block["user"]
            # -1 is nobody. With one pass the shift is 63, which leaves 0 of every other.
            kept = (user >= 0) & (user >> shift == number)
            pairs = pd.DataFrame({"user": user[kept], "domain": block["domain"][kept].astype(np.int64)})
            found.append(pairs.drop_duplicates())
    return pd.concat(found).drop_duplicates()
