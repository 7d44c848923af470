"""A small KuaiRand log in the published format: the same file names, headers and ways to write a value."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pandas as pd

LOGS = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08", "log_random_4_22_to_5_08")
START_MS = 1_649_462_400_000
RANGES = {
    "follow_user_num": ["0", "(0,10]", "(10,50]", "500+"],
    "fans_user_num": ["0", "[1,10)", "[10,100)"],
    "friend_user_num": ["0", "[1,5)", "[5,30)"],
    "register_days": ["8-14", "61-90", "730+"],
}


def make_views(rows: int, users: int, videos: int, tabs: tuple[int, ...] = (0, 1, 2, 4), seed: int = 0) -> pd.DataFrame:
    """Views in the order of the three logs; the last third was shown at random, and times are out of order."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, rows)
    video = np.minimum(rng.geometric(8 / videos, rows), videos - 1)
    odds = 0.2 + 0.5 * (user % 3 == 0) + 0.2 * (video % 2)
    click = (rng.random(rows) < odds).astype(int)
    duration = rng.integers(1_000, 90_000, rows)
    play = np.where(click, rng.integers(0, 120_000, rows), 0)
    time = START_MS + rng.integers(0, 30 * 86_400_000, rows)
    moment = pd.to_datetime(time + 8 * 3_600_000, unit="ms")
    zeros = np.zeros(rows, int)
    return pd.DataFrame(
        {
            "user_id": user,
            "video_id": video,
            "date": moment.strftime("%Y%m%d"),
            "hourmin": moment.hour * 100,
            "time_ms": time,
            "is_click": click,
            "is_like": click * rng.integers(0, 2, rows),
            **dict.fromkeys(("is_follow", "is_comment", "is_forward", "is_hate"), zeros),
            "long_view": (play > np.minimum(duration, 18_000)).astype(int),
            "play_time_ms": play,
            "duration_ms": duration,
            "profile_stay_time": zeros,
            "comment_stay_time": zeros,
            "is_profile_enter": zeros,
            "is_rand": (np.arange(rows) >= rows * 2 // 3).astype(int),
            "tab": rng.choice(tabs, rows, p=np.array([0.2, *[0.8 / (len(tabs) - 1)] * (len(tabs) - 1)])),
        }
    )


def make_users(users: int, seed: int = 0) -> pd.DataFrame:
    """Features of users; onehot_feat4 and 12 to 17 have gaps, so that pandas writes them as floats."""
    rng = np.random.default_rng(seed)
    ranges = {}
    for name, texts in RANGES.items():
        ranges |= {name: rng.integers(0, 900, users), f"{name}_range": rng.choice(texts, users)}
    onehot = {}
    for number in range(18):
        values = rng.integers(0, 5, users)
        gaps = number == 4 or number >= 12
        onehot[f"onehot_feat{number}"] = np.where(rng.random(users) < 0.2, np.nan, values) if gaps else values
    return pd.DataFrame(
        {
            "user_id": np.arange(users),
            "user_active_degree": rng.choice(["high_active", "full_active", "UNKNOWN"], users),
            "is_lowactive_period": 0,
            "is_live_streamer": rng.choice([-124, 0, 1], users),
            "is_video_author": rng.integers(0, 2, users),
            **ranges,
            **onehot,
        }
    )


def make_videos(videos: int, seed: int = 0) -> pd.DataFrame:
    """Features of videos, not in the order of their ids: several tags, or none, and gaps."""
    rng = np.random.default_rng(seed)
    tags = [",".join(map(str, sorted(rng.choice(60, rng.integers(0, 3), replace=False)))) for _ in range(videos)]
    frame = pd.DataFrame(
        {
            "video_id": np.arange(videos),
            "author_id": rng.integers(0, videos // 2 + 1, videos),
            "video_type": rng.choice(["NORMAL", "AD"], videos),
            "upload_dt": rng.choice(["2022-04-09", "2022-04-10", "2020-07-08"], videos),
            "upload_type": rng.choice(["LongImport", "ShortImport", "Kmovie"], videos),
            "visible_status": rng.choice([0.0, 1.0], videos),
            "video_duration": np.where(rng.random(videos) < 0.1, np.nan, rng.integers(1_000, 90_000, videos)),
            "server_width": 720.0,
            "server_height": rng.choice([1280.0, 960.0], videos),
            "music_id": rng.integers(10**9, 10**10, videos),
            "music_type": np.where(rng.random(videos) < 0.1, np.nan, rng.integers(4, 10, videos)),
            "tag": tags,
        }
    )
    return frame.sample(frac=1, random_state=seed)


def write(folder: Path, rows: int = 900, users: int = 40, videos: int = 30, name: str = "pure", seed: int = 0) -> Path:
    """The files of KuaiRand-Pure (or, with name "1k", -1K) in ``folder``/data; returns ``folder``."""
    data = folder / "data"
    data.mkdir(parents=True)
    views = make_views(rows, users, videos, seed=seed)
    for log, part in zip(LOGS, np.array_split(np.arange(rows), 3), strict=True):
        views.iloc[part].to_csv(data / f"{log}_{name}.csv", index=False)
    make_users(users, seed).to_csv(data / f"user_features_{name}.csv", index=False)
    make_videos(videos, seed).to_csv(data / f"video_features_basic_{name}.csv", index=False)
    (data / f"video_features_statistic_{name}.csv").write_text("video_id,play_cnt\n1,999\n")
    (folder / "LICENSE").write_text("CC BY-SA 4.0\n")
    return folder


def packed(folder: Path, target: Path) -> Path:
    """``folder`` as a .tar.gz, as the publisher packs it."""
    with tarfile.open(target, "w:gz") as tar:
        tar.add(folder, arcname="KuaiRand-Pure")
    return target


def frames(folder: Path, name: str = "pure") -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Views, users and videos as they stand in the files, all as texts."""
    data = folder / "data"
    views = pd.concat([pd.read_csv(data / f"{log}_{name}.csv", dtype=str) for log in LOGS], ignore_index=True)
    users = pd.read_csv(data / f"user_features_{name}.csv", dtype=str)
    return views, users, pd.read_csv(data / f"video_features_basic_{name}.csv", dtype=str)
