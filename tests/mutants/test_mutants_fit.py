"""Test that every mutant can be tried: its file, its tests and its one line are there."""

from tests.mutants.run import LIST, ROOT, read_list


def test_every_mutant_has_its_place() -> None:
    found = {str(mutant): why for mutant in read_list(LIST) if (why := mutant.misfit(ROOT))}
    assert not found
