from cluster.telemetry import Records


def test_a_replayed_step_replaces_its_first_run() -> None:
    records = Records()
    records.put([{"step": 1.0, "loss": 5.0}, {"step": 2.0, "loss": 4.0}])
    change, rows = records.since(0)
    assert [row["loss"] for row in rows] == [5.0, 4.0]
    assert records.since(change) == (change, [])
    records.put([{"step": 2.0, "loss": 4.5}])
    _, rows = records.since(change)
    assert rows == [{"step": 2.0, "loss": 4.5}]
    assert [row["loss"] for row in records.since(0)[1]] == [5.0, 4.5]
