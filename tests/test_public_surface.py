"""The public surface as reviewable text: names, verbs, flags and config keys.

If you meant to change it, run `UPDATE_GOLDEN=1 make test` and review the difference of
tests/golden/public_surface.txt.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import ouro_jax
from ouro_jax.cli.main import VERBS
from ouro_jax.config import Config, ModelConfig, Stage, to_dict

FILE = Path(__file__).parent / "golden" / "public_surface.txt"


def config_keys(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict) and value and name != "mixture":
            yield from config_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def flags_of(verb):
    command = [sys.executable, "-m", f"ouro_jax.cli.{verb}", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.strip() for line in text.split("Flags:")[1].splitlines()]
    return sorted(line.split(":")[0] for line in lines if line.startswith("--"))


def parameters_of(function):
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)


def surface():
    model = ModelConfig(8, 8, 8, 1, 1, 1, 8)
    stage = Stage(8, 8, 8, 1, 1, {"source": 1.0}, 1.0)
    config = Config("name", model, {"stable_1a": stage})
    yield "# names of ouro_jax"
    for name in sorted(ouro_jax.__all__):
        thing = getattr(ouro_jax, name)
        yield name if inspect.isclass(thing) else f"{name}({parameters_of(thing)})"
    yield "# verbs and flags of ouro"
    for verb in VERBS:
        yield f"{verb}: {' '.join(flags_of(verb))}"
    yield "# keys of a config"
    yield from config_keys(to_dict(config))


def test_public_surface_is_frozen():
    text = "\n".join(surface()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        FILE.write_text(text)
    assert text == FILE.read_text(), (
        "The public surface changed. If you meant it, run UPDATE_GOLDEN=1 make test and review "
        f"the difference of {FILE.name}."
    )
