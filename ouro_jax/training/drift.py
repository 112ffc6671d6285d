"""Whether a run goes on with the config that it was trained with."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ouro_jax.errors import ConfigError, nearest

# What changes neither what is computed nor from what: where things lie, how often they are
# written, how the work is laid out. Rows behind a checkpoint are checked in `start.py`.
FREE = (
    "name", "init_from", "data.root", "data.source_tokens", "data.max_bad_rows",
    "mesh", "layout", "checkpoint", "deadlines", "evaluation", "logging",
    "profile", "guard.patience", "guard.rollbacks", "guard.repeat_every_steps",
    "stages.*.skip_rows", "stages.*.max_epochs",
)  # fmt: skip
Changes = dict[str, tuple[Any, Any]]


def check_drift(
    saved: Mapping[str, Any], config: Mapping[str, Any], allowed: Iterable[str], where: str
) -> Changes:
    """The keys that differ from those of the checkpoint at `where`: key → (saved, now).

    Raises ConfigError showing the differences unless each is free to change or `allowed`: a key,
    or what stands before it (`stages.anneal`). A name that is no key is an error too; one that has
    not changed is none, for launchers repeat the command after the change has been saved.
    """
    changes = dict(differences(saved, config))
    allowed = tuple(allowed)
    keys = (*_keys(saved), *_keys(config))
    for name in allowed:
        if name not in keys:
            hint = nearest(name, keys)
            raise ConfigError(f"--allow_config_change={name}: no such key of the config.{hint}")
    refused = [
        key for key in changes
        if not any(_covers(name, key) for name in (*FREE, *allowed))
    ]  # fmt: skip
    if refused:
        lines = [f"  {key}: {_short(changes[key][0])} → {_short(changes[key][1])}"
                 for key in refused]  # fmt: skip
        raise ConfigError(
            f"The config differs from the one that {where} was trained with:\n"
            + "\n".join(lines)
            + "\nSet it back, choose another workdir, or go on with the change: "
            f"--allow_config_change={','.join(refused)}"
        )
    return changes


def differences(saved: Any, now: Any, key: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The dotted keys whose values differ, each with both values; None for what is not there."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*saved, *now)):
            path = f"{key}.{name}" if key else name
            yield from differences(saved.get(name), now.get(name), path)
    elif saved != now:
        yield key, (saved, now)


def _keys(tree: Any, key: str = "") -> Iterator[str]:
    """Every dotted key, those of dictionaries too."""
    if isinstance(tree, Mapping):
        for name, inner in tree.items():
            path = f"{key}.{name}" if key else name
            yield path
            yield from _keys(inner, path)


def _covers(name: str, key: str) -> bool:
    """Whether `name` is `key` or begins it, part by part; `*` is any part."""
    names, keys = name.split("."), key.split(".")
    return len(names) <= len(keys) and all(
        one in ("*", other) for one, other in zip(names, keys, strict=False)
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
