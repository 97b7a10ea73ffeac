"""Automations of a deployment: a URL is called when a run fails, crashes, promotes, is refused or is inconclusive."""

from __future__ import annotations

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
CAUSES = {
    "failed": {"prefect.flow-run.Failed", "prefect.flow-run.TimedOut"},
    "crashed": {"prefect.flow-run.Crashed"},
    "promoted": {"draftsmith.promoted"},
    "refused": {"draftsmith.refused"},
    "inconclusive": {"draftsmith.inconclusive"},
}
# JSON whatever the message holds. An event of our own says why itself, that of a state by the state's message.
_PAYLOAD = """{"cause": "%s", "deployment": {{ deployment.name | tojson }}, "flow_run": {{ flow_run.name | tojson }},
 "message": {{ (event.payload.message or flow_run.state.message) | tojson }},
 "url": {{ flow_run | ui_url | tojson }}}"""


def check_address(url: str) -> None:
    """Raises DraftsmithError for what nothing could be sent to."""
    if not re.match(r"https?://[^/\s]", url):
        raise DraftsmithError(
            f"--webhook {url!r}: an address begins with https:// or http:// and a host, such as "
            "https://hooks.example/draftsmith"
        )


def has_webhook(client: SyncPrefectClient, name: str) -> bool:
    """Whether `call_webhook` was called for the deployment of this name."""
    return bool(client.read_automations_by_name(_name(name, next(iter(CAUSES)))))


def call_webhook(client: SyncPrefectClient, url: str, deployment: UUID, name: str, *, heartbeat_s: float) -> None:
    """One automation a cause, and one that calls a run crashed whose host no longer sends heartbeats. The URL is kept
    in a block, encrypted. Calling it again changes them."""
    block = Webhook.model_validate({"url": url, "headers": {"Content-Type": "application/json"}})
    document = block.save(f"draftsmith-{deployment}", overwrite=True)
    assert isinstance(document, UUID)
    related: dict[str, str | list[str]] = {
        "prefect.resource.role": "deployment",
        "prefect.resource.id": f"prefect.deployment.{deployment}",
    }
    wanted = [
        AutomationCore(
            name=_name(name, cause),
            description=f"Calls the webhook of deployment {name}.",
            trigger=EventTrigger(
                expect=events, match_related=related, posture=Posture.Reactive, threshold=1, within=timedelta(0)
            ),
            actions=[CallWebhook(block_document_id=document, payload=_PAYLOAD % cause)],
        )
        for cause, events in CAUSES.items()
    ]
    wanted.append(
        AutomationCore(
            name=_name(name, "lost"),
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
        )
    )
    for automation in wanted:
        known = client.read_automations_by_name(automation.name)
        if known:
            client.update_automation(known[0].id, automation)
        else:
            client.create_automation(automation)


def _name(deployment: str, cause: str) -> str:
    """Of an automation."""
    return f"{deployment}: {cause}"
