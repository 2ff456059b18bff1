"""The harness of Autobahn's suite: what it forgives, and what it must not.

The suite itself is run by ``tests/autobahn/run.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .autobahn import run
from .autobahn.run import CannotRun, Summary, choose, echo_server, fuzz, main, suite, summarise


def write_reports(folder: Path, verdicts: dict[str, tuple[str, str]]) -> None:
    """What the suite leaves behind, as far as it is read."""
    index = {}
    for case, (behavior, close) in verdicts.items():
        name = f"trio_case_{case.replace('.', '_')}.json"
        index[case] = {"behavior": behavior, "behaviorClose": close, "reportfile": name}
        text = b'{"description": "Send <b>%s</b> &amp; wait", "wire": "\xff"}' % case.encode()
        (folder / name).write_bytes(text)
    (folder / "index.json").write_text(json.dumps({"trio": index}))


def judged(folder: Path, **second: str) -> Summary:
    """The summary of two cases, of which the first is fine."""
    verdict = (second.get("behavior", "OK"), second.get("close", "OK"))
    write_reports(folder, {"1.1.1": ("OK", "OK"), "7.1.6": verdict})
    return summarise(folder, "trio", ["1.1.1", "7.1.6"], 1.5)


# The strict summary


@pytest.mark.parametrize("behavior", ["OK", "INFORMATIONAL"])
@pytest.mark.parametrize("close", ["OK", "INFORMATIONAL"])
def test_ok_and_informational_are_fine(tmp_path: Path, behavior: str, close: str) -> None:
    summary = judged(tmp_path, behavior=behavior, close=close)
    assert summary.fine
    assert summary.problems == []
    assert sum(summary.counts.values()) == 2


@pytest.mark.parametrize("behavior", ["NON-STRICT", "FAILED", "UNIMPLEMENTED", "NEVER HEARD OF"])
def test_a_case_that_is_anything_else_is_a_problem(tmp_path: Path, behavior: str) -> None:
    summary = judged(tmp_path, behavior=behavior)
    assert not summary.fine
    assert (summary.counts["OK"], summary.counts[behavior]) == (1, 1)
    [problem] = summary.problems
    report = str(tmp_path / "trio_case_7_1_6.json")
    assert problem == ("7.1.6", behavior, "OK", "Send 7.1.6 & wait", report)
    assert str(problem) == f"7.1.6: {behavior}, close OK\n    Send 7.1.6 & wait\n    {report}"


@pytest.mark.parametrize("close", ["UNCLEAN", "WRONG CODE", "FAILED BY CLIENT", "FAILED"])
def test_a_bad_close_is_a_problem_of_a_case_that_is_ok(tmp_path: Path, close: str) -> None:
    summary = judged(tmp_path, close=close)
    assert not summary.fine
    assert (summary.counts["OK"], summary.counts["BAD CLOSE"]) == (2, 1)
    assert [problem.close for problem in summary.problems] == [close]


def test_a_case_that_was_not_run_is_a_problem(tmp_path: Path) -> None:
    write_reports(tmp_path, {"1.1.1": ("OK", "OK")})
    summary = summarise(tmp_path, "trio", ["1.1.1", "1.1.2"], 1.5)
    assert not summary.fine
    assert summary.counts["MISSING"] == 1
    assert [problem.case for problem in summary.problems] == ["1.1.2"]


def test_reports_of_another_loop_are_none(tmp_path: Path) -> None:
    write_reports(tmp_path, {"1.1.1": ("OK", "OK")})
    assert not summarise(tmp_path, "asyncio", ["1.1.1"], 1.5).fine


def test_nothing_run_is_not_fine(tmp_path: Path) -> None:
    write_reports(tmp_path, {})
    assert not summarise(tmp_path, "trio", [], 1.5).fine
    assert not Summary("trio").fine


def test_a_row_stands_below_its_columns(tmp_path: Path) -> None:
    row = str(judged(tmp_path, behavior="FAILED", close="UNCLEAN"))
    assert row.split() == ["trio", "1", "0", "0", "1", "0", "1", "0", "1.5"]


# Which cases


@pytest.mark.parametrize(
    ("preset", "count"), [("protocol", 247), ("fast", 364), ("compression", 63), ("all", 517)]
)
def test_a_preset_has_as_many_cases_as_it_should(preset: str, count: int) -> None:
    cases = choose(preset)
    assert len(cases) == len(set(cases)) == count


def test_the_presets_have_the_sections_they_are_named_for() -> None:
    sections = {
        preset: {int(case.partition(".")[0]) for case in choose(preset)} for preset in run.PRESETS
    }
    assert sections == {
        "protocol": {1, 2, 3, 4, 5, 6, 7, 10},
        "fast": {1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 13},
        "compression": {12, 13},
        "all": {1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 13},
    }


def test_ids_and_patterns_are_cases_in_the_order_of_the_suite() -> None:
    assert choose("10.1.1,1.1.[12],1.1.1") == ["1.1.1", "1.1.2", "10.1.1"]
    assert choose("7.5.*") == ["7.5.1"]


def test_a_pattern_without_a_case_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no case '8\.\*'"):
        choose("1.*,8.*")
    with pytest.raises(SystemExit) as ended:
        main(["8.*"])
    assert ended.value.code == 2


# What it says when it could not run


@pytest.fixture
def no_python27(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.delenv("PYTHON27", raising=False)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Stands in for a Python: a shell script, without a body yet."""
    path = tmp_path / "python2.7"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.usefixtures("no_python27")
def test_a_machine_without_python_2_7_has_an_exit_status_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["protocol", "--suite", str(tmp_path / "suite")]) == 3
    assert "no CPython 2.7" in capsys.readouterr().err
    assert not (tmp_path / "suite").exists()


@pytest.mark.usefixtures("no_python27")
def test_a_shim_on_the_path_that_does_not_work_is_no_python(tmp_path: Path, script: Path) -> None:
    script.write_text("#!/bin/sh\necho CPython\nexit 127\n")
    assert main(["protocol", "--suite", str(tmp_path / "suite")]) == 3


@pytest.mark.usefixtures("no_python27")
def test_a_wrong_python27_variable_is_not_forgiven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHON27", str(tmp_path / "nowhere"))
    assert main(["protocol", "--suite", str(tmp_path / "suite")]) == 2
    assert "PYTHON27=" in capsys.readouterr().err


def test_a_virtualenv_that_is_complete_is_used_as_it_is(tmp_path: Path, script: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    script.write_text("#!/bin/sh\necho CPython\n")
    script.rename(venv / "bin" / "python")
    (venv / "complete").write_text(run.REQUIREMENTS.read_text())
    assert suite(tmp_path) == venv / "bin" / "python"


@pytest.mark.usefixtures("no_python27")
def test_a_virtualenv_of_other_requirements_is_not_complete(tmp_path: Path, script: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    script.write_text("#!/bin/sh\necho CPython\n")
    script.rename(venv / "bin" / "python")
    (venv / "complete").write_text("autobahntestsuite==0.8.2\n")
    with pytest.raises(run.NoPython27):
        suite(tmp_path)


def test_a_suite_without_a_report_did_not_run(tmp_path: Path, script: Path) -> None:
    script.write_text("#!/bin/sh\necho refused\n")
    (tmp_path / "index.json").write_text("of the last run")
    with pytest.raises(CannotRun, match="no report\n    refused"):
        fuzz(script, 9, "trio", ["1.1.1"], tmp_path, 30)


def test_a_suite_without_an_end_is_ended(tmp_path: Path, script: Path) -> None:
    script.write_text("#!/bin/sh\necho began\nexec sleep 60\n")
    with pytest.raises(CannotRun, match="no end"):
        fuzz(script, 9, "trio", ["1.1.1"], tmp_path, 0.2)


def test_a_loop_on_which_the_suite_could_not_run_is_neither_fine_nor_a_failed_case(
    tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(run, "suite", lambda folder: script)
    results = tmp_path / "results.json"
    arguments = ["--loops", "asyncio", "--out", str(tmp_path), "--json", str(results)]
    assert main(["1.1.1", *arguments]) == 2
    [result] = json.loads(results.read_text())
    assert (result["loop"], result["fine"]) == ("asyncio", False)
    assert "the suite ended with 1" in result["error"]


def test_the_server_ends_with_its_starter(tmp_path: Path) -> None:
    with echo_server("asyncio", tmp_path / "log") as (server, port):
        assert port > 0
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(20) == 0


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "HERE", tmp_path)  # where there is none
    with (
        pytest.raises(CannotRun, match=r"did not start\n.*server\.py"),
        echo_server("asyncio", tmp_path / "log"),
    ):
        raise AssertionError("it started")
