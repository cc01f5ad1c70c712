"""A class is graded at the promised pace. It is run alone: the promise is for two idle cores."""

from __future__ import annotations

from classroom import hand_in

from llmcourse.grading.grade import grade
from llmcourse.grading.gradebook import Course
from llmcourse.labs.catalog import find_lab

SUBMISSIONS = 20
SECONDS_FOR_FORTY = 60


def test_twenty_submissions_take_no_more_than_their_share_of_a_minute_for_forty(tmp_path):
    lab = find_lab("01")
    for i in range(SUBMISSIONS):
        hand_in(tmp_path / "submissions", f"student{i:02d}")
    with Course(tmp_path / "course") as book:
        run = grade(tmp_path / "submissions", lab, book, workers=2)
    assert {row.points for row in run.rows} == {float(lab.points)}
    assert run.seconds <= SECONDS_FOR_FORTY * SUBMISSIONS / 40
