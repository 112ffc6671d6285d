"""What the tests of launchers share."""

import pytest
from fake_programs import Fakes


@pytest.fixture
def fakes(tmp_path) -> Fakes:
    return Fakes(tmp_path)
