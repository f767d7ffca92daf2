"""Print the dependencies in pyproject.toml and its extras, one per line, to install them before the source is copied.

python docker/dependencies.py pyproject.toml eval hub
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def dependencies(text: str, extras: list[str]) -> list[str]:
    """Requirements of the project and of the given extras.

    Raises:
        KeyError: an extra does not exist.
    """
    project = tomllib.loads(text)["project"]
    return [*project["dependencies"], *(d for extra in extras for d in project["optional-dependencies"][extra])]


if __name__ == "__main__":
    print("\n".join(dependencies(Path(sys.argv[1]).read_text(), sys.argv[2:])))
