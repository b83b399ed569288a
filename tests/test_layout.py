"""The name hazard: our folders deepspeed/ and sglang/ must never shadow the installed packages."""

import re
import sys

import pytest

from harness import ROOT


@pytest.mark.parametrize("folder", ["deepspeed", "sglang", "tests"])
def test_no_init_file(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_installed_deepspeed_is_the_real_one(libraries):
    import deepspeed

    assert deepspeed.__version__ >= "0.19"
    assert "site-packages" in deepspeed.__file__


def test_no_module_beside_a_script_hides_a_library():
    """sys.path[0] is the script's folder: a file there named like a library would be imported instead."""
    import importlib.metadata

    names = set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names
    names -= {"runtime_plugins"}  # installed from here, and the same files
    for folder in ("deepspeed", "sglang", "common", "rehearsal", "handout"):
        for path in (ROOT / folder).glob("*"):
            if path.suffix == ".py" or (path / "__init__.py").exists():
                assert path.stem not in names, path


def test_nothing_in_one_program_imports_the_other():
    for path in (ROOT / "deepspeed").rglob("*.py"):
        assert "import sglang" not in path.read_text()
    for path in (ROOT / "sglang").rglob("*.py"):
        assert "import deepspeed" not in path.read_text()


def test_the_repository_is_not_on_the_path():
    assert str(ROOT) not in sys.path
    assert "" not in sys.path


def test_both_locks_hold_the_same_versions_but_for_torch():
    def pins(path) -> dict[str, str]:
        return dict(line.split("==") for line in path.read_text().splitlines() if "==" in line)

    main, volta = pins(ROOT / "requirements.txt"), pins(ROOT / "deepspeed" / "requirements-v100.txt")
    assert volta["torch"] == "2.7.1"
    free = ("torch", "triton", "nvidia-", "setuptools", "sympy")
    for name, version in volta.items():
        if not name.startswith(free):
            assert main[name] == version, name
    assert (ROOT / "deepspeed" / "requirements.txt").read_text() == "-r ../requirements.txt\n"
    direct = [line.split("#")[0].strip() for line in (ROOT / "requirements.in").read_text().splitlines()]
    for name in filter(None, direct):
        assert re.split(r"==|\[", name)[0] in main
    # FlashInfer's kernels are compiled with headers that refuse another CUDA version's nvcc.
    compiler, headers = (main[f"nvidia-cuda-{name}"].split(".")[:2] for name in ("nvcc", "runtime"))
    assert compiler == headers
