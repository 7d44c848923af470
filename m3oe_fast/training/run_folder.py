"""The folder one training run writes, and nothing else writes:

    config.yaml             the resolved options, to read and to give to --config
    metrics.csv             one row per finished epoch
    metrics.jsonl           the same with everything, one JSON object on each line
    fusion.csv              the fusion weights, one row for each of their steps and each epoch
    metrics.json            the final result, strict JSON (an undefined value is null)
    profile.json            where the time went, if asked for
    checkpoints/last, best  model.pt with everything to score rows and to go on training
    checkpoints/epoch-N     the same behind epoch N, if more than the last one is kept

Every file is replaced in one piece, so a reader, or a run that is killed, never leaves or sees half
of one.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from m3oe_fast.atomic import replacing
from m3oe_fast.checkpoint import FILE_NAME
from m3oe_fast.errors import ConfigError, UserError

CHECKPOINTS = "checkpoints"
LAST = "last"
BEST = "best"


class RunFolder:
    """Paths and writers of one run folder; making the object touches no file.

    Args:
        root: the folder, existing or not.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.history = self.root / "metrics.csv"
        self.records = self.root / "metrics.jsonl"
        self.fusion = self.root / "fusion.csv"
        self.metrics = self.root / "metrics.json"
        self.profile = self.root / "profile.json"

    def checkpoint(self, name: str) -> Path:
        """Folder of the checkpoint ``last`` or ``best``."""
        return self.root / CHECKPOINTS / name

    def holds(self, name: str) -> bool:
        """Whether the checkpoint ``last`` or ``best`` is there; a killed run may leave just its folder."""
        return os.path.isfile(self.checkpoint(name) / FILE_NAME)

    def holds_run(self) -> bool:
        """Whether an earlier run left any of its files here."""
        # Unlike Path.exists, os.path.exists is False and no error where a folder on the way is closed to us.
        written = any(os.path.exists(trace) for trace in (self.config, self.history, self.metrics))
        return written or self.holds(LAST) or self.holds(BEST)

    def check(self, *, resuming: bool) -> None:
        """Make sure, before any work, that the run may and can be written here; leaves no trace.

        Args:
            resuming: the run that lies here is to be continued.

        Raises:
            ConfigError: another run lies here, or the folder cannot be written.
        """
        if self.holds_run() and not resuming:
            raise ConfigError(
                f"{self.root} already holds a run: continue it with --resume last, or name another folder with --out"
            )
        missing = [path for path in (self.root, *self.root.parents) if not os.path.exists(path)]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle, probe = tempfile.mkstemp(prefix=".probe.", dir=self.root)
            os.close(handle)
            os.unlink(probe)
        except OSError as error:
            raise _unwritable(self.root, error) from error
        finally:
            for path in missing:
                with contextlib.suppress(OSError):
                    path.rmdir()

    def write_config(self, resolved: Mapping[str, Any]) -> None:
        """Write config.yaml; a later ``--config`` reads the same options back."""
        write_text(self.config, yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True))

    def write_history(
        self,
        rows: Sequence[Mapping[str, Any]],
        records: Sequence[Mapping[str, Any]],
        fusion: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write metrics.csv, metrics.jsonl and fusion.csv; a file that holds this already is left alone. A model
        without fusion weights has no fusion.csv.

        Args:
            rows, fusion: the columns are the keys of the first row; None is an empty cell.
            records: plain JSON types.
        """
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        for path, text in (
            (self.history, _csv(rows)),
            (self.records, lines),
            *([(self.fusion, _csv(fusion))] if fusion else []),
        ):
            if _read(path) != text:
                write_text(path, text)

    def keep_epoch(self, epoch: int, count: int) -> None:
        """Keep the present ``last`` as the checkpoint of ``epoch``, and of all epochs the newest ``count``.

        With a count of 1 there are none beside ``last``.
        """
        folder = self.root / CHECKPOINTS
        if count > 1:
            _link(self.checkpoint(LAST) / FILE_NAME, folder / f"epoch-{epoch}" / FILE_NAME)
        for old in folder.glob("epoch-*"):
            number = old.name.removeprefix("epoch-")
            if number.isdecimal() and (count == 1 or not epoch - count < int(number) <= epoch):
                shutil.rmtree(old, ignore_errors=True)

    def write_profile(self, profile: Mapping[str, Any]) -> None:
        """Write profile.json."""
        write_text(self.profile, json.dumps(profile, indent=2, allow_nan=False) + "\n")

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json.

        Raises:
            ValueError: a value is NaN or infinite, which JSON cannot hold.
        """
        write_text(self.metrics, json.dumps(metrics, indent=2, allow_nan=False) + "\n")

    def read_metrics(self) -> dict[str, Any] | None:
        """The metrics.json of an earlier run, None where there is none that can be read."""
        try:
            content = json.loads(self.metrics.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def reserve_default(data: str, now: datetime) -> Path:
    """Make a new folder ``runs/<data>-<date>-<time>``, numbered if taken, that no other run gets.

    Args:
        data: value of ``--data``; of a path only the last part is kept.
        now: time of the start.

    Raises:
        ConfigError: it cannot be made.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/\\:]", data.rstrip("/\\"))[-1]).strip("-.") or "run"
    stem = f"{name}-{now:%Y%m%d-%H%M%S}"
    root, number = Path("runs") / stem, 2
    while True:
        try:
            root.mkdir(parents=True)
            return root
        except FileExistsError:
            root, number = Path("runs") / f"{stem}-{number}", number + 1
        except OSError as error:
            raise _unwritable(root, error) from error


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _link(source: Path, target: Path) -> None:
    """Give a file, which is replaced and never changed, a second name; a copy where the disk has no hard links."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def _unwritable(root: Path, error: OSError) -> ConfigError:
    reason = error.strerror or error
    return ConfigError(f"cannot write to the run folder {root} ({reason}); name another one with --out")


def root_of(path: str | os.PathLike[str]) -> Path | None:
    """The run folder that ``path`` is or whose checkpoint it is; None for any other path."""
    path = Path(path)
    folder = path.parent if os.path.isfile(path) else path
    if os.path.isdir(folder / CHECKPOINTS):
        return folder
    return folder.parent.parent if folder.parent.name == CHECKPOINTS else None


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one piece.

    Raises:
        UserError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    try:
        with replacing(path) as stream:
            stream.write(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
