"""The README says what there is."""

from tests import family_table


def test_the_table_of_families_is_up_to_date():
    assert family_table.section() in family_table.README.read_text(), "run: python -m tests.family_table"
