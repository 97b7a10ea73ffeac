"""Automations of a deployment: call a URL when a run ends or waits for a person, or when none has ended for days."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from uuid import UUID

from prefect.automations import AutomationCore
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture

from draftsmith.artifacts.errors import DraftsmithError

_LOST = "its host or its process sends nothing more"
_MISSED = 4  # heartbeats in a row, then a run is taken for crashed
# Our own events say what a run came to: the states' events wait for those before them, which a schedule's runs lack.
_OURS = {f"draftsmith.{outcome}" for outcome in ("promoted", "refused", "inconclusive")}
_CALLED = {f"prefect.flow-run.{state}" for state in ("Failed", "TimedOut", "Crashed", "Suspended")} | _OURS
_ENDED = {"draftsmith.current", "prefect.flow-run.Completed", "prefect.flow-run.Suspended"} | _OURS
# JSON whatever the message holds. The run may be in another state by now: the event says which one it came to.
_PAYLOAD = """{"cause": {{ event.event.split(".")[-1] | lower | tojson }}, "deployment": {{ deployment.name | tojson }},
 "flow_run": {{ flow_run.name | tojson }},
 "message": {{ (event.payload.message or event.payload.get("validated_state", {}).message or "") | tojson }},
 "url": {{ flow_run | ui_url | tojson }}}"""


def check_address(url: str) -> None:
    """Raise DraftsmithError for what nothing could be sent to."""
    if not re.match(r"https?://[^/\s]", url):
        raise DraftsmithError(
            f"--webhook {url!r}: an address begins with https:// or http:// and a host, such as "
            "https://hooks.example/draftsmith"
        )


def has_webhook(client: SyncPrefectClient, name: str) -> bool:
    """Return whether `call_webhook` was called for the deployment of this name."""
    return bool(client.read_automations_by_name(f"{name}: webhook"))


def call_webhook(
    client: SyncPrefectClient, url: str, deployment: UUID, name: str, *, heartbeat_s: float, silent_days: float | None
) -> None:
    """Create or change the automations of a deployment. The URL is kept in a block, encrypted.

    silent_days: the URL is called too when no run has ended for so long. A run that sends no heartbeats is called
    crashed, as its host or its process is gone.
    """
    block = Webhook.model_validate({"url": url, "headers": {"Content-Type": "application/json"}})
    document = block.save(f"draftsmith-{deployment}", overwrite=True)
    assert isinstance(document, UUID)
    related: dict[str, str | list[str]] = {
        "prefect.resource.role": "deployment",
        "prefect.resource.id": f"prefect.deployment.{deployment}",
    }
    wanted = [
        AutomationCore(
            name=f"{name}: webhook",
            description=f"Calls the webhook of deployment {name}.",
            trigger=EventTrigger(
                expect=_CALLED, match_related=related, posture=Posture.Reactive, threshold=1, within=timedelta(0)
            ),
            actions=[CallWebhook(block_document_id=document, payload=_PAYLOAD)],
        ),
        AutomationCore(
            name=f"{name}: lost",
            description="A run that sends no heartbeat has crashed: its host or its process is gone.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.*"},
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related=related,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=_MISSED * heartbeat_s),
            ),
            actions=[ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message=_LOST, force=False)],
        ),
    ]
    if silent_days is not None:
        message = f"no run has ended for {silent_days:g} days"
        payload = json.dumps({"cause": "silent", "deployment": name, "message": message})
        wanted.append(
            AutomationCore(
                name=f"{name}: silent",
                description=f"Calls the webhook of deployment {name} when no run has ended for {silent_days:g} days.",
                trigger=EventTrigger(
                    expect=_ENDED,
                    match_related=related,
                    posture=Posture.Proactive,
                    threshold=1,
                    within=timedelta(days=silent_days),
                ),
                actions=[CallWebhook(block_document_id=document, payload=payload)],
            )
        )
    for automation in wanted:
        known = client.read_automations_by_name(automation.name)
        if known:
            client.update_automation(known[0].id, automation)
        else:
            client.create_automation(automation)
