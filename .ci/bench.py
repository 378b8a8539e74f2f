#!/usr/bin/env python3
"""Measure queuectl against its goals for speed, and print one table.

    python3 .ci/bench.py                            # everything: about six minutes
    python3 .ci/bench.py --quick                    # under a minute: smaller, noisier
    python3 .ci/bench.py --only drain,enqueue       # some of it
    python3 .ci/bench.py --python /usr/bin/python3  # the interpreter under test
    python3 .ci/bench.py --against old/queuectl.py  # also in turn with another version

Ratios are what counts: both sides of one are measured in turn (A B A B ...) within this run,
and it is the median of the ratios of the pairs. So a machine that is busy, or slower than
yours, moves them little. A figure without a ratio (jobs/s, ms, MB) is this machine's.

Needs nothing but Python 3.8; task-spooler and GNU parallel are measured where installed. It
works in a folder of its own under $TMPDIR, on a copy of queuectl.py, and never touches your
queue. A goal that is missed is marked, and no failure: the exit code tells of breakage only.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import http.client
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

BENCH = os.path.abspath(__file__)
PROGRAM = os.path.join(os.path.dirname(os.path.dirname(BENCH)), "queuectl.py")
PATIENCE = 120.0  # seconds after which something that should have happened is broken
WARM_UP = 200  # completions before a rate is timed: start-up is no part of it
PROGRAM_JOB = "/bin/sleep 0"  # a program, where `true` is a builtin of the shell
MILLION = 1000000


class Sizes(NamedTuple):
    """How much is measured."""

    drained: int = 2000  # jobs of a drain
    timed: int = 2000  # completions that a rate is taken over
    pairs: int = 7  # of drains against other tools
    against_pairs: int = 25  # of drains against another version: the difference is small
    rate_pairs: int = 5  # of drain rates
    peer_jobs: int = 500  # for tools that are much slower
    calls: int = 30  # of the command line
    bulk: int = 100000
    big: int = MILLION
    listed: int = 200000
    starts: int = 200  # jobs whose wait for an idle worker is timed
    enqueues: int = 1000  # while workers drain
    idle_seconds: float = 10
    writer_seconds: float = 5
    writer_pairs: int = 3


QUICK = Sizes(timed=500, pairs=3, against_pairs=5, rate_pairs=1, peer_jobs=100, calls=5,
              bulk=20000, big=50000, listed=20000, starts=25, enqueues=200, idle_seconds=3,
              writer_seconds=1.5, writer_pairs=1)


# -- rows of the table --------------------------------------------------------------------

class Goal(NamedTuple):
    """A limit, and on which side of it to be."""

    text: str
    met: Callable[[float], bool]


def at_least(limit: float, unit: str) -> Goal:
    return Goal("at least %s %s" % (short(limit), unit), lambda value: value >= limit)


def at_most(limit: float, unit: str) -> Goal:
    return Goal("at most %s %s" % (short(limit), unit), lambda value: value <= limit)


def below(limit: float, unit: str) -> Goal:
    return Goal("below %s %s" % (short(limit), unit), lambda value: value < limit)


class Row(NamedTuple):
    what: str
    goal: Optional[Goal]
    value: float
    unit: str
    note: str = ""

    def cells(self) -> Tuple[str, str, str, str]:
        missed = self.goal is not None and not self.goal.met(self.value)
        return (self.what, self.goal.text if self.goal else "-",
                "%s %s%s" % (short(self.value), self.unit, "  <-- missed" if missed else ""),
                self.note)


def short(value: float) -> str:
    """Three figures are enough: 0.974, 12.3, 1480, 104,000."""
    if value >= 10000:
        return "{:,.0f}".format(round(value, -3))
    return "%.3g" % value if value < 1000 else "%.0f" % value


def ratio_row(what: str, goal: Optional[Goal], over: Sequence[float], under: Sequence[float],
              note: str = "") -> Row:
    """The median of the ratios of pairs that were measured in turn."""
    ratios = [a / b for a, b in zip(over, under)]
    spread = "%.2f to %.2f in %d pairs" % (min(ratios), max(ratios), len(ratios)) \
        if min(ratios) < max(ratios) else ""
    return Row(what, goal, statistics.median(ratios), "x", "; ".join(filter(None, (note, spread))))


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def print_table(rows: Sequence[Row]) -> None:
    heads = ("what", "goal", "measured", "note")
    cells = [heads] + [row.cells() for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    for number, row in enumerate(cells):
        line = [cell.ljust(width) for cell, width in zip(row, widths)]
        print("  ".join(line + [row[3]]).rstrip())
        if not number:
            print("  ".join("-" * width for width in widths + [40]))


# -- the laboratory -----------------------------------------------------------------------

class Broken(Exception):
    """Something did not work, so that there is nothing to measure."""


# Prints [seconds, ru_maxrss] of a command. A child's figure begins with what its parent had
# in memory, so the parent has to be this small.
PEAK = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])
_, status, usage = os.wait4(child, 0)
print([time.perf_counter() - start, usage.ru_maxrss])
sys.exit(status != 0)
"""


class Lab:
    """A temporary folder with a copy of queuectl.py, and what every measurement needs. All
    paths are in the folder; so are HOME and the default queue of all that it starts."""

    def __init__(self, folder: str, program: str, other: Optional[str], sizes: Sizes) -> None:
        self.folder = folder
        self.sizes = sizes
        self.program, self.other = self.path("queuectl.py"), self.path("other.py")
        shutil.copyfile(program, self.program)
        if other:
            shutil.copyfile(other, self.other)
        self.env = {name: value for name, value in os.environ.items()
                    if not name.startswith(("QUEUECTL_", "PYTHON", "XDG_", "TS_", "PARALLEL"))}
        self.env.update(HOME=folder, TMPDIR=folder, QUEUECTL_DB=self.path("default.db"),
                        SHELL="/bin/sh", LC_ALL="C")
        os.environ.clear()
        os.environ.update(self.env)
        os.chdir(folder)
        self.module = load(self.program)
        self._errors = os.open(self.path("stderr"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._built: Dict[str, Any] = {}

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def once(self, name: str, build: Callable[[Lab], Any]) -> Any:
        """What `build` makes: built on first use, then the same for all."""
        if name not in self._built:
            tell("  building %s" % name)
            self._built[name] = build(self)
        return self._built[name]

    def command(self, db: str, *words: str, program: Optional[str] = None) -> List[str]:
        return [sys.executable, program or self.program, "--db", db] + list(words)

    def start(self, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        for name in ("stdin", "stdout"):
            options.setdefault(name, subprocess.DEVNULL)
        return subprocess.Popen(words, stderr=self._errors, **options)

    def seconds(self, words: Sequence[str], **options: Any) -> float:
        """How long a command takes, from spawn to exit."""
        start = time.perf_counter()
        process = self.start(words, **options)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        taken = time.perf_counter() - start
        if code:
            raise Broken("%s: exit code %d: %s" % (" ".join(words)[:200], code, self.complaint()))
        return taken

    def peak(self, words: Sequence[str]) -> Tuple[float, float]:
        """(seconds, MB of memory at its peak) of a command."""
        process = self.start([sys.executable, "-I", "-S", "-c", PEAK] + list(words),
                             stdout=subprocess.PIPE)
        out = process.communicate()[0]
        if process.returncode:
            raise Broken("%s: %s" % (" ".join(words)[:200], self.complaint()))
        taken, peak = json.loads(out)
        return taken, peak / (1024 ** 2 if sys.platform == "darwin" else 1024)

    def complaint(self) -> str:
        with open(self.path("stderr"), "rb") as file:
            return file.read()[-500:].decode("utf-8", "replace").strip()

    def queue(self, db: str) -> Any:
        return self.module.Queue(db)

    def fresh(self, name: str, jobs: Iterable[Dict[str, Any]] = ()) -> str:
        """An empty database, or one with these jobs."""
        db = self.path(name)
        self.remove(db)
        self.add(db, jobs)
        return db

    def add(self, db: str, jobs: Iterable[Dict[str, Any]]) -> None:
        with self.queue(db) as queue:
            for _ in queue.enqueue_many(jobs):
                pass
        settle()

    def copy(self, db: str, name: str) -> str:
        copy = self.path(name)
        self.remove(copy)
        shutil.copyfile(db, copy)
        os.chmod(copy, 0o600)
        settle()
        return copy

    def remove(self, db: str) -> None:
        for path in (db, db + "-wal", db + "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        shutil.rmtree(db + "-run", ignore_errors=True)

    @contextlib.contextmanager
    def workers(self, db: str, count: int) -> Iterator[subprocess.Popen[bytes]]:
        """`count` running workers, by their supervisor; stopped at the end."""
        supervisor = self.start(self.command(db, "worker", "start", "--count", str(count),
                                             "--quiet"))
        try:
            with self.queue(db) as queue:
                self.await_that(lambda: len(queue.workers()) == count, 0.01)
            yield supervisor
        finally:
            supervisor.terminate()
            try:
                supervisor.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                raise Broken("the workers did not stop") from None

    def await_that(self, condition: Callable[[], bool], pause: float) -> float:
        """Wait until a condition holds; when it was seen to (time.perf_counter)."""
        give_up = time.perf_counter() + PATIENCE
        while not condition():
            if time.perf_counter() > give_up:
                raise Broken("waited in vain for the workers: %s" % self.complaint())
            time.sleep(pause)
        return time.perf_counter()


def load(program: str) -> Any:
    """queuectl as a library."""
    spec = importlib.util.spec_from_file_location("queuectl", program)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["queuectl"] = module
    spec.loader.exec_module(module)
    return module


def settle() -> None:
    """Have everything written out, so that it does not load the disk while we measure."""
    if hasattr(os, "sync"):
        os.sync()


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def batch(prefix: str, count: int, **fields: Any) -> Iterator[Dict[str, Any]]:
    """Jobs prefix0, prefix1, ... that do nothing."""
    return (dict(dict(command="true"), id="%s%d" % (prefix, number), **fields)
            for number in range(count))


def write_lines(path: str, jobs: Iterable[Dict[str, Any]]) -> str:
    with open(path, "w") as file:
        file.writelines(json.dumps(job) + "\n" for job in jobs)
    return path


def in_turn(measures: Dict[str, Callable[[], float]], rounds: int) -> Dict[str, List[float]]:
    """Measure each, again and again: A B C, A B C, ..."""
    found: Dict[str, List[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


# -- draining -----------------------------------------------------------------------------

def drain(lab: Lab) -> Iterator[Row]:
    """Jobs `true` with two workers against other tools: jobs per second of whole commands."""
    count, few = lab.sizes.drained, lab.sizes.peer_jobs
    full = lab.fresh("drain-full.db", batch("j", count))
    lines = lab.fresh("drain-lines.db", batch("j", count, command="true;"))
    programs = lab.fresh("drain-programs.db", batch("j", count, command=PROGRAM_JOB))
    peers: Dict[str, Callable[[], float]] = {}
    others = {"lines": lambda: drain_all(lab, lines, count),
              "programs": lambda: drain_all(lab, programs, count),
              "nothing": lambda: drain_nothing(lab)}
    if shutil.which("xargs"):
        peers["xargs -P2"] = lambda: xargs(lab, count)
        others["xargs"] = lambda: xargs(lab, count, PROGRAM_JOB)
    if shutil.which("tsp"):
        peers["task-spooler"] = lambda: task_spooler(lab, few)
    if is_gnu_parallel():
        peers["GNU parallel -j2"] = lambda: gnu_parallel(lab, few)
    found = in_turn(dict(peers, queuectl=lambda: drain_all(lab, full, count), **others),
                    lab.sizes.pairs)
    ours = found["queuectl"]
    for name in peers:
        yield ratio_row("drain %s jobs, 2 workers / %s" % ("{:,}".format(count), name),
                        at_least(1.0, "x"), ours, found[name], "%d jobs/s against %d" % (
                            statistics.median(ours), statistics.median(found[name])))
    if "xargs" in others:
        yield ratio_row("the same of a program, %s / xargs -P2" % PROGRAM_JOB, at_least(1.0, "x"),
                        found["programs"], found["xargs"], "%d jobs/s against %d" % (
                            statistics.median(found["programs"]),
                            statistics.median(found["xargs"])))
    yield ratio_row("the same of lines for the shell, `true;` / of `true`", None,
                    found["lines"], ours, "%d jobs/s" % statistics.median(found["lines"]))
    yield Row("drain 0 jobs, 2 workers", None, 1000 * statistics.median(found["nothing"]), "ms",
              "start and stop, which are part of the drains above")


def drain_nothing(lab: Lab) -> float:
    return lab.seconds(lab.command(lab.fresh("empty.db"), "worker", "start", "--count", "2",
                                   "--drain", "--quiet"))


def drain_all(lab: Lab, full: str, count: int) -> float:
    db = lab.copy(full, "drain.db")
    taken = lab.seconds(lab.command(db, "worker", "start", "--count", "2", "--drain", "--quiet"))
    with lab.queue(db) as queue:
        if queue.counts()["completed"] != count:
            raise Broken("not every job completed: %s" % queue.counts())
    return count / taken


def against(lab: Lab) -> Iterator[Row]:
    """This version in turn with another one (--against): jobs per second of whole commands."""
    if not os.path.exists(lab.other):
        return
    count, many = lab.sizes.drained, lab.sizes.bulk
    few_lines = write_lines(lab.path("few.jsonl"), batch("j", count))
    many_lines = write_lines(lab.path("many.jsonl"), batch("j", many))
    programs = {"this": lab.program, "other": lab.other}
    found = in_turn({name: partial(drain_file, lab, program, few_lines, count)
                     for name, program in programs.items()}, lab.sizes.against_pairs)
    yield ratio_row("drain %s jobs, 2 workers / another version" % "{:,}".format(count),
                    at_least(0.97, "x"), found["this"], found["other"],
                    rates(found["this"], found["other"]))
    found = in_turn({name: lambda program=program: many / store_file(lab, program, many_lines)[1]
                     for name, program in programs.items()}, lab.sizes.pairs)
    yield ratio_row("enqueue --file, %s jobs / another version" % "{:,}".format(many),
                    at_least(0.85, "x"), found["this"], found["other"],
                    rates(found["this"], found["other"]))


def store_file(lab: Lab, program: str, lines: str) -> Tuple[str, float]:
    """A new database with the jobs of a file, and the seconds that it took."""
    db = lab.path("against.db")
    lab.remove(db)
    settle()
    return db, lab.seconds(lab.command(db, "enqueue", "--file", lines, program=program))


def drain_file(lab: Lab, program: str, lines: str, count: int) -> float:
    db, _ = store_file(lab, program, lines)
    settle()
    return count / lab.seconds(lab.command(db, "worker", "start", "--count", "2", "--drain",
                                           "--quiet", program=program))


def xargs(lab: Lab, count: int, command: str = "true") -> float:
    with open(write_lines(lab.path("lines"), batch("j", count)), "rb") as lines:
        settle()
        return count / lab.seconds(["xargs", "-P2", "-I{}", "sh", "-c", command], stdin=lines)


def task_spooler(lab: Lab, count: int) -> float:
    """Its jobs are all queued behind two that wait at a gate, so that only running counts."""
    env = dict(lab.env, TS_SOCKET=lab.path("tsp"), TS_MAXFINISHED="10")
    gate = lab.path("gate")
    os.mkfifo(gate)
    fd = os.open(gate, os.O_RDWR)
    try:
        lab.seconds(["tsp", "-S", "2"], env=env)
        for _ in range(2):
            lab.seconds(["tsp", "-n", "sh", "-c", "read line <" + gate], env=env)
        for _ in range(count):
            lab.seconds(["tsp", "-n", "sh", "-c", "true"], env=env)
        start = time.perf_counter()
        os.write(fd, b"\n\n")
        lab.seconds(["tsp", "-w"], env=env)
        return count / (time.perf_counter() - start)
    finally:
        lab.start(["tsp", "-K"], env=env).wait()
        os.close(fd)
        os.unlink(gate)


def is_gnu_parallel() -> bool:
    found = shutil.which("parallel")
    return bool(found) and b"GNU" in subprocess.run(
        [found or "", "--version"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        check=False).stdout


def gnu_parallel(lab: Lab, count: int) -> float:
    with open(write_lines(lab.path("lines"), batch("j", count)), "rb") as lines:
        return count / lab.seconds(["parallel", "-j2", "-N0", "true"], stdin=lines)


def drain_rate(lab: Lab, db: str, workers: int, prefix: str, first: int = 0) -> float:
    """Completions per second of running workers that take jobs prefix<first>, ... in turn."""
    def completed(number: int) -> bool:
        return bool(queue.get("%s%d" % (prefix, number)).state == "completed")

    begin, end = first + WARM_UP, first + WARM_UP + lab.sizes.timed
    with lab.queue(db) as queue, lab.workers(db, workers):
        start = lab.await_that(lambda: completed(begin), 0.002)
        taken = lab.await_that(lambda: completed(end), 0.002) - start
    return lab.sizes.timed / taken


def rate_on_empty(lab: Lab, workers: int = 2) -> float:
    """The rate where nothing is in the queue but the jobs that are drained."""
    return drain_rate(lab, lab.fresh("empty.db", batch("e", lab.sizes.timed + 2 * WARM_UP)),
                      workers, "e")


def size(lab: Lab) -> str:
    return "{:,}".format(lab.sizes.big)


def ready(lab: Lab) -> Iterator[Row]:
    """The drain rate with very many ready rows."""
    db = lab.once("%s ready rows" % size(lab), build_ready)[0]
    position = [0]

    def rate() -> float:
        found = drain_rate(lab, db, 2, "r", position[0])
        with lab.queue(db) as queue:
            while queue.get("r%d" % position[0]).state == "completed":
                position[0] += 1
        return found

    found = in_turn({"empty": lambda: rate_on_empty(lab), "ready": rate}, lab.sizes.rate_pairs)
    yield ratio_row("drain rate, %s ready rows / empty queue" % size(lab), at_least(0.9, "x"),
                    found["ready"], found["empty"], rates(found["ready"], found["empty"]))


def mixed(lab: Lab) -> Iterator[Row]:
    """The drain rate with very many rows that are for later or have completed."""
    db = lab.once("%s future and as many completed rows" % size(lab), build_mixed)
    turn = [0]

    def rate() -> float:
        turn[0] += 1
        prefix = "m%d-" % turn[0]
        lab.add(db, batch(prefix, lab.sizes.timed + 2 * WARM_UP))
        return drain_rate(lab, db, 2, prefix)

    found = in_turn({"empty": lambda: rate_on_empty(lab), "mixed": rate}, lab.sizes.rate_pairs)
    yield ratio_row("drain rate, %s future + %s completed / empty" % (size(lab), size(lab)),
                    at_least(0.9, "x"), found["mixed"], found["empty"],
                    rates(found["mixed"], found["empty"]))


def rates(over: Sequence[float], under: Sequence[float]) -> str:
    return "%d jobs/s against %d" % (statistics.median(over), statistics.median(under))


def scaling(lab: Lab) -> Iterator[Row]:
    """The drain rate may not fall as workers are added."""
    counts = (1, 2, 4, 8, 16)
    found = in_turn({str(count): partial(rate_on_empty, lab, count) for count in counts},
                    lab.sizes.rate_pairs)
    for count in counts:
        yield ratio_row("drain rate, %d worker%s / 2 workers" % (count, "s" * (count > 1)),
                        at_least(0.95, "x") if count > 2 else None, found[str(count)], found["2"],
                        "%d jobs/s" % statistics.median(found[str(count)]))


# -- big databases ------------------------------------------------------------------------

def build_ready(lab: Lab) -> Tuple[str, float, float]:
    """(database, seconds, MB) of one `enqueue --file`."""
    db, count = lab.path("ready.db"), lab.sizes.big
    lines = write_lines(lab.path("ready.jsonl"), batch("r", count))
    taken, peak = lab.peak(lab.command(db, "enqueue", "--file", lines))
    os.unlink(lines)
    settle()
    return db, taken, peak


def build_mixed(lab: Lab) -> str:
    count = lab.sizes.big
    db = lab.fresh("mixed.db", batch("model", 1))
    lab.seconds(lab.command(db, "worker", "start", "--drain", "--quiet"))
    with contextlib.closing(sqlite3.connect(db, timeout=PATIENCE)) as connection:
        clone(connection, "jobs", {"seq": "n", "id": "'done' || n", "run": "n"}, count)
        clone(connection, "runs", {"run": "n", "job": "n"}, count)
        connection.commit()
    lab.add(db, batch("f", count, delay="7d"))
    return db


def clone(connection: sqlite3.Connection, table: str, keys: Dict[str, str], count: int) -> None:
    """Copy the only row of a table. Of the schema this knows just the keys, as functions of
    the number n of a copy."""
    others = ", ".join(row[1] for row in connection.execute("PRAGMA table_info(%s)" % table)
                       if row[1] not in keys)
    connection.execute(
        "WITH RECURSIVE numbers(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM numbers WHERE n <= %d)"
        " INSERT INTO %s (%s, %s) SELECT %s, %s FROM numbers, (SELECT %s FROM %s)" % (
            count, table, ", ".join(keys), others, ", ".join(keys.values()), others, others, table))


def bulk(lab: Lab) -> Iterator[Row]:
    """`enqueue --file`: speed, and memory that does not grow with the file."""
    count = lab.sizes.bulk
    lines = write_lines(lab.path("bulk.jsonl"), batch("b", count))

    def once() -> Tuple[float, float]:
        lab.remove(lab.path("bulk.db"))
        return lab.peak(lab.command(lab.path("bulk.db"), "enqueue", "--file", lines))

    found = [once() for _ in range(lab.sizes.writer_pairs)]
    speeds = [count / taken for taken, _ in found]
    peak = statistics.median(peak for _, peak in found)
    yield Row("enqueue --file, %s jobs" % "{:,}".format(count), at_least(100000, "jobs/s"),
              statistics.median(speeds), "jobs/s",
              "%s to %s; peak %.0f MB" % (short(min(speeds)), short(max(speeds)), peak))
    _, taken, big_peak = lab.once("%s ready rows" % size(lab), build_ready)
    yield Row("enqueue --file, %s jobs: peak memory" % size(lab), at_most(1.5, "x"),
              big_peak / peak, "x", "%.0f MB, against %.0f MB for %s jobs; %s jobs/s" % (
                  big_peak, peak, "{:,}".format(count), short(lab.sizes.big / taken)))


def big_looks(lab: Lab) -> Iterator[Row]:
    """`status` and `list` over very many rows; each is a whole command."""
    db = lab.once("%s future and as many completed rows" % size(lab), build_mixed)
    empty = lab.fresh("empty.db")
    rows = "{:,}".format(2 * lab.sizes.big)
    for words, limit in (("status", 1.0), ("list --limit 20", 0.2)):
        found = in_turn({where: partial(lab.seconds, lab.command(where, *words.split()))
                         for where in (empty, db)}, 5)
        yield Row("%s over %s rows" % (words, rows), below(limit, "s"),
                  statistics.median(found[db]), "s",
                  "%s s on an empty queue" % short(statistics.median(found[empty])))
    many, few = lab.sizes.listed, 1000
    taken, peak = lab.peak(lab.command(db, "list", "--json", "--limit", str(many)))
    _, small = lab.peak(lab.command(db, "list", "--json", "--limit", str(few)))
    yield Row("list --json of %s rows: peak memory" % "{:,}".format(many), at_most(1.2, "x"),
              peak / small, "x", "%.1f MB, against %.1f MB for %d rows; %s rows/s" % (
                  peak, small, few, short(many / taken)))


# -- enqueueing ---------------------------------------------------------------------------

def enqueue(lab: Lab) -> Iterator[Row]:
    """A call from the shell, against an interpreter that does next to nothing."""
    db = lab.fresh("enqueue.db")
    imports = "import argparse, json, sqlite3"
    compiling = imports + "; compile(open(%r, 'rb').read(), 'queuectl.py', 'exec')" % lab.program
    found = in_turn({
        "enqueue": lambda: lab.seconds(lab.command(db, "enqueue", "true")),
        "compiling": lambda: lab.seconds([sys.executable, "-c", compiling]),
        "imports": lambda: lab.seconds([sys.executable, "-c", imports]),
        "cached": lambda: lab.seconds([sys.executable, "-m", "queuectl", "--db", db, "enqueue",
                                       "true"]),
        "bare": lambda: lab.seconds([sys.executable, "-c", ""]),
    }, lab.sizes.calls)
    ms = {name: 1000 * statistics.median(values) for name, values in found.items()}
    yield ratio_row("enqueue / interpreter, imports and compiling", at_most(1.2, "x"),
                    found["enqueue"], found["compiling"],
                    "%.0f ms against %.0f" % (ms["enqueue"], ms["compiling"]))
    yield ratio_row("enqueue / interpreter and imports", at_most(2.5, "x"),
                    found["enqueue"], found["imports"], "%.0f ms against %.0f; bare: %.0f" % (
                        ms["enqueue"], ms["imports"], ms["bare"]))
    yield ratio_row("enqueue by `python3 -m queuectl` / the same", at_most(1.25, "x"),
                    found["cached"], found["imports"],
                    "%.0f ms: bytecode is cached, nothing is compiled" % ms["cached"])


def start(lab: Lab) -> Iterator[Row]:
    """From enqueue's return to the first act of the job, on idle workers."""
    fifo = lab.path("started")
    os.mkfifo(fifo)
    fd = os.open(fifo, os.O_RDWR)
    waits = []
    db = lab.fresh("start.db")
    try:
        with lab.queue(db) as queue, lab.workers(db, 4):
            for _ in range(lab.sizes.starts):
                time.sleep(random.uniform(0.01, 0.2))  # before and after a worker's sync
                queue.enqueue("echo >" + fifo)
                begin = time.perf_counter()
                if not select.select([fd], [], [], PATIENCE)[0]:
                    raise Broken("a job did not start")
                waits.append(1000 * (time.perf_counter() - begin))
                os.read(fd, 1)
    finally:
        os.close(fd)
    note = "to the job's own first act; 4 workers, %d jobs, longest %.1f ms" % (
        len(waits), max(waits))
    yield Row("enqueue to start, idle workers: p50", below(4, "ms"), percentile(waits, .5), "ms",
              note)
    yield Row("enqueue to start, idle workers: p99", below(10, "ms"), percentile(waits, .99), "ms")


def busy(lab: Lab) -> Iterator[Row]:
    """API enqueues, one every 5 ms, while two workers drain; and while none does."""
    count = lab.sizes.enqueues
    db = lab.fresh("busy.db", batch("j", 12 * count))
    with lab.queue(db) as queue:
        calm = enqueue_times(queue, count)
        with lab.workers(db, 2):
            waits = enqueue_times(queue, count)
        if queue.counts()["pending"] == 0:
            raise Broken("the queue ran empty")
    note = "%d enqueues; without workers: p50 %.2f, p99 %.2f ms" % (
        count, percentile(calm, .5), percentile(calm, .99))
    yield Row("enqueue while 2 workers drain: p50", None, percentile(waits, .5), "ms", note)
    yield Row("enqueue while 2 workers drain: p99", below(5, "ms"), percentile(waits, .99), "ms",
              "longest %.1f ms" % max(waits))


def enqueue_times(queue: Any, count: int) -> List[float]:
    """Milliseconds that each enqueue took."""
    found = []
    for _ in range(count):
        time.sleep(0.005)
        begin = time.perf_counter()
        queue.enqueue("true")
        found.append(1000 * (time.perf_counter() - begin))
    return found


def writers(lab: Lab) -> Iterator[Row]:
    """16 processes enqueue as fast as they can, against SQLite's own way to wait."""
    found: Dict[str, List[List[float]]] = {"queuectl": [], "sqlite": []}
    for _ in range(lab.sizes.writer_pairs):
        for kind, results in found.items():
            results.append(compete(lab, kind))
    worst = {kind: [result[0] for result in results] for kind, results in found.items()}
    commits = {kind: short(statistics.median(result[1] for result in results))
               for kind, results in found.items()}
    yield ratio_row("longest wait of 16 writers / SQLite's busy handler", below(1.0, "x"),
                    worst["queuectl"], worst["sqlite"],
                    "%.2f s against %.2f; %s enqueues/s against %s bare inserts" % (
                        max(worst["queuectl"]), max(worst["sqlite"]),
                        commits["queuectl"], commits["sqlite"]))


def compete(lab: Lab, kind: str) -> List[float]:
    """[longest wait in seconds, commits per second] of 16 writers at once."""
    db = lab.fresh("writers.db")
    if kind == "sqlite":
        lab.remove(db)
        with contextlib.closing(sqlite3.connect(db)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE jobs (id TEXT UNIQUE, command TEXT)")
    begin = time.time() + 2
    words = [sys.executable, BENCH, "--writer", kind, lab.program, db, repr(begin),
             repr(begin + lab.sizes.writer_seconds)]
    processes = [lab.start(words, stdout=subprocess.PIPE) for _ in range(16)]
    outs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise Broken("a writer failed: %s" % lab.complaint())
    results = [json.loads(out) for out in outs]
    return [max(longest for longest, _ in results),
            sum(commits for _, commits in results) / lab.sizes.writer_seconds]


# -- idling -------------------------------------------------------------------------------

def idle(lab: Lab) -> Iterator[Row]:
    """What four workers and their supervisor cost while nothing is to be done."""
    if not os.path.exists("/proc/self/smaps_rollup"):
        return
    db = lab.fresh("idle.db", batch("j", 40))
    with lab.queue(db) as queue, contextlib.ExitStack() as stack:
        # As they are meant to stay: in the background, where they import the file, whose bytecode
        # is there from the second time on.
        lab.seconds([sys.executable, "-c", "import queuectl"])
        lab.seconds(lab.command(db, "worker", "start", "--count", "4", "--detach"))
        stack.callback(lab.seconds, lab.command(db, "worker", "stop"))
        lab.await_that(lambda: queue.counts()["completed"] == 40, 0.05)
        time.sleep(2)
        pids = [info.pid for info in queue.workers(supervisors=True)]
        begin, before = time.perf_counter(), sum(map(cpu_seconds, pids))
        time.sleep(lab.sizes.idle_seconds)
        used = sum(map(cpu_seconds, pids)) - before
        share = 100 * used / (time.perf_counter() - begin)
        pss = [proc_kb(pid, "Pss:") / 1024 for pid in pids]
        rss = [proc_kb(pid, "Rss:") / 1024 for pid in pids]
    yield Row("four idle workers and their supervisor: CPU", below(0.1, "%"), share, "%",
              "of one core, over %.0f s" % lab.sizes.idle_seconds)
    yield Row("four idle workers and their supervisor: PSS", below(30, "MB"), sum(pss), "MB",
              "supervisor %.1f, workers %.1f each; RSS together %.0f" % (
                  pss[0], sum(pss[1:]) / 4, sum(rss)))


def cpu_seconds(pid: int) -> float:
    """CPU time of a process of one thread: from schedstat to the nanosecond, where the
    kernel keeps it, else from stat to a hundredth of a second."""
    with contextlib.suppress(OSError), open("/proc/%d/schedstat" % pid) as file:
        nanoseconds = int(file.read().split()[0])
        if nanoseconds:
            return nanoseconds / 1e9
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def proc_kb(pid: int, key: str) -> int:
    with open("/proc/%d/smaps_rollup" % pid) as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


# -- the page -----------------------------------------------------------------------------

class Tab:
    """What a browser asks of a running `web`."""

    def __init__(self, lab: Lab, db: str) -> None:
        self.process = lab.start(lab.command(db, "web"), stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        url = self.process.stdout.readline().decode().strip()
        self.port = int(url.split(":")[2].split("/")[0])
        self.cookie = ""
        response = self.ask("/" + url.rpartition("/")[2])
        self.cookie = (response.getheader("Set-Cookie") or "").partition(";")[0]

    def ask(self, path: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", path, headers={"Cookie": self.cookie})
        response = connection.getresponse()
        if response.status != 200:
            raise Broken("%s: %d %r" % (path, response.status, response.read()))
        return response

    def first_byte(self, path: str) -> float:
        start = time.perf_counter()
        with self.ask(path) as response:
            response.read(1)
            return time.perf_counter() - start

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def cpu(self) -> float:
        """CPU seconds of all its threads."""
        found = 0.0
        for name in glob.glob("/proc/%d/task/*/schedstat" % self.process.pid):
            with open(name) as file:
                found += int(file.read().split()[0]) / 1e9
        return found


def page(lab: Lab) -> Iterator[Row]:
    """`web`: the first byte of each page with very many jobs, and an open tab where nothing is."""
    db = lab.once("%s ready rows" % size(lab), build_ready)[0]
    tab = Tab(lab, db)

    def look(path: str) -> float:
        if path != "/events":
            return tab.first_byte(path)
        new = Tab(lab, db)  # the other one may know the answer already
        try:
            return new.first_byte(path)
        finally:
            new.close()

    try:
        paths = ("/", "/events", "/jobs", "/jobs?before=%d" % (lab.sizes.big // 2),
                 "/jobs?state=pending", "/jobs?state=dead", "/jobs?queue=default",
                 "/jobs?queue=nobody", "/jobs?word=nothing+like+it", "/job?id=r7",
                 "/job?id=r%d" % (lab.sizes.big - 1))
        found = in_turn({path: partial(look, path) for path in paths}, 5)
        for path in paths:
            yield Row("web, %s jobs: first byte of %s" % (size(lab), path), below(0.2, "s"),
                      statistics.median(found[path]), "s", "longest %.3f" % max(found[path]))
        with tab.ask("/events") as stream:
            stream.read(1)
            time.sleep(2)
            begin, before = time.perf_counter(), tab.cpu()
            time.sleep(2 * lab.sizes.idle_seconds)
            share = 100 * (tab.cpu() - before) / (time.perf_counter() - begin)
        yield Row("web with an open tab where nothing changes: CPU", below(0.1, "%"), share, "%",
                  "of one core, over %.0f s" % (2 * lab.sizes.idle_seconds))
    finally:
        tab.close()


# -- processes of our own -----------------------------------------------------------------

def writer_main(kind: str, program: str, db: str, begin: str, end: str) -> None:
    """One of the competing writers: prints [longest wait in seconds, commits]."""
    if kind == "queuectl":
        queue = load(program).Queue(db)

        def write(number: int) -> None:
            queue.enqueue("true")
    else:
        connection = sqlite3.connect(db, timeout=PATIENCE, isolation_level=None)
        connection.execute("PRAGMA synchronous = FULL")

        def write(number: int) -> None:
            connection.execute("INSERT INTO jobs VALUES (?, 'true')",
                               ("%d-%d" % (os.getpid(), number),))

    time.sleep(max(0.0, float(begin) - time.time()))
    longest, commits = 0.0, 0
    while time.time() < float(end):
        start = time.perf_counter()
        write(commits)
        longest = max(longest, time.perf_counter() - start)
        commits += 1
    print(json.dumps([longest, commits]))


# -- main ---------------------------------------------------------------------------------

MEASURES: Dict[str, Callable[[Lab], Iterator[Row]]] = {
    "drain": drain, "against": against, "bulk": bulk, "ready": ready, "mixed": mixed,
    "scaling": scaling, "enqueue": enqueue, "start": start, "busy": busy, "writers": writers,
    "idle": idle, "big-looks": big_looks, "page": page,
}


def describe(program: str) -> str:
    with open(program, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()[:12]
    load_text = "load %.1f" % os.getloadavg()[0] if hasattr(os, "getloadavg") else ""
    return "queuectl.py %s, Python %s (%s), SQLite %s, %s, %s cores, %s" % (
        digest, sys.version.split()[0], sys.executable, sqlite3.sqlite_version, sys.platform,
        os.cpu_count(), load_text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure queuectl against its goals for speed.")
    parser.add_argument("--quick", action="store_true", help="under a minute: smaller, noisier")
    parser.add_argument("--only", metavar="NAME,...", help="some of: " + ", ".join(MEASURES))
    parser.add_argument("--python", metavar="PATH", help="the interpreter under test (this one)")
    parser.add_argument("--program", metavar="PATH", default=PROGRAM,
                        help="the queuectl.py under test (the one beside this folder)")
    parser.add_argument("--against", metavar="PATH", help="another queuectl.py")
    args = parser.parse_args()
    args.names = args.only.split(",") if args.only else list(MEASURES)
    unknown = [name for name in args.names if name not in MEASURES]
    if unknown:
        parser.error("--only knows %s; not %s" % (", ".join(MEASURES), ", ".join(unknown)))
    return args


def main() -> int:
    if sys.argv[1:2] == ["--writer"]:
        writer_main(*sys.argv[2:])
        return 0
    args = parse_arguments()
    if args.python and os.path.abspath(args.python) != sys.executable:
        return subprocess.call([args.python, BENCH, "--program", args.program, "--only",
                                ",".join(args.names)] + ["--quick"] * args.quick
                               + ["--against", args.against] * bool(args.against))
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(143))  # cleaning up
    begin, rows, broken = time.perf_counter(), [], False
    heading = describe(args.program)
    with tempfile.TemporaryDirectory(prefix="queuectl-bench-") as folder:
        lab = Lab(folder, os.path.abspath(args.program),
                  args.against and os.path.abspath(args.against),
                  QUICK if args.quick else Sizes())
        for name in args.names:
            tell("%s: %s" % (name, (MEASURES[name].__doc__ or "").split("\n")[0]))
            try:
                rows += list(MEASURES[name](lab))
            except Exception as error:  # noqa: BLE001 - the others can still be measured
                broken = True
                tell("%s is broken: %s: %s" % (name, type(error).__name__, error))
        os.chdir(os.sep)
    print("%s; %.0f s%s\n" % (heading, time.perf_counter() - begin, ", quick" * args.quick))
    print_table(rows)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
