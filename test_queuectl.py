#!/usr/bin/env python3
"""The tests of queuectl, in the order of its rooms: python3 test_queuectl.py

Everything runs in folders of its own; the user's own queue is never touched. Nothing sleeps
and hopes: a job meets its test at FIFOs (class Meeting), everything else is awaited as an
event. QUEUECTL_CHAOS_KILLS=2000 makes the chaos test longer.
"""

from __future__ import annotations

import ast
import base64
import collections
import contextlib
import ctypes
import errno
import functools
import io
import itertools
import json
import lzma
import math
import os
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import urllib.parse
from unittest import mock

try:
    import fcntl
    import resource
    import termios
except ImportError:  # Windows
    fcntl = resource = termios = None

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import queuectl  # noqa: E402
from queuectl import Queue, QueueError  # noqa: E402

SCRIPT = os.path.join(HERE, "queuectl.py")
PATIENCE = 60.0  # seconds after which an awaited event counts as missing
PYTHON = shlex.quote(sys.executable)
OUTCOMES = ("completed", "failed", "timeout", "cancelled", "interrupted", "lost")
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
        if sys.platform == "win32" and not isinstance(self, Smoke):
            self.skipTest("needs Unix")
        self.dir = os.path.realpath(tempfile.mkdtemp(prefix="queuectl-test-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.db = os.path.join(self.dir, "q.db")
        self.env = {key: value for key, value in os.environ.items()
                    if not key.startswith("QUEUECTL_")
                    and key not in ("NO_COLOR", "COLUMNS", "PYTHONUNBUFFERED")}
        self.env.update(HOME=self.dir, XDG_STATE_HOME=os.path.join(self.dir, "state"),
                        LOCALAPPDATA=os.path.join(self.dir, "state"), QUEUECTL_DB=self.db)
        patch = mock.patch.dict(os.environ, self.env, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.dir)
        self.processes = []
        self.addCleanup(self.end_processes)

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def queue(self, **options):
        """A Queue on this test's database, closed at its end."""
        queue = Queue(self.db, **options)
        self.addCleanup(queue.close)
        return queue

    def sql(self, *statements):
        """Execute statements on a connection of another program; the rows of the last one."""
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as db:
            return [db.execute(statement).fetchall() for statement in statements][-1]

    @contextlib.contextmanager
    def locked(self):
        """Another program holds the writer lock meanwhile: its connection."""
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield other

    # Calling it. main() runs in this process, which is quick; cli() is the real thing.

    def main(self, *words, stdin=b""):
        """(exit code, stdout, stderr) of a command line, run in this process."""
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8")):
            code = queuectl.main([str(word) for word in words])
        out.flush(), err.flush()
        return (code,) + tuple(stream.buffer.getvalue().decode("utf-8", "backslashreplace")
                               for stream in (out, err))

    def ok(self, *words, stdin=b""):
        """stdout of a command line that must succeed."""
        code, out, err = self.main(*words, stdin=stdin)
        self.assertEqual(code, 0, "%s: %s" % (words, err))
        return out

    def refused(self, *words, by=None, code=None, says="", **options):
        """A command line must fail with one clear line, and print no data."""
        got, out, err = (by or self.main)(*words, **options)
        self.assertIn(got, (1, 2) if code is None else (code,), "%s: %s%s" % (words, out, err))
        self.assertEqual(out, "", words)
        self.assertRegex(err, r"\Aqueuectl: [^\n]+\n\Z", words)
        self.assertIn(says, err)
        return err

    def cli(self, *words, program=(), stdin=None, env=None, timeout=PATIENCE, **options):
        """(exit code, stdout, stderr) of a command line in a process of its own."""
        done = subprocess.run(
            [*program, sys.executable, SCRIPT, *map(str, words)], input=stdin, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(self.env, **env or {}),
            **options)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def start(self, *words, program=(), env=None, **options):
        """Start a command line in a process group of its own, ended with the test. Its
        stderr goes to the file `process.log`."""
        log = self.path("log-%d" % len(self.processes))
        with open(log, "wb") as file:
            options.setdefault("stderr", file)
            options.setdefault("stdout", subprocess.DEVNULL)
            # As in a terminal, however this suite was started (nohup, in the background).
            options.setdefault("preexec_fn", default_signals)
            process = subprocess.Popen(
                [*program, sys.executable, SCRIPT, *map(str, words)], stdin=subprocess.DEVNULL,
                env=dict(self.env, **env or {}), start_new_session=True, **options)
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

    def ids(self, jobs):
        return [job.id for job in jobs]

    def output(self, id, number=None):
        with Queue(self.db) as queue:
            return queue.output(queue.runs(id)[(number or 0) - 1].run)

    def add(self, id, command, **fields):
        with Queue(self.db) as queue:
            return queue.enqueue(command, id=id, **fields)

    def busy(self, command="%s", *words, count=1, meeting=None, **fields):
        """(meeting, supervisor, pid of its shell): workers of which one runs job `a`, which has
        come to a meeting in the middle of its command."""
        meeting = meeting or self.meeting()
        self.add("a", command.replace("%s", meeting.here), **fields)
        process = self.workers(count, *words)
        return meeting, process, meeting.arrived()

    def finish(self, meeting, id="a", state="completed"):
        """Let a job go on, to its end."""
        meeting.let_go()
        self.assertEqual(self.until_state(id, "completed", "dead").state, state)

    # What a worker does, without one.

    def claim(self, queue, worker="w-1"):
        return queue.turn(None, worker)[1]

    def result(self, claim, outcome="completed", output=b"", pieces=None, **fields):
        good = outcome == "completed"
        return queuectl.Result(**dict(
            dict(run=claim.run, seq=claim.seq, outcome=outcome, signal=None,
                 output=pieces or ([(0, output)] if output else []),
                 exit_code=0 if good else 1, error=None if good else outcome,
                 finished_at=time.time(), seconds=0.5), **fields))

    def settle(self, queue, claim, outcome="completed", **fields):
        return queue.turn(self.result(claim, outcome, **fields), None)[0]

    def run_next(self, queue, outcome="completed", **fields):
        """The claim of the next job, which has ended so; None if there is none."""
        claim = self.claim(queue)
        if claim is not None:
            self.settle(queue, claim, outcome, **fields)
        return claim

    def run_all(self, queue, outcome="completed"):
        """The ids of all jobs that could run, in the order in which they did."""
        return [claim.id for claim in iter(lambda: self.run_next(queue, outcome), None)]

    @contextlib.contextmanager
    def interrupting(self, queue, reads_before, action):
        """What somebody else does after so many reads of a queue, at the latest at the end."""
        read, reads = queue._rows, itertools.count()

        def rows(*words):
            if next(reads) == reads_before:
                action()
            return read(*words)
        with mock.patch.object(queue, "_rows", rows):
            yield
        if next(reads) <= reads_before:
            action()

    def refuses(self, says, method, *arguments, **options):
        with self.assertRaises(QueueError) as caught:
            result = method(*arguments, **options)
            self.fail("not refused: %r" % (result,))
        self.assertIn(says, str(caught.exception))

    def clock(self, now=1800000000.0):
        """A wall clock that stands still: clock.now is the time."""
        clock = mock.Mock(now=now)
        clock.side_effect = lambda: clock.now
        patch = mock.patch("time.time", clock)
        patch.start()
        self.addCleanup(patch.stop)
        return clock

    # Transcripts: what a person types, and what is seen then.

    UNSERVED = "queuectl: no worker "

    def play(self, text):
        """Run a transcript. `$ ` stands before a command and `> ` before its next lines; then
        comes its stdout, its stderr with `! ` before each line, and `[1]` for an exit code that
        is not 0. `...` is any text, and alone in its line any lines. Blank lines and lines that
        begin with `# ` are for the reader. That no worker runs, which enqueue says, is seen only
        where a line speaks of it."""
        scenes = []
        for line in map(str.rstrip, textwrap.dedent(text).splitlines()):
            if line.startswith("$ "):
                scenes.append((line[2:], []))
            elif re.match("> |>$", line) and not scenes[-1][1]:
                scenes[-1] = scenes[-1][0] + "\n" + line[2:], []
            elif line and not line.startswith("# "):
                scenes[-1][1].append(line)
        for command, expected in scenes:
            code, out, err = self.type(command)
            seen = [prefix + line.rstrip() for prefix, stream in (("", out), ("! ", err))
                    for line in stream.splitlines() if line.strip()] + ["[%d]" % code] * bool(code)
            if "enqueue" in command and not any(self.UNSERVED in line for line in expected):
                seen = [line for line in seen if self.UNSERVED not in line]
            patterns = {line: r"(?:.*\n)*" if line == "..." else
                        re.escape(line).replace(r"\.\.\.", ".*") + r"\n" for line in expected}
            if not re.fullmatch("".join(map(patterns.get, expected)),
                                "".join(line + "\n" for line in seen)):
                # What does vary is no difference.
                seen = [next((like for like, pattern in patterns.items() if like != "..." and
                              re.fullmatch(pattern, line + "\n")), line) for line in seen]
                self.assertEqual("\n".join(["$ " + command] + seen),
                                 "\n".join(["$ " + command] + expected))
                self.fail("in another order: " + command)

    def type(self, text):
        """(exit code, stdout, stderr) of what a person types. Plain words run in this process,
        also with a here-document as stdin; the rest has a shell, and `queuectl` on its PATH."""
        line, stdin = text, b""
        document = re.fullmatch(r"(.*) <<(\w+)\n(.*\n)?\2", text, re.S)
        if document:
            line, stdin = document.group(1), (document.group(3) or "").encode()
        line = re.sub(r"\Apython3 queuectl\.py ", "queuectl ", line.replace("\\\n", ""))
        tools = {"queuectl": self.main, "work": self.work, "states": self.states_now,
                 "later": self.later, "pick": self.pick_keys}
        if line.partition(" ")[0] in tools and not re.search(
                r"[|&;<>$`*?()~#\n]", re.sub("'[^']*'", "", line)):
            tool, *words = shlex.split(line)
            if words[:2] == ["worker", "start"]:  # which makes signals its own
                return self.cli(*words, cwd=self.dir)
            return tools[tool](*words, **{"stdin": stdin} if document else {})
        done = subprocess.run(["sh", "-c", text], stdin=subprocess.DEVNULL, cwd=self.dir,
                              env=dict(self.env, PATH=self.programs()), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=PATIENCE)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def programs(self):
        """A PATH on which the README's words for this program are found."""
        folder = self.path("bin")
        if not os.path.isdir(folder):
            os.mkdir(folder, 0o700)
            for word, line in (("queuectl", [sys.executable, SCRIPT]),
                               ("queuectl.py", [sys.executable, SCRIPT]),
                               ("python3", [sys.executable]), ("python", [sys.executable])):
                with open(os.path.join(folder, word), "w") as file:
                    file.write('#!/bin/sh\nexec %s "$@"\n' % " ".join(map(shlex.quote, line)))
                os.chmod(file.name, 0o700)
        return folder + os.pathsep + self.env["PATH"]

    # Further words of transcripts, for what nobody types.

    def work(self, count=10 ** 9):
        """work [N]: a worker in this process, which tells what became of its N jobs."""
        lines = []
        with Queue(self.db) as queue:
            for _ in range(int(count)):
                claim = self.claim(queue)
                if claim is None:
                    break
                done = subprocess.run(["sh", "-c", claim.command], stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                error = queuectl.exit_error(done.returncode, None, done.stdout)
                self.settle(queue, claim, "failed" if done.returncode else "completed",
                            exit_code=done.returncode, error=error if done.returncode else None,
                            output=done.stdout)
                lines.append("%s %s\n" % (claim.id, queue.get(claim.id).view))
        return 0, "".join(lines), ""

    def states(self):
        with Queue(self.db) as queue:
            return {job.id: job.view for job in queue.jobs()}

    def states_now(self):
        """states: the jobs of each state, in one line."""
        found = {}
        for id, view in self.states().items():
            found.setdefault(view, []).append(id)
        return 0, "; ".join(view + ": " + " ".join(found[view]) for view in found) + "\n", ""

    def later(self, duration):
        """later T: the wall clock has gone on by so much, and stands still there."""
        self.clock(time.time() + queuectl.parse_duration(duration))
        return 0, "", ""

    def pick_keys(self, keys, *words):
        """pick KEY,KEY.KEY queuectl ... --json: these values, a line for each object."""
        code, out, err = self.main(*words[1:])
        rows = json.loads(out)
        lines = []
        for row in rows if isinstance(rows, list) else [rows]:
            values = []
            for key in keys.split(","):
                value = row
                for name in key.split("."):
                    value = value[int(name) if name.isdigit() else name]
                values.append(value if isinstance(value, str) else json.dumps(value))
            lines.append(" ".join(values) + "\n")
        return code, "".join(lines), err

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
        "database": "errors model platform schema",
        "queue": "errors model platform schema database",
        "runner": "errors model platform",
        "workers": "errors model platform schema database queue runner",
        "clients": "errors model platform schema database queue",
        "output": "model",
        "web": "errors model platform schema database queue clients output",
        "commands": "errors model platform queue workers clients output web",
        "main": "errors model platform schema database queue runner workers clients output "
                "web commands",
    }
    LAZY = {"dataclasses", "typing", "enum", "uuid", "subprocess", "multiprocessing",
            "http.server"}  # what would slow down every short command
    EXECUTING = {"execute", "executemany", "executescript", "_execute", "_value", "connect"}

    @classmethod
    def setUpClass(cls):
        source = read_file(SCRIPT).decode("utf-8")
        cls.lines = source.splitlines()
        cls.tree = ast.parse(source, feature_version=(3, 8))
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

    def test_a_room_uses_only_the_rooms_that_it_may(self):
        self.assertEqual([name for _, name in self.banners], list(self.ROOMS)[1:])
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

    def test_only_the_queue_and_its_database_execute_sql(self):
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name in ("Database", "Queue"):
                self.assertEqual(self.room(node), node.name.lower())
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
        """And importing it does nothing else."""
        self.assertEqual(set(self.imports()) & self.LAZY, set())
        for name in ("lib", "empty", "home"):
            os.mkdir(self.path(name))
        shutil.copy(SCRIPT, self.path("lib"))
        env = dict(self.env, HOME=self.path("home"), PYTHONPATH=self.path("lib"), XDG_STATE_HOME="")
        loaded = []
        for names in (", ".join(set(self.imports()) - {"__future__"}), "queuectl"):
            shown = subprocess.check_output(
                [sys.executable, "-c", "import %s, sys; print(*sys.modules)" % names],
                cwd=self.path("empty"), env=env, stderr=subprocess.STDOUT)
            self.assertEqual(shown.count(b"\n"), 1, shown)
            loaded.append(set(shown.decode().split()))
        self.assertEqual((loaded[1] - loaded[0]) & self.LAZY, set())
        self.assertIn("queuectl", loaded[1] - loaded[0])
        self.assertIn("sqlite3", loaded[0])
        self.assertEqual(os.listdir(self.path("empty")) + os.listdir(self.path("home")), [])
        self.assertLessEqual(set(os.listdir(self.path("lib"))), {"queuectl.py", "__pycache__"})
        self.assertLessEqual(set(os.listdir(self.dir)), {"lib", "empty", "home"})

    def test_it_exports_what_it_says(self):
        self.assertLessEqual({"Queue", "QueueError", "main"}, set(queuectl.__all__))
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
        noon = 1767268800
        self.check(lambda text: queuectl.parse_time(text, now=1000), [
            ("2026-01-01T12:00:00Z", noon), ("2026-01-01T12:00Z", noon),
            ("2026-01-01T12:00z", noon), ("2026-01-01 12:00:00.250Z", noon + 0.25),
            ("2026-01-01T12:00:00+00:00", noon), ("2026-01-01T14:00:00+02:00", noon),
            ("2026-01-01T07:00-05:00", noon), ("2026-01-01T17:30", noon),
            ("2026-01-01T17:30:00", noon), ("2026-01-01", noon - 17.5 * 3600),
            (str(noon), noon), ("%d.5" % noon, noon + 0.5), (noon, noon), (noon + 0.5, noon + 0.5),
            ("+10m", 1600), ("+90", 1090), ("+0", 1000), ("+7d", 605800),
            ("9999-12-31T23:59:59Z", queuectl.MAX_EPOCH)])
        # Also where datetime.fromisoformat reads 20260131 as a date.
        self.check(queuectl.parse_time, [("100000000", 100000000), ("202601310800", 202601310800)])
        # The next time that a clock shows so; it is 5:30 of the first day of 1970 at 0.
        self.check(lambda text: queuectl.parse_time(text, now=1000), [
            ("5:47", 1020), ("05:46", 87360), ("23:30", 64800), ("05:00", 84600)])
        self.check_refused(queuectl.parse_time, [
            "", " ", "tomorrow", "24:00", "12:60", "1:2:3", ":30", "12:", "2", 2, "0", 0, "2026",
            "20260131", "2026-13-01", "2026-02-30T12:00", "2026-01-01T25:00",
            "+", "+x", "+-5", "++5", "+nan", "+inf", "-1", -1, "-10m", "10m", "nan", "inf",
            float("nan"), float("inf"), 1e300, 10 ** 400, noon * 1000, "9999-12-31T23:59:59-01:00",
            "0001-01-01T00:00", "1969-12-31T23:59:59Z", True, None, [], {}])

    def test_iso_and_back(self):
        """What is printed names the same moment, to the millisecond, for good."""
        self.check(queuectl.iso, [
            (None, None), (0, "1970-01-01T00:00:00.000Z"), (1767268800, "2026-01-01T12:00:00.000Z"),
            (1767268800.25, "2026-01-01T12:00:00.250Z"),
            (queuectl.MAX_EPOCH, "9999-12-31T23:59:59.000Z")])
        self.zone("WEST+8")
        for epoch in (0, 1, 1767268800.5, 951782400.125, queuectl.MAX_EPOCH):
            self.assertEqual(queuectl.from_iso(queuectl.iso(epoch)), epoch)
        for second in ("2026-01-01T12:00:00", "2038-09-02T10:30:44", "2300-01-31T23:59:18",
                       "9999-12-31T23:59:58"):
            for millis in range(1000):
                text = "%s.%03dZ" % (second, millis)
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
            ((127, None, b"x: not found", "x -a"), ["the worker's PATH counts"]),
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
        # PATH has nothing to do with a name that has a folder.
        self.assertEqual(queuectl.exit_error(127, None, b"", "./x -a"),
                         "exit code 127 (command not found)")


class Schema(Case):
    """The file: its marks, its mode, its place; and indexes that are used."""

    def test_each_has_an_identity(self):
        with Queue(self.db) as one, Queue(self.db) as again, Queue(self.path("o.db")) as other:
            self.assertRegex(one.identity, r"\A[0-9a-f]{32}\Z")
            self.assertEqual(one.identity, again.identity)
            self.assertNotEqual(one.identity, other.identity)

    # A database that the released program of schema 2 has made: bad ran twice, two other jobs and
    # their runs were pruned, open runs on a worker that is dead.
    SCHEMA_2 = """
    T>t<81poj4|NsC0{{ShJMV(;C8Tck-h>j-yF_rztA>a#KP@DIOa9sN{S`bk5*^x~JI3FX};cg7JGC&*dg)O%28@d8~*5}}=7
    UCudU?XV-oz8e+nGDJsaBfe*J@ECQcZT8%ceNcMZ8ve}2*uJ{*hGzD#L*3u4Z^QT5~;8LxX;xK0;y~I?eh{#W8(!Y#b0=y+0
    k#YEN<jBmBmNt9(!{Ah$BplZtVE?v{1sD5eiXC18q)lRMRX=(e)q2xdKdanatxElwnCuWwq+8&Bc2nBr{XBbMmg6F`c<Pyo|
    xLQ9~Hq5bF|1JEJ5GBoa-?i3~v;_WDiM^2A)<D8twIr83#$8bz5%##pPaw?<0Z3#qj(yIUzeH{;H)1M96-)BsdZ^nailr=|f
    wc^q&~<QL@C_-6LF)t+>zi{Q-@(*;TY+q|dd%G!BQHO&kVEE>4Y!yGkUm%f|v2xMgGVI(cV4U`j-<f+g1-Nd+N#!6vp^*cIp
    F>FzI`it0xO8tt&QAv(B^KTbp*qf!SIp<4maJ-Snmyh0LL&7JGNb0hpw9cp7UMg>~PoZc<Ah+F?d>&TMB}3`7Se-PKDDLtq4
    M1TWrUkNWpewv#m>RcnoCV#3GACun3lRKi)M{e!=G{FqFS8M)qQ<v3xwyGnQq#0UNkSv-K*pM44NI&Y;PhvQCS#9M<pEWvs%
    Oq(%!zF`5<8EOY2sqX7ytr!t{h(%P}5x&&yIRIdE6b`o}@ztG3f2zkj?;-bzU~{E-fs90_Rmr0FfdQQp6_@kR&%~lm)=esci
    f6D@{9Gp2XjK-9oCr1&~$(c;75yWDeM+hF5eB_W`51*%}Zh!2C%~ods*et`66(Dfh&(^An-<VW@@a8fqj+(gE4#6L`W0;7xa
    $91Ru1OW`w7#NdLCvRA~8Vzr1}M>T!Q?fGEB`}BaZ-g7f6q$fv{gysCCzmB-wvRQ<C{>*vYe%(l<qG9g+zmJYHQDkL|tUhAb
    c|JfTdE=2Jo&+m2TeuT&?epkWLw)j&Hn<be^;`4=5KM^AkI!g@^Q${15gNh1cIXZ83al0qKts2Dw6Z64-KVLRhz9Cn|Kg(uD
    0)KPQ?()N?3fE&;0m1gkTze&qmct&OU~w3a79X)owI7nBR%j6@(H$yxw)$vZ&lzGv5^>tNpg;$dcGLgd|JMB7@5i-p$+dQFZ
    #x1cBRtREsRvYQIh7Zhz)|YeO>15rG3l$%XEoLJYE)aXS)%b9D}NNK1~#K*QL{VeMUh1lq+=?WsNMR0&Uf$>r>2RAk0k|iGu
    DX32uPW=d-_lX$<-%e?}+=1xpV3^^OniN&v#cj754w+q|f`O2hJ~LVvCknQLYQ!eQoOE0Nbq35uOVuW~}CJ!85nB&+>9dzc*
    b5$PUmM1!0LSg;qeotf%H`^ac9R=?I?CAiiucFM+9K$Xy?m5Wjy@X&mh(`jTEjUIZD<8hv#&~i%9(#ZI*Q|u=ukBHSZS<99O
    #DeSaO|3Bq=1ZmqY`9Cq+$P%7+6yayMq`S&(bmj9i~|ES_h*MBR_qj;8@fAvJnRTU5eP|D27EVE@>S2*Ez+lL%ao;nxzh4Eh
    WX5<X(DfBt?y8mE6D<Zi%+_t%C#}V+Mh_)96PXJ90vdCNj+FWD>Aq={?Wz<4>3Jq<=$6UUkasnyMjmFJHR}>YVKkG&EYB2Js
    WNM-i_-_cMh2+YEA3DFstz^->E~AJMh$e-RD_>)@`&Sj3C*xB<7hEMdhOC1M!!1nffe`UNZ;>r~q1L3Jeilu3Uk_9{@FE+-y
    dSDEGtTA}a6YizyvxgYozJ9(BF+6#G`^XwxlpjpYtXHFt6C(=->;a?->F(}0NNXh~vATi2+yi>*RLNPxCdk2)J&{nSEKQW1v
    c-=qbS_&Er9#AN_Vg_xyL<&6|lMO{q_VnN<W$sor#C^W*j(rF9Ev8xu^=$r=K&!oTb17OFn5iO8Bu;jzyqmA}Kb|D)WEBsF}
    ;d6TNu89TMQKTngcpp4R{O*2M+!tHiK`N{^z(zMA6CFcDJi8L8)v2MEB)91cQ3;Hp>EsIzCSNyX!<rQx@WBd?XEJ3FyhNofN
    oYNYQZxirfyD_PopkX;^wGQ>3tEV-_6`uQCg5>rcMFj7!a0z>Wbtf`OuwJh`9iBWrFw+(@(uo0Y0+N{SU&fG0LflNcVnmoiU
    F)MAAO`#=GbIJO?%2>Da<V@jOOK>B!^uX5@r$NnfBO5#Z3022_#7UfY={XM_-Cs6uJd!_W~Pz`!MU$9=MT`IvXc1!*&?$vY?
    gkNBR~Kgb^ImDh&I#jQ=YhuYZ;u!Am4jM5LkKF;7KJDVf)(%*^W7b{^3GQ|`t<9W7{DUr-vrGz(QHd3dAMJ+}Cq!Th7>!u7?
    L(f(gt!lvUL>?1w#yvSY3O*Ba&&P2n&C^_p33gdJI2jJzf)ees2pbhG-5GhI01aF@#Fp}TbiOY*3R%6(-$Ob)FwO;(c`Cj!r
    hebUZzIA5;!h+}i3RQbL-neWM@ww(?eh#`>`<t>4!lwo2wc9!~douA{<6FGIEc9n%T=e)NDOWk9594_jlsY^p&+yUHtLY4?K
    >O^sMtCUGlH;j<DJ`G!a{je}yi;8$;CQkWE{ujnCvvnyBk+Y76uKi>*3g+NEV+L6$?C3nvXf`8{IPf5z=d6qG2<R2fN9fPvv
    Cu(_!~MZW#ujBuA_~AJ2NjF4lc|_W@0wlJYyfk7~rj1!O+5vDs0T6-jaP`2<|Gw-p@y3#iYt%Gv<x6^yfAf99H+B?E_NmapY
    Brq9X)9m^ukYv!j8Wi0Q$mG<5#X@x@H1gvzJs+5&iz05+eU#1D0JKHg*{ox6m!?tkEIPb?-=2RyzDq5i5P>fPw3@%eZkV>kd
    6(dok5AB>>KL}yudow^i3&%I~O>(J-t^FGYLS~0R@kSUKtNNr*FCyd}rS;N!G!8;?d<Uk3rTu2G|Fl`<x){G4iBHyKCede6A
    wy#JRu>A6>Z2F62j2hKJ{uHDdDYDd+oNk3cccNau8-u<HT9qmH!+{^xTyU{V#~VgiN?n^!Q>%HN2AG>!-WSK#hpHrd1K0kJ$
    ReN{az1Rdhw4;PT!-Y^`fFyRCI{a6FMTRmB5BlU$}f32N(L}qx;W-laBXX+vjfmCU=yYb%(A=6>+9GF0{Ch0Of`!_htn#PQN
    wQ7Ix$do+8);BdTHy}@ss!f6zAPf9$j=yE~c7v(5h}%-G|@ly#h~}J(?aGWzI_QvZpz&JiZ?a#`Ns8OiMOX3Nhx+{r?eMOaJ
    (wr9%
    """

    def test_a_database_of_schema_2_is_upgraded(self):
        old = lzma.decompress(base64.b85decode(re.sub(r"\s", "", self.SCHEMA_2)))
        with open(self.db, "wb") as file:
            file.write(old)
        folder = self.db + "-run"
        queuectl.make_folder(folder)
        for name, says in (("yav2mf", "kill 26605"), ("ys6s73", "kill 26693")):
            lock = os.path.join(folder, name + ".lock")
            held = queuectl.hold(lock)
            self.refuses("older queuectl; let them finish first: " + says, self.queue)
            queuectl.release(lock, held)
        # All or nothing:
        for number in range(1, len(queuectl.UPGRADES[3]) + 1):
            steps = queuectl.UPGRADES[3][:number] + ("SELECT nobody",)
            with mock.patch.dict(queuectl.UPGRADES, {3: steps}):
                self.refuses("no such column: nobody", self.queue)
        self.assertEqual(read_file(self.db), old)

        queue = self.queue()
        with mock.patch.object(queuectl, "VERSION", 2):  # while it is in the -wal file only
            self.refuses("made by a newer queuectl (schema 3; this one knows 2)", self.queue)
        self.assertEqual({job.id: job.view for job in queue.jobs()}, {
            "good": "completed", "bad": "dead", "again": "failed", "off": "cancelled",
            "later": "scheduled", "blocked": "blocked", "open": "processing", "ready": "pending"})
        self.assertEqual([(job.priority, job.cwd, job.env, job.exit_code) for job in queue.jobs(
            "completed")], [(5, "/", {"A": "1"}, 0)])
        self.assertEqual([(run.run, run.outcome, run.error, queue.output(run.run))
                          for id in ("good", "bad", "again", "open") for run in queue.runs(id)], [
            (4, "completed", None, b"hello\xff"), (5, "failed", "exit code 3: wrong", b"wrong\n"),
            (6, "failed", "exit code 3: wrong", b"wrong\n"), (7, "failed", "exit code 1", b""),
            (8, None, None, b"")])
        self.assertEqual(queue.identity, "c6817db496ae1029a478bc5fdf0ef012")
        self.assertEqual(queue.paused(), ["mail"])
        self.assertEqual([row[:3] for row in queue.stats()], [
            ("default", "completed", 2), ("default", "failed", 3), ("mail", "failed", 2)])
        self.assertEqual((queue.settings()["backoff_base"], queue.settings()["keep_completed"]),
                         (1000, 60480000))
        self.assertEqual(queue.enqueue("true", unique="k"), "later")
        self.assertEqual([job.id for job in queue.jobs("pending") if queue.blocker(job)],
                         ["blocked"])
        queuectl.Rescuer().finish(queue, lambda text: None)
        self.assertEqual((self.claim(queue).run, queue.runs("open")[0].outcome), (9, "lost"))
        tables = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
        with Queue(self.path("new.db")) as new:
            self.assertEqual(*([tuple(row) for row in each._rows(tables)] for each in (queue, new)))
        self.assertEqual(queue._value("PRAGMA integrity_check"), "ok")

    def test_any_command_creates_it(self):
        """Where there is no file, or an empty one."""
        for number, words in enumerate([
                ("status",), ("list",), ("enqueue", "true"), ("worker", "list"), ("config", "list"),
                ("metrics",), ("prune",), ("dlq", "list"), ("pause",), ("wait",),
                ("worker", "stop")]):
            self.db = self.path("%d.db" % number)
            if number % 2:
                open(self.db, "wb").close()
            self.ok("--db", self.db, *words)
            for pragma, value in (("application_id", 0x71756575), ("journal_mode", "wal"),
                                  ("user_version", queuectl.VERSION), ("integrity_check", "ok")):
                self.assertEqual(self.sql("PRAGMA " + pragma), [(value,)], words)

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

    # Indexes.

    def test_every_query_uses_its_index(self):
        """No full scan of the jobs or the runs; what is counted is a covering index. (Of the claim
        the next test sees more.)"""
        clock, seen, connect = self.clock(), [], sqlite3.connect

        class Recording(sqlite3.Connection):
            def execute(self, sql, parameters=()):
                seen.append((sql, parameters))
                return super().execute(sql, parameters)

            def executemany(self, sql, rows):
                rows = list(rows)
                seen.extend((sql, row) for row in rows[:1])
                return super().executemany(sql, rows)

        with mock.patch("sqlite3.connect", lambda *arguments, **options: connect(
                *arguments, factory=Recording, **options)):
            queue, every = self.queue(), self.queue()
        queue.serve(["default", "other"])
        look = sqlite3.connect(self.db)
        self.addCleanup(look.close)
        for statement in ("CREATE TEMP TABLE served (queue TEXT PRIMARY KEY)",
                          *queuectl.INCOMING[:2], queuectl.NOT_WAITED_FOR[0]):
            look.execute(statement)
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
        self.assertLessEqual({"jobs_ready", "jobs_next", "jobs_waiting", "jobs_ended"}, partial)
        self.assertLessEqual(len(partial), 5)
        ready, waiting, ended, key = "jobs_ready", "jobs_waiting", "jobs_ended", "PRIMARY KEY"
        in_order = r"INTEGER PRIMARY KEY \(rowid>\?\)"  # page by page, or what is new
        backwards = r"INTEGER PRIMARY KEY \((rowid>\? AND )?rowid<\?\)"  # as far as a limit goes
        for name, action, indexes, allowed in [
            ("settle", lambda: self.settle(every, self.claim(every)), {key, "deps_needs"}, None),
            ("orphans", lambda: queue.orphans(queue.open_runs()), set(), None),
            ("counts", queue.counts, {ready, waiting, ended}, None),
            ("oldest", queue.oldest_ready, {key}, None),
            ("left", lambda: queue.work_left("s"), {waiting}, None),
            ("workers", queue.workers, set(), None),
            ("wake", lambda: queue.wake(["default"]), set(), None),
            ("get", lambda: queue.get("j5"), {"(id=?)"}, None),
            ("runs", lambda: queue.runs("j5"), {key}, None),
            ("enqueue", lambda: queue.enqueue("true"), set(), in_order),
            ("unique", lambda: queue.enqueue("true", unique="u9"), {"(key=?)"}, in_order),
            ("after", lambda: queue.enqueue("true", after=["j9"]), {"(id=?)"}, in_order),
            ("blocker", lambda: queue.blocker(queue.get("blocked")), {key}, None),
            ("stuck", lambda: queue.stuck(queue.get("blocked")), {key}, None),
            ("cancel", lambda: queue.cancel(["j7"]), {key}, None),
            ("retry", lambda: queue.retry(["j7"]), {key}, None),
            ("retry all", queue.retry_all, {ended}, None),
            ("wait", queue.wait_for_all, {ended}, None),
            ("progress", lambda: queue.progress(100, None), {waiting, ended}, None),
            ("list", queue.jobs, {key}, in_order),
            ("newest", queue.newest, {key}, backwards),
            ("newest dead", lambda: queue.newest("dead"), {ended, key}, backwards),
            ("newest of a queue", lambda: queue.newest(queue="other"), {ready, waiting, ended},
             backwards),
            ("newest with a word", lambda: queue.newest(word="nothing"), {"(id=?"}, backwards),
            ("standing before", lambda: queue.standing_before(queue.get("j20")), {ready}, None),
            ("prune", lambda: queue.prune(queuectl.ENDED), {key}, in_order),
        ] + [("list " + state, lambda state=state: queue.jobs(state), set() if
              state == "processing" else {ended if state in queuectl.ENDED else waiting}, in_order)
             for state in queuectl.STATES + queuectl.VIEWS]:
            with self.subTest(name):
                del seen[:]
                result = action()
                if hasattr(result, "__next__"):
                    list(result)
                plan = [(sql, row[3]) for sql, parameters in seen
                        if re.match(r"\s*(SELECT|WITH|UPDATE|DELETE|INSERT)", sql)
                        for row in look.execute("EXPLAIN QUERY PLAN " + sql, parameters)]
                text = "\n".join(detail for _, detail in plan)
                self.assertTrue(plan)
                for index in indexes:
                    self.assertIn(index, text)
                for sql, detail in plan:
                    found = re.match(r"(SCAN|SEARCH) (?:TABLE )?(?:jobs|runs|dependant)\b"
                                     r"(?: AS \w+)?(?: EXISTS)?"
                                     r"(?: USING (?:COVERING )?(?:INDEX )?(.*))?",
                                     detail)
                    if not found:
                        continue
                    how, index = found.groups()
                    if how == "SCAN":
                        good = index and index.split()[0] in partial
                    else:  # a range of row numbers may be the whole table
                        good = not index and re.search(r"max\((run|seq)\)", sql) \
                            or index and ("PRIMARY KEY" not in index or "rowid=" in index)
                    self.assertTrue(good or allowed and re.search(allowed, detail),
                                    "%s: %s" % (detail, sql))

    def test_the_work_of_a_claim_does_not_grow(self):
        """Counted in steps of SQLite's machine, not in seconds: beside thousands of jobs that a
        worker may not have, and of queues, its turns take as many of them as beside ten."""
        def kinds(queue, many):
            """Of another queue, for later, blocked or ended."""
            queue.enqueue("true", id="first", queue="other")
            list(queue.enqueue_many(dict(kind, command="true") for kind in (
                dict(queue="other"), dict(delay=9999, priority=5), dict(after=["first"]), dict())
                for _ in range(many)))
            queue._execute("UPDATE jobs SET state = 'completed', hold = -2 "
                           "WHERE queue = 'default' AND hold = 0")
            list(queue.enqueue_many([{"command": "true"}] * 5))

        def queues(queue, many):
            list(queue.enqueue_many({"command": "true", "queue": "q%05d" % number,
                                     "priority": number % 7} for number in range(many)))

        def paused(queue, many):
            queues(queue, 10)
            list(queue.enqueue_many([{"command": "true", "queue": "paused", "priority": 9}] * many))
            queue.pause("paused")

        def steps(fill, many, served):
            seen = []
            with Queue(self.path("%s%d%s.db" % (fill.__name__, many, served)),
                       durable=False) as queue:
                queue.serve(served)
                fill(queue, many)
                queue._db.set_progress_handler(lambda: seen.append(1), 10)
                for outcome in ("completed", "failed", "completed"):
                    claim = self.claim(queue)
                    self.assertIsNotNone(claim)
                    self.settle(queue, claim, outcome)
                    # What a rescuer asks, who idles, and --drain.
                    queue.orphans(queue.open_runs())
                    queue.next_due()
                    queue.work_left("s")
                self.claim(queue)
                queue._db.set_progress_handler(None, 10)
            return len(seen)

        for fill, served in ((kinds, ["default"]), (queues, None), (paused, None),
                             (queues, ["q00003", "q00006", "q00008", "nobody"])):
            with self.subTest(fill=fill.__name__, served=served):
                self.assertLess(steps(fill, 5000, served), 2 * steps(fill, 10, served))


class Storage(Case):
    """class Queue, as a library: what goes in comes out, and in order."""

    KEYS = ["id", "command", "state", "view", "queue", "priority", "attempts", "max_retries",
            "timeout", "run_at", "cwd", "env", "after", "unique", "created_at", "updated_at",
            "started_at", "finished_at", "locked_by", "locked_at", "exit_code", "last_error"]

    def test_a_plain_job(self):
        self.clock()
        queue = self.queue()
        id = queue.enqueue("echo hello")
        self.assertEqual(queue.get(id).as_dict(), dict(
            id=id, command="echo hello", state="pending", view="pending", queue="default",
            priority=0, attempts=0, max_retries=3, timeout=None, run_at=None, cwd=os.getcwd(),
            env={}, after=[], unique=None, created_at="2027-01-15T08:00:00.000Z",
            updated_at="2027-01-15T08:00:00.000Z", started_at=None, finished_at=None,
            locked_by=None, locked_at=None, exit_code=None, last_error=None))
        self.assertEqual(queue.runs(id), [])

    def test_more_jobs_become_due_than_one_transaction_moves(self):
        clock = self.clock()
        queue = self.queue(durable=False)
        ids = list(queue.enqueue_many({"command": "true", "delay": 5} for _ in range(1200)))
        clock.now += 5
        self.assertEqual(self.claim(queue).id, ids[0])
        self.assertEqual(queue.counts()["scheduled"], 1200 - queuectl.DUE_BATCH)
        self.assertEqual([self.claim(queue).id for _ in range(1199)], ids[1:])
        self.assertIsNone(self.claim(queue))

    def test_many_or_none(self):
        """A list is stored in one transaction, and an error names its place."""
        queue = self.queue()
        queue.enqueue("true", id="taken")
        good = [{"command": "true", "id": "n%d" % number} for number in range(2500)]
        for says, wrong in [
            ("job 2001: ", {"command": ""}), ("job 2001: ", None),
            ("job 2001: the id taken is taken", {"command": "true", "id": "taken"}),
            ("job 2001: the id n5 is taken", {"command": "true", "id": "n5"}),
        ]:
            with self.subTest(wrong=wrong):
                self.refuses(says, queue.enqueue_many, good[:2000] + [wrong] + good[2000:])
                self.assertEqual(self.ids(queue.jobs()), ["taken"])
        def interrupted():
            yield from good
            raise KeyboardInterrupt
        with self.assertRaises(KeyboardInterrupt):
            queue.enqueue_many(interrupted())
        self.assertEqual(self.ids(queue.jobs()), ["taken"])
        self.assertEqual(list(queue.enqueue_many(good)), self.ids(queue.jobs())[1:])
        self.assertEqual(list(queue.enqueue_many([])), [])

    def test_generated_ids_that_are_taken_are_drawn_again(self):
        queue = self.queue()
        queue.enqueue("true", id="same")
        for draws, jobs in (
                (["same", "same", "new1"], [{}]), (["two", "two", "two", "new2"], [{}, {}]),
                (["new1", "same", "five", "new3"], [{}, {"id": "own"}, {}, {}])):
            draw = iter(draws + ["x1", "x2", "x3", "x4"])
            with mock.patch.object(queuectl, "new_id", lambda: next(draw)):
                ids = list(queue.enqueue_many(dict(job, command="true") for job in jobs))
            self.assertEqual(len(set(ids)), len(jobs))
            self.assertEqual([id == "own" for id in ids], ["id" in job for job in jobs])
            self.assertEqual(self.ids(queue.jobs())[-len(ids):], ids)
        with mock.patch.object(queuectl, "IDS_TAKEN", "SELECT 1 WHERE 0"):  # by nobody
            self.refuses("is corrupt", queue.enqueue, "true", id="same")

    def test_a_source_of_jobs_may_enqueue_others(self):
        """Such as those that its own jobs wait for: each is stored once, and none is lost."""
        queue = self.queue()
        with mock.patch.object(queuectl, "PAGE", 2):
            ids = queue.enqueue_many({"command": "b", "after": [queue.enqueue("a")]}
                                     for _ in range(5))
        self.assertEqual([queue.get(id).command for id in ids], ["b"] * 5)
        self.assertEqual(sorted(job.command for job in queue.jobs()), ["a"] * 5 + ["b"] * 5)

    def test_what_is_counted_is_of_one_moment(self):
        """A job that is put back meanwhile is neither missed nor counted twice."""
        queue, other = self.queue(), self.queue()
        queue.enqueue("true", id="a", max_retries=99)
        last = queue.wait_for_all()
        for count in (lambda: sum(map(queue.counts().get, ("pending", "processing"))),
                      lambda: queue.progress(last, None)[0]):
            for reads_before in range(5):
                claim = self.claim(other)
                with self.interrupting(queue, reads_before, lambda: self.settle(
                        other, claim, "failed")):
                    self.assertEqual(count(), 1, reads_before)
                queue.edit("a", delay=0)
        with self.interrupting(queue, 0, lambda: other.enqueue("true")):
            last = queue.wait_for_all()
        self.assertEqual(queue.progress(last, None)[0], 1)

    def test_an_error_in_a_snapshot_is_told(self):
        queue = self.queue()
        with self.assertRaises(queuectl.DatabaseUnavailable), queue._snapshot():
            queue._execute("ROLLBACK")  # as SQLite does where it cannot read
            raise queuectl.DatabaseUnavailable("disk I/O error")

    def test_cancel_all_misses_nothing_that_changes_meanwhile(self):
        """One that runs fails and is put back, and one that waits is started, while it looks."""
        queue, other = self.queue(), self.queue()
        queue.set_setting("backoff_base", 0)
        queue.enqueue("true", id="failing")
        claim, pages = self.claim(other), queue._pages
        list(queue.enqueue_many({"command": "true", "id": "j%d" % number} for number in range(5)))

        def changing(state, name):
            for page in pages(state, name):
                yield page
                if state == "pending" and claim.run == queue._value("SELECT max(run) FROM runs"):
                    self.settle(other, claim, "failed")
                    self.assertEqual(self.claim(other).id, "j2")
        with mock.patch.object(queuectl, "PAGE", 2), mock.patch.object(queue, "_pages", changing):
            self.assertEqual(queue.cancel_all(), 6)
        self.assertEqual([job.id for job in queue.jobs() if job.state == "pending"], [])
        self.assertEqual([job.id for job in queue.jobs() if job.state == "processing"], ["j2"])
        self.assertTrue(queue.get("j2").cancel)

    def test_retry_all_lets_others_write_in_between(self):
        """And between its read and its write, where somebody else does not want a job and another
        is dead again."""
        queue, other = self.queue(), self.queue()
        list(queue.enqueue_many({"command": "true", "id": "j%d" % n} for n in range(25)))
        queue._execute("UPDATE jobs SET state = 'dead', hold = -2")
        begin, seen, notes = queue._transaction, [], []

        def late():
            if len(seen) == 2:
                other.retry(["j24"])
                other.cancel(["j24"])
                other._execute("UPDATE jobs SET state = 'dead', hold = -2 WHERE id = 'j0'")
            return begin()
        with mock.patch.object(queuectl, "PAGE", 10), \
                mock.patch.object(queue, "_transaction", late), mock.patch.object(
                    queue, "wake", lambda queues: seen.append((queues, other.counts()["pending"]))):
            self.assertEqual(queue.retry_all(note=notes.append), 24)
        self.assertEqual(seen, [({"default"}, 10), ({"default"}, 20), ({"default"}, 23)])
        self.assertEqual((queue.get("j0").state, queue.get("j24").state), ("dead", "cancelled"))
        self.assertEqual(notes, ["job j24 is not dead any more"])

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
        queuectl.require_safe(self.db)
        queue.register("dead", "s", None, None)
        os.close(queuectl.create_file(queue.lock_path("new")))

        def is_held(path):
            if path == queue.lock_path("new"):
                other.register("new", "s", None, None)
            return False
        with mock.patch.object(queuectl, "is_held", is_held):
            queue.sweep()
        self.assertEqual(queue._rows("SELECT name FROM workers")[0]["name"], "new")

    def test_methods_refuse_what_they_cannot_store(self):
        queue = self.queue()
        for fields in [dict(command=None), dict(priority="x"), dict(timeout=-1), dict(after=["x"]),
                       dict(delay=1, run_at=1), dict(env="A"), dict(id="a b")]:
            with self.subTest(fields=fields), self.assertRaises(QueueError):
                queue.enqueue(**dict({"command": "true"}, **fields))
        self.assertEqual(list(queue.jobs()), [])
        self.refuses("faild", queue.jobs("faild").__next__)
        self.refuses("there is no state", queue.newest, "faild")
        for method, argument in ((queue.get, "a"), (queue.runs, "a"), (queue.cancel, "abc"),
                                 (queue.retry, "abc")):  # one id is one
            self.refuses("no job " + argument, method, argument)
        queue.enqueue("true", id="a")
        claim = self.claim(queue)
        self.assertFalse(queue.cancel_requested(claim))
        self.assertEqual([job.state for job in queue.cancel("a")], ["processing"])
        self.assertTrue(queue.cancel_requested(claim))
        self.settle(queue, claim, "cancelled")
        queue.prune(queuectl.ENDED)
        self.refuses("deleted", queue.output, claim.run)

    def test_a_vanished_folder(self):
        """A job without a folder of its own is refused where there is none to run it in."""
        queue = self.queue()
        os.mkdir(self.path("gone"))
        os.chdir(self.path("gone"))
        os.rmdir(self.path("gone"))
        self.refuses("--cwd", queue.enqueue, "true")
        queue.enqueue("true", cwd=self.dir)


class ModelTest(Case):
    """Thousands of random operations on three connections, against a plain dictionary.

    Clocks jump, stale results come in, jobs wait for each other, keys collide; the queue must
    be what the dictionary is, and what it returns, notes and counts must be what follows from
    that. QUEUECTL_SEED repeats a run, QUEUECTL_OPERATIONS makes it longer."""

    SERVED = {"w-all": None, "w-a": ["a"], "w-bc": ["b", "c"]}
    SEED = os.environ.get("QUEUECTL_SEED")  # (what a Case runs in has no QUEUECTL_ variables)
    OPERATIONS = int(os.environ.get("QUEUECTL_OPERATIONS") or 3000)
    DEFAULTS = {"backoff_base": 2, "backoff_max": 3600, "max_retries": 3, "job_timeout": 300,
                "kill_grace": 5, "output_limit": 65536, "keep_completed": 604800, "on_dead": ""}

    KEPT = ("command", "state", "attempts", "max_retries", "priority", "queue", "last_error",
            "locked_by", "locked_at", "run_at", "updated_at", "after", "unique", "exit_code",
            "started_at", "finished_at")

    def test_random_operations(self):
        import random
        seed = int(self.SEED or random.randrange(10 ** 9))
        self.random = random.Random(seed)
        self.time = self.clock()
        self.queues = {}
        self.reopen()
        self.jobs, self.claims, self.paused, self.serial = {}, [], set(), 0
        self.limits = {}
        self.stats = collections.Counter()
        self.settings = dict(self.DEFAULTS)
        self.trace, self.done = [], set()
        operations = [self.do_enqueue] * 6 + [self.do_claim] * 8 + [self.do_settle] * 8 + [
            self.do_stale, self.do_retry, self.do_retry_all, self.do_cancel, self.do_cancel,
            self.do_pause, self.do_resume, self.do_resume, self.do_clock, self.do_clock,
            self.do_set, self.do_prune, self.do_edit, self.do_edit, self.do_limit] + [
            lambda: self.do_enqueue(self.random.choice([2, 3, 4]))] * 2
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
            {*queuectl.STATES, *queuectl.VIEWS, *OUTCOMES, "stale", "key", "circle",
             "prune", "due", "capped", "drawn", "stuck", "limited", "edited", "not edited",
             "told"}, self.done, "seed %d: not met" % seed)

    # What the model knows.

    def any_queue(self):
        return self.queues[self.random.choice(list(self.queues))]

    def reopen(self):
        for name, served in self.SERVED.items():
            if name in self.queues:
                self.queues[name].close()
            self.queues[name] = self.queue(durable=False)
            self.queues[name].serve(served)

    def log(self, text, *values):
        self.trace.append(text % values)

    def call(self, method, *arguments, refusal=None, **fields):
        """Let any connection do it, or refuse it with such words."""
        self.log("%s %s %s", method, arguments, fields)
        with self.assertRaisesRegex(QueueError, refusal) if refusal else contextlib.nullcontext():
            return getattr(self.any_queue(), method)(*arguments, **fields)

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

    def held(self):
        """The queues of which no job may start now."""
        running = collections.Counter(job["queue"] for job in self.jobs.values()
                                      if job["state"] == "processing")
        limited = {name for name, limit in self.limits.items() if limit <= running[name]}
        self.done.update({"limited"} if limited else ())
        return self.paused | limited

    def too_late(self, job):
        """A retry never waits for longer than backoff_max, whatever the clock was at its end."""
        return job["hold"] == "failed" \
            and job["run_after"] > self.time.now + self.settings["backoff_max"]

    def last_run(self, job):
        """What a job tells of it, once it has begun and until it is as new again."""
        old = job["state"] == "pending" and not job["attempts"]
        return {} if old or not job["runs"] else {
            key: job["runs"][-1][key] for key in ("exit_code", "started_at", "finished_at")}

    def active(self, key):
        return [id for id, job in self.jobs.items() if key and job["unique"] == key
                and job["state"] in ("pending", "processing")]

    def change(self, job, state):
        job.update(state=state, updated=queuectl.iso(self.time.now))

    def pick(self, *states):
        ids = [id for id, job in self.jobs.items() if not states or job["state"] in states]
        return self.random.choice(ids) if ids else None

    def needs(self, id):
        """The jobs that it still waits for: those that have ended badly first, then in order."""
        return sorted(self.jobs[id]["unmet"], key=lambda need: (
            self.jobs[need]["state"] not in ("dead", "cancelled"), list(self.jobs).index(need)))

    def stuck(self, id):
        return any(self.jobs[need]["state"] in ("dead", "cancelled") or self.stuck(need)
                   for need in self.jobs[id]["unmet"])

    def compare(self):
        """Every job, in order, and all that can be asked."""
        queue, ids = self.any_queue(), list(self.jobs)
        self.assertEqual([(job.id, job.view, job.run, bool(job.cancel)) + tuple(
            job.as_dict()[key] for key in self.KEPT) for job in queue.jobs()], [
            (id, self.view(job), job["run"], job["cancel"]) + tuple(map(dict(
                job, last_error=job["error"], locked_by=job["worker"], updated_at=job["updated"],
                locked_at=job["worker"] and job["updated"], run_at=queuectl.iso(job["run_after"]),
                **self.last_run(job)).get, self.KEPT))
            for id, job in self.jobs.items()])
        counts = dict.fromkeys(queuectl.STATES + queuectl.VIEWS, 0)
        for job in self.jobs.values():
            for state in {job["state"], self.view(job)}:
                counts[state] += 1
                self.done.add(state)
        self.assertEqual(queue.counts(), counts)
        state = self.random.choice(queuectl.STATES + queuectl.VIEWS + (None,))
        name, limit = self.random.choice(["a", "none", None]), self.random.choice([0, 3, None])
        with mock.patch.object(queuectl, "RARE", self.random.choice([0, 5000])), \
                mock.patch.object(queuectl, "PAGE", self.random.choice([2, 1000])):
            self.assertEqual(self.ids(queue.jobs(state, name, limit)), [
                id for id, job in self.jobs.items() if state in (None, job["state"], self.view(job))
                and name in (None, job["queue"])][:limit])
        word = self.random.choice(["", "J3", "5% OF", "_", "%", "!", "nothing"])
        with mock.patch.multiple(queuectl, SPAN=self.random.choice([7, 20000]),
                                 RARE=self.random.choice([0, 5000])):
            found, before = queue.newest(state, name, word, None, 10)
            while before is not None:
                page, before = queue.newest(state, name, word, before, 10)
                self.assertLessEqual(len(page), 10)
                found += page
            self.assertEqual(self.ids(found), [
                id for id, job in reversed(list(self.jobs.items()))
                if state in (None, job["state"], self.view(job)) and name in (None, job["queue"])
                and (word.lower() in id or word.lower() in job["command"])], (state, name, word))
            for id in ids[:1]:  # by its whole id it is found at once, but for a page full of others
                page = self.ids(queue.newest(word=id)[0])
                self.assertTrue(id in page or len(page) == 50, id)
        waiting = [job["run_after"] for job in self.jobs.values() if job["state"] == "pending"
                   and job["hold"] and not job["unmet"]]
        some = any(job["run_after"] <= self.time.now or self.too_late(job)
                   for job in self.jobs.values() if job["state"] == "pending"
                   and job["hold"] and not job["unmet"])
        self.assertEqual(queue.next_due(), self.time.now if some else min(waiting, default=None))
        ready = [max(queuectl.from_iso(job["updated"]), job["run_after"] or 0)
                 for job in self.jobs.values() if self.view(job) == "pending"
                 and not {job["queue"], "*"} & self.held()]
        self.assertEqual(queue.oldest_ready(), ready[0] if ready else None)
        self.assertEqual(queue.paused(), sorted(self.paused))
        self.assertEqual((queue.held(), queue.limits()), (self.held(), self.limits))
        self.assertEqual(queue.settings(), self.settings)
        self.assertEqual({row[:2]: (row[2], row[3]) for row in queue.stats()},
                         {key: (runs, runs / 2) for key, runs in self.stats.items()})
        for id in self.random.sample(ids, min(3, len(ids))):
            job, runs = queue.get(id), queue.runs(id)
            self.assertEqual([(run.as_dict(), run.number, queue.output(run.run)) for run in runs], [
                (run, number, (run["outcome"] or "").encode())
                for number, run in enumerate(self.jobs[id]["runs"], 1)])
            needs = self.needs(id) if job.state == "pending" else []
            self.assertEqual(queue.blocker(job), (needs[0], self.jobs[needs[0]]["state"])
                             if needs else None)
            self.assertEqual(queue.stuck(job), bool(needs) and self.stuck(id))
            self.done.update({"stuck"} if needs and self.stuck(id) else ())

    # What can happen.

    def new_job(self, others):
        fields = {"command": self.random.choice(["true", "echo 5% of_it"]),
                  "queue": self.random.choice("aabc"),
                  "priority": self.random.choice([0, 0, 0, -1, 5])}
        self.serial += 1
        fields["id"] = "j%d" % self.serial
        if self.random.random() < 0.05 and self.jobs:
            fields["id"] = self.pick()
        elif not others and self.random.random() < 0.2:
            del fields["id"]  # one is drawn
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
        stored, added, notes, told = [], {}, [], []
        refused = None
        for job in fields:
            id, active = job.get("id", "?"), self.active(job.get("unique")) or [
                other for other, new in added.items() if job.get("unique")
                and new["unique"] == job["unique"]]
            if active:
                self.done.add("key")
                stored.append(active[0])
                notes.append("%s has the key %s" % (active[0], job["unique"]))
                continue
            if id in self.jobs or id in added:
                refused = "taken"
                break
            run_after = job.get("run_at")
            if job.get("delay") is not None:
                run_after = self.time.now + job["delay"]
            stored.append(id)
            added[id] = self.new(
                command=job["command"], queue=job["queue"], priority=job["priority"],
                run_after=run_after, after=job.get("after", []), unique=job.get("unique"),
                max_retries=job.get("max_retries", self.settings["max_retries"]))
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
            self.assertRegex(str(caught.exception), r"\Ajob \d+: |circle")
            self.assertIn(refused, str(caught.exception))
            return
        ids = []
        if batch == 1 and not notes:
            ids.append(queue.enqueue(**fields[0]))
        else:
            with mock.patch.object(queuectl, "PAGE", 2):
                queue.enqueue_from([("", job) for job in fields], ids.extend, told.append)
        if stored == ["?"]:
            self.done.add("drawn")
            self.assertNotIn(ids[0], self.jobs)
            stored, added = ids, {ids[0]: added["?"]}
        self.assertEqual(ids, stored)
        self.assertEqual([note.partition(" and ")[0] for note in told], notes)
        self.jobs.update(added)
        for job in added.values():
            job["unmet"] = {need for need in job["after"]
                            if self.jobs[need]["state"] != "completed"}
            self.hold(job)

    def do_claim(self):
        worker = self.random.choice(list(self.SERVED))
        queue, served = self.queues[worker], self.SERVED[worker]
        claim = self.claim(queue, worker)
        for job in self.jobs.values():
            if job["state"] == "pending" and job["hold"] and not job["unmet"]:
                if self.too_late(job):
                    job["run_after"] = self.time.now + self.settings["backoff_max"]
                    self.done.add("capped")
                if job["run_after"] <= self.time.now:
                    job["hold"] = None
                    self.done.add("due")
        ready = [(-job["priority"], number, id) for number, (id, job) in
                 enumerate(self.jobs.items()) if self.view(job) == "pending"
                 and (served is None or job["queue"] in served)
                 and not {job["queue"], "*"} & self.held()]
        self.log("%s claims %s", worker, claim and claim.id)
        if not ready:
            self.assertIsNone(claim)
            return
        id = min(ready)[2]
        self.assertEqual(claim and claim.id, id)
        job = self.jobs[id]
        self.change(job, "processing")
        job.update(attempts=job["attempts"] + 1, cancel=False, worker=worker, run=claim.run)
        job["runs"].append(dict.fromkeys(("outcome", "error", "exit_code", "signal", "finished_at"),
                                         None))
        job["runs"][-1].update(worker=worker, started_at=queuectl.iso(self.time.now))
        self.assertEqual((claim.attempts, claim.max_retries, claim.timeout),
                         (job["attempts"], job["max_retries"], self.settings["job_timeout"]))
        self.assertTrue(all(claim.run > other.run for other in self.claims))
        self.claims.append(claim)

    def do_settle(self):
        open_claims = [claim for claim in self.claims if claim.id in self.jobs
                       and self.jobs[claim.id]["run"] == claim.run
                       and self.jobs[claim.id]["state"] == "processing"]
        if not open_claims:
            return
        claim = self.random.choice(open_claims)
        outcome = self.random.choice(("completed",) * 4 + ("failed",) * 4 + OUTCOMES)
        job = self.jobs[claim.id]
        self.log("settle %s: %s", claim.id, outcome)
        end = {"exit_code": self.random.choice([0, 3, None]),
               "signal": self.random.choice([15, None])}
        settled = self.settle(self.any_queue(), claim, outcome, output=outcome.encode(), **end)
        self.done.add(outcome)
        self.stats[job["queue"], outcome] += 1
        job.update(worker=None, run_after=None, hold=None)
        job["runs"][-1].update(end, outcome=outcome, finished_at=queuectl.iso(self.time.now),
                               error=None if outcome == "completed" else outcome)
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
            if self.settings["on_dead"] and not job["tells"]:
                self.add_told(claim.id, job)
        else:
            self.change(job, "pending")
            if outcome in ("failed", "timeout"):
                delay = min(self.settings["backoff_base"] ** job["attempts"],
                            self.settings["backoff_max"])
                if delay:
                    job.update(hold="failed", run_after=self.time.now + delay)
        job["cancel"] = False
        self.assertEqual((settled.state, settled.run_after), (job["state"], job["run_after"]))

    def add_told(self, id, dead):
        """What on_dead says is the last job now."""
        job = list(self.any_queue().jobs(newest=1))[0]
        self.assertEqual((job.command, job.queue, job.env["QUEUECTL_DEAD_JOB"]),
                         (self.settings["on_dead"], dead["queue"], id))
        self.assertNotIn(job.id, self.jobs)
        self.jobs[job.id] = self.new(
            queue=dead["queue"], max_retries=self.settings["max_retries"], tells=True)
        self.done.add("told")

    def new(self, **fields):
        return dict(dict(
            state="pending", attempts=0, priority=0, hold=None, run_after=None, after=[],
            unique=None, error=None, worker=None, run=None, cancel=False, runs=[], unmet=set(),
            command=self.settings["on_dead"],
            updated=queuectl.iso(self.time.now), tells=False), **fields)

    def do_stale(self):
        """A result of a run that is over, or of a deleted job: fenced off."""
        stale = [claim for claim in self.claims if claim.id not in self.jobs
                 or self.jobs[claim.id]["run"] != claim.run
                 or self.jobs[claim.id]["state"] != "processing"]
        if stale:
            claim = self.random.choice(stale)
            self.log("stale settle of %s", claim.id)
            self.assertIsNone(self.settle(self.any_queue(), claim,
                                          self.random.choice(OUTCOMES)))
            self.done.add("stale")

    def do_cancel(self):
        ids = list(filter(None, [self.pick("pending", "processing", "cancelled"), self.pick()]))
        ids = ids[:self.random.choice([1, 1, 2])]
        refused = any(self.jobs[id]["state"] in ("completed", "dead") for id in ids)
        self.call("cancel", ids, refusal="has ended already" if refused else None)
        for id in () if refused else ids:
            job = self.jobs[id]
            if job["state"] == "pending":
                if self.view(job) == "failed":
                    job["run_after"] = None
                self.change(job, "cancelled")
            elif job["state"] == "processing":
                job["cancel"] = True

    def revive(self, id):
        """Whether a job may be retried; then it is."""
        job = self.jobs[id]
        if job["state"] not in ("dead", "cancelled") or self.active(job["unique"]):
            return False
        self.change(job, "pending")
        job.update(attempts=0, error=None)
        self.hold(job)
        job["run_after"] = job["hold"] and job["run_after"]
        return True

    def do_retry(self):
        id = self.pick("dead", "cancelled") if self.random.random() < 0.9 else self.pick()
        if id is not None:
            self.call("retry", [id], refusal=None if self.revive(id) else "be retried")

    def do_retry_all(self):
        """Those whose key another job has stay dead; of two with one key, either is retried."""
        if self.random.random() < 0.7:
            return
        groups = {}
        for id, job in self.jobs.items():
            if job["state"] == "dead":
                groups.setdefault(job["unique"] or (id,), []).append(id)
        count, queue = self.call("retry_all"), self.any_queue()
        for key, ids in groups.items():
            done = [id for id in ids if queue.get(id).state == "pending"]
            self.assertEqual(len(done), not self.active(key), (key, ids))
            count -= sum(map(self.revive, done))
        self.assertEqual(count, 0)

    def do_edit(self):
        id, fields = self.pick(), self.random.choice([
            {"queue": "b"}, {"priority": 7, "queue": "a"}, {"max_retries": 1}, {"delay": 0},
            {"delay": 100}, {"run_at": self.time.now + 5}])
        if id is None:
            return
        job = self.jobs[id]
        refused = job["state"] in ("processing", "completed")
        self.done.add("not edited" if refused else "edited")
        self.call("edit", id, refusal="can be changed" if refused else None, **fields)
        if refused:
            return
        for key in ("queue", "priority", "max_retries"):
            job[key] = fields.get(key, job[key])
        job["updated"] = queuectl.iso(self.time.now)
        if "delay" in fields or "run_at" in fields:
            job["run_after"] = fields.get("run_at", self.time.now + fields.get("delay", 0))
            if job["state"] == "pending" and not job["unmet"]:
                self.hold(job)

    def do_limit(self):
        name, limit = self.random.choice("abc"), self.random.choice([1, 2, None, None])
        self.call("limit", name, limit)
        self.limits.pop(name, None)
        if limit:
            self.limits[name] = limit

    def do_pause(self):
        name = self.random.choice(["a", "b", "c", None])
        self.call("pause", name)
        self.paused.add(name or "*")

    def do_resume(self):
        name = self.random.choice(["a", "b", "c", None, None])
        self.call("resume", name)
        self.paused = self.paused - {name} if name else set()

    def do_clock(self):
        jump = self.random.choice([0.1, 1, 2, 5, 40, 5000, -3, -100, -5000])
        self.time.now += jump
        self.log("the clock jumps by %s to %s", jump, self.time.now)

    def do_set(self):
        key, value = self.random.choice([
            ("backoff_base", 0), ("backoff_base", 3), ("backoff_max", 5), ("max_retries", 2),
            ("job_timeout", 7), ("on_dead", "mail me"),
            (self.random.choice(list(self.DEFAULTS)), None)])
        self.call(*("unset_setting", key) if value is None else ("set_setting", key, value))
        self.settings[key] = self.DEFAULTS[key] if value is None else value

    def do_prune(self):
        states = self.random.choice([["completed"], ["dead"], list(queuectl.ENDED)])
        age = self.random.choice([0, 10, 1000])
        before = queuectl.iso(self.time.now - age)
        gone, more = [], None
        while more != []:  # who waited, but is gone now, waits no more
            left = {id: job for id, job in self.jobs.items() if id not in gone}
            waited_for = {need for job in left.values() if job["unmet"] for need in job["after"]}
            more = [id for id, job in left.items() if job["state"] in states
                    and job["updated"] <= before
                    and (job["state"] == "completed" or id not in waited_for)]
            gone += more
        with mock.patch.object(queuectl, "PRUNE_BATCH", self.random.choice([2, 200])):
            self.assertEqual(self.call("prune", states, age), len(gone), gone)
        for id in gone:
            del self.jobs[id]
            self.done.add("prune")


class Commands(Case):
    """The command line: what it accepts, what it refuses and how, and what it prints."""

    def stored(self):
        with Queue(self.db) as queue:
            return [job.as_dict() for job in queue.jobs()], queue.settings(), queue.paused()

    def job_of(self, *words):
        """The job that an enqueue has stored, whose id it printed."""
        return self.job(self.ok(*words).strip())

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
        """Such a line names the word that is wrong, or what is missing."""
        self.ok("enqueue", "--id", "a", "true")
        self.check_refused([(line.split(), line.split()[-1], 2) for line in (
            "enqeue", "worker sotp", "config frob", "list --nope", "list x", "show a b",
            "cancel a --all", "cancel --queue q --all", "dlq purge --queue q --all",
            "prune --queue q --all", "limit q 0", "limit q many", "limit q -1", "completion ksh",
            "--db", "list --db", "list --state faild", "prune --state pending")])
        for code, table in ((2, {
            "required": ["", "worker", "dlq", "config"],
            "give one": ["enqueue", "enqueue --", "enqueue --file x true", "enqueue true -- true",
                         "enqueue --file x -- true", "enqueue --lines x --file y",
                         "enqueue --lines x true"],
            "--id": ["enqueue --id b --file x", "enqueue --id b --lines x"],
            "--env": ["enqueue --env %s true" % word for word in ("NOT_SET_HERE", "=x", "''")],
            "--": ["enqueue ls --colour"],
            "ID": ["show", "logs", "edit"],
            "VALUE": ["config set max_retries"],
            "QUEUE": ["limit"],
            "all": ["limit '*'"],
            "--priority": ["edit a"],
            "--all": ["cancel", "dlq retry", "dlq retry --all a"],
            "--queue": ["dlq retry a --queue q", "list --queue ''", "worker start --queue 'a b'"],
            "--older-than": ["dlq purge a --older-than 1h", "dlq purge --older-than -1",
                             "prune --older-than x"],
            "--limit": ["list --limit -1", "list --limit x"],
            "--timeout": ["wait --timeout x", "worker stop --timeout x"],
            "--run": ["logs a --run x"],
            "--count": ["worker start --count 0", "worker start --count x"],
            "--via": ["worker start --via ''"],
            "--db": ["--db '' list"],
            "": ["--nope", "status -- x", "completion", "resume -x"],
        }), (1, {
            "no job nope": ["show nope", "show --json nope", "logs nope", "logs -f nope",
                            "wait nope", "wait a nope", "cancel nope", "cancel a nope",
                            "dlq retry nope", "enqueue x --after nope"],
            "taken": ["enqueue --id a true"],
            "run": ["logs a --run 1", "logs a --run 5"],
            "run_at": ["enqueue --delay 1 --run-at +1 true"],
            "pending": ["dlq retry a"],
            "a b": ["show 'a b'", "pause 'a b'"],
        })):
            self.check_refused([(shlex.split(line), says, code)
                                for says, lines in table.items() for line in lines])

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

    WRONG = {  # field: values that are refused (class Model has more of each kind)
        "id": ["", "a b", "-a", "\0", "\ud800", "x" * 256, 1, True, [], {}],
        "command": ["", " ", "a\0b", "\ud800", 1, True, [], ["ls"], {"a": 1}],
        "queue": ["", "a b", "-q", 1, True, []],
        "priority": ["", "x", "1.5", 1.5, True, [], float("nan"), 1e999, 2 ** 31, -2 ** 31 - 1],
        "max_retries": [-1, "-1", 1.5, "many", True, [], float("inf"), 2 ** 31],
        "timeout": [-1, "-5s", "soon", "", True, [], float("nan"), 1e300, "inf"],
        "delay": [-1, "-5s", "5y", "", True, {}, float("-inf"), "nan"],
        "run_at": [-1, "tomorrow", "", "2026-13-01", "-10m", True, [], 1.7e12, "nan"],
        "cwd": ["", "a\0", 1, True, []],
        "env": ["A=1", 1, ["NOT_SET_HERE"], ["=x"], {"A": 1}, {"": "x"}, {"A=B": "x"}, {"A": "\0"}],
        "after": ["", "nope", "a b", 1, True, ["nope"], [1], [[]], {"a": 1}, ["a", ""]],
        "unique": ["", "a b", "-a", 1, True, []],
    }

    def test_what_is_hardly_meant_as_a_command(self):
        """It is refused, and the line says how it is done; behind -- it is a command."""
        for name in ("jobs.json", "jobs.jsonl"):
            with open(name, "w") as file:
                file.write("[]")
        self.check_refused([(("enqueue", word), "--file", None) for word in (
            "-", "@job.json", "@", "jobs.json", "jobs.jsonl", self.path("jobs.json"), "[]", " [ ] ",
            '["a"]', "[1]", '[{"command": "x"}]')]
            + [(("enqueue", '{"id": "x", "command": "a", "state": "%s"}' % state), "ended", 1)
               for state in queuectl.ENDED]
            + [(("enqueue", "--run-at", "2", "true"), "23:30", 2)])
        for words in (["[ -f jobs.json ]"], ['[ "$x" = "" ]'], ["no-such.json"], ["jobs.json x"],
                      ["--", "jobs.json"], ["--", "-"], ["./jobs.json.sh"], ["-", "x"]):
            self.ok("enqueue", *words)

    def test_lines(self):
        """A shell command line per line, as xargs and parallel users expect: one transaction, an
        error names its line, blank lines are skipped, options are defaults."""
        self.play("""
            $ queuectl enqueue --lines - --queue q --after nobody <<END
            > true
            > END
            ! queuectl: line 1: after: there is no job nobody
            [1]
            $ queuectl enqueue --lines - --queue q --priority 3 <<END
            > echo 'a  b' | cat
            >
            >    {"not": "json"}
            > - @x #
            > END
            ...
            $ pick command,queue,priority queuectl list --json
            echo 'a  b' | cat q 3
            {"not": "json"} q 3
            - @x # q 3
            $ printf '\\357\\273\\277one\\r\\n\\r\\ntwo' >lines
            $ queuectl enqueue --lines lines >ids
            $ wc -l <ids
            2
            $ pick command queuectl list --json --last 2
            one
            two
            $ queuectl enqueue --lines - <<END
            > END
            """)
        self.check_refused([
            (("enqueue", "--lines", "-"), says, 1, data) for says, data in (
                ("line 3: is not UTF-8", b"a\n\n\xff\n"),
                ("line 2: command: holds a NUL", b"a\n\0\n"),
                ("line 2: command: is", b"a\n" + b"x" * 131072))] + [
            (("enqueue", "--lines", "missing"), "missing", 1)])

    def test_without_dev_fd(self):
        """Where it is not mounted, the numbers of descriptors are tried."""
        with mock.patch("os.listdir", side_effect=FileNotFoundError):
            with open(os.devnull) as file:
                number = file.fileno()
                self.assertIn(number, queuectl.open_descriptors())
            self.assertNotIn(number, queuectl.open_descriptors())

    def test_every_field_with_wrong_values(self):
        """As a field of JSON, and what is a string as an option, too, where it is an error of
        usage."""
        self.ok("enqueue", "--id", "a", "true")
        for field, values in self.WRONG.items():
            option, table = "--" + field.replace("_", "-"), []
            for value in values:
                text, known = json.dumps({"command": "x", field: value}), "nope" not in str(value)
                table.append((("enqueue", text), field if known else "no job nope"))
                if isinstance(value, str) and field not in ("command", "env") and known:
                    table.append((("enqueue", option + "=" + value, "true"), option, 2))
            self.check_refused(table)
        self.check_refused([(("enqueue", '{"command": "x", "delay": 1, "run_at": 1}'), "run_at")])

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

    def test_a_name_that_the_locale_does_not_know(self):
        job = '{"command": "x", "env": ["\u20ac"]}'.encode()
        self.refused("enqueue", "--file", "-", by=self.cli, code=1, stdin=job,
                     says="is not set here", env={
                         "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})

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
            ("null", "line 1: "), ("ls -l", "line 1: "), (b"\xff\xfe{", "UTF-8"),
            (good.encode() + b"\n\xff\n", "line 2: "), (good + "\n\0\n", "line 2: "),
            (good + " " + good, "line 1: "), (good + "," + good, "line 1: "),
            ("[", "array does not end"), ("[" + good, "array does not end"),
            ("[" + good + ",", "array does not end"), ("[" + good + ",]", ""), ("[,]", ""),
            ("[" + good + " " + good + "]", "line 1: "),
            ("[\n" + good + "\n" + good + "\n]", "line 3"),
            ("[" + good + "] x", "line 1: "), ("[" + good + "]\n" + good, "behind the end"),
            ("[" + good + ",\n\n5]", "line 3: "), ("[" + good + ",\n{}]", "line 2: "),
            ("[" + good + ",\n[" + good + "]]", "line 2: "), ('[{"command": "x" "a"}]', ""),
            ("[" * 100000, ""), ("{" * 100000, "line 1: "), ("[" * 950 + "]" * 950, "line 1: "),
            (good + '\n{"command": %s}' % ('{"a":' * 990 + "1" + "}" * 990), "line 2: "),
            ("[" + good + ',{"command": %s}]' % ("[" * 100000), "line 1: "),
            (good + "\n" + '{"command": "x", "priority": %s}' % ("9" * 5000), "line 2: "),
            ('{"command": "x",\n' + good, "line 1: "), ("[" + good + ",\n{", "line 2: "),
            ('{"id": [], "command": "x", "state": "completed"}\n{"command": "x", "after": [[]]}',
             "line 2: after: "),
            ('{"command": "%s"}' % ("x" * 131072), "line 1: "),
            ('{"command": "x", "after": ["b"]}\n', "there is no job b"),
            ('{"command":"x","id":"b","after":["c"]}\n{"command":"x","id":"c","after":["b"]}',
             "circle"),
        ]:
            data = text if isinstance(text, bytes) else text.encode()
            table.append((("enqueue", "--file", "-"), says, 1, data))
        self.check_refused(table)
        with open("jobs", "w") as file:
            file.write(good + "\n{")
        self.check_refused([(("enqueue", "--file", path), says) for path, says in (
            ("jobs", "line 2: "), ("missing", "missing"), ("missing/jobs", "jobs"),
            (self.dir, self.dir), ("", ""), ("a\0b", ""))])

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

    def test_enqueue_prints_the_id_and_nothing_else(self):
        self.assertRegex(self.ok("enqueue", "true"), r"\A[0-9a-z]{6}\n\Z")
        self.assertEqual(self.ok("enqueue", "--id", "a", "true"), "a\n")
        # What nobody may set is ignored, whatever it is.
        ignored = set(Storage.KEYS) - set(self.WRONG) | {"runs"}
        job = self.job_of("enqueue", json.dumps(dict(
            dict.fromkeys(ignored, ["odd"]), id="b", command="x", state="processing")))
        self.assertEqual((job.id, job.view, job.attempts, job.locked_by, job.exit_code,
                          job.last_error), ("b", "pending", 0, None, None, None))

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
            for form, line in enumerate((
                    ["enqueue", "true"] + words, ["enqueue"] + words + ['{"command": "true"}'],
                    ["enqueue"] + words + ["--", "true"],
                    ["enqueue", json.dumps({"command": "true", field: value})])):
                with self.subTest(line=line):
                    self.db = os.environ["QUEUECTL_DB"] = self.path("%d-%d.db" % (number, form))
                    for id in "ab":
                        self.ok("enqueue", "--id", id, "true")
                    self.assertEqual(self.job_of(*line).as_dict()[attribute], expected)

    def test_options_are_defaults_for_json(self):
        """The job's own field wins; env merges; null is the same as absent."""
        self.clock()
        self.play(r"""
            $ queuectl enqueue --queue q --priority 5 --timeout 60 \
            >     --max-retries 9 --env A=option --env B=option --delay 60 --cwd / --file - <<END
            > [{"id": "1", "command": "x"},
            >  {"id": "2", "command": "x", "queue": "own", "priority": 0, "timeout": "2m",
            >   "max_retries": 1, "env": {"B": "own", "C": "own"}, "delay": 0, "cwd": "/usr"},
            >  {"id": "3", "command": "x", "queue": null, "env": null, "delay": null,
            >   "after": null, "unique": null, "run_at": null, "priority": null},
            >  {"id": "4", "command": "x", "run_at": "2030-01-01T00:00Z"},
            >  {"id": "5", "command": "x", "env": ["B=own"]}]
            > END
            1
            2
            3
            4
            5
            $ pick queue,priority,timeout,max_retries,env,run_at,cwd queuectl list --json
            q 5 60.0 9 {"A": "option", "B": "option"} 2027-01-15T08:01:00.000Z /
            own 0 120.0 1 {"A": "option", "B": "own", "C": "own"} 2027-01-15T08:00:00.000Z /usr
            q 5 60.0 9 {"A": "option", "B": "option"} 2027-01-15T08:01:00.000Z /
            q 5 60.0 9 {"A": "option", "B": "option"} 2030-01-01T00:00:00.000Z /
            q 5 60.0 9 {"A": "option", "B": "own"} 2027-01-15T08:01:00.000Z /
            $ queuectl enqueue --id option '{"command": "x", "id": "own"}'
            own
            $ queuectl enqueue '{"command": "x", "id": null}'
            ......
            """)

    def test_forms_of_a_file(self):
        """JSON Lines or an array, in any layout, from a file or from stdin."""
        a, b = '{"id": "a", "command": "x"}', '{"id": "b", "command": "y", "env": {"A": "[\u00fc"}}'
        both = [json.loads(a), json.loads(b)]
        for text in (a + "\n" + b, a + "\n\n  " + b + "\n\n", "\n\n" + a + "\r\n" + b + "\r\n",
                     "[%s,%s]" % (a, b), "[\n%s,\n%s\n]\n" % (a, b), "[%s\n,%s\n\n]  \n\n" % (a, b),
                     "\n [ %s , %s ] " % (a, b), "\ufeff" + a + "\n" + b, "\ufeff[%s,%s]" % (a, b),
                     json.dumps(both, indent=4), json.dumps(both, indent=1).replace("\n", "\n\n"),
                     json.dumps(both[0], indent=2) + "\n" + b):
            for form, size in (("-", 1 << 16), ("jobs", 1 << 16), ("-", 1), ("-", 7)):
                with self.subTest(text=text, size=size), mock.patch("queuectl.READ_SIZE", size):
                    with open("jobs", "wb") as file:
                        file.write(text.encode())
                    ids = self.ok("enqueue", "--file", form, stdin=text.encode()).split()
                    self.assertEqual([(job.id, job.command, job.env) for job in map(self.job, ids)],
                                     [("a", "x", {}), ("b", "y", {"A": "[\u00fc"})])
                    self.ok("cancel", "a", "b")
                    self.ok("prune")
        for text in ("", "\n\n", "[]", " [ ] \n"):
            self.assertEqual(self.ok("enqueue", "--file", "-", stdin=text.encode()), "")

    def test_what_list_prints_enqueue_reads(self):
        """The jobs that have not ended, as new."""
        everything = {
            "id": "all", "command": "x 'y'\n\u00fc", "queue": "q", "priority": 3, "max_retries": 8,
            "timeout": 1.5, "run_at": 1900000000.125, "cwd": "/usr", "env": {"A": "\u00fc"},
            "after": ["bad"], "unique": "k"}
        with self.queue() as queue:
            for id in ("done", "dead", "bad", "run", "gone"):
                queue.enqueue("x", id=id, max_retries=1 if id == "dead" else 3)
            for outcome in ("completed", "failed", "failed"):
                self.run_next(queue, outcome)
            self.claim(queue)
            list(queue.enqueue_many([
                everything, {"id": "next", "command": "true", "after": ["done"]}]))
            queue.cancel(["gone"])
        self.play("""
            $ queuectl list --json | queuectl --db other.db enqueue --file -
            bad
            run
            all
            next
            ! queuectl: 3 jobs skipped, which had ended already: done dead gone
            $ queuectl list --json | queuectl --db other.db enqueue --file -
            ! queuectl: line ...: the id bad is taken...
            [1]
            $ queuectl --db third.db enqueue --file - <<END
            > {"id": "done", "command": "x", "state": "completed"}
            > {"id": "one", "command": "x", "after": "done"}
            > END
            one
            ! queuectl: 1 job skipped, which had ended already: done
            """)
        with Queue(self.path("other.db")) as queue:
            self.assertEqual([(job.view, job.attempts) for job in queue.jobs()], [
                ("scheduled", 0), ("pending", 0), ("blocked", 0), ("pending", 0)])
            job = queue.get("all").as_dict()
        for key, value in dict(everything, run_at="2030-03-17T17:46:40.125Z").items():
            self.assertEqual(job[key], value, key)

    def test_options_stand_anywhere(self):
        """But not behind --. Of two databases the last one counts."""
        for line in ("--db a.db enqueue true --priority -4", "enqueue --db a.db --priority=-4 true",
                     "enqueue --priority -4 true --db a.db", "--db=a.db enqueue true",
                     "enqueue --db a.db -- true", "enqueue -- x --db b.db", "pause --db a.db -- q",
                     "config set --db a.db max_retries 5", "enqueue true --id a",
                     "enqueue true --id b", "cancel -- a b", "cancel a --db q.db b"):
            self.ok(*line.split())
        self.play("""
            $ pick command,state queuectl list --json
            x --db b.db pending
            true cancelled
            true cancelled
            $ queuectl --db a.db config get max_retries
            5
            $ pick command,priority queuectl --db b.db list --json --db a.db
            true -4
            true -4
            true -4
            true 0
            true 0
            """)
        self.assertFalse(os.path.exists("b.db"))

    def test_settings(self):
        for key, value, shown in [
                ("max-retries", None, "3"), ("backoff_max", None, "1h"),
                ("max-retries", "5", "5"), ("max_retries", "6", "6"),
                ("backoff-base", "1.5", "1.5"), ("backoff_max", "90m", "90m"),
                ("job-timeout", "0", "0s"), ("kill_grace", "500", "500s"),
                ("output-limit", "1M", "1M"), ("output_limit", "100", "100"),
                ("keep-completed", "14d", "14d"), ("keep_completed", "1.5", "1.5s"),
                ("keep_completed", "1.5s", "1.5s"), ("kill_grace", "500s", "500s")]:
            if value is not None:
                self.assertEqual(self.main("config", "set", key, value), (0, "", ""))
            for name in (key.replace("-", "_"), key.replace("_", "-")):
                self.assertEqual(self.ok("config", "get", name), shown + "\n")
        listed = self.ok("config", "list")
        for name in queuectl.SETTINGS:
            self.assertIn("\n%s " % name.replace("_", "-"), listed)
            self.ok("config", "unset", name.replace("_", "-"))
        self.assertRegex(listed, r"\ASETTING +VALUE +MEANING\n(.*\n)*max-retries +6 ")
        self.ok("config", "unset", "max_retries")
        for key, shown in (("max_retries", "3\n"), ("keep_completed", "7d\n")):
            self.assertEqual(self.ok("config", "get", key), shown)

    # What is printed.

    def a_bit_of_everything(self):
        self.play("""
            $ queuectl enqueue --file - <<END
            > {"id": "done", "command": "echo out"}
            > {"id": "dead", "command": "echo it broke; exit 3", "max_retries": 1}
            > {"id": "bad", "command": "false"}
            > {"id": "run", "command": "true", "queue": "q"}
            > {"id": "later", "command": "true", "delay": 99, "env": {"PASSWORD": "hunter2"}}
            > {"id": "blocked", "command": "true", "after": ["dead"]}
            > END
            ...
            $ work 3
            done completed
            dead dead
            bad failed
            """)
        self.claim(self.queue())

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
        for words, ids in [("--state cancelled", ""), ("--state pending", "bad later blocked"),
                           ("--state failed", "bad"), ("--queue q", "run"), ("--limit 0", ""),
                           ("--limit 2", "done dead"), ("--queue none", ""), ("--last 0", ""),
                           ("--last 2", "later blocked"), ("--last 1 --queue q", "run"),
                           ("--last 1 --state dead", "dead"),
                           ("--last 2 --queue default --limit 1", "later"),
                           ("--state pending --queue default --limit 1", "bad")]:
            found = json.loads(self.ok("list", "--json", *words.split()))
            self.assertEqual(" ".join(job["id"] for job in found), ids, words)

    def test_tables(self):
        self.clock()
        self.a_bit_of_everything()
        self.play("""
            $ queuectl list
            ID       STATE       TRIES  QUEUE    WHEN            COMMAND
            done     completed   1/3    default  0ms ago         echo out
            dead     dead        1/1    default  0ms ago         echo it broke; exit 3
            bad      failed      1/3    default  in 2.0s         false
            run      processing  1/3    q        for 0ms         true
            later    scheduled   0/3    default  in 1m39s        true
            blocked  blocked     0/3    default  by dead (dead)  true
            $ queuectl dlq list
            ID    TRIES  QUEUE    WHEN     ERROR                  COMMAND
            dead  1/1    default  0ms ago  exit code 3: it broke  echo it broke; exit 3
            $ queuectl show dead
            job       dead
            command   echo it broke; exit 3
            state     dead
            attempts  1 of 1
            queue     default
            folder    ...
            enqueued  2027-01-15 08:00:00 +0000 (0ms ago)
            error     exit code 3: it broke
            RUN  OUTCOME  STARTED                              TOOK  WORKER  ERROR
            1    failed   2027-01-15 08:00:00 +0000 (0ms ago)  0ms   w-1     exit code 3: it broke
            $ queuectl show later
            ...
            state     scheduled
            ...
            env       PASSWORD
            ...
            runs at   2027-01-15 08:01:39 +0000 (in 1m39s)
            # Secrets are not shown to people.
            $ queuectl show later | grep hunter
            [1]
            $ pick env queuectl show later --json
            {"PASSWORD": "hunter2"}
            $ queuectl show blocked
            ...
            state     blocked
            waits     it waits for dead, which is dead (to run that again: ... dlq retry dead); ...
            ...
            after     dead
            ...
            $ queuectl logs done
            out
            # No colour, and no secret, in a pipe.
            $ (queuectl list; queuectl status; queuectl dlq list; queuectl metrics) >all 2>&1
            $ grep -e hunter -e '\x1b' all
            [1]
            """.replace(r"\x1b", "\x1b"))

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

    # How it ends.

    def test_it_is_the_same_as_a_process(self):
        """Also where stdout is no UTF-8: no text ends in a traceback."""
        for line, expected in [
                ("--version", 0), ("enqueue --id \u00fc \u20ac", 0), ("enqueue --", 2), ("x", 2),
                ("list", 0), ("show \u00fc", 0), ("list --json", 0), ("status", 0),
                ("show \u20ac", 1), ("wait --timeout 0", 124)]:
            code, out, err = self.cli(*line.split(), env={
                "PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"})
            self.assertEqual((code, bool(out)), (expected, expected == 0), err)
            self.assertRegex(err, r"\A(queuectl: [^\n]+\n)*\Z")
            # On top of the error, why a job waits, and that nobody works.
            self.assertEqual(err.count("\n"), (code > 0) + (code == 124 or line == "status")
                             + ("--id" in line))

    def test_ctrl_c_stores_nothing(self):
        """130, and no traceback. It waits at a FIFO: a signal that comes before the system call
        would be heard by Python only after it."""
        os.mkfifo(self.path("jobs"))
        process = self.start("enqueue", "--file", self.path("jobs"), stdout=subprocess.PIPE)

        def opened():
            with contextlib.suppress(OSError):  # ENXIO: nobody reads it yet
                return os.open(self.path("jobs"), os.O_WRONLY | os.O_NONBLOCK)

        jobs = self.until(opened)
        self.addCleanup(os.close, jobs)
        os.write(jobs, b'{"command": "true"}\n')
        self.until(lambda: not any(fcntl.ioctl(jobs, termios.FIONREAD, bytes(4))))
        if sys.platform == "linux":
            self.until(lambda: b") S" in read_file("/proc/%d/stat" % process.pid))
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(PATIENCE), 130)
        self.assertEqual((process.stdout.read(), read_file(process.log)), (b"", b""))
        self.assertEqual(self.stored()[0], [])

    def test_a_closed_pipe_ends_quietly(self):
        """`list | head -1`, where more is printed than a pipe holds."""
        with self.queue() as queue:
            list(queue.enqueue_many({"command": "x" * 200} for _ in range(2000)))
        with open("many", "w") as file:
            file.write("true\n" * 20000)
        for words in (["list"], ["list", "--json"], ["enqueue", "--lines", "many"]):
            process = self.start(*words, stdout=subprocess.PIPE)
            self.assertTrue(process.stdout.readline())
            process.stdout.close()
            self.assertEqual((process.wait(PATIENCE), read_file(process.log)), (0, b""), words)
            process.stdout = None
        self.play("""
            $ queuectl list | head -1
            ID ...
            # Where there is no stdout at all, it does not matter.
            $ queuectl list >&- 2>err; grep -c Traceback err
            0
            [1]
            """)

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full here")
    def test_output_that_cannot_be_written(self):
        """A full disk behind stdout: one line and exit 1."""
        self.play("""
            $ queuectl enqueue true >/dev/full
            ! queuectl: stored, but the ids cannot be printed: ...
            [1]
            $ queuectl list >/dev/full
            ! queuectl: ...
            [1]
            $ queuectl list --json >/dev/full
            ! queuectl: ...
            [1]
            $ queuectl show nobody 2>/dev/full
            [1]
            $ queuectl nonsense 2>/dev/full
            [2]
            """)

    def test_values_that_are_nested_deep(self):
        def readable(depth):
            try:
                return json.loads("[" * depth + "]" * depth) is not None
            except RecursionError:
                return False

        low, high = 1, 200000  # between them is the most that json reads here
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if readable(middle) else (low, middle)
        for depth in (10, low // 2, *range(low - 20, low + 2), 2 * high):
            for field in (*self.WRONG, "nonsense"):
                for opening, closing in (("[", "]"), ('{"a":', "}")):
                    job = '{"command": "true", "%s": %s1%s}' % (
                        field, opening * depth, closing * depth)
                    for words in (["enqueue", job], ["enqueue", "--file", "-"]):
                        error = self.refused(*words, code=1, stdin=job.encode())
                        self.assertLess(len(error), 400, words)
        self.assertEqual(self.stored()[0], [])


class Documents(Case):
    """README.md and --help speak of every command, option and setting."""

    COMMANDS = {
        "enqueue": "--file --lines --id --queue --priority --max-retries --timeout --delay "
                   "--run-at --cwd --env --after --unique",
        "worker start": "--count --drain --detach --ensure --queue --via",
        "worker stop": "--queue --now --timeout", "worker list": "--json",
        "status": "--json --watch",
        "list": "--state --queue --limit --last --json", "show": "--json", "logs": "-f --run",
        "wait": "--timeout", "cancel": "--queue --all",
        "edit": "--command --priority --queue --timeout --max-retries --run-at --delay --cwd --env",
        "dlq list": "--queue --json", "dlq retry": "--queue --all",
        "dlq purge": "--older-than --queue --all", "config list": "", "config get": "",
        "config set": "",
        "config unset": "", "pause": "", "resume": "", "limit": "",
        "prune": "--older-than --state --queue",
        "metrics": "", "completion": "", "web": "--port",
    }
    SETTINGS = ("max_retries", "backoff_base", "backoff_max", "job_timeout", "kill_grace",
                "output_limit", "keep_completed", "on_dead")

    def setUp(self):
        super().setUp()
        os.environ["COLUMNS"] = "200"

    def test_every_command_has_help_with_an_example(self):
        """Which the parser that it explains reads."""
        for name, options in self.COMMANDS.items():
            with self.subTest(name):
                text, _, examples = self.ok(*name.split(), "--help").partition("example:\n")
                for option in options.split() + ["--db"]:
                    # with an explanation
                    self.assertRegex(text, r"\n  (-\w, )?%s\b.*\s{2,}\S" % option)
                self.assertRegex(examples, r"queuectl\.py( .*)? %s\b" % name)
            for line in [line for line in examples.splitlines() if "queuectl.py" in line]:
                words = shlex.split(line.strip().replace("<(", "").rstrip(")"), comments=True)
                words = itertools.takewhile(lambda word: word not in (">", ">>"),
                                            words[words.index("queuectl.py") + 1:])
                with self.subTest(line=line):
                    queuectl.parse_arguments([word.rstrip(")") for word in words])
        os.environ["COLUMNS"] = "80"
        for name in ["", "worker", "dlq", "config", *self.COMMANDS]:
            self.assertLessEqual(self.ok(*name.split(), "--help").count("\n"), 24, name)
        top = self.ok("--help")
        for name in self.COMMANDS:
            self.assertRegex(top, r"\n    %s\s+\S" % name.split()[0])
        self.assertFalse(os.path.exists(self.db))

    def test_the_readme_names_all_of_it(self):
        text = read_file(os.path.join(HERE, "README.md")).decode("utf-8")
        for name in self.COMMANDS:
            with self.subTest(name):
                self.assertTrue(re.search(r"`%s\b" % name, text))
                shown = self.ok(*name.split(), "--help").partition("example:")[0]
                for short, long in re.findall(r"\n  (?:(-\w), )?(--[a-z-]+)", shown):
                    self.assertTrue(long == "--help" or any(
                        option and re.search(r"[ `\[]%s\b" % option, text)
                        for option in (short, long)), long)
        self.assertEqual(tuple(queuectl.SETTINGS), self.SETTINGS)
        for name in self.SETTINGS:
            with self.subTest(name):
                default = self.ok("config", "get", name).strip()
                number = re.match(r"[\d.]+|\w+", default).group()
                self.assertTrue(any(re.search(r"\b%s\b|\b%s" % (number, default), line)
                                    for line in text.splitlines() if name in line), default)
        for word in queuectl.STATES + queuectl.VIEWS + (
                "QUEUECTL_DB", "QUEUECTL_JOB_ID", "QUEUECTL_ATTEMPT", "QUEUECTL_MAX_RETRIES",
                "QUEUECTL_QUEUE", "QUEUECTL_WORKER", "QUEUECTL_COMMAND", "XDG_STATE_HOME",
                "NO_COLOR", "124", "130", "from queuectl import"):
            self.assertTrue(word in text, word)
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
        """Stop a process with SIGSTOP, but not while it writes or reads the database: others
        would wait for it. It goes on at the end of the test, if not before."""
        self.addCleanup(lambda: alive(pid) and os.kill(pid, signal.SIGCONT))

        def free():
            os.kill(pid, signal.SIGSTOP)
            with contextlib.closing(sqlite3.connect(self.db, timeout=0.5)) as look:
                if look.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0:
                    return True
            os.kill(pid, signal.SIGCONT)
            return False
        self.until(free)

    def use(self, *names):
        """Go on with another database, in a folder of its own if there are two names."""
        self.db = self.env["QUEUECTL_DB"] = os.environ["QUEUECTL_DB"] = self.path(*names)
        os.makedirs(os.path.dirname(self.db), 0o700, exist_ok=True)

    @contextlib.contextmanager
    def place(self, name):
        """A subtest with a database and a meeting of its own."""
        with self.subTest(name):
            self.use(name + ".db")
            yield self.meeting(name)

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

    def stop(self, process):
        """End workers in their own time."""
        process.send_signal(signal.SIGTERM)
        self.ended(process)

    def race(self, function, count):
        """Run a function in so many forks at once; all must succeed."""
        pids = [self.fork(function, number) for number in range(count)]
        codes = [os.waitpid(pid, 0)[1] for pid in pids]
        self.assertEqual(codes, [0] * count)

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

    def shut(self, line):
        """A command that closes all that a job inherits but 0, 1 and 2, as sudo, ssh and daemons
        do, and runs a line."""
        return PYTHON + " -ISc 'import os, sys; os.closerange(3, 256); os.execv(\"/bin/sh\", " \
            "[\"sh\", \"-c\", sys.argv[1]])' " + shlex.quote(line)

    def kill_worker(self):
        os.kill(self.infos()[0].pid, signal.SIGKILL)

    # Other users of this machine, whom root can play.

    @staticmethod
    def become(uid=65534, group=None):
        if ROOT:
            os.setgroups([group or uid])
            os.setgid(group or uid)
            os.setuid(uid)

    def start_as(self, words, out, err, limit=0, **who):
        """Run a command line in a fork as another user, for so many seconds at the most: the
        process id."""
        # All that it may import: another user cannot reach every installation.
        import gc, multiprocessing.connection, multiprocessing.popen_fork  # noqa: E401, F401

        def run():
            os.setsid()
            for path, fd in ((out, 1), (err, 2)):
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, fd)
                os.close(file)
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
            default_signals()
            signal.alarm(limit)
            self.become(**who)
            return queuectl.main(words)
        return self.fork(run)

    def as_user(self, *words, **who):
        """(exit code, stdout, stderr) of another user's command line."""
        paths = self.path("user.out"), self.path("user.err")
        status = os.waitpid(self.start_as(words, *paths, limit=int(PATIENCE), **who), 0)[1]
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return (code,) + tuple(read_file(path).decode() for path in paths)

    def another_user(self):
        """Choose a user whom nobody else is, with this test's database in a folder of his own."""
        if not ROOT:
            self.skipTest("only root can become another user")
        self.uid = 20000 + os.getpid() % 20000
        os.chmod(self.dir, 0o711)
        self.use("home", "q.db")
        os.chown(self.path("home"), self.uid, self.uid)

    def user_does(self, *words):
        """What a command line of that user prints."""
        code, out, err = self.as_user(*words, uid=self.uid)
        self.assertEqual(code, 0, err)
        return out

    def user_sees(self, id):
        return json.loads(self.user_does("show", id, "--json"))

    def user_workers(self, *words):
        """(pid of the supervisor, pid of its only worker, path of the log)."""
        log = self.path("user.log")
        pid = self.start_as(["worker", "start", *words], os.devnull, log, uid=self.uid)

        def end():
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self.addCleanup(end)
        worker = self.until(lambda: json.loads(self.user_does("worker", "list", "--json")))
        return pid, worker[0]["pid"], log


class Platform(Process):
    """Locks that tell who lives, bells, and the ends of process trees."""

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
        with mock.patch.object(os, "posix_spawn", side_effect=AssertionError("a shell")):
            child = queuectl.Child("true", self.dir, dict(os.environ), lock, 1)
            os.close(child.fd)
            self.assertEqual(child.reap(), (0, None))
            with self.assertRaisesRegex(AssertionError, "a shell"):
                queuectl.Child("true;", self.dir, dict(os.environ), lock, 1)

    def test_a_lock_is_held_for_as_long_as_its_process_lives(self):
        """And not by its children."""
        path = self.path("a.lock")
        self.assertFalse(queuectl.is_held(path))
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
        with self.assertRaises(BlockingIOError):
            queuectl.hold(path, 0)
        self.assertTrue(os.path.exists(path))
        peer.kill()
        peer.wait()
        self.assertTrue(alive(child))
        self.assertFalse(queuectl.is_held(path))
        self.assertTrue(os.path.exists(path))
        queuectl.release(path, queuectl.hold(path, 0))
        self.assertFalse(os.path.exists(path))
        self.assertFalse(queuectl.is_held(path))
        # To ask for one's own would drop it: closing any descriptor of a file does.
        self.addCleanup(os.close, queuectl.hold(path))
        self.assertTrue(queuectl.is_held(path))
        with self.assertRaises(BlockingIOError):
            queuectl.hold(path, 0)
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
        before = len(os.listdir("/dev/fd"))
        with mock.patch("os.write", side_effect=BrokenPipeError(errno.EPIPE, "who left meanwhile")):
            self.assertFalse(queuectl.ring(path))
        self.assertEqual(len(os.listdir("/dev/fd")), before)
        with self.assertRaises(BlockingIOError):
            while True:
                os.write(bell.fd, b"x" * 4096)
        queuectl.ring(path)  # full
        os.close(bell.fd)
        queuectl.ring(path)  # nobody listens any more

    def tree(self, command, **env):
        """A job's processes after their worker has died: (child, path of their RunLock)."""
        lock = queuectl.RunLock(self.path("worker"))
        path = self.path(lock.renew())
        child = queuectl.Child(command, None, dict(os.environ, **env), lock, 7)
        lock.close()
        child.ended = functools.lru_cache(None)(child.reap)
        self.addCleanup(os.close, child.fd)
        self.addCleanup(child.ended)
        self.addCleanup(child.terminate, force=True)
        return child, path

    def kill_tree(self, path, *expected):
        """One look of a rescuer, which must find these processes. Their run has the name of this
        test's folder, which no other suite has that runs now."""
        pids, unproven = queuectl.end_tree(path, 7, self.dir)
        self.assertEqual((sorted(pids), unproven), (sorted(expected), None))

    def test_end_tree_ends_the_whole_group(self):
        meeting = self.meeting()
        child, path = self.tree(self.in_background(meeting) + meeting.here)
        pids = {meeting.arrived(), meeting.arrived()}
        self.kill_tree(path, *pids)
        meeting.gone()
        # Who has closed his files is still dying, and for so long somebody in the group. (Not then,
        # though nobody has reaped him.)
        self.until(lambda: queuectl.end_tree(path, 7, self.dir) == ([], None))
        self.assertEqual(child.ended(), (None, signal.SIGKILL))
        self.kill_tree(self.path("no such file"))

    @linux
    def test_end_tree_needs_no_more_than_the_lock(self):
        """Where the worker has died between the spawn and the record."""
        for record in (b"", b"6 1 2 3 4 5", b"7 1"):
            with self.subTest(record):
                meeting = self.meeting("meeting%d" % len(record))
                child, path = self.tree("setsid sh -c %s & exit 0" % shlex.quote(meeting.here))
                pid = meeting.arrived()
                child.ended()
                with open(path, "wb") as file:
                    file.write(record)
                rescuer = self.peer("import sys; file = open(sys.argv[1]); "
                                    "print('looks', flush=True); input()", path)
                self.hear(rescuer)  # to have it open is no proof
                self.kill_tree(path, pid)
                meeting.gone()

    @linux
    def test_end_tree_knows_the_group_by_one_of_it(self):
        """Its leader is gone, but who has the run in his environment proves whose group it is."""
        meeting = self.meeting()
        child, path = self.tree("cd %s; %s & %s; exit 0" % (
            shlex.quote(self.dir), self.shut(meeting.here), self.BARE), QUEUECTL_RUN=self.dir)
        pids = meeting.arrived(), self.bare(self.dir)
        child.ended()
        self.assertEqual(queuectl.end_tree(path, 7, "db")[0], [])
        self.kill_tree(path, *pids)
        meeting.gone()

    @linux
    def test_end_tree_knows_a_process_whose_first_thread_has_ended(self):
        """It looks like a zombie, and is alive."""
        code = "import ctypes, threading, time; " \
               "threading.Thread(target=time.sleep, args=(1000,)).start(); " \
               "exit = ctypes.CDLL(None).pthread_exit; exit.argtypes = [ctypes.c_void_p]; exit(0)"
        child, path = self.tree("exec env -i " + self.shut(
            "exec %s -c %s" % (PYTHON, shlex.quote(code))))
        self.until(lambda: b") Z" in read_file("/proc/%d/stat" % child.pid))
        self.assertIsNone(child.poll())
        self.kill_tree(path, child.pid)
        self.assertEqual(child.ended(), (None, signal.SIGKILL))

    @linux
    def test_end_tree_does_not_take_a_shortage_for_nobody(self):
        child, path = self.tree("exec sleep 1000")
        for place in ("/", "/proc/"):

            def scarce(path, *words):
                if path.startswith(place):
                    raise OSError(errno.ENFILE, "no")
                return open(path, *words)
            with mock.patch.object(queuectl, "open", scarce, create=True):
                with self.assertRaises(OSError):
                    queuectl.end_tree(path, 7, self.dir)
        self.kill_tree(path, child.pid)

    @linux
    def test_end_tree_leaves_strangers_alone(self):
        """A number that was reused, after a boot, or in another container proves nothing."""
        tick = queuectl.START_TICK
        for words in ({"before": 2 * tick, "after": 3 * tick}, {"before": -9, "after": -2 * tick},
                      {"boot": "another"}, {"namespace": "pid:[1]"}, {"run": 8}, {}):
            with self.subTest(words):
                child, path = self.tree("exit 0")
                child.ended()
                stranger = self.peer("input()", start_new_session=True)
                start = int(self.started(stranger.pid)) * tick
                record = dict(zip(("run", "leader", "before", "after", "boot", "namespace"),
                                  read_file(path).decode().split()))
                self.assertEqual(len(record), 6)
                record.update(words, leader=stranger.pid, **{
                    name: "%.3f" % (start + words.get(name, 0)) for name in ("before", "after")})
                with open(path, "wb") as file:
                    file.write(" ".join(map(str, record.values())).ljust(200).encode())
                self.kill_tree(path, *[stranger.pid] * (not words))
                if words:
                    self.assertIsNone(stranger.poll())
                else:  # as it would be, were all of it true
                    self.assertEqual(stranger.wait(), -signal.SIGKILL)

    def test_a_background_child_keeps_its_lock_and_the_next_run_gets_another(self):
        meeting = self.meeting()
        lock = queuectl.RunLock(self.path("worker"))
        first = lock.renew()
        child = queuectl.Child(self.in_background(meeting), None, dict(os.environ), lock, 7)
        self.addCleanup(os.close, child.fd)
        pid = meeting.arrived()
        child.reap()
        second = lock.renew()
        self.assertNotEqual(first, second)
        self.assertEqual(read_file(self.path(first))[:2], b"7 ")  # as long as it may be needed
        kept = os.open(self.path(first), os.O_RDONLY)
        self.addCleanup(os.close, kept)
        self.assertEqual([lock.renew(), lock.renew(), lock.renew()], [first, second, first])
        self.assertFalse(queuectl.same_file(kept, self.path(first)))  # it has been replaced
        self.assertTrue(alive(pid))
        self.assertLessEqual({first, second}, set(os.listdir(self.dir)))
        lock.discard()
        self.assertEqual({first, second} & set(os.listdir(self.dir)), set())
        meeting.let_go()
        meeting.gone()

    def test_a_lock_is_taken_while_a_rescuer_looks(self):
        """Who only looks has the file open for an instant, and is not taken for its holder."""
        child, path = self.tree("exit 0")
        child.ended()
        peer = self.peer("""if 1:
            import fcntl, sys
            file = open(sys.argv[1])
            fcntl.flock(file, fcntl.LOCK_SH)
            print("looks", flush=True)
            input()""", path)
        self.hear(peer)
        self.kill_tree(path)
        self.assertIsNone(peer.poll())


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
                        self.assertEqual(output.kept(), [(0, stream)])
                        continue
                    line = b"\n[queuectl: %d bytes are not kept (output_limit)]\n" % missing
                    self.assertEqual(queuectl.join_pieces(output.kept(), 0), (
                        stream[:first] + line + stream[first + missing:], len(stream)))
                    self.assertEqual(output.missing(), (first, first + missing))
                    last = min(limit - first, 50)
                    self.assertEqual(output.end(last), stream[len(stream) - last:])

    GAP = re.compile(rb"\n\[queuectl: (\d+) bytes are not kept \(output_limit\)\]\n")

    def read_on(self, queue, run, stream, seen):
        """(how far a reader who knows the first bytes has come, how much he has missed); what he
        sees must be of the stream, and what he does not see must be told."""
        data, after = queuectl.join_pieces(queue.pieces(run, seen)[0], seen)
        at, missed = seen, 0
        for number, text in enumerate(self.GAP.split(data)):
            if number % 2:
                missed += int(text)
                at += int(text)
            else:
                self.assertTrue(stream.startswith(text, at), "torn at %d" % at)
                at += len(text)
        self.assertEqual(at, after)
        return after, missed

    def test_live_output_is_followed_without_loss(self):
        """However it comes, and whenever one looks; and it stays within bounds."""
        import random
        random, queue = random.Random(4), self.queue(durable=False)
        queue.enqueue("true")
        claim, output = self.claim(queue), queuectl.Output(100)
        stream = bytes(random.choice(b"0123456789\n") for _ in range(20000))
        at = slow = fast = all_missed = 0
        with mock.patch.object(queuectl, "LIVE_MOST", 60):
            while at < len(stream):
                big = at > 10000  # from then on more comes than is shown
                size = random.choice((70, 200, 1000)) if big else random.choice((1, 20, 60))
                output.feed(stream[at:at + size])
                seen, at = at, min(at + size, len(stream))
                fresh = output.fresh(seen)
                self.assertLessEqual(sum(len(data) for _, data in fresh), 60)
                queue.add_output(claim.run, fresh, output.missing())
                fast, missed = self.read_on(queue, claim.run, stream, fast)
                self.assertEqual(fast, at)
                self.assertTrue(big or not missed)
                all_missed += missed
                _, missed = self.read_on(queue, claim.run, stream, 0)  # who comes late
                first, last = output.missing()
                self.assertTrue(big or missed <= last - first)
                if random.random() < 0.1:
                    slow, _ = self.read_on(queue, claim.run, stream, slow)
                    self.assertEqual(slow, at)
                self.assertLessEqual(queue._value("SELECT sum(length(data)) FROM output"),
                                     100 + 2 * 60)
        self.assertGreater(all_missed, 0)
        self.settle(queue, claim, pieces=output.kept())
        for seen in (slow, fast, 0, 10000):  # of a run that has ended
            self.assertEqual(self.read_on(queue, claim.run, stream, seen)[0], len(stream))
        self.assertEqual(queue.pieces(claim.run)[0], output.kept())

    def test_what_could_not_be_shown_is_shown_the_next_time(self):
        """While another program has the database, nothing of a live output is lost."""
        queue = self.queue(durable=False)
        queue.enqueue("exit")
        claim = self.claim(queue)
        with mock.patch.object(queuectl, "Child", side_effect=OSError(errno.EAGAIN, "no")):
            execution = queuectl.Execution(claim, "exit", {}, None)
        with mock.patch.object(queuectl, "LIVE_DELAY", 0), queue.impatient():
            execution._show_at, execution._timeout_at = 0, math.inf
            execution._output.feed(b"one")
            execution.show_output(queue.add_output)
            execution._output.feed(b"two")
            with self.locked(), self.assertRaises(queuectl.DatabaseUnavailable):
                execution.show_output(queue.add_output)
            self.assertLess(execution.deadline(), math.inf)  # without more to come
            execution.show_output(queue.add_output)
        self.assertEqual(queue.output(claim.run), b"onetwo")

    def test_what_is_read_of_an_output_is_of_one_moment(self):
        """Where its run ends meanwhile, it is not taken for whole too soon."""
        queue, other = self.queue(), self.queue()
        for reads_before in range(3):
            queue.enqueue("true")
            claim = self.claim(other)
            other.add_output(claim.run, [(0, b"one")], (25, 25))
            with self.interrupting(queue, reads_before, lambda: self.settle(
                    other, claim, output=b"one two")):
                self.assertIn(queue.pieces(claim.run)[:2], [
                    ([(0, b"one")], False), ([(0, b"one two")], True)])

    def test_output_of_a_run_that_is_over_is_not_added(self):
        """Its worker has been taken for dead, and was only slow."""
        queue = self.queue()
        queue.enqueue("true")
        claim = self.claim(queue)
        self.settle(queue, claim, "lost", output=b"one")
        queue.add_output(claim.run, [(3, b"two")], (25, 25))
        self.assertEqual(queue.output(claim.run), b"one")
        self.settle(queue, claim, output=b"whole")
        self.assertEqual(queue.output(claim.run), b"one")


class Workers(Process):
    """Jobs run as promised, and workers come, go and are seen."""

    def options(self):
        return queuectl.StartOptions(path=self.db, count=1, drain=False, queues=[], via=None,
                                     quiet=True, log=None, name="supervisor")

    def worker(self):
        """A worker that is no process, for what can only be seen from within. It waits for
        nothing, and its bell does not ring."""
        worker, lock = queuectl.Worker(self.options(), "w"), queuectl.RunLock(self.path("lock"))
        lock.renew()
        self.addCleanup(lock.discard)
        worker._queue, worker._lock, worker._env, worker._slot = self.queue(), lock, {}, 1
        worker._log, worker._bell, worker._waiter = (mock.Mock() for _ in range(3))
        worker._waiter.wait.return_value = []
        return worker

    def supervisor(self):
        supervisor = queuectl.Supervisor(self.options())
        supervisor._log, supervisor._bell, supervisor._waiter = (mock.Mock() for _ in range(3))
        supervisor._waiter.wait.return_value = []
        supervisor._lock_path = self.path("lock")
        supervisor._held = os.open(self.path("lock"), os.O_RDWR | os.O_CREAT)
        self.addCleanup(os.close, supervisor._held)
        return supervisor

    def test_orders_and_syncs_do_not_wait_for_jobs_that_cannot_be_spawned(self):
        worker, slept = self.worker(), []
        worker._queue.enqueue("true", cwd=self.path("nowhere"))
        worker._sleep = lambda until: slept.append(until) or []
        result = worker._attend(queuectl.Execution(
            worker._queue.turn(None, "w", "w.run0")[1], "true", {}, worker._lock))
        self.assertEqual(result.outcome, "failed")
        self.assertEqual(len(slept), 1)
        self.assertLess(slept[0], time.monotonic())

    def test_who_lacks_something_between_two_jobs_tries_again(self):
        worker, claim, result = self.worker(), mock.Mock(), mock.Mock(seconds=0.0)
        worker._lock, worker._queue, worker._back_off = mock.Mock(), mock.MagicMock(), lambda: None
        turn, renew = worker._queue.turn, worker._lock.renew
        # Where the database is full, the lock of the unsettled run stays: what that job left in
        # the background still holds it, and a rescuer must see that.
        turn.side_effect = [queuectl.DatabaseUnavailable("full")] * 3 + [(None, None)]
        self.assertIsNone(worker._turn(None))
        self.assertEqual((turn.call_count, renew.call_count), (4, 1))
        # Where no file can be locked, the result is stored before.
        for each in (turn, worker._log.warn):
            each.reset_mock()
        renew.side_effect = [OSError(errno.EMFILE, "no")] * 2 + ["w.run0"]
        turn.side_effect = [(mock.Mock(), None), (None, None), (None, claim)]
        self.assertIs(worker._turn(result), claim)
        self.assertEqual([call[0] for call in turn.call_args_list], [
            (result, None, ""), (None, None, ""), (None, "w", "w.run0")])
        # When there is nothing to start, all is well again: not where it has not been tried.
        turn.side_effect = [(mock.Mock(), None)] * 2
        renew.side_effect = ["w.run1"]
        for worker._level, said in (queuectl.DRAIN, []), (queuectl.RUN, ["that works again"]):
            worker._turn(result)
            self.assertEqual(
                [call[0][0].partition(":")[0] for call in worker._log.warn.call_args_list],
                ["cannot lock a file for the next job"] + said)
        self.assertEqual(worker._complaints, {})
        worker._queue.work_left.side_effect = queuectl.DatabaseUnavailable("full")
        self.assertFalse(worker._is_drained())  # it is asked again

    def test_who_lacks_descriptors_closes_the_pipes_of_ended_jobs(self):
        """Whatever needs one: in a worker that goes on without, nothing else would free any."""
        worker, none = self.worker(), OSError(errno.EMFILE, "none left")
        queue, worker._back_off = worker._queue, lambda: None
        queue.enqueue("true")
        queuectl.require_safe(self.db)
        worker._held = queuectl.hold(queue.lock_path("w"))
        self.addCleanup(queuectl.release, queue.lock_path("w"), worker._held)

        def lock():
            with mock.patch.object(worker._lock, "renew", side_effect=[none, "w.run0"]):
                worker._turn(None)

        def sync():  # fails, but not for that; it works again when one has succeeded
            worker._next_look = math.inf
            for flush, said in (mock.Mock(side_effect=OSError(errno.EIO, "no")), 0), (None, 1):
                queue.sync_at = 0.0
                with mock.patch.object(queuectl, "flush", flush or queuectl.flush):
                    worker._sleep(0.0)
                worker._recovered()
                self.assertEqual(worker._log.warn.call_args_list.count(
                    mock.call("that works again")), said + 1)

        def full():
            with mock.patch.object(worker._lock, "renew", side_effect=[
                    OSError(errno.ENOSPC, "no room"), "w.run0"]):
                worker._turn(None)

        def orders():
            with mock.patch.object(queuectl, "is_held", side_effect=none):
                worker._look_around()
        for need, closed in (lock, 1), (orders, 1), (sync, 0), (full, 0):
            with self.subTest(need.__name__):
                pipe = worker._open_pipes[99] = mock.Mock(fd=99)
                need()
                self.assertEqual((len(worker._open_pipes), pipe.close_output.call_count),
                                 (1 - closed, closed))

    def test_who_leaves_a_run_behind_leaves_what_its_rescuer_needs(self):
        """Where its result could not be stored. And whose lock has been deleted stops at once: he
        looks dead."""
        worker = self.worker()
        queue, path = worker._queue, worker._queue.lock_path("w")
        queuectl.require_safe(self.db)
        queue.register("w", "s", None, None)
        queue.enqueue("true")
        claim = self.claim(queue, "w")
        for left in (1, 0):
            worker._held = queuectl.hold(path)
            worker._leave()
            self.assertEqual((len(queue._rows("SELECT 1 FROM workers")),
                              os.path.exists(self.path("lock.run0"))), (left, left))
            self.settle(queue, claim)
        worker._held = queuectl.hold(path)
        self.addCleanup(queuectl.release, path, worker._held)
        os.unlink(path)
        self.refuses("has been deleted", worker._look_around)

    def test_a_job_is_put_back_where_its_worker_lacks_something(self):
        worker = self.worker()
        queue, worker._sleep, worker._back_off = worker._queue, lambda until: [], lambda: None
        for error, outcome in (
                (OSError(errno.EMFILE, "none left"), "interrupted"),
                (OSError(errno.EAGAIN, "none left"), "interrupted"),
                (OSError(errno.EACCES, "none left", "/bin/sh"), "interrupted"),
                (OSError(errno.EBADF, "none left"), "interrupted"),
                (OSError(errno.ENOMEM, "none left", self.dir), "interrupted"),
                (OSError(errno.EACCES, "none left", self.dir), "failed"),  # the job's own folder
                (OSError(errno.E2BIG, "none left", "/bin/sh"), "failed"),
                (ValueError("none left"), "failed")):
            id = queue.enqueue("true", cwd=self.dir)
            with mock.patch.object(queuectl, "Child", side_effect=error):
                result = worker._run(queue.turn(None, "w", "lock.run0")[1])
            self.assertEqual((error, result.outcome, result.error.count("none left")),
                             (error, outcome, 1))
            queue.cancel([id])
            queue.turn(result, None)

    def test_a_cancel_is_looked_for_when_a_bell_rings_and_once_a_tick(self):
        worker, asked = self.worker(), []
        wakes = iter(["bell", "output", "tick", "output", "end"])
        execution = mock.Mock(child=None, reading=False)

        def sleep(until):
            wake = next(wakes)
            worker._rung = wake == "bell"
            worker._next_look += wake == "tick"
            execution.step.return_value = mock.Mock() if wake == "end" else None
            asked.append(wake)
            return []
        worker._sleep, worker._queue = sleep, mock.MagicMock()
        worker._queue.cancel_requested.side_effect = lambda claim: asked.append("cancel?")
        worker._attend(execution)
        self.assertEqual(asked, ["bell", "cancel?", "output", "tick", "cancel?", "output", "end"])

    def test_who_cannot_see_what_is_due_tries_again(self):
        """And does not sleep until somebody changes the database."""
        worker, slept = self.worker(), []
        worker._queue = mock.Mock()
        worker._queue.next_due.side_effect = queuectl.DatabaseUnavailable("disk I/O error")
        worker._back_off, worker._sleep = lambda: slept.append("pause"), self.fail
        worker._idle()  # returns, to claim
        self.assertEqual(slept, ["pause"])
        worker._queue.next_due.side_effect = lambda: time.time() + 0.5
        worker._sleep = lambda until: setattr(worker, "_rung", slept.append(until) or True)
        worker._idle()
        self.assertAlmostEqual(slept[1], time.monotonic() + 0.5, delta=0.3)

    def test_who_idles_claims_again_after_what_may_have_changed(self):
        """A bell that rang during a claim, or a clock that was set: what is due may be another."""
        worker, rung = self.worker(), []
        worker._look_around, worker._rescuer.look = (lambda: None), lambda *words: 0

        def turn(result):
            worker._rung = True

        def idle():
            rung.append(worker._rung)
            worker._level = queuectl.DRAIN
        with mock.patch.multiple(worker, _turn=turn, _idle=idle):
            worker._work()
        self.assertEqual(rung, [True])
        for jump, expected in ((0, True), (0, False), (3600, True), (3600, False), (0, True)):
            worker._rung, worker._next_look, now = False, 0.0, time.time()
            with mock.patch("time.time", return_value=now + jump):  # (the first is the first look)
                worker._sleep(0.0)
            self.assertEqual(worker._rung, expected, jump)

    def test_a_supervisor_that_waits_for_the_last_job_sleeps(self):
        supervisor = self.supervisor()
        with mock.patch.object(queuectl, "open_queue",
                               side_effect=queuectl.DatabaseUnavailable("no")):
            for level in (queuectl.RUN, queuectl.RUN, queuectl.DRAIN):
                supervisor._level = level
                supervisor._wait()
        times = [call[0][0] for call in supervisor._waiter.wait.call_args_list]
        self.assertLessEqual(times[0], 0)  # it is time
        self.assertGreater(times[1], 0.5 * queuectl.TICK)  # what failed is not tried at once
        self.assertGreater(times[2], 0.5 * queuectl.TICK)

    def test_who_has_no_result_to_store_can_be_stopped_while_the_database_is_busy(self):
        """Neither a supervisor that would checkpoint nor a worker that leaves waits for long."""
        supervisor, worker = self.supervisor(), self.worker()
        worker._level = queuectl.DRAIN
        with self.locked(), mock.patch.object(queuectl, "_size", return_value=sys.maxsize):
            start = time.monotonic()
            self.assertIsNone(worker._turn(None))
            self.assertLess(time.monotonic() - start, 0.5)
            supervisor._housekeep(self.queue())
            self.assertLess(time.monotonic() - start, 0.5 * queuectl.BUSY_BUDGET)

    def test_who_waits_for_a_job_that_cannot_end_well_sleeps(self):
        """A worker whose database is gone ends its job, and is not kept awake meanwhile by a bell
        that it does not answer any more."""
        worker, steps = self.worker(), []
        worker._waiter.wait.return_value = [1]  # at once
        claim = mock.Mock(cwd=None, env={}, attempts=1, max_retries=3, id="a", run=1)
        execution = mock.Mock(child=None)
        start = time.monotonic()
        execution.step.side_effect = lambda: steps.append(1) or (
            True if time.monotonic() > start + 0.3 else None)
        with mock.patch.object(queuectl, "Execution", return_value=execution), \
                mock.patch.object(worker, "_attend", side_effect=QueueError("gone")), \
                self.assertRaises(QueueError):
            worker._run(claim)
        self.assertLess(len(steps), 20)

    def test_an_order_does_not_lower_one_that_came_meanwhile(self):
        """A signal that arrives while somebody else says: now."""
        supervisor = self.supervisor()
        supervisor._seats[1].name = "w"
        queuectl.give_order(self.path("lock"), queuectl.NOW)
        with mock.patch.object(queuectl, "ring") as ring:
            supervisor._obey(queuectl.DRAIN)
        ring.assert_called_once_with(self.path("w.bell"))  # or it would be heard a second later
        self.assertEqual(os.path.getsize(self.path("lock")), queuectl.NOW)

    def test_a_supervisor_outlives_a_shortage(self):
        supervisor = self.supervisor()
        seat = supervisor._seats[1]
        pipe, pipes = os.pipe, []
        for place in ("os.fork", "os.pipe"):  # the second pipe

            def scarce():
                pipes.append(place)
                if place == "os.fork" or pipes.count(place) > 1:
                    raise OSError(errno.EAGAIN, "no")
                return pipe()
            seat.replace_at = 0.0
            before = os.listdir("/dev/fd")
            with mock.patch(place, scarce):
                supervisor._replace()
            self.assertEqual(os.listdir("/dev/fd"), before)  # it will try again and again
            self.assertIn("cannot start worker 1", supervisor._log.warn.call_args[0][0])
        self.assertGreater(seat.replace_at, time.monotonic())
        self.assertIsNone(seat.process)
        with mock.patch.object(queuectl, "create_file", side_effect=OSError(errno.EMFILE, "no")):
            with self.assertRaises(queuectl.DatabaseUnavailable):
                self.queue()

    def test_nobody_who_reads_the_log_holds_a_worker(self):
        options = self.options()
        options.log = self.path("log")
        os.mkfifo(options.log)
        reader = os.open(options.log, os.O_RDWR | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        log = queuectl.Log(options, "me")
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(reader, b"x" * 4096)
        with mock.patch.object(queuectl, "LOG_PATIENCE", 0.01):
            for number in range(3):
                log.warn("line %d" % number)
        with contextlib.suppress(BlockingIOError):
            while os.read(reader, 65536):
                pass
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        late = fcntl.fcntl(reader, fcntl.F_DUPFD, 1100)  # which select() does not know
        self.addCleanup(os.close, late)
        self.assertFalse(queuectl.stalled(late, 0))
        log.warn("line 3")
        self.assertRegex(os.read(reader, 65536).decode(),
                         r"\A\(3 lines were dropped\)\n[0-9:-]+ [0-9:]+ me: line 3\n\Z")

    def test_a_running_job_does_not_wait_for_what_its_worker_does_for_others(self):
        """Neither for a busy database nor for the end of a dead worker's tree."""
        worker, seen = self.worker(), []
        queue, worker._look_around = worker._queue, lambda: None

        def look(queue, note):
            seen.append(queue._patience)
            return 0
        worker._rescuer.look = look
        worker._sleep(0.0)
        worker._sleep(0.0)  # not again so soon
        self.assertEqual(seen, [queuectl.IMPATIENCE])
        with self.locked(), mock.patch("time.sleep", side_effect=AssertionError("it sleeps")), \
                self.assertRaises(queuectl.DatabaseUnavailable), queue.impatient(-1.0):
            queue.pause()
        self.assertEqual(queue._patience, queuectl.BUSY_BUDGET)

    def test_a_rescuer_looks_again_soon(self):
        """While a tree is dying; if it does not, everybody is told."""
        queue, rescuer, notes = self.queue(), queuectl.Rescuer(), []
        queue.enqueue("true", id="a")
        self.claim(queue)
        trees = [([4711], None)] * 8 + [([], None), ([4711], None)] \
            + [([], None)] * 2  # unseen twice in a row: it is gone
        pauses = []
        with mock.patch.object(queuectl, "end_tree", lambda *words: trees.pop(0)):
            while trees:
                self.assertEqual(rescuer.look(queue, notes.append), int(not trees))
                pauses.append(rescuer.next_look - time.monotonic())
                error = queue.runs("a")[0].error
                if len(pauses) == 6:
                    self.assertIsNone(error)
                elif len(pauses) == 8:
                    self.assertIn("process 4711, which does not die, may be running it", error)
        self.assertEqual((self.runs("a")[0].outcome, pauses.pop()), ("lost", math.inf))
        for pause, expected in zip(pauses, (0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1, 1)):
            self.assertLessEqual(pause, expected)
            self.assertGreater(pause, 0.8 * expected - 0.02)
        self.assertEqual(notes, ["job a: its worker w-1 died; the job is pending"])

    def test_a_shortage_while_looking_for_dead_workers_harms_nobody(self):
        worker = self.worker()
        worker._look_around = lambda: None
        worker._queue.enqueue("true")
        self.claim(worker._queue)
        for number in (errno.EMFILE, errno.EIO):
            worker._next_look = 0.0
            with mock.patch.object(queuectl, "end_tree", side_effect=OSError(number, "no")):
                if number == errno.EMFILE:
                    worker._sleep(0.0)
                else:
                    self.refuses("cannot look for dead workers", worker._sleep, 0.0)

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
                worker._back_off()
                self.assertAlmostEqual(clock.now, 100.0 + 0.3 * queuectl.TICK * sleeps)

    @linux
    def test_the_surroundings_of_a_job(self):
        """Its environment and folder, whatever the worker inherited: variables, ignored and
        blocked signals, an umask, descriptors."""
        def hostile():
            for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT):
                signal.signal(signum, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            os.umask(0o027)
        self.add("a", "for fd in 0 1 2; do readlink /proc/$$/fd/$fd; done; ls /proc/$$/fd; "
                 "touch made; umask; grep -E '^Sig(Blk|Ign)' /proc/self/status; exit 3",
                 max_retries=1)
        os.mkdir(self.path("folder"))
        self.add("b", "pwd; env", env={"OF_JOB": "b c", "OF_WORKER": "changed"}, queue="mail",
                 max_retries=7, cwd=self.path("folder"))
        inherited = os.pipe()
        for fd in inherited:
            self.addCleanup(os.close, fd)
        process = self.workers(1, preexec_fn=hostile, pass_fds=inherited, cwd="/", env={
            "OF_WORKER": "x", "KEPT": "y", "QUEUECTL_ATTEMPT": "99"})
        for _ in range(2):  # a hang-up is ignored, as under nohup
            process.send_signal(signal.SIGHUP)
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
        self.until_state("b", "completed")
        for pid in process.pid, self.infos()[0].pid:  # while it spawns a job, glibc blocks all
            self.assertEqual(process_status(pid, "SigBlk"), 0)
        folder, *lines = self.output("b").decode().splitlines()
        env = dict(line.split("=", 1) for line in lines)
        self.assertEqual({key: value for key, value in env.items()
                          if key.startswith("QUEUECTL_")},
                         {"QUEUECTL_JOB_ID": "b", "QUEUECTL_ATTEMPT": "1", "QUEUECTL_QUEUE": "mail",
                          "QUEUECTL_MAX_RETRIES": "7", "QUEUECTL_WORKER": "1",
                          "QUEUECTL_DB": self.db, "QUEUECTL_RUN": queuectl.run_name(
                              self.queue(), self.runs("b")[0].run)})
        self.assertEqual([folder] + [env[key] for key in ("OF_JOB", "OF_WORKER", "KEPT")],
                         [self.path("folder"), "b c", "changed", "y"])
        self.add("c", "true")
        self.until_state("c", "completed")
        self.stop(process)

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
        """And what is logged."""
        self.configure(backoff_base=0)
        self.add("a", "printf '%s of %s es\\033cape' $QUEUECTL_ATTEMPT $QUEUECTL_MAX_RETRIES; "
                 "exit $QUEUECTL_ATTEMPT")
        self.add("b", "true")
        log = self.drain()
        for line in (
                r"queuectl: 1 worker on .*q\.db", r"worker 1: job a started \(attempt 2 of 3\)",
                r"worker 1: job a failed after [^ ]+, again at once: exit code 1: 1 of 3 es.cape",
                r"worker 1: job a dead after [^ ]+: exit code 3", "worker 1: job b completed in "):
            self.assertRegex(log, r"(?m)^\d\d:\d\d:\d\d " + line)
        self.assertNotIn("\x1b", log)
        self.assertEqual([(run.outcome, run.exit_code) for run in self.runs("a")],
                         [("failed", 1), ("failed", 2), ("failed", 3)])
        self.assertEqual([self.output("a", n) for n in (1, 2, 3)],
                         [b"%d of 3 es\33cape" % n for n in (1, 2, 3)])
        self.assertIn("exit code 3: 3 of 3", self.job("a").last_error)
        self.ok("dlq", "retry", "a")
        self.add("c", "true")
        self.assertRegex(self.drain("--quiet"), r"\A[0-9:]+ worker 1: job a dead after .*\n\Z")
        self.assertEqual((self.job("a").attempts, len(self.runs("a"))), (3, 6))

    def test_a_failed_job_leaves_nobody_behind_and_a_successful_one_may(self):
        failed, left, stays = map(self.meeting, ("failed", "left", "stays"))
        polite = "trap 'echo ended >ended; exit' TERM; "
        self.add("a", self.in_background(left, polite) + failed.here + "; exit 1", max_retries=1)
        self.add("b", self.in_background(stays))
        self.workers(2)
        failed.arrived(), left.arrived()
        pid = stays.arrived()
        self.until_state("b", "completed")
        self.finish(failed, "a", "dead")
        left.gone()
        self.assertEqual(read_file("ended"), b"ended\n")  # it was asked first
        self.assertTrue(alive(pid))
        stays.let_go()
        stays.gone()

    def test_drain_waits_for_retries_and_for_what_its_own_jobs_bring(self):
        self.configure(backoff_base=0.2)
        self.add("retry", "[ -e tried ] || { touch tried; exit 1; }")
        self.assertIn("again in 200ms", self.drain())
        first, second = (queuectl.from_iso(run.started_at) for run in self.runs("retry"))
        self.assertGreaterEqual(second - first, 0.2 - 0.002)
        self.assertEqual(self.job("retry").state, "completed")
        meeting = self.meeting()
        self.add("first", meeting.here)
        self.add("next", "true", after=["first"])
        process = self.start("worker", "start", "--drain", "--count", 2)
        meeting.arrived()
        self.assertIsNone(process.poll())
        meeting.let_go()
        self.ended(process)
        self.assertEqual(self.job("next").state, "completed")

    def test_workers_started_from_two_terminals_share_the_queue(self):
        """They are listed, and stopped from a third one."""
        meeting = self.meeting()
        for id in ("a", "b", "c"):
            self.add(id, meeting.here)
        first, second = self.workers(1), self.workers(2, "--queue", "default")
        self.assertEqual(len({meeting.arrived() for _ in range(3)}), 3)
        self.add("d", "true")
        rows = json.loads(self.cli("worker", "list", "--json")[1])
        self.assertEqual(sorted(row["job"] for row in rows), ["a", "b", "c"])
        self.assertEqual(sorted((row["slot"], str(row["queues"])) for row in rows),
                         [(1, "None"), (1, "['default']"), (2, "['default']")])
        self.assertEqual(len({row["supervisor"] for row in rows}), 2)
        for row in rows:
            self.assertLessEqual({"name", "pid", "started_at", "job_started_at"}, set(row))
            self.assertTrue(alive(row["pid"]))
        self.assertRegex(self.ok("worker", "list"), r"(?m)^%s .* a$" % self.job("a").locked_by)
        stop = self.start("worker", "stop")
        for process in (first, second):
            self.until_logged(process, "finishing the current jobs")
        for _ in rows:
            meeting.let_go()
        self.ended(stop)
        self.assertEqual(self.log(stop), "queuectl: 3 workers stopped\n")
        self.assertEqual(self.infos(supervisors=True), [])
        self.assertEqual(self.ok("worker", "list", "--json"), "[]\n")
        self.ended(first)
        self.ended(second)
        self.assertEqual((self.job("c").state, self.job("d").state), ("completed", "pending"))

    def test_replacing_pauses_more_and_more_and_hears_a_stop_meanwhile(self):
        self.add("a", "kill -9 $PPID; sleep 1000", max_retries=1000)
        process = self.workers()
        runs = self.until(lambda: len(self.runs("a")) >= 5 and self.runs("a"))
        times = [queuectl.from_iso(run.started_at) for run in runs]
        for number, (before, after) in enumerate(zip(times, times[1:]), 1):
            if number > 1:  # the first death is replaced at once
                self.assertGreater(after - before, 0.05 * 2 ** number - 0.01)
        self.until(lambda: not self.infos())
        self.stop(process)
        self.assertEqual(self.job("a").state, "pending", [self.runs("a")[-1], self.log(process)])
        runs = len(self.runs("a"))
        process = self.workers()
        self.until(lambda: len(self.runs("a")) >= runs + 3 and not self.infos())
        self.assertEqual([run.outcome for run in self.runs("a")][:3], ["lost"] * 3)
        self.assertEqual(self.cli("worker", "stop")[0], 0)
        self.ended(process)
        self.assertEqual(self.job("a").state, "pending")


class Stopping(Process):
    """Orders to stop, as signals and as commands."""

    def put_back(self, meeting, process):
        """Job `a` must have been ended and put back, its attempt uncounted."""
        self.ended(process)
        meeting.gone()
        job, runs = self.job("a"), self.runs("a")
        self.assertEqual((job.view, job.attempts, job.last_error), ("pending", 0, None))
        self.assertEqual([run.outcome for run in runs], ["interrupted"])
        self.assertEqual(self.infos(supervisors=True), [])
        self.assertFalse([name for name in os.listdir(self.db + "-run")
                          if name.endswith((".lock", ".bell", ".out"))])

    def much_later(self, process):
        """Wait until a second signal counts as one."""
        self.until_logged(process, "finishing the current jobs")
        start = time.monotonic()
        self.until(lambda: time.monotonic() > start + queuectl.SECOND_SIGNAL)

    def test_the_first_signal_finishes_the_jobs(self):
        """Ctrl-C, too, which a terminal sends to the whole foreground group. And one act that
        arrives twice is one order."""
        for signum, *again in ((signal.SIGTERM,), (signal.SIGINT,),
                               (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM)):
            with self.place("signal%d" % signum) as meeting:
                _, process, pid = self.busy(count=2, meeting=meeting)
                self.assertEqual((os.getsid(pid), os.getpgid(pid)), (pid, pid))
                (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
                for same in again:
                    process.send_signal(same)
                self.much_later(process)
                if again:
                    process.send_signal(signal.SIGHUP)  # however late: terminals close twice
                self.until(lambda: len(self.infos()) == 1)  # the idle one leaves
                self.add("b", "true")
                self.assertTrue(alive(pid))
                self.assertEqual(self.job("a").state, "processing")
                meeting.let_go()
                self.ended(process)
                self.assertEqual([self.job(id).state for id in "ab"], ["completed", "pending"])
                self.assertEqual(self.infos(supervisors=True), [])
                self.assertNotIn("putting them back", self.log(process))

    def test_a_later_second_signal_ends_the_jobs_and_puts_them_back(self):
        for first, second in ("INT", "INT"), ("HUP", "TERM"):
            with self.place(second) as meeting:
                _, process, _ = self.busy(self.in_background(meeting) + "%s", meeting=meeting)
                meeting.arrived()
                process.send_signal(signal.Signals["SIG" + first])
                self.much_later(process)
                process.send_signal(signal.Signals["SIG" + second])
                self.put_back(meeting, process)

    def test_a_stop_can_become_urgent(self):
        """Until then, it says for whom it waits."""
        meeting, process, pid = self.busy(count=2)
        worker, = [info.pid for info in self.infos() if info.job]
        with constants(self, PATIENCE=0.0):
            self.assertEqual(self.cli("worker", "stop", "--timeout", "0")[0], 124)
            code, out, err = self.cli("worker", "stop", "--timeout", "0.1")
        self.assertEqual((code, out, err.count("waiting")), (124, "", 1))
        self.assertRegex(err, r"waiting for .*job a \(pid %d\), .*its supervisor \(pid %d\); not "
                         "to wait for jobs: .* worker stop --now" % (worker, process.pid))
        self.until_logged(process, "finishing the current jobs")
        self.assertEqual(self.cli("worker", "stop", "--now")[0], 0)
        self.put_back(meeting, process)

    def test_a_job_may_stop_its_own_workers(self):
        """It does not wait for itself."""
        self.add("a", "queuectl worker stop --timeout 10", max_retries=1,
                 env={"PATH": self.programs()})
        process = self.workers()
        job = self.until_state("a", "completed", "dead")
        self.assertEqual((job.state, job.last_error), ("completed", None))
        self.ended(process)

    def test_a_job_has_its_grace(self):
        """TERM first: a job that cleans up and exits does so undisturbed."""
        for name, trap, grace, output, signum in (
                ("polite", "echo clean; exit 0", 1000, b"clean\n", None),
                ("stubborn", "", 0.2, b"", signal.SIGKILL)):
            with self.place(name) as meeting:
                self.configure(kill_grace=grace)
                _, process, _ = self.busy("trap '" + trap + "' TERM; %s", meeting=meeting)
                self.assertEqual(self.cli("worker", "stop", "--now")[0], 0)
                self.assertEqual((self.output("a"), self.runs("a")[0].signal), (output, signum))
                self.put_back(meeting, process)

    def test_workers_end_with_their_job_by_a_signal_or_without_their_supervisor(self):
        meeting, process, pid = self.busy(count=3)
        busy, = [info for info in self.infos() if info.job]
        for info in self.infos():
            for signum in (signal.SIGINT, signal.SIGHUP):
                os.kill(info.pid, signum)  # these are its supervisor's business
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(busy.pid, signum)
        self.queue().ring(busy.name)  # that no file orders it does not take the order back
        self.assertTrue(alive(pid))
        self.finish(meeting)
        self.until(lambda: not alive(busy.pid))  # nobody has ordered that: another one comes
        self.until_logged(process, " died (killed by SIGTERM)")
        self.until(lambda: len(self.infos()) == 3)
        self.add("b", meeting.here)
        pid = meeting.arrived()
        busy, = [info for info in self.infos() if info.job]
        process.kill()
        process.wait()
        self.until(lambda: len(self.infos()) == 1)  # the idle one leaves
        self.add("c", "true")
        self.assertTrue(alive(pid))
        self.queue().ring(busy.name)  # or it might not look around for another second
        meeting.let_go()
        self.until(lambda: not self.infos(supervisors=True))
        self.until(lambda: not alive(busy.pid))
        self.assertEqual([self.job(id).state for id in "bc"], ["completed", "pending"])


class Hostile(Process):
    """Jobs that try to hang, crash or fool their worker."""

    def test_what_jobs_may_do(self):
        self.configure(kill_grace=0.1)
        meeting, hold = self.meeting(), "exec 9>%s; " % self.path("meeting.alive")
        with open(self.path("file"), "w"):
            os.mkdir(self.path("gone"))
        table = [  # command, outcome, exit code, signal, fields, output, words of the error
            ("exit 3", "failed", 3, None, {}, b"", "exit code 3"),
            ("kill -9 $$", "failed", None, 9, {}, b"", "SIGKILL"),
            ("kill -STOP $$; sleep 1000", "timeout", None, 15, {"timeout": 0.2}, b"", "--timeout"),
            (hold + "trap '' TERM INT HUP; sh -c 'trap \"\" TERM; sleep 1000; :' & sleep 1000; :",
             "timeout", None, 9, {"timeout": 0.2}, b"", "--timeout"),
            (hold + "trap '' TERM; while :; do sleep 1000 & done", "timeout", None, 9,
             {"timeout": 0.2}, b"", "--timeout"),
            # A polite leader's end is not its stubborn child's.
            (hold + "sh -c 'trap \"\" TERM; sleep 1000; :' & sleep 1000; :", "timeout", None, 15,
             {"timeout": 0.2}, b"", "--timeout"),
            ("printf 'a\\377\\376\\200\\033[31m'; exit 3", "failed", 3, None, {},
             b"a\xff\xfe\x80\x1b[31m", "exit code 3: a"),
            ("%s -c 'import os; os.closerange(0, 256); os._exit(5)'" % shlex.quote(sys.executable),
             "failed", 5, None, {}, b"", "exit code 5"),
            ("exec <&- >&- 2>&-; sleep 0.2; exit 4", "failed", 4, None, {}, b"", "exit code 4"),
            ("exec >there 2>&1; echo there; [ -s there ]", "completed", 0, None, {}, b"", ""),
            ("exec /dev/null", "failed", 126, None, {}, None, "126"),
            ("no-such-command-at-all", "failed", 127, None, {}, None, "--env PATH"),
            ("true", "failed", None, None, {"cwd": "/no/where"}, b"", "/no/where --cwd"),
            ("true", "failed", None, None, {"cwd": self.path("file")}, b"", self.path("file")),
            ("rmdir %s; echo gone" % self.path("gone"), "completed", 0, None,
             {"cwd": self.path("gone")}, b"gone\n", ""),
        ] + [("echo a; echo b >/dev/stderr; echo c >/dev/stdout; echo d >&2", "completed", 0, None,
              {}, b"a\nb\nc\nd\n", "")] * (sys.platform == "linux")
        process = self.workers()
        worker = self.infos()[0].name
        for number, row in enumerate(table):
            self.add("j%d" % number, row[0], **dict(dict(max_retries=1), **row[4]))
        for number, (command, outcome, code, signum, _, output, words) in enumerate(table):
            with self.subTest(command=command):
                job = self.until_state("j%d" % number, "completed", "dead")
                run, = self.runs(job.id)
                self.assertEqual((run.outcome, run.exit_code, run.signal), (outcome, code, signum))
                self.assertIn(output, (None, self.output(job.id)))
                for word in words.split():
                    self.assertIn(word, job.last_error)
        meeting.gone()
        self.assertEqual([info.name for info in self.infos()], [worker])
        self.assertIsNone(process.poll())

    @linux
    def test_a_job_that_prints_without_end(self):
        meeting, _, _ = self.busy("head -c 200000000 /dev/zero; %s")
        worker, run = self.infos()[0].pid, self.runs("a")[0]
        kept = "SELECT ifnull(sum(length(data)), 0) FROM output WHERE run = %d" % run.run
        self.until(lambda: self.sql(kept) > [(0,)])
        self.assertLess(self.sql(kept), [(65536 + 2 * queuectl.LIVE_MOST,)])
        self.assertLess(process_status(worker, "VmHWM"), 64 * 1024)
        self.finish(meeting)
        output = self.output("a")
        self.assertLess(len(output), 65536 + 200)
        self.assertIn(b"%d bytes are not kept" % (200000000 - 65536), output)

    @linux
    def test_a_pipe_that_holds_much(self):
        """What it wrote before it ended is read to its end, however late the worker is."""
        many = "fcntl.fcntl(1, 1031, 1 << 20); os.write(1, b'x' * 900000 + b'\\nthe reason'); " \
            "os._exit(3)"  # 1031: F_SETPIPE_SZ
        meeting, _, pid = self.busy(
            "%%s; exec %s -c %s" % (PYTHON, shlex.quote("import fcntl, os; " + many)),
            max_retries=1)
        worker = self.infos()[0].pid
        self.freeze(worker)
        meeting.let_go()
        self.until(lambda: not alive(pid))
        os.kill(worker, signal.SIGCONT)
        self.assertEqual(self.until_state("a", "dead").last_error, "exit code 3: the reason")

    def test_few_descriptors(self):
        for limit in (20, 64, 100):
            with self.place(str(limit)) as background:  # where they hold descriptors, for good
                self.configure(backoff_base=0)
                ids = ["j%d" % number for number in range(20)]
                for id in ids:
                    self.add(id, self.in_background(background)
                             + "echo $QUEUECTL_ATTEMPT; test 1 = 1")
                self.add("plain", "/bin/true", max_retries=1)
                process = self.start("worker", "start", "--drain", "--count", 2,
                                     preexec_fn=lambda: resource.setrlimit(
                                         resource.RLIMIT_NOFILE, (limit, limit)))
                self.ended(process)
                for id in ids + ["plain"]:
                    job = self.job(id)
                    self.assertEqual((id, job.state, job.attempts), (id, "completed", 1),
                                     [job.last_error, self.log(process)])
                self.assertNotIn("failed", [run.outcome for run in self.runs("plain")])
                self.assertEqual(self.output("j0"), b"1\n")

    def test_a_worker_without_descriptors_spends_no_attempts(self):
        process = self.workers()
        worker = self.infos()[0].pid
        opened = [int(fd) for fd in os.listdir("/proc/%d/fd" % worker)]
        free = [fd for fd in range(max(opened) + 20) if fd not in opened]
        before = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        for spare in range(5):
            with self.subTest(spare):
                id, logged = "j%d" % spare, len(self.log(process))
                resource.prlimit(worker, resource.RLIMIT_NOFILE, (free[spare], before[1]))
                self.add(id, "echo $QUEUECTL_ATTEMPT", max_retries=1)
                self.until(lambda: "Too many open files" in self.log(process)[logged:]
                           or [run for run in self.runs(id) if run.outcome])
                job = self.job(id)
                # In the midst of another try it is counted, until that is put back.
                self.assertIn((job.state, job.attempts), (
                    ("completed", 1), ("pending", 0), ("processing", 1)), self.log(process))
                resource.prlimit(worker, resource.RLIMIT_NOFILE, before)
                self.until_state(id, "completed", "dead")
                self.assertEqual(self.output(id), b"1\n", self.log(process))
                self.assertTrue(alive(worker))

    def allow(self, worker, count):
        """So many processes for that user."""
        def run():
            self.become(self.uid)
            hard = resource.prlimit(worker, resource.RLIMIT_NPROC)[1]
            resource.prlimit(worker, resource.RLIMIT_NPROC, (count, hard))
        self.assertEqual(os.waitpid(self.fork(run), 0)[1], 0)

    def test_a_worker_without_processes_spends_no_attempts(self):
        self.another_user()
        _, worker, log = self.user_workers("--quiet")
        self.allow(worker, 1)
        self.user_does("enqueue", "--id", "a", "--max-retries", "1", "echo x")
        self.until(lambda: [run for run in self.user_sees("a")["runs"] if run["outcome"]][1:])
        job = self.user_sees("a")
        self.assertEqual({run["outcome"] for run in job["runs"]} - {None}, {"interrupted"}, job)
        self.assertIn((job["state"], job["attempts"]), (("pending", 0), ("processing", 1)))
        self.allow(worker, 1000)
        self.until(lambda: self.user_sees("a")["state"] in ("completed", "dead"))
        job = self.user_sees("a")
        self.assertEqual((job["state"], job["attempts"]), ("completed", 1), read_file(log))
        self.assertEqual(re.findall(r"cannot start|works again", read_file(log).decode()),
                         ["cannot start", "works again"])

    def left_alone(self, command, meeting, outcome, state, end):
        self.user_does("config", "set", "kill_grace", "0.3")
        self.user_does("enqueue", "--id", "a", "--max-retries", "1",
                       *(() if end else ("--timeout", "0.5")), command)
        self.user_does("enqueue", "--id", "z", "true")
        supervisor, worker, log = self.user_workers()
        left = meeting.arrived()
        self.assertEqual(os.stat("/proc/%d" % left).st_uid, 0)
        if end:
            self.user_does(*end)
        self.until(lambda: self.user_sees("a")["runs"][0]["outcome"])
        job = self.user_sees("a")
        self.assertEqual((job["runs"][0]["outcome"], job["state"]), (outcome, state))
        self.assertTrue(alive(left))

        def logged():
            return [line for line in read_file(log).decode().splitlines()
                    if re.search(r"\b%d\b" % left, line)]
        self.until(logged, "the log does not name process %d" % left)
        for text in (job["runs"][0]["error"], self.user_does("show", "a"), logged()[0]):
            self.assertRegex(text, r"\b%d\b" % left)
            self.assertRegex(text, r"signal|permit|permission|\buser\b|\buid\b|root")
        if outcome != "interrupted":
            self.until(lambda: self.user_sees("z")["state"] == "completed")
            self.assertTrue(alive(worker))
            os.kill(supervisor, signal.SIGTERM)
        self.assertEqual(os.waitpid(supervisor, 0)[1], 0)

    def test_a_job_that_becomes_root(self):
        """It, or a child of it, so that its worker may not signal it. After the grace the run is
        recorded, everybody is told who was left, and why, and the worker goes on."""
        self.another_user()
        tool, become = shutil.which("setpriv"), self.path("become")
        if not tool or os.statvfs(self.dir).f_flag & os.ST_NOSUID:
            self.skipTest("setpriv(1) is not there, or nobody becomes root in this folder")
        shutil.copyfile(tool, become)
        os.chmod(become, 0o4755)
        line = "%s --reuid 0 --clear-groups sh -c " % shlex.quote(become)
        for kind, command, outcome, state, end in (
                ("job", "exec %s", "timeout", "dead", ""),
                ("child", "%s & wait", "timeout", "dead", ""),
                ("cancelled", "exec %s", "cancelled", "cancelled", "cancel a"),
                ("stopped", "exec %s", "interrupted", "pending",
                 "worker stop --now --timeout 20")):
            with self.place(os.path.join("home", kind)) as meeting:
                for path in meeting.paths.values():
                    os.chmod(path, 0o666)
                self.left_alone(command % (line + shlex.quote(meeting.here)), meeting, outcome,
                                state, end.split())

    def test_the_pipes_of_background_children_are_bounded(self):
        """The oldest is closed, what is written to the others is drained; the Limits in the README
        tell so."""
        limits = read_file(os.path.join(HERE, "README.md")).decode()
        limits = limits.partition("\n## Limits\n")[2].partition("\n## ")[0]
        with constants(self, MOST_OPEN_PIPES=2):
            self.workers()
        meetings = [self.meeting("m%d" % number) for number in range(3)]
        for number, meeting in enumerate(meetings):
            told = self.path("told%d" % number)
            self.add("j%d" % number, "(%s; trap '' PIPE; head -c 1000000 /dev/zero; echo $? >%s) & "
                     "echo done" % (meeting.here, shlex.quote(told)))
            meeting.arrived()
            self.until_state("j%d" % number, "completed")
            self.assertEqual(self.output("j%d" % number), b"done\n")
        self.add("after", "true")
        self.until_state("after", "completed")
        for number, meeting in enumerate(meetings):
            meeting.let_go()
            meeting.gone()
            self.assertEqual(read_file(self.path("told%d" % number)) == b"0\n", number > 0)
        self.assertTrue([limit for limit in limits.split("\n- ") if "background" in limit
                         and re.search(r"\b%d\b" % queuectl.MOST_OPEN_PIPES, limit)], limits)


@contextlib.contextmanager
def constants(case, **values):
    """What the case starts meanwhile has these values in the place of the program's own."""
    program = case.path("changed-%s.py" % "-".join(values))
    with open(program, "w") as file:
        file.write("import sys; sys.path.insert(0, %r); import queuectl\n"
                   "vars(queuectl).update(%r)\n"
                   "if __name__ == '__main__': sys.exit(queuectl.main())\n" % (HERE, values))
    with mock.patch("%s.SCRIPT" % __name__, program):
        yield


class Guarantees(Process):
    """The twelve promises, in their order, but for 6 and 7, which are those of Stopping and
    Hostile. Each test fails when its promise is broken."""

    def strace(self, *options):
        """The words that stand before a command to trace it so."""
        words = ["strace", "-f", *options]
        if not shutil.which("strace") or subprocess.run(
                words + ["true"], stderr=subprocess.DEVNULL).returncode:
            self.skipTest("NOT TESTED: strace is not there, or may not trace")
        return words

    # A write to the -wal file, that it is synced, or a write to stdout.
    CALLS = re.compile(rb"write(?:64|v2?)?\(\d+<[^>]*q\.db-(w)al>|"
                       rb"\bf(?:data)?(s)ync\(\d+<[^>]*q\.db-wal>\)|\bwrite\((1)<")

    @linux
    def test_01_an_acknowledged_job_is_on_disk(self):
        trace = self.path("trace")
        strace = self.strace("-y", "-e", "trace=write,pwrite64,pwritev,fsync,fdatasync",
                             "-o", trace)

        def calls():
            return b"".join(map(b"".join, self.CALLS.findall(read_file(trace)))).decode()

        def synced():
            return re.search(r"ws+\Z", calls().replace("1", ""))
        self.queue()  # another connection: no close tidies up
        self.assertEqual(self.cli("enqueue", "true", program=strace)[0], 0)
        self.assertRegex(calls(), r"\A[ws]*ws+1+\Z")
        # A worker's commits follow soon, also while it runs a job.
        meeting = self.meeting()
        self.add("a", meeting.here)
        process = self.start("worker", "start", program=strace)
        pid = meeting.arrived()
        self.until(synced, "the claim is not synced")
        self.assertTrue(alive(pid))
        self.assertTrue(meeting.nobody())
        self.finish(meeting)
        self.until(synced, "the result is not synced")
        self.assertEqual(self.cli("worker", "stop")[0], 0)
        process.wait(PATIENCE)

    def test_01_each_worker_syncs_its_own_commits(self):
        """Within SYNC_DELAY of the first one that is not synced, also while it waits for the writer
        lock; where it fails, again."""
        first, second = (self.queue(durable=False) for _ in range(2))
        first.sync(), second.sync()
        synced = []
        with mock.patch.object(queuectl, "flush", synced.append):
            self.assertEqual((first.sync(), synced), (0, []))  # nothing to do
            now = time.monotonic()
            second.enqueue("true")
            due = second.sync_at
            self.assertTrue(now < due <= time.monotonic() + queuectl.SYNC_DELAY)
            second.enqueue("true")
            self.assertEqual((second.sync_at, first.sync_at), (due, math.inf))
            first.enqueue("true")
            self.assertEqual(first.sync(), os.path.getsize(self.db + "-wal"))
            self.assertEqual((second.sync_at, len(synced)), (due, 1))  # nobody's word but its own
            with mock.patch.object(queuectl, "flush", side_effect=OSError(errno.EIO, "no")):
                self.refuses("cannot sync", second.sync)
            self.assertTrue(now < second.sync_at < math.inf)
            second.sync()
            self.assertEqual((second.sync_at, len(synced)), (math.inf, 2))
            claim = self.claim(second)
            second.sync()
            second.add_output(claim.run, [(0, b"x")], (1, 1))  # if it is lost, so is the run
            self.assertEqual(second.sync_at, math.inf)
            second.enqueue("true")
            second.sync_at = 0.0
            with self.locked(), second.impatient(0.05), \
                    self.assertRaises(queuectl.DatabaseUnavailable):
                second.enqueue("true")
            self.assertEqual(len(synced), 4)
            second.enqueue("true")
            second.close()
            self.assertEqual(len(synced), 5)
        # Clients sync at each commit; a checkpoint that begins the log anew syncs its header. And
        # the names of new files, the database's and then the log's, must last as well.
        folders = []
        with mock.patch.object(queuectl, "flush_folder", folders.append):
            self.use("new", "q.db")
            client, worker = self.queue(), self.queue(durable=False)
            self.assertEqual([queue._value("PRAGMA synchronous") for queue in (client, worker)],
                             [2, 1])
            self.assertEqual(folders, [self.path("new")])
            worker.enqueue("true")
            worker.sync()
            self.assertEqual(folders, [self.path("new")] * 2)

    def test_02_one_claim_per_job(self):
        """And one settle: ModelTest shows that stale results change nothing."""
        # Every transaction has the writer lock before it reads.
        queue, seen = self.queue(), []
        queue._db.set_trace_callback(lambda sql: seen.append(sql.split("--")[0].strip()))
        queue.enqueue("true", id="b")
        self.settle(queue, self.claim(queue))
        queue.cancel([queue.enqueue("true")])
        queue.retry_all()
        queue._db.set_trace_callback(None)
        self.assertGreaterEqual(seen.count("BEGIN IMMEDIATE"), 5)
        locked = False
        for sql in seen:
            locked = (locked or sql == "BEGIN IMMEDIATE") and sql != "COMMIT"
            if not locked:  # what is not read may be of this connection only
                self.assertRegex(sql, r"\A(SELECT|WITH|PRAGMA|BEGIN\Z|COMMIT|CREATE TEMP|"
                                 r"(DELETE FROM|INSERT INTO|UPDATE) temp\.)")
        queue.close()

        # Claimers that race, in processes of their own.
        self.use("race.db")
        with Queue(self.db) as race:
            list(race.enqueue_many({"command": "true"} for _ in range(300)))

        def claim_all(name):
            with Queue(self.db, durable=False) as mine:
                claim = None
                while True:
                    settled, claim = mine.turn(claim and self.result(claim), "w%d" % name)
                    if claim is None:
                        return
        self.race(claim_all, 4)
        with Queue(self.db) as race:
            self.assertEqual(race.counts()["completed"], 300)
        self.assertEqual(set(self.sql("SELECT count(*), max(outcome) FROM runs GROUP BY job")),
                         {(1, "completed")})

    def test_02_a_refused_settle_is_logged(self):
        """Its job has been settled by somebody else while it ran."""
        meeting, process, _ = self.busy(max_retries=5)
        with Queue(self.db) as queue:
            self.settle(queue, queue.get("a"), "cancelled", error="taken")
        meeting.let_go()
        self.until_logged(process, "it was taken back from this worker; the result (completed)")
        self.add("b", "true")
        self.until_state("b", "completed")
        self.assertEqual((self.job("a").state, self.job("a").last_error), ("cancelled", "taken"))
        self.assertIsNone(process.poll())

    @linux
    def test_03_liveness_comes_from_the_operating_system(self):
        meeting, process, pid = self.busy(max_retries=5)
        worker = self.infos()[0]
        # A worker that does not move, as on a laptop that sleeps, and clocks that jump.
        self.freeze(worker.pid)
        self.sql("UPDATE jobs SET locked_at = '1970-01-01T00:00:00.000Z', "
                 "updated_at = '2999-01-01T00:00:00.000Z'", "UPDATE runs SET started_at = 0",
                 "UPDATE workers SET started_at = '1970-01-01T00:00:00.000Z'")
        self.drain()  # its supervisor looks for the dead, and so does its worker
        with Queue(self.db) as queue:
            self.assertEqual([row["run"] for row in queue.orphans(queue.open_runs())], [])
            queuectl.Rescuer().finish(queue, self.fail)
        self.assertEqual((self.job("a").state, alive(pid)), ("processing", True))
        self.assertEqual([info.job for info in self.infos()], ["a"])
        os.kill(worker.pid, signal.SIGCONT)
        self.finish(meeting)
        self.assertEqual(len(self.runs("a")), 1)
        self.stop(process)
        # And a row, a file and a living process of that number make no worker live.
        self.add("b", meeting.here, max_retries=5)
        with Queue(self.db) as queue:
            queue.turn(None, "forged", "forged.run0")
            queue.register("forged", "forged", None, None)  # with the number of this process
            os.close(queuectl.create_file(queue.lock_path("forged")))
            self.assertEqual(queue.workers(supervisors=True), [])
            self.assertEqual(queue.get("b").locked_by, "forged")
        self.workers()
        meeting.arrived()
        self.assertEqual([run.outcome for run in self.runs("b")], ["lost", None])
        meeting.let_go()
        self.until_state("b", "completed")

    def test_04_nothing_runs_again_while_somebody_unknown_may_run_it(self):
        meeting, process, pid = self.busy(
            "[ $QUEUECTL_ATTEMPT -gt 1 ] || { " + self.BARE + "; }; %s", max_retries=5)
        unknown = self.bare(self.dir)
        # The worker dies while its supervisor is stopped and cannot see it.
        self.freeze(process.pid)
        for victim in (self.infos()[0].pid, pid):
            os.kill(victim, signal.SIGKILL)
            self.until(lambda: not alive(victim))
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
        self.finish(meeting)

    def test_04_a_copy_of_the_database_ends_nobody(self):
        """Its runs have the same numbers, and no worker of it lives."""
        meeting, _, pid = self.busy()
        copy = self.path("copy.db")
        with contextlib.closing(sqlite3.connect(self.db)) as source, \
                contextlib.closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        os.chmod(copy, 0o600)
        with Queue(copy) as queue:
            queuectl.take_back_now(queue)
            self.assertEqual(queue.get("a").state, "pending")
        self.assertTrue(alive(pid))
        self.finish(meeting)

    @linux
    def test_05_rescue_is_quick(self):
        self.configure(backoff_base=1000, kill_grace=1000)
        meeting, process, pid = self.busy(max_retries=5)
        # By its supervisor, at once; a lost run costs an attempt and no backoff.
        os.kill(self.infos()[0].pid, signal.SIGKILL)
        pid = meeting.arrived()
        job = self.job("a")
        self.assertEqual((job.state, job.attempts), ("processing", 2))
        self.assertEqual([info.slot for info in self.infos()], [1])  # the dead one's
        self.until_logged(process, "worker 1 died (killed by SIGKILL)")
        self.until_logged(process, "job a: its worker %s died; the job is pending"
                          % self.runs("a")[0].worker)
        # By an idle worker of another supervisor, also where the database never stands still.
        worker = self.infos()[0].pid
        other = self.workers()
        process.kill()
        process.wait()
        os.kill(worker, signal.SIGKILL)
        with Queue(self.db) as queue:
            self.until(lambda: queue.pause("nobody") or len(queue.runs("a")) == 3)
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

    def test_05_wake_ups_go_to_those_who_can_run_the_job(self):
        queue, rung = self.queue(), []
        queuectl.require_safe(self.db)
        for name, queues in (("1", ["a"]), ("2", ["b"]), ("3", None), ("4", ["b", "c"])):
            queue.register(name, "s", queues, None)
        with mock.patch.object(queue, "ring", lambda name: rung.append(name) or True):
            for wake, expected in (
                    (lambda: queue.wake(["b"]), ["2", "3", "4"]),
                    (lambda: queue.wake(["a", "c"]), ["1", "3", "4"]),
                    (lambda: queue.wake(["d"]), ["3"]), (lambda: queue.wake([]), []),
                    (queue.wake, ["1", "2", "3", "4"]),
                    (lambda: queue.enqueue("true", queue="c", delay=3), ["3", "4"]),
                    (lambda: queue.enqueue("true", queue="b", id="b"), ["2", "3", "4"]),
                    (lambda: queue.enqueue("true", queue="a", after=["b"]), []),
                    (lambda: queue.turn(None, "2"), []),
                    (lambda: queue.wake(["b"]), ["3", "4"])):  # who is busy looks by himself
                del rung[:]
                wake()
                self.assertEqual(rung, expected)
            claim = queuectl.Claim(run=1, seq=queue.get("b").seq)
            del rung[:]
            self.settle(queue, claim)
            self.assertEqual(rung, ["1", "3"])  # the queue of the job that waited for it
            del rung[:]
            with mock.patch.object(queuectl, "is_held", return_value=True):
                queue.order_stop(queuectl.DRAIN)
            self.assertEqual(sorted(rung), ["1", "2", "3", "4"])

    def snapshot(self, folder):
        """What stands in a folder, byte for byte (without the side files of a queue)."""
        paths = [os.path.join(folder, name) for name in os.listdir(folder) if name[-4:] != "-run"]
        return {path: (oct(os.lstat(path).st_mode), os.path.isfile(path) and hash(read_file(path)))
                for path in paths}

    BAD = (  # what it is, what is said of it, and how it is made
        ("text", "not a database", b"to whom it may concern\n" * 1000),
        ("a note", "not a database", b"milk\n"), ("one byte", "", b"x"),
        ("folder", "is a folder", os.mkdir),
        ("fifo", "not a regular file", getattr(os, "mkfifo", None)),
        ("other program's", "another program's", ["CREATE TABLE jobs (id)"]),
        ("marked by another program", "another program's",
         ["PRAGMA application_id = 7", "PRAGMA user_version = 1"]),
        ("other program's WAL", "another program's",
         ["PRAGMA journal_mode = WAL", "CREATE TABLE t (x)"]),
        ("live WAL", "another program's", None), ("crashed WAL", "another program's", None),
        ("newer", "newer queuectl", (1, None, "PRAGMA user_version = 99")),
        ("truncated", "is truncated", (0.501, None)),
        ("truncated in its first page", "", (1e-9, None)),
        ("corrupt", "is corrupt", (1, 4096)), ("corrupt from its first page on", "", (1, 100)),
    )

    def bad_file(self, kind, how):
        """Make a file that is no queue, or one of 500 jobs of which so much is kept and what
        comes from some byte on is overwritten. A process that has it open."""
        if callable(how):
            how(self.db)
        elif isinstance(how, bytes):
            with open(self.db, "wb") as file:
                file.write(how)
        elif isinstance(how, list):
            self.sql(*how)
        elif isinstance(how, tuple):
            with Queue(self.db) as queue:
                list(queue.enqueue_many({"command": "true #%d" % n} for n in range(500)))
            (keep, start), statements = how[:2], how[2:]
            self.sql("SELECT 1", *statements)
            size = os.path.getsize(self.db)
            os.truncate(self.db, max(1000, int(size * keep)))
            with open(self.db, "r+b") as file:
                if start:
                    file.seek(start)
                    file.write(b"\xaa" * (size - start))
        else:
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
        return None

    def test_08_bad_files_are_refused_and_left_as_they_are(self):
        for kind, says, how in self.BAD:
            with self.subTest(kind):
                self.use(kind, "q.db")
                peer = self.bad_file(kind, how)
                before = self.snapshot(self.path(kind))
                for words in (("enqueue", "--file", "-"), ("status",), ("worker", "stop")):
                    self.refused(*words, code=1, says=says, stdin=b'{"command": "true"}')
                self.refused("worker", "start", "--drain", by=self.cli, code=1)
                self.assertEqual(self.snapshot(self.path(kind)), before)
                if kind == "live WAL":  # its owner goes on as if nothing had been
                    self.tell(peer)
                    self.assertEqual(self.hear(peer), "3")
        self.use("linked", "q.db")
        queue = self.queue()
        os.link(self.db, self.path("linked", "second"))
        Queue(self.db, expect=queue.identity).close()  # as workers do: they go on by its old name
        for place, says in (("no such folder/q.db", "no such folder/q.db"),
                            ("text/q.db/q.db", "q.db"), ("/dev/null", "regular"),
                            ("linked/second", "hard link"), ("linked/q.db", "hard link")):
            for words in (("enqueue", "true"), ("list",), ("worker", "start", "--drain")):
                self.refused("--db", place, *words, code=1, says=says)
        self.assertFalse(os.path.exists(self.path("no such folder")))

    def test_08_damage_within_is_told(self):
        """Where SQLite itself sees none: text that is none, and JSON that is none."""
        self.add("a", "true", env={"NAME": "x"})
        for damage in ("env = '!'", "command = CAST(x'ff' AS TEXT)"):
            self.sql("UPDATE jobs SET " + damage)
            for words in (("list",), ("list", "--json"), ("show", "a")):
                self.refused(*words, code=1, says="corrupt")
            code, _, err = self.cli("worker", "start", "--drain", "--quiet")
            self.assertEqual(code, 1)
            self.assertIn("is corrupt; stop its workers", err)
            self.assertNotIn("Traceback", err)
            self.assertEqual(self.sql("SELECT state, attempts FROM jobs"), [("pending", 0)])
        self.sql("UPDATE jobs SET env = NULL, command = 'true'")
        self.ok("cancel", "a")
        self.sql("UPDATE jobs SET state = 'cance_led'")
        for words in (("status",), ("status", "--json"), ("metrics",)):
            self.refused(*words, code=1, says="is corrupt")
        data = read_file(self.db)
        at = data.index(b"CREATE TABLE jobs")
        with open(self.db, "r+b") as file:
            file.seek(at + 7)
            file.write(b"\xae")
        self.refused("status", code=1, says="corrupt")

    def test_08_what_stands_beside_a_damaged_file_is_left(self):
        """Its -wal file may have the only good copy of the last jobs."""
        with Queue(self.db) as queue:
            queue.enqueue_many({"command": "true #%d" % n} for n in range(500))
            queue.checkpoint(0)
            queue.enqueue("true")
            self.use("crashed", "q.db")
            for end in ("", "-wal"):
                shutil.copy(queue.path + end, self.db + end)
        with open(self.db, "r+b") as file:
            file.seek(4096)
            file.write(b"\xaa" * (os.path.getsize(self.db) - 4096))
        before = [read_file(self.db + end) for end in ("", "-wal")]
        for words in (("status",), ("list",), ("worker", "start", "--drain")):
            self.refused(*words, by=self.cli, code=1, says="corrupt; stop its workers")
            self.assertEqual([read_file(self.db + end) for end in ("", "-wal")], before)

    def test_08_files_that_cannot_be_written(self):
        os.chmod(self.dir, 0o755)
        for kind, file, folder in (("file", 0o444, 0o755), ("folder", 0o644, 0o555),
                                   ("both", 0o444, 0o555), ("unreadable", 0o000, 0o755)):
            with self.subTest(kind):
                self.use(kind, "q.db")
                self.add("a", "true")
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
                    self.refused(*words, by=self.as_user, code=1)
                for words in (("status",), ("list",)):  # may be refused, too
                    code, out, err = self.as_user(*words)
                    self.assertEqual(code, 0 if out else 1, (words, err))
                    self.assertNotIn("Traceback", err)
                os.chmod(self.path(kind), 0o755)
                os.chmod(self.db, 0o644)
                self.assertEqual(self.snapshot(self.path(kind)), before)

    @linux
    def test_08_a_full_disk_loses_nothing(self):
        folder = self.path("disk")
        self.use("disk", "q.db")
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", folder]
        if not ROOT or not shutil.which("mount") or subprocess.run(
                mount, stderr=subprocess.PIPE).returncode:
            self.skipTest("only root may mount a file system")
        self.addCleanup(subprocess.run, ["umount", "-l", folder])
        self.addCleanup(self.end_processes)
        # At the first use: the checkpoint at its end could not bring all of the log into the file.
        many = b'{"command": "true"}\n' * 7000
        for _ in range(2):
            self.refused("enqueue", "--file", "-", by=self.cli, code=1,
                         says="nothing was stored", stdin=many)
        self.assertGreater(self.sql("PRAGMA page_count")[0][0] * 1024, os.path.getsize(self.db))
        subprocess.run(["mount", "-o", "remount,size=8m", folder], check=True)
        ids = self.ok("enqueue", "--file", "-", stdin=many)
        self.assertEqual(list(self.states()), ids.split())
        self.assert_sound()
        # While a job runs.
        self.use("disk", "other.db")
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
        self.assertRegex(self.refused("enqueue", "true #" + "x" * 100000, by=self.cli, code=1),
                         "full|disk")
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
        self.assertEqual(self.states(), {"a": "completed", "b": "scheduled", "c": "completed"})
        self.assert_sound()

    def test_08_a_file_that_may_not_grow_stores_nothing(self):
        keeper = self.queue()
        keeper.enqueue("true", id="a")
        wal = os.path.getsize(self.db + "-wal")
        many = b'{"command": "true #%s"}\n' % (b"x" * 1000) * 5000
        for words, most in ((["true #" + "x" * 100000], max(wal, os.path.getsize(self.db)) + 20000),
                            (["--id", "b", "true"], wal), (["--file", "-"], 10 ** 6)):
            self.assertRegex(self.refused(  # many jobs fill the log before their commit
                "enqueue", *words, by=self.cli, code=1, stdin=many, preexec_fn=lambda:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))), "full|disk")
        self.assertEqual([job.id for job in keeper.jobs()], ["a"])
        self.ok("enqueue", "--id", "b", "true")
        self.assert_sound()

    def test_08_a_database_that_is_taken_away_stops_its_workers(self):
        """Within about a second, whatever they do just then."""
        other = self.path("other.db")
        with Queue(other) as queue:
            queue.enqueue("true", id="b", queue="unserved")

        def deleted(*pids):
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.db + suffix)

        def made_anew(*pids):
            deleted()
            self.add("b", "true")

        def replaced(*pids):
            shutil.copy(self.db, self.path("copy"))
            os.replace(self.path("copy"), self.db)

        def moved(*pids):
            os.rename(os.path.dirname(self.db), self.path("moved"))

        def overwritten(*pids):  # which keeps the inode: only the random id tells
            for pid in pids:  # nobody writes while the file is copied
                self.freeze(pid)
            self.assertEqual(self.sql("PRAGMA busy_timeout = 9000",
                                      "PRAGMA wal_checkpoint(TRUNCATE)"), [(0, 0, 0)])
            inode = os.stat(self.db).st_ino
            subprocess.run(["cp", other, self.db], check=True)
            self.assertEqual(os.stat(self.db).st_ino, inode)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

        for doing, ways in (("idle", (deleted, made_anew, replaced, moved, overwritten)),
                            ("long job", (deleted, overwritten)),
                            ("short jobs", (deleted, made_anew, overwritten))):
            served = []
            for way in ways:
                name = "%s, %s" % (doing, way.__name__)
                self.use(name, "q.db")
                meeting = self.meeting(name)
                process = self.workers() if doing == "idle" else self.short_jobs() \
                    if doing == "short jobs" else self.busy(meeting=meeting)[1]
                served.append((name, way, process, meeting, self.infos()[0].pid))
            for name, way, process, _, worker in served:
                self.use(name, "q.db")
                way(process.pid, worker)
            start = time.monotonic()
            for name, way, process, meeting, _ in served:
                with self.subTest(name):
                    self.use(name, "q.db")
                    self.until(lambda: process.poll() is not None
                               or time.monotonic() > start + 20)
                    self.assertEqual(process.poll(), 1, self.log(process)[-300:])
                    self.assertIn("deleted or replaced", self.log(process))
                    self.assertNotIn("Traceback", self.log(process))
                    if doing == "long job":
                        meeting.gone()
                    if way is made_anew:
                        self.assertEqual(self.job("b").state, "pending")

    @linux
    def test_09_only_the_owner_feeds_the_queue(self):
        """Whatever the umask."""
        for mask in (0, 0o777):
            with self.place("umask-%o" % mask) as meeting:
                self.assertEqual(self.cli("enqueue", "--id", "a", "umask; " + meeting.here,
                                          preexec_fn=lambda: os.umask(mask))[0], 0)
                process = self.workers(1, preexec_fn=lambda: os.umask(mask))
                meeting.arrived()
                side = self.db + "-run"
                paths = [self.db + end for end in ("", "-wal", "-shm")] + [
                    os.path.join(side, name) for name in os.listdir(side)]
                self.assertEqual({path: oct(os.lstat(path).st_mode & 0o7777) for path in paths},
                                 dict.fromkeys(paths, "0o600"))
                self.assertEqual(stat.S_IMODE(os.lstat(side).st_mode), 0o700)
                self.assertEqual({path.rpartition(".")[2] for path in paths[3:]},
                                 {"lock", "bell", "run0"})
                self.finish(meeting)
                self.assertEqual(self.output("a"), b"%04o\n" % mask)
                self.stop(process)

    def test_09_workers_refuse_what_others_may_have_written(self):
        os.mkdir(self.path("planted"))
        self.use("folder", "q.db")
        folder, side = self.path("folder"), self.db + "-run"
        self.add("a", "true")
        shutil.rmtree(side, ignore_errors=True)
        # Sticky or not: what others plant beside a database, SQLite reads. The default place is
        # one that is safe.
        shared = "%s stands in a folder that every user can write .*such as %s" % tuple(
            map(re.escape, (self.db, self.path("state", "queuectl"))))
        table = [  # what is done, how it is undone, and what workers say meanwhile
            ((os.chmod, self.db, 0o602), (os.chmod, self.db, 0o600), "by every user .chmod"),
            ((os.symlink, self.path("planted"), side), (os.unlink, side), "-run"),
            ((os.mkfifo, side), (os.unlink, side), "-run"),
            ((os.mkdir, side), (os.chmod, side, 0o700), None),
            ((os.chmod, side, 0o777), (os.chmod, side, 0o700), "-run"),
        ] + [((os.chmod, folder, mode), (os.chmod, folder, 0o700), shared)
             for mode in (0o777, 0o1777, 0o1702)] + [
            ((os.chown, path, 65534, 65534), (os.chown, path, 0, 0), says)
            for path, says in ((side, "-run"), (self.db, "another user"),
                               (folder, "a folder of another user")) if ROOT]
        self.addCleanup(self.main, "worker", "stop", "--now")
        for (do, *how), (undo, *back), says in table:
            do(*how)
            for option in ("--drain", "--detach", "--ensure") if says else ():
                with self.subTest(says, how=how, option=option):
                    self.assertRegex(self.refused("worker", "start", option, by=self.cli, code=1),
                                     says)
                    self.assertEqual(self.job("a").state, "pending")  # nothing of it may run
            undo(*back)
            self.assertEqual(self.infos(), [])
        with mock.patch("os.geteuid", lambda: 12345):
            with self.assertRaisesRegex(QueueError, "another user"):
                queuectl.require_safe(self.db)
        self.assertEqual(os.listdir(self.path("planted")), [])
        os.symlink(self.db, self.path("link"))
        with self.assertRaises(OSError):
            queuectl.create_file(self.path("link"))
        for mode in (0o770, 0o1770, 0o2770):  # a group is the owner's choice
            os.chmod(folder, mode)
            self.add("%o" % mode, "true")
            self.drain()
            self.assertEqual(self.job("%o" % mode).state, "completed")

    def test_10_no_reader_pins_the_wal(self):
        writer, reader = self.queue(), self.queue()
        list(writer.enqueue_many({"command": "true"} for _ in range(2500)))
        with mock.patch.object(reader, "_rows", wraps=reader._rows) as rows:
            self.assertEqual(len(list(reader.jobs())), 2500)
        self.assertEqual(rows.call_count, 3)
        for page in (1, 1001, 2001):
            jobs = reader.jobs()
            for _ in range(page):
                next(jobs)
            writer.enqueue("true")
            self.assertEqual(self.sql("PRAGMA busy_timeout = 0", "PRAGMA wal_checkpoint(TRUNCATE)"),
                             [(0, 0, 0)])
            self.assertEqual(os.path.getsize(self.db + "-wal"), 0)

    def test_11_nobody_starves_and_nobody_sees_a_locked_database(self):
        """Also where first uses meet. And an id and a key are given once."""
        def use(number):
            with Queue(self.db) as queue:
                for job in range(jobs):
                    queue.enqueue("true", id="j%d-%d" % (number, job))
                with contextlib.suppress(QueueError):
                    queue.enqueue("true", id="same")
                queue.enqueue("true", unique="key")
                return 0 if queue.get(queue.enqueue("true", unique="key")).unique else 1
        for round, (users, jobs) in enumerate([(8, 1)] * 30 + [(16, 20)]):
            self.use("%d.db" % round)
            self.race(use, users)
            self.assertEqual(self.sql("SELECT count(*), sum(id = 'same'), sum(unique_key = 'key') "
                                      "FROM jobs"), [(users * jobs + 2, 1, 1)])
        self.assert_sound()

    def test_11_a_program_that_holds_the_lock_only_delays(self):
        self.configure(backoff_base=0)
        meeting, process, _ = self.busy()
        with self.locked():
            clients = [self.start(*words, stdout=subprocess.PIPE) for words in (
                ("enqueue", "--id", "b", "true"), ("pause", "x"),
                ("config", "set", "max-retries", "2"))]
            meeting.let_go()
            self.ok("status")
            start = time.monotonic()
            self.until(lambda: time.monotonic() > start + 1)
            self.assertEqual([client.poll() for client in clients], [None] * 3)
        for client in clients:
            self.ended(client)
        self.assertEqual(clients[0].stdout.read(), b"b\n")
        self.until_state("b", "completed")
        self.assertEqual(self.job("a").state, "completed")
        self.assertNotIn("locked", self.log(process))

    def test_12_the_database_is_never_opened(self):
        hooked = self.path("hooked.py")
        with open(hooked, "w") as file:
            file.write(textwrap.dedent("""
                import os, sys
                def hook(event, arguments):
                    if event == "open" and str(arguments[0]).rstrip("'").endswith(
                            ("q.db", "q.db-shm")) and not arguments[2] & os.O_EXCL:
                        os.write(2, ("OPENED %s\\n" % arguments[0]).encode())
                sys.addaudithook(hook)
                import queuectl
                code = queuectl.main()
                if "CONTROL" in os.environ:
                    os.close(os.open(os.environ["QUEUECTL_DB"], os.O_RDONLY))
                sys.exit(code)"""))
        self.env["PYTHONPATH"] = HERE
        meeting = self.meeting()
        with mock.patch("%s.SCRIPT" % __name__, hooked):
            for line in ("enqueue --id a --max-retries 1 false", "enqueue --id b true", "status",
                         "list", "pause", "resume", "worker start --drain --count 2", "logs a",
                         "show a", "dlq retry a", "cancel a", "worker list", "prune"):
                code, _, err = self.cli(*line.split())
                self.assertEqual((code, err.count("OPENED")), (0, 0), (line, err))
            self.assertIn("OPENED", self.cli("status", env={"CONTROL": "1"})[2])
            # While a job runs, and is rescued: the supervisor and its workers look often then.
            self.add("c", meeting.here, max_retries=3)
            process = self.workers()
            meeting.arrived()
            self.kill_worker()
            meeting.arrived()
            self.finish(meeting, "c")
            self.stop(process)
            self.assertNotIn("OPENED", self.log(process))

    @linux
    def test_12_no_connection_crosses_a_fork(self):
        for moment in ("before", "meanwhile"):
            with self.place(moment) as meeting:
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
                # Its own connection's, and soon that by which it syncs.
                self.assertIn(opened.count(self.db + "-wal"), (1, 2), opened)
                spawned = b"multiprocessing.spawn" in read_file("/proc/%d/cmdline" % worker)
                self.assertEqual(spawned, moment == "meanwhile")
                meeting.let_go()
                self.assertEqual(self.hear(peer), "code 0")
                self.assertEqual(self.job("a").state, "completed")
                self.assert_sound()

    def planted(self, kind):
        """The bytes of a -journal or -wal file from which SQLite would make any database of the
        same page size into a copy of another one, in which a job waits."""
        path = self.path("theirs.db" + kind)
        with Queue(path) as queue:
            queue.enqueue("id -u >%s" % self.path("ran"), id="theirs", cwd="/")
            if kind == "-wal":
                return read_file(path + "-wal")  # it holds every page
        data, size, nonce = read_file(path), 1024, 12345
        pages = [data[at:at + size] for at in range(0, len(data), size)]
        header = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + b"".join(
            number.to_bytes(4, "big") for number in (len(pages), nonce, len(pages), 512, size))
        return header.ljust(512, b"\0") + b"".join(
            number.to_bytes(4, "big") + page
            + (nonce + sum(page[size - 200:0:-200])).to_bytes(4, "big")
            for number, page in enumerate(pages, 1))

    @linux
    @unittest.skipUnless(ROOT, "NOT TESTED: only root can play another user's attack on a "
                         "database in a sticky folder")
    def test_09_what_another_user_plants_beside_a_database_does_not_run(self):
        """In a sticky folder anybody can create the -journal or -wal of somebody's database."""
        os.chmod(self.dir, 0o755)
        for kind in ("-journal", "-wal"):
            with self.subTest(kind):
                data = self.planted(kind)
                self.use("tmp" + kind, "q.db")
                os.chmod(self.path("tmp" + kind), 0o1777)
                self.add("mine", "true")
                before = read_file(self.db)

                def plant():
                    self.become()
                    os.umask(0)
                    with open(self.db + kind, "xb") as file:
                        file.write(data)
                self.assertEqual(os.waitpid(self.fork(plant), 0)[1], 0)
                self.assertEqual(os.stat(self.db + kind).st_uid, 65534)
                self.refused("worker", "start", "--drain", by=self.cli, code=1)
                self.assertFalse(os.path.exists(self.path("ran")), "another user's job ran")
                # Who is told to move the database elsewhere must not move their jobs with it.
                self.assertEqual(read_file(self.db), before)
                os.unlink(self.db + kind)
                self.assertEqual(self.job("mine").state, "pending")

    def touched(self):
        """What changes with every write to the database file. (Not its bytes: to open it here
        would drop the locks of this process.)"""
        status = os.stat(self.db)
        return status.st_size, status.st_mtime_ns

    CUT = queuectl.WAL_LIMIT // 2  # bytes of a -wal file that has been checkpointed

    def log_size(self):
        """The bytes of the -wal file."""
        return os.path.getsize(self.db + "-wal")

    def long_log(self, size):
        """A connection that holds the writer lock, beside a -wal file of more than `size` bytes."""
        holder = sqlite3.connect(self.db, isolation_level=None, timeout=PATIENCE)
        self.addCleanup(holder.close)
        holder.execute("PRAGMA wal_autocheckpoint = 0")
        while True:
            holder.execute("BEGIN IMMEDIATE")
            if self.log_size() > size:
                return holder
            holder.execute("INSERT OR REPLACE INTO config VALUES ('filler', ?)",
                           ("x" * (size + size // 16),))
            holder.execute("COMMIT")  # and hope to be the next one, too

    def test_10_the_supervisor_checkpoints_with_the_lock_and_does_not_keep_it(self):
        """However long another connection writes (SQLite's own way out, which it takes in silence
        when its busy timeout is over, is to go on without it), and also where no worker commits
        anything. Nor does it hold the lock while it waits for a reader of another program, which
        it cannot hurry."""
        self.add("a", "true", delay="1h")
        process = self.workers()
        for pid in (process.pid, self.infos()[0].pid):
            self.freeze(pid)
        leader, = [info.name for info in self.infos(supervisors=True) if not info.slot]
        keeper, holder = self.queue(), self.long_log(queuectl.WAL_LIMIT)
        before, end = self.touched(), time.monotonic() + 2.5
        process.send_signal(signal.SIGCONT)

        def over():
            keeper.ring(leader)
            self.assertEqual(self.touched(), before, "pages were written without the writer lock")
            return time.monotonic() > end
        self.until(over)
        holder.execute("ROLLBACK")
        self.until(lambda: self.log_size() <= self.CUT, "nobody checkpoints")
        self.assert_sound()
        reader = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(reader.close)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM jobs").fetchone()
        holder = self.long_log(queuectl.WAL_LIMIT)
        holder.execute("ROLLBACK")
        longest, end = [0.0], time.monotonic() + 2.5

        def write():
            keeper.ring(leader)
            before = time.monotonic()
            holder.execute("BEGIN IMMEDIATE")
            holder.execute("ROLLBACK")
            longest.append(time.monotonic() - before)
            return longest[-1] > 2 or time.monotonic() > end
        self.until(write)
        self.assertLess(max(longest), 2)
        reader.execute("COMMIT")
        holder.execute("UPDATE config SET value = 'y' WHERE key = 'filler'")
        self.until(lambda: self.log_size() <= self.CUT)
        self.assertIsNone(process.poll(), self.log(process))

    def test_10_workers_leave_the_checkpoint_to_others(self):
        """Whose jobs do not wait for it: the supervisor, or a client after its own commit."""
        self.configure(output_limit="1M")
        keeper, process = self.queue(), self.workers()
        self.freeze(process.pid)
        self.until(lambda: keeper.checkpoint(0) or self.log_size() <= self.CUT)
        list(keeper.enqueue_many({"command": "head -c 1000000 /dev/zero"} for _ in range(20)))
        before = self.touched()
        self.until(lambda: keeper.counts()["completed"] == 20)
        self.assertEqual(self.touched(), before, "a worker checkpoints")
        self.assertGreater(self.log_size(), queuectl.WAL_LIMIT)
        self.assertEqual(self.cli("enqueue", "--delay", "1h", "true")[0], 0)
        self.assertLessEqual(self.log_size(), self.CUT)
        self.assert_sound()

    def test_10_the_wal_is_bounded_while_workers_work(self):
        self.configure(output_limit="1M")
        keeper = self.queue()  # keeps the file in place
        list(keeper.enqueue_many({"command": "sleep 0.05; head -c 1000000 /dev/zero"}
                                 for _ in range(110)))
        process = self.start("worker", "start", "--drain", "--count", 2, "--quiet")
        most = 0
        while process.poll() is None:
            most = max(most, self.log_size())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        self.assertEqual(keeper.counts()["completed"], 110)
        # A tenth of a second between two syncs, after which a worker calls for the supervisor,
        # brings 4 MB, and a checkpoint takes its time.
        self.assertLess(most, 8 * queuectl.WAL_LIMIT)
        self.assertGreater(os.path.getsize(self.db), 20 * queuectl.WAL_LIMIT)

    def short_jobs(self):
        """A worker that is busy for a minute, with one short job after the other."""
        with Queue(self.db) as queue:
            list(queue.enqueue_many({"command": "echo >>%s; sleep 0.02" % self.path("ledger")}
                                    for _ in range(3000)))
            process = self.workers()
            self.until(lambda: queue.counts()["completed"] > 5)
        return process

    def test_06_an_order_whose_bell_was_lost_is_read_between_short_jobs(self):
        process = self.short_jobs()
        bells = [name for name in os.listdir(self.db + "-run") if name.endswith(".bell")]
        self.assertEqual(len(bells), 2)  # the worker's and its supervisor's
        for name in bells:
            os.unlink(os.path.join(self.db + "-run", name))
        code, _, err = self.cli("worker", "stop", "--timeout", 8)
        self.assertEqual(code, 0, err)
        self.ended(process)
        views = list(self.states().values())
        self.assertEqual(views.count("processing"), 0)
        self.assertGreater(views.count("pending"), 1000)  # so that it never was idle

    @linux
    @unittest.skipUnless(ROOT, "NOT TESTED: only root can play a member of the database's group")
    def test_09_a_member_of_the_group_is_told_whom_to_ask(self):
        """He may write the database, but not look into its owner's folder beside it: who lives
        there he cannot know, and says so at once."""
        group = 54321

        def member(*words):
            return self.as_user(*words, group=group)

        def told(*words):
            with self.subTest(words):
                self.assertRegex(self.refused(*words, by=member, code=1), r"\buid 0\b")
        os.chmod(self.dir, 0o755)
        self.use("shared", "q.db")
        os.chown(self.path("shared"), 0, group)
        os.chmod(self.path("shared"), 0o770)
        self.add("a", "true", delay="1h")
        os.chown(self.db, 0, group)
        os.chmod(self.db, 0o660)
        process = self.workers()
        self.assertEqual(stat.S_IMODE(os.stat(self.db + "-run").st_mode), 0o700)
        worker = self.infos()[0].pid
        for words in (("worker", "list"), ("worker", "list", "--json"), ("status",),
                      ("status", "--json"), ("worker", "stop"), ("worker", "stop", "--now")):
            told(*words)
        code, out, err = member("enqueue", "--id", "b", "--cwd", "/", "true")
        self.assertEqual((code, out, err), (0, "b\n", ""))
        self.until_state("b", "completed")  # nobody was stopped by who was refused
        self.assertIsNone(process.poll(), self.log(process))
        code, out, err = member("list", "--json")
        self.assertEqual((code, [job["id"] for job in json.loads(out)]), (0, ["a", "b"]), err)
        for pid in (process.pid, worker):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        self.until(lambda: not alive(worker))
        for words in (("worker", "list"), ("status",), ("worker", "stop")):
            told(*words)
        code, out, err = member("enqueue", "--id", "c", "--cwd", "/", "true")
        self.assertEqual((code, out, err), (0, "c\n", ""))
        self.assertEqual(self.infos(), [])  # its owner knows

    def faulty(self, first):
        """strace, under which reads of the database fail with EIO. To raise such an error in
        Python would show nothing: SQLite calls it SQLITE_CORRUPT (os_unix.c: EIO becomes
        SQLITE_IOERR_CORRUPTFS, and that SQLITE_CORRUPT)."""
        return self.strace("-o", os.devnull, "-P", self.db, "-P", self.db + "-wal", "-e",
                           "trace=pread64", "-e", "inject=pread64:error=EIO:when=%d+" % first)

    @linux
    def test_08_a_read_that_fails_is_not_called_corrupt(self):
        with Queue(self.db) as queue:
            list(queue.enqueue_many({"command": "true #" + "x" * 500} for _ in range(300)))
        for first in (2, 8, 12, 40, 100):
            with self.subTest(first):
                code, _, err = self.cli("list", "--json", program=self.faulty(first))
                self.assertEqual(code, 1, err)
                self.assertRegex(err, r"\Aqueuectl: [^\n]*I/O error[^\n]*\n\Z")
                self.assertNotRegex(err, "corrupt|restore")

    @linux
    def test_08_a_worker_outlives_reads_that_fail(self):
        self.add("before", "true")
        process = self.workers()
        self.until_state("before", "completed")
        worker = self.infos()[0].pid
        tracer = subprocess.Popen([*self.faulty(1), "-p", str(worker)], stderr=subprocess.PIPE)
        self.addCleanup(tracer.stderr.close)
        self.addCleanup(tracer.wait)
        self.addCleanup(lambda: tracer.poll() is None and tracer.terminate())
        if b"attached" not in tracer.stderr.readline():
            self.skipTest("NOT TESTED: strace may not attach to a worker")
        self.add("a", "true")
        self.until(lambda: process.poll() is not None
                   or re.search("I/O error|corrupt", self.log(process)))
        self.assertIn("I/O error", self.log(process))
        self.assertNotIn("corrupt", self.log(process))
        self.assertIsNone(process.poll(), self.log(process))
        tracer.terminate()
        tracer.wait()
        self.until_state("a", "completed")
        self.assertEqual(len(self.runs("a")), 1)
        self.until(lambda: len(self.infos()) == 1)  # this one, or one that replaces it
        self.assert_sound()

    def test_04_a_job_never_runs_twice_at_once(self):
        """Though its worker is killed again and again. So that nobody's luck decides, the job
        itself stops its worker."""
        for kind, command, shuts in (
                # At its very first step, and then closes every descriptor.
                ("just after the spawn", "kill -STOP $PPID; exec %s", True),
                # What has no environment either is known by its group alone.
                ("before the worker sleeps", "while read -r pid name state rest </proc/$PPID/stat "
                 "&& [ $state != S ]; do :; done; kill -STOP $PPID; exec env -i %s", True),
                ("with descriptors of its own", "exec 3>three 4>four 5>&1 6>&1 7>&1 8>eight; "
                 "echo x >&3; echo y >&8; kill -STOP $PPID; %s", False)):
            with self.place(kind) as meeting:
                self.configure(backoff_base=0)
                here = self.shut(meeting.here) if shuts else meeting.here
                _, process, pid = self.busy(command % here, meeting=meeting, max_retries=100)
                for _ in range(3):
                    self.assertTrue(alive(pid))
                    self.kill_worker()
                    last, pid = pid, meeting.arrived()
                    self.assertFalse(alive(last), "two copies")
                self.assertEqual([run.outcome for run in self.runs("a")], ["lost"] * 3 + [None])
                os.kill(self.infos()[0].pid, signal.SIGCONT)
                self.finish(meeting)
                self.stop(process)
        self.assertEqual(read_file("three") + read_file("eight"), b"x\ny\n")

    def test_04_who_left_the_group_and_the_lock_is_known_by_its_environment(self):
        away, leader = self.meeting("away"), self.meeting("leader")
        self.configure(backoff_base=0)
        _, _, pid = self.busy("setsid " + self.shut(away.here) + " & %s", meeting=leader,
                              max_retries=100)
        pids = away.arrived(), pid
        for widowed in (False, True, False):  # whether its leader is gone first
            worker = self.infos()[0].pid
            if widowed:
                self.freeze(worker)
                os.kill(pids[1], signal.SIGKILL)
                self.until(lambda: not alive(pids[1]))
            self.assertTrue(alive(pids[0]))
            os.kill(worker, signal.SIGKILL)
            again = leader.arrived()
            self.assertEqual([alive(pid) for pid in pids], [False] * 2, "two copies")
            pids = away.arrived(), again
        away.let_go()  # which a stop of the workers would not reach
        self.finish(leader, "a")

    def test_04_workers_that_a_job_starts_in_the_background_are_not_of_its_tree(self):
        meeting, _, _ = self.busy(
            "[ $QUEUECTL_ATTEMPT -gt 1 ] || queuectl worker start --detach --queue other; %s",
            "--queue", "default", max_retries=5, env={"PATH": self.programs()})
        other, = [info.pid for info in self.infos() if info.queues == ["other"]]
        worker, = [info.pid for info in self.infos() if info.queues == ["default"]]
        os.kill(worker, signal.SIGKILL)
        meeting.arrived()
        self.assertTrue(alive(other))
        self.add("b", "env | grep QUEUECTL_RUN", queue="other")
        self.until_state("b", "completed")
        self.assertEqual(self.output("b").count(b"QUEUECTL_RUN="), 1)
        self.assertTrue(self.output("b").endswith(b"/%d\n" % self.runs("b")[0].run))

    def test_04_the_run_folder_may_be_deleted(self):
        """Together with what it knows of the trees of dead workers."""
        for kind in ("plain", "away", "alive"):
            with self.place(kind) as meeting:
                _, process, pid = self.busy("setsid " + self.shut(meeting.here) + " & wait"
                                            if kind == "away" else "%s", meeting=meeting,
                                            max_retries=5)
                worker = self.infos()[0].pid
                if kind != "alive":
                    self.freeze(worker)
                    self.freeze(process.pid)
                shutil.rmtree(self.db + "-run")
                if kind != "alive":
                    os.kill(process.pid, signal.SIGKILL)
                    os.kill(worker, signal.SIGKILL)
                    process.wait()
                    self.until(lambda: not alive(worker))
                    self.assertTrue(alive(pid))
                else:
                    self.addCleanup(lambda: alive(worker) and os.kill(worker, signal.SIGKILL))
                other = self.start("worker", "start")
                again = meeting.arrived()
                self.assertFalse(alive(pid), "two copies")
                self.assertTrue(alive(again))
                meeting.let_go()
                self.until_state("a", "completed")
                self.stop(other)

    def test_05_a_busy_worker_rescues(self):
        """Also where the database never stands still. It ends what is left of a dead worker's run
        without waiting for that end, but looks for it long before its next look around, which is
        slow here."""
        lost, long = self.meeting("lost"), self.meeting("long")
        self.add("lost", lost.here, max_retries=5)
        process = self.workers()
        pid = lost.arrived()
        self.add("long", long.here)
        with constants(self, TICK=2.0):
            self.start("worker", "start")
        long.arrived()
        for victim in [process.pid] + [info.pid for info in self.infos() if info.job == "lost"]:
            os.kill(victim, signal.SIGKILL)
        process.wait()
        with Queue(self.db) as queue:
            self.until(lambda: queue.pause("nobody") or not alive(pid))
        died = time.monotonic()
        self.until(lambda: self.job("lost").state == "pending")
        self.assertLess(time.monotonic() - died, 1.0)
        self.assertEqual(self.runs("lost")[0].outcome, "lost")
        self.assertEqual(self.job("long").attempts, 1)
        long.let_go()
        lost.arrived()
        self.until_state("long", "completed")


@linux
class Chaos(Process):
    """Workers and supervisors are killed at random instants, while the jobs themselves write
    down what happens to them."""

    TOLD = "QUEUECTL_CHAOS_KILLS" in os.environ
    KILLS = int(os.environ.get("QUEUECTL_CHAOS_KILLS") or 100)
    JOBS = 2 * KILLS
    SUPERVISORS, WORKERS = 3, 2

    # Nothing that a process inherits tells of it here, since jobs close, leave and ignore all
    # there is. Each one makes a mark of its own, and then looks for one of another attempt
    # whose process lives: of any two that meet, one sees the other. A number and a start time
    # name one process only. Who is dying (a zombie, or without memory) runs nothing any more.
    MARK = """read -r line </proc/$$/stat
set -- ${line##*) }
: >marks/$QUEUECTL_JOB_ID/$QUEUECTL_ATTEMPT.$$.${20}
. ./look
"""
    LOOK = """for mark in marks/$QUEUECTL_JOB_ID/*; do
    IFS=.; set -- ${mark##*/}; unset IFS
    [ $1 != $QUEUECTL_ATTEMPT ] || continue
    other="$1 $2"; born=$3
    if { read -r line </proc/$2/stat; } 2>/dev/null; then
        set -- ${line##*) }
        case $1 in Z|X) continue;; esac
        [ ${20} != $born ] || [ ${21} = 0 ] ||
            echo overlap $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $$ $other >>ledger
    fi
done
"""
    CLOSE = "for fd in /proc/$$/fd/*; do fd=${fd##*/}; " \
            "[ $fd -le 2 ] || [ $fd = 255 ] || eval \"exec $fd>&-\"; done\n"  # 255: this script
    BEGIN = ". ./mark; echo start $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $$ >>ledger; "
    END = "; . ./look; echo end $QUEUECTL_JOB_ID $QUEUECTL_ATTEMPT $$ >>ledger"
    # What several jobs use. Who has left everything does not become another program: in such
    # a moment a process has no environment.
    SCRIPTS = {"mark": MARK, "look": LOOK, "nap": ". ./mark\nsleep 0.3\n:\n",
               "shut": CLOSE + ". ./mark\nsleep 0.3\n:\n",
               "deaf": CLOSE + "trap '' TERM HUP INT\n. ./mark\nsleep 0.3\n:\n",
               "fork": "[ $1 = 0 ] || { bash fork $(($1 - 1)) & bash fork $(($1 - 1)) & }\n"
                       + CLOSE + ". ./mark\nsleep 0.2\nwait\n"}
    KINDS = ("true", "sleep 0.1", "sleep 0.02", "sh nap & sleep 0.05",
             "setsid sh nap & sleep 0.05", "head -c 200000 /dev/zero; sleep 0.03",
             "(sleep 0.1; echo late) & (sleep 0.05; exec sleep 0.05) & wait",
             "setsid bash shut & wait", "setsid bash deaf & sleep 0.05", "bash shut",
             "trap '' TERM; setsid bash shut & bash deaf & wait", "bash fork 2")
    # The same, by programs that close every descriptor before anything else.
    CLOSING = ("true", "sleep 0.1", "sleep 0.3", "bash shut & sleep 0.05",
               "setsid bash shut & sleep 0.1", "trap '' TERM HUP INT; sleep 0.2",
               "trap '' TERM; setsid bash deaf & sh nap & sleep 0.1", "setsid bash fork 1 & wait")

    def pick(self, random):
        """A process to kill: now a worker, now a supervisor."""
        infos = self.watcher.workers(supervisors=True)
        leaders = [info for info in infos if not info.slot]
        workers = [info for info in infos if info.slot]
        if not workers or leaders and random.random() < 0.25:
            return random.choice(leaders) if leaders else None
        return random.choice(workers)

    def tend(self):
        """There are so many supervisors at all times."""
        for process in [process for process in self.processes if process.poll() is not None]:
            self.processes.remove(process)
        while len(self.processes) < self.SUPERVISORS:
            self.start("worker", "start", "--count", self.WORKERS, "--quiet")

    def kill(self, random, longest):
        """Kill at random instants; {whether of workers: how many}"""
        killed = {True: 0, False: 0}
        while sum(killed.values()) < self.KILLS:
            self.tend()
            victim = self.pick(random)
            if victim is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim.pid, signal.SIGKILL)
                    killed[bool(victim.slot)] += 1
            time.sleep(random.random() * longest)
        self.tend()
        return killed

    def prepare(self, random):
        """Put down the scripts; the commands of all jobs."""
        scripts = dict(self.SCRIPTS)
        commands = [self.BEGIN + kind + self.END for kind in self.KINDS]
        for number, kind in enumerate(self.CLOSING):
            scripts["job%d" % number] = self.CLOSE + self.BEGIN + kind + self.END + "\n"
            commands.append("bash job%d" % number)  # plain words: it starts without a shell
        for name, text in scripts.items():
            with open(self.path(name), "w") as file:
                file.write(text)
        os.mkdir(self.path("marks"))
        for number in range(self.JOBS):
            os.mkdir(self.path("marks", "j%d" % number))
        return [random.choice(commands) for _ in range(self.JOBS)]

    def living(self):
        """Processes of jobs that are alive, by their marks."""
        for id in os.listdir(self.path("marks")):
            for mark in os.listdir(self.path("marks", id)):
                attempt, pid, born = mark.split(".")
                with contextlib.suppress(OSError):
                    if alive(int(pid)) and self.started(int(pid)) == born.encode():
                        yield id, attempt, pid

    def test_chaos(self):
        import random
        for program in ("bash", "setsid"):
            if not shutil.which(program):
                self.skipTest("%s(1) is not there" % program)
        seed = int.from_bytes(os.urandom(4), "big")
        random = random.Random(seed)
        self.watcher = self.queue()
        list(self.watcher.enqueue_many(
            {"id": "j%d" % number, "command": command, "cwd": self.dir, "max_retries": 1000}
            for number, command in enumerate(self.prepare(random))))
        killed = self.kill(random, 0.12)
        done, deadline = -1, 0.0
        while done < self.JOBS:
            self.tend()
            select.select([], [], [], 0.02)
            before, done = done, self.watcher.counts()["completed"]
            if done > before:
                deadline = time.monotonic() + PATIENCE
            elif time.monotonic() > deadline:
                break
        self.tend()
        counts = self.watcher.counts()
        self.assertEqual(self.cli("worker", "stop")[0], 0)

        starts, ends, overlapping = {}, set(), []
        for line in read_file(self.path("ledger")).decode().splitlines():
            what, id, attempt, *rest = line.split()
            if what == "start":
                starts.setdefault(id, []).append(int(attempt))
            elif what == "end":
                ends.add((id, int(attempt)))
            else:
                overlapping.append(" ".join([id, self.watcher.get(id).command, attempt] + rest))
        late, lost = [], []
        for number in range(self.JOBS):
            id = "j%d" % number
            outcomes = [run.outcome for run in self.watcher.runs(id)]
            attempts = starts.get(id, [])
            # The run that completed is the last one, and was really run to its end.
            if outcomes != ["lost"] * (len(outcomes) - 1) + ["completed"] \
                    or (id, len(outcomes)) not in ends:
                lost.append((id, outcomes))
            if max(attempts, default=0) > len(outcomes) or len(set(attempts)) < len(attempts):
                late.append((id, attempts, outcomes))
        stuck = counts["processing"] + counts["pending"]
        figures = "chaos: %d jobs, %d kills of workers, %d of supervisors, %d starts, %d lost, " \
            "%d overlapping, %d started late, %d stuck (seed %d)" % (
                self.JOBS, killed[True], killed[False], sum(map(len, starts.values())), len(lost),
                len(overlapping), len(late), stuck, seed)
        if self.TOLD:
            print(figures, file=sys.stderr)
        self.assertEqual(([], [], [], 0), (lost, overlapping, late, stuck), figures)
        self.assertEqual(counts["completed"], self.JOBS, figures)
        self.assert_sound(figures)
        # Nothing stays: what ran on in the background ends, and the dead are swept.
        self.until(lambda: not list(self.living()), "processes of jobs are alive")
        self.drain("--quiet")
        self.assertEqual(os.listdir(self.db + "-run"), [], figures)


# -- commands: what people do with a queue every day ---------------------------------------


def own_terminal():
    """Between fork and exec: stdin becomes the terminal that controls this session."""
    default_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A program on a terminal of its own, whose screen is read as it comes."""

    def __init__(self, case, program, columns=80, lines=24, env=None, **streams):
        import pty
        import struct
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
    """Ways to look at what commands show, on a terminal and off it."""

    def various(self):
        """Jobs in every final position, by their names."""
        self.play("""
            $ queuectl enqueue --file - <<END
            > {"id": "good", "command": "true"}
            > {"id": "bad", "command": "false", "max_retries": 1}
            > {"id": "blocker", "command": "false", "max_retries": 1}
            > {"id": "off", "command": "true", "delay": 99}
            > {"id": "stuck", "command": "true", "after": "blocker"}
            > {"id": "behind", "command": "true", "after": ["stuck", "good"]}
            > {"id": "orphan", "command": "true", "after": "off"}
            > END
            ...
            $ work
            good completed
            bad dead
            blocker dead
            $ queuectl cancel off
            """)

    def terminal(self, *words, **options):
        return Terminal(self, (sys.executable, SCRIPT) + words, **options)

    def piped(self, *words, **options):
        """Start a command line whose stdout is a pipe."""
        return self.start(*words, stdout=subprocess.PIPE, **options)

    def read_until(self, process, text):
        """Read a process's stdout until it ends with `text`."""
        data, deadline = b"", time.monotonic() + PATIENCE
        while not data.endswith(text):
            ready, _, _ = select.select([process.stdout], [], [],
                                        max(0, deadline - time.monotonic()))
            part = os.read(process.stdout.fileno(), 65536) if ready else b""
            self.assertTrue(part, "%r did not come, but %r" % (text, data))
            data += part
        return data

    def ended(self, process):
        """(exit code, the rest of its stdout, its stderr) of a process that must end."""
        out = process.communicate(timeout=PATIENCE)[0]
        return process.returncode, out, read_file(process.log).decode()

    def interrupted(self, screen):
        """Ctrl-C ends what is on a terminal: 130, and no traceback. All that was shown."""
        screen.press(b"\x03")
        code, shown = screen.rest()
        self.assertEqual(code, 130)
        self.assertNotIn("Traceback", shown)
        return shown

    def patient(self, *words):
        """Start a worker that nothing but a bell wakes."""
        with constants(self, TICK=1000.0):
            return self.workers(1, *words)

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

    def test_exit_codes(self):
        """0: all completed. 1: any dead, cancelled, or never able to run. 124: --timeout."""
        self.various()
        for ids, left in (("good", ""), ("good good", ""), ("bad bad", "bad is dead"),
                          ("off", "off is cancelled"), ("stuck", "stuck is blocked"),
                          ("behind", "behind is blocked"), ("orphan", "orphan is blocked"),
                          ("good bad", "bad is dead"), ("behind good", "behind is blocked")):
            with self.subTest(ids):
                self.assertEqual(self.main("wait", "--timeout", "20", *ids.split()), (
                    (1, "", "queuectl: 1 job has not completed: %s (see: queuectl.py show %s)\n"
                     % (left, left.split()[0])) if left else (0, "", "")))
        self.play("""
            $ queuectl wait bad stuck
            ! queuectl: 2 jobs have not completed: bad is dead, stuck is blocked (see: ... show bad)
            [1]
            # None named: all that have not ended now.
            $ queuectl wait --timeout 20
            ! queuectl: 3 jobs have not completed (see: ... status)
            [1]
            $ queuectl cancel stuck behind orphan
            $ queuectl wait
            $ queuectl dlq retry bad
            $ queuectl wait bad --timeout 0
            ! queuectl: job bad waits: no worker runs (start one: queuectl.py worker start)
            ! queuectl: 1 job has not ended in time
            [124]
            $ queuectl wait --timeout 0.01
            ! queuectl: job bad waits: no worker runs ...
            ! queuectl: 1 job has not ended in time
            [124]
            """)

    def test_until_they_end(self):
        """It returns when the jobs end that it was asked for, across a retry. With none named,
        later jobs do not prolong it, and earlier failures do not count. On a terminal it shows
        its progress."""
        self.various()
        self.ok("config", "set", "backoff_base", 0)
        self.ok("cancel", "stuck", "behind", "orphan")
        meeting = self.meeting()
        self.ok("enqueue", "--id", "now", "--max-retries", 2,
                meeting.here + "; test $QUEUECTL_ATTEMPT = 2")
        every = self.terminal("wait")
        every.until("0 completed, 0 not, 1 left")
        self.ok("enqueue", "--id", "later", "--queue", "unserved", "true")
        self.workers(1, "--queue", "default")
        meeting.arrived()
        named = self.terminal("wait", "now")
        named.until("0 completed, 0 not, 1 left")
        meeting.let_go()
        meeting.arrived()
        self.assertEqual((every.process.poll(), named.process.poll()), (None, None))
        meeting.let_go()
        for screen in (every, named):
            code, shown = screen.rest()
            self.assertEqual(code, 0)
            self.assertIn("1 completed, 0 not, 0 left", shown)
        self.assertEqual(self.job("later").state, "pending")

    def test_one_is_blocked_meanwhile(self):
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
        self.assertEqual((named.rest()[0], all_of_them.rest()[0]), (1, 1))
        self.assertEqual(self.states(), dict(first="dead", second="blocked", third="blocked"))

    def test_what_is_retried_meanwhile_blocks_nobody_for_ever(self):
        """Though a wait for all, which began when it was dead, does not count it."""
        queue = self.queue()
        queue.enqueue("false", id="dead", max_retries=1)
        self.run_next(queue, "failed")
        for id, after in (("blocked", ["dead"]), ("other", [])):
            queue.enqueue("true", id=id, after=after)
        last = queue.wait_for_all()
        for act, expected in ((lambda: None, (2, 0, 0)), (lambda: self.run_next(queue), (1, 1, 0)),
                              (lambda: queue.retry(["dead"]), (1, 0, 0)),
                              (lambda: self.run_next(queue), (1, 0, 0)),
                              (lambda: self.run_next(queue), (0, 0, 0))):
            act()
            self.assertEqual(queue.progress(last, None), expected)

    def test_a_database_that_is_gone(self):
        queue = self.queue()
        os.unlink(self.db)
        self.refuses("deleted or replaced", queuectl._await_change, queue)

    def test_named_jobs_cost_nothing_for_all_the_others(self):
        with Queue(self.db) as queue:
            queue.enqueue("true", id="a")
            queue.cancel(["a"])
            with mock.patch.object(queue, "wait_for_all", side_effect=AssertionError), \
                    self.assertRaisesRegex(QueueError, "a is cancelled"):
                queuectl.wait_for(queue, ["a"], 0, lambda *numbers: None)

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
                queuectl.wait_for(queue, [], None, lambda *words: setattr(
                    clock, "now", clock.now + 100))
        self.assertEqual(rests, [0.0])

    def test_inside_a_job(self):
        """A job that waits does not wait for itself, named or not."""
        queue = "%s %s" % (shlex.quote(sys.executable), shlex.quote(SCRIPT))
        self.ok("enqueue", "--id", "other", "true")
        for id, words in (("named", "other named"), ("only", "only"), ("all", "")):
            self.ok("enqueue", "--id", id, "--max-retries", 1,
                    "%s wait --timeout 1 %s" % (queue, words))
        self.drain()
        self.assertEqual(set(self.states().values()), {"completed"})

    def test_progress_is_for_who_looks(self):
        """Without a terminal nothing is printed but how it ended; where only stdout is none, the
        progress is still on stderr. Ctrl-C ends it."""
        self.various()
        self.play("""
            $ queuectl wait bad good 2>&1 | cat
            queuectl: 1 job has not completed: bad is dead (see: ... show bad)
            """)
        with open(self.path("out"), "wb") as file:
            code, shown = self.terminal("wait", "bad", "good", stdout=file).rest()
        self.assertEqual((code, read_file(self.path("out"))), (1, b""))
        self.assertIn("1 completed, 1 not, 0 left", shown)
        self.ok("enqueue", "--id", "a", "true")
        waiting = self.terminal("wait", "a")
        waiting.until("1 left")
        self.interrupted(waiting)

    def test_the_wall_clock_does_not_tell_who_died_meanwhile(self):
        """It may be set back while one waits, and may have stood ahead when others died."""
        real = time.time
        for outcome in ("completed", "failed", "cancelled"):
            with self.subTest(outcome), Queue(self.db) as queue, mock.patch("time.time") as clock:
                for seconds in (-86400, 0, 86400):
                    clock.side_effect = lambda: real() + seconds
                    queue.enqueue("false", max_retries=1)
                    self.run_next(queue, "failed")
                    queue.cancel([queue.enqueue("true")])
                clock.side_effect = real
                id = queue.enqueue("true", max_retries=1)
                waiting = self.terminal("wait")
                waiting.until("0 completed, 0 not, 1 left")
                clock.side_effect = lambda: real() - 7200
                if outcome == "cancelled":
                    queue.cancel([id])
                else:
                    self.run_next(queue, outcome)
                code, shown = waiting.rest()
                good = outcome == "completed"
                self.assertEqual(code, 0 if good else 1, shown)
                self.assertIn("%d completed, %d not, 0 left" % (good, not good), shown)
                self.assertEqual("1 job has not completed" in shown, not good)


class Why(Everyday):
    """Why a job waits: one function, and everybody who looks on is told."""

    def test_show(self):
        """Paused, at its limit, not served, blocked, for later, behind others, or next."""
        self.clock()
        self.play("""
            $ queuectl enqueue --file - <<END
            > {"id": "run", "command": "true", "queue": "deploy", "priority": 9}
            > {"id": "limited", "command": "true", "queue": "deploy"}
            > {"id": "later", "command": "true", "delay": 60}
            > {"id": "blocked", "command": "true", "after": "later", "delay": 90}
            > {"id": "ready", "command": "true", "priority": 1}
            > {"id": "second", "command": "true"}
            > {"id": "third", "command": "true"}
            > END
            ...
            $ queuectl limit deploy 1
            $ work 0
            """)
        with Queue(self.db) as queue:
            self.assertEqual(self.claim(queue).id, "run")
        alone = "no worker runs (start one: queuectl.py worker start)"
        for id, waits in (
                ("run", None),
                ("limited", alone + "; the limit of the queue deploy is reached (1: run)"),
                ("later", "it is due at 2027-01-15 08:01:00 +0000 (in 1m00s); " + alone),
                ("blocked", "it waits for later, which is pending; it is due at "
                            "2027-01-15 08:01:30 +0000 (in 1m30s); " + alone),
                ("ready", alone), ("second", alone + "; 1 job stands before it"),
                ("third", alone + "; 2 jobs stand before it")):
            found = re.findall(r"(?m)^waits +(.*)$", self.ok("show", id))
            self.assertEqual(found, [waits] if waits else [], id)
        self.assertIn("runs at   2027-01-15 08:01:30 +0000 (in 1m30s)", self.ok("show", "blocked"))
        self.play("""
            $ queuectl pause deploy
            $ queuectl show limited
            ...
            waits     the queue deploy is paused (to go on: queuectl.py resume deploy); no ...
            ...
            $ queuectl pause
            $ queuectl show third
            ...
            waits     all queues are paused (to go on: queuectl.py resume); no worker runs ...
            ...
            $ queuectl cancel later
            $ queuectl show blocked
            ...
            waits     it waits for later, which is cancelled (to run that again: ...); ...
            ...
            """)

    def test_workers(self):
        """Those that do not serve its queue, and those that are busy."""
        meeting, _, _ = self.busy()
        self.add("next", "true")
        self.add("mail", "true", queue="mail")
        for words in (("--queue", "other"), ("--queue", "another")):
            self.assertIn("waits     it is the next one, once a worker is free\n",
                          self.ok("show", "next"))
            self.workers(1, *words)
        meeting.let_go()
        self.until_state("mail", "completed")
        self.ok("worker", "stop", *[info.name for info in self.queue().workers()
                                    if info.queues is None])
        self.add("post", "true", queue="mail")
        self.play("""
            $ queuectl show post
            ...
            waits     no worker serves the queue mail (start one: ... worker start --queue mail)
            ...
            $ queuectl wait post --timeout 0
            ! queuectl: job post waits: no worker serves the queue mail (start one: ...
            ! queuectl: 1 job has not ended in time
            [124]
            $ queuectl enqueue --queue mail true
            ...
            ! queuectl: no worker serves the queue mail ...
            $ queuectl enqueue --id other --queue other true
            other
            """)
        self.until_state("other", "completed")
        self.play("""
            $ queuectl status
            ...
            workers   2 workers, 0 busy
            ...
            ! queuectl: 2 jobs wait: no worker serves the queue mail (start one: ... --queue mail)
            $ queuectl enqueue --queue paper true
            ...
            $ queuectl status
            ...
            ! queuectl: 3 jobs wait: no worker serves the queues mail, paper (... worker start)
            $ queuectl cancel --all
            ! queuectl: 3 jobs cancelled
            # When one runs all is well.
            $ queuectl enqueue --delay 1h true
            ...
            $ queuectl status
            ...
            workers   2 workers, 0 busy
            ...
            """)
        self.assertEqual(json.loads(self.ok("status", "--json"))["workers"],
                         json.loads(self.ok("worker", "list", "--json")))

    def test_who_looks_on(self):
        """wait, named or not, enqueue, and the end of a drain, which goes on to succeed (logs -f:
        see Logs). What they say can be pasted: it begins with the program as it was called."""
        self.play("""
            $ queuectl enqueue --id a true
            a
            ! queuectl: no worker runs (start one: queuectl.py worker start)
            $ queuectl pause
            $ queuectl enqueue --id b --queue q --max-retries 1 false
            b
            ! queuectl: all queues are paused (to go on: queuectl.py resume)
            ! queuectl: no worker runs ...
            $ queuectl wait a --timeout 0
            ! queuectl: job a waits: all queues are paused (to go on: queuectl.py resume); no ...
            ! queuectl: 1 job has not ended in time
            [124]
            $ queuectl worker start --drain
            ! ...
            ! queuectl: 1 job left in the queue default; job a waits: all queues are paused ...
            ! queuectl: 1 job left in the queue q; job b waits: all queues are paused ...
            $ queuectl resume
            $ queuectl pause q
            $ queuectl wait --timeout 0
            ! queuectl: job a waits: no worker runs ...
            ! queuectl: the queue q is paused (to go on: queuectl.py resume q)
            ! queuectl: 2 jobs have not ended in time
            [124]
            $ queuectl worker start --db q.db --drain --queue default --queue q
            ! ...
            ! ...started...
            ! ...completed...
            ! queuectl: 1 job left in the queue q; job b waits: the queue q is paused (to go on: ...
            $ queuectl resume q
            $ queuectl worker start --drain --quiet
            ! ...job b dead after ...: exit code 1
            # It can never run as things are.
            $ queuectl enqueue --id c --after b true
            c
            ! queuectl: job c waits: it waits for b, which is dead (to run that again: ...
            """)
        os.mkdir(self.path("my folder"))
        self.assertIn('(start one: queuectl.py --db "my folder/q.db" worker start)',
                      self.main("--db", "my folder/q.db", "enqueue", "true")[2])
        called = "%s %s" % (os.path.basename(sys.executable), SCRIPT)
        self.assertIn("(start one: %s worker start)" % called, self.cli("enqueue", "true")[2])


class Logs(Everyday):
    """logs ID [-f] [--run N]"""

    NOTE = re.compile(rb"\n\[queuectl: (\d+) bytes are not kept \(output_limit\)\]\n")

    # What a follower says on stderr that began before any worker.
    ALONE = r"(queuectl: job a waits: no worker runs[^\n]*\n)?"

    def setUp(self):
        super().setUp()
        self.ok("config", "set", "backoff_base", 0)

    def test_finished(self):
        """The last run's output; with --run N that of the job's Nth run, from 1."""
        self.play("""
            $ queuectl enqueue --id other true
            other
            $ work
            other completed
            $ queuectl enqueue --id a --max-retries 2 'echo >>n; wc -l <n; [ $(wc -l <n) -gt 2 ]'
            a
            $ queuectl logs a
            ! queuectl: ...not run yet...
            [1]
            $ work
            a pending
            a dead
            $ queuectl dlq retry a
            $ work
            a completed
            $ queuectl logs a
            3
            $ queuectl logs -f a
            3
            $ queuectl logs other
            ! queuectl: job other has printed nothing
            $ queuectl logs a --run 1
            1
            $ queuectl logs --run 2 -f a
            2
            $ queuectl logs --run 3 a
            3
            $ queuectl logs a --run 4
            ! queuectl: ...3 runs...
            [1]
            $ queuectl logs a --run 0
            ! queuectl: ...--run...
            [2]
            """)

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
        code, out, err = self.ended(follower)
        self.assertEqual((code, out), (0, b""))
        self.assertRegex(err, self.ALONE + "queuectl: run 2 of job a\nqueuectl: run 3 of job a\n")
        code, shown = screen.rest()
        self.assertEqual((code, re.sub(self.ALONE, "", shown)), (
            0, "1\nqueuectl: run 2 of job a\n2\nqueuectl: run 3 of job a\n3\n"))

    def test_follow_what_never_runs(self):
        """-f of a waiting job ends when that is cancelled."""
        self.ok("enqueue", "--id", "a", "true")
        follower = self.terminal("logs", "-f", "a")
        follower.until("waits: no worker runs")
        self.ok("cancel", "a")
        code, shown = follower.rest()
        self.assertEqual(code, 0)
        self.assertRegex(shown, self.ALONE + "queuectl: job a has printed nothing\n")

    def test_a_follower_that_ends_leaves_the_job_alone(self):
        """By Ctrl-C (130), or at the end of its reader (`logs -f | head -n1`), without a word."""
        meeting, _, _ = self.busy("echo here; %s; echo two")
        screen, follower = self.terminal("logs", "-f", "a"), self.piped("logs", "-f", "a")
        screen.until("here")
        self.interrupted(screen)
        self.read_until(follower, b"here\n")
        follower.stdout.close()
        for words in ([], ["--run", 1]):  # what it has printed so far
            self.assertEqual(self.ok("logs", "a", *words), "here\n")
        meeting.let_go()
        self.assertEqual((follower.wait(PATIENCE), read_file(follower.log)), (0, b""))
        self.assertEqual(self.until_state("a", "completed", "dead").state, "completed")
        self.assertEqual(self.ok("logs", "a"), "here\ntwo\n")

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
        self.finish(meeting)
        for follower, seen, total in ((late, seen, 5000015), (early, b"", 5000009)):
            code, out, err = self.ended(follower)
            self.assertEqual(code, 0)
            self.assertRegex(err, r"\A%s\Z" % self.ALONE)
            data = seen + out
            self.assertTrue(data.endswith(b"xx\nTHE END\n"), data[-100:])
            self.assertEqual(sum(self.heard(data)), total)
            if follower is late:
                self.assertRegex(data, self.NOTE)


class Cancel(Everyday):
    """cancel ID ..., and dlq retry, which takes back what was cancelled"""

    def test_by_who_may_not_ask_which_workers_live(self):
        """It is done all the same."""
        self.ok("enqueue", "--id", "a", "true")
        self.queue().turn(None, "w", "w.run0")
        with mock.patch.object(queuectl, "is_held", side_effect=QueueError("only the user")):
            self.ok("cancel", "a")
        self.assertEqual(self.sql("SELECT cancel FROM jobs"), [(1,)])

    def test_waiting(self):
        """A pending job, for later, blocked or waiting for its retry, will not run. With unknown
        or ended jobs nothing is touched. dlq retry takes a cancelled one, --all dead ones only."""
        self.play("""
            $ queuectl enqueue --file - <<END
            > {"id": "done", "command": "true"}
            > {"id": "dead", "command": "false", "max_retries": 1}
            > {"id": "failed", "command": "false"}
            > {"id": "off", "command": "true", "delay": "1h"}
            > {"id": "behind", "command": "true", "after": ["off"]}
            > {"id": "ready", "command": "true", "priority": -1}
            > END
            ...
            $ work 3
            done completed
            dead dead
            failed failed
            $ queuectl cancel ready nobody
            ! queuectl: there is no job nobody...
            [1]
            $ queuectl cancel ready done
            ! queuectl: job done ...ended already...
            [1]
            $ states
            completed: done; dead: dead; failed: failed; scheduled: off; ...; pending: ready
            $ queuectl cancel ready off behind failed
            $ states
            completed: done; dead: dead; cancelled: failed off behind ready
            $ queuectl dlq retry --all
            ! queuectl: 1 dead job pending again
            $ queuectl dlq retry failed done
            ! queuectl: job done is completed...
            [1]
            $ queuectl dlq retry failed ready
            $ work
            dead dead
            failed failed
            ready completed
            """)

    def test_running(self):
        """A running job is ended, and its record says so."""
        meeting, _, _ = self.busy("echo begun; %s", queue="q")
        self.add("b", "true", queue="other", delay=3600)
        self.play("""
            $ queuectl cancel --queue q
            ! queuectl: 1 job cancelled
            """)
        meeting.gone()
        job = self.until_state("a", "cancelled")
        self.assertIn("cancelled", job.last_error)
        self.assertEqual((job.locked_by, job.exit_code), (None, None))
        run, = self.runs("a")
        self.assertEqual((run.outcome, run.signal), ("cancelled", signal.SIGTERM))
        self.assertEqual(self.output("a"), b"begun\n")
        self.assertEqual(self.job("b").view, "scheduled")

    def test_by_a_dead_worker(self):
        """A job whose worker and supervisor are dead is ended by whoever cancels it."""
        meeting, supervisor, _ = self.busy()
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
        self.drain()
        self.assertEqual([run.outcome for run in self.runs("a")], ["lost"])

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
            with contextlib.suppress(BlockingIOError):  # the word that nobody took
                os.read(meeting.go, 100)
            self.assertEqual([run.outcome for run in self.runs(id)], [job.state])
            self.assertIn(job.state, ("completed", "cancelled"))
            if job.state == "completed":  # (a cancelled one may have been at its exit 0)
                self.assertEqual(job.exit_code, 0)


class Selection(Everyday):
    """edit ID, and the jobs that cancel, dlq and prune take: by ids, of a queue, or all."""

    def test_edit(self):
        """A job that does not run and has not completed is changed, and nothing else of it."""
        self.play("""
            $ later 0
            $ queuectl enqueue --id a --env A=1 --cwd / --unique k 'false'
            a
            $ queuectl edit a --command 'echo $A$B' --env B=2 --env A=3 --priority 4 --queue q
            $ queuectl edit a --timeout 2m --max-retries 1 --cwd /usr
            $ pick command,env,priority,queue,timeout,max_retries,cwd,unique queuectl show a --json
            echo $A$B {"A": "3", "B": "2"} 4 q 120.0 1 /usr k
            $ queuectl edit a --run-at +10m
            $ pick view,timeout queuectl show a --json
            scheduled 120.0
            $ queuectl edit a --delay 0 --command 'false'
            $ work
            a dead
            $ queuectl edit a --command true --max-retries 5
            $ states
            dead: a
            $ queuectl dlq retry a
            $ work
            a completed
            $ queuectl edit a --priority 1
            ! queuectl: job a is completed; only a job that waits, or that has ended badly, ...
            [1]
            $ queuectl enqueue --id b --after a --after a true
            b
            $ queuectl edit nobody --priority 1
            ! queuectl: there is no job nobody
            [1]
            $ queuectl edit b
            ! queuectl: say what to change, such as --priority 5 (see: queuectl.py edit --help)
            [2]
            $ queuectl edit b --delay 1 --run-at +1
            ! queuectl: delay and run_at exclude each other
            [1]
            """)
        with self.queue() as queue:
            for field in ("after", "unique"):
                self.refuses("cannot be changed", queue.edit, "b", **{field: "x"})
            self.refuses("unknown field", queue.edit, "b", colour=1)

    def test_edit_wakes_who_can_run_it_now(self):
        self.ok("enqueue", "--id", "a", "--delay", "1h", "--queue", "x", "true")
        self.patient("--queue", "y")
        self.ok("edit", "a", "--queue", "y", "--delay", "0")
        self.until_state("a", "completed")

    def various(self):
        self.play("""
            $ queuectl enqueue --file - <<END
            > {"id": "a1", "command": "false", "queue": "a", "max_retries": 1}
            > {"id": "a2", "command": "false", "queue": "a", "max_retries": 1}
            > {"id": "b1", "command": "false", "queue": "b", "max_retries": 1}
            > {"id": "c1", "command": "true", "queue": "c"}
            > {"id": "b2", "command": "true", "queue": "b", "after": "b1"}
            > {"id": "a3", "command": "true", "queue": "a", "delay": "1h"}
            > END
            ...
            $ work
            a1 dead
            a2 dead
            b1 dead
            c1 completed
            """)

    def test_queues(self):
        self.various()
        self.play("""
            $ pick id queuectl dlq list --queue a --json
            a1
            a2
            $ queuectl dlq retry --queue a
            ! queuectl: 2 dead jobs pending again
            $ states
            pending: a1 a2; dead: b1; completed: c1; blocked: b2; scheduled: a3
            $ queuectl cancel --queue a
            ! queuectl: 3 jobs cancelled
            $ states
            cancelled: a1 a2 a3; dead: b1; completed: c1; blocked: b2
            $ queuectl prune --queue a
            ! queuectl: 3 jobs deleted
            $ queuectl cancel --all
            ! queuectl: 1 job cancelled
            $ queuectl cancel --queue nobody
            ! queuectl: 0 jobs cancelled
            $ states
            dead: b1; completed: c1; cancelled: b2
            $ queuectl dlq purge --queue a
            ! queuectl: 0 dead jobs deleted
            $ queuectl dlq purge --all
            ! queuectl: 0 dead jobs deleted
            $ queuectl prune --queue b
            ! queuectl: 2 jobs deleted
            $ queuectl prune --all
            ! queuectl: 1 job deleted
            $ queuectl list --json
            []
            """)

    def test_purge_one(self):
        self.various()
        self.play("""
            $ queuectl dlq purge a1 c1
            ! queuectl: job c1 is completed, not dead
            [1]
            $ queuectl dlq purge a1 b1
            ! queuectl: a job waits for b1; cancel that, and prune it first
            [1]
            $ queuectl dlq purge nobody
            ! queuectl: there is no job nobody
            [1]
            $ queuectl dlq purge a2
            $ states
            dead: a1 b1; completed: c1; blocked: b2; scheduled: a3
            """)


class Unique(Everyday):
    """enqueue --unique KEY. (When a key is free again, ModelTest knows.)"""

    def test_one_job_a_key(self):
        """While a job with the key has not ended, another prints its id and a note, and stores
        nothing; in a file repeated keys store one job, and each line gets its id."""
        self.play("""
            $ queuectl enqueue --id a --unique k --max-retries 2 false
            a
            $ queuectl enqueue --unique k 'something else'
            a
            ! queuectl: a has the key k and has not ended; nothing stored
            $ pick command,unique queuectl list --json
            false k
            $ queuectl enqueue --file - <<END
            > {"command": "1", "unique": "k"}
            > {"id": "b", "command": "2", "unique": "k2"}
            > {"command": "3", "unique": "k2"}
            > {"id": "c", "command": "4"}
            > {"id": "b", "command": "5", "unique": "k2"}
            > END
            a
            b
            b
            c
            b
            ! queuectl: a has the key k ...
            ! queuectl: b has the key k2 ...
            ! queuectl: b has the key k2 ...
            $ states
            pending: a b c
            """)

    def test_retry_conflict(self):
        """A dead job cannot come back while another one has its key."""
        self.add("a", "false", max_retries=1, unique="k")
        self.add("b", "false", max_retries=1)
        self.run_all(self.queue(), "failed")
        self.add("c", "true", unique="k")
        self.play("""
            $ queuectl dlq retry b a
            ! queuectl: ...k...
            [1]
            $ states
            dead: a b; pending: c
            $ queuectl dlq retry --all
            ! queuectl: job a cannot be retried while c has its key k
            ! queuectl: 1 dead job pending again
            """)


class After(Everyday):
    """enqueue --after ID: a job runs once those that it names have completed. (Whatever else may
    happen to them, ModelTest knows.)"""

    def test_a_job_and_what_it_waits_for(self):
        """In a file a job may name one that stands further down. A dead job blocks those behind
        it; list and show name it, and dlq retry heals the chain."""
        self.play("""
            $ queuectl enqueue --file - <<END
            > {"id": "end", "command": "true", "after": ["left", "right", "left"]}
            > {"id": "left", "command": "true", "after": ["root"]}
            > {"id": "right", "command": "true", "after": "root"}
            > {"id": "later", "command": "true", "after": "root", "delay": "1h"}
            > {"id": "root", "command": "test -e fixed", "max_retries": 1}
            > END
            ...
            $ pick after queuectl show end --json
            ["left", "right"]
            $ queuectl show left
            ...
            state     blocked
            waits     it waits for root, which is pending; no worker runs ...
            ...
            $ work
            root dead
            $ queuectl show left
            ...
            state     blocked
            waits     it waits for root, which is dead (to run that again: ... dlq retry root); ...
            ...
            $ queuectl list --state blocked
            ID     STATE    ...
            end    blocked  ... by left (pending) ...
            left   blocked  ... by root (dead) ...
            right  blocked  ... by root (dead) ...
            later  blocked  ... by root (dead) ...
            $ touch fixed
            $ queuectl dlq retry root
            $ work
            root completed
            left completed
            right completed
            end completed
            # What has completed already is not waited for.
            $ queuectl enqueue --id new --after root --after end true
            new
            $ states
            completed: end left right root; scheduled: later; pending: new
            """)

    def test_refused(self):
        """Unknown ids, a job behind itself, and circles: nothing is stored. In a file the
        error names the line, or the job."""
        self.ok("enqueue", "--id", "old", "true")
        self.refused("enqueue", "--id", "me", "--after", "me", "true", code=1, says="me")
        for jobs, says in (
                ([{"id": "x"}, {"id": "y", "after": "nobody"}],
                 "line 2: after: there is no job nobody"),
                ([{"id": "x", "after": ["x"]}], "x"),
                ([{"id": "x", "after": ["y"]}, {"id": "y", "after": ["x"]}], "x y"),
                ([{"id": "x", "after": ["old", "z"]}, {"id": "y", "after": ["x"]},
                  {"id": "z", "after": ["y"]}, {"id": "free"}], "x y z")):
            jobs = [dict(job, command="true") for job in jobs]
            self.refused("enqueue", "--file", "-", code=1, says=says,
                         stdin="\n".join(map(json.dumps, jobs)).encode())
        self.assertEqual(list(self.states()), ["old"])

    def test_thousands(self):
        """In a row they run in their order, and a wait for the last one sees at once that the
        first is dead; one releases thousands, which release one. A ladder is no circle."""
        row, fan = (["%s%d" % (name, number) for number in range(2000)] for name in ("row", "fan"))
        ladder = ["rung%d" % number for number in range(50)]
        with Queue(self.db, durable=False) as queue:
            def add(ids, after):
                list(queue.enqueue_many({"id": id, "command": "true", "max_retries": 1,
                                         "after": after(number)} for number, id in enumerate(ids)))
            add(row, lambda number: row[:number][-1:])
            self.run_next(queue, "failed")
            for words in (["wait", row[-1]], ["wait"]):
                self.assertEqual(self.main(*words)[:2], (1, ""))
            queue.retry(row[:1])
            self.assertEqual(self.run_all(queue), row)
            add(["root"] + fan + ["end"],
                lambda number: fan if number > len(fan) else ["root"][:number])
            self.assertEqual(self.run_all(queue), ["root"] + fan + ["end"])
            add(ladder, lambda number: ladder[number + 1:number + 3])
            self.assertEqual(self.run_all(queue), ladder[::-1])


class Queues(Everyday):
    """--queue, pause and resume"""

    def test_served(self):
        """Workers of some queues run jobs of these only, the more important ones first. No drain
        waits for paused, later and blocked jobs."""
        self.play("""
            $ queuectl enqueue --file - <<END
            > {"id": "a1", "command": "echo a1 $QUEUECTL_QUEUE >>ran", "queue": "a"}
            > {"id": "b1", "command": "echo b1 $QUEUECTL_QUEUE >>ran", "queue": "b", "priority": 5}
            > {"id": "c1", "command": "echo c1 $QUEUECTL_QUEUE >>ran", "queue": "c", "priority": 9}
            > {"id": "a2", "command": "echo a2 $QUEUECTL_QUEUE >>ran", "queue": "a", "priority": 7}
            > {"id": "d1", "command": "echo d1 $QUEUECTL_QUEUE >>ran", "priority": -1}
            > {"id": "a3", "command": "echo a3 $QUEUECTL_QUEUE >>ran", "queue": "a"}
            > {"id": "e1", "command": "echo e1 $QUEUECTL_QUEUE >>ran", "queue": "e", "priority": 9}
            > {"id": "later", "command": "true", "delay": "1h"}
            > {"id": "behind", "command": "true", "after": "later"}
            > END
            ...
            $ queuectl pause e
            $ queuectl worker start --drain --quiet --queue a --queue b --queue a
            $ cat ran
            a2 a
            b1 b
            a1 a
            a3 a
            $ rm ran
            $ queuectl worker start --drain --quiet --queue c --queue default --queue e
            $ cat ran
            c1 c
            d1 default
            # Nothing runs, and to resume one queue is not enough then.
            $ queuectl pause
            $ queuectl pause e
            $ queuectl worker start --drain --quiet
            $ queuectl resume e
            ! queuectl: all queues are still paused; to go on: queuectl.py resume
            $ queuectl worker start --drain --quiet
            $ pick paused queuectl status --json
            ["*"]
            $ queuectl pause e
            $ queuectl resume
            $ pick paused queuectl status --json
            []
            $ queuectl worker start --drain --quiet
            $ states
            completed: a1 b1 c1 a2 d1 a3 e1; scheduled: later; blocked: behind
            """)

    def test_pause_one(self):
        """Jobs of a paused queue stand still, others go on, and resume wakes idle workers.
        What runs already goes on to its end."""
        meeting, _, _ = self.busy(queue="slow")
        for _ in range(2):
            self.assertEqual(self.main("pause", "slow"), (0, "", ""))
        self.add("paused", "true", queue="slow", priority=9)
        self.add("other", "true")
        meeting.let_go()
        self.until_state("other", "completed")
        self.assertEqual(self.states(), dict(a="completed", paused="pending", other="completed"))
        self.assertEqual(self.runs("paused"), [])
        self.assertEqual(self.main("resume", "slow"), (0, "", ""))
        self.until_state("paused", "completed")
        self.ok("pause")
        self.add("last", "true")
        self.ok("resume")
        self.until_state("last", "completed")


class Limits(Everyday):
    """limit QUEUE [N | none]"""

    def test_number(self):
        """(Which jobs it holds, ModelTest knows.)"""
        self.play("""
            $ queuectl limit deploy
            none
            $ queuectl limit deploy 2
            $ queuectl limit deploy 1
            $ queuectl limit deploy
            1
            $ pick limits queuectl status --json
            {"deploy": 1}
            $ queuectl enqueue --lines - --queue deploy <<END
            > true
            > true
            > END
            ...
            """)
        self.claim(self.queue())
        self.play("""
            $ queuectl metrics | grep -e 'deploy.*pending' -e 'deploy.*held'
            queuectl_jobs{queue="deploy",state="pending"} 0
            queuectl_jobs{queue="deploy",state="held"} 1
            $ work
            $ queuectl limit deploy none
            $ queuectl limit deploy
            none
            $ work
            ... completed
            """)
        for number in (-1, 1.5, "many", True):
            self.refuses("", self.queue().limit, "deploy", number)

    def test_who_frees_a_place_wakes_somebody_for_it(self):
        """Also a drain, which waits for what only a limit holds, of another supervisor."""
        self.ok("limit", "deploy", 1)
        meeting, first, _ = self.busy(queue="deploy")
        self.add("b", "true", queue="deploy")
        drain = self.patient("--drain", "--queue", "deploy")
        self.until(lambda: self.queue().running_in("deploy") == ["a"])
        first.send_signal(signal.SIGTERM)  # it claims no more
        self.until(lambda: any(info.stop for info in self.queue().workers()))
        meeting.let_go()
        self.assertEqual(self.until_state("b", "completed", "dead").state, "completed")
        self.assertEqual((first.wait(PATIENCE), drain.wait(PATIENCE)), (0, 0))
        # A higher limit is a place, too.
        idle = self.patient()
        meeting, other = self.meeting("second"), self.meeting("third")
        self.add("c", meeting.here, queue="deploy")
        meeting.arrived()
        self.patient()
        self.add("d", other.here, queue="deploy")
        self.until(lambda: self.ok("show", "d").count("the limit of the queue deploy is reached"))
        self.assertTrue(other.nobody())
        self.ok("limit", "deploy", 2)
        other.arrived()
        for each in (meeting, other):
            each.let_go()
        self.assertIsNone(idle.poll())


class OnDead(Everyday):
    """The setting on_dead: a command that a death enqueues, in the same transaction."""

    def test_a_death_is_told_once(self):
        """In the dead job's queue, as a job like any other; its own death enqueues nothing."""
        told = 'echo "$QUEUECTL_DEAD_JOB|$QUEUECTL_DEAD_ERROR|$QUEUECTL_DEAD_COMMAND" >>told; ' \
               'echo $QUEUECTL_QUEUE $QUEUECTL_MAX_RETRIES; exit 1'
        self.ok("config", "set", "on-dead", "cd %s; %s" % (shlex.quote(self.dir), told))
        self.play(r"""
            $ queuectl config set backoff-base 0
            $ queuectl config set max-retries 1
            $ queuectl enqueue --id a --queue q --max-retries 2 'printf "no \001 room"; exit 3'
            a
            $ queuectl enqueue --id b true
            b
            $ queuectl enqueue --id c --after b 'exit 4'
            c
            $ queuectl worker start --drain --quiet
            ! ...job a dead after ...: exit code 3: no ... room
            ! ...job c dead after ...: exit code 4
            ! ...job ... dead after ...: exit code 1: q 1
            ! ...job ... dead after ...: exit code 1: default 1
            $ cat told
            a|exit code 3: no ... room|printf "no ... room"; exit 3
            c|exit code 4|exit 4
            $ queuectl dlq retry c
            $ queuectl worker start --drain --quiet
            ...
            $ cat told
            a|...
            c|exit code 4|exit 4
            c|exit code 4|exit 4
            """)
        self.assertEqual(len(self.states()), 6)

    def test_none(self):
        """Without it nothing is enqueued. (Nor by a cancel or a success: ModelTest.)"""
        self.play("""
            $ queuectl config get on_dead
            none
            $ queuectl config set on_dead 'true'
            $ queuectl config set on-dead none
            $ queuectl config get on_dead
            none
            $ queuectl enqueue --id c --max-retries 1 false
            c
            $ work
            c dead
            $ states
            dead: c
            """)
        self.refused("config", "set", "on_dead", "", code=1, says="empty")
        self.refused("config", "set", "on_dead", "a\0", code=1, says="NUL")

    def test_a_worker_that_dies(self):
        """A job whose last attempt its rescuer counts has died as well."""
        self.ok("config", "set", "on_dead", "true")
        with Queue(self.db) as queue:
            queue.enqueue("true", id="a", max_retries=1, queue="q")
            queue.turn(None, "w-dead", "w-dead.run0")
        self.drain("--quiet")
        told = [job for job in self.queue().jobs() if job.env]
        self.assertEqual([(job.queue, job.state, job.env["QUEUECTL_DEAD_JOB"], job.env[
            "QUEUECTL_DEAD_ERROR"]) for job in told],
            [("q", "completed", "a", "its worker died while it ran")])

    def test_quiet_logs_what_went_wrong(self):
        """A death, a worker's death and a rescue; no line for what went well."""
        self.add("good", "true")
        self.add("bad", "false", max_retries=1)
        meeting, process, _ = self.busy("%s", "--quiet")
        with Queue(self.db) as queue:
            os.kill(queue.workers()[0].pid, signal.SIGKILL)
        meeting.arrived()
        self.finish(meeting)
        lines = [line.partition(": ")[2] for line in read_file(process.log).decode().splitlines()]
        self.assertEqual(len(lines), 3, lines)
        for line, pattern in zip(lines, ("job bad dead after .*: exit code 1$",
                                         "worker 1 died .*SIGKILL",
                                         "job a: its worker .* died; the job is pending$")):
            self.assertRegex(line, pattern)

    def test_long_texts_fit(self):
        """Whatever the command and its error were, what is enqueued can be started."""
        self.ok("config", "set", "on_dead", 'printf %s "$QUEUECTL_DEAD_COMMAND" | wc -c')
        with Queue(self.db) as queue:
            for text in ("x" * 131071, "\U0001f600" * 32767):
                queue.enqueue(text, max_retries=1)
        self.drain("--quiet")
        self.assertEqual([(job.state, job.exit_code) for job in self.queue().jobs() if job.env],
                         [("completed", 0)] * 2)


class LimitedChaos(Chaos):
    """20 workers, a limit of 3 and deaths, while workers and supervisors are killed at random.

    A job takes one of three places, each the lock of a file: who finds none has met a fourth."""

    KILLS = int(os.environ.get("QUEUECTL_CHAOS_KILLS") or 30)
    SUPERVISORS, WORKERS = 4, 5
    JOB = "exec 3>place.1 4>place.2 5>place.3; for n in 3 4 5 none; do " \
          "flock -n $n 2>/dev/null && break; done; echo $n >>ledger; sleep 0.0%d; exit %d"

    @unittest.skipUnless(shutil.which("flock"), "flock(1) is not there")
    def test_chaos(self):
        import random
        seed = int.from_bytes(os.urandom(4), "big")
        random = random.Random(seed)
        self.configure(on_dead="true", backoff_base="0", max_retries="1000")
        watcher = self.watcher = self.queue()
        watcher.limit("narrow", 3)
        for _ in range(4 * self.KILLS):
            watcher.enqueue(self.JOB % (random.randrange(1, 9), random.random() < 0.3),
                            cwd=self.dir, max_retries=random.choice([1, 2]), queue="narrow")
        self.kill(random, 0.1)
        left = 1 + 4 * self.KILLS
        while left:  # it is waited for as long as some end
            left, = self.until(lambda: [count for count in [sum(
                watcher.counts()[state] for state in ("pending", "processing"))] if count < left])
        jobs = list(watcher.jobs())
        dead = [job.id for job in jobs if job.state == "dead"]
        told = [job.env["QUEUECTL_DEAD_JOB"] for job in jobs if job.env]
        places = collections.Counter(read_file(self.path("ledger")).decode().split())
        figures = "limited chaos: %d kills, %d jobs, %d dead, places %s (seed %d)" % (
            self.KILLS, len(jobs), len(dead), dict(places), seed)
        if self.TOLD:
            print(figures, file=sys.stderr)
        self.assertEqual(set(places), {"3", "4", "5"}, figures)  # all three, and no fourth
        self.assertTrue(dead, figures)
        self.assertEqual(sorted(told), sorted(dead), figures)
        self.assertEqual({job.state for job in jobs if job.env}, {"completed"}, figures)
        self.assert_sound(figures)


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
        self.assertEqual(sorted((info["slot"], info["queues"]) for info in self.listed()),
                         [(1, ["a", "b"]), (2, ["a", "b"])])
        self.add("job1", "true", queue="b")
        self.until_state("job1", "completed")
        self.until(lambda: b"job1 completed" in read_file(self.log_of(err)))
        self.play("""
            $ queuectl worker stop
            ! queuectl: 2 workers stopped
            $ queuectl worker stop
            ! queuectl: no worker runs on ...q.db
            $ queuectl worker list
            ! queuectl: no worker runs on ...q.db
            """)

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
        self.finish(meeting)
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
        """Where they cannot start, or their log cannot be written: exit 1."""
        with mock.patch("sys.executable", shutil.which("false")):
            self.assertIn("log", self.refused("worker", "start", "--detach", code=1,
                                              says="did not start"))
        self.assertEqual(self.listed(), [])
        self.refused("worker", "start", "--drain", "--log", "no/such/log", code=1, says="no/such")

    def test_what_is_logged_is_safe_for_a_terminal(self):
        options = queuectl.StartOptions(path=self.db, count=1, drain=False, queues=[], via=None,
                                        quiet=False, log=self.path("log"), name="s")
        queuectl.Log(options, "worker 1").event("red \x1b[31m")
        self.assertRegex(read_file(options.log), rb"worker 1: red [^\x1b\n]+\n\Z")

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

    def slots(self):
        return sorted(("".join(info["queues"] or "*"), info["slot"]) for info in self.listed())

    def test_slots(self):
        """The lowest that no live worker of the same queues has, across supervisors."""
        for words, slots in (("--ensure --count 1", "*1"), ("--ensure --count 2", "*1 *2"),
                             ("--ensure --count 2 --queue a", "*1 *2 a1 a2"),
                             ("--detach --queue a", "*1 *2 a1 a2 a3")):
            self.ok("worker", "start", *words.split())
            self.assertEqual(self.slots(), [(word[0], int(word[1])) for word in slots.split()])
        self.ok("worker", "stop", *[info["name"] for info in self.listed() if info["slot"] == 1])
        self.assertEqual(self.slots(), [("*", 2), ("a", 2), ("a", 3)])
        self.ok("worker", "start", "--detach", "--queue", "a")
        self.assertEqual(self.slots(), [("*", 2), ("a", 1), ("a", 2), ("a", 3)])

    def test_stop_some(self):
        """By name, or those that were started for just these queues."""
        for words in ("--count 2", "--queue a --queue b", "--queue a"):
            self.ok("worker", "start", "--detach", *words.split())
        self.play("""
            $ queuectl worker stop nobody
            ! queuectl: no worker nobody runs; see: queuectl.py worker list
            [1]
            $ queuectl worker stop --queue c
            ! queuectl: no worker was started for just these queues; see: queuectl.py worker list
            $ queuectl worker stop --queue b --queue a
            ! queuectl: 1 worker stopped
            $ queuectl worker stop --queue a --now
            ! queuectl: 1 worker stopped
            """)
        first, second = self.listed()
        self.ok("worker", "stop", first["name"])
        self.assertEqual(self.listed(), [second])
        with Queue(self.db) as queue:  # --ensure must not count on who has gone
            self.until(lambda: [info.count for info in queue.workers(supervisors=True)
                                if not info.slot] == [1])
        self.ok("worker", "stop", second["name"])
        with Queue(self.db) as queue:
            self.until(lambda: not queue.workers(supervisors=True))

    def test_ensure_with_another_via(self):
        """That workers run is not enough where they would run the jobs in another way."""
        self.play("""
            $ queuectl worker start --ensure --queue a --via 'sh -c "$QUEUECTL_COMMAND"'
            ! queuectl: 1 worker started on ...
            $ queuectl worker start --ensure --quiet --queue a --via 'sh -c "$QUEUECTL_COMMAND"'
            $ queuectl worker start --ensure --quiet --queue a
            ! queuectl: workers for these queues run already, with --via sh ... stop --queue a
            [1]
            $ queuectl worker start --ensure --queue b
            ! queuectl: 1 worker started on ...
            $ queuectl worker start --ensure --queue b --via x
            ! queuectl: workers for these queues run already, without --via; end them first: ...
            [1]
            """)
        self.assertEqual(self.slots(), [("a", 1), ("b", 1)])

    @linux
    def test_they_import_the_file(self):
        """And do not run it, for which Python would keep its syntax tree."""
        self.ok("worker", "start", "--detach")
        for info in self.queue().workers(supervisors=True):
            words = read_file("/proc/%d/cmdline" % info.pid).split(b"\0")
            self.assertEqual((words[1], b"from queuectl import main" in words[2]), (b"-c", True))

    def test_ensure_does_not_count_on_who_leaves(self):
        """Workers that finish their last job after a signal take no other one."""
        meeting, process, _ = self.busy()
        process.send_signal(signal.SIGTERM)
        self.until(lambda: "(stopping)" in self.ok("worker", "list"))
        self.ok("worker", "start", "--ensure")
        self.assertEqual([info["job"] for info in self.listed()], ["a", None])
        meeting.let_go()
        self.assertEqual(process.wait(PATIENCE), 0)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no FIFOs")
    def test_the_file_of_a_log(self):
        """A file that was there keeps its mode; what is no file stays as it is, and nobody waits
        for a lock on it: not even root's workers change the mode of /dev/null. One that is made
        is for its owner only."""
        self.addCleanup(os.umask, os.umask(0))
        for way in ("foreground", "background"):
            for kind in ("fifo", "device", "mine", "new"):
                log = self.path("%s-%s" % (way, kind))
                with self.subTest(log), contextlib.ExitStack() as stack:
                    if kind == "fifo":
                        os.mkfifo(log)
                    elif kind == "device":
                        try:
                            os.mknod(log, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
                            os.close(os.open(log, os.O_RDWR))
                        except (OSError, AttributeError):  # only root may, and not everywhere
                            continue
                    elif kind == "mine":
                        with open(log, "w") as file:
                            file.write("mine\n")
                        os.chmod(log, 0o640)
                    if kind in ("fifo", "device"):
                        os.chmod(log, 0o666)
                        fd = os.open(log, os.O_RDWR | os.O_NONBLOCK)
                        stack.callback(os.close, fd)
                        fcntl.flock(fd, fcntl.LOCK_EX)
                        fcntl.lockf(fd, fcntl.LOCK_EX)
                    before = kind != "new" and os.lstat(log)
                    self.log_one_job(way, log, way + kind)
                    after = os.lstat(log)
                    if kind == "new":
                        self.assertEqual(stat.S_IMODE(after.st_mode), 0o600)
                    else:
                        self.assertEqual(*[(found.st_mode, found.st_ino, found.st_rdev,
                                            found.st_uid, found.st_nlink)
                                           for found in (before, after)])
                    if kind != "device":
                        text = os.read(fd, 65536) if kind == "fifo" else read_file(log)
                        self.assertIn(b"job %s completed" % (way + kind).encode(), text)
                        self.assertEqual(text.startswith(b"mine\n"), kind == "mine")
                    self.assertFalse(os.path.exists(log + ".1"))

    def test_two_who_make_room_in_a_log_at_once(self):
        """The one that comes later leaves what the first has moved."""
        log, create = self.path("log"), queuectl.create_file
        with open(log, "wb") as file:
            file.write(b"x" * queuectl.LOG_LIMIT)

        def late(path, flags=0):
            fd = create(path, flags)
            if not os.path.exists(log + ".1"):
                os.replace(log, log + ".1")
                os.close(create(log))
            return fd
        with mock.patch.object(queuectl, "create_file", late):
            os.close(queuectl.open_log(log))
        self.assertEqual(os.path.getsize(log + ".1"), queuectl.LOG_LIMIT)

    def log_one_job(self, way, log, id):
        self.add(id, "true")
        if way == "background":
            code, out, err = self.cli("worker", "start", "--detach", "--log", log)
            self.assertEqual((code, out), (0, ""), err)
        else:
            process = self.start("worker", "start", "--log", log)
        self.until_state(id, "completed")
        if way == "background":
            self.assertEqual(self.cli("worker", "stop")[0], 0)
        else:
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(PATIENCE), 0, read_file(process.log))


class Via(Everyday):
    """worker start --via COMMAND"""

    def test_outcomes(self):
        """The job's command line is in $QUEUECTL_COMMAND, as it is; output, exit codes, a
        cancel and a timeout go through."""
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
        self.until_state("cancel", "cancelled")
        self.assertEqual((self.job("a").command, self.job("a").exit_code), (line, 7))
        self.assertEqual(self.output("a"), b"it's a two  blanks\n")
        self.assertEqual(self.output("b"), b"a b|$HOME|'|")
        self.assertEqual(self.runs("late")[0].outcome, "timeout")

    def test_wrappers(self):
        """One such as nice, which execs the command; one that is not there fails the job; and
        without one there is no such variable."""
        before = int(subprocess.check_output(["nice"]))
        self.play("""
            $ queuectl enqueue --id a nice
            a
            $ queuectl worker start --drain --quiet --via 'nice -n 3 sh -c "$QUEUECTL_COMMAND"'
            $ queuectl logs a
            %d
            $ queuectl enqueue --id b 'echo ${QUEUECTL_COMMAND-none}'
            b
            $ queuectl worker start --drain --quiet
            $ queuectl logs b
            none
            $ queuectl enqueue --id c --max-retries 1 true
            c
            $ queuectl worker start --drain --quiet --via no-such-wrapper
            ...
            $ pick state,exit_code queuectl show c --json
            dead 127
            """ % min(before + 3, 19))


class Prune(Everyday):
    """prune, dlq purge, and the setting keep_completed"""

    def test_states_and_ages(self):
        """Ended jobs go, or those of one state, or age from their end; others stay, and what an
        unfinished job waits for stays."""
        self.various()
        self.play("""
            $ queuectl prune --older-than 1h
            ! queuectl: 0 jobs deleted
            $ queuectl dlq purge --older-than 1h
            ! queuectl: 0 dead jobs deleted
            $ queuectl prune --state completed
            ! queuectl: 1 job deleted
            $ queuectl prune --state dead
            ! queuectl: 1 job deleted
            $ queuectl prune --state cancelled
            ! queuectl: 0 jobs deleted
            $ states
            dead: blocker; cancelled: off; blocked: stuck behind orphan
            $ queuectl enqueue --id old --max-retries 1 false
            old
            $ work
            old dead
            $ queuectl cancel orphan
            $ later 2h
            $ queuectl enqueue --id d1 --max-retries 1 false
            d1
            $ work
            d1 dead
            $ queuectl dlq purge --older-than 1h
            ! queuectl: 1 dead job deleted
            # What only those have needed that go goes with them.
            $ queuectl prune --older-than 1h
            ! queuectl: 2 jobs deleted
            $ states
            dead: blocker d1; blocked: stuck behind
            $ queuectl dlq purge
            ! queuectl: 1 dead job deleted
            $ queuectl enqueue --lines - --max-retries 1 <<END
            > true
            > false
            > END
            ...
            $ work
            ...
            # One that has completed, one that is dead, and what was cancelled.
            $ queuectl prune
            ! queuectl: 2 jobs deleted
            $ states
            dead: blocker; blocked: stuck behind
            """)

    def test_what_is_wanted_again_meanwhile_stays(self):
        """A prune has found a job, which then is retried, or another one waits for it."""
        queue, other = self.queue(), self.queue()
        for id in ("retried", "needed", "old"):
            queue.enqueue("true", id=id, max_retries=1)
        self.run_all(queue, "failed")
        begin = queue._transaction

        def late():
            other.retry(["retried"])
            other.enqueue("true", id="new", after=["needed"])
            return begin()
        with mock.patch.object(queue, "_transaction", late):
            self.assertEqual(queue.prune(queuectl.ENDED), 1)
        self.assertEqual(list(self.states()), ["retried", "needed", "new"])

    def test_rows_and_space(self):
        """With a job go its runs and what it waited for, and the file gets smaller."""
        def tables():
            with contextlib.closing(sqlite3.connect(self.db)) as db:
                return [db.execute("SELECT count(*) FROM " + name).fetchone()[0]
                        for name in ("jobs", "runs", "deps")]
        ids = ["job%d" % number for number in range(400)]
        with Queue(self.db, durable=False) as queue:
            list(queue.enqueue_many({"id": id, "command": "true", "after": ids[:1][:number]}
                                    for number, id in enumerate(ids)))
            while self.run_next(queue, output=b"x" * 8000):
                pass
        full = os.stat(self.db).st_size
        self.assertEqual(tables(), [400, 400, 399])
        self.ok("prune")
        self.assertEqual(tables(), [0, 0, 0])
        self.assertLess(os.stat(self.db).st_size, full / 4)

    def test_a_file_that_gives_no_space_back(self):
        """One that somebody else has made, and emptied: SQLite itself knows no way then."""
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("CREATE TABLE t (x)")
            db.execute("INSERT INTO t VALUES (zeroblob(4000000))")
            db.execute("DROP TABLE t")
        self.add("a", "true")
        self.assertEqual(self.main("prune"), (0, "", "queuectl: 0 jobs deleted\n"))

    def test_old_minutes_become_one(self):
        clock, queue = self.clock(), self.queue()
        for _ in range(5):
            queue.enqueue("true")
            self.run_next(queue)
            clock.now += 1800
        before = queue.stats()
        queue.housekeeping(0)
        self.assertEqual(queue.stats(), before)
        self.assertEqual(queue._value("SELECT count(*) FROM stats"), 3)

    def test_keep_completed(self):
        """Idle workers delete completed jobs past keep_completed, a few at a time, and no
        others; 0 keeps them for ever."""
        self.ok("config", "set", "keep_completed", 0)
        self.various()
        with Queue(self.db, durable=False) as queue:
            list(queue.enqueue_many({"command": "true"} for _ in range(250)))
            self.run_all(queue)
        with constants(self, HOUSEKEEPING=0.01):
            self.workers(1)
        self.ok("enqueue", "--id", "mark", "true")  # the worker has been idle, and is again
        self.until_state("mark", "completed")
        self.assertEqual(len(self.states()), 258)
        self.ok("config", "set", "keep_completed", "0.001")
        self.until(lambda: len(self.states()) == 6)
        self.assertNotIn("completed", self.states().values())


class Metrics(Everyday):
    """metrics: the text format of Prometheus"""

    NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
    LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'
    SAMPLE = re.compile(r"((%s)(?:\{(?:%s(?:,%s)*)?\})?) (-?[0-9.e+-]+|NaN|[+-]Inf)\Z"
                        % (NAME, LABEL, LABEL))

    def samples(self):
        """{"name{label="value"}": number}; fails where a line is not as it should."""
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
            name = match.group(2)
            self.assertEqual(re.sub("_(sum|count)$", "", name) if kinds[family] == "summary"
                             else name, family)
            self.assertTrue(name.startswith("queuectl_"))
            self.assertNotIn(match.group(1), found, "sampled twice")
            found[match.group(1)] = float(match.group(match.lastindex))
        self.assertNotIn(None, kinds.values())
        return found

    def busy(self):
        self.play("""
            $ queuectl enqueue --file - <<END
            > {"id": "a", "command": "true"}
            > {"id": "b", "command": "false", "max_retries": 2}
            > {"id": "c", "command": "true", "delay": 3600}
            > {"id": "d", "command": "true", "after": ["c"]}
            > {"id": "e", "command": "true", "queue": "mail", "priority": -1}
            > END
            ...
            $ work 2
            a completed
            b failed
            """)

    def test_numbers(self):
        """What they count, by queue and state or outcome. A counter never falls, whatever is
        deleted, and however old."""
        self.busy()
        found = self.samples()
        for sample, expected in (
                ('jobs{queue="default",state="pending"}', 0),
                ('jobs{queue="default",state="scheduled"}', 1),
                ('jobs{queue="default",state="blocked"}', 1),
                ('jobs{queue="default",state="failed"}', 1),
                ('jobs{queue="default",state="processing"}', 0),
                ('jobs{queue="default",state="completed"}', 1),
                ('jobs{queue="default",state="dead"}', 0),
                ('jobs{queue="default",state="cancelled"}', 0),
                ('jobs{queue="mail",state="pending"}', 1),
                ('runs_total{queue="default",outcome="failed"}', 1),
                ('run_seconds_count{queue="default"}', 2), ('run_seconds_sum{queue="default"}', 1),
                ('workers{state="idle"}', 0)):
            self.assertEqual(found["queuectl_" + sample], expected, sample)
        self.assertGreaterEqual(found["queuectl_oldest_ready_seconds"], 0)
        self.ok("cancel", "b", "d")
        self.ok("prune")
        self.assertEqual(list(self.states()), ["c", "e"])
        for hours in (0, 2, 25):
            with mock.patch("queuectl.time.time", return_value=time.time() + hours * 3600), \
                    Queue(self.db) as queue:
                queue.housekeeping(0)
                queue.housekeeping(0)
                now = self.samples()
                for key, value in found.items():
                    if "_total" in key or "_seconds_" in key:
                        self.assertEqual(now[key], value, key)
                if hours == 2:  # folded minutes meet later ones
                    queue.enqueue("false", id="f", queue="default", priority=9)
                    self.assertEqual(self.run_next(queue, "failed").id, "f")
                    found = self.samples()
                    self.assertEqual(found['queuectl_runs_total{queue="default",'
                                           'outcome="failed"}'], 2)

    def test_workers(self):
        """How many workers there are, and what they do."""
        meeting = self.meeting()
        self.ok("enqueue", meeting.here)
        self.workers(2)
        meeting.arrived()
        found = self.samples()
        self.assertEqual([found['queuectl_workers{state="%s"}' % state]
                          for state in ("busy", "idle")], [1, 1])
        meeting.let_go()

    def test_escaping(self):
        """Names of queues with quotes and backslashes."""
        name = 'a"b\\c{d}=,\u00e9'
        with Queue(self.db) as queue:
            queue.enqueue("true", queue=name)
            self.run_next(queue)
        label = 'queue="%s"' % name.replace("\\", "\\\\").replace('"', '\\"')
        found = self.samples()
        self.assertEqual(found['queuectl_jobs{%s,state="completed"}' % label], 1)
        self.assertEqual(found['queuectl_run_seconds_count{%s}' % label], 1)

    @unittest.skipUnless(shutil.which("promtool"), "promtool is not installed")
    def test_promtool(self):
        """Prometheus's own judge has nothing to say."""
        self.busy()
        done = subprocess.run(["promtool", "check", "metrics"], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, input=self.ok("metrics").encode())
        self.assertEqual((done.returncode, done.stdout), (0, b""))


class Status(Everyday):
    """status [--json] [--watch]"""

    def test_what_it_says(self):
        """Counts for every state and view; and on stderr one line of what does not go well by
        itself, the worst first."""
        self.play("""
            $ queuectl status
            database  ...q.db
            jobs      0 pending, 0 processing, 0 completed, 0 dead, 0 cancelled
            workers   none runs
            $ pick oldest_ready_seconds,workers queuectl status --json
            null []
            $ pick database queuectl status --json
            %s
            $ queuectl enqueue --id 1 true
            1
            $ queuectl enqueue --id 2 --max-retries 2 false
            2
            $ work
            1 completed
            2 failed
            $ queuectl enqueue --id 3 --delay 1h --queue mail true
            3
            $ queuectl enqueue --id 4 --after 2 true
            4
            $ queuectl enqueue --id 5 true
            5
            $ queuectl pause empty
            ! queuectl: the queue empty, which has no job yet, is paused
            $ queuectl pause mail
            $ queuectl limit mail 2
            $ queuectl status
            database  ...q.db
            jobs      4 pending, 0 processing, 1 completed, 0 dead, 0 cancelled
                      of the pending: 1 failed, 1 scheduled, 1 blocked
            waiting   the first ready job for ...
            rate      0... runs a minute in 5 minutes; 2 in the last hour, 1 of these runs failed
            duration  500ms on average
            workers   none runs
            QUEUE    PENDING  PROCESSING  FAILED  SCHEDULED  BLOCKED  DEAD
            default  3        0           1       0          1        0
            empty    0        0           0       0          0        0     paused
            mail     1        0           0       1          0        0     paused, limit 2
            # Who waits in a paused queue is no cause for alarm.
            ! queuectl: 3 jobs wait: no worker runs (start one: queuectl.py worker start)
            $ queuectl status --watch | head -2
            database  ...q.db
            jobs      4 pending...
            ! queuectl: 3 jobs wait: ...
            $ pick jobs,paused,last_hour queuectl status --json
            {...} ["empty", "mail"] {"runs": 2, "failed": 1, "mean_seconds": 0.5}
            $ queuectl pause
            $ queuectl status
            ...
            ! queuectl: 4 jobs wait: all queues are paused (to go on: queuectl.py resume)
            $ queuectl resume
            $ queuectl cancel 2 3 5
            $ queuectl status
            ...
            ! queuectl: what the blocked jobs wait for has ended badly; see: ...
            """ % self.db)
        status = json.loads(self.ok("status", "--json"))
        self.assertEqual((status["jobs"], status["queues"]["mail"]), ({
            "pending": 1, "processing": 0, "completed": 1, "dead": 0, "cancelled": 3, "failed": 0,
            "scheduled": 0, "blocked": 1}, {
            "pending": 0, "processing": 0, "completed": 0, "dead": 0, "cancelled": 1, "failed": 0,
            "scheduled": 0, "blocked": 0}))
        with self.queue() as queue:
            queue.retry(["5"])
            self.claim(queue, "dead")
        self.play("""
            $ queuectl status
            ...
            ! queuectl: 1 job was left by a dead worker; to take up again: queuectl.py worker start
            $ pick orphaned,jobs.processing queuectl status --json
            1 1
            """)

    def test_settings_and_what_runs_again(self):
        """Settings are listed in the words of the command line. What a job's JSON says of its end
        is of the runs that count."""
        self.play("""
            $ queuectl enqueue --id a --max-retries 1 'exit 3'
            a
            $ work
            a dead
            $ queuectl dlq retry a
            $ pick view,exit_code,started_at,finished_at,runs.0.exit_code queuectl show a --json
            pending null null null 3
            $ queuectl config get
            max-retries 3
            backoff-base 2
            backoff-max 1h
            job-timeout 5m
            kill-grace 5s
            output-limit 64K
            keep-completed 7d
            on-dead none
            """)

    def test_rate(self):
        """In whole numbers, however many."""
        self.clock()
        with Queue(self.db) as queue:
            queue._execute("INSERT INTO stats VALUES (?, 'q', 'completed', 26144, 1.0)",
                           (1800000000 // 60,))
        self.assertIn("rate      5229 runs a minute in 5 minutes; 26144 in the last hour",
                      self.ok("status"))

    def test_watch(self):
        """--watch redraws the same place, within the width of the terminal, until Ctrl-C."""
        with Queue(self.db) as queue:
            for id in ("good", "x" * 70, "other"):
                queue.enqueue("true", id=id, queue="queue-" + id, max_retries=1)
            self.run_next(queue)
            self.run_next(queue, "failed")
        self.ok("pause", "queue-other")
        screen = self.terminal("status", "--watch", columns=60, lines=20)
        screen.until(r"\x1b\[H[^\x00]*1 pending[^\x00]*\x1b\[J")
        self.ok("enqueue", "--queue", "new", "true")
        screen.until(r"\x1b\[H[^\x00]*2 pending[^\x00]*\x1b\[J")
        frames = self.interrupted(screen).split("\x1b[H")[1:]
        self.assertGreater(len(frames), 1)
        for frame in frames:
            lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).split("\n")
            self.assertLess(len(lines), 21)
            self.assertLessEqual(max(map(len, lines)), 60, lines)

    def test_a_small_screen_shows_the_warning_and_the_workers(self):
        """Whole, for which the queues make room first and then the facts."""
        with Queue(self.db) as queue:
            for number in range(30):
                queue.enqueue("true", queue="q%d" % number)
        self.workers(4, "--queue", "q1")
        with Queue(self.db) as queue:
            self.until(lambda: queue.counts()["completed"])
            status = queuectl.gather_status(queue)
        warning = queuectl.status_warning(status)
        for lines in (100, 30, 14, 12, 10, 8):
            shown = queuectl.status_screen(status, warning, time.time(), 40, lines)
            self.assertLessEqual(len(shown), lines)
            self.assertLessEqual(max(map(len, shown)), 40)
            text = " ".join(shown)
            self.assertTrue(text.startswith("! " + warning), text)
            self.assertIn("workers   4 workers, 0 busy", text)
            there = sum(info.name in text for info in status["workers"])
            hidden = max(0, 12 - lines) if lines < 11 else 0  # the note about them needs a line
            self.assertEqual(there, 4 - hidden, shown)
            self.assertEqual("(%d more worker" % hidden in text, hidden > 0, shown)
            self.assertEqual("q29" in text, lines == 100)
            self.assertEqual("database" in text, lines > 11)


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
            self.run_next(queue, "failed", error="exit code 1: " + "reason " * 20)
            queue.enqueue("true \x1b[31m\nsecond line", id="job-" + long, queue="queue-" + long)
            self.run_next(queue)
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
        with mock.patch.object(queuectl, "PAGE", 2):  # whatever the first rows were
            out = self.ok("list")
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


class Completion(Everyday):
    """completion bash|zsh|fish: what the program answers, and what comes of it in real shells."""

    CASES = (  # the line so far, words that must be offered, words that must not
        ("", "enqueue worker status list dlq config completion", "start bash --json --db"),
        ("--", "--db --help", "--json"), ("st", "status", "list start"),
        ("worker ", "start stop list", "enqueue --count"),
        ("worker st", "start stop", "list status"), ("worker --", "--db", "--count --json"),
        ("worker start --", "--count --drain --detach --ensure --queue --via --db", "--json"),
        ("dlq ", "list retry purge", "start"), ("dlq retry --", "--all", "--older-than"),
        ("enqueue --", " ".join("--" + name.replace("_", "-") for name in queuectl.FIELDS
                                if name != "command") + " --file --db", "--json"),
        ("list --state ", " ".join(queuectl.STATES + queuectl.VIEWS), "--json list"),
        ("list --state c", "completed cancelled", "dead"),
        ("list --state=c", "--state=completed --state=cancelled", "completed"),
        ("list --state dead ", "--queue --json", "dead --count"),
        ("prune --state ", "completed dead cancelled", "pending processing blocked"),
        ("config set ", " ".join(queuectl.SETTINGS), "list"),
        ("config get back", "backoff_base backoff_max", "max_retries"),
        ("config set max_retries ", "--db", "max_retries"),
        ("completion ", "bash zsh fish", "list"),
        ("--db x.db worker ", "start stop list", "enqueue"), ("--db x.db sho", "show", "list"),
        ("worker --db x.db st", "start stop", "status"),
        ("worker --db=x.db st", "start stop", "status"),
        ("list --queue worker --", "--state --limit --json", "--count"),
        ("show ", "job:1 job:2 other", "mail default odd;id"),
        ("show job:", "job:1 job:2", "other"),
        ("show 'jo", "job:1 job:2", "other"), ('show "o', "other", "job:1"),
        ("show other ", "--json", "other"), ("cancel other jo", "job:1 job:2", "other"),
        ("cancel --db q.db o", "other", "job:1"), ("--db=q.db logs o", "other", "job:1"),
        ("enqueue --after o", "other", "job:1"), ("enqueue --id o", "", "other"),
        ("pause ", "mail default", "other"), ("pause mail ", "--db", "mail default"),
        ("list --queue m", "mail", "default"), ("enqueue --queue=m", "--queue=mail", "mail"),
        ("enqueue --unique ", "", "max_retries other"),
        # Nothing: there the shell has names of files.
        ("enqueue --file ", "", None), ("enqueue --cwd ", "", None), ("--db ", "", None),
        ("worker start --log ", "", None), ("enqueue -- ", "", None), ("enqueue -- rm -", "", None),
        ("frob ", "", None), ("worker frob ", "", None), ("show nobody", "", None),
        ("--db nowhere/x.db show o", "", None), ("--db missing.db show o", "", None),
        ("--db broken.db show o", "", None), ("--db empty.db show o", "", None),
        ("--db . show o", "", None))

    def setUp(self):
        super().setUp()
        for id in ("job:1", "job:2", "other", "odd;id"):
            self.ok("enqueue", "--id", id, "true")
        self.ok("enqueue", "--id", "2", "--queue", "mail", "true")
        for name, text in (("broken.db", "text " * 100), ("empty.db", ""), ("x.json", "")):
            with open(self.path(name), "w") as file:
                file.write(text)

    def test_answers(self):
        """Nothing is said nor created, whatever the database is."""
        files = sorted(os.listdir(self.dir))
        for line, offered, other in self.CASES:
            with self.subTest(line), mock.patch.dict(os.environ, COMP_LINE="queuectl " + line):
                code, out, err = self.main("completion", "bash")
                self.assertEqual((code, err), (0 if out else 1, ""))
                words = out.split()
                self.assertLessEqual(set(offered.split()), set(words))
                if other is None:
                    self.assertEqual(words, [])
                else:
                    self.assertEqual(set(other.split()) & set(words), set())
        self.assertEqual(sorted(os.listdir(self.dir)), files)

    def test_workers(self):
        self.addCleanup(self.no_workers_left)
        self.ok("worker", "start", "--detach")
        name = json.loads(self.ok("worker", "list", "--json"))[0]["name"]
        with mock.patch.dict(os.environ, COMP_LINE="queuectl worker stop "):
            self.assertEqual(self.main("completion", "bash")[1], name + "\n")

    def test_what_bash_adds(self):
        """Where its cursor is, and the part of the last word that it will replace."""
        for line, point, word, answer in (
                ("show job:", 18, "", "1 2"), ("show job:", 16, "jo", "job:1 job:2"),
                ("list --state=co", 24, "co", "completed"), ("show \u00fc; x", 11, "sh", "show"),
                ("show 'job:", 19, "'job:", "'job:1 'job:2"), ("show", 8, "queuectl", ""),
                ("show", 3, "que", "")):
            env = {"COMP_LINE": "queuectl " + line, "COMP_POINT": str(point)}
            with self.subTest(line), mock.patch.dict(os.environ, env):
                _, out, err = self.main("completion", "bash", "--", "queuectl", word, "--x")
                self.assertEqual((out.split(), err), (answer.split(), ""))

    def test_many_jobs(self):
        with self.queue() as queue:
            list(queue.enqueue_many({"command": "true", "id": "a%d" % n} for n in range(12000)))
            for prefix, count in (("a", 400), ("a119", 111), ("a11999", 1), ("x", 0)):
                with self.subTest(prefix):
                    found = queue.ids(prefix)
                    self.assertEqual(len(found), count)
                    self.assertTrue(all(id.startswith(prefix) for id in found))
            self.assertIn("other", queue.ids("o"))  # though it is none of the newest 10,000

    TYPED = (  # what is typed, and the arguments that the program gets
        ("sho\tother", "show other"), ("worker sta\t--dr\t", "worker start --drain"),
        ("show job:\t2", "show job:2"), ("list --state comp\t", "list --state completed"),
        ("pause ma\t", "pause mail"), ("enqueue --file x.j\t", "enqueue --file x.json"),
        ("config get kee\t", "config get keep_completed"), ("dlq retry ot\t", "dlq retry other"))

    def type_in(self, *shell, prepare):
        """Type into a real shell. What is called there shows its arguments, and the program that
        was asked stands in a folder with a blank in its name."""
        os.mkdir(self.path("a folder"))
        asked = self.path("a folder", "queuectl.py")
        shutil.copy(SCRIPT, asked)
        for name in ("queuectl", "queuectl.py"):
            with open(self.path(name), "w") as file:
                file.write('#!/bin/sh\necho "got <$*>"\n')
            os.chmod(file.name, 0o700)
        script = self.path("script")
        with open(script, "wb") as file:
            file.write(subprocess.check_output([sys.executable, asked, "completion", shell[0]]))
        screen = Terminal(self, shell, env={"PATH": self.dir + os.pathsep + self.env["PATH"]})
        screen.press((prepare % script).encode() + b"\r")
        programs = ("queuectl", "queuectl.py", "./queuectl.py", self.path("queuectl"))
        for program, (keys, words) in zip(itertools.cycle(programs), self.TYPED):
            screen.press(("%s %s\r" % (program, keys)).encode())
            self.assertEqual(screen.until("got <(.*?)>").group(1).strip(), words)
            screen.shown = ""
        screen.press(b"exit\r")

    @unittest.skipUnless(shutil.which("bash"), "bash is not installed")
    def test_bash(self):
        self.type_in("bash", "--norc", "--noprofile", "-i", prepare=". '%s'")

    @unittest.skipUnless(shutil.which("zsh"), "zsh is not installed")
    def test_zsh(self):
        self.type_in("zsh", "-f", "-i", prepare=". '%s'")

    @unittest.skipUnless(shutil.which("fish"), "fish is not installed")
    def test_fish(self):
        self.type_in("fish", "--no-config", "-i", prepare="source '%s'")
        for line, offered, other in self.CASES:
            if other is not None and "'" not in line and '"' not in line:
                with self.subTest(line):
                    words = subprocess.check_output(
                        ["fish", "--no-config", "-c", "source script; complete -C %s"
                         % shlex.quote("queuectl " + line)], env=self.env).decode().split()
                    self.assertLessEqual(set(offered.split()), set(words))
                    self.assertEqual(set(other.split()) & set(words), set())


# -- web ------------------------------------------------------------------------------------


class WebCase(Everyday):
    """What tests of the page need: a `web` that serves, and requests."""

    XSS = ("<script>document.title='owned'</script>", "javascript:document.title='owned'",
           "\"'><img/src=x/onerror=document.title='owned'>",
           "</script><svg/onload=document.title='owned'>")

    def serve(self, *words, **values):
        """Start `web`, with other values of the room's constants."""
        with constants(self, **values):
            process = self.start("web", *words, stdout=subprocess.PIPE)
        self.url = process.stdout.readline().decode().strip()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?ticket=([\w-]{40,})", self.url)
        self.assertTrue(found, self.url + read_file(process.log).decode())
        self.port, self.ticket, self.cookie = int(found.group(1)), found.group(2), ""
        return process

    def request(self, method, path, body=None, headers=(), **more):
        """(status, headers, body) of a request, by default as a tab makes it."""
        lines = {"Host": "127.0.0.1:%d" % self.port, "Cookie": self.cookie, "Connection": "close"}
        if method == "POST":
            lines.update({"X-Queuectl": "1", "Content-Length": str(len(body or b""))})
        lines.update(headers, **more)
        head = "".join("%s: %s\r\n" % (name, value) for name, value in lines.items()
                       if value is not None)
        head = "%s %s HTTP/1.1\r\n%s\r\n" % (method, path, head)
        return self.raw(head.encode() + (body or b""))

    def raw(self, data):
        """(status, headers, body) of what is answered to these bytes; None: nothing is."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            with contextlib.suppress(OSError):  # it need not read a body that it refuses
                connection.sendall(data)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                for piece in iter(lambda: connection.recv(1 << 16), b""):
                    answer += piece
        if not answer:
            return None
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body

    def open(self):
        """Take the ticket, as a browser does; the page."""
        status, headers, body = self.request("GET", "/?ticket=" + self.ticket)
        self.assertEqual(status, 200)
        self.cookie = headers["Set-Cookie"].partition(";")[0]
        return headers, body.decode()

    def poison(self):
        """Dead jobs, each of which is full of what would be a script in a page."""
        queue = self.queue()
        for text in self.XSS:
            word = re.sub(r"\s", "", text)
            queue.enqueue(text, id=word, queue=word, max_retries=1,
                          env={text.replace("=", ""): text})
            self.run_next(queue, "failed", error=text, output=text.encode())

    def look(self, path, **asked):
        status, headers, body = self.request("GET", path + "?" + urllib.parse.urlencode(asked))
        self.assertEqual((status, headers["Content-Type"]),
                         (200, "application/json; charset=utf-8"), body)
        return json.loads(body)

    def act(self, path, **body):
        status, _, answer = self.request("POST", path, json.dumps(body).encode())
        self.assertEqual(status, 200, answer)
        return json.loads(answer)


class Web(WebCase):
    """The page over HTTP: what it shows, what it does, and all that it refuses."""

    def test_the_printed_url_opens_the_page_once(self):
        process = self.serve()
        self.assertEqual(self.request("GET", "/")[0], 403)
        headers, page = self.open()
        self.assertRegex(headers["Set-Cookie"], r"\Aqueuectl-%d=[\w-]{40,}; HttpOnly; "
                         r"SameSite=Strict; Path=/\Z" % self.port)
        self.assertEqual(self.request("GET", "/")[0], 200)
        cookie, self.cookie = self.cookie, ""
        self.assertEqual(self.request("GET", "/?ticket=" + self.ticket)[0], 403)
        line = read_file(process.log).decode()
        self.assertRegex(line, r"\Aqueuectl: [^\n]+\n\Z")
        self.ticket = re.search(r"ticket=(\S+)", line).group(1)
        self.open()  # in another browser
        self.assertEqual(self.cookie, cookie)
        # One script and one style, known by a nonce that serves once; nothing from elsewhere.
        policy = headers["Content-Security-Policy"]
        nonce = re.search(r"'nonce-([\w-]{40,})'", policy).group(1)
        self.assertNotIn(nonce, self.request("GET", "/")[1]["Content-Security-Policy"])
        for kind in ("script", "style"):
            self.assertEqual(re.findall("<%s[^>]*>" % kind, page),
                             ['<%s nonce="%s">' % (kind, nonce)])
            self.assertIn("%s-src 'nonce-%s';" % (kind, nonce), policy)
        self.assertNotIn("{", page.partition("<style")[0] + page.rpartition("</script>")[2])
        for word in ("default-src 'none'", "frame-ancestors 'none'", "form-action 'none'",
                     "base-uri 'none'", "require-trusted-types-for 'script'"):
            self.assertIn(word, policy)
        self.assertEqual(set(re.findall(r"https?://[\w.]+", page)), {"http://www.w3.org"})  # names
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(",
                     "Function(", "onclick=", "javascript:"):
            self.assertNotIn(word, page)

    def test_it_is_small(self):
        constants = [queuectl.PAGE_HTML, queuectl.PAGE_STYLE, queuectl.PAGE_SCRIPT]
        self.assertLessEqual(sum(text.strip().count("\n") + 1 for text in constants), 300)

    def test_what_it_refuses(self):
        process = self.serve()
        self.open()
        host = "127.0.0.1:%d" % self.port
        self.add("a", "true")
        good = json.dumps({"command": "touch owned"}).encode()
        rows = [(403, "GET", "/jobs", None, {"Cookie": cookie}) for cookie in (
            None, "queuectl-%d=x" % self.port, "queuectl-1" + self.cookie[10:])]
        rows += [(403, "GET", path, None, {"Cookie": ""}) for path in (
            "/events", "/nowhere", "/?ticket=x", "/?ticket=%ff%00")]
        rows += [(403, "GET", "/", None, {"Host": name}) for name in (
            None, "evil.example.org", "127.0.0.1.evil.org:%d" % self.port,
            "0.0.0.0:%d" % self.port)]
        rows += [(403, "POST", "/enqueue", good, headers) for headers in (
            {"Cookie": self.cookie[:-1]}, {"Cookie": self.cookie + "\u00e9"},
            {"Origin": "http://evil.example.org"}, {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"}, {"Origin": "https://" + host},
            {"X-Queuectl": None}, {"X-Queuectl": "0"})]
        rows += [(403, "GET", "/", None, {"host": "evil.example.org"}),  # two of them
                 (403, "GET", "/jobs", None, {"Origin": "http://evil.example.org"})]
        rows += [(status, method, path, body, {}) for status, method, body, paths in (
            (404, "GET", None, "/nowhere /../etc/passwd"), (404, "POST", good, "/jobs/"),
            (405, "GET", None, "/enqueue?command=true /cancel?id=a /pause"),
            (405, "POST", b"{}", "/jobs /"), (405, "PUT", good, "/enqueue"),
            (405, "OPTIONS", None, "/enqueue"), (405, "DELETE", None, "/"),
            (405, "BREW", None, "/"), (414, "GET", None, "/" + "a" * 70000),
            (400, "GET", None, "/job /job?id=nobody /job?id=a&run=x /job?id=%00 /jobs?state=odd "
             "/jobs?before=-1 /jobs?before=1e99 http://[/")) for path in paths.split()]
        rows += [(status, "POST", "/enqueue", body, headers) for status, body, headers in (
            (411, None, {"Content-Length": None}),
            (411, b"2\r\n{}\r\n0\r\n\r\n", {"Content-Length": None,
                                              "Transfer-Encoding": "chunked"}),
            (413, None, {"Content-Length": str(1 << 30)}),
            (400, None, {"Content-Length": "-1"}), (400, None, {"Content-Length": "9" * 99}))]
        rows += [(431, "GET", "/", None, {"h%d" % number: "x" for number in range(200)})]
        rows += [(400, "POST", path, body, {}) for path, bodies in (
            ("/enqueue", (b"", b"{", b"[]]", b"7", b"null", b'"x"', b"[" * 100000, b"\xff",
                          b'{"command": " "}', b'{"command": "true", "shell": 1}',
                          b'{"command": "true", "id": "a"}', b'{"command": "\\ud800"}')),
            ("/cancel", (b"{}", b'{"id": null}', b'{"id": "nobody"}', b'{"id": [["a"]]}')),
            ("/retry", [b'{"id": "a"}']), ("/purge", [b'{"id": "a"}']),
            ("/edit", (b'{"id": "a", "unique": "b"}', b'{"id": "a", "priority": "high"}')),
            ("/pause", (b"{}", b'{"queue": "*"}')),
            ("/retry-all", (b'{"queue": {}}', b'{"queue": 1%s}' % (b"0" * 30))),
            ("/limit", (b'{"queue": "q"}', b'{"queue": "q", "number": "0"}',
                        b'{"queue": "q", "number": 0}', b'{"queue": "q", "number": false}',
                        b'{"queue": null, "number": 1}'))) for body in bodies]
        for status, method, path, body, headers in rows:
            with self.subTest(method + " " + path[:40], body=body and body[:40], **headers if
                              len(headers) < 9 else {}):
                answer = self.request(method, path, body, headers)
                self.assertEqual((answer[0], answer[1]["Content-Type"]),
                                 (status, "text/plain; charset=utf-8"), answer[2])
                self.assertRegex(answer[2], rb"\A[^\n]+\n\Z")
        for data in (b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                     b"\x16\x03\x01\x02\r\n\r\n",
                     b"GET / HTTP/1.1\r\nHost: %b\r\n no colon\r\n\r\n" % host.encode()):
            answer = self.raw(data)
            self.assertTrue(answer is None or 400 <= answer[0] < 500, answer)
        answer = self.request("POST", "/enqueue", b'{"command": "%s"}' % (b"x" * 10 ** 7))
        self.assertTrue(answer is None or answer[0] == 413, answer)
        with Queue(self.db) as queue:
            self.assertEqual([(job.id, job.state) for job in queue.jobs()], [("a", "pending")])
            self.assertEqual((queue.paused(), queue.limits()), ([], {}))
        self.assertRegex(read_file(process.log), rb"\Aqueuectl: [^\n]+\n\Z")
        self.assertIsNone(process.poll())
        # As through ssh -L, where the browser knows another port.
        self.assertEqual(self.request("GET", "/jobs", Host="localhost:9",
                                      Origin="http://localhost:9")[0], 200)

    def test_what_it_does(self):
        queue = self.queue()
        self.serve()
        self.open()
        id = self.act("/enqueue", command="echo hi", queue="mail", priority=3, timeout="90")
        job = queue.get(id)
        self.assertEqual((job.command, job.queue, job.priority, job.timeout),
                         ("echo hi", "mail", 3, 90))
        self.act("/edit", id=id, command="echo ho", priority="-1", max_retries=1, delay=None)
        self.assertEqual((queue.get(id).command, queue.get(id).priority), ("echo ho", -1))
        self.act("/pause", queue="mail")
        self.act("/pause", queue=None)
        self.assertEqual(queue.paused(), ["*", "mail"])
        self.act("/resume", queue="mail")
        self.assertEqual(queue.paused(), ["*"])
        self.act("/resume", queue=None)
        self.act("/limit", queue="mail", number="2")
        self.assertEqual(queue.limits(), {"mail": 2})
        self.act("/limit", queue="mail", number=None)
        self.assertEqual((queue.limits(), queue.paused()), ({}, []))
        self.assertEqual(self.run_all(queue, "failed"), [id])
        self.act("/retry", id=id)
        self.assertEqual(queue.get(id).state, "pending")
        self.act("/cancel", id=id)
        self.assertEqual(queue.get(id).state, "cancelled")
        self.act("/retry", id=id)
        self.run_all(queue, "failed")
        self.assertEqual(self.act("/retry-all", queue="other"), 0)
        self.assertEqual(self.act("/retry-all", queue=None), 1)
        self.run_all(queue, "failed")
        self.act("/purge", id=id)
        self.assertEqual(list(queue.jobs()), [])

    def test_what_it_shows_is_what_the_commands_show(self):
        queue = self.queue()
        queue.set_setting("backoff_base", 1000)
        for number in range(60):
            queue.enqueue("echo %d" % number, id="j%d" % number, env={"SECRET": "value"})
        queue.enqueue("echo later", id="b", after=["j1"], queue="mail")
        self.run_next(queue, "failed")
        self.run_next(queue, output=b"x" * 10)
        self.serve()
        self.open()
        page = self.look("/jobs")
        listed = json.loads(self.ok("list", "--json", "--last", "50"))
        known = [{**job, "env": sorted(job["env"])} for job in listed][::-1]
        self.assertEqual([{name: job[name] for name in known[0]} for job in page["jobs"]], known)
        rest = self.look("/jobs", before=page["older"])
        self.assertEqual(([job["id"] for job in rest["jobs"]], rest["older"]),
                         (["j%d" % number for number in range(10, -1, -1)], None))
        for asked, ids in (({"state": "failed"}, ["j0"]), ({"state": "completed"}, ["j1"]),
                           ({"queue": "mail"}, ["b"]), ({"word": "%"}, []),
                           ({"word": "ECHO 4", "state": "pending"},
                            ["j%d" % number for number in (*range(49, 39, -1), 4)])):
            self.assertEqual([job["id"] for job in self.look("/jobs", **asked)["jobs"]], ids, asked)
        sheet, shown = self.look("/job", id="j0"), json.loads(self.ok("show", "--json", "j0"))
        runs = [{name: run[name] for name in shown["runs"][0]} for run in sheet.pop("runs")]
        self.assertEqual((runs, sheet["env"]), (shown.pop("runs"), ["SECRET"]))
        self.assertEqual({**{name: sheet[name] for name in shown}, "env": shown["env"]}, shown)
        self.assertRegex(dict(sheet["facts"])["waits"], "its retry is due at .*; no worker runs")
        self.assertNotIn("value", json.dumps(sheet) + json.dumps(page))
        self.assertEqual(self.look("/job", id="j1")["output"]["text"], "x" * 10)
        self.assertIsNone(self.look("/job", id="j5")["output"])

    def test_output_comes_as_it_grows(self):
        """From where the tab has seen it, in whole characters; of a long one the end."""
        queue = self.queue()
        queue.enqueue("true", id="a")
        claim = self.claim(queue)
        text = "h\u00e9llo \u20ac\n".encode()
        self.serve(OUTPUT_SHOWN=1000)
        self.open()
        shown, seen = "", 0
        for at in range(len(text)):
            queue.add_output(claim.run, [(at, text[at:at + 1])], (0, 0))
            output = self.look("/job", id="a", shown=1, seen=seen)["output"]
            self.assertEqual((output["run"], output["from"]), (1, seen))
            shown, seen = shown + output["text"], output["seen"]
        self.assertEqual((shown.encode(), seen), (text, len(text)))
        self.settle(queue, claim, "failed", output=b"y" * 5000 + b"end \xff")
        output = self.look("/job", id="a")["output"]
        self.assertEqual(output["text"],
                         "[4005 bytes stand before this]\n" + "y" * 995 + "end \ufffd")
        self.assertEqual(self.look("/job", id="a", shown=2, seen=9)["output"]["from"], 0)

    def events(self):
        """A stream of statuses, as an open tab has it."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        self.addCleanup(connection.close)
        connection.sendall(("GET /events HTTP/1.1\r\nHost: localhost\r\nCookie: %s\r\n\r\n"
                            % self.cookie).encode())
        stream = connection.makefile("rb")
        self.addCleanup(stream.close)
        self.assertIn(b" 200 ", stream.readline())
        while stream.readline().strip():
            pass
        for line in stream:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    def test_the_status_comes_whenever_something_changes(self):
        queue = self.queue()
        queue.enqueue("true", id="a")
        self.serve()
        self.open()
        tabs = [self.events(), self.events()]
        for tab in tabs:
            status = next(tab)
            known = json.loads(self.ok("status", "--json"))
            self.assertEqual({**{name: status[name] for name in known}, "oldest_ready_seconds": 0},
                             {**known, "oldest_ready_seconds": 0})
            self.assertIn("no worker runs", status["warning"])
        self.run_next(queue, "failed")
        for tab in tabs:
            status = next(tab)
            while not status["minutes"]:  # the claim and the settle may be seen one by one
                status = next(tab)
            self.assertEqual(status["jobs"]["failed"], 1)
            self.assertEqual(status["minutes"][0][1:], ["failed", 1])
        queue.enqueue("true", queue=self.XSS[0].replace(" ", ""))
        self.assertIn(self.XSS[0], next(tabs[0])["queues"])

    def test_the_database_is_asked_only_when_it_has_changed(self):
        """For all tabs at once, and not at all where no tab is open."""
        queue, watch, asked = self.queue(), queuectl.Watch(), []
        ended = threading.Event()

        def run():
            with Queue(self.db) as own, contextlib.suppress(QueueError):
                watch.run(own)
            ended.set()

        def ask(own):
            asked.append(1)
            return dict(status(own))
        status = queuectl.page_status
        with mock.patch.multiple(queuectl, page_status=ask, LOOK=0.01, BEAT=0.1):
            threading.Thread(target=run, daemon=True).start()
            queue.enqueue("true")
            tabs = [watch.events(), watch.events()]
            first = [next(tab) for tab in tabs]
            self.assertEqual((first[0][:6], first[0]), (b"data: ", first[1]))
            calm = len(asked)
            for tab in tabs:
                self.assertEqual([next(tab) for _ in range(3)], [b":\n\n"] * 3)
            self.assertEqual(len(asked), calm)
            queue.enqueue("true")
            self.until(lambda: next(tabs[0]) != b":\n\n")
            self.assertEqual(len(asked), calm + 1)
            for tab in tabs:
                tab.close()
            self.assertEqual(watch.readers, 0)
            queue.enqueue("true")
            self.until(lambda: watch.status == b"")
            self.assertEqual(len(asked), calm + 1)
            queue.close()
            os.unlink(self.db)
            self.assertTrue(ended.wait(PATIENCE))

    def test_a_worker_that_dies_in_silence_is_seen(self):
        """The database does not say so: nobody is left to write it there."""
        supervisor = self.workers(1)
        self.serve()
        self.open()
        tab = self.events()
        pids = [supervisor.pid] + [info.pid for info in self.queue().workers()]
        while not next(tab)["workers"]:
            pass
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        while next(tab)["workers"]:
            pass

    def test_slow_clients_and_many_connections_hurt_nobody(self):
        process = self.serve(REQUEST_TIME=1.5)
        self.open()
        crowd = []
        try:
            for number in range(200):
                crowd.append(socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE))
                crowd[-1].sendall(b"GET / HT" if number % 2 else b"")
            self.assertEqual(self.look("/jobs")["jobs"], [])
            self.assertEqual(crowd[0].recv(9), b"")  # who was silent longest had to go
            drip = crowd[-1]  # a byte now and then is no request either
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    drip.sendall(b"x")
                    if select.select([drip], [], [], 0.05)[0]:
                        break
            self.assertFalse(drip.recv(999).startswith(b"HTTP/1.0 200"))
            self.assertEqual(self.look("/jobs")["jobs"], [])
        finally:
            for connection in crowd:
                connection.close()
        self.assertRegex(read_file(process.log), rb"\Aqueuectl: [^\n]+\n\Z")

    def test_where_it_listens(self):
        """On this machine only. Several serve at once, and a port has one."""
        self.serve()
        port = self.port
        self.open()
        if os.path.exists("/proc/net/tcp"):
            sockets = map(str.split, read_file("/proc/net/tcp").decode().splitlines())
            self.assertEqual([line[1] for line in sockets if line[3] == "0A"
                              and line[1].endswith(":%04X" % port)], ["0100007F:%04X" % port])
        self.assertIn("cannot listen on 127.0.0.1:%d" % port, self.refused("web", "--port", port))
        self.assertEqual(self.refused("web", "--port", "65536", code=2)[:9], "queuectl:")
        self.serve()
        self.open()

    def test_its_end(self):
        process = self.serve()
        self.open()
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(PATIENCE), 130)
        process = self.serve()
        os.unlink(self.db)
        self.assertEqual(process.wait(PATIENCE), 1)
        self.assertRegex(read_file(process.log),
                         rb"\Aqueuectl: [^\n]+ deleted or replaced; stopping\n\Z")

    def test_text_from_jobs_is_never_html(self):
        """It travels as JSON, which no browser takes for a page."""
        self.poison()
        self.serve()
        _, page = self.open()
        self.assertNotIn("owned", page)
        for path in ("/jobs", "/job?id=" + urllib.parse.quote(self.XSS[0]), "/jobs?state=<script>"):
            _, headers, body = self.request("GET", path)
            self.assertIn(headers["Content-Type"].partition(";")[0],
                          ("application/json", "text/plain"))
            self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
            self.assertIn("default-src 'none'", headers["Content-Security-Policy"])


class Chromium:
    """A headless browser over its debugging pipe (messages of JSON, each ended by a NUL)."""

    NAMES = ("chromium", "chromium-browser", "google-chrome")
    PATH = next(filter(None, map(shutil.which, NAMES)), None)

    def __init__(self, folder, width=1280, height=800):
        orders, answers = os.pipe(), os.pipe()

        def pipes():  # 3 is what it reads, 4 what it writes
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (orders[0], answers[1])]
            for end, number in zip(ends, (3, 4)):
                os.dup2(end, number)
        self.process = subprocess.Popen(
            [self.PATH, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-dev-shm-usage", "--user-data-dir=" + folder,
             "--window-size=%d,%d" % (width, height), "--remote-debugging-pipe", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            close_fds=False, preexec_fn=pipes, start_new_session=True)
        os.close(orders[0])
        os.close(answers[1])
        self.orders, self.answers = orders[1], answers[0]
        self.count, self.buffer, self.session, self.complaints = 0, b"", None, []
        pages = [target for target in self.call("Target.getTargets")["targetInfos"]
                 if target["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=pages[0]["targetId"],
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(domain + ".enable")

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.orders, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            text = json.dumps(answer.get("params"))
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded") \
                    and "Failed to load resource" not in text:  # what was refused
                self.complaints.append(text)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise AssertionError("%s: %s" % (method, answer["error"]))
                return answer["result"]

    def read(self):
        while b"\0" not in self.buffer:
            if not select.select([self.answers], [], [], PATIENCE)[0]:
                raise AssertionError("the browser says nothing")
            data = os.read(self.answers, 1 << 16)
            if not data:
                raise AssertionError("the browser has ended")
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def js(self, text):
        found = self.call("Runtime.evaluate", expression=text, awaitPromise=True,
                          returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError("%s: %s" % (text, found["exceptionDetails"]))
        return found["result"].get("value")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      text={"Enter": "\r"}.get(key, key if len(key) == 1 else ""),
                      windowsVirtualKeyCode={"Enter": 13, "Escape": 27, "Tab": 9}.get(key, 0))

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.session = None
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.orders)
        os.close(self.answers)


@unittest.skipUnless(Chromium.PATH, "needs Chromium: apt-get install chromium")
class Browser(WebCase):
    """The page in a real browser. Nothing in here reloads it."""

    def setUp(self):
        super().setUp()
        self.server = self.serve()
        self.browser = Chromium(self.path("chromium"))
        self.addCleanup(self.browser.close)

    def visit(self):
        self.browser.call("Page.navigate", url=self.url)
        self.seen("!!status && document.querySelector('#states b')")
        self.browser.js("window.same = true")  # until it is loaded anew

    def seen(self, condition):
        """Wait until this is so in the page."""
        self.until(lambda: self.browser.js("!!(%s)" % condition), "never: " + condition)

    def text(self, selector):
        return self.browser.js("[...document.querySelectorAll(%r)].map(each => each.innerText)"
                               % selector)

    def click(self, selector):
        self.seen("document.querySelector(%r)" % selector)
        self.browser.js("document.querySelector(%r).click()" % selector)

    def fill(self, **values):
        """Fill in the dialog that is open, and send it."""
        for name, value in values.items():
            self.seen("document.querySelector('[name=%s]')" % name)
            self.browser.js("document.querySelector('[name=%s]').value = %s"
                            % (name, json.dumps(value)))
        self.click("dialog .main")

    def done(self):
        self.assertTrue(self.browser.js("window.same"))
        self.assertEqual(self.browser.complaints, [])

    def test_a_job_from_its_start_to_its_retry(self):
        """Load, enqueue, follow, filter, open, edit, retry: each is seen on the page."""
        self.visit()
        self.assertEqual(self.browser.js("location.search"), "")  # the ticket has gone
        self.click("[data-act=enqueue]")
        meeting = self.meeting()
        self.fill(command="echo before; %s; echo after; exit 3" % meeting.here, id="job",
                  queue="mail")
        self.seen("document.querySelector('#sheet h2')?.innerText === 'job'")
        self.seen("document.querySelector('dd.waits')?.innerText.includes('no worker runs')")
        with Queue(self.db) as queue:
            queue.edit("job", max_retries=1)
        self.workers(1)
        meeting.arrived()
        self.seen("document.querySelector('#output')?.innerText.trim() === 'before'")
        self.seen("document.querySelector('#workers code')?.innerText === 'job'")
        self.seen("document.querySelector('#states .processing b').innerText === '1'")
        meeting.let_go()
        self.seen("document.querySelector('#output')?.innerText.trim() === 'before\\nafter'")
        self.seen("document.querySelector('dd.error')?.innerText === 'exit code 3: after'")
        self.seen("document.querySelectorAll('#chart rect.failed').length === 1")
        self.browser.key("Escape")
        self.seen("document.querySelector('#sheet').hidden")
        self.add("other", "true", delay=999)
        self.seen("document.querySelectorAll('#jobs a').length === 2")
        self.click("#states .dead")
        self.seen("document.querySelectorAll('#jobs a').length === 1")
        self.assertIn("job", self.text("#jobs code")[0])
        self.click("#jobs a")
        self.click("#sheet [data-act=edit]")
        self.fill(command="echo again")
        self.seen("document.querySelector('#sheet pre').innerText === 'echo again'")
        self.click("#sheet [data-act=retry]")
        self.seen("document.querySelector('#sheet .row .state').innerText === 'completed'")
        self.seen("document.querySelector('#output').innerText.trim() === 'again'")
        self.assertEqual(len(self.text(".run")), 2)
        self.click(".run[data-key='1']")
        self.seen("document.querySelector('#output').innerText.includes('before')")
        self.done()

    def test_what_is_done_to_queues_and_jobs(self):
        self.add("a", "true", queue="mail")
        self.visit()
        self.click("#queues [data-act=pause]")
        self.seen("document.querySelector('#queues').innerText.includes('paused')")
        self.click("#switch [data-act=pause]")
        self.seen("document.querySelector('.warn')?.innerText.includes('all queues are paused')")
        self.click("#switch [data-act=resume]")
        self.click("#queues [data-act=resume]")
        self.click("#queues [data-act=limit]")
        self.fill(number="many")  # is refused, and says why
        self.seen("document.querySelector('#refused')?.innerText.includes('not a number')")
        self.fill(number="2")
        self.seen("document.querySelector('#queues').innerText.includes('limit 2')")
        self.click("#queues [data-act=limit]")
        self.fill(number="")
        self.seen("!document.querySelector('#queues').innerText.includes('limit 2')")
        with Queue(self.db) as queue:
            self.assertEqual((queue.limits(), queue.paused()), ({}, []))
            self.click("#jobs a")
            self.click("#sheet [data-act=cancel]")
            self.click("dialog [data-act=back]")  # it asks
            self.assertEqual(queue.get("a").state, "pending")
            self.click("#sheet [data-act=cancel]")
            self.click("dialog .main")
            self.seen("document.querySelector('#sheet .row .state').innerText === 'cancelled'")
            queue.enqueue("false", id="b", max_retries=1)
            self.run_next(queue, "failed")
            self.assertEqual(queue.get("b").state, "dead")
            self.browser.js("location.hash = '#job=b&state=dead'")
            self.click("#sheet [data-act=purge]")
            self.click("dialog .main")
            self.seen("!document.querySelector('#jobs a')")
            self.refuses("there is no job", queue.get, "b")
        self.done()

    def test_place_and_focus_stay(self):
        """While the list grows above: the row that has the focus, the search, the scrolling."""
        with Queue(self.db) as queue:
            queue.enqueue_many([{"command": "echo %d" % n, "id": "j%02d" % n} for n in range(70)])
            self.visit()
            self.seen("document.querySelectorAll('#jobs a').length === 50")
            self.click("#pages a")
            self.seen("document.querySelectorAll('#jobs a').length === 20")
            self.click("#pages a")
            self.seen("document.querySelectorAll('#jobs a').length === 50")
            self.browser.js("document.querySelectorAll('#jobs a')[5].focus()")
            self.browser.js("document.querySelector('main').scrollTop = 40")
            queue.enqueue("true", id="new")
            self.seen("document.querySelector('#jobs code').innerText === 'new'")
            self.assertIn("j64", self.browser.js("document.activeElement.innerText"))
            self.browser.key("Enter")
            self.seen("document.querySelector('#sheet h2')?.innerText === 'j64'")
            self.assertEqual(self.browser.js("document.activeElement.id"), "sheet")
            self.browser.key("Escape")
            self.seen("document.querySelector('#sheet').hidden")
            self.browser.key("/")
            self.assertEqual(self.browser.js("document.activeElement.id"), "word")
            for letter in "echo 7":
                self.browser.key(letter)
            self.seen("document.querySelectorAll('#jobs a').length === 1")
            queue.enqueue("echo 77")
            self.seen("document.querySelectorAll('#jobs a').length === 2")
            self.assertEqual(self.browser.js("document.activeElement.value"), "echo 7")
        self.done()

    def test_text_from_jobs_is_only_text(self):
        self.poison()
        self.visit()
        self.seen("document.querySelectorAll('#jobs a').length === 4")
        for text in self.XSS:
            word = re.sub(r"\s", "", text)
            self.browser.js("location.hash = '#' + new URLSearchParams({job: %s, queue: %s})"
                            % (json.dumps(word), json.dumps(word)))
            self.seen("document.querySelector('#sheet h2')?.innerText === %s" % json.dumps(word))
            self.seen("document.querySelector('#output')?.innerText.trim() === %s"
                      % json.dumps(text))
            self.seen("document.querySelector('#queues a')")
        self.assertNotIn("owned", self.browser.js("document.title"))
        self.assertEqual(self.browser.js(
            "document.querySelectorAll('img, script, #sheet svg').length"), 1)
        # And if it were, it would not run.
        self.assertIn("refused", self.browser.js(
            "try { document.body.innerHTML = '<b>x</b>'; 'done' } catch (error) { 'refused' }"))

    def test_it_fits(self):
        """Nothing is wider than a telephone; on a desk nothing has to be scrolled to."""
        with Queue(self.db) as queue:
            queue.enqueue_many([{"command": "echo " + "long " * 50, "queue": "q%d" % (n % 9),
                                 "id": "x" * 200 + str(n)} for n in range(70)])
        self.visit()
        for width, height in ((360, 740), (1280, 800)):
            self.browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                              deviceScaleFactor=1, mobile=width < 500)
            for place in ("", "#job=" + "x" * 200 + "1"):
                self.browser.js("location.hash = %r" % place)
                self.seen("document.querySelector('#sheet').hidden === %s" % json.dumps(not place))
                self.assertLessEqual(self.browser.js("document.documentElement.scrollWidth"), width)
        self.assertLessEqual(self.browser.js("document.documentElement.scrollHeight"), 800)
        self.done()


@unittest.skipIf(sys.platform == "win32", "the recipes are for sh")
class Recipes(Everyday):
    """The README: its recipes do what they say, in an empty home, and its transcripts are right."""

    def blocks(self):
        """(heading of its section, kind, text) of the README's code blocks."""
        path, blocks, section, fence = os.path.join(HERE, "README.md"), [], None, None
        if not os.path.exists(path):
            self.skipTest("there is no README.md")
        for line in read_file(path).decode().splitlines(True):
            if line.startswith("```"):
                fence = line[3:].strip() if fence is None else None
                if fence:
                    blocks.append((section, fence, ""))
            elif fence:
                blocks[-1] = section, fence, blocks[-1][2] + line
            elif line.startswith("## "):
                section = line[3:].strip()
        return blocks

    def test_recipes(self):
        """Each sh block of the section, on its own and in each shell that is here, ends with 0."""
        blocks = [text for section, kind, text in self.blocks()
                  if section == "Recipes" and kind in ("sh", "bash")]
        self.assertTrue(blocks, "the section Recipes has no sh block")
        for number, block in enumerate(blocks, 1):
            for shell in filter(shutil.which, ("sh", "bash", "dash", "zsh")):
                if not block.startswith("# not run:"):
                    with self.subTest(block, shell=shell):
                        self.run_block("recipe%d-%s" % (number, shell), block, shell)

    def test_the_launcher(self):
        """Hints name it, whatever stands in the folder; where it is not meant, its file."""
        launcher = next(text for _, kind, text in self.blocks()
                        if kind == "sh" and "cat >~/.local/bin/queuectl" in text)
        self.run_block("launcher", launcher + """
            mkdir queuectl; queuectl() { ~/.local/bin/queuectl "$@"; }
            queuectl enqueue true 2>&1 | grep -F '(start one: queuectl worker start)'
            queuectl completion bash | grep "python.*/share/queuectl/queuectl.py completion"
            queuectl worker start --detach
            grep "end it: python.*/share/queuectl/queuectl.py .*worker stop" \
                .local/state/*/*/worker.log
            queuectl worker stop
            """, "sh")

    def test_transcripts(self):
        """Each console block shows what is seen (see Case.play)."""
        self.addCleanup(self.no_workers_left)
        shutil.copy(SCRIPT, self.dir)
        for number, (_, kind, text) in enumerate(self.blocks()):
            if kind == "console":
                with self.subTest(text):
                    self.db = self.path("%d.db" % number)
                    self.env["QUEUECTL_DB"] = os.environ["QUEUECTL_DB"] = self.db
                    self.play(text)

    def run_block(self, name, block, shell):
        """Run a script in an empty home; it must end with 0."""
        home = self.path(name)
        os.makedirs(home, 0o700)
        shutil.copy(SCRIPT, home)
        env = dict(self.env, HOME=home, PATH=self.programs())
        for key in ("QUEUECTL_DB", "XDG_STATE_HOME"):
            env.pop(key, None)
        with open(self.path(name + ".log"), "wb") as log:
            process = subprocess.Popen([shell, "-e"], stdin=subprocess.PIPE, stdout=log,
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


# -- smoke: what must hold on every system, Windows included --------------------------------

JOB = r'''
"""What a job of class Smoke does: job.py WORD ..., in the folder of this file."""
import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def path(name):
    return os.path.join(HERE, name)


def hold(name):
    """Lock a file for as long as this process lives; False where another process has."""
    fd = os.open(path(name), os.O_RDWR | os.O_CREAT)
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return False
    return fd


def put(data):
    while data:
        data = data[os.write(1, data):]


def stay(name, seconds, children):
    """Be alive until NAME.go is there, or for so long; with so many generations of children."""
    if not hold(name):
        open(path(name + ".two"), "w").close()
    if children:
        subprocess.Popen([sys.executable, __file__, "stay", name + "+", "60", str(children - 1)])
    open(path(name + ".here"), "w").close()
    end = time.monotonic() + seconds
    while not os.path.exists(path(name + ".go")) and time.monotonic() < end:
        time.sleep(0.02)


def main(word, *words):
    if os.name == "nt":
        import msvcrt
        msvcrt.setmode(1, os.O_BINARY)
    if word == "args":
        put(json.dumps(words).encode())
    elif word == "exit":
        os._exit(int(words[0]))
    elif word == "lines":
        put(b"".join(b"line %d\n" % number for number in range(int(words[0]))))
    elif word == "print":  # hexadecimal bytes; before each but the first it waits for its file
        for number, text in enumerate(words):
            if number:
                stay("print-%d" % number, 60, 0)
            put(bytes.fromhex(text))
    elif word == "stay":
        stay(words[0], float(words[1]), int(words[2]))
    elif word == "leave":  # a child in the background
        subprocess.Popen([sys.executable, __file__, "stay", words[0], "60", "0"])
        while not os.path.exists(path(words[0] + ".here")):
            time.sleep(0.02)


if __name__ == "__main__":
    main(*sys.argv[1:])
'''


WINE = sys.platform == "win32" and hasattr(ctypes.windll.ntdll, "wine_get_version")


class Smoke(Case):
    """Nothing of Unix, and nothing of Windows: jobs are Python scripts, processes are killed in
    the way that the system has, and whether a process lives is told by a lock that it holds.
    QUEUECTL_SMOKE_KILLS=10 repeats the kills."""

    KILLS = int(os.environ.get("QUEUECTL_SMOKE_KILLS", 1))
    LIMIT = 65536  # output_limit
    TEXT = b"a\r\nb\n\x1ac\x00\xff\xfe\r\r\n"  # no text, and what text modes change

    def setUp(self):
        super().setUp()
        with open(self.path("job.py"), "w") as file:
            file.write(JOB)
        self.hold = runpy.run_path(self.path("job.py"))["hold"]
        self.numbers = itertools.count()
        self.addCleanup(self.end_workers)
        self.ok("config", "set", "kill_grace", "2s")

    def end_workers(self):
        self.main("worker", "stop", "--now", "--timeout", "20s")
        for info in self.workers_now():
            self.kill(info["pid"])

    # Ways to call it. What a process prints goes to files: a pipe would stay open for as long
    # as a background worker that has inherited it.

    def spawn(self, *words, stdin=None):
        process = subprocess.Popen(
            [sys.executable, SCRIPT] + [str(word) for word in words], stdin=stdin,
            stdout=subprocess.PIPE if stdin == subprocess.PIPE else self.file("out"),
            stderr=self.file("err"), env=self.env)
        self.addCleanup(self.reap, process)
        return process

    def file(self, kind):
        file = open(self.path("%s-%d" % (kind, next(self.numbers))), "w+b", buffering=0)
        self.addCleanup(file.close)
        setattr(self, kind, file.name)
        return file

    @staticmethod
    def reap(process):
        process.kill()
        process.wait()

    def call(self, *words, code=0):
        """(stdout as bytes, stderr as text) of a command line, which must end with this code."""
        process = self.spawn(*words, stdin=subprocess.DEVNULL)
        out, err = self.out, self.err
        got = process.wait(PATIENCE)
        err = read_file(err).decode("utf-8", "replace").replace("\r\n", "\n")
        if code is not None:
            self.assertEqual(got, code, "%s: %s" % (words, err))
        self.assertNotIn("Traceback", err)
        return read_file(out), err

    def add(self, id, *words, **options):
        """Enqueue a job that runs job.py."""
        flags = ["--%s=%s" % (key.replace("_", "-"), value) for key, value in options.items()]
        self.ok("enqueue", "--id", id, "--cwd", self.dir, *flags,
                "--", sys.executable, self.path("job.py"), *words)

    def start_workers(self, *words):
        process = self.spawn("worker", "start", *words)
        self.until(lambda: self.workers_now() or process.poll() is not None)
        self.assertIsNone(process.poll(), read_file(self.err))
        return process

    def workers_now(self):
        return json.loads(self.ok("worker", "list", "--json"))

    @staticmethod
    def kill(pid):
        with contextlib.suppress(OSError):
            os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # TerminateProcess

    def here(self, name):
        """Await the process, which leaves a file once it holds its lock; then remove that."""
        def met():
            with contextlib.suppress(OSError):  # on Windows, also while it is being made
                os.unlink(self.path(name + ".here"))
                return True
        self.until(met, name + " did not come")

    def go(self, name):
        open(self.path(name + ".go"), "w").close()

    def lives(self, name):
        fd = self.hold(name)
        if fd:
            os.close(fd)
        return not fd

    def all_gone(self, *names):
        """At most a second later, nobody lives."""
        end = time.monotonic() + 1
        while any(map(self.lives, names)) and time.monotonic() < end:
            time.sleep(0.02)
        self.assertEqual([name for name in names if self.lives(name)], [])

    # The tests.

    def test_drain_and_exit_codes(self):
        self.add("good", "exit", "0")
        self.add("bad", "exit", "7", max_retries=1)
        self.add("far", "exit", "0", run_at="9999-12-31T00:00:00Z")
        self.call("worker", "start", "--drain", "--count", "2")
        jobs = {job["id"]: job for job in json.loads(self.call("list", "--json")[0])}
        self.assertEqual({id: (job["state"], job["exit_code"]) for id, job in jobs.items()},
                         {"good": ("completed", 0), "bad": ("dead", 7), "far": ("pending", None)})
        self.assertEqual(jobs["far"]["run_at"], "9999-12-31T00:00:00.000Z")
        self.assertIn(b"far", self.call("list")[0])
        self.call("wait", "good")
        self.call("wait", "bad", code=1)
        self.call("wait", "far", "--timeout", "0.1s", code=124)
        self.call("nonsense", code=2)
        for words in (("show", "nobody"), ("wait", "nobody"), ("cancel", "nobody"),
                      ("--db", self.path("no", "folder", "q.db"), "status")):
            out, err = self.call(*words, code=1)
            self.assertEqual(out, b"")
            self.assertRegex(err, r"\Aqueuectl: [^\n]+\n\Z")

    def test_output_is_kept_byte_for_byte(self):
        self.add("text", "print", self.TEXT.hex())
        self.add("few", "lines", "200")
        self.add("many", "lines", "100000")
        self.call("worker", "start", "--drain")
        lines = b"".join(b"line %d\n" % number for number in range(100000))
        self.assertEqual(self.call("logs", "text")[0], self.TEXT)
        self.assertEqual(self.call("logs", "few")[0], lines[:lines.index(b"line 200\n")])
        kept = self.call("logs", "many")[0]
        first, last = lines[:self.LIMIT // 4], lines[-(self.LIMIT - self.LIMIT // 4):]
        self.assertTrue(kept.startswith(first) and kept.endswith(last), len(kept))
        self.assertRegex(kept[len(first):-len(last)].decode(), r"\A\n\[[^\n]*\b%d bytes\b[^\n]*\n\Z"
                         % (len(lines) - self.LIMIT))

    def test_follow(self):
        """What a job prints arrives while it runs, once, and exactly."""
        self.start_workers()
        self.add("job", "print", self.TEXT.hex(), b"and more\n".hex(), self.TEXT.hex())
        process = self.spawn("logs", "-f", "job")
        out = self.out
        for number, expected in enumerate((self.TEXT, self.TEXT + b"and more\n"), 1):
            self.until(lambda: len(read_file(out)) >= len(expected), "it does not arrive")
            self.assertEqual(read_file(out), expected)
            self.here("print-%d" % number)
            self.go("print-%d" % number)
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertEqual(read_file(out), self.TEXT + b"and more\n" + self.TEXT)
        self.assertEqual(self.call("logs", "job")[0], read_file(out))

    def test_a_timeout_ends_the_whole_tree(self):
        """Also where the leader ends by itself before it is killed."""
        seconds = 10 if sys.platform == "win32" else 2  # to start eight processes
        self.start_workers("--count", "2")
        for id, stays in (("long", 60), ("short", seconds + 1)):
            self.add(id, "stay", id, str(stays), "2", timeout=seconds, max_retries=1)
        for id in ("long", "short"):
            for name in (id, id + "+", id + "++"):
                self.here(name)
            self.assertTrue(self.lives(id + "++"))
        for id in ("long", "short"):
            self.assertIn("timed out", self.until_state(id, "dead").last_error)
            self.all_gone(id, id + "+", id + "++")
        self.assertEqual(len(self.workers_now()), 2)

    def test_cancel_and_stop_now_end_the_whole_tree(self):
        process = self.start_workers()
        self.add("one", "stay", "one", "60", "1")
        self.here("one+")
        self.call("cancel", "one")
        self.until_state("one", "cancelled")
        self.all_gone("one", "one+")
        self.add("two", "stay", "two", "60", "1")
        self.here("two+")
        self.call("worker", "stop", "--now", "--timeout", "30s")
        self.all_gone("two", "two+")
        self.assertEqual(process.wait(PATIENCE), 0)
        job = self.job("two")
        self.assertEqual((job.state, job.attempts), ("pending", 0))

    def test_what_a_completed_job_left_in_the_background_goes_on(self):
        self.start_workers()
        for id in ("a", "b"):
            self.add(id, "leave", id)
            self.until_state(id, "completed")
        self.assertEqual([self.lives("a"), self.lives("b")], [True, True])
        for id in ("a", "b"):
            self.go(id)
            self.until(lambda: not self.lives(id))

    def test_rescue_after_kills(self):
        """A killed worker, supervisor or both cost a run, and there are never two copies."""
        for victims in ("worker", "supervisor", "both"):
            for number in range(self.KILLS):
                with self.subTest(victims, number=number):
                    self.kill_in_mid_job(victims, "%s-%d" % (victims, number))

    def kill_in_mid_job(self, victims, id):
        process = self.start_workers()
        self.add(id, "stay", id, "60", "1")
        self.here(id)
        self.here(id + "+")
        if victims != "supervisor":
            self.kill(self.workers_now()[0]["pid"])
        if victims != "worker":
            process.kill()
        if victims == "both":
            process.wait()
            process = self.start_workers()
        if victims != "supervisor":  # the worker of a killed one finishes its job
            self.here(id)
            self.here(id + "+")
        self.assertTrue(self.lives(id))
        self.go(id)
        self.go(id + "+")
        self.until_state(id, "completed")
        self.assertEqual([run.outcome for run in self.runs(id)],
                         ["completed"] if victims == "supervisor" else ["lost", "completed"])
        self.assertEqual([name for name in os.listdir(self.dir) if name.endswith(".two")], [])
        self.call("worker", "stop", "--timeout", "30s")
        process.wait(PATIENCE)
        self.until(lambda: not self.workers_now())

    def test_detach_ensure_and_stop(self):
        log = self.path("w.log")
        self.call("worker", "start", "--detach", "--log", log)
        self.call("worker", "start", "--ensure", "--count", "2", "--log", log)
        self.assertEqual(len(self.workers_now()), 2)
        self.call("worker", "start", "--ensure", "--count", "2", "--log", log)
        self.assertEqual(len(self.workers_now()), 2)
        self.add("job", "stay", "job", "60", "0")
        self.here("job")
        process = self.spawn("worker", "stop")
        self.until(lambda: len(self.workers_now()) == 1)  # the idle one
        self.assertIsNone(process.poll())
        self.go("job")
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertEqual(self.workers_now(), [])
        self.assertEqual(self.job("job").state, "completed")
        self.assertIn(b"job job completed", read_file(log))

    def test_the_log_is_rotated(self):
        log = self.path("w.log")
        with open(log, "wb") as file:
            file.write(b"x" * 2 ** 21)
        self.call("worker", "start", "--detach", "--count", "2", "--log", log)
        for number in range(4):
            self.add("job%d" % number, "exit", "0")
            self.until_state("job%d" % number, "completed")
        self.call("worker", "stop")
        self.assertGreaterEqual(os.path.getsize(log + ".1"), 2 ** 21)
        kept = read_file(log) + read_file(log + ".1")[2 ** 21:]
        self.assertLess(os.path.getsize(log), 2 ** 20)
        for number in range(4):
            self.assertIn(b"job job%d completed" % number, kept)

    def test_words_arrive_as_they_are(self):
        words = ["a&b", "c|d", "<e", ">f", "g^h", "^^", "100%", "%", "%NOT_SET%", 'say "hi"', '"',
                 "two words", "", "'", "back\\", "back\\\\", 'x\\"y', '" & echo broken & "', "!z!",
                 "(p)", "a;b,c=d", "*", "~", "$HOME", "`id`", "\\\\server\\a share\\", "@q", "#r"]
        if not WINE:  # whose cmd expands it, however it is quoted
            words.append("%OS%")
        alone = [word for word in words if '"' in word or "%" in word]
        self.add("all", "args", *words)
        for word in alone:
            self.add("alone-%d" % alone.index(word), "args", word)
        self.call("worker", "start", "--drain")
        self.assertEqual(json.loads(self.output("all")), words)
        self.assertEqual([json.loads(self.output("alone-%d" % number))
                          for number in range(len(alone))], [[word] for word in alone])
        self.assertNotIn("f", os.listdir(self.dir))

    def test_a_closed_stdout_ends_quietly(self):
        self.ok("enqueue", "--file", "-", stdin=b"\n".join(
            [b'{"command": "echo %s", "delay": 3600}' % (b"x" * 500)] * 500))
        process = self.spawn("list", "--json", stdin=subprocess.PIPE)
        process.stdin.close()
        self.assertEqual(process.stdout.read(1), b"[")
        process.stdout.close()
        self.assertEqual((process.wait(PATIENCE), read_file(self.err)), (0, b""))


# All of it, by default in a few processes at a time: most tests wait for something.


def run_all(at_once=3):
    """Run each class of tests in a process of its own; the exit code."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    def run(name):
        done = subprocess.run([sys.executable, "-W", "error", os.path.abspath(__file__), name],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        # 5: all of them were skipped (since Python 3.12).
        return done.returncode if done.returncode != 5 else 0, \
            done.stdout.decode("utf-8", "replace")

    start, total, failed = time.monotonic(), 0, []
    suites = {name: unittest.defaultTestLoader.loadTestsFromTestCase(found).countTestCases()
              for name, found in globals().items()
              if isinstance(found, type) and issubclass(found, unittest.TestCase)}
    with ThreadPoolExecutor(at_once) as pool:
        # The longest first, by the number of their tests: so the last ones end together.
        runs = {pool.submit(run, name): name
                for name in sorted(suites, key=suites.__getitem__, reverse=True) if suites[name]}
        try:
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
        except KeyboardInterrupt:
            for waiting in runs:
                waiting.cancel()
            print("interrupted; the tests that run now end what they have started")
            return 130
    print("Ran %d tests in %.1f s: %s" % (
        total, time.monotonic() - start, "FAILED in " + ", ".join(failed) if failed else "OK"))
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        unittest.main(catchbreak=True)  # Ctrl-C: once this test has ended what it started
    sys.exit(run_all())
