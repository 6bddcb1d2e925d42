"""What a build puts where: the wheel, the checkout, the settings, and life without a compiler."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import zs3fast

ROOT = Path(__file__).parents[1]


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("ZS3FAST_")} | environment,
        capture_output=True,
        text=True,
    )


def install_wheel_tree(tmp_path: Path, **environment: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What a wheel would install, laid out in a folder by the build commands a wheel runs."""
    library = tmp_path / "lib"
    done = setup_py("build", "--build-lib", str(library), "--build-temp", str(tmp_path / "temp"), **environment)
    return library, done


def test_kernels_are_found_in_a_checkout():
    import zs3fast.kernels

    assert not (ROOT / "kernels" / "__init__.py").exists(), "`kernels` is the name of somebody else's package"
    found = {Path(path).resolve() for path in zs3fast.kernels.__path__}
    ours = {(ROOT / "kernels").resolve()}
    assert found == ours or Path(zs3fast.kernels.__file__).parent.resolve() in found  # an installed wheel


def test_a_wheel_ships_the_kernels_inside_the_package(tmp_path):
    """A kernels package of somebody else's beside ours is neither used nor needed."""
    kernels = {path.name for path in ROOT.glob("kernels/*.py")}
    library, done = install_wheel_tree(tmp_path, ZS3FAST_EXTENSION="0")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (library / "zs3fast" / "kernels").glob("*.py")} == kernels | {"__init__.py"}
    assert not (library / "kernels").exists()
    (library / "kernels").mkdir()
    (library / "kernels" / "masks_to_labels.py").write_text("raise ImportError('the wrong kernels')")
    program = "import zs3fast.kernels.masks_to_labels as m; print(m.__file__)"
    environment = os.environ | {"PYTHONPATH": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == library / "zs3fast" / "kernels" / "masks_to_labels.py"


def test_a_wheel_has_one_metadata_and_no_sources(tmp_path):
    done = setup_py(
        "build",
        "--build-base",
        str(tmp_path / "build"),
        "bdist_wheel",
        "--dist-dir",
        str(tmp_path),
        ZS3FAST_EXTENSION="0",
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    models = {path.name for path in ROOT.glob("zs3fast/weights/bundled/*")}
    assert {name.split("/")[-1] for name in names if "/bundled/" in name} == models and len(models) == 7
    assert {name.split("/")[0] for name in names} == {"zs3fast", f"zs3fast-{zs3fast.__version__}.dist-info"}
    assert not [name for name in names if name.startswith(("tests/", "bench/", "csrc/"))]
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "zs3fast = zs3fast.__main__:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_without_a_compiler_the_package_installs_and_says_so(tmp_path):
    library, done = install_wheel_tree(tmp_path, CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert "WARNING: zs3fast's C++ extension was NOT built: no C++ compiler found" in done.stderr
    assert not list((library / "zs3fast").glob("_C*"))


def test_without_a_compiler_a_required_extension_fails(tmp_path):
    _, done = install_wheel_tree(tmp_path, CXX="/no/such/compiler", ZS3FAST_EXTENSION="1")
    assert done.returncode != 0 and "no C++ compiler found" in done.stderr


def test_a_compiler_that_fails_is_a_warning_too(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    compiler.chmod(0o755)
    library, done = install_wheel_tree(tmp_path, CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert "WARNING: zs3fast's C++ extension was NOT built" in done.stderr


@pytest.mark.parametrize("name", ["ZS3FAST_EXTENSION", "ZS3FAST_CUDA"])
def test_settings_are_checked(name, tmp_path):
    done = setup_py("build", "--build-base", str(tmp_path), **{"CXX": "/no/such/compiler", name: "yes"})
    said = done.stderr + done.stdout
    assert f"{name}: expected auto, 0 or 1, got 'yes'" in said and done.returncode != 0


def load_setup(monkeypatch):
    """The functions of setup.py, without setting anything up."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **settings: captured.update(settings))
    captured: dict = {}
    spec = importlib.util.spec_from_file_location("zs3fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "zs3fast_setup", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module, captured


def fake_torch(site: Path, version: str = "2.99.0+cu132") -> None:
    (site / "torch" / "include").mkdir(parents=True)
    (site / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = '13.2'\n")


def test_torch_is_found_behind_build_isolation(tmp_path, monkeypatch):
    """pip hides the environment's packages from a build, not the folder they lie in."""
    fake_torch(tmp_path)
    setup, _ = load_setup(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(tmp_path))
    found = setup.Torch.find()
    assert (found.folder, found.version, found.cuda) == (tmp_path / "torch", "2.99.0+cu132", "13.2")


@pytest.mark.parametrize(
    ("there", "compiler", "extension", "asked"),
    [
        (True, True, "auto", []),
        (False, True, "auto", ["torch>=2.11"]),
        (False, False, "auto", []),
        (False, True, "0", []),
    ],
)
def test_torch_is_a_build_requirement_only_where_it_is_needed(there, compiler, extension, asked, tmp_path, monkeypatch):
    if there:
        fake_torch(tmp_path)
    monkeypatch.setenv("ZS3FAST_EXTENSION", extension)
    monkeypatch.setenv("CXX", sys.executable if compiler else "/no/such/compiler")
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(tmp_path))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    _, settings = load_setup(monkeypatch)
    assert settings["setup_requires"] == asked
    assert bool(settings["ext_modules"]) == (extension != "0")


def test_cuda_wants_an_nvcc_of_torchs_major_version(tmp_path, monkeypatch):
    setup, _ = load_setup(monkeypatch)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("ZS3FAST_CUDA", "1")
    torch = setup.Torch(tmp_path / "site" / "torch", "2.99.0", "12.6")
    assert f"-DZS3FAST_NVCC={nvcc}" in setup.cuda_settings(torch)
    with pytest.raises(RuntimeError, match="nvcc is CUDA 12, torch was built with CUDA 13.2"):
        setup.cuda_settings(setup.Torch(tmp_path, "2.99.0", "13.2"))
    with pytest.raises(RuntimeError, match="is a CPU build"):
        setup.cuda_settings(setup.Torch(tmp_path, "2.99.0+cpu", None))
    monkeypatch.setenv("ZS3FAST_CUDA", "0")
    assert setup.cuda_settings(torch) == []


def test_cuda_runtime_comes_with_torch_or_with_the_toolkit(tmp_path, monkeypatch):
    setup, _ = load_setup(monkeypatch)
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    torch = setup.Torch(tmp_path / "site" / "torch", "2.99.0", "13.2")
    assert f"-DZS3FAST_CUDART={tmp_path}/toolkit/lib64/libcudart.so" in setup.cuda_settings(torch)
    wheel = tmp_path / "site" / "nvidia" / "cu13"
    (wheel / "include").mkdir(parents=True)
    (wheel / "lib").mkdir()
    (wheel / "lib" / "libcudart.so.13").touch()
    settings = setup.cuda_settings(torch)
    assert f"-DZS3FAST_CUDART={wheel}/lib/libcudart.so.13" in settings
    assert f"-DZS3FAST_CUDA_INCLUDES={wheel}/include;{tmp_path}/toolkit/include" in settings
    assert "-DZS3FAST_CUDA_ARCHS=80;90a" in settings


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_cuda_kernels_that_do_not_compile_leave_the_cpu_kernels(wanted, tmp_path, monkeypatch, capsys):
    """nvcc refuses compilers newer than itself: that is no reason to go without a CPU kernel, unless one says so."""
    setup, _ = load_setup(monkeypatch)
    monkeypatch.setenv("ZS3FAST_CUDA", wanted)
    monkeypatch.setenv("ZS3FAST_EXTENSION", "1")
    monkeypatch.setattr(setup.Torch, "find", lambda: setup.Torch(tmp_path, "2.99.0", "13.2"))
    monkeypatch.setattr(setup, "cuda_settings", lambda torch: ["-DZS3FAST_NVCC=nvcc"])
    tried = []

    def run_cmake(self, target, torch, cuda):
        tried.append(cuda)
        if cuda:
            raise subprocess.CalledProcessError(1, "cmake --build")

    monkeypatch.setattr(setup.BuildExtension, "run_cmake", run_cmake)
    monkeypatch.setattr(setup.BuildExtension, "get_ext_fullpath", lambda self, name: str(tmp_path / "_C.so"))
    build = setup.BuildExtension.__new__(setup.BuildExtension)
    extension = setup.Extension("zs3fast._C", sources=[])
    if wanted == "1":
        with pytest.raises(subprocess.CalledProcessError):
            build.build_extension(extension)
        assert tried == [["-DZS3FAST_NVCC=nvcc"]]
    else:
        build.build_extension(extension)
        assert tried == [["-DZS3FAST_NVCC=nvcc"], []]
        assert "WARNING: trying again without the CUDA kernels" in capsys.readouterr().err
