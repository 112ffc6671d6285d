"""What goes wrong in words of the user: the errors that commands explain, and checks of values."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Something the user wrote is wrong: a key, a flag, a file."""

    exit_code = 2


class RunError(RuntimeError):
    """A failure that its message explains, as a full disk."""

    exit_code = 1


class Stopped(RunError):
    """The run was asked to stop, and has saved where it stands: the same command goes on.

    75 is `EX_TEMPFAIL` of sysexits.h: try again later. Launchers start such a run again and do not
    count it as a failure.
    """

    exit_code = 75


# What a process that was stuck leaves with, as `timeout` of coreutils does.
STUCK_CODE = 124


def nearest(name: str, choices: Iterable[str]) -> str:
    """The hint ` Did you mean 'x'?` for a misspelt `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def require(condition: bool, key: str, seen: object, expected: str) -> None:
    """Raises the ConfigError that names `key`, the value seen and what was expected."""
    if not condition:
        raise ConfigError(f"{key} = {seen!r}: expected {expected}.")


def require_choice(value: str, choices: Iterable[str], key: str) -> None:
    """Raises a ConfigError naming the nearest choice if `value` is none of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(
            f"{key} = {value!r}: expected one of {', '.join(choices)}.{nearest(value, choices)}"
        )
