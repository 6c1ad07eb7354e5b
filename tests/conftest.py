from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

# Tests run two at a time, and many start ranks: more threads than cores only wait for each other, with a busy CPU.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")


@pytest.fixture(autouse=True, scope="session")
def _a_cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUDIOTEXT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Our commands set up logging as programs do; one that a test calls must not mute the tests after it."""
    loggers = [logging.getLogger(name) for name in (None, "audiotext_dist")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
