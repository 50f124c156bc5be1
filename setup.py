"""Packaging: the content folders travel inside the wheel, what is compiled is optional.

Without a C++17 compiler (or with EDGEKIT_NATIVE=0) the install goes on without `edgekit._native`
and the numpy reference kernels run, and without `libedgekit.so`, the native engine: other backends
serve; `edgekit doctor` says so.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

content = {f"edgekit._content.{top}": top for top in ("targets", "calibration", "apps")}


class OptionalBuildExt(build_ext):
    def run(self):
        try:
            super().run()
        except Exception as error:  # noqa: BLE001 - any compiler trouble: the reference kernels serve instead
            self.warn_native(error)

    def build_extension(self, ext):
        one = self.compiler.compile

        def several(sources, output_dir=None, **more):  # a source on every core
            for name in self.compiler.object_filenames(sources, output_dir=output_dir):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                done = list(pool.map(lambda source: one([source], output_dir=output_dir, **more), sources))
            return [name for names in done for name in names]

        self.compiler.compile = several
        try:
            super().build_extension(ext)
        except Exception as error:  # noqa: BLE001
            self.warn_native(error)
        finally:
            self.compiler.compile = one

    def get_ext_filename(self, fullname):
        if fullname.split(".")[-1] == ENGINE:  # no Python module: a name that C programs can link
            return os.path.join(*fullname.split(".")[:-1], f"{ENGINE}.so")
        return super().get_ext_filename(fullname)

    def warn_native(self, error):
        if os.environ.get("EDGEKIT_NATIVE") == "1":
            raise error
        print(f"warning: not compiled: {error}. Slower code serves instead", file=sys.stderr)

    def copy_extensions_to_source(self):
        # self.inplace is set by now, so the freshly built file is looked up in build_lib
        built = Path(self.build_lib)
        self.extensions = [e for e in self.extensions if (built / self.get_ext_filename(e.name)).exists()]
        super().copy_extensions_to_source()


ENGINE = "libedgekit"
# contraction off: a * b + c must round the same on every CPU
FLAGS = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]

# what it needs of the C++ library is inside and seen by nobody: less memory, and C programs need no C++
LINKED = [
    "-pthread",
    "-s",
    "-static-libstdc++",
    "-static-libgcc",
    "-Wl,--exclude-libs,ALL",
    "-Wl,--gc-sections",
]


def engine_library():
    """The native engine, for ctypes and for C programs. Every instruction set is a file of its own."""
    top = Path("edgekit/backends/native")
    sources = sorted(str(p) for p in (top / "src").glob("*.cpp"))
    if os.environ.get("EDGEKIT_NATIVE") == "0" or not sources:
        return []
    return [
        Extension(
            f"edgekit.{ENGINE}",
            sources,
            depends=[str(p) for folder in (top, Path("edgekit/kernels")) for p in folder.rglob("*.h")],
            language="c++",
            extra_compile_args=["-std=c++17", "-g0", *FLAGS, "-O2"],
            extra_link_args=LINKED,
        )
    ]


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
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
        )
    ]


setup(
    packages=find_packages(include=["edgekit", "edgekit.*"]) + list(content),
    package_dir=content,
    package_data={
        "edgekit": [
            "py.typed",
            "**/*.css",
            "**/*.cu",
            "backends/native/include/*.h",
            "**/*.html",
            "**/*.js",
            "**/*.json",
            "**/*.svg",
        ],
        **{
            pkg: [str(f.relative_to(top)) for f in Path(top).rglob("*") if f.is_file()]
            for pkg, top in content.items()
        },
    },
    ext_modules=native_extension() + engine_library(),
    cmdclass={"build_ext": OptionalBuildExt},
)
