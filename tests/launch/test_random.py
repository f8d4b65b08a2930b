"""Random faults in random order: the invariants hold whatever happens.

    LAUNCH_SCHEDULES=200 launch/test.sh tests/launch/test_random.py

Each schedule is a function of its number. The invariants: a worker runs at most one trainer at a
time, and starts it once per attempt; the exit code is documented; steps never go back past a
checkpoint; in the end the cloud is empty, or the launcher names the machine that it kept.
"""

import os
import random
import time

import pytest

from launch.tpu import exit_codes
from tests.helpers.fake_cloud import Rig

SCHEDULES = int(os.environ.get("LAUNCH_SCHEDULES", "1"))
SSH = "tpu-vm ssh .*agent.sh"
CALLS = (
    "create",
    "describe",
    "cat >",
    f"{SSH} prepare",
    f"{SSH} start",
    f"{SSH} status",
    f"{SSH} stop",
    "delete",
)
STOCKOUT = 'There is no more capacity in the zone "us-a"; you can try in another zone'
ERRORS = ("error:HTTP 503: backend error", "before", "after", "hang", "always", "lost")
MACHINE = ("preempt:PREEMPTED", "preempt:UNKNOWN", "preempt:GONE", "preempt:SUSPENDED", "repair")
TRAINER = (
    "raise",
    "kill",
    "killall",
    "freeze",
    "hang",
    "busy",
    "exit0",
    "exit42",
    "exit2",
    "exit134",
)


def gcloud_fault(draw: random.Random) -> dict:
    if draw.random() < 0.35:
        do = draw.choice([*MACHINE, "reboot:0", "reboot:1"])
        return {"match": f"{SSH} status", "nth": draw.randint(2, 12), "do": do}
    do, match = draw.choice(ERRORS), draw.choice(CALLS)
    return {"match": match, "nth": draw.randint(1, 4), "times": draw.choice([1, 1, 2, 4]), "do": do}


def trainer_fault(draw: random.Random) -> dict:
    fault = {"worker": draw.randint(0, 1), "step": draw.randint(0, 12), "do": draw.choice(TRAINER)}
    return fault | ({"attempt": draw.randint(1, 3)} if draw.random() < 0.9 else {})


def timeline(draw: random.Random) -> list[str]:
    if draw.random() < 0.15:
        return ["ACCEPTED", f"FAILED:{STOCKOUT}"]
    return draw.choice([["ACTIVE"], ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])


@pytest.mark.parametrize("number", range(SCHEDULES))
def test_schedule(tmp_path, number):
    draw = random.Random(number)
    rig = Rig(tmp_path, timelines=[timeline(draw) for _ in range(6)] + [["ACTIVE"]])
    rig.profile(FAKE_SECONDS=draw.choice(["0.02", "0.1"]))
    rig.trainer_faults(*(trainer_fault(draw) for _ in range(draw.randint(0, 3))))
    rig.inject(*(gcloud_fault(draw) for _ in range(draw.randint(0, 4))))
    zones = draw.choice([[], ["--zones", "us-a,us-b"]])
    flags = [*rig.flags(), "--stall-timeout", "100", "--first-step-timeout", "400", *zones]
    try:
        for _ in range(draw.choice([0, 0, 1, 2])):
            process = rig.start(*flags, LAUNCH_LEAST="2")
            time.sleep(draw.uniform(0.3, 4))
            process.kill()
            process.communicate()
        code, result, err = rig.end(rig.start(*flags, LAUNCH_LEAST="2"), timeout=300)
        assert code in list(exit_codes.Exit), err
        assert "Traceback" not in err.replace("Traceback (most recent call last):\n[w", ""), err
        assert result["code"] == code
        assert rig.is_empty() or result["cloud"].startswith("kept (vit, us-"), err
        assert code != 0 or result["steps"] == 12
        rig.check()
    finally:
        rig.close()
