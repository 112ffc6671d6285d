"""What every loop makes of held-out tokens: its loss, its best guess, how sure it is, its gate.

T loops, B rows, L sequence, N tokens that are scored, S chunks of C tokens, D model width,
V vocabulary.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from ouro_jax.config import ModelConfig
from ouro_jax.data.batch import Batch
from ouro_jax.data.mixture import HeldoutBatch, heldout_batches, list_sources
from ouro_jax.errors import ConfigError, require
from ouro_jax.experiments.study import Record, Subject
from ouro_jax.model.exit import state_change, top_probability
from ouro_jax.model.loop_lm import LoopLM, LoopOutput

BATCH_TOKENS = 8192
CHUNK_TOKENS = 1024  # rows of logits that are held at once


@dataclass(frozen=True)
class Heldout:
    """Held-out batches: by source a function that gives them, the same ones at each call.

    `name` says in records which rows these are. The bytes of a batch are 0 where nobody knows them.
    """

    name: str
    sequence_length: int
    sources: Mapping[str, Callable[[], Iterable[HeldoutBatch]]]

    @property
    def key(self) -> Record:
        """What tells records on these rows from those on others."""
        return {"heldout": self.name, "sequence_length": self.sequence_length}


class TokenScores(NamedTuple):
    """Numpy arrays over the scored tokens, and the bytes of text they stand for (0: not known).

    `loss_TN` in nats, `correct_TN` whether the most probable token is the next one,
    `confidence_TN` its probability, `gate_logits_TN`, and `moved_TN` [T-1, N], the L2 norm of the
    state's change from the second loop on.
    """

    loss_TN: np.ndarray
    correct_TN: np.ndarray
    confidence_TN: np.ndarray
    gate_logits_TN: np.ndarray
    moved_TN: np.ndarray
    num_bytes: int


def prepared_heldout(
    root: str, sequence_length: int | None = None, rows: int = 64, sources: Sequence[str] = ()
) -> Heldout:
    """Held-out rows of prepared data at `root`.

    At most `rows` of each source, of all sources there are if none is named. Without a
    `sequence_length` it is the longest of which all of them have held-out rows. ConfigError if
    there is no such data.
    """
    there = list_sources(root)
    lengths = {
        name: {length for split, length in entries if split == "heldout"}
        for name, entries in there.items()
        if not sources or name in sources
    }
    if missing := set(sources) - set(there):
        raise ConfigError(f"sources {sorted(missing)}: {root} has {', '.join(there) or 'none'}.")
    common = set.intersection(*lengths.values()) if lengths else set()
    if sequence_length is not None:
        common &= {sequence_length}
    if not common:
        raise ConfigError(
            f"{root}: no held-out rows of one length in all sources; found "
            f"{ {name: sorted(found) for name, found in lengths.items()} }, asked for "
            f"{sequence_length or 'any'}. Prepare data with `ouro data prepare`, or name sources."
        )
    length = max(common)
    batch_rows = max(1, min(rows, BATCH_TOKENS // length))
    batches = {
        name: functools.partial(heldout_batches, root, name, length, batch_rows, rows)
        for name in sorted(lengths)
    }
    return Heldout(f"{rows} rows of {root}", length, batches)


def token_scores(subject: Subject, batches: Iterable[HeldoutBatch], num_loops: int) -> TokenScores:
    """The scores of all tokens of `batches` that count, after loops 1 … `num_loops`."""
    parts, num_bytes = [], 0
    for batch, bytes_of_batch in batches:
        counted_BL = np.asarray(batch.loss_mask_BL, bool)
        scores = jax.device_get(_scores(subject.config, subject.params, batch, num_loops))
        parts.append([array_TBL[:, counted_BL] for array_TBL in scores])
        num_bytes += bytes_of_batch
    if not parts:
        raise ConfigError("there is no held-out row to score.")
    arrays = [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]
    return TokenScores(*arrays, num_bytes=num_bytes)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _scores(config: ModelConfig, params: Any, batch: Batch, num_loops: int) -> list[jax.Array]:
    model = LoopLM(config, remat="none")
    out = cast(LoopOutput, model.apply(
        {"params": params}, batch.tokens_BL, batch.positions_BL, batch.segment_ids_BL,
        num_loops=num_loops,
    ))  # fmt: skip
    states_TBLD = out.states_TBLD
    loops, rows, length, width = states_TBLD.shape
    chunks = -(-rows * length // CHUNK_TOKENS)
    missing = chunks * CHUNK_TOKENS - rows * length

    def read_chunk(chunk):
        states_CD, targets_C = chunk
        logits_CV = cast(jax.Array, model.apply({"params": params}, states_CD, method="logits"))
        target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        loss_C = jax.nn.logsumexp(logits_CV, axis=-1) - target_C
        return loss_C, jnp.argmax(logits_CV, axis=-1) == targets_C, top_probability(logits_CV)

    def read_loop(states_BLD):
        states_ND = jnp.pad(states_BLD.reshape(-1, width), ((0, missing), (0, 0)))
        targets_N = jnp.pad(jnp.ravel(batch.targets_BL), (0, missing))
        chunked = states_ND.reshape(chunks, -1, width), targets_N.reshape(chunks, -1)
        scores_SC = jax.lax.map(read_chunk, chunked)
        return [x_SC.reshape(-1)[: rows * length].reshape(rows, length) for x_SC in scores_SC]

    moved_TBL = state_change(states_TBLD[1:], states_TBLD[:-1])
    return [*jax.lax.map(read_loop, states_TBLD), out.gate_logits_TBL, moved_TBL]


def heldout_prompts(heldout: Heldout, length: int, count: int) -> list[list[int]]:
    """The first `length` tokens of `count` held-out documents, from the sources in turns.

    ConfigError if fewer documents are that long.
    """
    sources = [_openings(batches(), length) for batches in heldout.sources.values()]
    in_turns = (opening for turn in itertools.zip_longest(*sources) for opening in turn)
    found = list(itertools.islice((opening for opening in in_turns if opening), count))
    require(len(found) == count, "prompts", count,
            f"at most {len(found)}, the held-out documents of {length} tokens or more")  # fmt: skip
    return found


def _openings(batches: Iterable[HeldoutBatch], length: int) -> Iterator[list[int]]:
    for batch, _ in batches:
        for tokens_L, segments_L in zip(batch.tokens_BL, batch.segment_ids_BL, strict=True):
            for segment in range(1, int(segments_L.max()) + 1):
                document = tokens_L[segments_L == segment]
                if len(document) >= length:
                    yield document[:length].tolist()
