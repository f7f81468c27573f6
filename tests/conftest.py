"""Options of the test-suite."""


def pytest_addoption(parser):
    parser.addoption(
        "--equality-table", metavar="FILE", help="write the table of the equality matrix to FILE (Markdown)"
    )
