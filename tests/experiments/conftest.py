"""What the tests of all scripts under experiments need."""

import sys

import pytest


@pytest.fixture(autouse=True)
def scripts(request, monkeypatch):
    """Lets modules of the test file's SCRIPTS folder import one another by name."""
    folder = request.module.SCRIPTS
    monkeypatch.syspath_prepend(str(folder))
    yield
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)
