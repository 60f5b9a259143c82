"""Tensors on disk: safetensors that obey the umask."""

from __future__ import annotations

import errno
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from emsplat.io.files import replacing


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Tensors with some texts as safetensors, under a temporary name until they are complete.

    Raises:
        OutputError: they cannot be written.
    """
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors makes files for their owner alone
        try:
            save_file(tensors, temporary, about)
        except SafetensorError as error:  # a full disk, which that library says in its own way
            raise OSError(errno.EIO, str(error)) from error
        temporary.chmod(mode)
