"""Building and loading the compiled library, by the functions that setup.py uses."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from transformers_dsv3.kernels.cpu import library as cpu_library


ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "transformers_dsv3" / "kernels" / "csrc"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler here"
)


@pytest.fixture
def setup_py(monkeypatch):
    for name in ("CC", "CFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder):
    return sorted(file.name for file in folder.iterdir())


def reason(folder):
    with pytest.raises(cpu_library.NotAvailable) as error:
        cpu_library.load(folder)
    return str(error.value)


@needs_compiler
@pytest.mark.skipif(cpu_library.FOLDER_VARIABLE in os.environ, reason="another library is used")
def test_where_there_is_a_compiler_there_is_the_library():
    """Otherwise most tests here are skipped: `python setup.py build_ext --inplace` after a change of the sources."""
    assert cpu_library.unavailable is None


@needs_compiler
def test_build_load_and_build_again(setup_py, tmp_path, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-O0")  # ten times faster
    # What earlier builds may have left
    for name in ("_cpu.so", "_cpu.cpython-311-x86_64-linux-gnu.so", setup_py.FAILURE):
        (tmp_path / name).write_text("old")
    assert setup_py.build(SOURCES, tmp_path) is None
    assert contents(tmp_path) == ["_cpu.so"]
    library = cpu_library.load(tmp_path)
    assert library.dsv3_version() == cpu_library.VERSION

    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert setup_py.build(SOURCES, tmp_path) is not None
    assert contents(tmp_path) == [setup_py.FAILURE]
    # The library that this process has loaded is still whole
    assert library.dsv3_use_isa(b"portable") == b"portable"
    assert library.dsv3_version() == cpu_library.VERSION


@pytest.mark.parametrize("command", ["/nonexistent/cc", "no-such-compiler -O2"])
def test_a_missing_compiler_is_named(setup_py, tmp_path, monkeypatch, command):
    monkeypatch.setenv("CC", command)
    setup_py.build(SOURCES, tmp_path)
    assert contents(tmp_path) == [cpu_library.BUILD_FAILURE]
    message = reason(tmp_path)
    assert message.startswith("was not built when the package was installed: the C compiler that CC names, ")
    assert repr(command.split()[0]) in message and "pip install --force-reinstall" in message


def test_no_compiler_at_all(setup_py, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    setup_py.build(SOURCES, tmp_path)
    assert "no C compiler was found (cc, gcc, clang): install gcc or clang; `pip install" in reason(tmp_path)


@needs_compiler
def test_the_compilers_first_errors_are_kept(setup_py, tmp_path, monkeypatch):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "wrong.c").write_text("int dsv3_version(void) { return one; }\n")
    setup_py.build(tmp_path / "src", tmp_path / "out")
    message = reason(tmp_path / "out")
    assert "wrong.c:1:" in message and "'one'" in message.replace("\u2018", "'").replace("\u2019", "'")
    assert "\n" not in message
    monkeypatch.setenv("CC", "false")
    setup_py.build(tmp_path / "src", tmp_path / "out")
    assert "`false` failed with status 1: it said nothing" in reason(tmp_path / "out")


@needs_compiler
def test_libraries_that_do_not_fit_are_refused(setup_py, tmp_path):
    assert reason(tmp_path) == "was not built when the package was installed"
    (tmp_path / "_cpu.so").write_text("no library")
    assert reason(tmp_path).startswith("_cpu.so does not load: ")
    (tmp_path / "src").mkdir()
    functions = "".join(f"void {name}(void) {{}}\n" for name in cpu_library.SIGNATURES)
    source = tmp_path / "src" / "other.c"
    source.write_text(functions + f"int dsv3_version(void) {{ return {cpu_library.VERSION - 1}; }}\n")
    # A folder for each, since what is loaded once from a path is loaded again
    setup_py.build(tmp_path / "src", tmp_path / "older")
    assert reason(tmp_path / "older") == "_cpu.so was built from another version of this package: install it again"
    source.write_text("int dsv3_version(void) { return 1; }\n")
    setup_py.build(tmp_path / "src", tmp_path / "much older")
    assert "was built from another version" in reason(tmp_path / "much older")
    source.write_text(f"int dsv3_version(void) {{ return {cpu_library.VERSION}; }}\n")
    setup_py.build(tmp_path / "src", tmp_path / "partial")
    assert reason(tmp_path / "partial").startswith("_cpu.so does not load: ")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("with_compiler", [True, False])
def test_wheels_from_source_distributions(setup_py, tmp_path, with_compiler):
    """An sdist has what the library is built from; the wheel has the library, or the reason, and fits every Python."""
    pytest.importorskip("build")
    # A copy, since setuptools leaves folders beside setup.py
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", setup_py.FAILURE)
    for name in ("transformers_dsv3", "transformers_dsv3_cli"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)],
        env=os.environ if with_compiler else {**os.environ, "CC": "false"},
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name and "-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    compiled = [name.split("/")[-1] for name in names if "/_cpu" in name]
    assert compiled == ["_cpu.so" if with_compiler else setup_py.FAILURE]
    assert {"transformers_dsv3/py.typed", "transformers_dsv3_cli/main.py"} <= set(names)
    assert not any("csrc" in name for name in names)
