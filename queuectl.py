#!/usr/bin/env python3
"""queuectl: a durable job queue for shell commands, in one file.

    queuectl.py enqueue 'tar czf /backup/etc.tgz /etc'   # prints the job's id
    queuectl.py worker start --count 2                   # Ctrl-C or `worker stop` ends it
    queuectl.py status | list | show ID | logs ID        # what happened
    queuectl.py COMMAND --help                           # every command has an example

A job is `pending`, `processing`, `completed`, `dead` or `cancelled`:

    enqueue -> pending --claim--> processing --exit 0--> completed
                  ^                   |
                  +-- failed, attempts < max_retries: run_after = now + backoff_base ** attempts
                                      |
                                      +-- failed, attempts >= max_retries --> dead
                  ^                                                            |
                  +-------------------- dlq retry, attempts = 0 ---------------+

What it promises, and by what means:

  - An acknowledged job is on disk: `enqueue` prints an id after an fsynced commit.
  - One claim per job: claim and settle are BEGIN IMMEDIATE transactions, and a settle is
    fenced by the number of its run, which is never used twice.
  - A worker is alive while it holds a kernel lock on a file of its own. No heartbeat, no
    lease, no pid file, so no clock and no reused pid can make a live worker look dead.
  - Never two copies of a job at once: whoever takes back a dead worker's job first ends
    its process tree, which is known by three proofs: an inherited lock, its process group, and
    its environment.
  - A worker waits for what happens in one place, where its job's end and output,
    signals, orders and wake-ups all arrive. An order is the size of a lock file; a wake-up is a
    hint, and what a lost one should have told is found by a worker within a second.

Exit codes: 0 done; 1 refused or failed; 2 usage; 124 `--timeout` ran out; 130 interrupted.

The file is built bottom-up, in rooms: errors, model, platform, schema, database, queue, runner,
workers, clients, output, web, commands, main. A room calls only rooms above it; only database and
queue execute SQL; only the workers' room joins queue and runner.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import itertools
import json
import math
import os
import signal
import sqlite3
import stat
import sys
import time
from datetime import datetime, timedelta

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO, Callable, Iterable, Iterator, Mapping, NoReturn
    from typing import Dict, Optional, Sequence, Tuple, TypeVar
    T = TypeVar("T")

__version__ = "1.0.0"
__all__ = ["Job", "Queue", "QueueError", "Run", "WorkerInfo", "main"]


# -- errors -------------------------------------------------------------------------------

class QueueError(Exception):
    """The user's problem: one line that says what is wrong and what to do about it."""

    exit_code = 1


class UsageError(QueueError):
    """The command line itself is wrong."""

    exit_code = 2


class TimeoutExpired(QueueError):
    """The caller's `--timeout` ran out before what it waited for came about."""

    exit_code = 124


class DatabaseUnavailable(QueueError):
    """The database cannot be used now and may be again: full disk, I/O error, busy, or this
    machine is short of something."""


class DatabaseBusy(DatabaseUnavailable):
    """Another program holds the database."""


# Of descriptors, processes, memory, or room on a disk.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)


# -- model --------------------------------------------------------------------------------

STATES = ("pending", "processing", "completed", "dead", "cancelled")
VIEWS = ("failed", "scheduled", "blocked")  # of pending; nothing stores them
ENDED = ("completed", "dead", "cancelled")

# Why a job is not handed out (column `hold`). The indexes of jobs are told apart by this number:
# the words of `state` would cost each insert another 0.8 us.
READY, SCHEDULED, RETRYING, BLOCKED = range(4)  # pending
RUNNING, OVER = -1, -2
HOLD_VIEWS = {SCHEDULED: "scheduled", RETRYING: "failed", BLOCKED: "blocked"}

# Orders to a worker. They only ever rise.
RUN, DRAIN, NOW = range(3)

DEFAULT_QUEUE = "default"
DEAD_JOB = "QUEUECTL_DEAD_JOB"  # in the environment of what on_dead enqueues
DEAD_COMMAND_LIMIT = 30 * 1024  # characters, of up to 4 bytes: it has to fit the environment
EVERY_QUEUE = "*"  # among the paused ones
PAGE = 1000  # rows a read transaction may last, so that no reader pins the WAL
MAX_TEXT = 128 * 1024  # bytes; Linux's MAX_ARG_STRLEN, the limit for one argument
MAX_LINE = 8100  # characters; cmd takes 8191, with the words that call it
LEAST_EPOCH = 10 ** 8  # 1973: a smaller number is hardly meant as a time
EPOCH = datetime(1970, 1, 1)
MAX_EPOCH = 253402300799  # 9999-12-31T23:59:59Z, the last second that ISO 8601 can name
CYCLE = 146097 * 86400  # seconds of 400 years: after them, the calendar is the same again
DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
BASE32 = "0123456789abcdefghjkmnpqrstvwxyz"
SIZE_UNITS = {"": 1, "b": 1, "k": 1024, "kb": 1024, "kib": 1024,
              "m": 1024 ** 2, "mb": 1024 ** 2, "mib": 1024 ** 2}


class Record:
    """A row. Its attributes are the annotated names of the subclass."""

    KEYS: tuple[str, ...] = ()  # what as_dict() shows

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {key: getattr(self, key) for key in self.KEYS}

    def __repr__(self) -> str:
        inside = ", ".join("%s=%r" % field for field in self.__dict__.items())
        return "%s(%s)" % (type(self).__name__, inside)


class Job(Record):
    """A job as `list --json` prints it, and what the queue knows of it besides. Times are
    ISO 8601 in UTC; `timeout` is in seconds."""

    id: str
    command: str
    state: str
    view: str  # the state as people see it: `failed`, `scheduled`, `blocked` are pending
    queue: str
    priority: int
    attempts: int
    max_retries: int
    timeout: float | None
    run_at: str | None
    cwd: str | None
    env: dict[str, str]
    after: list[str]
    unique: str | None
    created_at: str
    updated_at: str
    started_at: str | None
    finished_at: str | None
    locked_by: str | None
    locked_at: str | None
    exit_code: int | None
    last_error: str | None

    seq: int
    hold: int
    run: int | None
    run_after: float | None
    cancel: int


class Run(Record):
    """One execution of a job. `number` counts the runs of this job from 1; `run` is unique
    in the database. `outcome` is None while it runs."""

    run: int
    number: int
    worker: str
    started_at: str
    finished_at: str | None
    exit_code: int | None
    signal: int | None
    outcome: str | None
    error: str | None


class WorkerInfo(Record):
    """A live worker process, or (slot 0) a live supervisor of `count` workers.

    `queues` is None when it serves all. `job` is the id of the job that it runs since
    `job_started_at`. `stop` is the order that `worker stop` left for it, or that its supervisor
    follows: the size of whose lock file says so, since no file is quicker to write."""

    name: str
    supervisor: str
    slot: int
    count: int
    pid: int
    queues: list[str] | None
    started_at: str
    job: str | None
    job_started_at: str | None
    stop: int
    via: str | None


class Claim(Record):
    """A job that has been handed to a worker, as one run."""

    run: int
    seq: int
    id: str
    command: str
    attempts: int
    max_retries: int
    timeout: float
    kill_grace: float
    output_limit: int
    queue: str
    cwd: str | None
    env: dict[str, str]
    started_at: float


class Result(Record):
    """How a run ended: what `Queue.turn` settles."""

    run: int
    seq: int
    outcome: str
    exit_code: int | None
    signal: int | None
    error: str | None
    output: list[tuple[int, bytes]] | None
    finished_at: float
    seconds: float


class Settled(Record):
    """What a result made of its job. `run_after` is set when it will run again later;
    `awakened` are queues in which jobs can run now, or will then."""

    state: str
    run_after: float | None
    awakened: list[str]


class StartOptions(Record):
    """What `worker start` was asked for."""

    path: str
    count: int
    drain: bool
    queues: list[str]
    via: str | None
    quiet: bool
    log: str | None
    name: str  # of the supervisor
    identity: str | None = None  # of the database, once it has been seen


for _record, _hidden in ((Job, ("seq", "hold", "run", "run_after", "cancel")),
                         (Run, ("run", "number")), (WorkerInfo, ("stop", "count", "via"))):
    _record.KEYS = tuple(key for key in _record.__annotations__ if key not in _hidden)


def new_id() -> str:
    """Six random characters (30 bits) that are easy to read aloud and to type:
    Crockford's base 32 (no i, l, o, u)."""
    return _base32(int.from_bytes(os.urandom(4), "big"), 6)


def new_ids() -> Iterator[str]:
    """A random id, then ids that count up from random ones: many ids in the order of their
    index cost less, and hit those of others less often, than as many random ones."""
    yield new_id()
    first = int.from_bytes(os.urandom(4), "big")
    while True:
        head = _base32(first, 5)
        for digit in BASE32:
            yield head + digit
        first += 1


def _base32(number: int, digits: int) -> str:
    return "".join([BASE32[number >> shift & 31] for shift in range(5 * digits - 5, -1, -5)])


called_as = ["queuectl.py"]  # the words that hints begin with: the program, and its --db


def hint(command: str) -> str:
    """A command line that can be pasted, such as `queuectl.py worker start`."""
    return " ".join(['"%s"' % word if " " in word else word for word in called_as] + [command])


def printable(text: str) -> str:
    """Text from a job made safe for a terminal: one line, no escape sequences."""
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else " " if c in "\t\n\r" else "\ufffd" for c in text])


def backoff(attempts: int, base: float, longest: float) -> float:
    """Seconds from the failure of attempt number `attempts` to the next one:
    base ** attempts, at most `longest`, whatever `attempts` is."""
    try:
        return min(float(base) ** attempts, longest)
    except OverflowError:
        return longest


@functools.lru_cache(maxsize=64)
def iso(epoch: float | None) -> str | None:
    """Epoch seconds as ISO 8601 in UTC, to the millisecond."""
    if epoch is None:
        return None
    # No system's gmtime: some end in 3000. (A float is off by up to 15 us in the year 9999.)
    moment = EPOCH + timedelta(0, epoch + 5e-5)
    return moment.isoformat(timespec="milliseconds") + "Z"


# Windows knows no local time after the year 3000. But the calendar repeats itself: a late time is
# one between 2370 and 2769, and some times 400 years.

@functools.lru_cache(maxsize=64)
def local_time(epoch: float, form: str = "%Y-%m-%d %H:%M:%S %z") -> str:
    """A time for people: `2026-01-31 08:00:00 +0100`."""
    cycles = max(0, int(epoch) // CYCLE - 1)
    moment = datetime.fromtimestamp(int(epoch) - cycles * CYCLE).astimezone()
    return moment.strftime(form.replace("%Y", str(moment.year + 400 * cycles)))


def from_iso(text: str) -> float:
    """Epoch seconds of an ISO 8601 time; local time where it names no zone. ValueError."""
    if text[-1:] in "zZ":
        text = text[:-1] + "+00:00"
    moment = datetime.fromisoformat(text)
    cycles = max(0, (moment.year - 2370) // 400)
    return moment.replace(year=moment.year - 400 * cycles).timestamp() + cycles * CYCLE


def from_epoch(seconds: float) -> float:
    if not 0 <= seconds <= MAX_EPOCH:
        raise QueueError("is a time outside of 1970 to 9999")
    return seconds


def format_duration(seconds: float) -> str:
    """`90s`, `5m`, `1h`: the shortest form that parse_duration reads back."""
    for unit in ("d", "h", "m"):
        if seconds and not seconds % DURATION_UNITS[unit]:
            return "%d%s" % (seconds // DURATION_UNITS[unit], unit)
    return format_number(seconds) + "s"


def format_number(number: float) -> str:
    return "%d" % number if number == int(number) else repr(number)


def format_age(seconds: float) -> str:
    """About how long, for people: `40ms`, `1.2s`, `12s`, `3m05s`, `2h10m`, `6d`."""
    if seconds < 1:
        return "%dms" % max(seconds * 1000, 0)
    if seconds < 10:
        return "%.1fs" % seconds
    seconds = int(seconds)
    if seconds < 60:
        return "%ds" % seconds
    if seconds < 3600:
        return "%dm%02ds" % divmod(seconds, 60)
    if seconds < 86400:
        return "%dh%02dm" % (seconds // 3600, seconds % 3600 // 60)
    return "%dd" % (seconds // 86400)


def counted(number: int, one: str, many: str = "") -> str:
    """`1 job`, `2 jobs`; with a verb, `many` is how it reads of more than one."""
    return "%d %s" % (number, one if number == 1 else many or one + "s")


# The parsers below read a value as it comes from a command line (a string) or from JSON.
# Each returns what is stored or raises QueueError with an explanation that reads on from
# the value's name.

def _number(value: Any) -> float:
    number = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(value)
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        raise QueueError("%s is not a number" % _shown(value))
    if not -1e18 < number < 1e18:  # NaN and the infinities, too
        raise QueueError("%s is out of range" % value)
    return number


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, default=repr)
    except RecursionError:
        text = "a value nested too deep"
    return text if len(text) <= 60 else text[:57] + "..."


def parse_integer(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = _number(value)
        if number != int(number):
            raise QueueError("%s is not a whole number" % value)
        if not low <= number <= high:
            raise QueueError("%d is not between %d and %d" % (number, low, high))
        return int(number)
    return parse


def parse_factor(value: Any) -> float:
    number = _number(value)
    if not 0 <= number <= 1000:
        raise QueueError("%s is not between 0 and 1000" % value)
    return number


def _quantity(value: Any, units: Mapping[str, int]) -> float:
    """A number, or text that may have a unit behind its number. QueueError, KeyError."""
    number, unit = value, ""
    if isinstance(value, str):
        number = value.rstrip("".join(units))
        unit = value[len(number):]
    return _number(number) * units[unit]


def parse_duration(value: Any) -> float:
    """Seconds from `90`, `90s`, `10m`, `2h`, `7d`, or a number."""
    try:
        seconds = _quantity(value, DURATION_UNITS)
        if isinstance(value, str) and value[0] == "+":
            raise QueueError("has a sign")
    except (QueueError, KeyError):
        raise QueueError("%s is not a duration such as 90, 90s, 10m, 2h or 7d"
                         % _shown(value)) from None
    if not 0 <= seconds <= 1e10:
        raise QueueError("%s is not a duration between 0 and 300 years" % value)
    return seconds


def parse_size(value: Any) -> int:
    """Bytes from `65536`, `64K`, `64KiB`, `1M`, or a number."""
    text = value.lower().replace(" ", "") if isinstance(value, str) else value
    try:
        size = _quantity(text, SIZE_UNITS)
    except (QueueError, KeyError):
        raise QueueError("%s is not a size such as 65536, 64K or 1M" % _shown(value)) from None
    return parse_integer(0, 256 * 1024 ** 2)(size)


def format_size(size: float) -> str:
    for unit, name in ((1024 ** 2, "M"), (1024, "K")):
        if size and not size % unit:
            return "%d%s" % (size // unit, name)
    return "%d" % size


def parse_time(value: Any, now: float | None = None) -> float:
    """Epoch seconds from ISO 8601 (no zone: local time), epoch seconds, `23:30` (the next one),
    or `+10m`."""
    now = time.time() if now is None else now
    if isinstance(value, str) and not value.isdecimal():  # 20260131 is a date since Python 3.11
        if value.startswith("+"):
            return from_epoch(now + parse_duration(value[1:]))
        with contextlib.suppress(ValueError, OverflowError, OSError):
            if ":" in value[1:3]:
                today = datetime.combine(datetime.fromtimestamp(now),
                                         datetime.strptime(value, "%H:%M").time())
                return min(when for when in (today.timestamp(),
                                             (today + timedelta(days=1)).timestamp()) if when > now)
            return from_epoch(from_iso(value))
    with contextlib.suppress(QueueError):
        seconds = _number(value)
        if LEAST_EPOCH <= seconds <= MAX_EPOCH:
            return seconds
    raise QueueError("%s is not a time such as 2026-01-31T08:00, 2026-01-31T08:00Z, 23:30, "
                     "+10m or epoch seconds" % _shown(value))


def parse_text(value: Any) -> str:
    """Non-empty UTF-8 text without NUL that fits one argument of a command."""
    if not isinstance(value, str):
        raise QueueError("%s is not a string" % _shown(value))
    if not value.strip():
        raise QueueError("is empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise QueueError("is not UTF-8 text") from None
    if "\0" in value:
        raise QueueError("holds a NUL character")
    if size >= MAX_TEXT:
        raise QueueError("is %d bytes long; less than %d fit an argument (put it into a "
                         "script)" % (size, MAX_TEXT))
    return value


def parse_line(value: Any) -> str:
    """A command line for the shell."""
    line = parse_text(value)
    if sys.platform == "win32" and (len(line) > MAX_LINE or "\n" in line or "\r" in line):
        raise QueueError("is %d characters long, or more than a line; cmd takes one line of %d "
                         "(put it into a script)" % (len(line), MAX_LINE))
    return line


def parse_command(value: Any) -> str:
    """A command, or "" for `none`."""
    return "" if value == "none" else parse_line(value)


def parse_limit(value: Any) -> int:
    """How many jobs of a queue may run at once, or 0 for `none`: any number."""
    return 0 if value in (None, "none") else parse_integer(1, 2 ** 31 - 1)(value)


def parse_name(value: Any) -> str:
    """An id, the name of a queue, or a key: 1 to 255 printable characters, no blanks."""
    if not isinstance(value, str):
        raise QueueError("%s is not a string" % _shown(value))
    if not (0 < len(value) <= 255 and value.isprintable() and " " not in value
            and value[0] != "-"):
        raise QueueError("%s is not 1 to 255 printable characters without blanks and without "
                         "a leading '-'" % _shown(value))
    return value


def parse_queue(value: Any) -> str:
    if value == EVERY_QUEUE:
        raise QueueError("%s is no name of a queue: it stands for all" % value)
    return parse_name(value)


def parse_cwd(value: Any) -> str:
    return os.path.abspath(parse_text(value))


def parse_env(value: Any) -> dict[str, str]:
    """A dict of strings, or a list of `NAME=VALUE` and `NAME` (copied from os.environ)."""
    if isinstance(value, (list, tuple)):
        pairs = {}
        for word in value:
            name, equals, text = parse_text(word).partition("=")
            if not equals:
                try:
                    text = os.environ[name]
                except (KeyError, ValueError):  # or the locale has no such name
                    raise QueueError("%s is not set here; give it as %s=VALUE" % (name, name)) \
                        from None
            pairs[name] = text
        value = pairs
    if not isinstance(value, dict):
        raise QueueError("%s is not an object of strings" % _shown(value))
    for name, text in value.items():
        if not name or "=" in name or not isinstance(text, str):
            raise QueueError("%s is not a name and its string" % _shown({name: text}))
        parse_text(name + "=" + text)
    return value


def parse_after(value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)):
        value = [value]
    return list(dict.fromkeys(map(parse_name, value)))


# The fields of a new job, in the order of the parameters of INSERT_JOB.
FIELDS: dict[str, Callable[[Any], Any]] = {
    "id": parse_name,
    "command": parse_line,
    "queue": parse_queue,
    "priority": parse_integer(-2 ** 31, 2 ** 31 - 1),
    "max_retries": parse_integer(0, 2 ** 31 - 1),
    "timeout": parse_duration,
    "delay": parse_duration,
    "run_at": parse_time,
    "cwd": parse_cwd,
    "env": parse_env,
    "after": parse_after,
    "unique": parse_name,
}
READ_ONLY_FIELDS = {"runs", "run_after", *Job.KEYS}.difference(FIELDS)


def job_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a new job, each parsed; null is the same as absent. QueueError."""
    if not isinstance(fields, dict):
        raise QueueError("a job is a JSON object such as {\"command\": \"sleep 2\"}, not %s"
                         % _shown(fields))
    parsed = {}
    for name, value in fields.items():
        parse = FIELDS.get(name)
        if parse is None:
            if name in READ_ONLY_FIELDS:
                continue
            raise QueueError("unknown field %s; the fields of a job are %s"
                             % (_shown(name), ", ".join(FIELDS)))
        if value is not None:
            try:
                parsed[name] = parse(value)
            except QueueError as error:
                raise QueueError("%s: %s" % (name, error)) from None
    if "command" not in parsed:
        raise QueueError("a job needs a command")
    if "delay" in parsed and "run_at" in parsed:
        raise QueueError("delay and run_at exclude each other")
    return parsed


def starting_time(fields: Mapping[str, Any], now: float) -> float | None:
    """When a job with these parsed fields may run, in epoch seconds; None: at once. QueueError."""
    if "delay" in fields:
        return from_epoch(now + fields["delay"])
    return fields.get("run_at")


class Setting(Record):
    """A setting: parse(text) checks and converts it, format(value) writes it for people."""

    name: str
    default: Any
    parse: Callable[[Any], Any]
    format: Callable[[Any], str]
    help: str


SETTINGS = {name: Setting(name=name, default=default, parse=parse, format=form, help=text)
            for name, default, parse, form, text in (
    ("max_retries", 3, FIELDS["max_retries"], format_number,
     "attempts in all that a job enqueued from now on gets"),
    ("backoff_base", 2, parse_factor, format_number,
     "a retry waits backoff_base ** attempts seconds; 0: retry at once"),
    ("backoff_max", 3600, parse_duration, format_duration, "longest wait before a retry"),
    ("job_timeout", 300, parse_duration, format_duration,
     "time a run may take where the job sets no timeout; 0: no limit"),
    ("kill_grace", 5, parse_duration, format_duration,
     "time between SIGTERM and SIGKILL when a job is ended"),
    ("output_limit", 65536, parse_size, format_size,
     "bytes of output kept per run: the first quarter and the rest from the end"),
    ("keep_completed", 604800, parse_duration, format_duration,
     "time after which completed jobs are deleted; 0: never"),
    ("on_dead", "", parse_command, lambda command: command or "none",
     "command that is enqueued when a job dies, with QUEUECTL_DEAD_JOB in its environment"),
)}


def setting(name: str) -> Setting:
    """The setting of that name; `max-retries` and `max_retries` are one. QueueError."""
    found = SETTINGS.get(name.replace("-", "_"))
    if found is None:
        raise QueueError("unknown setting %s; the settings are %s"
                         % (_shown(name), ", ".join(SETTINGS)))
    return found


def exit_error(exit_code: int | None, signum: int | None, output: bytes = b"",
               command: str = "") -> str:
    """What last_error says of a run that ended by itself and not with 0."""
    if signum is not None:
        try:
            return "killed by %s" % signal.Signals(signum).name
        except ValueError:
            return "killed by signal %d" % signum
    text = "exit code %s" % exit_code
    if exit_code == 127:
        text += " (command not found%s)" % (
            "" if "/" in (command.split() or [""])[0] else "; the worker's PATH counts: use a full "
            "path, or enqueue with --env PATH")
    elif exit_code == 126:
        text += " (found, but not executable)"
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return text + (": " + lines[-1].strip()[-300:] if lines else "")


def join_pieces(pieces: Iterable[tuple[int, bytes]], seen: int) -> tuple[bytes, int]:
    """The output behind its first `seen` bytes, and how many have been seen then. `pieces` are
    pairs of a place and the bytes from there on; a line says how much is missing."""
    data = []
    for start, piece in pieces:
        if start > seen:
            data.append(b"\n[queuectl: %d bytes are not kept (output_limit)]\n" % (start - seen))
        data.append(piece[max(0, seen - start):])
        seen = max(seen, start + len(piece))
    return b"".join(data), seen


def next_state(outcome: str, attempts: int, max_retries: int, cancel: bool, now: float,
               settings: Mapping[str, Any]) -> tuple[str, int, int, float | None]:
    """The life of a job in one place: (state, hold, attempts, run_after) after a run.

    An interrupted run was ended for the operator's reasons, or the machine was short of something
    that it needs: it takes back its attempt.
    A lost one (its worker died) costs its attempt, but need not wait: nothing says that
    the command was at fault. A requested cancel wins over everything but success."""
    if outcome == "completed":
        return "completed", OVER, attempts, None
    if outcome == "interrupted":
        attempts -= 1
    if outcome == "cancelled" or cancel:
        return "cancelled", OVER, attempts, None
    if outcome == "interrupted":
        return "pending", READY, attempts, None
    if attempts >= max_retries:
        return "dead", OVER, attempts, None
    delay = backoff(attempts, settings["backoff_base"], settings["backoff_max"])
    if outcome == "lost" or not delay:
        return "pending", READY, attempts, None
    return "pending", RETRYING, attempts, now + delay


# -- platform -----------------------------------------------------------------------------
#
# Every difference between operating systems. Both arms define the same names:
#
#   default_folder  make_folder  create_file  flush  flush_folder  unsafe_reason
#   take  release  is_held          a lock: held until it is released, or its process dies
#   unreadable                      whether a disk fails
#   RunLock  end_tree  not_ours     a run's process tree: found and ended by whoever rescues
#   Child                           one spawned command, its pipe and its process group
#   Bell  ring  Waiter  stalled     sleeping in one place, and waking who sleeps there
#   allow_escapes                   what a terminal needs to show colours
#   open_descriptors  close_inherited  reset_signals  reap_orphans
#                                   what a process owes its children

RUN_VARIABLE = "QUEUECTL_RUN"  # in a job's environment: <id of the database file>/<run>
FORK = sys.platform == "linux"  # elsewhere forking a threaded libsystem is not safe
TICK = 1.0  # seconds after which a sleeper looks around unasked
LOG_LIMIT = 1024 ** 2  # bytes of a log file before it is moved to NAME.1
CHUNK = 65536  # bytes read from a job's pipe at once


def same_file(fd: int, path: str) -> bool:
    """Whether the open file `fd` is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def remove(path: str) -> None:
    """Unlink a file that may be gone already."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def raise_order(fd: int, order: int) -> None:
    """Let the open lock file say at least that order, by its size: that needs no room on a disk
    and no database. (Of two who do so at the same instant the lower one may win: so an order is
    given to each process that it concerns, and heard at once: a stop of all stands in two files for
    each worker. That of a single one does not; it may have to be said again.)"""
    if os.fstat(fd).st_size < order:
        os.ftruncate(fd, order)


def pipe_is_closed(error: OSError) -> bool:
    """Whether nobody reads any more what was written. (The C library of Windows says EINVAL.)"""
    return isinstance(error, BrokenPipeError) or sys.platform == "win32" \
        and error.errno == errno.EINVAL and error.winerror is None and error.filename is None


def give_order(path: str, order: int) -> None:
    """Give an order to the process that holds the lock file at `path`. (Not to this process
    itself: to close the file would drop its lock.)"""
    with contextlib.suppress(FileNotFoundError, PermissionError):  # it has gone, or is just going
        with open(path, "r+b", 0) as file:
            raise_order(file.fileno(), order)


def hold(path: str, patience: float = math.inf) -> int:
    """Lock a file, which is created if need be, until release() or the end of this process.
    Waits up to `patience` seconds for who has it; BlockingIOError."""
    until = time.monotonic() + patience
    while True:
        fd = take(path)
        if fd is not None:
            return fd
        if time.monotonic() >= until:
            raise BlockingIOError
        time.sleep(0.002)


def open_log(path: str) -> int:
    """Open a log to add to it, once it has made room for a new one. What is no regular file
    (/dev/null, a FIFO) is not moved. Of two who make room at once the later one may move the new
    file over the old one. OSError."""
    fd = create_file(path, os.O_APPEND)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size >= LOG_LIMIT and same_file(fd, path):
        os.close(fd)  # or Windows would not let it go
        old, way = path + ".1", "%s.%d" % (path, os.getpid())
        with contextlib.suppress(OSError):
            if sys.platform == "win32" and os.path.exists(old):
                os.replace(old, way)  # what is open can be renamed and deleted, but not replaced
                os.unlink(way)
            os.replace(path, old)
        fd = create_file(path, os.O_APPEND)
    return fd


if sys.platform == "win32":
    import _winapi
    import ctypes
    import msvcrt
    import subprocess
    from subprocess import Handle  # type: ignore[attr-defined]  # one that is forgotten is closed

    ANYBODY = 7  # how a file is shared: others may read, write, rename and delete it meanwhile
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)

    def kernel(name: str, *arguments: Any) -> Any:
        """Call a function of Windows by its name. OSError where it fails."""
        function = getattr(kernel32, name)
        function.restype = ctypes.c_void_p  # a handle, or something smaller
        result = function(*arguments)
        if not result:
            raise ctypes.WinError(ctypes.get_last_error())
        return result

    wakers: list[int] = [kernel("CreateEventW", None, 0, 0, None)]  # signals, bells, children

    def shared(name: str) -> str:  # by every session: a service's, a terminal's
        return "Global\\queuectl-" + os.path.normcase(name).replace("\\", "/")[-200:]

    def nothing(*arguments: Any) -> Any:
        """NTFS journals its folders, profiles have access lists, and nobody inherits anything."""

    flush, make_folder = os.fsync, functools.partial(os.makedirs, exist_ok=True)
    flush_folder = unsafe_reason = unreadable = not_ours = nothing
    reset_signals = close_inherited = reap_orphans = stalled = nothing
    open_descriptors: Callable[[], set[int]] = set

    def default_folder() -> str | None:
        local = os.environ.get("LOCALAPPDATA")
        return os.path.join(local, "queuectl") if local else None

    def create_file(path: str, flags: int = 0) -> int:
        if not flags & os.O_APPEND:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_BINARY | flags)
        append, always = 0x100084, 4  # O_APPEND is not atomic, and nobody could rename the file
        return msvcrt.open_osfhandle(_winapi.CreateFile(path, append, ANYBODY, 0, always, 0, 0),
                                     flags | os.O_BINARY | os.O_NOINHERIT)

    # A lock is a file that its process has open, without sharing its deletion. To ask is to open
    # it for deletion, which deletes nothing, and which those who ask share.

    def take(path: str) -> int | None:
        if not is_held(path):
            remove(path)
            with contextlib.suppress(FileExistsError, PermissionError):  # others were faster
                return create_file(path, os.O_EXCL)
        return None

    def release(path: str, fd: int) -> None:
        os.close(fd)
        remove(path)

    def is_held(path: str) -> bool:
        try:
            Handle(_winapi.CreateFile(path, 0x10000, ANYBODY, 0, 3, 0, 0))  # DELETE, OPEN_EXISTING
            return False
        except OSError as error:
            return not isinstance(error, FileNotFoundError)

    class RunLock:
        __init__ = close = discard = nothing  # a run's tree is known by its job object

        def renew(self) -> str:
            return "-"

    def members(job: int) -> list[int]:
        found = (ctypes.c_uint32 * 20000)()  # two numbers, of which one says how many; then pids
        kernel("QueryInformationJobObject", job, 3, found, ctypes.sizeof(found), None)
        return found[2::ctypes.sizeof(ctypes.c_void_p) // 4][:found[1]]

    def end_tree(path: str, run: int, name: str) -> tuple[list[int], str | None]:
        try:
            job = Handle(kernel("OpenJobObjectW", 0xC, False, shared(name)))  # query, terminate
        except FileNotFoundError:
            return [], None  # it went with its worker
        left = members(job)
        kernel("TerminateJobObject", job, 1)
        return left, None

    def waiting(pipe: int) -> int:
        """How many bytes can be read; -1 at the end."""
        with contextlib.suppress(BrokenPipeError):
            return int(_winapi.PeekNamedPipe(pipe, 0)[0])
        return -1

    class Child:
        """One spawned command in a job object, which is named after its run and ends with us."""

        def __init__(self, command: str, cwd: str | None, env: Mapping[str, str],
                     lock: RunLock, run: int) -> None:
            os.chdir(cwd or os.sep)
            self._job = Handle(kernel("CreateJobObjectW", None, shared(env[RUN_VARIABLE])))
            if ctypes.get_last_error():  # ERROR_ALREADY_EXISTS
                raise FileExistsError(errno.EEXIST, "its job object exists", env[RUN_VARIABLE])
            self._limit(0x2000)  # KILL_ON_JOB_CLOSE
            pipe, end = _winapi.CreatePipe(None, 4 * CHUNK)
            self.fd, shell = Handle(pipe), os.environ.get("COMSPEC", "cmd.exe")
            self.survivors, self.close_output = functools.partial(members, self._job), self.fd.Close
            with open(msvcrt.open_osfhandle(end, 0), "wb") as output:
                self._process = subprocess.Popen(  # /s: just the outer quotes are taken off
                    '"%s" /d /v:off /s /c "%s"' % (shell, command), executable=shell,
                    env={name.upper(): text for name, text in env.items()},  # Path is PATH
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    creationflags=4 | subprocess.CREATE_NEW_PROCESS_GROUP)  # 4: suspended
            self.pid, handle = self._process.pid, int(self._process._handle)  # type: ignore
            try:
                kernel("AssignProcessToJobObject", self._job, handle)
                if ctypes.WinDLL("ntdll").NtResumeProcess(handle):
                    raise OSError("its process cannot be resumed")
            except OSError:
                self._process.kill()
                raise

        def _limit(self, flags: int) -> None:
            limits = (ctypes.c_uint64 * (10 + ctypes.sizeof(ctypes.c_void_p)))(0, 0, flags)
            kernel("SetInformationJobObject", self._job, 9, limits, ctypes.sizeof(limits))

        def read(self) -> bytes | None:
            there = waiting(self.fd)
            return _winapi.ReadFile(self.fd, CHUNK)[0] if there > 0 else b"" if there else None

        def poll(self) -> bool | None:
            return None if self._process.poll() is None else self._process.returncode == 0

        def reap(self) -> tuple[int | None, int | None]:
            return self._process.wait(), None

        def terminate(self, force: bool) -> None:
            if not force and self.poll() is None:
                with contextlib.suppress(OSError):  # it is on no console
                    kernel("GenerateConsoleCtrlEvent", signal.CTRL_BREAK_EVENT, self.pid)
                    return
            kernel("TerminateJobObject", self._job, 1)

        def close(self) -> None:
            if not self._job.closed:
                self._limit(0)  # what a successful job left in the background may go on
                self._job.Close()

    class Bell:
        def __init__(self, path: str) -> None:
            self.fd = kernel("CreateEventW", None, True, False, shared(path))
            self.clear = functools.partial(kernel, "ResetEvent", self.fd)
            wakers.append(self.fd)

    def ring(path: str) -> bool:
        with contextlib.suppress(OSError):
            return bool(kernel("SetEvent", Handle(kernel("OpenEventW", 2, False, shared(path)))))
        return False

    class Waiter:
        """Sleeps until a waker wakes; while it watches a pipe, which is none, at most 50 ms."""
        forget = close = nothing

        def __init__(self) -> None:
            self._watched: set[int] = set()
            self.watch, self.unwatch = self._watched.add, self._watched.remove
            self._handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint32)(self._on_console)
            kernel("SetConsoleCtrlHandler", self._handler, True)

        def _on_console(self, event: int) -> bool:
            """In a thread of its own: 0 is Ctrl-C, which Python hears, 1 Ctrl-Break. After others
            (the window is closed) Windows ends us soon: what comes again puts the jobs back."""
            for _ in range(event if event < 2 else 20):
                signal.raise_signal(signal.SIGBREAK)
                kernel("SetEvent", wakers[0])
                time.sleep(0.5)
            return event > 0

        def expect(self, pid: int) -> None:
            wakers.append(Handle(_winapi.OpenProcess(_winapi.SYNCHRONIZE, False, pid)))

        def wait(self, timeout: float) -> list[int]:
            pipes = self._watched.difference(wakers)
            ready = list(filter(waiting, pipes))
            longest = 0 if ready else min(1000 * max(0.0, timeout), 50 if pipes else 10 ** 6)
            with contextlib.suppress(InterruptedError):  # Ctrl-C. Windows waits for 63, no more
                _winapi.WaitForMultipleObjects(wakers[:63], False, math.ceil(longest))
            ready += [handle for handle in wakers if not _winapi.WaitForSingleObject(handle, 0)]
            for child in set(ready).intersection(wakers[1:]) - self._watched:
                wakers.remove(child)  # it has ended, and wakes once
            return ready

    def allow_escapes(fd: int) -> None:
        with contextlib.suppress(OSError):
            kernel("SetConsoleMode", msvcrt.get_osfhandle(fd), 7)

else:
    import fcntl
    import select

    # Where a job's tree inherits its lock: scripts use 3 to 9 themselves. (The limit may be low.)
    LOCK_FD = min(100, os.sysconf("SC_OPEN_MAX") % 2 ** 31 - 1)  # -1: no limit
    SIGNALS = frozenset(map(int, signal.valid_signals())) - {signal.SIGKILL, signal.SIGSTOP}

    def default_folder() -> str | None:
        state = os.environ.get("XDG_STATE_HOME", "")
        if not os.path.isabs(state):
            home = os.environ.get("HOME", os.path.expanduser("~"))
            if not os.path.isabs(home) or not os.path.isdir(home):
                return None
            state = os.path.join(home, ".local", "state")
        return os.path.join(state, "queuectl")

    def make_folder(path: str) -> None:
        """Make a private folder, and refuse one that others could have planted."""
        missing = []
        while not os.path.isdir(path) and path not in missing:
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
                os.chmod(path, 0o700)
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022 \
                or status.st_uid not in (os.geteuid(), 0):
            raise QueueError("%s is not a folder that only you can write; remove it" % path)

    def create_file(path: str, flags: int = 0) -> int:
        """Open a file for reading and writing. One that is not there is created: private,
        whatever the umask. (The mode of a file that somebody else has made is his.)"""
        flags |= os.O_RDWR | os.O_NOFOLLOW
        while True:
            if not flags & os.O_EXCL:
                with contextlib.suppress(FileNotFoundError):
                    return os.open(path, flags)
            try:
                fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:  # somebody has just been faster
                if flags & os.O_EXCL:
                    raise
            else:
                os.fchmod(fd, 0o600)
                return fd

    def flush(fd: int) -> None:
        """Force a file to the disk itself (on macOS, fsync alone stops at the drive's cache)."""
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(fd)

    def flush_folder(path: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unsafe_reason(path: str) -> str | None:
        """Why workers must not run what this database says, or None: whoever can write it
        runs commands as the worker."""
        folder = os.stat(os.path.dirname(path))
        if os.path.isfile(path):  # or it will be refused, whosesoever it is
            status = os.stat(path)
            if status.st_uid != os.geteuid():
                return "belongs to another user (uid %d)" % status.st_uid
            if status.st_mode & stat.S_IWOTH:
                return "can be written by every user (chmod o-w it)"
        # Sticky or not: SQLite replays a journal that somebody has planted beside the file.
        if folder.st_mode & stat.S_IWOTH:
            return "stands in a folder that every user can write (move it into one of your own, " \
                "such as %s)" % (default_folder() or os.path.expanduser("~"))
        if folder.st_uid not in (os.geteuid(), 0):
            return "stands in a folder of another user (uid %d; move it into one of your own)" \
                % folder.st_uid
        return None

    # A record lock (fcntl) is not inherited by a fork, so that no child of a dead process can
    # make it look alive. Closing any descriptor of the file drops it: a process never opens a
    # lock file that it holds itself.

    _held: dict[str, int] = {}  # path: the process that holds it

    def take(path: str) -> int | None:
        """See hold; None where somebody has it."""
        if _held.get(path) != os.getpid():
            fd = create_file(path)
            with contextlib.suppress(BlockingIOError):
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if same_file(fd, path):  # not one that has just been removed
                    _held[path] = os.getpid()
                    return fd
            os.close(fd)
        return None

    def release(path: str, fd: int) -> None:
        """Remove a lock of this process, so that it looks as dead as it will be."""
        _held.pop(path, None)
        remove(path)
        os.close(fd)

    def is_held(path: str) -> bool:
        """Whether a living process holds the lock. Asks with a shared lock, so that two
        who ask never see each other. QueueError for whom one may not ask."""
        if _held.get(path) == os.getpid():
            return True
        try:
            with open(path, "rb", 0) as file:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except PermissionError:
            owner = os.stat(os.path.dirname(path)).st_uid
            raise QueueError("only the user who runs the workers (uid %d) can see which of them "
                             "are alive, and stop them" % owner) from None

    class RunLock:
        """The flock that the process tree of each run of one worker inherits. Its file also
        records the leader of the run's process group, for rescuers (end_tree).

        A worker locks the file of its next run before it settles the last one, for a settle and
        the next claim are one transaction. So two files take turns: that of the last run stays as
        it is, should this worker die before the commit, and the other one's run was settled one
        turn ago. Where somebody whom it left in the background still holds that, a new file takes
        its place."""

        def __init__(self, prefix: str) -> None:
            self._paths = [prefix + ".run0", prefix + ".run1"]  # the next one first
            self.fd = -1

        def renew(self) -> str:
            """Lock for a new run, with an open file description that no tree shares yet; the
            name of the file. OSError."""
            path = self._paths[0]
            while True:
                fd = create_file(path)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    os.close(fd)
                    remove(path)
            self.close()
            self.fd = fd
            self._paths.reverse()
            return os.path.basename(path)

        def close(self) -> None:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

        def discard(self) -> None:
            """Remove its files, once every run is settled."""
            self.close()
            for path in self._paths:
                remove(path)

        def record(self, run: int, pid: int, before: float) -> None:
            """Write down who leads the run's process group, and between which two moments it
            was started (`before` is boot_clock() just before the spawn). At once: who has closed
            his descriptors can be known only by this. Should the disk be full, the lock and
            the environment still tell the tree."""
            with contextlib.suppress(OSError):
                os.pwrite(self.fd, ("%d %d %.6f %.6f %s" % (
                    run, pid, before, boot_clock(), _this_boot())).ljust(200).encode(), 0)

    # What is left of a run whose worker is dead? Three proofs tell, each of which a process may
    # have shaken off: the run's lock, which its tree inherits; its process group; and in its
    # environment the name of the run. What can go wrong, and what stops it:
    #
    #   A stranger is killed.  A number proves nothing by itself: it may have been given to somebody
    #       else since. So the group counts only if its leader was started when the record says,
    #       or if one of its members is proven otherwise. And a copy of the database is another
    #       file, whose runs have other names.
    #   A member is missed.  The list is read while processes fork and begin other programs, which
    #       have no environment for an instant: Rescuer believes in an empty tree when it was
    #       empty twice. Who has another user's environment is known by lock and group only.
    #   It cannot be told.  Who is in the group of a dead leader and has shaken off the rest, or
    #       holds the lock where no /proc names its holder, may be of the run: he is not killed,
    #       and the job does not run again while he lives. (Without /proc nobody's environment can
    #       be read either: there the group alone proves.)
    #   The worker died between the spawn and the record.  The lock and the environment tell.
    #   The rescuer is of the tree, as a job may start workers.  In the foreground they are, and
    #       end with it. Those in the background lead a session of their own, and have neither the
    #       lock nor the variable.

    CLOCK_TICKS = os.sysconf("SC_CLK_TCK")  # a second, in /proc/PID/stat
    START_TICK = 1 / CLOCK_TICKS if sys.platform == "linux" else 1.0  # seconds; ps knows no less

    def boot_clock() -> float:
        """The clock of the start times of processes, in seconds: see proc(5), starttime."""
        if sys.platform == "linux":
            return time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.time()

    @functools.lru_cache(maxsize=1)
    def _this_boot() -> str:
        """The boot and the pid namespace in which a process number means something."""
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                return file.read().strip() + " " + os.readlink("/proc/self/ns/pid")
        except OSError:
            return (os.popen("sysctl -n kern.bootsessionuuid 2>/dev/null").read().strip()
                    or "unknown") + " host"

    def _processes() -> Iterator[tuple[int, int, float]]:
        """(pid, process group, start by boot_clock()) of every process that can be seen and is
        not dead. Starts are cut to START_TICK."""
        if sys.platform != "linux":
            with os.popen("LC_ALL=C ps -axo pid=,pgid=,stat=,lstart=") as table:
                for line in table:
                    pid, group, state, start = line.split(None, 3)
                    if state[0] != "Z":
                        yield int(pid), int(group), time.mktime(time.strptime(start.strip()))
            return
        for name in filter(str.isdigit, os.listdir("/proc")):
            # The name, in parentheses, may hold anything. After it: state, ppid, pgrp, ...
            # num_threads and starttime are the 20th and the 22nd field of proc(5). A process
            # goes on, though it looks like a zombie, while any of its threads does.
            fields = _read("/proc/%s/stat" % name).rpartition(b")")[2].split()
            if fields and (fields[0] not in b"ZX" or int(fields[17]) > 1):
                yield int(name), int(fields[2]), int(fields[19]) / CLOCK_TICKS

    def _read(path: str) -> bytes:
        """What is in a file of /proc; nothing where that is over or not ours to know. OSError
        where this machine is short of something: that must not look like nothing."""
        try:
            with open(path, "rb", 0) as file:
                return file.read()
        except OSError as error:
            if error.errno in SHORTAGES:
                raise
            return b""

    def _holds(pid: int, lock: os.stat_result) -> bool:
        """Whether the process holds the flock of that file (Linux). To have it open is not
        enough: other rescuers do, for an instant."""
        with contextlib.suppress(OSError):
            for fd in os.listdir("/proc/%d/fd" % pid):
                with contextlib.suppress(OSError):
                    if os.path.samestat(lock, os.stat("/proc/%d/fd/%s" % (pid, fd))):
                        info = _read("/proc/%d/fdinfo/%s" % (pid, fd))
                        if b"FLOCK  ADVISORY  WRITE" in info:
                            return True
        return False

    def _tree(path: str, run: int, name: str) -> tuple[list[int], str | None]:
        """(proven, unproven) of a run that its worker has left behind: the processes of it, or
        where there are none, in words, one that is alive and may be. Neither: none was seen."""
        lock, unproven = None, None
        record: list[str] = []
        with contextlib.suppress(FileNotFoundError):  # then the environment alone tells
            with open(path, "rb", 0) as file:
                record = file.read(200).decode("ascii", "replace").split()
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock, unproven = os.fstat(file.fileno()), "a process that holds %s" % path
        leader, before, after = -1, 0.0, 0.0
        if record[:1] == [str(run)] and " ".join(record[4:]) == _this_boot():
            leader, before, after = int(record[1]), float(record[2]), float(record[3])
        mark = (RUN_VARIABLE + "=" + name).encode()
        proven, group, ours = [], [], False
        for pid, of_group, start in _processes():
            if mark in _read("/proc/%d/environ" % pid).split(b"\0") \
                    or lock is not None and _holds(pid, lock):
                proven.append(pid)
                ours |= of_group == leader
            elif of_group == leader:
                group.append(pid)
                if pid == leader:
                    if not before - START_TICK <= start <= after:
                        leader, group = -1, []  # the number has been given to a stranger
                    else:
                        ours = True
        if ours:
            return proven + group, None
        if group:
            unproven = "process %d of its group" % group[0]
        return proven, None if proven else unproven

    def end_tree(path: str, run: int, name: str) -> tuple[list[int], str | None]:
        """Kill what is left of a dead worker's run, whose RunLock is at `path` and whose
        processes have RUN_VARIABLE set to `name`: (who is dying now, who else is alive and may
        be of the run). Both empty: none was seen. Does not wait: look again, soon.

        Ends with SIGKILL: nobody is left who could record a result, and the job waits."""
        processes, unproven = _tree(path, run, name)
        for pid in processes:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            except PermissionError:
                unproven = "process %d, which belongs to another user," % pid
        return processes, unproven

    # A line of nothing but words needs no shell, which would only run what they name; make
    # does the same. Not so where the first word means something to a shell: it is a builtin
    # that differs from the program of that name (of true and false, only --help does), a
    # reserved word, or an assignment.
    _PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                       "@%+=:,./-_ \t")
    _SHELL_WORDS = frozenset(
        ". : alias autoload bg bind break builtin caller case cd chdir command compgen complete "
        "compopt continue coproc declare dirs disown do done echo elif else enable esac eval exec "
        "exit export fc fg fi float for function functions getopts hash help history if in integer "
        "jobs kill let local logout mapfile newgrp popd print printf pushd pwd read readarray "
        "readonly repeat return select set shift shopt source suspend test then time times trap "
        "type typeset ulimit umask unalias unset until wait whence which while".split())

    def _plain_words(command: str) -> list[str]:
        """The words of a line that needs no shell; none if it needs one."""
        words = command.split() if _PLAIN.issuperset(command) else []
        return [] if words and (words[0] in _SHELL_WORDS or "=" in words[0]) else words

    class Child:
        """One spawned command: the leader of a session and process group of its own, with
        one pipe for its output. posix_spawn uses vfork on every Python that we support; it
        knows no folder, so this process itself goes to the job's."""

        def __init__(self, command: str, cwd: str | None, env: Mapping[str, str],
                     lock: RunLock, run: int) -> None:
            """OSError where the folder (which it names) or the machine does not let us."""
            self.fd, output = os.pipe()
            self._status: int | None = None
            target = LOCK_FD if lock.fd != LOCK_FD else LOCK_FD - 1  # dup2 to itself keeps CLOEXEC
            try:
                os.set_blocking(self.fd, False)
                os.chdir(cwd or os.sep)
                before = boot_clock()
                self.pid = self._spawn(command, env, (
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2),
                    (os.POSIX_SPAWN_DUP2, lock.fd, target)))
                lock.record(run, self.pid, before)
            except BaseException:
                os.close(self.fd)
                raise
            finally:
                os.close(output)

        def _spawn(self, command: str, env: Mapping[str, str], actions: Sequence[Any]) -> int:
            how: Any = dict(file_actions=actions, setsid=True, setsigmask=(), setsigdef=SIGNALS)
            words = _plain_words(command)
            if words and env.get("PATH") == os.environ.get("PATH"):  # it looks in ours
                with contextlib.suppress(OSError):
                    return os.posix_spawnp(words[0], words, env, **how)
            # Or nobody has that name, or a script begins without #!: the shell knows what to do.
            return os.posix_spawn("/bin/sh", ["/bin/sh", "-c", command], env, **how)

        def read(self) -> bytes | None:
            """Output that is there now: None if there is none, b"" at its end."""
            try:
                return os.read(self.fd, CHUNK)
            except BlockingIOError:
                return None

        def poll(self) -> bool | None:
            """None while the leader runs, then whether it ended with 0. It stays a zombie
            until reap(): that keeps its number, and so its group's, from a stranger."""
            if hasattr(os, "waitid"):
                seen = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                return None if seen is None else seen.si_status == 0
            if self._status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._status = status if pid else None
            return None if self._status is None else self._status == 0

        def reap(self) -> tuple[int | None, int | None]:
            """(exit code, signal) of the ended leader; one of them is None."""
            if self._status is None:
                self._status = os.waitpid(self.pid, 0)[1]
            if os.WIFSIGNALED(self._status):
                return None, os.WTERMSIG(self._status)
            return os.WEXITSTATUS(self._status), None

        def terminate(self, force: bool) -> None:
            """SIGTERM, or by force SIGKILL, to the whole process group."""
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL if force else signal.SIGTERM)
                if not force:
                    os.killpg(self.pid, signal.SIGCONT)  # a stopped process cannot hear TERM

        def survivors(self) -> list[int]:
            """The live members of its group. The group's number stays taken while it has any,
            zombies too, so a quick look first."""
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return []
            except PermissionError:
                pass
            return [pid for pid, group, _ in _processes() if group == self.pid]

        def close_output(self) -> None:
            os.close(self.fd)

        def close(self) -> None:
            """Let go of it. (One that goes on, and is not ours to end, will be our zombie.)"""
            if self._status is None:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(self.pid, os.WNOHANG)

    def unreadable(path: str, opened: bool) -> bool:
        """Whether the disk fails to read a file. Where this process has it `opened`, it is read
        by that descriptor: to open and close another one would drop SQLite's locks."""
        try:
            wanted = os.stat(path)
            fds = open_descriptors() if opened else {os.open(path, os.O_RDONLY)}
        except OSError:
            return False
        for fd in fds:
            try:
                start = 0
                while os.path.samestat(wanted, os.fstat(fd)):
                    data = os.pread(fd, 2 ** 20, start)
                    start += len(data)
                    if not data:
                        break
            except OSError as error:
                if error.errno == errno.EIO:
                    return True
            finally:
                if not opened:
                    os.close(fd)
        return False

    def not_ours(pid: int) -> bool:
        """Whether that process may not be signalled: it has become another user's (setuid)."""
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        except ProcessLookupError:
            pass
        return False

    class Bell:
        """A FIFO that wakes its owner. A byte is a hint only, and may be lost."""

        def __init__(self, path: str) -> None:
            remove(path)
            os.mkfifo(path, 0o600)
            os.chmod(path, 0o600)  # whatever the umask
            self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

        def clear(self) -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(self.fd, 65536)

    def ring(path: str) -> bool:
        """Ring the bell at `path`; whether anybody listens there."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            with contextlib.suppress(BlockingIOError):  # it has rung often enough
                os.write(fd, b"!")
            return True
        except BrokenPipeError:  # who listened has left just now
            return False
        finally:
            os.close(fd)

    class Waiter:
        """The one place where a process sleeps: until a watched descriptor can be read, a
        signal has arrived, or the time is over."""

        def __init__(self) -> None:
            self._poll = select.poll()
            self._wakeup, self._write = os.pipe()
            for fd in (self._wakeup, self._write):
                os.set_blocking(fd, False)
            signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self.watch(self._wakeup)

        def close(self) -> None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)
            os.close(self._write)

        def forget(self) -> None:
            """Do not wake for the signals that have come until now: their handlers have run."""
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakeup, 4096)

        def watch(self, fd: int) -> None:
            self._poll.register(fd, select.POLLIN)

        def unwatch(self, fd: int) -> None:
            self._poll.unregister(fd)

        def expect(self, pid: int) -> None:
            """Wake when that child ends. (So does its SIGCHLD.)"""

        def wait(self, timeout: float) -> list[int]:
            """The descriptors that can be read. `timeout` is in seconds."""
            ready = [fd for fd, _ in self._poll.poll(max(0.0, timeout * 1000))]
            if self._wakeup in ready:
                self.forget()
            return ready

    def allow_escapes(fd: int) -> None:
        """Let the terminal obey escape sequences. (They all do.)"""

    def reset_signals() -> None:
        """Hear every signal. (Were SIGCHLD left ignored, as it may be inherited, the kernel would
        reap the jobs and `exit 3` would read as success.)"""
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)

    def open_descriptors() -> set[int]:
        """Those of this process."""
        try:
            fds = set(map(int, os.listdir("/dev/fd")))
        except OSError:
            fds = set(range(min(os.sysconf("SC_OPEN_MAX"), 4096)))
        for fd in list(fds):
            try:
                os.fstat(fd)
            except OSError:
                fds.remove(fd)  # such as that of the look itself
        return fds

    def close_inherited() -> None:
        """Close all but the standard descriptors: a worker has those of its supervisor, and of
        who started that, and its jobs should not find any of them."""
        for fd in open_descriptors():
            if fd > 2:
                os.close(fd)

    def reap_orphans(ours: set[int]) -> None:
        """As the first process of a container, reap what others have left behind."""
        with contextlib.suppress(ChildProcessError):
            while hasattr(os, "waitid"):
                seen = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if seen is None or seen.si_pid in ours:
                    return
                os.waitpid(seen.si_pid, 0)

    def stalled(fd: int, timeout: float) -> bool:
        """Whether nothing could be written for `timeout` seconds."""
        waiter = select.poll()  # select() knows no number above 1023
        waiter.register(fd, select.POLLOUT)
        return not waiter.poll(1000 * timeout)


# -- schema -------------------------------------------------------------------------------
#
# Each partial index costs every insert a little, also where it does not apply. A query must
# repeat an index's predicate word for word, or SQLite reads the whole table in silence: hence
# `hold > 0 AND hold = 2`, of which the first half chooses the index and the second the rows. A `+`
# keeps SQLite from an index that would be the worse one. A test asks for the plan of each query.

APPLICATION_ID = 0x71756575  # "queu"; what marks a database file as ours
MARK = "PRAGMA application_id = %d" % APPLICATION_ID  # writes, even where it is marked already
WAL_LIMIT = 4 * 1024 ** 2  # bytes of -wal from which on a supervisor checkpoints it
DUE_BATCH = 500  # jobs that one transaction moves from later to ready
PRUNE_BATCH = 250  # jobs that one transaction deletes
VACUUM_STEP = 256  # free pages that one transaction gives back

_NEXT = "CREATE INDEX jobs_next ON jobs (priority DESC) WHERE hold = 0"
_RUNS = (
    """CREATE TABLE runs (
        run INTEGER PRIMARY KEY,                -- never used twice; see START_RUN
        job INTEGER NOT NULL,                   -- jobs.seq
        previous INTEGER,                       -- run of that job
        worker TEXT NOT NULL,
        lock TEXT NOT NULL,                     -- the file of its RunLock
        started_at REAL NOT NULL,               -- epoch seconds
        finished_at REAL,
        exit_code INTEGER,
        signal INTEGER,
        outcome TEXT,                           -- NULL while it runs
        error TEXT)""",
    "CREATE INDEX runs_open ON runs (worker, job) WHERE outcome IS NULL",  # = processing jobs
    # What is kept of what a run has printed, in pieces: `start` counts bytes from 0.
    "CREATE TABLE output (run INTEGER, start INTEGER, data BLOB, PRIMARY KEY (run, start))"
    " WITHOUT ROWID",
)
_QUEUES = """CREATE TABLE queues (              -- what somebody has said of a queue
    queue TEXT PRIMARY KEY, paused INTEGER NOT NULL DEFAULT 0, job_limit INTEGER) WITHOUT ROWID"""
_WORKERS = """CREATE TABLE workers (
    name TEXT PRIMARY KEY,                      -- names its lock and its bell, too
    supervisor TEXT NOT NULL,
    slot INTEGER NOT NULL,                      -- 1 ... N; 0: the supervisor itself
    count INTEGER NOT NULL,                     -- of a supervisor: its N
    pid INTEGER NOT NULL,
    queues TEXT,                                -- a JSON array; NULL: every queue
    via TEXT,
    started_at TEXT NOT NULL) WITHOUT ROWID"""
SCHEMA = (
    """CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- first in, first out
        id TEXT NOT NULL UNIQUE,
        command TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'pending',
        hold INTEGER NOT NULL,                  -- 0 READY ... 3 BLOCKED; -1 RUNNING; -2 OVER
        attempts INTEGER NOT NULL DEFAULT 0,
        max_retries INTEGER NOT NULL,
        created_at TEXT NOT NULL,               -- ISO 8601, UTC
        updated_at TEXT NOT NULL,
        locked_by TEXT,                         -- the worker that runs it
        locked_at TEXT,
        last_error TEXT,
        run_after REAL,                         -- epoch seconds; NULL: at once
        queue TEXT NOT NULL,
        priority INTEGER NOT NULL,
        timeout REAL,                           -- seconds; NULL: as job_timeout says
        cwd TEXT,
        env TEXT,                               -- a JSON object
        after TEXT,                             -- ids, separated by blanks
        unique_key TEXT,
        unmet INTEGER NOT NULL DEFAULT 0,       -- how many of `after` have not completed
        cancel INTEGER NOT NULL DEFAULT 0,      -- the worker is asked to end it
        run INTEGER)                            -- its current or last run; NULL: none yet""",
    # In the order of seq, too, which ends each entry of an index.
    "CREATE INDEX jobs_ready ON jobs (queue, priority DESC) WHERE hold = 0",
    _NEXT,
    "CREATE INDEX jobs_waiting ON jobs (hold, run_after, queue) WHERE hold > 0",
    "CREATE INDEX jobs_ended ON jobs (state, queue) WHERE hold = -2",
    *_RUNS,
    # The unique keys of the jobs that have not ended.
    "CREATE TABLE keys (key TEXT PRIMARY KEY, job INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE deps (job INTEGER, needs INTEGER, PRIMARY KEY (job, needs)) WITHOUT ROWID",
    "CREATE INDEX deps_needs ON deps (needs)",
    _WORKERS, _QUEUES,
    "CREATE TABLE config (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE stats (                     -- runs that ended, by the minute
        minute INTEGER, queue TEXT, outcome TEXT, runs INTEGER, seconds REAL,
        PRIMARY KEY (minute, queue, outcome)) WITHOUT ROWID""",
    "INSERT INTO config VALUES ('database_id', lower(hex(randomblob(16))))",
)
VERSION = 3  # of this schema: PRAGMA user_version
UPGRADES = {  # from the version before. (Version 1 was never out.)
    3: ("ALTER TABLE runs RENAME TO old_runs", "DROP INDEX runs_open", *_RUNS, """
        INSERT INTO runs SELECT run, job, previous, worker, lock, started_at, finished_at,
            exit_code, signal, outcome, error FROM old_runs""", """
        INSERT INTO output SELECT run, 0, output FROM old_runs WHERE length(output) > 0""",
        "DROP TABLE old_runs",
        _QUEUES, "INSERT INTO queues (queue, paused) SELECT queue, 1 FROM paused",
        "DROP TABLE paused",
        "DROP TABLE workers", _WORKERS, _NEXT),
}

# What `list --state` accepts, as a set of jobs that an index can enumerate.
MEMBERS = {
    "pending": "SELECT seq FROM jobs WHERE hold = 0 UNION ALL "
               "SELECT seq FROM jobs WHERE hold > 0",
    "processing": "SELECT job AS seq FROM runs WHERE outcome IS NULL",
    "scheduled": "SELECT seq FROM jobs WHERE hold > 0 AND hold = 1",
    "failed": "SELECT seq FROM jobs WHERE hold > 0 AND hold = 2",
    "blocked": "SELECT seq FROM jobs WHERE hold > 0 AND hold = 3",
}
MEMBERS.update((state, "SELECT seq FROM jobs WHERE hold = -2 AND state = '%s'" % state)
               for state in ENDED)
RARE = 5000  # up to so many members are looked up; more are met soon enough by a scan
SPAN = 20000  # rows that a search for a word looks at, at most, in a transaction

# The same sets as tests of one row.
PREDICATES = {"scheduled": "+hold = 1", "failed": "+hold = 2", "blocked": "+hold = 3"}
PREDICATES.update((state, "+state = '%s'" % state) for state in STATES)

SELECT_JOBS = """
    SELECT jobs.*, runs.started_at, runs.finished_at, runs.exit_code
    FROM jobs LEFT JOIN runs ON runs.run = jobs.run"""
SELECT_PAGE = SELECT_JOBS + """
    WHERE jobs.seq > :last AND (:queue IS NULL OR +queue = :queue) AND %s
    ORDER BY jobs.seq LIMIT :limit"""
BEFORE_NEWEST = """
    SELECT min(seq) - 1 FROM (
        SELECT jobs.seq FROM jobs WHERE (:queue IS NULL OR +queue = :queue) AND %s
        ORDER BY jobs.seq DESC LIMIT :limit)"""
SELECT_JOB = SELECT_JOBS + " WHERE jobs.id = :id"
# With all that run, of whatever queue: too many are no harm, the query tests the queue again.
MEMBERS_OF_QUEUE = """
    SELECT seq FROM jobs WHERE hold = 0 AND queue = :queue
    UNION ALL SELECT seq FROM jobs WHERE hold > 0 AND queue = :queue
    UNION ALL SELECT seq FROM jobs
        WHERE hold = -2 AND state IN ('completed', 'dead', 'cancelled') AND queue = :queue
    UNION ALL SELECT job FROM runs WHERE outcome IS NULL"""
LAST_LOOKED_AT = """
    SELECT min(seq) FROM (SELECT seq FROM jobs WHERE seq < :before ORDER BY seq DESC LIMIT :span)"""
# A page of the newest jobs that fit, of which no more than `span` rows are looked at.
SELECT_NEWEST = SELECT_JOBS + """
    WHERE jobs.seq < :before AND jobs.seq >= :floor AND (:queue IS NULL OR +queue = :queue)
        AND (:like = '%%%%' OR jobs.id LIKE :like ESCAPE '!' OR command LIKE :like ESCAPE '!')
        AND %s AND %s
    ORDER BY jobs.seq DESC LIMIT :limit"""
RUNS_OF_JOB = """
    WITH RECURSIVE chain(link) AS (
        SELECT run FROM jobs WHERE seq = :seq
        UNION ALL SELECT previous FROM chain JOIN runs ON run = link)
    SELECT link FROM chain"""
SELECT_RUNS = """
    SELECT run, worker, started_at, finished_at, exit_code, signal, outcome, error
    FROM runs WHERE run IN (%s) ORDER BY run""" % RUNS_OF_JOB

# Jobs come in by way of temporary tables, which SQLite keeps in memory or on disk, as they are
# large, and go into `jobs` as sets: see Queue.enqueue_from.
_COLUMNS = """id, command, queue, priority, max_retries, timeout, hold, run_after, cwd, env, after,
    unique_key, created_at, updated_at"""
INCOMING = (
    """CREATE TEMP TABLE IF NOT EXISTS incoming (
        %s, chosen, place,                      -- whether the caller chose the id; for errors
        number INTEGER PRIMARY KEY, instead TEXT)""" % _COLUMNS,
    "CREATE TEMP TABLE IF NOT EXISTS needed (number INTEGER, id TEXT)",
    "DELETE FROM temp.incoming", "DELETE FROM temp.needed",
)
INSERT_JOB = "INSERT INTO jobs (%s) VALUES (%s)" % (
    _COLUMNS, ", ".join("?" * (_COLUMNS.count(",") + 1)))
ADD_INCOMING = "INSERT INTO temp.incoming (%s, chosen, place, number) VALUES (%s)" % (
    _COLUMNS, ", ".join("?" * (_COLUMNS.count(",") + 4)))
# The id of the job that has a row's unique key: one in the queue, or an earlier one of these.
KEYS_TAKEN = (
    """UPDATE temp.incoming SET instead = (
        SELECT jobs.id FROM keys JOIN jobs ON seq = job WHERE key = incoming.unique_key)
    WHERE unique_key IS NOT NULL""",
    """UPDATE temp.incoming SET instead = (
        SELECT id FROM (SELECT unique_key, id, min(number) AS first FROM temp.incoming
                        WHERE unique_key IS NOT NULL GROUP BY unique_key) AS own
        WHERE own.unique_key = incoming.unique_key AND first < number)
    WHERE unique_key IS NOT NULL AND instead IS NULL""",
)
NOT_STORED = """
    SELECT instead, unique_key FROM temp.incoming WHERE instead IS NOT NULL ORDER BY number"""
IDS_TAKEN = """
    SELECT number, id, chosen, place, id IN (SELECT id FROM jobs) AS stored FROM temp.incoming
    WHERE instead IS NULL
        AND (stored OR id IN (SELECT id FROM temp.incoming WHERE instead IS NULL
                              GROUP BY id HAVING count(*) > 1))
    ORDER BY number"""
STORE_INCOMING = """
    INSERT INTO jobs (%s) SELECT %s FROM temp.incoming WHERE instead IS NULL
    ORDER BY number""" % (_COLUMNS, _COLUMNS)
LAST_SEQ = "SELECT ifnull((SELECT seq FROM sqlite_sequence WHERE name = 'jobs'), 0)"
ACTIVE_WITH_KEY = "SELECT id FROM keys JOIN jobs ON seq = job WHERE key = :key"
TAKE_KEYS = """
    INSERT INTO keys SELECT unique_key, seq FROM jobs
    WHERE seq > :last AND unique_key IS NOT NULL"""
TAKE_KEY = "INSERT INTO keys VALUES (:key, :seq)"
FREE_KEY = "DELETE FROM keys WHERE key = :key AND job = :seq"
_NEEDED = """
    FROM temp.needed JOIN temp.incoming USING (number) JOIN jobs ON jobs.id = incoming.id
    LEFT JOIN jobs AS need ON need.id = needed.id WHERE instead IS NULL"""
NOT_THERE = "SELECT place, needed.id" + _NEEDED + " AND need.seq IS NULL ORDER BY number LIMIT 1"
ADD_NEEDS = "INSERT OR IGNORE INTO deps SELECT jobs.seq, need.seq" + _NEEDED
COUNT_UNMET = """
    UPDATE jobs SET unmet = (SELECT count(*) FROM deps JOIN jobs AS need ON need.seq = needs
                             WHERE job = jobs.seq AND need.state != 'completed')
    WHERE seq > :last AND after IS NOT NULL"""
# Why a pending job waits, if it does: for others, or for its time.
_HOLD = "CASE WHEN %s > 0 THEN 3 WHEN run_after > :now THEN 1 ELSE 0 END"
HOLD_NEW = "UPDATE jobs SET hold = %s WHERE seq > :last AND after IS NOT NULL AND unmet = 0" % (
    _HOLD % "unmet")
# A circle can only be among new jobs, and only where one of them names itself or a later one.
NEW_NEEDS = """
    SELECT job, needs FROM deps WHERE job > :last AND needs > :last
        AND EXISTS (SELECT 1 FROM deps WHERE job > :last AND needs >= job)"""
NEW_QUEUES = "SELECT DISTINCT queue FROM jobs WHERE seq > :last AND hold IN (0, 1)"
MEET_DEPENDANTS = """
    UPDATE jobs SET unmet = unmet - 1,
        updated_at = CASE state WHEN 'pending' THEN :at ELSE updated_at END,
        hold = CASE WHEN hold < 0 THEN hold ELSE %s END
    WHERE seq IN (SELECT job FROM deps WHERE needs = :seq)""" % (_HOLD % "unmet - 1")
READY_DEPENDANTS = """
    SELECT DISTINCT queue FROM deps JOIN jobs ON seq = job WHERE needs = :seq AND hold IN (0, 1)"""
BLOCKERS = """
    SELECT id, state FROM jobs JOIN deps ON deps.needs = jobs.seq
    WHERE deps.job = :seq AND +state != 'completed'
    ORDER BY state IN ('dead', 'cancelled') DESC, seq LIMIT 1"""
# Blocked for ever, unless somebody retries: by an ended job, or by a job that is.
IS_STUCK = """
    WITH RECURSIVE needed(seq) AS (
        SELECT needs FROM deps WHERE job = :seq
        UNION SELECT deps.needs FROM needed JOIN jobs USING (seq) JOIN deps ON deps.job = seq
              WHERE unmet > 0)
    SELECT 1 FROM needed CROSS JOIN jobs USING (seq) WHERE state IN ('dead', 'cancelled') LIMIT 1"""

# Later jobs. No retry has to wait for longer than backoff_max, whatever clock it was stamped by.
_LONGEST = ":now + ifnull((SELECT CAST(value AS REAL) FROM config WHERE key = 'backoff_max'), %r)" \
    % SETTINGS["backoff_max"].default
IS_DUE = """
    SELECT 1 FROM jobs WHERE hold > 0 AND hold IN (1, 2) AND run_after <= :now
    UNION ALL SELECT 1 FROM jobs WHERE hold > 0 AND hold = 2 AND run_after > """ + _LONGEST
CAP_RETRIES = """
    UPDATE jobs SET run_after = %s WHERE seq IN (
        SELECT seq FROM jobs WHERE hold > 0 AND hold = 2 AND run_after > %s
        LIMIT %d)""" % (_LONGEST, _LONGEST, DUE_BATCH)
MOVE_DUE = """
    UPDATE jobs SET hold = 0 WHERE seq IN (
        SELECT seq FROM jobs WHERE hold > 0 AND hold IN (1, 2) AND run_after <= :now
        LIMIT %d)""" % DUE_BATCH
NEXT_DUE = """
    SELECT CASE WHEN EXISTS (%s) THEN :now ELSE min(soonest) END FROM (
        SELECT min(run_after) AS soonest FROM jobs WHERE hold > 0 AND hold = 1
        UNION ALL SELECT min(run_after) FROM jobs WHERE hold > 0 AND hold = 2)""" % IS_DUE

# The next job of all is the first of jobs_next, however many queues there are (with 1,000 of them a
# turn costs 80 us, and 1,300 without that index). Only where its queue may not go on (`held`), or
# where a worker serves certain queues, are the best ones of each queue compared: a seek per
# queue, however many jobs stand in any of them. What else a claim needs to know comes along: a
# statement costs more than what it asks for here.
RUN_SETTINGS = ("job_timeout", "kill_grace", "output_limit")
PAUSED = "SELECT queue FROM queues WHERE paused"
IN_USE = """(SELECT count(*) FROM runs JOIN jobs AS other ON other.seq = job
    WHERE outcome IS NULL AND other.queue = queues.queue)"""
HELD = "SELECT queue FROM queues WHERE paused OR job_limit <= " + IN_USE
_CLAIM = """
    SELECT seq, id, command, attempts + 1 AS attempts, max_retries, timeout, queue, cwd, env, run,
        EXISTS (""" + IS_DUE + ") AS due, " + ", ".join(
            "(SELECT value FROM config WHERE key = '%s') AS %s" % (key, key)
            for key in RUN_SETTINGS) + """,
        EXISTS (SELECT 1 FROM queues WHERE queue IN (jobs.queue, '*')
                AND (paused OR job_limit <= %s)) AS held
    FROM jobs""" % IN_USE
NEXT_OF_ALL = _CLAIM + " WHERE hold = 0 ORDER BY priority DESC, seq LIMIT 1"
_MAY_GO_ON = """served.queue NOT IN (%s)
            AND NOT EXISTS (SELECT 1 FROM queues WHERE queue = '*' AND paused)""" % HELD
_NEXT_MEMBERS_OF_QUEUES = _CLAIM + """ WHERE seq IN (
        SELECT (SELECT seq FROM jobs WHERE hold = 0 AND jobs.queue = served.queue
                ORDER BY priority DESC, seq LIMIT 1)
        FROM served WHERE %s)
    ORDER BY priority DESC, seq LIMIT 1""" % _MAY_GO_ON
_SERVING_ALL = """
    WITH RECURSIVE served(queue) AS (
        SELECT min(queue) FROM jobs WHERE hold = 0
        UNION ALL
        SELECT (SELECT min(queue) FROM jobs WHERE hold = 0 AND queue > served.queue)
        FROM served WHERE served.queue IS NOT NULL)"""
NEXT_OF_OTHERS = _SERVING_ALL + _NEXT_MEMBERS_OF_QUEUES
NEXT_OF_SERVED = _NEXT_MEMBERS_OF_QUEUES.replace("served", "temp.served")  # each one in it

CLAIM_JOB = """
    UPDATE jobs SET state = 'processing', hold = -1, attempts = attempts + 1, cancel = 0,
        run = :run, locked_by = :worker, locked_at = :at, updated_at = :at
    WHERE seq = :seq"""
# Numbers rise even where the newest runs have been deleted. (AUTOINCREMENT would write another
# page for each run, as an index of the runs by job would.)
LAST_RUN = """(max(ifnull((SELECT max(run) FROM runs), 0),
         ifnull((SELECT CAST(value AS INTEGER) FROM config WHERE key = 'last_run'), 0)))"""
KEEP_LAST_RUN = "INSERT OR REPLACE INTO config VALUES ('last_run', %s)" % LAST_RUN
START_RUN = """
    INSERT INTO runs (run, job, previous, worker, lock, started_at)
    VALUES (1 + %s, :seq, :previous, :worker, :lock, :now)""" % LAST_RUN
HELD_BY_RUN = """
    SELECT id, command, env, attempts, max_retries, cancel, queue, last_error, unique_key,
        EXISTS (SELECT 1 FROM deps WHERE needs = :seq) AS needed,
        EXISTS (SELECT 1 FROM queues WHERE queues.queue = jobs.queue AND job_limit) AS limited
    FROM jobs WHERE seq = :seq AND run = :run AND state = 'processing'"""  # the fence
SETTLE_JOB = """
    UPDATE jobs SET state = :state, hold = :hold, attempts = :attempts,
        run_after = :run_after, last_error = :last_error, cancel = 0,
        locked_by = NULL, locked_at = NULL, updated_at = :at
    WHERE seq = :seq"""
SETTLE_RUN = """
    UPDATE runs SET finished_at = :finished_at, exit_code = :exit_code, signal = :signal,
        outcome = :outcome, error = :error
    WHERE run = :run"""
# Only of a run that goes on: who was taken back adds nothing. So it comes before SETTLE_RUN.
ADD_OUTPUT = """
    INSERT INTO output SELECT :run, :start, :data
    WHERE EXISTS (SELECT 1 FROM runs WHERE run = :run AND outcome IS NULL)"""
# A piece that reaches beyond the gap stays, whole: no more than LIVE_MOST too much.
CUT_OUTPUT = """
    DELETE FROM output WHERE run = :run AND start >= :first AND start < :last
        AND start + length(data) <= :last"""
READ_OUTPUT = """
    SELECT start, data FROM output
    WHERE run = :run AND start + length(data) > :seen ORDER BY start"""
_ADD_UP = """
    ON CONFLICT (minute, queue, outcome)
    DO UPDATE SET runs = runs + excluded.runs, seconds = seconds + excluded.seconds"""
COUNT_RUN = "INSERT INTO stats VALUES (:minute, :queue, :outcome, 1, :seconds)" + _ADD_UP
FOLD_STATS = (  # minutes that no rate asks for any more become one row per outcome
    """INSERT INTO stats
           SELECT 0, queue, outcome, sum(runs), sum(seconds) FROM stats
           WHERE minute BETWEEN 1 AND :minute GROUP BY queue, outcome""" + _ADD_UP,
    "DELETE FROM stats WHERE minute BETWEEN 1 AND :minute",
)
PAUSE = """
    INSERT INTO queues (queue, paused) VALUES (?, 1) ON CONFLICT (queue) DO UPDATE SET paused = 1"""
SET_LIMIT = """
    INSERT INTO queues (queue, job_limit) VALUES (:queue, :limit)
    ON CONFLICT (queue) DO UPDATE SET job_limit = :limit"""
RESUME = "UPDATE queues SET paused = 0 WHERE :queue IS NULL OR queue = :queue"
SERVED_HERE = "(:every OR queue IN (SELECT queue FROM temp.served))"
WORK_LEFT = """
    SELECT EXISTS (SELECT 1 FROM runs JOIN jobs ON seq = job WHERE outcome IS NULL
                   AND %(served)s AND worker IN
                   (SELECT name FROM workers WHERE supervisor = :supervisor))
        OR NOT EXISTS (SELECT 1 FROM queues WHERE queue = '*' AND paused)
        AND (EXISTS (SELECT 1 FROM jobs WHERE hold > 0 AND hold = 2
                     AND %(served)s AND queue NOT IN (%(paused)s))
          OR EXISTS (SELECT 1 FROM queues WHERE job_limit > 0 AND NOT paused AND %(served)s
                     AND EXISTS (SELECT 1 FROM jobs WHERE hold = 0 AND jobs.queue = queues.queue)))
    """ % {"served": SERVED_HERE, "paused": PAUSED}
OTHER_SLOTS = "SELECT name, slot FROM workers WHERE slot > 0 AND queues IS :queues"
IDLE_WORKERS = """
    SELECT name, queues FROM workers WHERE slot > 0
        AND name NOT IN (SELECT worker FROM runs WHERE outcome IS NULL)"""
OPEN_RUNS = """
    SELECT seq, id, runs.run, worker, lock, started_at, error FROM runs JOIN jobs ON seq = job
    WHERE outcome IS NULL"""

CANCEL_PENDING = """
    UPDATE jobs SET state = 'cancelled', hold = -2, updated_at = :at,
        run_after = CASE hold WHEN 2 THEN NULL ELSE run_after END
    WHERE seq = :seq AND state = 'pending'"""
CANCEL_RUNNING = """
    UPDATE jobs SET cancel = 1 WHERE seq = :seq AND state = 'processing' AND NOT cancel"""
EDIT_JOB = """
    UPDATE jobs SET command = :command, queue = :queue, priority = :priority, timeout = :timeout,
        max_retries = :max_retries, run_after = :run_after, hold = :hold, cwd = :cwd, env = :env,
        updated_at = :at
    WHERE seq = :seq"""
RETRY_JOB = """
    UPDATE jobs SET state = 'pending', attempts = 0, last_error = NULL, updated_at = :at,
        hold = %s, run_after = CASE WHEN run_after > :now THEN run_after END
    WHERE seq = :seq AND state = :state""" % (_HOLD % "unmet")
# Jobs that have ended, that are past their time, and that no job with unmet needs waits for.
_PRUNABLE = """state IN (%s) AND updated_at <= :before
        AND (:queue IS NULL OR +queue = :queue) AND NOT EXISTS (
            SELECT 1 FROM deps JOIN jobs AS dependant ON dependant.seq = deps.job
            WHERE deps.needs = jobs.seq AND jobs.state != 'completed' AND dependant.unmet > 0)"""
FIND_PRUNABLE = "SELECT seq, " + _PRUNABLE + """ AS prunable
    FROM jobs WHERE seq > :last ORDER BY seq LIMIT :batch"""
STILL_PRUNABLE = "SELECT 1 FROM jobs WHERE seq = :seq AND " + _PRUNABLE
NEEDS = "SELECT needs FROM deps WHERE job = :seq"
DELETE_JOB = (
    "DELETE FROM deps WHERE job = :seq", "DELETE FROM deps WHERE needs = :seq",
    "DELETE FROM output WHERE run IN (%s)" % RUNS_OF_JOB,
    "DELETE FROM runs WHERE run IN (%s)" % RUNS_OF_JOB, "DELETE FROM jobs WHERE seq = :seq",
)
# How a `wait` for all stands, by numbers only: a clock may be set back meanwhile.
NOT_WAITED_FOR = (
    "CREATE TEMP TABLE IF NOT EXISTS ended (seq INTEGER PRIMARY KEY)", "DELETE FROM temp.ended",
    "INSERT INTO temp.ended SELECT seq FROM jobs"
    " WHERE hold = -2 AND state IN ('dead', 'cancelled')",
)
WAITED_FOR = """
    SELECT count(*) FROM (%s) WHERE +seq <= :last AND seq NOT IN (SELECT seq FROM temp.ended)
        AND seq NOT IN (SELECT seq FROM jobs WHERE id = :but)"""
# Whether one of the blocked jobs waits for another that is not: that has been retried, say.
CAN_STILL_RUN = """
    SELECT 1 FROM jobs JOIN deps ON job = jobs.seq JOIN jobs AS need ON need.seq = needs
    WHERE jobs.hold > 0 AND jobs.hold = 3 AND jobs.seq <= :last
        AND need.hold NOT IN (3, -2) LIMIT 1"""

COUNT_JOBS = """
    SELECT 'pending' AS state, 0 AS hold, queue, count(*) AS jobs
        FROM jobs WHERE hold = 0 GROUP BY queue
    UNION ALL SELECT 'processing', 0, queue, count(*)
        FROM runs JOIN jobs ON seq = job WHERE outcome IS NULL GROUP BY queue
    UNION ALL SELECT state, 0, queue, count(*)
        FROM jobs WHERE hold = -2 GROUP BY state, queue"""
# Their index does not lead with the queue, and to sort a million of them takes half a second: not
# where they are all of one queue.
COUNT_WAITING = """
    SELECT hold, min(queue) AS first, max(queue) AS last, count(*) AS jobs
    FROM jobs WHERE hold > 0 GROUP BY hold"""
COUNT_WAITING_BY_QUEUE = """
    SELECT 'pending', hold, queue, count(*) FROM jobs WHERE hold > 0 AND hold = :hold
    GROUP BY queue"""
IDS_LIKE = """
    SELECT * FROM (SELECT id FROM (SELECT id FROM jobs ORDER BY seq DESC LIMIT 10000)
                   WHERE id BETWEEN :low AND :high LIMIT 200)
    UNION SELECT * FROM (SELECT id FROM jobs WHERE id BETWEEN :low AND :high LIMIT 200)"""
STANDING_BEFORE = """
    SELECT (SELECT count(*) FROM jobs WHERE hold = 0 AND queue = :queue AND priority > :priority)
        + (SELECT count(*) FROM jobs WHERE hold = 0 AND queue = :queue AND priority = :priority
           AND seq < :seq)"""
RUNNING_IN = """
    SELECT id FROM runs JOIN jobs ON seq = job WHERE outcome IS NULL AND queue = :queue
    ORDER BY runs.run"""
# Jobs of one queue and priority stand in the order of seq: a few seeks for each of these.
OLDEST_READY = _SERVING_ALL + """, heads(queue, priority) AS (
        SELECT queue, (SELECT max(priority) FROM jobs WHERE hold = 0 AND jobs.queue = served.queue)
        FROM served WHERE %s
        UNION ALL
        SELECT queue, (SELECT max(priority) FROM jobs WHERE hold = 0 AND jobs.queue = heads.queue
                       AND jobs.priority < heads.priority)
        FROM heads WHERE priority IS NOT NULL)
    SELECT updated_at, run_after FROM jobs WHERE seq = (
        SELECT min((SELECT min(seq) FROM jobs WHERE hold = 0 AND jobs.queue = heads.queue
                    AND jobs.priority = heads.priority)) FROM heads)""" % _MAY_GO_ON
SELECT_IDENTITY = "SELECT value FROM config WHERE key = 'database_id'"
SELECT_WORKERS = """
    SELECT workers.*, jobs.id AS job, jobs.locked_at AS job_started_at
    FROM workers LEFT JOIN runs ON worker = name AND outcome IS NULL LEFT JOIN jobs ON seq = job
    ORDER BY (SELECT started_at FROM workers AS leader WHERE leader.name = workers.supervisor),
        supervisor, slot"""


# -- database -----------------------------------------------------------------------------

BUSY_BUDGET = 30.0  # seconds for which a busy database is tried again
IMPATIENCE = 0.01  # the same where somebody has something better to do; see impatient()
LOOKS = 1.0  # seconds for which a file that looks bad and changes is looked at again
SYNC_DELAY = 0.1  # seconds that a worker's commit may wait for its fsync
UNAVAILABLE = ("full", "disk I/O error", "unable to open", "locking protocol")

_connections: set[int] = set()  # ids of the Databases open in this process; see safe_to_fork()
# To close the last connection would bring the -wal file into a damaged database, and delete it.
_left_open: list[sqlite3.Connection] = []


def safe_to_fork() -> bool:
    """Whether no connection would cross a fork: SQLite's locks do not survive one."""
    return FORK and not _connections


def default_path() -> str:
    """`$QUEUECTL_DB`, or `queuectl.db` in the user's state folder. QueueError."""
    path = os.environ.get("QUEUECTL_DB")
    if path:
        return path
    folder = default_folder()
    if folder is None:
        raise QueueError("no usable home folder; name the database with --db PATH")
    try:
        make_folder(folder)
    except OSError as error:
        raise QueueError("cannot make the folder %s: %s; name the database with --db PATH"
                         % (folder, error.strerror)) from None
    return os.path.join(folder, "queuectl.db")


class Database:
    """An SQLite file of ours, which is created on first use. Knows nothing of jobs.

    What returns has been committed and fsynced, unless `durable` is false: then commits wait
    for sync(), which must be called at `sync_at` (time.monotonic; infinity: not at all), and
    somebody else checkpoints. With `expect`, an `identity`, it opens that very database, or none.
    `identity` is the random id of the database.

    Every method raises QueueError for what the user can mend, and nothing is changed then."""

    def __init__(self, path: str | None = None, *, durable: bool = True,
                 expect: str | None = None) -> None:
        self.path = self.path_of(path)
        self.folder = self.path + "-run"
        self.identity = ""
        self.sync_at = math.inf
        self._durable = durable
        self._expect = expect
        self._wal_fd = -1
        self._version = -1
        self._checked = 0  # st_mtime_ns of the file when its id was last read
        self._patience = BUSY_BUDGET
        self._is_damaged = False
        try:
            self._file = self._inspect()
            self._db = sqlite3.connect(
                _uri(self.path) + "?mode=rw", uri=True, timeout=0, isolation_level=None)
            _connections.add(id(self))
            self._db.row_factory = sqlite3.Row
            try:
                self._set_up()
            except BaseException:
                self.close()
                raise
        except sqlite3.Error as error:
            raise self._explain(error) from None
        except OSError as error:
            kind = DatabaseUnavailable if error.errno in SHORTAGES else QueueError
            raise kind("cannot open %s: %s" % (self.path, error.strerror)) from None

    @staticmethod
    def path_of(path: str | None) -> str:
        """The real path of a database: by default default_path(). QueueError."""
        path = default_path() if path is None else path
        if not path or "\0" in path:
            raise QueueError("%s is not a path" % _shown(path))
        return os.path.realpath(path)

    def close(self) -> None:
        """Sync and close. The last one to close a database tidies up its -wal file."""
        if id(self) in _connections:
            with contextlib.suppress(QueueError):
                self.sync()
            if self._wal_fd >= 0:
                os.close(self._wal_fd)
            _connections.discard(id(self))
            if self._is_damaged and _size(self.path + "-wal"):
                _left_open.append(self._db)
            else:
                self._db.close()

    def __del__(self) -> None:
        _connections.discard(id(self))  # of who was forgotten: its connection closes itself

    # Opening. A file is judged before any connection may write to it: opening a foreign WAL
    # database would rewrite it, and open() is out of question, since closing a descriptor of
    # a database drops all the POSIX locks that SQLite holds on it in this process.

    def _inspect(self) -> tuple[int, int]:
        """Refuse a file that is not ours; (device, inode) of the one that is."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            if self._expect:
                raise self._gone() from None
            with contextlib.suppress(FileExistsError):
                os.close(create_file(self.path, os.O_EXCL))
                flush_folder(os.path.dirname(self.path))
            status = os.stat(self.path)
        if stat.S_ISDIR(status.st_mode):
            raise QueueError("%s is a folder; name a file with --db" % self.path)
        if not stat.S_ISREG(status.st_mode):
            raise QueueError("%s is not a regular file" % self.path)
        if status.st_nlink > 1 and not self._expect:  # who is at work goes on by the name he knows
            raise QueueError("%s has a second name (a hard link), and SQLite would keep a log for "
                             "each; leave it one name only" % self.path)
        until = time.monotonic() + LOOKS
        while True:
            before = self._traces()
            try:
                self._look()
                break
            except (QueueError, sqlite3.Error):
                # Somebody may be in the middle of creating it, or of a checkpoint: only what
                # looks bad while nothing moves is bad.
                if before == self._traces() and not before[2] or time.monotonic() > until:
                    raise
                time.sleep(0.005)
        if not all(os.access(path, os.W_OK) for path in (self.path, os.path.dirname(self.path))):
            raise QueueError("%s cannot be written; make the file and its folder writable"
                             % self.path)
        return status.st_dev, status.st_ino

    def _traces(self) -> tuple[int, int, int]:
        status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns, _size(self.path + "-wal")

    @contextlib.contextmanager
    def _file_itself(self) -> Iterator[sqlite3.Connection]:
        """The file as it stands, without its -wal file, and without a trace of the reader."""
        look = sqlite3.connect(_uri(self.path) + "?immutable=1&mode=ro", uri=True, timeout=0,
                               isolation_level=None)
        try:
            # Or SQLite itself refuses what a checkpoint left half done, which only a connection
            # that sees the -wal file can complete.
            look.execute("PRAGMA writable_schema = ON")
            look.execute("BEGIN")
            yield look
        finally:
            look.close()

    def _look(self) -> None:
        """Judge the file as it stands. QueueError or sqlite3.Error: it is not ours, or bad."""
        length, _, log = self._traces()
        if not length:
            return
        if length < 100:  # the size of a header; SQLite takes a single byte for nothing
            raise sqlite3.DatabaseError("file is not a database")
        with self._file_itself() as look:
            owner, version, size = (
                look.execute("PRAGMA " + name).fetchone()[0]
                for name in ("application_id", "user_version", "page_size"))
            # What is ours is not read any further: most of it may still be in the -wal file.
            foreign = owner != APPLICATION_ID and (
                owner or version or log
                or look.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
        if foreign:
            raise QueueError("%s is another program's database; name another file with --db"
                             % self.path)
        self._check_version(version)
        if length % size and not log:
            raise QueueError("%s is truncated within a page; put a copy in its place" % self.path)

    def _check_version(self, version: int) -> None:
        if version > VERSION:
            raise QueueError("%s was made by a newer queuectl (schema %d; this one knows %d)"
                             % (self.path, version, VERSION))
        if version == 1:
            raise QueueError("%s was made by a queuectl that was never released" % self.path)

    def _set_up(self) -> None:
        self._execute("PRAGMA synchronous = %s" % ("FULL" if self._durable else "NORMAL"))
        if sys.platform == "darwin":
            self._execute("PRAGMA fullfsync = ON")
        self._execute("PRAGMA wal_autocheckpoint = 0")  # see checkpoint
        self._execute("PRAGMA journal_size_limit = %d" % (WAL_LIMIT // 2))
        version = self._value("PRAGMA user_version")
        self._check_version(version)
        if version != VERSION:
            if self._expect:
                raise self._gone()
            self._migrate()
        self.identity = str(self._value(SELECT_IDENTITY))
        if self._expect and self._expect != self.identity:
            raise self._gone()

    def _migrate(self) -> None:
        # First the mark, in a rollback journal, so that no other program and no other first
        # use ever sees a WAL database without it.
        if self._value("PRAGMA application_id") != APPLICATION_ID:
            # A commit writes whole pages: with 4096 bytes, workers drain at 0.85 x the rate.
            self._execute("PRAGMA page_size = 1024")
            self._execute("PRAGMA auto_vacuum = INCREMENTAL")
            with self._transaction():
                self._execute(MARK)
        self._execute("PRAGMA journal_mode = WAL")
        with self._transaction():
            version = self._value("PRAGMA user_version")  # others may have been faster
            self._check_version(version)
            if 0 < version < VERSION:
                self._allow_migration()
            statements = [text for number in range(version + 1, VERSION + 1)
                          for text in UPGRADES[number]] if version else SCHEMA
            for statement in statements:
                self._execute(statement)
            self._execute("PRAGMA user_version = %d" % VERSION)

    def _allow_migration(self) -> None:
        """QueueError if somebody uses the older schema."""

    # Executing. Every statement goes through here.

    def _execute(self, sql: str, parameters: Any = (), many: bool = False) -> sqlite3.Cursor:
        """Execute one statement, whose rows (if any) nobody wants."""
        call = self._db.executemany if many else self._db.execute
        return self._insist(lambda: call(sql, parameters))

    def _rows(self, sql: str, parameters: Any = ()) -> list[sqlite3.Row]:
        """All rows of a query: nothing is read later, when it could fail elsewhere."""
        return self._insist(lambda: self._db.execute(sql, parameters).fetchall())

    def _row(self, sql: str, parameters: Any = ()) -> sqlite3.Row | None:
        rows = self._rows(sql, parameters)
        return rows[0] if rows else None

    def _value(self, sql: str, parameters: Any = ()) -> Any:
        rows = self._rows(sql, parameters)
        return rows[0][0] if rows else None

    def _insist(self, call: Callable[[], T]) -> T:
        """Where the database is busy, try again after a short random wait: SQLite's own busy
        handler lets some writers starve. QueueError for all but a broken constraint."""
        budget = 0.0
        while True:
            try:
                return call()
            except sqlite3.IntegrityError:
                raise
            except UnicodeDecodeError:
                raise self._damaged() from None
            except sqlite3.Error as error:
                now = time.monotonic()
                budget = budget or now + self._patience
                if "locked" not in str(error) or now > budget:
                    raise self._explain(error) from None
                if now >= self.sync_at:
                    with contextlib.suppress(DatabaseUnavailable):
                        self.sync()
                # 0.1 to 0.3 ms, however long it has waited already: longer waits would let
                # newcomers win.
                time.sleep((0.5 + os.urandom(1)[0] / 256) * 0.0002)

    def _explain(self, error: sqlite3.Error) -> QueueError:
        text = str(error)
        if not text or "malformed" in text or "Could not decode" in text:
            # SQLite takes what the disk cannot read for something malformed, too.
            if not any(unreadable(path, bool(_connections))
                       for path in (self.path, self.path + "-wal")):
                return self._damaged()
            text = "disk I/O error"
        kind = DatabaseBusy if "locked" in text else DatabaseUnavailable \
            if any(word in text for word in UNAVAILABLE) else QueueError
        advice = {
            "file is not a database": "name another file with --db",
            "attempt to write a readonly database": "make the file and its folder writable",
            "unable to open database file": "see that its folder exists and is writable",
            "database or disk is full": "nothing was stored; make room on its disk",
            "disk I/O error": "nothing was stored; see that its disk is well, and has room",
            "database is locked": "another program held it for %g seconds" % self._patience,
        }.get(text)
        return kind("%s: %s%s" % (self.path, text, "; " + advice if advice else ""))

    def _damaged(self) -> QueueError:
        self._is_damaged = True
        return QueueError("%s is corrupt; stop its workers, delete its -wal and -shm files, and "
                          "put a copy in its place" % self.path)

    def _json(self, text: str | None) -> Any:
        """What has been stored as JSON."""
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise self._damaged() from None

    @contextlib.contextmanager
    def _transaction(self, sync: bool = True) -> Iterator[None]:
        """BEGIN IMMEDIATE: the writer lock is taken before anything is read, so what was
        read is still true when it is written, and no transaction fails halfway as busy.
        Without `sync`, one that is not durable may wait for the fsync of another."""
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise self._explain(error) from None
            raise
        if self._durable:
            self.checkpoint(4 * WAL_LIMIT)  # where no supervisor does
        elif sync:
            self.sync_at = min(self.sync_at, time.monotonic() + SYNC_DELAY)

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        """All that is read in here is of one moment. (What is written is in temporary tables.)"""
        self._execute("BEGIN")
        try:
            yield
        finally:
            if self._db.in_transaction:  # some errors end it
                self._execute("COMMIT")

    @contextlib.contextmanager
    def impatient(self, patience: float = IMPATIENCE) -> Iterator[None]:
        """In here, no more than so many seconds are spent on a busy database:
        DatabaseUnavailable, instead."""
        self._patience = patience
        try:
            yield
        finally:
            self._patience = BUSY_BUDGET

    # Durability. Clients commit with synchronous=FULL. Workers commit with NORMAL, which
    # syncs nothing, and sync the -wal file themselves, outside of the writer lock. A crash before
    # that loses the last commits, never one in their midst: a frame counts only with all before it.
    # What was settled then runs again, which `processing` in the older state allows for. (Of a
    # claim that is lost the number is given again: nobody is left who has it.) So what others read
    # of a worker's commits may be up to SYNC_DELAY younger than what is on disk. Where an fsync
    # fails, the next one may succeed without having written what the first one lost (Linux tells
    # of an error once): then, too, only a crash loses anything.
    #
    # A checkpoint must not bring commits into the database that the -wal file may still lose:
    # SQLite syncs that first. It has no lock on the -wal file, so that sync() may open and close
    # it. The supervisor checkpoints at WAL_LIMIT, of which the worker whose sync() has seen it
    # tells it; a client after its own commit at four times as much, where no supervisor does.

    def sync(self) -> int:
        """Bring this connection's commits to the disk; the size of the -wal file. QueueError."""
        if self.sync_at == math.inf:
            return 0
        try:
            if self._wal_fd < 0:
                self._wal_fd = os.open(self.path + "-wal", os.O_RDWR)
                flush_folder(os.path.dirname(self.path))  # its name must last as well
            flush(self._wal_fd)
        except OSError as error:
            self.sync_at = time.monotonic() + 1
            raise DatabaseUnavailable("cannot sync %s: %s" % (self.path, error.strerror)) from None
        self.sync_at = math.inf
        return os.fstat(self._wal_fd).st_size

    def checkpoint(self, limit: int = WAL_LIMIT) -> None:
        """Bring the -wal file into the database once it has grown to `limit` bytes.

        SQLite before 3.51.3 can corrupt a database when a commit resets the WAL while another
        connection checkpoints (https://www.sqlite.org/wal.html#walresetbug). So this one
        holds the writer lock while another one checkpoints. (TRUNCATE takes the lock itself;
        but it waits for it unfairly, without it where its time runs out, and holding it where a
        reader is slow.) PASSIVE waits for nobody: where a reader still needs an older state, it
        brings over what it can, the file goes on growing, and the next checkpoint ends it. Where
        this one fails, nothing is lost, and the next one will do."""
        if _size(self.path + "-wal") < limit:
            return
        with contextlib.suppress(QueueError):
            other = Database(self.path, expect=self.identity)
            try:
                self._execute("BEGIN IMMEDIATE")
                try:
                    other._execute("PRAGMA wal_checkpoint(PASSIVE)")
                finally:
                    self._execute("ROLLBACK")
                # The next write begins the -wal file anew, and cuts it to journal_size_limit.
                self._execute(MARK)  # (an UPDATE to the same would not write)
            finally:
                other.close()

    def changed(self) -> bool:
        """Whether another connection has committed since the last call (5 microseconds)."""
        before, self._version = self._version, self._value("PRAGMA data_version")
        return before != self._version

    def check_in_place(self) -> None:
        """Raise QueueError if the database has been deleted or replaced under us. An inode may be
        given to another file, and other contents to a file. This connection would not see that
        in the pages that it knows: where the file has changed, its id is read from there."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            raise self._gone() from None
        if (status.st_dev, status.st_ino) != self._file or not status.st_size:
            raise self._gone()
        if status.st_mtime_ns == self._checked:
            return
        try:
            with self._file_itself() as look:
                found = look.execute(SELECT_IDENTITY).fetchone()
        except sqlite3.Error as error:
            if "no such table" not in str(error):
                return  # a checkpoint is under way: it will be seen later
            found = None  # the table is only in the -wal file yet
        if found and found[0] != self.identity:
            raise self._gone()
        self._checked = status.st_mtime_ns

    def file_identity(self) -> str:
        """What no other file has: a copy of this one has its `identity`, and goes on with the same
        numbers."""
        return "%s-%x" % (self.identity, self._file[1])

    def _gone(self) -> QueueError:
        return QueueError("%s has been deleted or replaced; stopping" % self.path)


def require_safe(path: str) -> None:
    """Refuse to run what a database says, if others can write it: before it is opened, which
    would bring into it what they may have put beside it. QueueError."""
    try:
        reason = unsafe_reason(path)
        if reason:
            raise QueueError("%s %s: no worker runs what others may have put there"
                             % (path, reason))
        make_folder(path + "-run")
    except OSError as error:
        raise QueueError("cannot use %s: %s" % (path, error.strerror)) from None


def _uri(path: str) -> str:
    """The URI by which SQLite opens a file, special characters and all."""
    for character, escape in (("%", "%25"), ("?", "%3f"), ("#", "%23")):
        path = path.replace(character, escape)
    return "file:" + (path if os.sep == "/" else "/" + path.replace("\\", "/"))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


# -- queue --------------------------------------------------------------------------------

RESCUE_PAUSE = 0.02  # seconds between two looks at a tree that is being ended, at first


class Queue(Database):
    """A queue: one SQLite database, which is created on first use.

    Safe to use from any number of processes at once; within a process, one Queue a thread,
    and none across a fork. What returns has been committed and fsynced (if `durable`).

    Every method raises QueueError for what the user can mend, and nothing is changed then.
    Times that come in are epoch seconds."""

    _serves_every = True
    _receiving = False  # whether enqueue_from is under way

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _allow_migration(self) -> None:
        """Workers that know an older schema must not go on with a newer one."""
        pids = [str(row["pid"]) for row in self._rows("SELECT name, pid FROM workers")
                if is_held(self.lock_path(row["name"]))]
        if pids:
            raise QueueError("%s is served by workers of an older queuectl; let them finish "
                             "first: kill %s" % (self.path, " ".join(pids)))

    # Jobs come in.

    def enqueue(self, command: str, *, id: str | None = None, queue: str | None = None,
                priority: int | None = None, max_retries: int | None = None,
                timeout: Any = None, delay: Any = None, run_at: Any = None,
                cwd: str | None = None, env: Mapping[str, str] | None = None,
                after: Sequence[str] | None = None, unique: str | None = None) -> str:
        """Store a job and return its id, once it is on disk.

        `command` is a line for the shell. `timeout` and `delay` are seconds or text such as
        `10m`; `run_at` is epoch seconds or text such as `2026-01-31T08:00`. What is None
        takes its default: max_retries and timeout from the settings, cwd from the caller."""
        fields = dict(id=id, command=command, queue=queue, priority=priority,
                      max_retries=max_retries, timeout=timeout, delay=delay, run_at=run_at,
                      cwd=cwd, env=env, after=after, unique=unique)
        ids: list[str] = []
        self.enqueue_from([("", fields)], ids.extend)
        return ids[0]

    def enqueue_many(self, jobs: Iterable[Mapping[str, Any]]) -> list[str]:
        """Store jobs, given as dicts of the fields that enqueue() takes, in one transaction:
        all or none. Returns their ids, in order, once they are on disk. QueueError."""
        ids: list[str] = []
        self.enqueue_from((("job %d: " % number, fields)
                           for number, fields in enumerate(jobs, 1)), ids.extend)
        return ids

    def enqueue_from(self, jobs: Iterable[tuple[str, Mapping[str, Any]]],
                     show: Callable[[list[str]], None],
                     note: Callable[[str], None] = lambda text: None) -> list[str]:
        """As enqueue_many, for pairs of a place ("line 3: "), which errors begin with, and a
        job. `show` gets the ids, page by page, and `note` a line for each job that its unique
        key kept from being stored (whose id is that of the one which has the key). Returns the
        queues that have got jobs.

        The writer lock is not held while `jobs` is consumed, which may take its time: until
        then they stand in a temporary table. (A `delay` counts from when that began.) Where `jobs`
        or `show` enqueue something themselves, that has tables of its own."""
        if self._receiving:
            with Queue(self.path, expect=self.identity) as other:
                return other.enqueue_from(jobs, show, note)
        self._receiving = True
        try:
            return self._receive(jobs, show, note)
        finally:
            self._receiving = False

    def _receive(self, jobs: Iterable[tuple[str, Mapping[str, Any]]],
                 show: Callable[[list[str]], None], note: Callable[[str], None]) -> list[str]:
        now = time.time()
        make_row = _job_rows(int(self.settings()["max_retries"]), now)
        for statement in INCOMING:
            self._execute(statement)
        rows: list[tuple[Any, ...]] = []
        needed: list[tuple[int, str]] = []
        number, keys, waiting = 0, False, False
        for number, (place, fields) in enumerate(jobs, 1):
            try:
                parsed = job_fields(fields)
                rows.append(make_row(parsed) + ("id" in parsed, place, number))
            except QueueError as error:
                raise QueueError("%s%s" % (place, error)) from None
            needed += [(number, id) for id in parsed.get("after", ())]
            keys |= "unique" in parsed
            waiting |= bool(needed)
            if len(rows) == PAGE:
                self._add_incoming(rows, needed)
        self._add_incoming(rows, needed)
        with self._transaction():  # nothing in here may wait for anybody
            last = self._value(LAST_SEQ)  # we have the writer lock: what comes after it is ours
            self._store_incoming(keys)
            if keys:
                self._execute(TAKE_KEYS, {"last": last})
            if waiting:
                self._link(last, now)
            queues = [row[0] for row in self._rows(NEW_QUEUES, {"last": last})]
        for id, key in self._rows(NOT_STORED) if keys else ():
            note("%s has the key %s and has not ended; nothing stored" % (id, key))
        self.wake(queues)
        for first in range(1, number + 1, PAGE):
            show([row[0] for row in self._rows(
                "SELECT ifnull(instead, id) FROM temp.incoming WHERE number BETWEEN ? AND ? "
                "ORDER BY number", (first, first + PAGE - 1))])
        return queues

    def _add_incoming(self, rows: list[tuple[Any, ...]], needed: list[tuple[int, str]]) -> None:
        with self._snapshot():
            self._execute(ADD_INCOMING, rows, many=True)
            self._execute("INSERT INTO temp.needed VALUES (?, ?)", needed, many=True)
        rows.clear()
        needed.clear()

    def _store_incoming(self, keys: bool) -> None:
        """Bring the rows into `jobs`, with other ids for those whose generated ones are taken. As
        a row may name an earlier one `instead`, by its id, that is looked up again then."""
        while True:
            for statement in KEYS_TAKEN if keys else ():
                self._execute(statement)
            try:
                self._execute(STORE_INCOMING)
                return
            except sqlite3.IntegrityError:  # only of an id; the statement has undone itself
                taken = self._rows(IDS_TAKEN)
            if not taken:
                raise self._damaged()
            drawn = [(new_id(), row["number"]) for row in taken if not row["chosen"]]
            if not drawn:  # all were chosen: to blame is who is stored, or the later of two
                seen: set[str] = set()
                for row in taken:
                    if row["stored"] or row["id"] in seen:
                        raise QueueError("%sthe id %s is taken" % (row["place"], row["id"]))
                    seen.add(row["id"])
            self._execute("UPDATE temp.incoming SET id = ? WHERE number = ?", drawn, many=True)

    def _link(self, last: int, now: float) -> None:
        """Make the jobs after seq `last` wait for those that they name. QueueError."""
        row = self._row(NOT_THERE)
        if row is not None:
            raise QueueError("%safter: there is no job %s" % tuple(row))
        self._execute(ADD_NEEDS)
        self._execute(COUNT_UNMET, {"last": last})
        self._execute(HOLD_NEW, {"last": last, "now": now})
        # Take away who waits for nobody, until nobody is left, or only a circle.
        left: dict[int, int] = {}
        users: dict[int, list[int]] = {}
        for seq, need in self._rows(NEW_NEEDS, {"last": last}):
            left[seq] = left.get(seq, 0) + 1
            users.setdefault(need, []).append(seq)
        free = [need for need in users if need not in left]
        while free:
            for user in users.get(free.pop(), ()):
                left[user] -= 1
                if not left[user]:
                    del left[user]
                    free.append(user)
        if left:
            raise QueueError("after: these jobs wait for each other in a circle: %s" % " ".join(
                sorted(self._value("SELECT id FROM jobs WHERE seq = ?", (seq,))
                       for seq in list(left)[:10])))

    # Jobs are looked at.

    def get(self, id: str) -> Job:
        """The job of that id. QueueError if there is none."""
        row = self._row(SELECT_JOB, {"id": parse_name(id)})
        if row is None:
            raise QueueError("there is no job %s" % id)
        return self._job(row)

    def _job(self, row: sqlite3.Row) -> Job:
        fields = dict(row)
        fields.update(
            view=HOLD_VIEWS.get(row["hold"], row["state"]),
            env=self._json(row["env"]) or {}, after=(row["after"] or "").split(),
            unique=row["unique_key"], run_at=iso(row["run_after"]),
            started_at=iso(row["started_at"]), finished_at=iso(row["finished_at"]))
        if row["state"] == "pending" and not row["attempts"]:  # its runs were before a dlq retry
            fields.update(exit_code=None, started_at=None, finished_at=None)
        return Job(**fields)

    def ids(self, prefix: str) -> list[str]:
        """Ids that begin with `prefix`: up to 200 of the newest 10,000 jobs, and 200 of all."""
        return [row["id"] for row in self._rows(IDS_LIKE, {
            "low": prefix, "high": prefix + "\U0010ffff"})]

    def _named(self, ids: Sequence[str]) -> list[Job]:
        return [self.get(id) for id in dict.fromkeys([ids] if isinstance(ids, str) else ids)]

    def jobs(self, state: str | None = None, queue: str | None = None,
             limit: int | None = None, newest: int | None = None) -> Iterator[Job]:
        """Jobs in the order in which they came, read page by page: no transaction lasts
        longer than a page. `state` is one of STATES or VIEWS; at most the `limit` oldest ones
        or the `newest`. QueueError."""
        if state is None:
            where = "1"
        else:
            members = _members(state)
            where = "jobs.seq IN (%s)" % members if self._is_rare(members) else PREDICATES[state]
        last, left = 0, sys.maxsize if limit is None else limit
        if newest is not None:
            left = min(left, newest)
            last = self._value(BEFORE_NEWEST % where, {"queue": queue, "limit": newest}) or 0
        while left > 0:
            rows = self._rows(SELECT_PAGE % where, {
                "last": last, "queue": queue, "limit": min(PAGE, left)})
            yield from map(self._job, rows)
            if len(rows) < PAGE:
                return
            last, left = rows[-1]["seq"], left - len(rows)

    def newest(self, state: str | None = None, queue: str | None = None, word: str = "",
               before: int | None = None, limit: int = 50) -> tuple[list[Job], int | None]:
        """At most `limit` jobs before seq `before`, the newest first, whose id or command holds
        `word` (as LIKE compares), and from where to go on (None: there are no more). It may stop
        sooner: so that it is quick, it looks at no more than SPAN rows. But a job whose id is the
        word itself, and for which others leave room, is found at once. QueueError."""
        first, before = before is None, 1 << 62 if before is None else before
        sets = [MEMBERS_OF_QUEUE] * (queue is not None) + ([_members(state)] if state else [])
        rare = next((members for members in sets if self._is_rare(members, queue)), None)
        like = "%%%s%%" % "".join("!" + c if c in "!%_" else c for c in word)
        values: dict[str, Any] = {
            "before": before, "queue": queue, "like": like, "id": word, "limit": limit + 1,
            "span": SPAN if state or queue is not None or word else limit + 1, "floor": 0}
        if rare is None:
            values["floor"] = self._value(LAST_LOOKED_AT, values) or 0
        where = (PREDICATES.get(state or "", "1"), "jobs.seq IN (%s)" % rare if rare else "1")
        rows = self._rows(SELECT_NEWEST % where, values)
        jobs = [self._job(row) for row in rows[:limit]]
        if len(rows) > limit:
            return jobs, jobs[-1].seq
        if word and first:
            jobs += [self._job(row) for row in self._rows(SELECT_NEWEST % (
                where[0], "jobs.id = :id"), dict(values, before=values["floor"], floor=0))]
        more = self._value("SELECT 1 FROM jobs WHERE seq < :floor LIMIT 1", values)
        return jobs, values["floor"] if more else None

    def _is_rare(self, members: str, queue: str | None = None) -> bool:
        return self._value("SELECT 1 FROM (%s) LIMIT 1 OFFSET %d" % (members, RARE),
                           {"queue": queue}) is None

    def runs(self, id: str) -> list[Run]:
        """Every run of a job, the first one first. QueueError if there is no such job."""
        return [Run(**dict(row, number=number, started_at=iso(row["started_at"]),
                           finished_at=iso(row["finished_at"])))
                for number, row in enumerate(
                    self._rows(SELECT_RUNS, {"seq": self.get(id).seq}), 1)]

    def output(self, run: int) -> bytes:
        """What is kept, or there until now, of a run's output. QueueError."""
        return join_pieces(self.pieces(run)[0], 0)[0]

    def pieces(self, run: int, seen: int = 0) -> tuple[list[tuple[int, bytes]], bool]:
        """The pieces of a run's output (see join_pieces) that go beyond its first `seen`
        bytes, and whether the run has ended. QueueError."""
        with self._snapshot():
            row = self._row("SELECT outcome FROM runs WHERE run = ?", (run,))
            if row is None:
                raise QueueError("that run has been deleted with its job")
            pieces = self._rows(READ_OUTPUT, {"run": run, "seen": seen})
        return [(start, data) for start, data in pieces], row["outcome"] is not None

    def blocker(self, job: Job) -> tuple[str, str] | None:
        """(id, state) of a job that a blocked one waits for: a dead or cancelled one first."""
        row = self._row(BLOCKERS, {"seq": job.seq}) if job.view == "blocked" else None
        return (row["id"], row["state"]) if row else None

    def stuck(self, job: Job) -> bool:
        """Whether a job can never run as things are: one that it waits for has ended badly."""
        return job.view == "blocked" and bool(self._value(IS_STUCK, {"seq": job.seq}))

    def standing_before(self, job: Job) -> int:
        """How many ready jobs of its queue are handed out before it."""
        return int(self._value(STANDING_BEFORE, job.__dict__))

    def running_in(self, queue: str) -> list[str]:
        """The ids of a queue's jobs that run now."""
        return [row[0] for row in self._rows(RUNNING_IN, {"queue": queue})]

    def counts_by_queue(self) -> dict[str, dict[str, int]]:
        """For each queue, how many jobs there are in each of STATES, and (again) of VIEWS."""
        queues: dict[str, dict[str, int]] = {}
        with self._snapshot():
            rows: list[Any] = self._rows(COUNT_JOBS)
            for row in self._rows(COUNT_WAITING):
                if row["first"] == row["last"]:
                    rows.append(("pending", row["hold"], row["first"], row["jobs"]))
                else:
                    rows += self._rows(COUNT_WAITING_BY_QUEUE, {"hold": row["hold"]})
        for state, hold, queue, jobs in rows:
            counts = queues.setdefault(queue, dict.fromkeys(STATES + VIEWS, 0))
            for key in (state,) if hold == READY else (state, HOLD_VIEWS.get(hold)):
                if key not in counts:
                    raise self._damaged()
                counts[key] += jobs
        return queues

    def counts(self) -> dict[str, int]:
        """How many jobs there are in each of STATES, and (again) in each of VIEWS."""
        return total(self.counts_by_queue())

    def oldest_ready(self) -> float | None:
        """Since when (epoch seconds) the oldest job that could run has been waiting."""
        row = self._row(OLDEST_READY)
        return max(from_iso(row["updated_at"]), row["run_after"] or 0) if row else None

    def stats(self, since: float = 0) -> list[tuple[str, str, int, float]]:
        """(queue, outcome, runs, seconds) of the runs that have ended since, by the minute;
        rates reach back an hour, and 0 means for ever, deleted jobs included."""
        return [tuple(row) for row in self._rows(
            "SELECT queue, outcome, sum(runs), sum(seconds) FROM stats WHERE minute >= ? "
            "GROUP BY queue, outcome", (since // 60,))]

    def stats_by_minute(self, since: float) -> list[tuple[int, str, int]]:
        """(minute, outcome, runs) of the runs that have ended since: minutes since the epoch."""
        return [tuple(row) for row in self._rows(
            "SELECT minute, outcome, sum(runs) FROM stats WHERE minute >= ? "
            "GROUP BY minute, outcome", (since // 60,))]

    def wait_for_all(self) -> int:
        """Remember which jobs have not ended now, for progress(): the number of the newest."""
        with self._snapshot():
            for statement in NOT_WAITED_FOR:
                self._execute(statement)
            return int(self._value(LAST_SEQ))

    def progress(self, last: int, but: str | None) -> tuple[int, int, int]:
        """(left, stuck, failed) of the jobs up to seq `last` that had not ended at
        wait_for_all(), without the job `but`: not ended now; of those, blocked for ever; dead or
        cancelled now."""
        with self._snapshot():  # or a job that is put back meanwhile would not be seen anywhere
            pending, processing, blocked, dead, cancelled = (
                self._value(WAITED_FOR % MEMBERS[state], {"last": last, "but": but or ""})
                for state in ("pending", "processing", "blocked", "dead", "cancelled"))
            left = pending + processing
            # Something that is not blocked is behind every job that can still run.
            stuck = left == blocked > 0 and not self._value(CAN_STILL_RUN, {"last": last})
        return left, blocked if stuck else 0, dead + cancelled

    # Jobs are changed by people.

    def cancel(self, ids: Sequence[str]) -> list[Job]:
        """Cancel pending jobs, and ask the workers of running ones to end them. Returns the
        jobs as they are then: `processing` ones will end soon. QueueError for a job that
        does not exist or has ended otherwise: then none is touched."""
        with self._transaction():
            jobs = self._named(ids)
            for job in jobs:
                if job.state in ("completed", "dead"):
                    raise QueueError("job %s has ended already (%s)" % (job.id, job.state))
            for job in jobs:
                self._cancel(job)
        self._ring_for(jobs)
        return [self.get(job.id) for job in jobs]

    def cancel_all(self, queue: str | None = None) -> int:
        """Cancel every job of a queue (None: of all) that has not ended; how many. In small
        transactions."""
        count = 0
        # Of those that run first, which then cannot be put back as pending behind our back; and
        # of those that have been started meanwhile.
        for state in ("processing", "pending", "processing"):
            for page in self._pages(state, queue):
                with self._transaction():
                    count += sum(map(self._cancel, page))
                self._ring_for(page)
        return count

    def _cancel(self, job: Job) -> bool:
        """Cancel a job, or ask its worker to end it; False if it has ended."""
        parameters = {"seq": job.seq, "at": iso(time.time())}
        if self._execute(CANCEL_PENDING, parameters).rowcount:
            self._execute(FREE_KEY, {"key": job.unique, "seq": job.seq})
            return True
        return self._execute(CANCEL_RUNNING, parameters).rowcount > 0

    def _ring_for(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.locked_by:
                self.ring(job.locked_by)

    def _pages(self, state: str, queue: str | None) -> Iterator[list[Job]]:
        jobs = self.jobs(state, queue)
        return iter(lambda: list(itertools.islice(jobs, PAGE)), [])

    def edit(self, id: str, **fields: Any) -> None:
        """Change fields, as enqueue() takes them, of a job that does not run and has not completed;
        `env` is added to what it has. QueueError."""
        refused = fields.keys() & {"after", "unique"}
        if refused:
            raise QueueError("%s cannot be changed" % ", ".join(sorted(refused)))
        with self._transaction():
            job, now = self.get(id), time.time()
            if job.state in ("processing", "completed"):
                raise QueueError("job %s is %s; only a job that waits, or that has ended badly, "
                                 "can be changed" % (id, job.state))
            values = job_fields({"command": job.command, **fields})
            env = {**job.env, **values.get("env", {})}
            changed = {**job.__dict__, **values, "env": json.dumps(env) if env else None}
            if "delay" in values or "run_at" in values:
                changed["run_after"] = run_after = starting_time(values, now)
                if job.view in ("pending", "scheduled", "failed"):
                    changed["hold"] = SCHEDULED if run_after and run_after > now else READY
            self._execute(EDIT_JOB, dict(changed, at=iso(now)))
        self.wake([changed["queue"]])

    def retry(self, ids: Sequence[str]) -> None:
        """Make dead or cancelled jobs pending again, with attempts = 0. QueueError for any
        other job: then none is touched."""
        with self._transaction():
            jobs = self._named(ids)
            for job in jobs:
                if job.state not in ("dead", "cancelled"):
                    raise QueueError("job %s is %s; only dead and cancelled jobs can be retried"
                                     % (job.id, job.state))
                refusal = self._retry(job)
                if refusal:
                    raise QueueError(refusal)
        self.wake({job.queue for job in jobs})

    def retry_all(self, queue: str | None = None,
                  note: Callable[[str], None] = lambda text: None) -> int:
        """Retry every dead job of a queue (None: of all), and return how many. In small
        transactions. `note` gets a line for each whose unique key another job has: it stays
        dead."""
        count = 0
        for page in self._pages("dead", queue):
            with self._transaction():
                refused = [self._retry(job) for job in page]
            for text in filter(None, refused):
                note(text)
            count += refused.count(None)
            self.wake({job.queue for job in page})
        return count

    def _retry(self, job: Job) -> str | None:
        """Make a job pending again that is ended as it says; or why not."""
        active = self._value(ACTIVE_WITH_KEY, {"key": job.unique})
        if active:
            return "job %s cannot be retried while %s has its key %s" % (job.id, active, job.unique)
        now = time.time()
        if not self._execute(RETRY_JOB, {"seq": job.seq, "state": job.state, "at": iso(now),
                                         "now": now}).rowcount:
            return "job %s is not dead any more" % job.id
        if job.unique:
            self._execute(TAKE_KEY, {"key": job.unique, "seq": job.seq})
        return None

    def purge(self, ids: Sequence[str]) -> None:
        """Delete dead jobs. QueueError for any other, and for one that another job waits for:
        then none is touched."""
        with self._transaction():
            jobs = self._named(ids)
            for job in jobs:
                if job.state != "dead":
                    raise QueueError("job %s is %s, not dead" % (job.id, job.state))
                if not self._value(STILL_PRUNABLE % "'dead'", {
                        "seq": job.seq, "before": iso(MAX_EPOCH), "queue": None}):
                    raise QueueError("a job waits for %s; cancel that, and prune it first" % job.id)
            self._delete([{"seq": job.seq} for job in jobs])

    def _delete(self, seqs: list[dict[str, int]]) -> None:
        self._execute(KEEP_LAST_RUN)
        for statement in DELETE_JOB:
            self._execute(statement, seqs, many=True)

    def prune(self, states: Sequence[str], older_than: float = 0, queue: str | None = None) -> int:
        """Delete jobs (of a queue) that ended more than `older_than` seconds ago in one of
        `states` and that no unfinished job waits for. Returns how many. In small transactions."""
        before, last, count = time.time() - older_than, 0, 0
        while True:
            last, deleted = self.prune_step(states, before, last, queue)
            count += deleted
            if not last:
                break
        self.give_back_space(sys.maxsize)
        self.checkpoint(0)  # only that shortens the file itself
        return count

    def prune_step(self, states: Sequence[str], before: float, last: int,
                   queue: str | None = None) -> tuple[int, int]:
        """One step of a prune: finds who can go among the PRUNE_BATCH jobs after seq `last`, and
        holds up nobody meanwhile. What was found may be retried by now, or another job wait for
        it: the look that decides is the one under the writer lock, at each of them, and then at
        those that it needed, for which nobody may wait any more. Returns the seq that it reached
        (0: the end), how many it deleted."""
        words = ", ".join("'%s'" % state for state in ENDED if state in states)
        values: dict[str, Any] = {"before": iso(before), "last": last, "queue": queue,
                                  "batch": PRUNE_BATCH}
        rows = self._rows(FIND_PRUNABLE % words, values)
        found, count = [row["seq"] for row in rows if row["prunable"]], 0
        while found:
            with self._transaction():
                seqs = found[-PRUNE_BATCH:]
                del found[-PRUNE_BATCH:]
                seqs = [{"seq": seq} for seq in dict.fromkeys(seqs) if self._value(
                    STILL_PRUNABLE % words, dict(values, seq=seq))]
                found += [row["needs"] for seq in seqs for row in self._rows(NEEDS, seq)]
                self._delete(seqs)
            count += len(seqs)
        return rows[-1]["seq"] if len(rows) == PRUNE_BATCH else 0, count

    def give_back_space(self, steps: int) -> None:
        """Shorten the file by the pages that deleted jobs have left free: by at most VACUUM_STEP
        in a transaction, in at most so many of these."""
        before = math.inf
        for _ in range(steps):
            free = self._value("PRAGMA freelist_count")
            if free < VACUUM_STEP or free >= before:  # who made the file may not have asked for it
                break
            before = free
            # execute() would stop after the first page: this is a query without columns
            self._insist(lambda: self._db.executescript(
                "PRAGMA incremental_vacuum(%d)" % VACUUM_STEP))
            self.checkpoint()

    def pause(self, queue: str | None = None) -> None:
        """Hand out no more jobs of a queue, or of any."""
        with self._transaction():
            self._execute(PAUSE, (EVERY_QUEUE if queue is None else parse_queue(queue),))

    def resume(self, queue: str | None = None) -> None:
        """Hand out jobs again: of a queue, or (None) of every queue that was paused."""
        with self._transaction():
            self._execute(RESUME, {"queue": queue and parse_queue(queue)})
        self.wake()

    def paused(self) -> list[str]:
        """The names of the paused queues; EVERY_QUEUE stands for all."""
        return [row[0] for row in self._rows(PAUSED + " ORDER BY queue")]

    def limit(self, queue: str, number: int | None) -> None:
        """Let at most so many jobs of a queue run at once (None: any number). QueueError."""
        with self._transaction():
            self._execute(SET_LIMIT, {"queue": parse_queue(queue),
                                      "limit": parse_limit(number) or None})
        self.wake([queue])

    def limits(self) -> dict[str, int]:
        """The limits of those queues that have one."""
        return {row[0]: row[1] for row in self._rows(
            "SELECT queue, job_limit FROM queues WHERE job_limit IS NOT NULL ORDER BY queue")}

    def held(self) -> set[str]:
        """The queues of which no job may start now: paused ones (EVERY_QUEUE: all), and those
        whose limit is reached."""
        return {row[0] for row in self._rows(HELD)}

    # Settings.

    def settings(self) -> dict[str, Any]:
        """The value of every setting: numbers, and texts."""
        values = {name: found.default for name, found in SETTINGS.items()}
        for key, value in self._rows("SELECT key, value FROM config"):
            if key in SETTINGS:
                values[key] = value if values[key] == "" else float(value)
        return values

    def set_setting(self, key: str, value: Any) -> None:
        """Change a setting for every process that uses the queue, at once. QueueError."""
        found = setting(key)
        try:
            parsed = found.parse(value)
        except QueueError as error:
            raise QueueError("%s: %s" % (found.name, error)) from None
        with self._transaction():
            self._execute("INSERT OR REPLACE INTO config VALUES (?, ?)", (found.name, str(parsed)))

    def unset_setting(self, key: str) -> None:
        """Let a setting have its default again. QueueError."""
        with self._transaction():
            self._execute("DELETE FROM config WHERE key = ?", (setting(key).name,))

    # Workers come and go.

    def lock_path(self, name: str) -> str:
        return os.path.join(self.folder, name + ".lock")

    def bell_path(self, name: str) -> str:
        return os.path.join(self.folder, name + ".bell")

    def ring(self, name: str) -> bool:
        """Wake a worker or a supervisor; False if it is dead."""
        return ring(self.bell_path(name))

    def wake(self, queues: Iterable[str] | None = None) -> None:
        """Wake the idle workers that serve any of the queues (None: all). A hint: it comes after
        a commit, which its failure must not make look like one."""
        wanted = None if queues is None else set(queues)
        with contextlib.suppress(QueueError):
            for row in self._rows(IDLE_WORKERS):
                if wanted is None or wanted.intersection(self._json(row["queues"]) or wanted):
                    self.ring(row["name"])

    def register(self, name: str, supervisor: str, queues: Sequence[str] | None,
                 via: str | None, count: int = 0) -> int:
        """Make a worker (or, with a `count` of workers, a supervisor) known, whose lock is held
        already. Returns its slot: the lowest that no live worker of these queues has."""
        served = json.dumps(sorted(set(queues))) if queues else None
        with self._transaction():
            taken = {row["slot"] for row in self._rows(OTHER_SLOTS, {"queues": served})
                     if is_held(self.lock_path(row["name"]))}
            slot = 0 if count else min(set(range(1, len(taken) + 2)) - taken)
            self._execute(
                "INSERT INTO workers (name, supervisor, slot, count, pid, queues, via, started_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (name, supervisor, slot, count, os.getpid(), served, via, iso(time.time())))
        return slot

    def set_count(self, supervisor: str, count: int) -> None:
        with self._transaction():
            self._execute("UPDATE workers SET count = ? WHERE name = ? AND count <> ?",
                          (count, supervisor, count))

    def serve(self, queues: Sequence[str] | None) -> None:
        """Let turn() claim jobs of these queues only (None: of every queue)."""
        self._serves_every = not queues
        self._execute("CREATE TEMP TABLE served (queue TEXT PRIMARY KEY)")
        self._execute("INSERT OR IGNORE INTO temp.served VALUES (?)",
                      [(queue,) for queue in queues or ()], many=True)

    def unregister(self, name: str) -> None:
        with self._transaction():
            self._execute("DELETE FROM workers WHERE name = ?", (name,))

    def workers(self, supervisors: bool = False) -> list[WorkerInfo]:
        """The workers that are alive, and with `supervisors` their supervisors too."""
        return [WorkerInfo(**dict(row, queues=self._json(row["queues"]), stop=max(
                    _size(self.lock_path(name)) for name in (row["name"], row["supervisor"]))))
                for row in self._rows(SELECT_WORKERS)
                if (supervisors or row["slot"]) and is_held(self.lock_path(row["name"]))]

    def order_stop(self, order: int, names: Sequence[str] = (),
                   queues: Sequence[str] = ()) -> list[WorkerInfo]:
        """Order live workers and supervisors to stop: DRAIN, or NOW. All of them, or the workers
        of these names, or who was started for just these queues. Returns them. QueueError."""
        found = self.workers(supervisors=True)
        unknown = set(names) - {info.name for info in found}
        if unknown:
            raise QueueError("no worker %s runs; see: %s" % (", ".join(sorted(unknown)),
                                                             hint("worker list")))
        if names:
            found = [info for info in found if info.name in names]
        if queues:
            found = [info for info in found if info.queues == sorted(set(queues))]
        for info in found:
            give_order(self.lock_path(info.name), order)
            self.ring(info.name)
        return found

    # A worker's turns.

    def turn(self, result: Result | None, worker: str | None,
             lock: str = "") -> tuple[Settled | None, Claim | None]:
        """Settle a run and claim the next job for `worker`, in one transaction: either part
        may be None. `lock` names the RunLock that the next run will hold.

        The settle is fenced: where the run does not hold its job any more (it was rescued,
        and perhaps runs again), nothing changes and Settled is None."""
        settled = claim = None
        with self._transaction():
            now = time.time()  # not before: the wait for the writer lock may have been long
            if result is not None:
                settled = self._settle(result, now)
            if worker is not None:
                claim = self._claim(worker, lock, now)
        if settled and settled.awakened:
            self.wake(settled.awakened)
        return settled, claim

    def _settle(self, result: Result, now: float) -> Settled | None:
        row = self._row(HELD_BY_RUN, {"seq": result.seq, "run": result.run})
        if row is None:
            return None
        settings = {} if result.outcome == "completed" else self.settings()
        state, hold, attempts, run_after = next_state(
            result.outcome, row["attempts"], row["max_retries"], bool(row["cancel"]), now, settings)
        error = result.error if result.outcome != "interrupted" else row["last_error"]
        self._execute(SETTLE_JOB, {
            "seq": result.seq, "state": state, "hold": hold, "attempts": attempts,
            "run_after": run_after, "last_error": error, "at": iso(now)})
        if row["unique_key"] and state in ENDED:
            self._execute(FREE_KEY, {"key": row["unique_key"], "seq": result.seq})
        # What was shown live is replaced by what is kept, at the same places: who follows goes on.
        # A rescuer has none, and leaves it; where nothing is kept, nothing was shown.
        if result.output:
            self._execute("DELETE FROM output WHERE run = ?", (result.run,))
            self._add_pieces(result.run, result.output)
        self._execute(SETTLE_RUN, result.__dict__)
        self._execute(COUNT_RUN, {"minute": now // 60, "queue": row["queue"],
                                  "outcome": result.outcome, "seconds": result.seconds})
        died = state == "dead" and bool(settings["on_dead"]) and self._tell_of_death(
            settings, row, error, now)
        awakened = [row["queue"]] if state == "pending" or row["limited"] or died else []
        if state == "completed" and row["needed"]:
            self._execute(MEET_DEPENDANTS, {"seq": result.seq, "now": now, "at": iso(now)})
            awakened += [row[0] for row in self._rows(READY_DEPENDANTS, {"seq": result.seq})]
        return Settled(state=state, run_after=run_after, awakened=awakened)

    def _tell_of_death(self, settings: Mapping[str, Any], dead: sqlite3.Row, error: str | None,
                       now: float) -> bool:
        """Enqueue what on_dead says, in the dead job's queue; not for one that on_dead enqueued."""
        if DEAD_JOB in (self._json(dead["env"]) or {}):
            return False
        env = {DEAD_JOB: dead["id"], "QUEUECTL_DEAD_ERROR": printable(error or ""),
               "QUEUECTL_DEAD_COMMAND": dead["command"][:DEAD_COMMAND_LIMIT]}
        make_row = _job_rows(int(settings["max_retries"]), now)
        while True:
            with contextlib.suppress(sqlite3.IntegrityError):  # that id is taken
                self._execute(INSERT_JOB, make_row({
                    "command": settings["on_dead"], "queue": dead["queue"], "cwd": os.sep,
                    "env": env}))
                return True

    def _claim(self, worker: str, lock: str, now: float) -> Claim | None:
        row = self._next(now)
        if row is None or row["due"]:
            self._execute(CAP_RETRIES, {"now": now})
            if self._execute(MOVE_DUE, {"now": now}).rowcount:
                row = self._next(now)
        if row is None:
            return None
        settings = {key: SETTINGS[key].default if row[key] is None else float(row[key])
                    for key in RUN_SETTINGS}
        run = self._execute(START_RUN, {
            "seq": row["seq"], "previous": row["run"], "worker": worker, "lock": lock,
            "now": now}).lastrowid
        self._execute(CLAIM_JOB, {
            "seq": row["seq"], "run": run, "worker": worker, "at": iso(now)})
        return Claim(
            run=run, seq=row["seq"], id=row["id"], command=row["command"], queue=row["queue"],
            attempts=row["attempts"], max_retries=row["max_retries"], cwd=row["cwd"],
            env=self._json(row["env"]) or {}, started_at=now, kill_grace=settings["kill_grace"],
            timeout=settings["job_timeout"] if row["timeout"] is None else row["timeout"],
            output_limit=int(settings["output_limit"]))

    def _next(self, now: float) -> sqlite3.Row | None:
        row = self._row(NEXT_OF_ALL if self._serves_every else NEXT_OF_SERVED, {"now": now})
        if row is not None and row["held"]:  # never of NEXT_OF_SERVED: that leaves out held queues
            row = self._row(NEXT_OF_OTHERS, {"now": now})
        return row

    def add_output(self, run: int, pieces: Iterable[tuple[int, bytes]],
                   missing: tuple[int, int]) -> None:
        """Add what a run has printed since, while it goes on, and forget what stands within
        `missing` now. Needs no fsync: if it is lost, so is the run."""
        with self._transaction(sync=False):
            self._add_pieces(run, pieces)
            self._execute(CUT_OUTPUT, {"run": run, "first": missing[0], "last": missing[1]})

    def _add_pieces(self, run: int, pieces: Iterable[tuple[int, bytes]]) -> None:
        self._execute(ADD_OUTPUT, [{"run": run, "start": start, "data": data}
                                   for start, data in pieces], many=True)

    def cancel_requested(self, claim: Claim) -> bool:
        return bool(self._value("SELECT cancel FROM jobs WHERE seq = ? AND run = ?",
                                (claim.seq, claim.run)))

    def next_due(self) -> float | None:
        """When (epoch seconds) the next job for later is due."""
        due: float | None = self._value(NEXT_DUE, {"now": time.time()})
        return due

    def work_left(self, supervisor: str) -> bool:
        """Whether --drain has to go on where no job can start: one of the served queues runs
        under this supervisor, or waits for a retry, or for its queue's limit."""
        return bool(self._value(WORK_LEFT, {"every": self._serves_every,
                                            "supervisor": supervisor}))

    def housekeeping(self, last: int) -> tuple[int, int]:
        """One prune_step() of completed jobs past keep_completed; in its last one, minutes that
        no rate asks for any more become one row per outcome."""
        now, keep = time.time(), self.settings()["keep_completed"]
        last, deleted = self.prune_step(("completed",), now - keep, last) if keep else (0, 0)
        self.give_back_space(1 if deleted else 0)
        if not last:
            with self._transaction():
                for statement in FOLD_STATS:
                    self._execute(statement, {"minute": now // 60 - 61})
        return last, deleted

    # Rescue.

    def open_runs(self) -> list[sqlite3.Row]:
        """The runs that have no outcome yet: seq, id, run, worker, lock, started_at, and as
        `error` a note_orphan()."""
        return self._rows(OPEN_RUNS)

    def orphans(self, rows: list[sqlite3.Row]) -> list[sqlite3.Row]:
        """Those of the open runs whose worker is dead."""
        dead = {name for name in {row["worker"] for row in rows}
                if not is_held(self.lock_path(name))}
        return [row for row in rows if row["worker"] in dead]

    def note_orphan(self, run: int, text: str) -> None:
        """Note why an orphaned run cannot be settled yet."""
        if self._value("SELECT error FROM runs WHERE run = ?", (run,)) != text:
            with self._transaction():
                self._execute("UPDATE runs SET error = ? WHERE run = ? AND outcome IS NULL",
                              (text, run))

    def sweep(self) -> None:
        """Delete what dead workers have left: rows, and files of theirs that no run needs."""
        registered = [row["name"] for row in self._rows("SELECT name FROM workers")]
        try:
            files = os.listdir(self.folder)
        except OSError:
            files = []
        names = {file.partition(".")[0] for file in files}.union(registered)
        dead = {name for name in names if not is_held(self.lock_path(name))}
        # The dead claim no more: what they run now is all that they will ever have run.
        dead -= {row["worker"] for row in self.open_runs()}
        for name in dead.intersection(registered):  # who has registered since then lives
            self.unregister(name)
        for file in files:
            owner, _, kind = file.partition(".")
            path = os.path.join(self.folder, file)
            if owner in dead and kind == "lock":
                fd = take(path)
                if fd is not None:
                    release(path, fd)
            elif owner in dead and (kind in ("bell", "run0", "run1") or kind.isdigit()) \
                    or kind == "out" or file == "synced":  # of schema 2, some of them
                remove(path)


def _members(state: str) -> str:
    """The query for the jobs of one of STATES or VIEWS. QueueError."""
    if state not in MEMBERS:
        raise QueueError("there is no state %s; the states are %s"
                         % (_shown(state), ", ".join(STATES + VIEWS)))
    return MEMBERS[state]


def total(queues: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The sum of what counts_by_queue() returns."""
    return {state: sum(row[state] for row in queues.values()) for state in STATES + VIEWS}


def summary(stats: list[tuple[str, str, int, float]]) -> dict[str, float]:
    """Runs that ended, how many of them not well, and their mean seconds."""
    runs, seconds = sum(row[2] for row in stats), sum(row[3] for row in stats)
    failed = sum(row[2] for row in stats if row[1] in ("failed", "timeout", "lost"))
    return {"runs": runs, "failed": failed,
            "mean_seconds": round(seconds / runs, 3) if runs else 0.0}


def _job_rows(max_retries: int, now: float) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A function that makes parsed fields into the parameters of INSERT_JOB."""
    ids, created = new_ids(), iso(now)
    try:
        folder = parse_cwd(os.getcwd())
    except (OSError, QueueError):
        folder = ""

    def row(fields: dict[str, Any]) -> tuple[Any, ...]:
        get = fields.get
        run_after = starting_time(fields, now)
        cwd, env, after = get("cwd") or folder, get("env"), get("after")
        if not cwd:
            raise QueueError("the current folder is gone, or its name is not UTF-8; name one with "
                             "--cwd")
        hold = BLOCKED if after else READY if run_after is None or run_after <= now else SCHEDULED
        return (get("id") or next(ids), fields["command"], get("queue", DEFAULT_QUEUE),
                get("priority", 0), get("max_retries", max_retries), get("timeout"), hold,
                run_after, cwd, json.dumps(env) if env else None,
                " ".join(after) if after else None, get("unique"), created, created)

    return row


class Rescuer:
    """Takes back the jobs of dead workers: ends what is left of their process trees, then settles
    their runs as lost. Looks once a TICK, and soon again while a tree is dying. A job whose tree
    may be alive, and cannot be proven to be its, or does not die, stays as it is.

    A tree is gone when two looks in a row have seen nothing of it: a process that forks may be
    missed by a listing, and one that begins another program has no environment for an instant."""

    def __init__(self) -> None:
        self.next_look = math.inf  # time.monotonic(), where it has to look again soon
        self.dying = False  # whether it has to
        self.watching = True  # whether any run goes on: otherwise nobody has to look
        self._pause = 0.0  # before the next look: for how long anything has been dying
        self._unseen: set[int] = set()  # runs of which nothing was seen by the last look

    def look(self, queue: Queue, note: Callable[[str], None]) -> int:
        """How many jobs were taken back now. QueueError."""
        self.dying, self.next_look = False, math.inf
        try:
            self.watching = True  # should the next line fail
            runs = queue.open_runs()
            self.watching = bool(runs)
            rows = queue.orphans(runs)
            before, self._unseen = self._unseen, set()
            return sum(self._take_back(queue, row, row["run"] in before, note) for row in rows)
        except OSError as error:
            kind = DatabaseUnavailable if error.errno in SHORTAGES else QueueError
            raise kind("cannot look for dead workers: %s" % error) from None
        finally:
            self._pause = min(TICK, 2 * self._pause or RESCUE_PAUSE) if self.dying else 0.0
            if self.dying:
                self.next_look = time.monotonic() + self._pause

    def _take_back(self, queue: Queue, row: sqlite3.Row, unseen: bool,
                   note: Callable[[str], None]) -> bool:
        dying, unproven = end_tree(os.path.join(queue.folder, row["lock"]), row["run"],
                                   run_name(queue, row["run"]))
        if dying and not unproven and self._pause >= TICK:
            unproven = "process %d, which does not die," % dying[0]
        if unproven and self._pause:  # the first may pass: who is dying shows no files any more
            queue.note_orphan(row["run"], "its worker died, and %s may be running it still"
                              % unproven)
        if not dying and not unproven:
            self._unseen.add(row["run"])
        if dying or unproven or not unseen:
            self.dying = True
            return False
        now = time.time()
        settled, _ = queue.turn(Result(
            run=row["run"], seq=row["seq"], outcome="lost", exit_code=None, signal=None,
            error="its worker died while it ran", output=None, finished_at=now,
            seconds=max(0.0, now - row["started_at"])), None)
        if settled:
            note("job %s: its worker %s died; the job is %s"
                 % (row["id"], row["worker"], settled.state))
        return settled is not None

    def finish(self, queue: Queue, note: Callable[[str], None]) -> None:
        """Look until no tree is dying any more: for who does not come back. Takes up to 2 s."""
        until = time.monotonic() + 2
        self.look(queue, note)
        while self.dying and time.monotonic() < until:
            time.sleep(self._pause)
            self.look(queue, note)


def run_name(queue: Queue, run: int) -> str:
    """By what the processes of a run are known, in RUN_VARIABLE."""
    return "%s/%d" % (queue.file_identity(), run)


# -- runner -------------------------------------------------------------------------------

LIVE_DELAY = 0.1  # seconds between two looks at what a run has printed, for others to follow
LIVE_MOST = 1024 ** 2  # bytes that are shown of it at a time
PIPE_MOST = 1024 ** 2  # bytes that a pipe may hold; by default a CHUNK


class Output:
    """What is kept of a run's output: the first quarter of the limit and the rest from the
    end. Memory stays bounded, whatever the command prints."""

    def __init__(self, limit: int) -> None:
        self.total = 0
        self._first = limit // 4
        self._last = limit - self._first
        self._head = bytearray()
        self._tail = bytearray()

    def feed(self, data: bytes) -> None:
        self.total += len(data)
        room = self._first - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._last:
            del self._tail[:len(self._tail) - self._last]

    def kept(self) -> list[tuple[int, bytes]]:
        """What is kept, as pieces: pairs of a place and the bytes from there on."""
        tail = bytes(self._tail[max(0, len(self._tail) - self._last):])
        start = self.total - len(tail)
        if start == len(self._head):
            return [(0, bytes(self._head) + tail)] if self.total else []
        return [(0, bytes(self._head)), (start, tail)]

    def missing(self) -> tuple[int, int]:
        """Between which places nothing is kept."""
        return self._first, max(self._first, self.total - self._last)

    def fresh(self, seen: int) -> list[tuple[int, bytes]]:
        """What is kept beyond the first `seen` bytes, and is not too much: who follows may miss
        some of what is kept in the end."""
        seen = max(seen, self.total - LIVE_MOST)
        late = max(seen, self.total - min(len(self._tail), self._last))
        pieces = ((seen, bytes(self._head[seen:])),
                  (late, bytes(self._tail[late - self.total:] if late < self.total else b"")))
        return [piece for piece in pieces if piece[1]]

    def end(self, size: int) -> bytes:
        """The last bytes, at most so many."""
        return bytes((self._head + self._tail)[-size:])


class Execution:
    """One run of one command, from its spawn to its Result, in steps between which somebody
    else sleeps: step() whenever `child.fd` can be read, a child has ended, or the time is
    deadline(). Times are of time.monotonic()."""

    def __init__(self, claim: Claim, command: str, env: Mapping[str, str],
                 lock: RunLock) -> None:
        self.claim = claim
        self.child: Child | None = None
        # What kept it from starting, if that is this machine and not the command: then it is put
        # back, and tried again every TICK, for as long as that lasts.
        self.shortage: OSError | None = None
        self.reading = False  # whether child.fd is open and not at its end
        self._show_at = time.monotonic() + LIVE_DELAY
        self._output = Output(claim.output_limit)
        self._shown = 0  # how many bytes of its output show_output has stored
        self._outcome: str | None = None  # why it is being ended, if it is
        self._exit: tuple[int | None, int | None] | None = None
        self._kill_at = self._look_at = math.inf
        self._forced = False  # whether it has got a SIGKILL
        self._started = time.monotonic()
        self._timeout_at = self._started + claim.timeout if claim.timeout else math.inf
        try:
            self.child = Child(command, claim.cwd, env, lock, claim.run)
            self.reading = True
        except (OSError, ValueError) as error:
            self._cannot_start(error)

    def _cannot_start(self, error: Exception) -> None:
        """Its folder is the job's own fault, and so is a command or an environment that the
        system finds too long. Whatever else it is, another worker may well start it."""
        self._timeout_at = self._started  # there is nothing to wait for
        self._error = "cannot start: %s" % error
        if not isinstance(error, OSError) or error.errno == errno.E2BIG:
            return
        if error.errno not in SHORTAGES and self.claim.cwd and error.filename == self.claim.cwd:
            self._error = "cannot enter its folder %s: %s; make it, or enqueue with another --cwd" \
                % (self.claim.cwd, error.strerror)
        else:
            self.shortage = error

    def deadline(self) -> float:
        """When step() has to be called, whatever happens until then."""
        return min(self._timeout_at, self._look_at, self._kill_at,
                   self._show_at if self._shown < self._output.total else math.inf)

    def end(self, outcome: str) -> None:
        """End the command, unless that has begun: SIGTERM, after the grace SIGKILL."""
        if self._outcome is None and self.child is not None and self._exit is None \
                and self.child.poll() is None:  # or it has ended by itself just now
            self._escalate(self.child, outcome)

    def _escalate(self, child: Child, outcome: str) -> None:
        self._outcome = outcome
        self._timeout_at = math.inf
        self._kill_at = time.monotonic() + self.claim.kill_grace
        child.terminate(force=False)

    def step(self, readable: bool = True) -> Result | None:
        """Do what can be done without waiting; the Result once the run is over."""
        child, now = self.child, time.monotonic()
        if child is None:
            return self._result("interrupted" if self.shortage is not None else "failed",
                                self._error)
        if readable:
            self._read(child)
        if now >= self._timeout_at:
            self.end("timeout")
        succeeded = child.poll() if self._exit is None else None
        if succeeded is not None:
            self._read(child, PIPE_MOST // CHUNK + 1)  # all that it wrote before it ended
            if self._outcome is None and not succeeded:
                self._escalate(child, "failed")  # what is left of its group; it is a zombie
            self._exit = child.reap()
        if self._outcome is None:
            return None if self._exit is None else self._result("completed", None)
        return self._end_group(child, now)

    def _end_group(self, child: Child, now: float) -> Result | None:
        """It is being ended: the run is over when nobody of its group is left. Whom we may not
        signal, since he has become another user's, is left after the grace, and named."""
        if now >= self._kill_at:
            child.terminate(force=True)
            self._forced = True
            self._kill_at = now + 0.1  # again: it may have been forking
        if self._exit is None and not self._forced:
            return None
        left = child.survivors()
        if self._exit is None and child.pid not in left \
                or any(not (self._forced and not_ours(pid)) for pid in left):
            # To look at all processes takes a while where there are many.
            self._look_at = now + max(0.02, 10 * (time.monotonic() - now))
            return None
        assert self._outcome is not None
        error = self._reason(self._outcome)
        if left:
            error += "; process %d goes on: it has become another user's (setuid), and only he " \
                "can end it" % left[0]
        return self._result(self._outcome, error)

    def _read(self, child: Child, most: int = 4) -> None:
        for _ in range(most if self.reading else 0):  # then it is others' turn, whatever it prints
            data = child.read()
            if data is None:
                break
            if not data:
                self.reading = False
                break
            self._output.feed(data)
            if len(data) < CHUNK:
                break

    def show_output(self, add: Callable[[int, list[tuple[int, bytes]], tuple[int, int]], None]) \
            -> None:
        """Let others follow the output of a run that takes its time: `add` stores it. Where it
        cannot, what has come is stored the next time: no two pieces begin at one place, for
        `_shown` rises only once they are stored. A run that is taken back keeps its pieces: the
        head, the tail, and at most one more across each end of the gap."""
        if self._shown < self._output.total and time.monotonic() >= self._show_at:
            self._show_at = time.monotonic() + LIVE_DELAY
            add(self.claim.run, self._output.fresh(self._shown), self._output.missing())
            self._shown = self._output.total

    def _reason(self, outcome: str) -> str:
        if outcome == "failed":
            assert self._exit is not None
            return exit_error(*self._exit, self._output.end(2000), self.claim.command)
        return {"timeout": "timed out after %s (--timeout of the job, or the setting job_timeout)"
                           % format_duration(self.claim.timeout),
                "cancelled": "cancelled while it ran",
                "interrupted": "ended by a stop of its worker"}[outcome]

    def _result(self, outcome: str, error: str | None) -> Result:
        seconds = time.monotonic() - self._started
        exit_code, signum = self._exit or (None, None)
        return Result(run=self.claim.run, seq=self.claim.seq, outcome=outcome, error=error,
                      exit_code=exit_code, signal=signum, output=self._output.kept(),
                      finished_at=self.claim.started_at + seconds, seconds=seconds)


# -- workers ------------------------------------------------------------------------------
#
# `worker start` is a supervisor and N workers, each a process that claims, runs and settles
# job after job. What makes this safe without a daemon, a clock or a pid file:
#
#   Alive   is who holds the kernel's lock on `<database>-run/NAME.lock`. The kernel drops it
#           with the process, however that ends.
#   Rescue  When the lock of a job's worker is free, anybody may take the job back: the
#           supervisor at once when its child dies, `worker start` first of all, each worker
#           every second while any run goes on, `cancel` and `worker stop` when they are done.
#           The rescuer ends what is left of the process tree, then settles the run as `lost`.
#           If two rescue, the fence of settle lets one win.
#   Orders  are levels that only rise: RUN, DRAIN (finish the job, then exit), NOW (end the
#           job, put it back). They stand in the lock files, as their sizes: a worker follows
#           its own and its supervisor's, whose free lock means DRAIN. It reads them when its bell
#           rings and once a TICK; a supervisor reads its own whenever it wakes. A stop of all is
#           written into every lock file, that of one worker into its own. Only the supervisor
#           judges signals, because one Ctrl-C reaches every process of the terminal, and a
#           closed window sends two SIGHUPs. (A worker takes SIGTERM for DRAIN, and is replaced.)
#   Bells   are hints: somebody has written something that concerns you. What a lost one should
#           have told a worker is found within TICK, by one clock for each process.
#
# A process sleeps in one place, Worker._sleep or Supervisor._wait. What a worker owes to others is
# done there, once a TICK, whether it is idle or its jobs follow one another at once. It is deaf
# only while it waits for a busy database with a result in hand, or for who reads its log.

SUPERVISION = 5 * TICK  # longest sleep of a supervisor; its workers do not wait for it: see Orders
HOUSEKEEPING = 60.0  # seconds of rest once all completed jobs were looked at, for keep_completed
SECOND_SIGNAL = 0.3  # seconds after the first signal from which on one means: now
LONGEST_PAUSE = 5.0  # seconds before a worker that keeps dying is replaced again
SETTLED_IN = 2.0  # seconds that a worker must have lived for its death not to count as "keeps"
FATAL = 78  # exit code of a worker which no replacement can help
MOST_OPEN_PIPES = 200  # pipes of ended jobs that a worker goes on draining
LOG_PATIENCE = 1.0  # seconds for which a log line waits for who reads it


class Log:
    """A line per event, on stderr or in a file of bounded size. Whoever reads it may stand
    still (less, Ctrl-S): that must not stop the jobs, so lines are dropped then."""

    def __init__(self, options: StartOptions, who: str) -> None:
        self._path = options.log
        self._quiet = options.quiet
        self._who = who
        self._dropped = 0

    def event(self, text: str) -> None:
        if not self._quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        stamp = local_time(int(time.time()),
                           "%Y-%m-%d %H:%M:%S" if self._path else "%H:%M:%S")
        line = "%s %s: %s\n" % (stamp, self._who, printable(text))
        with contextlib.suppress(OSError):  # a terminal that has been closed
            fd = open_log(self._path) if self._path else 2
            try:
                if stalled(fd, 0 if self._dropped else LOG_PATIENCE):
                    self._dropped += 1
                    return
                if self._dropped:
                    line = "(%d lines were dropped)\n%s" % (self._dropped, line)
                    self._dropped = 0
                os.write(fd, line.encode("utf-8", "replace"))
            finally:
                if self._path:
                    os.close(fd)


def open_queue(options: StartOptions, durable: bool = True) -> Queue:
    return Queue(options.path, durable=durable, expect=options.identity)


class Worker:
    """One worker process: claims, runs and settles jobs until it is told to stop."""

    def __init__(self, options: StartOptions, name: str) -> None:
        self._options = options
        self._name = name
        self._level = RUN
        self._log = Log(options, "worker " + name)  # until it has a slot
        self._child: Child | None = None  # of the last run, until that is settled
        self._open_pipes: dict[int, Child] = {}  # pipes that outlived their job: drained, too
        self._rescuer = Rescuer()
        self._next_look = 0.0  # when it looks around, whatever happens: once a TICK
        self._rung = False  # whether something may have changed since _work or _attend looked
        self._clock = 0.0
        self._complaints: dict[str, str] = {}  # what was said, and what has to work again
        self.terminated = False  # whether it has got a SIGTERM

    def main(self) -> int:
        """Work until told to stop; the exit code of the process."""
        close_inherited()
        reset_signals()
        self._waiter = Waiter()
        for name in ("SIGINT", "SIGHUP", "SIGBREAK"):  # the supervisor's business
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), lambda signum, frame: None)
        signal.signal(signal.SIGTERM, self._on_term)
        self._env = dict(os.environ)
        os.chdir(os.sep)
        try:
            with open_queue(self._options, durable=False) as self._queue:
                self._enter()
                try:
                    self._work()
                finally:
                    self._leave()
            return 0
        except DatabaseUnavailable as error:  # the supervisor tries again, in a while
            self._log.warn(str(error))
            return 1
        except (QueueError, OSError) as error:
            self._log.warn(str(error))
            return 1 if getattr(error, "errno", None) in SHORTAGES else FATAL

    def _on_term(self, signum: int, frame: Any) -> None:
        """Somebody, such as its own job, ends this worker only: finish the job, and die by it."""
        self.terminated = True
        self._obey(DRAIN)

    def _enter(self) -> None:
        queue = self._queue
        self._held = hold(queue.lock_path(self._name))
        self._bell = Bell(queue.bell_path(self._name))
        self._waiter.watch(self._bell.fd)
        self._lock = RunLock(os.path.join(queue.folder, self._name))
        queue.serve(self._options.queues)
        self._slot = queue.register(self._name, self._options.name, self._options.queues,
                                    self._options.via)
        self._log = Log(self._options, "worker %d" % self._slot)
        self._look_around()

    def _leave(self) -> None:
        """Forget this worker, but for what a run that it could not settle needs: that is left
        to its rescuer. What cannot be removed is swept by others."""
        queue = self._queue
        self.terminated &= os.fstat(self._held).st_size == RUN  # or it was ordered, too
        with contextlib.suppress(QueueError), queue.impatient(TICK):
            if not any(row["worker"] == self._name for row in queue.open_runs()):
                queue.unregister(self._name)
                self._lock.discard()
        self._lock.close()
        self._waiter.unwatch(self._bell.fd)
        remove(queue.bell_path(self._name))
        release(queue.lock_path(self._name), self._held)

    def _obey(self, order: int) -> None:
        self._level = max(self._level, order)

    def _work(self) -> None:
        result: Result | None = None
        while True:
            self._rung = False  # before the claim: who rings during it has written too late for it
            claim = self._turn(result)
            if claim is not None:
                result = self._run(claim)
                continue
            result = None
            if self._level != RUN or self._options.drain and self._is_drained():
                return
            self._idle()

    def _is_drained(self) -> bool:
        try:
            return not self._queue.work_left(self._options.name)
        except DatabaseUnavailable:  # it is asked again
            return False

    def _turn(self, result: Result | None) -> Claim | None:
        """Settle a result, and claim the next job, if there is one and this worker goes on.
        Where the machine is short of something, it tries again every TICK: a result is
        kept until it is stored, and is stored also where no next job could be locked."""
        lock = ""
        while result is not None or self._level == RUN:
            # Once for a settle: again, it would take the file of the run that is not settled.
            if not lock and self._level == RUN:
                try:
                    lock = self._lock.renew()
                except OSError as error:
                    self._lacks("cannot lock a file for the next job: %s" % error, error)
            wanted = self._name if lock and self._level == RUN else None
            try:
                # Who has nothing to store does not wait for long: it would not hear an order. Who
                # has hears none meanwhile, and at NOW gives the result up: its run will be `lost`.
                with self._queue.impatient(TICK if result is None else BUSY_BUDGET):
                    settled, claim = self._queue.turn(result, wanted, lock)
            except DatabaseUnavailable as error:
                if result is not None or not isinstance(error, DatabaseBusy):
                    self._complain("%s; trying again every second" % error)
                if self._level == NOW:
                    raise
            else:
                if result is not None:
                    self._log_result(result, settled)
                    result = None
                    if self._child is not None:
                        self._child.close()
                        self._child = None
                if wanted or self._level != RUN:
                    if claim is None and wanted:
                        self._recovered()
                    return claim
            self._back_off()
        return None

    def _complain(self, text: str, of: str = "start") -> None:
        """Warn, but only once until that works again: of the start of jobs, that one has started or
        none is there to start."""
        if text not in self._complaints:
            self._log.warn(text)
        self._complaints[text] = of

    def _lacks(self, text: str, error: OSError) -> None:
        """Complain of a shortage. Where it is one of descriptors, close the pipes of ended jobs, of
        which each holds one."""
        if error.errno in (errno.EMFILE, errno.ENFILE):
            for fd in list(self._open_pipes):
                self._drop_pipe(fd)
        self._complain(text)

    def _recovered(self, of: str = "start") -> None:
        if of in self._complaints.values():
            self._complaints = {text: other for text, other in self._complaints.items()
                                if other != of}
            self._log.warn("that works again")

    def _log_result(self, result: Result, settled: Settled | None) -> None:
        if settled is not None and settled.state != "dead" and self._options.quiet:
            return
        took = format_age(result.seconds)
        if settled is None:
            self._log.warn("job %s: it was taken back from this worker; the result (%s) does "
                           "not count" % (self._job, result.outcome))
        elif settled.state == "completed":
            self._log.event("job %s completed in %s" % (self._job, took))
        elif settled.state == "pending" and result.outcome != "interrupted":
            wait = "at once" if settled.run_after is None else \
                "in " + format_age(round(settled.run_after - time.time(), 1))
            self._log.event("job %s failed after %s, again %s: %s" % (
                self._job, took, wait, result.error))
        else:
            tell = self._log.warn if settled.state == "dead" else self._log.event
            tell("job %s %s after %s: %s" % (
                self._job, {"pending": "is put back"}.get(settled.state, settled.state), took,
                result.error))

    def _run(self, claim: Claim) -> Result:
        """Run a claimed job to its end."""
        self._job = claim.id
        if not self._options.quiet:
            self._log.event("job %s started (attempt %d of %d)" % (
                claim.id, claim.attempts, max(claim.attempts, claim.max_retries)))
        self._waiter.forget()  # above all, the end of the job before
        execution = Execution(claim, self._options.via or claim.command, self._environment(claim),
                              self._lock)
        child = execution.child
        if child is not None:
            self._recovered()
            self._waiter.watch(child.fd)
            self._waiter.expect(child.pid)
        try:
            result = self._attend(execution)
        except BaseException:  # the database is gone: nobody could record how this ends
            execution.end("interrupted")
            while execution.step() is None:
                time.sleep(0.05)  # not in the one place: nobody hears what wakes it there
            raise
        if child is not None:
            self._child = child
            if execution.reading:  # somebody in the background still writes to it
                self._open_pipes[child.fd] = child
                if len(self._open_pipes) > MOST_OPEN_PIPES:
                    self._drop_pipe(next(iter(self._open_pipes)))
        elif execution.shortage is not None:
            self._lacks("a job %s; trying again every second" % result.error, execution.shortage)
            self._back_off()
        return result

    def _environment(self, claim: Claim) -> dict[str, str]:
        env = dict(self._env, PWD=claim.cwd or os.sep)
        env.update(claim.env)
        env.update({RUN_VARIABLE: run_name(self._queue, claim.run)}, QUEUECTL_JOB_ID=claim.id,
                   QUEUECTL_ATTEMPT=str(claim.attempts),
                   QUEUECTL_MAX_RETRIES=str(claim.max_retries), QUEUECTL_QUEUE=claim.queue,
                   QUEUECTL_WORKER=str(self._slot), QUEUECTL_DB=self._queue.path)
        if self._options.via:
            env["QUEUECTL_COMMAND"] = claim.command
        return env

    def _attend(self, execution: Execution) -> Result:
        """Sleep and step until the command has ended."""
        child, watched, looked = execution.child, execution.reading, self._next_look
        while True:
            if self._level == NOW:
                execution.end("interrupted")
            ready = self._sleep(execution.deadline())
            result = execution.step(child is not None and child.fd in ready)
            if child is not None and watched and not execution.reading:
                self._close_pipe(child)
                watched = False
            if result is not None:
                return result
            with contextlib.suppress(DatabaseUnavailable), self._queue.impatient():
                if self._rung or looked != self._next_look:
                    self._rung, looked = False, self._next_look
                    if self._queue.cancel_requested(execution.claim):
                        execution.end("cancelled")
                execution.show_output(self._queue.add_output)

    def _idle(self) -> None:
        """Sleep until a claim is worth trying."""
        os.chdir(os.sep)
        try:
            due = self._queue.next_due()
        except DatabaseUnavailable:
            return self._back_off()
        while self._level == RUN and not self._rung and not (due and due <= time.time()):
            self._sleep(math.inf if due is None else time.monotonic() + due - time.time())

    def _back_off(self) -> None:
        """Sleep for a TICK, or until another order comes."""
        level, until = self._level, time.monotonic() + TICK
        while self._level == level and time.monotonic() < until:
            self._sleep(until)

    def _sleep(self, until: float) -> list[int]:
        """Sleep in the one place where this process waits, until something happens: the
        descriptors that can be read. What is due meanwhile is done here. QueueError: the
        database is gone."""
        ready = self._waiter.wait(min(
            until, self._queue.sync_at, self._next_look, self._rescuer.next_look)
            - time.monotonic())
        for fd in ready:
            if fd == self._bell.fd:
                self._bell.clear()
                self._rung = True
            elif fd in self._open_pipes and self._open_pipes[fd].read() == b"":
                self._drop_pipe(fd)
        now = time.monotonic()
        if now >= self._queue.sync_at:
            try:
                if self._queue.sync() >= WAL_LIMIT:
                    self._queue.ring(self._options.name)  # to checkpoint
                self._recovered("sync")
            except DatabaseUnavailable as error:
                self._complain(str(error), "sync")
        tick = now >= self._next_look
        if tick:
            self._next_look = now + TICK
            with contextlib.suppress(DatabaseUnavailable):
                self._rung |= self._queue.changed() | self._clock_was_set()
        if tick or self._rung:
            self._look_around()
        if tick and (self._rung or self._rescuer.watching) or now >= self._rescuer.next_look:
            # Its own job must not wait for that.
            with contextlib.suppress(DatabaseUnavailable), self._queue.impatient():
                self._rung |= self._rescuer.look(self._queue, self._log.warn) > 0
        return ready

    def _clock_was_set(self) -> bool:
        """Whether the wall clock has jumped since the last call: what is due may be another."""
        before, self._clock = self._clock, time.time() - time.monotonic()
        return abs(self._clock - before) > TICK

    def _look_around(self) -> None:
        """See whether the database and the lock are in place, and what is ordered. QueueError."""
        leader = self._queue.lock_path(self._options.name)
        try:
            self._queue.check_in_place()
            if not same_file(self._held, self._queue.lock_path(self._name)):
                raise QueueError("%s has been deleted; stopping" % self._queue.folder)
            self._obey(max(os.fstat(self._held).st_size, _size(leader)))
            if not is_held(leader):
                self._obey(DRAIN)
        except OSError as error:
            if error.errno not in SHORTAGES:
                raise
            self._lacks("cannot look for orders: %s" % error, error)

    def _drop_pipe(self, fd: int) -> None:
        child = self._open_pipes.pop(fd)
        self._close_pipe(child)
        child.close()

    def _close_pipe(self, child: Child) -> None:
        self._waiter.unwatch(child.fd)
        child.close_output()


def _worker_main(options: StartOptions, name: str) -> None:
    """The worker process."""
    worker = Worker(options, name)
    code = worker.main()
    if worker.terminated and not code:  # as its supervisor sees then
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    sys.exit(code)


class Seat(Record):
    """A slot of the supervisor: its process, and its deaths."""

    process: Any = None
    name: str = ""
    started: float = 0.0
    deaths: int = 0
    replace_at: float = math.inf


class Supervisor:
    """Starts the workers, judges signals, replaces workers that die, and keeps the database in
    order. It keeps no database connection: none may cross the forks to come."""

    def __init__(self, options: StartOptions) -> None:
        import multiprocessing
        self._options = options
        self._context: Any = multiprocessing.get_context("fork" if safe_to_fork() else "spawn")
        self._log = Log(options, "queuectl")
        self._level = RUN
        self._failed = False
        self._signals: list[tuple[int, float]] = []
        self._first_signal: float | None = None
        self._seats = {slot: Seat() for slot in range(1, options.count + 1)}
        self._rescuer = Rescuer()
        self._next_checkpoint = self._next_housekeeping = 0.0  # time.monotonic()
        self._kept_until = 0  # how far the look for completed jobs past their time has come

    def run(self) -> int:
        """Work until stopped; the exit code. QueueError where it cannot start."""
        import gc
        names = ["SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP"]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            names.pop()  # nohup
        reset_signals()
        self._waiter = Waiter()
        before = {}
        for name in names:
            if hasattr(signal, name):
                signum = getattr(signal, name)
                before[signum] = signal.signal(
                    signum, lambda signum, frame: self._signals.append(
                        (signum, time.monotonic())))
        self._enter()
        gc.freeze()  # or a collection in a worker would copy all that it shares with us
        try:
            for slot in self._seats:
                self._start(slot)
            while self._seats:
                self._wait()
                self._judge_signals()
                self._reap()
                self._replace()
        finally:
            self._leave()
            for signum, handler in before.items():
                signal.signal(signum, handler)
        return 1 if self._failed else 0

    def _enter(self) -> None:
        name = self._options.name
        require_safe(self._options.path)
        with open_queue(self._options) as queue:
            self._options.identity = queue.identity
            self._lock_path = queue.lock_path(name)
            self._bell_path = queue.bell_path(name)
            self._held, self._bell = hold(self._lock_path), Bell(self._bell_path)
            self._rescuer.finish(queue, self._log.warn)  # or a drain would miss what it brings
            queue.sweep()
            queue.register(name, name, self._options.queues, self._options.via,
                           self._options.count)
            self._housekeep(queue)
        self._waiter.watch(self._bell.fd)
        self._log.event("%d worker%s on %s%s; to end %s: %s%s" % (
            self._options.count, "s" * (self._options.count > 1), self._options.path,
            self._options.queues and " (queues: %s)" % ", ".join(self._options.queues) or "",
            "them" if self._options.count > 1 else "it",
            "" if self._options.log else "Ctrl-C, or ", hint("worker stop")))

    def _leave(self) -> None:
        """Its row is swept by the next one: opening the database takes longer than all this."""
        if self._rescuer.dying:
            with contextlib.suppress(QueueError), open_queue(self._options) as queue, \
                    queue.impatient(TICK):
                self._rescuer.finish(queue, self._log.warn)
        remove(self._bell_path)
        release(self._lock_path, self._held)
        self._waiter.close()

    def _start(self, slot: int) -> None:
        """OSError where there is no process to be had."""
        seat = self._seats[slot]
        seat.name = new_id()
        seat.process = self._context.Process(
            target=_worker_main, args=(self._options, seat.name))
        before = open_descriptors()
        try:
            seat.process.start()
        except OSError:
            seat.process = None
            for fd in open_descriptors() - before:  # multiprocessing leaves its pipes
                os.close(fd)
            raise
        self._waiter.expect(seat.process.pid)
        seat.started = time.monotonic()
        seat.replace_at = math.inf

    def _wait(self) -> None:
        """Sleep until a child has died, a signal or an order has come, or something is due."""
        until = min(time.monotonic() + SUPERVISION,
                    self._next_housekeeping if self._level == RUN else math.inf,
                    min(seat.replace_at for seat in self._seats.values()),
                    self._rescuer.next_look)
        if self._bell.fd in self._waiter.wait(until - time.monotonic()):
            self._bell.clear()
        self._obey(os.fstat(self._held).st_size)
        now = time.monotonic()
        if now >= self._rescuer.next_look:
            self._rescue()
        if self._level == RUN and now >= self._next_housekeeping or (
                now >= self._next_checkpoint and _size(self._options.path + "-wal") >= WAL_LIMIT):
            self._next_checkpoint = now + TICK / 2  # a slow reader may keep the -wal file long
            self._next_housekeeping = max(self._next_housekeeping, now + TICK)  # should it fail
            with contextlib.suppress(QueueError), open_queue(self._options) as queue:
                self._housekeep(queue)

    def _judge_signals(self) -> None:
        while self._signals:
            signum, at = self._signals.pop(0)
            if self._first_signal is None:
                self._first_signal = at
                self._obey(DRAIN)
            elif signum != getattr(signal, "SIGHUP", None) \
                    and at - self._first_signal >= SECOND_SIGNAL:
                self._obey(NOW)

    def _obey(self, level: int) -> None:
        """Follow an order, and let the workers follow it: they read it from our lock file."""
        if level <= self._level:
            return
        self._level = level
        with contextlib.suppress(OSError):
            raise_order(self._held, level)
        self._ring()
        self._log.event("ending the jobs and putting them back" if level == NOW else
                        "finishing the current jobs" if self._first_signal is None else
                        "finishing the current jobs; a second signal (Ctrl-C) puts them back")
        for slot, seat in list(self._seats.items()):
            if seat.process is None:
                del self._seats[slot]

    def _ring(self) -> None:
        folder = os.path.dirname(self._lock_path)
        for seat in self._seats.values():
            ring(os.path.join(folder, seat.name + ".bell"))

    def _reap(self) -> None:
        for slot, seat in list(self._seats.items()):
            code = seat.process.exitcode if seat.process is not None else None
            if code is None:
                continue
            seat.process = None
            if code in (0, FATAL) or code == -signal.SIGTERM and self._level != RUN:
                del self._seats[slot]
                self._ring()  # with --drain, the others may be done now
                if code == FATAL:
                    self._failed = True
                    self._obey(DRAIN)
                self._next_housekeeping = min(self._next_housekeeping, time.monotonic() + TICK)
                continue
            self._log.warn("worker %d died (%s)" % (
                slot, "exit code %d" % code if code > 0 else exit_error(None, -code)))
            self._rescue()
            if self._level != RUN:
                self._seats.pop(slot, None)
                continue
            quick = time.monotonic() - seat.started < SETTLED_IN
            seat.deaths = seat.deaths + 1 if quick else 0
            # At once after the first death, then after 0.2, 0.4, 0.8 ... seconds.
            pause = min(LONGEST_PAUSE, 0.05 * 2 ** min(seat.deaths, 10)) if seat.deaths > 1 else 0.0
            seat.replace_at = time.monotonic() + pause
        if os.getpid() == 1:
            reap_orphans({seat.process.pid for seat in self._seats.values()
                          if seat.process is not None})

    def _rescue(self) -> None:
        """Take back what a dead child has left. (Otherwise the workers look.)"""
        try:
            with open_queue(self._options) as queue:
                self._rescuer.look(queue, self._log.warn)
                queue.sweep()
        except DatabaseUnavailable as error:  # a worker will do it
            self._log.warn(str(error))
        except QueueError as error:
            self._log.warn(str(error))
            self._failed = True
            self._obey(DRAIN)

    def _housekeep(self, queue: Queue) -> None:
        """Checkpoint, say how many workers are left (or --ensure would count on those that have
        ended), and delete completed jobs past their time: at once while there are some, a step each
        TICK while there are none, so that this never holds the writer lock, nor a signal, for long
        (a checkpoint does, for as long as the disk takes to write WAL_LIMIT)."""
        with contextlib.suppress(QueueError), queue.impatient(TICK):
            queue.checkpoint()
            queue.set_count(self._options.name, len(self._seats))
            self._kept_until, deleted = queue.housekeeping(self._kept_until)
            self._next_housekeeping = time.monotonic() + (
                0.05 if deleted else TICK if self._kept_until else HOUSEKEEPING)

    def _replace(self) -> None:
        for slot, seat in self._seats.items():
            if time.monotonic() >= seat.replace_at:
                try:
                    self._start(slot)
                except OSError as error:  # no process, no descriptor: there may be again
                    self._log.warn("cannot start worker %d: %s" % (slot, error))
                    seat.replace_at = time.monotonic() + LONGEST_PAUSE


# -- clients ------------------------------------------------------------------------------

LONGEST_REST = 5.0  # seconds between two looks of `wait`
PATIENCE = 3.0  # seconds after which `worker stop` says for whom it waits


def own_job(queue: Queue) -> str | None:
    """The id of the job that this command runs in, if it is one of the same queue."""
    same = os.environ.get("QUEUECTL_DB") == queue.path
    return os.environ.get("QUEUECTL_JOB_ID") if same else None


def stop_workers(queue: Queue, level: int, timeout: float | None, note: Callable[[str], None],
                 names: Sequence[str] = (), queues: Sequence[str] = ()) -> int:
    """Order workers to stop (see Queue.order_stop), and wait until they are gone; how many. One
    that runs the job from which this is called is not waited for. `note` gets a line about
    those for whom one waits long. TimeoutExpired."""
    found, caller = queue.order_stop(level, names, queues), own_job(queue)
    own = {info.supervisor for info in found if caller is not None and info.job == caller}
    now = time.monotonic()
    until, note_at = math.inf if timeout is None else now + timeout, now + PATIENCE
    left = [info for info in found if info.supervisor not in own]
    while left:
        left = [info for info in left if is_held(queue.lock_path(info.name))]
        if left and time.monotonic() >= until:
            raise TimeoutExpired("not all workers have stopped yet; " + (
                "see: " + hint("worker list") if level == NOW else
                "to end their jobs: " + hint("worker stop --now")))
        if left and time.monotonic() >= note_at:
            note_at = math.inf
            note("waiting for " + ", ".join(
                "%s (pid %d)" % ("job " + info.job if info.job else "a worker" if info.slot else
                                 "its supervisor", info.pid)
                for info in sorted(left, key=lambda info: -info.slot))
                + ("; not to wait for jobs: " + hint("worker stop --now")) * (level != NOW))
        time.sleep(0.01)
    take_back_now(queue)
    return sum(info.slot > 0 for info in found)


def take_back_now(queue: Queue) -> None:
    """Take back at once what dead workers have left: after a change that concerns their jobs. (It
    has been made, also where this user may not ask who lives.)"""
    with contextlib.suppress(QueueError):
        Rescuer().finish(queue, lambda text: None)


def serves(info: WorkerInfo, name: str) -> bool:
    return info.queues is None or name in info.queues


def visible_workers(queue: Queue) -> list[WorkerInfo] | None:
    """The live workers; None for another user, who may not ask which live."""
    try:
        return queue.workers()
    except QueueError:
        return None


def obstacles(names: Sequence[str], paused: Sequence[str],
              workers: Sequence[WorkerInfo] | None) -> Iterator[tuple[str, Sequence[str]]]:
    """What keeps the ready jobs of these queues from running until somebody does something about
    it, and what; each with the queues that it concerns. Nothing is said of `workers` that are
    None."""
    if not names:
        return
    if EVERY_QUEUE in paused:
        yield "all queues are paused (to go on: %s)" % hint("resume"), names
        paused = ()
    for name in sorted(set(names).intersection(paused)):
        yield "the queue %s is paused (to go on: %s)" % (name, hint("resume " + name)), [name]
    unserved = [name for name in names if not any(serves(info, name) for info in workers or ())]
    if workers is not None and not workers:
        yield "no worker runs (start one: %s)" % hint("worker start"), names
    elif workers and unserved:
        yield "no worker serves the queue%s %s%s (start one: %s)" % (
            "s" * (len(unserved) > 1), ", ".join(unserved[:3]), ", ..." * (len(unserved) > 3),
            hint("worker start" + (" --queue " + unserved[0]) * (len(unserved) == 1))), unserved


def why_waiting(queue: Queue, job: Job, served: bool = False) -> list[str]:
    """Why a job waits, for people; nothing where it does not, or will start at once. That nobody
    serves its queue is no reason where that has just been `served`."""
    if job.state != "pending":
        return []
    found, blocker, now = [], queue.blocker(job), time.time()
    workers = None if served else visible_workers(queue)
    if blocker is not None:
        found.append("it waits for %s, which is %s" % blocker)
        if blocker[1] in ENDED:
            found[-1] += " (to run that again: %s)" % hint("dlq retry " + blocker[0])
    if job.run_after is not None and job.run_after > now and job.view != "pending":
        found.append("%s due at %s (in %s)" % (
            "its retry is" if job.view == "failed" else "it is", local_time(job.run_after),
            format_age(job.run_after - now)))
    found += [text for text, _ in obstacles([job.queue], queue.paused(), workers)]
    if job.view != "pending":
        return found
    running, limit = queue.running_in(job.queue), queue.limits().get(job.queue, math.inf)
    if len(running) >= limit:
        found.append("the limit of the queue %s is reached (%d: %s)" % (
            job.queue, limit, " ".join(running[:5])))
    before = queue.standing_before(job)
    if before:
        found.append(counted(before, "job stands", "jobs stand") + " before it")
    elif not found and not served and not any(
            info.job is None and serves(info, job.queue) for info in workers or ()):
        found.append("it is the next one, once a worker is free")
    return found


def first_waiting(queue: Queue, names: Sequence[str] = ()) -> Iterator[tuple[Job, int]]:
    """The oldest pending job of each queue of these names (none: of all), and how many it has."""
    for name, row in sorted(queue.counts_by_queue().items()):
        if row["pending"] and (not names or name in names):
            for job in queue.jobs("pending", name, 1):
                yield job, row["pending"]


def gather_status(queue: Queue) -> dict[str, Any]:
    """What `status` shows."""
    now, oldest, queues = time.time(), queue.oldest_ready(), queue.counts_by_queue()
    return {
        "database": queue.path,
        "jobs": total(queues),
        "queues": queues,
        "paused": queue.paused(),
        "limits": queue.limits(),
        "workers": queue.workers(),
        "orphaned": len(queue.orphans(queue.open_runs())),
        "oldest_ready_seconds": None if oldest is None else round(max(0.0, now - oldest), 3),
        # Stats are by the minute, so the last five began up to six minutes ago.
        "runs_per_minute": round(60 * summary(queue.stats(now - 300))["runs"]
                                 / (300 + now % 60), 3),
        "last_hour": summary(queue.stats(now - 3600)),
    }


def status_warning(status: Mapping[str, Any]) -> str | None:
    """What is not going well by itself: jobs wait, and nobody will run them."""
    jobs, paused, workers = status["jobs"], status["paused"], status["workers"]
    orphaned = status["orphaned"]
    if orphaned:
        return "%s left by a dead worker; %s" % (
            counted(orphaned, "job was", "jobs were"),
            "%s says more" % hint("show ID") if workers
            else "to take up again: %s" % hint("worker start"))
    if jobs["pending"] and jobs["pending"] == jobs["blocked"] and not jobs["processing"]:
        return "what the blocked jobs wait for has ended badly; see: " \
            + hint("list --state blocked")
    waiting = [name for name, row in sorted(status["queues"].items())
               if row["pending"] and (name not in paused or EVERY_QUEUE in paused)]
    for reason, names in obstacles(waiting, paused, workers):
        count = sum(status["queues"][name]["pending"] for name in names)
        return "%s: %s" % (counted(count, "job waits", "jobs wait"), reason)
    return None


def follow(queue: Queue, job: Job, number: int | None, live: bool) -> Iterator[tuple[int, bytes]]:
    """Pairs of the number of a job's run and what it printed, first b"" for each: of run `number`,
    or of the last one. With `live` what a running one prints as it comes; and where no number is
    given, run after run to the end of the job. QueueError if there is no such run."""
    runs = queue.runs(job.id)
    if number is not None and not 1 <= number <= len(runs):
        raise QueueError("job %s has %s" % (job.id, counted(len(runs), "run")))
    if number is None and not runs and not live:
        raise QueueError("job %s has not run yet" % job.id)
    shown = max(0, len(runs) - 1) if number is None else number - 1
    while True:
        for run in queue.runs(job.id)[shown:number]:
            shown += 1
            yield shown, b""
            for data in _follow_run(queue, run.run, live):
                yield shown, data
        if not live or shown == number:
            return
        job = queue.get(job.id)
        if job.state in ENDED and len(queue.runs(job.id)) <= shown:
            return
        if queue.stuck(job):
            raise QueueError("job %s waits for one that has ended badly (see: %s)"
                             % (job.id, hint("show " + job.id)))
        _await_change(queue)


def _await_change(queue: Queue, until: float = math.inf, rest: float = 0.0) -> None:
    """Return when anything may have changed, `rest` seconds from now at the earliest; at the
    latest after TICK, or `until` then (time.monotonic). QueueError if the database is gone."""
    queue.check_in_place()
    now = time.monotonic()
    rested, until = now + rest, min(until, now + max(rest, TICK))
    while now < until and (now < rested or not queue.changed()):
        time.sleep(0.02)
        now = time.monotonic()


def _follow_run(queue: Queue, run: int, live: bool) -> Iterator[bytes]:
    seen = 0
    while True:
        pieces, ended = queue.pieces(run, seen)
        data, seen = join_pieces(pieces, seen)
        if data:
            yield data
        if ended or not live:
            return
        _await_change(queue)


def start_detached(options: StartOptions, ensure: bool) -> tuple[int, str]:
    """Start workers in the background, and return once they run: (how many, their log).
    With `ensure`, only those that are missing to make `count` for this choice of queues; two
    who ensure at once take turns, so that the second sees the workers of the first."""
    require_safe(options.path)
    with Queue(options.path) as queue:
        log = options.log or os.path.join(queue.folder, "worker.log")
        require_log(log)
        turns = os.path.join(queue.folder, "ensure")
        try:
            fd = hold(turns, BUSY_BUDGET)
        except BlockingIOError:
            raise QueueError("another process has held %s for 30 s" % turns) from None
        try:
            count, served = options.count, sorted(set(options.queues)) or None
            for info in queue.workers(supervisors=True) if ensure else ():
                if not info.slot and info.queues == served and not info.stop:
                    count -= info.count
                    if info.via != options.via:
                        raise QueueError("workers for these queues run already, %s; end them first:"
                                         " %s" % ("with --via " + info.via if info.via else
                                                  "without --via", hint(" ".join(
                                             ["worker stop"] + ["--queue " + name for name
                                                                in served or ()]))))
            if count > 0:
                _start_supervisor(queue, options, count, log)
            return max(count, 0), log
        finally:
            release(turns, fd)


def require_log(path: str) -> None:
    try:
        os.close(open_log(path))
    except OSError as error:
        raise QueueError("cannot write the log %s: %s" % (path, error.strerror)) from None


def own_command() -> list[str]:
    """How another interpreter runs this program for long: it imports the file, if it can, since
    that is compiled only once, and compiling leaves 14 MB behind in each process."""
    folder, name = os.path.split(os.path.abspath(__file__))
    module, ending = os.path.splitext(name)
    if ending != ".py" or not module.isidentifier():
        return [sys.executable, os.path.join(folder, name)]
    return [sys.executable, "-c", "import os, sys; sys.path.insert(0, sys.argv.pop(1)); "
            "from %s import main; os._exit(main())" % module, folder]


def _start_supervisor(queue: Queue, options: StartOptions, count: int, log: str) -> None:
    """Start `count` workers in the background; returns once they run. QueueError."""
    import subprocess
    words = own_command() + ["--db", queue.path, "worker", "start", "--count", str(count),
                             "--log", log, "--name", options.name]
    words += ["--drain"] * options.drain + ["--quiet"] * options.quiet
    words += ["--queue=" + name for name in options.queues]
    words += ["--via=" + options.via] if options.via else []
    env = dict(os.environ)
    env.pop(RUN_VARIABLE, None)  # a job that starts workers is not what they are part of
    errors = open_log(log)
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            cwd=os.sep, env=env, start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))  # Windows
    finally:
        os.close(errors)
    until = time.monotonic() + BUSY_BUDGET
    while process.poll() is None:
        running = sum(info.supervisor == options.name for info in queue.workers())
        enough = running >= (1 if options.drain else count)  # of those, some may be done already
        if enough or time.monotonic() > until:
            process.returncode = 0  # ours no longer: no warning that it still runs
            if not enough:
                raise QueueError("%d of %d workers have started in 30 s; the others are tried "
                                 "again, and %s says why" % (running, count, log))
            return
        time.sleep(0.01)
    if process.returncode or not options.drain:
        raise QueueError("the workers did not start; %s says why" % log)


def wait_for(queue: Queue, ids: Sequence[str], timeout: float | None,
             tell: Callable[[int, int, int], None]) -> None:
    """Wait until jobs have ended, or can never run: these, or (none named) all that have not
    ended now; but not for the job from which this is called. `tell` gets (done, failed, left) now
    and then. TimeoutExpired; QueueError for a job that does not exist, and where not all have
    completed."""
    until = math.inf if timeout is None else time.monotonic() + timeout
    last, caller = 0 if ids else queue.wait_for_all(), own_job(queue)
    open_jobs = [queue.get(id).id for id in dict.fromkeys(ids) if id != caller]
    total = len(open_jobs) if ids else queue.progress(last, caller)[0]
    bad: list[Job] = []
    while True:
        looked = time.monotonic()
        if ids:
            for job in map(queue.get, list(open_jobs)):
                if job.state in ENDED or queue.stuck(job):
                    open_jobs.remove(job.id)
                    if job.state != "completed":
                        bad.append(job)
            left, failed = len(open_jobs), len(bad)
        else:
            left, stuck, failed = queue.progress(last, caller)
            left, failed = left - stuck, failed + stuck
        took = time.monotonic() - looked
        tell(total - left - failed, failed, left)
        if failed and not left:
            raise QueueError("%s not completed%s (see: %s)" % (
                counted(failed, "job has", "jobs have"),
                ": " + ", ".join("%s is %s" % (job.id, job.view) for job in bad[:5]) if bad else "",
                hint("show " + bad[0].id if bad else "status")))
        if not left:
            return
        if time.monotonic() >= until:
            raise TimeoutExpired(counted(left, "job has", "jobs have") + " not ended in time")
        # To count a million jobs takes a while, which the workers should have.
        _await_change(queue, until, rest=min(10 * took, LONGEST_REST))


# -- output -------------------------------------------------------------------------------

COLOURS = {"processing": "36", "completed": "32", "dead": "31", "cancelled": "35",
           "failed": "33", "scheduled": "34", "blocked": "33"}
UNLIMITED = 10000  # columns of what is no terminal


def say(text: str) -> None:
    """A note for people: on stderr, so that stdout carries data only. Where nobody can get it,
    what it is about stays as it is."""
    with contextlib.suppress(OSError):
        print("queuectl: " + printable(text), file=sys.stderr, flush=True)


def width() -> int:
    import shutil
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED


def colour(text: str, state: str) -> str:
    """The text in the colour of that state, if it has one, on a terminal."""
    if state not in COLOURS or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return "\x1b[%sm%s\x1b[0m" % (COLOURS[state], text)


def clipped(line: str, columns: int) -> str:
    """A line that fits, without its colours where it has to be cut."""
    import re
    plain = re.sub("\x1b[^m]*m", "", line)
    return line if len(plain) <= columns else plain[:columns]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]],
          coloured: int = -1) -> Iterator[str]:
    """Lines of a table that fits the terminal. The last column takes what is left; column
    `coloured` holds states. Rows beyond the first page are laid out like it: no table keeps
    more than a page in memory. Any text is made safe for a terminal."""
    room, texts = width(), ([printable(cell) for cell in row] for row in rows)
    page = list(itertools.islice(texts, PAGE))
    widths = [max([len(head)] + [len(row[column]) for row in page])
              for column, head in enumerate(heads)]
    while sum(widths) + 2 * len(widths) - 2 > room and max(widths) > 4:
        # The last column gives way first, then the widest.
        last = len(widths) - 1
        widths[last if widths[last] > 12 else widths.index(max(widths))] -= 1

    def line(cells: Sequence[str]) -> str:
        parts = []
        for column, (cell, limit) in enumerate(zip(cells, widths)):
            if len(cell) > limit and room < UNLIMITED:
                cell = cell[:limit - 1] + "\u2026"
            text = cell.ljust(limit) if column < len(widths) - 1 else cell
            parts.append(colour(text, cell) if column == coloured else text)
        return "  ".join(parts).rstrip()

    yield from map(line, itertools.chain([heads], page, texts))


def relative(epoch: float, now: float) -> str:
    return "in " + format_age(epoch - now) if epoch > now else format_age(now - epoch) + " ago"


def job_when(job: Job, now: float, blocker: tuple[str, str] | None) -> str:
    """The time that matters in this job's state, relative to now."""
    if blocker is not None:
        return "by %s (%s)" % blocker
    if job.view in ("failed", "scheduled") and job.run_after is not None:
        return relative(job.run_after, now) if job.run_after > now else "due"
    if job.state == "processing":
        return "for " + format_age(now - from_iso(job.locked_at or job.updated_at))
    return relative(from_iso(job.created_at if job.state == "pending" else job.updated_at), now)


def job_tries(job: Job) -> str:
    return "%d/%d" % (job.attempts, job.max_retries)


def job_table(jobs: Iterable[Job], blocker: Callable[[Job], tuple[str, str] | None],
              now: float) -> Iterator[str]:
    return table(("ID", "STATE", "TRIES", "QUEUE", "WHEN", "COMMAND"), (
        (job.id, job.view, job_tries(job), job.queue,
         job_when(job, now, blocker(job)), job.command)
        for job in jobs), coloured=1)


def dead_table(jobs: Iterable[Job], now: float) -> Iterator[str]:
    return table(("ID", "TRIES", "QUEUE", "WHEN", "ERROR", "COMMAND"), (
        (job.id, job_tries(job), job.queue, relative(from_iso(job.updated_at), now),
         job.last_error or "", job.command) for job in jobs))


def at(text: str | None, now: float) -> str:
    """A time for people, and how long ago that was."""
    if not text:
        return ""
    epoch = from_iso(text)
    return "%s (%s)" % (local_time(epoch), relative(epoch, now))


def job_facts(job: Job, reasons: Sequence[str], now: float) -> list[tuple[str, str]]:
    """All about one job, with `reasons` why it waits: pairs of a name and a text. Of its
    environment only the names: the values may be secrets."""
    facts = [
        ("job", job.id), ("command", job.command), ("state", job.view),
        ("waits", "; ".join(reasons)),
        ("attempts", "%d of %d" % (job.attempts, job.max_retries)),
        ("queue", job.queue + (", priority %d" % job.priority if job.priority else "")),
        ("timeout", "" if job.timeout is None else format_duration(job.timeout) if job.timeout
         else "none"),
        ("folder", job.cwd or ""), ("env", " ".join(sorted(job.env))),
        ("after", " ".join(job.after)), ("unique", job.unique or ""),
        ("enqueued", at(job.created_at, now)),
        ("runs at", at(job.run_at, now) if job.state == "pending" else ""),
        ("worker", "%s, since %s" % (job.locked_by, at(job.locked_at, now))
         if job.locked_by else ""),
        ("error", job.last_error or ""),
    ]
    return [(name, printable(text)) for name, text in facts if text]


def job_sheet(job: Job, runs: Sequence[Run], reasons: Sequence[str], now: float) -> Iterator[str]:
    for name, text in job_facts(job, reasons, now):
        yield "%-9s %s" % (name, colour(text, job.view) if name == "state" else text)
    if runs:
        yield ""
        yield from table(("RUN", "OUTCOME", "STARTED", "TOOK", "WORKER", "ERROR"), (
                (str(run.number), run.outcome or "running", at(run.started_at, now),
                 format_age((from_iso(run.finished_at) if run.finished_at else now)
                            - from_iso(run.started_at)), run.worker, run.error or "")
                for run in runs), coloured=1)


def status_parts(status: Mapping[str, Any], now: float) -> Sequence[list[str]]:
    """Lines about the jobs, the workers and (where they say more) the queues."""
    jobs, paused, hour = status["jobs"], status["paused"], status["last_hour"]
    facts = ["database  " + printable(status["database"]), "jobs      " + ", ".join(
        colour("%d %s" % (jobs[state], state), state if jobs[state] else "")
        for state in STATES)]
    views = ["%d %s" % (jobs[view], view) for view in VIEWS if jobs[view]]
    if views:
        facts.append("          of the pending: " + ", ".join(views))
    if status["oldest_ready_seconds"] is not None:
        facts.append("waiting   the first ready job for "
                     + format_age(status["oldest_ready_seconds"]))
    if hour["runs"]:
        rate = status["runs_per_minute"]
        facts.append("rate      %.*f runs a minute in 5 minutes; %d in the last hour, "
                     "%d of these runs failed" % (0 if rate >= 10 else 1, rate, hour["runs"],
                                                  hour["failed"]))
        facts.append("duration  %s on average" % format_age(hour["mean_seconds"]))
    workers, limits, queues = status["workers"], status["limits"], status["queues"]
    busy = sum(info.job is not None for info in workers)
    there = ["workers   " + ("%s, %d busy" % (counted(len(workers), "worker"), busy) if workers
                             else "none runs")]
    if workers:
        there += ["", *worker_table(workers, now)]
    if len(queues) <= 1 and not paused and not limits:
        return facts, there, []
    shown = ("pending", "processing", "failed", "scheduled", "blocked", "dead")
    return facts, there, ["", *table(("QUEUE",) + tuple(word.upper() for word in shown) + ("",), (
        [name] + [str(queues.get(name, {}).get(word, 0)) for word in shown]
        + [", ".join((["paused"] if {name, EVERY_QUEUE} & set(paused) else [])
                     + (["limit %d" % limits[name]] if name in limits else []))]
        for name in sorted(set(queues) | set(paused) - {EVERY_QUEUE} | set(limits))))]


def status_screen(status: Mapping[str, Any], warning: str | None, now: float, columns: int,
                  lines: int) -> list[str]:
    """These lines and the warning for a screen. What is too much for it are first the queues, then
    the facts, and of the workers the last ones."""
    import textwrap
    facts, workers, queues = status_parts(status, now)
    head = textwrap.wrap("! " + warning, columns) + [""] if warning else []
    over = len(head + facts + workers + queues) - lines
    for part in (queues, facts):
        gone = min(max(over, 0), len(part))
        del part[len(part) - gone:]
        over -= gone
    if over > 0:
        workers[-over - 1:] = ["(%s)" % counted(over + 1, "more worker")]
    return [clipped(line, columns) for line in head + facts + workers + queues]


def worker_table(workers: Iterable[WorkerInfo], now: float) -> Iterator[str]:
    return table(("WORKER", "SLOT", "PID", "QUEUES", "FOR", "JOB"), (
        (info.name, str(info.slot), str(info.pid),
         "all" if info.queues is None else ",".join(info.queues),
         format_age(now - from_iso(info.job_started_at or info.started_at)),
         (info.job or "idle") + (" (stopping)" if info.stop else "")) for info in workers))


def prometheus(queues: Mapping[str, Mapping[str, int]], held: set[str],
               stats: Sequence[tuple[str, str, int, float]], workers: Sequence[WorkerInfo],
               oldest: float) -> Iterator[str]:
    """The text format 0.0.4 of
    https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format"""
    def metric(name: str, kind: str, text: str,
               samples: Iterable[tuple[str, Mapping[str, str], float]]) -> Iterator[str]:
        yield "# HELP queuectl_%s %s" % (name, text)
        yield "# TYPE queuectl_%s %s" % (name, kind)
        for suffix, labels, value in samples:
            words = ['%s="%s"' % (key, word.replace("\\", r"\\").replace('"', r'\"'))
                     for key, word in labels.items()]
            yield "queuectl_%s%s%s %.10g" % (
                name, suffix, "{%s}" % ",".join(words) if words else "", value)

    def states(queue: str) -> dict[str, int]:
        row = dict(queues[queue])
        ready = row["pending"] - sum(row[view] for view in VIEWS)
        is_held = bool(held & {queue, EVERY_QUEUE})
        return dict(row, pending=0 if is_held else ready, held=ready if is_held else 0)

    yield from metric("jobs", "gauge", "Jobs by queue and state. Pending ones could run now; those "
                      "of a queue that is paused or at its limit are held.", (
        ("", {"queue": queue, "state": state}, jobs)
        for queue in sorted(queues) for state, jobs in states(queue).items()))
    yield from metric("runs_total", "counter", "Runs that have ended, by queue and outcome.", (
        ("", {"queue": queue, "outcome": outcome}, runs) for queue, outcome, runs, _ in stats))
    totals: dict[str, list[float]] = {}
    for queue, _, runs, seconds in stats:
        total = totals.setdefault(queue, [0, 0])
        total[0] += seconds
        total[1] += runs
    yield from metric("run_seconds", "summary", "How long runs took, by queue.", (
        (suffix, {"queue": queue}, value) for queue, total in sorted(totals.items())
        for suffix, value in zip(("_sum", "_count"), total)))
    yield from metric("workers", "gauge", "Live workers, by what they do.", (
        ("", {"state": "busy"}, sum(info.job is not None for info in workers)),
        ("", {"state": "idle"}, sum(info.job is None for info in workers))))
    yield from metric("oldest_ready_seconds", "gauge", "For how long the first of the jobs that "
                      "could run has been waiting.", (("", {}, oldest),))


# -- web ----------------------------------------------------------------------------------
#
# One page for people who would rather look. Who can enqueue can run commands, so each request
# has to name this machine as its Host (as none does from a name that somebody has rebound) and
# to bring the cookie that is given for the ticket in the printed URL, which serves once; what
# acts also needs a header that a page from elsewhere cannot send. Text from jobs travels as JSON
# and becomes text nodes: the Content-Security-Policy knows one script, by a nonce, and forbids to
# make HTML of a string.
#
# The main thread watches: it asks PRAGMA data_version, and whether supervisors live; where that
# says something new and somebody looks on, it gathers the status, and streams it to all open tabs
# (/events), which then ask for what else they show. Each request has a thread and a Queue.

# At most: queues, those with most to do; a job's last runs; characters of a command in a list;
# bytes of a run's output, from its end.
QUEUES_SHOWN, RUNS_SHOWN, COMMAND_SHOWN, OUTPUT_SHOWN = 100, 50, 300, 1 << 18
FACTS = ("waiting", "rate", "duration", "workers")  # lines of `status`
# Seconds between two looks; after which a silent stream finds out whether somebody reads it; and
# for a client to come up with its request.
LOOK, BEAT, REQUEST_TIME = 0.5, 15.0, 20.0
CONNECTIONS = 100  # without a request yet; for one more, the oldest has to go
BODY_LIMIT = 1 << 20  # bytes; a command has less than 128 KiB
WHOLE = parse_integer(0, 1 << 59)  # a number in a request, which may be any

PAGE_HTML = r"""<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>queuectl</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 5 5'>
 <path d='M0 0h5v1H0zm0 2h4v1H0zm0 2h3v1H0z' fill='%231a8f6f'/></svg>">
<style nonce="{nonce}">{style}</style>
<header><h1>queuectl</h1><p id="database" class="cut mute"></p><p id="link" role="status"></p>
  <span id="switch"></span><button data-act="enqueue" class="main">Enqueue…</button></header>
<p id="verdict" role="status"></p><nav id="states" aria-label="Jobs by state"></nav>
<figure id="chart"></figure><main>
  <form id="filter" role="search"><input id="word" type="search" maxlength="200" autocomplete="off"
    aria-label="Search ids and commands" placeholder="search ids and commands ( / )">
    <span id="views"></span></form>
  <ol id="jobs" aria-label="Jobs, the newest first"></ol><nav id="pages" aria-label="Pages"></nav>
</main>
<aside id="side"><h2>Queues</h2><ul id="queues"></ul><h2>Workers</h2><ul id="workers"></ul></aside>
<aside id="sheet" aria-label="Job" tabindex="-1" hidden></aside><dialog id="dialog"></dialog>
<p id="notice" role="alert" hidden></p>
<script nonce="{nonce}">{script}</script>
"""
PAGE_STYLE = r"""
:root { color-scheme: light dark; --back: #f3f4f6; --panel: #fff; --line: #dcdfe4; --text: #1b212a;
  --mute: #5b6673; --green: #1f7a3d; --red: #c3262e; --cyan: #0b7285; --magenta: #8f3fa8;
  --yellow: #8f5f00; --blue: #1f5fbf; --orange: #c2570c; }
@media (prefers-color-scheme: dark) { :root { --back: #0f1216; --panel: #161a20; --line: #2a3039;
  --text: #dbe1e8; --mute: #909baa; --green: #57c47a; --red: #ff7b78; --cyan: #4cc3d9;
  --magenta: #d792ee; --yellow: #e0b040; --blue: #7db4ff; --orange: #ff9c4a; } }
* { box-sizing: border-box; margin: 0; font: inherit; color: inherit; text-decoration: none; }
body { display: grid; height: 100dvh; padding: 0 16px 12px; gap: 10px; background: var(--back);
  color: var(--text); font: 14px/1.4 system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
  grid: auto auto auto minmax(0, 1fr) / 550px minmax(0, 1fr) 344px; grid-template-areas:
  "head head head" "verdict verdict verdict" "states chart chart" "main main side"; }
.dead, .lost, dd.error { color: var(--red); } .failed, .blocked, dd.waits { color: var(--yellow); }
.processing { color: var(--cyan); } .completed { color: var(--green); } .cancelled { color:
  var(--magenta); } .timeout { color: var(--orange); } .scheduled { color: var(--blue); }
.interrupted, .none, dt { color: var(--mute); } dialog::backdrop { background: #0006; }
h1, b { font-weight: 620; } h2, .mute, figcaption { font-size: 12px; color: var(--mute); }
h2 { font-weight: 600; padding: 12px 0 4px; } aside h2:first-child { padding-top: 0; }
ol, ul { list-style: none; padding: 0; } b, time, #jobs { font-variant-numeric: tabular-nums; }
code, pre { font: 12.5px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.cut { min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.state::before { content: "●"; font-size: 11px; margin-right: 6px; } [hidden] { display: none; }
a:hover, a[aria-current], pre, input { background: var(--back); }
button, input, pre, .chip { border: 1px solid var(--line); border-radius: 6px; padding: 3px 10px; }
button, .chip { background: var(--panel); font-size: 13px; white-space: nowrap; cursor: pointer; }
.chip[aria-current], #states [aria-current] { box-shadow: inset 0 0 0 2px currentColor; }
button::first-letter { text-transform: uppercase; } button:hover { border-color: var(--mute); }
.main, [data-act=retry] { background: var(--green); color: var(--panel); }
[data-act=purge], [data-act=cancel] { border-color: var(--red); color: var(--red); }
:focus-visible { outline: 2px solid var(--blue); outline-offset: -1px; }
header { grid-area: head; display: flex; align-items: center; gap: 12px; height: 46px;
  margin: 0 -16px; padding: 0 16px; background: var(--panel); } #database { flex: 1; }
#verdict { grid-area: verdict; padding: 7px 12px; border-left: 4px solid var(--green);
  background: var(--panel); color: var(--mute); font-size: 13px; }
#verdict b { font-size: 14px; color: var(--text); } #verdict.warn { border-color: var(--yellow); }
#states { grid-area: states; display: grid; grid-template-columns: repeat(5, 1fr); gap: 8px; }
#states a, #chart, main, #side, dialog { border: 1px solid var(--line); border-radius: 8px;
  background: var(--panel); padding: 10px 12px; }
#states b { display: block; font-size: 26px; line-height: 1.4; } main, #side { overflow: auto; }
#chart { grid-area: chart; } main { grid-area: main; } #side { grid-area: side; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 14px; } figcaption i { flex: 1; }
svg { display: block; width: 100%; height: 66px; } rect { fill: currentColor; }
#filter { position: sticky; top: -10px; margin: -10px -12px 0; background: var(--panel); }
#filter, #pages, .row, #views { display: flex; flex-wrap: wrap; gap: 8px; padding: 8px 12px; }
#word { width: 250px; } #views { flex: 1; padding: 0; } .row { padding: 0 0 10px; }
#jobs a, .run { display: grid; align-items: baseline; gap: 0 12px; padding: 4px 12px;
  border-top: 1px solid var(--line); grid-template-columns: 104px 104px 36px 92px 80px 1fr; }
.what { display: flex; gap: 10px; } #jobs a { margin: 0 -12px; } li.mute { padding: 12px 0; }
#side li { display: grid; grid-template-columns: minmax(0, 1fr) auto auto auto; gap: 0 6px;
  align-items: center; padding: 5px 0; border-top: 1px solid var(--line); }
#side .more { grid-column: 1 / -1; } #side button { padding: 1px 7px; font-size: 12px; }
#sheet { position: fixed; inset: 0 0 0 auto; width: min(640px, 100vw); overflow: auto; outline: 0;
  padding: 14px 18px; background: var(--panel); box-shadow: 0 0 40px #0006; }
#sheet, dialog, #notice { overflow-wrap: anywhere; } .row h2, .row .state { padding: 3px 0; }
.row h2 { flex: 1; } .row h2 code { font-size: 17px; color: var(--text); }
pre { white-space: pre-wrap; max-height: 42vh; overflow: auto; }
ol, dl { font-size: 13px; } dl { display: grid; grid-template-columns: 90px 1fr; margin: 10px 0; }
#sheet .run { grid-template-columns: 22px 106px 68px 60px minmax(0, 1fr); padding: 4px 6px; }
dialog { margin: auto; width: min(480px, 96vw); color: var(--text); } label { display: block; }
dialog input { width: 100%; padding: 6px 8px; }
label, dialog .row { margin: 10px 0 0; justify-content: end; padding: 0; }
#notice { position: fixed; left: 50%; bottom: 18px; transform: translateX(-50%); max-width: 92vw;
  padding: 8px 14px; border-radius: 6px; background: var(--text); color: var(--back); }
@media (max-width: 1180px) { body { height: auto; grid: auto / minmax(0, 1fr); grid-template-areas:
  "head" "verdict" "states" "chart" "main" "side"; } main, #side { overflow: visible; } }
@media (max-width: 640px) { body { padding: 0 8px 12px; gap: 7px; } #states { gap: 4px; }
  header { margin: 0 -8px; padding: 0 8px; gap: 8px; } svg { height: 46px; }
  #states a { padding: 4px 0; text-align: center; font-size: 11px; } #states b { font-size: 19px; }
  #jobs a { grid: auto auto / 100px minmax(0, 1fr) auto; padding: 7px 12px; gap: 1px 8px; }
  #jobs .wide { display: none; } #jobs .what { grid-column: 1 / -1; } #word { width: 100%; }
  #sheet .run { grid-template-columns: 22px 106px 1fr auto; } .run .cut { grid-column: 2 / -1; }
  button, .chip { padding: 6px 9px; } #side button { padding: 5px 9px; } #views { gap: 5px; } }
"""
PAGE_SCRIPT = r"""
"use strict";
const $ = id => document.getElementById(id), state = name => el("span state " + name, name);
let status, jobs, job, output = {text: ""}, skew = 0, stream, loading, again;
// What is asked before something is done: a text, and the fields of a form.
const ASKED = {cancel: ["Cancel $? If it runs, it is ended."],
  purge: ["Delete $, with its runs and their output, for good?"],
  limit: ["How many jobs of $ may run at once? Nothing: any number.", "number"],
  enqueue: ["A command for the shell", "command", "id", "queue", "priority", "timeout", "delay"],
  edit: ["Change $", "command", "queue", "priority", "timeout", "max_retries", "delay"],
  "retry-all": ["Retry all dead jobs of $?"]};
// el("b mute", "text", {title: "..."}) is a node: what comes from a job becomes a text node in it,
// or the value of an attribute. fill() changes only what differs: focus and selection stay.
function el(what, ...children) {
  const [tag, ...look] = what.split(" "), kind = /svg|rect/.test(tag) ? "2000/svg" : "1999/xhtml";
  return give(document.createElementNS("http://www.w3.org/" + kind, tag), {class: look.join(" ")},
    children);
}
function give(node, ...children) {
  for (const child of children.flat(3).filter(child => child || child === 0)) {
    if (child.constructor !== Object) node.append(child);
    else for (const [name, value] of Object.entries(child))
      if (value || value === 0) node.setAttribute(name, value);
  }
  return node;
}
function patch(old, now) {
  if (old.nodeType === 3) { if (old.data !== now.data) old.data = now.data; return; }
  for (const {name} of [...old.attributes]) if (!now.hasAttribute(name)) old.removeAttribute(name);
  for (const {name, value} of now.attributes)
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const left = [...old.childNodes], key = node => node.nodeName + (node.dataset || {}).key;
  for (const child of [...now.childNodes]) {
    const at = left.findIndex(each => key(each) === key(child));
    for (const gone of left.splice(0, at)) gone.remove();
    if (at < 0) old.insertBefore(child, left[0] || null); else patch(left.shift(), child);
  }
  for (const gone of left) gone.remove();
}
const fill = (id, ...children) => patch($(id), give($(id).cloneNode(false), children));
// What is shown stands in the address, behind the #: reload, "back" and bookmarks keep it.
const pairs = found => new URLSearchParams(Object.entries(found).filter(([, value]) => value));
const place = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const to = changes => "#" + pairs({...place(), ...changes});
const link = (look, text, changes, more) => el("a " + look, text, {href: to(changes)}, more);
const act = (name, body, text = name.replace("-", " ")) => el("button", text, ASKED[name] && "…",
  {"data-act": name, "data-body": JSON.stringify(body)});
const words = (...texts) => texts.filter(Boolean).join(" · ");
const clock = () => Date.now() / 1000 + skew, epoch = text => Date.parse(text) / 1000;
const age = seconds => seconds < 1 ? Math.round(seconds * 1000) + "ms" : seconds < 60
  ? +seconds.toFixed(seconds < 10 ? 1 : 0) + "s" : seconds < 3600 ? Math.floor(seconds / 60) + "m"
  : seconds < 86400 ? Math.floor(seconds / 3600) + "h" : Math.floor(seconds / 86400) + "d";
const told = text => (passed => passed < 0 ? "in " + age(-passed) : age(passed || 1) + " ago")(
  Math.floor(clock() - epoch(text)));
const time = text => text && el("time", told(text), {datetime: text, title: text});
const when = each => time(each.state === "processing" ? each.locked_at : each.state !== "pending"
  ? each.updated_at : each.view === "pending" ? each.created_at : each.run_at);
function tick() {  // no more often than somebody can see
  const times = [...document.querySelectorAll("time")];
  for (const each of times) each.firstChild.data = told(each.dateTime);
  setTimeout(tick, times.some(each => /\ds/.test(each.firstChild.data)) ? 1000 : 20000);
}
function showStatus() {
  const {jobs: counts, workers, queues, limits, paused, warning} = status, here = place();
  document.title = (warning ? "! " : counts.dead ? counts.dead + " dead · " : "") + "queuectl";
  fill("database", status.database);
  fill("switch", act(...paused.includes("*") ? ["resume", {queue: null}, "resume all"]
    : ["pause", {queue: null}, "pause all"]));
  $("verdict").className = warning ? "warn" : "";
  fill("verdict", el("b", warning || (counts.processing ? "Running" : counts.pending
    ? "Nothing runs now" : "Nothing to do")), words(" ", ...status.facts));
  const filter = (look, name, text) => link(look + name, text, {before: "", state: here.state ===
    name ? "" : name}, {"aria-current": here.state === name});
  fill("states", ["pending", "processing", "completed", "dead", "cancelled"].map(name => filter(
    counts[name] ? "" : "none ", name, [el("b", counts[name].toLocaleString("en")), name])));
  fill("views", here.queue && link("chip", `queue ${here.queue} ✕`, {queue: "", before: ""}),
    ["failed", "scheduled", "blocked"].filter(name => counts[name] || here.state === name).map(
      name => filter("chip state ", name, `${name} ${counts[name]}`)),
    here.state === "dead" && !here.word && act("retry-all", {queue: here.queue || null}));
  const names = new Set([...Object.keys(queues), ...paused, ...Object.keys(limits)]);
  fill("queues", [...names].sort().filter(name => name !== "*").map(name => {
    const row = queues[name] || {pending: 0, processing: 0}, off = paused.includes(name);
    return el("li", {"data-key": name}, link("cut", name, {queue: name, before: ""}),
      el("span failed", words(off && "paused", limits[name] && "limit " + limits[name])),
      act("limit", {queue: name, number: limits[name]}),
      act(off ? "resume" : "pause", {queue: name}),
      el("span mute more", `${row.pending} pending, ${row.processing} processing`));
  }));
  fill("workers", workers.map(each => el("li", {"data-key": each.name},
    each.job ? link("cut", el("code", each.job), {job: each.job, run: ""}) : "idle",
    el("span failed", each.stop > 0 && "stopping"), time(each.job_started_at || each.started_at),
    el("span mute cut more", words(each.slot, each.name, ...each.queues || []) + " ",
      el("code", each.command)))), !workers.length && el("li mute", "none runs"));
  showChart();
}
function showChart() {
  const last = Math.floor(clock() / 60), minutes = Array.from({length: 60}, () => ({})), hour = {};
  for (const [minute, outcome, runs] of status.minutes.filter(([minute]) => minute > last - 60)) {
    minutes[Math.min(59, minute - last + 59)][outcome] = runs;
    hour[outcome] = (hour[outcome] || 0) + runs;
  }
  const most = Math.max(...minutes.map(each => Object.values(each).reduce((a, b) => a + b, 0)));
  const parts = each => ["completed", "failed", "timeout", "lost", "cancelled", "interrupted"]
    .filter(name => each[name]).map(name => [name, each[name]]);
  const bar = (each, x, top = 0) => parts(each).map(([name, runs]) => el("rect " + name, {
    x: x + .12, width: .76, y: most - (top += runs), height: runs}));
  fill("chart", el("svg", {viewBox: `0 0 60 ${most || 1}`, preserveAspectRatio: "none"},
    minutes.map((each, x) => bar(each, x))), el("figcaption", "1 h ago", el("i"),
    parts(hour).map(([name, runs]) => el("span state " + name, `${runs} ${name}`)),
    most ? `at most ${most} a minute` : "no runs in the last hour", el("i"), "now"));
}
function showJobs() {
  const here = place(), asked = here.state || here.queue || here.word || here.before;
  fill("jobs", jobs.jobs.map(each => el("li", {"data-key": each.id}, link("", [state(each.view),
    el("code cut", each.id), el("span mute wide", `${each.attempts}/${each.max_retries}`),
    el("span cut wide", each.queue), el("span mute cut", each.blocker ? "by " + each.blocker[0]
      : when(each)), el("span cut what", el("code cut", each.command), el("span mute cut",
      each.state !== "completed" && each.last_error))],
  {job: each.id, run: ""}, {"aria-current": here.job === each.id}))), !jobs.jobs.length &&
    el("li mute", asked ? "No such job" + (jobs.older ? " so far." : ".") : "No jobs yet."));
  fill("pages", here.before && link("chip", "↑ newest", {before: ""}),
    jobs.older && link("chip", "older ↓", {before: jobs.older}));
}
function showSheet() {
  const before = $("output"), was = $("sheet").hidden;
  const atEnd = !before || before.scrollTop + before.clientHeight > before.scrollHeight - 30;
  if ($("sheet").hidden = !place().job || !job) return fill("sheet");
  const {id, view} = job, ended = /dead|cancelled/.test(view), waits = job.state === "pending";
  fill("sheet", el("div row", el("h2", el("code", id)), state(view), link("chip", "Close", {job: "",
    run: ""})), el("div row", ended && act("retry", {id}), (ended || waits) && act("edit", {id}),
  view === "dead" && act("purge", {id}), (waits || view === "processing") && act("cancel", {id})),
  el("pre", job.command), el("dl", job.facts.map(([name, text]) => [el("dt", name), el("dd " + name,
    name === "error" ? text : text.replace(/ \((in [\w.]+|[\w.]+ ago)\)/g, ""))])),
  [...job.runs].reverse().map(each => link("run", [el("b", each.number), state(each.outcome ||
    "processing"), time(each.started_at), el("span", age((each.finished_at ?
    epoch(each.finished_at) : clock()) - epoch(each.started_at))), el("span cut mute", each.error)],
  {run: each.number}, {"data-key": each.number, "aria-current": output.run === each.number})),
  output.run && [el("h2", `Output of run ${output.run}`), el("pre", output.text ||
    "It has printed nothing.", {id: "output", tabindex: 0})]);
  if (atEnd && $("output")) $("output").scrollTop = $("output").scrollHeight;
  if (was) $("sheet").focus();
}
function tell(text) { $("notice").textContent = text; $("notice").hidden = !text; }
async function ask(path, body) {
  const answer = await fetch(path, body && {method: "POST", headers: {"X-Queuectl": "1"},
    body: JSON.stringify(body)});
  if (answer.ok) return answer.json(); else throw Error(await answer.text());
}
async function refresh() {  // one at a time
  const {job: id, run, ...filters} = place();
  if (loading) return again = true;
  [loading, again] = [true, false];
  try {
    jobs = await ask("jobs?" + pairs(filters));
    skew = jobs.now - Date.now() / 1000;
    if (!job || id !== job.id) [job, output] = [null, {text: ""}];
    if (id) job = await ask("job?" + pairs({id, run, shown: output.run, seen: output.seen}));
    const now = job && job.output || {text: ""}, text = (now.from ? output.text : "") + now.text;
    output = {...now, text: text.slice(-300000).replace(/\x1b\[[\d;?]*[A-Za-z]/g, "")};
  } catch (error) { tell(error.message); }
  loading = false;
  if (again) return refresh();
  if (status) showStatus();
  if (jobs) { showJobs(); showSheet(); }
}
function start(name, body) {
  const [text, ...fields] = ASKED[name] || [], had = name === "edit" ? job : body;
  if (!text) return ask(name, body).then(refresh, error => tell(error.message));
  fill("dialog", el("form", {"data-key": Date.now()}, el("p", text.replace("$", () => body.id ||
    body.queue || "all queues")), fields.map(field => el("label", field.replace("_", " "),
    el("input", {name: field, value: had[field], autocomplete: "off"}))), el("p dead", {
    id: "refused", role: "alert"}), el("div row", act("back"), el("button main",
    name.replace("-", " ")))));
  $("dialog").firstChild.onsubmit = async event => {
    event.preventDefault();
    const given = [...new FormData(event.target)].filter(([field, text]) => name === "limit" || text
      && text !== String(had[field])).map(([field, text]) => [field, text || null]);
    try {
      const result = await ask(name, {...body, ...Object.fromEntries(given)});
      if (/enqueue|purge/.test(name)) location.hash = to({job: result, run: ""});
      $("dialog").close();
      refresh();
    } catch (error) { fill("refused", error.message); }
  };
  $("dialog").showModal();
}
function listen() {  // while the tab is seen
  if (stream) stream.close();
  if (document.hidden) return;
  stream = new EventSource("events");
  stream.onmessage = event => { status = JSON.parse(event.data); refresh(); };
  stream.onopen = stream.onerror = () => {
    $("link").className = "state " + (stream.readyState === 1 ? "completed" : "failed");
    $("link").textContent = ["no connection", "live", "open the new URL"][stream.readyState];
  };
}
document.onvisibilitychange = listen; window.onhashchange = refresh;
document.onclick = event => {
  const {act, body} = (event.target.closest("[data-act]") || document.body).dataset;
  tell("");
  if (act === "back") { event.preventDefault(); $("dialog").close(); }
  else if (act) start(act, JSON.parse(body || "{}"));
};
document.onkeydown = event => {
  if (event.key === "Escape" && !$("dialog").open) location.hash = to({job: "", run: ""});
  if (event.key === "/" && event.target.tagName !== "INPUT") { $("word").focus(); return false; }
};
$("word").oninput = () => location.replace(to({word: $("word").value, before: ""}));
$("word").value = place().word || ""; $("filter").onsubmit = () => false;
history.replaceState(null, "", location.pathname + location.hash);
setInterval(() => status && showChart(), 60000);
listen(); tick();
"""
PAGE_POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src "
    "'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types")
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'", "Connection": "close",
    "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def page_status(queue: Queue) -> dict[str, Any]:
    """What `status` shows, the last hour by the minute, and what the workers run."""
    status, now = gather_status(queue), time.time()
    commands = {job.locked_by: job.command[:COMMAND_SHOWN] for job in queue.jobs("processing")}
    busiest = sorted(status["queues"].items(), key=lambda item: (
        -item[1]["pending"] - item[1]["processing"], item[0]))[:QUEUES_SHOWN]
    facts, workers, _ = status_parts(status, now)
    return dict(status, warning=status_warning(status), queues=dict(busiest),
                facts=[" ".join(line.split()) for line in facts + workers[:1]
                       if line.startswith(FACTS)],
                minutes=queue.stats_by_minute(now - 3600), workers=[
                    dict(info.as_dict(), stop=info.stop, command=commands.get(info.name, ""))
                    for info in status["workers"]])


def page_jobs(queue: Queue, asked: Mapping[str, str]) -> dict[str, Any]:
    """A page of Queue.newest."""
    before = WHOLE(asked["before"]) if "before" in asked else None
    jobs, older = queue.newest(asked.get("state"), asked.get("queue"), asked.get("word", ""),
                               before)
    return {"now": time.time(), "older": older, "jobs": [
        dict(job.as_dict(), command=job.command[:COMMAND_SHOWN], env=sorted(job.env),
             blocker=queue.blocker(job)) for job in jobs]}


def page_job(queue: Queue, asked: Mapping[str, str]) -> dict[str, Any]:
    """What `show` says of the job `id`, and the output of its run `run`, or of the last one: where
    that is `shown` already, what goes beyond its first `seen` bytes."""
    import codecs
    job = queue.get(asked["id"])
    runs, output = queue.runs(job.id), None
    chosen = WHOLE(asked.get("run", len(runs)))
    if 0 < chosen <= len(runs):
        seen = WHOLE(asked.get("seen", 0)) if WHOLE(asked.get("shown", 0)) == chosen else 0
        pieces, ended = queue.pieces(runs[chosen - 1].run, seen)
        data, end = join_pieces(pieces, seen)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data[-OUTPUT_SHOWN:], ended)  # half a character has to wait
        output = {"run": chosen, "from": seen, "seen": end - len(decoder.getstate()[0]),
                  "text": text if len(data) <= OUTPUT_SHOWN else "[%d bytes stand before this]\n%s"
                  % (len(data) - OUTPUT_SHOWN, text)}
    facts = job_facts(job, why_waiting(queue, job), time.time())
    return dict(job.as_dict(), env=sorted(job.env), output=output,
                facts=facts[3:],  # the page has id, command and state in places of their own
                runs=[dict(run.as_dict(), number=run.number) for run in runs[-RUNS_SHOWN:]])


def act_cancel(queue: Queue, body: dict[str, Any]) -> None:
    queue.cancel([str(body["id"])])
    take_back_now(queue)


# What a tab may ask for, by what stands behind the ?, and what it may have done, by the JSON in
# `body`. What Queue does not look at itself is looked at here.
if TYPE_CHECKING:
    Answers = Dict[str, Callable[[Queue, Dict[str, Any]], Any]]
PAGE_LOOKS: Answers = {"/jobs": page_jobs, "/job": page_job}
PAGE_ACTS: Answers = {
    "/enqueue": lambda queue, body: queue.enqueue_many([body])[0],
    "/edit": lambda queue, body: queue.edit(str(body.pop("id")), **{
        name: body[name] for name in FIELDS if name in body}),
    "/cancel": act_cancel,
    "/retry": lambda queue, body: queue.retry([str(body["id"])]),
    "/retry-all": lambda queue, body: queue.retry_all(body["queue"]),
    "/purge": lambda queue, body: queue.purge([str(body["id"])]),
    "/pause": lambda queue, body: queue.pause(body["queue"]),
    "/resume": lambda queue, body: queue.resume(body["queue"]),
    "/limit": lambda queue, body: queue.limit(body["queue"], body["number"]),
}


class Watch:
    """Who asks the database for all tabs."""

    def __init__(self) -> None:
        import threading
        self.news, self.readers, self.version, self.status = threading.Condition(), 0, 0, b""

    def run(self, queue: Queue) -> NoReturn:
        """Tell the readers what is new, until the database is gone. QueueError."""
        changed, leaders, alive = True, [""], [False]
        while True:
            began = time.monotonic()
            with contextlib.suppress(DatabaseUnavailable):
                queue.check_in_place()
                changed |= queue.changed()
                changed |= alive != [is_held(queue.lock_path(name)) for name in leaders]
                if changed and self.readers:
                    status = page_status(queue)
                    leaders = sorted({info["supervisor"] for info in status["workers"]})
                    alive, changed = [True] * len(leaders), False
                    with self.news:
                        self.status, self.version = json.dumps(status).encode(), self.version + 1
                        self.news.notify_all()
            with self.news:
                self.status = b"" if changed else self.status
                self.news.wait(max(LOOK, 10 * (time.monotonic() - began)))  # a million take long

    def events(self) -> Iterator[bytes]:
        """The stream of one reader: it begins with how things are now."""
        with self.news:
            self.readers, seen = self.readers + 1, 0
            self.news.notify_all()
        try:
            while True:
                with self.news:
                    if seen == self.version or not self.status:
                        self.news.wait(BEAT)
                    new, seen, status = seen != self.version, self.version, self.status
                yield b"data: %s\n\n" % status if new and status else b":\n\n"
        finally:
            with self.news:
                self.readers -= 1


class Refusal(Exception):
    """The status of HTTP, and what is wrong with a request."""


def serve_page(database: Queue, port: int, show: Callable[[str], None],
               note: Callable[[str], None]) -> NoReturn:
    """Serve the page until interrupted; `show` gets its URL. QueueError."""
    import http.server
    import secrets
    import socket
    import socketserver
    import threading
    import urllib.parse
    watch, cookie, ticket = Watch(), secrets.token_urlsafe(), secrets.token_urlsafe()
    silent: dict[socket.socket, float] = {}  # connections without a request, and since when

    def url() -> str:
        return "http://127.0.0.1:%d/?ticket=%s" % (server.server_address[1], ticket)

    def same(text: str, secret: str) -> bool:
        return secrets.compare_digest(text.encode(), secret.encode())

    class Handler(http.server.BaseHTTPRequestHandler):
        server_version, sys_version, default_request_version = "queuectl", "", "HTTP/1.0"
        timeout = REQUEST_TIME

        def do_GET(self) -> None:
            try:
                where = urllib.parse.urlsplit(self.path)
                path, asked = where.path, dict(urllib.parse.parse_qsl(where.query))
                headers = self.admit(path, asked)
                given = self.body() if path in PAGE_ACTS else asked
                silent.pop(self.connection, None)
                if path == "/":
                    page = PAGE_HTML.replace("{style}", PAGE_STYLE).replace("{script}", PAGE_SCRIPT)
                    nonce = secrets.token_urlsafe()
                    headers["Content-Security-Policy"] = PAGE_POLICY.replace("{nonce}", nonce)
                    page = page.replace("{nonce}", nonce)
                    self.answer(200, "text/html", [page.encode()], headers)
                elif path == "/events":
                    self.answer(200, "text/event-stream", watch.events())
                else:
                    with Queue(database.path, expect=database.identity) as queue:
                        result = {**PAGE_LOOKS, **PAGE_ACTS}[path](queue, given)
                    self.answer(200, "application/json", [json.dumps(result).encode()])
            except Refusal as refusal:
                self.send_error(*refusal.args)
            except KeyError as error:
                self.send_error(400, "%s is missing" % error)
            except (QueueError, ValueError, OverflowError, RecursionError) as error:
                self.send_error(503 if isinstance(error, DatabaseUnavailable) else 400, str(error))

        do_POST = do_GET

        def admit(self, path: str, asked: Mapping[str, str]) -> dict[str, str]:
            """Refuse a request that should not be. Returns the cookie for who has the ticket."""
            nonlocal ticket
            host, acts = ",".join(self.headers.get_all("Host", [])), path in PAGE_ACTS
            name, _, port = host.partition(":")  # any port: ssh -L has one of its own
            if name not in ("127.0.0.1", "localhost") or not (port or "0").isdecimal() \
                    or self.headers.get("Origin") not in (None, "http://" + host):
                raise Refusal(403, "only pages from here may ask, and only for this host")
            name = "queuectl-%d" % server.server_address[1]
            with watch.news:  # or two might have it
                if path == "/" and same(asked.get("ticket", ""), ticket):
                    ticket = secrets.token_urlsafe()
                    note("this URL has been opened; for another browser: " + url())
                    return {"Set-Cookie": name + "=%s; HttpOnly; SameSite=Strict; Path=/" % cookie}
            cookies = dict(pair.strip().partition("=")[::2]
                           for pair in self.headers.get("Cookie", "").split(";"))
            for fine, status, text in (
                    (same(cookies.get(name, ""), cookie), 403, "open the URL printed last"),
                    (acts or path in ("/", "/events", *PAGE_LOOKS), 404, "there is no such page"),
                    (self.command == ("POST" if acts else "GET"), 405, "use another method"),
                    (not acts or self.headers.get("X-Queuectl") == "1", 403, "no X-Queuectl"),
                    (not acts or "Content-Length" in self.headers, 411, "no Content-Length")):
                if not fine:
                    raise Refusal(status, text)
            return {}

        def body(self) -> dict[str, Any]:
            length = WHOLE(self.headers["Content-Length"])
            if length > BODY_LIMIT:
                raise Refusal(413, "more than %d bytes" % BODY_LIMIT)
            body = json.loads(self.rfile.read(length))
            if not isinstance(body, dict):
                raise Refusal(400, "this is no JSON object")
            return body

        def answer(self, status: int, kind: str, content: Iterable[bytes],
                   more: Mapping[str, str] = {}) -> None:
            self.send_response(status)
            kind += "; charset=utf-8"
            for header in {**PAGE_HEADERS, "Content-Type": kind, **more}.items():
                self.send_header(*header)
            self.end_headers()
            for piece in content:
                self.wfile.write(piece)

        def send_error(self, code: int, message: str | None = None, *explain: object) -> None:
            """One line. What http.server itself refuses comes here, too."""
            self.answer({501: 405, 505: 400}.get(code, code), "text/plain", [
                (printable(message or "refused") + "\n").encode()])

        def log_message(self, *words: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128
        allow_reuse_address = os.name == "posix"  # on Windows it would mean to share the port
        server_bind = socketserver.TCPServer.server_bind  # HTTPServer's asks for its own name

        def service_actions(self) -> None:
            for connection in list(silent)[:-CONNECTIONS] + [
                    each for each, since in list(silent.items())
                    if time.monotonic() > since + REQUEST_TIME]:
                silent.pop(connection, None)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

        def process_request(self, request: Any, client_address: Any) -> None:
            silent[request] = time.monotonic()
            super().process_request(request, client_address)

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exc_info()[1], OSError):  # which is how a client goes
                super().handle_error(request, client_address)

    try:
        server = Server(("127.0.0.1", port), Handler)
    except OSError as error:
        raise QueueError("cannot listen on 127.0.0.1:%d: %s; name another --port, or none"
                         % (port, error.strerror)) from None
    threading.Thread(target=server.serve_forever, args=(2 * LOOK,), daemon=True).start()
    show(url())
    watch.run(database)


# -- commands -----------------------------------------------------------------------------
#
# One function per subcommand, its options declared on it. It gets the open queue, unless it
# is declared as one that needs none, prints data on stdout and notes on stderr, and returns
# the exit code (None: 0).

if TYPE_CHECKING:
    Option = Tuple[Tuple[str, ...], Dict[str, Any]]
    Handler = Callable[..., Optional[int]]


class Command(Record):
    run: Callable[[argparse.Namespace], int | None]
    help: str
    example: str
    options: Sequence[Option]


COMMANDS: dict[str, Command] = {}
GROUPS = {"worker": "start, stop and list workers", "dlq": "the dead letter queue",
          "config": "settings"}


def option(*flags: str, **details: Any) -> Option:
    return flags, details


def command(name: str, text: str, example: str, *options: Option,
            opens: bool = True) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        def run(args: argparse.Namespace) -> int | None:
            with Queue(args.db) as queue:
                return handler(queue, args)

        COMMANDS[name] = Command(run=run if opens else handler, help=text, example=example,
                                 options=options)
        return handler
    return register


def checked(parse: Callable[[Any], Any]) -> Callable[[str], Any]:
    """A parser of values as argparse wants it: what it refuses is a usage error."""
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except QueueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return convert


PROGRAM_VERSION = option("--version", action="version", version="queuectl " + __version__)
DATABASE = option("--db", default=argparse.SUPPRESS, metavar="PATH",
                  help="the database ($QUEUECTL_DB, or one in your state folder)")
READ_SIZE = 1 << 16  # bytes of a file of jobs that are read at once
LONGEST_JOB = 1 << 24  # characters of one job in such a file
JSON = option("--json", action="store_true", help="print JSON")
DURATION = checked(parse_duration)
NUMBER = checked(parse_integer(0, 2 ** 31))
ID = option("id", metavar="ID")
IDS = option("id", nargs="*", metavar="ID")
KEY = option("key", metavar="KEY")
OF_QUEUE = option("--queue", type=checked(parse_queue), metavar="NAME", help="of this queue only")
ALL = option("--all", action="store_true", help="of every queue")


def require_selection(args: argparse.Namespace, needed: bool = True) -> None:
    """UsageError unless the jobs are named in one of three ways (not `needed`: or in none)."""
    ways = bool(getattr(args, "id", ())) + (args.queue is not None) + args.all
    if ways > 1 or needed and not ways:
        raise UsageError("name the jobs, or --queue NAME, or --all")


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """A job: one word is JSON or a line for the shell, several are the words of a command.
    UsageError for what is hardly meant as a command. QueueError for broken JSON."""
    word, alone, value = words[0], len(words) == 1, None
    text = word.lstrip()
    if alone and text[:1] == "{" and text[1:].lstrip()[:1] in ('"', "}"):
        try:
            return dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise QueueError("broken JSON: %s" % error) from None
    if text[:1] == "{" and not text[1:2].isspace():
        raise QueueError("%s is neither JSON nor a command; some shells (PowerShell) take the "
                         "quotes out of JSON: use options instead, as in: %s"
                         % (_shown(text), hint("enqueue --id job1 \"sleep 2\"")))
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
    array = isinstance(value, list) or text[:1] == "[" and text[1:].lstrip()[:1] == "{"
    if array or alone and (word == "-" or word[:1] == "@" or
                           word.endswith((".json", ".jsonl")) and os.path.exists(word)):
        raise UsageError("%s is no command; many jobs come by --file FILE, or --file - from a pipe"
                         % _shown(word))
    if not alone and " " in word and not os.path.exists(word):
        raise UsageError("%s is a command line, and more follows; many come by --lines FILE, "
                         "and a program with a blank in its name goes behind --" % _shown(word))
    return {"command": word if alone else quoted(words)}


def read_file(path: str, read: Callable[[BinaryIO], Iterator[tuple[str, Any]]]) \
        -> Iterator[tuple[str, Any]]:
    """What `read` finds in a file; `-` is stdin. QueueError."""
    try:
        if path == "-":
            yield from read(sys.stdin.buffer)
        else:
            with open(path, "rb") as file:
                yield from read(file)
    except (OSError, ValueError) as error:
        raise QueueError("cannot read %s: %s" % (
            path, getattr(error, "strerror", None) or error)) from None


def read_lines(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Pairs of a place and a job whose command is a line."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_JOB), b""), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise QueueError("line %d: is not UTF-8 text" % number) from None
        if text:
            yield "line %d: " % number, {"command": text}


def read_jobs(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Pairs of a place ("line 3: ") and a value, of JSON Lines or of one JSON array. However long
    the file is, no more of it is held than a value and what was read with it. QueueError."""
    import codecs
    import re
    # Bytes that are no UTF-8 become what no field may hold: who meets it knows the line.
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    parse, blanks = json.JSONDecoder().raw_decode, re.compile("[ \t\r\n]*").match
    text, at, line = "", 0, 1  # what is held, the place in it, and the line that this is on

    def hold_more() -> bool:
        nonlocal text, at
        data = file.read(max(READ_SIZE, len(text) - at))
        text, at = text[at:] + decode(data, not data), 0
        return bool(data)

    def ahead(end: int) -> str:
        """Go on to `end` and the next character that is no blank; "" at the end of the file."""
        nonlocal at, line
        while True:
            end = blanks(text, end).end()  # type: ignore[union-attr]  # none are blanks, too
            line += text.count("\n", at, end)
            at = end
            if at < len(text) or not hold_more():
                return text[at:at + 1]
            end = 0

    def broken(why: object) -> QueueError:
        if at == len(text):
            why = "the array does not end"
        elif not text[at].isprintable():
            why = "this is no UTF-8 text"
        return QueueError("line %d: broken JSON: %s" % (line, why))

    array = ahead(0) == "["
    last = "]" if array else ""
    mark = ahead(at + array)
    while mark != last:
        try:
            value, end = parse(text, at)
        except (ValueError, RecursionError) as error:
            # It may only be cut off: not where its line has ended, and not for ever.
            if "\n" in text[getattr(error, "pos", 0):] or len(text) - at > LONGEST_JOB \
                    or not hold_more():
                raise broken(getattr(error, "msg", error)) from None
            continue
        start = line
        yield "line %d: " % start, value
        mark = ahead(end)
        if mark == "," and array:
            ahead(at + 1)  # what follows has to be a value
        elif mark != last and (array or line == start):
            raise broken("expected , or ] between jobs" if array else "two jobs on one line")
    if array and ahead(at + 1):
        raise broken("there is something behind the end of the array")


def unfinished_jobs(jobs: Iterable[tuple[str, Any]], defaults: Mapping[str, Any],
                    skipped: list[str]) -> Iterator[tuple[str, Any]]:
    """Jobs with the command line's defaults filled in. Those that have ended are skipped, and
    jobs that come after a completed one of them need not wait."""
    live, number = sys.stderr.isatty(), 0
    completed = set()
    for number, (place, job) in enumerate(jobs, 1):
        if live and number % 10000 == 0:
            print("\rqueuectl: %d jobs read" % number, end="", file=sys.stderr, flush=True)
        if isinstance(job, dict) and job.get("state") in ENDED:
            skipped.append(job["id"] if isinstance(job.get("id"), str) else "")
            if job["state"] == "completed":
                completed.add(skipped[-1])
            continue
        if isinstance(job, dict) and (defaults or completed):
            own = {name: value for name, value in job.items() if value is not None}
            after = own.get("after")
            if isinstance(after, (str, list)):
                own["after"] = [id for id in ([after] if isinstance(after, str) else after)
                                if not (isinstance(id, str) and id in completed)]
            job = {**defaults, **own}
            if "delay" in own or "run_at" in own:  # either is the job's own choice
                job.update(delay=own.get("delay"), run_at=own.get("run_at"))
            if "env" in own and "env" in defaults:
                with contextlib.suppress(QueueError):  # which will be raised where it is stored
                    job["env"] = {**defaults["env"], **parse_env(own["env"])}
        yield place, job
    if live and number >= 10000:
        print("\r\x1b[K", end="", file=sys.stderr)


FIELD_OPTIONS = (
    option("--queue", type=checked(parse_queue), metavar="NAME", help="its queue (default)"),
    option("--priority", type=checked(FIELDS["priority"]), metavar="N",
           help="higher runs sooner (0)"),
    option("--max-retries", type=checked(FIELDS["max_retries"]), metavar="N",
           help="attempts in all (the setting max-retries)"),
    option("--timeout", type=DURATION, metavar="T", help="longest run, 0: no limit (job-timeout)"),
    option("--delay", type=DURATION, metavar="T", help="run it after this time"),
    option("--run-at", type=checked(parse_time), metavar="TIME",
           help="run it at 2026-01-31T08:00, 23:30 or +10m"),
    option("--cwd", type=checked(parse_cwd), metavar="DIR", help="its folder (the current one)"),
    option("--env", action="append", type=checked(lambda word: parse_env([word])),
           metavar="NAME[=VALUE]", help="set or copy a variable; repeatable"),
)


def given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a job that are named by arguments."""
    fields = {name: value for name, value in vars(args).items()
              if name in FIELDS and value is not None}
    if "env" in fields:
        fields["env"] = {name: text for env in args.env for name, text in env.items()}
    return fields


@command(
    "enqueue", "add a job (a shell command line or JSON, in quotes), or many",
    """queuectl.py enqueue --id job1 'sleep 2 && date'
  queuectl.py enqueue '{"command": "sleep 2", "priority": 5}'
  queuectl.py enqueue --timeout 10m -- rsync -a 'my dir/' host:/x  # word for word""",
    option("word", nargs="*", metavar="JOB"),
    option("--file", metavar="FILE", help="a JSON array or JSON Lines of jobs; -: stdin"),
    option("--lines", metavar="FILE", help="a shell command line per line; -: stdin"),
    option("--id", type=checked(parse_name), help="its id (else a short random one)"),
    *FIELD_OPTIONS,
    option("--after", action="append", type=checked(parse_name), metavar="ID",
           help="run it only once this job has completed; repeatable"),
    option("--unique", type=checked(parse_name), metavar="KEY",
           help="store nothing while a job with this key has not ended"), opens=False)
def cmd_enqueue(args: argparse.Namespace) -> None:
    defaults = given_fields(args)
    words, exact = args.word, args.exact
    path = args.file if args.lines is None else args.lines
    if (args.file is not None) + (args.lines is not None) + bool(words) + bool(exact) != 1:
        raise UsageError("give one job, or words after --, or --file FILE, or --lines FILE")
    if path is not None and args.id is not None:
        raise UsageError("--id names one job; in a file each job has its own")
    if exact and not exact[0].strip():
        raise UsageError("the command behind -- is empty")
    if words:
        jobs: Iterable[tuple[str, Any]] = [("", read_words(words))]
    elif exact:
        jobs = [("", {"command": quoted(exact)})]
    else:
        jobs = read_file(path, read_jobs if args.lines is None else read_lines)
    skipped: list[str] = []
    stored: list[str] = []

    def keep(ids: Sequence[str]) -> None:
        stored.extend(ids[:1])
        show_ids(ids)

    with Queue(args.db) as queue:
        queues = queue.enqueue_from(unfinished_jobs(jobs, defaults, skipped), keep, say)
        if skipped and path is None:
            raise QueueError("this job has ended already, and is not stored; without its state it "
                             "is a new one")
        for id in stored if path is None and not queues else ():
            job = queue.get(id)
            if queue.stuck(job):
                say_why(queue, [job])
        say_obstacles(queue, queues)
    if skipped:
        say(" ".join([counted(len(skipped), "job"), "skipped, which had ended already:"]
                     + [id or "(no id)" for id in skipped[:5]]))


def say_obstacles(queue: Queue, names: Sequence[str], told: Sequence[str] = ()) -> None:
    for text, _ in obstacles(names, queue.paused(), visible_workers(queue)):
        if text not in told:
            say(text)


def say_why(queue: Queue, jobs: Iterable[Job]) -> None:
    """Tell who looks on why the first waiting one of these jobs waits, and what keeps others from
    running until somebody does something about it."""
    first: dict[str, Job] = {}
    for job in jobs:
        if job.state == "pending":
            first.setdefault(job.queue, job)
    waiting = iter(first.values())
    for job in waiting:
        told = why_waiting(queue, job)
        if told:
            say("job %s waits: %s" % (job.id, "; ".join(told)))
            say_obstacles(queue, [other.queue for other in waiting], told)


def show_ids(ids: Sequence[str]) -> None:
    """In one write, so that many may enqueue into one pipe. QueueError."""
    try:
        sys.stdout.write("\n".join(ids) + "\n")
        sys.stdout.flush()
    except OSError as error:
        if pipe_is_closed(error):
            raise
        raise QueueError("stored, but the ids cannot be printed: %s" % error.strerror) from None


def _quoted_for_cmd(words: Sequence[str]) -> str:
    """Words are quoted for the program's own parser; then there is a caret before all that cmd
    would read, quotes too, and behind a % before any character, so that nothing names a variable.
    But cmd takes a program with blanks only in true quotes, unless each of them has a caret."""
    import re
    import subprocess

    def careted(words: Sequence[str], blank: str = "") -> str:
        line = re.sub('[()%!^"<>&|' + blank + "]", r"^\g<0>", subprocess.list2cmdline(words))
        return re.sub(r"(?<=\^%)[^\s^]", r"^\g<0>", line)
    plain = " " in words[0] and not {'"', "%"}.intersection(words[0])
    program = '"%s"' % words[0] if plain else careted(words[:1], " ")
    return " ".join([program] + [careted(words[1:])] * (len(words) > 1))


def quoted(words: Sequence[str]) -> str:
    """Words as a line that the shell splits into just these words."""
    if sys.platform == "win32":
        return _quoted_for_cmd(words)
    import shlex
    return " ".join(shlex.quote(word) for word in words)


@command(
    "worker start", "run jobs until stopped", """queuectl.py worker start --count 2
  queuectl.py worker start --drain      # until nothing is left to do
  * * * * * queuectl.py worker start --ensure   # in a crontab""",
    option("--count", type=checked(parse_integer(1, 1000)), default=1, metavar="N",
           help="worker processes (1)"),
    option("--drain", action="store_true", help="exit once there is nothing left to do"),
    option("--detach", action="store_true", help="in the background, returning once they run"),
    option("--ensure", action="store_true",
           help="in the background, only those that are missing to make N"),
    option("--queue", action="append", default=[], type=checked(parse_queue), metavar="NAME",
           help="serve this queue only; repeatable"),
    option("--via", type=checked(parse_line), metavar="COMMAND",
           help="run every job through COMMAND, which finds it in $QUEUECTL_COMMAND"),
    option("--quiet", action="store_true", help="no line per job"),
    option("--log", metavar="FILE", help="log to FILE, of bounded size, instead of stderr"),
    option("--name", help=argparse.SUPPRESS),  # of the supervisor; see start_detached
    opens=False)
def cmd_worker_start(args: argparse.Namespace) -> int:
    options = StartOptions(
        path=Queue.path_of(args.db), count=args.count, drain=args.drain, queues=args.queue,
        via=args.via, quiet=args.quiet, log=args.log and os.path.realpath(args.log),
        name=args.name or new_id())
    if not (args.detach or args.ensure):
        if options.log:
            require_log(options.log)
        code = Supervisor(options).run()
        if args.drain and not args.quiet:
            with Queue(args.db) as queue:
                say_what_is_left(queue, options.queues)
        return code
    count, log = start_detached(options, args.ensure)
    if not (args.ensure and args.quiet):  # or cron would mail it
        say("%s on %s (to end all: %s); log: %s" % (
            counted(count, "worker") + " started" if count else "enough workers run",
            options.path, hint("worker stop"), log))
    return 0


def say_what_is_left(queue: Queue, names: Sequence[str]) -> None:
    """Tell why a drain has left pending jobs of the queues that it served (none named: all)."""
    for job, count in first_waiting(queue, names):
        reasons = why_waiting(queue, job, served=True)
        if reasons:
            say("%s left in the queue %s; job %s waits: %s" % (
                counted(count, "job"), job.queue, job.id, "; ".join(reasons)))


@command(
    "worker stop", "stop all workers, once their jobs are done",
    """queuectl.py worker stop
  queuectl.py worker stop --now        # ends the jobs and puts them back""",
    option("name", nargs="*", metavar="WORKER", help="these, as worker list names them (all)"),
    option("--queue", action="append", default=[], type=checked(parse_queue), metavar="NAME",
           help="those started for just this queue, or these; repeatable"),
    option("--now", action="store_true", help="end the jobs and put them back unharmed"),
    option("--timeout", type=DURATION, metavar="T", help="give up waiting after this time"))
def cmd_worker_stop(queue: Queue, args: argparse.Namespace) -> None:
    count = stop_workers(queue, NOW if args.now else DRAIN, args.timeout, say, args.name,
                         args.queue)
    say(counted(count, "worker") + " stopped" if count else
        "no worker runs on %s" % queue.path if not queue.workers() else
        "no worker was started for just these queues; see: " + hint("worker list"))


@command("worker list", "the workers that are alive", "queuectl.py worker list --json", JSON)
def cmd_worker_list(queue: Queue, args: argparse.Namespace) -> None:
    workers = queue.workers()
    if workers or args.json:
        show(args, workers, worker_table(workers, time.time()))
    else:
        say("no worker runs on %s" % queue.path)


def show_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def show(args: argparse.Namespace, value: Any, lines: Iterable[str]) -> None:
    """Print a result: as JSON with --json (`value` is a dictionary, or records), or as lines."""
    if not args.json:
        show_lines(lines)
    elif isinstance(value, dict):
        print(json.dumps(value, indent=2))
    else:  # a record a line: it streams, and `enqueue --file` reads it
        between = "[\n"
        for record in value:
            print(between + json.dumps(record.as_dict()), end="")
            between = ",\n"
        print("[]" if between == "[\n" else "\n]")


@command(
    "status", "whether it is going well", "queuectl.py status --watch", JSON,
    option("--watch", action="store_true", help="redraw every second, until Ctrl-C"))
def cmd_status(queue: Queue, args: argparse.Namespace) -> None:
    while args.watch and sys.stdout.isatty():
        import shutil
        size, status = shutil.get_terminal_size(), gather_status(queue)
        sys.stdout.write("\x1b[H" + "".join(line + "\x1b[K\n" for line in status_screen(
            status, status_warning(status), time.time(), size.columns, size.lines - 1)) + "\x1b[J")
        sys.stdout.flush()
        time.sleep(1)
        queue.check_in_place()
    status = gather_status(queue)
    show(args, dict(status, workers=[info.as_dict() for info in status["workers"]]),
         itertools.chain(*status_parts(status, time.time())))
    warning = status_warning(status)
    if warning and not args.json:
        say(warning)


@command(
    "list", "jobs, the oldest first", "queuectl.py list --state failed --limit 20",
    option("--state", choices=STATES + VIEWS, help="one of: " + ", ".join(STATES + VIEWS),
           metavar="STATE"),
    OF_QUEUE, option("--limit", type=NUMBER, metavar="N", help="at most N"),
    option("--last", type=NUMBER, metavar="N", help="the newest N"), JSON)
def cmd_list(queue: Queue, args: argparse.Namespace) -> None:
    jobs = queue.jobs(args.state, args.queue, args.limit, args.last)
    show(args, jobs, job_table(jobs, queue.blocker, time.time()))


@command("show", "one job with all its runs", "queuectl.py show job1 --json", ID, JSON)
def cmd_show(queue: Queue, args: argparse.Namespace) -> None:
    job, runs = queue.get(args.id), queue.runs(args.id)
    show(args, dict(job.as_dict(), runs=[run.as_dict() for run in runs]),
         job_sheet(job, runs, why_waiting(queue, job), time.time()))


@command(
    "logs", "what a job printed", "queuectl.py logs -f job1", ID,
    option("-f", "--follow", action="store_true",
           help="follow a waiting or running job to its end"),
    option("--run", type=checked(parse_integer(1, 2 ** 31)), metavar="N",
           help="its Nth run (the last one)"))
def cmd_logs(queue: Queue, args: argparse.Namespace) -> None:
    sys.stdout.flush()
    job = queue.get(args.id)
    if args.follow:
        say_why(queue, [job])
    shown, printed = 0, False
    for number, data in follow(queue, job, args.run, args.follow):
        if shown and number != shown:
            say("run %d of job %s" % (number, job.id))
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        shown, printed = number, printed or bool(data)
    if not printed:
        say("job %s has printed nothing%s" % (
            job.id, " yet" if queue.get(job.id).state == "processing" else ""))


@command(
    "wait", "wait until jobs have ended", "queuectl.py wait job1 job2 --timeout 1h",
    option("id", nargs="*", metavar="ID", help="these (none: all that have not ended now, and no "
                                               "failure from before)"),
    option("--timeout", type=DURATION, metavar="T", help="exit 124 after this time"))
def cmd_wait(queue: Queue, args: argparse.Namespace) -> None:
    live, start = sys.stderr.isatty(), 0.0

    def tell(done: int, failed: int, left: int) -> None:
        nonlocal start
        if not start and left:
            say_why(queue, map(queue.get, args.id) if args.id else
                    (job for job, _ in first_waiting(queue)))
        start = start or time.monotonic()
        if live:
            rate = (done + failed) / max(time.monotonic() - start, 0.001)
            rest = ", %.1f/s, about %s" % (rate, format_age(left / rate)) if rate and left else ""
            print("\r\x1b[K%d completed, %d not, %d left%s" % (done, failed, left, rest),
                  end="", file=sys.stderr, flush=True)

    try:
        wait_for(queue, args.id, args.timeout, tell)
    finally:
        if live and start and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            print(file=sys.stderr)  # what is said next has a line of its own


@command("cancel", "keep pending jobs from running; end running ones",
         "queuectl.py cancel job1 job2", IDS, OF_QUEUE, ALL)
def cmd_cancel(queue: Queue, args: argparse.Namespace) -> None:
    require_selection(args)
    jobs: list[Job] = []
    if args.id:
        jobs = queue.cancel(args.id)
    else:
        say("%s cancelled" % counted(queue.cancel_all(args.queue), "job"))
    take_back_now(queue)
    for job in jobs:
        if queue.get(job.id).state == "processing":
            say("job %s is being ended" % job.id)


@command(
    "edit", "change a job that does not run", "queuectl.py edit job1 --priority 5 --timeout 1h", ID,
    option("--command", type=checked(parse_line), metavar="C", help="another command"),
    *FIELD_OPTIONS)
def cmd_edit(queue: Queue, args: argparse.Namespace) -> None:
    fields = given_fields(args)
    if len(fields) == 1:  # its id
        raise UsageError("say what to change, such as --priority 5 (see: %s)" % hint("edit --help"))
    queue.edit(**fields)


@command("dlq list", "dead jobs and why they died", "queuectl.py dlq list", OF_QUEUE, JSON)
def cmd_dlq_list(queue: Queue, args: argparse.Namespace) -> None:
    jobs = queue.jobs("dead", args.queue)
    show(args, jobs, dead_table(jobs, time.time()))


@command("dlq retry", "make dead or cancelled jobs pending again, attempts at 0",
         "queuectl.py dlq retry job1", IDS, OF_QUEUE, ALL)
def cmd_dlq_retry(queue: Queue, args: argparse.Namespace) -> None:
    require_selection(args)
    if args.id:
        queue.retry(args.id)
    else:
        say("%s pending again" % counted(queue.retry_all(args.queue, say), "dead job"))


OLDER_THAN = option("--older-than", type=DURATION, default=0.0, metavar="T",
                    help="only those that ended longer ago")


@command("dlq purge", "delete dead jobs", "queuectl.py dlq purge --older-than 30d",
         IDS, OF_QUEUE, ALL, OLDER_THAN)
def cmd_dlq_purge(queue: Queue, args: argparse.Namespace) -> None:
    require_selection(args, needed=False)
    if args.id:
        if args.older_than:
            raise UsageError("name the jobs, or --older-than T")
        queue.purge(args.id)
    else:
        say("%s deleted" % counted(queue.prune(("dead",), args.older_than, args.queue),
                                   "dead job"))


@command("config list", "every setting", "queuectl.py config list")
def cmd_config_list(queue: Queue, args: argparse.Namespace) -> None:
    values = queue.settings()
    show_lines(table(("SETTING", "VALUE", "MEANING"), (
        (name.replace("_", "-"), found.format(values[name]), found.help)
        for name, found in SETTINGS.items())))


@command("config get", "one setting", "queuectl.py config get max_retries",
         option("key", nargs="?", metavar="KEY", help="(all of them)"))
def cmd_config_get(queue: Queue, args: argparse.Namespace) -> None:
    values = queue.settings()
    for name in SETTINGS if args.key is None else [setting(args.key).name]:
        text = SETTINGS[name].format(values[name])
        print(text if args.key else "%s %s" % (name.replace("_", "-"), text))


@command("config set", "change a setting", "queuectl.py config set max-retries 5",
         KEY, option("value", metavar="VALUE"))
def cmd_config_set(queue: Queue, args: argparse.Namespace) -> None:
    queue.set_setting(args.key, args.value)


@command("config unset", "let a setting have its default again",
         "queuectl.py config unset max_retries", KEY)
def cmd_config_unset(queue: Queue, args: argparse.Namespace) -> None:
    queue.unset_setting(args.key)


@command("pause", "hand out no more jobs", "queuectl.py pause mail",
         option("queue", nargs="?", metavar="QUEUE", help="of this queue (of any)"))
def cmd_pause(queue: Queue, args: argparse.Namespace) -> None:
    queue.pause(args.queue)
    if args.queue is not None and next(queue.jobs(queue=args.queue, limit=1), None) is None:
        say("the queue %s, which has no job yet, is paused" % args.queue)


@command("resume", "hand out jobs again", "queuectl.py resume mail",
         option("queue", nargs="?", metavar="QUEUE", help="of this queue (of every one)"))
def cmd_resume(queue: Queue, args: argparse.Namespace) -> None:
    queue.resume(args.queue)
    if args.queue is not None and EVERY_QUEUE in queue.paused():
        say("all queues are still paused; to go on: " + hint("resume"))


@command(
    "prune", "delete ended jobs that nothing waits for",
    "queuectl.py prune --older-than 7d --state completed", OLDER_THAN, OF_QUEUE, ALL,
    option("--state", choices=ENDED, help="only these: " + ", ".join(ENDED), metavar="STATE"))
def cmd_prune(queue: Queue, args: argparse.Namespace) -> None:
    require_selection(args, needed=False)
    states = [args.state] if args.state else ENDED
    say("%s deleted" % counted(queue.prune(states, args.older_than, args.queue), "job"))


@command("limit", "run at most N jobs of a queue at once", "queuectl.py limit deploy 1",
         option("queue", type=checked(parse_queue), metavar="QUEUE"),
         option("number", nargs="?", type=checked(parse_limit), metavar="N",
                help="1 or more, or none; without it the limit is printed"))
def cmd_limit(queue: Queue, args: argparse.Namespace) -> None:
    if args.number is None:
        print(queue.limits().get(args.queue, "none"))
    else:
        queue.limit(args.queue, args.number or None)


@command("metrics", "numbers for Prometheus", "queuectl.py metrics > queuectl.prom")
def cmd_metrics(queue: Queue, args: argparse.Namespace) -> None:
    oldest = queue.oldest_ready()
    show_lines(prometheus(queue.counts_by_queue(), queue.held(), queue.stats(), queue.workers(),
                          max(0.0, time.time() - oldest) if oldest else 0.0))


@command(
    "web", "a page to look at and to act on, on this machine only", "queuectl.py web --port 8080",
    option("--port", type=checked(parse_integer(0, 65535)), default=0, metavar="N",
           help="its port on 127.0.0.1 (one that is free)"))
def cmd_web(queue: Queue, args: argparse.Namespace) -> None:
    def show_url(url: str) -> None:
        print(url, flush=True)
        if sys.stderr.isatty():
            say("open it in a browser on this machine; Ctrl-C ends it")

    serve_page(queue, args.port, show_url, say)


def plain_words(words: Sequence[str], valued: Sequence[str] = ("--db",)) -> list[str]:
    """The words that are no options, nor values of the `valued` ones."""
    return [word for before, word in zip(("", *words), words)
            if word[:1] != "-" and before not in valued]


def chosen_command(words: Sequence[str]) -> str:
    """The command that a command line names: its first word, or of a group the first two."""
    names = plain_words(words)
    return " ".join(names[:2] if names[:1] and names[0] in GROUPS else names[:1])


def completions(before: Sequence[str], text: str) -> Iterable[str]:
    """What may stand behind the words `before`, at least all that begins with `text`. Nothing
    where that is any word, or a file: then the shell offers names of files."""
    name = chosen_command(before)
    start = (name + " ").lstrip()
    names = [other[len(start):].split()[0] for other in COMMANDS if other.startswith(start)]
    if "--" in before or not names and name not in COMMANDS:
        return ()
    own = COMMANDS[name].options if name in COMMANDS else [option("command", choices=names)]
    options = [*own, DATABASE, option("--help", action="help")]
    arguments = {word: details for words, details in options for word in words}
    flags = [word for word in arguments if word[0] == "-"]
    valued = [flag for flag in flags if arguments[flag].get("action", "append") == "append"]
    places = [word for word in arguments if word not in flags]
    if places and arguments[places[-1]].get("nargs") == "*":
        places += places[-1:] * len(before)
    place = len(plain_words(before, valued)) - len(name.split())
    if before and before[-1] in valued:
        return values_of(before[-1], arguments[before[-1]], before, text)
    if text[:1] == "-" or place >= len(places):
        return flags
    return values_of(places[place], arguments[places[place]], before, text) or flags


def values_of(argument: str, details: Mapping[str, Any], before: Sequence[str],
              text: str) -> Sequence[str]:
    """What may stand for this argument. A look for what is in the queue never creates one."""
    if "choices" in details or argument == "key":
        return tuple(details.get("choices", SETTINGS))
    paths = [word for last, word in zip(before, before[1:]) if last == "--db"]
    with contextlib.suppress(QueueError, OSError):
        path = Queue.path_of(os.path.expanduser(paths[-1]) if paths else None)
        if os.path.getsize(path):
            with Queue(path) as queue:
                if argument in ("id", "--after"):
                    return queue.ids(text)
                if argument in ("queue", "--queue"):
                    return list(queue.counts_by_queue())
                if argument == "name":
                    return [info.name for info in queue.workers()]
    return ()


def completed(line: str, end: str | None) -> list[str]:
    """The words that may take the place of `end`, which is the end of an unfinished command line
    as its shell sees it (None: its last word; bash begins a new one behind = and :)."""
    import shlex
    words: list[str] = []
    for quote in ("", "'", '"'):  # which may be open
        with contextlib.suppress(ValueError):
            words = words or shlex.split(line + "." + quote)  # the last word may be empty
    *before, text = [part for word in words for part in (
        word.split("=", 1) if word[:2] == "--" else [word])]
    end, text = words[-1][:-1] if end is None else end, text[:-1]
    return sorted({end + word[len(text):] for word in completions(before[1:], text)
                   if word.startswith(text) and shlex.quote(word) == word})


@command(
    "completion", "lines for your shell, which ask this program at each TAB",
    """queuectl.py completion bash >> ~/.bashrc
  queuectl.py completion zsh >> ~/.zshrc
  queuectl.py completion fish >> ~/.config/fish/config.fish""",
    option("shell", choices=("bash", "zsh", "fish"), metavar="bash|zsh|fish"), opens=False)
def cmd_completion(args: argparse.Namespace) -> int:
    """Prints these lines. Called by them, with the line up to the cursor in COMP_LINE, as bash does
    it: prints the words that may stand there, and 1 says that there are none."""
    import shlex
    line = os.environ.get("COMP_LINE")
    if line is not None:
        found = completed(line[:int(os.environ.get("COMP_POINT", len(line)))],
                          args.exact[1] if args.exact else None)
        show_lines(found)
        return 0 if found else 1
    ask = shlex.join([sys.executable, os.path.abspath(__file__), "completion",
                      args.shell]) + " 2>/dev/null"
    if args.shell == "fish":
        words = ["-f", "-a", "(env COMP_LINE=(commandline -cp) %s; "
                             "or __fish_complete_path (commandline -ct))" % ask, "-c"]
    else:
        words = ["-o", "default", "-C", ask + " --"]
    if args.shell == "zsh":  # where bashcompinit brings bash's `complete`
        print("autoload -Uz compinit bashcompinit; (( $+functions[compdef] )) || compinit\n"
              "bashcompinit")
    for name in sorted({"queuectl", "queuectl.py", os.path.basename(sys.argv[0])}):
        print("complete " + shlex.join([*words, name]))
    return 0


# -- main ---------------------------------------------------------------------------------

class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the terminal, and no longer than one of 24 lines: usage names no options, which
    are explained below it. argparse makes a formatter for each option: only help looks at its
    width, or each command would import shutil (2 ms)."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=80)
        self._action_max_length = 14  # or the longest command would have a line of its own

    def add_usage(self, usage: Any, actions: Iterable[argparse.Action], groups: Any,
                  prefix: str | None = None) -> None:
        self._prog += " [OPTION ...]"
        super().add_usage(usage, [a for a in actions if not a.option_strings], groups, prefix)

    def add_argument(self, action: argparse.Action) -> None:
        if action.help and action.dest != "help" or action.nargs == argparse.PARSER:
            super().add_argument(action)

    def format_help(self) -> str:
        import shutil
        self._width = shutil.get_terminal_size().columns - 2
        return super().format_help()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **details: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **details)

    def error(self, message: str) -> NoReturn:
        import re
        found = re.match(r"argument COMMAND: invalid choice: '(.*)' \(choose from (.*)\)", message)
        if found:
            import difflib
            near = difflib.get_close_matches(found.group(1), re.findall(r"[\w-]+", found.group(2)))
            message = "there is no command %s%s" % (
                printable(found.group(1)), "; did you mean %s?" % near[0] if near else "")
        raise UsageError("%s (see: %s --help)" % (message, self.prog))


def build_parser(chosen: str = "") -> argparse.ArgumentParser:
    """The parser, from COMMANDS. Of them it knows the chosen one only, where one is chosen:
    building all of them would take longer than all else that a short command does."""
    def commands(parser: argparse.ArgumentParser) -> Any:
        return parser.add_subparsers(title="commands", prog=parser.prog, metavar="COMMAND",
                                     required=True)

    program = " ".join(called_as)
    parser = Parser(prog=program, usage=program + " [--version] [--db PATH] COMMAND ...",
                    description="A durable job queue for shell commands; COMMAND --help has more "
                                "and an example.")
    for flags, details in PROGRAM_VERSION, DATABASE:
        parser.add_argument(*flags, **dict(details, help=argparse.SUPPRESS))
    top = commands(parser)
    groups: dict[str, Any] = {}
    for name, found in COMMANDS.items():
        if chosen and name != chosen:
            continue
        group, _, rest = name.partition(" ")
        if rest and group not in groups:
            above = top.add_parser(group, help=GROUPS[group], description=GROUPS[group] + ".")
            above.add_argument(*DATABASE[0], **DATABASE[1])
            groups[group] = commands(above)
        sub = (groups[group] if rest else top).add_parser(
            rest or name, help=found.help, description=found.help + ".",
            epilog="example:\n  " + found.example.replace("queuectl.py", program))
        for flags, details in (DATABASE, *found.options):
            sub.add_argument(*flags, **details)
        sub.set_defaults(run_command=found.run)
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace: its command's options, `run_command`, `db` and `exact`, the
    words behind `--`. UsageError; SystemExit for --help and --version."""
    at = argv.index("--") if "--" in argv else len(argv)
    words, exact = list(argv[:at]), list(argv[at + 1:])
    chosen = chosen_command(words)
    if chosen not in ("enqueue", "completion"):
        words, exact = words + exact, []  # these are words like others
    if chosen not in COMMANDS or words[0] in ("-h", "--help"):
        chosen = ""
    args, unknown = build_parser(chosen).parse_known_args(words)
    if isinstance(getattr(args, "id", None), list) and not any(w[:1] == "-" for w in unknown):
        args.id, unknown = args.id + unknown, []  # argparse gives up on ids behind an option
    if unknown:
        raise UsageError("unknown argument %s%s" % (
            unknown[0], "; a command with options of its own goes behind --"
            if chosen == "enqueue" else ""))
    args.exact = exact
    args.db = getattr(args, "db", None)
    if args.db == "":
        raise UsageError("argument --db: the path is empty")
    if args.db is not None:
        called_as.extend(["--db", args.db])
    return args


def program_words() -> list[str]:
    """How this program was called, as words that can be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    folder, name = os.path.split(sys.argv[0])
    python = os.path.basename(sys.executable)
    if spec is not None:
        return [python, "-m", spec.name]
    if not hasattr(sys.modules["__main__"], "__file__"):  # python -c: who does that names itself
        return [name] if name != "-c" else [python, os.path.abspath(__file__)]
    runs = os.access(sys.argv[0], os.X_OK) and sys.platform != "win32"
    if runs and folder in os.environ.get("PATH", "").split(":"):
        return [name]
    return [sys.argv[0]] if folder and runs else [python, sys.argv[0]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: sys.argv) and return its exit code. Prints, and never
    exits, but for a bug, whose traceback it lets through."""
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:  # it was closed when Python started: nothing else may
            with contextlib.suppress(OSError):  # be given its number
                os.close(fd)
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
            allow_escapes(stream.fileno())
    try:
        try:
            called_as[:] = program_words() if argv is None else ["queuectl.py"]
            args = parse_arguments(sys.argv[1:] if argv is None else argv)
            code = args.run_command(args)
            sys.stdout.flush()
            return code or 0
        except QueueError as error:
            say(str(error))
            return error.exit_code
        except SystemExit as stop:  # argparse has printed its help
            sys.stdout.flush()
            return int(stop.code or 0)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the prompt has a line of its own
        return 130
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # what cannot be written is forgotten
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if pipe_is_closed(error):  # `list | head`
            return 0
        say("%s%s" % (error.filename + ": " if error.filename else "", error.strerror or error))
        return 1


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)  # nothing is left to be closed: taking the interpreter apart costs 5 ms
