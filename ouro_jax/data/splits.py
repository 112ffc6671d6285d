"""Which documents are held out: decided by a hash, so the same everywhere and for ever."""

import hashlib

HELDOUT_SHARE = 20  # one document in so many


def stable_hash(text: str) -> int:
    """The same 64 bits for the same text on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def in_split(key: str, split: str) -> bool:
    """Whether the document named (or spelt) `key` belongs to `split`, `train` or `heldout`."""
    return (stable_hash(f"split/{key}") % HELDOUT_SHARE == 0) == (split == "heldout")
