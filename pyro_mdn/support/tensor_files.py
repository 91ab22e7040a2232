r"""Save a configuration and its tensors in one safetensors file; loading a file executes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = [
    "read_tensors",
    "require_fitting",
    "write_atomically",
    "write_tensors",
]

_FORMAT = "pyro_mdn/2"


def write_tensors(path: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a JSON-able configuration and tensors; if writing fails, an earlier file at ``path`` stays as it was."""
    text = json.dumps(config)
    if others := {name: type(value).__name__ for name, value in tensors.items() if not isinstance(value, Tensor)}:
        raise ValueError(f"network: expected a state of tensors alone, to save it, got {others}")
    # Clones, because safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "config": text, "sha256": _digest(text, tensors)}
    write_atomically(path, save(tensors, metadata))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of :func:`write_tensors`; raise a ``ValueError`` if the file is damaged or of another format."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: expected a file, got a directory")
    try:
        # Releases of safetensors before 0.6 would read into the default device, which may be a meta device.
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path}: expected a file of format {_FORMAT!r}, got {metadata.get('format')!r}")
            # Clones, because the memory of the file is not aligned, and may change with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got something else or a damaged one") from error
    text = metadata.get("config", "")
    if metadata.get("sha256") != _digest(text, tensors):
        raise ValueError(f"{path}: expected contents that match their checksum, got a damaged file")
    config = json.loads(text)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a configuration, got {text}")
    return config, tensors


def require_fitting(source: str, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` that names the source unless names and shapes of tensors are as expected."""
    a, b = ({(name, tuple(tensor.shape)) for name, tensor in tensors.items()} for tensors in (expected, got))
    if a != b:
        differing = sorted({name for name, _ in a ^ b})
        raise ValueError(f"{source}: expected tensors that fit the network, got others for {differing}")


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file as a whole or not at all: write a temporary file beside it, flush it to disk, and rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
