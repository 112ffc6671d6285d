"""What becomes of a compiler's end, good or bad, and that nothing is compiled twice."""

import dataclasses
import sys

import pytest

from ouro_jax.config import MeshConfig, ModelConfig
from ouro_jax.errors import ConfigError, RunError
from ouro_jax.planning.compile import compile_all, folder_of
from ouro_jax.planning.programs import Request, refusal
from ouro_jax.planning.topologies import parse_topology
from ouro_jax.training.layout import Layout

LAYOUT = Layout(MeshConfig(1, 2, 2, 1, 1), "each_loop", "layer", 1)
MODEL = ModelConfig(128, 64, 128, 2, 2, 2, 32, num_loops=2)
REQUEST = Request("train", parse_topology("v5e:2x2"), MODEL, 128, 1, layout=LAYOUT)
FINE = "open(sys.argv[1] + '/result.json', 'w').write('{\"fits\": true}')"


def child(tmp_path, code):
    """A process that does `code` in place of the compiler, and leaves a mark each time."""
    mark = f"import sys, os; open({str(tmp_path / 'marks')!r}, 'a').write('x')\n"
    return sys.executable, "-c", mark + code


def results(tmp_path, code, *requests):
    return dict(compile_all(requests or [REQUEST], tmp_path / "cache", child(tmp_path, code)))


def test_equal_requests_are_compiled_once_and_kept(tmp_path):
    other = dataclasses.replace(REQUEST, rows=2)
    first = results(tmp_path, FINE, REQUEST, other, REQUEST)
    assert first == {request: {"fits": True, "warnings": 0} for request in (REQUEST, other)}
    assert results(tmp_path, "sys.exit(1)", other, REQUEST) == first
    assert (tmp_path / "marks").read_text() == "xx"


def test_all_that_decides_a_program_tells_requests_apart(tmp_path, monkeypatch):
    folders = [
        folder_of(dataclasses.replace(REQUEST, **change), tmp_path)
        for change in (
            {}, {"rows": 2}, {"sequence_length": 256}, {"objective": "gate"},
            {"model": dataclasses.replace(MODEL, num_loops=3)},
            {"layout": dataclasses.replace(LAYOUT, remat="none")},
            {"topology": parse_topology("v6e:2x2")},
        )
    ]  # fmt: skip
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=true")
    folders.append(folder_of(REQUEST, tmp_path))
    assert len(set(folders)) == len(folders)


def test_a_compiler_that_aborts_is_a_result_with_its_last_words(tmp_path):
    code = "print('first\\nF1 check failed: x > 0', file=sys.stderr, flush=True); os.abort()"
    result = results(tmp_path, code)[REQUEST]
    assert not result["fits"] and result["peak_bytes"] is None
    assert "aborted (SIGABRT)" in result["reason"] and "check failed: x > 0" in result["reason"]
    # It would abort again: that is kept too.
    assert results(tmp_path, FINE)[REQUEST] == result


def test_a_killed_or_failing_child_is_a_failure_and_not_kept(tmp_path):
    for code, words in (
        ("os.kill(os.getpid(), 9)", "killed, perhaps for want of memory"),
        ("raise OSError('disk')", "OSError: disk"),
    ):
        with pytest.raises(RunError, match=words):
            results(tmp_path, code)
    assert results(tmp_path, FINE)[REQUEST]["fits"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [
        folder_of(REQUEST, tmp_path).name
    ]


def test_warnings_are_counted_and_a_wrong_layout_is_a_config_error(tmp_path):
    said = "print('W [SPMD] Involuntary full rematerialization. x', file=sys.stderr)\n"
    assert results(tmp_path, 2 * said + FINE)[REQUEST]["warnings"] == 2
    wrong = FINE.replace('"fits": true', '"config_error": "mesh.fsdp"')
    with pytest.raises(ConfigError, match=r"mesh\.fsdp"):
        results(tmp_path, wrong, dataclasses.replace(REQUEST, rows=3))


def test_refusals_tell_the_memory_that_is_short():
    for message, gib in (
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.30G of 15.75G hbm. "
         "Exceeded hbm capacity by 5.55G.", 21.3),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (27.24G) exceeds available HBM (15.75G).", 27.24),
    ):  # fmt: skip
        assert refusal(message)["peak_bytes"] == pytest.approx(gib * 2**30)
    vmem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem."
    assert refusal(vmem)["peak_bytes"] is None
    assert refusal("INTERNAL: Mosaic failed.\n\nmore") == {
        "reason": "INTERNAL: Mosaic failed.", "peak_bytes": None,
    }  # fmt: skip
