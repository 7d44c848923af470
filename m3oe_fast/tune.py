"""``python -m m3oe_fast.tune``: train a model many times and keep the options with the best validation AUC.

The folder of a study:

    study.yaml   the options, to read and for --resume
    space.yaml   what is searched, to read and for --space
    study.db     what Optuna remembers (SQLite)
    trials/N     the run folder of trial N
    tune.csv     one row per trial
    best.yaml    the options of the best trial, for m3oe_fast.train --config
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from rich.console import Console

from m3oe_fast import cli, search_space, train
from m3oe_fast.cli import config_file
from m3oe_fast.cli.compute import ComputeOptions
from m3oe_fast.cli.words import Names
from m3oe_fast.data import load_options
from m3oe_fast.data.dataset import Dataset
from m3oe_fast.data.options import DataOptions, option
from m3oe_fast.errors import CheckpointError, ConfigError
from m3oe_fast.models.options import NOT_SIZES, ModelOptions
from m3oe_fast.search_space import Space
from m3oe_fast.training import Result, Trainer, TrainOptions
from m3oe_fast.training.console import ConsoleDisplay, make_console, say
from m3oe_fast.training.resume import short
from m3oe_fast.training.run_folder import RunFolder, write_text

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

    from m3oe_fast.training.history import Epoch


@dataclass(frozen=True)
class TuneOptions:
    """How to search."""

    out: str = option("", "The study's folder. One that holds a study needs --resume.")
    trials: int = option(20, "Trials of the study, those before a --resume included. The first has the options as set.")
    timeout: float | None = option(None, "Start no further trial after this many seconds (default: no limit).")
    space: str | None = option(
        None,
        "A YAML file of what to search, an option on each line: NAME: {low: 1e-4, high: 1e-2, log: true}, or "
        "NAME: {choices: [64, 128]} (default: lr, fusion_lr, shared_experts, hidden_dim, expert_dims, tower_dim and "
        "embed_dim, without those set on the line).",
    )
    pruner: Literal["none", "median"] = option(
        "none", "median: end a trial whose validation AUC is below the median of the earlier ones at that epoch."
    )
    resume: bool = option(False, "Go on with the study in --out, with its options; starts afresh where there is none.")

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ConfigError("name the study's folder with --out, for example --out runs/tune")
        if not self.trials >= 1:
            raise ConfigError(f"trials must be an integer of at least 1, got {self.trials!r}")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"timeout must be above 0, got {self.timeout!r}")


COMMAND = cli.Command(
    "tune",
    """\
Trains a model with many settings (Optuna, tree-structured Parzen estimator) and keeps those with
the best mean validation AUC. Each trial is a run as m3oe_fast.train makes it.""",
    examples=[
        "--out runs/tune --trials 50 --epochs 3",
        "--out runs/tune --resume --trials 100",
        "--out runs/tune --data movielens-1m --data_path ml-1m.zip --space space.yaml --pruner median",
    ],
    groups={
        "search": TuneOptions,
        "data": DataOptions,
        "model": ModelOptions,
        "training": TrainOptions,
        "computation": ComputeOptions,
    },
    aliases=cli.ALIASES | {"--n_trials": "--trials"},
    interrupted="interrupted by Ctrl-C (--resume goes on, with the trial that was interrupted)",
)

_FOLDER = "folder"
_FREE_TO_CHANGE = {
    *("out", "trials", "timeout", "space", "pruner", "resume", "data_path", "cache_dir", "device", "backend"),
    *("cuda_graph", "prefetch", "checkpoint_every", "keep_last", "logger", "profile"),
}


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UserError: something the user has to mend.
    """
    search, *options = COMMAND.parse(argv)
    folder = StudyFolder(search.out)
    goes_on = folder.check(search.resume)
    if goes_on:
        search, *options = folder.parse_again(argv)
        space = folder.space(search)
    else:
        fixed = COMMAND.given(argv, files=False)
        space = _space(search, options[1], options[2], fixed)
    _import_optuna()
    data, model, training, compute = options
    if model.form != "mdmt":
        raise ConfigError(f"form must be mdmt, one model, got {model.form}; a study of members has no single score")
    run = train.RunOptions(**dataclasses.asdict(compute))
    base = train.Options(data, model, training, run)
    device = train.computing_device(base)
    console = make_console()
    if search.resume and not goes_on:
        say(console, "nothing to resume from: starting afresh")
    dataset = load_options(data)
    folder.write(search, options, space)
    for line in (*dataset.summary(), f"search    {', '.join(space)}", f"study     {search.out}"):
        say(console, line)
    return Search(search, base, space, folder, dataset, device, console).run()


def _import_optuna() -> None:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError("tuning needs Optuna, which is not installed: pip install 'm3oe_fast[tune]'") from error
    optuna.logging.set_verbosity(logging.ERROR)


def _space(search: TuneOptions, model: ModelOptions, training: TrainOptions, fixed: Mapping[str, Any]) -> Space:
    own = model.resolved()
    foreign = [field.name for field in dataclasses.fields(ModelOptions) if field.name not in own]
    if search.space is not None:
        space = search_space.read(search.space, _searchable(), fixed)
        if wrong := [name for name in space if name in foreign]:
            raise ConfigError(f"search space {search.space}: {wrong[0]} is no option of model {model.model}")
        return space
    without_effect = ["fusion_lr"] if training.bilevel == "off" or "fusion" in foreign else []
    return search_space.default([*fixed, *foreign, *without_effect])


def _searchable() -> Names:
    """The names of options that a trial can change."""
    names = COMMAND.names
    groups = (ModelOptions, TrainOptions)
    ours = [field.name for group in groups for field in dataclasses.fields(group) if field.name not in NOT_SIZES]
    types = {name: names.types[name] for name in ours}
    return Names(types, {theirs: name for theirs, name in names.aliases.items() if name[2:] in types})


class StudyFolder:
    """Paths and files of a study.

    Args:
        root: the folder, existing or not.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.options = self.root / "study.yaml"
        self.searched = self.root / "space.yaml"
        self.storage = self.root / "study.db"
        self.table = self.root / "tune.csv"
        self.best = self.root / "best.yaml"

    def trial(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.root / "trials" / str(number)

    def check(self, resume: bool) -> bool:
        """Make sure that the study may and can be written here.

        Returns:
            Whether there is one to go on with.

        Raises:
            ConfigError: it may not, or cannot.
        """
        if RunFolder(self.root).holds_run():
            raise ConfigError(f"{self.root} holds a training run; name another folder with --out")
        exists = self.options.is_file()
        if exists and not resume:
            raise ConfigError(
                f"{self.root} already holds a study: continue it with --resume, or name another folder with --out"
            )
        RunFolder(self.root).check(resuming=True)
        return exists

    def parse_again(self, argv: list[str]) -> tuple[Any, ...]:
        """The options of a line, with those of the study in the place of the defaults.

        Raises:
            ConfigError: the line changes what a study cannot change, or study.yaml cannot be read.
        """
        try:
            saved = config_file.load_mapping(str(self.options))
        except ConfigError as error:
            raise ConfigError(f"{self.options}: {error}") from error
        parsed = COMMAND.parse(argv, {name: saved[name] for name in saved if name in COMMAND.names.types})
        for name, value in _flat(parsed).items():
            if name not in _FREE_TO_CHANGE and name in saved and _plain(value) != saved[name]:
                raise ConfigError(
                    f"{self.root} is a study with another {name}: it was {short(saved[name])} and is now "
                    f"{short(_plain(value))}; drop the option, or start a new study with another --out"
                )
        return parsed

    def space(self, search: TuneOptions) -> Space:
        """What the study searches.

        Raises:
            ConfigError: the line names another space, or space.yaml cannot be read.
        """
        own = search_space.read(str(self.searched), _searchable(), ())
        if search.space is not None and search_space.read(search.space, _searchable(), ()) != own:
            raise ConfigError(
                f"{self.root} is a study of another search space, {self.searched}; drop --space, or start a new study "
                "with another --out"
            )
        return own

    def write(self, search: TuneOptions, options: list[Any], space: Space) -> None:
        """Write study.yaml and space.yaml.

        Raises:
            UserError: the folder cannot be written.
        """
        values = {name: _plain(value) for name, value in _flat([search, *options]).items()}
        for name in ("out", "space", "resume"):
            del values[name]
        write_text(self.searched, search_space.to_yaml(space))
        write_text(self.options, config_file.as_text(values))


def _flat(groups: Any) -> dict[str, Any]:
    return {name: value for group in groups for name, value in dataclasses.asdict(group).items()}


def _plain(value: Any) -> Any:
    """As YAML has it."""
    return list(value) if isinstance(value, tuple) else value


class Search:
    """The trials of one study that are left to do.

    Args:
        search: how to search.
        base: the options that trials vary.
        space: which ones, and how.
        folder: where the study lies.
        dataset: what ``base`` names.
        device: where trials compute.
        console: where to write.
    """

    def __init__(
        self,
        search: TuneOptions,
        base: train.Options,
        space: Space,
        folder: StudyFolder,
        dataset: Dataset,
        device: torch.device,
        console: Console,
    ) -> None:
        self._search, self._base, self._space, self._folder = search, base, space, folder
        self._dataset, self._device, self._console = dataset, device, console
        self._warned: set[str] = set()

    def run(self) -> int:
        """Run the trials; returns the command's exit status.

        Raises:
            ConfigError: no trial came to a result, or study.db cannot be read or written.
            UserError: the study's folder cannot be written.
        """
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return self._run(self._open())
        except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            of_sqlite = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None)
            reason = str(of_sqlite or error).splitlines()[0]
            raise ConfigError(
                f"{self._folder.storage} cannot be used ({reason}); mend that, or start a new study with another --out"
            ) from error

    def _run(self, study: optuna.Study) -> int:
        started = time.monotonic()
        while (position := len(_settled(study))) < self._search.trials:
            if self._search.timeout is not None and time.monotonic() - started >= self._search.timeout:
                say(self._console, f"timeout after {position} trials; to go on: {self._go_on}")
                break
            study.sampler = self._sampler(position)
            trial = study.ask()
            if _FOLDER not in trial.user_attrs:
                trial.set_user_attr(_FOLDER, position + 1)
            done = self._try(study, trial)
            self._write(study)
            if not done:
                say(self._console, f"interrupted in trial {_number(trial)}; to go on: {self._go_on}")
                return 130
        self._close(study)
        return 0

    @property
    def _go_on(self) -> str:
        return f"python -m m3oe_fast.tune --out {self._search.out} --resume"

    def _open(self) -> optuna.Study:
        import optuna

        median = optuna.pruners.MedianPruner(n_warmup_steps=1)
        study = optuna.create_study(
            # A path in a URL would have to be quoted, in a way that depends on the version of SQLAlchemy.
            storage=optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": self._connect}),
            study_name="m3oe_fast",
            direction="maximize",
            pruner=median if self._search.pruner == "median" else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        if not study.trials:
            self._enqueue_base(study)
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # its process was killed
            if trial.params.keys() == self._space.keys():
                _put_in_line(study, trial)
        return study

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._folder.storage, timeout=60.0)

    def _enqueue_base(self, study: optuna.Study) -> None:
        """Let the first trial have the options as they are, if the search might come upon them."""
        values = {name: _drawn(value) for name, value in _flat([self._base.model, self._base.train]).items()}
        if all(entry.holds(values[name]) for name, entry in self._space.items()):
            study.enqueue_trial({name: values[name] for name in self._space})

    def _sampler(self, position: int) -> optuna.samplers.BaseSampler:
        """Draws that (seed, position) and the trials before decide, so that an interruption changes none of them."""
        import optuna

        seed = np.random.SeedSequence([self._base.train.seed, position]).generate_state(1)[0]
        return optuna.samplers.TPESampler(seed=int(seed))

    def _try(self, study: optuna.Study, trial: Trial) -> bool:
        """One trial; False if it was interrupted."""
        import optuna

        states = optuna.trial.TrialState
        label = f"trial {_number(trial)}/{self._search.trials}"
        started = time.monotonic()
        try:
            params = {name: entry.draw(trial, name) for name, entry in self._space.items()}
            result = self._train(trial, params)
            if result.ended == "interrupted":
                raise KeyboardInterrupt
            auc = result.val.to_dict()["auc"]["mean"]
            if auc is None:
                raise ConfigError("no validation AUC is defined: see the warnings about the data")
            trial.set_user_attr("test_auc", result.test.to_dict()["auc"]["mean"])
            trial.set_user_attr("best_epoch", result.best_epoch)
            best = [settled.value for settled in _settled(study) if settled.value is not None]
            study.tell(trial, auc)
            ended = f"val AUC {auc:.4f}" + ("  best so far" if auc > max(best, default=-1.0) else "")
        except KeyboardInterrupt:
            study.tell(trial, state=states.FAIL)
            _put_in_line(study, trial)
            return False
        except optuna.TrialPruned as pruned:
            trial.set_user_attr("reason", str(pruned))
            study.tell(trial, state=states.PRUNED)
            ended = f"pruned {pruned}"
        except (ConfigError, CheckpointError, MemoryError, torch.OutOfMemoryError) as error:
            reason = (str(error) or "out of memory").splitlines()[0]
            trial.set_user_attr("reason", reason)
            study.tell(trial, state=states.FAIL)
            ended = f"failed: {reason}"
        say(self._console, f"{label}  {_told(trial.params)}  {time.monotonic() - started:.1f} s  {ended}")
        return True

    def _train(self, trial: Trial, params: Mapping[str, Any]) -> Result:
        folder = str(self._folder.trial(_number(trial)))
        options = _varied(self._base, params)
        # The run of an interrupted trial goes on where it was.
        trainer = Trainer(
            self._make_model(options),
            self._dataset,
            options.train,
            out=folder,
            resolved=options.resolved(folder, self._dataset),
            display=_TrialDisplay(self._console, trial, self._warned),
        )
        return trainer.fit("last")

    def _make_model(self, options: train.Options) -> Any:
        torch.manual_seed(options.train.seed)
        return train.make_model(options, self._dataset.schema, self._device)

    def _write(self, study: optuna.Study) -> None:
        """Write tune.csv and, if there is a best trial, best.yaml."""
        columns = ["trial", "state", "val_auc", "test_auc", "best_epoch", "seconds", *self._space, "reason"]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_row(trial) for trial in _settled(study))
        write_text(self._folder.table, text.getvalue())
        if (best := _best(study)) is not None:
            options = config_file.load_mapping(str(RunFolder(self._folder.trial(_number(best))).config))
            del options["out"]  # a run with these options is another run
            write_text(self._folder.best, config_file.as_text(options))

    def _close(self, study: optuna.Study) -> None:
        best, settled = _best(study), _settled(study)
        if best is None:
            reasons = [trial.user_attrs.get("reason", "") for trial in settled]
            if not reasons:
                return  # a timeout before the first trial
            raise ConfigError(f"none of {len(reasons)} trials came to a result; the first: {reasons[0]}")
        test = best.user_attrs["test_auc"]
        say(
            self._console,
            f"best      trial {_number(best)} of {len(settled)}, val AUC {best.value:.4f}, "
            + ("" if test is None else f"test AUC {test:.4f}, ")
            + _told(best.params),
        )
        say(self._console, f"to train with it: python -m m3oe_fast.train --config {self._folder.best}")


class _TrialDisplay(ConsoleDisplay):
    """The bar of a trial's run without the run's lines; tells Optuna of every epoch."""

    def __init__(self, console: Console, trial: Trial, warned: set[str]) -> None:
        super().__init__(console)
        self._trial, self._warned = trial, warned

    def message(self, text: str) -> None:
        """Of what a run says, a warning, once in a study."""
        if text.startswith("warning") and text not in self._warned:
            self._warned.add(text)
            super().message(text)

    def end_epoch(self, epoch: Epoch, is_best: bool) -> None:
        """Report the epoch, and end the trial if it is not worth going on."""
        import optuna

        super().end_epoch(epoch, is_best)
        auc = epoch.val["auc"]["mean"]
        if auc is None:
            return
        self._trial.report(auc, epoch.epoch)
        if self._trial.should_prune():
            raise optuna.TrialPruned(f"after epoch {epoch.epoch}, val AUC {auc:.4f}")


def _varied(base: train.Options, params: Mapping[str, Any]) -> train.Options:
    """``base`` with other values of some options.

    Raises:
        ConfigError: they are out of range, or do not go together.
    """
    parts = {"model": base.model, "train": base.train}
    changed = {
        part: dataclasses.replace(group, **{name: params[name] for name in params if hasattr(group, name)})
        for part, group in parts.items()
    }
    return dataclasses.replace(base, **changed)


def _drawn(value: Any) -> Any:
    """An option's value as a search space has it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _number(trial: Trial | FrozenTrial) -> int:
    """The number of a trial and of its folder, from 1; one that goes on with an interrupted one has that one's."""
    return trial.user_attrs[_FOLDER]


def _put_in_line(study: optuna.Study, trial: Trial | FrozenTrial) -> None:
    """Let one of the next trials go on with an interrupted one."""
    study.enqueue_trial(trial.params, user_attrs={_FOLDER: _number(trial)})


def _settled(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count: all that ended but the interrupted ones, which were put in line again."""
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    return [trial for trial in ended if trial.value is not None or "reason" in trial.user_attrs]


def _best(study: optuna.Study) -> FrozenTrial | None:
    complete = [trial for trial in _settled(study) if trial.state.name == "COMPLETE"]
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def _row(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "trial": _number(trial),
        "state": trial.state.name.lower(),
        "val_auc": trial.value if trial.state.name == "COMPLETE" else None,
        "test_auc": trial.user_attrs.get("test_auc"),
        "best_epoch": trial.user_attrs.get("best_epoch"),
        "seconds": trial.duration.total_seconds(),
        **trial.params,
        "reason": trial.user_attrs.get("reason"),
    }


def _told(params: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


if __name__ == "__main__":
    cli.run(main)
