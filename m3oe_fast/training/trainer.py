"""The training loop: two levels, early stopping on validation AUC, exact resume.

Inner level: Adam or AdamW, and for the embedding table an optimizer of its own if asked for, move
``model.network_parameters()`` on the training rows. Outer level: the fusion weights have an Adam of
their own and move only in outer steps (bi-level optimisation: M3oE, SIGIR 2024, section 2.6).
Everything random is a function of (seed, epoch), and the state behind every finished epoch is
written whole, so a run that was stopped and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from m3oe_fast.data.dataset import Dataset
from m3oe_fast.errors import ConfigError, DataError
from m3oe_fast.metrics import Scores
from m3oe_fast.model import M3oE
from m3oe_fast.training import graph
from m3oe_fast.training.console import ConsoleDisplay, Display
from m3oe_fast.training.evaluation import device_of, evaluate, unscored
from m3oe_fast.training.history import Epoch, Progress, Stopper
from m3oe_fast.training.optimizers import Optimizers
from m3oe_fast.training.options import TrainOptions
from m3oe_fast.training.report import config_of, metrics_of
from m3oe_fast.training.resume import STATE_FORMAT, check_same, continues, epochs_behind, newest, read_state, short
from m3oe_fast.training.run_folder import BEST, CHECKPOINTS, LAST, RunFolder
from m3oe_fast.training.steps import EagerSteps, GraphedSteps, Steps

Ended = Literal["epochs", "patience", "interrupted"]


_OUTER_STREAM = 0x6F75746572  # keeps the draws of the outer level apart from the permutations of the inner one
_FREE_TO_CHANGE = {"epochs", "patience", "cuda_graph"}


@dataclass(frozen=True)
class Result:
    """How a run ended, measured with its best weights.

    Attributes:
        ended: "epochs" (all done), "patience" (early stop) or "interrupted" (Ctrl-C).
        history: every finished epoch, those before a resume included.
        best_epoch: epoch whose weights the model now has; 0 if none was finished.
        val, test: scores of those weights; without a value if no epoch was finished.
        metrics: the content of metrics.json.
    """

    ended: Ended
    history: tuple[Epoch, ...]
    best_epoch: int
    val: Scores
    test: Scores
    metrics: dict[str, Any]


class Trainer:
    """Trains ``model`` on ``dataset``.

        result = Trainer(model, dataset, TrainOptions(epochs=5), out="runs/a").fit()

    Args:
        model: new or pre-trained; it is trained in place and ends with the best weights. Seed torch
            before making it if its first weights are to be reproducible.
        dataset: from ``m3oe_fast.data``; its encoder is attached to the model.
        options: how to train.
        out: the run folder; None keeps everything in memory.
        resolved: what config.yaml shall say; by default the options and the model's configuration.
        display: who hears of the progress; by default a bar on a terminal and plain lines
            elsewhere. ``Display()`` is silent.

    Raises:
        ConfigError: the model and the dataset do not fit together, or ``cuda_graph`` is on and cannot be.
        DataError: a part of the dataset is empty.
    """

    def __init__(
        self,
        model: M3oE,
        dataset: Dataset,
        options: TrainOptions | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        resolved: Mapping[str, Any] | None = None,
        display: Display | None = None,
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.options = options or TrainOptions()
        self.run = None if out is None else RunFolder(out)
        self.resolved = resolved
        self.display = ConsoleDisplay() if display is None else display
        _check_fit(model, dataset)
        model.encoder = dataset.encoder
        self.progress = Progress()
        self._written = 0
        self._plan_rows()
        graphed = graph.is_used(self.options, device_of(model), model.backend_name)
        self.optimizers = Optimizers(model, self.options, tensor_lr=graphed)
        self.steps = self._make_steps(graphed)

    def _plan_rows(self) -> None:
        """Decide which training rows the outer level owns, and how many steps an epoch has."""
        options, rows = self.options, len(self.dataset.train)
        self.outer_rows: np.ndarray | None = None
        self._is_inner = np.ones(rows, dtype=bool)
        if options.bilevel == "alternating":
            if rows < 2:
                raise DataError(f"the training part of {self.dataset.name} has one row; use bilevel off")
            count = min(max(1, round(options.outer_fraction * rows)), rows - 1)
            self.outer_rows = np.sort(_draws(options.seed, 0).permutation(rows)[:count])
            self._is_inner[self.outer_rows] = False
        self.inner_rows = int(self._is_inner.sum())
        self.steps_per_epoch = math.ceil(self.inner_rows / options.batch_size)
        of_outer = rows if self.outer_rows is None else len(self.outer_rows)
        self._outer_size = min(options.batch_size, of_outer)

    def _make_steps(self, graphed: bool) -> Steps:
        if not graphed:
            return EagerSteps(self.model, self.optimizers)
        capture = graph.CudaCapture(self.optimizers, device_of(self.model))
        inner_size = min(self.options.batch_size, self.inner_rows)
        return GraphedSteps(self.model, self.optimizers, capture, inner_size, self._outer_size)

    @property
    def outer_steps(self) -> int:
        """Outer steps that the run will have done if no early stop ends it."""
        options = self.options
        if options.bilevel == "alternating":
            return options.epochs * self.steps_per_epoch // options.outer_every
        return options.epochs if options.bilevel == "published" else 0

    # The run ----------------------------------------------------------------------------------

    def fit(self, resume: str | os.PathLike[str] | None = None) -> Result:
        """Train to the end, restore the best weights, measure them, and write the run folder.

        Ctrl-C ends the run early in the same way: the result says "interrupted" and the run can be
        resumed.

        Args:
            resume: "last" or "best" of the run folder, or a path to a run folder or checkpoint.
                "last" without a checkpoint starts afresh. A finished run is measured again and its
                files are left alone.

        Raises:
            ConfigError: the run folder cannot be used, or the training diverged.
            CheckpointError: the checkpoint is missing, damaged or of another configuration.
            UserError: the run folder cannot be written any more.
        """
        if self.run is not None:
            self.run.check(resuming=continues(self.run, resume))
        torch.manual_seed(self.options.seed)
        if resume is not None:
            self._resume(resume)
        finished_before = self._ended() is not None
        if self.run is not None and not (finished_before and self.run.holds_run()):
            default = config_of(self.model, self.dataset, self.options, str(self.run.root))
            self.run.write_config(self.resolved or default)
        self._catch_up()
        if not finished_before:
            self._warn()
        ended = self._train()
        self._ensure_best()
        result = self._measure(ended)
        if self.run is not None and not (finished_before and self._is_written(result)):
            self.run.write_metrics(result.metrics)
        return result

    def _warn(self) -> None:
        """Say what the options ask for and the run will not do."""
        if text := graph.notice(self.options, device_of(self.model), self.model.backend_name):
            self.display.message(text)
        if self.optimizers.fusion is not None and not self.outer_steps:
            self.display.message(
                f"warning: no outer step will be done, the fusion weights stay as they start: {self.options.epochs} "
                f"epochs have {self.options.epochs * self.steps_per_epoch} steps, fewer than outer_every "
                f"({self.options.outer_every})"
            )

    def _ended(self) -> Ended | None:
        if self.progress.epoch >= self.options.epochs:
            return "epochs"
        return "patience" if self.progress.stopper.exhausted(self.options.patience) else None

    def _train(self) -> Ended:
        """Run the epochs that are left; whatever happens, leave the best weights in the model."""
        try:
            with self.optimizers.training(), self.steps.running(), self.display:
                while (ended := self._ended()) is None:
                    self._run_epoch()
            return ended
        except KeyboardInterrupt:
            if self._written < self.progress.epoch:
                self._write_epoch()
            return "interrupted"
        finally:
            if self.progress.best_weights is not None:
                self.model.load_state_dict(self.progress.best_weights)

    def _run_epoch(self) -> None:
        number = self.progress.epoch + 1
        wall, cpu = time.perf_counter(), time.process_time()
        self.display.begin_epoch(number, self.options.epochs, self.inner_rows)
        train_loss = self._train_epoch(number)
        if self.options.bilevel == "published":
            self._outer_step(number - 1)
        validation = time.perf_counter()
        val = evaluate(self.model, self.dataset.val, self.dataset)
        self.model.check_inputs()
        self._check_finite(number, val)
        now = time.perf_counter()
        record = Epoch(
            epoch=number,
            train_loss=train_loss,
            samples=self.inner_rows,
            seconds=now - wall,
            cpu_seconds=time.process_time() - cpu,
            validation_seconds=now - validation,
            val=val.to_dict(),
            fusion=self.model.fusion_values(),
        )
        stopper = self.progress.stopper.after(number, val.mean_auc)
        is_best = stopper.best_epoch == number
        best_weights = _copy(self.model.state_dict()) if is_best else self.progress.best_weights
        self.progress = Progress((*self.progress.history, record), stopper, best_weights)
        self._write_epoch()
        self.display.end_epoch(record, is_best)

    def _train_epoch(self, number: int) -> float:
        """One pass over the inner rows; returns the mean loss."""
        options = self.options
        order = self.dataset.train.permutation(options.seed, number)
        order = order[self._is_inner[order]]
        self.model.train()
        self.steps.begin_epoch()
        step = (number - 1) * self.steps_per_epoch
        done = 0
        for batch in self.dataset.train.batches(options.batch_size, order):
            self.steps.inner(batch)
            done += len(batch.domain)
            step += 1
            if options.bilevel == "alternating" and step % options.outer_every == 0:
                self._outer_step(step // options.outer_every - 1)
            self.display.advance(done, lambda done=done: self.steps.loss_sum() / done)
        mean = self.steps.loss_sum() / done
        if not math.isfinite(mean):
            raise self._diverged(number, f"the loss is {mean}")
        return mean

    def _check_finite(self, number: int, val: Scores) -> None:
        """The loss of an epoch tells nothing of its last step."""
        if not all(bool(weight.isfinite().all()) for weight in self.model.state_dict().values()):
            raise self._diverged(number, "weights are not finite")
        if not val.finite:
            raise self._diverged(number, "validation scores are not finite")

    def _diverged(self, number: int, how: str) -> ConfigError:
        options = self.options
        own = "" if options.embedding_lr is None else f" or embedding_lr (now {options.embedding_lr:g})"
        return ConfigError(f"training diverged in epoch {number} ({how}): lower lr (now {options.lr:g}){own}")

    def _outer_step(self, number: int) -> None:
        """Move the fusion weights, and nothing else, on one batch of their rows.

        Args:
            number: outer steps so far; the batch is a function of it and the seed.
        """
        self.steps.outer(self.dataset.train.take(self._outer_batch(number)))

    def _outer_batch(self, number: int) -> np.ndarray:
        """Row numbers of an outer batch: shuffled passes over the held-out or all rows."""
        rows = len(self.dataset.train) if self.outer_rows is None else len(self.outer_rows)
        size = self._outer_size
        turn, position = divmod(number, rows // size)
        picked = _draws(self.options.seed, 1 + turn).permutation(rows)[position * size : (position + 1) * size]
        return picked if self.outer_rows is None else self.outer_rows[picked]

    def _measure(self, ended: Ended) -> Result:
        best_epoch = self.progress.stopper.best_epoch
        parts = (self.dataset.val, self.dataset.test)
        if best_epoch:
            val, test = (evaluate(self.model, part, self.dataset) for part in parts)
        else:  # half-trained weights that no file holds
            val, test = (unscored(part, self.dataset) for part in parts)
        history = self.progress.history
        metrics = metrics_of(self.model, self.dataset, history, best_epoch, val, test)
        return Result(ended, history, best_epoch, val, test, metrics)

    # Files ------------------------------------------------------------------------------------

    def _write_epoch(self) -> None:
        """Write the state behind the last finished epoch. ``best`` goes first: see `_newest`."""
        if self.run is not None:
            is_best = self.progress.stopper.best_epoch == self.progress.epoch
            for name in (BEST, LAST) if is_best else (LAST,):
                self.model.save(self.run.checkpoint(name), trainer_state=self._state())
            self._write_history()
        self._written = self.progress.epoch

    def _catch_up(self) -> None:
        """Write what a resumed run that was killed among the files of its last epoch did not."""
        done = self.progress.epoch
        if self.run is None or not done:
            return
        if epochs_behind(self.run, LAST) < done:
            self.model.save(self.run.checkpoint(LAST), trainer_state=self._state())
        if self.run.epochs_in_history() < done:
            self._write_history()

    def _write_history(self) -> None:
        self.run.write_history([epoch.to_row() for epoch in self.progress.history])

    def _ensure_best(self) -> None:
        """A run resumed from elsewhere may never have had a better epoch of its own to write."""
        best_known = self.progress.best_weights is not None
        if self.run is not None and best_known and not self.run.holds(BEST):
            self.model.save(self.run.checkpoint(BEST))

    def _state(self) -> dict[str, Any]:
        progress = self.progress
        is_best = progress.stopper.best_epoch == progress.epoch
        return {
            "format": STATE_FORMAT,
            "options": self._fixed_options(),
            "data": self._identity(),
            "history": [dataclasses.asdict(epoch) for epoch in progress.history],
            "stopper": dataclasses.asdict(progress.stopper),
            # With the best weights inside, a checkpoint needs no other file to resume from.
            "best_weights": None if is_best else dict(progress.best_weights),
            **self.optimizers.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def _identity(self) -> dict[str, Any]:
        """Which rows the run goes over. Equal digests are equal rows, whatever the log is called;
        the other entries are there to say what differs."""
        data = self.dataset
        return {
            "data": data.name,
            "split": data.split,
            "split_seed": data.split_seed,
            "domains": list(data.schema.domains),
            "tasks": list(data.schema.tasks),
            "digest of the rows": data.identity,
        }

    def _fixed_options(self) -> dict[str, Any]:
        """The options that decide the course of the run; a resumed run cannot change them."""
        options = dataclasses.asdict(self.options) | {"precision": self.model.precision}
        return {name: value for name, value in options.items() if name not in _FREE_TO_CHANGE}

    def _resume(self, resume: str | os.PathLike[str]) -> None:
        found = self._find(resume)
        if found is None:
            self.display.message("nothing to resume from: starting afresh")
            return
        file, content = found
        check_same(file, content, self._identity(), self.model.config.to_dict(), self._fixed_options())
        state = content["trainer"]
        self.model.load_weights(content["weights"], source=str(file))
        best_weights = content["weights"] if state["best_weights"] is None else state["best_weights"]
        self.optimizers.load_state_dict(state)
        torch.set_rng_state(state["rng"])
        history = tuple(Epoch(**epoch) for epoch in state["history"])
        self.progress = Progress(history, Stopper(**state["stopper"]), _copy(best_weights))
        self._written = self.progress.epoch
        self.display.message(
            f"resuming after epoch {self.progress.epoch} from {file}"
            if self._ended() is None
            else f"{file} is of a finished run: nothing to train, its files stay as they are"
        )

    def _find(self, resume: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that ``resume`` names and its content, None if there is none yet."""
        if resume == BEST:
            if self.run is None:
                raise ConfigError("resume best needs the run folder that holds it: name it with out")
            return read_state(self.run.checkpoint(BEST))
        if resume == LAST:
            return None if self.run is None else newest(self.run)
        if os.path.isdir(Path(resume) / CHECKPOINTS) and (found := newest(RunFolder(resume))):
            return found
        return read_state(Path(resume))

    def _is_written(self, result: Result) -> bool:
        """Whether metrics.json already tells of this very result."""
        old = self.run.read_metrics()
        return old is not None and all(
            (old.get(part) or {}).get(key) == result.metrics[part][key]
            for part, key in (("train", "epochs"), ("train", "seconds"))
        )


def _check_fit(model: M3oE, dataset: Dataset) -> None:
    for name in ("train", "val", "test"):
        if not len(getattr(dataset, name)):
            raise DataError(
                f"the split {dataset.split} leaves the {name} part of {dataset.name} empty; "
                "use a larger log or another split"
            )
    config, schema = model.config, dataset.schema
    for name, have, need in (
        ("vocab_sizes", tuple(config.vocab_sizes), tuple(schema.vocab_sizes)),
        ("num_dense", config.num_dense, len(schema.dense)),
        ("num_domains", config.num_domains, len(schema.domains)),
        ("num_tasks", config.num_tasks, len(schema.tasks)),
    ):
        if have != need:
            raise ConfigError(f"the model's {name} is {short(have)}, {dataset.name} needs {short(need)}")


def _draws(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, _OUTER_STREAM, number])


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}
