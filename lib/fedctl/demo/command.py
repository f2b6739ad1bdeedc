"""``fl demo``: options, signals, exit codes and the order of events."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import click

from fedclient.rules import Rule
from fedcore.errors import FedcoreError
from fedctl.demo import certificates
from fedctl.demo.cluster import Cluster, Weights, running_cluster
from fedctl.demo.plan import (
    ENCRYPT_TYPES,
    EPSILONS,
    LABELLED,
    WORKER_SAMPLES,
    Plan,
    beside_a_worker,
    divide,
)
from fedctl.demo.report import (
    DeviceRecord,
    Examiner,
    IterationRecord,
    Report,
    compared,
    save_compared_curves,
    save_curves,
    save_json,
)
from fedctl.demo.view import View, commands_to_look_around, comparison, view_for
from fedctl.processes import ChildFailed, NoRedis, find_redis_server
from fedexamples import datasets

CURVES = Path("demo-run/curves.png")
LOOK_S = 0.05  # between two looks at the server; it keeps a model for three iterations
STAY_LOOK_S = 0.2
STALL_S = 180.0  # with no device heard of, the demo gives up; a device's part takes seconds
DEVICES, SILOS = 8, 3  # unless --devices says otherwise
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

EXAMPLES = """
Examples:

\b
  fl demo                                   eight devices, 20 iterations
  fl demo --devices 20 --alpha 0.1          more devices, each with its own few digits
  fl demo --iterations 5 --json run.json
  fl demo --silo                            three silos, each rule of aggregation in turn
  fl demo --silo --rule scaffold            one of them
  fl demo --hybrid                          devices with few labels, without and with a worker
  fl demo --hybrid --torch --json run.json
  fl demo --tls                             the same over HTTPS, with certificates of its own
  fl demo --compress                        fewer bytes in both directions
  fl demo --encrypt PW_ENCRYPT              masked updates: the server sees nothing but their sum
  fl demo --encrypt DP_ENCRYPT              updates with noise
  fl demo --encrypt SIGNDS                  a few positions and a sign in place of weights
  fl demo --stay                            leaves the cluster running, to look around
"""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What is asked for besides the training.

    Attributes:
        json_file: file of the figures, None for none.
        curves: file of the curves.
        stay: keep the cluster running at the end.
    """

    json_file: Path | None
    curves: Path
    stay: bool


class Stopped(BaseException):
    """A signal asks for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Let the first SIGINT, SIGTERM or SIGHUP raise ``Stopped``, and ignore all that follow.

    What was ignored before (nohup, a job in the background) stays so.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def run_directory(given: Path | None, keep: bool) -> Iterator[Path]:
    """Give a run its directory: the named one, or a temporary one that goes unless it is wanted or of use.

    It is of use if a process failed: then its logs are there.

    Raises:
        ClickException: the named one is not empty.
    """
    if given is not None:
        if given.exists() and (not given.is_dir() or any(given.iterdir())):
            raise click.ClickException(f"{given} is not an empty directory; choose another")
        given.mkdir(parents=True, exist_ok=True)
        yield given.absolute()
        return
    temporary = Path(tempfile.mkdtemp(prefix="fl-demo-"))
    try:
        yield temporary
    except ChildFailed:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)


def train(plan: Plan, cluster: Cluster, examiner: Examiner, view: View) -> Iterator[IterationRecord]:
    """Follow a running training to its end; yield each iteration as soon as its model is judged.

    Models are fetched as they come and judged when there is time, so that none is missed.

    Raises:
        ChildFailed: something ended that should not, or an iteration made no model.
    """
    fetched: deque[tuple[Weights, int, float]] = deque()  # with clients and seconds
    number, judged, counted = 1, 0, 0
    began: float | None = None
    seen, seen_at = None, time.monotonic()
    while judged < plan.iterations:
        progress = cluster.progress()
        now = time.monotonic()
        if progress != seen:
            seen, seen_at = progress, now
        elif now - seen_at > STALL_S:
            raise cluster.stalled(STALL_S)
        if began is None and (progress.selected or progress.iteration > 1):
            began = now
        view.tick(progress.iteration, progress.uploaded)
        if number < progress.iteration and (weights := cluster.model(number)) is not None:
            clients = min(progress.accepted - progress.uploaded - counted, plan.devices)
            fetched.append((weights, clients, 0.0 if began is None else now - began))
            number, counted, began = number + 1, counted + clients, now
        elif fetched:
            weights, clients, seconds = fetched.popleft()
            judged += 1
            loss, accuracy = examiner.examine(weights)
            yield IterationRecord(judged, loss, accuracy, clients, seconds)
        else:
            time.sleep(LOOK_S)


def device_record(
    name: str, samples: Mapping[int, int], reports: Sequence[Mapping[str, Any]]
) -> DeviceRecord:
    """Sum up what one device reported of its iterations."""
    completed = [report for report in reports if report["outcome"] == "completed"]
    loss, accuracy = (completed[-1]["loss"], completed[-1]["accuracy"]) if completed else (None, None)
    return DeviceRecord(name, samples, len(completed), loss, accuracy)


def run(plan: Plan, directory: Path, view: View, conclude: Callable[[Report, Cluster, View], None]) -> None:
    """Do it all: load, start, train, tell, and stop what was started.

    Args:
        plan: what is trained.
        directory: for the files of the run; exists.
        view: what the reader sees.
        conclude: called with what came of it, while the cluster is still there.

    Raises:
        ConfigError: the data or torch are not there, or there are too many devices for the data.
        NoRedis: there is no redis-server.
        ChildFailed: something ended that should not, or an iteration made no model.
    """
    plan.check()
    find_redis_server()
    data = datasets.load(plan.data)
    shares = divide(plan, data)
    examiner = Examiner(data)
    report = Report(plan, len(examiner))
    began = time.monotonic()
    with running_cluster(plan, directory, view.say) as cluster:
        with view:
            for record in train(plan, cluster, examiner, view):
                report.iterations.append(record)
                view.record(record)
        report.seconds = time.monotonic() - began
        told = cluster.device_reports()
        report.devices = [
            device_record(name, samples, reports)
            for (name, reports), samples in zip(told.items(), shares, strict=True)
        ]
        view.summarise(report)
        conclude(report, cluster, view)


def conclude(outputs: Outputs, report: Report, cluster: Cluster, view: View) -> None:
    """Write the files of a single run, and show where to look."""
    write(report, view, outputs)
    look_around(cluster, view, outputs.stay)


def compare(plans: Sequence[Plan], directory: Path, outputs: Outputs) -> None:
    """Do it all for each plan in turn, and tell how they did beside each other.

    Raises:
        ConfigError, NoRedis, ChildFailed: as ``run``.
    """
    reports: list[Report] = []

    def conclude_one(report: Report, cluster: Cluster, view: View) -> None:
        reports.append(report)
        view.say("")
        if len(reports) < len(plans):
            return
        for line in comparison(reports):
            view.say(line)
        write_files(outputs, view, compared(reports), lambda: save_compared_curves(reports, outputs.curves))
        if outputs.stay:
            look_around(cluster, view, stays=True)

    for plan in plans:
        folder = directory / plan.name.replace(" ", "-")
        folder.mkdir()
        view = view_for(plan, reports[0] if plan.worker else None)
        view.say(f"{plan.name}:")
        run(plan, folder, view, conclude_one)


def look_around(cluster: Cluster, view: View, stays: bool) -> None:
    """Show what there is to look at, and keep it there if it is to stay.

    Raises:
        ChildFailed: a daemon ended.
    """
    view.say(
        "to look around:" if stays else "while it ran (fl demo --stay keeps it running) there was to look at:"
    )
    ca_file = cluster.directory / certificates.CA_FILE if cluster.plan.tls else None
    for command in commands_to_look_around(cluster.addresses, ca_file):
        view.say(f"  {command}")
    if stays:
        view.say("the cluster keeps running until Ctrl-C")
        stay(cluster)


def write(report: Report, view: View, outputs: Outputs) -> None:
    """Write the files that were asked for."""
    write_files(outputs, view, report.as_json(), lambda: save_curves(report, outputs.curves))


def write_files(outputs: Outputs, view: View, figures: Mapping[str, Any], draw: Callable[[], None]) -> None:
    """Write figures and curves, where they are asked for and can be."""
    if outputs.json_file is not None:
        save_json(figures, outputs.json_file)
        view.say(f"figures: {outputs.json_file}")
    try:
        draw()
        view.say(f"curves: {outputs.curves}")
    except ImportError:
        view.say("no curves: matplotlib is not installed (pip install 'fedcore[demo]')")


def stay(cluster: Cluster) -> None:
    """Wait for a signal.

    Raises:
        ChildFailed: a daemon ended.
    """
    with contextlib.suppress(Stopped):
        while True:
            cluster.check_daemons()
            time.sleep(STAY_LOOK_S)


@click.command("demo", epilog=EXAMPLES)
@click.option("--data", type=click.Choice(datasets.NAMES), default="digits", show_default=True)
@click.option("--torch", is_flag=True, help="Train with torch instead of numpy.")
@click.option(
    "--devices",
    type=click.IntRange(1, 1000),
    help=f"Number of devices, or of silos.  [default: {DEVICES}; silos: {SILOS}]",
)
@click.option("--silo", is_flag=True, help="Cloud workers train (CLOUD_TRAINING) instead of devices.")
@click.option(
    "--rule",
    type=click.Choice([*Rule], case_sensitive=False),
    help="With --silo: the rule of aggregation.  [default: all, one after another]",
)
@click.option(
    "--hybrid",
    is_flag=True,
    help=f"Devices have {LABELLED} labels each; they train alone, and then with a worker that has {WORKER_SAMPLES} "
    "(HYBRID_TRAINING).",
)
@click.option(
    "--tls",
    is_flag=True,
    help="Devices, operators and nodes use TLS; the certificates are those of fl certs.",
)
@click.option(
    "--encrypt",
    type=click.Choice(ENCRYPT_TYPES, case_sensitive=False),
    help="How devices protect their updates.  [default: not at all]",
)
@click.option(
    "--epsilon",
    type=click.FloatRange(0, min_open=True),
    help=f"With DP_ENCRYPT or SIGNDS: what one update may tell.  [default: {EPSILONS['DP_ENCRYPT']:g}, "
    f"{EPSILONS['SIGNDS']:g}]",
)
@click.option(
    "--compress",
    is_flag=True,
    help="Uploads as DIFF_SPARSE_QUANT, where the encrypt type allows it, and downloads as QUANT.",
)
@click.option("--iterations", type=click.IntRange(1, 100_000), default=20, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same course.")
@click.option(
    "--alpha",
    type=click.FloatRange(0, min_open=True),
    default=0.5,
    show_default=True,
    help="How alike the devices' data are: 0.1 hardly, 100 very.",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Write the curves (PNG).  [default: curves.png in --directory, else {CURVES}]",
)
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run in this new directory and keep it.  [default: a temporary one]",
)
@click.option("--keep", is_flag=True, help="Keep the temporary directory.")
@click.option("--stay", is_flag=True, help="Leave the cluster running at the end, until Ctrl-C.")
def demo(
    data: str,
    torch: bool,
    devices: int | None,
    silo: bool,
    rule: str | None,
    hybrid: bool,
    tls: bool,
    encrypt: str | None,
    epsilon: float | None,
    compress: bool,
    iterations: int,
    seed: int,
    alpha: float,
    json_file: Path | None,
    plot: Path | None,
    directory: Path | None,
    keep: bool,
    stay: bool,
) -> None:
    """Watch a federation learn to read handwriting.

    Starts a private redis-server, a scheduler, a server and the devices, each a process of its own on this
    machine, and trains LeNet-5 on data that is spread unevenly over the devices. After each iteration the new
    model is fetched and judged on images that no device has seen. Everything ends with this command, after
    about 15 seconds on two cores; --hybrid and --silo are several runs and take up to a minute.
    """
    if hybrid and silo:
        raise click.UsageError("--hybrid and --silo do not go together: a worker trains beside devices")
    if rule is not None and not silo:
        raise click.UsageError("--rule is for --silo: devices know FedAvg only")
    if (encrypt or compress) and (silo or hybrid):
        raise click.UsageError(
            "--encrypt and --compress are for devices alone: leave --silo and --hybrid out"
        )
    if epsilon is not None and encrypt not in EPSILONS:
        raise click.UsageError(f"--epsilon is for --encrypt {' and '.join(EPSILONS)}")
    rules = [Rule.named(rule)] if rule else [*Rule]
    if silo and stay and len(rules) > 1:
        raise click.UsageError("--stay needs one --rule: each rule has a cluster of its own")
    outputs = Outputs(json_file, plot or (directory / CURVES.name if directory else CURVES), stay)
    devices = devices or (SILOS if silo else DEVICES)
    plan = Plan(
        data,
        devices,
        iterations,
        seed,
        alpha,
        torch,
        tls=tls,
        encrypt=encrypt or "NOT_ENCRYPT",
        epsilon=epsilon,
        compress=compress,
    )
    plans = [plan]
    if silo:
        plans = [replace(plan, rule=each) for each in rules]
    elif hybrid:
        plans = beside_a_worker(plan)
    try:
        with stopping_on_signals(), run_directory(directory, keep) as folder:
            for path in filter(None, (json_file, outputs.curves)):
                path.parent.mkdir(parents=True, exist_ok=True)
            if len(plans) == 1:
                run(plans[0], folder, view_for(plans[0]), partial(conclude, outputs))
            else:
                compare(plans, folder, outputs)
            if keep or directory:
                click.echo(f"the run's files: {folder}")
    except Stopped as stopped:
        click.echo(f"stopped by {signal.Signals(stopped.number).name}", err=True)
        sys.exit(128 + stopped.number)
    except (ChildFailed, NoRedis, FedcoreError) as error:
        raise click.ClickException(str(error)) from error
    except FileNotFoundError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error
