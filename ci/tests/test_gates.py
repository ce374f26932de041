from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).resolve().parents[1]


@pytest.fixture
def tree(tmp_path):
    """Runs the gates over a tree with a clean core plus `files`; returns the exit code and the output."""

    def run(files, *args):
        for name, text in {"core/polyradix/a.py": "torch_dtype = chip = 1\n", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        done = subprocess.run([sys.executable, CI / "gates.py", *args, tmp_path], capture_output=True, text=True)
        return done.returncode, done.stdout

    return run


def test_this_repository_passes():
    done = subprocess.run([sys.executable, CI / "gates.py", CI.parent], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "gates: passed\n")


def test_a_clean_tree_passes(tree):
    assert tree({"backends/b.py": "import torch  # cuda\n" * 500, ".venv/c.py": "x\n" * 900})[0] == 0


@pytest.mark.parametrize(
    "line",
    [
        "import torch",
        "from jax import numpy",
        "# on CUDA only",
        "def is_cuda(): ...",
        "x.is_cpu",
        '"""Like TPUs, or an Npu."""',
        "AVX512 = 1",
    ],
)
def test_a_vendor_name_in_core_fails(tree, line):
    code, out = tree({"core/polyradix/deep/b.py": f"x = 1\n{line}\n"})
    assert code == 1
    assert "core/polyradix/deep/b.py:2: core names" in out


def test_a_vendor_name_in_a_template_fails(tree):
    code, out = tree({"core/polyradix/serve/templates/b.py.txt": "import torch\n"})
    assert code == 1
    assert "core/polyradix/serve/templates/b.py.txt:1: core names 'torch'" in out


def test_a_long_file_fails(tree):
    code, out = tree({"bench/long.py": "x\n" * 501})
    assert code == 1
    assert "bench/long.py: 501 lines; expected at most 500" in out


def test_a_tree_without_core_fails(tmp_path):
    done = subprocess.run([sys.executable, CI / "gates.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no files found" in done.stdout


def test_an_environment_with_a_framework_is_not_bare(tmp_path):
    (tmp_path / "torch.py").write_text("")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, CI / "gates.py", "--bare"], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "torch is installed" in done.stdout


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("def test_a(): pass", 0),
        ("def test_a(): assert False", 1),
        ("import pytest\ndef test_a(): pytest.skip('no')\ndef test_b(): pass", 1),
        ("import pytest\npytest.importorskip('no_such_module')\ndef test_b(): pass", 1),
        ("def helper(): pass", 5),
    ],
)
def test_skipped_and_missing_tests_fail_a_strict_run(tmp_path, body, code):
    (tmp_path / "test_it.py").write_text(body)
    (tmp_path / "test_other.py").write_text("def test_good(): pass" if code == 1 else "")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "strict", "-p", "no:cacheprovider", tmp_path]
    env = os.environ | {"PYTHONPATH": str(CI), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others take seconds to import
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == code, done.stdout
    assert ("counts as failed" in done.stdout) == ("import pytest" in body)
