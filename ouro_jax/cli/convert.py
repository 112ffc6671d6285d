"""Turns a run's newest checkpoint into the Hugging Face format, or the other way round.

  ouro convert --from=runs/tiny --to=exports/tiny
  ouro convert --from=runs/tiny/stable_1a --to=exports/tiny_1a
  ouro convert --from=downloads/Ouro-1.4B --to=checkpoints/ouro_1p4b

--from takes a workdir, one of its stages, or a folder with config.json and safetensors; what it
is decides the direction. --to names a new or empty folder. Tensors keep their dtypes bit for bit;
a tokenizer.json beside the checkpoint is copied along.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from ouro_jax.cli.common import required, run_verb
from ouro_jax.config import ConfigError, num_parameters

flags.DEFINE_string("from", "", "Workdir, stage folder or Hugging Face folder to read.")
flags.DEFINE_string("to", "", "New or empty folder to write.")


def main() -> Mapping[str, Any]:
    """The verb."""
    source = Path(required("from", "runs/tiny"))
    target = Path(required("to", "exports/tiny"))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to={target}: exists and is not an empty folder; choose another.")
    # Loading jax and Orbax takes seconds; a wrong flag should not wait for them.
    from ouro_jax.interop.huggingface import load_huggingface, save_huggingface
    from ouro_jax.training.checkpoints import load_params, save_params
    from ouro_jax.training.start import is_huggingface

    if is_huggingface(source):
        written = "orbax"
        model, params = load_huggingface(source)
        save_params(target, params, model)
    else:
        written = "huggingface"
        position, params = load_params(source)
        model = position.model
        target.mkdir(parents=True, exist_ok=True)
        save_huggingface(model, params, target)
    _copy_tokenizer(source, target)
    parameters = num_parameters(model)
    print(f"{target}: {parameters:,} parameters in the {written} format")
    return {"to": str(target), "format": written, "parameters": parameters}


def _copy_tokenizer(source: Path, target: Path) -> None:
    """From the folder itself or, for a stage, from its workdir."""
    for folder in (source, source.resolve().parent):
        if (folder / "tokenizer.json").is_file():
            shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
            return


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
