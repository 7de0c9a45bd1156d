"""Products, traffic, loops and kernels read off HLO, against counts that a person can make by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from moe_jax.hlo.cost import declare_flops, flops_of, scope_of, work_of
from moe_jax.hlo.text import Program

M, K, N = 32, 16, 24
A, B = jax.ShapeDtypeStruct((M, K), "float32"), jax.ShapeDtypeStruct((K, N), "float32")
SQUARE = jax.ShapeDtypeStruct((K, K), "float32")


def works(fn, *args):
    """(what surely runs, a turn of each loop of unknown length, kernels, those loops)."""
    return work_of(Program(jax.jit(fn).lower(*args).compile().as_text()), has_fast_memory=False)


def module(*lines, computations=""):
    """An HLO module whose entry computation has these lines."""
    body = "\n".join("  " + line for line in lines)
    return Program(f"HloModule m\n\n{computations}\nENTRY %main (p: f32[1]) -> f32[1] {{\n{body}\n}}\n")


def test_a_product_is_two_flops_a_multiplication():
    work, rest, kernels, loops = works(lambda a, b: a @ b, A, B)
    assert work.flops == 2 * M * N * K and not rest.flops and not kernels and not loops
    assert work.bytes_accessed == 4 * (M * K + K * N + M * N)
    assert work.cycles is None and work.collective_bytes == 0


def test_a_batched_product():
    shapes = (jax.ShapeDtypeStruct((5, M, K), "float32"), jax.ShapeDtypeStruct((5, K, N), "float32"))
    assert works(lambda a, b: jnp.einsum("gmk,gkn->gmn", a, b), *shapes)[0].flops == 5 * 2 * M * N * K


def test_products_as_the_tpu_compiler_writes_them():
    """As convolutions; the batch is a dimension whose window meets one element in each place."""
    program = module(
        "%a = bf16[512,256]{1,0} parameter(0)",
        "%b = bf16[384,256]{1,0} parameter(1)",
        "ROOT %c = bf16[512,384]{1,0} convolution(%a, %b), dim_labels=bf_oi->bf",
    )
    assert work_of(program, has_fast_memory=True)[0].flops == 2 * 512 * 384 * 256
    program = module(
        "%a = bf16[4,512,256]{2,1,0} parameter(0)",
        "%b = bf16[4,256,384]{2,1,0} parameter(1)",
        "ROOT %c = bf16[4,512,384]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, "
        "dim_labels=0bf_0io->0bf",
    )
    assert work_of(program, has_fast_memory=True)[0].flops == 4 * 2 * 512 * 384 * 256


@pytest.mark.parametrize("stride,rhs_dilate,lhs_dilate,pad", [(1, 1, 1, 1), (2, 1, 1, 0), (1, 2, 1, 2), (1, 1, 2, 1)])
def test_a_convolution_counts_no_padding(stride, rhs_dilate, lhs_dilate, pad):
    size, window, batch, features, out_features = 7, 3, 2, 4, 5
    lhs = jax.ShapeDtypeStruct((batch, features, size), "float32")
    rhs = jax.ShapeDtypeStruct((out_features, features, window), "float32")

    def convolve(a, b):
        return lax.conv_general_dilated(
            a, b, (stride,), [(pad, pad)], lhs_dilation=(lhs_dilate,), rhs_dilation=(rhs_dilate,)
        )

    # Each multiplication of ones adds one to the sum of the result.
    ones = [np.ones(a.shape, np.float32) for a in (lhs, rhs)]
    multiplications = int(convolve(*ones).sum())
    text = jax.jit(convolve).lower(lhs, rhs).compile().as_text()
    program = Program(text)
    found = [flops_of(program, e.instruction) for e in program.executions(lambda i: 0)]
    assert sum(filter(None, found)) == 2 * multiplications


def test_loops_count_by_their_trips_and_nested_loops_by_the_product():
    def nested(x, w):
        return lax.fori_loop(0, 3, lambda _, x: lax.fori_loop(2, 7, lambda _, x: jnp.tanh(x @ w), x) + 1, x)

    work, rest, _, loops = works(nested, SQUARE, SQUARE)
    assert work.flops == 3 * 5 * 2 * K**3 and not rest.flops and not loops


def test_a_turn_of_a_loop_of_unknown_length_is_kept_apart():
    def step(x, w):
        with jax.named_scope("known"):
            x = lax.fori_loop(0, 4, lambda _, x: jnp.tanh(x @ w), x)
        with jax.named_scope("unknown"):
            return lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: lax.fori_loop(0, 2, lambda _, x: x @ w, x), x)

    work, rest, _, loops = works(step, SQUARE, SQUARE)
    assert work.flops == 4 * 2 * K**3 and rest.flops == 2 * 2 * K**3
    assert len(loops) == 1 and loops[0].endswith(" unknown")


@pytest.mark.parametrize("first,bound,step,trips", [(0, 5, 1, 5), (2, 9, 3, 3), (4, 4, 1, 0)])
@pytest.mark.parametrize("bound_in_tuple", [False, True])
def test_trips_by_the_counter_where_the_compiler_does_not_say(first, bound, step, trips, bound_in_tuple):
    """The TPU compiler's text: no known_trip_count; the bound is in the condition or comes in with the tuple."""
    tuple_type = "(s32[], f32[16,16], s32[])"
    limit = "get-tuple-element(%q), index=2" if bound_in_tuple else f"constant({bound})"
    program = module(
        "%x = f32[16,16]{1,0} parameter(0)",
        f"%first = s32[] constant({first})",
        f"%bound = s32[] constant({bound})",
        "%start = s32[] copy(%first)",
        f"%t = {tuple_type} tuple(%start, %x, %bound)",
        f"%w = {tuple_type} while(%t), condition=%cond, body=%body",
        "ROOT %r = f32[16,16]{1,0} get-tuple-element(%w), index=1",
        computations=f"""%body (p: {tuple_type}) -> {tuple_type} {{
  %p = {tuple_type} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %y = f32[16,16]{{1,0}} get-tuple-element(%p), index=1
  %z = f32[16,16]{{1,0}} dot(%y, %y), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %out = {tuple_type} tuple(%next, %z, %n)
}}

%cond (q: {tuple_type}) -> pred[] {{
  %q = {tuple_type} parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] {limit}
  ROOT %lt = pred[] compare(%j, %limit), direction=LT
}}
""",
    )
    work, rest, _, loops = work_of(program, has_fast_memory=True)
    assert (work.flops, rest.flops, loops) == (trips * 2 * 16**3, 0, ())


@pytest.mark.parametrize("heavier", [0, 1])
def test_of_the_branches_the_heavier_counts(heavier):
    def either(x, w, which):
        branches = [lambda: x @ w, lambda: jnp.tanh(x @ w) @ w]
        return lax.cond(which, branches[heavier], branches[1 - heavier])

    assert works(either, SQUARE, SQUARE, jax.ShapeDtypeStruct((), "bool"))[0].flops == 2 * 2 * K**3


def test_a_gather_reads_rows_and_an_update_in_place_writes_them():
    table, rows = jax.ShapeDtypeStruct((1000, K), "float32"), jax.ShapeDtypeStruct((8,), "int32")
    work = works(lambda x, at: x.at[at].get(mode="promise_in_bounds"), table, rows)[0]
    assert work.gathers == 1 and work.bytes_accessed == 8 * 4 + 2 * 8 * K * 4

    program = module(
        "%x = f32[1000,16]{1,0} parameter(0)",
        "%row = f32[1,16]{1,0} parameter(1)",
        "%at = s32[] parameter(2)",
        "ROOT %y = f32[1000,16]{1,0} dynamic-update-slice(%x, %row, %at, %at)",
    )
    assert work_of(program, has_fast_memory=False)[0].bytes_accessed == 2 * 16 * 4 + 2 * 4


def test_asynchronous_copies_and_slices():
    """A start's type names its operands too. What goes into fast memory is read from the main one, and not written."""
    program = module(
        "%x = f32[4,8]{1,0} parameter(0)",
        "%a = ((f32[4,8]{1,0}), f32[1,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1], [0:8]}",
        "%b = f32[1,8]{1,0:T(8,128)S(1)} slice-done(%a)",
        "%c = (f32[4,8]{1,0:S(1)}, f32[4,8]{1,0}, u32[]{:S(2)}) copy-start(%x)",
        "%d = f32[4,8]{1,0:S(1)} copy-done(%c)",
        "%e = ((f32[4,8]{1,0}), f32[4,8]{1,0}) all-to-all-start(%x), replica_groups={{0,1}}",
        "ROOT %f = f32[4,8]{1,0} all-to-all-done(%e)",
    )
    work = work_of(program, has_fast_memory=True)[0]
    assert work.bytes_accessed == 4 * (8 + 4 * 8 + 2 * 4 * 8) and work.collective_bytes == 4 * 4 * 8
    assert work_of(program, has_fast_memory=False)[0].bytes_accessed == 4 * (2 * 8 + 2 * 4 * 8 + 2 * 4 * 8)


def test_kernels_count_what_they_declare_and_memory_on_the_chip_is_no_traffic():
    config = 'backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"1234","bytes_accessed":"5"}}}'
    program = module(
        "%x = f32[8,16]{1,0} parameter(0)",
        f'%k.3 = f32[8,16]{{1,0:T(8,128)S(1)}} custom-call(%x), custom_call_target="tpu_custom_call", {config}',
        'ROOT %other.1 = f32[8,16]{1,0} custom-call(%k.3), custom_call_target="tpu_custom_call"',
    )
    work, _, kernels, _ = work_of(program, has_fast_memory=True)
    assert work.flops == 1234 and dict(work.flops_by_op) == {"k": 1234} and dict(work.unpriced) == {"k": 1, "other": 1}
    assert [(k.name, k.executions, k.flops) for k in kernels] == [("k", 1, 1234), ("other", 1, None)]
    assert work.bytes_accessed == 2 * 8 * 16 * 4
    assert work_of(program, has_fast_memory=False)[0].bytes_accessed == 4 * 8 * 16 * 4


def test_what_neither_multiplies_nor_communicates_is_kept_apart():
    cycles = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
    program = module(
        "%a = f32[8,16]{1,0} parameter(0)",
        "%b = f32[16,4]{1,0} parameter(1)",
        "%at = s32[6]{0} parameter(2)",
        f"%product = f32[8,4]{{1,0}} fusion(%a, %b), kind=kOutput, calls=%inside, {cycles % 7}",
        f"%other = f32[8,4]{{1,0}} add(%product, %product), {cycles % 5}",
        "%rows = f32[6,4]{1,0} gather(%other, %at), offset_dims={1}, collapsed_slice_dims={0}, slice_sizes={1,4}",
        "ROOT %moved = f32[6,4]{1,0} all-to-all(%rows), replica_groups={{0,1}}, dimensions={0}",
        computations="%inside (p: f32[8,16], q: f32[16,4]) -> f32[8,4] {\n  %p = f32[8,16]{1,0} parameter(0)\n  "
        "%q = f32[16,4]{1,0} parameter(1)\n  "
        "ROOT %y = f32[8,4]{1,0} convolution(%p, %q), dim_labels=bf_io->bf\n}\n",
    )
    work = work_of(program, has_fast_memory=True)[0]
    assert (work.cycles, work.other_cycles) == (12, 5) and work.gather_bytes == 4 * 6 * 4
    assert work.other_bytes == 4 * (3 * 8 * 4 + 2 * 6 * 4 + 6)
    assert work.bytes_accessed == work.other_bytes + 4 * (8 * 16 + 16 * 4 + 8 * 4 + 2 * 6 * 4)
    assert work_of(program, has_fast_memory=False)[0].other_cycles is None


def test_what_is_declared_around_a_kernel_counts_where_the_kernel_cannot_say_it():
    """As of GPUs, whose custom calls have lost the cost estimate of Pallas. What is no kernel does not count."""

    def declared(a):
        with declare_flops(1234):
            return a + 1

    attribute = 'moe_jax_flops="1234"'
    assert attribute in jax.jit(declared).lower(A).compile().as_text()
    program = module(
        "%x = f32[8,16]{1,0} parameter(0)",
        f"%sum.1 = f32[8,16]{{1,0}} add(%x, %x), frontend_attributes={{{attribute}}}",
        'ROOT %k.3 = f32[8,16]{1,0} custom-call(%sum.1), custom_call_target="__gpu$xla.gpu.triton", '
        f"frontend_attributes={{{attribute}}}, backend_config={{num_warps = 8 : i32}}",
    )
    work, _, kernels, _ = work_of(program, has_fast_memory=False)
    assert work.flops == 1234 and [(k.name, k.flops) for k in kernels] == [("k", 1234)]


def test_cycles_by_scope():
    def line(name, path, cycles):
        return (
            f'%{name} = f32[1]{{0}} add(%x, %x), metadata={{op_name="jit(f)/{path}"}}, '
            f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
        )

    paths = [
        "shard_map/dispatch/exchange/add",
        "while/body/eval_jaxpr/jvp(dispatch)/exchange/add",
        "transpose(jvp(experts))/mul",
    ]
    lines = [line(f"v{i}", path, 10 ** (i + 1)) for i, path in enumerate(paths)]
    work = work_of(module("%x = f32[1]{0} parameter(0)", *lines), has_fast_memory=True)[0]
    assert work.cycles == 1110
    assert dict(work.scope_cycles) == {"experts (backward)": 1000, "dispatch/exchange": 110}


def test_what_the_compiler_adds_counts_with_what_it_works_on():
    cycles = 'backend_config={"window_config":{"estimated_cycles":"7"}}'
    named = 'metadata={op_name="jit(f)/experts/mul"}'
    program = module(
        "%x = f32[8]{0} parameter(0)",
        '%small = f32[2]{0} slice(%x), slice={[0:2]}, metadata={op_name="jit(f)/route/slice"}',
        f"%large = f32[8]{{0}} multiply(%x, %x), {named}",
        "%start = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%large)",
        "%done = f32[8]{0} copy-done(%start)",
        f"%mix = f32[8]{{0}} custom-call(%small, %done), {cycles}",
        f"%fused = f32[8]{{0}} fusion(%small), kind=kLoop, calls=%inside, {cycles}",
        f'%weights = f32[8]{{0}} copy(%x), metadata={{op_name="w_up"}}, {cycles}',
        computations=f"%inside (p: f32[2]) -> f32[8] {{\n  %p = f32[2]{{0}} parameter(0)\n  "
        f"ROOT %y = f32[8]{{0}} pad(%p, %p), padding=0_6, {named}\n}}\n",
    )
    work = work_of(program, has_fast_memory=True)[0]
    assert dict(work.scope_cycles) == {"experts": 14, "(no scope)": 7}


def test_scopes_of_a_real_program():
    def step(x, w):
        with jax.named_scope("outer"), jax.named_scope("inner"):
            return jnp.sum(jnp.tanh(x @ w))

    program = Program(jax.jit(jax.grad(step)).lower(SQUARE, SQUARE).compile().as_text())
    found = {scope_of(e.instruction) for e in program.executions(lambda i: 0) if e.instruction.op == "dot"}
    assert found == {"outer/inner", "outer/inner (backward)"}
