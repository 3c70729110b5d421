"""Prose of two scripts, and what a step of `data.cleaning` makes of it."""

import uuid
from pathlib import Path
from typing import Any

from cluster.config import TextData
from cluster.config.cleaning import parse
from pipelines.data import cleaning
from pipelines.data.cleaning import Document, Drop

# A line per sentence, and a line of Chinese for each of English.
ENGLISH = """\
The mirror follows the sun through the day and throws its light at one point on a tower.
Engineers have built fields of ten thousand such mirrors in deserts where the sky is clear.
Salt that flows through the tower is heated until it glows, and it keeps the heat for the night.
A turbine turns that heat to power when people come home, cook, and switch on their lamps.
It costs more than panels do, but what it gives can be had at midnight with no battery.
"""
CHINESE = """\
定日镜整天跟随太阳转动，把阳光反射到高塔顶端的同一个点上。
工程师在天空晴朗的沙漠里建造了由上万面这样的镜子组成的镜场。
流过高塔的熔盐被加热到发光的程度，并且能够把热量一直保存到深夜。
当人们回到家里做饭、打开电灯的时候，汽轮机就把这些热量变成电力。
它的成本比光伏板要高，但是不用任何电池就可以在半夜里提供能量。
"""


def made(step: Any, document: Document) -> str | Drop:
    data = TextData(sources=("x",), min_characters=0, cleaning=(parse(step),))
    return cleaning.clean(document, cleaning.rules(data))


def doc(text: str, extension: str = "", cells: dict[str, str] | None = None) -> Document:
    return Document(text, f"a{extension}", None, extension, cells)


def no_secrets(text: str) -> Drop | None:
    """A rule of a user's own, for workers to import."""
    return Drop("secret") if "机密" in text else None


def noted(text: str) -> None:
    """A rule of cleaning that keeps every document, and leaves a file in the folder that its first
    line names."""
    (Path(text.splitlines()[0]) / uuid.uuid4().hex).touch()
