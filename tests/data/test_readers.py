"""Every bad input is named with its file and record; what can be read around it is read."""

import contextlib
import gzip
import json
import os
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ouro_jax.data.corpus import BadRecords, Corpus, plan_parts, read_documents
from ouro_jax.data.files import File, find_files
from ouro_jax.data.readers import open_text
from ouro_jax.errors import ConfigError

MANY = 10**9
ZSTD = zstandard.ZstdCompressor(write_checksum=True)
COMPRESS = {".gz": gzip.compress, ".zst": ZSTD.compress}


def read(path, corpus=None, limit=0, part_bytes=MANY):
    """The documents of a path, and what was bad."""
    bad, corpus = BadRecords(limit), corpus or Corpus()
    parts = plan_parts(find_files(str(path)), corpus, part_bytes)
    return [item for part in parts for item in read_documents(part, corpus, bad)], bad.places


def write(path, content):
    path.write_bytes(content)
    return path


def test_text_files_are_a_document_each(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo")
    write(tmp_path / "b.txt.gz", gzip.compress("zw\u00f6lf\n".encode()))
    write(tmp_path / "c.txt", b"")
    assert read(tmp_path, Corpus("text"))[0] == ["one\ntwo", "zw\u00f6lf\n", ""]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("members", [1, 3])
def test_compressed_files_are_what_they_hold(tmp_path, suffix, members):
    """Over many blocks, and of several members, as `cat a.gz b.gz` makes and as pigz does."""
    line = os.urandom(30_000).hex().encode() + b"\n"
    path = write(tmp_path / f"a{suffix}", COMPRESS[suffix](line * 20) * members)
    with open_text(str(path)) as file:
        assert file.read() == line * 20 * members
    with open_text(str(path)) as file:
        assert list(file) == [line] * 20 * members


def test_zstd_with_the_longest_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, compression_level=1)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = write(tmp_path / "a.jsonl.zst", stream.compress(b'{"text": "a"}\n') + stream.flush())
    assert read(path) == (["a"], [])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"text": "a"}\n{"text": \n', r"bad.jsonl, line 2: broken JSON \(Expecting value, col"),
        (b'{"text": "a"}\n\n{"tekst": "b"}', r"line 3: no field 'text'.*Did you mean 'tekst'\?"),
        (b"{}", "line 1: no field 'text'; there are none"),
        (b'{"text": 7}', "line 1: field 'text' is no text but int"),
        (b'{"text": null}', "line 1: field 'text' is no text but NoneType"),
        (b'["text"]', "line 1: expected an object with the field 'text'"),
        (b'{"text": "a"}\n{"text": "\xff"}', "bad.jsonl, line 2: not UTF-8 .*Convert the file"),
        (b'{"text": "\\ud800"}', "line 1: field 'text' is no valid Unicode"),
        (b'{"text": ' + b"[" * 100_000, r"line 1: broken JSON \(.*recursion"),
        (b'{"text": ' + b"9" * 5000 + b"}", r"line 1: broken JSON \(Exceeds the limit"),
        ('{"text": "a"}\n'.encode("utf-16"), "line 1: not UTF-8"),
    ],
)
def test_a_bad_line_is_named_and_can_be_skipped(tmp_path, content, error):
    path = write(tmp_path / "bad.jsonl", content)
    with pytest.raises(ConfigError, match=error):
        read(path)
    good = b'{"text": "good"}\n' * 2
    write(path, good + content.rstrip() + b"\n" + good)
    documents, (place, *_) = read(path, limit=2)
    assert documents == ["good"] * 2 + ["a"] * (b'"a"}' in content) + ["good"] * 2
    assert place.startswith(f"{path}, line ")


CHAT_ERRORS = [
    ("messages", {"messages": "hi"}, "line 2: expected a list of messages, got str"),
    ("messages", {"messages": ["hi"]}, "line 2: message 0: expected an object with role and"),
    ("messages", {"messages": [{"role": "bot", "content": ""}]}, "line 2: message 0: role = 'bot'"),
    ("messages", {"messages": [{"role": "user", "content": "\ud800"}]},
     "line 2: message 0: content is no valid Unicode"),
    ("messages", {"mesages": []}, "line 2: no field 'messages'.*Did you mean 'mesages'"),
    ("question_answer", {"question": "q"}, "line 2: no field 'answer'; there are question"),
    ("question_answer", {"question": 1, "answer": ""}, "line 2: field 'question' is no text but"),
    ("question_answer", {"question": "", "answer": "", "thought": []}, "field 'thought' is no tex"),
    ("question_answer", "q", "line 2: expected an object with the field 'question'"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "record", "error"), CHAT_ERRORS)
def test_a_bad_conversation_is_named(tmp_path, schema, record, error):
    path = write(tmp_path / "bad.jsonl", b"\n" + json.dumps(record).encode())
    with pytest.raises(ConfigError, match=error):
        read(path, Corpus(schema=schema))


def test_line_numbers_count_in_the_whole_file_for_any_part(tmp_path):
    lines = [f'{{"text": "{i}"}}' for i in range(60)]
    lines[7] = lines[40] = lines[59] = "{"
    lines.insert(20, "")
    path = write(tmp_path / "bad.jsonl", "\r\n".join(lines).encode())
    whole = read(path, limit=3)
    assert [place.split(":")[0] for place in whole[1]] == [
        f"{path}, line {number}" for number in (8, 42, 61)
    ]
    for part_bytes in (1, 5, 16, 17, 100, 400):
        assert read(path, limit=3, part_bytes=part_bytes) == whole


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(("cut", "least"), [(0, 0), (5, 0), (200_000, 60), (-1, 150)])
def test_a_truncated_file_is_one_bad_record_after_what_could_be_read(tmp_path, suffix, cut, least):
    texts = [os.urandom(1000).hex() for _ in range(200)]
    lines = "".join(f'{{"text": "{text}"}}\n' for text in texts).encode()
    path = write(tmp_path / f"bad.jsonl{suffix}", COMPRESS[suffix](lines)[:cut])
    documents, (place,) = read(path, limit=1)
    assert documents == texts[: len(documents)]
    assert least <= len(documents) <= (200 if least else 0)
    assert place == (
        f"{path}, line {len(documents) + 1}: the file is cut off or damaged here "
        "(the compressed data ends too soon)."
    )
    with pytest.raises(ConfigError, match=re.escape(place)):
        read(path)
    documents, (place,) = read(path, Corpus("text"), limit=1)
    assert not documents and place.startswith(f"{path}, line 1: the file is cut off")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_and_wrongly_named_files_are_named(tmp_path, suffix):
    data = bytearray(COMPRESS[suffix](os.urandom(5000).hex().encode()))
    data[len(data) // 2] ^= 0xFF
    for content in (bytes(data), b'{"text": "not compressed"}\n'):
        path = write(tmp_path / f"bad.jsonl{suffix}", content)
        with pytest.raises(ConfigError, match=f"bad.jsonl{suffix}, line 1: the file is cut off or"):
            read(path)
    plain = write(tmp_path / "compressed.jsonl", bytes(data))
    with pytest.raises(ConfigError, match="compressed.jsonl, line 1: not UTF-8"):
        read(plain)


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    write(tmp_path / "bad.txt", b"fine\nfine\n\xe9")
    with pytest.raises(ConfigError, match="bad.txt, line 3: not UTF-8"):
        read(tmp_path, Corpus("text"))


def test_missing_files_are_named():
    spans = plan_parts([File("missing.jsonl", 10, 0.0)], Corpus(), MANY)[0]
    for corpus in (Corpus(), Corpus("text"), Corpus("parquet"), Corpus("datasets")):
        with pytest.raises(ConfigError, match=r"missing.jsonl: cannot be read \(No such file"):
            list(read_documents(spans, corpus, BadRecords(9)))


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize("part_bytes", [1, MANY])
def test_parquet_without_the_column_lists_what_there_is(tmp_path, part_bytes):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1], "texts": ["a"]})
    for corpus, error in (
        (Corpus("parquet"), r"a.parquet: no column 'text'; there are id, texts. Did you mean 'tex"),
        (Corpus("parquet", "question_answer"), "a.parquet: no column 'question'; there are id"),
    ):
        with pytest.raises(ConfigError, match=error):
            read(path, corpus, limit=9, part_bytes=part_bytes)
    for content in (path.read_bytes()[:-5], b"", b"no Parquet"):
        write(tmp_path / "b.parquet", content)
        with pytest.raises(ConfigError, match=r"b.parquet: no Parquet file, or cut off \("):
            read(tmp_path / "b.parquet", Corpus("parquet"), limit=9, part_bytes=part_bytes)


@pytest.mark.parametrize("part_bytes", [1, MANY])
def test_bad_rows_of_parquet_are_named_by_their_number(tmp_path, part_bytes):
    texts = [f"text {i}" for i in range(40)]
    array = pyarrow.array([text.encode() for text in texts[:30]] + [b"\xff", None, b"x"] * 2)
    columns = {
        "text": pyarrow.StringArray.from_buffers(36, *array.buffers()[1:], array.buffers()[0])
    }
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=5, compression="none")
    documents, places = read(path, Corpus("parquet"), limit=4, part_bytes=part_bytes)
    assert documents == texts[:30] + ["x", "x"]
    assert [place.removeprefix(f"{path}, ").split(":")[0] for place in places] == [
        "row 30", "row 31", "row 33", "row 34"
    ]  # fmt: skip
    assert "not UTF-8" in places[0] and "is no text but NoneType" in places[1]
    path = write_parquet(tmp_path / "a.parquet", {"text": [7]})
    with pytest.raises(ConfigError, match="a.parquet, row 0: field 'text' is no text but int"):
        read(path, Corpus("parquet"))


def test_damaged_pages_of_parquet_are_one_bad_record(tmp_path):
    texts = [os.urandom(3000).hex() for _ in range(20)]
    path = write_parquet(
        tmp_path / "a.parquet", {"text": texts}, row_group_size=5, compression="gzip"
    )
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 20_000] = bytes(20_000)
    documents, (place,) = read(write(path, bytes(data)), Corpus("parquet"), limit=1)
    assert documents == texts[:10]
    assert place.startswith(f"{path}, row 10: the file is cut off or damaged here")


def test_a_truncated_arrow_file_is_one_bad_record_after_what_could_be_read(tmp_path):
    table = pyarrow.table({"text": [f"text {i}" for i in range(100)]})
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=10)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    data = (tmp_path / "a.arrow").read_bytes()
    write(tmp_path / "a.arrow", data[: len(data) // 2])
    documents, (place,) = read(tmp_path, Corpus("datasets"), limit=1)
    assert documents == [f"text {i}" for i in range(len(documents))] and 0 < len(documents) < 60
    row = len(documents)
    assert place.startswith(f"{tmp_path}/a.arrow, row {row}: the file is cut off or damaged here")
    # A message is its length and so on after four bytes of ones: here the second batch begins.
    border = [found.start() for found in re.finditer(b"\xff\xff\xff\xff", data)][2]
    write(tmp_path / "a.arrow", data[:border])
    documents, (place,) = read(tmp_path, Corpus("datasets"), limit=1)
    assert len(documents) == 10 and "row 10: the file is cut off" in place
    assert "end-of-stream" in place
    (tmp_path / "state.json").write_text('{"_data_files": ["a.arrow"]}')
    with pytest.raises(ConfigError, match="state.json names this file; it is missing"):
        read(tmp_path, Corpus("datasets"))
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    write(tmp_path / "a.arrow", b'{"text": 1}')
    with pytest.raises(ConfigError, match="a.arrow: no Arrow stream"):
        read(tmp_path, Corpus("datasets"))


def test_columns_that_cannot_be_told_apart_or_read_are_named(tmp_path):
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="a.parquet: there are 2 columns 'text'"):
        read(tmp_path / "a.parquet", Corpus("parquet"))
    # 317,000 years on: beyond Python's times, and pandas, where it is installed, is not asked.
    time = pyarrow.array([10**13], pyarrow.timestamp("s"))
    pyarrow.parquet.write_table(pyarrow.table({"text": time}), tmp_path / "b.parquet")
    _, (place,) = read(tmp_path / "b.parquet", Corpus("parquet"), limit=1)
    assert place.startswith(f"{tmp_path}/b.parquet, row 0: a value cannot be read")


def test_zeros_after_the_last_member_are_padding(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n') + bytes(3 << 20))
    assert read(path) == (["a"], [])
    write(path, gzip.compress(b'{"text": "a"}\n') + bytes(99) + b"more")
    assert "cut off or damaged" in read(path, limit=1)[1][0]


@pytest.mark.parametrize(
    ("name", "corpus", "package"),
    [
        ("a.jsonl.zst", Corpus(), "zstandard"),
        ("a.parquet", Corpus("parquet"), "pyarrow"),
        ("a.arrow", Corpus("datasets"), "pyarrow"),
    ],
)
def test_a_missing_package_is_named_with_what_to_do(tmp_path, monkeypatch, name, corpus, package):
    path = write(tmp_path / name, b"")
    (span,) = plan_parts([File(str(path), 0, 0.0)], Corpus(), MANY)[0]
    monkeypatch.setitem(sys.modules, package, None)
    with (
        contextlib.closing(read_documents([span], corpus, BadRecords(9))) as documents,
        pytest.raises(
            ConfigError, match=rf"{name}: reading it takes {package}. Run pip install 'ouro_jax\["
        ),
    ):
        next(documents)
