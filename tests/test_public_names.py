"""What `import fffexp` offers."""

from importlib.metadata import version

import fffexp


def test_every_public_name_is_listed_and_found() -> None:
    assert {*fffexp.__all__, "__version__"} <= {*dir(fffexp)}
    for name in fffexp.__all__:
        assert getattr(fffexp, name) is not None


def test_the_version_is_that_of_the_package() -> None:
    assert fffexp.__version__ == version("fffexp")
