"""`TokenPruner`: a method with all of its settings, as hosts call it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from angeljax.tokens._proxies import distinctiveness, norm_importance
from angeljax.tokens._registry import find
from angeljax.tokens._scorer import score_tokens
from angeljax.tokens._selection import Selection
from angeljax.tokens._signals import choose

IMPORTANCES = ("attn", "distinctiveness", "norm", "scorer")


def _static(**default: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **default)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPruner:
    """A method of `prune` with its settings; a pytree whose leaves are its arrays.

    Hosts call it with what they have, and it takes what its method needs. Equal
    settings are one and the same for `jax.jit`, so that nothing is compiled twice.

    Attributes:
      method: one of `methods()`.
      keep: a count or a share; see `keep_count`.
      options: of the method, sorted pairs.
      importance: what the method takes for `importance` where the host gives none:
        "attn", "norm", "distinctiveness" or "scorer"; None for nothing.
      quota: see `prune`.
      group_keep: see `prune`.
      attn_layer, object_layer: layers of the vision tower whose attention is wanted;
        negative ones count from the last. None leaves it to the host.
      scorer: params of the learned scorer; see `score_tokens`.
      key: of `jax.random.key`, for methods that draw.

    Example:
      >>> import jax.numpy as jnp
      >>> fn = TokenPruner(method="idpruner", keep=2, importance="norm")
      >>> x = jnp.array([[[1.0, 0.0], [3.0, 0.1], [0.0, 2.0]]])
      >>> fn(x).indices.tolist()
      [[1, 2]]
    """

    method: str = _static()
    keep: int | float = _static()
    options: tuple[tuple[str, Any], ...] = _static(default=())
    importance: str | None = _static(default=None)
    quota: str = _static(default="global")
    group_keep: int | None = _static(default=None)
    attn_layer: int | None = _static(default=None)
    object_layer: int | None = _static(default=None)
    scorer: Any = None
    key: jax.Array | None = None

    def __call__(
        self,
        embeds: jax.Array,
        *,
        mask: jax.Array | None = None,
        attn: jax.Array | None = None,
        object_attn: jax.Array | None = None,
        keys: jax.Array | None = None,
        text: jax.Array | None = None,
        groups: jax.Array | None = None,
        importance: jax.Array | None = None,
    ) -> Selection:
        """The choice among tokens `[B, N, D]`; arguments are those of `prune`.

        Raises:
          ValueError: the host does not give what the method or its importance needs.
        """
        fn = find(self.method)
        if importance is None:
            importance = self._importance(embeds, mask, attn)
        grouped = self.quota != "global" or self.group_keep is not None
        if grouped and groups is None:
            raise ValueError(
                f"quota={self.quota!r} needs a host that says which image each token "
                "belongs to (groups)"
            )

        def run(embeds: jax.Array, **signals: Any) -> Selection:
            return fn(
                embeds,
                keep=self.keep,
                quota=self.quota,
                group_keep=self.group_keep,
                **signals,
                **dict(self.options),
            )

        return choose(
            run,
            embeds,
            takes=fn,
            mask=mask,
            attn=attn,
            object_attn=object_attn,
            keys=keys,
            text=text,
            groups=groups if grouped else None,
            importance=importance,
            key=self.key,
        )

    def _importance(self, embeds: jax.Array, mask: Any, attn: Any) -> jax.Array | None:
        if self.importance is None:
            return None
        if self.importance == "norm":
            return norm_importance(embeds)
        if self.importance == "distinctiveness":
            return distinctiveness(embeds, mask)
        if self.importance == "scorer":
            if self.scorer is None:
                raise ValueError(
                    "importance: scorer needs the params of a scorer: "
                    "prune_fn(scorer=angeljax.tokens.load_scorer(path))"
                )
            return score_tokens(self.scorer, embeds, mask)
        if attn is None:
            raise ValueError(
                "importance: attn needs a host that gives attention; this one does not"
            )
        return attn
