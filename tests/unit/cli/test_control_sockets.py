"""Where the control doors of a user's clusters are found."""

import socket

import pytest

from penstock.cli.cluster import sockets
from penstock.common.config import ConfigError


@pytest.fixture
def doors(tmp_path, monkeypatch):
    """Opens a door for a gRPC address; all close in the end."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    opened = []

    def open_door(address):
        door = socket.socket(socket.AF_UNIX)
        opened.append(door)
        door.bind(str(sockets.socket_path(address)))
        door.listen()
        return door

    yield open_door
    for door in opened:
        door.close()


def test_the_folder_is_the_users_alone(doors, tmp_path):
    assert sockets.folder() == tmp_path / "penstock"
    assert (tmp_path / "penstock").stat().st_mode & 0o777 == 0o700


def test_without_a_runtime_folder_there_is_one_among_the_temporary_files(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert sockets.folder().parent == tmp_path


def test_a_folder_that_others_can_open_is_refused(doors, tmp_path):
    sockets.folder().chmod(0o755)
    with pytest.raises(ConfigError, match="nobody else can open"):
        sockets.find(None)


def test_a_link_in_the_folders_place_is_refused(doors, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (tmp_path / "penstock").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="must be a folder"):
        sockets.folder()


def test_a_folder_of_another_user_is_refused(doors, monkeypatch):
    sockets.folder()
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="of the user's own"):
        sockets.folder()


def test_the_only_cluster_is_found_without_a_word(doors):
    with pytest.raises(ConfigError, match=r"no cluster .* runs here"):
        sockets.find(None)
    doors("127.0.0.1:8001")
    assert sockets.find(None).name == "127.0.0.1:8001.sock"


def test_of_several_one_has_to_be_named(doors):
    doors("127.0.0.1:8001")
    doors("127.0.0.1:9001")
    with pytest.raises(ConfigError, match=r"several clusters .* 127\.0\.0\.1:8001, 127\.0\.0\.1:9001"):
        sockets.find(None)
    assert sockets.find("127.0.0.1:9001").name == "127.0.0.1:9001.sock"
    assert sockets.find("grpc://localhost:9001").name == "127.0.0.1:9001.sock"
    with pytest.raises(ConfigError, match=r"at 127\.0\.0\.1:1; there are 127\.0\.0\.1:8001"):
        sockets.find("127.0.0.1:1")
    with pytest.raises(ConfigError, match="--target: must be HOST:PORT"):
        sockets.find("nonsense")


def test_a_door_on_all_interfaces_is_found_by_any_name(doors):
    doors("0.0.0.0:8001")
    assert sockets.find("127.0.0.1:8001").name == "0.0.0.0:8001.sock"
    with pytest.raises(ConfigError, match="no cluster"):
        sockets.find("127.0.0.1:8002")


def test_what_a_killed_cluster_left_is_removed(doors):
    doors("127.0.0.1:8001").close()
    left = sockets.folder() / "127.0.0.1:8001.sock"
    assert left.exists()
    assert sockets.running() == {}
    assert not left.exists()


def test_a_living_clusters_door_is_not_taken_over(doors):
    doors("127.0.0.1:8001")
    with pytest.raises(ConfigError, match="another cluster answers there"):
        sockets.socket_path("127.0.0.1:8001")


def test_a_path_that_no_socket_can_have_is_refused(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(ConfigError, match="too long for a socket"):
        sockets.socket_path("127.0.0.1:8001")
