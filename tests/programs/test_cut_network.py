"""A network that breaks between two nodes: network namespaces of this machine, whose link is taken down in training."""

import os
import re
import time

import pytest
from support.forked_ranks import ForkedRank
from support.network_namespaces import ADDRESSES, INTERFACE, set_link, two_namespaces, why_not

LIMIT = 4.0  # train.step_timeout, seconds
BOUND = 90.0  # seconds within which both sides must have ended: on a busy machine, and the store's own wait of 4 s
PORT = 29511
TINY = ["--preset", "digits", "train.log_every=1", "train.global_batch=8", "model.hidden_size=32", "model.depth=2"]


@pytest.fixture
def two_nodes():
    if reason := why_not():
        pytest.skip(reason)
    with two_namespaces() as names:
        yield names


@pytest.mark.full
@pytest.mark.parametrize("cut", [0, 1], ids=["the side with the store", "the other side"])
def test_both_sides_of_a_cut_network_end_with_a_sentence(cut, two_nodes, tmp_path, fault_table):
    run = tmp_path / "run"
    words = ["train", "--run-dir", str(run), *TINY, "train.steps=1000000"]
    words += [f"train.step_timeout={LIMIT:g}", "train.timeout=60"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
    clean |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": INTERFACE}
    jobs: list[ForkedRank] = []

    def output_of(rank: int) -> str:
        return (tmp_path / f"output-{rank}").read_text()

    def wait_until(condition, limit: float) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, output_of(0)[-3000:] + output_of(1)[-3000:]
            time.sleep(0.05)

    def steps() -> int:
        file = run / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    try:
        for rank, name in enumerate(two_nodes):
            ranks = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            env = clean | {key: str(value) for key, value in ranks.items()} | {"OMP_NUM_THREADS": "1"}
            call = f"enter_network({name!r}); patient_start(); sys.exit(main())"
            jobs.append(ForkedRank(words, env, tmp_path / f"output-{rank}", call))
        wait_until(lambda: steps() >= 5 or any(job.poll() is not None for job in jobs), 300)
        assert [job.poll() for job in jobs] == [None, None], output_of(0)[-3000:] + output_of(1)[-3000:]
        set_link(two_nodes[cut], "down")
        broken = time.monotonic()
        wait_until(lambda: all(job.poll() is not None for job in jobs), BOUND)
        took = time.monotonic() - broken
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
            job.wait()
    assert [job.returncode for job in jobs] == [76, 76], output_of(0)[-3000:] + output_of(1)[-3000:]
    place = r"no progress for \d+ s \(train.step_timeout = 4\) in section '[a-z ]+' of step \d+; "
    assert re.search(rf"rank 0: {place}silent: rank 1, last in section", output_of(0)), output_of(0)[-3000:]
    assert re.search(rf"rank 1: {place}the process that holds the job's store", output_of(1)), output_of(1)[-3000:]
    fault_table.append(
        (
            f"the network between two nodes is cut, on {('the side with the store', 'the other side')[cut]}",
            "rank 0 names the other rank, the other rank the holder of the store; both end with code 76",
            f"{took:.0f} s, and the steps since the last save",
        )
    )
