"""The public errors. Each says what went wrong, where, and how to mend it; none is shown with a traceback unless asked."""

from __future__ import annotations


class EdgeFusionError(Exception):
    """Base of all errors that a user can act on; `exit_code` is the process's."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__("".join((f"{where}: " if where else "", what, f". {remedy}" if remedy else "")))


class RecipeError(EdgeFusionError):
    """A recipe that cannot be run: the key, the file and the nearest valid name."""

    exit_code = 2


class StageError(EdgeFusionError):
    """A stage that could not be opened, or that failed on every unit."""

    exit_code = 3


class OutOfMemory(StageError):
    """Work that needs more memory than its device has: the same try again would need as much."""


class CorruptShard(EdgeFusionError):
    """A shard, manifest or ledger file that is not what its checksum says."""

    exit_code = 4


class LedgerConflict(EdgeFusionError):
    """A unit committed twice with different contents, or a folder that belongs to another recipe."""

    exit_code = 5


class ParityError(EdgeFusionError):
    """A build whose results are further from full precision than its gate allows."""

    exit_code = 6


class TargetUnavailable(EdgeFusionError):
    """A package, device or vendor tool that this machine lacks, with the line that installs it."""

    exit_code = 7
