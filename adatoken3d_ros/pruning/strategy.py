# SPDX-License-Identifier: Apache-2.0
"""Strategies: which policy prunes which share of the spatial tokens where, for which model; YAML files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from adatoken3d_ros.files import UnusableFile, read_file, replacing
from adatoken3d_ros.lmm.identity import original_identity, shape_of
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, ScheduleError, Stage
from adatoken3d_ros.text import quoted, shown

logger = logging.getLogger(__name__)

FORMAT = "adatoken3d-strategy/1"
MAX_BYTES = 64 * 1024
_MAX_DEPTH = 16
_MAX_NUMBER = 2**31


class StrategyError(ValueError):
    """A strategy that cannot be read, or that was made for another model; the message names key and value."""


@dataclass(frozen=True)
class Strategy:
    """A way to prune, and the model it was made for.

    Attributes:
        name: what answers and reports call it.
        policy: name of the pruning policy (`policies.POLICY_NAMES`).
        schedule: which share of the spatial tokens is left where.
        model_hash: identity of the model, of its shape alone in files from before weights had one; None for a strategy
            that was made for no model in particular.
        options: keyword options of the policy, plain values.
        info: how it was made, plain values.
        model_id: name of the model, for people.
    """

    name: str
    policy: str
    schedule: Schedule
    model_hash: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    model_id: str = ""

    def fits(self, identity: str) -> bool:
        """Whether it was made for the model of this identity, or for the one that it was before its weights were
        quantised, as far as it says: `names_only_the_shape` may be true."""
        return self.model_hash in (identity, original_identity(identity)) or (
            self.names_only_the_shape and self.model_hash == shape_of(identity)
        )

    @property
    def names_only_the_shape(self) -> bool:
        """Whether it may have been made for other weights of the same shape."""
        return self.model_hash is not None and self.model_hash == shape_of(self.model_hash)

    def check(self, identity: str) -> None:
        """Raises StrategyError if the strategy was made for another model; logs a warning where it cannot be told."""
        if self.model_hash is None:
            return
        known_as = f" ({shown(self.model_id)})" if self.model_id else ""
        if not self.fits(identity):
            raise StrategyError(
                f"strategy {self.name!r} was made for the model {shown(self.model_hash)}{known_as}, "
                f"this model is {identity}: calibrate it for this model"
            )
        if self.names_only_the_shape:
            logger.warning(
                "strategy %r says only of what shape the model was that it was made for, %s%s: its losses may have "
                "been measured with other weights than these, %s",
                self.name,
                self.model_hash,
                known_as,
                identity,
            )

    def text(self) -> str:
        """The strategy as YAML, which `parse` reads. Raises StrategyError where that is longer than MAX_BYTES."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "policy": self.policy,
            "options": dict(self.options),
            "stages": [{"layer": stage.layer, "ratio": stage.ratio} for stage in self.schedule.stages],
            "withdraw_layer": self.schedule.withdraw_layer,
            "model": {"id": self.model_id, "hash": self.model_hash},
            "info": dict(self.info),
        }
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
        if len(text.encode()) > MAX_BYTES:
            raise StrategyError(f"strategy {self.name!r} takes {len(text.encode())} bytes, more than {MAX_BYTES}")
        return text

    def save(self, path: Path | str) -> None:
        """Writes the strategy as YAML, atomically; raises as `text`."""
        text = self.text()
        with replacing(path) as file:
            file.write(text.encode())

    @classmethod
    def load(cls, path: Path | str) -> Strategy:
        """Reads a strategy, a regular file of at most MAX_BYTES.

        Raises:
            StrategyError: names the file and the key that is wrong. Of a file that does not call itself a strategy it
                tells no value: a path may be given from afar, and what lies there is nobody's business.
            OSError: if the file cannot be read.
        """
        try:
            return parse(read_file(path, MAX_BYTES).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise StrategyError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error
        except UnusableFile as error:
            raise StrategyError(str(error)) from error
        except ValueError as error:
            raise StrategyError(f"{path}: {error}") from error


def parse(text: str) -> Strategy:
    """A strategy from its YAML. Raises StrategyError naming the key, and in what calls itself one the value."""
    value = _safe_yaml(text)
    if not isinstance(value, dict):
        raise StrategyError(f"expected a mapping of keys to values, not a {type(value).__name__}")
    if value.get("format") != FORMAT:
        raise StrategyError(f"key format is {'another than' if 'format' in value else 'missing, expected'} {FORMAT!r}")
    content = _Keys(value, "")
    content.take("format", str)
    stages = [_stage(entry, f"stages[{index}]") for index, entry in enumerate(content.take("stages", list))]
    model = _Keys(content.take("model", dict), "model.")
    policy, options = content.take("policy", str), content.take("options", dict, default={})
    _check_plain(options, "options")
    try:
        make_policy(policy, **options)
    except (ValueError, TypeError, OverflowError) as error:
        raise StrategyError(f"policy {quoted(policy)} with options {quoted(options, 200)}: {error}") from error
    try:
        schedule = Schedule(tuple(stages), content.take("withdraw_layer", int, type(None), default=None))
    except ScheduleError as error:
        raise StrategyError(f"stages or withdraw_layer: {error}") from error
    strategy = Strategy(
        name=content.take("name", str),
        policy=policy,
        schedule=schedule,
        model_hash=model.take("hash", str, type(None)),
        options=options,
        info=content.take("info", dict, default={}),
        model_id=model.take("id", str, default=""),
    )
    model.end()
    content.end()
    return strategy


def _stage(entry: Any, where: str) -> Stage:
    if not isinstance(entry, dict):
        raise StrategyError(f"{where} is {quoted(entry)}, expected a mapping with layer and ratio")
    keys = _Keys(entry, f"{where}.")
    layer, ratio = keys.take("layer", int), keys.take("ratio", float, int)
    keys.end()
    try:
        return Stage(layer, float(ratio))
    except (ScheduleError, OverflowError) as error:
        raise StrategyError(f"{where}: {error}") from error


class _Keys:
    """A mapping whose keys are taken one by one, each with its type; what is left over is unknown."""

    def __init__(self, content: Any, prefix: str) -> None:
        if not isinstance(content, dict):
            raise StrategyError(f"{prefix.rstrip('.')}: expected a mapping of keys to values, not {quoted(content)}")
        self._rest = dict(content)
        self._prefix = prefix

    def take(self, key: str, *kinds: type, default: Any = ...) -> Any:
        if key not in self._rest:
            if default is ...:
                raise StrategyError(f"key {self._prefix}{key} is missing")
            return default
        value = self._rest.pop(key)
        # In Python a bool is an int; in a strategy `layer: yes` is a mistake.
        if not isinstance(value, kinds) or isinstance(value, bool):
            expected = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
            raise StrategyError(f"{self._prefix}{key} is {quoted(value)}, expected {expected}")
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise StrategyError(f"{self._prefix}{key} has {value.bit_length()} bits: too large a number")
        return value

    def end(self) -> None:
        if self._rest:
            key, value = next(iter(self._rest.items()))
            raise StrategyError(f"unknown key {self._prefix}{shown(key, 80)} with value {quoted(value)}")


def _check_plain(options: dict[Any, Any], where: str) -> None:
    """Options are handed to a policy: keys are names, values are numbers, texts, switches or lists of them."""
    for key, value in options.items():
        if not isinstance(key, str):
            raise StrategyError(f"{where} has the key {quoted(key)}, expected a name")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int) and abs(one) > _MAX_NUMBER:
                raise StrategyError(f"{where}.{shown(key, 80)} has {one.bit_length()} bits: too large a number")
            if not isinstance(one, str | int | float | bool | None):
                raise StrategyError(
                    f"{where}.{shown(key, 80)} is {quoted(value)}, expected a plain value or a list of them"
                )


def _safe_yaml(text: str) -> Any:
    """The content of one YAML document of plain values, without anchors, tags, deep nesting or keys given twice."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            start: Any = event.start_mark
            line = start.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise StrategyError(f"line {line}: aliases are not allowed")
            if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None) is not None:
                # A value that a tag forces into a kind that it is not is an error of Python's, not of YAML's.
                raise StrategyError(f"line {line}: tags are not allowed")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise StrategyError(f"line {line}: nested deeper than {_MAX_DEPTH} levels")
        _check_unique(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        # The library's own words quote the text.
        mark: Any = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise StrategyError(f"not valid YAML{where}") from error
    except StrategyError:
        raise
    except (ValueError, OverflowError) as error:  # what looks like a date or a number and is none
        raise StrategyError(f"not valid YAML: a {type(error).__name__} where its values are read") from error


def _check_unique(node: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise StrategyError(f"line {key.start_mark.line + 1}: key {shown(key.value, 80)} is given twice")
                seen.add(key.value)
            _check_unique(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_unique(value)


def default_strategy(policy: str, n_layers: int, first_gate: int = 0) -> Strategy:
    """A policy with its own schedule, scaled to `n_layers` and not before `first_gate`: for a model that was not
    calibrated.
    """
    schedule = make_policy(policy).default_schedule(n_layers).not_before(first_gate)
    return Strategy(f"{policy}-default", policy, schedule, info={"kind": "default"})
