"""How much a compressed model lost: perplexity, KL divergence, top-1 agreement.

```python
text = load_text()
cut = windows(tokenizer.encode(text), length=512)
cache = reference_logits(logits_fn, params, cut)
result = evaluate(logits_fn, compressed, cut, reference=cache)
print(result.kl, result.top1_agreement, result.perplexity)
```

Everything works on a function `logits_fn(params, tokens[B, T]) -> logits[B, T, V]`, so
on anybody's model. KL and agreement need no labels and show a regression that
perplexity hides.
"""

from angeljax.evaluation._steps import LogitsFn
from angeljax.evaluation.quality import EvalResult, evaluate
from angeljax.evaluation.reference import ReferenceCache, reference_logits
from angeljax.evaluation.text import (
    DEFAULT_TEXT,
    Windows,
    load_documents,
    load_text,
    windows,
)

__all__ = [
    "DEFAULT_TEXT",
    "EvalResult",
    "LogitsFn",
    "ReferenceCache",
    "Windows",
    "evaluate",
    "load_documents",
    "load_text",
    "reference_logits",
    "windows",
]
