"""Fixtures of the models' tests."""

import pytest

from tests.models import folders


@pytest.fixture
def folder(tmp_path):
    """Writes a new folder: see `folders.write`."""

    def write(*args, **options):
        path = tmp_path / f"folder{len(list(tmp_path.iterdir()))}"
        return folders.write(path, *args, **options)

    return write
