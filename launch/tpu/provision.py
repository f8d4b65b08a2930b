"""Install the code and the same environment on every worker."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from launch.tpu import gcloud, preflight
from launch.tpu import worker_commands as commands
from launch.tpu.clock import Clock, elapsed
from launch.tpu.cloud_tpu import refuse
from launch.tpu.exit_codes import Agent, Exit, Stop
from launch.tpu.journal import Journal
from launch.tpu.plan import Plan
from launch.tpu.transport import Workers, last_error, on_all

SHOWN = 15  # last lines of a failed worker's output to print


@dataclass
class Provisioner:
    """Prepares `workers`. `check` raises Gone if their machine is gone; `pause` waits."""

    plan: Plan
    workers: Workers
    clock: Clock
    journal: Journal
    check: Callable[[], None]
    pause: Callable[[float], None]

    def upload(self) -> None:
        """Copy the code and the agent to every worker. Raises Gone or Stop.

        The first SSH connection updates the node's metadata, and concurrent updates conflict:
        worker 0 goes first.
        """
        self.retry_on_all("reach", [0], self._upload)
        self.retry_on_all("reach", range(1, self.workers.count), self._upload)

    def _upload(self, worker: int) -> gcloud.Result:
        code, agent = self.plan.code, commands.AGENT.read_bytes()
        result = self.workers.shell(worker, commands.probe(code.sha), b"", 90)
        if result.code == 0 and b"have" not in result.out:
            line = commands.receive(f"{code.sha}.tgz", code.data)
            result = self.workers.shell(worker, line, code.data, 600)
        return result if result.code else self.workers.shell(worker, commands.install(), agent, 60)

    def retry_on_all(self, what: str, workers, call, tries: int = 4) -> dict[int, gcloud.Result]:
        """Call all workers, retrying on failure. Raises Gone, or Stop with a worker's error."""
        left = list(workers)
        results: dict[int, gcloud.Result] = {}
        for number in range(tries):
            results |= on_all(left, call)
            left = [worker for worker in left if results[worker].code]
            if not left:
                return results
            codes = {results[worker].code for worker in left}
            for worker in left:
                code, error = results[worker].code, results[worker].err[-4000:]
                self.journal.write(what, worker=worker, code=code, error=error)
            self.check()
            if codes & {Agent.SETUP_FAILED, Agent.DISK_FULL} and number:
                break
            limited = any(re.search(gcloud.RATE_LIMIT, results[w].err, re.I) for w in left)
            self.pause(60 if limited else 10 * (number + 1))  # limits are per minute
        worker = left[0]
        for printed in results[worker].err.strip().splitlines()[-SHOWN:]:
            self.journal.print_log(worker, printed)
        line = f"{what}: [w{worker:02}] {last_error(results[worker].err)}"
        if results[worker].code in (Agent.DAMAGED, Agent.SETUP_FAILED, Agent.DISK_FULL):
            raise Stop(Exit.SETUP_FAILED, line)
        refusal = gcloud.error(results[worker].err)
        if refusal.kind in ("agent", "auth", "permission", "key"):
            raise refuse(refusal)
        raise Stop(Exit.INFRASTRUCTURE, line)

    def prepare(self) -> None:
        """Prepare every worker for a start. Raises Stop."""
        if self.plan.show:
            self.prepare_workers()
            self.check_config()
            if not self.plan.setup:
                return
        self.prepare_workers()

    def check_config(self) -> None:
        """Check the config on worker 0, as this machine could not, and find out its data.

        Raises Stop as `preflight` would have.
        """
        resolved, line = None, commands.show(self.plan)
        for _ in range(3):
            result = self.workers.shell(0, line, b"", 300)
            out = result.out.decode(errors="replace")
            resolved = preflight.parse_show(result.code, out, result.err)
            if resolved:
                break
            self.check()
            self.pause(10)
        if not resolved:
            raise Stop(Exit.SETUP_FAILED, f"cannot check config: [w00] {last_error(result.err)}")
        downloads = preflight.check_data(resolved, local=self.plan.target != "vm")
        self.plan.setup = " && ".join([self.plan.setup] * bool(self.plan.setup) + downloads)
        self.plan.show = []
        self.journal.say("prepare", "worker 0 checked the config")

    def prepare_workers(self) -> None:
        """Install one environment on every worker. Raises Stop with the outlier's name."""
        count, began = self.workers.count, self.clock.now()
        line = commands.prepare(self.plan)

        def call(worker):
            return self.workers.shell(worker, line, b"", 1800)

        prints = self.fingerprints(self.retry_on_all("prepare", range(count), call, tries=3))
        if outlier := self.outlier(prints):
            self.journal.say("prepare", f"[w{outlier[0]:02}] differs, retrying: {outlier[1]}")
            prints |= self.fingerprints(self.retry_on_all("prepare", [outlier[0]], call, tries=2))
            if outlier := self.outlier(prints):
                raise Stop(Exit.SETUP_FAILED, f"[w{outlier[0]:02}] differs again: {outlier[1]}")
        names = [name for name in ("python", "jax", "libtpu") if name in prints[0]]
        shown = ", ".join(f"{name} {prints[0][name]}" for name in names)
        took = elapsed(self.clock.now() - began)
        self.journal.say("prepare", f"{count}/{count} workers equal: {shown} ({took})")

    def fingerprints(self, results: dict[int, gcloud.Result]) -> dict[int, dict]:
        prints = {}
        for worker, result in results.items():
            _, marked, text = result.out.decode(errors="replace").partition("#FINGERPRINT ")
            if not marked:
                line = f"prepare: [w{worker:02}] no fingerprint: {last_error(result.err)}"
                raise Stop(Exit.SETUP_FAILED, line)
            prints[worker] = json.loads(text.splitlines()[0])
        return prints

    def outlier(self, prints: dict[int, dict]) -> tuple[int, str] | None:
        """Return the first worker that differs from most, and how; None if all are equal."""
        texts = [json.dumps(fingerprint, sort_keys=True) for fingerprint in prints.values()]
        usual = json.loads(max(texts, key=texts.count))
        for worker, own in sorted(prints.items()):
            differs = [key for key in usual if usual[key] != own.get(key)]
            if differs:
                return worker, ", ".join(f"{k} {own.get(k)} not {usual[k]}" for k in differs)
        return None
