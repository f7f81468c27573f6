"""The fault table: rows from tests that use the fixture `fault_table`, which are the tests that `make faults` runs."""

from pathlib import Path

from support.page_sections import write_section

HEADING = "Faults in small runs"
HEADER = """\
Each row is a fault that a test causes in a small run, what happens, what is lost, and the test. Written by
`make faults`, which runs only these tests.

| fault | what happens | lost | test |
|---|---|---|---|
"""
ROW = "fault"  # the name of a row among the properties of a test's report


class Rows:
    """The rows of one test. They travel in its report, also from another process."""

    def __init__(self, item):
        self.item = item

    def append(self, row: tuple[str, str, str]) -> None:
        """Adds a row: the fault, what happened, what was lost."""
        fault, happened, lost = row
        self.item.user_properties.append((ROW, (fault, happened, lost)))


class FaultTable:
    """A plug-in that runs the tests with rows alone, and writes the table if all of them passed."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: list[tuple[str, str, str, str]] = []
        self.skipped: dict[str, str] = {}
        self.passed: set[str] = set()

    def pytest_collection_modifyitems(self, config, items) -> None:
        """Leaves out the tests without rows."""
        others = [item for item in items if "fault_table" not in getattr(item, "fixturenames", ())]
        items[:] = [item for item in items if "fault_table" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)

    def pytest_runtest_logreport(self, report) -> None:
        """Takes in the rows of a test that passed, or why it was skipped."""
        test = report.nodeid.partition("[")[0]
        if report.skipped:
            self.skipped[test] = report.longrepr[2].removeprefix("Skipped: ")
        if report.when == "call" and report.passed:
            self.passed.add(test)
            self.rows += [(*values, f"`{test}`") for name, values in report.user_properties if name == ROW]

    def pytest_terminal_summary(self, terminalreporter, exitstatus) -> None:
        """Writes the file, or says why not. One case of a test may add the rows of all its cases."""
        without_rows = sorted(self.passed - {row[-1].strip("`") for row in self.rows})
        if without_rows:
            terminalreporter.write_line(f"no rows, though they ask for the table: {', '.join(without_rows)}")
        if exitstatus or without_rows or not self.rows:
            terminalreporter.write_line(f"{self.file} is not written: it is the table of tests that all passed")
            return
        lines = [f"| {' | '.join(row)} |\n" for row in self.rows]
        text = HEADER + "".join(lines)
        if self.skipped:
            text += "\nNot run on this machine:\n\n"
            text += "".join(f"* `{test}`: {reason}\n" for test, reason in sorted(self.skipped.items()))
        write_section(self.file, HEADING, text)
        terminalreporter.write_line(f"{self.file}: {len(self.rows)} faults")
