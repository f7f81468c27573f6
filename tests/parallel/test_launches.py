"""What the host issues in a training step at the depth of XL, and that the counting is right."""

from collections import Counter as Tally
from functools import cache

import pytest
import torch
from support.processes import run

from megapromoe.benchmark.launch_program import PHASES, markdown
from megapromoe.benchmark.launches import IssueCounter, Issued, count_step, narrow
from megapromoe.benchmark.lowered import LoweringBackend
from megapromoe.distributed.mesh import make_mesh

# ---- the counting


def test_operators_bytes_and_phases_of_a_known_program():
    a, b = torch.ones(8, 4), torch.ones(4, 2)
    with IssueCounter() as counter:
        counter.phase("products")
        c = a @ b  # its bytes are not counted
        counter.phase("elementwise")
        d = c.t().relu()  # a view is not counted
        d.add_(torch.ones(1, 1).expand(2, 8))  # two are: ones and add_; the expanded tensor has one number
    assert counter.phases["products"] == Issued(Tally(mm=1))
    assert counter.phases["elementwise"] == Issued(Tally(relu=1, ones=1, add_=1), moved=4 * (16 + 16 + 1 + 17 + 16))


def test_launches_of_a_known_compiled_program():
    """A product, and one kernel for all that is elementwise; each call counts."""

    def program(x, w):
        return (x @ w).sigmoid() * 2 + 1

    backend = LoweringBackend(unknown_size=1)
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    x, w = torch.ones(8, 4), torch.ones(4, 16)
    for _ in range(2):
        with IssueCounter(backend) as counter:
            counter.phase("compiled")
            y = compiled(x, w)
            counter.phase("eager")
            z = y + 1
    torch.testing.assert_close(z, program(x, w) + 1)
    assert counter.phases["compiled"] == Issued(Tally(mm=1), fused=1, moved=2 * 8 * 16 * 4)
    assert counter.phases["eager"] == Issued(Tally(add=1), moved=2 * 8 * 16 * 4)
    assert backend.issued.total == 4 and len(backend.graphs) == 1


def test_the_table_has_every_phase():
    figures = {"launches": 1234, "operators": {}, "fused": 0, "moved": 0, "messages": 2}
    step = {"model": "promoe_s", "ranks": 2, "mode": "eager", "phases": dict.fromkeys(PHASES, figures)}
    table = markdown({"steps": [step], "images": 8, "torch": "2.13.0", "deepspeed": "0.19.8"})
    assert table.splitlines()[-1] == f"| promoe_s | 2 | eager | {'1,234 | ' * 8}16 |"


# ---- what a step issues


def steps(names: tuple[str, ...], compiled: bool) -> dict[str, dict[str, Issued]]:
    mesh = make_mesh(timeout=120)
    return {name: count_step(narrow(name, "train.global_batch=8"), mesh, compiled) for name in names}


@cache
def counted(compiled: bool) -> dict[str, dict[str, Issued]]:
    return run(1, steps, ("promoe_xl", "dit_xl"), compiled)[0]


# Forward, loss, backward of the model; what DeepSpeed adds to forward and backward; norm, update, averages. DeepSpeed
# copies the gradient of each parameter.
EAGER = {"promoe_xl": (1099, 9, 1978, 1, 870, 23, 25, 3), "dit_xl": (529, 7, 1264, 1, 588, 23, 17, 2)}


@pytest.mark.full
@pytest.mark.parametrize("name", EAGER)
def test_launches_of_an_eager_step(name):
    assert tuple(issued.launches for issued in counted(False)[name].values()) == EAGER[name]


COMPILED = {"promoe_xl": (526, 9, 834), "dit_xl": (0, 0, 0)}


@pytest.mark.full
@pytest.mark.parametrize("name", COMPILED)
def test_launches_of_a_compiled_step(name):
    launches = tuple(issued.launches for issued in counted(True)[name].values())
    assert launches[:3] == COMPILED[name] and launches[5:] == EAGER[name][5:]
