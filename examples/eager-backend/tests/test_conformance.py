"""Every case of the suite as a test: `pytest`, or `pytest -k L1/rope` for some."""

import pytest


@pytest.mark.conformance(backend="eager", profile="dense")
def test_conformance(conformance_case) -> None:
    conformance_case.check()
