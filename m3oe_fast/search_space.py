"""What ``m3oe_fast.tune`` searches: for each option a range or a list of values.

As YAML:

    lr: {low: 1e-4, high: 1e-2, log: true}
    shared_experts: {low: 1, high: 8}
    expert_dims: {choices: [64, "128,64"]}
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from m3oe_fast.cli import config_file
from m3oe_fast.cli.words import Names, expected
from m3oe_fast.errors import ConfigError

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = int | float | bool | str


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; ``log``: their logarithm is what is drawn evenly."""

    low: int | float
    high: int | float
    log: bool = False

    def draw(self, trial: Trial, name: str) -> Value:
        """A value for one trial."""
        suggest = trial.suggest_int if isinstance(self.low, int) else trial.suggest_float
        return suggest(name, self.low, self.high, log=self.log)

    def holds(self, value: Value) -> bool:
        """Whether ``value`` could be drawn."""
        return not isinstance(value, str) and self.low <= value <= self.high

    def to_dict(self) -> dict[str, Any]:
        """As in the YAML file."""
        return {"low": self.low, "high": self.high, "log": self.log}


@dataclass(frozen=True)
class Choices:
    """Some values."""

    values: tuple[Value, ...]

    def draw(self, trial: Trial, name: str) -> Value:
        """A value for one trial."""
        return trial.suggest_categorical(name, self.values)

    def holds(self, value: Value) -> bool:
        """Whether ``value`` could be drawn."""
        return value in self.values

    def to_dict(self) -> dict[str, Any]:
        """As in the YAML file."""
        return {"choices": list(self.values)}


Space = dict[str, Range | Choices]

DEFAULT: Space = {
    "lr": Range(1e-4, 1e-2, log=True),
    "fusion_lr": Range(1e-4, 1e-1, log=True),
    "shared_experts": Range(1, 8),
    "hidden_dim": Choices((64, 128, 256, 512)),
    "expert_dims": Choices(("32", "64", "128", "128,64")),
    "tower_dim": Choices((32, 64, 128)),
    "embed_dim": Choices((8, 16, 32)),
}


def default(fixed: Collection[str]) -> Space:
    """What is searched if nothing else is said: ``DEFAULT`` without the options in ``fixed``.

    Raises:
        ConfigError: nothing is left.
    """
    space = {name: values for name, values in DEFAULT.items() if name not in fixed}
    if not space:
        raise ConfigError("every option of the default search space is set on the line: drop one, or name a --space")
    return space


def read(path: str, names: Names, fixed: Collection[str]) -> Space:
    """A search space from a YAML file.

    Args:
        path: the file.
        names: the options that may be searched.
        fixed: options that the line sets.

    Raises:
        ConfigError: the file cannot be read, an option is unknown or set on the line as well, or its values are wrong.
    """
    try:
        space: Space = {}
        for key, values in config_file.load_mapping(path).items():
            name = names.ours(str(key), dashes=False)
            if name not in names.types:
                raise ConfigError(f"{name} cannot be searched")
            if name in space:
                raise ConfigError(f"{name} is there twice, once by another name; drop one")
            if name in fixed:
                raise ConfigError(f"{name} is searched here and set on the line; drop one")
            space[name] = _entry(name, values, names.types[name])
        if not space:
            raise ConfigError("it names no option to search")
        return space
    except ConfigError as error:
        raise ConfigError(f"search space {path}: {error}") from error


def to_yaml(space: Space) -> str:
    """The text of a file that ``read`` reads as ``space``."""
    return config_file.as_text({name: values.to_dict() for name, values in space.items()})


def _entry(name: str, values: Any, kind: Any) -> Range | Choices:
    known = ({"low", "high"}, {"low", "high", "log"}, {"choices"})
    if not isinstance(values, Mapping) or set(values) not in known:
        raise ConfigError(f"{name} must be {{low: 1, high: 8}}, with log: true if wanted, or {{choices: [1, 2]}}")
    if "choices" in values:
        return Choices(_choices(name, values["choices"], kind))
    return _range(name, values, kind)


def _range(name: str, values: Mapping[str, Any], kind: Any) -> Range:
    kinds = _kinds(kind)
    if str in kinds or not kinds & {int, float}:
        raise ConfigError(f"{name} takes {expected(kind)}, which has no range: list its values, {{choices: [...]}}")
    log = values.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{name}: log must be true or false, got {log!r}")
    low, high = (_value(name, values[end], kind) for end in ("low", "high"))
    if float in kinds:
        low, high = float(low), float(high)
    if not low < high:
        raise ConfigError(f"{name}: low ({low}) must be below high ({high})")
    if log and low <= 0:
        raise ConfigError(f"{name}: with log: true low must be above 0, got {low}")
    return Range(low, high, log)


def _choices(name: str, listed: Any, kind: Any) -> tuple[Value, ...]:
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{name}: choices must be a list such as [1, 2], got {listed!r}")
    values = tuple(_value(name, value, kind) for value in listed)
    if len(set(values)) < len(values):
        raise ConfigError(f"{name}: a choice is there twice; drop one")
    return values


def _value(name: str, value: Any, kind: Any) -> Value:
    """A value as the option takes it; widths of several layers become a text such as 128,64."""
    kinds = _kinds(kind)
    if isinstance(value, bool) and kind is not bool and {"on", "off"} & set(get_args(kind)):
        value = "on" if value else "off"  # what YAML makes of a bare word
    if list[int] in kinds:
        widths = value if isinstance(value, list) else [value]
        if all(isinstance(width, int | str) and not isinstance(width, bool) for width in widths):
            return ",".join(map(str, widths))
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif isinstance(value, str) and float in kinds and _is_number(value):
        return float(value)  # YAML 1.1 reads 1e-4 as a text
    elif isinstance(value, bool):
        if bool in kinds:
            return value
    elif type(value) in kinds or (float in kinds and isinstance(value, int)):
        return _finite(name, value)
    raise ConfigError(f"{name} must be {expected(kind)}, got {value!r}")


def _finite(name: str, value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
    return value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _kinds(kind: Any) -> set[Any]:
    return set(get_args(kind)) - {type(None)} if get_origin(kind) in (Union, UnionType) else {kind}
