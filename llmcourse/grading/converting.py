"""nbgrader's converters, run in this process: configured here, quiet, and with errors that say what to do.

nbgrader turns notebooks into notebooks in steps, each step a list of preprocessors. Two steps are used:

    generate_assignment    solutions/LAB  →  labs/LAB          solutions and hidden tests cut out
    autograde              judged/STUDENT/LAB  →  autograded/STUDENT/LAB, and marks in the gradebook

Nothing is configured by files: what an instructor has in a home folder changes neither step.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmcourse.errors import MissingPackageError, NotebookError
from llmcourse.vgpu import unwritten

SOURCE, RELEASE, JUDGED, MARKED = "solutions", "labs", "judged", "autograded"
COURSE_ID = "llmcourse"

NOT_YET = unwritten.NOT_YET
CODE_STUB = f'# YOUR CODE HERE\nraise NotImplementedError("{NOT_YET}")'
CUDA_STUB = unwritten.STUB
TEXT_STUB = "*Your answer here.*"


def require() -> None:
    """Raise MissingPackageError where nbgrader is not installed."""
    try:
        import nbgrader  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"labs cannot be built or graded here: {error}.",
            "The release of labs, the gradebook and manual marks are nbgrader's.",
            "pip install -c constraints.txt -e '.[grade]' in the course's folder.",
        ) from error


def configuration(root: Path, db_url: str | None = None) -> Any:
    """nbgrader's configuration for a course in the folder `root`; without a URL there is no gradebook."""
    require()
    from traitlets.config import Config

    config = Config()
    config.CourseDirectory.root = str(root)
    config.CourseDirectory.course_id = COURSE_ID
    config.CourseDirectory.source_directory = SOURCE
    config.CourseDirectory.release_directory = RELEASE
    config.CourseDirectory.submitted_directory = JUDGED
    config.CourseDirectory.autograded_directory = MARKED
    config.ClearSolutions.code_stub = {"python": CODE_STUB, "cuda": CUDA_STUB}
    config.ClearSolutions.text_stub = TEXT_STUB
    if db_url is None:
        config.SaveCells.enabled = False
        config.GenerateAssignment.no_database = True
    else:
        config.CourseDirectory.db_url = db_url
    return config


def generate(config: Any, lab: str) -> None:
    """Write the students' version of `lab`; with a gradebook, register its cells and points there.

    Raises NotebookError with what nbgrader has to say about the source.
    """
    from nbgrader.converters import GenerateAssignment
    from nbgrader.coursedir import CourseDirectory

    from llmcourse.grading.stubs import with_stubs

    course = CourseDirectory(config=config)
    course.assignment_id = lab
    converter = GenerateAssignment(coursedir=course, config=config)
    converter.force = True
    converter.preprocessors = with_stubs(converter.preprocessors)
    run(converter, f"the students' version of {lab} cannot be made", "mending its notebook in solutions/.")


def run(converter: Any, what: str, fix: str) -> None:
    """Start a converter. Raises NotebookError with `what`, the reason and `fix` where it fails."""
    with quiet() as said:
        try:
            converter.start()
            return
        except Exception as error:  # nbgrader wraps what went wrong and logs the reason
            reason = f"{type(error).__name__}: {error}"
    # Its log ends with a traceback, whose last line says what is wrong with the notebook.
    last = [line for text in said for line in text.splitlines() if line and not line.startswith(" ")]
    told = [line for line in last if "Error" in line or "Exception" in line] or [reason]
    raise NotebookError(f"{what}.", f"nbgrader says: {told[-1][:300]}", fix)


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Collect nbgrader's log in place of printing it, and silence SQLAlchemy's warnings about its queries."""
    from traitlets import log

    logger: Any = log.get_logger()
    said: list[str] = []
    handler = _Collect(said)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


@contextmanager
def one_engine(engine: Any) -> Iterator[None]:
    """Let nbgrader use this SQLAlchemy engine, and leave its connection open.

    It opens its database seven times for a submission, with an engine each time, and each of them
    translates every query to SQL anew. With one engine an entry takes half as long.
    """
    from nbgrader import api

    create, dispose = api.create_engine, engine.dispose
    api.create_engine = lambda *args, **options: engine
    engine.dispose = lambda *args, **options: None
    try:
        yield
    finally:
        api.create_engine, engine.dispose = create, dispose


class _Collect(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
