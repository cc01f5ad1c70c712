"""Explorables: pictures that follow a control, by mouse and by keyboard."""

from llmcourse.widgets.explorable import Explorable, png

__all__ = ["Explorable", "png"]
