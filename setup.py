"""Maps the stage folders beside qtoolkit/ to its subpackages; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

STAGES = ("kernels", "calibration", "serve", "evals")
ROOTS = {"qtoolkit": "qtoolkit", **{f"qtoolkit.{stage}": stage for stage in STAGES}}
LINKS = [pattern for stage in STAGES for pattern in (stage, f"{stage}.*")]  # qtoolkit/kernels is a link to kernels/

packages = [f"{name}.{sub}" for name, folder in ROOTS.items() for sub in find_packages(folder, exclude=LINKS)]
setup(package_dir=ROOTS, packages=[*ROOTS, *packages])
