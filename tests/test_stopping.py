"""Ends before the time: what a signal does to a program, and to a step that hangs. Hardly any JAX, so it is quick."""

import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEEDING = "import os, signal, sys, time\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)"


def begin(code):
    """A program of its own, once it has said that it is there. It heeds a terminal that is closed, whatever started the tests."""
    said = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    process = subprocess.Popen([sys.executable, "-c", f"{HEEDING}\nfrom aligner import stopping\n{code}"], **said)
    assert process.stdout.readline() == "here\n", process.communicate()[1]
    return process


WORK = """
try:
    print("here", flush=True)
    time.sleep(300)
except BaseException:  # as some import might
    time.sleep(300)
"""


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_nothing_to_save(number, code):
    """It ends with the code that the launcher knows, with one sentence, whatever catches exceptions just then."""
    process = begin(f"with stopping.nothing_to_save(75):{WORK.replace(chr(10), chr(10) + '    ')}")
    process.send_signal(getattr(signal, number))
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told.strip()) == (code, "stopped at once; the same command goes on from the newest checkpoint")


def test_handlers_come_back():
    done = "with stopping.nothing_to_save(75): pass\nprint('here', flush=True)\ntime.sleep(300)"
    process = begin(done)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM


def test_the_second_ctrl_c_is_heard():
    """Also where an exception would be lost, as in a callback of the garbage collector."""
    # in short sleeps: one that began while the first was being told would sleep through the second
    process = begin("""
stopping.end_quietly()
with stopping.catch_signals() as check_stop:
    print("here", flush=True)
    while True:
        try:
            time.sleep(0.01)
        except BaseException:  # which is what loses it
            pass
""")
    process.send_signal(signal.SIGINT)
    assert [process.stderr.readline() for _ in range(2)][1] == "stopping: the state is being saved (Ctrl-C again to stop at once)\n"
    process.send_signal(signal.SIGINT)
    assert (process.wait(60), process.stderr.read().strip()) == (130, "stopped at once; the same command goes on from the newest checkpoint")


def test_nohup():
    """A process that was started to outlive its terminal does."""
    process = begin("""
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with stopping.nothing_to_save(75):
    print("here", flush=True)
    time.sleep(1)
with stopping.catch_signals() as check_stop:
    os.kill(os.getpid(), signal.SIGHUP)
    check_stop()
""")
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0, process.communicate()[1]


def test_a_terminal_that_is_closed(tmp_path):
    """The run saves and ends; that its last words reach nobody is no error."""
    terminal, end = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    code = f"""
{HEEDING}
import fcntl, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from aligner import stopping
from aligner.console import progress, say
with stopping.catch_signals() as check_stop, progress(0, 10**6) as bar:
    try:
        for step in range(10**6):
            bar(step, dict(loss=0.0, num_tokens=1))
            time.sleep(0.01)
            check_stop()
    except stopping.Stopped:
        say("saved")
        open({str(tmp_path / "saved")!r}, "w").close()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=end, stdout=end, stderr=end, cwd=ROOT)
    os.close(end)
    seen = b""
    while b"%" not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)
    assert process.wait(60) == 0
    assert (tmp_path / "saved").exists()


def test_nobody_reads_on():
    """Of a run into `| head`, whose last line has been read: it goes on."""
    process = begin("from aligner.console import say\nprint('here', flush=True)\nsys.stdin.read()\nsay('one', 'two')\nprint('done')")
    process.stderr.close()
    assert process.communicate()[0] == "done\n" and process.returncode == 0


def test_a_step_that_hangs():
    """Another thread holds what the main one waits for: the stacks of both are told, and the process ends."""
    process = begin("""
import threading
def stuck_reader():
    time.sleep(300)
reader = threading.Thread(target=stuck_reader, daemon=True)
reader.start()
with stopping.watchdog(0.4) as watch:
    for _ in range(4):  # steps
        watch(True)
        time.sleep(0.1)
    print("here", flush=True)
    reader.join()
""")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 124
    assert "no step for 0.4 s: the stacks of all threads" in told
    assert "in stuck_reader" in told and "in join" in told and "Traceback" not in told


@pytest.mark.parametrize("pause", ["watch(False)", "with_nothing_started"])
def test_it_does_not_bark_at_what_is_no_step(pause):
    """Compilation before the first step, and an evaluation, may take their time; so may what comes after."""
    first = "watch(True); watch(False)" if pause == "watch(False)" else "pass"
    process = begin(f"""
print("here", flush=True)
with stopping.watchdog(0.2) as watch:
    {first}
    time.sleep(0.8)
    watch(True)
time.sleep(0.8)
with stopping.watchdog(0) as watch:
    watch(True)
    time.sleep(0.3)
""")
    assert (process.wait(60), process.stderr.read()) == (0, "")


def test_a_process_that_was_suspended_does_not_hang():
    process = begin("""
with stopping.watchdog(0.8) as watch:
    watch(True)
    print("here", flush=True)
    time.sleep(0.3)
    watch(True)
    watch(False)
""")
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert (process.wait(60), process.stderr.read()) == (0, "")


def test_ctrl_c_while_importing(tmp_path):
    """As by a user who saw a typo: no traceback. What Python does before the first line of the program is its own."""
    (tmp_path / "absl.py").write_text(f"import time{WORK}")  # stands for all that takes its time to import
    process = begin(f"import runpy\nsys.path.insert(0, {str(tmp_path)!r})\nrunpy.run_module('aligner.main', run_name='__main__')")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told.strip()) == (130, "stopped at once; the same command goes on from the newest checkpoint")
