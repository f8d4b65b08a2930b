"""The code and one environment on every worker, the same on all."""

import json
from collections.abc import Callable

from launch.tpu import clock as clocks
from launch.tpu import gcloud, preflight, worker_commands
from launch.tpu.attempt import last_error_line
from launch.tpu.clock import Clock
from launch.tpu.cloud_tpu import refuse
from launch.tpu.exit_codes import (
    AGENT_DAMAGED,
    AGENT_DISK_FULL,
    AGENT_SETUP,
    INFRASTRUCTURE,
    SETUP,
    Stop,
)
from launch.tpu.journal import Journal
from launch.tpu.plan import Plan
from launch.tpu.transport import Workers, on_all

SHOWN = 15  # last lines of what a worker says that can't be prepared


class Provisioner:
    """Of `workers`. `check` raises Gone where their machine is no more; `pause` waits."""

    def __init__(
        self,
        plan: Plan,
        workers: Workers,
        clock: Clock,
        journal: Journal,
        check: Callable[[], None],
        pause: Callable[[float], None],
    ):
        self.plan, self.workers, self.clock, self.journal = plan, workers, clock, journal
        self.check, self.pause = check, pause

    def reach(self) -> None:
        """The code and the agent are on every worker. Raises Gone or Stop.

        The first connection of all changes the node's metadata, and two at once get in each other's
        way: worker 0 comes first.
        """
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        file = worker_commands.code_file(self.plan)
        if not file.exists():
            for old in self.plan.folder.glob("*.tgz"):
                old.unlink()
            partial = file.with_suffix(".part")
            partial.write_bytes(self.plan.code.data)
            partial.replace(file)
        self.retry_on_all("reach", [0], self._reach)
        self.retry_on_all("reach", range(1, self.workers.count), self._reach)

    def _reach(self, worker: int) -> gcloud.Result:
        result = self.workers.shell(worker, worker_commands.prime(self.plan.code.sha), b"", 90)
        if result.code:
            return result
        files = [str(worker_commands.AGENT)]
        if b"have" not in result.out:
            files.append(str(worker_commands.code_file(self.plan)))
        result = self.workers.copy(worker, files, worker_commands.INCOMING, 600)
        return (
            result
            if result.code
            else self.workers.shell(worker, worker_commands.install(), b"", 60)
        )

    def retry_on_all(self, what: str, workers, call, tries: int = 4) -> dict[int, gcloud.Result]:
        """Have all do it, again where it fails. Raises Gone, or Stop with the worker's own line."""
        left = list(workers)
        results: dict[int, gcloud.Result] = {}
        for number in range(tries):
            results |= on_all(left, call)
            left = [worker for worker in left if results[worker].code]
            if not left:
                return results
            codes = {results[worker].code for worker in left}
            for worker in left:
                self.journal.write(
                    what,
                    worker=worker,
                    code=results[worker].code,
                    error=results[worker].err[-4000:],
                )
            self.check()
            if codes & {AGENT_SETUP, AGENT_DISK_FULL} and number:
                break
            self.pause(10 * (number + 1))
        worker = left[0]
        for said in results[worker].err.strip().splitlines()[-SHOWN:]:
            self.journal.print_log(worker, said)
        line = f"{what}: [w{worker:02}] {last_error_line(results[worker].err)}"
        if results[worker].code in (AGENT_DAMAGED, AGENT_SETUP, AGENT_DISK_FULL):
            raise Stop(SETUP, line)
        error = gcloud.error(results[worker].err)
        if error.kind in ("agent", "auth", "permission", "key"):
            raise refuse(error)
        raise Stop(INFRASTRUCTURE, line)

    def prepare(self) -> None:
        """All that is needed to start, on every worker. Raises Stop."""
        if self.plan.unchecked:
            self.prepare_workers()
            self.check_config()
            if not self.plan.setup:
                return
        self.prepare_workers()

    def check_config(self) -> None:
        """Worker 0 says what this machine could not: what the config comes to, and needs.

        Raises Stop for a mistake, as it would have been raised before there was a machine.
        """
        found, line = None, worker_commands.show(self.plan)
        for _ in range(3):
            result = self.workers.shell(0, line, b"", 300)
            found = preflight.read(result.code, result.out.decode(errors="replace"), result.err)
            if found:
                break
            self.check()
            self.pause(10)
        if not found:
            raise Stop(SETUP, f"the config can't be checked: [w00] {last_error_line(result.err)}")
        commands = preflight.check_data(found, local=self.plan.target != "vm")
        self.plan.setup = " && ".join([self.plan.setup] * bool(self.plan.setup) + commands)
        self.plan.unchecked = False
        self.journal.say("prepare", "worker 0 has checked the config")

    def prepare_workers(self) -> None:
        """One environment, the same on every worker. Raises Stop with the odd one's name."""
        count, began = self.workers.count, self.clock.now()
        line = worker_commands.prepare(self.plan)

        def call(worker):
            return self.workers.shell(worker, line, b"", 1800)

        prints = self.fingerprints(self.retry_on_all("prepare", range(count), call, tries=3))
        if outlier := self.outlier(prints):
            self.journal.say("prepare", f"[w{outlier[0]:02}] differs, once more: {outlier[1]}")
            prints |= self.fingerprints(self.retry_on_all("prepare", [outlier[0]], call, tries=2))
            if outlier := self.outlier(prints):
                raise Stop(SETUP, f"[w{outlier[0]:02}] differs from the others: {outlier[1]}")
        found = prints[0]
        shown = ", ".join(
            f"{key} {found[key]}" for key in ("python", "jax", "libtpu") if key in found
        )
        took = clocks.text(self.clock.now() - began)
        self.journal.say("prepare", f"{count}/{count} workers alike: {shown} ({took})")

    def fingerprints(self, results: dict[int, gcloud.Result]) -> dict[int, dict]:
        found = {}
        for worker, result in results.items():
            _, marked, text = result.out.decode(errors="replace").partition("#FINGERPRINT ")
            if not marked:
                raise Stop(
                    SETUP, f"prepare: [w{worker:02}] no fingerprint: {last_error_line(result.err)}"
                )
            found[worker] = json.loads(text.splitlines()[0])
        return found

    def outlier(self, prints: dict[int, dict]) -> tuple[int, str] | None:
        """The worker that is not like most, and in what."""
        texts = [json.dumps(found, sort_keys=True) for found in prints.values()]
        usual = json.loads(max(texts, key=texts.count))
        for worker, found in sorted(prints.items()):
            differs = [key for key in usual if usual[key] != found.get(key)]
            if differs:
                return worker, ", ".join(f"{k} {found.get(k)} not {usual[k]}" for k in differs)
        return None
