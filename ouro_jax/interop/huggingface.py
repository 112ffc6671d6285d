"""Checkpoints in the Hugging Face format of the released Ouro models, in and out.

Only `config.json` and the weights are read; nothing of torch or transformers is needed. Tensors
pass one at a time, so a model is never held twice. D model width, H heads, G KV heads, K head
width, F MLP width, V vocabulary.

A quantised checkpoint has int8 matrices, `….weight`, each with a float32 `….weight_scale` [out, 1]
beside it that it is to be multiplied with, and says so in `config.json` (`quantization_config`).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ouro_jax.config import ModelConfig
from ouro_jax.errors import ConfigError
from ouro_jax.interop.huggingface_config import (
    QUANTIZATION_KEY,
    config_from_json,
    config_to_json,
)
from ouro_jax.interop.safetensors_file import (
    DTYPES,
    StoredTensor,
    TensorSpec,
    read_header,
    replacing,
    write_safetensors,
)
from ouro_jax.model.int8 import LAYER_MATRICES, SCALE, is_quantised

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Params = dict[str, Any]


@dataclass(frozen=True)
class _Leaf:
    """One leaf of the parameter tree and the tensors it holds.

    `name` has a `{}` for the layer in stacked leaves; `stored` is torch's shape of one tensor
    ([out, in] for matrices), `shape` ours of the same ([in, out], heads split). `dtypes` are the
    file's names of those it may have.
    """

    path: tuple[str, ...]
    name: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    layers: int
    dtypes: tuple[str, ...] = ("F32", "BF16")

    @property
    def stacked(self) -> bool:
        return self.layers > 0

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (self.layers, *self.shape) if self.stacked else self.shape

    @property
    def names(self) -> list[str]:
        return [self.name.format(layer) for layer in range(self.layers)] or [self.name]

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"


def load_huggingface(
    directory: str | Path, place: Callable[[tuple[str, ...], np.ndarray], Any] | None = None
) -> tuple[ModelConfig, Params]:
    """Reads a released checkpoint: `config, params = load_huggingface(directory)`.

    Reads `config.json` and `model.safetensors`, or the files that `model.safetensors.index.json`
    names, and nothing else. The arrays are plain (not boxed), on the default device, and keep the
    dtypes of the file; those of a quantised checkpoint are as `inference.quantize` makes them.
    `place(path, array)` puts a leaf elsewhere, for instance onto a mesh.
    Fields of `config.json` that change nothing are kept for writing back.

    Raises ConfigError for a missing or damaged file, for missing, surplus or wrongly shaped
    tensors (all are named), and for config values that this model does not implement.
    """
    directory = Path(directory)
    fields = read_json(directory / CONFIG_FILE)
    tensors = _stored_tensors(directory)
    embedding = tensors.get("model.embed_tokens.weight")
    dtype = DTYPES[embedding.dtype].name if embedding else None
    config = config_from_json(fields, dtype, str(directory / CONFIG_FILE))
    leaves = _leaves(config, quantised=fields.get(QUANTIZATION_KEY) is not None)
    _require_fit(directory, leaves, tensors)
    params: Params = {}
    # The largest first: its host copy, which jax drops late, then adds to little else.
    for leaf in sorted(leaves, key=lambda leaf: -math.prod(leaf.full_shape)):
        holder = params
        for key in leaf.path[:-1]:
            holder = holder.setdefault(key, {})
        array = _read_leaf(leaf, tensors)
        # Transfers are asynchronous; unless each is awaited, all host copies wait for theirs.
        holder[leaf.path[-1]] = jax.block_until_ready(
            place(leaf.path, array) if place else jnp.asarray(array)
        )
    return config, params


def save_huggingface(config: ModelConfig, tree: Mapping[str, Any], directory: str | Path) -> None:
    """Writes `config.json` and one `model.safetensors` into the existing folder `directory`.

    `tree` has the structure of the parameters (gradients have it too) and keeps its dtypes,
    float32 or bfloat16; a quantised one makes a quantised checkpoint. A loaded checkpoint is
    written back bit for bit, its `config.json` with the same fields. The released modelling code
    and its two `.py` files are the reader's to add; vLLM has its own, which computes head_dim as
    hidden_size / heads whatever the config says.

    Raises ConfigError if the folder is missing or the tree does not fit `config`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such folder. Make it first; the model goes inside.")
    quantised = is_quantised(tree)
    leaves = _leaves(config, quantised)
    arrays = _require_tree(leaves, tree)
    specs = [
        TensorSpec(name, np.dtype(arrays[leaf.path].dtype), leaf.stored)
        for leaf in leaves
        for name in leaf.names
    ]
    sources = {
        name: (leaf, layer) for leaf in leaves for layer, name in enumerate(leaf.names)
    }  # fmt: skip

    def tensor(name: str) -> np.ndarray:
        leaf, layer = sources[name]
        array = arrays[leaf.path]
        # One layer leaves the device at a time; the whole array would stay cached on the host.
        piece = np.asarray(array[layer] if leaf.stacked else array)
        if leaf.transposed:
            return piece.reshape(leaf.stored[::-1]).T
        return piece.reshape(leaf.stored)

    write_safetensors(directory / WEIGHTS_FILE, specs, tensor)
    with replacing(directory / CONFIG_FILE) as part:
        part.write_text(json.dumps(config_to_json(config, quantised), indent=2) + "\n")


def _leaves(config: ModelConfig, quantised: bool) -> list[_Leaf]:
    """The parameter tree beside the tensors: 11 a layer and 5 others, and the scales if int8."""
    if not quantised:
        return _float_leaves(config)
    inputs: dict[tuple[str, ...], int] = {("lm_head",): 1}
    inputs |= {("stack", "layers", *module): axes for module, axes in LAYER_MATRICES.items()}
    leaves = []
    for leaf in _float_leaves(config):
        module = leaf.path[:-1]
        leaves += _pair(leaf, inputs[module]) if module in inputs else [leaf]
    return leaves


def _pair(leaf: _Leaf, inputs: int) -> list[_Leaf]:
    """An int8 kernel, whose first `inputs` axes a product sums over, and its scale."""
    scale = _Leaf(
        (*leaf.path[:-1], SCALE), f"{leaf.name}_scale", (leaf.stored[0], 1), leaf.shape[inputs:],
        leaf.layers, ("F32",),
    )  # fmt: skip
    return [replace(leaf, dtypes=("I8",)), scale]


def _float_leaves(config: ModelConfig) -> list[_Leaf]:
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    H, G, K = config.num_heads, config.num_kv_heads, config.head_dim
    matrices = [
        ("self_attn/q_proj", (H * K, D), (D, H, K)),
        ("self_attn/k_proj", (G * K, D), (D, G, K)),
        ("self_attn/v_proj", (G * K, D), (D, G, K)),
        ("self_attn/o_proj", (D, H * K), (H, K, D)),
        ("mlp/gate_proj", (F, D), (D, F)),
        ("mlp/up_proj", (F, D), (D, F)),
        ("mlp/down_proj", (D, F), (F, D)),
    ]
    norms = ("input_layernorm", "input_layernorm_2",
             "post_attention_layernorm", "post_attention_layernorm_2")  # fmt: skip
    in_layer = [(f"{path}/kernel", stored, shape) for path, stored, shape in matrices]
    in_layer += [(f"{norm}/scale", (D,), (D,)) for norm in norms]
    leaves = [_Leaf(("embed_tokens", "embedding"), "model.embed_tokens.weight", (V, D), (V, D), 0)]
    for path, stored, shape in in_layer:
        *module, _ = path.split("/")
        name = f"model.layers.{{}}.{'.'.join(module)}.weight"
        leaf_path = ("stack", "layers", *path.split("/"))
        leaves.append(_Leaf(leaf_path, name, stored, shape, config.num_layers))
    gate = "model.early_exit_gate"
    return [
        *leaves,
        _Leaf(("stack", "norm", "scale"), "model.norm.weight", (D,), (D,), 0),
        _Leaf(("stack", "early_exit_gate", "kernel"), f"{gate}.weight", (1, D), (D, 1), 0),
        _Leaf(("stack", "early_exit_gate", "bias"), f"{gate}.bias", (1,), (1,), 0),
        _Leaf(("lm_head", "kernel"), "lm_head.weight", (V, D), (D, V), 0),
    ]


def _read_leaf(leaf: _Leaf, tensors: Mapping[str, StoredTensor]) -> np.ndarray:
    """One leaf, filled tensor by tensor."""
    array = np.empty(leaf.full_shape, DTYPES[tensors[leaf.names[0]].dtype])
    pieces = array if leaf.stacked else array[None]
    for piece, name in zip(pieces, leaf.names, strict=True):
        if leaf.transposed:
            stored = np.empty(leaf.stored, array.dtype)
            tensors[name].read_into(stored)
            piece.reshape(leaf.stored[::-1])[...] = stored.T
        else:
            tensors[name].read_into(piece)
    return array


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ConfigError naming the file if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


def _stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of the single file, or of the files that the index names."""
    weights, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if weights.exists():
        return read_header(weights)
    if not index.exists():
        raise ConfigError(f"{directory}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}.")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ConfigError(f"{index}: weight_map: expected an object of tensor names and files.")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise ConfigError(f"{index}: weight_map names {file!r}: expected a file beside it.")
        shard = read_header(directory / file)
        elsewhere = [name for name in shard if places.get(name) != file]
        absent = [name for name, place in places.items() if place == file and name not in shard]
        if elsewhere or absent:
            raise ConfigError(
                f"{directory / file}: differs from {INDEX_FILE}: missing {absent}, surplus "
                f"{elsewhere}."
            )
        tensors |= shard
    return tensors


def _require_fit(directory: Path, leaves: list[_Leaf], tensors: Mapping[str, StoredTensor]) -> None:
    """Raises a ConfigError that names every tensor that is missing, surplus or does not fit."""
    expected = {name: leaf for leaf in leaves for name in leaf.names}
    problems = [
        f"missing {name} {list(leaf.stored)}"
        for name, leaf in expected.items()
        if name not in tensors
    ]
    problems += [
        f"surplus {name} {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name not in expected
    ]
    for name, leaf in expected.items():
        if name in tensors and tensors[name].shape != leaf.stored:
            problems.append(
                f"{name} has shape {list(tensors[name].shape)}, expected {list(leaf.stored)}"
            )
        if name in tensors and tensors[name].dtype not in leaf.dtypes:
            problems.append(f"{name} is {tensors[name].dtype}, expected {' or '.join(leaf.dtypes)}")
    for leaf in leaves:
        dtypes = sorted({tensors[name].dtype for name in leaf.names if name in tensors})
        if len(dtypes) > 1:
            problems.append(f"{leaf.name.format('*')} has dtypes {dtypes}, expected one")
    if problems:
        raise ConfigError(
            f"{directory}: the tensors do not fit {CONFIG_FILE}:\n  " + "\n  ".join(problems)
        )


def _require_tree(leaves: list[_Leaf], tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """The arrays of `tree` by path; a ConfigError names all that do not fit the model."""
    arrays = {
        tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/")): array
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
    }
    expected = {leaf.path: leaf for leaf in leaves}
    problems = [f"missing {'/'.join(path)}" for path in expected if path not in arrays]
    problems += [f"surplus {'/'.join(path)}" for path in arrays if path not in expected]
    for path, leaf in expected.items():
        if path not in arrays:
            continue
        array, shape = arrays[path], leaf.full_shape
        if array.shape != shape:
            problems.append(f"{'/'.join(path)} has shape {array.shape}, expected {shape}")
        dtypes = [DTYPES[name].name for name in leaf.dtypes]
        if array.dtype.name not in dtypes:
            problems.append(f"{'/'.join(path)} is {array.dtype}, expected {' or '.join(dtypes)}")
    if problems:
        raise ConfigError("The tree does not fit the model config:\n  " + "\n  ".join(problems))
    return arrays
