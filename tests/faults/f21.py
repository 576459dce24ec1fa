"""F21: two `dvc repro` at once, in one directory and in two PID namespaces."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.faults.checkout import TOO_LONG, Checkout
from tests.faults.figure import Figure, share

FAULT = "two dvc repro at the same time"
INJECTION = "a second one while a stage of the first writes: in the same directory, and (root) each in a PID namespace"
OUTCOME = "the second fails at once and names the holder; never two writers; the first completes"
STAGE = "train_vae"
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def run(place: Path, seed: int, full: bool) -> list[Figure]:
    checkout, drawn = Checkout.made(place), random.Random(seed)
    undisturbed = checkout.digests()
    rounds = 5 if full else 1
    figures = together(checkout, (), rounds, drawn, "one directory")
    able = os.geteuid() == 0 and shutil.which("unshare") is not None
    if able and subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0:
        figures += together(checkout, NAMESPACE, rounds, drawn, "two PID namespaces")
    else:
        print("  two PID namespaces: skipped, they need root and unshare", flush=True)
    return [*figures, share("outputs equal to the undisturbed run's", [checkout.digests() == undisturbed])]


def together(
    checkout: Checkout, before: tuple[str, ...], rounds: int, drawn: random.Random, where: str
) -> list[Figure]:
    disturbed, seconds, held, named, first_done = [], [], [], [], []
    for _ in range(rounds):
        first = checkout.start("dvc", "repro", "--force", "--single-item", STAGE, before=before)
        wait_for_writer(checkout, first)
        time.sleep(drawn.uniform(0, 0.5))
        holders = [process.pid for process in checkout.processes()]
        for process in writing(checkout):
            process.send_signal(signal.SIGSTOP)  # so that it is still at work when the second is refused
        owned, begun = owner(checkout), time.monotonic()
        second = checkout.start("dvc", "repro", "--force", "--single-item", STAGE, before=before)
        said, _ = second.communicate(timeout=TOO_LONG)
        seconds.append(time.monotonic() - begun)
        disturbed.append(owner(checkout) != owned)  # a second writer begins with a draft of its own
        for process in writing(checkout):
            process.send_signal(signal.SIGCONT)
        held.append(second.returncode != 0)
        named.append(bool(before) or any(f"{pid}" in said for pid in holders))
        first.communicate(timeout=TOO_LONG)
        first_done.append(first.returncode == 0)
    return [
        Figure(f"second writers, {where}", sum(disturbed), "writers", "<= 0"),
        # DVC itself knows the holder only in its own namespace; elsewhere the stage refuses, once it is loaded.
        Figure(f"until the second has failed, {where}", max(seconds), "s", "" if before else "<= 2"),
        share(f"the second is refused, {where}", held),
        *([] if before else [share("the refusal names the holder's process", named)]),
        share(f"the first completes, {where}", first_done),
    ]


def owner(checkout: Checkout) -> tuple[int, str]:
    """The draft that is being written, by its number on the disk, and who holds the stage's lock."""
    state = checkout.folder / ".inkwell"
    return (state / "drafts" / STAGE).stat().st_ino, (state / "locks" / STAGE).read_text()


def writing(checkout: Checkout) -> list[psutil.Process]:
    """The processes of the stage."""
    return [process for process in checkout.processes() if f"pipelines.{STAGE}" in process.cmdline()]


def wait_for_writer(checkout: Checkout, process: subprocess.Popen[str]) -> None:
    """Until the first holds the stage's lock and writes."""
    last = time.monotonic() + TOO_LONG
    while not list((checkout.folder / ".inkwell/drafts").glob("*")):
        assert process.poll() is None and time.monotonic() < last, process.communicate()[0]
        time.sleep(0.02)
