import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.common.service import StartError
from penstock.common.sources import BUILTIN_FOLDER, default_name, resolve

sys.path.insert(0, str(Path(__file__).parent))
from fake_hub import COMMIT, FakeHub

REPO = "someone/small-model"
WEIGHTS = bytes(range(256)) * 100_000  # more than the hub's client reads at once
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "consolidated.safetensors": b"the same weights again",
    "original/model.safetensors": b"and again",
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
}

# In a process of its own: the hub's client reads its environment once, when it is imported.
SCRIPT = """
import sys
from penstock.common.service import StartError
from penstock.common.sources import resolve
try:
    print(resolve(sys.argv[1]))
except StartError as error:
    print(error)
    sys.exit(3)
"""


def resolve_apart(home: Path, endpoint: str, model: str = REPO, **environment: str) -> tuple[bool, str, str]:
    """Whether it resolved, the folder or the refusal, and stderr."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model],
        env={**clean, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, **environment},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in {0, 3}, done.stderr
    return done.returncode == 0, done.stdout.strip(), done.stderr


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


def test_a_folder_wins_over_the_builtin_name(tmp_path, monkeypatch):
    (tmp_path / "builtin").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("builtin") == tmp_path / "builtin"


def test_the_builtin_model_needs_no_hub():
    assert resolve("builtin") == BUILTIN_FOLDER
    assert (BUILTIN_FOLDER / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "model",
    ["", "/no/such/folder", "./nowhere", "~/nowhere-at-all", "a/b/c", "two words", "a--b/c", "model/", "a/b@", "a@b@c", "@v1"],
)
def test_what_is_no_model_is_refused_in_one_line(model):
    with pytest.raises(StartError, match="folder") as refusal:
        resolve(model)
    assert "\n" not in str(refusal.value)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(StartError, match="is a file; give the folder"):
        resolve(str(tmp_path / "model.safetensors"))


def test_only_the_files_that_are_needed_are_fetched(tmp_path):
    with FakeHub(REPO, FILES) as hub:
        ok, folder, stderr = resolve_apart(tmp_path, hub.url)
        assert ok, folder
        assert {p.name for p in Path(folder).rglob("*") if p.is_file()} == {"config.json", "tokenizer.json", "model.safetensors"}
        assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS
        assert "%" not in stderr  # no progress bar where stderr is no terminal
        fetched = len(hub.downloads)
        assert resolve_apart(tmp_path, hub.url)[:2] == (True, folder)
        assert len(hub.downloads) == fetched


def test_a_fetch_that_breaks_off_goes_on_where_it_stopped(tmp_path):
    with FakeHub(REPO, FILES, cut=1) as hub:
        ok, folder, _ = resolve_apart(tmp_path, hub.url)
        if not ok:  # what is there is kept for the next attempt
            ok, folder, _ = resolve_apart(tmp_path, hub.url)
        assert ok, folder
        starts = [start for name, start in hub.downloads if name == "model.safetensors"]
        assert starts[0] == 0
        assert starts[1] > 0
        assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS


def test_offline_takes_the_cache_and_says_when_there_is_none(tmp_path):
    with FakeHub(REPO, FILES) as hub:
        ok, said, _ = resolve_apart(tmp_path, hub.url, HF_HUB_OFFLINE="1")
        assert not ok
        assert "HF_HUB_OFFLINE is set" in said
        _, folder, _ = resolve_apart(tmp_path, hub.url)
        assert resolve_apart(tmp_path, hub.url, HF_HUB_OFFLINE="1")[:2] == (True, folder)
    assert resolve_apart(tmp_path, hub.url)[:2] == (True, folder)  # and when the hub has gone


def test_a_token_opens_a_gated_model(tmp_path):
    with FakeHub(REPO, FILES, token="hf_secret") as hub:
        ok, said, stderr = resolve_apart(tmp_path, hub.url)
        assert not ok
        assert said == f"{REPO} is gated: accept its terms at {hub.url}/{REPO} and set HF_TOKEN"
        ok, _, stderr = resolve_apart(tmp_path, hub.url, HF_TOKEN="hf_secret")
        assert ok
        assert "hf_secret" not in stderr


@pytest.mark.parametrize(
    ("change", "model", "said"),
    [
        ({}, "someone/other", "no such model on"),
        ({}, f"{REPO}@v9", "has no revision 'v9'"),
        ({"refusal": (401, "")}, REPO, "HF_TOKEN"),
        ({"refusal": (403, "")}, REPO, "can not be reached"),
        ({"refusal": (500, "")}, REPO, "can not be reached"),
        ({"files": {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}}, REPO, "holds no .safetensors weights"),
    ],
)
def test_each_way_to_fail_is_told_in_one_line(tmp_path, change, model, said):
    with FakeHub(REPO, **{"files": FILES, **change}) as hub:
        ok, refusal, _ = resolve_apart(tmp_path, hub.url, model)
    assert not ok
    assert said in refusal
    assert "\n" not in refusal


def test_no_hub_at_all_is_told_in_one_line(tmp_path):
    ok, refusal, _ = resolve_apart(tmp_path, "http://127.0.0.1:9")
    assert not ok
    assert "http://127.0.0.1:9 can not be reached" in refusal
    assert "\n" not in refusal


def test_a_misspelt_builtin_is_told_as_one(tmp_path):
    ok, refusal, _ = resolve_apart(tmp_path, "http://127.0.0.1:9", "bultin")
    assert not ok
    assert refusal.endswith("; did you mean 'builtin'?")


def test_a_commit_can_be_named(tmp_path):
    with FakeHub(REPO, FILES) as hub:
        ok, folder, _ = resolve_apart(tmp_path, hub.url, f"{REPO}@{COMMIT}")
    assert ok
    assert Path(folder).name == COMMIT


def test_a_model_without_a_name_is_called_by_its_folder_or_by_its_id_without_the_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert default_name(".") == tmp_path.name
    assert default_name("weights/") == "weights"
    assert default_name("builtin") == "builtin"
    assert default_name(REPO) == default_name(f"{REPO}@v2") == REPO
