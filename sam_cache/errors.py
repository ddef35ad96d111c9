"""Everything samcache raises on purpose, as one small tree.

SamcacheError                 exit code 1; its text is one line: what, which value, what to do
|-- UsageError                exit code 2; the command itself makes no sense
|-- DatasetError              an annotation file or an image folder cannot be used at all
|   `-- ImageError            one image cannot be used: recorded in the store, never fatal to a run
|-- CheckpointError           a weights file is missing, damaged, or of another model
`-- StoreError                a store is missing, unfinished, or of another identity
    `-- DamageError           exit code 3; bytes on disk are not what was committed

Interrupted                   exit code 130; asked to stop, everything committed is kept
"""


class SamcacheError(Exception):
    """Base of all expected failures. The message is one line that names the remedy."""

    exit_code = 1


class UsageError(SamcacheError):
    exit_code = 2


class DatasetError(SamcacheError):
    pass


class ImageError(DatasetError):
    pass


class CheckpointError(SamcacheError):
    pass


class StoreError(SamcacheError):
    pass


class DamageError(StoreError):
    exit_code = 3


class Interrupted(SamcacheError):
    exit_code = 130
