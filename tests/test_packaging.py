"""What pyproject.toml puts into a wheel is everything that lies in the four folders."""

import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("dispc", "passes", "export", "validate")
SETUPTOOLS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]


def directory(package: str) -> Path:
    """Where the files of `package` lie: `dispc.passes` and others at the top of the repository."""
    first, *rest = package.split(".")
    return REPOSITORY.joinpath(*(rest if rest and rest[0] in FOLDERS else [first, *rest]))


def test_every_package_is_in_the_wheel() -> None:
    listed = {directory(package) for package in SETUPTOOLS["packages"]}
    assert listed == {file.parent for folder in FOLDERS for file in (REPOSITORY / folder).rglob("__init__.py")}


def test_every_file_beside_the_code_is_in_the_wheel() -> None:
    patterns = SETUPTOOLS["package-data"].items()
    listed = {file for package, globs in patterns for glob in globs for file in directory(package).glob(glob)}
    lying = {file for folder in FOLDERS for file in (REPOSITORY / folder).rglob("*") if file.is_file()}
    assert listed == {file for file in lying if file.suffix not in (".py", ".pyc")}
