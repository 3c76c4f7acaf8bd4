"""What `angeljax spec` does.

| module | what |
| --- | --- |
| `setup` | target, drafter and prompts: what is checked before work |
| `answers` | `spec generate`: one prompt after another, compared with plain decoding |
| `bench` | `spec bench`: several drafters on the same prompts |
| `widths` | `spec profile`: what a wide round costs, and which drafts pay |
| `training` | `spec train`: which kind of drafter a configuration is for |
"""
