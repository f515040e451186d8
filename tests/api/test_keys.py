import hashlib
import json

import pytest

from raymill.api.keys import KeyFile, ensure_metrics_key, forget_keys, new_key
from raymill.errors import MachineError


def test_only_hashes_are_stored_and_only_the_owner_reads_them(tmp_path):
    keys = KeyFile(tmp_path / "api_keys.json")
    made = [keys.create("client"), keys.create("metrics")]
    text = keys.path.read_text()
    assert keys.path.stat().st_mode & 0o777 == 0o600
    assert all(key.startswith("sk-") and len(key) > 40 and key[3:] not in text for key in made)
    assert hashlib.sha256(made[0].encode()).hexdigest() in text
    assert [keys.role_of(key) for key in (*made, "sk-other", "")] == ["client", "metrics", None, None]


def test_keys_made_and_removed_elsewhere_count_at_once(tmp_path):
    here, elsewhere = KeyFile(tmp_path / "api_keys.json"), KeyFile(tmp_path / "api_keys.json")
    assert not here.has("client")
    key = elsewhere.create("client")
    assert here.role_of(key) == "client"
    second = elsewhere.create("client")
    values = json.loads(here.path.read_text())
    values["keys"] = values["keys"][1:]
    aside = tmp_path / "aside"
    aside.write_text(json.dumps(values))
    aside.chmod(0o600)
    aside.replace(here.path)
    assert (here.role_of(key), here.role_of(second)) == (None, "client")
    here.path.unlink()
    assert here.role_of(second) is None


def test_a_file_others_can_read_or_that_is_damaged_is_refused(tmp_path):
    keys = KeyFile(tmp_path / "api_keys.json")
    key = keys.create("client")
    keys.path.chmod(0o640)
    with pytest.raises(MachineError, match="chmod 600"):
        keys.role_of(key)
    keys.path.chmod(0o600)
    keys.path.write_text('{"keys": [{"role": "admin"}]}')
    with pytest.raises(MachineError, match="damaged"):
        keys.role_of(key)


def test_a_runs_metrics_key_is_kept_while_it_is_good(tmp_path):
    plain = tmp_path / "metrics_key"
    ensure_metrics_key(tmp_path)
    key = plain.read_text()
    ensure_metrics_key(tmp_path)
    assert plain.read_text() == key and plain.stat().st_mode & 0o777 == 0o600
    plain.write_text("sk-from-elsewhere")
    ensure_metrics_key(tmp_path)
    assert KeyFile(tmp_path / "api_keys.json").role_of(plain.read_text()) == "metrics"


def test_a_runs_client_key_is_made_once_and_can_be_forgotten(tmp_path):
    key = new_key(tmp_path)
    assert key.startswith("sk-") and new_key(tmp_path) is None
    forget_keys(tmp_path), forget_keys(tmp_path)
    assert KeyFile(tmp_path / "api_keys.json").role_of(key) is None and new_key(tmp_path)
