"""How much a compressed model lost: perplexity, KL divergence, top-1 agreement, tasks.

```python
text = load_text()
cut = windows(tokenizer.encode(text), length=512)
cache = reference_logits(logits_fn, params, cut)
result = evaluate(logits_fn, compressed, cut, reference=cache)
print(result.kl, result.top1_agreement, result.perplexity)
```

```python
tasks = [load_task("piqa.jsonl"), load_task("arc_easy.jsonl")]
for result in evaluate_tasks(logits_fn, params, tokenizer, tasks):
    print(result.name, result.acc, result.acc_norm)
```

```python
heard = transcribe(load_whisper("openai/whisper-tiny.en"), recordings)
print(word_error_rate(said, heard, normalize=english_normalizer()))
```

All measures of text models work on a function `logits_fn(params, tokens[B, T]) ->
logits[B, T, V]`, so on anybody's model. KL and agreement need no labels and show a
regression that perplexity hides.
"""

from angeljax.evaluation._steps import LogitsFn
from angeljax.evaluation.documents import document_windows, perplexity_per
from angeljax.evaluation.encoding import EncodedTask, Encoder, encode_task
from angeljax.evaluation.examples import Example, Task, load_task, load_tasks
from angeljax.evaluation.quality import EvalResult, evaluate
from angeljax.evaluation.reference import ReferenceCache, reference_logits
from angeljax.evaluation.tasks import TaskResult, evaluate_tasks, score_encoded
from angeljax.evaluation.text import (
    DEFAULT_TEXT,
    Windows,
    load_documents,
    load_text,
    windows,
)
from angeljax.evaluation.word_error import (
    WordErrors,
    english_normalizer,
    word_error_rate,
    word_errors,
)

__all__ = [
    "DEFAULT_TEXT",
    "EncodedTask",
    "Encoder",
    "EvalResult",
    "Example",
    "LogitsFn",
    "ReferenceCache",
    "Task",
    "TaskResult",
    "Windows",
    "WordErrors",
    "document_windows",
    "encode_task",
    "english_normalizer",
    "evaluate",
    "evaluate_tasks",
    "load_documents",
    "load_task",
    "load_tasks",
    "load_text",
    "perplexity_per",
    "reference_logits",
    "score_encoded",
    "windows",
    "word_error_rate",
    "word_errors",
]
