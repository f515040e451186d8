"""Compiles the C++ sources beside this file into one shared library, once per node.

In: all *.cpp and *.h here, a target ("vnni", "avx2", "plain"), the compiler $CXX or the first of c++, g++, clang++.
Out: `$XDG_CACHE_HOME/raymill/native-<key>-<compiler>-<digest>.so`. The key is of sources, flags and architecture (homes are
shared between nodes), and the compiler's version stands beside it, so any change compiles anew; where there is no compiler,
what any made of the same key is taken. The digest is of the file itself, so a truncated one is seen and compiled again,
never loaded. One process compiles while others wait for it; the file appears by one rename. Only a file of our own in a
folder of our own is loaded. Whoever compiles deletes what no one has loaded for 90 days.

No -ffast-math and no contraction: what is added, and in which order, is what the source says, on every compiler.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

from raymill.errors import MachineError

Target = Literal["vnni", "avx2", "plain"]
"""What the code may use: AVX-512 with VNNI, AVX2 with FMA, or what every CPU of the architecture has."""

TARGETS: tuple[Target, ...] = get_args(Target)
"""Best first."""

SOURCES = Path(__file__).parent
_FLAGS = [
    *(
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-pthread",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fvisibility=hidden",
    ),
    "-Wno-psabi",  # vectors wider than the target's pass between functions of this one library only
]
TARGET_FLAGS: dict[Target, list[str]] = {
    "vnni": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c", "-mbmi2"),
        "-mprefer-vector-width=512",
    ],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "plain": [],
}
NEEDS: dict[Target, set[str]] = {
    "vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx2", "fma", "f16c", "bmi2"},
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "plain": set(),
}
_COMPILERS = ("c++", "g++", "clang++")
_LONGEST_S = 600
_UNUSED_S = 90 * 86400
_FIX = "install a C++ compiler (g++ 9 or clang 10 at least), or name one in CXX"


def runnable_targets() -> tuple[Target, ...]:
    """The targets that this CPU runs, best first."""
    flags = cpu_flags()
    return tuple(target for target in TARGETS if NEEDS[target] <= flags)


def best_target() -> Target:
    return runnable_targets()[0]


def built_library(target: Target) -> Path:
    """The compiled library; compiles it where the cache has none. MachineError when that cannot be done."""
    folder, key = _own_folder(), _key(target)
    try:
        compiler = find_compiler()
        key += "-" + hashlib.sha256(_run([*compiler, "--version"]).encode()).hexdigest()[:8]
    except MachineError:
        found = _cached(folder, f"{key}-*")
        if found is None:
            raise
        return found
    try:
        with (folder / f"native-{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel when its holder dies
            return _cached(folder, key) or _compile(compiler, target, folder, key)
    except OSError as error:
        found = _cached(folder, key)  # an image whose disk is read-only may bring its own
        if found is None:
            raise _not_kept(folder, error) from None
        return found


def cpu_flags() -> set[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def find_compiler() -> list[str]:
    """The compiler's command."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise MachineError("CXX is no command", where=os.environ["CXX"], why=str(error), fix=_FIX) from None
    for command in [named] if named else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    names = named[0] if named else ", ".join(_COMPILERS)
    raise MachineError("there is no C++ compiler", why=f"not found on PATH: {names}", fix=_FIX)


def _sources() -> tuple[Path, ...]:
    return tuple(sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]))


def _key(target: Target) -> str:
    """What the library depends on beside the compiler, hashed."""
    digest = hashlib.sha256(repr((platform.machine(), _FLAGS, target, TARGET_FLAGS[target])).encode())
    for path in _sources():
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:24]


def _own_folder() -> Path:
    """A folder that only we can write to: code is loaded from it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "raymill")
    try:
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and found.st_mode & 0o077:
            folder.chmod(0o700)
    except (OSError, RuntimeError) as error:  # RuntimeError: whoever runs this has no home
        raise _not_kept(folder, error) from None
    if found.st_uid != os.getuid():
        fix = "set XDG_CACHE_HOME to a folder of your own"
        raise MachineError("the cache of compiled code is another user's", where=str(folder), fix=fix)
    return folder


def _not_kept(folder: Path, error: Exception) -> MachineError:
    fix = "set XDG_CACHE_HOME to a folder that can be written"
    return MachineError("compiled code cannot be kept", where=str(folder), why=str(error), fix=fix)


def _cached(folder: Path, key: str) -> Path | None:
    """The library of that key, if whole and ours, noted as used today; others of that key are deleted."""
    for path in folder.glob(f"native-{key}-*.so"):
        digest = path.stem.rpartition("-")[2]
        if path.lstat().st_uid == os.getuid() and not path.is_symlink() and _digest(path) == digest:
            with contextlib.suppress(OSError):  # of a folder that can only be read
                os.utime(path)
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _delete_old(folder: Path) -> None:
    """Libraries, and locks, that no one has used for long. A process of this node that has one loaded keeps it; one of
    another node with the same home may not, so it is very long: a library has 0.3 MB."""
    for path in folder.glob("native-*"):
        with contextlib.suppress(OSError):  # deleted by another meanwhile
            if path.lstat().st_mtime < time.time() - _UNUSED_S:
                path.unlink()


def _compile(compiler: list[str], target: Target, folder: Path, key: str) -> Path:
    """Every source on its own, side by side, then joined."""
    sources = [path for path in _sources() if path.suffix == ".cpp"]
    command = [*compiler, *_FLAGS, *TARGET_FLAGS[target]]
    with tempfile.TemporaryDirectory(dir=folder) as workplace, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [f"{workplace}/{path.stem}.o" for path in sources]
        pairs = zip(sources, objects, strict=True)
        list(pool.map(_run, ([*command, "-c", str(source), "-o", made] for source, made in pairs)))
        made = Path(workplace) / "native.so"
        _run([*command, "-shared", *objects, "-o", str(made)])
        library = made.rename(folder / f"native-{key}-{_digest(made)}.so")
    _delete_old(folder)
    return library


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_LONGEST_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError("the C++ compiler failed", why=str(error)[:500], fix=_FIX) from None
    if done.returncode:
        why = f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[:2000]}"
        raise MachineError("the C++ compiler failed", why=why, fix=_FIX)
    return done.stdout
