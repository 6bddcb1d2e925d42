"""Builds the optional C++/CUDA extension `zs3fast._C` with CMake and ships `kernels/` inside the package.

ZS3FAST_EXTENSION  auto (default): build if possible, else install without; 0: never; 1: a failed build is an error.
ZS3FAST_CUDA       auto (default): build csrc/*/cuda*.cu if nvcc fits torch and compiles them; 0: never; 1: or fail.
ZS3FAST_CUDA_ARCHS 80;90a (default): compute capabilities, separated by semicolons.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def choice(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: expected auto, 0 or 1, got {value!r}")
    return value


@dataclass(frozen=True)
class Torch:
    """The torch to compile against, known by its folder alone: reading it does not import it."""

    folder: Path
    version: str
    cuda: str | None

    @classmethod
    def find(cls) -> Torch | None:
        """The torch of this environment, or of the environment pip is building for (hidden by build isolation)."""
        spec = importlib.util.find_spec("torch")
        places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
        places += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
        for folder in places:
            if (folder / "version.py").is_file() and (folder / "include").is_dir():
                facts = runpy.run_path(str(folder / "version.py"))
                return cls(folder, str(facts["__version__"]), facts.get("cuda"))
        return None


def tool(name: str) -> str | None:
    """The program of the wheel of that name (nothing need be activated), or else of PATH."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    # cmake's wheel has the program in data/bin, and in bin a script that works only where the wheel can be imported
    programs = sorted((f for f in files if f.name == name and "bin" in f.parts), key=lambda f: "data" not in f.parts)
    return str(Path(programs[0].locate()).resolve()) if programs else shutil.which(name)


def compiler() -> str | None:
    named = os.environ.get("CXX", "").split()
    return next((path for path in map(shutil.which, named[:1] or ("c++", "g++", "clang++")) if path), None)


def cuda_settings(torch: Torch) -> list[str]:
    """CMake settings for the CUDA sources: none if they are not wanted or cannot be built."""
    wanted = choice("ZS3FAST_CUDA")
    if wanted == "0":
        return []
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    nvcc = next((str(p) for h in homes if h and (p := Path(h, "bin", "nvcc")).is_file()), None) or shutil.which("nvcc")
    problem = None
    if torch.cuda is None:
        problem = f"torch {torch.version} is a CPU build"
    elif nvcc is None:
        problem = "nvcc not found (PATH, CUDA_HOME)"
    else:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+)", said)
        if release is None or release[1] != torch.cuda.split(".")[0]:
            problem = f"nvcc is CUDA {release and release[1]}, torch was built with CUDA {torch.cuda}"
    if problem is None:
        # headers and runtime library come with torch's nvidia-* wheels, or else with the toolkit
        site, toolkit = torch.folder.parent, Path(nvcc).resolve().parents[1]
        headers = [*sorted(site.glob("nvidia/*/include")), toolkit / "include"]
        runtimes = [*sorted(site.glob("nvidia/*/lib/libcudart.so*")), toolkit / "lib64" / "libcudart.so"]
        return [
            f"-DZS3FAST_NVCC={nvcc}",
            f"-DZS3FAST_CUDA_ARCHS={os.environ.get('ZS3FAST_CUDA_ARCHS', '80;90a')}",
            f"-DZS3FAST_CUDA_INCLUDES={';'.join(map(str, headers))}",
            f"-DZS3FAST_CUDART={runtimes[0]}",
        ]
    if wanted == "1":
        raise RuntimeError(f"ZS3FAST_CUDA=1: {problem}")
    print(f"zs3fast: building without CUDA: {problem}", file=sys.stderr)
    return []


class BuildExtension(build_ext):
    """Runs CMake; a build that fails leaves the package without the extension unless ZS3FAST_EXTENSION=1."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            torch = Torch.find()
            if torch is None:
                raise RuntimeError("torch not found")
            cuda = cuda_settings(torch)
            try:
                self.run_cmake(target, torch, cuda)
            except subprocess.CalledProcessError as error:
                if not cuda or choice("ZS3FAST_CUDA") == "1":
                    raise
                # a compiler that nvcc does not know, say: the CPU kernels need not suffer for it
                print(f"zs3fast: WARNING: trying again without the CUDA kernels: {error}", file=sys.stderr)
                self.run_cmake(target, torch, [])
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if choice("ZS3FAST_EXTENSION") == "1":
                raise
            line = "=" * 100
            print(
                f"{line}\nWARNING: zs3fast's C++ extension was NOT built: {error}\n"
                "The package works without it, on the reference and Triton backends, and is slower on CPUs.\n"
                f"ZS3FAST_EXTENSION=1 makes this an error, ZS3FAST_EXTENSION=0 silences it.\n{line}",
                file=sys.stderr,
            )

    def run_cmake(self, target: Path, torch: Torch, cuda: list[str]) -> None:
        cxx = compiler()
        if cxx is None:
            raise RuntimeError("no C++ compiler found (CXX, c++, g++, clang++)")
        cmake, ninja = tool("cmake"), tool("ninja")
        if cmake is None:
            raise RuntimeError("cmake not found")
        folder = Path(self.build_temp).resolve() / "cmake"
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure += [
            f"-DCMAKE_CXX_COMPILER={cxx}",
            f"-DZS3FAST_TORCH={torch.folder}",
            f"-DZS3FAST_TORCH_VERSION={torch.version}",
            f"-DZS3FAST_PYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DZS3FAST_OUTPUT={target}",
            *(cuda or ["-DZS3FAST_NVCC="]),  # CMake remembers the last one
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], check=True)


class BuildPackage(build_py):
    """Puts the Triton kernels of the top-level kernels/ folder where zs3fast.kernels finds them once installed."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source in sorted(ROOT.glob("kernels/*.py")):
                self.copy_file(str(source), str(Path(self.build_lib, "zs3fast", "kernels", source.name)))


choice("ZS3FAST_CUDA")  # a wrong value is refused before anything is built
wanted = choice("ZS3FAST_EXTENSION") != "0"
setup(
    ext_modules=[Extension("zs3fast._C", sources=[], optional=choice("ZS3FAST_EXTENSION") != "1")] if wanted else [],
    # in a fresh environment pip puts the newest torch into the build, and then the same one beside the package
    setup_requires=["torch>=2.11"] if wanted and compiler() and Torch.find() is None else [],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
)
