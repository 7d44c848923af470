"""The demo log: generated, so that the best reachable AUC is known.

An app with three tabs (the domains, 65/25/10 % of the rows) shows items to users and logs three
tasks: click, like and long_view. The score (logit) of a task adds effects that a multi-domain
multi-task model should tell apart:

    shared   user and item leanings, the user segment's affinity for the category, taste . trait
    domain   what a tab makes of categories, hours and fresh items
    task     base rate, what a task makes of users, items, categories (also by tab), long clips

The noise of the tasks is correlated (one row's tasks share it with probability 0.4), and a tenth
of the like labels is missing at random. Rows stand in order of time.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from m3oe_fast.data.columns import Tokens
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.rawlog import RawLog, Source

VERSION = 2  # raise it when the rows change: prepared logs are found again by it
ROWS, SEED = 200_000, 0
TABS = ("home", "discover", "live")
TAB_SHARE = (0.65, 0.25, 0.10)
TASKS = ("click", "like", "long_view")
BASE = (-0.6, -1.6, -1.1)  # logit of each task where every effect is zero
USERS, ITEMS, SEGMENTS, CATEGORIES, DEVICES, TASTES = 1_000, 400, 8, 20, 3, 4
FIRST_SECOND, DAYS = 1_699_920_000, 14
SHARED_NOISE, LIKE_MISSING = 0.4, 0.1


def find() -> Source:
    """The demo log of ``ROWS`` rows and ``SEED``."""
    identity = {"version": VERSION, "rows": ROWS, "seed": SEED}
    return Source("demo", identity, generate)


def generate(rows: int = ROWS, seed: int = SEED) -> RawLog:
    """The log; the same bytes for the same arguments.

    Args:
        rows: at least 1.
        seed: not negative.
    """
    rng = np.random.default_rng(seed)
    columns, dense, domain, time = _impressions(rng, rows)
    probability = 1 / (1 + np.exp(-_logits(rng, columns, dense, domain)))
    return RawLog(
        where="demo",
        fields={name: Tokens.merged(codes, _names(codes)) for name, codes in columns.items()},
        dense=dense,
        domain=domain,
        domain_rule=DomainRule("tab", texts=TABS),
        label=_labels(rng, probability),
        label_rules=tuple(LabelRule(task, task) for task in TASKS),
        user=Tokens(columns["user_id"], tuple(_names(columns["user_id"]))),
        time=time,
        probability=probability,
    )


def frame(rows: int = ROWS, seed: int = SEED) -> pd.DataFrame:
    """The same log as raw rows, as an application would hand them to ``Encoder.transform``."""
    log = generate(rows, seed)
    ids = {name: np.array(column.values)[column.codes] for name, column in log.fields.items()}
    labels = {task: log.label[:, place] for place, task in enumerate(TASKS)}
    return pd.DataFrame({**ids, **log.dense, "tab": np.array(TABS)[log.domain], **labels})


def _impressions(
    rng: np.random.Generator, rows: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """What was shown: id columns int32 [rows], dense float64, domain int32, time float64."""
    second = np.sort(rng.integers(0, DAYS * 86_400, rows))
    user = rng.choice(USERS, rows, p=_long_tail(USERS))
    item = rng.choice(ITEMS, rows, p=_long_tail(ITEMS))
    born = rng.uniform(-30, 0, ITEMS)
    seconds = rng.lognormal(3.3, 0.6, ITEMS)
    columns = {
        "user_id": user,
        "item_id": item,
        "segment": rng.integers(0, SEGMENTS, USERS)[user],
        "category": rng.integers(0, CATEGORIES, ITEMS)[item],
        "device": rng.choice(DEVICES, USERS, p=(0.55, 0.35, 0.10))[user],
        "hour": second // 3600 % 24,
    }
    dense = {"item_age_days": second / 86_400 - born[item], "video_seconds": seconds[item]}
    domain = rng.choice(len(TABS), rows, p=TAB_SHARE)
    columns = {name: column.astype(np.int32) for name, column in columns.items()}
    return columns, dense, domain.astype(np.int32), FIRST_SECOND + second.astype(np.float64)


def _logits(
    rng: np.random.Generator,
    columns: dict[str, np.ndarray],
    dense: dict[str, np.ndarray],
    domain: np.ndarray,
) -> np.ndarray:
    """The score of every row and task, float64 [rows,T]."""
    user, item = columns["user_id"], columns["item_id"]
    segment, category, hour = columns["segment"], columns["category"], columns["hour"]

    def effect(scale: float, *shape: int) -> np.ndarray:
        return rng.normal(0.0, scale, shape)

    tabs, tasks = len(TABS), len(TASKS)
    taste, trait = effect(1.0, USERS, TASTES), effect(0.15, ITEMS, TASTES)
    fresh = np.exp(-dense["item_age_days"] / 10)
    long = np.log(dense["video_seconds"]) - 3.3
    shared = effect(0.8, USERS)[user] + effect(0.8, ITEMS)[item]
    shared += effect(0.6, SEGMENTS, CATEGORIES)[segment, category]
    shared += (taste[user] * trait[item]).sum(axis=1)
    shared += effect(0.6, tabs, CATEGORIES)[domain, category] + effect(0.2, tabs, 24)[domain, hour]
    shared += np.array([0.3, 1.5, -0.8])[domain] * fresh
    own = effect(0.2, tasks, USERS)[:, user] + effect(0.3, tasks, ITEMS)[:, item]
    own += effect(0.4, tasks, tabs, CATEGORIES)[:, domain, category]
    own += effect(0.15, tasks, SEGMENTS, CATEGORIES)[:, segment, category]
    own += np.array([0.2, 0.0, -0.8])[:, None] * long  # long clips are opened, but seldom seen to the end
    return np.array(BASE) + shared[:, None] + own.T


def _labels(rng: np.random.Generator, probability: np.ndarray) -> np.ndarray:
    """Labels float32 [rows,T], each 1 with its probability; some rows share one draw."""
    rows, tasks = probability.shape
    together = rng.random((rows, 1)) < SHARED_NOISE
    draw = np.where(together, rng.random((rows, 1)), rng.random((rows, tasks)))
    label = (draw < probability).astype(np.float32)
    label[rng.random(rows) < LIKE_MISSING, TASKS.index("like")] = np.nan
    return label


def _long_tail(size: int) -> np.ndarray:
    """Shares of ``size`` users or items: the r-th takes 1 / (r + size/10)."""
    share = 1 / (np.arange(size) + size / 10)
    return share / share.sum()


def _names(codes: np.ndarray) -> list[str]:
    return [str(code) for code in range(int(codes.max()) + 1)]
