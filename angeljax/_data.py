"""Where the recipes that come with angeljax lie on disk."""

from __future__ import annotations

from pathlib import Path


def configs_dir() -> Path:
    """Returns the folder of the shipped recipes (`ternary/sherry.yaml`, ...).

    In a checkout, an editable install included, that is `configs/` beside the
    package, so that an edited recipe counts at once. A wheel carries the same folder
    as `angeljax/_configs`.

    Returns:
      An existing folder.

    Raises:
      FileNotFoundError: if the installation has lost its recipes.

    Example:
      >>> from angeljax._data import configs_dir
      >>> configs_dir().is_dir()
      True
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent
    # `configs` alone might be anybody's folder in site-packages; with a pyproject.toml
    # beside it, it is ours.
    if (checkout / "pyproject.toml").is_file() and (checkout / "configs").is_dir():
        return checkout / "configs"
    if (package / "_configs").is_dir():
        return package / "_configs"
    raise FileNotFoundError(
        f"angeljax's recipes are missing from {package}; reinstall angeljax"
    )


def recipe_files() -> list[Path]:
    """The shipped recipes: every YAML file but the trainings in `train/`.

    Returns:
      Files of `configs_dir()`, sorted.

    Raises:
      FileNotFoundError: as `configs_dir`.

    Example:
      >>> from angeljax._data import recipe_files
      >>> "sherry" in [file.stem for file in recipe_files()]
      True
    """
    root = configs_dir()
    return [f for f in sorted(root.rglob("*.yaml")) if f.parent != root / "train"]
