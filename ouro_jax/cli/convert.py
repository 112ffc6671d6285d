"""Turns checkpoints into the other format: Hugging Face ↔ Orbax.

  ouro convert --from=ByteDance/Ouro-1.4B --to=runs/released     Hugging Face folder → stage folder
  ouro convert --from=runs/tiny --to=exported                    workdir or stage → safetensors
  ouro convert --from=ByteDance/Ouro-1.4B --to=int8 --quantize=int8 --calibrate=sample.txt

The direction follows from what `--from` is. A stage folder made this way serves as
`--config.init_from` and as `--checkpoint`. A tokenizer is taken along. Dtypes are kept.

--quantize=int8 makes matrices of one byte a weight, for `ouro generate` and not for training, in
the Hugging Face format whatever `--from` is. --calibrate names a text file like what the model
will read (UTF-8; some 100 KB are used), which makes the error of later loops smaller
(docs/quantize.md).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from ouro_jax.cli.common import FLAGS, required, run_verb
from ouro_jax.cli.open_checkpoint import Checkpoint, open_checkpoint
from ouro_jax.config import num_parameters
from ouro_jax.errors import ConfigError, require_choice

# More than the tokens that are used need; a file of gigabytes is not to be tokenised whole.
_CALIBRATION_CHARACTERS = 1_000_000

flags.DEFINE_string("from", "", "Hugging Face folder, or workdir or stage of a run.")
flags.DEFINE_string("to", "", "Folder to write; new or empty.")

flags.DEFINE_string("quantize", "", "int8, or nothing for weights as they are.")
flags.DEFINE_string("calibrate", "", "Text file to choose the int8 numbers by.")


def main() -> Mapping[str, Any]:
    """The verb."""
    source = Path(required("from", "runs/tiny"))
    target = Path(required("to", "exported"))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to = {str(target)!r}: not empty; name a new or an empty folder.")
    text = _calibration_text()
    checkpoint = open_checkpoint(source)
    _refuse_quantised(source, checkpoint)
    params = _quantised(checkpoint, text) if FLAGS.quantize else checkpoint.params
    to_orbax = checkpoint.is_huggingface and not FLAGS.quantize
    target.mkdir(parents=True, exist_ok=True)
    if to_orbax:
        from ouro_jax.training.checkpoints import save_params

        save_params(target, params, checkpoint.config)
    else:
        from ouro_jax.interop.huggingface import save_huggingface

        save_huggingface(checkpoint.config, params, target)
    if checkpoint.tokenizer_file is not None:
        shutil.copyfile(checkpoint.tokenizer_file, target / "tokenizer.json")
    written = "Orbax" if to_orbax else "Hugging Face"
    parameters = num_parameters(checkpoint.config)
    as_what = f", matrices as {FLAGS.quantize}" if FLAGS.quantize else ""
    print(f"{target}: {parameters:,} parameters in the {written} format{as_what}.")
    return {
        "from": str(source), "to": str(target), "format": written, "parameters": parameters,
        "quantize": FLAGS.quantize or None,
    }  # fmt: skip


def _calibration_text() -> str | None:
    """What `--calibrate` names, before anything slow is begun; wrong flags are refused here."""
    path = FLAGS.calibrate
    if FLAGS.quantize:
        from ouro_jax.inference.quantize import METHODS

        require_choice(FLAGS.quantize, METHODS, "--quantize")
    elif path:
        raise ConfigError(f"--calibrate = {path!r}: expected --quantize=int8 with it.")
    if not path:
        return None
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--calibrate = {path!r}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--calibrate = {path!r}: expected UTF-8 text ({error}).") from error


def _refuse_quantised(source: Path, checkpoint: Checkpoint) -> None:
    """int8 weights cannot be quantised again nor trained, which is what a stage is for."""
    from ouro_jax.model.int8 import is_quantised

    if is_quantised(checkpoint.params):
        raise ConfigError(
            f"--from = {str(source)!r}: its weights are int8 already: expected float weights. "
            "`ouro generate` reads it as it is; convert the checkpoint that it was made from."
        )


def _quantised(checkpoint: Checkpoint, text: str | None) -> dict[str, Any]:
    from ouro_jax.data.tokenizer import encode, load_tokenizer
    from ouro_jax.inference.quantize import calibration_rows, quantize

    rows_BL = None
    if text is not None:
        if checkpoint.tokenizer_file is None:
            raise ConfigError(
                f"--calibrate = {FLAGS.calibrate!r}: there is no tokenizer.json beside --from; "
                "expected one to read the text with."
            )
        ids = encode(load_tokenizer(checkpoint.tokenizer_file), text[:_CALIBRATION_CHARACTERS])
        rows_BL = calibration_rows(checkpoint.config, ids)
    return quantize(checkpoint.config, checkpoint.params, rows_BL)


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__)


if __name__ == "__main__":
    run()
