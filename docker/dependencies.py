"""Print the dependencies that pyproject.toml names, with those of extras, one a line: they are installed before the source is copied.

python docker/dependencies.py pyproject.toml eval hub
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def dependencies(text: str, extras: list[str]) -> list[str]:
    """The project's requirements and those of its extras.

    Raises:
        KeyError: there is no such extra.
    """
    project = tomllib.loads(text)["project"]
    return [*project["dependencies"], *(d for extra in extras for d in project["optional-dependencies"][extra])]


if __name__ == "__main__":
    print("\n".join(dependencies(Path(sys.argv[1]).read_text(), sys.argv[2:])))
