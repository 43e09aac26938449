"""The command line as its users meet it: exit codes, one-line errors, files on disk, runs that stop and go on."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from .command import command, environment, one_line, ttt4as

COMMANDS = ("demo", "fit", "predict", "evaluate", "segment", "serve", "info", "bench")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str) -> None:
    text = ttt4as(name, "--help").stdout
    assert "Examples" in text
    assert f"ttt4as {name}" in text
    assert len(text.splitlines()) > 8


def test_help_explains_arguments() -> None:
    text = " ".join(ttt4as("predict", "--help").stdout.split())
    assert "File from ttt4as fit." in text and "Image files, and folders of them." in text


def test_arguments_are_written_alike() -> None:
    for name in COMMANDS:
        (usage,) = (line for line in ttt4as(name, "--help").stdout.splitlines() if "Usage:" in line)
        names = re.sub(r"[\[\]{}.]", "", usage.partition("[OPTIONS]")[2])
        assert names == names.upper(), usage


def test_help_shows_brackets_as_they_are() -> None:
    assert "pip install 'ttt4as_fast[serve]'" in " ".join(ttt4as("serve", "--help").stdout.split())


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys\ntry:\n    from ttt4as_fast.cli import main; sys.argv = ['ttt4as', '--help']; main()\n"
    code += "except SystemExit: pass\nprint('LOADED', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split("LOADED")[1].split())
    assert all(name in done.stdout for name in COMMANDS)
    assert not loaded & {"torch", "timm", "numba", "scipy", "sklearn", "skimage", "matplotlib", "cupy"}


def test_version() -> None:
    from ttt4as_fast import __version__

    assert ttt4as("--version").stdout.strip() == f"ttt4as {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["demo", "--texture", "wood"],
        ["demo", "--seed", "-1"],
        ["fit"],
        ["predict", "m"],
        ["fit", ".", "--model", "m", "--validation-share", "1.5"],
        ["segment", "a", "b", "--output", "o", "--loss", "cubic"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ttt4as(*arguments, code=2).stderr.strip()
    assert not list(tmp_path.iterdir())


def test_info_names_every_operation_and_variable() -> None:
    found = json.loads(ttt4as("info", "--json", TTT4AS_BACKEND="reference").stdout)
    assert {"bilinear", "knn", "coreset", "peaks", "linear_svm", "segment"} <= set(found["backends"]["cpu"])
    assert all(backends["reference"] is None for backends in found["backends"]["cpu"].values())
    assert "gpu" in found["backends"]["cuda"]["knn"]  # and why not
    assert found["environment"]["TTT4AS_BACKEND"]["value"] == "reference"
    assert found["versions"]["torch"]
    assert found["environment"]["TTT4AS_BACKEND"]["remark"] is None
    text = ttt4as("info", TTT4AS_BACKEND="[nope]").stdout
    words = ("linear_svm", "TTT4AS_NUM_THREADS", "TTT4AS_CUDA_GRAPHS", "usable", "all raise", "'[nope]'")
    for word in (*words, found["versions"]["torch"]):
        assert word in text


def test_info_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None  # an import of it now fails as if it were absent\n"
    code += "import json; from ttt4as_fast import installation; found = installation.describe()\n"
    code += "assert len(list(installation.tables(found))) == 4; print(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torch_threads"] is None and found["cuda"] is None
    assert found["backends"]["cpu"]["segment"]["reference"] is None
    assert all("torch" in backends["gpu"] for backends in found["backends"]["cuda"].values() if "gpu" in backends)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is needed")
def test_a_checkout_may_have_a_name_that_no_locale_decodes(tmp_path: Path) -> None:
    from ttt4as_fast.installation import checkout

    root = tmp_path / os.fsdecode(b"\xff")
    (root / "kernels" / "cpp").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", root], check=True)
    assert checkout(root / "kernels").samefile(root)


def test_info_says_where_a_backend_of_the_environment_is_missing() -> None:
    from ttt4as_fast import kernels
    from ttt4as_fast.installation import _remark

    assert all(_remark(backend, kernels.backends()) is None for backend in (None, "", "auto", "cpu"))
    assert _remark("nope", kernels.backends()) == "all raise: no backend 'nope'"
    some = _remark("numba", kernels.backends())
    assert some.startswith("bilinear, knn") and "peaks" not in some and some.endswith("raise: no backend 'numba'")


def test_tables_keep_what_stands_in_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.table import Table

    from ttt4as_fast.terminal import print_table

    table = Table("backend", "[b]", title="of [one]")
    table.add_row("gpu", "pip install 'ttt4as_fast[gpu]'")
    print_table(table)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[b]", "of [one]", "'ttt4as_fast[gpu]'"))
    monkeypatch.setattr(sys, "stdout", None)  # closed, as `>&-` has it
    print_table(table)


def test_debug_shows_the_traceback(work: Path) -> None:
    wrong = ("predict", work / "absent", work / "one", "-o", work / "never")
    for arguments, more in ((("--debug", *wrong), {}), (wrong, {"TTT4AS_DEBUG": "1"})):
        done = subprocess.run(
            command(*arguments), cwd="/", env=environment(**more), capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "Traceback" in done.stderr


@pytest.mark.parametrize("off", ["0", ""])
def test_debug_can_be_off(tmp_path: Path, off: str) -> None:
    one_line(ttt4as("predict", tmp_path / "absent", tmp_path, "-o", tmp_path / "never", code=2, TTT4AS_DEBUG=off))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_output(work: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    image = work / "one" / "grey.png"
    assert "locked" in one_line(
        ttt4as("predict", work / "m.safetensors", image, "-o", tmp_path / "locked" / "o", code=2)
    )
    assert "locked" in one_line(ttt4as("fit", work, "-m", tmp_path / "locked" / "m.safetensors", code=2))


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
def test_a_reader_who_has_had_enough_is_no_error() -> None:
    process = subprocess.Popen(command("info"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() != 0


def test_demo_runs(tmp_path: Path) -> None:
    done = ttt4as("demo", "--texture", "brick", "--output", tmp_path / "d", "--seed", 1)
    summary = json.loads((tmp_path / "d" / "summary.json").read_text("utf-8"))
    assert summary["f1_ttt4as"] > summary["f1_threshold"]
    assert f"f1_ttt4as {summary['f1_ttt4as']:.3f}" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("place", ["predict", "evaluate", "segment", "serve", "TTT4AS", "TTT4ASPostProcessor"])
def test_the_method_has_the_same_defaults_everywhere(place: str) -> None:
    from ttt4as_fast import TTT4AS, cli
    from ttt4as_fast.kernels.segment import SegmentOptions

    if place == "TTT4ASPostProcessor":
        pytest.importorskip("anomalib")
        from ttt4as_fast.integrations.anomalib import TTT4ASPostProcessor as function
    else:
        function = TTT4AS if place == "TTT4AS" else getattr(cli, place)
    parameters = inspect.signature(function).parameters
    for option in fields(SegmentOptions):
        if option.name == "image_threshold" and place in ("evaluate", "TTT4ASPostProcessor"):
            continue  # judged with and without; the host's
        default = parameters["svm_c" if option.name == "C" and "svm_c" in parameters else option.name].default
        assert getattr(default, "value", default) == option.default, option.name
