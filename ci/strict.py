"""pytest plugin (`-p strict`, with ci/ on the path): a run in which a test was skipped, or none ran, has failed."""

from __future__ import annotations

import pytest


class Skips:
    """Collects what was skipped, whole modules included."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.seen.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.seen.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.seen:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for nodeid in self.seen:
            terminalreporter.write_line(f"SKIPPED, which counts as failed: {nodeid}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Skips(), "polyradix-skips")
