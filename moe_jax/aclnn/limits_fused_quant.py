"""What the quantised siblings of the fused pair ask besides: data of one byte or less, and scales beside it.

Letters as in ``limits_fused``. JAX has no hif8, so mode 1, one scale per tensor, is for int8 and fp8 and no product.
"""

from moe_jax.aclnn.limits import DTYPE, Rule, check_shape, where
from moe_jax.aclnn.limits_fused import ARRAYS, FLAGS, NEEDS, columns, fused_operator
from moe_jax.errors import DtypeError, InvalidArgumentError, ShapeError

_FP8 = ("float8_e4m3fn", "float8_e5m2")
_E8M0 = ("float8_e8m0fnu", "uint8")


def _quantised_dtypes(call):
    """fp8 in any mix, or fp4 throughout; int8 with per-tensor scales."""
    alike = _FP8 if call.dtype("gmm_x") in _FP8 else (call.dtype("gmm_x"),)
    for name in ("gmm_weight", "mm_x", "mm_weight"):
        if call.given(name) and call.dtype(name) not in alike:
            raise DtypeError(f"{name} has dtype {call.dtype(name)}; beside gmm_x of {call.dtype('gmm_x')} it must be "
                             f"{' or '.join(alike)}")  # fmt: skip


def _scale_dtypes(call):
    legal = ("float32",) if call["gmm_x_quant_mode"] == 1 else _E8M0
    for name in ("gmm_x_scale", "gmm_weight_scale", "mm_x_scale", "mm_weight_scale"):
        if call.given(name) and call.dtype(name) not in legal:
            raise DtypeError(
                f"{name} has dtype {call.dtype(name)}; with gmm_x_quant_mode={call['gmm_x_quant_mode']} it must be "
                f"{' or '.join(legal)}"
            )


def _mode_dtypes(call):
    legal = ("int8", *_FP8) if call["gmm_x_quant_mode"] == 1 else (*_FP8, "float4_e2m1fn")
    if call.dtype("gmm_x") not in legal:
        raise DtypeError(
            f"gmm_x has dtype {call.dtype('gmm_x')}; with gmm_x_quant_mode={call['gmm_x_quant_mode']} it must be "
            f"{' or '.join(legal)}"
        )


def _per_tensor_data(call):
    if call["gmm_x_quant_mode"] == 1:
        raise DtypeError(
            f"gmm_x has dtype {call.dtype('gmm_x')}; with gmm_x_quant_mode=1 it must be hif8{where(call.product)}, "
            "which JAX does not have; take gmm_x_quant_mode=6, or product=None"
        )


def _quant_modes(call):
    mode = call["gmm_x_quant_mode"]
    if call["gmm_weight_quant_mode"] != mode:
        raise InvalidArgumentError(
            f"gmm_weight_quant_mode={call['gmm_weight_quant_mode']} must be gmm_x_quant_mode={mode}; (1, 1) and (6, 6) "
            "are taken"
        )
    wanted = mode if call.given("mm_x") else 0
    for name in ("mm_x_quant_mode", "mm_weight_quant_mode"):
        if call[name] not in ((mode,) if wanted else (0, mode)):
            raise InvalidArgumentError(f"{name}={call[name]} must be {wanted}, as gmm_x_quant_mode={mode}")


def _scale_shapes(call):
    """Per tensor (1,); for blocks of 32 two exponents per 64 columns, beside the dimension that is summed over."""
    for x, weight, flag in (("gmm_x", "gmm_weight", "trans_gmm_weight"), ("mm_x", "mm_weight", "trans_mm_weight")):
        if not call.given(x):
            continue
        rows, width = call.shape(x)
        outer, pairs, size = call.shape(weight)[:-2], -(-width // 64), columns(call, weight, flag)
        legal = ((rows, pairs, 2), (*outer, size, pairs, 2) if call[flag] else (*outer, pairs, size, 2))
        if call["gmm_x_quant_mode"] == 1:
            legal = ((1,), (1,))
        for name, shape in zip((x, weight), legal, strict=True):
            check_shape(f"{name}_scale", call.shape(f"{name}_scale"), (shape,))


def _even_width(call):
    for name in ("gmm_x", "mm_x"):
        if call.given(name) and call.dtype(name) == "float4_e2m1fn":
            width = call.shape(name)[1]
            if width % 2 or width == 2:
                raise ShapeError(
                    f"{name} has shape {call.shape(name)}: its width {width} must be even and not 2 for e2m1, two of "
                    "which share a byte"
                )


_SCALES = ("gmm_x_scale", "gmm_weight_scale", "mm_x_scale", "mm_weight_scale")
_QUANTISED = (
    Rule("quantised_dtypes", "14.6", _quantised_dtypes, DTYPE),
    Rule("mode_dtypes", "14.6", _mode_dtypes, DTYPE, depends_on="gmm_x_quant_mode"),
    Rule("scale_dtypes", "14.6", _scale_dtypes, DTYPE, depends_on="gmm_x_quant_mode"),
    Rule("per_tensor_data", "14.6", _per_tensor_data, DTYPE, products=("a5",)),
)
_QUANTISED_AFTER = (
    Rule("quant_modes", "14.6", _quant_modes),
    Rule("even_width", "14.6", _even_width),
    Rule("scale_shapes", "14.6", _scale_shapes),
)
_QUANTISED_NEEDS = (*NEEDS, "gmm_x_scale", "gmm_weight_scale", "gmm_x_quant_mode", "gmm_weight_quant_mode")

QUANT_GROUPED_MATMUL_ALL_TO_ALLV = fused_operator(
    _QUANTISED, _QUANTISED_AFTER, (*ARRAYS, *_SCALES, "comm_quant_scale"), _QUANTISED_NEEDS, FLAGS
)
ALL_TO_ALLV_QUANT_GROUPED_MATMUL = fused_operator(
    _QUANTISED, _QUANTISED_AFTER, (*ARRAYS, *_SCALES), _QUANTISED_NEEDS, (*FLAGS, "permute_out_flag")
)
