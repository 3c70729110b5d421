"""API keys: made once, kept as digests, found in constant time, gone when revoked."""

import json
import os
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConfigError, StorageError, UsageError
from cluster.storage import Store
from serving import auth
from serving.auth import Key, KeyFile, KeyRing, Quota, find, new_key


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyFile:
    monkeypatch.delenv(auth.ENVIRONMENT, raising=False)
    return KeyFile(Store(str(tmp_path / "root")))


def test_a_key_has_256_random_bits_and_is_not_stored(keys: KeyFile, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        secret, key = new_key("手机")
        keys.add(key)
    finally:
        os.umask(before)
    content = (tmp_path / "root" / "keys.json").read_bytes()
    random_part = secret.split("-", 2)[2]  # which itself may contain, and begin with, "-"
    assert secret.encode() not in content and random_part.encode() not in content
    assert stat.S_IMODE((tmp_path / "root" / "keys.json").stat().st_mode) == 0o600
    assert len(random_part) == 43  # 256 bits, base64
    assert keys.read() == (key,)
    assert new_key("手机")[0] != secret


def test_only_the_whole_key_is_found() -> None:
    secret, key = new_key("a")
    _, other = new_key("b")
    assert find([other, key], secret) == key
    wrong = [secret[:-1], secret + "a", key.id, key.digest, "", f"hst-{other.id}-{secret[17:]}"]
    assert [find([other, key], presented) for presented in wrong] == [None] * len(wrong)


def test_no_key_is_compared_in_a_way_whose_time_tells() -> None:
    text = Path(auth.__file__).read_text("utf-8")
    assert "compare_digest" in text and "digest ==" not in text and "== digest" not in text


def test_a_key_ends_when_it_expires_or_is_revoked(keys: KeyFile) -> None:
    _, key = new_key("a", expires=1000)
    assert [key.state(now) for now in (999, 1000)] == ["valid", "expired"]
    keys.add(key)
    assert keys.revoke("a").state(0) == "revoked"
    found = keys.read()
    assert found is not None and found[0].state(0) == "revoked"
    with pytest.raises(UsageError, match="no valid key is named a"):
        keys.revoke("a")


def test_of_two_keys_of_one_name_the_id_tells(keys: KeyFile) -> None:
    first, second = new_key("a")[1], new_key("a")[1]
    keys.add(first)
    keys.add(second)
    with pytest.raises(UsageError, match="2 keys are named a"):
        keys.revoke("a")
    assert keys.revoke(second.id).id == second.id
    assert keys.revoke("a").id == first.id


def test_a_key_file_that_others_can_read_is_refused_with_the_cure(
    keys: KeyFile, tmp_path: Path
) -> None:
    keys.add(new_key("a")[1])
    (tmp_path / "root" / "keys.json").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys.read()


@pytest.mark.parametrize("content", ["", "[]", '{"keys": [{}]}', '{"keys": 1}', "\x00"])
def test_a_damaged_key_file_says_so(keys: KeyFile, tmp_path: Path, content: str) -> None:
    keys.add(new_key("a")[1])
    (tmp_path / "root" / "keys.json").write_text(content)
    with pytest.raises(ConfigError, match="does not hold the keys"):
        keys.read()


def test_a_secret_of_the_environment_goes_first(
    keys: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_key("a", ["classify"], quota=Quota(concurrent=3))[1]
    monkeypatch.setenv(auth.ENVIRONMENT, auth.encode([key]).decode())
    assert keys.read() == (key,)
    with pytest.raises(UsageError, match="cannot change"):
        keys.revoke("a")
    monkeypatch.setenv(auth.ENVIRONMENT, json.dumps({"no": "keys"}))
    with pytest.raises(ConfigError, match=r"\$HELIOSTAT_KEYS"):
        keys.read()


@pytest.mark.parametrize(("text", "seconds"), [("30d", 2_592_000), ("12h", 43_200), ("5m", 300)])
def test_durations(text: str, seconds: int) -> None:
    assert auth.until(text, 10.9) == 10 + seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "0d", "1.5h", "1y", "9" * 50 + "d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="such as 30d"):
        auth.until(text, 0)


def test_a_ring_that_had_keys_never_opens_again() -> None:
    held: list[tuple[Key, ...] | None] = [None]
    ring = KeyRing(lambda: held[0])
    ring.load()
    assert ring.keys is None
    held[0] = (new_key("a")[1],)
    ring.load()
    assert ring.keys == held[0]
    held[0] = None
    ring.load()
    assert ring.keys == ()


def test_a_ring_that_cannot_read_grows_old() -> None:
    now = [0.0]
    failing = False

    def read() -> tuple[Key, ...]:
        if failing:
            raise StorageError("gone")
        return ()

    ring = KeyRing(read, lambda: now[0])
    ring.load()
    failing, now[0] = True, 9.0
    with pytest.raises(StorageError):
        ring.load()
    assert ring.age == 9.0 > KeyRing.STALE_SECONDS


def test_keys_differ_in_time_and_state() -> None:
    key = new_key("a")[1]
    assert abs(key.created - time.time()) < 60
    assert replace(key, revoked=1).state(time.time()) == "revoked"
