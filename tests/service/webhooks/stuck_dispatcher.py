"""Run a process that leases a webhook and then hangs before it sends anything, to be killed.

`python -m tests.service.webhooks.stuck_dispatcher LEASE_S`, with the service's environment; prints
"leased" once it holds a lease.
"""

import asyncio
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace

from jobs.store.webhook_outbox import Outbox
from service.app import create_app
from service.maintenance.tasks import delivery_context
from service.settings import ServiceSettings
from service.webhooks.delivery import Deliveries
from service.webhooks.dispatcher import Dispatcher
from service.webhooks.sender import Sender, tls_context


async def hang(host: str, port: int) -> Sequence[str]:
    """A resolver that never returns. It is called after the lease was taken."""
    sys.stdout.write("leased\n")
    sys.stdout.flush()
    await asyncio.Event().wait()
    return []


def main() -> None:
    app_state = create_app(ServiceSettings()).state.app_state
    outbox = Outbox(app_state.redis, lease_s=float(sys.argv[1]))
    sender = Sender(tls_context(), private=True, resolve=hang)
    stuck = replace(delivery_context(app_state), outbox=outbox, sender=sender)
    Dispatcher(outbox, Deliveries(stuck).deliver).run(threading.Event())


if __name__ == "__main__":
    main()
