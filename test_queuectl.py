#!/usr/bin/env python3
"""The tests of queuectl, in the order of its rooms: python3 test_queuectl.py

Everything runs in folders of its own; the user's own queue is never touched. Nothing sleeps
and hopes: a job meets its test at FIFOs (class Meeting), everything else is awaited as an
event. QUEUECTL_CHAOS_KILLS=2000 makes the chaos test longer.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import queuectl  # noqa: E402
from queuectl import Queue, QueueError  # noqa: E402

SCRIPT = os.path.join(HERE, "queuectl.py")
PATIENCE = 60.0  # seconds after which an awaited event counts as missing
ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else False


def default_signals():
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


class Case(unittest.TestCase):
    """A folder and a database of its own, a clean environment, and ways to call queuectl."""

    maxDiff = None

    def setUp(self):
        self.dir = os.path.realpath(tempfile.mkdtemp(prefix="queuectl-test-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.db = os.path.join(self.dir, "q.db")
        self.env = {key: value for key, value in os.environ.items()
                    if not key.startswith("QUEUECTL_")
                    and key not in ("NO_COLOR", "COLUMNS", "PYTHONUNBUFFERED")}
        self.env.update(HOME=self.dir, XDG_STATE_HOME=os.path.join(self.dir, "state"),
                        QUEUECTL_DB=self.db)
        patch = mock.patch.dict(os.environ, self.env, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        self.processes = []
        self.addCleanup(self.end_processes)

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def queue(self, **options):
        """A Queue on this test's database, closed at its end."""
        queue = Queue(self.db, **options)
        self.addCleanup(queue.close)
        return queue

    # Calling it. main() runs in this process, which is quick; cli() is the real thing.

    def main(self, *words, stdin=b""):
        """(exit code, stdout, stderr) of a command line, run in this process."""
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8")):
            code = queuectl.main([str(word) for word in words])
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode("utf-8", "backslashreplace"))
        return code, texts[0], texts[1]

    def ok(self, *words, stdin=b""):
        """stdout of a command line that must succeed."""
        code, out, err = self.main(*words, stdin=stdin)
        self.assertEqual(code, 0, "%s: %s" % (words, err))
        return out

    def refused(self, *words, stdin=b"", code=None, says=""):
        """A command line must fail with one clear line, and print no data."""
        got, out, err = self.main(*words, stdin=stdin)
        self.assertIn(got, (1, 2) if code is None else (code,), "%s: %s%s" % (words, out, err))
        self.assertEqual(out, "", words)
        self.assertRegex(err, r"\Aqueuectl: [^\n]+\n\Z", words)
        self.assertIn(says, err)
        return err

    def cli(self, *words, stdin=None, env=None, timeout=PATIENCE, cwd=None):
        """(exit code, stdout, stderr) of a command line in a process of its own."""
        done = subprocess.run(
            [sys.executable, SCRIPT] + [str(word) for word in words], input=stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout, cwd=cwd,
            env=dict(self.env, **env or {}))
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def start(self, *words, env=None, **options):
        """Start a command line in a process group of its own, ended with the test. Its
        stderr goes to the file `process.log`."""
        log = self.path("log-%d" % len(self.processes))
        with open(log, "wb") as file:
            options.setdefault("stderr", file)
            options.setdefault("stdout", subprocess.DEVNULL)
            # As in a terminal, however this suite was started (nohup, in the background).
            options.setdefault("preexec_fn", default_signals)
            process = subprocess.Popen(
                [sys.executable, SCRIPT] + [str(word) for word in words],
                stdin=subprocess.DEVNULL, env=dict(self.env, **env or {}),
                start_new_session=True, **options)
        process.log = log
        self.processes.append(process)
        return process

    def workers(self, count=1, *words, **options):
        """Start `worker start` and return once all its workers run."""
        process = self.start("worker", "start", "--count", count, *words, **options)
        with Queue(self.db) as queue:
            self.until(lambda: process.poll() is not None or sum(
                info.supervisor == leader.name for leader in queue.workers(supervisors=True)
                if leader.pid == process.pid for info in queue.workers()) == count)
        self.assertIsNone(process.poll(), read_file(process.log))
        return process

    def drain(self, *words, code=0):
        """Run workers until nothing is left to do."""
        got, _, err = self.cli("worker", "start", "--drain", *words)
        self.assertEqual(got, code, err)
        return err

    def end_processes(self):
        """End what this test started: the supervisors, their workers and their jobs. All on
        this test's database are its own."""
        infos = []
        if self.processes and os.path.exists(self.db):
            with contextlib.suppress(QueueError), Queue(self.db) as queue:
                infos = queue.order_stop(queuectl.NOW)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10 if infos else 0)
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        for info in infos:
            if queuectl.is_held(os.path.join(self.db + "-run", info.name + ".lock")):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(info.pid, signal.SIGKILL)

    # Waiting for events.

    def until(self, condition, message="the awaited event did not come"):
        """The first true value of condition(). For what offers no descriptor to wait on:
        looks often, and fails only after PATIENCE."""
        deadline = time.monotonic() + PATIENCE
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                self.fail(message)
            time.sleep(0.005)

    def until_state(self, id, *states):
        """The job, once it is in one of the states (or views)."""
        with Queue(self.db) as queue:
            return self.until(lambda: queue.get(id).view in states and queue.get(id),
                              "job %s is not %s" % (id, states))

    def job(self, id):
        with Queue(self.db) as queue:
            return queue.get(id)

    def runs(self, id):
        with Queue(self.db) as queue:
            return queue.runs(id)

    def output(self, id, number=None):
        with Queue(self.db) as queue:
            return queue.output(queue.runs(id)[(number or 0) - 1].run)

    def meeting(self, name="meeting"):
        return Meeting(self, name)


class Meeting:
    """Where a job (a shell command) meets its test: `meeting.here` in its command says that it
    has arrived and waits until the test lets it go. Its death is an event, too."""

    def __init__(self, case, name):
        self.case = case
        self.paths = {word: case.path("%s.%s" % (name, word)) for word in ("up", "go", "alive")}
        for path in self.paths.values():
            os.mkfifo(path)
        self.up, self.go = (os.open(self.paths[word], os.O_RDWR | os.O_NONBLOCK)
                            for word in ("up", "go"))
        self.alive = os.open(self.paths["alive"], os.O_RDONLY | os.O_NONBLOCK)
        case.addCleanup(self.close)
        # Descriptor 9 stays open in the shell, and in what it starts, until they die.
        self.here = "exec 9>%(alive)s; echo $$ >%(up)s; read line <%(go)s" % {
            word: shlex.quote(path) for word, path in self.paths.items()}

    def close(self):
        """End who has come here and is still alive, then forget them."""
        for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
            with contextlib.suppress(OSError):
                if int(pid) != os.getpid() and os.readlink(
                        "/proc/%s/fd/9" % pid) == self.paths["alive"]:
                    os.kill(int(pid), signal.SIGKILL)
        for fd in (self.up, self.go, self.alive):
            os.close(fd)

    def arrived(self):
        """Wait until a job is here; the process id of its shell."""
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.up], [], [], PATIENCE)
            self.case.assertTrue(ready, "the job did not arrive")
            line += os.read(self.up, 1)
        return int(line)

    def nobody(self):
        """Whether nobody has arrived that has not been awaited."""
        return not select.select([self.up], [], [], 0)[0]

    def let_go(self):
        os.write(self.go, b"go\n")

    def gone(self):
        """Wait until every process that came here is dead."""
        deadline = time.monotonic() + PATIENCE
        while True:
            ready, _, _ = select.select([self.alive], [], [], max(0, deadline - time.monotonic()))
            self.case.assertTrue(ready, "the job is still alive")
            if not os.read(self.alive, 100):
                return


class Shape(Case):
    """queuectl.py keeps to the table of rooms in its design."""

    ROOMS = {  # room: the rooms whose names it may use, besides the imports
        "header": "",
        "errors": "",
        "model": "errors",
        "platform": "errors",
        "schema": "model",
        "storage": "errors model platform schema",
        "runner": "errors model platform",
        "workers": "errors model platform schema storage runner",
        "output": "model",
        "commands": "errors model platform storage workers output",
        "main": "errors model platform schema storage runner workers output commands",
    }
    LAZY = {"dataclasses", "typing", "enum", "uuid", "subprocess", "multiprocessing",
            "http.server"}  # what would slow down every short command
    EXECUTING = {"execute", "executemany", "executescript", "_execute", "_value", "connect"}

    @classmethod
    def setUpClass(cls):
        cls.source = read_file(SCRIPT).decode("utf-8")
        cls.lines = cls.source.splitlines()
        cls.tree = ast.parse(cls.source)
        banners = [(number, re.match(r"# -- (\w+) -+$", line))
                   for number, line in enumerate(cls.lines, 1)]
        cls.banners = [(number, found.group(1)) for number, found in banners if found]

    def room(self, node):
        return ([name for number, name in self.banners if number < node.lineno]
                or ["header"])[-1]

    def names(self, node):
        """(defined, used): the global names of one top-level statement."""
        import symtable
        first = min([node.lineno] + [each.lineno for each in
                                     getattr(node, "decorator_list", ())])
        text = "\n".join(self.lines[first - 1:node.end_lineno]) + "\n"
        defined, used = set(), set()

        def look(table, top):
            for symbol in table.get_symbols():
                if top and (symbol.is_assigned() or symbol.is_imported()
                            or symbol.is_namespace()):
                    defined.add(symbol.get_name())
                if symbol.is_referenced() and (top or symbol.is_global()):
                    used.add(symbol.get_name())
            for child in table.get_children():
                look(child, False)

        look(symtable.symtable(text, "queuectl.py", "exec"), True)
        return defined, used

    def imports(self, top=True):
        """The modules that are imported: when the file is (top), or ever."""
        skipped = {id(inner) for node in self.tree.body if isinstance(node, ast.If)
                   and ("TYPE_CHECKING" in ast.dump(node.test) or "platform" in ast.dump(node.test))
                   for branch in node.body for inner in ast.walk(branch)}
        functions = {id(inner) for node in ast.walk(self.tree)
                     if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
        for node in ast.walk(self.tree):
            if id(node) in skipped or top and id(node) in functions:
                continue
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0)
                yield node.module

    def test_the_rooms_stand_in_their_order(self):
        self.assertEqual([name for _, name in self.banners], list(self.ROOMS)[1:])

    def test_a_room_uses_only_the_rooms_that_it_may(self):
        homes, uses = {}, []
        for node in self.tree.body:
            defined, used = self.names(node)
            room = self.room(node)
            for name in defined:
                homes.setdefault(name, room)
            uses.append((room, node.lineno, used))
        self.assertGreater(len(homes), 200)
        self.assertGreater(sum(len(used) for _, _, used in uses), 500)
        wrong = ["%s (line %d) uses %s of %s" % (room, line, name, homes[name])
                 for room, line, used in uses for name in sorted(used)
                 if homes.get(name, "header") not in self.ROOMS[room].split() + [room, "header"]]
        self.assertEqual(wrong, [])

    def test_only_class_queue_executes_sql(self):
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == "Queue":
                self.assertEqual(self.room(node), "storage")
                continue
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute):
                    self.assertNotIn(inner.attr, self.EXECUTING, "line %d" % inner.lineno)

    def test_only_the_guard_exits(self):
        """And the main function of a worker process; no function that a library calls."""
        guard = self.tree.body[-1]
        self.assertIn("__main__", ast.dump(guard))
        for node in self.tree.body[:-1]:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_main"):
                continue
            self.assertNotIn("sys.exit(", "".join(self.lines[node.lineno - 1:node.end_lineno]),
                             "line %d" % node.lineno)

    def test_it_imports_the_standard_library_only(self):
        import importlib.util
        import sysconfig
        places = tuple(os.path.realpath(sysconfig.get_path(name))
                       for name in ("stdlib", "platstdlib"))
        for name in sorted(set(self.imports(top=False)) - {"msvcrt"}):
            spec = importlib.util.find_spec(name)
            self.assertIsNotNone(spec, name)
            if spec.has_location:  # it is neither built in nor frozen
                self.assertTrue(os.path.realpath(spec.origin).startswith(places), spec.origin)
                self.assertNotIn("site-packages", spec.origin)

    def test_what_is_slow_to_import_is_imported_where_it_is_needed(self):
        self.assertEqual(set(self.imports()) & self.LAZY, set())
        self.assertIn("sqlite3", set(self.imports()))
        show = "import sys; %s; print(*sorted(sys.modules))"
        names = sorted(set(self.imports()) - {"__future__"})
        loaded = [set(subprocess.check_output(
            [sys.executable, "-c", show % code], cwd=HERE, env=self.env).decode().split())
            for code in ("import " + ", ".join(names), "import queuectl")]
        self.assertEqual((loaded[1] - loaded[0]) & self.LAZY, set())
        self.assertIn("queuectl", loaded[1] - loaded[0])

    def test_importing_it_does_nothing(self):
        for name in ("lib", "empty", "home"):
            os.mkdir(self.path(name))
        shutil.copy(SCRIPT, self.path("lib"))
        done = subprocess.run(
            [sys.executable, "-c", "import queuectl"], cwd=self.path("empty"),
            env=dict(self.env, HOME=self.path("home"), PYTHONPATH=self.path("lib"),
                     XDG_STATE_HOME=""), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((done.returncode, done.stdout), (0, b""))
        self.assertEqual(os.listdir(self.path("empty")) + os.listdir(self.path("home")), [])
        self.assertLessEqual(set(os.listdir(self.path("lib"))), {"queuectl.py", "__pycache__"})
        self.assertLessEqual(set(os.listdir(self.dir)), {"lib", "empty", "home"})

    def test_it_is_python_3_8(self):
        ast.parse(self.source, feature_version=(3, 8))

    def test_it_exports_what_it_says(self):
        for name in ("Queue", "QueueError", "main"):
            self.assertIn(name, queuectl.__all__)
        for name in queuectl.__all__:
            self.assertTrue(hasattr(queuectl, name), name)
        self.assertRegex(queuectl.__version__, r"\A\d+\.\d+\.\d+\Z")


class Model(Case):
    """The pure functions, as tables of what goes in and what comes out."""

    def check(self, function, table):
        for given, expected in table:
            with self.subTest(given=given):
                given = given if isinstance(given, tuple) else (given,)
                self.assertEqual(function(*given), expected)

    def check_refused(self, function, values):
        for value in values:
            with self.subTest(value=value), self.assertRaises(QueueError) as caught:
                self.fail("it is read as %r" % (function(value),))
            text = str(caught.exception)
            self.assertTrue(text and "\n" not in text, text)

    def zone(self, name):
        """Let local time be that of a POSIX time zone."""
        def set_zone(value):
            os.environ.pop("TZ", None)
            if value is not None:
                os.environ["TZ"] = value
            time.tzset()
        self.addCleanup(set_zone, os.environ.get("TZ"))
        set_zone(name)

    def test_backoff(self):
        """base ** attempts seconds, capped, whatever attempts is."""
        self.check(queuectl.backoff, [
            ((1, 2, 3600), 2), ((2, 2, 3600), 4), ((3, 2, 3600), 8), ((11, 2, 3600), 2048),
            ((12, 2, 3600), 3600), ((13, 2, 3600), 3600), ((10 ** 6, 2, 3600), 3600),
            ((2 ** 31, 1000, 60), 60), ((1, 0, 3600), 0), ((10 ** 6, 0, 3600), 0),
            ((1, 1.5, 3600), 1.5), ((2, 1.5, 3600), 2.25), ((10 ** 6, 1.5, 3600), 3600),
            ((10 ** 6, 1, 3600), 1), ((10 ** 6, 0.5, 3600), 0), ((3, 10, 0), 0)])

    def test_durations(self):
        self.check(queuectl.parse_duration, [
            ("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("7d", 604800), ("0", 0),
            ("0s", 0), ("1.5h", 5400), ("0.5", 0.5), (90, 90), (0.25, 0.25), (0, 0)])
        self.check_refused(queuectl.parse_duration, [
            "", " ", "s", "m", "soon", "5y", "-1", "-5s", "1h30m", "nan", "inf", "-inf", "nans",
            "infs", "1e400", "9" * 400, -1, -0.5, float("nan"), float("inf"), 1e300, 10 ** 400,
            True, None, [], {}, ["5"], b"5"])
        self.check(queuectl.format_duration, [
            (90, "90s"), (300, "5m"), (3600, "1h"), (604800, "7d"), (0, "0s"), (0.5, "0.5s"),
            (86400, "1d"), (7200, "2h")])
        for seconds in (0, 0.5, 1, 59, 60, 61, 3599, 3600, 5400, 86400, 604800, 10 ** 9):
            self.assertEqual(queuectl.parse_duration(queuectl.format_duration(seconds)), seconds)

    def test_sizes(self):
        self.check(queuectl.parse_size, [
            ("65536", 65536), ("64K", 65536), ("64k", 65536), ("64KiB", 65536), ("64 KiB", 65536),
            ("1M", 1048576), ("0", 0), (65536, 65536), ("1.5K", 1536), ("7b", 7)])
        self.check_refused(queuectl.parse_size, [
            "", "K", "-1", "-1K", "1.5", "64X", "64KK", "many", "nan", "inf", "1e400", "2048M",
            -1, 1.5, float("nan"), float("inf"), True, None, []])
        for size in (0, 1, 1023, 1024, 1536, 65536, 1024 ** 2, 200 * 1024 ** 2):
            self.assertEqual(queuectl.parse_size(queuectl.format_size(size)), size)

    def test_times(self):
        """ISO 8601 (without a zone: local time), epoch seconds, or from now."""
        self.zone("EAST-05:30")
        noon = 1767268800  # 2026-01-01T12:00:00Z
        self.check(lambda text: queuectl.parse_time(text, now=1000), [
            ("2026-01-01T12:00:00Z", noon), ("2026-01-01T12:00Z", noon),
            ("2026-01-01T12:00z", noon), ("2026-01-01 12:00:00.250Z", noon + 0.25),
            ("2026-01-01T12:00:00+00:00", noon), ("2026-01-01T14:00:00+02:00", noon),
            ("2026-01-01T07:00-05:00", noon), ("2026-01-01T17:30", noon),
            ("2026-01-01T17:30:00", noon), ("2026-01-01", noon - 17.5 * 3600),
            (str(noon), noon), ("%d.5" % noon, noon + 0.5), (noon, noon), (noon + 0.5, noon + 0.5),
            ("0", 0), (0, 0), ("+10m", 1600), ("+90", 1090), ("+0", 1000), ("+7d", 605800),
            ("9999-12-31T23:59:59Z", queuectl.MAX_EPOCH)])
        self.check_refused(queuectl.parse_time, [
            "", " ", "tomorrow", "12:00", "2026-13-01", "2026-02-30T12:00", "2026-01-01T25:00",
            "+", "+x", "+-5", "++5", "+nan", "+inf", "-1", -1, "-10m", "10m", "nan", "inf",
            float("nan"), float("inf"), 1e300, 10 ** 400, noon * 1000, "9999-12-31T23:59:59-01:00",
            "0001-01-01T00:00", "1969-12-31T23:59:59Z", True, None, [], {}])

    def test_digits_are_epoch_seconds_on_every_python(self):
        """Also where datetime.fromisoformat reads 20260131 as a date."""
        for text in ("2026", "20260131", "2026001", "202601310800"):
            self.assertEqual(queuectl.parse_time(text), int(text))

    def test_iso_and_back(self):
        """What is printed names the same moment, to the millisecond, for good."""
        self.check(queuectl.iso, [
            (None, None), (0, "1970-01-01T00:00:00.000Z"), (1767268800, "2026-01-01T12:00:00.000Z"),
            (1767268800.25, "2026-01-01T12:00:00.250Z"),
            (queuectl.MAX_EPOCH, "9999-12-31T23:59:59.000Z")])
        self.zone("WEST+8")
        for epoch in (0, 1, 1767268800.5, 951782400.125, queuectl.MAX_EPOCH):
            self.assertEqual(queuectl.from_iso(queuectl.iso(epoch)), epoch)
        for millis in range(1000):
            text = "2026-01-01T12:00:00.%03dZ" % millis
            self.assertEqual(queuectl.iso(queuectl.from_iso(text)), text)

    def test_names(self):
        good = ["a", "job1", "a-b", "a.b/c:d", "\u00fc", "x" * 255, "1", "a,b", "{}", "'", "."]
        self.check(queuectl.parse_name, [(name, name) for name in good])
        self.check_refused(queuectl.parse_name, [
            "", " ", "a b", " a", "a\n", "a\tb", "a\0", "-a", "-", "x" * 256, "\x1b[31m", "\u202e",
            "a\u00a0b", "\udcff", "\x7f", 1, True, None, [], {}, b"a"])

    def test_new_ids(self):
        """Short, easy to type, and names."""
        ids = {queuectl.new_id() for _ in range(1000)}
        self.assertGreater(len(ids), 990)
        for id in ids:
            self.assertRegex(id, r"\A[0-9a-hjkmnp-tv-z]{6}\Z")
            self.assertEqual(queuectl.parse_name(id), id)

    def test_texts(self):
        """UTF-8, no NUL, and what fits one argument of a command: under 128 KiB."""
        limit = 128 * 1024
        for text in ("true", " x ", "a\nb", "\u00fc\u20ac", "x" * (limit - 1),
                     "\u00fc" * (limit // 2 - 1)):
            self.assertEqual(queuectl.parse_text(text), text)
        self.check_refused(queuectl.parse_text, [
            "", " ", "\n\t", "a\0b", "\udcff", "\ud800", "x" * limit, "\u00fc" * (limit // 2),
            1, True, None, [], {}, b"x"])

    def test_environments(self):
        os.environ["COPIED"] = "from here"
        self.check(queuectl.parse_env, [
            ({}, {}), ({"A": "1", "b": ""}, {"A": "1", "b": ""}), ([], {}),
            (["A=1", "B=x=y", "C="], {"A": "1", "B": "x=y", "C": ""}),
            (["COPIED"], {"COPIED": "from here"}), (["A=1", "A=2"], {"A": "2"})])
        self.check_refused(queuectl.parse_env, [
            "A=1", 1, True, {"A": 1}, {"": "x"}, {"A=B": "x"}, {"A": "x\0"}, {"A\0": "x"},
            {"A": "\udcff"}, {"A": "x" * 131072}, {"A": ["x"]}, ["NOT_SET_ANYWHERE"], ["=x"],
            [""], [1], [{"A": "1"}]])

    def test_numbers(self):
        parse = queuectl.parse_integer(-5, 10)
        self.check(parse, [(1, 1), ("1", 1), ("-5", -5), ("+10", 10), (2.0, 2), ("2.0", 2)])
        self.assertIs(type(parse("2.0")), int)
        self.check_refused(parse, [
            "", "x", "1.5", 1.5, 11, "11", -6, "nan", "inf", float("nan"), float("-inf"),
            10 ** 400, "9" * 400, "--1", "1-", "0x5", True, False, None, [], {}])

    def test_printable(self):
        """One line that no terminal takes for a command."""
        self.check(queuectl.printable, [
            ("plain \u00fc", "plain \u00fc"), ("a\nb\tc\rd", "a b c d"),
            ("\x1b[31mred", "\ufffd[31mred"), ("\x9b31m", "\ufffd31m"),
            ("\x07\x08\x7f\0", "\ufffd" * 4),
            ("\u202eabc", "\ufffdabc"), ("\u2028", "\ufffd"), ("\udcff", "\ufffd")])

    def test_exit_errors(self):
        """last_error says what happened, and what to do about it where it can."""
        for arguments, parts in [
            ((1, None, b""), ["exit code 1"]),
            ((3, None, b"one\ntwo\n\n"), ["exit code 3", "two"]),
            ((127, None, b"sh: x: not found\n"), ["exit code 127", "PATH", "--env PATH", "sh: x"]),
            ((126, None, b""), ["exit code 126", "not executable"]),
            ((None, int(signal.SIGKILL), b""), ["SIGKILL"]),
            ((None, 99, b""), ["signal 99"]),
            ((1, None, b"\xff\xfe\n"), ["exit code 1", "\ufffd"]),
        ]:
            text = queuectl.exit_error(*arguments)
            for part in parts:
                self.assertIn(part, text)
            self.assertNotIn("\n", text)
        self.assertLess(len(queuectl.exit_error(1, None, b"x" * 10 ** 6)), 1000)
        self.assertNotIn("one", queuectl.exit_error(3, None, b"one\ntwo\n"))

    def test_next_state(self):
        """Every outcome, with and without a wish to cancel, before and at the last attempt."""
        completed, dead = ("completed", "completed"), ("dead", "dead")
        cancelled, ready = ("cancelled", "cancelled"), ("pending", "pending")
        failed = ("pending", "failed")
        table = {  # (outcome, cancel): (at attempt 1 of 3, at 3 of 3, at 4 of 3)
            ("completed", False): (completed, completed, completed),
            ("completed", True): (completed, completed, completed),
            ("failed", False): (failed, dead, dead),
            ("failed", True): (cancelled, cancelled, cancelled),
            ("timeout", False): (failed, dead, dead),
            ("timeout", True): (cancelled, cancelled, cancelled),
            ("lost", False): (ready, dead, dead),
            ("lost", True): (cancelled, cancelled, cancelled),
            ("interrupted", False): (ready, ready, ready),
            ("interrupted", True): (cancelled, cancelled, cancelled),
            ("cancelled", False): (cancelled, cancelled, cancelled),
            ("cancelled", True): (cancelled, cancelled, cancelled),
        }
        self.assertEqual({outcome for outcome, _ in table}, set(queuectl.OUTCOMES))
        settings = {"backoff_base": 2, "backoff_max": 3600}
        for (outcome, cancel), row in table.items():
            for attempts, (state, view) in zip((1, 3, 4), row):
                with self.subTest(outcome=outcome, cancel=cancel, attempts=attempts):
                    got, hold, kept, run_after = queuectl.next_state(
                        outcome, attempts, 3, cancel, 1000.0, settings)
                    self.assertEqual((got, queuectl.Job(state=got, hold=hold).view), (state, view))
                    self.assertEqual(kept, attempts - (outcome == "interrupted"))
                    self.assertEqual(run_after, 1002.0 if view == "failed" else None)

    def test_the_delays_of_failures(self):
        """2, 4, 8 s; the cap; and a base of 0 retries at once."""
        for attempts, settings, expected in [
            (1, (2, 3600), 1002), (2, (2, 3600), 1004), (3, (2, 3600), 1008),
            (10 ** 6, (2, 3600), 4600), (1, (0, 3600), None), (5, (1.5, 6), 1006),
            (3, (2, 0), None),
        ]:
            state, hold, _, run_after = queuectl.next_state(
                "failed", attempts, 10 ** 7, False, 1000.0,
                dict(zip(("backoff_base", "backoff_max"), settings)))
            self.assertEqual((state, run_after), ("pending", expected))
            self.assertEqual(hold == queuectl.READY, expected is None)

    def test_settings_have_their_defaults(self):
        defaults = {"max_retries": 3, "backoff_base": 2, "backoff_max": 3600, "job_timeout": 300,
                    "kill_grace": 5, "output_limit": 65536, "keep_completed": 604800}
        self.assertEqual(self.queue().settings(), defaults)


class StorageCase(Case):
    """What a worker does, without one."""

    def claim(self, queue, worker="w-1"):
        return queue.turn(None, worker)[1]

    def result(self, claim, outcome="completed", output=b"", **fields):
        return queuectl.Result(**dict(
            dict(run=claim.run, seq=claim.seq, outcome=outcome,
                 output=[(0, output)] if output else [],
                 exit_code=0 if outcome == "completed" else 1, signal=None,
                 error=None if outcome == "completed" else outcome,
                 finished_at=time.time(), seconds=0.0), **fields))

    def settle(self, queue, claim, outcome="completed", **fields):
        return queue.turn(self.result(claim, outcome, **fields), None)[0]

    def end(self, queue, id, state):
        """Let a job that is next end as completed, dead or cancelled."""
        if state == "cancelled":
            queue.cancel([id])
        else:
            claim = self.claim(queue)
            self.assertEqual(claim.id, id)
            self.settle(queue, claim, "completed" if state == "completed" else "failed")
        self.assertEqual(queue.get(id).state, state)

    def ids(self, jobs):
        return [job.id for job in jobs]

    def clock(self, now=1800000000.0):
        """A wall clock that stands still: clock.now is the time."""
        clock = mock.Mock(now=now)
        clock.side_effect = lambda: clock.now
        patch = mock.patch("time.time", clock)
        patch.start()
        self.addCleanup(patch.stop)
        return clock

    def refuses(self, says, method, *arguments, **options):
        with self.assertRaises(QueueError) as caught:
            result = method(*arguments, **options)
            self.fail("not refused: %r" % (result,))
        self.assertIn(says, str(caught.exception))


class Schema(StorageCase):
    """The file: its marks, its mode, its place; and indexes that are used."""

    def pragma(self, name, path=None):
        connection = sqlite3.connect(path or self.db)
        try:
            return connection.execute(name).fetchone()[0]
        finally:
            connection.close()

    def test_marks(self):
        """A database says whose it is, of which version, and which one it is."""
        self.ok("status")
        self.assertEqual(self.pragma("PRAGMA application_id"), 0x71756575)
        self.assertEqual(self.pragma("PRAGMA user_version"), queuectl.VERSION)
        self.assertEqual(self.pragma("PRAGMA journal_mode"), "wal")
        self.assertEqual(self.pragma("PRAGMA integrity_check"), "ok")
        with Queue(self.db) as one, Queue(self.db) as again, Queue(self.path("o.db")) as other:
            self.assertRegex(one.identity(), r"\A[0-9a-f]{32}\Z")
            self.assertEqual(one.identity(), again.identity())
            self.assertNotEqual(one.identity(), other.identity())

    def test_a_database_of_the_first_version_is_upgraded(self):
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as old:
            old.execute("PRAGMA application_id = 0x71756575")
            old.execute("PRAGMA journal_mode = WAL")
            for statement in (
                    *(text for text in queuectl.SCHEMA
                      if text not in queuectl._RUNS + queuectl._INDEXES),
                    """CREATE INDEX jobs_ready ON jobs (queue, priority DESC, seq)
                        WHERE state = 'pending' AND hold = 0""",
                    """CREATE INDEX jobs_waiting ON jobs (hold, run_after, queue)
                        WHERE state = 'pending' AND hold > 0""",
                    """CREATE INDEX jobs_ended ON jobs (state, queue)
                        WHERE state IN ('completed', 'dead', 'cancelled')""",
                    """CREATE TABLE runs (
                        run INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL,
                        worker TEXT NOT NULL, lock TEXT NOT NULL, started_at REAL NOT NULL,
                        finished_at REAL, exit_code INTEGER, signal INTEGER, outcome TEXT,
                        error TEXT, output BLOB)""",
                    "CREATE INDEX runs_job ON runs (job)",
                    "CREATE INDEX runs_open ON runs (worker, job) WHERE outcome IS NULL",
                    *("INSERT INTO jobs (id, command, state, hold, max_retries, created_at, "
                      "updated_at, queue, priority, run) VALUES ('%s', 'true', '%s', 0, 3, "
                      "'2026-01-01T00:00:00.000Z', '2026-01-01T00:00:00.000Z', 'q', 0, %s)" % row
                      for row in (("a", "completed", 4), ("b", "processing", 5),
                                  ("c", "pending", "NULL"))),
                    *("INSERT INTO runs VALUES (%d, %d, 'w', 'w.0', 1.5, 2.5, %s, NULL, %s, NULL, "
                      "x'4142')" % row for row in (
                          (1, 1, "1", "'failed'"), (2, 2, "1", "'failed'"), (3, 1, "1", "'failed'"),
                          (4, 1, "0", "'completed'"), (5, 2, "NULL", "NULL"),
                          (9, 3, "1", "'failed'"))),
                    "DELETE FROM runs WHERE run = 9", "PRAGMA user_version = 1"):
                old.execute(statement)
            old.execute("INSERT INTO workers VALUES ('w', 's', 1, 0, 4711, NULL, '', 0)")
            lock = self.path("q.db-run", "w.lock")
            with mock.patch.object(queuectl, "is_held", lambda path: path == lock):
                self.refuses("older queuectl; let them finish first: kill 4711", Queue, self.db)
            self.assertEqual(old.execute("PRAGMA user_version").fetchall(), [(1,)])
        with Queue(self.db) as queue, Queue(self.path("new.db")) as new:
            self.assertEqual([run.run for run in queue.runs("a")], [1, 3, 4])
            self.assertEqual([run.outcome for run in queue.runs("b")], ["failed", None])
            self.assertEqual((queue.runs("a")[2].exit_code, queue.output(4)), (0, b"AB"))
            self.assertEqual(len(queue.open_runs()), 1)
            self.assertEqual([queue.counts()[state] for state in queuectl.STATES], [1, 1, 1, 0, 0])
            self.assertEqual([job.hold for job in queue.jobs()], [-2, -1, 0])
            self.assertEqual(self.claim(queue).run, 10)
            tables = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
            self.assertEqual(*([tuple(row) for row in q._rows(tables)] for q in (queue, new)))
            self.assertEqual(queue._value("PRAGMA integrity_check"), "ok")

    def test_any_command_creates_it(self):
        for number, words in enumerate([
                ("status",), ("list",), ("enqueue", "true"), ("worker", "list"), ("config", "list"),
                ("metrics",), ("prune",), ("dlq", "list"), ("pause",), ("wait",),
                ("worker", "stop")]):
            path = self.path("%d.db" % number)
            self.ok("--db", path, *words)
            self.assertEqual(self.pragma("PRAGMA application_id", path), 0x71756575, words)

    def test_it_adopts_an_empty_file(self):
        open(self.db, "wb").close()
        self.ok("enqueue", "true")
        self.assertEqual(self.pragma("PRAGMA application_id"), 0x71756575)

    def test_files_are_private_whatever_the_umask(self):
        for umask in (0, 0o777, 0o022):
            with self.subTest(umask=oct(umask)):
                folder = self.path("%o" % umask)
                os.mkdir(folder, 0o700)
                self.env["QUEUECTL_DB"] = self.db = os.path.join(folder, "q.db")
                self.addCleanup(os.umask, os.umask(umask))
                try:
                    with Queue(self.db) as queue:
                        queue.enqueue("true")
                        queue.require_safe()
                        os.close(queuectl.create_file(os.path.join(queue.folder, "x")))
                        found = {}
                        for here, folders, files in os.walk(folder):
                            for name in folders + files:
                                mode = os.stat(os.path.join(here, name)).st_mode
                                found[name] = stat.S_IMODE(mode)
                finally:
                    os.umask(0o022)
                self.assertEqual(found, {"q.db": 0o600, "q.db-wal": 0o600, "q.db-shm": 0o600,
                                         "q.db-run": 0o700, "x": 0o600})

    def test_the_default_place(self):
        """Per user, whatever the working directory; only this folder is made, private."""
        os.environ.pop("QUEUECTL_DB")
        home, state = self.path("home"), self.path("deep", "state")
        os.mkdir(home)
        for environment, place in [
            ({"HOME": home, "XDG_STATE_HOME": state}, state),
            ({"HOME": home}, os.path.join(home, ".local", "state")),
            ({"HOME": home, "XDG_STATE_HOME": ""}, os.path.join(home, ".local", "state")),
            ({"HOME": home, "XDG_STATE_HOME": "relative"}, os.path.join(home, ".local", "state")),
            ({"HOME": home, "QUEUECTL_DB": ""}, os.path.join(home, ".local", "state")),
        ]:
            with self.subTest(environment=environment):
                os.environ.pop("XDG_STATE_HOME", None)
                os.environ.update(environment)
                path = os.path.join(place, "queuectl", "queuectl.db")
                self.assertIn(path, self.ok("status"))
                self.assertEqual(stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode), 0o700)
        os.environ["QUEUECTL_DB"] = self.db
        self.assertIn(self.db, self.ok("status"))
        self.assertIn(self.path("o.db"), self.ok("status", "--db", self.path("o.db")))

    def test_no_usable_home(self):
        os.environ.pop("QUEUECTL_DB")
        os.environ.pop("XDG_STATE_HOME")
        for home in ("relative", self.path("missing"), SCRIPT, ""):
            os.environ["HOME"] = home
            self.assertIsNone(queuectl.default_folder(), home)  # and so nothing is made in /
            self.refused("status", code=1, says="--db")

    def test_a_link_to_the_database(self):
        """It is the same queue by every name, and its side files stand beside the real one."""
        os.mkdir(self.path("real"))
        real, link, late = self.path("real", "q.db"), self.path("link.db"), self.path("late.db")
        os.symlink(real, late)  # it points to nothing yet
        self.ok("enqueue", "--db", late, "--id", "a", "true")
        os.symlink(real, link)
        self.ok("enqueue", "--db", link, "--id", "b", "true")
        with Queue(real) as queue, Queue(link) as linked:
            self.assertEqual(self.ids(queue.jobs()), ["a", "b"])
            self.assertEqual((linked.path, linked.folder), (queue.path, queue.folder))
            self.assertEqual(os.path.dirname(linked.folder), self.path("real"))
        self.assertTrue(os.path.islink(link) and os.path.islink(late))
        self.assertEqual(sorted(os.listdir(self.dir)), ["late.db", "link.db", "real"])

    def test_odd_file_names(self):
        os.mkdir(self.path("odd"))
        names = ["a b?#%.db", "%41.db", "x?mode=memory", ":memory:", "file:q.db", "\u00fc.db",
                 "'\";.db", "new\nline.db", "-x.db"]
        if sys.platform == "linux":  # others want UTF-8
            names.append(os.fsdecode(b"\xff.db"))
        for name in names:
            with self.subTest(name=name):
                path = self.path("odd", name)
                for id in "ab":
                    self.ok("--db", path, "enqueue", "--id", id, "true")
                self.assertEqual(len(self.ok("list", "--db", path).splitlines()), 3)
                self.assertEqual(
                    {each for each in os.listdir(self.path("odd"))
                     if each not in (name + "-wal", name + "-shm")}, {name})
                os.unlink(path)

    def test_a_database_is_named_in_relation_to_here(self):
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.dir)
        self.ok("--db", "here.db", "enqueue", "true")
        self.assertTrue(os.path.exists(self.path("here.db")))

    # Indexes.

    def recording(self):
        """A Queue, and the list of the (statement, parameters) that it executes."""
        seen = []

        class Recording(sqlite3.Connection):
            def execute(self, sql, parameters=()):
                seen.append((sql, parameters))
                return super().execute(sql, parameters)

            def executemany(self, sql, rows):
                rows = list(rows)
                seen.extend((sql, row) for row in rows[:1])
                return super().executemany(sql, rows)

        connect = sqlite3.connect
        with mock.patch("sqlite3.connect", lambda *arguments, **options: connect(
                *arguments, **dict(options, factory=Recording))):
            return self.queue(), seen

    def test_every_query_uses_its_index(self):
        """No full scan of the jobs or the runs; what is counted is a covering index."""
        clock = self.clock()
        queue, seen = self.recording()
        queue.serve(["default", "other"])
        every, seen_too = self.recording()
        look = sqlite3.connect(self.db)
        self.addCleanup(look.close)
        look.execute("CREATE TEMP TABLE served (queue TEXT PRIMARY KEY)")
        look.execute("CREATE TEMP TABLE dead (seq INTEGER)")
        for number in range(30):
            queue.enqueue("true", id="j%d" % number, unique="u%d" % number)
        queue.enqueue("true", id="due", delay=1)
        queue.enqueue("true", id="later", delay=1000)
        queue.enqueue("true", id="blocked", after=["later"])
        self.settle(queue, self.claim(queue), "failed")
        self.settle(queue, self.claim(queue), "completed")
        queue.cancel(["j2"])
        clock.now += 1
        partial = {row[0] for row in look.execute(
            "SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE '%WHERE%'")}
        self.assertLessEqual({"jobs_ready", "jobs_waiting", "jobs_ended"}, partial)
        self.assertLessEqual(len(partial), 5)
        ready, waiting, ended, key = "jobs_ready", "jobs_waiting", "jobs_ended", "PRIMARY KEY"
        in_order = r"INTEGER PRIMARY KEY \(rowid>\?\)"  # page by page
        for name, action, indexes, allowed in [
            ("claim", lambda: self.claim(queue), {ready, waiting, key}, None),
            ("claim of any", lambda: self.claim(every), {ready, waiting, key}, None),
            ("settle", lambda: self.settle(every, self.claim(every)), {key, "deps_needs"}, None),
            ("next due", queue.next_due, {waiting}, None),
            ("orphans", queue.orphans, set(), None),
            ("counts", queue.counts, {ready, waiting, ended}, None),
            ("oldest", queue.oldest_ready, {ready, key}, None),
            ("left", lambda: queue.work_left("s"), {ready, waiting}, None),
            ("workers", queue.workers, set(), None),
            ("wake", lambda: queue.wake(None, 1), set(), None),
            ("get", lambda: queue.get("j5"), {"(id=?)"}, None),
            ("runs", lambda: queue.runs("j5"), {key}, None),
            ("enqueue", lambda: queue.enqueue("true"), set(), None),
            ("unique", lambda: queue.enqueue("true", unique="u9"), {"(key=?)"}, None),
            ("after", lambda: queue.enqueue("true", after=["j9"]), {"(id=?)"}, None),
            ("blocker", lambda: queue.blocker(queue.get("blocked")), {key}, None),
            ("stuck", lambda: queue.stuck(queue.get("blocked")), {key}, None),
            ("cancel", lambda: queue.cancel(["j7"]), {key}, None),
            ("retry", lambda: queue.retry(["j7"]), {key}, None),
            ("retry all", queue.retry_all, {ended}, None),
            ("progress", lambda: queue.progress(100, 0, None), {ready, waiting, ended}, None),
            ("list", queue.jobs, {key}, in_order),
            ("prune", lambda: queue.prune(queuectl.ENDED), {key}, in_order),
        ] + [("list " + state, lambda state=state: queue.jobs(state), set() if
              state == "processing" else {ended if state in queuectl.ENDED else waiting}, in_order)
             for state in queuectl.STATES + queuectl.VIEWS]:
            with self.subTest(name):
                del seen[:], seen_too[:]
                result = action()
                if hasattr(result, "__next__"):
                    list(result)
                plan = [(sql, row[3]) for sql, parameters in seen + seen_too
                        if re.match(r"\s*(SELECT|WITH|UPDATE|DELETE|INSERT)", sql)
                        for row in look.execute("EXPLAIN QUERY PLAN " + sql, parameters)]
                text = "\n".join(detail for _, detail in plan)
                self.assertTrue(plan)
                for index in indexes:
                    self.assertIn(index, text)
                for sql, detail in plan:
                    found = re.match(r"(SCAN|SEARCH) (?:TABLE )?(?:jobs|runs|dependant)\b"
                                     r"(?: AS \w+)?(?: USING (?:COVERING )?(?:INDEX )?(.*))?",
                                     detail)
                    if not found:
                        continue
                    how, index = found.groups()
                    if how == "SCAN":
                        good = index and index.split()[0] in partial
                    else:  # a range of row numbers may be the whole table
                        good = not index and "max(run)" in sql \
                            or index and ("PRIMARY KEY" not in index or "rowid=" in index)
                    self.assertTrue(good or allowed and re.search(allowed, detail),
                                    "%s: %s" % (detail, sql))

    def test_the_work_of_a_claim_does_not_grow(self):
        """Counted in steps of SQLite's machine, not in seconds: a claim takes as many of
        them beside 5,000 jobs of another queue, for later, blocked or ended as beside one."""
        opened = []
        connect = sqlite3.connect

        def remember(*arguments, **options):
            opened.append(connect(*arguments, **options))
            return opened[-1]

        def steps(many):
            with mock.patch("sqlite3.connect", remember), \
                    Queue(self.path("%d.db" % many), durable=False) as queue:
                queue.serve(["default"])
                kinds = [dict(queue="other"), dict(delay=9999, priority=5),
                         dict(after=["first"]), dict()]  # the last ones will have ended
                queue.enqueue("true", id="first", queue="other")
                list(queue.enqueue_many(dict(kind, command="true") for kind in kinds
                                        for _ in range(many)))
                for _ in range(5):
                    queue.enqueue("true")
                connection, count = opened[-1], [0]
                connection.execute("UPDATE jobs SET state = 'completed', hold = -2 "
                                   "WHERE queue = 'default' AND hold = 0 AND seq <= ?", (many * 4,))

                def step():
                    count[0] += 1
                connection.set_progress_handler(step, 10)
                claim = self.claim(queue)
                self.assertIsNotNone(claim)
                self.settle(queue, claim)
                queue.next_due()
                queue.orphans()
                queue.work_left("s")
                connection.set_progress_handler(None, 10)
                return count[0]

        self.assertLess(steps(5000), 2 * steps(10))


class Storage(StorageCase):
    """class Queue, as a library: what goes in comes out, and in order."""

    KEYS = ["id", "command", "state", "queue", "priority", "attempts", "max_retries", "timeout",
            "run_at", "cwd", "env", "after", "unique", "created_at", "updated_at", "started_at",
            "finished_at", "locked_by", "locked_at", "exit_code", "last_error"]

    def test_a_plain_job(self):
        clock = self.clock()
        queue = self.queue()
        id = queue.enqueue("echo hello")
        self.assertEqual(queue.get(id).as_dict(), dict(
            id=id, command="echo hello", state="pending", queue="default", priority=0, attempts=0,
            max_retries=3, timeout=None, run_at=None, cwd=os.getcwd(), env={}, after=[],
            unique=None, created_at="2027-01-15T08:00:00.000Z",
            updated_at="2027-01-15T08:00:00.000Z", started_at=None, finished_at=None,
            locked_by=None, locked_at=None, exit_code=None, last_error=None))
        self.assertEqual(list(queue.get(id).as_dict()), self.KEYS)
        self.assertEqual(queue.runs(id), [])
        self.assertEqual(clock.now, 1800000000.0)

    def test_a_job_with_everything(self):
        self.clock()
        with Queue(self.db) as queue:
            queue.enqueue("true", id="first")
            id = queue.enqueue("x 'y'\n\u00fc", id="all", queue="mail", priority=-7, max_retries=9,
                               timeout="10m", run_at="2030-01-01T00:00Z", cwd="/",
                               env={"A": "\u00fc"}, after=["first"], unique="key")
        self.assertEqual(id, "all")
        job = self.queue().get("all").as_dict()  # also from another connection
        for key, value in dict(
                command="x 'y'\n\u00fc", state="pending", queue="mail", priority=-7, max_retries=9,
                timeout=600, run_at="2030-01-01T00:00:00.000Z", cwd="/", env={"A": "\u00fc"},
                after=["first"], unique="key").items():
            self.assertEqual(job[key], value, key)

    def test_the_life_of_a_job(self):
        """Every start is a run, kept across retries and `dlq retry`; attempts count."""
        clock = self.clock()
        queue = self.queue()
        queue.enqueue("true", id="a", max_retries=2)
        one = self.claim(queue)
        self.assertEqual((one.id, one.command, one.attempts), ("a", "true", 1))
        job = queue.get("a")
        self.assertEqual((job.state, job.attempts, job.locked_by, job.locked_at),
                         ("processing", 1, "w-1", "2027-01-15T08:00:00.000Z"))
        self.assertIsNone(self.claim(queue))
        self.settle(queue, one, "failed", exit_code=3, error="exit code 3", output=b"one\n")
        job = queue.get("a")
        self.assertEqual((job.state, job.view, job.attempts, job.exit_code, job.last_error,
                          job.locked_by, job.locked_at, job.run_at),
                         ("pending", "failed", 1, 3, "exit code 3", None, None,
                          "2027-01-15T08:00:02.000Z"))
        clock.now += 1.99
        self.assertIsNone(self.claim(queue))
        self.assertEqual(queue.next_due(), 1800000002.0)
        clock.now += 0.01
        two = self.claim(queue, "w-2")
        self.settle(queue, two, "timeout", exit_code=None, signal=15, error="too long")
        job = queue.get("a")
        self.assertEqual((job.state, job.attempts, job.last_error), ("dead", 2, "too long"))
        self.assertIsNone(self.claim(queue))
        queue.retry(["a"])
        job = queue.get("a")
        self.assertEqual((job.state, job.view, job.attempts, job.run_at, job.last_error),
                         ("pending", "pending", 0, None, None))
        clock.now += 5
        three = self.claim(queue)
        self.assertEqual(three.attempts, 1)
        self.settle(queue, three, output=b"three\n", exit_code=0)
        job = queue.get("a")
        self.assertEqual((job.state, job.exit_code, job.last_error), ("completed", 0, None))
        runs = queue.runs("a")
        self.assertEqual([(run.number, run.outcome, run.worker, run.exit_code, run.signal)
                          for run in runs],
                         [(1, "failed", "w-1", 3, None), (2, "timeout", "w-2", None, 15),
                          (3, "completed", "w-1", 0, None)])
        self.assertEqual([queue.output(run.run) for run in runs], [b"one\n", b"", b"three\n"])
        self.assertEqual([run.started_at for run in runs], [
            "2027-01-15T08:00:00.000Z", "2027-01-15T08:00:02.000Z", "2027-01-15T08:00:07.000Z"])
        self.assertEqual(len({run.run for run in runs}), 3)

    def test_first_in_first_out_within_a_priority(self):
        queue = self.queue()
        for id, priority in [("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5), ("f", 0)]:
            queue.enqueue("true", id=id, priority=priority)
        self.assertEqual(self.ids(self.claim(queue) for _ in range(6)), list("beacfd"))
        self.assertIsNone(self.claim(queue))

    def test_queues(self):
        """A worker takes jobs of its own queues only, the best of all of them first."""
        all, one, two = self.queue(), self.queue(), self.queue()
        one.serve(["a"])
        two.serve(["b", "c", "nothing"])
        for id, queue, priority in [("1", "a", 0), ("2", "b", 0), ("3", "c", 1), ("4", "b", 0),
                                    ("5", "a", 0), ("6", "d", 0), ("7", "A", 9)]:
            all.enqueue("true", id=id, queue=queue, priority=priority)
        self.assertEqual(self.ids(self.claim(two) for _ in range(2)), ["3", "2"])
        self.assertEqual(self.claim(one).id, "1")
        self.assertEqual(self.claim(all).id, "7")
        self.assertEqual(self.claim(two).id, "4")
        self.assertIsNone(self.claim(two))
        self.assertEqual(self.ids(self.claim(all) for _ in range(2)), ["5", "6"])
        self.assertEqual(self.ids(all.jobs(queue="b")), ["2", "4"])
        self.assertEqual(self.ids(all.jobs("processing", "a")), ["1", "5"])

    def test_pause_and_resume(self):
        queue = self.queue()
        for name in "abc":
            queue.enqueue("true", id=name, queue=name)
        queue.pause("a")
        queue.pause("a")
        self.assertEqual(self.claim(queue).id, "b")
        queue.pause()
        self.assertIsNone(self.claim(queue))
        self.assertEqual(len(queue.paused()), 2)
        queue.resume("a")
        self.assertIsNone(self.claim(queue))
        queue.resume()
        self.assertEqual(queue.paused(), [])
        self.assertEqual(self.ids(self.claim(queue) for _ in range(2)), ["a", "c"])

    def test_later_jobs_become_due(self):
        clock = self.clock()
        queue = self.queue()
        queue.enqueue("true", id="hour", delay="1h", priority=9)
        queue.enqueue("true", id="soon", run_at=clock.now + 10)
        queue.enqueue("true", id="past", run_at=clock.now - 10)
        queue.enqueue("true", id="now", delay=0)
        self.assertEqual(queue.counts()["scheduled"], 2)
        self.assertEqual(self.ids(queue.jobs("scheduled")), ["hour", "soon"])
        self.assertEqual(queue.next_due(), clock.now + 10)
        self.assertEqual([self.claim(queue).id, self.claim(queue).id], ["past", "now"])
        self.assertIsNone(self.claim(queue))
        clock.now += 10
        self.assertEqual(self.claim(queue).id, "soon")
        clock.now += 3600
        self.assertEqual(self.claim(queue).id, "hour")
        self.assertIsNone(queue.next_due())

    def test_more_jobs_become_due_than_one_transaction_moves(self):
        clock = self.clock()
        queue = self.queue(durable=False)
        ids = list(queue.enqueue_many({"command": "true", "delay": 5} for _ in range(1200)))
        clock.now += 5
        self.assertEqual([self.claim(queue).id for _ in range(1200)], ids)
        self.assertIsNone(self.claim(queue))

    def test_jobs_that_wait_for_others(self):
        clock = self.clock()
        queue = self.queue()
        list(queue.enqueue_many([
            {"id": "c", "command": "true", "after": ["a", "b", "a"]},  # named before they come
            {"id": "a", "command": "true"}, {"id": "b", "command": "true"},
            {"id": "d", "command": "true", "after": "c", "delay": 60}]))
        self.assertEqual(queue.counts()["blocked"], 2)
        self.assertEqual(queue.get("c").after, ["a", "b"])
        self.assertEqual(queue.blocker(queue.get("c")), ("a", "pending"))
        a, b = self.claim(queue), self.claim(queue)
        self.assertEqual(self.ids([a, b]), ["a", "b"])
        self.settle(queue, a)
        self.assertIsNone(self.claim(queue))
        self.settle(queue, b)
        c = self.claim(queue)
        self.assertEqual(c.id, "c")
        self.settle(queue, c)
        self.assertEqual(queue.get("d").view, "scheduled")
        self.assertIsNone(self.claim(queue))
        clock.now += 60
        self.assertEqual(self.claim(queue).id, "d")
        queue.enqueue("true", id="e", after=["a", "b"])  # they have completed
        self.assertEqual(self.claim(queue).id, "e")

    def test_a_job_after_one_that_ends_badly_stays_blocked_until_that_is_retried(self):
        for state in ("dead", "cancelled"):
            with self.subTest(state), Queue(self.path(state + ".db")) as queue:
                queue.enqueue("true", id="a", max_retries=1)
                queue.enqueue("true", id="b", after=["a"])
                queue.enqueue("true", id="c", after=["b"])
                self.assertFalse(queue.stuck(queue.get("b")))
                self.end(queue, "a", state)
                self.assertIsNone(self.claim(queue))
                self.assertEqual(queue.blocker(queue.get("b")), ("a", state))
                self.assertTrue(queue.stuck(queue.get("b")) and queue.stuck(queue.get("c")))
                self.assertEqual(queue.prune(queuectl.ENDED), 0)  # b waits for it
                queue.retry(["a"])
                self.assertFalse(queue.stuck(queue.get("c")))
                for id in "abc":
                    self.end(queue, id, "completed")

    def test_the_end_of_a_job_keeps_its_time(self):
        """Though what it would have waited for completes later."""
        clock = self.clock()
        queue = self.queue()
        queue.enqueue("true", id="a")
        queue.enqueue("true", id="b", after=["a"])
        queue.cancel(["b"])
        clock.now += 1000
        self.end(queue, "a", "completed")
        self.assertEqual(queue.get("b").updated_at, "2027-01-15T08:00:00.000Z")
        self.assertEqual(queue.prune(["cancelled"], 500), 1)

    def test_no_job_waits_for_ever_for_one_that_was_deleted(self):
        """A dead job stays while another, though cancelled itself, could still be retried."""
        queue = self.queue()
        queue.enqueue("true", id="a", max_retries=1)
        queue.enqueue("true", id="b", after=["a"])
        self.end(queue, "a", "dead")
        queue.cancel(["b"])
        self.assertEqual(queue.prune(["dead"]), 0)
        queue.retry(["b"])
        self.assertEqual(queue.blocker(queue.get("b")), ("a", "dead"))
        self.assertTrue(queue.stuck(queue.get("b")))
        queue.cancel(["b"])
        self.assertEqual(queue.prune(["cancelled"]), 1)
        self.assertEqual(queue.prune(["dead"]), 1)

    def test_circles_and_unknown_jobs_are_refused(self):
        queue = self.queue()
        queue.enqueue("true", id="x")
        for says, jobs in [
            ("there is no job nope", [dict(id="a", after=["nope"])]),
            ("circle", [dict(id="a", after=["a"])]),
            ("circle", [dict(id="a", after=["c"]), dict(id="b", after=["a", "x"]),
                        dict(id="c", after=["b"])]),
        ]:
            self.refuses(says, queue.enqueue_many, [dict(job, command="true") for job in jobs])
            self.assertEqual(self.ids(queue.jobs()), ["x"])
        # A ladder is no circle.
        ids = ["j%d" % number for number in range(50)]
        list(queue.enqueue_many(dict(id=id, command="true", after=ids[number + 1:number + 3])
                                for number, id in enumerate(ids)))
        self.assertEqual(self.ids(self.claim(queue) for _ in range(2)), ["x", "j49"])

    def test_unique_keys(self):
        """At most one job with a key that has not ended; who comes second gets its id."""
        queue = self.queue()
        self.assertEqual(queue.enqueue("one", id="a", unique="k"), "a")
        self.assertEqual(queue.enqueue("two", unique="k"), "a")
        self.assertEqual(queue.enqueue("two", id="b", unique="l"), "b")
        notes = []
        self.assertEqual(list(queue.enqueue_from(
            [("", dict(command="x", unique="k")), ("", dict(command="x", id="c", unique="m")),
             ("", dict(command="x", unique="m"))], notes.append)), ["a", "c", "c"])
        self.assertEqual(len(notes), 2)
        self.assertEqual(self.ids(queue.jobs()), ["a", "b", "c"])
        claim = self.claim(queue)
        self.assertEqual(queue.enqueue("x", unique="k"), "a")  # it runs
        self.settle(queue, claim, "failed")
        self.assertEqual(queue.enqueue("x", unique="k"), "a")  # it waits for a retry
        queue.cancel(["a"])
        self.assertEqual(queue.enqueue("x", id="d", unique="k"), "d")
        self.refuses("k", queue.retry, ["a"])
        self.assertEqual(queue.get("a").state, "cancelled")
        queue.cancel(["d"])
        queue.retry(["a"])
        self.refuses("k", queue.retry, ["d"])
        self.assertEqual(queue.enqueue("x", unique="k"), "a")

    def test_many_or_none(self):
        """A list is stored in one transaction, and an error names its place."""
        queue = self.queue()
        queue.enqueue("true", id="taken")
        good = [{"command": "true", "id": "n%d" % number} for number in range(2500)]
        for says, wrong in [
            ("job 2001: ", {"command": ""}), ("job 2001: ", {"command": "true", "colour": 1}),
            ("job 2001: ", {}), ("job 2001: ", "true"), ("job 2001: ", None),
            ("job 2001: the id taken is taken", {"command": "true", "id": "taken"}),
            ("job 2001: the id n5 is taken", {"command": "true", "id": "n5"}),
        ]:
            with self.subTest(wrong=wrong):
                self.refuses(says, queue.enqueue_many, good[:2000] + [wrong] + good[2000:])
                self.assertEqual(self.ids(queue.jobs()), ["taken"])
        self.assertEqual(len(list(queue.enqueue_many(good))), 2500)
        self.assertEqual(list(queue.enqueue_many([])), [])

    def test_a_source_that_breaks_stores_nothing(self):
        def source():
            for _ in range(1500):
                yield {"command": "true"}
            raise KeyboardInterrupt

        queue = self.queue()
        with self.assertRaises(KeyboardInterrupt):
            queue.enqueue_many(source())
        self.assertEqual(list(queue.jobs()), [])
        queue.enqueue("true")

    def test_generated_ids_that_are_taken_are_drawn_again(self):
        queue = self.queue()
        queue.enqueue("true", id="same")
        for draws, jobs, expected in [
            (["same", "same", "new1"], [{}], ["new1"]),
            (["two", "two", "two", "new2"], [{}, {}], ["two", "new2"]),
            (["new1", "same", "five", "new3"], [{}, {"id": "own"}, {}, {}],
             ["five", "own", "new3", "x1"]),
        ]:
            extra = iter(["x1", "x2", "x3", "x4"])
            draw = iter(draws)
            with mock.patch.object(queuectl, "new_id", lambda: next(draw, None) or next(extra)):
                ids = list(queue.enqueue_many(dict(job, command="true") for job in jobs))
            self.assertEqual(len(set(ids)), len(jobs))
            self.assertEqual([id == "own" for id in ids], ["id" in job for job in jobs])
            self.assertEqual(self.ids(queue.jobs())[-len(ids):], ids)

    def test_more_jobs_than_fit_in_memory_keep_their_order(self):
        """12,345 of them go through the temporary file, some with ids and keys."""
        queue = self.queue()
        jobs = [dict(command="echo %d" % number) for number in range(12345)]
        for number in range(0, 12345, 1000):
            jobs[number]["id"] = "own%d" % number
            jobs[number]["unique"] = "key%d" % (number // 2000)
        stored = list(queue.enqueue_many(iter(jobs)))
        self.assertEqual(len(stored), 12345)
        self.assertEqual(stored[2000], "own2000")
        self.assertEqual(stored[3000], "own2000")  # the key was taken
        expected = [(id, job["command"]) for number, (id, job) in enumerate(zip(stored, jobs))
                    if number % 2000 != 1000]
        self.assertEqual([(job.id, job.command) for job in queue.jobs()], expected)
        self.assertEqual(queue.counts()["pending"], len(expected))

    def test_lists_go_beyond_a_page(self):
        queue = self.queue()
        ids = list(queue.enqueue_many(
            {"command": "true", "queue": "ab"[number % 2], "delay": 9999 * (number % 3 == 0)}
            for number in range(3500)))
        for arguments, expected in [
            ((), ids), ((None, None, 10), ids[:10]), ((None, None, 1000), ids[:1000]),
            ((None, None, 2345), ids[:2345]), ((None, None, 0), []), ((None, "b"), ids[1::2]),
            ((None, "b", 1200), ids[1:2400:2]), (("scheduled",), ids[::3]),
            (("scheduled", "b"), ids[3::6]), (("scheduled", None, 1001), ids[:3003:3]),
            (("pending",), ids), (("dead",), []), (("blocked", "a"), []), ((None, "none"), []),
        ]:
            with self.subTest(arguments=arguments):
                self.assertEqual(self.ids(queue.jobs(*arguments)), expected)

    def test_no_read_outlives_a_page(self):
        """A slow reader of a list (`list | less`) pins nothing: others write and checkpoint,
        and the list goes on with what is there then."""
        queue, other = self.queue(), self.queue()
        list(queue.enqueue_many({"command": "true"} for _ in range(1500)))
        jobs = queue.jobs()
        next(jobs)
        other.enqueue("true", id="new")
        connection = sqlite3.connect(self.db, timeout=0)
        self.addCleanup(connection.close)
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self.assertEqual(busy, 0)
        self.assertEqual([job.id for job in jobs][-1], "new")

    def test_states_and_views(self):
        clock = self.clock()
        queue = self.queue()
        for id, options in [("dead", dict(max_retries=1)), ("done", {}), ("bad", {}), ("run", {})]:
            queue.enqueue("true", id=id, **options)
            self.settle(queue, self.claim(queue), {"done": "completed"}.get(id, "failed")) \
                if id != "run" else self.claim(queue)
        queue.enqueue("true", id="ready")
        queue.enqueue("true", id="later", delay=60)
        queue.enqueue("true", id="blocked", after=["later"])
        queue.enqueue("true", id="gone")
        queue.cancel(["gone"])
        clock.now += 1
        expected = {"pending": ["bad", "ready", "later", "blocked"], "processing": ["run"],
                    "completed": ["done"], "dead": ["dead"], "cancelled": ["gone"],
                    "failed": ["bad"], "scheduled": ["later"], "blocked": ["blocked"]}
        for state in queuectl.STATES + queuectl.VIEWS:
            self.assertEqual(self.ids(queue.jobs(state)), expected[state], state)
        self.assertEqual(queue.counts(), {state: len(ids) for state, ids in expected.items()})
        # The same, where so many are of a state that the table is read in order.
        with mock.patch.object(queuectl, "RARE", 0):
            for state in queuectl.STATES + queuectl.VIEWS:
                self.assertEqual(self.ids(queue.jobs(state)), expected[state], state)
        self.refuses("failed", queue.jobs("faild").__next__)

    def test_what_is_counted_is_of_one_moment(self):
        """A job that is put back meanwhile is neither missed nor counted twice."""
        queue, other = self.queue(), self.queue()
        queue.enqueue("true")
        read = queue._rows
        for count in (lambda: sum(map(queue.counts().get, ("pending", "processing"))),
                      lambda: queue.progress(queue.last_seq(), 0, None)[0]):
            for reads_before in range(5):
                claim, reads = self.claim(other), []

                def rows(*words):
                    if len(reads) == reads_before:
                        self.settle(other, claim, "interrupted")
                    reads.append(words)
                    return read(*words)
                with mock.patch.object(queue, "_rows", rows):
                    self.assertEqual(count(), 1, reads)
                if len(reads) <= reads_before:
                    self.settle(other, claim, "interrupted")

    def test_an_error_in_a_snapshot_is_told(self):
        queue = self.queue()
        with self.assertRaises(queuectl.DatabaseUnavailable), queue._snapshot():
            queue._execute("ROLLBACK")  # as SQLite does where it cannot read
            raise queuectl.DatabaseUnavailable("disk I/O error")

    def test_cancel(self):
        queue = self.queue()
        special = {"b": dict(delay=60), "c": dict(after=["a"])}
        for id in "abcdef":
            queue.enqueue("true", id=id, **special.get(id, {}))
        one = self.claim(queue)
        self.assertEqual(one.id, "a")
        jobs = queue.cancel(["a", "b", "c", "d"])
        self.assertEqual([job.state for job in jobs], ["processing"] + ["cancelled"] * 3)
        self.assertTrue(queue.cancel_requested(one))
        self.settle(queue, one, "cancelled")
        self.assertEqual(queue.get("a").state, "cancelled")
        queue.cancel(["a", "b"])  # once more does no harm
        self.refuses("no job abc", queue.cancel, "abc")  # one id is one
        self.refuses("no job abc", queue.retry, "abc")
        two = self.claim(queue)
        self.assertEqual(two.id, "e")
        queue.cancel(["e"])
        self.settle(queue, two, "completed")  # it was quicker
        self.assertEqual(queue.get("e").state, "completed")
        for says, ids in [("ended already", ["f", "e"]), ("no job nope", ["f", "nope"])]:
            self.refuses(says, queue.cancel, ids)
            self.assertEqual(queue.get("f").state, "pending")
        three = self.claim(queue)
        queue.cancel(["f"])
        self.settle(queue, three, "interrupted")
        self.assertEqual((queue.get("f").state, queue.get("f").attempts), ("cancelled", 0))

    def test_retry(self):
        queue = self.queue()
        for id, state in [("a", "dead"), ("b", "cancelled"), ("c", "completed"), ("d", "dead")]:
            queue.enqueue("true", id=id, max_retries=1)
            self.end(queue, id, state)
        queue.enqueue("true", id="e")
        for says, ids in [("c is completed", ["a", "c"]), ("e is pending", ["a", "e"]),
                          ("no job nope", ["a", "nope"])]:
            self.refuses(says, queue.retry, ids)
            self.assertEqual(queue.get("a").state, "dead")
        self.assertEqual(queue.retry_all(), 2)
        self.assertEqual([job.state for job in queue.jobs()],
                         ["pending", "cancelled", "completed", "pending", "pending"])
        queue.retry(["b"])
        self.assertEqual(self.ids(self.claim(queue) for _ in range(4)), ["a", "b", "d", "e"])

    def test_retry_all_leaves_those_whose_key_is_taken(self):
        queue = self.queue()
        for id, key in [("a", "k"), ("b", "k"), ("c", "l"), ("d", None)]:
            queue.enqueue("true", id=id, unique=key, max_retries=1)
            self.end(queue, id, "dead")
        queue.enqueue("true", id="e", unique="l")
        self.assertEqual(queue.retry_all(), 2)
        self.assertEqual([job.state for job in queue.jobs()],
                         ["pending", "dead", "dead", "pending", "pending"])
        self.refuses("l", queue.retry, ["b", "c"])
        self.assertEqual(queue.get("b").state, "dead")

    def test_retry_all_lets_others_write_in_between(self):
        queue, other = self.queue(), self.queue()
        list(queue.enqueue_many({"command": "true"} for _ in range(25)))
        queue._execute("UPDATE jobs SET state = 'dead', hold = -2")
        seen = []

        def wake(name, count):
            seen.append((count, other.counts()["pending"]))
            if len(seen) == 1:  # somebody else retries one, and another one is dead again
                other.retry([job.id for job in other.jobs("dead")][-1:])
                other._execute("UPDATE jobs SET state = 'dead', hold = -2 WHERE seq = 1")
        with mock.patch.object(queuectl, "PAGE", 10), mock.patch.object(queue, "wake", wake):
            self.assertEqual(queue.retry_all(), 24)
        self.assertEqual(seen, [(10, 10), (10, 20), (4, 24)])
        self.assertEqual(queue.counts()["dead"], 1)

    def test_prune(self):
        clock = self.clock()
        queue = self.queue()
        for id, state in [("a", "completed"), ("b", "dead"), ("c", "cancelled")]:
            queue.enqueue("true", id=id, max_retries=1)
            self.end(queue, id, state)
        clock.now += 100
        queue.enqueue("true", id="d")
        self.end(queue, "d", "completed")
        queue.enqueue("true", id="e")
        self.assertEqual(queue.prune(["completed"], 101), 0)
        self.assertEqual(queue.prune(["completed"], 50), 1)
        self.assertEqual(self.ids(queue.jobs()), ["b", "c", "d", "e"])
        self.assertEqual(queue.prune(["dead"], 50), 1)
        self.assertEqual(queue.prune(queuectl.ENDED), 2)
        self.assertEqual(self.ids(queue.jobs()), ["e"])
        self.refuses("no job a", queue.runs, "a")
        self.assertEqual(queue.enqueue("true", id="a"), "a")  # the id is free again
        self.assertEqual(queue.runs("a"), [])

    def test_prune_goes_through_all_and_gives_the_space_back(self):
        queue = self.queue(durable=False)
        list(queue.enqueue_many({"command": "x" * 2000} for _ in range(2600)))
        ids = self.ids(queue.jobs())
        queue.cancel(ids[100:])
        big = os.stat(self.db).st_size + os.stat(self.db + "-wal").st_size
        self.assertEqual(queue.prune(["cancelled"]), 2500)
        self.assertEqual(self.ids(queue.jobs()), ids[:100])
        queue.close()
        self.assertLess(os.stat(self.db).st_size, big / 4)

    def test_settings(self):
        queue, other = self.queue(), self.queue()
        for key, value, expected in [
            ("max_retries", "5", 5), ("max-retries", 7, 7), ("backoff_base", "1.5", 1.5),
            ("backoff_max", "2h", 7200), ("job_timeout", "0", 0), ("kill_grace", "0.5", 0.5),
            ("output_limit", "1M", 1048576), ("keep_completed", "0", 0)]:
            queue.set_setting(key, value)
            self.assertEqual(other.settings()[key.replace("-", "_")], expected)
        for key, value in [("max_retries", "-1"), ("max_retries", "1.5"), ("max_retries", ""),
                           ("backoff_base", "-2"), ("backoff_base", "nan"), ("backoff_max", "soon"),
                           ("job_timeout", "-1"), ("output_limit", "-1"), ("output_limit", "1T"),
                           ("keep_completed", "inf"), ("kill_grace", None), ("nope", "1")]:
            self.refuses(key, queue.set_setting, key, value)
        self.assertEqual(queue.settings()["max_retries"], 7)
        queue.unset_setting("max-retries")
        self.assertEqual(other.settings()["max_retries"], 3)

    def test_max_retries_is_fixed_at_enqueue_and_the_rest_holds_at_once(self):
        clock = self.clock()
        queue = self.queue()
        queue.enqueue("true", id="a")
        queue.set_setting("max_retries", 1)
        queue.enqueue("true", id="b")
        queue.set_setting("backoff_base", 10)
        queue.set_setting("job_timeout", "7s")
        queue.set_setting("kill_grace", "3s")
        claim = self.claim(queue)
        self.assertEqual((claim.max_retries, claim.timeout, claim.kill_grace), (3, 7, 3))
        self.settle(queue, claim, "failed")
        self.assertEqual(queue.next_due(), clock.now + 10)
        queue.set_setting("backoff_base", 0)
        self.settle(queue, self.claim(queue), "failed")
        self.assertEqual(queue.get("b").state, "dead")
        clock.now += 10
        self.settle(queue, self.claim(queue), "failed")
        self.assertEqual(self.claim(queue).attempts, 3)  # at once

    def test_a_settle_is_fenced_by_its_run(self):
        """A result of a run that does not hold its job any more changes nothing at all."""
        queue = self.queue()
        queue.set_setting("backoff_base", 0)
        queue.enqueue("true", id="a")
        first = self.claim(queue, "w-1")
        self.assertIsNotNone(self.settle(queue, first, "lost", error="worker died"))
        second = self.claim(queue, "w-2")
        self.assertEqual((second.id, second.attempts), ("a", 2))
        for outcome in queuectl.OUTCOMES:
            before = queue.get("a").as_dict(), [run.as_dict() for run in queue.runs("a")]
            self.assertIsNone(self.settle(queue, first, outcome, output=b"late", error="late"))
            self.assertEqual(
                (queue.get("a").as_dict(), [run.as_dict() for run in queue.runs("a")]), before)
        self.assertIsNotNone(self.settle(queue, second))
        for claim in (first, second):  # twice is once
            self.assertIsNone(self.settle(queue, claim, "failed"))
        self.assertEqual([run.outcome for run in queue.runs("a")], ["lost", "completed"])
        self.assertEqual(queue.output(queue.runs("a")[0].run), b"")

    def test_one_turn_settles_and_claims(self):
        queue = self.queue()
        for id in "ab":
            queue.enqueue("true", id=id)
        one = self.claim(queue)
        settled, two = queue.turn(self.result(one), "w-1")
        self.assertEqual((settled.state, two.id), ("completed", "b"))
        settled, none = queue.turn(self.result(one), "w-1")  # stale: and still it claims
        self.assertEqual((settled, none), (None, None))
        settled, again = queue.turn(self.result(two, "interrupted"), "w-1")
        self.assertEqual((settled.state, again.id, again.attempts), ("pending", "b", 1))

    def test_a_result_has_the_time_at_which_it_was_stored(self):
        """Not that at which its worker began to wait for the writer lock."""
        clock, queue = self.clock(), self.queue()
        queue.enqueue("true", id="a", max_retries=1)
        claim, execute = self.claim(queue), queue._execute

        def slow(sql, *words, **options):
            clock.now += 5 * (sql == "BEGIN IMMEDIATE")
            return execute(sql, *words, **options)
        with mock.patch.object(queue, "_execute", slow):
            self.settle(queue, claim, "failed")
        self.assertEqual(queue.get("a").updated_at, queuectl.iso(clock.now))

    def test_a_sweep_spares_who_has_just_registered(self):
        queue, other = self.queue(), self.queue()
        queue.require_safe()
        queue.register("dead", "s", 1, 0, None)
        os.close(queuectl.create_file(queue.lock_path("new")))

        def is_held(path):
            if path == queue.lock_path("new"):
                other.register("new", "s", 1, 0, None)
            return False
        with mock.patch.object(queuectl, "is_held", is_held):
            queue.sweep()
        self.assertEqual(queue._rows("SELECT name FROM workers")[0]["name"], "new")

    def test_run_numbers_are_never_used_twice(self):
        queue = self.queue()
        numbers = []
        for _ in range(3):
            queue.enqueue("true", id="a")
            claim = self.claim(queue)
            numbers.append(claim.run)
            self.settle(queue, claim)
            self.assertEqual(queue.prune(queuectl.ENDED), 1)
        self.assertEqual(len(set(numbers)), 3)
        self.assertEqual(sorted(numbers), numbers)
        self.refuses("deleted", queue.output, numbers[0])

    def test_numbers_for_statistics(self):
        clock = self.clock()
        queue = self.queue()
        for number in range(4):
            queue.enqueue("true", max_retries=1)
            self.settle(queue, self.claim(queue), "failed" if number == 3 else "completed",
                        seconds=2.0)
        self.assertEqual(sorted(queue.stats()), [("default", "completed", 3, 6.0),
                                                 ("default", "failed", 1, 2.0)])
        clock.now += 3 * 3600
        queue.fold_stats(clock.now)
        self.assertEqual(queue.stats(clock.now - 3600), [])
        self.assertEqual(sorted(queue.stats()), [("default", "completed", 3, 6.0),
                                                 ("default", "failed", 1, 2.0)])

    def test_a_busy_worker_counts_its_runs_now_and_then(self):
        queue = self.queue()
        list(queue.enqueue_many({"command": "true"} for _ in range(4)))
        claim = self.claim(queue)
        counted = []
        for delay in (PATIENCE, PATIENCE, 0, PATIENCE):
            with mock.patch.object(queuectl, "TALLY_DELAY", delay):
                _, claim = queue.turn(self.result(claim), "w", "w.0")
            counted.append(sum(row[2] for row in queue.stats()))
        self.assertEqual(counted, [0, 0, 3, 4])  # the last turn found no job

    def test_what_an_older_program_has_cancelled_or_claimed_is_not_claimed(self):
        queue = self.queue()
        for id in "abc":
            queue.enqueue("true", id=id)
        queue._execute("UPDATE jobs SET state = 'cancelled' WHERE id = 'a'")
        queue._execute("UPDATE jobs SET state = 'processing' WHERE id = 'b'")
        self.assertEqual(self.claim(queue).id, "c")
        self.assertEqual([job.hold for job in queue.jobs()], [-2, -1, -1])

    def test_the_oldest_ready_job(self):
        clock = self.clock()
        queue = self.queue()
        self.assertIsNone(queue.oldest_ready())
        queue.enqueue("true", delay=5)
        self.assertIsNone(queue.oldest_ready())
        queue.enqueue("true", priority=9)
        clock.now += 2
        queue.enqueue("true")
        self.assertEqual(queue.oldest_ready(), clock.now - 2)

    def test_methods_refuse_what_they_cannot_store(self):
        queue = self.queue()
        for fields in [dict(command=""), dict(command=None), dict(command=5), dict(priority="x"),
                       dict(priority=1.5), dict(timeout=-1), dict(delay="soon"), dict(run_at="x"),
                       dict(delay=1, run_at=1), dict(env={"A": 1}), dict(env="A"),
                       dict(after=["x"]), dict(id="a b"), dict(unique=""), dict(queue="-q"),
                       dict(max_retries=-1)]:
            with self.subTest(fields=fields), self.assertRaises(QueueError):
                queue.enqueue(**dict({"command": "true"}, **fields))
        self.assertEqual(list(queue.jobs()), [])
        self.refuses("no job a", queue.get, "a")
        self.refuses("no job a", queue.runs, "a")

    def test_a_vanished_folder(self):
        """A job without a folder of its own is refused where there is none to run it in."""
        self.addCleanup(os.chdir, os.getcwd())
        queue = self.queue()
        os.mkdir(self.path("gone"))
        os.chdir(self.path("gone"))
        os.rmdir(self.path("gone"))
        self.refuses("--cwd", queue.enqueue, "true")
        queue.enqueue("true", cwd=self.dir)

    # Several processes at once.

    def crowd(self, code, count=3):
        """What `count` processes print that run the same code at once on this database."""
        script = "import sys, time\nfrom queuectl import *\nimport queuectl\n" \
                 "sys.stdin.readline()\n" + code
        processes = [subprocess.Popen(
            [sys.executable, "-c", script, str(number)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=dict(self.env, PYTHONPATH=HERE))
            for number in range(count)]
        for process in processes:  # all have begun to wait, or read at once what is there
            process.stdin.write(b"go\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=PATIENCE)[0].decode().split()
                   for process in processes]
        self.assertEqual([process.returncode for process in processes], [0] * count)
        return outputs

    def test_every_job_is_claimed_once(self):
        with Queue(self.db) as queue:
            ids = list(queue.enqueue_many({"command": "true"} for _ in range(600)))
        outputs = self.crowd("""
with Queue(durable=False) as queue:
    result = None
    while True:
        settled, claim = queue.turn(result, "w-" + sys.argv[1])
        assert result is None or settled is not None
        if claim is None:
            break
        print(claim.id, claim.run)
        result = queuectl.Result(run=claim.run, seq=claim.seq, outcome="completed", exit_code=0,
            signal=None, error=None, output=b"", finished_at=time.time(), seconds=0.0)
""")
        self.assertEqual(sorted(sum((output[::2] for output in outputs), [])), sorted(ids))
        self.assertEqual(len(set(sum((output[1::2] for output in outputs), []))), 600)
        with Queue(self.db) as queue:
            self.assertEqual(queue.counts()["completed"], 600)
            self.assertEqual({len(queue.runs(id)) for id in ids[::50]}, {1})

    def test_an_id_and_a_key_are_given_once(self):
        """Also when several processes create the database in the same moment."""
        outputs = self.crowd("""
with Queue() as queue:
    for number in range(40):
        try:
            print("id", queue.enqueue("true", id="i%d" % number))
        except QueueError as error:
            assert "taken" in str(error), error
        print("key", queue.enqueue("true", unique="k%d" % number))
""", count=4)
        words = sum(outputs, [])
        pairs = list(zip(words[::2], words[1::2]))
        self.assertEqual(sorted(id for kind, id in pairs if kind == "id"),
                         sorted("i%d" % number for number in range(40)))
        self.assertEqual(sum(kind == "key" for kind, _ in pairs), 160)
        self.assertEqual(len({id for kind, id in pairs if kind == "key"}), 40)
        with Queue(self.db) as queue:
            self.assertEqual(queue.counts()["pending"], 80)


class ModelTest(StorageCase):
    """Thousands of random operations on three connections, against a plain dictionary.

    Clocks jump, stale results come in, jobs wait for each other, keys collide; the queue must
    be what the dictionary is. QUEUECTL_SEED repeats a run, QUEUECTL_OPERATIONS makes it longer."""

    SERVED = {"w-all": None, "w-a": ["a"], "w-bc": ["b", "c"]}
    SEED = os.environ.get("QUEUECTL_SEED")  # (what a Case runs in has no QUEUECTL_ variables)
    OPERATIONS = int(os.environ.get("QUEUECTL_OPERATIONS") or 3000)

    def test_random_operations(self):
        import random
        seed = int(self.SEED or random.randrange(10 ** 9))
        self.random = random.Random(seed)
        self.time = self.clock()
        self.queues = {}
        for name, served in self.SERVED.items():
            self.queues[name] = self.queue(durable=False)
            self.queues[name].serve(served)
        self.jobs, self.claims, self.paused, self.serial = {}, [], set(), 0
        self.settings = {"backoff_base": 2, "backoff_max": 3600, "max_retries": 3}
        self.trace, self.done = [], set()
        operations = [self.do_enqueue] * 6 + [self.do_claim] * 8 + [self.do_settle] * 8 + [
            self.do_stale, self.do_retry, self.do_retry_all, self.do_cancel, self.do_cancel,
            self.do_pause, self.do_resume, self.do_resume, self.do_clock, self.do_clock,
            self.do_set, self.do_batch, self.do_batch, self.do_prune]
        try:
            for number in range(self.OPERATIONS):
                self.random.choice(operations)()
                if number % 20 == 0:
                    self.compare()
                if self.random.random() < 0.0015:
                    self.reopen()
            self.compare()
        except BaseException:
            print("\nmodel test: QUEUECTL_SEED=%d; the last operations:\n  %s" % (
                seed, "\n  ".join(self.trace[-12:])), file=sys.stderr)
            raise
        self.assertLessEqual(
            set(queuectl.STATES + queuectl.VIEWS) | set(queuectl.OUTCOMES)
            | {"stale", "key", "circle", "prune", "due"}, self.done, "seed %d: not met" % seed)

    # What the model knows.

    def any_queue(self):
        return self.queues[self.random.choice(list(self.queues))]

    def reopen(self):
        for name, served in self.SERVED.items():
            self.queues[name].close()
            self.queues[name] = self.queue(durable=False)
            self.queues[name].serve(served)

    def log(self, text, *values):
        self.trace.append(text % values)

    def view(self, job):
        if job["state"] != "pending":
            return job["state"]
        if job["unmet"]:
            return "blocked"
        return job["hold"] or "pending"

    def hold(self, job):
        """A job that waits for no other (any more) is scheduled, or ready."""
        late = job["run_after"] is not None and job["run_after"] > self.time.now
        job["hold"] = "scheduled" if late else None

    def active(self, key):
        return [id for id, job in self.jobs.items() if key and job["unique"] == key
                and job["state"] in ("pending", "processing")]

    def change(self, job, state):
        job.update(state=state, updated=queuectl.iso(self.time.now))

    def pick(self, *states):
        ids = [id for id, job in self.jobs.items() if not states or job["state"] in states]
        return self.random.choice(ids) if ids else None

    def compare(self):
        """Every job, in order, and the counts."""
        expected = [(id, job["state"], job["attempts"], job["max_retries"], job["priority"],
                     job["queue"], job["error"], job["worker"], job["run"],
                     queuectl.iso(job["run_after"]), job["updated"], bool(job["cancel"]),
                     self.view(job)) for id, job in self.jobs.items()]
        queue = self.any_queue()
        self.assertEqual([
            (job.id, job.state, job.attempts, job.max_retries, job.priority, job.queue,
             job.last_error, job.locked_by, job.run, job.run_at, job.updated_at, bool(job.cancel),
             job.view) for job in queue.jobs()], expected)
        counts = dict.fromkeys(queuectl.STATES + queuectl.VIEWS, 0)
        for job in self.jobs.values():
            for state in {job["state"], self.view(job)}:
                counts[state] += 1
                self.done.add(state)
        self.assertEqual(queue.counts(), counts)
        for id in self.random.sample(sorted(self.jobs), min(3, len(self.jobs))):
            self.assertEqual([run.outcome for run in queue.runs(id)], self.jobs[id]["outcomes"])

    # What can happen.

    def new_job(self, others):
        fields = {"command": "true", "queue": self.random.choice("aabc"),
                  "priority": self.random.choice([0, 0, 0, -1, 5])}
        self.serial += 1
        fields["id"] = "j%d" % self.serial
        if self.random.random() < 0.05 and self.jobs:
            fields["id"] = self.pick()
        if self.random.random() < 0.3:
            fields["max_retries"] = self.random.choice([0, 1, 2, 5])
        if self.random.random() < 0.25:
            fields["delay"] = self.random.choice([0, 1, 30, 4000])
        elif self.random.random() < 0.1:
            fields["run_at"] = max(0, self.time.now + self.random.choice([-5, 5, 100]))
        if self.random.random() < 0.2:
            fields["unique"] = self.random.choice("xyz")
        if self.random.random() < 0.3:
            recent = list(self.jobs)[-12:] + others + ["missing"] * (self.random.random() < 0.05)
            if recent:
                fields["after"] = self.random.sample(recent, min(len(recent),
                                                                 self.random.choice([1, 1, 2, 3])))
        return fields

    def do_enqueue(self, batch=1):
        ids = ["j%d" % (self.serial + number) for number in range(1, batch + 1)]
        fields = [self.new_job(ids if batch > 1 else []) for _ in range(batch)]
        self.log("enqueue %s", fields)
        queue = self.any_queue()
        stored, added = [], {}
        refused = None
        for job in fields:
            id, active = job["id"], self.active(job.get("unique")) or [
                other for other, new in added.items() if job.get("unique")
                and new["unique"] == job["unique"]]
            if active:
                self.done.add("key")
                stored.append(active[0])
                continue
            if id in self.jobs or id in added:
                refused = "taken"
                break
            run_after = job.get("run_at")
            if job.get("delay") is not None:
                run_after = self.time.now + job["delay"]
            stored.append(id)
            added[id] = dict(
                state="pending", attempts=0, queue=job["queue"], priority=job["priority"],
                max_retries=job.get("max_retries", self.settings["max_retries"]), hold=None,
                run_after=run_after, after=job.get("after", []), unique=job.get("unique"),
                error=None, worker=None, run=None, cancel=False, outcomes=[], unmet=set(),
                updated=queuectl.iso(self.time.now))
        known = dict(self.jobs, **added)
        if refused is None:
            for id, job in added.items():
                if not refused and any(need not in known for need in job["after"]):
                    refused = "no job"
            reached = {id: set(job["after"]) & set(added) for id, job in added.items()}
            for _ in added:
                for needs in reached.values():
                    needs.update(*[reached[need] for need in needs])
            if not refused and any(id in needs for id, needs in reached.items()):
                refused = "circle"
                self.done.add("circle")
        if refused:
            with self.assertRaises(QueueError) as caught:
                queue.enqueue_many(fields)
            self.assertIn(refused, str(caught.exception))
            return
        self.assertEqual(list(queue.enqueue_many(fields)), stored)
        self.jobs.update(added)
        for job in added.values():
            job["unmet"] = {need for need in job["after"]
                            if self.jobs[need]["state"] != "completed"}
            self.hold(job)

    def do_batch(self):
        self.do_enqueue(self.random.choice([2, 3, 4]))

    def do_claim(self, settle=None):
        worker = self.random.choice(list(self.SERVED))
        queue, served = self.queues[worker], self.SERVED[worker]
        settled, claim = queue.turn(settle, worker)
        for job in self.jobs.values():
            if job["hold"] and not job["unmet"] and job["state"] == "pending" \
                    and job["run_after"] <= self.time.now:
                job["hold"] = None
                self.done.add("due")
        ready = [(-job["priority"], number, id) for number, (id, job) in
                 enumerate(self.jobs.items()) if self.view(job) == "pending"
                 and (served is None or job["queue"] in served)
                 and job["queue"] not in self.paused and "*" not in self.paused]
        self.log("%s claims %s", worker, claim and claim.id)
        if not ready:
            self.assertIsNone(claim)
            return
        id = min(ready)[2]
        self.assertEqual(claim and claim.id, id)
        job = self.jobs[id]
        self.change(job, "processing")
        job.update(attempts=job["attempts"] + 1, cancel=False, worker=worker, run=claim.run)
        job["outcomes"].append(None)
        self.assertEqual((claim.attempts, claim.max_retries), (job["attempts"], job["max_retries"]))
        self.assertTrue(all(claim.run > other.run for other in self.claims))
        self.claims.append(claim)

    def do_settle(self):
        open_claims = [claim for claim in self.claims if claim.id in self.jobs
                       and self.jobs[claim.id]["run"] == claim.run
                       and self.jobs[claim.id]["state"] == "processing"]
        if not open_claims:
            return
        claim = self.random.choice(open_claims)
        outcome = self.random.choice(("completed",) * 4 + ("failed",) * 4 + queuectl.OUTCOMES)
        job = self.jobs[claim.id]
        self.log("settle %s: %s", claim.id, outcome)
        settled = self.settle(self.any_queue(), claim, outcome)
        self.done.add(outcome)
        job.update(worker=None, run_after=None, hold=None)
        job["outcomes"][-1] = outcome
        if outcome == "interrupted":
            job["attempts"] -= 1
        else:
            job["error"] = None if outcome == "completed" else outcome
        if outcome == "completed":
            self.change(job, "completed")
            for other in self.jobs.values():
                if claim.id in other["unmet"]:
                    other["unmet"].discard(claim.id)
                    if other["state"] == "pending":
                        self.change(other, "pending")
                    if not other["unmet"]:
                        self.hold(other)
        elif outcome == "cancelled" or job["cancel"]:
            self.change(job, "cancelled")
        elif outcome in ("failed", "timeout", "lost") and job["attempts"] >= job["max_retries"]:
            self.change(job, "dead")
        else:
            self.change(job, "pending")
            if outcome in ("failed", "timeout"):
                delay = min(self.settings["backoff_base"] ** job["attempts"],
                            self.settings["backoff_max"])
                if delay:
                    job.update(hold="failed", run_after=self.time.now + delay)
        job["cancel"] = False
        self.assertEqual((settled.state, settled.run_after), (job["state"], job["run_after"]))

    def do_stale(self):
        """A result of a run that is over, or of a deleted job: fenced off."""
        stale = [claim for claim in self.claims if claim.id not in self.jobs
                 or self.jobs[claim.id]["run"] != claim.run
                 or self.jobs[claim.id]["state"] != "processing"]
        if stale:
            claim = self.random.choice(stale)
            self.log("stale settle of %s", claim.id)
            self.assertIsNone(self.settle(self.any_queue(), claim,
                                          self.random.choice(queuectl.OUTCOMES)))
            self.done.add("stale")

    def do_cancel(self):
        ids = list(filter(None, [self.pick("pending", "processing", "cancelled"), self.pick()]))
        ids = ids[:self.random.choice([1, 1, 2])]
        self.log("cancel %s", ids)
        if any(self.jobs[id]["state"] in ("completed", "dead") for id in ids):
            with self.assertRaises(QueueError):
                self.any_queue().cancel(ids)
            return
        self.any_queue().cancel(ids)
        for id in ids:
            job = self.jobs[id]
            if job["state"] == "pending":
                self.change(job, "cancelled")
            elif job["state"] == "processing":
                job["cancel"] = True

    def revive(self, id):
        """Whether a job may be retried; then it is."""
        job = self.jobs[id]
        if job["state"] not in ("dead", "cancelled") or self.active(job["unique"]):
            return False
        self.change(job, "pending")
        job.update(attempts=0, run_after=None, error=None, hold=None)
        return True

    def do_retry(self):
        id = self.pick("dead", "cancelled") if self.random.random() < 0.9 else self.pick()
        if id is None:
            return
        self.log("retry %s", id)
        if self.revive(id):
            self.any_queue().retry([id])
        else:
            with self.assertRaises(QueueError):
                self.any_queue().retry([id])

    def do_retry_all(self):
        """Those whose key another job has stay dead; of two with one key, either is retried."""
        if self.random.random() < 0.7:
            return
        groups = {}
        for id, job in self.jobs.items():
            if job["state"] == "dead":
                groups.setdefault(job["unique"] or (id,), []).append(id)
        self.log("retry all: %s", groups)
        queue = self.any_queue()
        count = queue.retry_all()
        for key, ids in groups.items():
            done = [id for id in ids if queue.get(id).state == "pending"]
            self.assertEqual(len(done), not self.active(key), (key, ids))
            count -= sum(map(self.revive, done))
        self.assertEqual(count, 0)

    def do_pause(self):
        name = self.random.choice(["a", "b", "c", None])
        self.log("pause %s", name)
        self.any_queue().pause(name)
        self.paused.add(name or "*")

    def do_resume(self):
        name = self.random.choice(["a", "b", "c", None, None])
        self.log("resume %s", name)
        self.any_queue().resume(name)
        self.paused = self.paused - {name} if name else set()

    def do_clock(self):
        jump = self.random.choice([0.1, 1, 2, 5, 40, 5000, -3, -100, -5000])
        self.time.now += jump
        self.log("the clock jumps by %s to %s", jump, self.time.now)

    def do_set(self):
        key, value = self.random.choice([("backoff_base", 0), ("backoff_base", 2),
                                         ("backoff_base", 3), ("backoff_max", 5),
                                         ("backoff_max", 3600), ("max_retries", 2),
                                         ("max_retries", 3)])
        self.log("%s = %s", key, value)
        self.any_queue().set_setting(key, value)
        self.settings[key] = value

    def do_prune(self):
        states = self.random.choice([["completed"], ["dead"], list(queuectl.ENDED)])
        age = self.random.choice([0, 10, 1000])
        before = queuectl.iso(self.time.now - age)
        waited_for = {need for job in self.jobs.values() if job["unmet"] for need in job["after"]}
        gone = [id for id, job in self.jobs.items() if job["state"] in states
                and job["updated"] <= before
                and (job["state"] == "completed" or id not in waited_for)]
        self.log("prune %s older than %s: %s", states, age, gone)
        self.assertEqual(self.any_queue().prune(states, age), len(gone))
        for id in gone:
            del self.jobs[id]
            self.done.add("prune")


class Commands(StorageCase):
    """The command line: what it accepts, what it refuses and how, and what it prints."""

    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.dir)

    def stored(self):
        with Queue(self.db) as queue:
            return [job.as_dict() for job in queue.jobs()], queue.settings(), queue.paused()

    def jobs_of(self, *words, stdin=b""):
        """The jobs that an enqueue has stored, whose ids it printed, one a line."""
        ids = self.ok(*words, stdin=stdin).splitlines()
        with Queue(self.db) as queue:
            return [queue.get(id) for id in ids]

    def job_of(self, *words):
        job, = self.jobs_of(*words)
        return job

    def check_refused(self, table):
        """Each of (words, what the line says[, exit code[, stdin]]) is refused and changes
        nothing."""
        before = self.stored()
        for words, says, *rest in table:
            with self.subTest(words=[str(word)[:80] for word in words]):
                code, stdin = rest + [None, b""][len(rest):]
                self.refused(*words, says=says, code=code, stdin=stdin)
                self.assertEqual(self.stored(), before)

    # Wrong input.

    def test_wrong_commands(self):
        self.check_refused([((), "required"), (("enqeue", "x"), "enqeue", 2),
                            (("--nope",), "", 2), (("worker",), "required", 2),
                            (("worker", "sotp"), "sotp", 2), (("dlq",), "required", 2),
                            (("config",), "required", 2), (("config", "frob"), "frob", 2),
                            (("enqueue",), "give one job", 2), (("enqueue", "--"), "give one", 2),
                            (("list", "--nope"), "--nope", 2), (("list", "x"), "x", 2),
                            (("status", "--", "x"), "", 2), (("show",), "ID", 2),
                            (("show", "a", "b"), "b", 2), (("logs",), "ID", 2),
                            (("cancel",), "ID", 2), (("config", "set", "max_retries"), "VALUE", 2),
                            (("config", "get"), "KEY", 2), (("completion",), "", 2),
                            (("completion", "ksh"), "ksh", 2), (("--db",), "--db", 2),
                            (("--db", "", "list"), "--db", 2), (("list", "--db"), "--db", 2)])

    def test_wrong_jobs(self):
        """What is no command and no JSON job, as one word."""
        self.ok("enqueue", "--id", "taken", "true")
        self.refused("enqueue", "--", "", code=2, says="empty")
        self.check_refused([(("enqueue", word), says) for word, says in [
            ("", "empty"), (" ", "empty"), ("\n\t ", "empty"), ("\u3000", "empty"),
            ('[{"command": "x"}]', "--file"), ("[ {}]", "--file"),
            ('{"command": "x"', "JSON"), ('{"command": }', "JSON"), ('{"command" "x"}', "JSON"),
            ('{"command": "x"} more', "JSON"), ('{"command": "x",}', "JSON"), ('{"', "JSON"),
            ('{ "command: x}', "JSON"), (' {"a', "JSON"), ('{"a": ' + "[" * 100000, "JSON"),
            ("{id:job1,command:sleep 2}", "PowerShell"), ("{'id':'job1'}", "PowerShell"),
            ("{command: x}", "PowerShell"), ("{a", "PowerShell"),
            ("{}", "needs a command"), ("{ }", "needs a command"), ('{"id": "a"}', "command"),
            ('{"command": "x", "colour": 1}', '"colour"'), ('{"command": "x", "Id": "a"}', "id"),
            ('{"command": "x", "id": "taken"}', "taken"), ("a\0b", "NUL"), ("x" * 131072, "131072"),
            ("\u00fc" * 65536, "131072"), ("a\udcff", "UTF-8"),
            ('{"command": "x", "command": null}', "command")]])
        error = self.refused("enqueue", '{"command": "x", "colour": 1}')
        for name in ("id", "command", "queue", "priority", "max_retries", "timeout", "delay",
                     "run_at", "cwd", "env", "after", "unique"):
            self.assertIn(name, error)

    WRONG = {  # field: values that are refused, as JSON text
        "id": '"" " " "a b" "a\\nb" "-a" "a\\u0000" "\\u001b[31m" "\\ud800" "%s" 1 1.5 true [] {}'
              ' ["a"]' % ("x" * 256),
        "command": '"" " " "\\n" "a\\u0000b" "\\ud800" 1 true [] {} ["ls"] {"a":1}',
        "queue": '"" "a b" "-q" "a\\tb" 1 true [] {}',
        "priority": '"" "x" "1.5" 1.5 true [] {} NaN Infinity -Infinity 1e999 2147483648'
                    ' -2147483649 %s' % ("9" * 400),
        "max_retries": '-1 "-1" 1.5 "many" true [] {} NaN Infinity 1e999 2147483648',
        "timeout": '-1 "-5s" "soon" "" "s" "5y" true [] {} NaN Infinity -Infinity 1e300 "nan"'
                   ' "inf"',
        "delay": '-1 "-5s" "soon" "" "5y" true [] {} NaN Infinity 1e300 "infs"',
        "run_at": '-1 "tomorrow" "" "2026-13-01" "+x" "-10m" true [] {} NaN Infinity 1e300'
                  ' 1700000000000 "nan"',
        "cwd": '"" "a\\u0000" 1 true [] {}',
        "env": '"A" "A=1" 1 true ["NOT_SET_HERE"] ["=x"] {"A":1} {"":"x"} {"A=B":"x"}'
               ' {"A":"\\u0000"} {"A":["x"]} {"A":"\\ud800"} {"A":"%s"}' % ("x" * 131072),
        "after": '"" "nope" "a\\u0020b" 1 true ["nope"] [1] [[]] {"a":1} ["a",""] ["a\\u0020b"]',
        "unique": '"" "a\\u0020b" "-a" 1 true [] {}',
    }

    def test_every_field_with_wrong_values(self):
        self.ok("enqueue", "--id", "a", "true")
        for field, values in self.WRONG.items():
            values = re.findall(r'"[^"]*"(?=[\s\]]|$)|\{[^}]*\}|\[[^ ]*\]|[^\s"\[\]{}]+', values)
            self.assertGreater(len(values), 5, field)
            table = []
            for value in values:
                text = '{"command": "true", "%s": %s}' % (field, value)
                if field == "command":
                    text = '{"command": %s}' % value
                json.loads(text)  # the test itself is right
                table.append((("enqueue", text), "" if "nope" in value else field))
            self.check_refused(table)
        self.check_refused([(("enqueue", '{"command": "x", "delay": 1, "run_at": 1}'), "run_at")])

    def test_wrong_options_are_usage_errors(self):
        self.ok("enqueue", "--id", "a", "true")
        self.check_refused([(("enqueue",) + words + ("true",), words[0], 2) for words in [
            ("--id", ""), ("--id", "a b"), ("--id", "a\nb"), ("--queue", ""), ("--queue", "a b"),
            ("--priority", "x"), ("--priority", "1.5"), ("--priority", "nan"),
            ("--priority", "99999999999"), ("--max-retries", "-1"), ("--max-retries", "many"),
            ("--timeout", "soon"), ("--timeout", "-1"), ("--timeout", "inf"), ("--delay", "5y"),
            ("--delay", "nan"), ("--run-at", "tomorrow"), ("--run-at", "2026-02-30"),
            ("--cwd", ""), ("--env", "NOT_SET_HERE"), ("--env", "=x"), ("--env", ""),
            ("--after", "a b"), ("--unique", "a b"), ("--unique", "")]] + [
            (("enqueue", "--id", "a", "true"), "taken", 1),
            (("enqueue", "--after", "nope", "true"), "nope", 1),
            (("enqueue", "--delay", "1", "--run-at", "+1", "true"), "run_at", None),
            (("enqueue", "--file", "x", "true"), "give one", 2),
            (("enqueue", "--file", "x", "--", "true"), "give one", 2),
            (("enqueue", "--id", "b", "--file", "x"), "--id", 2),
            (("enqueue", "true", "--", "true"), "give one", 2),
            (("enqueue", "ls", "--colour"), "--", 2),
            (("list", "--state", "faild"), "faild", 2), (("list", "--limit", "-1"), "--limit", 2),
            (("list", "--limit", "x"), "--limit", 2), (("list", "--queue", ""), "--queue", 2),
            (("prune", "--state", "pending"), "pending", 2),
            (("prune", "--older-than", "x"), "--older-than", 2),
            (("dlq", "purge", "--older-than", "-1"), "--older-than", 2),
            (("wait", "--timeout", "x"), "--timeout", 2),
            (("logs", "a", "--run", "0"), "--run", 2), (("logs", "a", "--run", "x"), "--run", 2),
            (("worker", "start", "--count", "0"), "--count", 2),
            (("worker", "start", "--count", "x"), "--count", 2),
            (("worker", "start", "--queue", "a b"), "--queue", 2),
            (("worker", "start", "--via", ""), "--via", 2),
            (("worker", "stop", "--timeout", "x"), "--timeout", 2),
            (("dlq", "retry"), "--all", 2), (("dlq", "retry", "--all", "a"), "--all", 2)])

    def test_what_does_not_exist(self):
        self.ok("enqueue", "--id", "a", "true")
        self.check_refused(
            [(words + ("nope",), "no job nope", 1) for words in [
                ("show",), ("show", "--json"), ("logs",), ("logs", "-f"), ("wait",),
                ("wait", "a"), ("cancel",), ("cancel", "a"), ("dlq", "retry"),
                ("enqueue", "x", "--after")]]
            + [(("logs", "a", "--run", "1"), "run", 1), (("logs", "a", "--run", "5"), "run", 1),
               (("dlq", "retry", "a"), "pending", 1),
               (("show", "a b"), "a b", 1), (("pause", "a b"), "a b", 1),
               (("resume", "-x"), "", None)])

    def test_wrong_settings(self):
        self.check_refused(
            [(("config",) + words, words[1], None) for words in [
                ("get", "nope"), ("set", "nope", "1"), ("unset", "nope"),
                ("set", "MAX_RETRIES", "1"), ("get", "worker_pids")]]
            + [(("config", "set", key, value), key, None) for key, values in {
                "max_retries": "x -1 1.5 nan inf 1e400", "backoff_base": "x -2 nan inf 1e400",
                "backoff_max": "x -1 5y nan inf", "job_timeout": "x -1 inf", "kill_grace": "x -1",
                "output_limit": "x -1 64X 1.5 9999G", "keep_completed": "x -1 5y inf",
            }.items() for value in values.split() + [""]])
        for word in queuectl.SETTINGS:
            self.assertIn(word, self.refused("config", "get", "nope"))

    def test_files_of_jobs_that_are_wrong(self):
        """An error names its line, and nothing of the file is stored."""
        self.ok("enqueue", "--id", "taken", "true")
        good = '{"command": "true"}'
        table = []
        for text, says in [
            (good + "\n{", "line 2: "), (good + "\n\n" + good + "\nnot json\n", "line 4: "),
            (good + "\n{}\n", "line 2: "), (good + '\n{"command": "x", "a": 1}', "line 2: "),
            (good + '\n{"command": "x", "id": "taken"}\n', "line 2: the id taken is taken"),
            ('{"command": "x", "id": "b"}\n{"command": "x", "id": "b"}\n', "line 2: the id b"),
            (good + "\n[]\n", "line 2: "), (good + "\n5", "line 2: "), ('"ls"', "line 1: "),
            ("null", "line 1: "), ("ls -l", "line 1: "), (b"\xff\xfe{", "line 1: "),
            (good.encode() + b"\n\xff\n", "line 2: "), (good + "\n\0\n", "line 2: "),
            (good + " " + good, "line 1: "), (good + "," + good, "line 1: "),
            ("[", "array does not end"), ("[" + good, "array does not end"),
            ("[" + good + ",", "array does not end"), ("[" + good + ",]", ""), ("[,]", ""),
            ("[" + good + " " + good + "]", "line 1: "),
            ("[\n" + good + "\n" + good + "\n]", "line 3"),
            ("[" + good + "] x", "line 1: "), ("[" + good + "]\n" + good, "behind the end"),
            ("[" + good + ",\n\n5]", "line 3: "), ("[" + good + ",\n{}]", "line 2: "),
            ("[" + good + ",\n[" + good + "]]", "line 2: "), ('[{"command": "x" "a"}]', ""),
            ("[" * 100000, ""), ("{" * 100000, "line 1: "),
            ('{"command": "%s"}' % ("x" * 131072), "line 1: "),
            ('{"command": "x", "after": ["b"]}\n', "there is no job b"),
            ('{"command":"x","id":"b","after":["c"]}\n{"command":"x","id":"c","after":["b"]}',
             "circle"),
        ]:
            data = text if isinstance(text, bytes) else text.encode()
            table.append((("enqueue", "--file", "-"), says, 1, data))
        self.check_refused(table)
        with open(self.path("jobs"), "w") as file:
            file.write(good + "\n{")
        self.check_refused([
            (("enqueue", "--file", self.path("jobs")), "line 2: ", 1),
            (("enqueue", "--file", self.path("missing")), "missing", 1),
            (("enqueue", "--file", self.path("missing", "jobs")), "jobs", 1),
            (("enqueue", "--file", self.dir), self.dir, 1), (("enqueue", "--file", ""), "", None),
            (("enqueue", "--file", "a\0b"), "", 1)])

    def test_databases_that_are_none(self):
        os.mkdir(self.path("folder"))
        os.mkfifo(self.path("fifo"))
        with open(self.path("file"), "w") as file:
            file.write("text\n")
        for path, says in [("folder", "folder"), ("missing/q.db", "missing/q.db"),
                           ("fifo", "regular"), ("file", "not a database"), ("file/q.db", "file"),
                           ("/dev/null", "regular")]:
            for words in (["list"], ["enqueue", "true"], ["worker", "start", "--drain"]):
                with self.subTest(path=path, words=words):
                    self.refused("--db", path, *words, code=1, says=says)
        self.assertEqual(sorted(os.listdir(self.dir)), ["fifo", "file", "folder"])
        self.assertEqual(read_file(self.path("file")), b"text\n")
        self.assertEqual(os.listdir(self.path("folder")), [])

    # Right input.

    def test_how_words_are_read(self):
        """One word is JSON or a line for the shell; several, or what is behind --, are the
        exact arguments of a command."""
        for words, command in [
            (["sleep 2 && date"], "sleep 2 && date"), (["true"], "true"),
            (['{"command": "sleep 2"}'], "sleep 2"), (['{\n "command" : "a"\n}\n'], "a"),
            ([' {"command": "a"}'], "a"), (["{ echo a; echo b; }"], "{ echo a; echo b; }"),
            (["{\necho a\n}"], "{\necho a\n}"), (["  { echo; }"], "  { echo; }"),
            (["[ -f x ] && rm x"], "[ -f x ] && rm x"), (["5"], "5"), (["null"], "null"),
            (['"my tool" x'], '"my tool" x'), (["echo \u00fc"], "echo \u00fc"),
            (["echo", "a b", "$HOME", "it's"], "echo 'a b' '$HOME' 'it'\"'\"'s'"),
            (["--", "rsync", "-a", "my dir/", "host:/x"], "rsync -a 'my dir/' host:/x"),
            (["--", "true"], "true"), (["--", "my tool"], "'my tool'"), (["--", "a;b"], "'a;b'"),
            (["--", '{"command": "x"}'], "'{\"command\": \"x\"}'"), (["--", "{ x; }"], "'{ x; }'"),
            (["--", "cmd", "--", "-x", "--db", "y"], "cmd -- -x --db y"), (["--", "a", ""], "a ''"),
            (["--priority", "5", "--", "--priority", "6"], "--priority 6"),
            (["x" * 131071], "x" * 131071),
        ]:
            with self.subTest(words=[word[:50] for word in words]):
                self.assertEqual(self.job_of("enqueue", *words).command, command)

    def test_exact_arguments_arrive_as_they_were(self):
        """Whatever is in them: the shell splits the line into just these words."""
        show = "import json, sys; print(json.dumps(sys.argv[1:]))"
        words = ["a b", "", "'", '"', "$HOME `x` \\", "*", "new\nline", "-x", "{", "\u00fc", "#",
                 "~"]
        command = self.job_of("enqueue", "--", sys.executable, "-c", show, *words).command
        self.assertEqual(json.loads(subprocess.check_output(["/bin/sh", "-c", command])), words)

    def test_enqueue_prints_the_id_and_nothing_else(self):
        code, out, err = self.main("enqueue", "true")
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, r"\A[0-9a-z]{6}\n\Z")
        self.assertEqual(self.main("enqueue", "--id", "a", "true"), (0, "a\n", ""))
        self.assertEqual(self.main("enqueue", '{"id": "b", "command": "true"}'), (0, "b\n", ""))
        code, out, err = self.main("enqueue", "--file", "-", stdin=b'{"id": "c", "command": "x"}\n'
                                   b'\n{"id": "d", "command": "x"}')
        self.assertEqual((code, out, err), (0, "c\nd\n", ""))

    FIELDS = [  # option words, JSON field, its value in JSON, attribute of the job
        (["--id", "x1"], "id", "x1", "x1"), (["--queue", "q"], "queue", "q", "q"),
        (["--priority", "-5"], "priority", -5, -5), (["--priority=5"], "priority", "5", 5),
        (["--max-retries", "7"], "max_retries", 7, 7),
        (["--timeout", "10m"], "timeout", "10m", 600),
        (["--timeout", "0"], "timeout", 0, 0), (["--timeout", "1.5"], "timeout", 1.5, 1.5),
        (["--delay", "1h"], "delay", "1h", "2027-01-15T09:00:00.000Z"),
        (["--delay", "0"], "delay", 0, "2027-01-15T08:00:00.000Z"),
        (["--run-at", "+10m"], "run_at", "+10m", "2027-01-15T08:10:00.000Z"),
        (["--run-at", "2030-01-01T00:00Z"], "run_at", "2030-01-01T00:00Z",
         "2030-01-01T00:00:00.000Z"),
        (["--run-at", "1900000000"], "run_at", 1900000000, "2030-03-17T17:46:40.000Z"),
        (["--cwd", "/usr/.."], "cwd", "/usr/..", "/"),
        (["--env", "A=1", "--env", "B=x=y"], "env", {"A": "1", "B": "x=y"}, {"A": "1", "B": "x=y"}),
        (["--env", "COPIED"], "env", ["COPIED"], {"COPIED": "from here"}),
        (["--after", "a", "--after", "b"], "after", ["a", "b"], ["a", "b"]),
        (["--after", "a"], "after", "a", ["a"]), (["--unique", "k"], "unique", "k", "k"),
    ]

    def test_every_option_is_a_field(self):
        self.clock()
        os.environ["COPIED"] = "from here"
        for number, (words, field, value, expected) in enumerate(self.FIELDS):
            attribute = "run_at" if field == "delay" else field
            for form in (["enqueue", "true"] + words,
                         ["enqueue"] + words + ['{"command": "true"}'],
                         ["enqueue"] + words + ["--", "true"],
                         ["enqueue", json.dumps({"command": "true", field: value})]):
                with self.subTest(form=form):
                    self.db = self.path("f%d.db" % number)
                    os.environ["QUEUECTL_DB"] = self.db
                    self.ok("enqueue", "--file", "-", stdin=b'{"command":"a","id":"a"}\n'
                            b'{"command":"b","id":"b"}')
                    self.assertEqual(self.job_of(*form).as_dict()[attribute], expected)
                    for end in ("", "-wal", "-shm"):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(self.db + end)

    def test_options_are_defaults_for_json(self):
        """The job's own field wins; env merges; null is the same as absent."""
        self.clock()
        options = ["--queue", "q", "--priority", "5", "--timeout", "60", "--max-retries", "9",
                   "--env", "A=option", "--env", "B=option", "--delay", "60", "--cwd", "/"]
        lines = [{"command": "x"}, {"command": "x", "queue": "own", "priority": 0, "timeout": "2m",
                                    "max_retries": 1, "env": {"B": "own", "C": "own"},
                                    "delay": 0, "cwd": "/usr"},
                 {"command": "x", "queue": None, "env": None, "delay": None, "id": None,
                  "after": None, "unique": None, "run_at": None, "priority": None},
                 {"command": "x", "run_at": "2030-01-01T00:00Z"},
                 {"command": "x", "env": ["B=own"]}]
        jobs = self.jobs_of("enqueue", "--file", "-", *options,
                            stdin="\n".join(map(json.dumps, lines)).encode())
        both, late = {"A": "option", "B": "option"}, "2027-01-15T08:01:00.000Z"
        self.assertEqual([(job.queue, job.priority, job.timeout, job.max_retries, job.env,
                           job.run_at, job.cwd) for job in jobs], [
            ("q", 5, 60, 9, both, late, "/"),
            ("own", 0, 120, 1, {"A": "option", "B": "own", "C": "own"},
             "2027-01-15T08:00:00.000Z", "/usr"),
            ("q", 5, 60, 9, both, late, "/"),
            ("q", 5, 60, 9, both, "2030-01-01T00:00:00.000Z", "/"),
            ("q", 5, 60, 9, dict(both, B="own"), late, "/")])
        job = self.job_of("enqueue", "--id", "option", '{"command": "x", "id": "own"}')
        self.assertEqual(job.id, "own")

    def test_fields_that_nobody_may_set_are_ignored(self):
        fields = {"command": "x", "state": "processing", "attempts": 7, "created_at": "never",
                  "updated_at": 5, "started_at": "x", "finished_at": "x", "locked_by": "me",
                  "locked_at": "x", "exit_code": 9, "last_error": "x", "runs": [1]}
        job = self.job_of("enqueue", json.dumps(fields)).as_dict()
        self.assertEqual((job["state"], job["attempts"], job["locked_by"], job["exit_code"],
                          job["last_error"], job["started_at"]),
                         ("pending", 0, None, None, None, None))
        self.assertRegex(job["created_at"], r"\A20")

    def test_jobs_that_have_ended_are_skipped_with_a_note(self):
        lines = [{"id": "a", "command": "x", "state": "completed"},
                 {"id": "b", "command": "x", "state": "dead"}, {"id": "c", "command": "x"},
                 {"id": "d", "command": "x", "state": "cancelled"},
                 {"id": "e", "command": "x", "state": "pending"}]
        code, out, err = self.main("enqueue", "--file", "-",
                                   stdin="\n".join(map(json.dumps, lines)).encode())
        self.assertEqual((code, out), (0, "c\ne\n"))
        self.assertRegex(err, r"\Aqueuectl: 3 jobs .*a b d\n\Z")
        code, out, err = self.main("enqueue", json.dumps(lines[0]))
        self.assertEqual((code, out), (0, ""))
        self.assertIn("a", err)

    def test_forms_of_a_file(self):
        """JSON Lines or an array, in any layout, from a file or from stdin."""
        a, b = '{"id": "a", "command": "x"}', '{"id": "b", "command": "y", "env": {"A": "["}}'
        for text in (a + "\n" + b, a + "\n\n  " + b + "\n\n", "\n\n" + a + "\r\n" + b + "\r\n",
                     "[%s,%s]" % (a, b), "[\n%s,\n%s\n]\n" % (a, b), "[%s\n,%s\n\n]  \n\n" % (a, b),
                     "\n [ %s , %s ] " % (a, b), "\ufeff" + a + "\n" + b, "\ufeff[%s,%s]" % (a, b),
                     json.dumps([json.loads(a), json.loads(b)], indent=4),
                     json.dumps([json.loads(a), json.loads(b)], indent=1).replace("\n", "\n\n")):
            with self.subTest(text=text):
                for form in ("-", self.path("jobs")):
                    with open(self.path("jobs"), "wb") as file:
                        file.write(text.encode())
                    jobs = self.jobs_of("enqueue", "--file", form, stdin=text.encode())
                    self.assertEqual([(job.id, job.command, job.env) for job in jobs],
                                     [("a", "x", {}), ("b", "y", {"A": "["})])
                    self.ok("cancel", "a", "b")
                    self.ok("prune")
        for text in ("", "\n\n", "[]", " [ ] \n"):
            self.assertEqual(self.ok("enqueue", "--file", "-", stdin=text.encode()), "")

    def test_what_list_prints_enqueue_reads(self):
        """`list --json` of one queue feeds another: the jobs that have not ended, as new."""
        with self.queue() as queue:
            for id, fields in [
                    ("done", {}), ("bad", {}), ("run", {}), ("all", dict(
                        command="x 'y'\n\u00fc", queue="q", priority=3, max_retries=8, timeout=1.5,
                        run_at=1900000000.125, cwd="/usr", env={"A": "\u00fc"}, after=["bad"],
                        unique="k")), ("plain", {}), ("gone", {}), ("next", dict(after=["done"]))]:
                queue.enqueue(**dict(dict(command="true", id=id), **fields))
                if id in ("done", "bad"):
                    self.settle(queue, self.claim(queue), "completed" if id == "done" else "failed")
                elif id == "run":
                    self.claim(queue)
            queue.cancel(["gone"])
            jobs = {job.id: job.as_dict() for job in queue.jobs()}
        other = self.path("other.db")
        printed = self.ok("list", "--json").encode()
        out = self.ok("--db", other, "enqueue", "--file", "-", stdin=printed)
        self.assertEqual(out.split(), ["bad", "run", "all", "plain", "next"])
        with Queue(other) as queue:
            for job in queue.jobs():
                for key in ("command", "queue", "priority", "max_retries", "timeout", "run_at",
                            "cwd", "env", "unique"):
                    self.assertEqual(job.as_dict()[key], jobs[job.id][key], key)
                self.assertEqual((job.state, job.attempts), ("pending", 0))
            self.assertEqual(queue.get("all").view, "blocked")
            self.assertEqual(queue.get("next").view, "pending")  # what it waited for is done
        self.refused("--db", other, "enqueue", "--file", "-", stdin=printed, says="taken")

    def test_the_database_is_named_on_either_side(self):
        a, b = self.path("a.db"), self.path("b.db")
        for words in (["--db", a, "enqueue", "--id", "1", "true"],
                      ["enqueue", "--db", a, "--id", "2", "true"],
                      ["enqueue", "--id", "3", "true", "--db", a], ["--db=" + a, "enqueue", "true"],
                      ["enqueue", "--db", a, "--", "true"], ["pause", "--db", a, "q"],
                      ["config", "set", "--db", a, "max_retries", "5"],
                      ["--db", a, "config", "set", "max_retries", "5"]):
            self.ok(*words)
        self.ok("enqueue", "--", "x", "--db", b)
        self.assertFalse(os.path.exists(b))
        with Queue(a) as queue, self.queue() as mine:
            self.assertEqual(len(list(queue.jobs())), 5)
            self.assertEqual(queue.settings()["max_retries"], 5)
            self.assertEqual(len(list(mine.jobs())), 1)
        self.assertEqual(self.ok("--db", b, "list", "--json", "--db", a).count('"command"'), 5)

    def test_options_stand_anywhere(self):
        self.assertEqual(self.job_of("enqueue", "true", "--priority", "4").priority, 4)
        self.assertEqual(self.job_of("enqueue", "--priority=-4", "true").priority, -4)
        self.assertEqual(self.job_of("enqueue", "--priority", "-4", "true").priority, -4)
        self.ok("cancel", "--", *[job["id"] for job in self.stored()[0][:1]])
        self.ok("pause", "--", "q")

    def test_settings(self):
        self.assertEqual(self.ok("config", "get", "max-retries"), "3\n")
        self.assertEqual(self.ok("config", "get", "backoff_max"), "1h\n")
        for key, value, shown in [
                ("max-retries", "5", "5"), ("max_retries", "6", "6"),
                ("backoff-base", "1.5", "1.5"), ("backoff_max", "90m", "90m"),
                ("job-timeout", "0", "0s"), ("kill_grace", "500", "500s"),
                ("output-limit", "1M", "1M"), ("output_limit", "100", "100"),
                ("keep-completed", "14d", "14d"), ("keep_completed", "1.5", "1.5s")]:
            self.assertEqual(self.main("config", "set", key, value), (0, "", ""))
            for name in (key.replace("-", "_"), key.replace("_", "-")):
                self.assertEqual(self.ok("config", "get", name), shown + "\n")
            again = self.ok("config", "get", key).strip()
            self.ok("config", "set", key, again)  # what is shown is read back
            self.assertEqual(self.ok("config", "get", key).strip(), again)
        listed = self.ok("config", "list")
        for name in queuectl.SETTINGS:
            self.assertIn("\n%s " % name, listed)
        self.assertRegex(listed, r"\nmax_retries +6 ")
        for name in queuectl.SETTINGS:
            self.ok("config", "unset", name.replace("_", "-"))
        self.ok("config", "unset", "max_retries")
        self.assertEqual(self.ok("config", "get", "max_retries"), "3\n")
        self.assertEqual(self.ok("config", "get", "keep_completed"), "7d\n")

    # What is printed.

    def a_bit_of_everything(self):
        with self.queue() as queue:
            queue.set_setting("backoff_base", 2)
            for id, outcome, fields in [
                    ("done", "completed", {}), ("dead", "failed", dict(max_retries=1)),
                    ("bad", "failed", {}), ("run", None, dict(queue="q"))]:
                queue.enqueue("true", id=id, **fields)
                claim = self.claim(queue)
                if outcome:
                    self.settle(queue, claim, outcome, output=b"out\n")
            queue.enqueue("true", id="later", delay=99, env={"PASSWORD": "hunter2"})
            queue.enqueue("true", id="blocked", after=["dead"])

    def test_json_of_jobs(self):
        self.a_bit_of_everything()
        jobs = json.loads(self.ok("list", "--json"))
        self.assertEqual([job["id"] for job in jobs],
                         ["done", "dead", "bad", "run", "later", "blocked"])
        for job in jobs:
            self.assertEqual(list(job), Storage.KEYS)
            shown = json.loads(self.ok("show", "--json", job["id"]))
            runs = shown.pop("runs")
            self.assertEqual(shown, job)
            self.assertEqual(len(runs), job["id"] in ("done", "dead", "bad", "run"))
            for run in runs:
                self.assertLessEqual({"worker", "started_at", "finished_at", "exit_code", "signal",
                                      "outcome", "error"}, set(run))
            for key in ("run_at", "created_at", "updated_at", "started_at", "finished_at",
                        "locked_at"):
                if job[key] is not None:
                    self.assertRegex(job[key], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\Z")
        self.assertEqual(jobs[4]["env"], {"PASSWORD": "hunter2"})
        self.assertEqual(json.loads(self.ok("dlq", "list", "--json")), [jobs[1]])
        self.assertEqual(json.loads(self.ok("list", "--state", "cancelled", "--json")), [])
        for words, ids in [(["--state", "pending"], ["bad", "later", "blocked"]),
                           (["--state", "failed"], ["bad"]), (["--queue", "q"], ["run"]),
                           (["--limit", "2"], ["done", "dead"]), (["--limit", "0"], []),
                           (["--state", "pending", "--queue", "default", "--limit", "1"], ["bad"])]:
            self.assertEqual([job["id"] for job in json.loads(self.ok("list", "--json", *words))],
                             ids)

    def test_json_of_status_and_workers(self):
        self.a_bit_of_everything()
        status = json.loads(self.ok("status", "--json"))
        self.assertEqual(status["database"], self.db)
        self.assertEqual(status["jobs"], {
            "pending": 3, "processing": 1, "completed": 1, "dead": 1, "cancelled": 0, "failed": 1,
            "scheduled": 1, "blocked": 1})
        self.assertEqual(status["workers"], [])
        self.assertEqual(json.loads(self.ok("worker", "list", "--json")), [])

    def test_status_for_people(self):
        code, out, err = self.main("status")
        self.assertIn(self.db, out)
        self.assertEqual((code, err), (0, ""))
        self.ok("enqueue", "true")
        code, out, err = self.main("status")
        self.assertIn("1 pending", out)
        self.assertRegex(err, r"\Aqueuectl: .*no worker runs.*worker start\n\Z")
        self.ok("pause")
        self.assertIn("paused", "".join(self.main("status")[1:]))

    def test_tables(self):
        self.a_bit_of_everything()
        lines = self.ok("list").splitlines()
        self.assertEqual([line.split()[:3] for line in lines], [
            ["ID", "STATE", "TRIES"], ["done", "completed", "1/3"], ["dead", "dead", "1/1"],
            ["bad", "failed", "1/3"], ["run", "processing", "1/3"], ["later", "scheduled", "0/3"],
            ["blocked", "blocked", "0/3"]])
        self.assertIn("by dead (dead)", lines[-1])
        self.assertIn("failed", self.ok("dlq", "list").splitlines()[1])
        shown = self.ok("show", "dead")
        for text in ("dead", "1 of 1", "true", "failed", "w-1", self.dir):
            self.assertIn(text, shown)
        self.assertEqual(self.ok("logs", "done"), "out\n")

    def test_secrets_are_not_shown_to_people(self):
        """The names of a job's environment, not the values."""
        self.ok("enqueue", "--id", "a", "--env", "PASSWORD=hunter2", "true")
        for words in (["show", "a"], ["list"], ["status"], ["dlq", "list"], ["metrics"]):
            self.assertNotIn("hunter2", "".join(map(str, self.main(*words))))
        self.assertIn("PASSWORD", self.ok("show", "a"))
        self.assertIn("hunter2", self.ok("show", "--json", "a"))

    def test_text_of_jobs_is_safe_for_a_terminal(self):
        """No escape sequence, no control character, one line a job; logs are raw."""
        evil = "\x1b]0;owned\x07\x1b[31m\n\r\x08\x9b2J\u202e"
        with self.queue() as queue:
            queue.enqueue("echo '%s'" % evil, id="a", cwd="/" + evil, env={"N" + evil: evil},
                          max_retries=1)
            claim = self.claim(queue)
            self.settle(queue, claim, "failed", error="exit code 1: " + evil, output=evil.encode())
            queue.enqueue("echo '%s'" % evil, id="b", after=["a"])
        for words in (["list"], ["show", "a"], ["show", "b"], ["dlq", "list"], ["status"],
                      ["metrics"], ["config", "list"], ["worker", "list"]):
            code, out, err = self.main(*words)
            self.assertEqual(code, 0)
            self.assertRegex(out + err, r"\A[^\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]*\Z", words)
        self.assertEqual(len(self.ok("list").splitlines()), 3)
        self.assertNotRegex(self.ok("list", "--json"), "[\x1b\x07\x9b]")
        self.assertEqual(self.ok("logs", "a").encode(), evil.encode())
        for words in (["show", evil], ["enqueue", "--id", evil, "x"], ["config", "get", evil],
                      ["--db", "/" + evil + "/x", "list"], [evil], ["list", "--state", evil],
                      ["enqueue", "--file", evil]):
            self.assertNotRegex(self.refused(*words), "[\x1b\x07\x9b\x08\r\u202e]", words)

    def test_there_is_no_colour_in_a_pipe(self):
        self.a_bit_of_everything()
        for words in (["list"], ["status"], ["show", "dead"], ["dlq", "list"]):
            self.assertNotIn("\x1b", self.ok(*words))

    def test_odd_text_survives_an_ascii_terminal(self):
        """Whatever the encoding of stdout, nothing ends in a traceback."""
        self.ok("enqueue", "--id", "\u00fc", "echo \u20ac \U0001f600")
        for words in (["list"], ["show", "\u00fc"], ["list", "--json"], ["status"],
                      ["show", "\u20ac"]):
            code, out, err = self.cli(*words, env={
                "PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"})
            self.assertEqual(code, words == ["show", "\u20ac"], err)
            self.assertNotIn("Traceback", err)

    def test_metrics(self):
        self.a_bit_of_everything()
        lines = self.ok("metrics").splitlines()
        for line in lines:
            self.assertRegex(line, r'\A(# (HELP|TYPE) queuectl_\w+ .+'
                                   r'|queuectl_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [-+.e\d]+)\Z')
        self.assertIn('queuectl_jobs{queue="default",state="dead"} 1', lines)
        self.assertIn('queuectl_jobs{queue="q",state="processing"} 1', lines)
        self.assertIn('queuectl_runs_total{queue="default",outcome="failed"} 2', lines)
        types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        self.assertEqual(len(types), len(set(types)))

    def test_completion(self):
        """bash is asked itself; the words for the others are at least there."""
        self.ok("enqueue", "true")
        scripts = {shell: self.ok("completion", shell) for shell in ("bash", "zsh", "fish")}
        for script in scripts.values():
            for word in ("enqueue", "--max-retries", "retry", "scheduled", "backoff_base",
                         "--json"):
                self.assertIn(word, script)
        bash = shutil.which("bash")
        if bash is None:
            self.skipTest("no bash")
        with open(self.path("script"), "w") as file:
            file.write(scripts["bash"])
        for words, expected in [
            ("wor", ["worker"]), ("worker st", ["start", "stop"]),
            ("config set max", ["max_retries"]),
            ("list --state sch", ["scheduled"]), ("enqueue --max", ["--max-retries"]),
            ("dlq re", ["retry"]), ("--db x dlq pu", ["purge"]), ("completion f", ["fish"]),
        ]:
            typed = ["queuectl.py"] + words.split()
            out = subprocess.check_output([
                bash, "-c", 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _queuectl; '
                'echo "${COMPREPLY[@]}"', self.path("script")] + typed).decode().split()
            self.assertEqual(sorted(out), expected, words)

    # How it ends.

    def test_exit_codes(self):
        self.ok("enqueue", "--id", "a", "true")
        self.ok("enqueue", "--id", "b", "true")
        self.ok("enqueue", "--id", "c", "--after", "b", "true")
        self.assertEqual(self.main("wait", "a", "--timeout", "0")[0], 124)
        self.refused("wait", "--timeout", "0.001", code=124)
        with self.queue() as queue:
            self.end(queue, "a", "completed")
        self.assertEqual(self.main("wait", "a"), (0, "", ""))
        self.ok("cancel", "b")
        for ids in (["b"], ["a", "b"], ["c"], []):  # c can never run
            self.assertEqual(self.main("wait", *ids)[0], 1, ids)
        self.ok("dlq", "retry", "b")
        self.assertEqual(self.main("wait", "c", "--timeout", "0")[0], 124)
        self.ok("cancel", "b", "c")
        self.assertEqual(self.main("wait"), (0, "", ""))
        with mock.patch.object(Queue, "get", side_effect=KeyboardInterrupt):
            self.assertEqual(self.main("show", "a"), (130, "", ""))
        for words in (["--help"], ["enqueue", "--help"], ["worker", "--help"], ["--version"]):
            code, out, err = self.main(*words)
            self.assertEqual((code, err), (0, ""))
            self.assertTrue(out)

    def test_it_is_the_same_as_a_process(self):
        for words, expected in [(["--version"], 0), (["enqueue", "true"], 0), (["enqueue", ""], 1),
                                (["nope"], 2), (["wait", "--timeout", "0"], 124)]:
            code, out, err = self.cli(*words)
            self.assertEqual(code, expected, err)
            self.assertEqual(bool(out), expected == 0)
            self.assertRegex(err, r"\A(queuectl: [^\n]+\n)?\Z")

    def test_ctrl_c_stores_nothing(self):
        """130, and no traceback. It reads a FIFO: once that can be written, it is at it."""
        os.mkfifo(self.path("jobs"))
        process = self.start("enqueue", "--file", self.path("jobs"), stdout=subprocess.PIPE)

        def opened():
            with contextlib.suppress(OSError):  # ENXIO: nobody reads it yet
                return os.open(self.path("jobs"), os.O_WRONLY | os.O_NONBLOCK)

        jobs = self.until(opened)
        self.addCleanup(os.close, jobs)
        os.write(jobs, b'{"command": "true"}\n')
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(PATIENCE), 130)
        self.assertEqual((process.stdout.read(), read_file(process.log)), (b"", b""))
        self.assertEqual(self.stored()[0], [])

    def test_a_closed_pipe_ends_quietly(self):
        """`list | head -1`, where more is printed than a pipe holds."""
        with self.queue() as queue:
            list(queue.enqueue_many({"command": "x" * 200} for _ in range(2000)))
        for words in (["list"], ["list", "--json"], ["dlq", "list", "--json"]):
            process = self.start(*words, stdout=subprocess.PIPE)
            self.assertTrue(process.stdout.readline())
            process.stdout.close()
            self.assertEqual((process.wait(PATIENCE), read_file(process.log)), (0, b""), words)
            process.stdout = None
        done = subprocess.run("%s %s list | head -1" % (shlex.quote(sys.executable),
                                                       shlex.quote(SCRIPT)),
                              shell=True, env=self.env, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
        self.assertRegex(done.stdout, rb"\AID ")
        self.assertEqual(done.stderr, b"")

    def test_output_that_cannot_be_written(self):
        """A full disk behind stdout: one line and exit 1. No stdout at all: no matter."""
        self.ok("enqueue", "true")
        if os.path.exists("/dev/full"):
            for words in (["list"], ["enqueue", "true"], ["list", "--json"]):
                with open("/dev/full", "wb") as full:
                    process = self.start(*words, stdout=full)
                    self.assertEqual(process.wait(PATIENCE), 1, read_file(process.log))
                self.assertRegex(read_file(process.log), rb"\Aqueuectl: [^\n]+\n\Z", words)
                if words[0] == "enqueue":
                    self.assertIn(b"stored, but the ids cannot be printed", read_file(process.log))
            for words, code in ((["show", "nobody"], 1), (["nonsense"], 2)):
                with open("/dev/full", "wb") as full:
                    self.assertEqual(self.start(*words, stderr=full).wait(PATIENCE), code)
        done = subprocess.run("exec %s %s list >&-" % (shlex.quote(sys.executable),
                                                      shlex.quote(SCRIPT)),
                              shell=True, env=self.env, stderr=subprocess.PIPE)
        self.assertNotIn(b"Traceback", done.stderr)

    def test_bulk_commands(self):
        with self.queue() as queue:
            list(queue.enqueue_many({"command": "true", "id": "j%d" % number, "max_retries": 1}
                                    for number in range(5)))
            for number, outcome in enumerate(["failed", "failed", "completed"]):
                self.settle(queue, self.claim(queue), outcome)
        code, out, err = self.main("dlq", "retry", "--all")
        self.assertEqual((code, out), (0, ""))
        self.assertIn("2", err)
        self.assertEqual(self.main("dlq", "retry", "--all")[0], 0)
        self.ok("cancel", "j3", "j4")
        self.ok("dlq", "retry", "j3")
        for words, count in [(["dlq", "purge", "--older-than", "1h"], 0),
                             (["prune", "--older-than", "1d"], 0),
                             (["prune", "--state", "cancelled"], 1), (["prune"], 1),
                             (["dlq", "purge"], 0)]:
            code, out, err = self.main(*words)
            self.assertEqual((code, out), (0, ""))
            self.assertRegex(err, r"\Aqueuectl: .*\b%d\b.*\n\Z" % count)
        self.assertEqual([job["id"] for job in self.stored()[0]], ["j0", "j1", "j3"])


class Documents(Case):
    """README.md and --help speak of every command, option and setting."""

    COMMANDS = {
        "enqueue": "--file --id --queue --priority --max-retries --timeout --delay --run-at --cwd "
                   "--env --after --unique",
        "worker start": "--count --drain --detach --ensure --queue --via",
        "worker stop": "--now --timeout", "worker list": "--json", "status": "--json --watch",
        "list": "--state --queue --limit --json", "show": "--json", "logs": "-f --run",
        "wait": "--timeout", "cancel": "", "dlq list": "--json", "dlq retry": "--all",
        "dlq purge": "--older-than", "config list": "", "config get": "", "config set": "",
        "config unset": "", "pause": "", "resume": "", "prune": "--older-than --state",
        "metrics": "", "completion": "",
    }
    SETTINGS = ("max_retries", "backoff_base", "backoff_max", "job_timeout", "kill_grace",
                "output_limit", "keep_completed")

    def setUp(self):
        super().setUp()
        os.environ["COLUMNS"] = "200"

    def readme(self):
        return read_file(os.path.join(HERE, "README.md")).decode("utf-8")

    def test_every_command_has_help_with_an_example(self):
        for name, options in self.COMMANDS.items():
            with self.subTest(name):
                text = self.ok(*name.split(), "--help")
                self.assertRegex(text, r"(?s)example:\n.*queuectl\.py( .*)? %s\b" % name)
                for option in options.split() + ["--db", "--help"]:
                    # with an explanation
                    self.assertRegex(text, r"\n  (-\w, )?%s\b.*\s{2,}\S" % option)
        top = self.ok("--help")
        for name in self.COMMANDS:
            self.assertRegex(top, r"\n    %s\s+\S" % name.split()[0])
        self.assertFalse(os.path.exists(self.db))

    def test_the_examples_of_the_help_are_right(self):
        """They are read by the parser that they explain."""
        for name in self.COMMANDS:
            text = self.ok(*name.split(), "--help").partition("example:\n")[2]
            lines = [line for line in text.splitlines() if "queuectl.py" in line]
            self.assertTrue(lines, name)
            for line in lines:
                words = shlex.split(line.strip().replace("<(", "").rstrip(")"), comments=True)
                words = words[words.index("queuectl.py") + 1:]
                words = words[:words.index(">")] if ">" in words else words
                if "--" not in words:
                    words = [word.rstrip(")") for word in words]
                with self.subTest(line=line):
                    before = words[:words.index("--")] if "--" in words else words
                    self.assertEqual(self.main(*before, "--help")[0], 0)

    def test_the_readme_names_every_command_and_option(self):
        text = self.readme()
        for name in self.COMMANDS:
            with self.subTest(name):
                self.assertTrue(re.search(r"`%s\b" % name, text))
                shown = self.ok(*name.split(), "--help").partition("example:")[0]
                for short, long in re.findall(r"\n  (?:(-\w), )?(--[a-z-]+)", shown):
                    self.assertTrue(long == "--help" or any(
                        option and re.search(r"[ `\[]%s\b" % option, text)
                        for option in (short, long)), long)

    def test_the_readme_names_every_setting_and_its_default(self):
        text = self.readme()
        self.assertEqual(tuple(queuectl.SETTINGS), self.SETTINGS)
        for name in self.SETTINGS:
            with self.subTest(name):
                default = self.ok("config", "get", name).strip()
                lines = [line for line in text.splitlines() if name in line]
                self.assertTrue(lines)
                number = re.match(r"[\d.]+", default).group()
                self.assertTrue(any(re.search(r"\b%s\b|\b%s" % (number, default), line)
                                    for line in lines), "%s %s" % (default, lines))

    def test_the_readme_names_what_else_is_promised(self):
        text = self.readme()
        for word in queuectl.STATES + queuectl.VIEWS + (
                "QUEUECTL_DB", "QUEUECTL_JOB_ID", "QUEUECTL_ATTEMPT", "QUEUECTL_MAX_RETRIES",
                "QUEUECTL_QUEUE", "QUEUECTL_WORKER", "QUEUECTL_COMMAND", "XDG_STATE_HOME",
                "NO_COLOR", "124", "130", "from queuectl import"):
            self.assertTrue(word in text, word)

    def test_the_docstring_names_the_exit_codes_and_states(self):
        for word in queuectl.STATES + ("124", "130", "queuectl.py enqueue"):
            self.assertIn(word, queuectl.__doc__)


# -- platform, runner, workers --------------------------------------------------------------

linux = unittest.skipUnless(sys.platform == "linux", "looks into /proc")


def alive(pid):
    """Whether the process lives (a zombie does not)."""
    try:
        return read_file("/proc/%d/stat" % pid).rpartition(b")")[2].split()[0] not in b"ZX"
    except OSError:
        if os.path.isdir("/proc/self"):
            return False
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


def process_status(pid, key):
    """A number of /proc/PID/status: VmRSS and VmHWM in KiB, masks of signals as they are."""
    text = read_file("/proc/%d/status" % pid).decode()
    word = re.search(r"^%s:\s*(\w+)" % key, text, re.M).group(1)
    return int(word, 16 if key.startswith("Sig") else 10)


class Process(Case):
    """What tests of processes need besides."""

    def freeze(self, pid):
        """Stop a process with SIGSTOP, but not while it holds the writer lock."""
        def free():
            os.kill(pid, signal.SIGSTOP)
            try:
                with contextlib.closing(sqlite3.connect(self.db, timeout=0.5)) as look:
                    look.execute("BEGIN IMMEDIATE")
                return True
            except sqlite3.OperationalError:
                os.kill(pid, signal.SIGCONT)
                return False
        self.until(free)

    def use(self, *names):
        """Go on with another database."""
        self.db = self.env["QUEUECTL_DB"] = os.environ["QUEUECTL_DB"] = self.path(*names)

    def add(self, id, command, **fields):
        with Queue(self.db) as queue:
            return queue.enqueue(command, id=id, **fields)

    def sql(self, *statements):
        """Execute statements on a connection of another program; the rows of the last one."""
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as db:
            return [db.execute(statement).fetchall() for statement in statements][-1]

    def assert_sound(self, message=None):
        self.assertEqual(self.sql("PRAGMA integrity_check"), [("ok",)], message)

    def configure(self, **settings):
        with Queue(self.db) as queue:
            for key, value in settings.items():
                queue.set_setting(key, value)

    def infos(self, **options):
        with Queue(self.db) as queue:
            return queue.workers(**options)

    def log(self, process):
        return read_file(process.log).decode()

    def until_logged(self, process, text):
        self.until(lambda: text in self.log(process), "not logged: " + text)

    def ended(self, process, code=0):
        """The supervisor must end by itself, with this code."""
        self.assertEqual(process.wait(PATIENCE), code, self.log(process))

    def peer(self, code, *words, **options):
        """Another Python, which can import queuectl; hear() and tell() talk to it by lines."""
        process = subprocess.Popen(
            [sys.executable, "-c", code] + list(words), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=dict(self.env, PYTHONPATH=HERE), **options)

        def end():
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.addCleanup(end)
        return process

    def hear(self, peer):
        line = peer.stdout.readline()
        self.assertTrue(line, "the other process died")
        return line.decode().strip()

    def tell(self, peer):
        peer.stdin.write(b"go\n")
        peer.stdin.flush()

    def stranger(self):
        """A process, with a group of its own, that has nothing to do with any job."""
        process = subprocess.Popen(["sleep", "1000"], start_new_session=True)

        def end():
            process.kill()
            process.wait()
        self.addCleanup(end)
        return process

    def fork(self, function, *arguments):
        """Run a function in a fork of this process; ends with the fork's exit code."""
        pid = os.fork()
        if pid:
            return pid
        code = 99
        try:
            code = function(*arguments) or 0
        except BaseException:  # nothing may run on in the copy
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @staticmethod
    def in_background(meeting, before=""):
        """A shell of its own, with a number of its own, that comes to the meeting."""
        return "sh -c %s &" % shlex.quote(before + meeting.here)

    @staticmethod
    def started(pid):
        """When the process was started, in the words of the kernel."""
        return read_file("/proc/%d/stat" % pid).rpartition(b")")[2].split()[19]

    # A process of the job's group that keeps neither its lock nor its environment.
    BARE = "%s -c 'import os; os.closerange(3, 256); " \
           "os.execve(\"/bin/sleep\", [\"sleep\", \"1000\"], {})' & echo $! >bare" \
           % shlex.quote(sys.executable)

    def bare(self, folder):
        """The process id of that process, once it is what it wants to be."""
        path = os.path.join(folder, "bare")
        pid = int(self.until(lambda: os.path.exists(path) and read_file(path).strip()))
        self.until(lambda: read_file("/proc/%d/cmdline" % pid).startswith(b"sleep\0"))
        self.assertEqual(read_file("/proc/%d/environ" % pid), b"")
        self.addCleanup(lambda: alive(pid) and os.kill(pid, signal.SIGKILL))
        return pid


class Platform(Process):
    """Locks that tell who lives, bells, and the ends of process trees."""

    HOLDER = "import queuectl, sys; queuectl.hold(sys.argv[1]); print(1, flush=True); input()"

    def test_which_lines_need_a_shell(self):
        for line in ("true", "/bin/true", "./a b", "  tar\tczf  /a/b.tgz -C / etc", "dd if=a of=b",
                     "date +%F", "scp u@h:a,b x_1"):
            self.assertEqual(queuectl._plain_words(line), line.split(), line)
        for line in ("", " ", "a;", "a&", "a|b", "a>b", "$a", "`a`", "'a'", '"a"', "a\\b", "a\nb",
                     "~/a", "a ~", "a*", "a?", "[ a ]", "{ a }", "a {b,c}", "!a", "a #b", "(a)",
                     "\u00e9", "a=b", "a=b c", "cd /", "echo a", "exec a", ". a", ": a", "if a",
                     "test a", "time a"):
            self.assertEqual(queuectl._plain_words(line), [], line)
        lock = queuectl.RunLock(self.path("x"))
        self.addCleanup(lock.close)
        lock.renew()
        self.addCleanup(os.chdir, os.getcwd())
        with mock.patch.object(os, "posix_spawn", side_effect=AssertionError("a shell")):
            child = queuectl.Child("true", self.dir, dict(os.environ), lock)
            os.close(child.fd)
            self.assertEqual(child.reap(), (0, None))
            with self.assertRaisesRegex(AssertionError, "a shell"):
                queuectl.Child("true;", self.dir, dict(os.environ), lock)

    def test_a_lock_is_held_for_as_long_as_its_process_lives(self):
        path = self.path("a.lock")
        self.assertFalse(queuectl.is_held(path))
        self.assertTrue(queuectl.sweep(path))
        peer = self.peer(self.HOLDER, path)
        self.hear(peer)
        self.assertTrue(queuectl.is_held(path))
        self.assertFalse(queuectl.sweep(path))
        self.assertTrue(os.path.exists(path))
        peer.kill()
        peer.wait()
        self.assertFalse(queuectl.is_held(path))
        self.assertTrue(os.path.exists(path))
        self.assertTrue(queuectl.sweep(path))
        self.assertFalse(os.path.exists(path))

    def test_a_process_knows_its_own_lock(self):
        """Asking the kernel would drop it: closing any descriptor of a file does."""
        path = self.path("own.lock")
        fd = queuectl.hold(path)
        self.addCleanup(os.close, fd)
        self.assertTrue(queuectl.is_held(path))
        self.assertFalse(queuectl.sweep(path))
        code = "import queuectl, sys; print(queuectl.is_held(sys.argv[1]), flush=True)"
        self.assertEqual(self.hear(self.peer(code, path)), "True")

    def test_two_who_ask_do_not_see_each_other(self):
        path = self.path("a.lock")
        os.close(queuectl.create_file(path))
        peer = self.peer("""if 1:
            import queuectl, sys
            lockf = queuectl.fcntl.lockf
            def slowly(*arguments):
                lockf(*arguments)
                print("asking", flush=True)
                input()
            queuectl.fcntl.lockf = slowly
            print(queuectl.is_held(sys.argv[1]), flush=True)""", path)
        self.assertEqual(self.hear(peer), "asking")
        self.assertFalse(queuectl.is_held(path))
        self.tell(peer)
        self.assertEqual(self.hear(peer), "False")

    def test_a_fork_does_not_inherit_the_lock(self):
        path = self.path("a.lock")
        peer = self.peer("""if 1:
            import os, queuectl, sys
            queuectl.hold(sys.argv[1])
            child = os.fork()
            if child:
                print(child, flush=True)
            input()""", path)
        child = int(self.hear(peer))
        self.addCleanup(lambda: alive(child) and os.kill(child, signal.SIGKILL))
        self.assertTrue(queuectl.is_held(path))
        peer.kill()
        peer.wait()
        self.assertTrue(alive(child))
        self.assertFalse(queuectl.is_held(path))

    def test_a_lock_file_that_is_swept_while_it_is_taken_is_taken_anew(self):
        path, create, made = self.path("a.lock"), queuectl.create_file, []

        def swept(path, flags=0):
            made.append(create(path, flags))
            if len(made) == 1:
                os.unlink(path)
            return made[-1]
        with mock.patch.object(queuectl, "create_file", swept):
            fd = queuectl.hold(path)
        self.addCleanup(os.close, fd)
        self.assertEqual(len(made), 2)
        self.assertTrue(queuectl.same_file(fd, path))

    def test_who_rings_is_not_harmed_by_who_leaves(self):
        bell = queuectl.Bell(self.path("bell"))
        self.addCleanup(os.close, bell.fd)
        before = len(os.listdir("/dev/fd"))
        with mock.patch("os.write", side_effect=BrokenPipeError(errno.EPIPE, "gone")):
            self.assertFalse(queuectl.ring(self.path("bell")))
        self.assertEqual(len(os.listdir("/dev/fd")), before)

    def test_one_look_is_enough_where_nobody_is_patient(self):
        looks = []
        with mock.patch.object(queuectl, "_tree", lambda *words: looks.append(words)
                               or ([], None, "somebody")):
            self.assertEqual(queuectl.end_tree("x", 1, "a", patient=False), "somebody")
        self.assertEqual(len(looks), 1)

    def test_a_bell_wakes_and_never_blocks_who_rings(self):
        path = self.path("a.bell")
        queuectl.ring(path)  # nobody has ever listened here
        bell = queuectl.Bell(path)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        for _ in range(2):
            self.assertFalse(select.select([bell.fd], [], [], 0)[0])
            queuectl.ring(path)
            queuectl.ring(path)
            self.assertTrue(select.select([bell.fd], [], [], 0)[0])
            bell.clear()
        bell.clear()
        with self.assertRaises(BlockingIOError):
            while True:
                os.write(bell.fd, b"x" * 4096)
        queuectl.ring(path)  # full
        os.close(bell.fd)
        queuectl.ring(path)  # nobody listens any more

    def tree(self, command):
        """A job's processes after their worker has died: (child, path of their RunLock)."""
        lock = queuectl.RunLock(self.path("worker"))
        lock.renew()
        child = queuectl.Child(command, None, dict(os.environ, QUEUECTL_JOB_ID="job"), lock)
        lock.record(7, child.pid)
        os.close(lock.fd)
        reaped = []

        def reap():
            reaped[:] = reaped or [child.reap()]
            return reaped[0]

        def end():
            child.terminate(force=True)
            reap()
            os.close(child.fd)
        self.addCleanup(end)
        child.ended = reap
        return child, self.path(lock.name)

    def forge(self, path, **words):
        """Change what a RunLock's file says of its run."""
        names = ("run", "leader", "start", "boot", "namespace")
        record = dict(zip(names, read_file(path).decode().split()))
        self.assertEqual(set(record), set(names))
        record.update(words)
        with open(path, "wb") as file:
            file.write(" ".join(str(record[name]) for name in names).ljust(200).encode())

    def test_end_tree_ends_the_whole_group(self):
        meeting = self.meeting()
        child, path = self.tree(self.in_background(meeting) + meeting.here)
        meeting.arrived(), meeting.arrived()
        self.assertIsNone(queuectl.end_tree(path, 7, "job"))
        meeting.gone()
        self.assertEqual(child.ended(), (None, signal.SIGKILL))
        self.assertIsNone(queuectl.end_tree(path, 7, "job"))
        self.assertIsNone(queuectl.end_tree(self.path("no such file"), 7, "job"))

    @linux
    def test_end_tree_finds_by_the_lock_who_left_the_group(self):
        meeting = self.meeting()
        child, path = self.tree("setsid " + self.in_background(meeting))
        pid = meeting.arrived()
        self.assertEqual(child.ended(), (0, None))
        self.assertTrue(alive(pid))
        self.assertIsNone(queuectl.end_tree(path, 7, "job"))
        meeting.gone()

    @linux
    def test_end_tree_needs_no_record(self):
        """A worker can die between the spawn and the record: then the lock alone tells."""
        for text in (b"", b"6 1 2 3 4"):
            with self.subTest(text=text):
                meeting = self.meeting("meeting%d" % len(text))
                child, path = self.tree(meeting.here)
                meeting.arrived()
                with open(path, "wb") as file:
                    file.write(text)
                self.assertIsNone(queuectl.end_tree(path, 7, "job"))
                meeting.gone()

    @linux
    def test_end_tree_knows_the_group_by_the_environment_of_a_member(self):
        """Its leader is gone, and the lock has been closed."""
        meeting = self.meeting()
        close = "%s -c 'import os, sys; os.close(%d); os.execl(\"/bin/sh\", \"sh\", \"-c\", " \
            "sys.argv[1])' %s" % (shlex.quote(sys.executable), queuectl.LOCK_FD,
                                  shlex.quote(meeting.here))
        child, path = self.tree(close + " & exit 0")
        meeting.arrived()
        child.ended()
        self.assertIsNone(queuectl.end_tree(path, 7, "job"))
        meeting.gone()

    @linux
    def test_end_tree_kills_nobody_without_proof(self):
        child, path = self.tree("cd %s; %s; exit 0" % (shlex.quote(self.dir), self.BARE))
        pid = self.bare(self.dir)
        child.ended()
        doubt = queuectl.end_tree(path, 7, "job")
        self.assertIn("process %d of its group" % pid, doubt)
        self.assertTrue(alive(pid))
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: queuectl.end_tree(path, 7, "job") is None)

    @linux
    def test_end_tree_leaves_strangers_alone(self):
        """A number that was reused, after a boot, or in another container proves nothing."""
        for words in ({"start": "1"}, {"boot": "another"}, {"namespace": "pid:[1]"}):
            with self.subTest(words):
                child, path = self.tree("exit 0")
                child.ended()
                stranger = self.stranger()
                self.forge(path, leader=stranger.pid,
                           start=self.started(stranger.pid).decode())
                self.forge(path, **words)
                self.assertIsNone(queuectl.end_tree(path, 7, "job"))
                self.assertIsNone(stranger.poll())

    def test_a_background_child_keeps_its_lock_and_the_next_run_gets_another(self):
        meeting = self.meeting()
        lock = queuectl.RunLock(self.path("worker"))
        lock.renew()
        first = lock.name
        child = queuectl.Child(self.in_background(meeting), None, dict(os.environ), lock)
        self.addCleanup(os.close, child.fd)
        meeting.arrived()
        child.reap()
        lock.renew()
        second = lock.name
        self.assertNotEqual(first, second)
        lock.renew()
        self.assertEqual(lock.name, second)  # nobody holds it: no file per run
        meeting.let_go()
        meeting.gone()
        os.close(lock.fd)
        self.assertIsNone(queuectl.end_tree(self.path(first), 1, "job"))

    def test_signals_that_were_blocked_are_heard(self):
        peer = self.peer("""if 1:
            import queuectl, signal
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGCHLD])
            queuectl.clean_slate()
            print(signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN,
                  signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)""")
        self.assertEqual(self.hear(peer), "False set()")


class Runner(Process):
    """What is kept of an output, and what others can follow."""

    def test_output_keeps_the_first_quarter_and_the_rest_from_the_end(self):
        stream = bytes(range(256)) * 5
        for limit in (0, 1, 4, 7, 100, len(stream) - 1, len(stream), len(stream) + 1):
            for chunk in (1, 3, 64, 10000):
                with self.subTest(limit=limit, chunk=chunk):
                    output = queuectl.Output(limit)
                    for start in range(0, len(stream), chunk):
                        output.feed(stream[start:start + chunk])
                    first, missing = limit // 4, len(stream) - limit
                    if missing <= 0:
                        self.assertEqual(output.kept(), stream)
                        continue
                    line = b"\n[queuectl: %d bytes are not kept (output_limit)]\n" % missing
                    self.assertEqual(output.kept(), stream[:first] + line
                                     + stream[first + missing:])
                    self.assertEqual(output.total, len(stream))

    def test_output_is_bounded_in_memory(self):
        import tracemalloc
        output, chunk = queuectl.Output(65536), b"x" * 65536
        tracemalloc.start()
        try:
            for _ in range(500):
                output.feed(chunk)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        self.assertLess(peak, 1024 ** 2)

    def live(self, output=None):
        path = self.path("live")
        live = queuectl.LiveOutput.create(path, output or queuectl.Output(100))
        reader = queuectl.open_live_output(path)
        self.addCleanup(live.close)
        self.addCleanup(reader.close)
        return live, reader

    def test_live_output_is_followed_without_loss_round_the_ring(self):
        import random
        random, (live, reader) = random.Random(4), self.live()
        stream = os.urandom(3 * queuectl.LIVE_RING + 12345)
        at = 0
        while at < len(stream):
            size = random.choice((1, 1000, 65536))
            live.write(stream[at:at + size])
            self.assertTrue(reader.grown())
            data, missed = reader.read()
            self.assertEqual((missed, data), (0, stream[at:at + size]))
            self.assertEqual(reader.read(), (b"", 0))
            self.assertFalse(reader.grown())
            at += len(data)
        self.assertLessEqual(os.path.getsize(self.path("live")), queuectl.LIVE_RING + 100)

    def test_live_output_says_how_much_a_slow_reader_has_missed(self):
        live, reader = self.live()
        stream = os.urandom(5 * queuectl.LIVE_RING // 2)
        live.write(stream[:1000])
        self.assertEqual(reader.read(), (stream[:1000], 0))
        live.write(stream[1000:])
        data, missed = reader.read()
        self.assertEqual(1000 + missed + len(data), len(stream))
        self.assertEqual(data, stream[1000 + missed:])
        self.assertGreaterEqual(len(data), queuectl.LIVE_RING - queuectl.CHUNK)

    def test_live_output_starts_with_what_was_kept(self):
        output = queuectl.Output(100)
        output.feed(b"h" * 25 + b"-" * 1000 + b"t" * 75)
        live, reader = self.live(output)
        self.assertEqual(reader.read(), (b"t" * 75, 1025))
        live.write(b"more")
        self.assertEqual(reader.read(), (b"more", 0))

    def test_live_output_never_shows_what_is_being_overwritten(self):
        import random
        live, reader = self.live()
        stream = random.Random(6).getrandbits(8 * 8 * 1024 ** 2).to_bytes(8 * 1024 ** 2, "big")

        def write():
            for start in range(0, len(stream), 65536):
                live.write(stream[start:start + 65536])
        writer = threading.Thread(target=write)
        writer.start()
        try:
            at = 0
            while at < len(stream):
                data, missed = reader.read()
                at += missed
                self.assertTrue(stream.startswith(data, at), "torn at %d" % at)
                at += len(data)
        finally:
            writer.join()


class Workers(Process):
    """Jobs run as promised, and workers come, go and are seen."""

    def test_the_environment_of_a_job(self):
        self.add("a", "env", env={"OF_JOB": "b c", "OF_WORKER": "changed"}, queue="mail",
                 max_retries=7)
        code, _, err = self.cli("worker", "start", "--drain", env={
            "OF_WORKER": "x", "KEPT": "y", "QUEUECTL_ATTEMPT": "99"})
        self.assertEqual(code, 0, err)
        env = dict(line.split("=", 1) for line in self.output("a").decode().splitlines())
        self.assertEqual({key: value for key, value in env.items()
                          if key.startswith("QUEUECTL_")},
                         {"QUEUECTL_JOB_ID": "a", "QUEUECTL_ATTEMPT": "1", "QUEUECTL_QUEUE": "mail",
                          "QUEUECTL_MAX_RETRIES": "7", "QUEUECTL_WORKER": "1",
                          "QUEUECTL_DB": self.db})
        self.assertEqual([env[key] for key in ("OF_JOB", "OF_WORKER", "KEPT")],
                         ["b c", "changed", "y"])

    def worker(self):
        """A worker that is no process: for what can only be seen from within."""
        return queuectl.Worker(queuectl.StartOptions(
            path=self.db, count=1, drain=False, queues=[], via=None, quiet=True, log=None),
            "supervisor", 1, None)

    def test_an_order_that_cannot_be_read_is_read_again(self):
        worker = self.worker()
        worker._check_files = lambda: None
        worker._queue = mock.Mock()
        worker._queue.ordered.side_effect = [queuectl.DatabaseUnavailable("busy"), queuectl.DRAIN]
        worker._look_around()
        self.assertTrue(worker._rung)  # so that it does not sleep long
        worker._look_around()
        self.assertEqual((worker._level, worker._rung), (queuectl.DRAIN, False))

    def test_orders_and_syncs_do_not_wait_for_jobs_that_cannot_be_spawned(self):
        queue, worker, lock = self.queue(), self.worker(), queuectl.RunLock(self.path("lock"))
        queue.enqueue("true", cwd=self.path("nowhere"))
        lock.renew()
        self.addCleanup(lock.discard)
        slept = []
        worker._sleep = lambda until: slept.append(until) or []
        result = worker._attend(queuectl.Execution(
            queue.turn(None, "w", "w.0")[1], "true", {}, lock, self.path("live"), 1.0))
        self.assertEqual(result.outcome, "failed")
        self.assertEqual(len(slept), 1)
        self.assertLess(slept[0], time.monotonic())

    def test_the_lock_of_an_unsettled_run_stays_while_the_database_is_full(self):
        """What a job left in the background still holds it, and a rescuer must see that."""
        worker = self.worker()
        worker._lock, worker._queue, worker._log = mock.Mock(), mock.Mock(), mock.Mock()
        worker._look_around = worker._sleep = lambda *until: None
        worker._queue.turn.side_effect = [queuectl.DatabaseUnavailable("full")] * 3 + [(None, None)]
        self.assertIsNone(worker._turn(None))
        self.assertEqual(worker._queue.turn.call_count, 4)
        self.assertEqual(worker._lock.renew.call_count, 1)

    def test_a_job_is_put_back_where_its_worker_lacks_something(self):
        queue, worker, lock = self.queue(), self.worker(), queuectl.RunLock(self.path("lock"))
        lock.renew()
        self.addCleanup(lock.discard)
        worker._lock, worker._queue, worker._waiter = lock, queue, mock.Mock()
        worker._env = {}
        worker._sleep = lambda until: []
        for number, outcome in ((errno.EMFILE, "interrupted"), (errno.EAGAIN, "interrupted"),
                                (errno.EACCES, "failed")):
            id = queue.enqueue("true")
            with mock.patch.object(queuectl, "Child", side_effect=OSError(number, "none left")):
                _, result = worker._run(queue.turn(None, "w", "lock.0")[1])
            self.assertEqual((result.outcome, result.error.count("none left")), (outcome, 1))
            queue.cancel([id])
            queue.turn(result, None)

    def test_a_supervisor_outlives_a_shortage(self):
        supervisor = queuectl.Supervisor(self.worker()._options)
        supervisor._log = mock.Mock()
        seat = supervisor._seats[1]
        seat.replace_at = 0.0
        with mock.patch.object(queuectl.Fork, "Pipe", side_effect=OSError(errno.EMFILE, "no")):
            supervisor._replace()
        self.assertGreater(seat.replace_at, time.monotonic())
        with mock.patch("os.fork", side_effect=OSError(errno.EAGAIN, "no")):
            seat.replace_at = 0.0
            before = len(os.listdir("/dev/fd"))
            supervisor._replace()
            self.assertEqual(len(os.listdir("/dev/fd")), before)
        self.assertGreater(seat.replace_at, time.monotonic())
        self.assertIsNone(seat.process)
        with mock.patch.object(queuectl, "create_file", side_effect=OSError(errno.EMFILE, "no")):
            with self.assertRaises(queuectl.DatabaseUnavailable):
                self.queue()

    def test_nobody_who_reads_the_log_holds_a_worker(self):
        log = queuectl.Log(self.worker()._options, "me")
        reader, log._fd = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, log._fd)
        os.set_blocking(log._fd, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(log._fd, b"x" * 4096)
        os.set_blocking(log._fd, True)
        with mock.patch.object(queuectl, "LOG_PATIENCE", 0.01):
            for number in range(3):
                log.warn("line %d" % number)
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            while os.read(reader, 65536):
                pass
        log.warn("line 3")
        self.assertRegex(os.read(reader, 65536).decode(),
                         r"\A\(3 lines were dropped\)\n[0-9:]+ me: line 3\n\Z")

    def test_a_running_job_does_not_wait_for_what_its_worker_does_for_others(self):
        """Neither for a busy database nor for the end of a dead worker's tree."""
        worker, queue = self.worker(), self.queue()
        worker._queue, seen = queue, []
        queue.store_counts = lambda: seen.append(queue._patience)
        with mock.patch.object(queuectl, "rescue", lambda queue, note, patient: seen.append(
                patient) or 0):
            worker._look_after_others()
            worker._look_after_others()  # not again so soon
        self.assertEqual(seen, [False, queuectl.IMPATIENCE])
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other, \
                mock.patch.object(queuectl, "IMPATIENCE", 0.0), \
                mock.patch("time.sleep", side_effect=AssertionError("it sleeps")):
            other.execute("BEGIN IMMEDIATE")
            with self.assertRaises(queuectl.DatabaseUnavailable), queue.impatient():
                queue.pause()
        self.assertEqual(queue._patience, queuectl.BUSY_BUDGET)

    def test_a_shortage_while_looking_for_dead_workers_harms_nobody(self):
        worker = self.worker()
        worker._queue, worker._log = self.queue(), mock.Mock()
        for number, expected in ((errno.EMFILE, False), (errno.EIO, None)):
            worker._next_rescue = 0.0
            with mock.patch.object(queuectl, "rescue", side_effect=OSError(number, "no")):
                if expected is None:
                    self.assertRaises(OSError, worker._rescue)
                else:
                    self.assertEqual(worker._rescue(), expected)

    def test_a_pause_is_as_long_as_it_should_be(self):
        """Whatever wakes, but for another order."""
        worker, clock = self.worker(), mock.Mock(now=100.0)
        clock.monotonic = lambda: clock.now

        def sleep(until):
            clock.now += 0.3 * queuectl.TICK
            worker._level = orders.pop(0) if orders else worker._level
        worker._sleep = sleep
        with mock.patch.object(queuectl, "time", clock):
            for orders, sleeps in (([], 4), ([queuectl.RUN, queuectl.DRAIN, queuectl.NOW], 2)):
                clock.now = 100.0
                worker._pause()
                self.assertAlmostEqual(clock.now, 100.0 + 0.3 * queuectl.TICK * sleeps)

    def test_who_could_not_lock_tries_again(self):
        """Also where nothing else happens to the database."""
        worker, queue = self.worker(), self.queue()
        worker._queue, worker._able = queue, False
        worker._rescue = lambda: False
        worker._check_files = worker._keep_house = lambda: None
        worker._sleep = lambda until: None
        queue.changed()
        with mock.patch.object(queuectl, "TICK", 0.0):
            worker._idle()  # returns

    def test_what_has_run_is_counted_while_a_long_job_runs(self):
        meeting = self.meeting()
        self.add("a", "true")
        self.add("b", meeting.here)
        self.workers()
        meeting.arrived()
        with Queue(self.db) as queue:
            self.until(lambda: [row[1:3] for row in queue.stats()] == [("completed", 1)])

    def test_a_job_reaches_its_own_queue(self):
        self.add("a", "%s %s enqueue --id b true" % (shlex.quote(sys.executable),
                                                    shlex.quote(SCRIPT)))
        self.drain("--db", self.db)
        self.assertEqual(self.job("b").state, "completed")

    @linux
    def test_the_surroundings_of_a_job(self):
        """Whatever the worker inherited: ignored and blocked signals, an umask."""
        def hostile():
            for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT):
                signal.signal(signum, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
            os.umask(0o027)
        self.add("a", "for fd in 0 1 2; do readlink /proc/$$/fd/$fd; done; ls /proc/$$/fd; "
                 "touch made; umask; grep -E '^Sig(Blk|Ign)' /proc/self/status; exit 3",
                 max_retries=1, cwd=self.dir)
        process = self.workers(1, preexec_fn=hostile)
        self.until_state("a", "dead")
        self.assertEqual(self.job("a").exit_code, 3)  # with SIGCHLD ignored it would be 0
        words = self.output("a").decode().split()
        self.assertEqual(words[0], "/dev/null")
        self.assertEqual(words[1], words[2])
        self.assertTrue(words[1].startswith("pipe:"), words[1])
        self.assertEqual(words[3:7], ["0", "1", "100", "2"])
        self.assertEqual(words[7], "0027")
        masks = dict(zip(words[8::2], words[9::2]))
        self.assertEqual(int(masks["SigBlk:"], 16), 0)
        # The C library itself ignores 32 and 33 in what it spawns.
        self.assertEqual(int(masks["SigIgn:"], 16) & ~(3 << 31), 0)
        self.assertEqual(stat.S_IMODE(os.stat(self.path("made")).st_mode), 0o640)
        process.send_signal(signal.SIGTERM)
        self.ended(process)

    def test_the_folder_of_a_job(self):
        os.mkdir(self.path("folder"))
        self.add("a", "pwd", cwd=self.path("folder"))
        self.add("b", "pwd")
        self.drain()
        self.assertEqual(self.output("a").decode().strip(), self.path("folder"))
        self.assertEqual(self.output("b").decode().strip(), os.getcwd())

    def test_a_line_that_needs_no_shell_ends_as_with_one(self):
        for name, text in (("noshebang", "echo shell $0 $@"), ("a-script", "#!/bin/sh\necho $0 $@"),
                           ("secret", "#!/bin/sh")):
            with open(self.path(name), "w") as file:
                file.write(text + "\n")
            os.chmod(self.path(name), 0o644 if name == "secret" else 0o755)
        os.mkdir(self.path("bin"))
        os.rename(self.path("a-script"), self.path("bin", "a-script"))
        os.mkdir(self.path("there"))
        os.symlink("there", self.path("link"))
        there = {"PATH": "%s:/usr/bin:/bin" % self.path("bin")}
        lines = [(line, {}) for line in (
            "true", "false", "printenv PWD", "pwd", "echo -e x", "  expr\t7  +  4 ", ":", "while",
            "dd if=/dev/null of=/dev/null status=none", "no-such-command 1", "./no/such",
            "../noshebang 1 2", "../bin/a-script a=b", "../secret", "../there", "a-script x",
            "A=b printenv A", "test -d ../there", "kill -l 9", "exit 3",
            ". ../noshebang", "exec printenv HOME", "if true")]
        jobs = [(self.add(None, line, cwd=self.path(cwd), env=env, max_retries=1), line, env, cwd)
                for line, env in lines + [("a-script x", there)] for cwd in ("there", "link")]
        self.drain()
        for id, line, env, cwd in jobs:
            with self.subTest(line=line, env=env, cwd=cwd):
                shell = subprocess.run(
                    ["/bin/sh", "-c", line], cwd=self.path(cwd),
                    env=dict(self.env, PWD=self.path(cwd), **env), stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                self.assertEqual((self.job(id).exit_code, self.output(id)),
                                 (shell.returncode, shell.stdout))

    def test_a_job_is_retried_and_then_dead(self):
        self.configure(backoff_base=0)
        self.add("a", "echo $QUEUECTL_ATTEMPT of $QUEUECTL_MAX_RETRIES; exit $QUEUECTL_ATTEMPT")
        self.add("b", "exit 9", max_retries=1)
        log = self.drain()
        job, runs = self.job("a"), self.runs("a")
        self.assertEqual((job.state, job.attempts, job.exit_code), ("dead", 3, 3))
        self.assertEqual([(run.outcome, run.exit_code) for run in runs],
                         [("failed", 1), ("failed", 2), ("failed", 3)])
        self.assertEqual([self.output("a", n) for n in (1, 2, 3)],
                         [b"%d of 3\n" % n for n in (1, 2, 3)])
        self.assertIn("exit code 3: 3 of 3", job.last_error)
        self.assertEqual(len(self.runs("b")), 1)
        self.assertRegex(log, r"job a failed after [^ ]+, again at once: exit code 1")
        self.assertRegex(log, r"job a started \(attempt 2 of 3\)")
        self.assertRegex(log, r"job a dead after [^ ]+: exit code 3")
        self.ok("dlq", "retry", "a")
        self.drain()
        self.assertEqual((self.job("a").attempts, len(self.runs("a"))), (3, 6))

    def test_a_retry_waits_for_its_backoff(self):
        self.configure(backoff_base=100)
        self.add("a", "exit 1")
        process = self.workers()
        job = self.until_state("a", "failed")
        finished = queuectl.from_iso(self.runs("a")[0].finished_at)
        self.assertAlmostEqual(job.run_after - finished, 100, delta=5)
        self.until_logged(process, "again in 1m")
        self.configure(backoff_base=0.3)
        self.add("b", "exit 1")
        self.until_state("b", "dead")
        first, second, third = (queuectl.from_iso(run.started_at) for run in self.runs("b"))
        self.assertGreaterEqual(second - first, 0.3 - 0.002)
        self.assertGreaterEqual(third - second, 0.3 ** 2 - 0.002)
        self.assertEqual(self.job("a").attempts, 1)

    def test_a_timeout_ends_the_whole_group(self):
        meeting = self.meeting()
        self.add("a", self.in_background(meeting) + self.in_background(meeting, "trap '' TERM; ")
                 + meeting.here, timeout=0.5, max_retries=1)
        self.configure(kill_grace=0.2)
        self.drain()
        meeting.gone()
        job, run = self.job("a"), self.runs("a")[0]
        self.assertEqual((job.state, run.outcome), ("dead", "timeout"))
        self.assertIn("--timeout", job.last_error)
        self.configure(job_timeout=0.2)  # applies to jobs that are there already
        self.add("b", "sleep 1000", max_retries=1)
        self.drain()
        self.assertEqual(self.runs("b")[0].outcome, "timeout")

    def test_a_failed_job_leaves_nobody_behind_and_a_successful_one_may(self):
        failed, succeeded = self.meeting("failed"), self.meeting("succeeded")
        self.add("a", self.in_background(failed) + failed.here + "; exit 1", max_retries=1)
        self.add("b", self.in_background(succeeded))
        self.workers(2)
        pids = {failed.arrived(), failed.arrived()}
        pid = succeeded.arrived()
        self.until_state("b", "completed")
        self.assertEqual(self.job("a").state, "processing")
        # Only one may go: the job's own shell, whose end is the job's.
        self.until(lambda: failed.let_go() or self.job("a").state == "dead"
                   or not any(map(alive, pids)))
        self.until_state("a", "dead")
        failed.gone()
        self.assertTrue(alive(pid))
        succeeded.let_go()
        succeeded.gone()

    def test_priorities_and_the_order_of_arrival(self):
        for number, priority in enumerate((0, 5, -1, 5, 0, 7)):
            self.add("j%d" % number, "echo $QUEUECTL_JOB_ID >>ran", priority=priority, cwd=self.dir)
        self.drain()
        self.assertEqual(read_file(self.path("ran")).decode().split(),
                         ["j5", "j1", "j3", "j0", "j4", "j2"])

    def test_workers_serve_the_queues_that_they_are_told(self):
        for name in ("one", "two", "three"):
            self.add(name, "true", queue=name)
        self.drain("--queue", "one", "--queue", "two")
        self.assertEqual([self.job(name).state for name in ("one", "two", "three")],
                         ["completed", "completed", "pending"])
        self.workers(1, "--queue", "three")
        self.until_state("three", "completed")
        self.assertEqual(self.infos()[0].queues, ["three"])

    def test_drain_does_not_wait_for_paused_later_and_blocked_jobs(self):
        self.ok("pause", "paused")
        self.add("paused", "true", queue="paused")
        self.add("later", "true", delay="1h")
        self.add("blocked", "true", after=["later"])
        self.add("other", "true", queue="other")
        self.add("ready", "true")
        self.drain("--queue", "default", "--queue", "paused")
        self.assertEqual([self.job(id).view for id in
                          ("paused", "later", "blocked", "other", "ready")],
                         ["pending", "scheduled", "blocked", "pending", "completed"])
        self.ok("pause")
        self.add("all", "true")
        self.drain()
        self.assertEqual(self.job("all").state, "pending")

    def test_drain_waits_for_retries_and_for_what_its_own_jobs_bring(self):
        self.configure(backoff_base=0.2)
        again = "[ -e %s ] || { touch %s; exit 1; }"
        self.add("retry", again % ((shlex.quote(self.path("tried")),) * 2))
        meeting = self.meeting()
        self.add("first", meeting.here)
        self.add("next", "true", after=["first"])
        process = self.start("worker", "start", "--drain", "--count", 2)
        meeting.arrived()
        self.until_state("retry", "completed")
        self.assertIsNone(process.poll())
        meeting.let_go()
        self.ended(process)
        self.assertEqual(self.job("next").state, "completed")

    def test_drain_does_not_wait_for_jobs_of_other_supervisors(self):
        meeting = self.meeting()
        self.add("a", meeting.here)
        self.workers()
        meeting.arrived()
        self.drain()
        self.assertEqual(self.job("a").state, "processing")
        meeting.let_go()
        self.until_state("a", "completed")

    def test_workers_started_from_two_terminals_share_the_queue(self):
        meeting = self.meeting()
        for id in ("a", "b", "c"):
            self.add(id, meeting.here)
        first, second = self.workers(1), self.workers(2)
        pids = {meeting.arrived() for _ in range(3)}
        self.assertEqual(len(pids), 3)
        infos = self.infos()
        self.assertEqual(sorted(info.job for info in infos), ["a", "b", "c"])
        self.assertEqual(sorted(info.slot for info in infos), [1, 1, 2])
        self.assertEqual(len({info.supervisor for info in infos}), 2)
        for _ in pids:
            meeting.let_go()
        code, _, err = self.cli("worker", "stop")
        self.assertEqual((code, "3 workers stopped" in err), (0, True), err)
        self.ended(first)
        self.ended(second)
        self.assertEqual(self.infos(supervisors=True), [])

    def test_worker_list_shows_the_living(self):
        self.assertEqual(self.ok("worker", "list", "--json"), "[]\n")
        meeting = self.meeting()
        self.add("a", meeting.here)
        process = self.workers(2)
        meeting.arrived()
        code, out, err = self.cli("worker", "list", "--json")
        self.assertEqual((code, err), (0, ""))
        rows = json.loads(out)
        self.assertEqual(sorted(row["slot"] for row in rows), [1, 2])
        self.assertEqual(sorted(row["job"] or "" for row in rows), ["", "a"])
        for row in rows:
            self.assertLessEqual({"name", "supervisor", "slot", "pid", "queues", "started_at",
                                  "job", "job_started_at"}, set(row))
            self.assertTrue(alive(row["pid"]))
            self.assertIsNone(row["queues"])
        self.assertRegex(self.ok("worker", "list"), r"(?m)^%s .* a$" % self.job("a").locked_by)
        meeting.let_go()
        self.ok("worker", "stop")
        self.ended(process)
        self.assertEqual(self.ok("worker", "list", "--json"), "[]\n")

    def test_worker_stop_from_another_process(self):
        meeting = self.meeting()
        self.add("a", meeting.here)
        process = self.workers(2)
        meeting.arrived()
        self.add("b", "true")
        self.until_state("b", "completed")  # by the other one
        code, out, err = self.cli("worker", "stop", "--timeout", "0.2")
        self.assertEqual((code, out), (124, ""), err)
        self.add("c", "true")
        stop = self.start("worker", "stop")
        meeting.let_go()
        self.ended(stop)
        self.assertEqual(self.infos(supervisors=True), [])
        self.ended(process)
        self.assertEqual([self.job(id).state for id in "abc"],
                         ["completed", "completed", "pending"])
        self.assertEqual(self.cli("worker", "stop")[0], 0)  # none there: nothing to do

    def test_worker_stop_says_for_whom_it_waits(self):
        meeting, notes = self.meeting(), []
        self.add("a", meeting.here)
        process = self.workers(1)
        meeting.arrived()
        pid = self.infos()[0].pid
        with Queue(self.db) as queue, mock.patch.object(queuectl, "PATIENCE", 0.0):
            with self.assertRaises(queuectl.TimeoutExpired):
                queuectl.stop_workers(queue, queuectl.DRAIN, 0.1, None, notes.append)
        self.assertEqual(notes, ["waiting for pid %d, which runs a, their supervisor, pid %d"
                                 % (pid, process.pid)])

    def test_a_killed_worker_is_replaced(self):
        process = self.workers(2)
        victim = self.infos()[0]
        os.kill(victim.pid, signal.SIGKILL)
        self.until(lambda: {(info.slot, info.name == victim.name) for info in self.infos()}
                   == {(1, False), (2, False)})
        self.until_logged(process, "worker %d died (killed by SIGKILL)" % victim.slot)
        self.add("a", "true")
        self.until_state("a", "completed")

    def test_replacing_pauses_more_and_more_and_hears_a_stop_meanwhile(self):
        self.add("a", "kill -9 $PPID; sleep 1000", max_retries=1000)
        process = self.workers()
        runs = self.until(lambda: len(self.runs("a")) >= 5 and self.runs("a"))
        times = [queuectl.from_iso(run.started_at) for run in runs]
        for number, (before, after) in enumerate(zip(times, times[1:]), 1):
            if number > 1:  # the first death is replaced at once
                self.assertGreater(after - before, 0.05 * 2 ** number - 0.01)
        self.until(lambda: not self.infos())
        process.send_signal(signal.SIGTERM)
        self.ended(process)
        self.assertEqual(self.job("a").state, "pending")
        runs = len(self.runs("a"))
        process = self.workers()
        self.until(lambda: len(self.runs("a")) >= runs + 3 and not self.infos())
        self.assertEqual(self.cli("worker", "stop")[0], 0)
        self.ended(process)
        self.assertEqual(self.job("a").state, "pending")

    def test_quiet_workers_and_log_lines(self):
        self.configure(backoff_base=0)
        for id in ("a", "b"):
            self.add(id, "printf 'es\\033cape'; exit 4" if id == "a" else "true", max_retries=2)
        log = self.drain()
        for line in (r"queuectl: 1 worker on .*q\.db",
                     r"worker 1: job a started \(attempt 1 of 2\)",
                     r"worker 1: job a .*: exit code 4: es.cape", r"worker 1: job b completed in "):
            self.assertRegex(log, r"(?m)^\d\d:\d\d:\d\d " + line)
        self.assertNotIn("\x1b", log)
        self.add("c", "true")
        self.assertEqual(self.drain("--quiet"), "")

    def test_a_log_file_is_bounded(self):
        options = queuectl.StartOptions(log=self.path("log"), quiet=False)
        with mock.patch.object(queuectl, "LOG_LIMIT", 1000):
            log = queuectl.Log(options, "me")
            for number in range(100):
                log.event("line %d" % number)
        os.close(log._fd)
        self.assertLess(os.path.getsize(self.path("log")), 1100)
        self.assertLess(os.path.getsize(self.path("log.1")), 1100)
        self.assertIn("line 99", read_file(self.path("log")).decode())

    def test_via_runs_every_job_through_a_command(self):
        self.add("a", "echo it\"s\" $0")
        self.drain("--via", "echo via; sh -c \"$QUEUECTL_COMMAND\" zero")
        self.assertEqual(self.output("a"), b"via\nits zero\n")

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc here")
    def test_a_job_inherits_no_descriptor_of_the_worker(self):
        """Not what the worker has inherited itself."""
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, write)
        self.add("a", "ls -l /proc/self/fd")
        self.ended(self.start("worker", "start", "--drain", pass_fds=(read, write)))
        pipe = b"pipe:[%d]" % os.fstat(write).st_ino
        self.assertIn(b"-> pipe:[", self.output("a"))  # its own, to its worker
        self.assertNotIn(pipe, self.output("a"))


class Stopping(Process):
    """Orders to stop, as signals and as commands."""

    def busy(self, count=1, command=""):
        """(meeting, process): workers of which one runs job `a`, and waits in its command."""
        meeting = self.meeting()
        self.add("a", command + meeting.here)
        process = self.workers(count)
        self.pid = meeting.arrived()
        return meeting, process

    def put_back(self, meeting, process):
        """Job `a` must have been ended and put back, its attempt uncounted."""
        self.ended(process)
        meeting.gone()
        job, runs = self.job("a"), self.runs("a")
        self.assertEqual((job.view, job.attempts, job.last_error), ("pending", 0, None))
        self.assertEqual([run.outcome for run in runs], ["interrupted"])
        self.assertEqual(self.infos(supervisors=True), [])

    def much_later(self, process):
        """Wait until a second signal counts as one."""
        self.until_logged(process, "finishing the current jobs")
        start = time.monotonic()
        self.until(lambda: time.monotonic() > start + queuectl.SECOND_SIGNAL)

    def test_nohup_is_respected(self):
        """A hang-up that was ignored when the workers started does not end them."""
        self.add("a", "true")
        process = self.workers(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        os.kill(process.pid, signal.SIGHUP)
        os.kill(process.pid, signal.SIGHUP)
        self.until_state("a", "completed")
        self.add("b", "true")
        self.until_state("b", "completed")
        os.kill(process.pid, signal.SIGTERM)
        self.ended(process)

    def test_the_first_signal_finishes_the_jobs(self):
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(signum=signum):
                self.use("%d.db" % signum)
                meeting = self.meeting(str(int(signum)))
                self.add("a", meeting.here)
                process = self.workers()
                meeting.arrived()
                self.add("b", "true")
                process.send_signal(signum)
                self.until_logged(process, "finishing the current jobs")
                self.assertEqual(self.job("a").state, "processing")
                meeting.let_go()
                self.ended(process)
                self.assertEqual([self.job(id).state for id in "ab"], ["completed", "pending"])
                self.assertEqual(self.infos(supervisors=True), [])

    def test_a_later_second_signal_ends_the_jobs_and_puts_them_back(self):
        for number, signum in enumerate((signal.SIGINT, signal.SIGTERM)):
            with self.subTest(signum=signum):
                self.use("%d.db" % number)
                meeting = self.meeting(str(number))
                self.add("a", self.in_background(meeting) + meeting.here)
                process = self.workers()
                meeting.arrived(), meeting.arrived()
                process.send_signal(signal.SIGHUP if number else signal.SIGINT)
                self.much_later(process)
                process.send_signal(signum)
                self.put_back(meeting, process)

    def test_one_act_that_arrives_twice_is_one_order(self):
        meeting, process = self.busy()
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        self.much_later(process)
        process.send_signal(signal.SIGHUP)  # however late: terminals close twice
        self.assertTrue(alive(self.pid))
        self.assertEqual([info.job for info in self.infos()], ["a"])
        meeting.let_go()
        self.ended(process)
        self.assertEqual(self.job("a").state, "completed")
        self.assertNotIn("putting them back", self.log(process))

    def test_stop_now(self):
        meeting, process = self.busy(2)
        code, _, err = self.cli("worker", "stop", "--now")
        self.assertEqual(code, 0, err)
        self.put_back(meeting, process)

    def test_a_stop_can_become_urgent(self):
        meeting, process = self.busy()
        self.assertEqual(self.cli("worker", "stop", "--timeout", "0")[0], 124)
        self.until_logged(process, "finishing the current jobs")
        self.assertEqual(self.cli("worker", "stop", "--now")[0], 0)
        self.put_back(meeting, process)

    def test_a_job_that_ignores_the_order_is_killed(self):
        self.configure(kill_grace=0.2)
        meeting, process = self.busy(command="trap '' TERM; ")
        self.assertEqual(self.cli("worker", "stop", "--now")[0], 0)
        self.assertEqual(self.runs("a")[0].signal, signal.SIGKILL)
        self.put_back(meeting, process)

    def test_a_job_may_use_its_grace(self):
        """TERM first: a job that cleans up and exits does so undisturbed."""
        meeting, process = self.busy(command="trap 'echo clean; exit 0' TERM; ")
        self.assertEqual(self.cli("worker", "stop", "--now")[0], 0)
        self.assertEqual(self.output("a"), b"clean\n")
        self.put_back(meeting, process)

    def test_a_signal_to_a_worker_drains_it_alone(self):
        meeting, process = self.busy(2)
        busy, = [info for info in self.infos() if info.job]
        os.kill(busy.pid, signal.SIGTERM)
        os.kill(busy.pid, signal.SIGTERM)
        os.kill(busy.pid, signal.SIGINT)
        self.assertTrue(alive(self.pid))
        meeting.let_go()
        self.until_state("a", "completed")
        left = self.until(lambda: len(self.infos()) == 1 and self.infos())
        self.assertNotEqual(left[0].pid, busy.pid)
        self.add("b", "true")
        self.until_state("b", "completed")
        self.assertIsNone(process.poll())

    def test_workers_outlive_their_supervisor_for_one_job(self):
        meeting, process = self.busy(2)
        busy, = [info for info in self.infos() if info.job]
        process.kill()
        process.wait()
        self.until(lambda: len(self.infos()) == 1)  # the idle one leaves
        self.add("b", "true")
        self.assertTrue(alive(self.pid))
        meeting.let_go()
        self.until(lambda: not self.infos(supervisors=True))
        self.until(lambda: not alive(busy.pid))
        self.assertEqual([self.job(id).state for id in "ab"], ["completed", "pending"])

    def test_ctrl_c_does_not_reach_the_job(self):
        """The terminal sends it to the whole foreground group."""
        meeting, process = self.busy(2)
        os.killpg(process.pid, signal.SIGINT)
        self.until_logged(process, "finishing the current jobs")
        self.assertTrue(alive(self.pid))
        meeting.let_go()
        self.ended(process)
        self.assertEqual(self.job("a").state, "completed")


class Hostile(Process):
    """Jobs that try to hang, crash or fool their worker."""

    def one(self, command, outcome, **fields):
        """Run one job once; it must end like this, and another one must run after it."""
        self.add("a", command, **dict(dict(max_retries=1), **fields))
        self.add("z", "true")
        log = self.drain()
        self.assertEqual(self.job("z").state, "completed", log)
        run = self.runs("a")[0]
        self.assertEqual(run.outcome, outcome, log)
        return run

    def test_a_background_child_that_keeps_the_pipe_open(self):
        meeting = self.meeting()
        self.add("a", "(%s; head -c 1000000 /dev/zero; echo $$ >%s) & echo done" % (
            meeting.here, shlex.quote(meeting.paths["up"])))
        self.workers()
        meeting.arrived()
        self.until_state("a", "completed")
        self.assertEqual(self.output("a"), b"done\n")
        self.add("b", "true")
        self.until_state("b", "completed")
        meeting.let_go()
        meeting.arrived()  # what it writes is drained, or it would hang
        meeting.gone()

    def test_a_job_that_ignores_every_signal_that_can_be_ignored(self):
        self.configure(kill_grace=0.2)
        meeting = self.meeting()
        run = self.one("trap '' TERM INT HUP; " + self.in_background(meeting) + meeting.here,
                       "timeout", timeout=0.3)
        self.assertEqual(run.signal, signal.SIGKILL)
        meeting.gone()

    @linux
    def test_a_job_that_prints_without_end(self):
        meeting = self.meeting()
        self.add("a", "head -c 200000000 /dev/zero; %s" % meeting.here)
        self.workers()
        meeting.arrived()
        worker, run = self.infos()[0].pid, self.runs("a")[0]
        with Queue(self.db) as queue:
            size = os.path.getsize(queue.live_output(run.run))
        self.assertLess(process_status(worker, "VmHWM"), 64 * 1024)
        self.assertLess(size, queuectl.LIVE_RING + 4096)
        self.assertGreater(size, queuectl.LIVE_RING - 4096)  # it has been used
        meeting.let_go()
        self.until_state("a", "completed")
        output = self.output("a")
        self.assertLess(len(output), 65536 + 200)
        self.assertIn(b"%d bytes are not kept" % (200000000 - 65536), output)

    def test_output_that_is_no_utf8(self):
        self.one("printf 'a\\377\\376\\200\\033[31m'; exit 3", "failed")
        self.assertEqual(self.output("a"), b"a\xff\xfe\x80\x1b[31m")
        self.assertIn("exit code 3: a", self.job("a").last_error)
        for words in (("list",), ("show", "a"), ("dlq", "list"), ("list", "--json")):
            self.assertNotIn("\x1b", self.ok(*words))
        done = subprocess.run([sys.executable, SCRIPT, "logs", "a"], env=self.env,
                              stdout=subprocess.PIPE)
        self.assertEqual(done.stdout, b"a\xff\xfe\x80\x1b[31m")

    def test_jobs_that_close_or_redirect_every_descriptor(self):
        meeting = self.meeting()
        self.add("a", "exec <&- >&- 2>&-; %s; exit 4" % meeting.here, max_retries=1)
        self.workers()
        pid = meeting.arrived()
        self.assertEqual(self.job("a").state, "processing")
        self.assertTrue(alive(pid))
        meeting.let_go()
        self.until_state("a", "dead")
        self.assertEqual(self.runs("a")[0].exit_code, 4)
        self.add("b", "%s -c 'import os; os.closerange(0, 256); os._exit(5)'"
                 % shlex.quote(sys.executable), max_retries=1)
        self.until_state("b", "dead")
        self.assertEqual(self.runs("b")[0].exit_code, 5)
        self.add("c", "exec >%s 2>&1; echo there" % shlex.quote(self.path("there")))
        self.until_state("c", "completed")
        self.assertEqual(read_file(self.path("there")), b"there\n")

    @linux
    def test_jobs_that_open_dev_stderr_and_dev_stdout(self):
        """Were they files, each opening would cut off what has been written."""
        self.one("echo a; echo b >/dev/stderr; echo c >/dev/stdout; echo d >&2", "completed")
        self.assertEqual(self.output("a"), b"a\nb\nc\nd\n")

    def test_a_job_that_stops_itself(self):
        self.one("kill -STOP $$; sleep 1000", "timeout", timeout=0.3)

    def test_a_job_that_deletes_its_folder(self):
        os.mkdir(self.path("folder"))
        self.one("rmdir %s; echo gone" % shlex.quote(self.path("folder")), "completed",
                 cwd=self.path("folder"))
        self.assertEqual(self.output("a"), b"gone\n")

    def test_a_folder_that_is_not_there(self):
        run = self.one("true", "failed", cwd=self.path("nowhere"))
        self.assertIn(self.path("nowhere"), run.error)
        self.assertIn("--cwd", run.error)
        self.assertEqual((run.exit_code, run.signal), (None, None))
        self.use("b.db")
        with open(self.path("file"), "w"):
            pass
        self.assertIn(self.path("file"), self.one("true", "failed", cwd=self.path("file")).error)

    def test_a_command_that_is_not_there(self):
        run = self.one("no-such-command-at-all", "failed")
        self.assertEqual(run.exit_code, 127)
        for word in ("PATH", "--env PATH"):
            self.assertIn(word, run.error)
        self.use("b.db")
        self.assertEqual(self.one("exec /dev/null", "failed").exit_code, 126)

    def test_a_job_that_forks_until_it_is_told_to_stop(self):
        meeting = self.meeting()
        self.configure(kill_grace=0.1)
        self.one("exec 9>%s; trap '' TERM; while :; do sleep 1000 & done"
                 % shlex.quote(meeting.paths["alive"]), "timeout", timeout=0.3)
        meeting.gone()

    @linux
    def test_a_job_that_uses_descriptors_of_its_own(self):
        meeting = self.meeting()
        command = "cd %s; exec 3>three 4>four 5>&1 6>&1 7>&1 8>eight; echo x >&3; echo y >&8; %s" \
            % (shlex.quote(self.dir), meeting.here)
        self.add("a", command, max_retries=5)
        process = self.workers()
        first = meeting.arrived()
        self.assertEqual(read_file(self.path("three")) + read_file(self.path("eight")), b"x\ny\n")
        self.assertIn("100", os.listdir("/proc/%d/fd" % first))  # its lock is where it was
        os.kill(self.infos()[0].pid, signal.SIGKILL)
        second = meeting.arrived()
        self.assertFalse(alive(first))
        self.assertTrue(alive(second))
        meeting.let_go()
        self.until_state("a", "completed")
        self.assertIsNone(process.poll())

    def test_a_job_that_kills_its_worker_each_time(self):
        self.one("kill -9 $PPID; sleep 1000", "lost", max_retries=3)
        job = self.job("a")
        self.assertEqual((job.state, job.attempts), ("dead", 3))
        self.assertEqual([run.outcome for run in self.runs("a")], ["lost"] * 3)
        self.assertIn("worker died", job.last_error)

    def test_a_job_that_is_killed(self):
        run = self.one("kill -9 $$", "failed")
        self.assertEqual((run.exit_code, run.signal), (None, signal.SIGKILL))
        self.assertIn("SIGKILL", run.error)


class Guarantees(Process):
    """The twelve promises, in their order. Each test fails when its promise is broken."""

    WAL_WRITE = re.compile(r"(?:pwrite64|write|pwritev2?)\(\d+<[^>]*q\.db-wal>")
    WAL_SYNC = re.compile(r"(?:fsync|fdatasync)\(\d+<[^>]*q\.db-wal>\)")

    def traced(self, *words, **options):
        """Start a command line under strace; the path of what strace writes."""
        trace = self.path("trace")
        if not shutil.which("strace") or subprocess.run(
                ["strace", "-o", os.devnull, "true"], stderr=subprocess.DEVNULL).returncode:
            self.skipTest("strace is not there, or may not trace")
        process = subprocess.Popen(
            ["strace", "-f", "-y", "-e", "trace=write,pwrite64,pwritev,fsync,fdatasync",
             "-o", trace, sys.executable, SCRIPT] + list(words),
            stdin=subprocess.DEVNULL, env=self.env,
            stderr=subprocess.DEVNULL, **options)
        self.processes.append(process)
        return process, trace

    def marks(self, trace):
        """w: a write to the -wal file, s: it is synced, o: a write to stdout; in order."""
        marks = ""
        for line in read_file(trace).decode("utf-8", "replace").splitlines():
            if self.WAL_WRITE.search(line):
                marks += "w"
            elif self.WAL_SYNC.search(line):
                marks += "s"
            elif re.search(r"\bwrite\(1<", line):
                marks += "o"
        return marks

    @linux
    def test_01_an_acknowledged_job_is_on_disk(self):
        self.queue()  # another connection: no close tidies up
        process, trace = self.traced("enqueue", "true", stdout=subprocess.DEVNULL)
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertRegex(self.marks(trace), r"\A[ws]*ws+o+\Z")
        # A worker's commits follow soon, also while it runs a job.
        meeting = self.meeting()
        self.add("a", meeting.here)
        process, trace = self.traced("worker", "start")
        pid = meeting.arrived()
        self.until(lambda: re.search(r"ws+\Z", self.marks(trace).replace("o", "")),
                   "the claim is not synced")
        self.assertTrue(alive(pid))
        self.assertTrue(meeting.nobody())
        meeting.let_go()
        self.until_state("a", "completed")
        self.until(lambda: re.search(r"ws+\Z", self.marks(trace).replace("o", "")),
                   "the result is not synced")
        self.assertEqual(self.cli("worker", "stop")[0], 0)
        process.wait(PATIENCE)

    def test_01_workers_share_their_syncs(self):
        """One sync is enough for all that was committed before it began."""
        keeper = self.queue()
        keeper.require_safe()
        first, second = (Queue(self.db, durable=False) for _ in range(2))
        self.addCleanup(first.close)
        synced = []
        marks = os.path.join(keeper.folder, "synced")

        def due(queue):
            queue.sync_at = time.monotonic()

        def while_syncing(fd):
            synced.append("first")
            due(second)
            second.sync()
            self.assertEqual(synced, ["first"])  # it waits for what goes on
            self.assertLess(second.sync_at, math.inf)
        with mock.patch.object(queuectl, "flush", while_syncing):
            second.enqueue("true")
            first.enqueue("true")
            due(first)
            first.sync()
        with mock.patch.object(queuectl, "flush", lambda fd: synced.append("second")):
            second.sync()
            self.assertEqual(synced, ["first"])  # which was enough
            self.assertEqual(second.sync_at, math.inf)
            second.enqueue("true")
            due(second)
            with open(marks, "r+b") as file:  # somebody began, and died
                begun = time.monotonic()
                file.write(queuectl.MARKS % (begun - 9, begun - queuectl.SYNC_DELAY))
            second.sync()
            self.assertEqual(synced, ["first", "second"])
            second.enqueue("true")
            with open(marks, "r+b") as file:  # somebody has just synced that
                file.write(queuectl.MARKS % (time.monotonic(), time.monotonic()))
            second.enqueue("true")
            second.sync()
            self.assertEqual(synced, ["first", "second"])  # for this one there is time
            second.close()
            self.assertEqual(synced, ["first", "second", "second"])

    def test_01_who_waits_for_the_writer_lock_syncs_meanwhile(self):
        self.queue().require_safe()
        queue = Queue(self.db, durable=False)
        self.addCleanup(queue.close)
        queue.enqueue("true")
        queue.sync_at = 0.0
        synced = []
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other, \
                mock.patch.object(queuectl, "flush", synced.append), \
                mock.patch.object(queuectl, "BUSY_BUDGET", 0.05):
            other.execute("BEGIN IMMEDIATE")
            with self.assertRaises(queuectl.DatabaseUnavailable):
                queue.enqueue("true")
        self.assertEqual(len(synced), 1)

    def test_01_a_full_disk_does_not_keep_from_syncing(self):
        self.queue().require_safe()
        queue = Queue(self.db, durable=False)
        self.addCleanup(queue.close)
        queue.enqueue("true")
        queue.sync_at = time.monotonic()
        synced = []
        full = OSError(errno.ENOSPC, "full")
        with mock.patch.object(queuectl, "flush", synced.append), \
                mock.patch.object(queuectl, "write_at", side_effect=full):
            queue.sync()
        self.assertEqual(len(synced), 1)
        self.assertEqual(queue.sync_at, math.inf)

    def test_02_one_claim_per_job(self):
        queue = self.queue()
        # The fence: a run that has been taken back can change nothing any more.
        self.add("a", "true", max_retries=9)
        _, old = queue.turn(None, "old")

        def result(claim, outcome, **fields):
            return queuectl.Result(**dict(dict(
                run=claim.run, seq=claim.seq, outcome=outcome, exit_code=None, signal=None,
                error=None, output=b"", finished_at=time.time(), seconds=0.0), **fields))
        for outcome in queuectl.OUTCOMES:
            with self.subTest(outcome=outcome):
                settled, new = queue.turn(result(old, "lost"), "new")
                self.assertIsNotNone(settled, "the run that holds the job cannot settle it")
                self.assertEqual((settled.state, new.id), ("pending", "a"))
                before = queue.get("a").__dict__, [run.__dict__ for run in queue.runs("a")]
                late, _ = queue.turn(result(old, outcome, exit_code=0, output=b"late"), None)
                self.assertIsNone(late)
                self.assertEqual(before, (queue.get("a").__dict__,
                                          [run.__dict__ for run in queue.runs("a")]))
                old = new
        settled, _ = queue.turn(result(old, "completed"), None)
        self.assertEqual(settled.state, "completed")
        self.assertEqual(queue.turn(result(old, "failed"), None), (None, None))
        self.assertEqual(queue.get("a").state, "completed")
        # Every transaction has the writer lock before it reads.
        seen = []
        queue._db.set_trace_callback(lambda sql: seen.append(sql.split("--")[0].strip()))
        queue.enqueue("true", id="b")
        queue.turn(None, "me")
        queue.cancel(["b"])
        queue._db.set_trace_callback(None)
        begins = [sql for sql in seen if sql.startswith("BEGIN")]
        self.assertEqual(set(begins), {"BEGIN IMMEDIATE"})
        self.assertEqual(len(begins), 3)
        for sql in seen[:seen.index("BEGIN IMMEDIATE")]:
            self.assertRegex(sql, r"\A(SELECT|WITH|PRAGMA)")
        queue.close()

        # Claimers that race, in processes of their own.
        self.use("race.db")
        with Queue(self.db) as race:
            list(race.enqueue_many({"command": "true"} for _ in range(300)))

        def claim_all(name):
            with Queue(self.db, durable=False) as mine:
                claim = None
                while True:
                    settled, claim = mine.turn(claim and result(claim, "completed"), name)
                    if claim is None:
                        return
        for pid in [self.fork(claim_all, "w%d" % number) for number in range(4)]:
            self.assertEqual(os.waitpid(pid, 0)[1], 0)
        with Queue(self.db) as race:
            self.assertEqual(race.counts()["completed"], 300)
        self.assertEqual(set(self.sql("SELECT count(*), max(outcome) FROM runs GROUP BY job")),
                         {(1, "completed")})

    def test_02_a_refused_settle_is_logged(self):
        """Its job has been settled by somebody else while it ran."""
        meeting = self.meeting()
        self.add("a", meeting.here, max_retries=5)
        process = self.workers()
        meeting.arrived()
        with Queue(self.db) as queue:
            job = queue.get("a")
            queue.turn(queuectl.Result(
                run=job.run, seq=job.seq, outcome="cancelled", exit_code=None, signal=None,
                error="taken", output=b"", finished_at=time.time(), seconds=0.0), None)
        meeting.let_go()
        self.until_logged(process, "it was taken back from this worker; the result (completed)")
        self.add("b", "true")
        self.until_state("b", "completed")
        self.assertEqual((self.job("a").state, self.job("a").last_error), ("cancelled", "taken"))
        self.assertIsNone(process.poll())

    @linux
    def test_03_liveness_comes_from_the_operating_system(self):
        meeting = self.meeting()
        self.add("a", meeting.here, max_retries=5)
        process = self.workers()
        pid = meeting.arrived()
        worker = self.infos()[0]
        # A worker that does not move, as on a laptop that sleeps, and clocks that jump.
        self.freeze(worker.pid)
        self.sql("UPDATE jobs SET locked_at = '1970-01-01T00:00:00.000Z', "
                 "updated_at = '2999-01-01T00:00:00.000Z'", "UPDATE runs SET started_at = 0",
                 "UPDATE workers SET started_at = '1970-01-01T00:00:00.000Z'")
        self.drain()  # its supervisor looks for the dead, and so does its worker
        with Queue(self.db) as queue:
            self.assertEqual([row["run"] for row in queue.orphans()], [])
            queuectl.rescue(queue, self.fail)
        self.assertEqual((self.job("a").state, alive(pid)), ("processing", True))
        self.assertEqual([info.job for info in self.infos()], ["a"])
        os.kill(worker.pid, signal.SIGCONT)
        meeting.let_go()
        self.until_state("a", "completed")
        self.assertEqual(len(self.runs("a")), 1)
        process.send_signal(signal.SIGTERM)
        self.ended(process)
        # And a row, a file and a living process of that number make no worker live.
        self.add("b", meeting.here, max_retries=5)
        with Queue(self.db) as queue:
            queue.turn(None, "forged", "forged.0")
            queue.register("forged", "forged", 1, 1, None)  # with the number of this process
            os.close(queuectl.create_file(queue.lock_path("forged")))
            self.assertEqual(queue.workers(supervisors=True), [])
            self.assertEqual(queue.get("b").locked_by, "forged")
        self.workers()
        meeting.arrived()
        self.assertEqual([run.outcome for run in self.runs("b")], ["lost", None])
        meeting.let_go()
        self.until_state("b", "completed")

    @linux
    def test_04_the_orphaned_tree_is_ended_before_the_job_runs_again(self):
        meeting = self.meeting()
        self.add("a", self.in_background(meeting) + "setsid " + self.in_background(meeting)
                 + meeting.here, max_retries=9)
        self.workers()
        pids = [meeting.arrived() for _ in range(3)]
        for _ in range(2):
            os.kill(self.infos()[0].pid, signal.SIGKILL)
            first = meeting.arrived()
            self.assertEqual([alive(pid) for pid in pids], [False] * 3)
            pids = [first, meeting.arrived(), meeting.arrived()]
        self.assertEqual([run.outcome for run in self.runs("a")], ["lost", "lost", None])

    def record(self):
        """The path of the RunLock of the only worker."""
        path, = [os.path.join(self.db + "-run", name) for name in os.listdir(self.db + "-run")
                 if name.rpartition(".")[2].isdigit()]
        return path

    def widow(self, command):
        """(process, pid of the job's shell): a job whose worker has been killed, while its
        supervisor is stopped and cannot see it."""
        meeting = self.meeting("widow")
        self.add("a", command % {"here": meeting.here}, max_retries=5)
        process = self.workers()
        pid = meeting.arrived()
        self.until(lambda: read_file(self.record()))
        self.freeze(process.pid)
        self.addCleanup(lambda: process.poll() is None and os.kill(process.pid, signal.SIGCONT))
        worker = self.infos()[0].pid
        os.kill(worker, signal.SIGKILL)
        self.until(lambda: not alive(worker))
        return meeting, process, pid

    @linux
    def test_04_a_stranger_with_a_reused_number_is_not_killed(self):
        meeting, process, pid = self.widow("%(here)s")
        os.kill(pid, signal.SIGKILL)
        meeting.gone()
        words = read_file(self.record()).split()
        self.assertEqual(int(words[1]), pid)
        # As if the kernel had given the number to somebody else (within one tick of its
        # clock it never does).
        stranger = self.stranger()
        while self.started(stranger.pid) == words[2]:
            stranger = self.stranger()
        words[1] = b"%d" % stranger.pid
        with open(self.record(), "r+b") as file:
            file.write(b" ".join(words).ljust(200))
        os.kill(process.pid, signal.SIGCONT)
        meeting.arrived()  # the job runs again
        self.assertIsNone(stranger.poll())
        meeting.let_go()
        self.until_state("a", "completed")
        self.assertIsNone(stranger.poll())

    @linux
    def test_04_nothing_runs_again_while_somebody_unknown_may_run_it(self):
        bare = "cd %s; [ $QUEUECTL_ATTEMPT -gt 1 ] || { %s; }; " % (
            shlex.quote(self.dir), self.BARE.replace("%", "%%"))
        meeting, process, pid = self.widow(bare + "%(here)s")
        unknown = self.bare(self.dir)
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: not os.path.exists("/proc/%d" % pid), "pid 1 does not reap")
        os.kill(process.pid, signal.SIGCONT)
        sheet = self.until(lambda: "may be running it" in self.ok("show", "a")
                           and self.ok("show", "a"))
        self.assertIn("process %d of its group" % unknown, sheet)
        self.assertIn("process %d" % unknown,
                      json.loads(self.ok("show", "a", "--json"))["runs"][0]["error"])
        self.drain()  # another supervisor, another worker: the same
        self.assertTrue(alive(unknown))
        self.assertEqual((self.job("a").state, len(self.runs("a"))), ("processing", 1))
        self.assertTrue(meeting.nobody())
        os.kill(unknown, signal.SIGKILL)
        meeting.arrived()
        meeting.let_go()
        self.until_state("a", "completed")

    @linux
    def test_05_rescue_is_quick(self):
        self.configure(backoff_base=1000, kill_grace=1000)
        meeting = self.meeting()
        self.add("a", meeting.here, max_retries=5)
        process = self.workers()
        pid = meeting.arrived()
        # By its supervisor, at once; a lost run costs an attempt and no backoff.
        os.kill(self.infos()[0].pid, signal.SIGKILL)
        pid = meeting.arrived()
        job = self.job("a")
        self.assertEqual((job.state, job.attempts), ("processing", 2))
        self.until_logged(process, "job a: its worker %s died; the job is pending"
                          % self.runs("a")[0].worker)
        # By an idle worker of another supervisor.
        worker = self.infos()[0].pid
        other = self.workers()
        process.kill()
        process.wait()
        os.kill(worker, signal.SIGKILL)
        pid = meeting.arrived()
        self.assertEqual(self.job("a").attempts, 3)
        self.until_logged(other, "its worker")
        # By `worker start`, when nobody was left.
        other.kill()
        other.wait()
        os.kill(self.infos()[0].pid, signal.SIGKILL)
        self.until(lambda: not self.infos(supervisors=True))
        self.assertEqual((self.job("a").state, alive(pid)), ("processing", True))
        process = self.workers()
        meeting.arrived()
        self.assertFalse(alive(pid))
        self.assertEqual([run.outcome for run in self.runs("a")], ["lost"] * 3 + [None])
        # One that was to be cancelled does not run again.
        worker = self.infos()[0].pid
        self.freeze(worker)
        self.ok("cancel", "a")
        self.assertEqual(self.job("a").state, "processing")
        os.kill(worker, signal.SIGKILL)
        self.until_state("a", "cancelled")
        self.assertEqual(self.job("a").attempts, 4)
        meeting.gone()
        self.assertTrue(meeting.nobody())

    @linux
    def test_05_rescue_is_quick_however_busy_the_others_are(self):
        lost, long, idle = self.meeting("lost"), self.meeting("long"), self.meeting("idle")
        for id, meeting, busy in (("a", lost, False), ("b", idle, True)):
            self.add(id, meeting.here)
            process = self.workers()
            meeting.arrived()
            if busy:
                self.add("long", long.here)
            other = self.workers()
            if busy:
                long.arrived()
            pids = [process.pid] + [info.pid for info in self.infos() if info.job == id]
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            process.wait()
            with Queue(self.db) as queue:
                def taken_back():
                    queue.pause("nobody")  # the database does not stand still
                    return len(queue.runs(id)) > 1 or queue.get(id).state == "pending"
                self.until(taken_back)
            self.assertEqual(self.runs(id)[0].outcome, "lost")
            if not busy:
                meeting.arrived()
                meeting.let_go()
                self.until_state(id, "completed")
                other.send_signal(signal.SIGTERM)
                self.ended(other)

    def test_05_wake_ups_go_to_those_who_can_run_the_job(self):
        queue, rung = self.queue(), []
        queue.require_safe()
        for name, queues in (("1", ["a"]), ("2", ["b"]), ("3", None), ("4", ["b", "c"])):
            queue.register(name, "s", 1, 0, queues)
        with mock.patch.object(queue, "ring", lambda name: rung.append(name) or True):
            for name, count, expected in (("b", 1, ["2"]), ("b", 9, ["2", "3", "4"]),
                                          (None, 9, []), ("d", 9, ["3"])):
                del rung[:]
                queue.wake(name, count)
                self.assertEqual(rung, expected)
            for wake, expected in (
                    (lambda: queue.enqueue("true", queue="c", delay=3), ["3"]),
                    (lambda: queue.enqueue("true", queue="b", id="b"), ["2"]),
                    (lambda: queue.enqueue("true", queue="a", after=["b"]), []),
                    (lambda: queue.wake(None, 9), ["2", "3", "4"])):
                del rung[:]
                wake()
                self.assertEqual(rung, expected)
            claim = queue.turn(None, "5")[1]
            del rung[:]
            queue.turn(queuectl.Result(
                run=claim.run, seq=claim.seq, outcome="completed", exit_code=0, signal=None,
                error=None, output=b"", finished_at=0.0, seconds=0.0), None)
            self.assertEqual(rung, ["1"])  # the queue of the job that waited for it

    def test_05_wake_ups_are_not_spent_on_the_dead(self):
        """The dead worker is the first that anybody would wake for the job that it has lost."""
        self.workers()
        worker = self.infos()[0].pid
        self.freeze(worker)
        with Queue(self.db) as queue:
            queue.register("0", "0", 1, 0, None)
            queue.enqueue("true", id="a", max_retries=5)
            queue.turn(None, "0", "0.0")
        os.kill(worker, signal.SIGCONT)
        self.until_state("a", "completed")
        self.assertEqual([run.outcome for run in self.runs("a")], ["lost", "completed"])

    def test_06_stopping_is_graceful(self):
        """In short; class Stopping has the rest."""
        meeting = self.meeting()
        for id in ("a", "b", "c"):
            self.add(id, meeting.here)
        process = self.workers(2)
        meeting.arrived(), meeting.arrived()
        os.killpg(process.pid, signal.SIGINT)
        self.until_logged(process, "finishing the current jobs")
        meeting.let_go()
        meeting.let_go()
        self.ended(process)
        self.assertEqual([self.job(id).state for id in ("a", "b", "c")],
                         ["completed", "completed", "pending"])
        self.assertEqual((len(self.runs("c")), self.job("c").attempts), (0, 0))
        self.assertEqual(self.infos(supervisors=True), [])
        self.assertFalse([name for name in os.listdir(self.db + "-run")
                          if name.endswith((".lock", ".bell", ".out"))])

    def test_07_no_job_hangs_crashes_or_fools_its_worker(self):
        """In short; class Hostile has the rest. One worker takes them all."""
        self.configure(kill_grace=0.1, backoff_base=0)
        hostile = [("exit 3", "failed", {}), ("kill -9 $$", "failed", {}),
                   ("kill -STOP $$", "timeout", {"timeout": 0.1}),
                   ("trap '' TERM; sleep 1000", "timeout", {"timeout": 0.1}),
                   ("exec <&- >&- 2>&-; sleep 0.1", "completed", {}),
                   ("head -c 3000000 /dev/urandom", "completed", {}),
                   ("no-such-command", "failed", {}), ("true", "failed", {"cwd": "/no/where"})]
        process = self.workers()
        worker = self.infos()[0]
        for number, (command, _, fields) in enumerate(hostile):
            self.add("j%d" % number, command, **dict(dict(max_retries=1), **fields))
        for number, (command, outcome, _) in enumerate(hostile):
            with self.subTest(command=command):
                self.until_state("j%d" % number, "completed", "dead")
                self.assertEqual(self.runs("j%d" % number)[0].outcome, outcome)
        self.assertEqual([info.name for info in self.infos()], [worker.name])
        self.assertIsNone(process.poll())

    def snapshot(self, folder):
        """What stands in a folder, byte for byte (without the side files of a queue)."""
        found = {}
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            regular = stat.S_ISREG(os.lstat(path).st_mode)
            if not name.endswith("-run"):
                data = read_file(path) if regular else b""
                found[name] = oct(os.lstat(path).st_mode), len(data), hash(data)
        return found

    def make_queue(self, jobs=500):
        with Queue(self.db) as queue:
            list(queue.enqueue_many({"command": "true #%d" % number} for number in range(jobs)))

    def make_foreign(self, *statements):
        db = sqlite3.connect(self.db, isolation_level=None)
        for statement in statements:
            db.execute(statement)
        db.close()

    def bad_file(self, kind):
        if kind == "text":
            with open(self.db, "wb") as file:
                file.write(b"to whom it may concern\n" * 1000)
        elif kind in ("a note", "one byte"):
            with open(self.db, "wb") as file:
                file.write(b"milk\n" if kind == "a note" else b"x")
        elif kind == "folder":
            os.mkdir(self.db)
        elif kind == "fifo":
            os.mkfifo(self.db)
        elif kind == "other program's":
            self.make_foreign("CREATE TABLE jobs (id)", "INSERT INTO jobs VALUES (1)")
        elif kind == "marked by another program":
            self.make_foreign("PRAGMA application_id = 7", "PRAGMA user_version = 1")
        elif kind == "other program's WAL":
            self.make_foreign("PRAGMA journal_mode = WAL", "CREATE TABLE t (x)")
        elif kind in ("live WAL", "crashed WAL"):
            peer = self.peer("""if 1:
                import sqlite3, sys
                db = sqlite3.connect(sys.argv[1], isolation_level=None)
                db.execute("PRAGMA journal_mode = WAL")
                if sys.argv[2] == "live WAL":  # what is in the file itself is empty
                    db.execute("PRAGMA wal_autocheckpoint = 0")
                db.execute("CREATE TABLE t (x)")
                db.execute("INSERT INTO t VALUES (1)")
                print("there", flush=True)
                input()
                db.execute("INSERT INTO t VALUES (2)")
                print(db.execute("SELECT sum(x) FROM t").fetchone()[0], flush=True)
                input()""", self.db, kind)
            self.hear(peer)
            if kind == "crashed WAL":
                peer.kill()
                peer.wait()
            return peer
        else:
            self.make_queue()
            if kind == "newer":
                self.make_foreign("PRAGMA user_version = 99")
            size = os.path.getsize(self.db)
            if kind == "truncated":
                os.truncate(self.db, size // 2)
            elif kind == "truncated in its first page":
                os.truncate(self.db, 1000)
            elif kind == "corrupt":
                with open(self.db, "r+b") as file:
                    file.seek(4096)
                    file.write(b"\xaa" * (size - 4096))
            elif kind == "corrupt from its first page on":
                with open(self.db, "r+b") as file:
                    file.seek(100)
                    file.write(b"\xaa" * (size - 100))
        return None

    BAD = {
        "text": "not a database", "a note": "not a database", "one byte": "", "folder": "folder",
        "fifo": "not a regular file", "other program's": "another program's",
        "marked by another program": "another program's",
        "other program's WAL": "another program's", "live WAL": "another program's",
        "crashed WAL": "another program's", "newer": "newer queuectl", "truncated": "truncated",
        "truncated in its first page": "", "corrupt": "corrupt",
        "corrupt from its first page on": "",
    }

    def test_08_bad_files_are_refused_and_left_as_they_are(self):
        for kind, says in self.BAD.items():
            with self.subTest(kind):
                os.mkdir(self.path(kind))
                self.use(kind, "q.db")
                peer = self.bad_file(kind)
                before = self.snapshot(self.path(kind))
                for words in (("enqueue", "true"), ("enqueue", "--file", "-"), ("status",),
                              ("list",), ("cancel", "a"), ("wait",), ("config", "list"),
                              ("prune",), ("worker", "list"), ("worker", "stop")):
                    self.refused(*words, code=1, says=says, stdin=b'{"command": "true"}')
                code, out, err = self.cli("worker", "start", "--drain")
                self.assertEqual((code, out), (1, ""), err)
                self.assertRegex(err, r"\Aqueuectl: [^\n]+\n\Z")
                self.assertEqual(self.snapshot(self.path(kind)), before)
                if kind == "live WAL":  # its owner goes on as if nothing had been
                    self.tell(peer)
                    self.assertEqual(self.hear(peer), "3")
        self.use("no such folder", "q.db")
        self.refused("enqueue", "true", code=1)
        self.assertFalse(os.path.exists(self.path("no such folder")))

    def as_nobody(self, *words):
        """(exit code, stderr) of a command line, run in a fork without privileges."""
        # All that it may import: as nobody it cannot reach every installation.
        import multiprocessing.connection, multiprocessing.popen_fork  # noqa: E401, F401

        def run():
            out = io.StringIO()
            if ROOT:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            with open(self.path("as-nobody"), "w") as err, \
                    contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                return queuectl.main(words) or (50 if out.getvalue() else 0)
        with open(self.path("as-nobody"), "w"):
            os.chmod(self.path("as-nobody"), 0o666)
        pid = self.fork(run)
        status = os.waitpid(pid, 0)[1]
        return os.WEXITSTATUS(status), read_file(self.path("as-nobody")).decode()

    def test_08_damage_within_is_told(self):
        """Where SQLite itself sees none: text that is none, and JSON that is none."""
        self.add("a", "true", env={"NAME": "x"})
        for damage in ("UPDATE jobs SET env = '!'", "UPDATE jobs SET command = CAST(x'ff' AS TEXT)",
                       "UPDATE jobs SET env = NULL"):
            self.sql(damage)
            if damage.endswith("NULL"):
                break
            for words in (("list",), ("list", "--json"), ("show", "a")):
                self.refused(*words, code=1, says="corrupt")
            code, out, err = self.cli("worker", "start", "--drain", "--quiet")
            self.assertEqual((code, out), (1, ""))
            self.assertIn("is corrupt; restore a copy of it", err)
            self.assertNotIn("Traceback", err)
            self.assertEqual(self.sql("SELECT state, attempts FROM jobs"), [("pending", 0)])
        data = read_file(self.db)
        at = data.index(b"CREATE TABLE jobs")
        with open(self.db, "r+b") as file:
            file.seek(at + 7)
            file.write(b"\xae")
        self.refused("status", code=1, says="corrupt")

    def test_08_files_that_cannot_be_written(self):
        os.chmod(self.dir, 0o755)
        for kind, file, folder in (("file", 0o444, 0o755), ("folder", 0o644, 0o555),
                                   ("both", 0o444, 0o555), ("unreadable", 0o000, 0o755)):
            with self.subTest(kind):
                os.mkdir(self.path(kind))
                self.use(kind, "q.db")
                self.make_queue(10)
                if ROOT:
                    os.chown(self.db, 65534, 65534)
                    os.chown(self.path(kind), 65534, 65534)
                    shutil.rmtree(self.db + "-run", ignore_errors=True)
                os.chmod(self.db, 0o644)
                before = self.snapshot(self.path(kind))
                os.chmod(self.db, file)
                os.chmod(self.path(kind), folder)
                self.addCleanup(os.chmod, self.path(kind), 0o755)
                for words in (("enqueue", "true"), ("pause",), ("worker", "start", "--drain")):
                    code, err = self.as_nobody(*words)
                    self.assertEqual(code, 1, (words, err))
                    self.assertRegex(err, r"\Aqueuectl: [^\n]+\n\Z", words)
                for words in (("status",), ("list",)):  # may be refused, too
                    code, err = self.as_nobody(*words)
                    self.assertIn(code, (1, 50), (words, err))
                    self.assertNotIn("Traceback", err)
                os.chmod(self.path(kind), 0o755)
                os.chmod(self.db, 0o644)
                self.assertEqual(self.snapshot(self.path(kind)), before)

    def small_disk(self, size):
        """A file system of its own for the database; ends with the test."""
        folder = self.path("disk")
        os.mkdir(folder, 0o700)
        mount = ["mount", "-t", "tmpfs", "-o", "size=%s,mode=700" % size, "tmpfs", folder]
        done = subprocess.run(mount, stderr=subprocess.PIPE) \
            if ROOT and shutil.which("mount") else None
        if done is None or done.returncode:
            self.skipTest("only root may mount a file system")

        def end():
            self.end_processes()
            subprocess.run(["umount", "-l", folder])
        self.addCleanup(end)
        self.use("disk", "q.db")
        return folder

    @linux
    def test_08_a_full_disk_loses_nothing(self):
        folder = self.small_disk("2m")
        self.configure(output_limit="200K")
        meeting = self.meeting()
        self.add("a", "head -c 150000 /dev/zero; " + meeting.here)
        self.add("b", "true", delay="1h")
        process = self.workers()
        pid = meeting.arrived()
        filler = os.path.join(folder, "filler")
        with open(filler, "wb", buffering=0) as file:
            for size in (65536, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)
        code, out, err = self.cli("enqueue", "true #" + "x" * 100000)
        self.assertEqual((code, out), (1, ""), err)
        self.assertRegex(err, r"\Aqueuectl: [^\n]+\n\Z")
        self.assertRegex(err, "full|disk")
        meeting.let_go()
        self.until(lambda: not alive(pid))
        self.until(lambda: re.search("No space left|is full|disk I/O error", self.log(process)))
        self.assertIsNone(process.poll())
        os.unlink(filler)
        self.until_state("a", "completed")
        self.assertEqual(len(self.output("a")), 150000)
        self.assertEqual(len(self.runs("a")), 1)
        self.ok("enqueue", "--id", "c", "true")
        self.until_state("c", "completed")
        with Queue(self.db) as queue:
            self.assertEqual(queue.counts()["completed"], 2)
            self.assertEqual(queue.counts()["scheduled"], 1)
            self.assert_sound()

    @linux
    def test_08_a_disk_that_is_full_at_the_first_use_costs_nothing(self):
        """The checkpoint at its end could not bring all of the log into the file."""
        folder = self.small_disk("1m")
        for _ in range(2):
            code, out, err = self.cli("enqueue", "--file", "-",
                                      stdin=b'{"command": "true"}\n' * 7000)
            self.assertEqual((code, out), (1, ""))
            self.assertRegex(err, r"\Aqueuectl: [^\n]*disk[^\n]*\n\Z")
        with Queue(self.db) as queue:
            self.assertGreater(queue._value("PRAGMA page_count") * 1024, os.path.getsize(self.db))
        subprocess.run(["mount", "-o", "remount,size=8m", folder], check=True)
        ids = self.ok("enqueue", "--file", "-", stdin=b'{"command": "true"}\n' * 7000)
        with Queue(self.db) as queue:
            self.assertEqual([job.id for job in queue.jobs()], ids.split())
        self.assert_sound()

    def test_08_a_file_that_may_not_grow_stores_nothing(self):
        import resource
        keeper = self.queue()
        keeper.enqueue("true", id="a")
        room = max(os.path.getsize(self.db), os.path.getsize(self.db + "-wal"))
        for size, most in (("x" * 100000, room + 20000), ("", os.path.getsize(self.db + "-wal"))):
            done = subprocess.run(
                [sys.executable, SCRIPT, "enqueue", "--id", "b", "true #" + size], env=self.env,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
            self.assertEqual((done.returncode, done.stdout), (1, b""), done.stderr)
            self.assertRegex(done.stderr.decode(), r"\Aqueuectl: [^\n]*(full|disk)[^\n]*\n\Z")
        # Many jobs fill the log before their commit.
        done = subprocess.run(
            [sys.executable, SCRIPT, "enqueue", "--file", "-"], env=self.env,
            input=b'{"command": "true #%s"}\n' % (b"x" * 1000) * 5000, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6)))
        self.assertEqual((done.returncode, done.stdout), (1, b""), done.stderr)
        self.assertRegex(done.stderr.decode(), r"\Aqueuectl: [^\n]*(full|disk)[^\n]*\n\Z")
        self.assertEqual([job.id for job in keeper.jobs()], ["a"])
        self.ok("enqueue", "--id", "b", "true")
        self.assert_sound()

    def test_08_a_database_that_is_taken_away_stops_its_workers(self):
        meeting = self.meeting()
        processes = []
        for kind in ("deleted", "deleted while a job runs", "replaced", "anew", "folder"):
            os.mkdir(self.path(kind))
            self.use(kind, "q.db")
            if kind == "deleted while a job runs":
                self.add("a", meeting.here)
            processes.append((kind, self.workers()))
        meeting.arrived()
        for kind, process in processes:
            self.use(kind, "q.db")
            if kind == "folder":
                os.rename(self.path(kind), self.path("moved"))
                continue
            if kind == "replaced":
                shutil.copy(self.db, self.path("copy"))
                os.replace(self.path("copy"), self.db)
                continue
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.db + suffix)
            if kind == "anew":
                self.add("b", "true", max_retries=1)
        for kind, process in processes:
            with self.subTest(kind):
                self.use(kind, "q.db")
                self.ended(process, 1)
                self.assertIn("deleted or replaced", self.log(process))
                self.assertNotIn("Traceback", self.log(process))
        meeting.gone()
        self.use("anew", "q.db")
        self.assertEqual(self.job("b").state, "pending")
        self.use("q.db")

    def modes(self):
        found = {}
        for folder, folders, files in os.walk(self.dir):
            for name in folders + files:
                path = os.path.join(folder, name)
                if "q.db" in path or "state" in path or "queuectl.db" in path:
                    found[os.path.relpath(path, self.dir)] = stat.S_IMODE(os.lstat(path).st_mode)
        return found

    @linux
    def test_09_only_the_owner_feeds_the_queue(self):
        def umask(mask):
            os.umask(mask)
        # Modes, whatever the umask.
        for mask in (0, 0o777):
            self.use("%o-q.db" % mask)
            meeting = self.meeting("meeting%d" % mask)
            self.assertEqual(subprocess.run(
                [sys.executable, SCRIPT, "enqueue", "--id", "a", "--cwd", self.dir,
                 "echo x; umask; " + meeting.here], env=self.env, stdout=subprocess.DEVNULL,
                preexec_fn=lambda: umask(mask)).returncode, 0)
            process = self.workers(1, preexec_fn=lambda: umask(mask))
            meeting.arrived()
            run = self.runs("a")[0].run
            live = os.path.join(self.db + "-run", "%d.out" % run)
            self.until(lambda: os.path.exists(live) and os.path.getsize(live))
            found = {path: mode for path, mode in self.modes().items()
                     if path.startswith("%o-q.db" % mask)}
            self.assertEqual({oct(mode) for path, mode in found.items() if not
                              path.endswith("-run")}, {"0o600"}, found)
            self.assertEqual(found["%o-q.db-run" % mask], 0o700)
            for end in ("-wal", "-shm", ".lock", ".bell", ".out", ".0"):
                self.assertTrue([path for path in found if path.endswith(end)], (end, found))
            meeting.let_go()
            self.until_state("a", "completed")
            self.assertEqual(self.output("a"), b"x\n%04o\n" % mask)
            process.send_signal(signal.SIGTERM)
            self.ended(process)
        # The default folder is private.
        done = subprocess.run([sys.executable, SCRIPT, "enqueue", "true"],
                              env=dict(self.env, QUEUECTL_DB=""), stdout=subprocess.DEVNULL,
                              preexec_fn=lambda: umask(0))
        self.assertEqual(done.returncode, 0)
        self.assertEqual({path: oct(mode) for path, mode in self.modes().items()
                          if path.startswith("state")},
                         {"state": "0o700", "state/queuectl": "0o700",
                          "state/queuectl/queuectl.db": "0o600"})

    @linux
    def test_09_workers_refuse_what_others_may_have_written(self):
        def refuses(says):
            """Nothing of it may run."""
            code, out, err = self.cli("worker", "start", "--drain")
            self.assertEqual((code, out), (1, ""), err)
            self.assertRegex(err, r"\Aqueuectl: [^\n]+\n\Z")
            self.assertIn(says, err)
            self.assertEqual(self.job("a").state, "pending")
            code, out, err = self.cli("worker", "start", "--detach")
            self.assertEqual((code, out), (1, ""), err)
        os.mkdir(self.path("folder"))
        self.use("folder", "q.db")
        side = self.db + "-run"
        self.add("a", "true")
        os.chmod(self.db, 0o602)
        refuses("written by every user")
        os.chmod(self.db, 0o600)
        os.chmod(self.path("folder"), 0o777)
        refuses("folder that every user can write")
        os.chmod(self.path("folder"), 0o700)
        shutil.rmtree(side, ignore_errors=True)
        os.mkdir(self.path("planted"))
        os.symlink(self.path("planted"), side)
        refuses("-run")
        os.unlink(side)
        with open(side, "w"):
            pass
        refuses("-run")
        os.unlink(side)
        os.mkdir(side)
        os.chmod(side, 0o777)
        refuses("-run")
        os.chmod(side, 0o700)
        if ROOT:
            os.chown(side, 65534, 65534)
            refuses("-run")
            os.chown(side, 0, 0)
            os.chown(self.db, 65534, 65534)
            refuses("another user")
            os.chown(self.db, 0, 0)
        with Queue(self.db) as queue, mock.patch("os.geteuid", lambda: 12345):
            with self.assertRaisesRegex(QueueError, "another user"):
                queue.require_safe()
        self.assertEqual(os.listdir(self.path("planted")), [])
        os.chmod(self.path("folder"), 0o1777)  # as /tmp
        self.drain()
        self.assertEqual(self.job("a").state, "completed")

    def test_10_checkpoints_never_race_a_commit(self):
        seen, checkpoint = [], Queue.checkpoint
        limit = 200000

        def early(queue, limit=limit):
            checkpoint(queue, limit)

        def spied(durable):
            queue = self.queue(durable=durable)
            queue._db.set_trace_callback(
                lambda sql: re.search("checkpoint|busy_timeout", sql) and seen.append(sql))
            return queue
        with mock.patch.object(Queue, "checkpoint", early):
            for durable in (True, False):
                queue = spied(durable)
                self.assertEqual(queue._value("PRAGMA wal_autocheckpoint"), 0)
                for _ in range(100):
                    queue.enqueue("true #" + "x" * 10000)
                self.assertLess(os.path.getsize(self.db + "-wal"), limit + 33 * 40000)
            checkpoints = [number for number, sql in enumerate(seen) if "_checkpoint(" in sql]
            self.assertGreater(len(checkpoints), 1)
            for number in checkpoints:
                self.assertEqual(seen[number], "PRAGMA wal_checkpoint(TRUNCATE)")
                timeouts = [sql for sql in seen[:number] if "busy_timeout" in sql]
                self.assertRegex(timeouts[-1] if timeouts else "none",
                                 r"\APRAGMA busy_timeout = [1-9]\d*\Z")
            # After a busy answer there is a pause.
            with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM jobs").fetchone()
                del seen[:]
                list(queue.enqueue_many({"command": "true #" + "y" * 1000} for _ in range(500)))
                queue.checkpoint()
                queue.checkpoint()
                self.assertEqual(len([sql for sql in seen if "_checkpoint(" in sql]), 1)
        self.assert_sound()

    def test_10_no_reader_pins_the_wal(self):
        writer, reader = self.queue(), self.queue()
        list(writer.enqueue_many({"command": "true"} for _ in range(2500)))
        for page in (1, 1001, 2001):
            jobs = reader.jobs()
            for _ in range(page):
                next(jobs)
            writer.enqueue("true")
            self.assertEqual(self.sql("PRAGMA busy_timeout = 0", "PRAGMA wal_checkpoint(TRUNCATE)"),
                             [(0, 0, 0)])
            self.assertEqual(os.path.getsize(self.db + "-wal"), 0)

    def test_10_the_wal_is_bounded_while_workers_work(self):
        keeper = self.queue()  # keeps the file in place
        list(keeper.enqueue_many({"command": "head -c 70000 /dev/urandom"} for _ in range(400)))
        process = self.start("worker", "start", "--drain", "--count", 2, "--quiet")
        most = 0
        while process.poll() is None:
            most = max(most, os.path.getsize(self.db + "-wal"))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        self.assertEqual(keeper.counts()["completed"], 400)
        self.assertLess(most, queuectl.WAL_LIMIT + 2 * 33 * 130000)
        stored = os.path.getsize(self.db) + os.path.getsize(self.db + "-wal")
        self.assertGreater(stored, 24e6)  # it was more than the log ever held

    def race(self, function, count):
        """Run a function in so many forks at once; all must succeed."""
        pids = [self.fork(function, number) for number in range(count)]
        codes = [os.waitpid(pid, 0)[1] for pid in pids]
        self.assertEqual(codes, [0] * count)

    def test_11_nobody_starves_and_nobody_sees_a_locked_database(self):
        def enqueue(number):
            with Queue(self.db) as queue:
                for _ in range(20):
                    queue.enqueue("true", queue="q%d" % number)
        self.race(enqueue, 16)
        self.assertEqual(self.sql("SELECT queue, count(*) FROM jobs GROUP BY queue"),
                         [("q%d" % number, 20) for number in sorted(range(16), key=str)])
        self.assert_sound()

    def test_11_first_uses_may_meet(self):
        def first_use(number):
            with Queue(self.db) as queue:
                queue.enqueue("true", id="j%d" % number)
        for number in range(30):
            self.use("%d.db" % number)
            self.race(first_use, 8)
            self.assertEqual(self.sql("SELECT count(*) FROM jobs"), [(8,)])

    def test_11_a_program_that_holds_the_lock_only_delays(self):
        self.configure(backoff_base=0)
        meeting = self.meeting()
        self.add("a", meeting.here)
        process = self.workers()
        meeting.arrived()
        other = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN IMMEDIATE")
        clients = [self.start(*words, stdout=subprocess.PIPE) for words in (
            ("enqueue", "--id", "b", "true"), ("pause", "x"),
            ("config", "set", "max-retries", "2"))]
        meeting.let_go()
        self.ok("status")
        start = time.monotonic()
        self.until(lambda: time.monotonic() > start + 1)
        self.assertEqual([client.poll() for client in clients], [None] * 3)
        other.execute("COMMIT")
        for client in clients:
            self.ended(client)
        self.assertEqual(clients[0].stdout.read(), b"b\n")
        self.until_state("b", "completed")
        self.assertEqual(self.job("a").state, "completed")
        self.assertNotIn("locked", self.log(process))

    HOOKED = """if 1:
        import os, sys
        def hook(event, arguments):
            if event == "open" and str(arguments[0]).rstrip("'").endswith(("q.db", "q.db-shm")) \\
                    and not arguments[2] & os.O_EXCL:  # only what is there can be looked at
                os.write(2, ("OPENED %s\\n" % arguments[0]).encode())
        sys.addaudithook(hook)
        import queuectl
        code = queuectl.main(sys.argv[2:])
        if sys.argv[1] == "control":
            os.close(os.open(os.environ["QUEUECTL_DB"], os.O_RDONLY))
        sys.exit(code)"""

    def test_12_the_database_is_never_opened(self):
        meeting = self.meeting()
        for words in (("enqueue", "--id", "a", "--max-retries", "1", "echo x; exit 1"),
                      ("enqueue", "--id", "b", "true"),
                      ("status",), ("list",), ("pause",), ("resume",),
                      ("worker", "start", "--drain", "--count", "2"), ("logs", "a"), ("show", "a"),
                      ("dlq", "retry", "a"), ("cancel", "a"), ("worker", "list"), ("prune",),
                      ("control", "status")):
            done = subprocess.run(
                [sys.executable, "-c", self.HOOKED, "control" if words[0] == "control" else ""]
                + list(words[words[0] == "control":]), env=dict(
                    self.env, PYTHONPATH=HERE), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stderr.count(b"OPENED"), words[0] == "control", done.stderr)
        # While a job runs, and is rescued: the supervisor and its workers look often then.
        self.add("c", meeting.here, max_retries=3)
        with open(self.path("hooked"), "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", self.HOOKED, "", "worker", "start"], stderr=log,
                env=dict(self.env, PYTHONPATH=HERE))
        process.log = self.path("hooked")
        self.processes.append(process)
        meeting.arrived()
        os.kill(self.infos()[0].pid, signal.SIGKILL)
        meeting.arrived()
        meeting.let_go()
        self.until_state("c", "completed")
        process.send_signal(signal.SIGTERM)
        self.ended(process)
        self.assertNotIn("OPENED", self.log(process))

    @linux
    def test_12_no_connection_crosses_a_fork(self):
        for moment in ("before", "meanwhile"):
            with self.subTest(moment):
                self.use(moment + "-q.db")
                meeting = self.meeting(moment)
                peer = self.peer("""if 1:
                    import os, queuectl, sys
                    if __name__ == "__main__":
                        queue = queuectl.Queue()
                        queue.enqueue(sys.argv[1], id="a")
                        if sys.argv[2] == "before":
                            queue.close()
                        code = queuectl.main(["worker", "start", "--drain"])
                        if sys.argv[2] == "meanwhile":
                            queue.enqueue("true", id="b")
                            queue.close()
                        print("code", code, flush=True)""", meeting.here, moment,
                                 stderr=subprocess.DEVNULL)
                meeting.arrived()
                worker = self.infos()[0].pid
                opened = [os.path.realpath("/proc/%d/fd/%s" % (worker, fd))
                          for fd in os.listdir("/proc/%d/fd" % worker)]
                self.assertEqual(opened.count(self.db), 1, opened)
                meeting.let_go()
                self.assertEqual(self.hear(peer), "code 0")
                self.assertEqual(self.job("a").state, "completed")
                self.assert_sound()


@linux
class Chaos(Process):
    """Workers and supervisors are killed at random instants, while the jobs themselves write
    down what happens to them."""

    TOLD = "QUEUECTL_CHAOS_KILLS" in os.environ
    KILLS = int(os.environ.get("QUEUECTL_CHAOS_KILLS") or 100)
    JOBS = 3 * KILLS

    # Each job holds the lock of its own in all of its processes: whoever finds it taken has
    # met another copy of itself.
    BEGIN = "exec 8>lock.$QUEUECTL_JOB_ID; " \
            "flock -n 8 || echo overlap $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $$ >>ledger; " \
            "echo start $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $$ >>ledger; "
    END = "; echo end $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $$ >>ledger"
    KINDS = ("true", "sleep 0.1", "sleep 0.02", "sleep 0.3 & sleep 0.05",
             "setsid sleep 0.3 & sleep 0.05", "head -c 200000 /dev/zero; sleep 0.03",
             "(sleep 0.1; echo late) & (sleep 0.05; exec sleep 0.05) & wait")

    def pick(self, random):
        """A process to kill: now a worker, now a supervisor."""
        infos = self.watcher.workers(supervisors=True)
        leaders = [info for info in infos if not info.slot]
        workers = [info for info in infos if info.slot]
        if not workers or leaders and random.random() < 0.25:
            return random.choice(leaders) if leaders else None
        return random.choice(workers)

    def tend(self):
        """There are three supervisors at all times."""
        for process in [process for process in self.processes if process.poll() is not None]:
            self.processes.remove(process)
        while len(self.processes) < 3:
            self.start("worker", "start", "--count", 2, "--quiet")

    def test_chaos(self):
        import random
        if not shutil.which("flock") or not shutil.which("setsid"):
            self.skipTest("flock(1) and setsid(1) are not there")
        seed = int.from_bytes(os.urandom(4), "big")
        random = random.Random(seed)
        self.watcher = self.queue()
        kinds = [random.choice(self.KINDS) for _ in range(self.JOBS)]
        list(self.watcher.enqueue_many(
            {"id": "j%d" % number, "command": self.BEGIN + kind + self.END, "cwd": self.dir,
             "max_retries": 1000} for number, kind in enumerate(kinds)))
        killed = {True: 0, False: 0}
        while sum(killed.values()) < self.KILLS:
            self.tend()
            victim = self.pick(random)
            if victim is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim.pid, signal.SIGKILL)
                    killed[bool(victim.slot)] += 1
            time.sleep(random.random() * 0.12)  # the random instants
        deadline = time.monotonic() + PATIENCE
        while self.watcher.counts()["completed"] < self.JOBS and time.monotonic() < deadline:
            self.tend()
            select.select([], [], [], 0.02)
        self.tend()
        counts = self.watcher.counts()
        self.assertEqual(self.cli("worker", "stop")[0], 0)

        starts, ends, overlapping = [], set(), []
        for line in read_file(self.path("ledger")).decode().splitlines():
            what, id, attempt, _ = line.split()
            {"start": starts.append, "end": ends.add, "overlap": overlapping.append}[what](
                (id, int(attempt)))
        late, lost = [], []
        for number in range(self.JOBS):
            id = "j%d" % number
            outcomes = [run.outcome for run in self.watcher.runs(id)]
            attempts = [attempt for name, attempt in starts if name == id]
            # The run that completed is the last one, and was really run to its end.
            if outcomes != ["lost"] * (len(outcomes) - 1) + ["completed"] \
                    or (id, len(outcomes)) not in ends:
                lost.append((id, outcomes))
            if max(attempts, default=0) > len(outcomes) or len(set(attempts)) < len(attempts):
                late.append((id, attempts, outcomes))
        stuck = counts["processing"] + counts["pending"]
        figures = "chaos: %d jobs, %d kills of workers, %d of supervisors, %d starts, %d lost, " \
            "%d overlapping, %d started late, %d stuck (seed %d)" % (
                self.JOBS, killed[True], killed[False], len(starts), len(lost),
                len(overlapping), len(late), stuck, seed)
        if self.TOLD:
            print(figures, file=sys.stderr)
        self.assertEqual(([], [], [], 0), (lost, overlapping, late, stuck), figures)
        self.assertEqual(counts["completed"], self.JOBS, figures)
        self.assert_sound(figures)


# -- commands: what people do with a queue every day ---------------------------------------

LONG = bool(os.environ.get("QUEUECTL_LONG"))
MANY = 10000 if LONG else 2000


def interruptible():
    """Between fork and exec: Ctrl-C counts, even where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def own_terminal():
    """Between fork and exec: stdin becomes the terminal that controls this session."""
    import fcntl
    import termios
    interruptible()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A program on a terminal of its own, whose screen is read as it comes."""

    def __init__(self, case, program, columns=80, lines=24, env=None, **streams):
        import fcntl
        import pty
        import struct
        import termios
        self.case, self.shown = case, ""
        self.master, slave = pty.openpty()
        case.addCleanup(self.close)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        for stream in ("stdin", "stdout", "stderr"):
            streams.setdefault(stream, slave)
        self.process = subprocess.Popen(
            [str(word) for word in program], env=dict(case.env, TERM="xterm", **env or {}),
            start_new_session=True, preexec_fn=own_terminal, **streams)
        self.process.log = os.devnull
        case.processes.append(self.process)
        os.close(slave)

    def until(self, pattern):
        """Read on until the screen has shown the pattern; its match."""
        deadline = time.monotonic() + PATIENCE
        while True:
            match = re.search(pattern, self.shown)
            if match:
                return match
            self.case.assertTrue(self._read(deadline), "%r was not shown, but: %r"
                                 % (pattern, self.shown))

    def rest(self):
        """(exit code, all that was shown), once the program has ended."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(PATIENCE), self.shown.replace("\r\n", "\n")

    def _read(self, deadline):
        ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
        self.case.assertTrue(ready, "nothing more was shown after %r" % self.shown)
        try:
            data = os.read(self.master, 65536)
        except OSError as error:  # Linux's way to say that nobody has it open any more
            if error.errno != errno.EIO:
                raise
            data = b""
        self.shown += data.decode("utf-8", "replace")
        return data

    def press(self, keys):
        os.write(self.master, keys)

    def close(self):
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


class Everyday(Case):
    """Ways to settle jobs without workers, and to look at what commands show."""

    def settle(self, queue, outcome="completed", output=b"", error=None):
        """Run the next job in this process: claim it, and settle it with that outcome."""
        claim = queue.turn(None, "nobody", "nobody.0")[1]
        if claim is not None:
            self.finish(queue, claim, outcome, output, error)
        return claim

    def finish(self, queue, claim, outcome="completed", output=b"", error=None):
        code = {"completed": 0, "failed": 1}.get(outcome)
        return queue.turn(queuectl.Result(
            run=claim.run, seq=claim.seq, outcome=outcome, exit_code=code, signal=None,
            error=error or (outcome if code != 0 else None), output=output,
            finished_at=time.time(), seconds=0.5), None)[0]

    def settle_all(self, queue, outcome="completed"):
        """The ids of all jobs that could run, in the order in which they did."""
        ids = []
        while True:
            claim = self.settle(queue, outcome)
            if claim is None:
                return ids
            ids.append(claim.id)

    def bulk(self, jobs):
        """JSON Lines of jobs, for stdin."""
        return "".join(json.dumps(job) + "\n" for job in jobs).encode()

    def terminal(self, *words, **options):
        return Terminal(self, (sys.executable, SCRIPT) + words, **options)

    def piped(self, *words, **options):
        """Start a command line whose stdout is a pipe."""
        return self.start(*words, stdout=subprocess.PIPE, preexec_fn=interruptible, **options)

    def read_until(self, process, text):
        """Read a process's stdout until it ends with `text`."""
        data, deadline = b"", time.monotonic() + PATIENCE
        while not data.endswith(text):
            ready, _, _ = select.select([process.stdout], [], [],
                                        max(0, deadline - time.monotonic()))
            self.assertTrue(ready, "%r did not come, but %r" % (text, data))
            part = os.read(process.stdout.fileno(), 65536)
            self.assertTrue(part, "%r did not come, but %r and the end" % (text, data))
            data += part
        return data

    def ended(self, process):
        """(exit code, the rest of its stdout, its stderr) of a process that must end."""
        out = process.communicate(timeout=PATIENCE)[0]
        return process.returncode, out, read_file(process.log).decode()

    def states(self):
        with Queue(self.db) as queue:
            return {job.id: job.view for job in queue.jobs()}

    def no_workers_left(self):
        """As a cleanup: end the workers that were started in the background."""
        with Queue(self.db) as queue:
            pids = [info.pid for info in queue.workers(supervisors=True)]
            self.main("--db", self.db, "worker", "stop", "--now", "--timeout", "10")
        for pid in pids:
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)


class Wait(Everyday):
    """wait [ID ...] [--timeout T]"""

    def setUp(self):
        super().setUp()
        self.ok("config", "set", "backoff_base", 0)

    def various(self):
        """Jobs in every final position, by their names."""
        with Queue(self.db) as queue:
            queue.enqueue("true", id="good")
            self.settle_all(queue)
            queue.enqueue("false", id="bad", max_retries=1)
            self.settle_all(queue, "failed")
            queue.enqueue("true", id="stopped")
            queue.cancel(["stopped"])
            queue.enqueue("true", id="stuck", after=["bad"])
            queue.enqueue("true", id="behind", after=["stuck", "good"])
            queue.enqueue("true", id="orphan", after=["stopped"])

    def test_exit_codes(self):
        """0: all completed. 1: any dead, cancelled, or never able to run."""
        self.various()
        for ids, expected in (("good", 0), ("good good", 0), ("bad", 1), ("stopped", 1),
                              ("stuck", 1), ("behind", 1), ("orphan", 1), ("good bad", 1),
                              ("behind good", 1), ("", 1)):
            with self.subTest(ids):
                code, out, err = self.main("wait", "--timeout", "20", *ids.split())
                self.assertEqual((code, out), (expected, ""))
                self.assertRegex(err, r"\Aqueuectl: [^\n]+ not completed[^\n]*\n\Z" if code
                                 else r"\A\Z")
        self.assertIn(": bad is dead, stuck is blocked\n", self.main("wait", "bad", "stuck")[2])

    def test_nothing_to_wait_for(self):
        """None named, and none that has not ended: done at once, whatever failed before."""
        self.assertEqual(self.main("wait"), (0, "", ""))
        with Queue(self.db) as queue:
            queue.enqueue("false", max_retries=1)
            self.settle_all(queue, "failed")
        self.assertEqual(self.main("wait"), (0, "", ""))

    def test_timeout(self):
        """124 where --timeout ran out, with a line that says so; 0 if all had ended."""
        self.ok("enqueue", "--id", "a", "true")
        self.refused("wait", "a", "--timeout", "0", code=124)
        self.refused("wait", "--timeout", "0.01", code=124)
        with Queue(self.db) as queue:
            self.settle_all(queue)
        self.ok("wait", "a", "--timeout", "0")

    def test_unknown(self):
        """A job that does not exist is an error, also among others."""
        self.ok("enqueue", "--id", "a", "true")
        self.refused("wait", "nobody", code=1, says="nobody")
        self.refused("wait", "a", "nobody", code=1, says="nobody")

    def test_until_they_end(self):
        """It returns when the jobs that it was asked for end, across a retry."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "a", "--max-retries", 2,
                meeting.here + "; test $QUEUECTL_ATTEMPT = 2")
        waiting = self.piped("wait", "a")
        self.workers(1)
        for _ in range(2):
            meeting.arrived()
            self.assertIsNone(waiting.poll())
            meeting.let_go()
        self.assertEqual(self.ended(waiting), (0, b"", ""))

    def test_all_that_have_not_ended_now(self):
        """With none named, later jobs do not prolong it, and earlier failures do not count.
        On a terminal it shows its progress."""
        self.various()
        self.ok("cancel", "stuck", "behind", "orphan")
        meeting = self.meeting()
        self.ok("enqueue", "--id", "now", meeting.here)
        waiting = self.terminal("wait")
        waiting.until("0 done, 0 failed, 1 left")
        self.ok("enqueue", "--id", "later", "--queue", "unserved", "true")
        self.workers(1, "--queue", "default")
        meeting.arrived()
        meeting.let_go()
        code, shown = waiting.rest()
        self.assertEqual(code, 0)
        self.assertIn("1 done, 0 failed, 0 left", shown)
        self.assertEqual(self.job("later").state, "pending")

    def test_one_is_cancelled_or_blocked_meanwhile(self):
        """What can never run any more is not waited for."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "first", "--max-retries", 1, meeting.here + "; exit 1")
        self.ok("enqueue", "--id", "second", "--after", "first", "true")
        self.ok("enqueue", "--id", "third", "--after", "second", "true")
        named, all_of_them = self.terminal("wait", "third"), self.terminal("wait")
        named.until("1 left")
        all_of_them.until("3 left")
        self.workers(1)
        meeting.arrived()
        meeting.let_go()
        self.assertEqual(named.rest()[0], 1)
        self.assertEqual(all_of_them.rest()[0], 1)
        self.assertEqual(self.states(), {"first": "dead", "second": "blocked",
                                         "third": "blocked"})

    def test_who_looks_long_rests_long(self):
        """Or a look at a million jobs would follow the other."""
        clock = mock.Mock(now=1000.0)
        clock.monotonic = lambda: clock.now
        clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
        queue = mock.Mock()
        with mock.patch.object(queuectl, "time", clock):
            for changed, until, rest, slept in ((True, math.inf, 0, 0), (True, math.inf, 3, 3),
                                                (False, math.inf, 0, queuectl.TICK),
                                                (False, math.inf, 3, 3), (True, 1000.5, 3, 0.5)):
                clock.now = 1000.0
                queue.changed.return_value = changed
                queuectl._await_change(queue, until, rest)
                self.assertAlmostEqual(clock.now - 1000.0, slept, delta=0.03)

    def test_the_time_of_the_terminal_is_not_counted(self):
        """Ctrl-S holds the progress: nobody should have to rest for ten times as long."""
        self.ok("enqueue", "--id", "a", "true")
        clock, rests = mock.Mock(now=1000.0), []
        clock.monotonic, clock.time = (lambda: clock.now), time.time

        def rest(queue, until, rest):
            rests.append(rest)
            queue.cancel(["a"])
        with mock.patch.object(queuectl, "time", clock), Queue(self.db) as queue, \
                mock.patch.object(queuectl, "_await_change", rest):
            with self.assertRaises(QueueError):
                queuectl.wait_for(queue, [], None, None, lambda *words: setattr(
                    clock, "now", clock.now + 100))
        self.assertEqual(rests, [0.0])

    def test_inside_a_job(self):
        """A job that waits does not wait for itself, named or not."""
        queue = "%s %s" % (shlex.quote(sys.executable), shlex.quote(SCRIPT))
        self.ok("enqueue", "--id", "other", "true")
        for id, words in (("named", "wait --timeout 1 other named"),
                          ("only", "wait --timeout 1 only"), ("all", "wait --timeout 1")):
            self.ok("enqueue", "--id", id, "--max-retries", 1, queue + " " + words)
        self.drain()
        for id in ("named", "only", "all"):
            job = self.job(id)
            self.assertEqual((id, job.state, job.attempts, job.last_error),
                             (id, "completed", 1, None))

    def test_no_progress_where_nobody_looks(self):
        """Without a terminal nothing is printed but how it ended; where only stdout is none, the
        progress is still on stderr."""
        self.various()
        self.assertEqual(self.cli("wait", "bad", "good"),
                         (1, "", "queuectl: 1 job has not completed: bad is dead\n"))
        with open(self.path("out"), "wb") as file:
            code, shown = self.terminal("wait", "bad", "good", stdout=file).rest()
        self.assertEqual((code, read_file(self.path("out"))), (1, b""))
        self.assertIn("1 done, 1 failed, 0 left", shown)

    def test_interrupted(self):
        """Ctrl-C: 130, and no traceback."""
        self.ok("enqueue", "true")
        waiting = self.terminal("wait")
        waiting.until("1 left")
        waiting.press(b"\x03")
        code, shown = waiting.rest()
        self.assertEqual(code, 130)
        self.assertNotIn("Traceback", shown)


class Logs(Everyday):
    """logs ID [-f] [--run N]"""

    NOTE = re.compile(rb"\n\[queuectl: (\d+) bytes were missed\]\n")

    def setUp(self):
        super().setUp()
        self.ok("config", "set", "backoff_base", 0)

    def test_finished(self):
        """The last run's output; with --run N that of the job's Nth run, from 1."""
        with Queue(self.db) as queue:
            queue.enqueue("true", id="other")
            self.settle(queue)
            queue.enqueue("true", id="a", max_retries=2)
            self.refused("logs", "a", code=1, says="not run yet")
            for text in (b"first\n", b"second\n"):
                self.settle(queue, "failed", text)
            queue.retry(["a"])
            self.settle(queue, "completed", b"third\n")
        for words, expected in ((("a",), "third\n"), (("-f", "a"), "third\n"),
                                (("other",), "")):
            self.assertEqual(self.ok("logs", *words), expected)
        for number, text in enumerate(("first\n", "second\n", "third\n"), 1):
            self.assertEqual(self.ok("logs", "a", "--run", number), text)
            self.assertEqual(self.ok("logs", "--run", number, "-f", "a"), text)
        self.refused("logs", "a", "--run", 4, code=1, says="3 runs")
        self.refused("logs", "a", "--run", 0, code=2)
        self.refused("logs", "nobody", code=1, says="nobody")
        self.refused("logs", "-f", "nobody", code=1, says="nobody")

    def test_running(self):
        """What a running job has printed so far."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "a", "echo begin; %s; echo end" % meeting.here)
        self.workers(1)
        meeting.arrived()
        self.until(lambda: self.ok("logs", "a"))
        self.assertEqual(self.ok("logs", "a"), "begin\n")
        self.assertEqual(self.ok("logs", "a", "--run", 1), "begin\n")
        meeting.let_go()
        self.until_state("a", "completed")
        self.assertEqual(self.ok("logs", "a"), "begin\nend\n")

    def test_follow(self):
        """-f goes with a job from before its start, run after run, to its end, and ends by
        itself: through a pipe, on a terminal, and with --run at the end of that run."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "a", "--max-retries", 3,
                "echo $QUEUECTL_ATTEMPT; %s; test $QUEUECTL_ATTEMPT = 3" % meeting.here)
        follower, screen = self.piped("logs", "-f", "a"), self.terminal("logs", "-f", "a")
        self.workers(1)
        for text in (b"1\n", b"2\n", b"3\n"):
            meeting.arrived()
            self.assertEqual(self.read_until(follower, text), text)
            screen.until(r"(?m)^%s\r$" % text.decode().strip())
            if text == b"2\n":
                one = self.piped("logs", "-f", "--run", "2", "a")
                self.assertEqual(self.read_until(one, text), text)
            meeting.let_go()
            if text == b"2\n":
                self.assertEqual(self.ended(one), (0, b"", ""))
        self.assertEqual(self.ended(follower), (0, b"", ""))
        code, shown = screen.rest()
        self.assertEqual((code, re.sub(r"\Aqueuectl: no worker[^\n]*\n", "", shown)),
                         (0, "1\n2\n3\n"))

    def test_follow_what_never_runs(self):
        """-f of a waiting job ends when that is cancelled."""
        self.ok("enqueue", "--id", "a", "true")
        follower = self.piped("logs", "-f", "a")
        self.ok("cancel", "a")
        self.assertEqual(self.ended(follower), (0, b"", ""))

    def test_interrupted(self):
        """Ctrl-C ends the follower (130) and leaves the job alone."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "a", "echo here; " + meeting.here)
        self.workers(1)
        meeting.arrived()
        screen = self.terminal("logs", "-f", "a")
        screen.until("here")
        screen.press(b"\x03")
        code, shown = screen.rest()
        self.assertEqual(code, 130)
        self.assertNotIn("Traceback", shown)
        meeting.let_go()
        self.assertEqual(self.until_state("a", "completed", "dead").state, "completed")

    def test_closed_pipe(self):
        """`logs -f | head -n1`: the reader's end is its end, without a word."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "a", "echo one; %s; echo two" % meeting.here)
        self.workers(1)
        meeting.arrived()
        follower = self.piped("logs", "-f", "a")
        self.read_until(follower, b"one\n")
        follower.stdout.close()
        meeting.let_go()
        self.assertEqual(follower.wait(PATIENCE), 0)
        self.assertEqual(read_file(follower.log), b"")
        self.assertEqual(self.until_state("a", "completed", "dead").state, "completed")

    def heard(self, data):
        """(bytes of output, bytes that notes say were missed) of what a follower printed."""
        missed = sum(int(note) for note in self.NOTE.findall(data))
        return len(self.NOTE.sub(b"", data)), missed

    def test_fast_printer(self):
        """A job that prints faster than anybody reads: the follower is told how many bytes it
        missed, and always sees the end."""
        start, meeting = self.meeting("start"), self.meeting()
        self.ok("enqueue", "--id", "a", "echo start; %s; head -c 5000000 /dev/zero | tr '\\0' x; "
                "%s; echo; echo 'THE END'" % (start.here, meeting.here))
        early = self.piped("logs", "-f", "a")
        self.workers(1)
        start.arrived()
        self.read_until(early, b"start\n")  # and nothing more before the job has ended
        start.let_go()
        meeting.arrived()
        late = self.piped("logs", "-f", "a")
        seen = os.read(late.stdout.fileno(), 65536)  # the follower has begun
        meeting.let_go()
        self.until_state("a", "completed")
        code, out, err = self.ended(late)
        self.assertEqual((code, err), (0, ""))
        data = seen + out
        self.assertTrue(data.endswith(b"xx\nTHE END\n"), data[-100:])
        self.assertRegex(data, self.NOTE)
        self.assertEqual(sum(self.heard(data)), 5000015)
        code, data, err = self.ended(early)
        self.assertEqual((code, err), (0, ""))
        self.assertTrue(data.endswith(b"xx\nTHE END\n"), data[-100:])
        self.assertEqual(sum(self.heard(data)), 5000009)

    def test_output_limit(self):
        """The first quarter and the rest from the end are kept, and between them a line that
        says how much is missing; what fits is kept as it is."""
        self.ok("config", "set", "output_limit", 100)
        text = "".join("%04d" % number for number in range(250))
        self.ok("enqueue", "--id", "long", "printf %s " + text)
        self.ok("enqueue", "--id", "fits", "printf %s " + text[:100])
        self.ok("enqueue", "--id", "over", "printf %s " + text[:101])
        self.drain()
        line = "\n[queuectl: %d bytes are not kept (output_limit)]\n"
        self.assertEqual(self.ok("logs", "long"), text[:25] + line % 900 + text[-75:])
        self.assertEqual(self.ok("logs", "fits"), text[:100])
        self.assertEqual(self.ok("logs", "over"), text[:25] + line % 1 + text[26:101])
        self.ok("config", "set", "output_limit", 0)
        self.ok("enqueue", "--id", "none", "echo 12345")
        self.drain()
        self.assertEqual(self.ok("logs", "none"), line % 6)

    def test_raw_bytes(self):
        """Byte for byte what the job printed: no UTF-8, NUL and escapes included."""
        self.ok("enqueue", "--id", "a", r"printf '\377\000\033[31m\r\nx'")
        self.drain()
        self.assertEqual(self.ended(self.piped("logs", "a")),
                         (0, b"\xff\x00\x1b[31m\r\nx", ""))


class Cancel(Everyday):
    """cancel ID ..."""

    def test_waiting(self):
        """A pending job, for later, blocked or waiting for its retry, will not run."""
        with Queue(self.db) as queue:
            queue.enqueue("false", id="failed")
            self.settle(queue, "failed")
            queue.enqueue("true", id="ready")
            queue.enqueue("true", id="scheduled", delay=3600)
            queue.enqueue("true", id="blocked", after=["scheduled"])
        self.assertEqual(sorted(self.states().values()), ["blocked", "failed", "pending",
                                                          "scheduled"])
        self.assertEqual(self.main("cancel", "ready", "scheduled", "blocked", "failed"),
                         (0, "", ""))
        self.assertEqual(set(self.states().values()), {"cancelled"})
        with Queue(self.db) as queue:
            self.assertEqual(self.settle_all(queue), [])

    def test_running(self):
        """A running job is ended, and its record says so."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "a", "echo begun; " + meeting.here)
        self.workers(1)
        meeting.arrived()
        code, out, err = self.main("cancel", "a")
        self.assertEqual((code, out), (0, ""))
        meeting.gone()
        job = self.until_state("a", "cancelled")
        self.assertIn("cancelled", job.last_error)
        self.assertEqual((job.locked_by, job.exit_code), (None, None))
        run, = self.runs("a")
        self.assertEqual((run.outcome, run.signal), ("cancelled", signal.SIGTERM))
        self.assertEqual(self.output("a"), b"begun\n")

    def test_whole_tree(self):
        """Who ignores SIGTERM, children included, gets SIGKILL after kill_grace."""
        self.ok("config", "set", "kill_grace", "0.1")
        meeting = self.meeting()
        self.ok("enqueue", "--id", "a",
                "trap '' TERM; exec 9>%s; sh -c 'trap \"\" TERM; sleep 1000; :' & %s; wait"
                % (shlex.quote(meeting.paths["alive"]), meeting.here))
        self.workers(1)
        meeting.arrived()
        self.ok("cancel", "a")
        meeting.gone()
        self.until_state("a", "cancelled")
        self.assertEqual(self.runs("a")[0].signal, signal.SIGKILL)

    def test_polite_leader_stubborn_child(self):
        """The leader's end is not the job's: a child that ignores SIGTERM is ended, too."""
        self.ok("config", "set", "kill_grace", "0.1")
        meeting = self.meeting()
        child = shlex.quote("trap '' TERM; %s; sleep 1000; :" % meeting.here)
        self.ok("enqueue", "--id", "a", "exec 9>%s; sh -c %s & wait" % (
            shlex.quote(meeting.paths["alive"]), child))
        self.workers(1)
        meeting.arrived()
        meeting.let_go()
        self.ok("cancel", "a")
        meeting.gone()
        self.until_state("a", "cancelled")

    def test_by_a_dead_worker(self):
        """A job whose worker and supervisor are dead is ended by whoever cancels it."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "a", meeting.here)
        supervisor = self.workers(1)
        meeting.arrived()
        with Queue(self.db) as queue:
            worker, = queue.workers()
        supervisor.send_signal(signal.SIGSTOP)
        os.kill(worker.pid, signal.SIGKILL)
        supervisor.kill()
        supervisor.wait()
        with Queue(self.db) as queue:
            self.until(lambda: not queue.workers(supervisors=True))
        err = self.main("cancel", "a")
        meeting.gone()
        self.assertEqual(self.job("a").state, "cancelled", (err, self.runs("a")))
        run, = self.runs("a")
        self.assertEqual(run.outcome, "lost")
        self.drain()
        self.assertEqual((self.job("a").state, len(self.runs("a"))), ("cancelled", 1))

    def test_race_in_the_database(self):
        """Cancel and settle at once: one wins, and both parties learn who."""
        with Queue(self.db, durable=False) as queue:
            for number in range(150):
                id = "job%d" % number
                queue.enqueue("true", id=id)
                claim = queue.turn(None, "nobody", "nobody.0")[1]
                start = threading.Barrier(2)
                errors = []

                def cancel():
                    with Queue(self.db, durable=False) as other:
                        start.wait()
                        try:
                            other.cancel([id])
                        except QueueError as error:
                            errors.append(str(error))
                thread = threading.Thread(target=cancel)
                thread.start()
                start.wait()
                settled = self.finish(queue, claim, ("completed", "failed")[number % 2])
                thread.join()
                job = queue.get(id)
                self.assertEqual((job.cancel, job.locked_by), (0, None), "a request is left")
                if number % 2:  # it failed: the cancel holds, before or after the settle
                    self.assertEqual((job.state, errors), ("cancelled", []))
                    self.assertIn(settled.state, ("cancelled", "pending"))
                else:  # success wins: the cancel was refused, or came too late to matter
                    self.assertEqual((job.state, settled.state), ("completed", "completed"))

    def test_race_with_its_end(self):
        """A job that ends while it is cancelled: it has completed or it was cancelled, its
        run agrees, and it never runs again."""
        self.workers(1)
        meeting = self.meeting()
        for number in range(25):
            id = "job%d" % number
            self.ok("enqueue", "--id", id, meeting.here)
            meeting.arrived()
            start = threading.Barrier(2)

            def let_go():
                start.wait()
                meeting.let_go()
            thread = threading.Thread(target=let_go)
            thread.start()
            with Queue(self.db) as queue:
                start.wait()
                with contextlib.suppress(QueueError):
                    queue.cancel([id])
            thread.join()
            meeting.gone()
            job = self.until_state(id, "completed", "cancelled", "dead")
            run, = self.runs(id)
            with contextlib.suppress(BlockingIOError):  # the word that nobody took
                os.read(meeting.go, 100)
            self.assertEqual(run.outcome, job.state)
            self.assertIn(job.state, ("completed", "cancelled"))
            if job.state == "completed":  # (a cancelled one may have been at its exit 0)
                self.assertEqual(job.exit_code, 0)

    def test_retry(self):
        """dlq retry takes a cancelled job, with attempts at 0; --all takes dead ones only."""
        with Queue(self.db) as queue:
            queue.enqueue("true", id="a")
            queue.enqueue("false", id="b", max_retries=1)
            queue.cancel(["a"])
            self.settle_all(queue, "failed")
            self.ok("dlq", "retry", "--all")
            self.assertEqual(self.states(), {"a": "cancelled", "b": "pending"})
            self.ok("dlq", "retry", "a")
            self.assertEqual(self.settle_all(queue), ["a", "b"])
        self.assertEqual(self.job("a").attempts, 1)

    def test_refused(self):
        """Unknown and ended jobs are errors, and then nothing is touched."""
        with Queue(self.db) as queue:
            queue.enqueue("true", id="done")
            self.settle_all(queue)
            queue.enqueue("true", id="dead", max_retries=1)
            self.settle_all(queue, "failed")
            queue.enqueue("true", id="waiting")
        before = self.ok("list", "--json")
        for ids in (("nobody",), ("done",), ("dead",), ("waiting", "nobody"),
                    ("waiting", "done"), ("dead", "waiting")):
            self.refused("cancel", *ids, code=1,
                         says=[id for id in ids if id != "waiting"][0])
        self.refused("cancel", code=2)
        self.assertEqual(self.ok("list", "--json"), before)


class Unique(Everyday):
    """enqueue --unique KEY"""

    def test_second_one(self):
        """While a job with the key has not ended, another prints its id and a note, and stores
        nothing: pending, waiting for a retry, and processing. It may use the same id."""
        self.ok("enqueue", "--id", "a", "--unique", "k", "true")
        queue = self.queue()

        def again():
            code, out, err = self.main("enqueue", "--unique", "k", "something else")
            self.assertEqual((code, out), (0, "a\n"))
            self.assertRegex(err, r"\Aqueuectl: a [^\n]*\bk\b[^\n]*\n\Z")
            self.assertEqual(list(self.states()), ["a"])
        again()
        claim = queue.turn(None, "nobody", "nobody.0")[1]
        self.assertEqual(self.ok("enqueue", "--unique", "k", "x"), "a\n")
        self.finish(queue, claim, "failed")
        self.assertEqual(self.job("a").view, "failed")
        again()
        self.assertEqual(self.job("a").command, "true")
        self.assertEqual(self.job("a").unique, "k")

    def test_free_again(self):
        """The key is free once its job has completed, died or been cancelled."""
        with Queue(self.db) as queue:
            for number, end in enumerate((
                    lambda: self.settle(queue), lambda: queue.cancel(["job1"]),
                    lambda: self.settle(queue, "failed"), lambda: None)):
                self.assertEqual(self.ok("enqueue", "--id", "job%d" % number, "--unique", "k",
                                         "--max-retries", 1, "true"), "job%d\n" % number)
                end()
        self.assertEqual(self.states(), {"job0": "completed", "job1": "cancelled",
                                         "job2": "dead", "job3": "pending"})

    def test_in_bulk(self):
        """In a file, too: repeated keys store one job, and each line gets its id."""
        self.ok("enqueue", "--id", "a", "--unique", "k1", "true")
        out = self.ok("enqueue", "--file", "-", stdin=self.bulk([
            {"command": "1", "unique": "k1"}, {"command": "2", "id": "b", "unique": "k2"},
            {"command": "3", "unique": "k2"}, {"command": "4", "id": "c"},
            {"command": "5", "id": "d", "unique": "k2"}]))
        self.assertEqual(out.split(), ["a", "b", "b", "c", "b"])
        self.assertEqual(list(self.states()), ["a", "b", "c"])

    def test_many_enqueuers(self):
        """Processes that enqueue one key at once all get one id."""
        keys = 40
        program = ("import os, sys; sys.path.insert(0, %r); import queuectl\n"
                   "with queuectl.Queue(%r) as queue:\n"
                   "    print('ready', flush=True)\n"
                   "    sys.stdin.readline()\n"
                   "    for key in range(%d):\n"
                   "        print(queue.enqueue('true', unique='k%%d' %% key))\n"
                   % (HERE, self.db, keys))
        crowd = [subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=self.env)
                 for _ in range(8)]
        for process in crowd:
            process.log = os.devnull
            self.processes.append(process)
        for process in crowd:
            self.assertEqual(process.stdout.readline(), b"ready\n")
        for process in crowd:
            process.stdin.write(b"go\n")
            process.stdin.flush()
        printed = {process.communicate(timeout=PATIENCE)[0] for process in crowd}
        self.assertEqual([process.returncode for process in crowd], [0] * 8, printed)
        self.assertEqual(len(printed), 1)
        self.assertEqual(list(self.states()), printed.pop().decode().split())
        self.assertEqual(len(self.states()), keys)

    def test_retry_conflict(self):
        """A dead job cannot come back while another one has its key."""
        with Queue(self.db) as queue:
            queue.enqueue("false", id="a", unique="k", max_retries=1)
            queue.enqueue("false", id="b", max_retries=1)
            self.settle_all(queue, "failed")
            queue.enqueue("true", id="c", unique="k")
            self.refused("dlq", "retry", "b", "a", code=1, says="k")
            self.assertEqual(self.states(), {"a": "dead", "b": "dead", "c": "pending"})
            code, out, err = self.main("dlq", "retry", "--all")  # those that can
            self.assertEqual((code, out), (0, ""))
            self.assertRegex(err, r"(?m)^queuectl: .*\ba\b.*\bk\b")
            self.assertEqual(self.states(), {"a": "dead", "b": "pending", "c": "pending"})
            self.settle_all(queue)
            self.ok("dlq", "retry", "a")
            self.assertEqual(self.settle_all(queue), ["a"])


class After(Everyday):
    """enqueue --after ID: a job runs once those that it names have completed."""

    def test_fan_in_and_out(self):
        """Each runs when all that it waits for have completed, and not before."""
        for id, after in (("root", ()), ("left", ("root",)), ("right", ("root",)),
                          ("end", ("left", "right", "left"))):
            self.ok("enqueue", "--id", id, *[word for name in after
                                             for word in ("--after", name)] + ["true"])
        self.assertEqual(self.job("end").after, ["left", "right"])
        with Queue(self.db) as queue:
            for expected in ("root", "left", "right", "end"):
                waiting = [id for id, view in self.states().items() if view == "blocked"]
                self.assertEqual(self.settle(queue).id, expected)
                self.assertNotIn(expected, waiting)
            self.assertIsNone(self.settle(queue))

    def test_with_workers(self):
        """Several workers keep the order, and an end wakes who can run now."""
        log = shlex.quote(self.path("order"))
        ids = ["job%d" % number for number in range(12)]
        self.ok("enqueue", "--file", "-", stdin=self.bulk(
            [{"id": id, "command": "echo %s >>%s" % (id, log), "after": ids[number - 1:number]}
             for number, id in enumerate(ids)]))
        self.workers(2)
        self.assertEqual(self.main("wait", "--timeout", "50"), (0, "", ""))
        self.assertEqual(read_file(self.path("order")).decode().split(), ids)

    def test_after_completed(self):
        """What has completed already is not waited for; run_at still counts."""
        with Queue(self.db) as queue:
            queue.enqueue("true", id="a")
            self.settle_all(queue)
            queue.enqueue("true", id="b", after=["a"])
            queue.enqueue("true", id="c", after=["a"], delay=3600)
            self.assertEqual(self.states(), {"a": "completed", "b": "pending",
                                             "c": "scheduled"})
            queue.enqueue("true", id="d", after=["b"], delay=3600)
            self.settle_all(queue)
            self.assertEqual(self.states()["d"], "scheduled")

    def test_blocked(self):
        """A dead or cancelled job blocks those behind it; list and show name it, and
        dlq retry heals the chain."""
        with Queue(self.db) as queue:
            for end in ("dead", "cancelled"):
                first, second, third = (end + "-" + name for name in ("one", "two", "three"))
                queue.enqueue("true", id=first, max_retries=1)
                queue.enqueue("true", id=second, after=[first])
                queue.enqueue("true", id=third, after=[second])
                self.assertIn(first + " (pending)", self.ok("show", second))
                if end == "dead":
                    self.settle_all(queue, "failed")
                else:
                    queue.cancel([first])
                self.assertIsNone(self.settle(queue))
                blocker = "%s (%s)" % (first, end)
                self.assertIn("blocked by " + blocker, self.ok("show", second))
                line, = [line for line in self.ok("list", "--state", "blocked").splitlines()
                         if line.startswith(second)]
                self.assertIn(blocker, line)
                self.ok("dlq", "retry", first)
                self.assertEqual(self.settle_all(queue), [first, second, third])

    def test_blocker_is_purged(self):
        """A purge keeps what a cancelled job waits for: when that is retried, it must not wait
        for a job that nobody can name."""
        with Queue(self.db) as queue:
            queue.enqueue("true", id="a", max_retries=1)
            queue.enqueue("true", id="b", after=["a"])
            self.settle_all(queue, "failed")
            queue.cancel(["b"])
            self.ok("dlq", "purge")
            self.ok("dlq", "retry", "b")
            self.assertIn("blocked by a (dead)", self.ok("show", "b"))
            self.assertEqual(self.main("wait", "b")[0], 1)
            self.ok("dlq", "retry", "a")
            self.assertEqual(self.settle_all(queue), ["a", "b"])

    def test_cancelled_then_healed(self):
        """A cancelled job whose blockers have completed meanwhile can run when retried."""
        with Queue(self.db) as queue:
            queue.enqueue("true", id="a")
            queue.enqueue("true", id="b", after=["a"])
            queue.cancel(["b"])
            self.assertEqual(self.settle_all(queue), ["a"])
            self.assertEqual(self.job("b").state, "cancelled")
            queue.retry(["b"])
            self.assertEqual(self.settle_all(queue), ["b"])

    def test_refused(self):
        """Unknown ids, a job behind itself, and circles: nothing is stored. In a file the
        error names the line, or the job."""
        self.ok("enqueue", "--id", "old", "true")
        self.refused("enqueue", "--after", "nobody", "true", code=1, says="nobody")
        self.refused("enqueue", "--id", "me", "--after", "me", "true", code=1, says="me")
        for jobs, says in (
                ([{"id": "x"}, {"id": "y", "after": "nobody"}], "nobody"),
                ([{"id": "x", "after": ["x"]}], "x"),
                ([{"id": "x", "after": ["y"]}, {"id": "y", "after": ["x"]}], "x y"),
                ([{"id": "x", "after": ["old", "z"]}, {"id": "y", "after": ["x"]},
                  {"id": "z", "after": ["y"]}, {"id": "free"}], "x y z")):
            jobs = [dict(job, command="true") for job in jobs]
            self.refused("enqueue", "--file", "-", stdin=self.bulk(jobs), code=1, says=says)
        self.refused("enqueue", "--file", "-", code=1, says="line 2", stdin=self.bulk(
            [{"command": "true"}, {"command": "true", "after": "nobody"}]))
        self.assertEqual(list(self.states()), ["old"])

    def test_forward_references(self):
        """In one file, a job may name one that stands further down."""
        self.ok("enqueue", "--file", "-", stdin=self.bulk([
            {"id": "c", "command": "true", "after": ["b", "a"]},
            {"id": "b", "command": "true", "after": ["a"]}, {"id": "a", "command": "true"}]))
        with Queue(self.db) as queue:
            self.assertEqual(self.settle_all(queue), ["a", "b", "c"])

    def test_long_chain(self):
        """Thousands in a row run in their order; a wait for the last one sees at once that
        the first is dead."""
        ids = ["job%d" % number for number in range(MANY)]
        with Queue(self.db, durable=False) as queue:
            self.ok("enqueue", "--file", "-", stdin=self.bulk(
                [{"id": id, "command": "true", "max_retries": 1, "after": ids[number - 1:number]}
                 for number, id in enumerate(ids)]))
            self.settle(queue, "failed")
            self.assertEqual(self.main("wait", ids[-1])[:2], (1, ""))
            self.assertEqual(self.main("wait")[:2], (1, ""))
            queue.retry(ids[:1])
            self.assertEqual(self.settle_all(queue), ids)

    def test_wide_fan(self):
        """One releases thousands, and thousands release one."""
        ids = ["job%d" % number for number in range(MANY)]
        with Queue(self.db, durable=False) as queue:
            self.ok("enqueue", "--file", "-", stdin=self.bulk(
                [{"id": "root", "command": "true"}]
                + [{"id": id, "command": "true", "after": ["root"]} for id in ids]
                + [{"id": "end", "command": "true", "after": ids}]))
            self.assertEqual(self.settle_all(queue), ["root"] + ids + ["end"])


class Queues(Everyday):
    """--queue, pause and resume"""

    def test_served(self):
        """Workers of some queues run jobs of these only, the more important ones first."""
        log = shlex.quote(self.path("order"))
        for id, queue, priority in (("a1", "a", 0), ("b1", "b", 5), ("c1", "c", 9),
                                    ("a2", "a", 7), ("d1", "default", 8)):
            self.ok("enqueue", "--id", id, "--queue", queue, "--priority", priority,
                    "echo %s $QUEUECTL_QUEUE >>%s" % (id, log))
        self.drain("--queue", "a", "--queue", "b", "--queue", "a")
        self.assertEqual(read_file(self.path("order")), b"a2 a\nb1 b\na1 a\n")
        self.drain()
        self.assertEqual(read_file(self.path("order"))[15:], b"c1 c\nd1 default\n")

    def test_list_of_a_queue(self):
        """list --queue shows that queue; one that nobody uses is empty, and no error."""
        for id, queue in (("a", "one"), ("b", "two"), ("c", "one")):
            self.ok("enqueue", "--id", id, "--queue", queue, "true")
        for queue, expected in (("one", ["a", "c"]), ("two", ["b"]), ("none", [])):
            jobs = json.loads(self.ok("list", "--queue", queue, "--json"))
            self.assertEqual([job["id"] for job in jobs], expected)

    def test_pause_one(self):
        """Jobs of a paused queue stand still, others go on, and resume wakes idle workers.
        What runs already goes on to its end."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "running", "--queue", "slow", meeting.here)
        self.workers(1)
        meeting.arrived()
        self.assertEqual(self.main("pause", "slow"), (0, "", ""))
        self.ok("pause", "slow")
        self.ok("enqueue", "--id", "paused", "--queue", "slow", "--priority", 9, "true")
        self.ok("enqueue", "--id", "other", "true")
        meeting.let_go()
        self.until_state("other", "completed")
        self.assertEqual((self.job("running").state, self.job("paused").state),
                         ("completed", "pending"))
        self.assertEqual(self.runs("paused"), [])
        self.assertEqual(self.main("resume", "slow"), (0, "", ""))
        self.until_state("paused", "completed")

    def test_pause_all(self):
        """pause without a name: nothing runs, and a drain does not wait for it. To resume one
        queue is not enough then, and a note says so."""
        self.ok("enqueue", "--id", "a", "--queue", "q", "true")
        self.ok("pause")
        self.ok("pause", "q")
        self.drain()
        code, out, err = self.main("resume", "q")
        self.assertEqual((code, out), (0, ""))
        self.assertRegex(err, r"\Aqueuectl: all queues are still paused[^\n]*\n\Z")
        self.drain()
        self.assertEqual(self.states(), {"a": "pending"})
        self.assertEqual(json.loads(self.ok("status", "--json"))["paused"], ["*"])
        self.assertIn("paused", self.ok("status"))
        self.ok("pause", "q")
        self.workers(1)
        self.assertEqual(self.main("resume"), (0, "", ""))
        self.until_state("a", "completed")
        self.assertEqual(json.loads(self.ok("status", "--json"))["paused"], [])


@unittest.skipIf(sys.platform == "win32", "needs terminals of Unix")
class Detach(Everyday):
    """worker start --detach, and --ensure: workers in the background"""

    def setUp(self):
        super().setUp()
        self.addCleanup(self.no_workers_left)

    def listed(self):
        return json.loads(self.ok("worker", "list", "--json"))

    def log_of(self, err):
        path = re.search(r"\blog: (\S+)", err).group(1)
        self.assertTrue(os.path.isfile(path), err)
        return path

    def test_background(self):
        """It returns once they run, names its log on stderr, and prints no data. They are
        listed and stopped like any others."""
        code, out, err = self.cli("worker", "start", "--detach", "--count", "2",
                                  "--queue", "a", "--queue", "b")
        self.assertEqual((code, out), (0, ""), err)
        self.assertRegex(err, r"\Aqueuectl: 2 workers started [^\n]*\n\Z")
        workers = self.listed()
        self.assertEqual(sorted((info["slot"], info["queues"], info["job"])
                                for info in workers), [(1, ["a", "b"], None),
                                                       (2, ["a", "b"], None)])
        self.ok("enqueue", "--id", "job1", "--queue", "b", "pwd; echo $QUEUECTL_WORKER")
        self.until_state("job1", "completed")
        self.until(lambda: b"job1 completed" in read_file(self.log_of(err)))
        code, out, err = self.main("worker", "stop")
        self.assertEqual((code, out), (0, ""))
        self.assertIn("2 workers stopped", err)
        self.assertEqual(self.listed(), [])

    def test_survives_its_terminal(self):
        """They go on when the terminal that started them is closed."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "a", meeting.here)
        shell = Terminal(self, ("sh", "-c", '"$0" "$1" worker start --detach; read line',
                                sys.executable, SCRIPT))
        shell.until(r"1 worker started .*log: \S+")
        meeting.arrived()
        shell.close()  # SIGHUP for the whole session
        shell.process.wait(PATIENCE)
        meeting.let_go()
        self.until_state("a", "completed")
        self.ok("enqueue", "--id", "b", "true")
        self.until_state("b", "completed")
        self.assertEqual(len(self.listed()), 1)

    def test_options(self):
        """--detach takes --drain, --via, --quiet and --log along."""
        self.ok("enqueue", "--id", "a", "echo job")
        log = self.path("my.log")
        code, out, err = self.cli("worker", "start", "--detach", "--drain", "--quiet", "--log",
                                  log, "--via", 'echo via; sh -c "$QUEUECTL_COMMAND"')
        self.assertEqual((code, out), (0, ""), err)
        self.until_state("a", "completed")
        self.assertEqual(self.output("a"), b"via\njob\n")
        self.until(lambda: not self.listed())
        self.assertEqual(self.log_of(err), log)
        self.assertEqual(read_file(log), b"")

    def test_failure_is_reported(self):
        """Where they cannot start, it says so and exits 1."""
        with mock.patch("sys.executable", shutil.which("false")):
            self.assertIn("log", self.refused("worker", "start", "--detach", code=1,
                                              says="did not start"))
        self.ok("status")
        os.chmod(self.db, 0o666)
        self.refused("worker", "start", "--detach", code=1, says="chmod")
        self.refused("worker", "start", "--ensure", code=1, says="chmod")
        os.chmod(self.db, 0o600)
        self.assertEqual(self.listed(), [])

    def test_log_that_cannot_be_written(self):
        """--log FILE in a folder that does not exist is refused, not ignored."""
        self.refused("worker", "start", "--drain", "--log", self.path("no", "such", "log"),
                     code=1, says="no/such")

    def test_log_is_bounded(self):
        """A log moves to NAME.1 when it is full: there are two files, neither much larger
        than the limit, and the newest line is in the first."""
        path = self.path("worker.log")
        options = queuectl.StartOptions(path=self.db, count=1, drain=False, queues=[], via=None,
                                        quiet=False, log=path)
        logs = [queuectl.Log(options, "worker %d" % slot) for slot in (1, 2)]
        self.addCleanup(lambda: [os.close(log._fd) for log in logs if log._fd > 2])
        with mock.patch("queuectl.LOG_LIMIT", 2000):
            for number in range(200):
                logs[number % 2].event("event %03d \x1b[31m" % number)
                for name in (path, path + ".1"):
                    if os.path.exists(name):
                        self.assertLess(os.stat(name).st_size, 2500)
        lines = (read_file(path + ".1") + read_file(path)).decode().splitlines()
        self.assertIn("worker 2: event 199", lines[-1])
        self.assertNotIn("\x1b", "".join(lines))
        self.assertEqual(sorted(os.listdir(self.dir))[-2:], ["worker.log", "worker.log.1"])
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)

    def test_ensure(self):
        """--ensure starts what is missing to make N for this choice of queues, and no more:
        when 8 do it at once, and after a supervisor has died."""
        crowd = [self.start("worker", "start", "--ensure", "--count", 3, "--queue", queue,
                            stdout=subprocess.DEVNULL) for queue in "aaaaaaab"]
        self.assertEqual([process.wait(PATIENCE) for process in crowd], [0] * 8,
                         [read_file(process.log) for process in crowd])

        def served():
            return sorted("".join(info["queues"] or "*") for info in self.listed())
        self.assertEqual(served(), list("aaabbb"))
        code, out, err = self.cli("worker", "start", "--ensure", "--count", "2", "--queue", "a")
        self.assertEqual((code, out), (0, ""))
        self.assertIn("enough", err)
        self.ok("worker", "start", "--ensure", "--count", 4, "--queue", "a")
        self.assertEqual(served(), list("aaaabbb"))
        with Queue(self.db) as queue:
            victim = [info for info in queue.workers(supervisors=True)
                      if not info.slot and info.count == 3 and info.queues == ["a"]][0]
            orphans = [info for info in queue.workers() if info.supervisor == victim.name]
        os.kill(victim.pid, signal.SIGKILL)
        self.until(lambda: not {info["name"] for info in self.listed()}
                   & {info.name for info in orphans})
        self.assertEqual(served(), list("abbb"))
        self.ok("worker", "start", "--ensure", "--count", 4, "--queue", "a")
        self.assertEqual(served(), list("aaaabbb"))
        self.ok("worker", "start", "--ensure")
        self.assertEqual(served(), list("*aaaabbb"))

    def test_ensure_does_not_count_on_who_leaves(self):
        """Workers that finish their last job after a signal take no other one."""
        meeting = self.meeting()
        self.ok("enqueue", "--id", "a", meeting.here)
        process = self.workers(1)
        meeting.arrived()
        process.send_signal(signal.SIGTERM)
        self.until(lambda: "(stopping)" in self.ok("worker", "list"))
        self.ok("worker", "start", "--ensure")
        self.assertEqual([info["job"] for info in self.listed()], ["a", None])
        meeting.let_go()
        self.assertEqual(process.wait(PATIENCE), 0)


class Via(Everyday):
    """worker start --via COMMAND"""

    def test_outcomes(self):
        """The job's command line is in $QUEUECTL_COMMAND, as it is; output, exit codes, a
        cancel and a timeout go through."""
        self.ok("config", "set", "kill_grace", "0.1")
        cancel, late = self.meeting("cancel"), self.meeting("late")
        line = "echo \"it's $QUEUECTL_JOB_ID\"  'two  blanks'; exit 7"
        self.ok("enqueue", "--id", "a", "--max-retries", 1, "--env", "X=job", line)
        self.ok("enqueue", "--id", "b", "--", "printf", "%s|", "a b", "$HOME", "'")
        self.ok("enqueue", "--id", "late", "--max-retries", 1, "--timeout", "0.2", late.here)
        self.ok("enqueue", "--id", "cancel", cancel.here)
        self.workers(1, "--via", 'sh -c "$QUEUECTL_COMMAND"')
        late.arrived()
        late.gone()
        cancel.arrived()
        self.ok("cancel", "cancel")
        cancel.gone()
        job = self.until_state("a", "dead")
        self.assertEqual((job.command, job.exit_code), (line, 7))
        self.assertEqual(self.output("a"), b"it's a two  blanks\n")
        self.assertEqual(self.output("b"), b"a b|$HOME|'|")
        self.assertEqual(self.until_state("late", "dead").view, "dead")
        self.assertEqual(self.runs("late")[0].outcome, "timeout")
        self.until_state("cancel", "cancelled")

    def test_nice(self):
        """A wrapper such as nice, which execs the command."""
        before = int(subprocess.check_output(["nice"]))
        self.ok("enqueue", "--id", "a", "nice")
        self.drain("--via", 'nice -n 3 sh -c "$QUEUECTL_COMMAND"')
        self.assertEqual(int(self.output("a")), min(before + 3, 19))

    def test_only_there(self):
        """Without --via there is no such variable, and a broken wrapper fails the job."""
        self.ok("enqueue", "--id", "a", "echo ${QUEUECTL_COMMAND-none}")
        self.drain()
        self.assertEqual(self.output("a"), b"none\n")
        self.ok("enqueue", "--id", "b", "--max-retries", 1, "true")
        self.drain("--via", "no-such-wrapper")
        self.assertEqual((self.job("b").state, self.job("b").exit_code), ("dead", 127))
        self.refused("worker", "start", "--via", "", code=2)


class Prune(Everyday):
    """prune, dlq purge, and the setting keep_completed"""

    def various(self, queue):
        queue.enqueue("true", id="good")
        self.settle_all(queue)
        for id in ("bad", "blocker"):
            queue.enqueue("true", id=id, max_retries=1)
        self.settle_all(queue, "failed")
        queue.enqueue("true", id="off")
        queue.enqueue("true", id="behind", after=["good", "blocker"])
        queue.cancel(["off"])

    def test_states(self):
        """Ended jobs go, or those of one state; others stay, and what an unfinished job
        waits for stays."""
        for words, left in (((), ["blocker", "behind"]),
                            (("--state", "completed"), ["bad", "blocker", "off", "behind"]),
                            (("--state", "dead"), ["good", "blocker", "off", "behind"]),
                            (("--state", "cancelled"), ["good", "bad", "blocker", "behind"]),
                            (("--older-than", "1h"),
                             ["good", "bad", "blocker", "off", "behind"])):
            with self.subTest(words):
                with Queue(self.db) as queue:
                    self.various(queue)
                    code, out, err = self.main("prune", *words)
                    self.assertEqual((code, out), (0, ""))
                    self.assertEqual(re.findall(r"\d+", err), [str(5 - len(left))])
                    self.assertEqual(list(self.states()), left)
                for name in os.listdir(self.dir):
                    if name.startswith("q.db") and not name.endswith("-run"):
                        os.unlink(self.path(name))
        self.refused("prune", "--state", "pending", code=2)
        self.refused("prune", "--older-than", "soon", code=2)

    def test_purge(self):
        """dlq purge: dead jobs only."""
        with Queue(self.db) as queue:
            self.various(queue)
        self.ok("dlq", "purge", "--older-than", "1h")
        self.assertEqual(len(self.states()), 5)
        self.ok("dlq", "purge")
        self.assertEqual(list(self.states()), ["good", "blocker", "off", "behind"])

    def test_age(self):
        """--older-than counts from the job's end."""
        with Queue(self.db) as queue:
            queue.enqueue("true", id="old")
            with mock.patch("queuectl.time.time", return_value=time.time() - 7200):
                self.settle(queue)
            queue.enqueue("true", id="new")
            self.settle(queue)
        self.ok("prune", "--older-than", "1h")
        self.assertEqual(list(self.states()), ["new"])

    def tables(self):
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            return [db.execute("SELECT count(*) FROM " + name).fetchone()[0]
                    for name in ("jobs", "runs", "deps")]

    def test_rows_and_space(self):
        """With a job go its runs and what it waited for, and the file gets smaller."""
        ids = ["job%d" % number for number in range(400)]
        with Queue(self.db, durable=False) as queue:
            list(queue.enqueue_many({"id": id, "command": "true", "after": ids[:1][:number]}
                                    for number, id in enumerate(ids)))
            while self.settle(queue, output=b"x" * 8000):
                pass
        full = os.stat(self.db).st_size
        self.assertEqual(self.tables(), [400, 400, 399])
        self.ok("prune")
        self.assertEqual(self.tables(), [0, 0, 0])
        self.assertLess(os.stat(self.db).st_size, full / 4)

    def test_keep_completed(self):
        """Idle workers delete completed jobs past keep_completed, a few at a time, and no
        others; 0 keeps them for ever."""
        self.ok("config", "set", "keep_completed", 0)
        with Queue(self.db, durable=False) as queue:
            self.various(queue)
            list(queue.enqueue_many({"command": "true"} for _ in range(250)))
            while self.settle(queue):
                pass
        program = self.path("often.py")
        with open(program, "w") as file:
            file.write("import sys; sys.path.insert(0, %r); import queuectl\n"
                       "queuectl.HOUSEKEEPING = 0.01\n"
                       "if __name__ == '__main__': sys.exit(queuectl.main())\n" % HERE)
        with mock.patch("%s.SCRIPT" % __name__, program):
            self.workers(1)
        self.ok("enqueue", "--id", "mark", "true")  # the worker has been idle, and is again
        self.until_state("mark", "completed")
        self.assertEqual(len(self.states()), 256)
        self.ok("config", "set", "keep_completed", "0.001")
        self.until(lambda: len(self.states()) == 4)
        self.assertEqual(list(self.states()), ["bad", "blocker", "off", "behind"])


class Metrics(Everyday):
    """metrics: the text format of Prometheus"""

    NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
    LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'
    SAMPLE = re.compile(r"(%s)(?:\{(%s(?:,%s)*)?\})? (-?[0-9.e+-]+|NaN|[+-]Inf)\Z"
                        % (NAME, LABEL, LABEL))

    def samples(self):
        """{(name, ((label, value), ...)): number}; fails where a line is not as it should."""
        text, found, kinds, family = self.ok("metrics"), {}, {}, None
        self.assertTrue(text.endswith("\n"))
        for line in text.splitlines():
            if line.startswith("# "):
                _, word, name, rest = line.split(" ", 3)
                self.assertRegex(name, r"\A%s\Z" % self.NAME)
                if word == "HELP":
                    self.assertNotIn(name, kinds, "a family must be in one piece")
                    kinds[name], family = None, name
                else:
                    self.assertEqual((word, name, kinds[name]), ("TYPE", family, None))
                    self.assertIn(rest, ("counter", "gauge", "summary"))
                    kinds[name] = rest
                    self.assertEqual(name.endswith("_total"), rest == "counter")
                continue
            match = self.SAMPLE.match(line)
            self.assertTrue(match, line)
            name, labels = match.group(1), tuple(re.findall(self.LABEL, match.group(2) or ""))
            self.assertEqual(re.sub("_(sum|count)$", "", name) if kinds[family] == "summary"
                             else name, family)
            self.assertTrue(name.startswith("queuectl_"))
            self.assertNotIn((name, labels), found, "sampled twice")
            found[name, labels] = float(match.group(match.lastindex))
        self.assertNotIn(None, kinds.values())
        return found

    def busy(self, queue):
        list(queue.enqueue_many([
            {"id": "a", "command": "true"}, {"id": "b", "command": "false", "max_retries": 2},
            {"id": "c", "command": "true", "delay": 3600},
            {"id": "d", "command": "true", "after": ["c"]},
            {"id": "e", "command": "true", "queue": "mail", "priority": -1}]))
        self.settle(queue)
        self.settle(queue, "failed")

    def test_numbers(self):
        """What they count, by queue and state or outcome."""
        self.assertEqual(self.samples()["queuectl_workers", (("state", "idle"),)], 0)
        with Queue(self.db) as queue:
            self.busy(queue)
            found = self.samples()

        def jobs(queue, state):
            return found["queuectl_jobs", (("queue", queue), ("state", state))]
        for state, expected in (("pending", 0), ("scheduled", 1), ("blocked", 1), ("failed", 1),
                                ("processing", 0), ("completed", 1), ("dead", 0),
                                ("cancelled", 0)):
            self.assertEqual(jobs("default", state), expected, state)
        self.assertEqual(jobs("mail", "pending"), 1)
        self.assertEqual(found["queuectl_runs_total", (("queue", "default"),
                                                       ("outcome", "failed"))], 1)
        self.assertEqual(found["queuectl_run_seconds_count", (("queue", "default"),)], 2)
        self.assertEqual(found["queuectl_run_seconds_sum", (("queue", "default"),)], 1)
        self.assertGreaterEqual(found["queuectl_oldest_ready_seconds", ()], 0)

    def test_workers(self):
        """How many workers there are, and what they do."""
        meeting = self.meeting()
        self.ok("enqueue", meeting.here)
        self.workers(2)
        meeting.arrived()
        found = self.samples()
        self.assertEqual([found["queuectl_workers", (("state", state),)]
                          for state in ("busy", "idle")], [1, 1])
        meeting.let_go()

    def test_counters_stay(self):
        """A counter never falls, whatever is deleted."""
        with Queue(self.db) as queue:
            self.busy(queue)
            queue.cancel(["b", "d"])
            before = self.samples()
            self.ok("prune")
            after = self.samples()
            self.assertEqual(list(self.states()), ["c", "e"])
            with mock.patch("queuectl.time.time", return_value=time.time() + 90000):
                queue.fold_stats(time.time() + 90000)
                later = self.samples()
        for key, value in before.items():
            if "_total" in key[0] or "_seconds_" in key[0]:
                self.assertEqual((after[key], later[key]), (value, value), key)

    def test_escaping(self):
        """Names of queues with quotes and backslashes."""
        name = 'a"b\\c{d}=,\u00e9'
        with Queue(self.db) as queue:
            queue.enqueue("true", queue=name)
            self.settle(queue)
        label = ("queue", name.replace("\\", "\\\\").replace('"', '\\"'))
        found = self.samples()
        self.assertEqual(found["queuectl_jobs", (label, ("state", "completed"))], 1)
        self.assertEqual(found["queuectl_run_seconds_count", (label,)], 1)

    @unittest.skipUnless(shutil.which("promtool"), "promtool is not installed")
    def test_promtool(self):
        """Prometheus's own judge has nothing to say."""
        with Queue(self.db) as queue:
            self.busy(queue)
        done = subprocess.run(["promtool", "check", "metrics"], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, input=self.ok("metrics").encode())
        self.assertEqual((done.returncode, done.stdout), (0, b""))


class Status(Everyday):
    """status [--json] [--watch]"""

    def test_json(self):
        """Its keys, and a count for every state and view."""
        with Queue(self.db) as queue:
            for id in "ab":
                queue.enqueue("true", id=id, max_retries=2)
            self.settle(queue)
            self.settle(queue, "failed")
            queue.enqueue("true", delay=3600, queue="mail")
            queue.enqueue("true", after=["b"])
            queue.enqueue("true")
        status = json.loads(self.ok("status", "--json"))
        self.assertEqual(status["database"], self.db)
        self.assertEqual(status["jobs"], {
            "pending": 4, "processing": 0, "completed": 1, "dead": 0, "cancelled": 0,
            "failed": 1, "scheduled": 1, "blocked": 1})
        self.assertEqual(status["workers"], [])
        self.assertEqual(status["paused"], [])
        self.assertEqual(status["queues"]["mail"], {
            "pending": 1, "processing": 0, "completed": 0, "dead": 0, "cancelled": 0,
            "failed": 0, "scheduled": 1, "blocked": 0})
        self.assertGreaterEqual(status["oldest_ready_seconds"], 0)
        self.assertEqual(status["last_hour"], {"runs": 2, "failed": 1, "mean_seconds": 0.5})

    def test_empty(self):
        """Nothing waits, so nothing is amiss; and oldest_ready_seconds is null."""
        code, out, err = self.main("status")
        self.assertEqual((code, err), (0, ""))
        self.assertIn(self.db, out)
        self.assertIsNone(json.loads(self.ok("status", "--json"))["oldest_ready_seconds"])

    def test_warning(self):
        """When jobs wait and no worker runs, it says so, on stderr; not when one runs."""
        self.ok("enqueue", "--delay", "1h", "true")
        for words in (("status",), ("status", "--json")):
            code, out, err = self.main(*words)
            self.assertEqual(code, 0)
            self.assertNotIn("worker start", out)
            if words == ("status",):
                self.assertRegex(err, r"\Aqueuectl: 1 job waits [^\n]*worker start[^\n]*\n\Z")
        self.workers(2)
        code, out, err = self.main("status")
        self.assertEqual((code, err), (0, ""))
        self.assertNotIn("no worker", out)
        workers = json.loads(self.ok("status", "--json"))["workers"]
        self.assertEqual(sorted(info["slot"] for info in workers), [1, 2])
        self.assertEqual(workers, json.loads(self.ok("worker", "list", "--json")))

    def test_what_is_amiss(self):
        """One line on stderr says what does not go well by itself, the worst first."""
        def warns(text):
            code, out, err = self.main("status")
            self.assertEqual(code, 0)
            self.assertRegex(err, r"\Aqueuectl: [^\n]*%s[^\n]*\n\Z" % text)
        with Queue(self.db) as queue:
            queue.enqueue("true", id="a")
            queue.enqueue("true", id="b", after=["a"])
            warns("2 jobs wait and no worker runs")
            queue.pause()
            warns("all queues are paused")
            queue.resume()
            queue.cancel(["a"])
            warns("blocked jobs wait for has ended badly")
            queue.retry(["a"])
            claim = queue.turn(None, "dead")[1]
            self.assertEqual(claim.id, "a")
            warns("1 job was left by a dead worker; to take up again: worker start")
            self.assertEqual(json.loads(self.ok("status", "--json"))["orphaned"], 1)

    def test_rate(self):
        """In whole numbers, however many."""
        clock = mock.patch("time.time", lambda: 1800000000.0)
        with clock, Queue(self.db) as queue:
            queue._execute("INSERT INTO stats VALUES (?, 'q', 'completed', 26144, 1.0)",
                           (1800000000 // 60,))
            self.assertIn("rate      5229 runs a minute in 5 minutes; 26144 in the last hour",
                          self.ok("status"))

    def test_paused(self):
        """Paused queues are named, also those without a job."""
        self.ok("enqueue", "--queue", "mail", "true")
        for name in ("mail", "empty"):
            self.ok("pause", name)
        lines = [line.split() for line in self.ok("status").splitlines()
                 if line.endswith("paused")]
        self.assertEqual([line[0] for line in lines], ["empty", "mail"])
        self.assertEqual(json.loads(self.ok("status", "--json"))["paused"], ["empty", "mail"])
        self.ok("resume")
        self.assertNotIn("paused", self.ok("status"))

    def test_watch(self):
        """--watch redraws the same place, within the width of the terminal, until Ctrl-C."""
        with Queue(self.db) as queue:
            for id in ("good", "x" * 70, "other"):
                queue.enqueue("true", id=id, queue="queue-" + id, max_retries=1)
            self.settle(queue)
            self.settle(queue, "failed")
        self.ok("pause", "queue-other")
        screen = self.terminal("status", "--watch", columns=60, lines=20)
        screen.until(r"\x1b\[H[^\x00]*1 pending[^\x00]*\x1b\[J")
        self.ok("enqueue", "--queue", "new", "true")
        screen.until(r"\x1b\[H[^\x00]*2 pending[^\x00]*\x1b\[J")
        screen.press(b"\x03")
        code, shown = screen.rest()
        self.assertEqual(code, 130)
        self.assertNotIn("Traceback", shown)
        frames = shown.split("\x1b[H")[1:]
        self.assertGreater(len(frames), 1)
        for frame in frames:
            lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).split("\n")
            self.assertLess(len(lines), 21)
            for line in lines:
                self.assertLessEqual(len(line), 60, line)

    def test_watch_without_a_terminal(self):
        """Where nobody looks, it shows the status once."""
        self.assertIn("database", self.ok("status", "--watch"))


@unittest.skipIf(sys.platform == "win32", "needs terminals of Unix")
class Tables(Everyday):
    """Tables for people: they fit the terminal, and colour is for terminals only."""

    COMMANDS = ("list", "dlq list", "worker list", "config list", "show dead", "status")
    PROGRAM = ("import sys; sys.path.insert(0, %r); import queuectl\n"
               "for line in sys.argv[1:]:\n"
               "    print('== ' + line, flush=True)\n"
               "    queuectl.main(line.split())\n" % HERE)

    def fill(self):
        long, meeting = "with-a-very-long-name-" * 4, self.meeting()
        with Queue(self.db) as queue:
            queue.enqueue("echo " + "word " * 40, id="dead", max_retries=1)
            self.settle(queue, "failed", error="exit code 1: " + "reason " * 20)
            queue.enqueue("true \x1b[31m\nsecond line", id="job-" + long, queue="queue-" + long)
            self.settle(queue)
            queue.enqueue("true", id="blocked", after=["dead"])
            queue.enqueue("true", id="blocked-" + long, after=["dead"])
            queue.enqueue("true", id="x" * 255, queue="y" * 255)
            queue.enqueue("true", id="later", delay=3600)
            queue.enqueue(meeting.here, id="running", queue="busy-" + long)
        self.workers(2, "--queue", "busy-" + long, "--queue", "other-" + long)
        meeting.arrived()
        return meeting

    def tables(self, **options):
        """{command line: the lines that it showed on a terminal}"""
        screen = Terminal(self, (sys.executable, "-c", self.PROGRAM) + self.COMMANDS, **options)
        code, shown = screen.rest()
        self.assertEqual(code, 0, shown)
        parts = shown.split("== ")[1:]
        return {part.split("\n")[0]: part.split("\n")[1:] for part in parts}

    def test_width(self):
        """No line of a table is longer than the terminal is wide, and every job has one."""
        self.fill()
        for columns in (80, 60):
            for name, lines in self.tables(columns=columns, env={"NO_COLOR": "1"}).items():
                if name == "show dead":  # its facts are for reading; the runs are a table
                    lines = lines[lines.index(""):]
                if name == "status":  # but for its warning, which is no table either
                    lines = [line for line in lines[lines.index(""):]
                             if not line.startswith("queuectl: ")]
                with self.subTest(name, columns=columns):
                    self.assertEqual([line for line in lines if len(line) > columns], [])
                if name == "list":
                    self.assertEqual(len([line for line in lines if line]), 8)
                    self.assertIn(" STATE ", lines[0], "long ids must not hide the rest")

    def test_whole_where_there_is_room(self):
        """In a file or a pipe nothing is cut."""
        self.fill()
        code, out, _ = self.cli("list")
        self.assertEqual([line.split()[0] for line in out.splitlines()[1:]],
                         [job.id for job in self.queue().jobs()])
        self.assertIn("word " * 39, out)
        self.assertEqual(len(out.splitlines()), 8)

    def test_colour(self):
        """Colour on a terminal, none in a pipe nor with NO_COLOR; never a job's own."""
        self.fill()
        coloured = self.tables()
        self.assertTrue(any("\x1b[31mdead" in line for line in coloured["list"]), coloured)
        self.assertTrue(any("\x1b[" in line for line in coloured["status"]))
        for lines in self.tables(env={"NO_COLOR": "1"}).values():
            self.assertNotIn("\x1b", "".join(lines))
        for line in self.COMMANDS:
            self.assertNotIn("\x1b", "".join(self.main(*line.split())[1:]), line)

    def test_headings(self):
        """Each table begins with the names of its columns, also an empty one."""
        for words, heads in (("list", "ID STATE TRIES QUEUE WHEN COMMAND"),
                             ("dlq list", "ID TRIES QUEUE WHEN ERROR COMMAND"),
                             ("config list", "SETTING VALUE MEANING")):
            self.assertEqual(self.ok(*words.split()).splitlines()[0].split(), heads.split())


class Completion(Everyday):
    """completion bash|zsh|fish"""

    @unittest.skipUnless(shutil.which("bash"), "bash is not installed")
    def test_bash(self):
        """Commands, subcommands, options, states, settings and choices, wherever --db is."""
        cases = (  # words so far, words that must be offered, words that must not
            ("", "enqueue worker status list dlq config completion --db --help", "start bash"),
            ("st", "status", "list start"),
            ("worker ", "start stop list", "enqueue --count"),
            ("worker st", "start stop", "list status"),
            ("worker start --", "--count --drain --detach --ensure --queue --via --db", "--json"),
            ("dlq ", "list retry purge", "start"),
            ("dlq retry --", "--all", "--older-than"),
            ("enqueue --", " ".join("--" + name.replace("_", "-") for name in queuectl.FIELDS
                                    if name != "command") + " --file --db", "--json"),
            ("list --state ", " ".join(queuectl.STATES + queuectl.VIEWS), "--json list"),
            ("list --state c", "completed cancelled", "dead"),
            ("prune --state ", "completed dead cancelled", "pending processing blocked"),
            ("config set ", " ".join(queuectl.SETTINGS), "list"),
            ("config get back", "backoff_base backoff_max", "max_retries"),
            ("completion ", "bash zsh fish", "list"),
            ("--db x.db worker ", "start stop list", "enqueue"),
            ("--db x.db sho", "show", ""),
            ("worker --db x.db st", "start stop", ""),
            ("list --queue worker --", "--state --limit --json", "--count"),
        )
        script = self.ok("completion", "bash") + (
            'try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _queuectl;\n'
            '        echo ${COMPREPLY[@]+"${COMPREPLY[@]}"}; }\n')
        for line, _, _ in cases:
            words = ["queuectl"] + line.split() + ([""] if line[-1:] in ("", " ") else [])
            script += "try %s\n" % " ".join(map(shlex.quote, words))
        done = subprocess.run(["bash", "--norc", "-u"], input=script.encode(), cwd=self.dir,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.env)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        answers = done.stdout.decode().split("\n")
        for (line, offered, other), answer in zip(cases, answers):
            with self.subTest(line):
                self.assertLessEqual(set(offered.split()), set(answer.split()))
                self.assertEqual(set(other.split()) & set(answer.split()), set())

    def test_syntax(self):
        """Each shell that is here can read its script, and each script names everything."""
        for shell in ("bash", "zsh", "fish"):
            script = self.ok("completion", shell)
            for word in ("enqueue", "retry", "max_retries", "blocked", "--priority"):
                self.assertIn(word, script, shell)
            if shutil.which(shell):
                done = subprocess.run([shell, "-n"], input=script.encode(), env=self.env,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                self.assertEqual((done.returncode, done.stdout), (0, b""), shell)
        self.refused("completion", "tcsh", code=2)
        self.refused("completion", code=2)


@unittest.skipIf(sys.platform == "win32", "the recipes are for sh")
class Recipes(Everyday):
    """The README's section Recipes: every sh block does what it says, in an empty home."""

    def blocks(self):
        path = os.path.join(HERE, "README.md")
        if not os.path.exists(path):
            self.skipTest("there is no README.md")
        blocks, depth, fence = [], 0, None
        for line in read_file(path).decode().splitlines(True):
            heading = re.match(r"(#+) (.*)", line) if fence is None else None
            if heading and (not depth or len(heading.group(1)) <= depth):
                depth = len(heading.group(1)) if heading.group(2).strip() == "Recipes" else 0
            elif line.startswith("```"):
                fence = line[3:].strip() if fence is None else None
                if fence in ("sh", "bash") and depth:
                    blocks.append("")
            elif fence in ("sh", "bash") and depth:
                blocks[-1] += line
        self.assertTrue(blocks, "the section Recipes has no sh block")
        return [block for block in blocks if not block.startswith("# not run:")]

    def test_all(self):
        """Each block, on its own, ends with 0."""
        for number, block in enumerate(self.blocks(), 1):
            with self.subTest(block):
                self.run_block("recipe%d" % number, block)

    def run_block(self, name, block):
        home, programs = self.path(name), self.path(name, "bin")
        os.makedirs(programs, 0o700)
        for word, line in (("queuectl", [sys.executable, SCRIPT]),
                           ("queuectl.py", [sys.executable, SCRIPT]),
                           ("python3", [sys.executable]), ("python", [sys.executable])):
            with open(os.path.join(programs, word), "w") as file:
                file.write('#!/bin/sh\nexec %s "$@"\n' % " ".join(map(shlex.quote, line)))
            os.chmod(file.name, 0o700)
        shutil.copy(SCRIPT, home)
        env = dict(self.env, HOME=home, PATH=programs + os.pathsep + self.env["PATH"])
        for key in ("QUEUECTL_DB", "XDG_STATE_HOME"):
            env.pop(key, None)
        self.db = os.path.join(home, ".local", "state", "queuectl", "queuectl.db")
        with open(self.path(name + ".log"), "wb") as log:
            process = subprocess.Popen(["sh", "-e"], stdin=subprocess.PIPE, stdout=log,
                                       stderr=subprocess.STDOUT, cwd=home, env=env,
                                       start_new_session=True)
        try:
            process.communicate(block.encode(), timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.fail("it does not end: %s" % read_file(log.name).decode())
        finally:
            for folder, _, names in os.walk(home):
                for file in names:
                    if file + "-run" in os.listdir(folder):
                        self.db = os.path.join(folder, file)
                        self.no_workers_left()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.assertEqual(process.returncode, 0, read_file(log.name).decode())


# All of it, by default in a few processes at a time: most tests wait for something.

def run_all(at_once=3):
    """Run each class of tests in a process of its own; the exit code."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    def run(name):
        done = subprocess.run([sys.executable, "-W", "error", os.path.abspath(__file__), name],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        return done.returncode, done.stdout.decode("utf-8", "replace")

    start, total, failed = time.monotonic(), 0, []
    suites = {name: unittest.defaultTestLoader.loadTestsFromTestCase(found).countTestCases()
              for name, found in globals().items()
              if isinstance(found, type) and issubclass(found, unittest.TestCase)}
    with ThreadPoolExecutor(at_once) as pool:
        # The longest first, by the number of their tests: so the last ones end together.
        runs = {pool.submit(run, name): name
                for name in sorted(suites, key=suites.__getitem__, reverse=True) if suites[name]}
        for done in as_completed(runs):
            code, output = done.result()
            name = runs[done]
            print("%s %s: %d tests" % ("FAILED" if code else "ok    ", name, suites[name]))
            for line in output.splitlines():
                if code or re.search("skipped|chaos", line):
                    print("    " + line)
            sys.stdout.flush()
            total += suites[name]
            failed += [name] if code else []
    print("Ran %d tests in %.1f s: %s" % (
        total, time.monotonic() - start, "FAILED in " + ", ".join(failed) if failed else "OK"))
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        unittest.main()
    sys.exit(run_all())
