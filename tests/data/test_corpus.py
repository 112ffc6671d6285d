"""Parts: cut and grouped without losing, doubling or reordering a document."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ouro_jax.data.corpus import (
    FORMATS,
    BadRecords,
    Corpus,
    Span,
    plan_parts,
    read_documents,
)
from ouro_jax.data.files import File, find_files, open_file
from ouro_jax.errors import ConfigError

DAY = 1_700_000_000.0


def documents_of(parts, corpus=None):
    return [list(read_documents(part, corpus or Corpus(), BadRecords(0))) for part in parts]


def flat(lists):
    return [item for items in lists for item in items]


LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \t\r\n"])


@st.composite
def jsonl(draw):
    """The bytes of a JSONL file and its documents."""
    texts = draw(st.lists(st.text(max_size=30), max_size=12))
    ascii_only = draw(st.booleans())
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only).encode() for text in texts]
    content = b"".join(line + draw(LINE_ENDS) for line in lines)
    if lines and draw(st.booleans()):
        content = content.rstrip()  # the last line has no newline
    if lines and draw(st.booleans()):
        content = b"\xef\xbb\xbf" + content
    return content, texts


@given(st.lists(jsonl(), min_size=1, max_size=4), st.integers(1, 300))
@settings(max_examples=150)
@example([(b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"])], 14)  # a cut right after a newline
@example([(b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"])], 13)  # and right before it
def test_the_parts_of_any_size_hold_every_document_once_and_in_order(contents, part_bytes):
    expected = []
    for index, (content, texts) in enumerate(contents):
        with open_file(f"memory://parts/{index}.jsonl", "wb") as file:
            file.write(content)
        expected += texts
    files = [
        File(f"memory://parts/{index}.jsonl", len(content), DAY)
        for index, (content, _) in enumerate(contents)
    ]
    parts = plan_parts(files, Corpus(), part_bytes)
    assert flat(documents_of(parts)) == expected
    spans = flat(parts)
    assert sum(span.size for span in spans) == sum(file.size for file in files)
    # Parts are full: no two neighbours would fit into one, and none is too large.
    sizes = [sum(span.size for span in part) for part in parts]
    assert max(sizes) <= part_bytes
    assert all(
        size + part[0].size > part_bytes for size, part in zip(sizes, parts[1:], strict=False)
    )


def test_large_files_are_cut_and_small_ones_share_a_part():
    files = [File("a.jsonl", 250, DAY), File("b.jsonl", 30, DAY), File("c.jsonl.gz", 20, DAY)]
    assert plan_parts(files, Corpus(), 100) == [
        (Span("a.jsonl", 0, 83, 83),),
        (Span("a.jsonl", 83, 166, 83),),
        (Span("a.jsonl", 166, 250, 84),),
        (Span("b.jsonl", 0, 0, 30), Span("c.jsonl.gz", 0, 0, 60)),
    ]
    # What cannot be cut stays whole, and counts as more where it is compressed.
    assert plan_parts(files[2:], Corpus(), 10) == [(Span("c.jsonl.gz", 0, 0, 60),)]
    assert plan_parts(files[:1], Corpus("text"), 100) == [(Span("a.jsonl", 0, 0, 250),)]
    assert plan_parts([], Corpus(), 100) == []


@pytest.mark.parametrize("part_bytes", [1, 400, 1000, 10**9])
def test_parquet_is_cut_between_row_groups(tmp_path, part_bytes):
    path = str(tmp_path / "a.parquet")
    texts = [f"text {i} " + "x" * (i % 7) for i in range(50)]
    table = pyarrow.table({"id": list(range(50)), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=8)
    files, corpus = find_files(path), Corpus("parquet")
    parts = plan_parts(files, corpus, part_bytes)
    assert flat(documents_of(parts, corpus)) == texts
    assert len(parts) == {1: 7, 400: 7, 10**9: 1}.get(part_bytes, len(parts))
    assert 1 <= len(parts) <= 7
    assert sum(span.stop - span.start for span in flat(parts)) == (7 if len(parts) > 1 else 0)
    total = sum(span.size for span in flat(parts))
    assert 2 * files[0].size - 7 <= total <= 2 * files[0].size


def test_parts_of_parquet_weigh_about_the_same(tmp_path):
    path = str(tmp_path / "a.parquet")
    table = pyarrow.table({"text": [f"{i:0100d}" for i in range(120)]})
    pyarrow.parquet.write_table(table, path, row_group_size=10)
    (file,) = find_files(path)
    parts = plan_parts([file], Corpus("parquet"), 2 * file.size // 3 + 1)
    assert [(span.start, span.stop) for span in flat(parts)] == [(0, 4), (4, 8), (8, 12)]
    (span,) = flat(plan_parts([file], Corpus("parquet"), 2 * file.size))
    assert span == Span(path, 0, 0, 2 * file.size)


def save_dataset(folder, shards):
    """The layout of `datasets.Dataset.save_to_disk`: Arrow streams, listed in state.json."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, columns in zip(names, shards, strict=True):
        table = pyarrow.table(columns)
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def test_a_dataset_folder_is_read_in_its_own_order(tmp_path):
    shards = [{"text": ["b", "c", "d"]}, {"text": ["a"]}, {"text": ["e", "f"]}]
    save_dataset(tmp_path / "set", shards)
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    corpus, files = Corpus("datasets"), find_files(str(tmp_path / "set"))
    assert documents_of(plan_parts(files, corpus, 1), corpus) == [
        ["e", "f"],
        ["a"],
        ["b", "c", "d"],
    ]
    assert len(plan_parts(files, corpus, 10**6)) == 1

    (tmp_path / "set" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00001-of-00003.arrow: .*state.json names this"):
        plan_parts(find_files(str(tmp_path / "set")), corpus, 1)
    (tmp_path / "set" / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"state.json: no readable description of a data set"):
        plan_parts(find_files(str(tmp_path / "set")), corpus, 1)


def test_folders_that_are_no_data_set_are_refused(tmp_path):
    (tmp_path / "a.arrow").write_bytes(b"")
    with pytest.raises(ConfigError, match="a.arrow: there is no state.json.*save_to_disk"):
        plan_parts(find_files(str(tmp_path)), Corpus("datasets"), 1)
    for split in ("test", "train"):
        save_dataset(tmp_path / "dict" / split, [{"text": [split]}])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"dict: a DatasetDict with the splits train, test"):
        plan_parts(find_files(str(tmp_path / "dict")), Corpus("datasets"), 1)
    parts = plan_parts(find_files(str(tmp_path / "dict" / "train")), Corpus("datasets"), 1)
    assert documents_of(parts, Corpus("datasets")) == [["train"]]


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
THOUGHTFUL = [CHAT[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
RECORDS = {  # schema, field, record, content
    "text": ("text", "", {"text": "hello"}, "hello"),
    "body": ("text", "body", {"body": "hello", "text": 7}, "hello"),
    "messages": ("messages", "", {"messages": CHAT, "id": 1}, CHAT),
    "sharegpt": ("messages", "conversations", {"conversations": SHAREGPT}, CHAT),
    "question": ("question_answer", "", {"question": "q", "answer": "a"}, CHAT),
    "thought": ("question_answer", "", {"thought": "hm", "answer": "a", "question": "q"},
                THOUGHTFUL),
}  # fmt: skip


@pytest.mark.parametrize("file_format", ["jsonl", "parquet", "datasets"])
@pytest.mark.parametrize("name", RECORDS)
def test_every_schema_in_every_format(tmp_path, name, file_format):
    schema, field, record, content = RECORDS[name]
    columns = {name: [value] * 3 for name, value in record.items()}
    if file_format == "datasets":
        save_dataset(tmp_path / "set", [columns])
    elif file_format == "parquet":
        (tmp_path / "set").mkdir()
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "set" / "a.parquet")
    else:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "a.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    corpus = Corpus(file_format, schema, field)
    parts = plan_parts(find_files(str(tmp_path / "set")), corpus, 10**6)
    assert flat(documents_of(parts, corpus)) == [content] * 3


def test_thoughts_may_be_missing_in_some_records(tmp_path):
    """As null, or not there at all: other columns of Parquet are then null."""
    records = [{"question": "q", "answer": "a", "thought": thought} for thought in ("hm", None)]
    records.append({"question": "q", "answer": "a"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus = Corpus(schema="question_answer")
    (contents,) = documents_of(plan_parts(find_files(str(tmp_path)), corpus, 10**6), corpus)
    assert [content[1]["content"] for content in contents] == [
        "<think>\nhm\n</think>\n\na",
        "a",
        "a",
    ]


def test_a_corpus_says_what_is_wrong_with_it():
    assert FORMATS == ("jsonl", "text", "parquet", "datasets")
    assert Corpus().field == "text" and Corpus(schema="messages").field == "messages"
    assert Corpus() == Corpus(field="text")
    for arguments, error in (
        (("json",), "format = 'json'.*Did you mean 'jsonl'"),
        (("jsonl", "message"), "schema = 'message'.*Did you mean 'messages'"),
        (("text", "messages"), "schema = 'messages': expected text: text files have no fields"),
        (("jsonl", "question_answer", "q"), "field = 'q': expected none: question_answer reads"),
    ):
        with pytest.raises(ConfigError, match=error):
            Corpus(*arguments)


def test_bad_records_are_bounded_and_counted():
    bad = BadRecords(2)
    bad.add(ConfigError("a.jsonl, line 1: no"))
    bad.add(ConfigError("a.jsonl, line 2: no"))
    assert (bad.count, bad.places) == (2, ["a.jsonl, line 1: no", "a.jsonl, line 2: no"])
    with pytest.raises(ConfigError, match=r"line 3: no \(skip_bad = 2, and as many were skipped"):
        bad.add(ConfigError("a.jsonl, line 3: no"))
    with pytest.raises(ConfigError, match="line 1: no$"):
        BadRecords(0).add(ConfigError("a.jsonl, line 1: no"))


def test_remote_and_compressed_files_are_read_as_local_ones_are():
    with open_file("memory://corpus/a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}'))
    with open_file("memory://corpus/b/c.jsonl", "wb") as file:
        file.write(b'{"text": "three"}\n')
    files = find_files("memory://corpus/**/*.jsonl*")
    assert flat(documents_of(plan_parts(files, Corpus(), 10))) == ["one", "two", "three"]
