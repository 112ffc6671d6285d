"""Turns checkpoints into the other format: Hugging Face ↔ Orbax.

  ouro convert --from=ByteDance/Ouro-1.4B --to=runs/released     Hugging Face folder → stage folder
  ouro convert --from=runs/tiny --to=exported                    workdir or stage → safetensors

The direction follows from what `--from` is. A stage folder made this way serves as
`--config.init_from` and as `--checkpoint`. A tokenizer is taken along. Dtypes are kept.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from ouro_jax.cli.common import required, run_verb
from ouro_jax.cli.open_checkpoint import open_checkpoint
from ouro_jax.config import num_parameters
from ouro_jax.errors import ConfigError

flags.DEFINE_string("from", "", "Hugging Face folder, or workdir or stage of a run.")
flags.DEFINE_string("to", "", "Folder to write; new or empty.")


def main() -> Mapping[str, Any]:
    """The verb."""
    source = Path(required("from", "runs/tiny"))
    target = Path(required("to", "exported"))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to = {str(target)!r}: not empty; name a new or an empty folder.")
    checkpoint = open_checkpoint(source)
    target.mkdir(parents=True, exist_ok=True)
    if checkpoint.is_huggingface:
        from ouro_jax.training.checkpoints import save_params

        save_params(target, checkpoint.params, checkpoint.config)
    else:
        from ouro_jax.interop.huggingface import save_huggingface

        save_huggingface(checkpoint.config, checkpoint.params, target)
    if checkpoint.tokenizer_file is not None:
        shutil.copyfile(checkpoint.tokenizer_file, target / "tokenizer.json")
    written = "Orbax" if checkpoint.is_huggingface else "Hugging Face"
    parameters = num_parameters(checkpoint.config)
    print(f"{target}: {parameters:,} parameters in the {written} format.")
    return {"from": str(source), "to": str(target), "format": written, "parameters": parameters}


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
