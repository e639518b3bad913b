"""One browser for all tests of a process: it takes longer to start than most tests."""

from collections.abc import Iterator

import pytest
from reporting.chromium import Chromium, chromium


@pytest.fixture(scope="session")
def running_browser() -> Iterator[Chromium]:
    """A browser with one page."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def browser(running_browser) -> Chromium:
    """The browser as a reader has it at first: an ordinary window, light colours, nothing said yet."""
    running_browser.open("about:blank")  # a page that follows a run would go on asking
    running_browser.messages.clear()
    running_browser.look()
    return running_browser
