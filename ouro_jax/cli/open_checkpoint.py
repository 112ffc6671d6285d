"""What `--checkpoint` means: a workdir, one of its stages, or a Hugging Face folder."""

import dataclasses
from pathlib import Path
from typing import Any

from etils import epath

from ouro_jax.config import STAGE_ORDER, ModelConfig
from ouro_jax.errors import ConfigError
from ouro_jax.interop.huggingface import load_huggingface
from ouro_jax.training.checkpoint_files import checkpoint_root, steps_of
from ouro_jax.training.checkpoints import latest_stage, load_params
from ouro_jax.training.start import is_huggingface


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model, where its tokenizer lies (None: there is none), and the stage's name."""

    config: ModelConfig
    params: Any
    tokenizer_file: Path | None
    is_huggingface: bool
    name: str


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the checkpoint at `path`; ConfigError if there is none or it cannot be read."""
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(
            f"checkpoint {str(path)!r}: no such folder; expected a workdir of `ouro train`, one of "
            "its stages, or a folder in the Hugging Face format."
        )
    if is_huggingface(path):
        config, params = load_huggingface(path)
        return Checkpoint(config, params, _tokenizer(path), True, path.name)
    stage = latest_stage(path)
    position, params = load_params(stage)
    # Checkpoints may lie in a bucket, but their tokenizer lies in the workdir.
    places = (path, path.parent) if steps_of(epath.Path(path)) else (path,)
    tokenizer_file = _tokenizer(*places)
    return Checkpoint(position.model, params, tokenizer_file, False, stage.name)


def has_checkpoint(workdir: str | Path) -> bool:
    """Whether a workdir holds a checkpoint of any stage yet."""
    root = checkpoint_root(workdir)
    return any(steps_of(root / name) for name in STAGE_ORDER)


def _tokenizer(*folders: epath.PathLike) -> Path | None:
    files = [Path(folder) / "tokenizer.json" for folder in folders]
    return next((file for file in files if file.is_file()), None)
