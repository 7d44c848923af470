"""The training loop: two levels, early stopping on validation AUC, exact resume.

Inner level: Adam or AdamW, and for the embedding tables an optimizer of its own if asked for, move
``model.network_parameters()`` on the training rows. Outer level: the fusion weights have an Adam of
their own and move in steps of their own (bi-level optimisation: M3oE, SIGIR 2024, section 2.6), or in
mode joint along with the network. Everything random is a function of (seed, epoch), and the whole
state is written between two steps: a run that was killed and resumed ends with the same bits as one
that was not.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.dataset import Dataset
from m3oe_fast.data.reader import Reader
from m3oe_fast.errors import ConfigError, DataError
from m3oe_fast.metrics import Scores
from m3oe_fast.model import RankingModel
from m3oe_fast.training import bilevel, graph
from m3oe_fast.training.console import ConsoleDisplay, Display
from m3oe_fast.training.evaluation import device_of, evaluate, unscored
from m3oe_fast.training.held_out import HeldOut
from m3oe_fast.training.history import Epoch, Partial, Progress, Stopper, flat_fusion
from m3oe_fast.training.interrupt import Interrupt
from m3oe_fast.training.loggers import Logger, make_loggers
from m3oe_fast.training.optimizers import Optimizers
from m3oe_fast.training.options import TrainOptions
from m3oe_fast.training.profile import Stopwatch
from m3oe_fast.training.resume import (
    STATE_FORMAT,
    check_same,
    continues,
    find,
    position_behind,
    position_in,
    short,
)
from m3oe_fast.training.run_folder import BEST, LAST, RunFolder
from m3oe_fast.training.schedule import rate_factor
from m3oe_fast.training.steps import EagerSteps, GraphedSteps, Steps
from m3oe_fast.training.summary import config_of, metrics_of
from m3oe_fast.training.weighting import LossWeighting

Ended = Literal["epochs", "patience", "interrupted"]

WHOLE_ROWS = 1 << 23
"""Training rows that are shuffled as a whole unless ``shuffle_window`` says otherwise."""
WINDOW_ROWS = 1 << 20

_FREE_TO_CHANGE = {
    *("epochs", "patience", "cuda_graph", "prefetch", "checkpoint_every", "keep_last", "logger", "profile")
}
_BEFORE_THE_STEP = ("first_order", "unrolled")


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


class _Interrupted(Exception):
    """The run ends between two steps, as asked for; its state is written."""


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
        ConfigError: the model and the dataset do not fit together, or options ask for what cannot be had here.
        DataError: a part of the dataset is empty.
    """

    def __init__(
        self,
        model: RankingModel,
        dataset: Dataset,
        options: TrainOptions | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        resolved: Mapping[str, Any] | None = None,
        display: Display | None = None,
    ) -> None:
        self.model = model
        self.dataset = dataset
        options = options or TrainOptions()
        if not model.fusion_parameters():
            options = dataclasses.replace(options, bilevel="off")
        self.options = options
        self.run = None if out is None else RunFolder(out)
        self.resolved = resolved
        self.display = ConsoleDisplay() if display is None else display
        self.clock = Stopwatch()
        _check_fit(model, dataset)
        if self.run is None and (options.logger or options.profile):
            raise ConfigError("logger and profile write into the run folder: name one with out, or leave them out")
        model.encoder = dataset.encoder
        self.progress = Progress()
        self._written = (0, 0)
        self._loggers: list[Logger] = []
        self._interrupt = Interrupt()
        self.held_out = HeldOut(dataset.train, options, dataset.name)
        self.reader = self._make_reader()
        self.steps_per_epoch = math.ceil(self.reader.steps_per_epoch / options.accumulate)
        device = device_of(model)
        schema = dataset.schema
        self.weighting = LossWeighting(options, schema.domains, schema.tasks).to(model.embedding.device)
        graphed = graph.is_used(options, device, model.backend_name, bool(schema.bags))
        self.optimizers = Optimizers(model, options, extra=list(self.weighting.parameters()), tensor_lr=graphed)
        self.steps = self._make_steps(graphed)

    def _make_reader(self) -> Reader:
        options, train = self.options, self.dataset.train
        window = options.shuffle_window or (0 if len(train) <= WHOLE_ROWS else WINDOW_ROWS)
        return Reader(
            train,
            options.batch_size,
            options.seed,
            skip=self.held_out.mask,
            window=window,
            prefetch=options.prefetch,
            pin=self.model.embedding.is_cuda,
        )

    def _make_steps(self, graphed: bool) -> Steps:
        if not graphed:
            return EagerSteps(self.model, self.optimizers, self.weighting, self.options)
        capture = graph.CudaCapture(self.optimizers, device_of(self.model))
        inner_size = min(self.options.batch_size, self.inner_rows)
        return GraphedSteps(
            self.model,
            self.optimizers,
            self.weighting,
            capture,
            inner_size,
            self.held_out.batch_rows,
            self.dataset.schema.weighted,
        )

    @property
    def inner_rows(self) -> int:
        """Rows of an epoch: the training rows that are not held out."""
        return self.reader.rows

    @property
    def outer_steps(self) -> int:
        """Steps of their own that the fusion weights will have done if no early stop ends the run."""
        options = self.options
        steps = options.epochs * self.steps_per_epoch
        if options.bilevel in _BEFORE_THE_STEP:
            return math.ceil(steps / options.outer_every)
        if options.holds_out:
            return steps // options.outer_every
        return options.epochs if options.bilevel == "published" else 0

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C or SIGTERM came during the training, even if it was done by then and has another end."""
        return self._interrupt.requested

    # The run ----------------------------------------------------------------------------------

    def fit(self, resume: str | os.PathLike[str] | None = None) -> Result:
        """Train to the end, restore the best weights, measure them, and write the run folder.

        Ctrl-C, or SIGTERM, ends the run after the step it is in: the state is written, the result says
        "interrupted", and the run can be resumed. A second one ends it at once.

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
        elif self._ended() is None and self.progress.position != (0, 0):
            raise ConfigError("this run was interrupted: resume it from its folder, or make a new Trainer")
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
        options, model = self.options, self.model
        if text := graph.notice(options, device_of(model), model.backend_name, bool(self.dataset.schema.bags)):
            self.display.message(text)
        if text := bilevel.warning(options.bilevel, model.config):
            self.display.message(text)
        own_steps = options.bilevel not in ("off", "joint")
        if own_steps and not self.outer_steps:
            self.display.message(
                f"warning: no outer step will be done, the fusion weights stay as they start: {options.epochs} "
                f"epochs have {options.epochs * self.steps_per_epoch} steps, fewer than outer_every "
                f"({options.outer_every})"
            )

    def _ended(self) -> Ended | None:
        if self.progress.epoch >= self.options.epochs:
            return "epochs"
        return "patience" if self.progress.stopper.exhausted(self.options.patience) else None

    def _train(self) -> Ended:
        """Run the epochs that are left; whatever happens, leave the best weights in the model."""
        started = time.perf_counter()
        try:
            with (
                self._logging(),
                self.optimizers.training(),
                self.steps.running(),
                self.display,
                self._interrupt.listening(),
            ):
                while (ended := self._ended()) is None:
                    self._run_epoch()
            return ended
        except _Interrupted:
            return "interrupted"
        except KeyboardInterrupt:
            if self._written < (self.progress.epoch, 0):
                self._write_epoch()
            return "interrupted"
        finally:
            if self.progress.best_weights is not None:
                self.model.load_state_dict(self.progress.best_weights)
            if self.options.profile and self.clock.seconds:
                self.run.write_profile(self.clock.report(time.perf_counter() - started))

    def _run_epoch(self) -> None:
        number, partial = self.progress.epoch + 1, self.progress.partial
        wall, cpu = time.perf_counter() - partial.seconds, time.process_time() - partial.cpu_seconds
        self.display.begin_epoch(number, self.options.epochs, self.inner_rows, partial.rows)
        train_loss = self._train_epoch(number, wall, cpu)
        if self.options.bilevel == "published":
            self._outer_step(number - 1, None)
        validation = time.perf_counter()
        val = evaluate(self.model, self.dataset.val, self.dataset, self.clock)
        self.model.check_inputs()
        self._check_finite(number, val)
        now = time.perf_counter()
        self._note_fusion()
        step = number * self.steps_per_epoch
        record = Epoch(
            epoch=number,
            step=step,
            lr=self.options.lr * rate_factor(self.options, step - 1, self.steps_per_epoch),
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
        history = (*self.progress.history, record)
        self.progress = Progress(history, stopper, best_weights, fusion=self.progress.fusion)
        self._write_epoch()
        with self.clock("log"):
            for logger in self._loggers:
                logger.epoch(record.to_record(), step)
            self.display.end_epoch(record, is_best)
        if self._interrupt.requested and self._ended() is None:
            raise _Interrupted

    def _train_epoch(self, number: int, wall: float, cpu: float) -> float:
        """The rest of one pass over the inner rows; returns the mean loss of the whole pass.

        Args:
            number: the epoch, from 1.
            wall, cpu: when it would have begun, had it never been interrupted.
        """
        options, partial = self.options, self.progress.partial
        step, rows = partial.step, partial.rows
        before = (number - 1) * self.steps_per_epoch
        self.model.train()
        self.steps.begin_epoch(partial.loss_sum)
        batches = self.reader.epoch(number, step * options.accumulate)
        for group in self.clock.each("read", _grouped(batches, options.accumulate)):
            self._one_step(before + step, group)
            rows += sum(len(batch.domain) for batch in group)
            step += 1
            with self.clock("display"):
                self.display.advance(rows, lambda rows=rows: self.steps.loss_sum() / rows)
            due = options.checkpoint_every and step % options.checkpoint_every == 0
            if (due or self._interrupt.requested) and step < self.steps_per_epoch:
                seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
                partial = Partial(step, rows, self.steps.loss_sum(), seconds, cpu_seconds)
                # The last good state must not be lost to a bad one.
                self._check_loss(number, partial.loss_sum / rows)
                self._check_weights(number)
                self.progress = dataclasses.replace(self.progress, partial=partial)
                self._write_partial()
                if self._interrupt.requested:
                    raise _Interrupted
        mean = self.steps.loss_sum() / rows
        self._check_loss(number, mean)
        return mean

    def _one_step(self, step: int, group: list[Batch]) -> None:
        """Step number ``step`` (from 0) of the run, and the outer step that is due with it."""
        options = self.options
        if options.schedule != "constant" or step <= options.warmup:
            self.optimizers.set_rate_factor(rate_factor(options, step, self.steps_per_epoch))
        early = options.bilevel in _BEFORE_THE_STEP
        if early and step % options.outer_every == 0:
            self._outer_step(step // options.outer_every, group[0])
            self._note_fusion(step + 1)
        with self.clock("step"):
            self.steps.inner(group)
        if early:
            return
        if options.holds_out and (step + 1) % options.outer_every == 0:
            self._outer_step((step + 1) // options.outer_every - 1, group[0])
            self._note_fusion(step + 1)
        if options.bilevel == "joint" and (step + 1) % options.outer_every == 0:
            self._note_fusion(step + 1)

    def _outer_step(self, number: int, training: Batch | None) -> None:
        """Move the fusion weights, and nothing else, on one batch of their rows.

        Args:
            number: outer steps so far; the batch is a function of it and the seed.
            training: what the network is trained on, for the modes that look through its step.
        """
        with self.clock("read"):
            held_out = self.held_out.batch(number)
        with self.clock("outer"):
            self.steps.outer(held_out, held_out if training is None else training)

    def _note_fusion(self, step: int | None = None) -> None:
        """Remember where the fusion weights stand in or after step ``step`` of the run; None: at an epoch's end."""
        number = self.progress.epoch + 1
        at = number * self.steps_per_epoch if step is None else step
        flat = self._flat_fusion()
        if not flat:
            return
        with self.clock("log"):
            self.progress.fusion.append([number, at, *flat.values()])
            for logger in self._loggers:
                logger.outer(at, flat)

    def _flat_fusion(self) -> dict[str, float]:
        schema = self.dataset.schema
        return flat_fusion(self.model.fusion_values(), schema.domains, schema.tasks)

    def _check_loss(self, number: int, mean: float) -> None:
        if not math.isfinite(mean):
            raise self._diverged(number, f"the loss is {mean}")

    def _check_weights(self, number: int) -> None:
        if not all(bool(weight.isfinite().all()) for weight in self.model.state_dict().values()):
            raise self._diverged(number, "weights are not finite")

    def _check_finite(self, number: int, val: Scores) -> None:
        """The loss of an epoch tells nothing of its last step."""
        self._check_weights(number)
        if not val.finite:
            raise self._diverged(number, "validation scores are not finite")

    def _diverged(self, number: int, how: str) -> ConfigError:
        options = self.options
        own = "" if options.embedding_lr is None else f" or embedding_lr (now {options.embedding_lr:g})"
        return ConfigError(f"training diverged in epoch {number} ({how}): lower lr (now {options.lr:g}){own}")

    def _measure(self, ended: Ended) -> Result:
        best_epoch = self.progress.stopper.best_epoch
        parts = (self.dataset.val, self.dataset.test)
        if best_epoch:
            val, test = (evaluate(self.model, part, self.dataset) for part in parts)
        else:  # half-trained weights
            val, test = (unscored(part, self.dataset) for part in parts)
        history = self.progress.history
        metrics = metrics_of(self.model, self.dataset, history, best_epoch, val, test)
        return Result(ended, history, best_epoch, val, test, metrics)

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Surrounds the training; a run that goes on tells its loggers from which step."""
        if self.run is None or self._ended() is not None:
            yield
            return
        step = self.progress.epoch * self.steps_per_epoch + self.progress.partial.step
        with ExitStack() as stack:
            self._loggers = make_loggers(self.options.logger, self.run.root, step)
            for logger in self._loggers:
                stack.callback(logger.close)
            yield
        self._loggers = []

    # Files ------------------------------------------------------------------------------------

    def _write_epoch(self) -> None:
        """Write the state behind the last finished epoch. ``best`` goes first: see `resume.newest`."""
        if self.run is not None:
            with self.clock("checkpoint"):
                epoch = self.progress.epoch
                is_best = self.progress.stopper.best_epoch == epoch
                for name in (BEST, LAST) if is_best else (LAST,):
                    self.model.save(self.run.checkpoint(name), trainer_state=self._state())
                self.run.keep_epoch(epoch, self.options.keep_last)
                self._write_history()
        self._written = self.progress.position

    def _write_partial(self) -> None:
        """Write the state between two steps of an epoch."""
        if self.run is not None:
            with self.clock("checkpoint"):
                self.model.save(self.run.checkpoint(LAST), trainer_state=self._state())
                self._write_history()
        self._written = self.progress.position

    def _catch_up(self) -> None:
        """Write what a resumed run that was killed among the files of its last checkpoint did not."""
        if self.run is None or self.progress.position == (0, 0):
            return
        if position_behind(self.run, LAST) < self.progress.position:
            self.model.save(self.run.checkpoint(LAST), trainer_state=self._state())
        if not self.progress.partial.step and position_behind(self.run, LAST) == self.progress.position:
            self.run.keep_epoch(self.progress.epoch, self.options.keep_last)
        self._write_history()

    def _write_history(self) -> None:
        schema, history = self.dataset.schema, self.progress.history
        columns = ("epoch", "step", *self._flat_fusion())
        self.run.write_history(
            [epoch.to_row(schema.domains, schema.tasks) for epoch in history],
            [epoch.to_record() for epoch in history],
            [dict(zip(columns, values, strict=True)) for values in self.progress.fusion],
        )

    def _ensure_best(self) -> None:
        """A run resumed from elsewhere may never have had a better epoch of its own to write."""
        best_known = self.progress.best_weights is not None
        if self.run is not None and best_known and not self.run.holds(BEST):
            self.model.save(self.run.checkpoint(BEST))

    def _state(self) -> dict[str, Any]:
        progress = self.progress
        is_best = progress.stopper.best_epoch == progress.epoch and not progress.partial.step
        best = progress.best_weights
        return {
            "format": STATE_FORMAT,
            "options": self._fixed_options(),
            "data": self._identity(),
            "history": [dataclasses.asdict(epoch) for epoch in progress.history],
            "partial": dataclasses.asdict(progress.partial),
            "stopper": dataclasses.asdict(progress.stopper),
            "fusion": [list(values) for values in progress.fusion],
            # With the best weights inside, a checkpoint needs no other file to resume from.
            "best_weights": None if is_best or best is None else dict(best),
            **self.optimizers.state_dict(),
            "weighting": self.weighting.state_dict(),
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
        free = _FREE_TO_CHANGE - ({"epochs"} if self.options.schedule in ("linear", "cosine") else set())
        return {name: value for name, value in options.items() if name not in free}

    def _resume(self, resume: str | os.PathLike[str]) -> None:
        found = find(self.run, resume)
        if found is None:
            self.display.message("nothing to resume from: starting afresh")
            return
        file, content = found
        self._check_newest(file, content, resume)
        config = {"model": self.model.config.name, **self.model.config.to_dict()}
        check_same(file, content, self._identity(), config, self._fixed_options())
        state = content["trainer"]
        self.model.load_weights(content["weights"], source=str(file))
        self.optimizers.load_state_dict(state)
        self.weighting.load_state_dict(state["weighting"])
        torch.set_rng_state(state["rng"])
        stopper = Stopper(**state["stopper"])
        best = state["best_weights"]
        if best is None and stopper.best_epoch:
            best = content["weights"]
        self.progress = Progress(
            tuple(Epoch(**epoch) for epoch in state["history"]),
            stopper,
            None if best is None else _copy(best),
            Partial(**state["partial"]),
            state["fusion"],
        )
        self._written = self.progress.position
        self.display.message(self._resumed(file))

    def _check_newest(self, file: Path, content: Mapping[str, Any], resume: str | os.PathLike[str]) -> None:
        """Refuse to go back inside a run folder: its files would then tell of two runs."""
        if self.run is None or not continues(self.run, resume) or file.parent.name in (LAST, BEST):
            return
        if position_in(content) < max(position_behind(self.run, name) for name in (LAST, BEST)):
            raise ConfigError(
                f"{file} lies behind what {self.run.root} has reached: go on from it in another folder, with --out"
            )

    def _resumed(self, file: Path) -> str:
        epoch, step = self.progress.position
        if self._ended() is not None:
            return f"{file} is of a finished run: nothing to train, its files stay as they are"
        if step:
            return f"resuming in epoch {epoch + 1} after step {step:,} of {self.steps_per_epoch:,} from {file}"
        return f"resuming after epoch {epoch} from {file}"

    def _is_written(self, result: Result) -> bool:
        """Whether metrics.json already tells of this very result."""
        old = self.run.read_metrics()
        return old is not None and all(
            (old.get(part) or {}).get(key) == result.metrics[part][key]
            for part, key in (("train", "epochs"), ("train", "seconds"))
        )


def _grouped(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of one step after another; the last group may be short."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _check_fit(model: RankingModel, dataset: Dataset) -> None:
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
        ("bag_vocab_sizes", tuple(config.bag_vocab_sizes), tuple(schema.bag_vocab_sizes)),
        ("bag_pooling", tuple(config.bag_pooling), tuple(schema.bag_pooling)),
    ):
        if have != need:
            raise ConfigError(f"the model's {name} is {short(have)}, {dataset.name} needs {short(need)}")


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}
