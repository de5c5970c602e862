"""The benchmark that compiles for a TPU, as far as a machine without libtpu can try it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import hlo, models, results, tpu_report
from benchmarks.tpu_cases import ON_DEVICE, STREAMED, Sizes, floats, int8_params, tpu_cases

ROOT = Path(__file__).parents[2]

# As libtpu prints it, made shorter. In the loop, the first copy runs beside a product, the second
# beside nothing but an addition, and the third is awaited at once. Outside, one is synchronous. A
# copy to the host and one inside of a fusion do not count.
PROGRAM = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[4,8,16]{2,1,0:T(8,128)S(5)})}

%product (a: bf16[8,16]) -> bf16[8,8] {
  %a = bf16[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %convolution.1 = bf16[8,8]{1,0:T(8,128)} convolution(%a, %a), dim_labels=bf_oi->bf
}

%sliced (w: bf16[4,8,16]) -> bf16[1,8,16] {
  %w = bf16[4,8,16]{2,1,0:T(8,128)S(5)} parameter(0)
  ROOT %slice.1 = bf16[1,8,16]{2,1,0:T(8,128)} slice(%w), slice={[0:1], [0:8], [0:16]}
}

%body (state: (bf16[8,8], bf16[4,8,16])) -> (bf16[8,8], bf16[4,8,16]) {
  %state = (bf16[8,8]{1,0:T(8,128)}, bf16[4,8,16]{2,1,0:T(8,128)S(5)}) parameter(0)
  %x = bf16[8,8]{1,0:T(8,128)} get-tuple-element(%state), index=0
  %w = bf16[4,8,16]{2,1,0:T(8,128)S(5)} get-tuple-element(%state), index=1
  %start.1 = ((bf16[4,8,16]{2,1,0:S(5)}), /*i=1*/bf16[1,8,16]{2,1,0}) dynamic-slice-start(%w, %x)
  %fusion.1 = bf16[8,8]{1,0:T(8,128)} fusion(%x), kind=kOutput, calls=%product
  %done.1 = bf16[1,8,16]{2,1,0:T(8,128)} dynamic-slice-done(%start.1)
  %start.2 = ((bf16[4,8,16]{2,1,0:S(5)}), /*i=1*/bf16[2,8,16]{2,1,0}) dynamic-slice-start(%w, %x)
  %add.1 = bf16[8,8]{1,0:T(8,128)} add(%fusion.1, %x)
  %done.2 = bf16[2,8,16]{2,1,0:T(8,128)} dynamic-slice-done(%start.2)
  %start.3 = ((bf16[4,8,16]{2,1,0:S(5)}), /*i=1*/bf16[1,8,16]{2,1,0}) dynamic-slice-start(%w, %x)
  %done.3 = bf16[1,8,16]{2,1,0:T(8,128)} dynamic-slice-done(%start.3)
  ROOT %tuple.1 = (bf16[8,8]{1,0:T(8,128)}, bf16[4,8,16]{2,1,0:T(8,128)S(5)}) tuple(%add.1, %w)
}

%condition (state: (bf16[8,8], bf16[4,8,16])) -> pred[] {
  %state = (bf16[8,8]{1,0:T(8,128)}, bf16[4,8,16]{2,1,0:T(8,128)S(5)}) parameter(0)
  ROOT %constant.1 = pred[] constant(true)
}

ENTRY %main.1 (w: bf16[4,8,16], x: bf16[8,8]) -> bf16[8,8] {
  %w = bf16[4,8,16]{2,1,0:T(8,128)S(5)} parameter(0), sharding={replicated}
  %x = bf16[8,8]{1,0:T(8,128)} parameter(1)
  %fusion.2 = bf16[1,8,16]{2,1,0:T(8,128)} fusion(%w), kind=kLoop, calls=%sliced
  %start.4 = (bf16[8,8]{1,0:T(8,128)S(5)}, bf16[8,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %done.4 = bf16[8,8]{1,0:T(8,128)S(5)} copy-done(%start.4)
  %tuple.2 = (bf16[8,8]{1,0:T(8,128)}, bf16[4,8,16]{2,1,0:T(8,128)S(5)}) tuple(%x, %w)
  %while.1 = (bf16[8,8], bf16[4,8,16]{2,1,0:S(5)}) while(%tuple.2), condition=%condition, body=%body
  ROOT %result = bf16[8,8]{1,0:T(8,128)} get-tuple-element(%while.1), index=0
}
"""


def test_copies_from_the_host_are_counted_once_and_only_a_product_hides_them():
    layer = 8 * 16 * 2
    assert list(hlo.copies_from_host(PROGRAM)) == [
        hlo.Copy(layer, in_loop=False),
        hlo.Copy(layer, in_loop=True, asynchronous=True, hidden=True),
        hlo.Copy(2 * layer, in_loop=True, asynchronous=True),
        hlo.Copy(layer, in_loop=True, asynchronous=True),
    ]
    assert hlo.described(PROGRAM) == {
        "copies": 4,
        "asynchronous": 3,
        "beside a product": 1,
        "in loops": 3,
        "in loops, beside a product": 1,
        "largest copy": 2 * layer,
    }


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("bf16[3,5]{1,0:T(8,128)}", 30), ("s8[7]", 7), ("f32[]", 4), ("f8e4m3fn[2,2]", 4), ("()", 0)],
)
def test_the_bytes_of_a_type(text, nbytes):
    assert hlo.nbytes(text) == nbytes


@pytest.mark.parametrize("name", tpu_cases(tiny=True))
def test_a_streamed_step_of_each_case_takes_the_params_that_it_returns(name):
    case = tpu_cases(tiny=True)[name]
    mesh = jax.sharding.Mesh(jax.devices()[:1], "x")
    device = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    host = device.with_memory_kind("pinned_host")
    arguments = case.arguments(STREAMED, device, host)
    assert host in {x.sharding for x in jax.tree.leaves(arguments[0]["layers"])}
    with jax.numpy_dtype_promotion("standard"):  # AdamW mixes bfloat16 and float32
        params, state, _ = jax.eval_shape(case.step(STREAMED), *arguments)
    leaves, structure = jax.tree.flatten((params, state))
    given, of_given = jax.tree.flatten(arguments[:2])
    assert structure == of_given
    assert [(x.shape, x.dtype) for x in leaves] == [(x.shape, x.dtype) for x in given]
    on_device = case.arguments(ON_DEVICE, device, host)
    assert {x.sharding for x in jax.tree.leaves(on_device)} == {device}


def test_int8_packed_in_int32_gives_the_same_kernel():
    sizes = Sizes(1, 128, 8)
    with jax.numpy_dtype_promotion("standard"):
        original = models.stacked_transformer(*sizes.of_model())["layers"]["up"][0]
        kernels = []
        for packed in (False, True):
            stored = jax.tree.map(lambda x: x[0], int8_params(sizes, packed)["layers"]["up"])
            kernels.append(np.asarray(floats(stored, jnp.bfloat16), np.float32))
    np.testing.assert_array_equal(*kernels)
    error = np.abs(kernels[0] - np.asarray(original, np.float32)).max()
    assert 0 < error <= 0.02 * np.abs(kernels[0]).max()


def test_an_error_of_memory_says_how_much_there_is():
    text = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    text += "temporaries (27.39G) exceeds available HBM (15.75G)."
    assert tpu_report.reason(text) == "does not fit: 27.39 of 15.75 GiB"
    assert tpu_report.reason("ValueError: a shape.\nmore") == "error: ValueError: a shape"


def test_the_page_is_that_of_the_stored_figures():
    page = (ROOT / "docs" / "explanation" / "tpu.md").read_text()
    assert page == tpu_report.page(results.read("tpu"))
