"""Fingerprints of documents: which are nearly the same, and which quote an evaluation set.

A text is compared by its words: Unicode NFKC, case folded, punctuation and white space dropped;
characters of Chinese and Japanese, written without spaces, are words of their own. Nearness is
the share of common five-word shingles (Jaccard), estimated by datasketch's MinHash; candidates
come from its bands (locality-sensitive hashing), sorted on disk instead of in its dictionaries,
which take 5 KB a document.

N documents, W words, G n-grams, P permutations (hash values of a signature).
"""

import functools
import hashlib
import importlib
import re
import unicodedata
from typing import Any

import numpy as np

from ouro_jax.errors import ConfigError

SHINGLE_WORDS = 5  # a document with fewer has no near duplicates, only exact ones
PASSAGE_WORDS = 13  # shared with an evaluation text, they are a contamination
NUM_PERMUTATIONS = 128  # the estimate's standard error at a similarity of 0.8 is 3.5 points
# Candidates are compared again, so a missed pair weighs more than a false candidate: at a
# threshold of 0.8 this gives 16 bands of 8, which find 95 % of the pairs at 0.8, 99 % at 0.85.
BAND_WEIGHTS = (0.05, 0.95)
MAX_BAND_SIMILARITY = 0.8  # those bands find 99.99 % of the pairs at 0.9; for 1 there are none
UPDATE_SHINGLES = 4096  # hashed at once: 2 MB of temporaries, however long a document is
COMPARE_ROWS = 1 << 16  # signatures read at once: 32 MB

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, of well-mixed bits


def word_hashes(text: str) -> np.ndarray:
    """hash_W (uint64) of the words of a text."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return np.fromiter(map(_hash_word, words), np.uint64, len(words))


@functools.lru_cache(1 << 18)  # some 40 MB; nearly all words of a text were seen before
def _hash_word(word: str) -> int:
    data = word.encode("utf-8", "surrogatepass")  # a lone surrogate is as good as any letter
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def ngram_hashes(hash_W: np.ndarray, length: int) -> np.ndarray:
    """hash_G (uint64) of all runs of `length` words; none if there are fewer words."""
    if len(hash_W) < length or not length:
        return hash_W[:0]
    factors = np.array([pow(_MULTIPLIER, i, 1 << 64) for i in range(length)], np.uint64)
    return np.lib.stride_tricks.sliding_window_view(hash_W, length) @ factors


def passage_hashes(hash_W: np.ndarray) -> np.ndarray:
    """hash_G of the 13-word passages of a text; of a shorter text, of the whole of it.

    So a text of 1 to 12 words only ever meets one of exactly these words.
    """
    return ngram_hashes(hash_W, min(len(hash_W), PASSAGE_WORDS))


def is_among(hash_G: np.ndarray, sorted_E: np.ndarray) -> bool:
    """Whether any of `hash_G` is in the ascending `sorted_E`."""
    if not len(sorted_E):
        return False
    place_G = np.minimum(np.searchsorted(sorted_E, hash_G), len(sorted_E) - 1)
    return bool((sorted_E[place_G] == hash_G).any())


def datasketch() -> Any:
    """The library of the extra `clean`; ConfigError saying so if it is not installed."""
    try:
        return importlib.import_module("datasketch")
    except ImportError as error:
        raise ConfigError(
            "cleaning takes datasketch. Run pip install 'ouro_jax[clean]'."
        ) from error


@functools.cache
def _empty_sketch() -> Any:
    return datasketch().MinHash(NUM_PERMUTATIONS, seed=1, scheme="affine32", hashfunc=int)


def signature(hash_W: np.ndarray) -> np.ndarray:
    """The MinHash signature_P (uint32) of a text's shingles; all ones bits if it has none."""
    sketch = _empty_sketch().copy()
    shingles = (ngram_hashes(hash_W, SHINGLE_WORDS) >> np.uint64(32)).tolist()
    for start in range(0, len(shingles), UPDATE_SHINGLES):
        sketch.update_batch(shingles[start : start + UPDATE_SHINGLES])
    return sketch.hashvalues


def has_shingles(signature_NP: np.ndarray) -> np.ndarray:
    """Which signatures are of texts with at least one shingle."""
    return signature_NP[:, 0] != np.iinfo(np.uint32).max


def first_of_near_duplicates(signature_NP: np.ndarray, similarity: float) -> np.ndarray:
    """first_N: the index of the first document of the group that each one belongs to.

    Two documents that share a band and agree in at least `similarity` of their hash values are
    near duplicates, and groups are what is connected by such pairs. Each document of a band's
    bucket is compared with the one before it and with the bucket's first, so a bucket of any size
    costs no more than its size. `signature_NP` may be a memory map; some 80 bytes a document are
    held besides.
    """
    threshold = min(similarity, MAX_BAND_SIMILARITY)
    bands = datasketch().MinHashLSH(threshold, NUM_PERMUTATIONS, BAND_WEIGHTS)
    first_N = np.arange(len(signature_NP))
    for band in range(bands.b):
        key_N = _band_keys(signature_NP, slice(band * bands.r, (band + 1) * bands.r))
        order_N = np.argsort(key_N, kind="stable")
        key_N = key_N[order_N]
        begins = np.concatenate([[True], key_N[1:] != key_N[:-1]])
        start, later = np.flatnonzero(begins), np.flatnonzero(~begins)
        start_of_later = start[np.searchsorted(start, later) - 1]
        for earlier in (later - 1, start_of_later):
            first_N = _join_near(
                signature_NP, similarity, first_N, order_N[earlier], order_N[later]
            )
    return first_N


def _join_near(
    signature_NP: np.ndarray,
    similarity: float,
    first_N: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
) -> np.ndarray:
    """`first_N` after the groups of those pairs that are near have become one each."""
    apart = first_N[left] != first_N[right]
    left, right = left[apart], right[apart]
    near = _agreement(signature_NP, left, right) >= similarity
    return _join(first_N, left[near], right[near]) if near.any() else first_N


def _band_keys(signature_NP: np.ndarray, band: slice) -> np.ndarray:
    """A hash of the values of every document in one band."""
    factors = np.array(
        [pow(_MULTIPLIER, i, 1 << 64) for i in range(1, band.stop - band.start + 1)], np.uint64
    )
    key_N = np.empty(len(signature_NP), np.uint64)
    for start in range(0, len(key_N), COMPARE_ROWS):
        rows = slice(start, start + COMPARE_ROWS)
        key_N[rows] = signature_NP[rows, band].astype(np.uint64) @ factors
    return key_N


def _agreement(signature_NP: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The share of equal hash values, which estimates the similarity, of each pair."""
    share = np.empty(len(left))
    for start in range(0, len(left), COMPARE_ROWS):
        pairs = slice(start, start + COMPARE_ROWS)
        share[pairs] = (signature_NP[left[pairs]] == signature_NP[right[pairs]]).mean(axis=1)
    return share


def _join(first_N: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`first_N` after the groups of all pairs have become one each."""
    # Half a second to load, and with datasketch anyway.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    member = np.flatnonzero(first_N != np.arange(len(first_N)))
    ends = np.concatenate([member, left]), np.concatenate([first_N[member], right])
    size = (len(first_N), len(first_N))
    edges = coo_array((np.ones(len(ends[0]), bool), ends), size)
    _, group_N = connected_components(edges, directed=False)
    _, first = np.unique(group_N, return_index=True)
    return first[group_N]
