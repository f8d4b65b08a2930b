"""The verb profile: every worker traces its next ten steps; the traces are fetched, or named."""

import argparse
import os
import pathlib
import shlex

from launch.tpu import agent_status, gcloud
from launch.tpu.attempt import last_error
from launch.tpu.exit_codes import Exit, Stop
from launch.tpu.run_registry import RegisteredRun
from launch.tpu.transport import on_all

LIMIT = 600  # seconds for ten steps and for writing their trace


def profile(args: argparse.Namespace) -> int:
    """Print where the traces are. Raises Stop if a worker does not train or writes none."""
    run = RegisteredRun(args)
    workers = run.workers()

    def trace(worker: int) -> str:
        """Return the path of the worker's trace, on the worker or in a bucket."""
        result = workers.agent(worker, "profile", run.id, number, limit=LIMIT)
        if result.code:
            raise Stop(Exit.INFRASTRUCTURE, f"[w{worker:02}] no trace: {last_error(result.err)}")
        return result.out.decode().strip()

    answers = on_all(range(workers.count), lambda i: workers.agent(i, "status", run.id, "last"))
    for worker, reply in enumerate(map(agent_status.parse, answers.values())):
        if reply is None or reply.state != "running":
            raise Stop(Exit.REFUSED, f"[w{worker:02}] does not train, or does not answer")
        number = reply.attempt
    for worker, path in on_all(range(workers.count), trace).items():
        folder = path
        if run.cloud and not path.startswith("gs://"):
            folder = f"{run.folder}/profile/plugins/profile/{pathlib.PurePath(path).name}"
            result = workers.shell(worker, f"tar -cz -C {shlex.quote(path)} .", b"", LIMIT)
            os.makedirs(folder, exist_ok=True)
            if result.code or gcloud.run(["tar", "-xzC", folder], result.out).code:
                raise Stop(Exit.INFRASTRUCTURE, f"[w{worker:02}] {path} was not fetched")
    print(f"{folder}; to open it: xprof --logdir {shlex.quote(folder.partition('/plugins/')[0])}")
    return Exit.DONE
