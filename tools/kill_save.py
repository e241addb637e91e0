"""The saves of kill-save.sh: killed, failing, and losing power at each system call."""

import collections
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

# Those that a save changes something with, or learns of an error from.
CALLS = [
    "mkdir", "openat", "flock", "write", "ftruncate", "lseek", "read", "chmod", "fchmod", "fsync",
    "rename", "renameat", "unlink", "unlinkat", "rmdir", "getdents64", "close", "statfs", "statx", "fstat",
]
ERRORS = ["ENOSPC", "EIO"]


def save(program, out, strace=()):
    """Runs the program that saves a model to `out`; returns its exit code and what it printed."""
    ran = subprocess.run(
        [*strace, *program, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return ran.returncode, ran.stdout.decode(errors="replace")


def contents(path):
    """The files of a directory with their bytes."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def calls_of_save(log):
    """The lines of the thread that saves, `name(args) = result`, with its first one of the save."""
    threads = collections.defaultdict(list)
    for line in log.read_text(errors="replace").splitlines():
        if found := re.match(r"(\d+) +((\w+)\(.*)", line):
            threads[found[1]].append((found[3], found[2]))
        elif found := re.match(r"(\d+) +<\.\.\. \w+ resumed>(.*)", line):
            # The end of a line that another thread interrupted.
            name, begun = threads[found[1]][-1]
            threads[found[1]][-1] = (name, begun.replace(" <unfinished ...>", "") + found[2])
    for calls in threads.values():
        for at, (name, line) in enumerate(calls):
            if name == "mkdir" and "/made" in line:
                return calls, at
    sys.exit("no save in the log")


def injections(calls, begins, root):
    """Each call of the save by its name and number, counted from 1 in its thread."""
    counts = collections.Counter()
    for at, (name, line) in enumerate(calls):
        counts[name] += 1
        if at >= begins and name in CALLS and str(root) in line:
            yield name, counts[name], line


def check(program, work, expected):
    """Kills and fails a save at each call. Returns the number of saves of each kind and outcome."""
    log = work / "log"
    reference = ["strace", "-f", "-qq", "-y", "-o", str(log), "-e", "trace=" + ",".join(CALLS)]
    code, said = save(program, work / "traced" / "made" / "model", reference)
    assert code == 0, said
    calls, begins = calls_of_save(log)
    outcomes = collections.Counter()
    for name, number, line in injections(calls, begins, work / "traced"):
        kinds = ["signal=KILL"] + [f"error={error}" for error in ERRORS]
        for kind in kinds:
            inject = f"inject={name}:{kind}:when={number}"
            strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={name}", "-e", inject]
            place = work / "place"
            out = place / "made" / "model"
            place.mkdir()
            code, said = save(program, out, strace)
            where = f"{inject}, {line}:\n{said}"
            is_there = out.exists()
            if is_there:
                assert contents(out) == expected, f"torn by {where}"
            left = [path.name for path in place.rglob("*") if path.name.startswith(".")]
            if kind == "signal=KILL":
                outcome = "killed, " + ("whole" if is_there else "absent")
                outcomes["killed, a hidden directory left"] += bool(left)
            elif code == 0:
                assert is_there, f"success without a model after {where}"
                outcome = "error, whole"
            elif is_there:
                assert "NotFlushed" in said, f"published, but denied after {where}"
                outcome = "error, whole and said"
            else:
                assert "Os {" in said or "OutputExists" in said, f"another error after {where}"
                assert not list(place.iterdir()), f"{left} left by {where}"
                outcome = "error, absent"
            outcomes[outcome] += 1
            if is_there:
                shutil.rmtree(out)
            code, said = save(program, out)
            assert code == 0, f"the next save fails after {where}\n{said}"
            assert contents(out) == expected
            assert [path.name for path in out.parent.iterdir()] == ["model"], f"left after {where}"
            shutil.rmtree(place)
    return outcomes


class Node:
    """A file or directory: its versions or entries, and those that the disk is known to have."""

    def __init__(self, is_dir):
        self.is_dir = is_dir
        self.now = {} if is_dir else 0
        self.flushed = {} if is_dir else None


def replay(calls, root, is_flushed=lambda name: True):
    """Yields the directory `root` after each call of the save."""
    top = Node(True)

    def find(path):
        node = top
        for part in pathlib.PurePath(path).relative_to(root).parts:
            node = node.now.get(part) if node and node.is_dir else None
        return node

    def place(path):
        path = pathlib.PurePath(path)
        return find(path.parent).now, path.name

    for name, line in calls:
        if re.search(r"= -1 E|= \?$", line) or str(root) not in line:
            continue
        strings = re.findall(r'"([^"]*)"', line)
        opened = re.search(r"\((?:\d+)<([^>]*)>", line)
        of_fd = opened and opened[1].startswith(str(root)) and "(deleted)" not in opened[1]
        node = find(opened[1]) if of_fd else None
        if name == "mkdir":
            entries, entry = place(strings[0])
            entries[entry] = Node(True)
        elif name == "openat" and "O_CREAT" in line:
            entries, entry = place(strings[0])
            created = entries.setdefault(entry, Node(False))
            if "O_TRUNC" in line:
                created.now += 1
        elif name in ("write", "ftruncate") and node:
            node.now += 1
        elif name == "fsync" and node and is_flushed(name):
            node.flushed = dict(node.now) if node.is_dir else node.now
        elif name in ("rename", "renameat"):
            entries, entry = place(strings[0])
            moved = entries.pop(entry)
            entries, entry = place(strings[1])
            entries[entry] = moved
        elif name in ("unlink", "rmdir", "unlinkat"):
            entries, entry = place(strings[-1])
            entries.pop(entry, None)
        else:
            continue
        yield top


def after_power_loss(top, entries_of, expected):
    """Whether the model is whole, absent or torn, if a directory has its `entries_of`."""
    made = entries_of(top).get("made")
    model = entries_of(made).get("model") if made else None
    if model is None:
        return "absent"
    files = entries_of(model)
    whole = set(files) == set(expected) and all(
        node.flushed is not None and node.flushed == node.now for node in files.values()
    )
    return "whole" if whole else "torn"


def lose_power(work, expected):
    """Loses power after each call. Returns the number of outcomes."""
    calls, begins = calls_of_save(work / "log")
    root = work / "traced"
    # Of names that are not flushed, the disk may have none or all; of files, only what is flushed.
    kinds = {"names as flushed": lambda of: of.flushed, "names as made": lambda of: of.now}
    outcomes = collections.Counter()
    for kind, entries_of in kinds.items():
        for top in replay(calls[begins:], root):
            outcome = after_power_loss(top, entries_of, expected)
            assert outcome != "torn", f"torn by a loss of power, {kind}"
            outcomes[f"power lost, {kind}, {outcome}"] += 1
        assert outcome == "whole", f"lost after the end of the save, {kind}"
    # The check sees what it is made for.
    unflushed = replay(calls[begins:], root, is_flushed=lambda name: False)
    torn = [after_power_loss(top, kinds["names as made"], expected) for top in unflushed]
    assert "torn" in torn, "the check sees nothing"
    return outcomes


def main():
    program, below = sys.argv[1:3], sys.argv[3] or None
    work = pathlib.Path(tempfile.mkdtemp(prefix="kill-save-", dir=below)).resolve()
    try:
        code, said = save(program, work / "reference" / "model")
        assert code == 0, said
        expected = contents(work / "reference" / "model")
        outcomes = check(program, work, expected)
        outcomes.update(lose_power(work, expected))
    finally:
        shutil.rmtree(work)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")


main()
