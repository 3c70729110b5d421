"""The doctor before a run: what must be cured is refused, with the cure, before a worker starts."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import doctor
from cluster.errors import ClusterError
from cluster.findings import Node
from cluster.session import Session
from cluster.storage import Store
from pipelines import pretrain
from tests.hunting import tiny

HEAD = Node("10.0.0.1", {"Python": "3.11.7", "torch": "2.13.0"})
GPUS = Node("10.0.0.2", {**HEAD.versions, "driver": "570.1"})
TWO = Session(False, "", 8, 0, ("one", "other"))


def examined(monkeypatch: pytest.MonkeyPatch, *nodes: Node) -> list[Sequence[Node]]:
    """A cluster whose nodes say this; gives what they were asked for."""
    asked: list[Sequence[Node]] = []

    class Nodes:
        def quick(self) -> Sequence[Node]:
            asked.append(nodes)
            return nodes

    monkeypatch.setattr(doctor, "Nodes", Nodes)
    return asked


def test_a_sound_cluster_may_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = examined(monkeypatch, HEAD, GPUS)
    doctor.before(TWO)
    assert len(asked) == 1
    doctor.before(replace(TWO, nodes=("one",)))  # which has nobody to differ from
    assert len(asked) == 1


def test_pretrain_refuses_what_would_break_it_in_its_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("nothing is begun")

    other = replace(GPUS, versions={**GPUS.versions, "torch": "2.12.0"})
    examined(monkeypatch, HEAD, other)
    monkeypatch.setattr(pretrain, "session", lambda config: nullcontext(TWO))
    monkeypatch.setattr(pretrain, "_fit", never)
    job: Any = None  # which comes into play only later
    with pytest.raises(ClusterError) as caught:
        pretrain.launch(job, tiny(tmp_path), Store(str(tmp_path)))
    assert "torch is 2.12.0 on 10.0.0.2, 2.13.0 on 10.0.0.1" in str(caught.value)
    assert "give all nodes one image or the same set-up commands" in str(caught.value)
    full = replace(GPUS, disk_free=1 << 30, disk_total=100 << 30)
    examined(monkeypatch, HEAD, full)
    with pytest.raises(ClusterError, match=r"disk: 10.0.0.2 has 1.0 GiB free .*free some"):
        pretrain.launch(job, tiny(tmp_path), Store(str(tmp_path)))
