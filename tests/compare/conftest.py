import pytest

from tests.compare.sample import sample


@pytest.fixture(scope="module")
def comparison():
    return sample()
