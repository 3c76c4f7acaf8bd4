"""What `angeljax train` does: from a configuration to a checkpoint.

```
<out>/config.yaml      the configuration, overrides included
<out>/metrics.jsonl    one line for each interval (or layer) and evaluation
<out>/checkpoints/     the state, to resume from
<out>/layers/          mode blockwise: the layers that are done, to resume from
<out>/tensorboard/     event files, if asked for
<out>/model/           the trained model; what `angeljax generate` takes
<out>/adapter/         mode lora: the factors alone, for `load_lora`
```

| module | what |
| --- | --- |
| `run` | modes with a loop over steps: end to end and LoRA |
| `layers` | block-wise reconstruction |
| `setup` | models, data, teacher: everything that is checked before work |
| `data` | `angeljax train-data`: text and predictions of a teacher |
"""

from angeljax._train_workflow.run import Trained, train

__all__ = ["Trained", "train"]
