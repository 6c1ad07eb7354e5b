"""The one error that means: the person, not the program, can mend this."""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Wrong input. The message is one line that names the thing and the mend.

    on_every_rank: False for what only one rank can have met, such as a clip of its own share.
    """

    on_every_rank = True


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The mend of a name that is not known: ``did you mean 'NAME'?``, or what to do where none is near."""
    guess = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{guess[0]}'?" if guess else otherwise


def require_positive(config: object, prefix: str, *keys: str) -> None:
    """Raise ``UserError`` unless each of these numbers, where it is set, is finite and above 0."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{prefix}.{key}={value} must be above 0")


def run_for_people(main: Callable[[], None]) -> None:
    """Run an entry point; a ``UserError``, a file that cannot be had or a reading process that was killed becomes
    one line and exit code 2.

    Under a launcher what every rank meets is said by local rank 0 alone.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or not error.on_every_rank:
            sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"error: {error.strerror or error}{named}\n")
        raise SystemExit(2) from None
    except RuntimeError as error:
        # torch raises it wherever the main thread is at that moment.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        sys.stderr.write(
            f"error: {str(error).partition('. ')[0]} (out of memory?): give fewer data.num_workers, or mend the cause; "
            "training.resume=auto goes on\n"
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
