"""Progress of the commands: none for quick work, a bar on a terminal, lines elsewhere."""

import re
import time

import pytest

from flexjag.cli import options as cli_tools


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(cli_tools, "PATIENCE", 0.0)
    with cli_tools.progress(1, quiet=True) as say:
        say("nothing of this")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    seen = ""
    with cli_tools.progress(2, quiet=False) as say:
        say("counting")
        for _ in range(1000):
            if "counting" in seen:
                break
            time.sleep(0.01)
            printed = capsys.readouterr()
            seen += printed.err
            assert printed.out == ""
    assert "counting" in seen


@pytest.mark.parametrize("terminal", [False, True])
def test_quick_work_shows_nothing(capsys, monkeypatch, terminal):
    monkeypatch.setattr(cli_tools, "PATIENCE", 60.0)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with cli_tools.progress(2, quiet=False) as say:
        say("quick")
    assert capsys.readouterr() == ("", "")


def test_progress_elsewhere_is_a_line_for_the_step_at_hand_and_for_each_to_come(capsys, monkeypatch):
    timers = []

    class Timer:
        """Runs out when told to."""

        def __init__(self, seconds, function):
            self.seconds, self.run_out = seconds, function
            timers.append(self)

        def start(self):
            pass

        cancel = start

    monkeypatch.setattr(cli_tools.threading, "Timer", Timer)
    with cli_tools.progress(3, quiet=False) as say:
        say("over before anyone asks")
        say("counting")
        timers[0].run_out()
        say("comparing")
    timers[0].run_out()
    assert timers[0].seconds < 1, "whoever waits a second hears why"
    printed = capsys.readouterr()
    assert re.sub(r"\d+", "N", printed.err) == "   N s  counting\n   N s  comparing\n"
    assert printed.out == ""
