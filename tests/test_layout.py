"""The name hazard: our folders deepspeed/ and sglang/ must never shadow the installed packages."""

import ast
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
    for folder in ("deepspeed", "sglang", "sglang/labs", "common", "rehearsal", "handout", "bench"):
        for path in (ROOT / folder).glob("*"):
            if path.suffix == ".py" or (path / "__init__.py").exists():
                assert path.stem not in names, path


def imports(path) -> set[str]:
    """Names of the top-level modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("folder", "knows"),
    [
        ("common/workbench", {"workbench"}),
        ("deepspeed", {"workbench", "lora_sft", "tiny_model", "todo"}),
        ("sglang/runtime_plugins", {"runtime_plugins"}),
        ("sglang/batch_infer", {"workbench", "batch_infer", "runtime_plugins", "tiny_model"}),
        ("sglang/labs", {"workbench", "batch_infer", "engines", "radix_figure", "fsm_figure", "radix_results"}),
    ],
)
def test_arrows_point_down(folder, knows):
    """script -> its package -> common -> libraries; nothing below knows labs, bench, handout or the other program."""
    places = (
        "common",
        "deepspeed",
        "sglang",
        "sglang/labs",
        "sglang/runtime_plugins",
        "bench",
        "handout",
        "rehearsal",
    )
    entries = [path for place in places for path in (ROOT / place).iterdir()]
    ours = {path.stem for path in entries if path.suffix == ".py" or (path / "__init__.py").exists()}
    ours |= {"deepspeed", "sglang"}
    library = "deepspeed" if folder == "deepspeed" else "sglang"
    for path in (ROOT / folder).rglob("*.py"):
        if "build" not in path.parts:
            assert imports(path) & ours <= knows | {library}, path


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
