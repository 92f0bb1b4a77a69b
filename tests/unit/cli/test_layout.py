"""What holds the repository's folders together."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_no_root_of_the_namespace_hides_the_others():
    done = subprocess.run([ROOT / "tools/check_namespace.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    roots = [ROOT / root / "penstock" for root in ("services", "backends", "clients/python")]
    assert all(root.is_dir() and not (root / "__init__.py").exists() for root in roots)


def test_all_roots_are_one_package():
    import penstock

    assert len(set(penstock.__path__)) >= 3 or "site-packages" in str(next(iter(penstock.__path__)))


@pytest.mark.parametrize("target", ["setup", "demo", "serve", "test", "lint", "protos", "bench"])
def test_the_makefile_has_its_targets(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_checks_and_the_tests():
    run = ROOT / ".ci/run"
    assert run.stat().st_mode & 0o111
    text = run.read_text()
    assert "make lint" in text
    assert "make test" in text
