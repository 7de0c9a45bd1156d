"""The derivative of quantisation. Rounding has slope zero almost everywhere, so a more useful derivative is defined."""

import functools

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.errors import check_type
from moe_jax.quant.base import Recipe


def straight_through(recipe: Recipe, x: jax.Array, smooth: jax.Array | None = None) -> jax.Array:
    """``x`` as the receiver sees it, with the derivative of the identity.

    ``x_hat = dequantize(quantize(x, smooth)) / smooth``, rounded to ``x.dtype``; columns with smooth = 0 give 0. The
    cotangent of ``x`` is that of ``x_hat``, also where values saturated. The cotangent of ``smooth`` is zero, because
    ``smooth`` cancels out of ``x_hat`` but for rounding.

    Args:
      recipe: what ``moe_jax.quant.recipe`` returned.
      x: [rows, H] of the recipe's dtype.
      smooth: as for ``Recipe.quantize``.

    Returns:
      x_hat [rows, H], like x.

    >>> import jax, jax.numpy as jnp
    >>> from moe_jax import quant
    >>> int8, x = quant.recipe("int8", "float32"), jnp.array([[127.0, 3.4]])
    >>> quant.straight_through(int8, x), jax.grad(lambda x: quant.straight_through(int8, x).sum())(x)
    (Array([[127.,   3.]], dtype=float32), Array([[1., 1.]], dtype=float32))
    """
    check_type("recipe", recipe, Recipe, "get one from moe_jax.quant.recipe(name, dtype)")
    axes = _compat.union_of_varying_axes((x, smooth))
    return _straight_through(recipe, *_compat.as_varying((x, smooth), axes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _straight_through(recipe, x, smooth):
    x_hat = recipe.dequantize(recipe.quantize(x, smooth=smooth))
    if smooth is not None:
        x_hat = jnp.where(smooth == 0, 0.0, x_hat / smooth)
    return x_hat.astype(x.dtype)


@_straight_through.defjvp
def _straight_through_jvp(recipe, primals, tangents):
    # d_x_hat = d_x    # [rows, H] = [rows, H]; d_smooth adds nothing
    return _straight_through(recipe, *primals), tangents[0]
