"""Finds the packages; everything else about the build is in pyproject.toml.

`apps/` and `presets/` stand at the top of the checkout and belong inside the package, so that an installed project
collides with nobody's folders of these names. The declarative finder cannot rename what it finds.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["lowrank_align", "lowrank_align.*"]),
        "lowrank_align.apps",
        *(f"lowrank_align.apps.{name}" for name in find_packages("apps")),
        "lowrank_align.presets",  # data only: a module presets.py beside it wins over a folder without __init__.py
    ],
    package_dir={"lowrank_align.apps": "apps", "lowrank_align.presets": "presets"},
)
