"""KuaiRand-Pure and KuaiRand-1K: views of short videos, domains by tab, tasks click and long_view, as in the paper.

Three logs (two of what the recommender showed, one of videos shown at random) are read one after the other and joined
with the features of users and videos. Rows of tabs that are no domain are left out. No column that follows from what
the user did is a feature, and neither is video_features_statistic, which sums up the whole month: it knows the future.
Format: the tables on the publisher's page (``catalogue``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from m3oe_fast.data.archive import Archive, kind_of
from m3oe_fast.data.catalogue import CATALOGUE
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.joined import Computed, JoinedFile, SideTable
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.log_files import CsvFile
from m3oe_fast.data.log_schema import BagColumn, IdColumn, LogSchema
from m3oe_fast.data.options import Exposure
from m3oe_fast.data.published_counts import Counts, Published
from m3oe_fast.data.tabular import TabularLog, check_columns, file_digest
from m3oe_fast.data.unpack import unpack
from m3oe_fast.errors import DataError

TABS = "0,1,4"
STANDARD = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
RANDOM = ("log_random_4_22_to_5_08",)
USERS, VIDEOS = "user_features", "video_features_basic"
USER_FIELDS = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{number}" for number in range(18)),
)
VIDEO_FIELDS = (
    "author_id",
    "video_type",
    "upload_dt",
    "upload_type",
    "visible_status",
    "server_width",
    "server_height",
    "music_id",
    "music_type",
)
DURATION = "duration_bin"
VIEW_FIELDS = (DURATION, "hourmin", "is_rand")
LABELS = (LabelRule("click", "is_click"), LabelRule("long_view", "long_view"))
SUFFIXES = {"kuairand-pure": "pure", "kuairand-1k": "1k"}
RARE = {"kuairand-pure": 1, "kuairand-1k": 5}  # least training rows of a video, author or music; 1K has 4.4 M videos
PUBLISHED = Published(
    "the M3oE paper (Table 1)",
    Counts(
        (178_087, 2_236_414, 93_165),
        {"user_id": (15_398, 27_049, 11_809), "video_id": (6_233, 7_580, 4_633)},
    ),
    remedy=f"use all three logs of an intact {CATALOGUE['kuairand-pure'].file_names}",
    option="--tabs",
)


def find(name: str, data_path: str, tabs: str | None, exposure: Exposure | None, cache: Path) -> TabularLog:
    """The log ``name`` of ``SUFFIXES``.

    Args:
        name: which.
        data_path: the publisher's .tar.gz, or a folder that holds its files, also some folders down.
        tabs: the tabs that are the domains, in order, as in ``0,1,4``; None: ``TABS``.
        exposure: "standard" or "random": only these logs; None: all three.
        cache: where files of a .tar.gz are unpacked.

    Raises:
        DataError: files or columns are missing, or an option is wrong.
    """
    domains = DomainRule("tab", texts=_parse_tabs(TABS if tabs is None else tabs))
    logs = {None: (*STANDARD, *RANDOM), "standard": STANDARD, "random": RANDOM}.get(exposure)
    if logs is None:
        raise DataError(f"--exposure {exposure!r} is unknown; choose standard or random, or leave it out for both")
    *logs, users, videos = _locate(name, Path(data_path).expanduser(), (*logs, USERS, VIDEOS), cache)
    schema = _schema(domains, RARE[name])
    sides = (
        SideTable(CsvFile(users, ",", (), wholes=("user_id",)), "user_id", USER_FIELDS),
        SideTable(CsvFile(videos, ",", (), wholes=("video_id",)), "video_id", (*VIDEO_FIELDS, "tag")),
    )
    numbers = ("duration_ms", *(rule.column for rule in LABELS))
    computed = {DURATION: Computed("duration_ms", pa.int64(), _binned)}
    files = tuple(
        JoinedFile(CsvFile(path, ",", numbers, wholes=("user_id", "video_id", "time_ms")), sides, computed)
        for path in logs
    )
    published = PUBLISHED if name == "kuairand-pure" else None
    log = TabularLog(name, Path(data_path), files, schema, joined=(users, videos), published=published)
    for file in files:
        check_columns(log, file)
    return log


def duration_bin(duration_ms: np.ndarray) -> np.ndarray:
    """The field ``duration_bin``: int64 [n] from the lengths of n videos, float64 [n] in milliseconds.

    floor(4 log2(1 + seconds)): bins that widen with the length, by a fifth each. 7 seconds begin bin 12.
    """
    return np.floor(4 * np.log2(1 + np.maximum(duration_ms, 0) / 1000)).astype(np.int64)


def _binned(duration_ms: pa.Array) -> pa.Array:
    numbers = duration_ms.fill_null(np.nan).to_numpy(zero_copy_only=False)
    known = np.isfinite(numbers)
    return pa.array(duration_bin(np.where(known, numbers, 0)), mask=~known)


def _parse_tabs(text: str) -> tuple[str, ...]:
    tabs = [part.strip() for part in text.split(",")]
    for tab in tabs:
        if not re.fullmatch(r"0|[1-9][0-9]?", tab):
            raise DataError(f"--tabs {text!r}: {tab!r} is no tab; write numbers as in {TABS}")
        if tabs.count(tab) > 1:
            raise DataError(f"--tabs {text!r}: {tab} occurs twice; drop one")
    return tuple(tabs)


def _locate(name: str, path: Path, stems: Sequence[str], cache: Path) -> list[Path]:
    """The files, from a folder or unpacked."""
    names = [f"{stem}_{SUFFIXES[name]}.csv" for stem in stems]
    if kind_of(path) == "file":
        place = cache / f"{name}-files-{file_digest(path)}"
        # All files, whichever are asked for now: the archive is read once for good.
        unpack(path, [f"{stem}_{SUFFIXES[name]}.csv" for stem in (*STANDARD, *RANDOM, USERS, VIDEOS)], place)
        return [place / file for file in names]
    archive = Archive(path)
    found = [archive.find(file) for file in names]
    lacking = ", ".join(file for file, member in zip(names, found, strict=True) if member is None)
    if lacking:
        published = CATALOGUE[name]
        raise DataError(f"{archive.path}: lacks {lacking}; fetch {published.file_names} from {published.page}")
    return [archive.path / member for member in found]


def _schema(domains: DomainRule, rare: int) -> LogSchema:
    counted = {"video_id", "author_id", "music_id"}
    fields = ("user_id", "video_id", *USER_FIELDS, *VIDEO_FIELDS, *VIEW_FIELDS)
    return LogSchema(
        ids=tuple(IdColumn(name, min_count=rare if name in counted else 1) for name in fields),
        bags=(BagColumn("tag", separator=","),),
        dense=(),
        domain=domains,
        labels=LABELS,
        timestamp="time_ms",
        user="user_id",
        drop_others=True,
    )
