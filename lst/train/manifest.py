"""What makes a folder whole: ``manifest.json``, the size and the SHA-256 of every other file in it.

::

    {"files": {"config.json": {"bytes": 2019, "sha256": "9f86d0…"}, …}}

It is written last. Sizes tell at once whether files are missing or cut short; hashes, which take
as long as reading everything, whether their content is what was written.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lst.errors import UserError
from lst.files import write_json, writing
from lst.strict_json import read_json, read_strictly
from lst.train.distributed import SharedError, World

MANIFEST = "manifest.json"
TENSORS = ".safetensors"  # files of this kind are read because they are there


@dataclass(frozen=True)
class File:
    """What a file must be."""

    bytes: int
    sha256: str  # in hexadecimal


@dataclass(frozen=True)
class _Manifest:
    """What ``manifest.json`` says."""

    files: dict[str, File]


def write_manifest(folder: Path, hashes: dict[str, str]) -> None:
    """Write the manifest of a folder whose files have these hashes, by name relative to it."""
    with writing(folder):
        files = {
            name: asdict(File((folder / name).stat().st_size, sha256))
            for name, sha256 in sorted(hashes.items())
        }
    write_json(folder / MANIFEST, {"files": files})


def hash_files(folder: Path, names: Sequence[str], world: World) -> dict[str, str]:
    """SHA-256 of files by name, each rank hashing a share of them; every rank calls it.

    Raises:
        SharedError: one cannot be read.
    """
    share = {}
    with world.together():
        for name in names[world.rank :: world.size]:
            try:
                with (folder / name).open("rb") as file:
                    share[name] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    return {name: sha256 for part in world.gather(share) for name, sha256 in part.items()}


def file_names(folder: Path) -> list[str]:
    """Every file in a folder and the folders in it, relative to it."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def read_manifest(folder: Path) -> dict[str, File] | None:
    """Files by name; None where there is no manifest that can be read."""
    try:
        return read_strictly(_Manifest, read_json(folder / MANIFEST), MANIFEST).files
    except UserError:
        return None


def size_faults(folder: Path) -> list[str]:
    """What keeps a folder from being whole as far as names and sizes tell; no file is read."""
    files = read_manifest(folder)
    if files is None:
        return [f"{MANIFEST}: expected a manifest, got none that can be read"]
    faults = []
    for name, file in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            faults.append(f"{name}: expected a file of this folder")
            continue
        got = f"{path.stat().st_size}" if path.is_file() else "no file"
        if got != str(file.bytes):
            faults.append(f"{name}: expected {file.bytes} bytes, got {got}")
    tensors = sorted(str(path.relative_to(folder)) for path in folder.rglob(f"*{TENSORS}"))
    unknown = [name for name in tensors if name not in files]
    return faults + [f"{name}: expected no such file, got one" for name in unknown]


def faults(folder: Path, world: World) -> list[str]:
    """What keeps a folder from being whole, file by file; every rank calls it, each reads a share.

    A file that is missing or has another size is told of before anything is read.
    """
    by_size = world.gather(size_faults(folder))[0]
    if by_size:
        return by_size
    files = read_manifest(folder) or {}
    try:
        hashes = hash_files(folder, sorted(files), world)
    except SharedError as error:
        return [str(error)]
    return [
        f"{name}: expected SHA-256 {files[name].sha256}, got {got}"
        for name, got in hashes.items()
        if got != files[name].sha256
    ]
