"""A table's rows and seeds run once each, whatever stops them, and its figures are those of its files."""

import json
import os
import select
import shlex
import signal
import statistics
import sys
from pathlib import Path

import pytest

from audiotext_dist.errors import UserError
from audiotext_dist.training.recipe import read_recipe
from launch import reproduce
from launch.reproduction import runner
from launch.reproduction.runner import Place, Runner, places
from launch.reproduction.summary import as_markdown, summarise, write_summary
from launch.reproduction.table import Table, read_table, resolve

TABLES = sorted((Path(__file__).parents[1] / "launch" / "tables").glob("*.yaml"))
# Writes one result, and a line into a log of what ran.
STEP = """
import json, os, sys
from pathlib import Path
log, folder, row, seed, value = sys.argv[1:]
with open(log, "a") as file:
    file.write(f"{row} {seed}\\n")
pipe = Path(log).with_name("pipe")
if pipe.exists() and row == "second":
    pipe.write_text(str(os.getpid()))
    Path(log).with_name("never").read_text()
if value == "broken":
    print("first\\nCUDA is out of memory")
    sys.exit(3)
metrics = {"metrics": {"R@1": float(value) + int(seed) / 100}, "chance": {"R@1": 0.05}}
Path(folder, "retrieval.json").write_text(
    json.dumps([{"set_name": "test", "directions": {"audio->text": metrics}}])
)
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "step.py").write_text(STEP)
    (tmp_path / "table.yaml").write_text(f"""
title: Tiny
out: {tmp_path / "out"}
seeds: [0, 2]
variables: {{value: 0.1, log: {tmp_path / "log"}}}
prepare:
  data: python -c "open('{tmp_path / "log"}', 'a').write('prepare\\n')"
steps:
  make: ${{launch}} {tmp_path / "step.py"} ${{log}} ${{folder}} ${{row}} ${{seed}} ${{value}}
columns:
  A->T: {{file: "${{folder}}/retrieval.json", metric: test/audio->text/R@1}}
rows:
  first: {{paper: {{A->T: 12.5}}}}
  second: {{title: the second, variables: {{value: 0.3}}, after: [first]}}
""")
    return tmp_path / "table.yaml"


def ran(file: Path) -> list[str]:
    return file.with_name("log").read_text().splitlines()


def test_rows_and_seeds_run_once_and_give_mean_and_deviation(file):
    table = read_table(str(file), [])
    assert Runner(table).run() == {}
    assert ran(file) == ["prepare", "first 0", "second 0", "first 2", "second 2"]
    assert Runner(table).run() == {}
    assert len(ran(file)) == 5, "what is done is not run again"
    cell = summarise(table)["second"]["A->T"]
    assert cell.by_seed == pytest.approx({0: 30.0, 2: 32.0})
    assert (cell.mean, cell.deviation) == pytest.approx((31.0, statistics.stdev([30, 32])))
    text = write_summary(table, summarise(table), {})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [line for line in lines if line[0] in ("first", "the second", "chance")] == [
        ["first", "2/2", "11.00 ± 1.41 [12.50]"],
        ["the second", "2/2", "31.00 ± 1.41"],
        ["chance", "", "5.00"],
    ]
    found = json.loads((Path(table.out) / "table.json").read_text())
    assert found["rows"]["first"]["A->T"]["by_seed"] == pytest.approx({"0": 10.0, "2": 12.0})
    assert (Path(table.out) / "table.png").stat().st_size > 1000


def test_differences_are_of_the_same_seed(file):
    table = read_table(str(file), ["differences={second over first: [second, first]}", "rows.second.paper={A->T: 10}"])
    Runner(table).run()
    (table.folder("first", 2) / "make.json").unlink()
    lines = write_summary(table, summarise(table), {}).splitlines()
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert ["second over first", "1/2", "+20.00 [-2.50]"] in shown, "the only seed that both rows have"
    found = json.loads((Path(table.out) / "table.json").read_text())["differences"]["second over first"]["A->T"]
    assert found["by_seed"] == pytest.approx({"0": 20.0})
    alone = read_table(str(file), ["differences={second over first: [second, first]}", "only=[first]"])
    assert "over first" not in as_markdown(alone, summarise(alone)), "a row that was not asked for"


def test_rows_are_drawn_as_lines_over_a_variable(file):
    table = read_table(str(file), ["lines={x: value, line: row}", "name=lines"])
    Runner(table).run()
    write_summary(table, summarise(table), {})
    assert (Path(table.out) / "lines.png").stat().st_size > 1000
    assert not (Path(table.out) / "table.png").exists(), "it is another table's"
    wrong = read_table(str(file), ["lines={x: log}"])
    with pytest.raises(UserError, match=r"lines\.x=log is '.*' in row 'first', which is no number"):
        write_summary(wrong, summarise(wrong), {})


def test_a_failed_row_is_named_and_the_others_go_on(file, monkeypatch, capsys):
    words = ["rows.first.variables.value=broken", "rows.third={}", "jobs=2"]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", str(file), *words])
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    said = capsys.readouterr().out
    assert ended.value.code == 1
    assert "failed: first seed 0: first seed 0 make ended with 3, see " in said
    assert "first | CUDA is out of memory" in said
    assert "failed: second seed 2: needs first, which failed" in said
    assert sorted(ran(file)) == ["first 0", "first 2", "prepare", "third 0", "third 2"]
    table = read_table(str(file), words)
    assert [cells["A->T"].text() for cells in summarise(table).values()] == ["- [12.50]", "-", "11.00 ± 1.41"]
    mended = read_table(str(file), ["only=[second]"])
    assert Runner(mended).run() == {}, "a row alone runs, be it done or not what it follows"


def test_figures_of_a_row_that_is_not_through_do_not_count(file):
    table = read_table(str(file), ["seeds=[0]", "steps.then=ls nowhere"])
    assert "first seed 0 then ended with " in Runner(table).run()["first seed 0"]
    assert (table.folder("first", 0) / "retrieval.json").is_file()
    assert summarise(table)["first"]["A->T"].by_seed == {}


def test_a_kill_leaves_no_process_and_loses_one_step(file):
    table = read_table(str(file), ["seeds=[0]"])
    pipe, never = file.with_name("pipe"), file.with_name("never")
    os.mkfifo(pipe)
    os.mkfifo(never)
    child = os.fork()
    if child == 0:
        Runner(table).run()
        os._exit(0)
    step = os.pidfd_open(int(pipe.read_text()))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert select.select([step], [], [], 30)[0], "the step ends with the command"
    pipe.unlink()
    assert not json.loads((table.folder("second", 0) / "make.json").read_text())["ended"]
    assert Runner(table).run() == {}
    assert ran(file) == ["prepare", "first 0", "second 0", "second 0"]


def test_a_step_whose_command_changed_is_refused(file):
    assert Runner(read_table(str(file), ["seeds=[0]"])).run() == {}
    failed = Runner(read_table(str(file), ["seeds=[0]", "variables.value=0.2"])).run()
    assert "first seed 0 make was made by another command: remove" in failed["first seed 0"]
    assert failed.keys() == {"first seed 0", "second seed 0"}, "the second has a value of its own, but comes after"


def test_a_step_whose_command_only_looks_otherwise_is_not_run_again(file):
    assert Runner(read_table(str(file), ["seeds=[0]"])).run() == {}
    again = f"${{launch}}  {file.with_name('step.py')} ${{log}} ${{folder}} '${{row}}' ${{seed}} ${{value}} ${{more}}"
    file.write_text(file.read_text().replace("value: 0.1,", "value: 0.1, more: '',"))
    assert Runner(read_table(str(file), ["seeds=[0]", f"steps.make={again}"])).run() == {}
    assert ran(file) == ["prepare", "first 0", "second 0"]


def test_words_may_name_what_belongs_to_a_row(file):
    table = read_table(str(file), ["variables.value=0.${seed}", "rows.third={variables: {log: '${folder}/log'}}"])
    names = table.names_of("third", 2)
    assert resolve("${value} ${log}", {**names, "launch": ""}, "third") == f"0.2 {table.folder('third', 2)}/log"


def test_on_gpus_each_job_has_its_own(file, monkeypatch):
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place.gpus for place in places(read_table(str(file), []))] == [("0",), ("1",), ("2",), ("3",), ("4",)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,8,7,6,5")
    both = places(read_table(str(file), ["gpus_a_job=2"]))
    assert [place.gpus for place in both] == [("9", "8"), ("7", "6")]
    assert both[1].environment()["CUDA_VISIBLE_DEVICES"] == "7,6"
    assert both[1].launch().startswith("deepspeed --log_level warning --master_port ")
    assert Place(gpus=("3",), num_threads=1).launch() == "python"
    with pytest.raises(UserError, match="gpus_a_job=6, but there are 5 GPUs"):
        places(read_table(str(file), ["gpus_a_job=6"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sedes=[1]"], "unknown key 'sedes': did you mean 'seeds'"),
        (["seeds=[]"], "has no seeds: give some"),
        (["variables.num_trian=1"], r"has no variables\.num_trian: it has "),
        (["only=[third]"], "only=third is no row of .*: the rows are first, second"),
        (["rows.second.after=[third]"], "row 'second' of .* is after 'third', which is no row above it"),
        (["rows.second.paper.X=1"], "has the paper's 'X', which is no column"),
        (["steps={}"], "row 'first' of .* has no steps"),
        (["columns.B.file=a"], r"'columns.B.metric' in .* has no value"),
        (["differences={a: [first]}"], r"the difference 'a' of .* is \[first\]: give two of first, second"),
        (["differences={a: [first, third]}"], r"the difference 'a' of .* is \[first, third\]: give two of "),
        (["jobs=0"], "jobs=0 and gpus_a_job=1 must be above 0"),
    ],
)
def test_a_wrong_table_is_one_line(file, words, message):
    with pytest.raises(UserError, match=message):
        read_table(str(file), words)


def test_names_are_replaced_and_an_unknown_one_is_told():
    assert resolve("a ${x} {b: '${y}'}", {"x": "${y}-1", "y": 2}, "here") == "a 2-1 {b: '2'}"
    with pytest.raises(UserError, match=r"here: .*'z' not found; known names are x"):
        resolve("${z}", {"x": 1}, "here")


def test_a_metric_that_is_not_there_is_named(file):
    table = read_table(str(file), ["columns.A->T.metric=test/audio->text/R@2"])
    Runner(table).run()
    with pytest.raises(UserError, match=r"retrieval.json holds no 'test/audio->text/R@2'"):
        summarise(table)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_of_the_repository_is_whole(path):
    table = read_table(str(path), [])
    assert isinstance(table, Table)
    for row, seed in table.jobs_in_order():
        if seed != table.seeds[-1]:  # the others differ in nothing else
            continue
        names = table.names_of(row, seed, launch="python")
        for name, command in table.steps_of(row).items():
            program, *words = shlex.split(resolve(command, names, f"{row} {name}"))[1:]
            if program == "launch/pretrain.py":
                recipe = read_recipe(words)
                assert recipe.training.seed in (seed, int(f"10{seed}")), name
                assert Path(recipe.run_dir).is_relative_to(table.folder(row, seed)), name
    for command in table.prepare.values():
        resolve(command, {**table.variables, "out": table.out, "launch": "python"}, "prepare")
    assert as_markdown(table, summarise(table))


def test_tables_that_share_a_folder_do_not_overwrite_each_other():
    tables = [read_table(str(path), []) for path in TABLES]
    assert len({(table.out, table.name) for table in tables}) == len(tables)
