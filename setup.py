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
        # An editable install has a fresh temporary folder each time; objects in build/ are kept.
        objects = (
            ROOT / "build" / Path(self.build_temp).name
            if self.editable_mode
            else Path(self.build_temp).resolve()
        )
        try:
            build_extension(objects, output)
        except BuildError as error:
            sys.exit(f"error: {error}")


setup(ext_modules=[Extension("comoe._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
