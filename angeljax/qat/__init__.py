"""Quantization-aware training: fake quantizers, Arenas, Tequila, learned scales.

```python
qat = aj.qat.make(recipe, total_steps=1000)
state = qat.init(params)
loss = lambda p, s, step, x: loss_fn(model.apply(qat.apply(p, s, step), x))
packed = aj.qat.finalize(params, state)
```

| module | what |
| --- | --- |
| `_transform` | `make`, `finalize`: the pair of functions above |
| `_fake` | the fake quantizer and its two straight-through gradients |
| `_tequila` | the dead-zone bias |
| `lora` | low-rank additions to a frozen packed tree (QLoRA) |
| `diagnostics`, `plots` | weight trapping: histograms, flips of codes, ranks |
| `_tensor` | weights whose product also quantizes activations |

The Arenas schedule and the options of a rule are part of a recipe.
"""

from angeljax._train_options import Arenas, QATOptions
from angeljax.formats._activation import fake_quantize_activation
from angeljax.qat._fake import fake_quantize, quantize_learned
from angeljax.qat._tensor import FakeTensor
from angeljax.qat._transform import QAT, QATState, finalize, make

__all__ = [
    "QAT",
    "Arenas",
    "FakeTensor",
    "QATOptions",
    "QATState",
    "fake_quantize",
    "fake_quantize_activation",
    "finalize",
    "make",
    "quantize_learned",
]
