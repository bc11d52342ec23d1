"""Test that the receiver in docs/webhooks.md does what the page says."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from deploy.local.waiting import wait_until
from jobs.store.webhook_outbox import WebhookState
from service.webhooks.delivery import DeliveryContext, Schedule
from service.webhooks.message import Signer
from service.webhooks.url_rules import HostRule
from tests.service.webhooks.conftest import HOST, SECRET, MakeEnded, Status, delivering

PAGE = Path(__file__).resolve().parents[3] / "docs" / "webhooks.md"


def test_the_example_receives(
    delivery_context: DeliveryContext,
    make_ended: MakeEnded,
    status: Status,
    unused_port: int,
    tmp_path: Path,
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "receiver.py").write_text(example)
    rules = replace(delivery_context.rules, hosts=(HostRule(HOST, port=unused_port),))
    # The receiver may not listen yet at the first call, so the pauses are short and many.
    delivery_context = replace(
        delivery_context, rules=rules, schedule=Schedule(pauses_s=(0.2,) * 100)
    )
    forger = replace(delivery_context, signer=Signer(["whsec_" + "Zm9yZ2Vy" * 5]))
    with subprocess.Popen(
        [sys.executable, "receiver.py", str(unused_port)],
        cwd=tmp_path,
        env={**os.environ, "WEBHOOK_SECRET": SECRET},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as example_process:
        try:
            job = make_ended(f"http://{HOST}:{unused_port}/wan")
            with delivering(forger):
                wait_until(lambda: status(job).last_status == 401)
            with delivering(delivery_context):
                wait_until(lambda: status(job).state is WebhookState.DELIVERED)
        finally:
            example_process.terminate()
        assert example_process.stdout is not None
        assert example_process.stdout.read() == f"job.cancelled {job.id} None\n"
