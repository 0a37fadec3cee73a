import json
import math
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import flexjag
from flexjag.__main__ import main
from flexjag.algebra.masks import Causal, Window
from flexjag.api.explain import facts
from flexjag.api.plan import plan
from flexjag.cli import demo
from flexjag.cli import demo_arms as cli_arms
from flexjag.cli import explain as cli_explain
from flexjag.cli import options as cli_tools
from flexjag.cli.explain import parse_lengths
from flexjag.errors import CommandError
from flexjag.jagged import Jagged


def command(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(Path(flexjag.__file__).parents[1])}
    run = [sys.executable, "-m", "flexjag", *map(str, arguments)]
    return subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


def fails(capsys, arguments, *words):
    """The command exits with 2, prints one line on stderr with all of `words`, and nothing on stdout."""
    assert main([str(x) for x in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.endswith("\n")
    for word in words:
        assert word in printed.err


def is_progress(text):
    """Lines with the seconds so far."""
    return bool(text) and all(re.fullmatch(r" *\d+ s  .+", line) for line in text.splitlines())


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a busy machine quick work may take long enough to be told of."""
    monkeypatch.setattr(cli_tools, "PATIENCE", 60.0)


@pytest.fixture
def folder(tmp_path):
    """Four files of 1000, 700, 0 and 900 bytes, one of them a folder down."""
    (tmp_path / "files" / "deeper").mkdir(parents=True)
    for index, (name, size) in enumerate([("a", 1000), ("b", 700), ("c", 0), ("deeper/d", 900)]):
        content = bytes((7 * i + 31 * index) % 251 for i in range(size))
        (tmp_path / "files" / name).write_bytes(content)
    return tmp_path / "files"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flexjag {flexjag.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"], ["demo", "--help"]])
def test_help_names_what_there_is_and_hides_what_is_internal(capsys, arguments):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "usage: flexjag" in text
    assert "--arm" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["flexjag:", "COMMAND"]),
        (["bogus"], ["'bogus'", "demo", "explain"]),
        (["explain"], ["flexjag explain:", "--lengths"]),
        (["explain", "--lengths", "5", "--nonsense"], ["--nonsense"]),
        (["explain", "--lengths", "5", "--heads", "0"], ["--heads", "from 1", "'0'"]),
        (["explain", "--lengths", "5", "--dim", "x"], ["--dim", "'x'"]),
        (["explain", "--lengths", "5", "--block", "100"], ["block_size", "power of two", "100"]),
        (["explain", "--lengths", "5", "--mask", "causal & windw(3)"], ["--mask", "'windw'", "'window'", "column 10"]),
        (["explain", "--lengths", "5", "--mask", "\n"], ["--mask", "expected a mask"]),
        (["explain", "--lengths", "5", "--score", "alib"], ["--score", "'alib'", "'alibi'"]),
        (["explain", "--lengths", "5,5,5", "--mask", "prefix([1, 2])"], ["entries=2", "segments=3"]),
        (["explain", "--lengths", "5,5", "--kv-lengths", "5"], ["as many segments", "q=2", "k=1"]),
        (["explain", "--lengths", "5", "--kv-lengths", "five"], ["--kv-lengths", "'five'"]),
        (["demo", "--tokens", "0"], ["flexjag demo:", "--tokens", "'0'"]),
        (["demo", "--longest", "4097"], ["--longest", "4096"]),
        (["demo", "--budget", "nan"], ["--budget", "'nan'"]),
        (["demo", "--arm", "sdpa"], ["--arm"]),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(capsys, arguments, words):
    fails(capsys, arguments, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["N,N,...", "lognormal:MEAN,SIGMAxCOUNT", "''"]),
        ("1,,2", ["'1,,2'"]),
        ("1.5", ["'1.5'"]),
        ("3,-1", ["negative", "-1"]),
        ("poisson:3x4", ["'poisson:3x4'"]),
        ("lognormal:5x3", ["'lognormal:5x3'"]),
        ("uniform:1,2,3x4", ["'uniform:1,2,3x4'"]),
        ("uniform:1,5", ["'uniform:1,5'"]),
        ("uniform:1.5,2x3", ["'uniform:1.5,2x3'"]),
        ("uniform:9,1x3", ["LOW <= HIGH"]),
        ("constant:-1x3", ["0 <= LOW"]),
        ("constant:5x0", ["1 to 1048576 segments"]),
        ("lognormal:5,-1x3", ["SIGMA"]),
        ("lognormal:nan,1x3", ["MEAN"]),
        ("lognormal:99,1x3", ["at most 16777216 tokens"]),
        ("constant:9999999x9", ["at most 16777216 tokens"]),
        ("99999999999999999999", ["at most 16777216 tokens"]),
    ],
)
def test_lengths_that_cannot_be_read(capsys, text, words):
    fails(capsys, ["explain", "--lengths", text], "--lengths", *words)


def test_lengths_from_generators():
    assert parse_lengths("100, 0,50", 0) == [100, 0, 50]
    assert parse_lengths("constant:128x8", 0) == [128] * 8
    uniform = parse_lengths("uniform:1,3x1000", 0)
    assert set(uniform) == {1, 2, 3}
    assert uniform == parse_lengths("uniform:1,3x1000", 0) != parse_lengths("uniform:1,3x1000", 1)
    lognormal = parse_lengths("lognormal:5,0.9x10000", 0)
    logs = torch.tensor(lognormal, dtype=torch.float64).log()
    # Six standard errors of the mean, and of the standard deviation, of 10,000 draws.
    assert abs(float(logs.mean()) - 5) < 6 * 0.9 / 100
    assert abs(float(logs.std()) - 0.9) < 6 * 0.9 / math.sqrt(2 * 9999)
    assert parse_lengths("lognormal:-50,0x2", 0) == [1, 1]


def test_explain_prints_the_plan(capsys):
    mask = "causal & window(256)"
    assert main(["explain", "--lengths", "100,300,50", "--mask", mask, "--score", "alibi", "--heads", "4"]) == 0
    printed = capsys.readouterr()
    x = Jagged.from_lengths(torch.zeros(450, 4, 64), [100, 300, 50])
    made = plan(x, mask=Causal() & Window(256, 0), score=flexjag.Alibi.from_heads(4))
    assert printed.out == made.explain() + "\n"
    assert printed.err == ""


def test_explain_prints_one_json_object(capsys):
    lengths = ["--lengths", "uniform:1,64x6", "--kv-lengths", "uniform:0,99x6", "--seed", "3"]
    assert main(["explain", *lengths, "--mask", "causal(end)", "--block", "16", "--dim", "32", "--json"]) == 0
    printed = capsys.readouterr()
    q_lengths, kv_lengths = parse_lengths(lengths[1], 3), parse_lengths(lengths[3], 4)
    q, k = (Jagged.from_lengths(torch.zeros(sum(n), 8, 32), n) for n in (q_lengths, kv_lengths))
    assert json.loads(printed.out) == json.loads(json.dumps(facts(plan(q, k, mask=Causal("end"), block_size=16))))
    assert printed.err == ""


def test_explain_takes_no_memory_for_the_values_it_does_not_read(capsys):
    # 2**24 tokens of these heads would take 4 TB.
    x = cli_explain._batch([2**24], 1024, 64)
    assert x.values.shape == (2**24, 1024, 64)
    assert x.values.untyped_storage().nbytes() == 4
    assert (
        main(["explain", "--lengths", "200000", "--mask", "causal & window(8)", "--heads", "1024", "--dim", "65536"])
        == 0
    )
    assert "200000 tokens" in capsys.readouterr().out


def test_explain_of_nothing(capsys):
    assert main(["explain", "--lengths", "0,0"]) == 0
    assert "2 segments, 0 tokens" in capsys.readouterr().out


def test_ctrl_c_is_quiet(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_explain, "run", interrupted)
    assert main(["explain", "--lengths", "5"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_leaves_is_no_error():
    process = command("explain", "--lengths", "5,5")
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", ["no such file or folder", "nowhere"]),
        ("hollow", ["no files in folder", "hollow"]),
        ("void", ["empty"]),
    ],
)
def test_demo_says_what_it_cannot_read(capsys, tmp_path, name, words):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "void").touch()
    fails(capsys, ["demo", tmp_path / name], "PATH", *words)


def test_demo_says_what_it_cannot_draw_before_the_long_part(capsys, folder, monkeypatch):
    monkeypatch.setattr(demo, "_compare", None)
    fails(capsys, ["demo", folder, "--picture", folder / "x.nonsense"], "--picture", "nonsense")
    fails(capsys, ["demo", folder, "--picture", folder / "nowhere" / "x.png"], "nowhere")


def test_files_are_walked_in_order_and_packed_to_the_budget(folder):
    files = list(demo.find_files([str(folder), str(folder / "a")]))
    assert [str(f.relative_to(folder)) for f in files] == ["a", "b", "c", "deeper/d", "a"]
    packed = demo.pack(files, tokens=2000, longest=800)
    assert packed.bytes.lengths.tolist() == [800, 700, 0, 500]
    assert packed.cut == 2
    segments = [bytes(x.tolist()) for x in packed.bytes.to_list()]
    assert segments == [f.read_bytes()[:n] for f, n in zip(packed.paths, [800, 700, 0, 500], strict=True)]
    exact = demo.pack(files[:2], tokens=1700, longest=1000)
    assert (exact.bytes.lengths.tolist(), exact.cut) == ([1000, 700], 0)


def test_the_default_is_the_standard_library():
    files = list(demo.find_files([]))
    assert Path(os.__file__).resolve() in [f.resolve() for f in files]
    assert files == list(demo.find_files([]))  # shuffled, always in the same way
    library = Path(sysconfig.get_path("stdlib"))
    assert all(f.is_relative_to(library) and "site-packages" not in f.parts for f in files)
    assert len({f.parent for f in files}) > 10


def attended():
    lengths = [300, 0, 20, 1, 90]
    x = Jagged.from_lengths(torch.arange(sum(lengths)).remainder(251).to(torch.uint8), lengths)
    inputs = demo.make_inputs(x)
    return inputs, demo.attend(inputs, plan(inputs.q, inputs.k, mask=demo.MASK))


def test_the_check_passes_what_is_right():
    checks = demo.check(*attended())
    assert list(checks) == ["output", "dq", "dk", "dv"]
    for c in checks.values():
        assert c.passed
        assert 0 < c.error <= c.tolerance < 1e-4


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("wrong", [1e-3, math.nan])
def test_the_check_fails_what_is_wrong(which, wrong):
    inputs, seen = attended()
    seen[which][5] += wrong  # a row of the longest segment, which is in every sample
    assert [c.passed for c in demo.check(inputs, seen).values()] == [index != which for index in range(4)]


@pytest.mark.parametrize("name", ["sdpa", "dense"])
def test_the_arms_compute_the_same(name):
    inputs, seen = attended()
    assert torch.equal(cli_arms.ARMS["flexjag"].prepare(inputs)(), seen[0])
    step = cli_arms.ARMS[name].prepare(inputs)
    # Two float32 results of the same sums, of values below 1, over at most 257 keys.
    torch.testing.assert_close(step(), seen[0], rtol=0, atol=257 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(step(), step(), rtol=0, atol=0)


def test_a_wrong_result_is_told_and_exits_with_1(capsys, folder, monkeypatch):
    monkeypatch.setattr(cli_tools, "PATIENCE", 0.0)
    right = demo.attend
    monkeypatch.setattr(demo, "attend", lambda *given: [x + 1e-2 for x in right(*given)])
    monkeypatch.setattr(cli_arms, "measure_memory", lambda name, arguments: 12_345_678)
    arguments = ["demo", str(folder), "--longest", "200", "--budget", "0", "--picture", ""]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out.count("DIFFERS FROM THE REFERENCE") == 4
    assert is_progress(printed.err)
    assert main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    flexjag_arm, sdpa, dense = report["arms"]
    assert (flexjag_arm["skipped"], flexjag_arm["extra_bytes"]) == (None, 12_345_678)
    for arm in (sdpa, dense):
        assert arm["skipped"].startswith("would need")
        assert arm["seconds"] is arm["extra_bytes"] is None


def test_demo_for_people(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_tools, "PATIENCE", 0.0)

    def measured(name, arguments):
        if name == "dense":
            raise CommandError("measuring dense failed with exit code -9: nothing")
        return {"flexjag": 2_000_000, "sdpa": 5_000_000}[name]

    monkeypatch.setattr(cli_arms, "measure_memory", measured)
    picture = tmp_path / "mask.png"
    assert main(["demo", str(folder), "--longest", "100", "--picture", str(picture)]) == 0
    printed = capsys.readouterr()
    assert is_progress(printed.err)
    assert "4 files (3 cut short), 300 bytes; padded to 100: 400 places, 25% of them empty" in printed.out
    assert printed.out.count("agrees with the reference") == 4
    assert "Causal() & Window(256, 0)" in printed.out
    rows = {line.split("│")[1].strip(): line for line in printed.out.splitlines() if line.startswith("│")}
    assert "2.0 MB" in rows["flexjag"]
    assert "5.0 MB" in rows["padded SDPA + mask"]
    assert "2.5" in rows["padded SDPA + mask"]
    assert "skipped" in rows["padded dense softmax"]
    assert "padded dense softmax is skipped: measuring dense failed with exit code -9: nothing" in printed.out
    assert str(picture) in printed.out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_failed_measurement_of_flexjag_itself_is_an_error(tmp_path):
    with pytest.raises(CommandError, match=r"measuring flexjag failed with exit code 2: .*nowhere"):
        cli_arms.measure_memory("flexjag", [str(tmp_path / "nowhere")])


@pytest.mark.slow
def test_demo_for_machines_in_a_process_of_its_own(folder, tmp_path):
    picture = tmp_path / "mask.svg"
    process = command("demo", folder, "--tokens", "2048", "--json", "--picture", picture, cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    report = json.loads(out)
    assert report["files"] == [str(folder / name) for name in ("a", "b", "c", "deeper/d")]
    assert report["lengths"] == [1000, 700, 0, 348]
    assert (report["tokens"], report["padded_tokens"]) == (2048, 4000)
    assert report["plan"]["mask"] == "Causal() & Window(256, 0)"
    assert report["plan"]["tokens_q"] == 2048
    assert report["passed"] is True
    assert all(c["passed"] and c["error"] <= c["tolerance"] for c in report["check"].values())
    assert picture.read_text().lstrip().startswith("<?xml")
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert list(arms) == ["flexjag", "sdpa", "dense"]
    for arm in arms.values():
        times = arm["seconds"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
        assert times["runs"] >= 3
        assert arm["skipped"] is None
    if sys.platform == "linux":
        # The gradient of a softmax takes its output and its gradient and makes a third matrix of scores, 4 bytes each.
        assert arms["dense"]["extra_bytes"] >= 3 * 4 * 4 * demo.HEADS * 1000**2
        assert arms["dense"]["extra_bytes"] > arms["flexjag"]["extra_bytes"] > 0
