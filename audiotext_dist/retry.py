"""What disks and servers refuse, said in one line, and how long to go on asking a server."""

from __future__ import annotations

import contextlib
import errno
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from audiotext_dist.errors import UserError

Answer = TypeVar("Answer")
MAX_PAUSE_SECONDS = 30.0
MAX_DOUBLINGS = 60


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """What is done about a server in trouble.

    retries: attempts after the first one, counted anew whenever a body gets further than before. stall_seconds: a
    server that sends no byte for so long is given up, and asked again. first_pause_seconds: before the first retry.
    """

    retries: int = 8
    stall_seconds: float = 20.0
    first_pause_seconds: float = 0.5

    def pause_seconds(self, num_failures: int) -> float:
        """The pause after so many failures in a row, 1 or more: doubled each time, cut at random by up to a half.

        Without the random part all workers of a cluster would come back at the same moment.
        """
        return self._longest_pause_seconds(num_failures) * random.uniform(0.5, 1.0)

    @property
    def longest_seconds(self) -> float:
        """How long it can take to give up a server that sends nothing at all."""
        num_growing = min(self.retries, MAX_DOUBLINGS)
        pauses = sum(self._longest_pause_seconds(num_failures) for num_failures in range(1, num_growing + 1))
        rest = (self.retries - num_growing) * self._longest_pause_seconds(self.retries)
        return (self.retries + 1) * self.stall_seconds + pauses + rest

    def _longest_pause_seconds(self, num_failures: int) -> float:
        return min(self.first_pause_seconds * 2.0 ** min(num_failures - 1, MAX_DOUBLINGS), MAX_PAUSE_SECONDS)


class RefusalError(UserError):
    """What a disk or a server refused. transient: asked again later, it may say yes."""

    # A default, or it could not come back from a worker process.
    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class GaveUpError(RefusalError):
    """A server refused for as long as it was asked."""


def answer(action: str, shown: str, retry: RetryConfig | None, ask: Callable[[], Answer]) -> Answer:
    """What ``ask`` returns; with ``retry``, of a URL, tried again while the refusals are such as may pass."""
    num_failures = 0
    while True:
        try:
            with refusals_named(action, shown):
                return ask()
        except RefusalError as error:
            num_failures += 1
            if retry is None or not error.transient or "://" not in shown:
                raise
            if num_failures > retry.retries:
                raise gave_up(error, num_failures) from None
            time.sleep(retry.pause_seconds(num_failures))


def gave_up(error: RefusalError, num_attempts: int) -> GaveUpError:
    """The same refusal, with how often it was met."""
    return GaveUpError(f"after {num_attempts} attempts: {error}", transient=False)


@contextlib.contextmanager
def refusals_named(action: str, shown: str, *, whatever: bool = False) -> Iterator[None]:
    """Say in one line what a disk or a server refused; what is not there is the caller's to judge.

    whatever: also errors of file systems that have kinds of their own.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        if action == "write":
            raise UserError(f"cannot write {shown}: there is no such folder or bucket, make it") from None
        raise
    except Exception as error:
        if not (whatever or isinstance(error, _refusals())):
            raise
        # A web server's refusal is told without its URL, which may hold a signature.
        status = getattr(error, "status", None)
        told = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        reason = f"HTTP {status}" if status else told or ("stalled" if isinstance(error, TimeoutError) else "")
        raise RefusalError(
            f"cannot {action} {shown} ({reason or type(error).__name__}): "
            "mend the cause, then run the same command again",
            transient=may_pass(error),
        ) from None


def _refusals() -> tuple[type[Exception], ...]:
    """The system's errors, and those that s3fs and aiohttp let through, where these are at work."""
    refusals: list[type[Exception]] = [OSError]
    if botocore := sys.modules.get("botocore.exceptions"):
        refusals += [botocore.BotoCoreError, botocore.ClientError]
    if aiohttp := sys.modules.get("aiohttp"):
        refusals.append(aiohttp.ClientError)
    return tuple(refusals)


def may_pass(error: Exception) -> bool:
    """False for what no waiting mends: no permission, no credentials, a request that makes no sense."""
    botocore = sys.modules.get("botocore.exceptions")
    if botocore and isinstance(error, botocore.BotoCoreError):
        return isinstance(error, botocore.HTTPClientError)
    if (status := getattr(error, "status", None)) is not None:
        return status >= 500 or status in (408, 425, 429)
    if isinstance(error, OSError):
        lasting = (errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EPERM, errno.ENAMETOOLONG)
        return not isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError) and (
            error.errno not in lasting
        )
    return not isinstance(error, ValueError | TypeError | ImportError | NotImplementedError)
