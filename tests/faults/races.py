"""Two concurrent refreshes in one home."""

from __future__ import annotations

from tests.faults.scene import Play, Scene, must

_OTHER = ("--set", "opd.steps=8")


def same_config(scene: Scene) -> None:
    """Check that each node is made by one of them, and that both end well."""
    one = scene.start()
    scene.pause(scene.chance.uniform(0, 5))
    other = scene.home.start(*scene.arguments, output="other")
    ended = [running.wait() for running in (one, other)]
    for each in ended:
        scene.check_end(each, [0])
    made = [node for each in ended for node in each.nodes("started")]
    must(len(made) == len(set(made)), f"{sorted(made)}: made by both")
    scene.finished(scene.refresh())


def different_configs(scene: Scene) -> None:
    """Check that they share what both need, and that the other's OPD equals one made without the first."""
    one = scene.start()
    scene.pause(scene.chance.uniform(0, 5))
    other = scene.home.start(*scene.arguments, *_OTHER, output="other")
    ended = [running.wait() for running in (one, other)]
    for each in ended:
        scene.check_end(each, [0])
    before = scene.home.content_ids()
    alone = scene.refresh(*_OTHER, "--force", "opd")
    must(alone.code == 0, f"alone it ended with {alone.code}: {alone.message}")
    must(scene.home.content_ids() == before, "made alone, the other's OPD has another content")
    litter = scene.home.litter()
    must(not litter, f"{litter[:1]}: made alone, the other's OPD has another content")
    again = scene.refresh()
    must(again.code == 0 and not again.nodes("started"), f"{again.nodes('started')}: finished work was repeated")
    scene.nothing_left()
    for artifact, content in scene.undisturbed.content_ids.items():
        must(before.get(artifact, content) == content, f"{artifact} has another content")


FAULTS: dict[str, Play] = {
    "two refreshes of one config": same_config,
    "two different refreshes": different_configs,
}
