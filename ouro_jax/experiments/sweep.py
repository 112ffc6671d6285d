"""Sweeps: one config, many runs that override some of its keys.

A file of `configs/sweeps/` says which, in lists of overrides that these words make:

  one_of("stages.*.learning_rate", [1e-3, 2e-3])     a run for each value; * is any name
  product(one_of(…), one_of(…))                      every combination
  zipped(one_of(…), one_of(…))                       the first of each, the second of each, …
  chain([{"seed": 1}], product(…))                   one list after the other
"""

import collections
import copy
import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ouro_jax.config import Config, from_config_dict
from ouro_jax.errors import ConfigError, nearest

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What `get_sweep()` of a sweep file returns: runs of `base`, FILE.py or FILE.py:VARIANT.

    Each of `runs` maps config keys to values.
    """

    base: str
    runs: Sequence[Overrides]


@dataclass(frozen=True)
class PlannedRun:
    """One run: its name, the overrides as written (`labels`: short key → value) and in full."""

    name: str
    labels: Overrides
    overrides: Overrides
    config: Config

    def flags(self) -> list[str]:
        """The overrides as flags of `ouro train`."""
        return [f"--config.{key}={value}" for key, value in self.overrides.items()]


def one_of(key: str, values: Iterable[Any]) -> list[Overrides]:
    """A run for each value of one key."""
    return [{key: value} for value in values]


def product(*parts: Sequence[Overrides]) -> list[Overrides]:
    """Every combination of one run from each part; the last part changes fastest."""
    return [_merged(runs) for runs in itertools.product(*parts)]


def zipped(*parts: Sequence[Overrides]) -> list[Overrides]:
    """The first runs of all parts merged, the second ones, …; ConfigError if a part is short."""
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        raise ConfigError(f"zipped: the parts have {lengths} runs; expected as many in each.")
    return [_merged(runs) for runs in zip(*parts, strict=True)]


def chain(*parts: Sequence[Overrides]) -> list[Overrides]:
    """The runs of all parts, one part after the other."""
    return [run for part in parts for run in part]


def _merged(runs: Iterable[Overrides]) -> Overrides:
    merged: Overrides = {}
    for run in runs:
        for key in run.keys() & merged.keys():
            raise ConfigError(f"a sweep sets {key!r} twice in one run; leave one of them out.")
        merged |= run
    return merged


def plan_runs(sweep: Sweep, base: Mapping[str, Any]) -> list[PlannedRun]:
    """The runs of a sweep over the config `base` as a dictionary, each validated.

    ConfigError names the run with an unknown key or a wrong value, a sweep of no runs, and runs
    that are the same.
    """
    if not sweep.runs:
        raise ConfigError("the sweep has no runs; expected at least one dictionary of overrides.")
    names = _short_names({key for run in sweep.runs for key in run})
    planned = [_plan_run(run, base, names) for run in sweep.runs]
    counts = collections.Counter(run.name for run in planned)
    for name, count in counts.items():
        if count > 1:
            raise ConfigError(f"{count} runs of the sweep are the same: {name}; leave one.")
    return planned


def _plan_run(run: Overrides, base: Mapping[str, Any], names: dict[str, str]) -> PlannedRun:
    labels = {names[key]: value for key, value in run.items()}
    name = ",".join(f"{label}={_text(value)}" for label, value in labels.items()) or "base"
    tree, overrides = copy.deepcopy(dict(base)), {}
    try:
        for key, value in run.items():
            for full in _matching(tree, key):
                overrides[full] = value
                *parents, leaf = full.split(".")
                node = tree
                for parent in parents:
                    node = node[parent]
                node[leaf] = value
        config = from_config_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"run {name}: {error}") from error
    return PlannedRun(name, labels, overrides, config)


def _matching(tree: Mapping[str, Any], pattern: str, prefix: str = "") -> list[str]:
    """The keys of values that a dotted key means, * standing for any name."""
    head, _, rest = pattern.partition(".")
    found = fnmatch.filter(tree, head)
    if not found:
        raise ConfigError(f"Unknown config key {prefix + head!r}.{nearest(head, tree)}")
    keys = []
    for name in found:
        inner = isinstance(tree[name], Mapping)
        if inner != bool(rest):
            expected = "one of " + ", ".join(tree[name]) if inner else "no key below it"
            raise ConfigError(f"{prefix}{pattern}: expected {expected} after {prefix}{name}.")
        keys += _matching(tree[name], rest, f"{prefix}{name}.") if inner else [prefix + name]
    return keys


def _short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key, all of it where another key ends alike."""
    ends = collections.Counter(key.rpartition(".")[2] for key in keys)
    return {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in keys}


def _text(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text)
