"""The preparation of a corpus as an Apache Beam pipeline: on Dataflow, Flink, Spark or here.

Every element is the number of a part; a worker makes that part's shard and record, as a local
worker does, so the rows are the same. Input, tokenizer and output have to be paths that all
workers reach. What a worker has to say goes through the output folder: no runner brings results
back to the program that started it.
"""

import os
from collections.abc import Sequence

from ouro_jax.data.folder import Folder
from ouro_jax.data.prepare import (
    Manifest,
    Preparation,
    finish,
    finished_parts,
    preparing,
    write_part,
)
from ouro_jax.errors import ConfigError, RunError

FAILED = "failed"
# Workers tell of every connection otherwise, and an error drowns in it.
DEFAULT_ARGS = ("--default_sdk_harness_log_level=WARNING",)


def prepare_with_beam(preparation: Preparation, pipeline_args: Sequence[str]) -> Manifest:
    """Makes the shards that are not there yet by a Beam pipeline and writes the manifest.

    `pipeline_args` are Beam's own flags (`--runner=DataflowRunner`, …); without any the pipeline
    runs in this process. Repeated, it continues with the finished shards. Raises ConfigError if
    Beam is not installed, does not know the runner, or the input is bad, and RunError if the
    pipeline ended without all shards.
    """
    with preparing(preparation) as manifest:
        if manifest:
            return manifest
        folder = Folder(preparation.output)
        folder.remove(FAILED)
        there = finished_parts(preparation)
        missing = [index for index in range(len(preparation.parts)) if index not in there]
        state = _run_pipeline(preparation, missing, pipeline_args)
        failures = folder.read_texts(FAILED)
        folder.remove(FAILED)
        if failures:
            raise ConfigError(next(iter(failures.values())))
        parts = finished_parts(preparation)
        if len(parts) < len(preparation.parts):
            raise RunError(
                f"{folder}: the pipeline ended ({state}) with {len(parts):,} of "
                f"{len(preparation.parts):,} shards."
            )
        return finish(preparation, [parts[index] for index in sorted(parts)])


def _run_pipeline(
    preparation: Preparation, missing: Sequence[int], pipeline_args: Sequence[str]
) -> str:
    """Runs it to its end and returns the runner's word for how it ended."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ConfigError(f"beam: {error}. Run pip install 'ouro_jax[data]'.") from error
    try:
        options = PipelineOptions([*DEFAULT_ARGS, *pipeline_args])
        pipeline = beam.Pipeline(options=options)
    except ValueError as error:  # an unknown runner, or flags that its runner refuses
        raise ConfigError(f"beam = {' '.join(pipeline_args)!r}: {error}") from error
    _ = (
        pipeline
        | "parts" >> beam.Create(missing)
        | "spread" >> beam.Reshuffle()
        | "write" >> beam.Map(_write_part, preparation)
    )
    return str(pipeline.run().wait_until_finish())


def _write_part(index: int, preparation: Preparation) -> None:
    """Makes a part on a worker, where tokens and bytes are counted for the runner's display.

    Bad input is noted, not raised: a runner would try it again, in vain, and bury the message.
    """
    from apache_beam.metrics import Metrics

    def advance(text_bytes: int, tokens: int) -> None:
        Metrics.counter("ouro_jax", "text_bytes").inc(text_bytes)
        Metrics.counter("ouro_jax", "tokens").inc(tokens)

    folder = Folder(preparation.output)
    if folder.sizes(FAILED):
        return  # another part has failed, so the pipeline may end
    # Runners start a process per core; threads inside each would get in each other's way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        write_part(preparation, index, advance)
    except ConfigError as error:
        folder.write_text(f"{FAILED}/{index:08d}", str(error))
