"""Duplicates and quotes of evaluation sets are found, counted by source, and nothing else is."""

import errno
import gzip
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from ouro_jax.data import clean as clean_module
from ouro_jax.data.clean import clean, describe_report
from ouro_jax.data.clean_plan import plan_cleaning
from ouro_jax.data.corpus import Corpus
from ouro_jax.data.folder import Folder
from ouro_jax.errors import ConfigError, RunError

WORDS = [f"word{number}" for number in range(5000)]


def prose(length, seed):
    """So many words at random; two seeds share no passage."""
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def write(path, records):
    """A JSONL file; texts become records with a field of their own besides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {"text": record, "id": f"{path.stem}-{number}"} if isinstance(record, str) else record
        for number, record in enumerate(records)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def run(tmp_path, pattern="in/**/*.jsonl", schema="text", workers=1, output="out", **options):
    """The report, and what was kept by file."""
    file_format = options.pop("file_format", "jsonl")
    cleaning = plan_cleaning(
        str(tmp_path / pattern),
        output=tmp_path / output,
        corpus=Corpus(file_format, schema),
        **options,
    )
    report = clean(cleaning, workers)
    kept = {
        path.relative_to(tmp_path / output).as_posix(): read(path)
        for path in sorted((tmp_path / output).rglob("*.jsonl"))
    }
    return report, kept


def kept_texts(tmp_path, texts, evaluation=(), **options):
    """Which of the texts, as one file, are kept."""
    write(tmp_path / "in/a.jsonl", texts)
    if evaluation:
        options["against"] = str(write(tmp_path / "evals/e.jsonl", evaluation))
    return [record["text"] for record in run(tmp_path, **options)[1]["a.jsonl"]]


# Exact duplicates


def test_the_first_of_equal_texts_stays_with_all_its_fields(tmp_path):
    first, second, third = (prose(40, seed) for seed in range(3))
    write(tmp_path / "in/b.jsonl", [third, first, second])
    write(tmp_path / "in/a.jsonl", [first, second, first])
    report, kept = run(tmp_path)
    assert kept == {
        "a.jsonl": [{"text": first, "id": "a-0"}, {"text": second, "id": "a-1"}],
        "b.jsonl": [{"text": third, "id": "b-0"}],
    }
    assert report["total"]["exact_duplicates"] == 3


def test_texts_of_few_words_are_duplicates_only_if_equal(tmp_path):
    texts = ["3 + 4 = 7", "3 - 4 = 7", "3 + 4 = 7", "three words here", "Three words here", "!!!"]
    assert kept_texts(tmp_path, texts) == [*texts[:2], *texts[3:]]


# Near duplicates


def jaccard(left, right):
    """The share of common shingles, the plain way."""
    sets = []
    for text in (left, right):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text, edits, seed):
    """The text with so many words replaced, evenly spread."""
    words = text.split()
    for edit in range(edits):
        words[(2 * edit + 1) * len(words) // (2 * edits)] = f"edit{seed}x{edit}"
    return " ".join(words)


def test_groups_are_those_of_brute_force(tmp_path):
    """40 texts, each with copies: 2 edits in 300 words are near (0.93), 12 and 30 are not."""
    originals = [prose(300, seed) for seed in range(40)]
    texts = list(originals)
    for index, text in enumerate(originals):
        texts += [edited(text, edits, index) for edits in (2, 12, 30)[: 1 + index % 3]]
    random.Random(0).shuffle(texts)
    similar = {
        pair: jaccard(*pair)
        for pair in itertools.combinations(texts, 2)
        if set(pair[0].split()[:4]) & set(pair[1].split()[:4])
    }
    assert all(not 0.7 < value < 0.9 for value in similar.values())
    expected, removed = [], set()
    for text in texts:
        if text not in removed:
            expected.append(text)
            removed |= {
                pair[1] for pair, value in similar.items() if pair[0] == text and value > 0.8
            }
    assert len(texts) - len(expected) == 40
    assert kept_texts(tmp_path, texts) == expected


@pytest.mark.parametrize(
    ("similarity", "num_kept"), [(1, 4), (0.95, 4), (0.85, 3), (0.7, 2), (0.4, 1)]
)
def test_similarity_is_where_the_line_is(tmp_path, similarity, num_kept):
    original = prose(1000, 1)
    copies = [edited(original, edits, edits) for edits in (10, 25, 75)]
    assert [round(jaccard(original, copy), 2) for copy in copies] == [0.9, 0.78, 0.45]
    assert len(kept_texts(tmp_path, [original, *copies], similarity=similarity)) == num_kept


def test_case_punctuation_space_and_unicode_forms_make_no_difference(tmp_path):
    text = "Ein Café, « zwei » Straßen; ﬁve Words here — and 日本語の文 too"
    other = "ein cafe\u0301 zwei  STRASSEN\nfive words HERE and 日本語の文, TOO!"
    assert kept_texts(tmp_path, [text, other]) == [text]


def test_texts_without_spaces_have_words_too(tmp_path):
    characters = "".join(chr(0x4E00 + random.Random(1).randrange(5000)) for _ in range(5))
    text = "".join(chr(0x4E00 + n) for n in random.Random(2).sample(range(5000), 200))
    assert kept_texts(tmp_path, [text, f"{text[:-1]}。", characters]) == [text, characters]


# Evaluation sets


def test_thirteen_shared_words_are_a_contamination_and_twelve_are_not(tmp_path):
    question = prose(30, 1).split()
    texts = [
        f"{prose(50, 2)} {' '.join(question[5:18])} {prose(50, 3)}",
        f"{prose(50, 4)} {' '.join(question[5:17])} {prose(50, 5)}",
        f"{prose(50, 6)} {' '.join(question[5:11])} and {' '.join(question[12:18])}",
    ]
    evaluation = [{"id": 7, "doc": {"question": " ".join(question), "choices": ["yes", "no"]}}]
    assert kept_texts(tmp_path, texts, evaluation) == texts[1:]


def test_normalisation_hides_no_contamination(tmp_path):
    words = prose(13, 1).split()
    text = f"{prose(20, 2)} {'; '.join(word.upper() for word in words)}!\n{prose(20, 3)}"
    assert kept_texts(tmp_path, [text, prose(50, 4)], [{"q": words}, {"q": " ".join(words)}]) == [
        prose(50, 4)
    ]


def test_a_short_text_is_contaminated_only_if_it_is_a_whole_evaluation_text(tmp_path):
    evaluation = ["What is the capital of France?", prose(13, 1)]
    texts = [
        "what is the capital of france",
        "What is the capital of France? Paris.",
        " ".join(prose(13, 1).split()[:12]),
    ]
    assert kept_texts(tmp_path, texts, evaluation) == texts[1:]


def test_a_copy_of_a_contaminated_text_stays_if_it_is_none_itself(tmp_path):
    passage = prose(13, 1)
    contaminated = f"{prose(400, 2)} {passage}"
    clean_copy = f"{prose(400, 2)} {passage.replace(passage.split()[6], 'other')}"
    assert jaccard(contaminated, clean_copy) > 0.95
    assert kept_texts(tmp_path, [contaminated, clean_copy], [passage]) == [clean_copy]


@pytest.mark.parametrize("schema", ["messages", "question_answer"])
def test_the_question_of_a_conversation_counts(tmp_path, schema):
    def record(question, answer):
        if schema == "question_answer":
            return {"question": question, "answer": answer, "source": "x"}
        roles = {"system": "Be kind.", "user": question, "assistant": answer}
        return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}

    short, long = "What is 6 times 7?", prose(40, 1)
    records = [
        record(short, prose(30, 2)),
        record(f"Please: {long}", prose(30, 3)),
        record("And 7 times 7?", f"Well. {short}"),
        record(prose(20, 4), f"{prose(30, 5)} {' '.join(long.split()[10:25])}"),
        record(prose(20, 6), prose(30, 7)),
        record(prose(20, 6), prose(30, 7)),
    ]
    write(tmp_path / "in/a.jsonl", records)
    against = str(write(tmp_path / "e.jsonl", [{"question": short}, {"question": long}]))
    report, kept = run(tmp_path, schema=schema, against=against)
    assert kept["a.jsonl"] == [records[2], records[4]]
    counts = {name: report["total"][name] for name in ("contaminated", "exact_duplicates")}
    assert counts == {"contaminated": 3, "exact_duplicates": 1}


# Counts, files, repetition


def test_counts_by_source(tmp_path):
    text, other, quoted = f"{prose(60, 1)} é", prose(60, 2), prose(60, 3)
    write(tmp_path / "in/math/x/1.jsonl", [text, "", other])
    write(tmp_path / "in/math/2.jsonl", [text, edited(other, 1, 0)])
    write(tmp_path / "in/code/1.jsonl", [quoted, " \n", text, prose(60, 4)])
    write(tmp_path / "in/alone.jsonl", [prose(60, 5)])
    report, kept = run(tmp_path, against=str(write(tmp_path / "e.jsonl", [quoted])))
    names = ("documents", "kept", "empty", "contaminated", "exact_duplicates", "near_duplicates")
    counts = {
        source: [row[name] for name in names]
        for source, row in [*report["sources"].items(), ("total", report["total"])]
    }
    assert counts == {
        "alone": [1, 1, 0, 0, 0, 0],
        "code": [4, 2, 1, 1, 0, 0],  # the text in code comes first
        "math": [5, 1, 1, 0, 2, 1],
        "total": [10, 4, 2, 1, 2, 1],
    }
    assert report["total"]["kept_bytes"] == sum(
        len(record["text"].encode()) for records in kept.values() for record in records
    )
    assert report["total"]["bytes"] == sum(
        len(record["text"].encode())
        for path in (tmp_path / "in").rglob("*.jsonl")
        for record in read(path)
    )
    table = [re.split(r"\s{2,}", line) for line in describe_report(report).splitlines()]
    assert table[0] == ["source", *(name.replace("_", " ") for name in names)]
    assert table[-1] == ["total", *(str(count) for count in counts["total"])]
    assert json.loads((tmp_path / "out/report.json").read_text()) == report


def corpus_of_many_files(tmp_path):
    for number in range(4):
        texts = [prose(80, seed) for seed in range(20 * number, 20 * number + 30)]
        texts += [edited(text, 1, number) for text in texts[::3]]
        write(tmp_path / f"in/s{number % 2}/{number}.jsonl", texts)


def test_neither_workers_nor_parts_change_a_byte(tmp_path):
    corpus_of_many_files(tmp_path)
    report, kept = run(tmp_path, part_bytes=3000)
    assert report["total"]["near_duplicates"] > 20 and report["total"]["exact_duplicates"] > 20
    for output, options in {"two": {"workers": 2, "part_bytes": 3000}, "one": {}}.items():
        again, same = run(tmp_path, output=output, **options)
        assert same == kept
        assert again["sources"] == report["sources"]
        for name in kept:
            assert (tmp_path / output / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_stopped_run_looks_incomplete_and_goes_on_with_its_fingerprints(tmp_path, monkeypatch):
    corpus_of_many_files(tmp_path)
    expected = run(tmp_path, output="whole", part_bytes=3000)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clean_module, "write_kept", stop)
        run(tmp_path, part_bytes=3000)
    assert not (tmp_path / "out/report.json").exists()
    (tmp_path / "out/s0").mkdir()
    (tmp_path / "out/s0/.unfinished-0.jsonl-1").write_text("half a li")
    parts = sorted((tmp_path / "out/unfinished").glob("*.npz"))
    parts[3].unlink()
    made = []
    original = clean_module.write_fingerprints
    monkeypatch.setattr(
        clean_module, "write_fingerprints", lambda *args: made.append(args[2]) or original(*args)
    )
    assert run(tmp_path, part_bytes=3000) == expected
    assert made == [3] and len(parts) > 5
    assert not list((tmp_path / "out").rglob("*unfinished*"))
    monkeypatch.setattr(clean_module, "write_fingerprints", stop)
    assert run(tmp_path, part_bytes=3000) == expected  # complete already


@pytest.mark.parametrize("workers", [1, 2])
def test_compressed_files_and_text_files(tmp_path, workers):
    text = prose(40, 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    assert run(tmp_path, "in/*", workers=workers)[1] == {"a.jsonl": [{"text": text}]}
    for name in ("a.txt", "b.py", "sub/a.txt"):
        (tmp_path / "texts/sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(text if name != "b.py" else "print()")
    report, kept = run(tmp_path, "texts", file_format="text", output="o", workers=workers)
    assert kept == {"a.jsonl": [{"text": text}], "b.py.jsonl": [{"text": "print()"}],
                    "sub/a.jsonl": []}  # fmt: skip
    assert list(report["sources"]) == ["a", "b.py", "sub"]


def test_all_columns_of_parquet_are_kept(tmp_path):
    (tmp_path / "in").mkdir()
    rows = {"id": [1, 2, 3], "text": ["one", "two", "one"], "tags": [["a"], [], None]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "in/a.parquet", row_group_size=1)
    _, kept = run(tmp_path, "in/*.parquet", file_format="parquet", part_bytes=1)
    assert kept["a.jsonl"] == [
        {"id": 1, "text": "one", "tags": ["a"]},
        {"id": 2, "text": "two", "tags": []},
    ]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["one"], "image": [b"\xff"]}), tmp_path / "in/b.parquet"
    )
    with pytest.raises(ConfigError, match="b.parquet: a record holds what JSON cannot hold"):
        run(tmp_path, "in/b.parquet", file_format="parquet", output="other")


def test_odd_characters_come_back_as_they_were(tmp_path):
    line = '{"text": "caf\\u00e9 \\u2028 \\ud83d\\ude00", "half": "\\ud800", "big": 1e-7}'
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text(line)
    assert run(tmp_path)[1] == {"a.jsonl": [json.loads(line)]}


def test_unreadable_records_are_left_out_within_a_bound(tmp_path):
    path = write(tmp_path / "in/a.jsonl", [prose(30, 1), {"other": 1}, prose(30, 2)])
    path.write_bytes(path.read_bytes() + b"{broken\n" + path.read_bytes()[:20])
    report, kept = run(tmp_path, skip_bad=3, part_bytes=100)
    assert [record["id"] for record in kept["a.jsonl"]] == ["a-0", "a-2"]
    assert [re.sub(".*line ", "", place)[:2] for place in report["skipped"]] == ["2:", "4:", "5:"]
    for bound, part_bytes in ((2, 100), (2, 1000), (0, 1000)):
        with pytest.raises(ConfigError, match=f"a.jsonl, line.*skip_bad|skip_bad = {bound}|line 2"):
            run(tmp_path, skip_bad=bound, part_bytes=part_bytes, output=f"{bound}-{part_bytes}")
        assert not (tmp_path / f"{bound}-{part_bytes}/report.json").exists()


def test_the_bound_is_on_all_files_together(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"in/{name}.jsonl", [{"other": 1}, prose(30, 1)])
    with pytest.raises(ConfigError, match="2 unreadable records, skip_bad = 1 .*b.jsonl, line 1"):
        run(tmp_path, skip_bad=1, part_bytes=100)
    assert not list((tmp_path / "out").glob("*.json*"))


def test_object_storage(tmp_path):
    """fsspec's memory stands for it."""
    storage = fsspec.filesystem("memory")
    first, second = prose(30, 1), prose(30, 2)
    for name, texts in {"a/x": [first, second], "b/y": [edited(first * 9, 1, 1), second]}.items():
        lines = [json.dumps({"text": text}) for text in texts]
        storage.pipe(f"/clean/in/{name}.jsonl", "\n".join(lines).encode())
    cleaning = plan_cleaning(
        "memory://clean/in/**/*.jsonl", output="memory://clean/out", corpus=Corpus()
    )
    report = clean(cleaning)
    assert {name: row["kept"] for name, row in report["sources"].items()} == {"a": 2, "b": 1}
    assert sorted(storage.find("/clean/out")) == [
        "/clean/out/a/x.jsonl", "/clean/out/b/y.jsonl", "/clean/out/report.json",
    ]  # fmt: skip


def test_mistakes_are_named(tmp_path):
    write(tmp_path / "in/a.jsonl", [prose(30, 1)])
    evals = tmp_path / "evals"
    write(evals / "good.jsonl", ["a question"])
    write(evals / "empty.jsonl", [])
    write(evals / "wordless.jsonl", [{"answer": 7, "unit": "%"}])
    (evals / "broken.jsonl").write_text('{"q": "one"}\n{"q": }\n')
    (evals / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"q": "one"}\n' * 9)[:-9])
    for name, message in {
        "missing.jsonl": "against.*missing.jsonl",
        "empty.jsonl": "empty.jsonl: there is no text",
        "*less.jsonl": "wordless.jsonl: there is no text",
        "broken.jsonl": "broken.jsonl, line 2: broken JSON",
        "cut.jsonl.gz": "cut.jsonl.gz: the file is cut off",
    }.items():
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, against=str(evals / name))
        assert not (tmp_path / "out").exists()
    for options, message in {
        ("similarity", 0): "similarity",
        ("similarity", 1.1): "similarity",
        ("skip_bad", -1): "skip_bad",
        ("pattern", "none/*"): "none",
    }.items():
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, **dict([options]))
    (tmp_path / "in/a.jsonl.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="a.jsonl.gz would both be written to a.jsonl"):
        run(tmp_path, "in/*")


def test_an_output_that_holds_something_else_is_refused(tmp_path):
    path = write(tmp_path / "in/a.jsonl", [prose(30, 1)])
    write(tmp_path / "mine/sub/notes.jsonl", ["mine"])
    with pytest.raises(ConfigError, match="mine exists already and is not empty"):
        run(tmp_path, output="mine")
    run(tmp_path)
    for change in ({"similarity": 0.7}, {"against": str(path)}, {"pattern": "in/../in/*"}):
        with pytest.raises(
            ConfigError, match="out exists already and holds what was kept of other"
        ):
            run(tmp_path, **change)
    os.utime(path, (0, 1e9))  # as long as before, but written at another time
    with pytest.raises(ConfigError, match="out exists already"):
        run(tmp_path)


def test_changed_input_is_read_again(tmp_path, monkeypatch):
    """A file changes while it is being cleaned, another one is gone when that is repeated."""
    corpus_of_many_files(tmp_path)
    path = tmp_path / "in/s0/2.jsonl"
    size = path.stat().st_size

    def change(*_):
        if path.stat().st_size == size:
            path.write_bytes(path.read_bytes()[: size // 2])
        return write_kept(*_)

    write_kept = clean_module.write_kept
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="2.jsonl has changed"):
        patch.setattr(clean_module, "write_kept", change)
        run(tmp_path, part_bytes=3000, skip_bad=1)
    assert (tmp_path / "out/s0/0.jsonl").exists() and not (tmp_path / "out/s0/2.jsonl").exists()
    (tmp_path / "in/s0/0.jsonl").unlink()
    whole = run(tmp_path, output="whole", part_bytes=3000, skip_bad=1)
    assert run(tmp_path, part_bytes=3000, skip_bad=1) == whole
    assert sorted(whole[1]) == ["s0/2.jsonl", "s1/1.jsonl", "s1/3.jsonl"]


def test_other_settings_after_a_stop(tmp_path, monkeypatch):
    """The line for near duplicates needs no new fingerprints, other evaluation sets do."""
    corpus_of_many_files(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(clean_module, "write_kept", lambda *_: 1 / 0)
        run(tmp_path, part_bytes=3000)
    made = []
    original = clean_module.write_fingerprints
    monkeypatch.setattr(
        clean_module, "write_fingerprints", lambda *args: made.append(args[2]) or original(*args)
    )
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(clean_module, "write_kept", lambda *_: 1 / 0)
        run(tmp_path, part_bytes=3000, similarity=1.0)
    assert not made
    against = str(write(tmp_path / "e.jsonl", [prose(80, 5)]))
    report, _ = run(tmp_path, part_bytes=3000, against=against)
    assert made and report["total"]["contaminated"] == 1


def test_one_writer_at_a_time(tmp_path):
    write(tmp_path / "in/a.jsonl", [prose(30, 1)])
    with Folder(tmp_path / "out").locked(), pytest.raises(ConfigError, match="another process"):
        run(tmp_path)


def test_a_full_disk_is_said_plainly(tmp_path, monkeypatch):
    write(tmp_path / "in/a.jsonl", [prose(30, 1)])

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(clean_module.tempfile, "TemporaryFile", full)
    with pytest.raises(RunError, match="out: cannot be written .No space left"):
        run(tmp_path)


def test_a_missing_library_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"pip install 'ouro_jax\[clean\]'"):
        run(tmp_path)
