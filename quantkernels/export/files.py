"""Writing a file so that it is there whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Calls `write` with the name of a new file in the folder of `path`; when it is done, renames that file to `path`.

    What is there and is no file, such as a device, is written to and not replaced: renamed over, /dev/null would be a
    file for all programs of the machine.

    Whatever goes wrong before the renaming, a killed process included, leaves what was at `path` as it was. (A killed
    process leaves its unfinished file too, under a hidden name that starts with a dot.)

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / path.name
            write(whole)
            with whole.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        write(unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp's files are for their owner only; the result has the permissions of any new file.
        unfinished.chmod(0o666 & ~_umask())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def check_is_writable(argument: str, path: str | os.PathLike[str]) -> None:
    """Raises before any work where `path` cannot become a file.

    Raises:
        ValueError: the folder does not exist, or `path` is a folder.
    """
    where = Path(path)
    if not where.parent.is_dir():
        raise ValueError(f"export_model: expected `{argument}` to be in a folder that exists, but got {str(path)!r}")
    if where.is_dir():
        raise ValueError(f"export_model: expected `{argument}` to be a file's name, but got the folder {str(path)!r}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
