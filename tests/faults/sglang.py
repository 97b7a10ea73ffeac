"""A real SGLang server on the CPU that a rollout asks through a proxy which spoils its answers."""

from __future__ import annotations

from tests.faults.proxy import Mood, proxy
from tests.faults.scene import WORKING, Play, Scene, TooLate

_SPOILED_S = (0.5, 6.0)


def spoiled_a_while(mood: Mood) -> Play:
    """Spoil answers for a while, and check that the rollout sends those requests again and succeeds.

    The third answer to one request with tokens that the model lacks ends it: then a rerun must complete it.
    """

    def play(scene: Scene) -> None:
        between = proxy(scene.undisturbed.folder.parent)
        running = scene.start()
        try:
            scene.reach(running, [WORKING])
            spoiled, between.mood = between.spoiled, mood
            scene.pause(scene.chance.uniform(*_SPOILED_S))
            if running.process.poll() is not None and between.spoiled == spoiled:
                raise TooLate
        finally:
            between.mood = Mood.WELL
        ended = scene.check_end(running.wait(), [0, 2] if mood is Mood.WRONG else [0])
        if between.spoiled == spoiled:
            raise TooLate
        if ended.code == 0:
            scene.finished(ended)
        else:
            scene.nothing_left()
            scene.continues()

    return play


def lost(mood: Mood) -> Play:
    """Lose the server for good: the exit code is that of a retryable error, and finished answers are kept."""

    def play(scene: Scene) -> None:
        between = proxy(scene.undisturbed.folder.parent)
        running = scene.start("--set", "stages.retries=0")
        try:
            scene.reach(running, [WORKING])
            between.mood = mood
            ended = running.wait()
        finally:
            between.mood = Mood.WELL
        if ended.code == 0:
            raise TooLate
        scene.check_end(ended, [75], "SGLang", "request ")
        scene.nothing_left()
        scene.continues()

    return play


FAULTS: dict[str, Play] = {
    **{f"SGLang answers {m.value} a while": spoiled_a_while(m) for m in Mood if m not in (Mood.WELL, Mood.GONE)},
    "SGLang gone a while": spoiled_a_while(Mood.GONE),
    "SGLang gone for good": lost(Mood.GONE),
    "SGLang silent for good": lost(Mood.SILENT),
}
