"""What tests ask of the installation."""

import pytest

from geco_fast._backend import LIBRARY
from geco_fast.testing.calls import LEVELS

needs_library = pytest.mark.skipif(LIBRARY is None, reason="pure-Python installation")

# The fixture `backend` is then "cpu", with one instruction set after the other in use.
every_level = pytest.mark.parametrize(
    "backend", [f"cpu-{level}" for level in LEVELS], indirect=True
)
