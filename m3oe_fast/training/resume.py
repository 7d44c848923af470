"""Which checkpoint a resumed run goes on from, and whether it belongs to that run at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3oe_fast import checkpoint
from m3oe_fast.errors import CheckpointError, ConfigError
from m3oe_fast.training.run_folder import BEST, CHECKPOINTS, LAST, RunFolder, root_of

STATE_FORMAT = 3


def continues(run: RunFolder, resume: str | os.PathLike[str] | None) -> bool:
    """Whether ``resume`` names the run that lies in ``run``, which may then be written on."""
    if resume is None:
        return False
    if resume in (LAST, BEST):
        return True
    root = root_of(os.path.abspath(resume))
    return root is not None and root.resolve() == run.root.resolve()


def find(run: RunFolder | None, resume: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that ``resume`` (last, best or a path) names and its content, None if there is none yet.

    Raises:
        ConfigError: best of no run folder.
        CheckpointError: it is missing or damaged.
    """
    if resume == BEST:
        if run is None:
            raise ConfigError("resume best needs the run folder that holds it: name it with out")
        return read_state(run.checkpoint(BEST))
    if resume == LAST:
        return None if run is None else newest(run)
    if os.path.isdir(Path(resume) / CHECKPOINTS) and (found := newest(RunFolder(resume))):
        return found
    return read_state(Path(resume))


def newest(run: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """The latest state of a run: ``best`` if it was killed after writing that, else ``last``."""
    found = [read_state(run.checkpoint(name)) for name in (LAST, BEST) if run.holds(name)]
    return max(found, key=lambda item: position_in(item[1]), default=None)


def read_state(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file behind ``path`` and its content.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        return checkpoint.locate(path), checkpoint.read(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error


def position_behind(run: RunFolder, name: str) -> tuple[int, int]:
    """`position_in` the checkpoint ``last`` or ``best`` of a run, (0, 0) if it is missing or damaged."""
    try:
        return position_in(read_state(run.checkpoint(name))[1])
    except CheckpointError:
        return 0, 0


def position_in(content: Mapping[str, Any]) -> tuple[int, int]:
    """Finished epochs behind a checkpoint's training state, and finished steps of the next one."""
    state = content["trainer"] or {}
    return len(state.get("history", ())), (state.get("partial") or {}).get("step", 0)


def check_same(
    file: Path,
    content: Mapping[str, Any],
    data: Mapping[str, Any],
    config: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Raise CheckpointError that names the first field in which a checkpoint differs from the run.

    Args:
        file, content: the checkpoint.
        data: which rows the run goes over.
        config: the model's name ("model") and configuration.
        options: the options that decide the course of the run.
    """
    state = content["trainer"]
    if state is None:
        raise CheckpointError(f"{file} holds a model but no training state: it cannot be resumed")
    if state.get("format") != STATE_FORMAT:
        raise CheckpointError(f"{file} was written by another version of m3oe_fast and cannot be resumed")
    same_rows = data["digest of the rows"] == state["data"].get("digest of the rows")
    for own, saved in (
        ({} if same_rows else data, state["data"]),
        (config, {"model": checkpoint.model_name(content), **content["config"]}),
        (options, state["options"]),
    ):
        for name, value in own.items():
            if saved.get(name) != value:
                raise CheckpointError(
                    f"{file} belongs to another configuration: {name} was "
                    f"{short(saved.get(name))} and is now {short(value)}; resume with the "
                    "run's own config.yaml, or train in a new folder"
                )


def short(value: Any) -> str:
    """A value as it reads in one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
