"""Sampling text from the model, one byte at a time, with one fixed shape."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.tools.train.model import Decoder
from moe_jax.tools.train.step import TrainState


def compile_next_byte(decoder: Decoder, state: TrainState, *, batch_size: int) -> Callable:
    """Compiles next_byte(params, balance, tokens [B, S] i32, position, key data), as `state` has the first two.

    It draws the byte after `position` of row 0.
    """

    def next_byte(params, balance, tokens, position, key):
        logits, _ = decoder.logits(params, tokens, balance)
        return jax.random.categorical(jax.random.wrap_key_data(key), logits[0, position])

    key = jax.random.key_data(jax.random.key(0))
    like = (
        jax.ShapeDtypeStruct((batch_size, decoder.config.seq_len), jnp.int32, sharding=decoder.over_batch),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=decoder.replicated),
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=decoder.replicated),
    )
    return jax.jit(next_byte, out_shardings=decoder.replicated).lower(state.params, state.balance, *like).compile()


def sample_text(
    decoder: Decoder,
    state: TrainState,
    prompt: bytes,
    *,
    num_bytes: int,
    batch_size: int,
    seed: int,
    tell: Callable[[str, int, int], None],
) -> str:
    """Samples `num_bytes` bytes after `prompt`, and returns both as text. Bytes that are no UTF-8 become U+FFFD.

    `tell` is called before every byte, with the number of bytes that are sampled so far.

    The model runs on the batch size that it was planned for, so that no other plan is needed: every row holds the same
    text, and row 0 is read. Of a text longer than `seq_len` the model sees the last `seq_len` bytes.
    """
    next_byte = compile_next_byte(decoder, state, batch_size=batch_size)
    seq_len, text = decoder.config.seq_len, list(prompt)
    for done, key in enumerate(np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), num_bytes)))):
        tell("sampling", done, num_bytes)
        window = text[-seq_len:]
        tokens = np.zeros((batch_size, seq_len), np.int32)
        tokens[:, : len(window)] = window
        inputs = jax.device_put(
            (tokens, np.int32(len(window) - 1), key), (decoder.over_batch, decoder.replicated, decoder.replicated)
        )
        text.append(int(next_byte(state.params, state.balance, *inputs)))
    return bytes(text).decode(errors="replace")


def printable(text: str) -> str:
    r"""Writes characters that could steer a terminal as escapes, such as \x1b; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
