"""Files on local disks and objects in S3 by one set of functions: `from resshift import storage`."""

from resshift.storage.files import (
    exists,
    find_entry,
    is_inside,
    is_s3,
    join,
    list_entries,
    name_problem,
    open_input,
    read_bytes,
    read_file,
    read_first_bytes,
    read_range,
    remove,
    write_bytes,
    write_file,
)
from resshift.storage.types import EPOCH, Entry, StorageError, StorageReason, printable, printable_key

__all__ = [
    "EPOCH",
    "Entry",
    "StorageError",
    "StorageReason",
    "exists",
    "find_entry",
    "is_inside",
    "is_s3",
    "join",
    "list_entries",
    "name_problem",
    "open_input",
    "printable",
    "printable_key",
    "read_bytes",
    "read_file",
    "read_first_bytes",
    "read_range",
    "remove",
    "write_bytes",
    "write_file",
]
