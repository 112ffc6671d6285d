"""What all verbs share: parsing, exit codes, `--help`, `--json`, reading the config flag.

Exit codes: 0 success, 2 a wrong config, flag or input, 130 interrupted, 1 anything else, with its
traceback unless the message says it all. Training also has 75, stopped as asked after saving, and
124, ended by its watchdog.
"""

import itertools
import json
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from ouro_jax.config import Config, from_config_dict
from ouro_jax.errors import ConfigError, RunError, nearest

FLAGS = flags.FLAGS

flags.DEFINE_bool("json", False, "Print one line of JSON last.")


def define_config() -> None:
    """Defines `--config=FILE[:VARIANT]` with `--config.key=value` overrides."""
    config_flags.DEFINE_config_file("config", None, "Config file, FILE.py or FILE.py:VARIANT.")


def config_from_flags() -> Config:
    """The validated Config of `--config` and its overrides."""
    if FLAGS.config is None:
        raise ConfigError("--config is missing: name a config file, e.g. --config=configs/tiny.py")
    return from_config_dict(FLAGS.config)


def required(name: str, example: str) -> str:
    """The value of a flag that must be given; ConfigError with an example if it was not."""
    value = FLAGS[name].value
    if not value:
        raise ConfigError(f"--{name} is missing: e.g. --{name}={example}")
    return value


def run_verb(
    main: Callable[..., Mapping[str, Any] | None], module: str, max_words: int = 0
) -> None:
    """Parses the command line, runs `main`, and leaves the process with the right code.

    `main` gets what is no flag, at most `max_words`, and returns what `--json` prints. `module` is
    the verb's `__name__`; its docstring is the help.
    """
    if module not in ("__main__", sys.argv[0]):
        sys.argv[0] = module
    doc = sys.modules[module].__doc__ or ""
    if any(argument in ("--help", "-h", "-help") for argument in sys.argv[1:]):
        shared = [f"  --{name}: {FLAGS[name].help}" for name in ("config", "json") if name in FLAGS]
        print("\n".join([doc.strip(), "\nFlags:", FLAGS.module_help(module), *shared]))
        sys.exit(0)
    # Orbax and jax report their own progress at INFO; a run shows its own.
    logging.set_verbosity(logging.ERROR)
    try:
        result = main(*_parse(sys.argv, max_words))
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if FLAGS.json and result is not None:
        print(json.dumps(result))
    sys.exit(0)


def _parse(argv: list[str], max_words: int) -> list[str]:
    """Sets the flags; returns the words that are none."""
    known = _dotted_keys(_config_of(argv)) if "config" in FLAGS else []
    FLAGS.set_gnu_getopt(True)  # flags may follow words
    try:
        words = FLAGS(argv)[1:]
    except flags.Error as error:
        hint = ""
        if "invalid literal for int()" in str(error):
            hint = " Write whole numbers as 1000000 or 1_000_000."
        raise ConfigError(f"{error}{hint}") from error
    except (AttributeError, KeyError) as error:
        raise ConfigError(_unknown_key(argv, known, error)) from error
    if len(words) > max_words:
        raise ConfigError(f"{words[max_words]!r}: expected flags only, as in --name=value.")
    return words


def _config_of(argv: list[str]) -> Mapping[str, Any]:
    """What the file of `--config` makes, without overrides; empty if the flag is not there.

    ml_collections runs the file too, but reports what goes wrong in it late and as a traceback.
    """
    values = [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]
    values += [value for flag, value in itertools.pairwise(argv) if flag == "--config"]
    if not values:
        return {}
    return call_file(values[-1], "get_config", "--config", "configs/tiny.py")


def call_file(name: str, function: str, flag: str, example: str) -> Any:
    """What `function` of the file `name` returns; FILE.py:VARIANT gives it the variant.

    A ConfigError names `flag`, and a file to look at, if there is no such file or function.
    """
    path, _, variant = name.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"{flag}={path}: no such file; e.g. {flag}={example}")
    try:
        get = runpy.run_path(path)[function]
        return get(variant) if variant else get()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{flag}={path}: not a readable config file ({type(error).__name__}: {error}); "
            f"expected Python with a function {function}, as in {example}."
        ) from error


def _unknown_key(argv: list[str], known: list[str], error: Exception) -> str:
    """ml_collections names only the last part of an unknown key; this finds all of it."""
    for argument in argv:
        key = argument.removeprefix("--config.").split("=", 1)[0]
        if argument.startswith("--config.") and key not in known:
            return f"Unknown config key {key!r}.{nearest(key, known)}"
    return f"--config: {error}"


def _dotted_keys(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for name, value in tree.items():
        keys.append(prefix + name)
        if isinstance(value, Mapping | ConfigDict):
            keys += _dotted_keys(value, f"{prefix}{name}.")
    return keys
