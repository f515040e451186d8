"""Compiling once per node: the cache, and what happens without a compiler. The sources here are one function each."""

import ctypes
import logging
import os
import platform
import pwd
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from raymill.errors import MachineError
from raymill.inference import native
from raymill.inference.native import build

SOURCE = 'extern "C" int answer() { return %d; }\n'


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of sources in place of ours, and a cache of its own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(
        SOURCE.replace("int answer", '__attribute__((visibility("default"))) int answer') % 42
    )
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._library.cache_clear()
    yield folder
    native._library.cache_clear()


@pytest.fixture
def compiler():
    try:
        build.find_compiler()
    except MachineError:
        pytest.skip("no C++ compiler")


def answer(path):
    return ctypes.CDLL(str(path)).answer()


def test_a_library_is_compiled_once_and_kept_for_us_alone(sources, compiler, tmp_path, monkeypatch):
    path = build.built_library("plain")
    assert answer(path) == 42
    assert path.parent == tmp_path / "cache" / "raymill"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    written = path.stat().st_ino
    assert build.built_library("plain") == path and path.stat().st_ino == written


def test_other_sources_flags_or_machines_make_another_library(sources, compiler, monkeypatch):
    first = build.built_library("plain")
    (sources / "answer.h").write_text("// read by no one, but it could be\n")
    second = build.built_library("plain")
    assert second != first
    monkeypatch.setitem(build.TARGET_FLAGS, "plain", ["-O1"])
    third = build.built_library("plain")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")  # the same home, on a node of another kind
    assert len({first, second, third, build.built_library("plain")}) == 4
    assert first.exists()


def test_a_truncated_library_is_compiled_again_not_loaded(sources, compiler):
    path = build.built_library("plain")
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    again = build.built_library("plain")
    assert answer(again) == 42
    assert [each for each in path.parent.iterdir() if each.suffix == ".so"] == [again]


def test_a_link_to_elsewhere_is_not_followed(sources, compiler, tmp_path):
    path = build.built_library("plain")
    elsewhere = tmp_path / "elsewhere.so"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert not build.built_library("plain").is_symlink()


def test_a_folder_open_to_others_is_closed(sources, compiler, tmp_path):
    folder = tmp_path / "cache" / "raymill"
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o777)
    build.built_library("plain")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_processes_that_start_at_once_get_one_library(sources, compiler):
    program = (
        "import sys, pathlib\nfrom raymill.inference.native import build\n"
        f"build.SOURCES = pathlib.Path({str(sources)!r})\nprint(build.built_library('plain'))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(4)
    ]
    found = {process.communicate(timeout=60)[0].strip() for process in started}
    assert len(found) == 1 and answer(found.pop()) == 42


@pytest.mark.parametrize("how", ["no compiler", "one that fails"])
def test_without_a_compiler_what_another_made_of_the_same_sources_is_taken(
    how, sources, compiler, monkeypatch, tmp_path
):
    path = build.built_library("plain")
    if how == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CXX", "false")
    assert build.built_library("plain") == path
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(MachineError, match=r"install a C\+\+ compiler"):
        build.built_library("plain")
    assert not path.exists(), "a truncated one is not kept"


def test_other_sources_are_no_use_without_a_compiler(sources, compiler, monkeypatch):
    build.built_library("plain")
    monkeypatch.setenv("CXX", "no-such-compiler")
    (sources / "answer.h").write_text("// other\n")
    with pytest.raises(MachineError, match=r"install a C\+\+ compiler"):
        build.built_library("plain")


def test_what_no_one_loaded_for_90_days_is_deleted_and_what_is_used_stays(sources, compiler):
    used, unused = build.built_library("plain"), None
    for text in ("// unused", "// new"):
        (sources / "answer.h").write_text(text)
        unused = unused or build.built_library("plain")
    month_s = 30 * 86400
    for path in used.parent.iterdir():
        os.utime(path, (time.time() - 4 * month_s,) * 2)
    (sources / "answer.h").unlink()
    assert build.built_library("plain") == used  # loaded today, made long ago
    (sources / "answer.h").write_text("// new")
    new = build.built_library("plain")
    left = set(used.parent.iterdir())
    assert {path for path in left if path.suffix == ".so"} == {used, new}
    assert len([path for path in left if path.suffix == ".lock"]) == 2


WAYS = ["no compiler", "one that is not there", "no command", "one that fails", "one in Latin-1", "wrong sources"]


@pytest.mark.parametrize("how", WAYS)
def test_what_cannot_be_compiled_is_told_once_with_the_fix(how, sources, monkeypatch, caplog, tmp_path):
    if how == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    elif how == "one that is not there":
        monkeypatch.setenv("CXX", "no-such-compiler -v")
    elif how == "no command":
        monkeypatch.setenv("CXX", "g++ '-O2")
    elif how == "one that fails":
        monkeypatch.setenv("CXX", "false")
    elif how == "one in Latin-1":
        monkeypatch.setenv("CXX", r"sh -c 'printf \351 >&2; exit 1'")
    else:
        (sources / "answer.cpp").write_text("int answer() { return }\n")
    with caplog.at_level(logging.WARNING):
        with ThreadPoolExecutor() as pool:  # a replica asks from two threads as it starts
            found = list(pool.map(native.library, [None, build.best_target(), None, build.best_target()]))
        assert found == [native.library()] * 4 == [None] * 4
    (record,) = caplog.records
    assert "torch step serves" in record.getMessage()
    assert "install a C++ compiler" in record.getMessage()


def test_a_cache_that_cannot_be_written_is_told_with_the_fix(sources, compiler, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.library() is None
    assert "set XDG_CACHE_HOME" in caplog.records[0].getMessage()


def test_whoever_has_no_home_is_told_what_to_set(sources, compiler, monkeypatch, caplog):
    def unknown(user):
        raise KeyError(user)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert native.library() is None
    assert "set XDG_CACHE_HOME" in caplog.records[0].getMessage()


def test_a_folder_that_can_only_be_read_still_gives_what_it_holds(sources, compiler):
    path = build.built_library("plain")
    (lock,) = path.parent.glob("*.lock")
    lock.unlink()
    lock.mkdir()  # for root too, a file that cannot be opened
    assert build.built_library("plain") == path
    path.unlink()
    with pytest.raises(MachineError, match="set XDG_CACHE_HOME"):
        build.built_library("plain")


def test_targets_are_chosen_by_the_cpus_flags(monkeypatch):
    monkeypatch.setattr(build, "cpu_flags", lambda: set())
    assert build.runnable_targets() == ("plain",)
    monkeypatch.setattr(build, "cpu_flags", lambda: {"avx2", "fma", "f16c", "bmi2", "avx512f"})
    assert build.best_target() == "avx2"
    monkeypatch.setattr(build, "cpu_flags", lambda: set().union(*build.NEEDS.values()))
    assert build.runnable_targets() == ("vnni", "avx2", "plain")
