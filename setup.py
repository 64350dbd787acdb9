"""Puts the fronts and configs, which lie beside the package, into the wheel; all else is in pyproject.toml."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithFronts(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in ("scripts", "configs"):
                # Benchmarks compare this package with others and stay in the repository.
                ignored = ignore_patterns("__pycache__", "benchmark.py")
                copytree(name, Path(self.build_lib, "ssl_vit", name), ignore=ignored, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithFronts})
