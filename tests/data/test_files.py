"""Files are found and opened alike on a disk and elsewhere (`memory://` stands for `gs://`)."""

import os
import time

import pytest
from fsspec.registry import get_filesystem_class, known_implementations

from ouro_jax.data.files import File, file_system, find_files, open_file
from ouro_jax.errors import ConfigError, RunError

TREE = {"b.txt": b"22", "a.txt": b"1", "deep/c.txt": b"333", "deep/er/d.txt": b"4444", "e.md": b""}


@pytest.fixture(params=["disk", "memory"])
def root(request, tmp_path):
    """TREE as a folder on the disk, or of fsspec's memory."""
    folder = str(tmp_path) if request.param == "disk" else f"memory://{tmp_path}"
    for name, content in TREE.items():
        os.makedirs((tmp_path / name).parent, exist_ok=True)
        with open_file(f"{folder}/{name}", "wb") as file:
            file.write(content)
    return folder


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "deep/c.txt", "deep/er/d.txt"]),
        ("deep/c.txt", ["deep/c.txt"]),
        ("deep", ["deep/c.txt", "deep/er/d.txt"]),
        ("*", ["a.txt", "b.txt", "e.md"]),
    ],
)
def test_patterns_find_files_in_the_order_of_their_paths(root, pattern, names):
    files = find_files(f"{root}/{pattern}")
    assert [(file.path, file.size) for file in files] == [
        (f"{root}/{name}", len(TREE[name])) for name in names
    ]
    assert all(abs(file.modified - time.time()) < 60 for file in files)
    for file, name in zip(files, names, strict=True):
        with open_file(file.path) as opened:
            assert opened.read() == TREE[name]


def test_nothing_found_is_an_error(root):
    for pattern in ("*.parquet", "missing.txt", "deep/*/*/*.txt"):
        with pytest.raises(ConfigError, match=r"input = .*matches at least one file"):
            find_files(f"{root}/{pattern}")
    with (
        pytest.raises(ConfigError, match=r"missing.txt: cannot be read"),
        open_file(f"{root}/missing.txt"),
    ):
        pass


def test_names_with_wildcards_relative_paths_and_links(tmp_path, monkeypatch):
    (tmp_path / "data" / "blobs").mkdir(parents=True)
    (tmp_path / "data" / "[1].txt").write_text("one")
    (tmp_path / "data" / "1.txt").write_text("not this one")
    (tmp_path / "data" / "blobs" / "0a").write_text("linked")
    (tmp_path / "data" / "link.txt").symlink_to(tmp_path / "data" / "blobs" / "0a")
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (file,) = find_files("data/[1].txt")
    assert file == File(str(tmp_path / "data" / "[1].txt"), 3, file.modified)
    names = [file.path.removeprefix(f"{tmp_path}/") for file in find_files("linked/**/*.txt")]
    assert names == ["linked/1.txt", "linked/[1].txt", "linked/link.txt"]
    assert find_files("data/link.txt")[0].size == len("linked")
    (tmp_path / "data" / "blobs" / "0a").unlink()
    with pytest.raises(ConfigError, match=r"link.txt: cannot be read \(No such file"):
        find_files("data/*.txt")


def test_schemes_without_their_package_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"gss://bucket/x: Protocol not known: gss"):
        file_system("gss://bucket/x")
    missing = {"class": "no_such_package.FileSystem", "err": "Please install no_such_package"}
    monkeypatch.setitem(known_implementations, "bucket", missing)
    expected = r"bucket://x: .*install no_such_package. Run pip install 'ouro_jax\[data\]'"
    with pytest.raises(ConfigError, match=expected):
        find_files("bucket://x")
    assert get_filesystem_class("gs")  # its package is in the extra `data`


def test_a_full_disk_is_a_failure_and_no_mistake():
    with (
        pytest.raises(RunError, match=r"/dev/full: cannot be written \(No space left"),
        open_file("/dev/full", "wb") as file,
    ):
        file.write(b"x" * 100_000)
