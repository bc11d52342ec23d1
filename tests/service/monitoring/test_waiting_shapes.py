"""Test what operators' looks at the queues remember of one another."""

from service.monitoring.fleet_details import Shape, WaitingShapes

SHAPE = Shape("wan", "bf16", "64x64", 5, True)


def test_a_shape_is_read_once() -> None:
    shapes = WaitingShapes()
    assert shapes.unknown(["a", "b"]) == ["a", "b"]
    # A record of another form has no shape, and will not get one.
    assert shapes.of(["a", "b"], {"a": SHAPE, "b": None}) == {"a": SHAPE, "b": None}
    assert shapes.unknown(["a", "b", "c"]) == ["c"]
    assert shapes.of(["a"], {}) == {"a": SHAPE}
    assert shapes.unknown(["a", "b"]) == ["b"], "it waits no more"


def test_what_another_thread_has_forgotten_is_read_again() -> None:
    shapes = WaitingShapes()
    shapes.of(["a", "b"], {"a": SHAPE, "b": SHAPE})
    assert shapes.unknown(["a", "b"]) == []
    shapes.of(["b"], {})  # another look, which has seen `a` taken
    assert shapes.of(["a", "b"], {}) == {"b": SHAPE}
    assert shapes.unknown(["a", "b"]) == ["a"]
