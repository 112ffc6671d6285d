"""Corpora and rows in a bucket are those on a disk, and what storage refuses is said plainly."""

import json
import time
import types

import gcsfs.retry
import numpy as np
import pytest
from etils import epath

from ouro_jax.data.clean import clean
from ouro_jax.data.clean_plan import plan_cleaning
from ouro_jax.data.corpus import Corpus
from ouro_jax.data.files import find_files
from ouro_jax.data.folder import Folder
from ouro_jax.data.mixture import heldout_batches, list_sources, open_mixture
from ouro_jax.data.prepare import plan_preparation, prepare, prepare_tokenizer, write_part
from ouro_jax.data.rows import Row, open_rows, verify_rows
from ouro_jax.errors import ConfigError, RunError
from ouro_jax.training.curriculum import StagePlan
from ouro_jax.training.stage_rows import open_stage_mixture
from tests.data.fake_gcs import FakeGcs
from tests.micro_run import micro_config, ouro
from tests.prepared import write_rows

TEXTS = [f"Document {i}: " + "the quick brown fox, é. " * (i % 5) for i in range(200)]
ROWS = "gs://bucket/data/web/train-64"


@pytest.fixture
def gcs(monkeypatch):
    """A bucket, where `gs://bucket` leads in this process and in those that it starts."""
    fake = FakeGcs()
    for name, value in fake.environment().items():
        monkeypatch.setenv(name, value)
    yield fake
    fake.shutdown()
    fake.server_close()


@pytest.fixture
def corpus(gcs, tmp_path):
    """The texts in four files and a tokenizer, in a folder and in the bucket: both roots."""
    (tmp_path / "raw" / "deep").mkdir(parents=True)
    for part in range(4):
        lines = "\n".join(json.dumps({"text": text}) for text in TEXTS[part::4])
        (tmp_path / "raw" / "deep" / f"{part}.jsonl").write_text(lines)
    upload(gcs, tmp_path)
    roots = str(tmp_path), "gs://bucket"
    for root in roots:
        pattern, output = f"{root}/raw/**/*.jsonl", f"{root}/data/tokenizer.json"
        prepare_tokenizer(pattern, corpus=Corpus(), vocab_size=280, output=output)
    return roots


def upload(gcs, folder):
    """Copies a folder into the bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            gcs.write(path.relative_to(folder).as_posix(), path.read_bytes())


def plan(root, **options):
    return plan_preparation(
        **{
            "pattern": f"{root}/raw/**/*.jsonl",
            "tokenizer": f"{root}/data/tokenizer.json",
            "sequence_length": 64,
            "output": f"{root}/data/web/train-64",
            "corpus": Corpus(),
            "shard_bytes": 3000,
            **options,
        }
    )


def contents(gcs, folder):
    """Every object below a folder of the bucket with its bytes."""
    folder += "/"
    return {k.removeprefix(folder): v for k, v in gcs.objects.items() if k.startswith(folder)}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_prepared_and_read_in_a_bucket_as_on_a_disk(gcs, corpus, tmp_path):
    disk, bucket = corpus
    manifest = prepare(plan(disk))
    assert len(manifest.shards) > 4
    assert prepare(plan(bucket), workers=2) == prepare(plan(bucket)) == manifest
    assert contents(gcs, "data/web/train-64") == files(tmp_path / "data" / "web" / "train-64")
    assert verify_rows(ROWS) == manifest
    mixtures = [
        open_mixture(f"{root}/data", {"web": 1.0}, sequence_length=64, seed=0) for root in corpus
    ]
    for expected, got in zip(*(mixture.read(0, 40) for mixture in mixtures), strict=True):
        np.testing.assert_array_equal(expected, got)


def test_a_row_takes_one_request_and_its_shard_one_when_it_is_opened(gcs):
    row = Row(np.arange(4096), np.array([4096], np.uint32))
    rng = np.random.default_rng(0)
    rows = [row._replace(tokens=rng.integers(0, 1 << 16, 4096)) for _ in range(300)]
    write_rows(ROWS, rows, sequence_length=4096, vocab_size=1 << 16, tokenizer_hash="", source="w")
    source = open_rows(ROWS)
    gcs.requests.clear()
    for index in (0, 100, 7):
        np.testing.assert_array_equal(source[index].tokens, rows[index].tokens)
    ranges = [request.range for request in gcs.requests if "array_record" in request.name]
    # The shard's index is in its last MiB; ArrayRecord hangs up when it has its row.
    assert ranges[0] == f"bytes=-{1 << 20}" and len(ranges) == 1 + 3, gcs.requests


def test_a_preparation_that_was_stopped_goes_on_to_the_same_bytes(gcs, corpus, tmp_path):
    prepare(plan(corpus[0]))
    preparation = plan(corpus[1])
    for index in (0, 2):
        write_part(preparation, index)
    gcs.refused["raw/deep/3.jsonl"] = 401
    with pytest.raises(ConfigError, match=r"3.jsonl: cannot be read .*credentials.* repeat the co"):
        prepare(preparation)
    gcs.refused.clear()
    there, gcs.requests[:] = set(gcs.objects), []
    prepare(preparation)
    written = {request.name for request in gcs.requests if request.method == "POST"}
    assert "data/web/train-64/manifest.json" in written and not written & there
    assert contents(gcs, "data/web/train-64") == files(tmp_path / "data" / "web" / "train-64")


def test_a_folder_shows_what_others_write_and_remove(gcs):
    folder = Folder("gs://bucket/there")
    assert folder.sizes() == {} and not folder.has("large")
    with folder.writing("large") as path:
        path.write_bytes(b"x" * 6_000_000)  # too large for one request
    gcs.write("there/by/others", b"123")
    gcs.write("thereafter", b"")
    assert folder.sizes() == {"large": 6_000_000} and folder.folders() == ["by"]
    assert folder.read_texts("by") == {"others": "123"} and folder.has("by/others")
    assert abs(folder.modified("by/others") - time.time()) < 60
    gcs.write("there/by/others", b"4567")
    assert folder.sizes("by") == {"others": 4} and folder.read_text("by/others") == "4567"
    del gcs.objects["there/by/others"]
    assert folder.sizes("by") == {} and not folder.has("by/others")
    with pytest.raises(ValueError), folder.writing("half") as path:
        path.write_text("half of it")
        raise ValueError
    assert not folder.has("half")
    folder.remove()
    assert list(gcs.objects) == ["thereafter"]


def test_a_corpus_is_cleaned_from_bucket_to_bucket_as_on_a_disk(gcs, corpus, tmp_path):
    for root in corpus:
        cleaning = plan_cleaning(f"{root}/raw/**/*.jsonl", output=f"{root}/kept", corpus=Corpus())
        clean(cleaning)
    kept = contents(gcs, "kept")
    assert kept.keys() == {"report.json", *(f"deep/{part}.jsonl" for part in range(4))}
    assert kept["deep/0.jsonl"] == (tmp_path / "kept" / "deep" / "0.jsonl").read_bytes()


def test_training_takes_its_rows_from_a_bucket(gcs, embedded_root):
    upload(gcs, embedded_root)
    config = micro_config(embedded_root)
    plan = StagePlan("stable_1a", config.stages["stable_1a"])
    roots = embedded_root, epath.Path("gs://bucket")
    disk, bucket = (open_stage_mixture(config, root, plan).read(0, 8) for root in roots)
    np.testing.assert_array_equal(disk.tokens_BL, bucket.tokens_BL)
    assert list_sources(roots[1]) == list_sources(roots[0])
    disk, bucket = (next(heldout_batches(root, "code", 64, 4, 4)) for root in roots)
    np.testing.assert_array_equal(disk.batch.targets_BL, bucket.batch.targets_BL)
    assert disk.num_bytes == bucket.num_bytes


def test_rows_of_a_bucket_are_shown_as_text(gcs, embedded_root):
    upload(gcs, embedded_root)
    shown = ouro("data", "inspect", "gs://bucket/prose/train-64/", "--rows=1")
    assert shown.returncode == 0, shown.stderr
    assert (
        shown.stdout
        == ouro("data", "inspect", f"{embedded_root}/prose/train-64", "--rows=1").stdout
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pattern": "gs://no/*"}, r"input = 'gs://no/\*': .*matches at least one file"),
        ({"tokenizer": "gs://no/t.json"}, "gs://no/t.json: no such tokenizer file"),
        ({"output": "gs://no/web/a"}, "gs://no/web/a/.*: cannot be written .no such bucket; check"),
    ],
)
def test_a_bucket_that_does_not_exist_is_named_before_any_work(corpus, options, expected):
    with pytest.raises(ConfigError, match=expected):
        prepare(plan(corpus[1], **options), on_progress=lambda _: pytest.fail("work was begun"))


@pytest.mark.parametrize("status", [401, 403])
def test_missing_rights_are_no_missing_files(gcs, corpus, status):
    manifest = prepare(plan(corpus[1]))
    rows = open_rows(ROWS)
    for name in gcs.objects:
        gcs.refused[name] = status
    for read in (open_rows, verify_rows):
        with pytest.raises(ConfigError, match=r"gs://.*cannot be read \(.*check .*credentials"):
            read(ROWS)
    shard = manifest.shards[0].name
    with pytest.raises(
        ConfigError, match=f"{shard}, record 0: cannot be read .*status code: {status}"
    ):
        rows[0]
    gcs.refused["data/new"] = status
    with pytest.raises(RunError, match=r"gs://bucket/data/new: cannot be written \(.*check the"):
        Folder("gs://bucket/data").write_text("new", "")


def test_a_shard_that_went_missing_is_named(gcs, corpus):
    manifest = prepare(plan(corpus[1]))
    rows, shard = open_rows(ROWS), manifest.shards[-1].name
    del gcs.objects[f"data/web/train-64/{shard}"]
    with pytest.raises(ConfigError, match=f"{shard}, record .*cannot be read"):
        rows[len(rows) - 1]
    with pytest.raises(ConfigError, match=f"{shard}: this shard of the manifest is missing"):
        open_rows(ROWS)


def test_without_a_network_it_says_so(gcs, monkeypatch):
    async def soon(_: float) -> None:
        """Instead of the pauses between attempts, some 30 seconds."""

    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=soon))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    for read in (open_rows, find_files):
        with pytest.raises(ConfigError, match=r"cannot be read \(.*Cannot connect .*the network"):
            read(ROWS)
