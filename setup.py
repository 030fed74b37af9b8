"""Builds comoe._C from csrc with ninja (no torch headers, no network, no GPU needed)."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        from ninja_build import BuildError, build_extension

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # An editable install is given a fresh temporary folder each time: it takes that of
        # `setup.py build_ext`, which then finds its objects made.
        objects = (
            ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            if self.editable_mode
            else Path(self.build_temp).resolve()
        )
        try:
            build_extension(objects, output)
        except BuildError as error:
            sys.exit(f"error: {error}")


setup(ext_modules=[Extension("comoe._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
