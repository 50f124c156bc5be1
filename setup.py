"""Packaging: the content folders travel inside the wheel, the native kernels are optional.

Without a C++17 compiler (or with EDGEKIT_NATIVE=0) the install goes on without `edgekit._native`
and the numpy reference kernels run; `edgekit doctor` says so.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

content = {f"edgekit._content.{top}": top for top in ("targets", "calibration", "apps")}


class OptionalBuildExt(build_ext):
    def run(self):
        try:
            super().run()
        except Exception as error:  # noqa: BLE001 - any compiler trouble: the reference kernels serve instead
            self.warn_native(error)

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:  # noqa: BLE001
            self.warn_native(error)

    def warn_native(self, error):
        if os.environ.get("EDGEKIT_NATIVE") == "1":
            raise error
        print(f"warning: native kernels not built ({error}); the numpy kernels run instead", file=sys.stderr)

    def copy_extensions_to_source(self):
        # self.inplace is set by now, so the freshly built file is looked up in build_lib
        built = Path(self.build_lib)
        self.extensions = [e for e in self.extensions if (built / self.get_ext_filename(e.name)).exists()]
        super().copy_extensions_to_source()


def native_extension():
    sources = sorted(str(p) for p in Path("edgekit/kernels").rglob("*.cpp"))
    if os.environ.get("EDGEKIT_NATIVE") == "0" or not sources:
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    return [
        Pybind11Extension(
            "edgekit._native",
            sources,
            include_dirs=["edgekit/kernels"],
            depends=[str(p) for p in Path("edgekit/kernels").rglob("*.h")],
            cxx_std=17,
            # contraction off: a * b + c must round the same on every CPU
            extra_compile_args=["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ]


setup(
    packages=find_packages(include=["edgekit", "edgekit.*"]) + list(content),
    package_dir=content,
    package_data={
        "edgekit": ["py.typed", "**/*.css", "**/*.cu", "**/*.html", "**/*.js", "**/*.json", "**/*.svg"],
        **{
            pkg: [str(f.relative_to(top)) for f in Path(top).rglob("*") if f.is_file()]
            for pkg, top in content.items()
        },
    },
    ext_modules=native_extension(),
    cmdclass={"build_ext": OptionalBuildExt},
)
