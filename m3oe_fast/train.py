"""``python -m m3oe_fast.train``: train a model on a log, print the result, write a run folder.

Options come from the line, from a YAML file (``--config``) or both; the line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

from m3oe_fast import backends, cli
from m3oe_fast.config import Fusion, Init, M3oEConfig, StarActivation
from m3oe_fast.data import load_options
from m3oe_fast.data.dataset import Dataset
from m3oe_fast.data.options import DataOptions, add_arguments, option
from m3oe_fast.errors import ConfigError
from m3oe_fast.model import M3oE
from m3oe_fast.training import Result, Trainer, TrainOptions, graph
from m3oe_fast.training.console import ConsoleDisplay, make_console, print_result, say
from m3oe_fast.training.device import Device, choose_device
from m3oe_fast.training.evaluation import device_of
from m3oe_fast.training.resume import continues
from m3oe_fast.training.run_folder import RunFolder, reserve_default, root_of

MODELS = ("m3oe",)

ALIASES = {
    "--epoch": "--epochs",
    "--learning_rate": "--lr",
    "--learning_rate_darts": "--fusion_lr",
    "--expert_num": "--shared_experts",
    "--dataset_path": "--data_path",
    "--model_name": "--model",
    "--save_dir": "--out",
}
"""Names that users of the published M3oE code type, and ours."""

DESCRIPTION = """\
Trains a multi-domain multi-task model on a log and prints AUC and logloss per domain and task.
Without any option it trains M3oE on a generated demo log, in a minute or two on a laptop."""

EPILOG = f"""\
examples:
  python -m m3oe_fast.train
  python -m m3oe_fast.train --epochs 3 --out runs/a
  python -m m3oe_fast.train --out runs/a --epochs 6 --resume last
  python -m m3oe_fast.train --data movielens-1m --data_path ml-1m.zip --lr 3e-3
  python -m m3oe_fast.train --config runs/a/config.yaml --out runs/b --seed 1

names of the published code work as well, here and in YAML:
{chr(10).join(f"  {theirs:<21} = {ours}" for theirs, ours in ALIASES.items())}

exit status: 0 done, 2 wrong input, 130 interrupted by Ctrl-C (--resume last goes on)
"""


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and its sizes and switches; the defaults are the published ones."""

    model: str = option("m3oe", f"The model: {', '.join(MODELS)}.")
    shared_experts: int = option(M3oEConfig.shared_experts, "K, experts shared by all domains and tasks.")
    embed_dim: int = option(M3oEConfig.embed_dim, "Width of the embedding of one id field.")
    star_dim: int = option(M3oEConfig.star_dim, "S, width of the star layer.")
    hidden_dim: int = option(M3oEConfig.hidden_dim, "H, width of the representation.")
    expert_dims: int | list[int] | str = option(
        "64", "Output width of each layer of an expert, for example 64, or 128,64 for two layers."
    )
    tower_dim: int = option(M3oEConfig.tower_dim, "Y, hidden width of a tower.")
    star_activation: StarActivation = option(
        M3oEConfig.star_activation,
        "norm_relu as in the published code, or linear as printed in the paper.",
    )
    gate_detach: bool = option(
        M3oEConfig.gate_detach,
        "Gates read the representation without sending it gradients (published code).",
    )
    fusion: Fusion = option(
        M3oEConfig.fusion,
        "Fusion weights: four scalars (paper), or one per domain and per task (per_index).",
    )
    fusion_init: float = option(M3oEConfig.fusion_init, "First value of the fusion logits; 1 is a weight of 0.731.")
    init: Init = option(M3oEConfig.init, "First values: published, or star (domain matrices start at one).")

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(f"model {self.model!r} does not exist; there is {', '.join(MODELS)}")
        object.__setattr__(self, "expert_dims", _widths(self.expert_dims))

    def config(self, vocab_sizes: Sequence[int], num_dense: int, num_domains: int, num_tasks: int) -> M3oEConfig:
        """The model's configuration for a log of these sizes."""
        sizes = dataclasses.asdict(self)
        del sizes["model"]
        return M3oEConfig(vocab_sizes, num_dense, num_domains, num_tasks, **sizes)


@dataclass(frozen=True)
class RunOptions:
    """How to compute, and where the run is kept."""

    device: Device = option(
        "auto",
        "Where to compute: auto takes the GPU where there is one that backend triton can use, else the processor.",
    )
    backend: Literal[("auto", *backends.NAMES)] = option(
        "auto", "What computes: auto takes the fastest that runs here, reference is plain PyTorch."
    )
    precision: Literal[backends.PRECISIONS] = option(
        "fp32",
        "Operands of matrix products on backend cpu: fp32, bf16x3 (each split into two bf16 numbers, about as exact "
        "as fp32) or bf16 (rounded); sums and weights stay fp32, and a processor without fast instructions for one "
        "computes in fp32. tf32 is for GPUs.",
    )
    out: str | None = option(None, "The run folder (default: runs/<data>-<time>). One that holds a run needs --resume.")
    resume: str | None = option(
        None,
        "Go on with a run: last or best of the run folder --out, or the path of a run folder or "
        "checkpoint. last starts afresh where there is nothing yet.",
    )

    def __post_init__(self) -> None:
        for name in ("out", "resume"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ConfigError(f"{name} must name a folder, got {value!r}")


GROUPS = {
    "data": DataOptions,
    "model": ModelOptions,
    "training": TrainOptions,
    "run": RunOptions,
}


_TYPES = {name: kind for group in GROUPS.values() for name, kind in get_type_hints(group).items()}


@dataclass(frozen=True)
class Options:
    """Everything that was asked for, resolved and valid."""

    data: DataOptions
    model: ModelOptions
    train: TrainOptions
    run: RunOptions

    def resolved(self, out: str, dataset: Dataset) -> dict[str, Any]:
        """The content of config.yaml: what --config needs to do the same again."""
        groups = (self.data, self.model, self.train, self.run)
        flat = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
        del flat["resume"]
        # A prepared folder was split when it was written, whatever the line says.
        return flat | {"split": dataset.split, "split_seed": dataset.split_seed, "out": out}


class HelpFormatter(DefaultHelpFormatter):
    """Keeps the line breaks of description and epilog, and leaves Python types out of the help."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, argparse.SUPPRESS) and "default:" not in action.help
        return f"{action.help} (default: %(default)s)" if shown else action.help


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UserError: something the user has to mend.
    """
    options = parse(argv)
    with _run_folder(options) as out:
        return _run(options, out)


def _run(options: Options, out: str) -> int:
    console = make_console()
    folder = RunFolder(out)
    folder.check(resuming=continues(folder, options.run.resume))
    device = _computing_device(options)
    dataset = load_options(options.data)
    torch.manual_seed(options.train.seed)
    model = _make_model(options, dataset, device)
    trainer = Trainer(
        model,
        dataset,
        options.train,
        out=out,
        resolved=options.resolved(out, dataset),
        display=ConsoleDisplay(console),
    )
    for line in (*dataset.summary(), *_describe(trainer, options), f"run       {out}"):
        say(console, line)
    result = trainer.fit(options.run.resume)
    if result.best_epoch:
        print_result(console, result, dataset.best_auc)
    say(console, _closing(result, out))
    return 130 if result.ended == "interrupted" else 0


def parse(argv: Sequence[str]) -> Options:
    """Read the options of one command line.

    Raises:
        ConfigError: an option, a value or the YAML file is wrong; one line says which.
        SystemExit: --help or --print_config was asked for, and printed.
    """
    parser = _make_parser()
    argv = [_without_alias(argument) for argument in argv]
    for argument in argv:
        if argument.startswith("--"):
            _check_known(argument.partition("=")[0])
    paths, argv = _take_configs(argv)
    configs = [f"--config={_read_config(parser, path)}" for path in paths]
    try:
        # The files go first: whatever else is on the line wins over them.
        values = parser.parse_args([*configs, *argv])
    except argparse.ArgumentError as error:
        raise ConfigError(_explain(error)) from error
    groups = [_take(group, vars(values)) for group in GROUPS.values()]
    return Options(*groups)


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m m3oe_fast.train",
        description=DESCRIPTION,
        usage="%(prog)s [--option value ...]",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="A YAML file of options, name: value on each line; the rest of the line wins over it.",
    )
    for title, group in GROUPS.items():
        add_arguments(parser, group, title)
    return parser


def _without_alias(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return ALIASES.get(name, name) + equals + value


def _take_configs(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files named by --config, in their order, and the rest of the line."""
    paths, rest = [], []
    left = iter(argv)
    for argument in left:
        name, equals, path = argument.partition("=")
        if name != "--config":
            rest.append(argument)
        elif equals or (path := next(left, None)) is not None:
            paths.append(path)
        else:
            raise ConfigError("--config must be followed by the path of a YAML file")
    return paths, rest


def _read_config(parser: ArgumentParser, path: str) -> str:
    """The options in a file, by our names, as YAML; parsed on their own first, so that an error names the file."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
        if not isinstance(content, dict):
            raise ConfigError("it holds no options; write name: value on each line")
        renamed: dict[str, Any] = {}
        for name, value in content.items():
            ours = _without_alias(f"--{name}").removeprefix("--")
            _check_known(ours, prefix="")
            if ours not in _TYPES:
                raise ConfigError(f"{ours} works on the line only")
            if ours in renamed:
                raise ConfigError(f"{ours} is there twice, once by another name; drop one")
            renamed[ours] = _word(value, _TYPES[ours])
        text = yaml.safe_dump(renamed, sort_keys=False, allow_unicode=True)
        parser.parse_string(text)
        return text
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"config file {path}: {_one_line(error)}") from error
    except argparse.ArgumentError as error:
        raise ConfigError(f"config file {path}: {_explain(error)}") from error


def _word(value: Any, kind: Any) -> Any:
    """``value``, or the word behind it where YAML took a bare on or off for true or false."""
    if isinstance(value, bool) and {"on", "off"} & set(get_args(kind)):
        return "on" if value else "off"
    return value


def _check_known(name: str, prefix: str = "--") -> None:
    known = {prefix + field: prefix + field for field in (*_TYPES, "config", "print_config", "help")}
    if name not in known:
        for theirs, ours in ALIASES.items():
            known[prefix + theirs.removeprefix("--")] = prefix + ours.removeprefix("--")
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {known[close[0]]}?" if close else "see --help"
        raise ConfigError(f"unknown option {name}; {hint}")


def _explain(error: argparse.ArgumentError) -> str:
    """A parser's message as one line that says what the option takes."""
    message = _one_line(error)
    named = re.match(r'Parser key "(\w+)":', message)
    value = re.search(r"[Vv]alue: (.*)$", message)
    if not named or not value or named[1] not in _TYPES:
        return message
    return f"--{named[1]} must be {_expected(_TYPES[named[1]])}, got {value[1]}"


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    names = {int: "a whole number", float: "a number", float | None: "a number", bool: "true or false"}
    if list[int] in get_args(kind):
        return "a whole number or a list of them"
    return names.get(kind, "text (in a YAML file, put it in quotes)")


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()


def _take(group: type, values: dict[str, Any]) -> Any:
    return group(**{field.name: values[field.name] for field in dataclasses.fields(group)})


def _widths(value: int | Sequence[int] | str) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, str):
        return tuple(value)
    try:
        return tuple(int(width) for width in value.split(","))
    except ValueError:
        raise ConfigError(f"expert_dims must be widths such as 64 or 128,64, got {value!r}") from None


@contextmanager
def _run_folder(options: Options) -> Iterator[str]:
    """The run folder; a default one is made at once, so that no other run takes it, and removed if left empty."""
    resume = options.run.resume
    if options.run.out is not None:
        yield options.run.out
    elif resume not in (None, "last", "best") and (root := root_of(resume)):
        yield str(root)
    else:
        root = reserve_default(options.data.data, datetime.now())
        try:
            yield str(root)
        finally:
            for folder in (root, root.parent):
                with suppress(OSError):
                    folder.rmdir()


def _computing_device(options: Options) -> torch.device:
    """Where the run computes; what cannot run is refused before a log is read, which can take long."""
    run = options.run
    device = choose_device(run.device, run.backend, run.precision)
    backend = backends.choose(run.backend, device, torch.float32, run.precision)
    graph.is_used(options.train, device, backend)
    options.model.config(vocab_sizes=(1,), num_dense=0, num_domains=1, num_tasks=1)
    return device


def _make_model(options: Options, dataset: Dataset, device: torch.device) -> M3oE:
    schema = dataset.schema
    config = options.model.config(schema.vocab_sizes, len(schema.dense), len(schema.domains), len(schema.tasks))
    run = options.run
    backend = backends.choose(run.backend, device, torch.float32, run.precision)
    # Made on the CPU, where its first weights are the same for every device.
    return M3oE(config, backend=backend, precision=run.precision).to(device)


def _describe(trainer: Trainer, options: Options) -> list[str]:
    model = trainer.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device = device_of(model)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    isa = f", instruction set {model.isa_name}" if model.isa_name else ""
    computed = model.compute_precision
    precision = model.precision + (f" (computed in {computed} here)" if computed != model.precision else "")
    train = options.train
    graphs = ", steps as CUDA graphs" if graph.is_used(train, device, model.backend_name) else ""
    table = ""
    if train.embedding_optimizer != "same":
        table = f"; embedding: {train.embedding_optimizer}, lr {train.table_lr:g}, only the rows in the batch"
    outer = {
        "off": "fixed",
        "published": f"one outer step an epoch, at most {trainer.outer_steps:,}, lr {train.fusion_lr:g}",
        "alternating": f"an outer step every {train.outer_every} steps, at most {trainer.outer_steps:,}, "
        f"lr {train.fusion_lr:g}",
    }[train.bilevel]
    return [
        f"model     {options.model.model}, {parameters:,} parameters",
        f"backend   {model.backend_name}{isa}, {precision}, {where}",
        f"training  at most {train.epochs} epochs, batch {train.batch_size:,}, {train.optimizer}, "
        f"lr {train.lr:g}, seed {train.seed}{graphs}{table}; fusion weights: {outer}",
    ]


def _closing(result: Result, out: str) -> str:
    done = len(result.history)
    if result.ended == "interrupted":
        when = f"after epoch {done}; to go on" if done else "before the first epoch was finished; to start again"
        return f"interrupted {when}: python -m m3oe_fast.train --config {out}/config.yaml --resume last"
    why = "stopped early" if result.ended == "patience" else "done"
    return f"{why} after epoch {done}; the weights in {out} are those of epoch {result.best_epoch}"


if __name__ == "__main__":
    cli.run(main)
