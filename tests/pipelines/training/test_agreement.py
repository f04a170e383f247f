"""When the workers of a run agree to save: by the clock of the first one, and at notices."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.training.agreement import NOTICE, TIME, Decision, SaveAgreement


@dataclass
class Notice:
    deadline_ms: int | None
    preempted_node_ids: list[str]


class Workers:
    """Workers whose steps take a constant time. The clocks of all but the first are far off."""

    def __init__(self, step_s: float, every_s: float | None = None, number: int = 3) -> None:
        self.now, self.step_s, self.step = 1000.0, step_s, 0
        self.notice: Notice | None = None
        self.questions: list[int] = []
        self._from_first: Decision | None = None
        self.agreements = [
            SaveAgreement(0, every_s, self._read, self._broadcast, lambda rank=rank: self.now + 1e5 * rank)
            for rank in range(number)
        ]

    def _read(self) -> Notice | None:
        return self.notice

    def _broadcast(self, decision: Decision) -> Decision:
        self._from_first = self._from_first or decision
        return self._from_first

    def take(self, seconds: float, save_s: float | None = None) -> list[tuple[int, str]]:
        """Train for so long; return (step, reason) of each checkpoint."""
        saved: list[tuple[int, str]] = []
        for _ in range(round(seconds / self.step_s)):
            self.step += 1
            self.now += self.step_s
            self._from_first = None
            answers = {agreement.ask(self.step) for agreement in self.agreements}
            assert len(answers) == 1, "the workers disagree"
            if self._from_first is not None:
                self.questions.append(self.step)
            if reason := answers.pop():
                saved.append((self.step, reason))
                for agreement in self.agreements:
                    agreement.saved(save_s)
        return saved


def test_checkpoints_come_by_the_clock_of_the_first_worker() -> None:
    saved = Workers(step_s=0.5, every_s=60).take(200)
    assert [reason for _, reason in saved] == [TIME] * 3
    for before, after in zip([0, *(step for step, _ in saved)], [step for step, _ in saved], strict=False):
        assert 120 <= after - before <= 125  # asked every two seconds


def test_no_clock_no_checkpoint() -> None:
    assert Workers(step_s=1.0, every_s=None).take(10_000) == []


def test_the_question_comes_every_two_seconds_however_long_a_step_takes() -> None:
    """All workers wait for each other when it is asked."""
    fast, slow = Workers(step_s=0.01), Workers(step_s=30.0)
    fast.take(60)
    assert 25 <= len(fast.questions) <= 33
    slow.take(300)
    assert slow.questions == list(range(1, 11))


def test_a_notice_leads_to_a_checkpoint_within_two_seconds_and_to_a_last_one_before_the_end() -> None:
    workers = Workers(step_s=0.5)
    assert workers.take(10) == []
    workers.notice = Notice(int((workers.now + 120) * 1000), ["a"])
    first, last = workers.take(120, save_s=5.0)
    assert first[1] == last[1] == NOTICE
    assert first[0] - 20 <= 5
    left_s = 130 - last[0] * 0.5
    assert 3 * 5.0 <= left_s <= 3 * 5.0 + 5, "three times the seconds of a checkpoint, and the question's"


def test_a_notice_without_a_deadline_leads_to_one_checkpoint() -> None:
    workers = Workers(step_s=1.0)
    workers.notice = Notice(None, ["a"])
    assert len(workers.take(300)) == 1


def test_another_node_is_another_notice() -> None:
    workers = Workers(step_s=1.0)
    workers.notice = Notice(None, ["a"])
    workers.take(30)
    workers.notice = Notice(None, ["a", "b"])
    assert len(workers.take(30)) == 1


def test_a_notice_that_comes_late_leads_to_one_checkpoint() -> None:
    workers = Workers(step_s=0.5)
    workers.notice = Notice(int((workers.now + 5) * 1000), ["a"])
    assert len(workers.take(10, save_s=1.0)) == 1
