"""Reading and writing safetensors files a tensor at a time.

The format: 8 bytes, the little-endian length of a JSON header; the header, one entry per tensor
with dtype, shape and its span of the data; the data. It is read and written here and not by the
safetensors library, because that maps the whole file on reading (pages add up in resident memory
beside the arrays made from them) and wants all tensors at once on writing.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ouro_jax.errors import ConfigError

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `dtype` is the file's own name (`BF16`), `begin` a byte of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def read_into(self, array: np.ndarray) -> None:
        """Fills the contiguous `array` of this dtype and size with the tensor's bytes."""
        target = array.reshape(-1).view(np.uint8).data
        with self.file.open("rb") as file:
            file.seek(self.begin)
            if file.readinto(target) != len(target):
                raise ConfigError(f"{self.file}: shorter than its header says.")


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; their data is not read.

    Raises ConfigError, naming the file, if it is missing, cut off, or not a safetensors file, or
    holds a dtype other than float32, bfloat16 and int8.
    """
    try:
        entries, start, size = _read_entries(path)
        tensors = {name: _stored(path, entry, start) for name, entry in entries.items()}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path}: not a whole safetensors file ({error}). Copy or download it again."
        ) from error
    unknown = {name: t.dtype for name, t in tensors.items() if t.dtype not in DTYPES}
    if unknown:
        raise ConfigError(f"{path}: dtypes {unknown}; supported are {', '.join(DTYPES)}.")
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.begin):
        if tensor.begin != end:
            raise ConfigError(f"{path}: corrupt: its tensors overlap or leave a gap at byte {end}.")
        end += DTYPES[tensor.dtype].itemsize * math.prod(tensor.shape)
    if end != size:
        raise ConfigError(f"{path}: {size:,} bytes, its header says {end:,}. Download it again.")
    return tensors


def _read_entries(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header without its metadata, the first byte of the data, the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        if length > _MAX_HEADER_BYTES or start > size:
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        entries = json.loads(file.read(length))
    if not isinstance(entries, dict):
        raise ValueError("the header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries, start, size


def _stored(path: Path, entry: Mapping[str, Any], start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(extent) for extent in entry["shape"])
    tensor = StoredTensor(path, str(entry["dtype"]), shape, start + int(begin))
    if min(shape, default=0) < 0 or begin < 0:
        raise ValueError(f"a tensor of shape {shape} at {begin}")
    if tensor.dtype in DTYPES and end - begin != DTYPES[tensor.dtype].itemsize * math.prod(shape):
        raise ValueError(f"{end - begin:,} bytes for a {tensor.dtype} tensor of shape {shape}")
    return tensor


def write_safetensors(
    path: Path, specs: Iterable[TensorSpec], read: Callable[[str], np.ndarray]
) -> None:
    """Writes the tensors that `read(name)` yields, one at a time, and then renames into place.

    The widest dtypes come first, so that every tensor is aligned to its own size.
    """
    specs = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": names[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for spec in specs:
            data = np.ascontiguousarray(read(spec.name))
            if (data.dtype, data.shape) != (spec.dtype, spec.shape):
                raise ValueError(f"{spec.name}: {data.dtype}{data.shape} for {spec}")
            file.write(data.reshape(-1).view(np.uint8).data)


class replacing:
    """`with replacing(path) as part:` writes beside `path` and renames when all went well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")

    def __enter__(self) -> Path:
        return self._part

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            os.replace(self._part, self._path)
        else:
            self._part.unlink(missing_ok=True)
