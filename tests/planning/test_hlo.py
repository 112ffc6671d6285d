"""The counter of loops and collectives: programs known by hand, compiled for CPU and for TPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ouro_jax.config import MESH_AXES
from ouro_jax.planning.hlo import Collective, HloError, collectives, facts, loops
from tests.planning.compile_collectives import INNER, MODEL, OUTER, WIDTH, lower_nested, mesh_of

GOLDEN = Path(__file__).parents[1] / "golden" / "hlo_facts.txt"
MESH = dict(zip(MESH_AXES, (1, 2, 4, 1, 1), strict=True))
WHOLE = WIDTH * WIDTH * 4  # bytes of the array that fsdp = 4 splits


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, str]:
    """The programs of compile_collectives.py, compiled for eight v5e chips in a child process."""
    folder = tmp_path_factory.mktemp("hlo")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.compile_collectives", str(folder)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {file.stem: file.read_text() for file in folder.iterdir()}


def rows(text, mesh=MESH):
    return {
        (row.kind, "+".join(row.axes), row.group_size, row.count, row.trips, row.payload_bytes)
        for row in collectives(text, mesh)
    }


def check_nested(text):
    """Every collective of the nested program, its axes, executions and whole payload, by hand."""
    assert [(loop.trips, loop.depth) for loop in loops(text)] == [(OUTER, 0), (INNER, 1)]
    assert rows(text) == {
        ("all-gather", "fsdp", 4, 1, OUTER * INNER, WHOLE),
        ("reduce-scatter", "fsdp", 4, 1, OUTER * INNER, WHOLE),
        ("collective-permute", "fsdp", 4, 1, OUTER, WHOLE // 4),
        ("all-reduce", "data", 2, 1, OUTER, WHOLE // 4),
        ("all-reduce", "data+fsdp", 8, 1, OUTER, WHOLE // 4),
        ("all-to-all", "fsdp", 4, 1, OUTER, WHOLE // 4),
    }


def test_nested_loops_on_cpu():
    check_nested(lower_nested(mesh_of()).compile().as_text())


def test_nested_loops_on_tpu(texts):
    assert "known_trip_count" not in texts["nested"]
    check_nested(texts["nested"])


def test_transfers_between_slices(texts):
    """XLA prints them as sends to the host: a megascale runtime carries them."""
    assert "all-reduce(" not in texts["slices"]
    mesh = dict(zip(MESH_AXES, (2, 1, 4, 1, 1), strict=True))
    assert rows(texts["slices"], mesh) == {("all-reduce", "slice", 2, 1, OUTER, WHOLE // 4)}
    with pytest.raises(HloError, match="unknown kind of transfer between slices: to-moon"):
        collectives(texts["slices"].replace('"ALL_REDUCE"', '"TO_MOON"'), mesh)


def test_once_moves_every_weight_once(texts):
    """One gather of the bfloat16 weights and no transfer in any loop, by hand: layers of 4 × 256 ×
    256 + 3 × 256 × 512 weights, embedding and head of 1024 × 256."""
    found = collectives(texts["once"], MESH)
    assert {row.trips for row in found} == {1}
    weights = 3 * 655_360 + 2 * 262_144
    assert sum(row.total_bytes for row in found if row.kind == "all-gather") == 2 * weights
    # The float32 gradients are reduced over fsdp, all of them, and norms, gate and sums beside.
    reduced = sum(
        row.total_bytes for row in found if row.kind != "all-gather" and "fsdp" in row.axes
    )
    assert 4 * weights <= reduced < 1.01 * 4 * weights


def test_each_loop_moves_the_weights_of_a_layer_in_every_loop(texts):
    text = texts["each_loop"]
    # The traps are there: asynchronous gathers, and reduce-scatters that are all-reduces.
    assert "chain_id=" in text and "%all-reduce-scatter" in text
    each = 2 * MODEL.num_loops * MODEL.num_layers  # 2 microbatches
    found = [row for row in collectives(text, MESH) if row.trips == each and "fsdp" in row.axes]
    # Forward, again for the loop, again for the layer, backward: whole passes over the matrices,
    # of 256 × 256 and 256 × 512 bfloat16, four and three of them in a layer.
    gathers = {row.payload_bytes: row.count for row in found if row.kind == "all-gather"}
    assert gathers.keys() == {131_072, 262_144}
    assert gathers[131_072] % 4 == 0 and gathers[262_144] % 3 == 0
    # Their bfloat16 gradients are reduced in every execution; norms are small beside them.
    reduced = sum(row.count * row.payload_bytes for row in found if row.kind != "all-gather")
    assert 2 * 655_360 <= reduced < 1.01 * 2 * 655_360


def test_facts_of_the_small_train_step_are_frozen(texts):
    text = "".join(f"# {name}\n{facts(texts[name], MESH)}" for name in ("once", "each_loop"))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), (
        "What the compiled train step does has changed. If you meant it, run UPDATE_GOLDEN=1 make "
        f"test and review the difference of {GOLDEN.name}."
    )


def program(instructions: str, computations: str = "") -> str:
    return f"""HloModule m, is_scheduled=true

{computations}

ENTRY %main (p.1: f32[4,16]) -> f32[4,16] {{
  %x = f32[4,16]{{1,0:T(8,128)}} parameter(0)
  %zero = s32[]{{:T(128)}} constant(0)
  %six = s32[] constant(6)
{instructions}
}}
"""


def loop(condition: str, step: str = "%one") -> str:
    """A while over (i, x, limit) whose body moves 256 bytes; `condition` computes %go."""
    return f"""
%body (b: (s32[], f32[4,16], s32[])) -> (s32[], f32[4,16], s32[]) {{
  %b = (s32[], f32[4,16], s32[]) parameter(0)
  %one = s32[] constant(1)
  %two = s32[] constant(2)
  %i.b = s32[] get-tuple-element(%b), index=0
  %x.b = f32[4,16]{{1,0}} get-tuple-element(%b), index=1
  %limit.b = s32[] get-tuple-element(%b), index=2
  %next = s32[] add(%i.b, {step})
  %sum = f32[4,16]{{1,0}} all-reduce(%x.b), channel_id=1, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%add
  ROOT %out = (s32[], f32[4,16], s32[]) tuple(%next, %sum, /*index=2*/%limit.b)
}}

%less (first: s32[], second: s32[]) -> pred[] {{
  %first = s32[] parameter(0)
  %second = s32[] parameter(1)
  ROOT %is_less = pred[] compare(%first, %second), direction=LT
}}

%condition (c: (s32[], f32[4,16], s32[])) -> pred[] {{
  %c = (s32[], f32[4,16], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] get-tuple-element(%c), index=2
  %five = s32[]{{:T(128)}} constant(5)
  ROOT %go = pred[]{{:T(512)}} {condition}
}}
"""  # noqa: E501


WHILE = """  %init = (s32[], f32[4,16], s32[]) tuple(%zero, %x, %six)
  %w = (s32[], f32[4,16]{1,0:T(8,128)}, s32[]) while(%init), condition=%condition, body=%body
  ROOT %y = f32[4,16] get-tuple-element(%w), index=1"""


@pytest.mark.parametrize(
    "condition, step, trips",
    [
        ("compare(%i, %five), direction=LT", "%one", 5),
        ("compare(%i, %five), direction=LE", "%one", 6),
        ("compare(%five, %i), direction=GT", "%two", 3),
        ("compare(%i, %limit), direction=LT", "%one", 6),
        ("fusion(%i, %limit), kind=kLoop, calls=%less", "%one", 6),
    ],
)
def test_trip_counts_from_the_condition(condition, step, trips):
    (row,) = collectives(program(WHILE, loop(condition, step)), MESH)
    assert (row.kind, row.axes, row.trips, row.payload_bytes) == (
        "all-reduce",
        ("fsdp",),
        trips,
        256,
    )
    assert row.total_bytes == 256 * trips


def test_a_limit_carried_through_an_outer_loop():
    """The inner loop's limit is an element of the outer loop's state that never changes."""
    outer = """
%outer (o: (s32[], f32[4,16], s32[])) -> (s32[], f32[4,16], s32[]) {
  %o = (s32[], f32[4,16], s32[]) parameter(0)
  %i.o = s32[] get-tuple-element(%o), index=0
  %x.o = f32[4,16] get-tuple-element(%o), index=1
  %limit.o = s32[] get-tuple-element(%o), index=2
  %zero.o = s32[] constant(0)
  %one.o = s32[] constant(1)
  %init.o = (s32[], f32[4,16], s32[]) tuple(%zero.o, %x.o, %limit.o)
  %w.o = (s32[], f32[4,16], s32[]) while(%init.o), condition=%condition, body=%body
  %x.w = f32[4,16] get-tuple-element(%w.o), index=1
  %limit.w = s32[] get-tuple-element(%w.o), index=2
  %next.o = s32[] add(%i.o, %one.o)
  ROOT %out.o = (s32[], f32[4,16], s32[]) tuple(%next.o, %x.w, %limit.w)
}

%below (q: (s32[], f32[4,16], s32[])) -> pred[] {
  %q = (s32[], f32[4,16], s32[]) parameter(0)
  %i.q = s32[] get-tuple-element(%q), index=0
  %four = s32[] constant(4)
  ROOT %go.q = pred[] compare(%i.q, %four), direction=LT
}
"""
    calls = WHILE.replace("condition=%condition, body=%body", "condition=%below, body=%outer")
    text = program(calls, loop("compare(%i, %limit), direction=LT") + outer)
    assert [(found.trips, found.depth) for found in loops(text)] == [(4, 0), (6, 1)]
    assert [row.trips for row in collectives(text, MESH)] == [24]
    # A limit that grows from one outer iteration to the next is none.
    grows = text.replace("get-tuple-element(%w.o), index=2", "add(%limit.o, %one.o)")
    assert [(found.trips, found.depth) for found in loops(grows)] == [(4, 0), (None, 1)]


def test_a_stated_trip_count_is_taken():
    stated = WHILE.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"},"other":[]}'
    )
    unknown = loop('custom-call(%i), custom_call_target="f"')
    assert [row.trips for row in collectives(program(stated, unknown), MESH)] == [7]


def test_a_trip_count_that_nobody_knows_is_refused():
    text = program(WHILE, loop("compare(%i, %y), direction=LT").replace(
        "%five = s32[]{:T(128)} constant(5)", "%y = s32[] custom-call(%i), custom_call_target=\"f\""
    ))  # fmt: skip
    assert [found.trips for found in loops(text)] == [None]
    with pytest.raises(HloError, match="trip count of the loop w around this all-reduce"):
        collectives(text, MESH)


GROUPS = {
    "{{0,4},{1,5},{2,6},{3,7}}": ("data", 2),
    "{{0,1,2,3},{4,5,6,7}}": ("fsdp", 4),
    "{}": ("data+fsdp", 8),
    "[2,4]<=[8]": ("fsdp", 4),
    "[4,2]<=[2,4]T(1,0)": ("data", 2),
    "[1,8]<=[8]": ("data+fsdp", 8),
    "mesh['a'=2,'b'=4] {'b'}": ("fsdp", 4),
    "mesh['a'=2,'b'=1,'c'=4] {'a','c'}": ("data+fsdp", 8),
    "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}": ("fsdp", 4),
    "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": ("data", 2),
}


@pytest.mark.parametrize("groups, expected", GROUPS.items())
def test_every_form_of_groups(groups, expected):
    text = program(
        f"  ROOT %y = f32[4,16] all-reduce(%x), channel_id=1, replica_groups={groups}, "
        'use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(f)/psum"}'
    )
    axes, size = expected
    assert collectives(text, MESH) == [
        Collective("all-reduce", tuple(axes.split("+")), size, 1, 1, 256, "jit(f)/psum")
    ]


def test_an_unknown_form_of_groups_is_refused():
    text = program("  ROOT %y = f32[4,16] all-reduce(%x), replica_groups=@x, to_apply=%add")
    with pytest.raises(HloError, match="unknown form of groups"):
        collectives(text, MESH)


def test_groups_of_one_move_nothing():
    text = program("  ROOT %y = f32[4,16] all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%a")
    assert collectives(text, MESH) == []


def test_combined_arrays_add_up():
    text = program("""  %z = bf16[3,5]{1,0:T(8,128)(2,1)} custom-call(%x), custom_call_target="f"
  ROOT %y = (f32[4,16], bf16[3,5]) all-reduce(%x, /*index=1*/%z), replica_groups=[2,4]<=[8], to_apply=%a""")  # noqa: E501
    assert rows(text) == {("all-reduce", "fsdp", 4, 1, 1, 256 + 30)}


def test_pallas_attributes_do_not_end_a_computation():
    text = program("""  %k = f32[4,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", kernel_metadata={
    block={"rows": 4
}}
}, backend_config={"custom_call_config":{"body":"TUzv"}}
  ROOT %y = f32[4,16] all-reduce(%k), replica_groups=[2,4]<=[8], to_apply=%a""")  # noqa: E501
    assert rows(text) == {("all-reduce", "fsdp", 4, 1, 1, 256)}
    assert facts(text, MESH).endswith("Pallas calls: 1\n")


def test_a_fused_reduce_scatter_counts_once_and_whole():
    fusion = """
%all-reduce-scatter.3.clone (p: f32[4,16]) -> f32[1,16] {
  %p = f32[4,16] parameter(0)
  %r = f32[4,16]{1,0:T(8,128)} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%a
  %n = s32[] constant(0)
  ROOT %d = f32[1,16] dynamic-slice(%r, %n, %n), dynamic_slice_sizes={1,16}
}
"""
    call = "  ROOT %y = f32[1,16] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3.clone"
    assert rows(program(call, fusion)) == {("reduce-scatter", "fsdp", 4, 1, 1, 256)}


def test_a_chain_of_start_steps_and_done_is_one_gather():
    gather = """all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}"""  # noqa: E501
    chain = "".join(
        f"""
%{name} (p: f32[4,16]) -> f32[16,16] {{
  %p = f32[4,16] parameter(0)
  %g = f32[16,16] {gather}
  ROOT %c = f32[16,16] custom-call(%g), custom_call_target="AsyncCollective{name}"
}}
"""
        for name in ("Start", "Step", "Done")
    )
    calls = "\n".join(
        f"  %{name}.1 = f32[16,16] fusion(%x), kind=kCustom, calls=%{name}"
        for name in ("Start", "Step", "Done")
    )
    assert rows(program(calls, chain)) == {("all-gather", "fsdp", 4, 1, 1, 1024)}


def test_starts_and_wrapped_starts_count_once():
    wrapped = """
%wrapped (p: f32[4,16]) -> f32[1,16] {
  %p = f32[4,16] parameter(0)
  ROOT %r = f32[1,16] reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%a
}
"""
    calls = """
  %g = (f32[4,16], f32[16,16]) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %h = f32[16,16] all-gather-done(%g)
  %s = ((f32[4,16]), f32[1,16], s32[]) async-start(%x), calls=%wrapped
  %t = f32[1,16] async-done(%s), calls=%wrapped
  %m = (f32[4,16], f32[4,16]) collective-permute-start(%x), source_target_pairs={{0,1},{5,6}}
  ROOT %n = f32[4,16] collective-permute-done(%m)"""
    assert rows(program(calls, wrapped)) == {
        ("all-gather", "fsdp", 4, 1, 1, 1024),
        ("reduce-scatter", "fsdp", 4, 1, 1, 256),
        ("collective-permute", "fsdp", 4, 1, 1, 256),
    }


def test_a_conditional_counts_every_branch():
    branch = """
%branch.{0} (p: f32[4,16]) -> f32[4,16] {{
  %p = f32[4,16] parameter(0)
  ROOT %r = f32[4,16] all-reduce(%p), replica_groups=[{0},{1}]<=[8], to_apply=%a
}}
"""
    call = "conditional(%zero, %x, %x), branch_computations={%branch.1, %branch.2}"
    text = program(f"  ROOT %y = f32[4,16] {call}", branch.format(1, 8) + branch.format(2, 4))
    assert {row[1] for row in rows(text)} == {"data+fsdp", "fsdp"}
