"""Where a file or a directory of a model lies: a path, file://, s3:// or a repository on Hugging Face.

Local files are used where they are. Others are copied once to each machine: objects of a bucket into the
cache of `resshift.models.cache`, files from Hugging Face into the cache of huggingface_hub. Credentials are
those of the environment.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from resshift.models.cache import Cache, Origin
from resshift.models.files import WeightsError

if TYPE_CHECKING:
    from resshift.storage import Entry, StorageError

# `resshift.storage` brings s3fs, half a second of every process: it is imported where a bucket is read.
BUCKET = "s3://"
HUB = "hf://"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # names on the hub begin so; ./NAME is a path
_PART = 1 << 24  # bytes of one request to a bucket


class Folder(Protocol):
    """A directory of a model, wherever it is."""

    def __str__(self) -> str:
        """Address for messages."""
        ...

    def names(self) -> list[str]:
        """Return the relative paths of its files.

        Raises:
            WeightsError: The directory cannot be read.
        """
        ...

    def text(self, name: str) -> str | None:
        """Return the content of a small file; None if there is none.

        Raises:
            WeightsError: The file cannot be read.
        """
        ...

    def file(self, name: str) -> Path | None:
        """Return the local copy of a file; None if there is none.

        Raises:
            WeightsError: The file cannot be fetched.
        """
        ...


def is_elsewhere(source: str) -> bool:
    """Tell whether a source has to be fetched: s3:// or hf://."""
    return source.startswith((BUCKET, HUB))


def is_weight_file(source: str) -> bool:
    """Tell whether an address ends like the name of a weight file."""
    return source.endswith(SUFFIXES)


def local_path(source: str | Path) -> Path:
    """Return the path of a local source, given as a path or as file://."""
    return Path(str(source).removeprefix("file://")).expanduser()


def local_file(source: str | Path) -> Path:
    """Return the local copy of a file: a path, file://, s3://BUCKET/KEY or hf://OWNER/NAME/FILE. That a local
    file exists is not checked.

    Raises:
        WeightsError: The file cannot be fetched; the message gives the reason in one line.
    """
    text = str(source)
    if text.startswith(HUB):
        repository, _, name = _split_hub(text)
        if not name:
            raise WeightsError(f"{text} names a repository; a file in it is {HUB}{repository}/FILE")
        return _found(hub_folder(text.removesuffix(f"/{name}")).file(name), text)
    if text.startswith(BUCKET):
        root, _, name = text.rpartition("/")
        return _found(BucketFolder(root).file(name), text)
    return local_path(source)


def _found(path: Path | None, address: str) -> Path:
    if path is None:
        from resshift import storage

        raise WeightsError(f"no model at {storage.printable(address)}: there is no such file")
    return path


def folder_of(source: str) -> Folder:
    """Return the directory at a source."""
    if source.startswith(HUB):
        return hub_folder(source)
    if source.startswith(BUCKET):
        return BucketFolder(BUCKET + source.removeprefix(BUCKET).rstrip("/"))
    return LocalFolder(local_path(source))


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A directory on this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        return sorted(
            path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()
        )

    def text(self, name: str) -> str | None:
        path = self.path / name
        try:
            return path.read_text() if path.is_file() else None
        except (OSError, UnicodeError) as error:
            raise WeightsError(f"{path} cannot be read: {error}") from error

    def file(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.is_file() else None


@dataclass(frozen=True, slots=True)
class BucketFolder:
    """A prefix in a bucket."""

    uri: str

    def __str__(self) -> str:
        from resshift import storage

        return storage.printable(self.uri)

    def names(self) -> list[str]:
        from resshift import storage

        try:
            return [entry.key for entry in storage.list_entries(self.uri)]
        except storage.StorageError as error:
            raise _unreachable(error) from error

    def text(self, name: str) -> str | None:
        from resshift import storage

        try:
            return storage.read_bytes(storage.join(self.uri, name), max_bytes=1 << 20).decode()
        except storage.StorageError as error:
            if error.reason is storage.StorageReason.MISSING:
                return None
            raise _unreachable(error) from error
        except UnicodeError as error:
            raise WeightsError(f"{self}/{name} is not text: {error}") from error

    def file(self, name: str) -> Path | None:
        from resshift import storage

        try:
            entry = storage.find_entry(self.uri, name)
            return Cache().get(
                Origin(
                    address=storage.printable(entry.uri),
                    version=entry.etag,
                    suffix=PurePosixPath(name).suffix,
                    size_bytes=entry.size_bytes,
                    chunks=partial(_parts, entry),
                )
            )
        except storage.StorageError as error:
            if error.reason is storage.StorageReason.MISSING:
                return None
            raise _unreachable(error) from error
        except OSError as error:
            raise WeightsError(f"{self}/{name} cannot be stored in the cache: {error}") from error


def _parts(entry: Entry) -> Iterator[bytes]:
    from resshift import storage

    for offset in range(0, entry.size_bytes, _PART):
        yield storage.read_range(entry.uri, offset, min(_PART, entry.size_bytes - offset))


def _unreachable(error: StorageError) -> WeightsError:
    from resshift import storage

    return WeightsError(f"no model at {storage.printable(error.uri)}: {error.reason}: {error.detail}")


@dataclass(frozen=True, slots=True)
class HubFolder:
    """A repository of models on Hugging Face, at a revision."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return HUB + self.repository + ("" if self.revision is None else f"@{self.revision}")

    def names(self) -> list[str]:
        hub = _hub()
        with _telling(self):
            return sorted(hub.HfApi().list_repo_files(self.repository, revision=self.revision))

    def text(self, name: str) -> str | None:
        path = self.file(name)
        return None if path is None else path.read_text()

    def file(self, name: str) -> Path | None:
        hub = _hub()
        try:
            with _telling(self):
                return Path(hub.hf_hub_download(self.repository, name, revision=self.revision))
        except hub.errors.RemoteEntryNotFoundError:
            return None


@contextmanager
def _telling(folder: HubFolder) -> Generator[None]:
    """Turn errors of huggingface_hub into a WeightsError of one line; that a file is absent passes."""
    errors = _hub().errors
    try:
        yield
    except errors.RemoteEntryNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, errors.GatedRepoError):
            reason = "denied: its terms must be accepted on its page, and HF_TOKEN must be set"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "missing, or private and HF_TOKEN does not give access"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"it has no revision {folder.revision}"
        else:
            reason = "unavailable: " + " ".join(str(error).split())[:200]
        raise WeightsError(f"no model at {folder}: {reason}") from error


def hub_folder(source: str) -> HubFolder:
    """Return a repository: hf://OWNER/NAME, or hf://OWNER/NAME@REVISION.

    Raises:
        WeightsError: The source is no such address.
    """
    repository, revision, name = _split_hub(source)
    if name:
        raise WeightsError(f"{source} names a file, not a repository")
    return HubFolder(repository, revision)


def is_repository(source: str) -> bool:
    """Tell whether a source looks like OWNER/NAME."""
    return _REPOSITORY.fullmatch(source) is not None


def _split_hub(source: str) -> tuple[str, str | None, str]:
    """Return the repository, the revision and the file of hf://OWNER/NAME[@REVISION][/FILE]."""
    owner, _, rest = source.removeprefix(HUB).strip("/").partition("/")
    name, _, file = rest.partition("/")
    name, at, revision = name.partition("@")
    if not is_repository(f"{owner}/{name}") or (at and not revision):
        raise WeightsError(f"an address on Hugging Face is {HUB}OWNER/NAME, got {source}")
    return f"{owner}/{name}", revision or None, file


def _hub() -> Any:
    try:
        hub = importlib.import_module("huggingface_hub")
        importlib.import_module("huggingface_hub.errors")  # which the package does not import by itself
    except ImportError as error:
        raise WeightsError(
            "models on Hugging Face need the package huggingface_hub: pip install 'resshift[models]'"
        ) from error
    return hub
