"""Options of the test-suite: where to write the tables that its measurements make."""

TABLES = {
    "--equality-table": "the equality matrix",
    "--layout-table": "the layout-change matrix",
    "--fault-table": "the fault table",
}


def pytest_addoption(parser):
    for option, what in TABLES.items():
        parser.addoption(option, metavar="FILE", help=f"write {what} to FILE (Markdown)")
