"""Which nodes of a torchrun job take part in an attempt, and with which exit code an attempt ends."""

import contextlib
import json
import logging
import signal
import socket
import threading
import time

import pytest

from megapromoe.distributed import node_attempt, node_group, torchrun
from megapromoe.distributed.node_group import NodeGroup, NodeServer, NodesMissing, OtherJob, join

JOB = "runs/a"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(node_group, "HEARTBEAT", 0.1)
    monkeypatch.setattr(node_group, "SILENT_AFTER", 0.6)


@pytest.fixture
def port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


class Joining(threading.Thread):
    """`join` of a node in a thread: its `result`, which may be an exception."""

    def __init__(self, port: int, node: int, job: str = JOB, timeout: float = 20.0):
        super().__init__(daemon=True)
        self.arguments, self.result = ("127.0.0.1", port, job, node, f"host{node}", timeout), "still waits"
        self.start()

    def run(self) -> None:
        try:
            self.result = join(*self.arguments)
        except Exception as error:
            self.result = error

    def end(self):
        self.join(timeout=20)
        return self.result


@contextlib.contextmanager
def server(port: int, counts: list[int], on_more=lambda: None):
    made = NodeServer(port, JOB, "host0", counts, on_more)
    try:
        yield made
    finally:
        made.close()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def names(*nodes: int) -> NodeGroup:
    return NodeGroup(nodes, tuple(f"host{node}" for node in nodes))


def test_all_nodes_take_part_at_once_if_all_have_come(port):
    with server(port, [3]) as node0:
        others = [Joining(port, node) for node in (2, 1)]
        assert node0.gather(wait=60, timeout=60) == names(0, 1, 2)
        assert [node.end() for node in others] == [names(0, 1, 2)] * 2


def test_a_node_may_come_before_node_0(port):
    early = Joining(port, 1)
    time.sleep(0.3)
    with server(port, [2]) as node0:
        assert node0.gather(60, 60) == names(0, 1) == early.end()


def test_fewer_nodes_are_enough_after_a_while_if_the_configuration_can_run_on_them(port):
    """3 of 4 have come, and it cannot run on 3: the last waits."""
    calls = []
    with server(port, [1, 2, 4], lambda: calls.append(1)) as node0:
        others = {node: Joining(port, node) for node in (3, 1)}
        start = time.monotonic()
        assert node0.gather(wait=1.0, timeout=60) == names(0, 1)
        assert 1.0 <= time.monotonic() - start < 20
        assert others[1].end() == names(0, 1)
        time.sleep(0.5)
        assert others[3].is_alive() and not calls, "with 3 nodes there is nothing to gain"
        others[2] = Joining(port, 2)
        wait_until(lambda: calls)
        node0.close(done=True)
        assert others[3].end() is None and others[2].end() is None, "the job is done without them"


def test_a_node_that_is_cut_off_while_it_waits_is_left_out(port):
    """Its connection is open, but it sends nothing."""
    with server(port, [1, 2, 3]) as node0, socket.create_connection(("127.0.0.1", port)) as silent:
        silent.sendall(json.dumps({"job": JOB, "node": 1, "name": "host1"}).encode() + b"\n")
        assert node0.gather(wait=2.0, timeout=60) == names(0)


def test_a_message_arrives_although_lines_of_the_node_are_unread(port):
    """A close with unread data would reset the connection, and the node would never learn that it takes part."""
    with server(port, [2]) as node0:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as node, node.makefile("rb") as lines:
                node.sendall(json.dumps({"job": JOB, "node": 1, "name": "host1"}).encode() + b"\n")
                sending = threading.Thread(target=lambda: [node.sendall(b"\n" * 500) for _ in range(20)])
                sending.start()
                assert node0.gather(60, 60) == names(0, 1)
                sending.join()
                assert json.loads(next(line for line in lines if line.strip()))["nodes"] == [0, 1]


def test_a_node_that_starts_again_replaces_itself(port):
    with server(port, [2]) as node0, socket.create_connection(("127.0.0.1", port)) as earlier:
        earlier.sendall(json.dumps({"job": JOB, "node": 1, "name": "old"}).encode() + b"\n")
        time.sleep(0.2)
        again = Joining(port, 1)
        wait_until(lambda: any(c.name == "host1" for c in list(node0._connections.values())))
        assert node0.gather(60, 60) == names(0, 1) == again.end()


def test_too_few_nodes_and_an_unreachable_node_0_are_named(port, caplog, monkeypatch):
    monkeypatch.setattr(node_group, "NOTICE_EVERY", 0.2)
    with caplog.at_level(logging.WARNING), server(port, [3]) as node0:
        waiting = Joining(port, 2, timeout=0.5)
        message = r"node 0 on host0 waits for 3 nodes.*connected: 2 \(host2\).*MASTER_ADDR"
        with pytest.raises(NodesMissing, match=message):
            node0.gather(wait=0.1, timeout=0.8)
    assert "node 0 waits for 3 nodes" in caplog.text
    error = waiting.end()
    assert isinstance(error, NodesMissing) and "node 2 on host2 cannot reach node 0 at 127.0.0.1" in str(error)
    assert error.exit_code == 1, "it may succeed at another time"


@pytest.mark.parametrize("job, node", [("runs/b", 1), (JOB, 2), (JOB, 0)])
def test_a_node_of_another_job_is_refused(job, node, port):
    with server(port, [2]):
        error = Joining(port, node, job).end()
    assert isinstance(error, OtherJob) and "check MASTER_ADDR, NNODES, NODE_RANK and RUN_DIR" in str(error)
    assert error.exit_code == 2


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"node": "x"}\n', b"\xff\n", b"x" * 9000])
def test_whatever_else_connects_is_ignored(sent, port):
    with server(port, [2]) as node0:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(sent)
            stranger.settimeout(5)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(10) == b""
        other = Joining(port, 1)
        assert node0.gather(60, 60) == names(0, 1) == other.end()


# ---- exit codes


@pytest.mark.parametrize(
    "codes, code",
    [
        ([75, 75], 75),
        ([76, 75], 76),
        ([1, 75], 1),
        ([76, -15], 76),
        ([1, 2], 2),
        ([-9, 75], 137),
        ([-9, -15], 143),
        ([-9, 1], 1),
    ],
)
def test_the_code_of_a_node_is_that_of_the_rank_that_failed(codes, code):
    """As with srun, the highest; but not of ranks that torchrun has ended because of another."""
    assert torchrun.exit_code(codes) == code


# ---- an attempt


def parsed(*more: str, steps=("--", "check", "a.b=1", "--", "train")):
    words = ["--node=2", "--counts=4,2", "--ranks-per-node=2", "--address=n0", "--port=100", "--wait=5", "--timeout=9"]
    return node_attempt.parse([*words, "--job=a", "--logs=logs", *more, *steps])


def test_every_step_has_words_and_a_port_of_its_own():
    options = parsed()
    assert options.counts == [2, 4] and options.steps == [["check", "a.b=1"], ["train"]]
    commands = [node_attempt.torchrun_command(options, names(0, 2), i, words) for i, words in enumerate(options.steps)]
    assert [c[c.index("megapromoe") + 1 :] for c in commands] == options.steps
    for number, command in enumerate(commands):
        wanted = {"--nnodes=2", "--node-rank=1", "--nproc-per-node=2", "--master-addr=n0", "--redirects=1:3"}
        assert wanted | {f"--master-port={101 + number}"} <= set(command)


@pytest.mark.parametrize(
    "then, code",
    [
        ("sleep 60", 75),  # the first step, before which there is nothing to save
        ("exit 0", 75),  # the last, which the signal ends before it handles signals
        ("exit 3", 3),  # no signal: the last step does not run
    ],
)
def test_the_code_of_a_stopped_attempt(then, code, tmp_path, monkeypatch):
    steps = ["--", "first", "--", "last"]
    options = parsed("--node=0", f"--nodes-file={tmp_path}/nodes", steps=steps)
    script = {"first": f"touch {tmp_path}/first; {then}", "last": f"touch {tmp_path}/last; sleep 60"}
    monkeypatch.setattr(node_attempt, "torchrun_command", lambda o, g, i, words: ["bash", "-c", script[words[0]]])
    attempt = node_attempt.Attempt(options)

    def stop() -> None:
        wait_until(lambda: (tmp_path / ("first" if then == "sleep 60" else "last")).exists())
        attempt._pass_on(signal.SIGTERM)

    if then != "exit 3":
        threading.Thread(target=stop, daemon=True).start()
    assert attempt._run_steps(names(0)) == code
    assert (tmp_path / "last").exists() == (then == "exit 0")
    assert (tmp_path / "nodes").read_text() == "host0\n"


def test_an_attempt_without_a_step_is_refused(capsys):
    with pytest.raises(SystemExit):
        parsed(steps=())
    assert "no step" in capsys.readouterr().err
