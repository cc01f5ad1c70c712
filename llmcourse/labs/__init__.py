"""The graded labs: which there are, and what a lab's notebook talks to.

    from llmcourse.labs import open_lab

    lab = open_lab("01")
    check, hint = lab.check, lab.hint

A lab's exercises live in a package of their own, `labNN_topic`, one file each. Where submissions are
graded those packages are out of sight; `open_lab` then gives a lab that lets every cell run and judges
nothing, since the judge is another process.
"""

from llmcourse.labs.catalog import LABS, Lab, find_lab
from llmcourse.labs.desk import Desk, open_lab

__all__ = ["LABS", "Desk", "Lab", "find_lab", "open_lab"]
