"""ToMe: bipartite soft matching (arXiv 2210.09461)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from angeljax.tokens import _choose
from angeljax.tokens._method import Choice, Tokens, method


@method(arrays={"keys": 1, "sizes": 0})
def tome(tokens: Tokens) -> Choice:
    """Merges the most similar pairs until K tokens are left.

    A pass: tokens at even places (A) and at odd places (B); each of A proposes the most
    similar of B; the r = min(left // 2, left - K) best proposals are accepted, and both
    become one token at B's place, the mean of all patches in it,

        x_b <- (s_b x_b + sum_a s_a x_a) / (s_b + sum_a s_a),  s_b <- s_b + sum_a s_a

    (arXiv 2210.09461). A pass halves at most, so that fewer than half
    of the tokens take several, each on the merged tokens in their places. Arguments are
    those of `prune`.

    Args:
      tokens: see `prune`.
      keys: `[B, N, C]`, what is compared (mean over heads); default the embeddings.
      sizes: `[B, N]`, patches that each token stands for already; default 1.

    Returns:
      A `Selection` with `merged`. `order` is `indices`, as nothing is chosen in order.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [4.0, 0.1]])
      >>> chosen = tome(x, keep=3)
      >>> chosen.indices.tolist(), chosen.merged[2].tolist()  # 2 is most like 3
      ([0, 1, 3], [3.0, 0.1...])
    """
    n, keep, count, mask = tokens.num_tokens, tokens.keep, tokens.count, tokens.mask
    keys = tokens.arrays.get("keys", tokens.embeds)
    sizes = tokens.arrays.get("sizes", jnp.ones(n))
    sizes = jnp.where(mask, sizes, 0)

    def means(rows: jax.Array, into: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows and sizes with each token in its place of `into` `[N]`."""
        size = jnp.zeros(n).at[into].add(sizes)
        total = jnp.zeros_like(rows).at[into].add(rows * sizes[:, None])
        return total / jnp.maximum(size, 1e-12)[:, None], size

    def more(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.sum(state[0]) > count

    def pass_(state: tuple[jax.Array, jax.Array]) -> Any:
        alive, into = state
        place, left = _choose.rank(alive), jnp.sum(alive, dtype=jnp.int32)
        even, odd = alive & (place % 2 == 0), alive & (place % 2 == 1)
        key, _ = means(keys, into)
        like = jnp.where(odd, _choose.cosines(key, key), -jnp.inf)
        number = jnp.minimum(jnp.maximum(left // 2, 1), left - count)
        nearest = jnp.max(like, axis=-1)
        source = _choose.chosen(_choose.best(nearest, even, n, number), n)
        moved = jnp.where(source, jnp.argmax(like, axis=-1), jnp.arange(n))
        return alive & ~source, moved[into]

    alive, into = jax.lax.while_loop(more, pass_, (mask, jnp.arange(n)))
    order = _choose.first(jnp.argsort(~alive, stable=True)[:keep], count, n)
    return order, means(tokens.rows, into)[0]
