"""moe_engine/log and moe_engine/report/curve.py: what is written, what is printed, and when a warning is raised."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_engine.log.console import progress_line
from moe_engine.log.load import load_entropy, load_max_over_mean, load_warnings
from moe_engine.log.logger import Logger
from moe_engine.log.rows import read_rows
from moe_engine.report.curve import expert_load_table, loss_curve_png
from moe_engine.text import printable

S1_30 = [0.125, 0.118, 0.132, 0.109, 0.121, 0.135, 0.117, 0.143]


def row(step: int, **more: object) -> dict:
    return {"step": step, "loss": 4.0 / step, "lm_loss": 3.9 / step, "lr": 1e-3, "tokens": 100 * step, **more}


def shares_with(value: float, experts: int = 8) -> list[float]:
    """One expert receives `value`, the others share the rest equally."""
    return [value] + [(1 - value) / (experts - 1)] * (experts - 1)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.0499, "collapse"), (0.05, None), (0.25, None), (0.2501, "imbalance"), (0.0, "collapse")]
)
def test_load_warning_thresholds_at_eight_experts(share: float, verdict: str | None) -> None:
    found = load_warnings([shares_with(share)])
    if verdict is None:
        assert found == []
    else:
        assert len(found) == 1 and verdict in found[0] and "layer 0 expert 0" in found[0]
        assert ("< 5 %" if verdict == "collapse" else "> 25 %") in found[0]


def test_load_warning_at_counts_and_other_expert_numbers() -> None:
    counts = [50, 250, 150, 150, 100, 100, 100, 100]  # exactly on both bounds
    assert load_warnings([[n / 1000 for n in counts]]) == []
    counts[0], counts[2] = 49, 151
    assert len(load_warnings([[n / 1000 for n in counts]])) == 1
    assert load_warnings([shares_with(0.4 / 64, 64), shares_with(2 / 64, 64)]) == []
    found = load_warnings([shares_with(0.39 / 64, 64), shares_with(2.01 / 64, 64)], layers=[3, 7])
    assert "layer 3 expert 0" in found[0] and "collapse" in found[0]
    assert "layer 7 expert 0" in found[1] and "imbalance" in found[1]


def test_load_warning_is_silent_on_the_reference_table_and_without_tokens() -> None:
    assert load_warnings([S1_30]) == []
    assert load_warnings([[0.0] * 8]) == []
    assert load_warnings([[math.nan] * 8]) == []


def test_load_statistics_match_the_reference_table() -> None:
    assert load_entropy(S1_30) == pytest.approx(2.0760, abs=5e-5)
    assert load_entropy([1 / 8] * 8) == pytest.approx(math.log(8))
    assert load_entropy([1.0, 0.0]) == 0
    assert load_max_over_mean(S1_30) == pytest.approx(8 * 0.143)


def test_rows_reach_metrics_jsonl_as_they_happen(tmp_path: Path) -> None:
    log = Logger(tmp_path / "run", is_main=True, total_steps=2, quiet=True)
    log.step(row(1, grad_norm=math.inf, expert_load=[[0.5, 0.5], [1.0, 0.0]], dropped=[0, 3], moe_layers=[1, 3]))
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    log.close()
    assert written[0]["grad_norm"] is None  # JSON has no infinity
    assert written[0]["moe_layers"] == [1, 3] and written[0]["dropped"] == [0, 3]
    assert written[0]["load_entropy"] == pytest.approx([math.log(2), 0])
    assert written[0]["load_max_over_mean"] == [1, 2]


def test_tensorboard_carries_the_tags(tmp_path: Path) -> None:
    with Logger(tmp_path, is_main=True, total_steps=1, quiet=True) as log:
        more = {"aux_loss": 1.0, "z_loss": 0.5, "grad_norm": 2.0, "tokens_per_s": 10.0, "mfu": 0.25}
        layers = {"expert_load": [[0.75, 0.25]], "moe_layers": [4], "dropped": [2]}
        log.step(row(1, routing_supervision_loss=1.5, domain_loss={"books": 3.0}, **more, **layers))
        log.eval({"step": 1, "loss": 3.5, "domain_loss": {"books": 3.25}})
    found = scalars(tmp_path / "tensorboard")
    train = (
        "loss lm_loss aux_loss z_loss routing_supervision_loss grad_norm learning_rate tokens tokens_per_s mfu".split()
    )
    layer = ["load_max_over_mean", "load_entropy", "dropped"]
    other = ["domain/books/loss", "eval/loss", "eval/domain_loss/books"]
    assert set(found) == {f"train/{t}" for t in train} | {f"moe/layer_4/{t}" for t in layer} | set(other)
    assert found["train/loss"] == [(1, 4.0)] and found["moe/layer_4/load_max_over_mean"] == [(1, 1.5)]


def test_resume_leaves_each_step_once(tmp_path: Path) -> None:
    with Logger(tmp_path, is_main=True, total_steps=9, quiet=True) as log:
        for step in range(1, 6):
            log.step(row(step))
        log.eval({"step": 5, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.')  # the crash came in the middle of a line
    with Logger(tmp_path, is_main=True, total_steps=9, quiet=True) as log:
        log.truncate_after(3)
        log.step(row(4, loss=0.25))
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["loss"] == 0.25
    assert read_rows(tmp_path / "eval.jsonl") == []
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["train/loss"]] == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.tmp"))


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Logger(tmp_path / "run", is_main=False, total_steps=1) as log:
        log.info("a")
        log.warn("b")
        log.truncate_after(0)
        log.step(row(1, expert_load=[[1.0] + [0.0] * 7]))
        log.eval({"step": 1, "loss": 1.0})
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_missing_tensorboard_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Logger(tmp_path, is_main=True, total_steps=2, quiet=True) as log:
        log.step(row(1))
        log.step(row(2))
    assert capsys.readouterr().err.count("pip install tensorboard") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


def test_full_disk_does_not_end_the_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = Logger(tmp_path, is_main=True, total_steps=1, quiet=True)
    log.step(row(1))
    assert "No space left" in capsys.readouterr().err


def test_progress_line_opens_with_step_loss_lr() -> None:
    full = row(12, routing_supervision_loss=1.25, grad_norm=0.5, tokens_per_s=12345.6, mfu=0.314)
    full |= {"load_max_over_mean": [1.1, 1.7], "dropped": [0, 4]}
    minimised = ("routing_supervision_loss", "lm_loss", "router_entropy")
    assert progress_line(full | {"router_entropy": 1.5}, 200, 3723.4, minimised) == (
        "Step 12/200 | Loss: 0.3333 | LR: 1.000e-03 | Routing Loss: 1.2500 | LM: 0.3250 | router_entropy 1.5000"
        " | grad norm 0.500"
        " | 12,346 tok/s | MFU 31.4 % | load max/mean 1.70 | dropped 4 | ETA 1:02:03"
    )
    assert progress_line({"step": 1, "loss": math.nan}, 2) == "Step 1/2 | Loss: nan"


def test_console_prints_every_nth_step_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter(range(0, 1000, 2))
    log = Logger(None, is_main=True, total_steps=7, log_every=3, clock=lambda: float(next(now)))
    for step in range(1, 8):
        log.step(row(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines] == ["Step 3/7", "Step 6/7", "Step 7/7"]
    # The clock ticks 2 s a call: one call for the first row and one for the ETA of each later row, so 2 s a step.
    assert lines[0].endswith("ETA 0:00:08") and lines[-1].endswith("ETA 0:00:00")


def test_live_line_on_a_terminal() -> None:
    code = """
from moe_engine.log.logger import Logger
with Logger(None, True, 5, log_every=3) as log:
    for step in range(1, 6):
        log.step({"step": step, "loss": 1.0})
        if step == 4:
            log.info("a note")
"""
    master, slave = os.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=slave, env=os.environ | {"TERM": "xterm"}, check=True)
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert all(f"Step {step}/5" in shown for step in range(1, 6))
    # What stays on the screen: the text after the last "erase this line" of each line.
    kept = [line.rpartition("\x1b[2K")[2].strip() for line in shown.split("\r\n")]
    kept = [line for line in kept if line and "Step 4" not in line and "Step 2" not in line]
    assert [line.split(" |")[0] for line in kept] == ["Step 3/5", "a note", "Step 5/5"]
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is visible


def test_load_warning_once_per_interval_on_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with Logger(None, is_main=True, total_steps=100, quiet=True, warn_every=10) as log:
        for step in range(1, 11):  # expert 0 and 1 take turns to starve: balanced on average
            low = step % 2
            log.step(row(step, expert_load=[[0.01 + 0.23 * low, 0.24 - 0.23 * low] + [0.125] * 6]))
        assert capsys.readouterr().err == ""
        for step in range(11, 31):
            log.step(row(step, expert_load=[shares_with(0.01)] * 6, moe_layers=[1, 2, 3, 5, 8, 13]))
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all("3 more like it" in line and "layer 1 expert 0" in line for line in err)


@pytest.mark.parametrize("text", ["\x1b[2Jgone", "a\nStep 9/9 | Loss: 0", "a\rb", "\u202eabc", "\u2028", "\x9b1m"])
def test_outside_text_cannot_move_the_cursor(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = Logger(None, is_main=True, total_steps=1)
    log.info(text)
    log.warn(text)
    log.eval({"step": 1, "domain_loss": {text: 1.0}})
    out, err = capsys.readouterr()
    for line in (*out.splitlines(), *err.splitlines()):
        assert all(c.isprintable() for c in line)
    assert (len(out.splitlines()), len(err.splitlines())) == (2, 1)


def test_printable_keeps_readable_text() -> None:
    assert printable("Übung 北京 50 %") == "Übung 北京 50 %"
    assert printable("a\x1b[31m\n") == "a\\x1b[31m\\n"


def test_summary(tmp_path: Path) -> None:
    with Logger(tmp_path, is_main=True, total_steps=20, quiet=True) as log:
        for step in range(1, 21):
            log.step(row(step))
        log.eval({"step": 20, "loss": 0.5})
    loss_curve_png(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = expert_load_table([S1_30, [0.5, 0.5]], layers=[1, 30]).splitlines()
    assert table[1].split() == "1 12.5 11.8 13.2 10.9 12.1 13.5 11.7 14.3 0.998 1.14".split()
    assert table[2].split() == ["30", "50.0", "50.0", "1.000", "1.00"]
    assert len({len(line) for line in table}) == 1


def test_importing_log_stays_light() -> None:
    heavy = "{'torch', 'rich', 'matplotlib'} & set(sys.modules)"
    code = f"import moe_engine.log.logger, moe_engine.report.summary, sys; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
