"""What a config that cannot be understood is told: every complaint with file, line, key and remedy."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from nexa_infra.errors import ConfigError
from nexa_infra.spec.load import MOST_BYTES, MOST_COMPLAINTS, code_root, load_config, locate, problem_at, read_config

BAD = Path(__file__).parent / "bad_config"
CASES = sorted(path for path in BAD.iterdir() if path.suffix != ".expected")

GOOD = """\
job:
  name: t
  time: "08:00:00"
launcher: {script: train.py}
sweep:
  base_args: [--epochs, "2"]
  parameters:
    lr: [2e-5, 1e-5]
    batch_size: [8, 16]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a program, in which the test stands."""
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(path: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_a_bad_config_is_told_what_is_wrong_and_leaves_nothing_on_disk(case: Path, project: Path) -> None:
    shutil.copy(case, project)
    before = sorted(project.rglob("*"))

    told = refusal(case.name)

    expected = case.with_suffix(".expected").read_text().removesuffix("\n")
    assert told.replace(str(project.resolve()), "DIR") == expected
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_no_complaint_speaks_the_language_of_the_libraries(case: Path, project: Path) -> None:
    shutil.copy(case, project)
    with pytest.raises(ConfigError) as caught:
        load_config(case.name)
    for problem in caught.value.problems:
        assert problem.file == case.name
        assert problem.line
        for jargon in ("Input should", "Value error", "valid string", "dictionary", "[type=", "Traceback", "pydantic"):
            assert jargon not in str(problem)
    lines = [problem.line or 0 for problem in caught.value.problems]
    assert lines == sorted(lines)


def test_every_case_has_its_expected_message() -> None:
    assert len(CASES) > 100
    assert {case.stem for case in CASES} == {path.stem for path in BAD.glob("*.expected")}


def test_a_file_that_is_not_there_is_told_with_the_nearest_name(project: Path) -> None:
    (project / "digits.yaml").touch()
    assert refusal("digit.yaml") == "digit.yaml: there is no such file (did you mean 'digits.yaml'?)"
    assert refusal("zzz") == "zzz: there is no such file; the folder has digits.yaml"
    assert refusal("configs/digits.yaml") == "configs/digits.yaml: there is no such file: there is no folder configs"


def test_a_folder_is_no_config(project: Path) -> None:
    (project / "configs").mkdir()
    assert refusal("configs") == "configs: is a folder, not a config file, and holds none"
    (project / "configs" / "a.yaml").touch()
    assert refusal("configs") == "configs: is a folder, not a config file: name a file in it, such as a.yaml"


def test_a_path_that_cannot_be_opened_is_told_in_the_system_s_words(project: Path) -> None:
    assert refusal("train.py/a.yaml") == "train.py/a.yaml: cannot be read: Not a directory"
    assert refusal("a\0b") == "a\0b: cannot be read: embedded null byte"
    assert "cannot be read: File name too long" in refusal("x" * 300)


def test_a_very_large_file_is_refused_without_being_read_whole(project: Path) -> None:
    with Path("big.yaml").open("wb") as file:
        file.truncate(MOST_BYTES * 1000)
    assert refusal("big.yaml").startswith("big.yaml: is larger than 16 MiB")
    assert refusal("/dev/zero").startswith("/dev/zero: is larger than 16 MiB")


def test_nesting_that_would_overflow_a_stack_is_one_error(project: Path) -> None:
    Path("deep.yaml").write_text("sweep: " + "[" * 1_000_000)
    assert "nests deeper than 64 levels" in refusal("deep.yaml")
    Path("deep.yaml").write_text("sweep: " + "{a: " * 300_000)
    assert "nests deeper than 64 levels" in refusal("deep.yaml")


def test_an_anchor_bomb_is_refused_at_once(project: Path) -> None:
    row = "{" + ", ".join(f"p{number}: x" for number in range(1000)) + "}"
    Path("bomb.yaml").write_text(f"launcher: {{script: train.py}}\nsweep:\n  trials: [&a {row}, {'*a, ' * 100_000}]\n")
    started = time.monotonic()
    assert "the aliases of this file grow to more than 200,000 values" in refusal("bomb.yaml")
    assert time.monotonic() - started < 10


def test_ten_thousand_wrong_rows_are_told_in_a_page(project: Path) -> None:
    rows = "".join(f"    - {{lr: [{number}]}}\n" for number in range(10_000))
    Path("rows.yaml").write_text(f"launcher: {{script: train.py}}\nsweep:\n  trials:\n{rows}")
    told = refusal("rows.yaml").splitlines()
    assert len(told) == MOST_COMPLAINTS + 1
    assert told[0].startswith("rows.yaml:4: sweep.trials[0].lr: ")
    assert told[-1] == "rows.yaml: and 9,960 more complaints; mend these first"


class TestOverrides:
    """`dotted.key=YAML value`, put over the file's own values before they are checked."""

    @pytest.fixture(autouse=True)
    def _config(self, project: Path) -> None:
        Path("c.yaml").write_text(GOOD)

    def test_an_override_takes_the_place_of_a_value(self) -> None:
        config = read_config("c.yaml", ["job.time=00:10:00", "sweep.parameters.lr=[1e-3, 1e-4]"])
        assert config.job.time == "00:10:00"
        assert config.trials.parameters == {"lr": ("1e-3", "1e-4"), "batch_size": ("8", "16")}

    def test_an_override_makes_the_section_that_it_needs(self) -> None:
        config = read_config("c.yaml", ["budget.limit_usd=5", "job.setup.modules=[cuda/12]", "job.extra.licenses=a=1"])
        assert str(config.budget.limit_usd) == "5"
        assert config.job.setup.modules == ("cuda/12",)
        assert config.job.extra == {"licenses": "a=1"}

    def test_a_parameter_s_name_may_hold_dots(self) -> None:
        assert "model.lr" in read_config("c.yaml", ["sweep.parameters.model.lr=[1, 2]"]).trials.parameters

    def test_the_last_of_two_overrides_holds(self) -> None:
        assert read_config("c.yaml", ["job.nodes=2", "job.nodes=3"]).job.nodes == 3

    def test_an_override_of_a_shared_value_leaves_its_other_uses_alone(self) -> None:
        text = "sweep:\n  parameters: &p {lr: [1, 2]}\n  zip: {x: [1]}\n  env: &e {A: b}\njob: {env: *e}\n"
        Path("c.yaml").write_text("launcher: {script: train.py}\n" + text)
        config = read_config("c.yaml", ["job.env.A=c"])
        assert (config.job.env, config.trials.env) == ({"A": "c"}, {"A": "b"})

    def test_the_file_is_not_touched(self) -> None:
        read_config("c.yaml", ["job.nodes=2"])
        assert Path("c.yaml").read_text() == GOOD

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("job.tme=1", "job.tme: there is no such key (did you mean 'time'?)"),
            ("jbo.time=1", "jbo: there is no such key (did you mean 'job'?)"),
            ("time=1", "time: there is no such key here: it belongs under job:"),
            ("job.nodes=0", "job.nodes: must be 1 or more, not 0"),
            ("job.nodes=true", "job.nodes: a number is meant here, not the boolean true"),
            ("sweep.parameters.lr=3", "sweep.parameters.lr: a list of values is meant here, not one value: write [3]"),
            (
                "job.time.x=3",
                "job.time.x: job.time is the value '08:00:00', which has no keys below it: set job.time itself",
            ),
            ("job.time=", "job.time: has no value: write null for none, or '' for an empty text"),
            ("job.name=[a", "is not YAML: the list that opens with [ is not closed, or a comma is missing"),
            (
                "job.name=!x y",
                "job.name: the YAML tag !x is not followed: remove it, values are read as they are written",
            ),
            (
                "sweep.trials[3].lr=1",
                "sweep.trials[3].lr: an override sets a whole list, not one item: give all of its items",
            ),
            (
                "job",
                "an override is written key=value, such as job.time=00:10:00 or sweep.parameters.lr=[1e-3, 1e-4]",
            ),
            (
                "job.=1",
                "an override is written key=value, such as job.time=00:10:00 or sweep.parameters.lr=[1e-3, 1e-4]",
            ),
            ("training.args=[x]", "training: stands beside sweep: a config has one of the two; remove the other"),
        ],
    )
    def test_a_wrong_override_is_named_in_the_complaint(self, text: str, told: str) -> None:
        assert refusal("c.yaml", text) == f"override {text}: {told}"

    def test_complaints_of_file_and_override_are_told_together(self) -> None:
        Path("c.yaml").write_text(GOOD.replace('"08:00:00"', "8h"))
        told = refusal("c.yaml", "nodes", "job.nodes=0").splitlines()
        assert told[0].startswith("c.yaml:3: job.time: '8h' is not a walltime")
        assert told[1].startswith("override nodes: an override is written key=value")
        assert told[2] == "override job.nodes=0: job.nodes: must be 1 or more, not 0"

    def test_a_line_end_in_an_override_does_not_break_the_message(self) -> None:
        assert refusal("c.yaml", "job.nodes=a\n b") == (
            "override 'job.nodes=a\\n b': job.nodes: a whole number is meant here, not 'a b'"
        )


class TestScript:
    """`launcher.script` is looked for from the top of the code, then beside the config."""

    @pytest.fixture
    def repository(self, tmp_path: Path) -> Path:
        (tmp_path / ".git").mkdir()
        (tmp_path / "configs").mkdir()
        return tmp_path

    def write(self, folder: Path, script: str) -> Path:
        config = folder / "configs" / "c.yaml"
        config.write_text(f"launcher:\n  script: {script}\nsweep: {{parameters: {{lr: [1]}}}}\n")
        return config

    def test_a_script_at_the_top_of_the_code_stays_as_it_is(self, repository: Path) -> None:
        (repository / "train.py").touch()
        (repository / "configs" / "train.py").touch()
        assert load_config(self.write(repository, "train.py")).launcher.script == "train.py"

    def test_a_script_beside_the_config_is_named_from_the_top_of_the_code(self, repository: Path) -> None:
        (repository / "configs" / "train.py").touch()
        assert load_config(self.write(repository, "./train.py")).launcher.script == "configs/train.py"

    def test_a_script_above_the_config_is_named_from_the_top_of_the_code(self, repository: Path) -> None:
        (repository / "src").mkdir()
        (repository / "src" / "train.py").touch()
        assert load_config(self.write(repository, "../src/train.py")).launcher.script == "src/train.py"

    def test_an_absolute_script_stays_absolute(self, repository: Path, tmp_path: Path) -> None:
        script = tmp_path / "elsewhere.py"
        script.touch()
        assert load_config(self.write(repository, str(script))).launcher.script == str(script)
        told = refusal(self.write(repository, f"{tmp_path}/elsewere.py"))
        assert told.endswith(f"looked in {tmp_path} (did you mean '{script}'?)")

    def test_a_script_out_of_the_code_is_refused_though_it_exists(self, repository: Path) -> None:
        inner = repository / "inner"
        (inner / ".git").mkdir(parents=True)
        (inner / "configs").mkdir()
        (repository / "train.py").touch()
        told = refusal(self.write(inner, "../../train.py"))
        assert f"'../../train.py' leads out of the code ({repository.resolve()}/train.py): only what is under" in told

    def test_a_missing_script_names_the_places_and_the_nearest_file(self, repository: Path) -> None:
        (repository / "src").mkdir()
        (repository / "src" / "train.py").touch()
        config = self.write(repository, "train.py")
        root = repository.resolve()
        assert refusal(config) == (
            f"{config}:2: launcher.script: there is no script 'train.py': looked in {root} and in {root}/configs "
            "(did you mean 'src/train.py'?)"
        )
        told = refusal(self.write(repository, "src/trian.py"))
        assert told.endswith(f"looked in {root}/src and in {root}/configs/src (did you mean 'src/train.py'?)")

    def test_a_folder_is_no_script(self, repository: Path) -> None:
        (repository / "train").mkdir()
        (repository / "train" / "main.py").touch()
        told = refusal(self.write(repository, "train"))
        assert told.endswith(
            f"is a folder ({repository.resolve()}/train), not a script: name the file in it, such as train/main.py"
        )

    def test_modules_commands_and_placeholders_are_not_looked_for(self, repository: Path) -> None:
        config = repository / "configs" / "c.yaml"
        for launcher in ("{module: pkg.train}", "{type: command, command: [x]}", '{script: "{lr}.py"}'):
            config.write_text(f"launcher: {launcher}\nsweep: {{parameters: {{lr: [1]}}}}\n")
            assert load_config(config).launcher.argument_style == "--name value"

    def test_the_top_of_the_code_is_the_nearest_repository_or_the_config_s_folder(self, repository: Path) -> None:
        assert code_root(repository / "configs" / "c.yaml") == repository.resolve()
        (repository / ".git").rmdir()
        assert code_root(repository / "configs" / "c.yaml") == repository.resolve() / "configs"


class TestLaterComplaints:
    """Checks that come after the reading complain by file, line and key all the same."""

    @pytest.fixture(autouse=True)
    def _config(self, project: Path) -> None:
        Path("c.yaml").write_text(GOOD)

    @pytest.mark.parametrize(
        ("key", "line"),
        [
            ("job", 1),
            ("job.time", 3),
            ("launcher.script", 4),
            ("sweep.base_args[1]", 6),
            ("sweep.parameters.batch_size", 9),
            ("job.gpu_type", 1),
            ("sweep.parameters.batch_size[7]", 9),
            ("container.image", 1),
        ],
    )
    def test_a_key_is_found_or_the_nearest_above_it(self, key: str, line: int) -> None:
        assert locate("c.yaml", key) == line

    def test_a_complaint_without_a_file_names_the_key(self) -> None:
        assert str(problem_at(None, "job.gpu_type", "is not known")) == "config: job.gpu_type: is not known"

    def test_a_complaint_about_a_file_that_has_gone_has_no_line(self) -> None:
        Path("c.yaml").unlink()
        assert str(problem_at("c.yaml", "job.time", "is odd")) == "c.yaml: job.time: is odd"
        assert locate("c.yaml", "job.time") is None

    def test_a_complaint_about_an_override_names_it(self) -> None:
        told = str(problem_at("c.yaml", "job.gpu_type", "is not known", ["job.gpu_type=h1000"]))
        assert told == "override job.gpu_type=h1000: job.gpu_type: is not known"
