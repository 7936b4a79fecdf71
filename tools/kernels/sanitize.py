"""The C++ kernels under sanitizers: `python tools/kernels/sanitize.py [address] [thread]`, which is `make sanitize`.

    address    AddressSanitizer and UndefinedBehaviorSanitizer: memory that is not ours, arithmetic that C++ leaves open
    thread     ThreadSanitizer: two threads at one place, one of which writes, and nothing that orders them

Each is a build of csrc/ in a temporary copy of the sources, with which the parity tests and the fuzzer
(tests/ops/fuzz.py) run. torch is not instrumented: what it does to memory is not seen, and is not reported. For the
thread sanitizer the loops of csrc run in plain threads (threads/ATen/ParallelOpenMP.h), which it understands.
"""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("csrc", "moe_engine", "tests", "tools", "setup.py", "pyproject.toml", "README.md", "LICENSE")


class Sanitizer(NamedTuple):
    flags: str
    libraries: tuple[str, ...]  # loaded before Python, which knows nothing of them
    options: dict[str, str]  # environment of what runs


SANITIZERS = {
    "address": Sanitizer(
        "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer",
        ("libasan.so", "libstdc++.so"),
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},  # Python never frees all
    ),
    "thread": Sanitizer(
        "-fsanitize=thread", ("libtsan.so",), {"TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1"}
    ),
}
PARITY = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not reference", "tests/ops/test_parity.py")
PARITY += ("tests/ops/test_tiles.py", "tests/ops/test_ops.py")


def environment(kind: str) -> dict[str, str]:
    """In which a process of Python runs under the sanitizer."""
    libraries = (library_path(name) for name in SANITIZERS[kind].libraries)
    return {**os.environ, **SANITIZERS[kind].options, "LD_PRELOAD": ":".join(libraries), "OMP_NUM_THREADS": "1"}


def library_path(name: str) -> str:
    """Where g++ keeps it; the name alone if it does not."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


@functools.cache
def prefix(kind: str) -> tuple[str, ...] | None:
    """What a command begins with under the sanitizer; None if it cannot run here. Addresses that are too random are
    not what an older thread sanitizer expects."""
    for words in ((), ("setarch", "-R")):
        if words and not shutil.which(words[0]):
            continue
        if not subprocess.run(
            [*words, sys.executable, "-c", ""], env=environment(kind), capture_output=True
        ).returncode:
            return words
    return None


def absent(kind: str) -> str | None:
    """Why the sanitizer cannot be used on this machine."""
    if sys.platform != "linux" or not shutil.which("g++"):
        return "needs g++ on Linux"
    missing = [name for name in SANITIZERS[kind].libraries if not os.path.isabs(library_path(name))]
    if missing:
        return f"g++ has no {missing[0]}"
    return None if prefix(kind) is not None else f"Python does not start with {SANITIZERS[kind].libraries[0]}"


def copy_sources(folder: Path) -> None:
    """What the build and the tests of the kernels need, into an empty folder."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


def build(folder: Path, kind: str) -> None:
    """Build the copy's extension in place; what has not changed since the last build is not compiled again."""
    flags = SANITIZERS[kind].flags
    compile_flags = f"{flags} -g1" + (f" -I{folder}/tools/kernels/threads" if kind == "thread" else "")
    variables = {"CXX": "g++", "CFLAGS": compile_flags, "LDFLAGS": flags, "MAX_JOBS": str(os.cpu_count())}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    for old in (folder / "moe_engine").glob("_C*.so"):
        old.unlink()
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)
    if not list((folder / "moe_engine").glob("_C*.so")):
        raise SystemExit(f"error: the build with {flags} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def run(folder: Path, kind: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments in the copy, under the sanitizer; both outputs are in stdout."""
    command = [*(prefix(kind) or ()), sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(kind), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="address | thread", help="both by default")
    parser.add_argument("--cases", default="2000", help="of the fuzzer (default: 2000)")
    parser.add_argument("--seed", default="0", help="of its first case (default: 0)")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(SANITIZERS):
        parser.error(f"found {', '.join(sorted(unknown))}, expected address or thread")
    failed = False
    for kind in options.kinds or SANITIZERS:
        if reason := absent(kind):
            print(f"{kind}: left out: {reason}")
            continue
        with tempfile.TemporaryDirectory() as name:
            folder, start = Path(name), time.monotonic()
            copy_sources(folder)
            build(folder, kind)
            print(f"{kind}: built in {time.monotonic() - start:.0f} s", flush=True)
            for arguments in (PARITY, ("-m", "tests.ops.fuzz", "--cases", options.cases, "--seed", options.seed)):
                start, done = time.monotonic(), run(folder, kind, *arguments)
                failed |= done.returncode != 0
                said = done.stdout[-6000:] if done.returncode else done.stdout.splitlines()[-1]
                print(f"{kind}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
