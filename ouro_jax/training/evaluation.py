"""Held-out loss per source and per loop, and n-gram models fitted on what the model saw."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from ouro_jax.config import Config
from ouro_jax.data.bad_rows import BadRows
from ouro_jax.data.batch import Batch
from ouro_jax.data.mixture import heldout_batches, list_sources
from ouro_jax.data.ngram import evaluate_ngrams, fit_ngrams
from ouro_jax.parallel.host_rows import data_host, place
from ouro_jax.parallel.mesh import batch_sharding, batch_shards
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.stage_rows import open_stage_mixture
from ouro_jax.training.step import StepSpec, compiled_evaluation

EVALUATION_TOKENS = 8192


def heldout_sources(config: Config, root: epath.Path, sequence_length: int) -> list[str]:
    """Sources of any stage of the run that have held-out rows of this length."""
    used = {source for _, stage in config.stream() for source in stage.mixture}
    there = list_sources(root)
    return sorted(name for name in used if ("heldout", sequence_length) in there.get(name, []))


def evaluate(
    config: Config, root: epath.Path, plan: StagePlan, spec: StepSpec, params: Any
) -> Iterator[dict[str, Any]]:
    """One `heldout` record per source: nats per token and bits per byte after each loop."""
    length = plan.stage.sequence_length
    loops = config.evaluation.num_loops
    run = compiled_evaluation(spec.model, spec.mesh, loops)
    shards = batch_shards(spec.mesh)
    batch_rows = shards * max(1, EVALUATION_TOKENS // length // shards)
    sharding, host = batch_sharding(spec.mesh, microbatched=False), data_host(spec.mesh)
    rope_theta = jax.device_put(np.float32(plan.stage.rope_theta))
    for source in heldout_sources(config, root, length):
        totals, num_bytes = None, 0
        rows = config.evaluation.rows_per_source
        for batch, bytes_of_batch in heldout_batches(root, source, length, batch_rows, rows):
            # Every host reads the whole batch and gives its own rows.
            own = jax.tree.map(lambda x_BL: x_BL[host.index :: host.count], batch)
            sums = run(params, place(own, sharding), rope_theta)
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
            num_bytes += bytes_of_batch
        assert totals is not None, "open_source refuses an empty source"
        yield _record(source, jax.device_get(totals), num_bytes, spec.model.num_loops)


def _record(source: str, sums: Any, num_bytes: int, trained_loops: int) -> dict[str, Any]:
    means = {name: value.tolist() for name, value in sums.means().items()}
    nats_T = sums.metrics["loss_per_loop"]
    return {
        "kind": "heldout",
        "source": source,
        "loss_per_loop": means["loss_per_loop"],
        "bits_per_byte_per_loop": (nats_T / math.log(2) / max(num_bytes, 1)).tolist(),
        "trained_loops": trained_loops,
        "exit_distribution": means["exit_distribution"],
        "mean_depth": means["mean_depth"],
        "num_tokens": int(sums.num_tokens),
        "num_bytes": num_bytes,
    }


def ngram_baselines(
    config: Config, root: epath.Path, bad_rows: BadRows
) -> Iterator[dict[str, Any]]:
    """One `baseline` record per source: n-gram models fitted on the rows the whole run saw.

    Reads every training row again, so it is for small runs; evaluated on the same held-out rows
    as the model, at the last stage's row length.
    """
    model = fit_ngrams(_training_batches(config, root, bad_rows), config.model.vocab_size)
    length = config.stream()[-1][1].sequence_length
    rows = config.evaluation.rows_per_source
    for source in heldout_sources(config, root, length):
        score = evaluate_ngrams(model, heldout_batches(root, source, length, 64, rows))
        yield {
            "kind": "baseline",
            "source": source,
            "unigram_bits_per_byte": score.unigram_bits_per_byte,
            "bigram_bits_per_byte": score.bigram_bits_per_byte,
            "tokens": model.num_tokens,
        }


def _training_batches(config: Config, root: epath.Path, bad_rows: BadRows) -> Iterator[Batch]:
    for name, stage in config.stream():
        plan = StagePlan(name, stage)
        mixture = open_stage_mixture(config, root, plan, bad_rows)
        for start in range(0, plan.total_rows, 256):
            yield mixture.read(start, min(256, plan.total_rows - start))
