"""The verbs: help, exit codes, everything Hydra offers behind `train`, and start-up without torch."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import pytest

from subquad.__main__ import VERBS, main
from subquad.commands import explain, generate, train
from subquad.commands.hydra_verb import SWEEP_DIR, _Task
from subquad.errors import ConfigError, RunError
from subquad.registry import load_registry
from subquad.schema import RunConfig

OWN_PROJECT = Path(__file__).resolve().parent.parent / "examples" / "03_own_project"
HEAVY = {"torch", "lightning", "wandb", "hydra", "triton"}


class Jobs:
    """Stands for training: remembers what it was asked, and fails where it is told to."""

    def __init__(self) -> None:
        self.configs: list[RunConfig] = []
        self.overrides: list[list[str]] = []
        self.fail: dict[str, BaseException] = {}
        self.seen: list[tuple[list[str], str | None, str]] = []

    def __call__(self, config: RunConfig, overrides: Sequence[str]) -> None:
        self.configs.append(config)
        self.overrides.append(list(overrides))
        self.seen.append((list(sys.argv), os.environ.get("HYDRA_FULL_ERROR"), os.getcwd()))
        if config.model.name in self.fail:
            raise self.fail[config.model.name]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    recorder = Jobs()
    monkeypatch.setattr(train, "train_job", recorder)
    return recorder


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


# --- verbs ---------------------------------------------------------------------


def test_help_lists_every_verb_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)
    assert len(shown.splitlines()) <= 24
    assert max(map(len, shown.splitlines())) <= 120


def test_no_verb_shows_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "train" in capsys.readouterr().out


def test_a_misspelt_verb_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "takes"),
    [
        (["plugins", "lsit"], "--json, new, check"),
        (["plugins", "chek"], "did you mean 'check'?"),
        (["doctor", "no-checks"], "did you mean '--no-checks'?"),
        (["completion", "zsh"], "takes no arguments"),
    ],
)
def test_a_word_that_a_verb_does_not_take_is_an_error_in_three_lines(
    arguments: list[str], takes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    what, where, mend = said.err.splitlines()
    assert what == f"ConfigError: '{arguments[1]}' is not understood"
    assert where == f"  where   {arguments[0]}"
    assert takes in mend


def test_a_reader_who_has_seen_enough_of_the_help_is_no_error() -> None:
    run = [sys.executable, "-u", "-m", "subquad", "--help"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.parametrize("argument", ["plan=plan.json", "resume=runs/a"])
def test_explain_refuses_what_it_does_not_read(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", argument, "target=h100"]) == 2
    assert f"where   {argument}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])
def test_every_verb_with_arguments_has_help_of_its_own(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert verb in capsys.readouterr().out


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    import subquad

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"subquad {subquad.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["plugins", "--json"], ["completion"]], ids=str)
def test_answers_within_a_second_and_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from subquad.__main__ import main; code = main(sys.argv[1:])\n"
        f"loaded = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, so that a busy machine does not fail the test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_module_runs_from_any_folder(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "subquad", "train", "--cfg", "job", "-p", "trainer.max_steps", "trainer.max_steps=7"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "7", "")


@pytest.mark.parametrize(("module", "mend"), [("hydra", "make install"), ("lightning", "pip install 'subquad[train]'")])
def test_a_missing_dependency_says_what_to_install(module: str, mend: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from subquad.__main__ import main; sys.exit(main(['train', 'model=transformer']))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert mend in result.stderr
    assert "Traceback" not in result.stderr
    assert everything_in(tmp_path) == []


def test_a_module_that_a_plugin_forgot_shows_where_it_is_imported(
    jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.fail["mamba"] = ModuleNotFoundError("No module named 'acme'", name="acme")
    assert main(["train", "model=mamba"]) == 1
    assert "Traceback" in capsys.readouterr().err


# --- plugins and doctor ---------------------------------------------------------------


def test_plugins_as_json_agrees_with_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    registry = load_registry()
    assert {entry["name"] for entry in content["mixers"]} == set(registry.mixers)
    assert {f"{entry['operator']}/{entry['name']}" for entry in content["kernels"]} == set(registry.kernels)
    assert {entry["distribution"] for entry in content["plugins"]} >= {"subquad", "subquad-scout", "subquad-ssm"}
    for kernel in content["kernels"]:
        assert kernel["usable"] == (kernel["reason"] is None)
    assert any(kernel["usable"] for kernel in content["kernels"])


def test_plugins_says_why_a_kernel_is_not_usable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["plugins", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    reasons = {kernel["name"]: kernel["reason"] for kernel in kernels if kernel["operator"] == "softmax_attention"}
    assert "cuda" in reasons["sdpa_cudnn"]
    assert reasons["reference"] is None


def test_plugins_as_tables_shows_growth_and_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row, checkpoint = (line for line in lines if line.split()[:1] == ["mamba"])
    assert "without biases" in checkpoint
    assert row.split()[1:3] == ["t", "1"]
    assert "subquad-ssm 0.1.0" in row


def test_a_broken_plugin_costs_one_line_and_not_the_command(tmp_path: Path) -> None:
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[subquad]\nbroken = a_module_that_nobody_has\n")
    result = subprocess.run(
        [sys.executable, "-m", "subquad", "plugins"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: plugin 'broken' (broken) was skipped")
    assert "Skipped plugins" in result.stdout


def test_doctor_names_versions_devices_and_caches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no-checks"]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "  cpu" in shown
    assert os.environ["SUBQUAD_CACHE"] in shown


def test_doctor_fails_when_a_kernel_disagrees_with_its_reference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from subquad_kernels import self_check
    from subquad_kernels.catalogue import Kernel
    from subquad_kernels.workload import Workload

    def verdict(kernel: Kernel, workload: Workload, device: str = "cpu") -> self_check.Verdict:
        bad = kernel.name == "sdpa_flash"
        reason = "d_q is off by 3.0e-01" if bad else "fine"
        return self_check.Verdict(kernel=kernel.key, workload=workload.key, passed=not bad, reason=reason)

    monkeypatch.setattr(self_check, "check_kernel", verdict)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert "d_q is off by 3.0e-01" in shown
    assert "will not be chosen: softmax_attention/sdpa_flash" in shown


@pytest.mark.slow
def test_every_kernel_passes_its_check_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0, capsys.readouterr().out


# --- Hydra behind the verb -------------------------------------------------------------


def test_train_gets_the_typed_configuration_and_the_overrides_as_typed(jobs: Jobs) -> None:
    assert main(["train", "model=mamba", "trainer.max_steps=3"]) == 0
    (config,) = jobs.configs
    assert type(config) is RunConfig
    assert (config.model.name, config.trainer.max_steps) == ("mamba", 3)
    assert jobs.overrides == [["model=mamba", "trainer.max_steps=3"]]


@dataclass(frozen=True)
class Sweep:
    """What a sweep did: its jobs, the exit code, the terminal, and the files left in the working folder."""

    jobs: Jobs
    code: int
    shown: str
    files: list[Path]
    folder: Path


def run_sweep(arguments: list[str], fail: dict[str, BaseException], folder: Path) -> Sweep:
    """Four lines of patching that several claims share; a sweep composes every job twice, which takes seconds."""
    jobs, shown = Jobs(), io.StringIO()
    jobs.fail = fail
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(shown):
        patch.chdir(folder)
        patch.setattr(train, "train_job", jobs)
        patch.setattr(sys, "argv", ["caller", "argument"])
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        code = main(["train", "--multirun", *arguments])
    return Sweep(jobs, code, shown.getvalue(), sorted(folder.rglob("*")), folder)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return run_sweep(["model=mamba,transformer", "seed=1,2", "run_dir=out"], {}, tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def failing_sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    fail: dict[str, BaseException] = {
        "mamba": RunError(what="the loss is not finite", where="step 3", mend="lower optimizer.lr"),
        "scout_swa": ConfigError(what="too wide", where="here", mend="there"),
    }
    return run_sweep(["model=transformer,mamba,scout_swa,scout_mamba"], fail, tmp_path_factory.mktemp("failing"))


def test_multirun_runs_every_combination(sweep: Sweep) -> None:
    assert sweep.code == 0
    found = [(config.model.name, config.seed) for config in sweep.jobs.configs]
    assert found == [("mamba", 1), ("mamba", 2), ("transformer", 1), ("transformer", 2)]


def test_jobs_of_a_sweep_have_run_folders_of_their_own(sweep: Sweep) -> None:
    assert [config.run_dir for config in sweep.jobs.configs] == [str(Path("out") / str(job)) for job in range(4)]


def test_hydra_writes_nothing(sweep: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    assert sweep.files == []
    assert main(["train", "model=mamba"]) == 0
    assert everything_in(tmp_path) == []


def test_a_job_sees_the_callers_command_line_environment_and_folder(sweep: Sweep) -> None:
    assert sweep.jobs.seen == [(["caller", "argument"], None, str(sweep.folder))] * 4


def test_a_single_job_has_the_run_folder_it_was_given(jobs: Jobs) -> None:
    assert main(["train", "run_dir=out"]) == 0
    assert jobs.configs[0].run_dir == "out"


def test_failing_jobs_of_a_sweep_surface_and_the_others_run(failing_sweep: Sweep) -> None:
    assert failing_sweep.code == 1
    names = [config.model.name for config in failing_sweep.jobs.configs]
    assert names == ["transformer", "mamba", "scout_swa", "scout_mamba"]
    assert "job 1 failed: model=mamba" in failing_sweep.shown
    assert "job 2 failed: model=scout_swa" in failing_sweep.shown
    assert failing_sweep.shown.count("the loss is not finite") == 1
    assert failing_sweep.shown.count("too wide") == 1
    assert "Traceback" not in failing_sweep.shown


def test_a_bug_in_a_job_of_a_sweep_surfaces_with_its_traceback(tmp_path: Path) -> None:
    found = run_sweep(["model=mamba,transformer"], {"mamba": ZeroDivisionError("a bug")}, tmp_path)
    assert found.code == 1
    assert "ZeroDivisionError: a bug" in found.shown


def test_an_unknown_choice_of_a_sweep_is_found_before_any_job_runs(
    jobs: Jobs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", "-m", "model=transformer,mmba"]) == 2
    assert jobs.configs == []
    assert "did you mean 'mamba'?" in capsys.readouterr().err
    assert everything_in(tmp_path) == []


def test_cfg_prints_the_composed_configuration_and_runs_nothing(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", "model=mamba", "trainer.max_steps=3"]) == 0
    shown = capsys.readouterr().out
    assert "max_steps: 3" in shown
    assert "hydra" not in shown
    assert jobs.configs == []


def test_package_narrows_what_cfg_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", "--package", "data", "data=synthetic"]) == 0
    assert capsys.readouterr().out.startswith("# @package data\nname: synthetic\n")


def test_info_shows_where_configs_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--info", "searchpath", "--config-dir", str(OWN_PROJECT / "conf")]) == 0
    shown = capsys.readouterr().out
    assert "pkg://subquad.conf" in shown
    assert str(OWN_PROJECT) in shown


def test_help_of_train_lists_groups_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "scout_mamba_430m" in shown
    assert "synthetic" in shown
    assert "max_steps" in shown


def test_explain_composes_the_same_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Jobs()
    monkeypatch.setattr(explain, "explain_job", recorder)
    assert main(["explain", "model=mamba", "target=h100"]) == 0
    assert (recorder.configs[0].model.name, recorder.configs[0].target) == ("mamba", "h100")


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_options_may_stand_between_overrides(flag: str, jobs: Jobs) -> None:
    assert main(["train", "model=mamba", flag, "seed=1,2", "trainer.max_steps=3"]) == 0
    assert [(config.model.name, config.seed, config.trainer.max_steps) for config in jobs.configs] == [
        ("mamba", 1, 3), ("mamba", 2, 3)
    ]  # fmt: skip


def test_an_option_with_a_value_may_stand_between_overrides(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model=mamba", "--cfg", "job", "-p", "trainer.max_steps", "trainer.max_steps=3"]) == 0
    assert capsys.readouterr().out.strip() == "3"
    assert jobs.configs == []


def test_a_launcher_that_is_chosen_by_name_is_used(jobs: Jobs) -> None:
    assert main(["train", "-m", "hydra/launcher=basic", "hydra.sweep.dir=sweeps", "seed=1,2"]) == 0
    assert [config.seed for config in jobs.configs] == [1, 2]
    assert Path("sweeps/multirun.yaml").exists()


def test_the_task_travels_to_the_process_of_a_launcher() -> None:
    task = _Task("train", (train.train_job, train.train_in_sweep), load_registry(), ["subquad"], None)
    travelled = pickle.loads(pickle.dumps(task))
    assert travelled.__name__ == "train"
    assert travelled._jobs == (train.train_job, train.train_in_sweep)


def test_the_example_project_composes_by_config_dir(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN_PROJECT)
    assert main(["train", "--config-dir", "conf", "experiment=short"]) == 0
    assert main(["train", "--config-dir", "conf", "-m", "experiment=short", "model=my_hybrid,transformer"]) == 0
    assert [config.model.name for config in jobs.configs] == ["my_hybrid", "my_hybrid", "transformer"]
    assert {config.trainer.max_steps for config in jobs.configs} == {100}


@pytest.mark.slow
def test_the_example_project_trains(tmp_path: Path) -> None:
    small = ["trainer=smoke", "trainer.progress_bar=false", "compiler.measure=false", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "subquad", "train", "--config-dir", "conf", "experiment=short", *small]
    result = subprocess.run(
        [*command, "trainer.max_steps=3"], cwd=OWN_PROJECT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "run") in result.stdout.splitlines()[-1]
    assert {path.name for path in OWN_PROJECT.iterdir()} == {"README.md", "conf"}


# --- what surrounds a job ------------------------------------------------------------------


def test_nothing_of_hydra_stays_behind(jobs: Jobs) -> None:
    argv, environment = list(sys.argv), dict(os.environ)
    assert main(["train", "-m", "seed=1"]) == 0
    assert main(["train", "model=nope"]) == 2
    assert (sys.argv, dict(os.environ)) == (argv, environment)
    assert SWEEP_DIR not in os.environ


def test_ctrl_c_exits_with_130(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.fail["mamba"] = KeyboardInterrupt()
    assert main(["train", "model=mamba"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_ends_a_sweep(jobs: Jobs) -> None:
    jobs.fail["mamba"] = KeyboardInterrupt()
    assert main(["train", "-m", "model=mamba,transformer"]) == 130
    assert len(jobs.configs) == 1


def test_a_failed_run_exits_with_1_and_three_lines(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.fail["mamba"] = RunError(what="the disk is full", where="runs/x", mend="make room")
    assert main(["train", "model=mamba"]) == 1
    assert capsys.readouterr().err == "RunError: the disk is full\n  where   runs/x\n  mend    make room\n"


def test_a_bug_shows_its_traceback_and_exits_with_1(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.fail["mamba"] = ZeroDivisionError("a bug")
    assert main(["train", "model=mamba"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["--traceback", "HYDRA_FULL_ERROR"])
def test_the_traceback_of_an_expected_error_is_shown_on_demand(
    how: str, jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.fail["mamba"] = ConfigError(what="w", where="x", mend="y")
    if how == "HYDRA_FULL_ERROR":
        monkeypatch.setenv(how, "1")
    flags = [how] if how.startswith("--") else []
    assert main(["train", "model=mamba", *flags]) == 2
    assert main(["train", "model=nope", *flags]) == 2
    shown = capsys.readouterr().err
    assert shown.count("ConfigError: w\n  where   x\n  mend    y\n") == 1
    assert "in __call__" in shown
    assert "MissingConfigException" in shown


# --- generate --------------------------------------------------------------------------


def test_generate_takes_a_prompt_literally() -> None:
    prompt = "def f(x: ${y}) = ??? # {a: b}, 'c' \\"
    config = generate.generate_config(["run=a=b", f"prompt={prompt}", "max_tokens=7", "temperature=0"])
    assert (config.run, config.prompt, config.max_tokens, config.temperature) == ("a=b", prompt, 7, 0.0)


@pytest.mark.parametrize(
    ("text", "stops"),
    [("", []), ("\n\n", ["\n\n"]), ("a, ${b}", ["a, ${b}"]), ('["\\n", "- x"]', ["\n", "- x"])],
)
def test_generate_reads_one_stop_string_or_a_list(text: str, stops: list[str]) -> None:
    config = generate.generate_config(["run=x", f"stop={text}", "stop_ids=[3,4]", "top_p=0.9"])
    assert (config.stop, config.stop_ids, config.top_p) == (stops, [3, 4], 0.9)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prompt=x"], "run=RUN_DIR"),
        (["run=x", "promt=x"], "did you mean 'prompt'?"),
        (["run=x", "hello"], "key=value"),
        (["run=x", "max_tokens=many"], "generate.max_tokens"),
        (["run=x", "stop=[3]"], "generate.stop"),
        (["run=x", "stop=[a"], "generate.stop"),
        (["run=x", "stop_ids=[a]"], "generate.stop_ids"),
    ],
)
def test_generate_says_what_is_wrong(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *arguments]) == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert len(shown.splitlines()) == 3


def test_a_key_without_a_default_is_said_to_be_needed(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("generate", "evaluate", "export", "bench"):
        assert main([verb, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.split())  # as wide as a terminal
        assert "must be given" in shown
        assert "???" not in shown
