"""The C++ kernels under sanitizers, and that each of them reports a fault planted in a copy of the sources."""

from pathlib import Path

import pytest

from tools.kernels.sanitize import PARITY, SANITIZERS, absent, build, copy_sources, run

ROW, SUM = "for (int64_t r = begin; r < end; r++)", "std::vector<Wide<T>> sum(width);"
NARROW = "narrow(grad * fast_exp(widen(row[i]) - lse), out[i]);"
TO_INTEGER = f"(void)int32_t(widen(row[i])), {NARROW}"
PLANTED = {  # file, what is right, what is wrong, what is reported
    "address": [
        ("permute.cpp", ROW, ROW.replace("r < end", "r <= end"), "heap-buffer-overflow"),
        ("cross_entropy.cpp", NARROW, TO_INTEGER, "outside the range of representable values"),
    ],
    "thread": [("permute.cpp", SUM, "static std::vector<Wide<T>> sum(4096);", "data race")],
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", SANITIZERS)
def test_case_24_sanitizers_find_what_is_planted_and_nothing_else(kind: str, tmp_path: Path) -> None:
    if reason := absent(kind):
        pytest.skip(reason)
    copy_sources(tmp_path)
    build(tmp_path, kind)
    for arguments in (PARITY, ("-m", "tests.ops.fuzz", "--cases", "2000")):
        done = run(tmp_path, kind, *arguments)
        assert done.returncode == 0, done.stdout[-6000:]
    for file, right, wrong, report in PLANTED[kind]:
        path = tmp_path / "csrc" / file
        source = path.read_text()
        assert source.count(right) == 1
        path.write_text(source.replace(right, wrong))
        build(tmp_path, kind)
        done = run(tmp_path, kind, "-m", "tests.ops.fuzz", "--cases", "600")
        assert done.returncode and report in done.stdout, f"{file}: {done.stdout[-6000:]}"
        path.write_text(source)
