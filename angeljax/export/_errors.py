"""The one exception of `angeljax.export`."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; one line that says what would work.

    Example:
      >>> import angeljax.export.orbax as ckpt
      >>> try:
      ...     ckpt.load("/nowhere")
      ... except ckpt.CheckpointError as e:
      ...     print(e)
      /nowhere: no such directory
    """


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of another library's exception, fit to stand inside ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."
