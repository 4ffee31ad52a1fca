"""Print the Python packages of pyproject.toml, one per line as pip takes them: requirements.py [EXTRA].

What graft and its tests need; with EXTRA ("release"), what that needs and nothing else; with "wheel", what an
environment gets beside graft's wheel, pipx's shared libraries among it.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
sets = {**project["optional-dependencies"], "wheel": [*project["dependencies"], "pip", "setuptools", "wheel"]}
print("\n".join(sets[sys.argv[1]] if sys.argv[1:] else [*project["dependencies"], *sets["dev"]]))
